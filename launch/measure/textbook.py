"""A textbook version of LlamaGen's GPT on the same weights, for comparison with the kit's sampler.

It shares only the weights and the table of angles with the kit, and has two ways of drawing:
without a cache, and with a cache of keys and values that is appended to.

Shapes: R rows (conditional ones first), L inputs, P prefix, D width, H heads, K width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.models.blocks import rope_table
from t2i.models.conditions import Condition
from t2i.models.llamagen.llamagen_model import LlamaGen
from t2i.sampling import SamplingConfig

Past = list[tuple[Tensor, Tensor]]
"""Keys and values [R, H, L, K] of each layer."""


class Textbook:
    """Draws with a LlamaGen's weights."""

    def __init__(self, backbone: LlamaGen, condition: Condition, sampling: SamplingConfig):
        """`condition` holds all rows."""
        self.config, self.sampling = backbone.config, sampling
        self.weights = backbone.official_state_dict()
        self.prefix, self.mask = condition.prefix, condition.mask
        self.rope = rope_table(backbone.config).to(backbone.device)
        self.tokens = backbone.spec.num_tokens

    def _norm(self, x: Tensor, name: str) -> Tensor:
        x32 = x.float()
        unit = x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + self.config.norm_eps)
        return unit.type_as(x) * self.weights[name]

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys [R, L, H, K], rotated by the angles of their positions."""
        cos, sin = self.rope[start : start + x.shape[1], None].unbind(-1)
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)

    def _visible(self, length: int, start: int) -> Tensor | None:
        """Which entries the inputs may attend to, bool [R, 1, L, start + L]."""
        if self.mask is None:
            return None
        rows, prefix = self.mask.shape
        seen = self.mask.new_ones(rows, start + length)
        seen[:, :prefix] = self.mask
        index = torch.arange(start + length, device=seen.device)
        own = index[start:, None]
        return ((seen[:, None] & (index <= own)) | (index == own))[:, None]

    def _attend(self, x: Tensor, layer: int, past: Past | None, start: int) -> Tensor:
        heads = self.config.n_head
        qkv = F.linear(x, self.weights[f"layers.{layer}.attention.wqkv.weight"])
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (self._rotated(q, start), self._rotated(k, start), v))
        if past is not None:
            if start:
                k, v = (torch.cat(pair, 2) for pair in zip(past[layer], (k, v), strict=True))
            past[layer] = k, v
        mask = self._visible(x.shape[1], start)
        causal = mask is None and start == 0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        out = out.transpose(1, 2).flatten(2)
        return F.linear(out, self.weights[f"layers.{layer}.attention.wo.weight"])

    def logits(self, x: Tensor, past: Past | None = None, start: int = 0) -> Tensor:
        """Guided fp32 logits [B, V] after inputs [R, L, D], the first at position `start`."""
        for layer in range(self.config.n_layer):
            name = f"layers.{layer}"
            x = x + self._attend(self._norm(x, f"{name}.attention_norm.weight"), layer, past, start)
            h = self._norm(x, f"{name}.ffn_norm.weight")
            w1, w2, w3 = (self.weights[f"{name}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
            x = x + F.linear(F.silu(F.linear(h, w1)) * F.linear(h, w3), w2)
        h = self._norm(x[:, -1], "norm.weight")
        logits = F.linear(h, self.weights["output.weight"]).float()
        scale = self.sampling.cfg_scale
        assert not isinstance(scale, tuple)
        if scale == 1:
            return logits
        cond, null = logits.chunk(2)
        return null + (cond - null) * scale

    def _embed(self, codes: Tensor) -> Tensor:
        """Codes [B, L] -> inputs [R, L, D]."""
        x = F.embedding(codes, self.weights["tok_embeddings.weight"])
        return x.repeat(len(self.prefix) // len(codes), 1, 1)

    def pick(self, logits: Tensor) -> Tensor:
        """Pick a code for each row: [B, 1]."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        top_k = self.sampling.top_k
        assert isinstance(top_k, int)
        if 0 < top_k < logits.shape[-1]:
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1)

    @torch.no_grad()
    def appending(self, tick: Callable[[], None]) -> Tensor:
        """Draw codes [B, T], appending keys and values at each step."""
        # Placeholders, which the first step replaces.
        past: Past = [(self.prefix, self.prefix)] * self.config.n_layer
        x, start, codes = self.prefix, 0, []
        for _ in range(self.tokens):
            codes.append(self.pick(self.logits(x, past, start)))
            tick()
            start += x.shape[1]
            x = self._embed(codes[-1])
        return torch.cat(codes, 1)

    @torch.no_grad()
    def recomputing(self, codes: Tensor) -> Tensor:
        """Draw the code [B, 1] after codes [B, t], recomputing all keys and values."""
        return self.pick(self.logits(torch.cat([self.prefix, self._embed(codes)], 1)))

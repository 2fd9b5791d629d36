"""Input encoder (k -> 1) and output decoder (1 -> k), placed around an unchanged trunk (arXiv
2505.16324, section 3.2).

Both are query transformers: learned queries attend to a short memory and to each other, so one
hidden state can answer every slot's query differently.

    E(w)    = e(w[0]) + z_in * QT_in(e(w[0]) .. e(w[k-1]))
    D(h)[0] = h       + z_out * QT_out(h)[0]
    D(h)[j] =                   QT_out(h)[j]          for drafts j >= 1

z_in and z_out are zero at initialization, so an attached model equals the base model bit for bit.
By default h is not added to drafts: with `residual="all"` all slots pull on the same h, and the
base's own prediction suffers.

Shapes: M rows (batch x windows), m memory entries, q queries (p as keys and values), k slots, D
width, H heads, K width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.lean import swiglu
from t2i.tensorar.method import TensorARConfig

_EPS = torch.finfo(torch.float32).eps
"""Of the codec's norms, in every dtype. (torch's default is that of bf16 in some versions: 0.008,
far above the mean square of learned queries.)
"""


class Norm(nn.RMSNorm):
    """RMS norm in its weight's dtype: torch fuses only equal ones, and autocast mixes them."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type_as(self.weight))


class CodecBlock(nn.Module):
    """Pre-norm attention of queries to [memory; queries], then an optional SwiGLU (8 D^2
    parameters).
    """

    def __init__(self, config: TensorARConfig, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_memory = Norm(dim), Norm(dim)
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wkv = nn.Linear(dim, 2 * dim, bias=False)
        self.mlp = SwiGLU(dim) if config.mlp else None

    def forward(self, x: Tensor, memory_MmD: Tensor, valid_Mm: Tensor | None) -> Tensor:
        """Updated queries [M, q, D], from queries [M, q, D] or [q, D] (shared by all rows, and then
        projected only once).
        """
        unit = self.norm_query(x)
        q, own, read = self.wq(unit), self.wkv(unit), self.wkv(self.norm_memory(memory_MmD))
        q, own, read = (
            t.unflatten(-1, (-1, self.heads, q.shape[-1] // self.heads)) for t in (q, own, read)
        )
        attend = _attend_shared if x.dim() == 2 and x.device.type == "cpu" else _attend
        x = x + self.wo(attend(q[..., 0, :, :], read, own, valid_Mm).flatten(2))
        return x if self.mlp is None else x + self.mlp(x)


def _attend(q: Tensor, read: Tensor, own: Tensor, valid_Mm: Tensor | None) -> Tensor:
    """Attention [M, q, H, K] of queries [M, q, H, K] or [q, H, K] to the keys and values of the
    memory [M, m, 2, H, K] and of the queries themselves [M, q, 2, H, K] or [q, 2, H, K].
    """
    rows = len(read)
    q, own = q.expand(rows, *q.shape[-3:]), own.expand(rows, *own.shape[-4:])
    k, v = torch.cat([read, own], dim=1).unbind(2)
    mask = None
    if valid_Mm is not None:
        mask = F.pad(valid_Mm, (0, q.shape[1]), value=True)[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _attend_shared(q_qHK: Tensor, read: Tensor, own: Tensor, valid_Mm: Tensor | None) -> Tensor:
    """`_attend` for queries that all rows share. On a CPU, a few large products are much faster
    than the fused kernel on thousands of rows with a few entries each.
    """
    (k_MmHK, v_MmHK), (k_pHK, v_pHK) = read.unbind(2), own.unbind(1)
    q_qHK = q_qHK * q_qHK.shape[-1] ** -0.5
    to_memory = torch.einsum("qhk,mnhk->mhqn", q_qHK, k_MmHK).float()
    if valid_Mm is not None:
        to_memory = to_memory.masked_fill(~valid_Mm[:, None, None], -torch.inf)
    to_own = torch.einsum("qhk,phk->hqp", q_qHK, k_pHK).float()
    scores = torch.cat([to_memory, to_own.expand(len(read), -1, -1, -1)], dim=-1)
    weights = scores.softmax(-1).type_as(read)
    of_memory, of_own = weights.split([k_MmHK.shape[1], len(k_pHK)], dim=-1)
    # Often one query or one entry: elementwise products and a sum beat a matrix product.
    out = (of_memory.permute(0, 2, 3, 1)[..., None] * v_MmHK[:, None]).sum(2)
    return out + torch.einsum("mhqp,phk->mqhk", of_own, v_pHK)


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hidden = 8 * round(dim / 3)  # tensor cores need a multiple of 8
        self.norm = Norm(dim)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class QueryTransformer(nn.Module):
    """`queries` learned vectors read a memory through `depth` blocks: [M, m, D] -> [M, q, D]."""

    def __init__(self, queries: int, config: TensorARConfig, dim: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.blocks = nn.ModuleList(CodecBlock(config, dim, heads) for _ in range(config.depth))

    def forward(self, memory_MmD: Tensor, valid_Mm: Tensor | None = None) -> Tensor:
        x = self.queries
        for block in self.blocks:
            x = block(x, memory_MmD, valid_Mm)
        return x


class InputEncoder(nn.Module):
    """One input embedding per window: E(w)."""

    def __init__(self, config: TensorARConfig, dim: int, heads: int):
        super().__init__()
        self.slots = nn.Parameter(torch.empty(config.k, dim))
        self.transformer = QueryTransformer(1, config, dim, heads)
        self.z_in = None if config.residual == "none" else nn.Parameter(torch.zeros(dim))

    def forward(self, e_MkD: Tensor, valid_Mk: Tensor) -> Tensor:
        """Embeddings of a window's slots [M, k, D] and which are valid [M, k] -> [M, D]."""
        memory = F.rms_norm(e_MkD, e_MkD.shape[-1:], eps=_EPS) + self.slots[: e_MkD.shape[1]]
        read = self.transformer(memory.type_as(e_MkD), valid_Mk)[:, 0]
        return read if self.z_in is None else e_MkD[:, 0] + self.z_in * read


class OutputDecoder(nn.Module):
    """One hidden state per slot of the predicted window: D(h)."""

    def __init__(self, config: TensorARConfig, dim: int, heads: int):
        super().__init__()
        self.config = config
        self.transformer = QueryTransformer(config.k, config, dim, heads)
        self.z_out = None if config.residual == "none" else nn.Parameter(torch.zeros(dim))

    def forward(self, h_MD: Tensor) -> Tensor:
        """Hidden states [M, D] -> [M, k, D]."""
        read = self.transformer((h_MD.detach() if self.config.detach else h_MD)[:, None])
        if self.z_out is None:
            return read
        h_M1D, drafts = h_MD[:, None], read[:, 1:]
        if self.config.residual == "all":
            drafts = h_M1D + drafts
        return torch.cat([h_M1D + self.z_out * read[:, :1], drafts], dim=1)


class Codec(nn.Module):
    """Input encoder and output decoder: everything TensorAR adds to a backbone."""

    def __init__(self, config: TensorARConfig, dim: int, heads: int):
        super().__init__()
        self.encoder = InputEncoder(config, dim, heads)
        self.decoder = OutputDecoder(config, dim, heads)

    def initialize(self, generator: torch.Generator) -> None:
        """N(0, 1/fan_in) for matrices, N(0, 0.02) for queries and slots, zero for the gates, one
        for the norms.

        The output matrices of the decoder's blocks get a tenth of that scale, so that drafts start
        near the uniform distribution. At full scale their loss starts well above uniform, and that
        error would reach the trunk and the shared head. (Where a norm follows the decoder, as in
        Open-MAGVIT2's head, the scale cancels, and drafts start above uniform anyway.)
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name.endswith(".weight"):
                last = name.startswith("decoder.") and name.endswith(("wo.weight", "w2.weight"))
                std = (0.1 if last else 1.0) * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith(("queries", "slots")):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name.endswith(("z_in", "z_out")):
                nn.init.zeros_(parameter)
            else:
                assert "norm" in name, name
                nn.init.ones_(parameter)

"""TensorAR = a backbone + a codec: the training loss and the building blocks of the sampler (arXiv
2505.16324).

Shapes: B batch, T image tokens, N windows, k slots, S sub-tokens, P prefix, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i.models.base import Backbone, parameter_count
from t2i.models.conditions import Condition, to_device
from t2i.rng import fold, integers, normals, uniforms
from t2i.sampling import Speculate, Speed
from t2i.tensorar.codec import Codec
from t2i.tensorar.drawing import draw_by_share
from t2i.tensorar.loss import (
    LOGITS_OF_A_SAMPLE,
    WindowLosses,
    filled,
    slot_parts,
    window_losses,
)
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.noise import (
    GAUSSIAN_VARIANCE,
    corrupt_bits,
    corrupt_categorical,
    corrupt_codebook,
    schedule_strengths,
)
from t2i.tensorar.speed import Held
from t2i.tensorar.windows import Windows


class TensorAR(nn.Module):
    """A backbone that predicts windows. With `config.k == 1` it has no codec and is the base model.

    Raises:
        UserError: k does not fit the image, or there is codebook noise and no image tokenizer.
    """

    def __init__(self, backbone: Backbone, config: TensorARConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.windows = Windows(backbone.spec.num_tokens, config.k)
        self.backbone = backbone
        self.sampling = backbone.spec.sampling
        self.speed: Speed = "auto"
        self.speculate: Speculate = "off"
        self.recompute_codec = False
        """Recompute the codec in the backward pass (always done when the backbone's blocks are)."""
        self.held = Held()
        self.trained = "nothing yet"
        """A phrase for what training has changed, or is about to change."""
        self.codec: Codec | None = None
        if config.k > 1:
            if config.noise == "codebook":
                backbone.code_vectors()  # raises if there is no codebook
            first = next(backbone.parameters())
            with torch.device("meta"):
                codec = Codec(config, backbone.spec.dim, backbone.spec.num_heads)
            if first.device.type != "meta":
                codec.to_empty(device="cpu").initialize(torch.Generator().manual_seed(seed))
                codec.to(device=first.device, dtype=first.dtype)
            self.codec = codec

    def __repr__(self) -> str:
        """A one-line summary; `print(model.backbone.gpt)` and the like show the modules."""
        c = self.config
        window = f"k={c.k}" if self.codec is not None else "k=1, the base model"
        if self.sampling.stride > 1:
            window += f", stride={self.sampling.stride}"
        size = "" if self.codec is None else f", codec {parameter_count(self.codec)}"
        return f"TensorAR({window}{size}, trained: {self.trained}, {self.backbone!r})"

    def train(self, mode: bool = True) -> "TensorAR":
        if mode:
            self.held.clear()  # training needs the memory
        return super().train(mode)

    @property
    def uses_gaussian_noise(self) -> bool:
        """Training noise is added to embeddings, not to codes."""
        return self.config.noise == "gaussian" and self.config.k > 1

    # -- inputs ------------------------------------------------------------------------------------
    def noised_windows(self, codes: Tensor, keys: Tensor) -> Tensor:
        """Input windows int64 [B, N, k, S] of codes [B, T, S], with the configured noise on drafts;
        keys int64 [B].
        """
        clean = self.windows.gather(codes)
        if self.config.k == 1 or self.config.noise == "gaussian":
            return clean
        return self.corruption(self.config.k, codes.device)(clean, keys)

    def corruption(
        self, slots: int, device: torch.device, share: float = 1.0, final: int = 1
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that corrupts windows int64 [B, n, slots, S], given keys int64 [B].

        share: factor on the configured strengths.
        final: how many leading slots stay unchanged.
        """
        strengths = schedule_strengths(self.config.schedule, self.config.k, self.config.noise_floor)
        b_k = share * filled([*[0.0] * final, *strengths[final:]][:slots], device)
        spec = self.backbone.spec
        if self.config.noise != "codebook":
            return lambda windows, keys: corrupt_categorical(windows, b_k, spec.subvocabs, keys)
        if spec.sign_codebook:
            return lambda windows, keys: corrupt_bits(windows, b_k, spec.subvocabs, keys)
        vectors = tuple(v.to(device) for v in self.backbone.code_vectors())
        return lambda windows, keys: corrupt_codebook(windows, b_k, vectors, keys)

    def training_windows(
        self, codes: Tensor, condition: Condition, keys: Tensor, progress: float = 1.0
    ) -> Tensor:
        """Input windows of a training step, int64 [B, N, k, S]: true codes with noise or, for the
        configured share of samples, own drafts.

        keys: int64 [B]; on the CPU, so that choosing samples does not wait for a GPU.
        progress: share of the run that is completed, for annealing.
        """
        device = codes.device
        windows = self.noised_windows(codes, to_device(keys, device))
        share = self.config.own_drafts * (progress if self.config.anneal else 1.0)
        if share == 0 or self.config.k == 1:
            return windows
        # Only the chosen rows take a second pass, but at least one row does: under ZeRO-3 all
        # processes must take part in a pass.
        chosen = torch.nonzero(uniforms(fold(keys, 2001)) < share)[:, 0]
        some = chosen if len(chosen) else chosen.new_zeros(1)
        rows, own_keys = to_device(some, device), to_device(fold(keys[some], 2000), device)
        own = self.own_draft_windows(codes[rows], condition.rows(rows), own_keys, passes=1)
        return windows.index_copy(0, rows[: len(chosen)], own[: len(chosen)])

    def embed_windows(
        self,
        windows: Tensor,
        first: int | Tensor = 0,
        gaussian_keys: Tensor | None = None,
        known_n: Tensor | None = None,
    ) -> Tensor:
        """E(w): windows [B, n, k' <= k, S] -> embeddings [B, n, D].

        first: position of the first window, or int64 [B, 1] of each row's; each further window
            begins one position later.
        known_n: number of known slots in each window, int64 [n]; None for all.
        """
        e_BnkD = self.backbone.embed_tokens(windows)
        if self.codec is None:
            return e_BnkD[:, :, 0]
        if gaussian_keys is not None:
            noise = normals(gaussian_keys, *e_BnkD.shape[1:]) * GAUSSIAN_VARIANCE**0.5
            noise[:, :, 0] = 0
            e_BnkD = e_BnkD + noise.type_as(e_BnkD)
        n, slots = windows.shape[1:3]
        starts = torch.arange(n, device=windows.device) + first
        slot_k = torch.arange(slots, device=windows.device)
        valid = starts[..., None] + slot_k < self.windows.tokens
        if known_n is not None:
            valid = valid & (slot_k < known_n[:, None])
        valid = valid.expand(len(windows), -1, -1).flatten(0, 1)
        read = self._run(self.codec.encoder, e_BnkD.flatten(0, 1), valid)
        return read.unflatten(0, (len(windows), n))

    def _run(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        """Run a part of the codec, recomputed in the backward pass if so configured."""
        if torch.is_grad_enabled() and (
            self.recompute_codec or self.backbone.gradient_checkpointing
        ):
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)

    # -- teacher forcing ---------------------------------------------------------------------------
    def hidden(
        self,
        condition: Condition,
        windows: Tensor,
        gaussian_keys: Tensor | None = None,
        stride: int = 1,
    ) -> Tensor:
        """Trunk outputs [B, N, D] that predict windows 0..N-1, from windows [B, N, k', S].

        The last window is not read. `stride` is the one that the windows were drawn with.
        """
        prefix, geometry = condition.prefix, self.windows.shrunk(windows.shape[2], stride)
        fed, known_n = geometry.fed(windows[:, :-1])
        x = torch.cat([prefix, self.embed_windows(fed, 0, gaussian_keys, known_n)], dim=1)
        positions = torch.arange(x.shape[1], device=x.device)
        return self.backbone.trunk(x, positions, condition)[:, prefix.shape[1] - 1 :: stride]

    def decode_slots(self, h: Tensor) -> Tensor:
        """D(h): hidden [..., D] -> [..., k, D]."""
        if self.codec is None:
            return h[..., None, :]
        slots = self._run(self.codec.decoder, h.reshape(-1, h.shape[-1]))
        return slots.view(*h.shape[:-1], self.config.k, -1)

    def slot_logits(self, d_kD: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        """Teacher-forced logits [..., k, V_s] per sub-token, from decoded slots [..., k, D] and
        true codes [..., k, S].
        """
        parts = [
            self.backbone.all_logits(d_kD[..., part, :], codes[..., part, :])
            for part in slot_parts(d_kD.shape[-2])
        ]
        return tuple(torch.cat(logits, dim=-2) for logits in zip(*parts, strict=True))

    def forward(
        self,
        codes: Tensor,
        condition: Condition,
        windows: Tensor,
        gaussian_keys: Tensor | None = None,
    ) -> WindowLosses:
        """Cross entropy of the true codes [B, T, S] by slot, given input windows [B, N, k, S] (with
        noise or own drafts).
        """
        d_BNkD = self.decode_slots(self.hidden(condition, windows, gaussian_keys))
        valid_Nk = self.windows.valid(codes.device).float()
        targets = self.windows.gather(codes)
        weights_k = filled(self.config.weights(), codes.device)
        return window_losses(self.backbone, d_BNkD, targets, valid_Nk, weights_k)

    def windows_at_once(self, slots: int) -> int:
        """How many windows with this many slots make up `LOGITS_OF_A_SAMPLE` logits, at least 1."""
        return max(1, LOGITS_OF_A_SAMPLE // (slots * max(self.backbone.spec.subvocabs)))

    # -- own drafts --------------------------------------------------------------------------------
    @torch.no_grad()
    def own_draft_windows(
        self, codes: Tensor, condition: Condition, keys: Tensor, passes: int = 2
    ) -> Tensor:
        """Input windows int64 [B, N, k, S]: the true code in slot 0, then the model's own samples.

        Each pass predicts all windows in parallel and uses the samples as the next pass's drafts.
        In the first pass the drafts are pure noise, so the truth cannot leak into them. Apart from
        the true slot 0 this is what sampling feeds the model, and as in sampling there is no
        dropout. The model's train/eval mode is restored at the end.
        """
        truth = self.windows.gather(codes)
        if self.config.k == 1:
            return truth
        final, drafts = truth.split([1, self.config.k - 1], dim=2)
        shape = drafts.shape[1:3]
        noise = [
            integers(fold(keys, s), v, *shape) for s, v in enumerate(self.backbone.spec.subvocabs)
        ]
        windows = torch.cat([final, torch.stack(noise, dim=-1)], dim=2)
        window_N, slot_k = (torch.arange(size, device=keys.device) for size in shape)
        was_training = self.training
        self.eval()
        for p in range(passes):
            d = self.decode_slots(self.hidden(condition, windows))[:, :, 1:]
            noise_BNk = fold(keys[:, None, None], 1000 + p, window_N[:, None], slot_k)
            size = self.windows_at_once(len(slot_k))
            parts = zip(d.split(size, dim=1), noise_BNk.split(size, dim=1), strict=True)
            drafts = torch.cat([self.draw(*part) for part in parts], dim=1)
            windows = torch.cat([final, drafts], dim=2)
        self.train(was_training)
        return windows

    @torch.no_grad()
    def draw(self, d: Tensor, keys: Tensor) -> Tensor:
        """Codes int64 [..., S] drawn from the model's own distribution for decoded slots [..., D];
        `keys` int64 [...] seed the draw.
        """
        codes = keys[..., None][..., :0]
        for s in range(len(self.backbone.spec.subvocabs)):
            logits = self.backbone.next_logits(d, codes)
            code = draw_by_share(logits, fold(keys, s))
            codes = torch.cat([codes, code[..., None]], dim=-1)
        return codes

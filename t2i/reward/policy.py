"""Learning from drawn images: log-probabilities, advantages, loss, and the copy of the start.

The log-probability of an image is that of its final codes, each given the windows that were drawn
before it: slots 0..stride-1 of every window. Drafts (the slots behind) are taken as they were
drawn, like the noise that drew them: the model reads them, and what follows is conditioned on them,
but none of them is in the image, and a reward says nothing of one that a later step replaced. To
score them, too, would add k - 1 times as many terms of which the gradient is noise. So the
distribution that is learned is that of the final codes given the drafts, whose ratio at the first
update is exactly 1; that drafts stay good is watched by the held-out loss by slot.

Shapes: B images, R rows (2B with guidance: conditional rows first), N windows, n of them at once, s
final slots of a window, S sub-tokens, V vocabulary; P prompts, G images of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i.lora import without_lora
from t2i.models.base import Condition
from t2i.sampling import SamplingConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows, guidance_table
from t2i.training.state import trained

# -- log-probabilities -----------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeScores:
    """Of the final codes of drawn images, in the order of the windows."""

    log_p: Tensor
    """fp32 [B, N, s]; 0 where a slot is past the image."""
    entropy: Tensor
    """fp32 [B, N, s] of the distribution that the code was drawn from, without a gradient."""
    valid: Tensor
    """bool [N, s]"""


def score_codes(
    model: TensorAR, prepared: dict[str, Tensor], windows: Tensor, sampling: SamplingConfig
) -> CodeScores:
    """What the model that drew windows [B, N, k, S] so (`SamplingConfig`, without filters) says of
    them: teacher-forced, with guidance by two passes as in drawing.
    """
    backbone, geometry = model.backbone, drawn_windows(model, sampling)
    stride = geometry.stride
    scales_NS = guidance_table(model, sampling)
    condition, fed, guided = backbone.encode_condition(prepared), windows, scales_NS is not None
    if guided:
        drop = torch.ones(len(windows), dtype=torch.bool, device=windows.device)
        condition = Condition.cat([condition, backbone.encode_condition(prepared, drop)])
        fed = torch.cat([windows, windows])
    d_RNsD = model.decode_slots(model.hidden(condition, fed, stride=stride))[:, :, :stride]
    codes = fed[:, :, :stride]
    work = partial(_score, model, sampling.by_sub_token(codes.shape[-1]))
    size = model.windows_at_once(stride)
    scales = None if scales_NS is None else scales_NS.split(size)
    parts = []
    for i, piece in enumerate(zip(d_RNsD.split(size, 1), codes.split(size, 1), strict=True)):
        inputs = (*piece, None if scales is None else scales[i])
        if torch.is_grad_enabled():  # the logits are the most of what it would keep
            parts.append(checkpoint(work, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(work(*inputs))
    log_p, entropy = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    valid = geometry.valid(windows.device)[:, :stride]
    return CodeScores(log_p * valid, entropy * valid, valid)


def _score(
    model: TensorAR, settings: tuple, d_RnsD: Tensor, codes_RnsS: Tensor, scales_nS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [B, n, s] of codes."""
    log_p: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    heads = model.backbone.all_heads(d_RnsD, codes_RnsS)
    for sub, ((x, head), own) in enumerate(zip(heads, settings, strict=True)):
        logits, codes = head(x).float(), codes_RnsS[..., sub, None]
        if scales_nS is not None:
            (cond, null), codes = logits.chunk(2), codes.chunk(2)[0]
            scale = scales_nS[:, sub, None, None]
            logits = torch.where(scale == 1, cond, null + (cond - null) * scale)
        every = (logits / own.temperature).log_softmax(-1)
        log_p = log_p + every.gather(-1, codes)[..., 0]
        with torch.no_grad():
            entropy = entropy - (every.exp() * every).sum(-1)
    assert isinstance(log_p, Tensor) and isinstance(entropy, Tensor), "a code has a sub-token"
    return log_p, entropy


# -- advantages ------------------------------------------------------------------------------------
_NO_SPREAD = 1e-6


def advantages(rewards_PG: Tensor, *, by_spread: bool) -> tuple[Tensor, Tensor]:
    """How much better than its group each image is, fp64 [P, G], and which groups have a spread at
    all, bool [P]; the others are left out, with advantages of 0.

    by_spread: over the spread of the group; else over that of all groups that have one.
    """
    off = rewards_PG - rewards_PG.mean(1, keepdim=True)
    kept = off.abs().amax(1) > _NO_SPREAD
    variance = off.square().mean(1, keepdim=True)
    if not by_spread and kept.any():
        variance = variance[kept].mean().expand_as(variance)
    found = off / variance.sqrt().clamp(min=_NO_SPREAD)
    return found * kept[:, None], kept


# -- the loss --------------------------------------------------------------------------------------
@dataclass
class DrawnBatch:
    """Some drawn images to learn from: what one forward pass reads."""

    windows: Tensor
    """int64 [B, N, k, S]"""
    prepared: dict[str, Tensor]
    advantage: Tensor
    """fp32 [B]"""
    share: Tensor
    """fp32 [B]: of the batch's loss; 0 for an image of a group that is left out."""
    start: Tensor
    """fp32 [B, N, s]: log-probabilities by the model that the run started from."""
    before: Tensor | None = None
    """The same by the model that drew; None where that is the model that learns now."""


SUMS = ("loss", "entropy", "kl", "clipped", "ratio_off", "codes")
"""What a forward pass adds up, over the codes of all its images."""


class PolicyLoss(nn.Module):
    """What DeepSpeed wraps: GRPO's loss of a batch, and `SUMS`.

    Of each code min(r A, clip(r) A) - kl (exp(d) - d - 1), where r is the ratio of its
    probabilities now and when it was drawn, A its image's advantage, and d = log p_start - log p
    (an estimate of the divergence that is never negative). Mean over the codes, and over the images
    that are not left out.
    """

    def __init__(self, model: TensorAR, sampling: SamplingConfig, *, clip: float, kl: float):
        super().__init__()
        self.model, self.sampling = model, sampling
        self.clip, self.kl = clip, kl

    def forward(self, batch: DrawnBatch) -> tuple[Tensor, Tensor]:
        found = score_codes(self.model, batch.prepared, batch.windows, self.sampling)
        log_p = found.log_p
        ratio = (log_p - (log_p.detach() if batch.before is None else batch.before)).exp()
        gain = batch.advantage[:, None, None]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        behind = (batch.start - log_p) * found.valid
        kl = behind.exp() - behind - 1
        each = self.kl * kl - torch.minimum(ratio * gain, clipped * gain)
        per_image = (each * found.valid).sum((1, 2)) / found.valid.sum()
        loss = (per_image * batch.share).sum()
        with torch.no_grad():
            cut = ((ratio * gain > clipped * gain) & found.valid).sum()
            off = ((ratio - 1).abs() * found.valid).sum()
            codes = found.valid.sum() * len(log_p)
            sums = (loss * codes, found.entropy.sum(), kl.sum(), cut, off, codes)
        return loss, torch.stack([value.detach().float() for value in sums])


# -- the start -------------------------------------------------------------------------------------
class Start:
    """The model as it was when the run began: weights that are trained whole are copied (in their
    type: as many bytes as they have), and adapters, which began as the identity, are turned off.
    """

    def __init__(self, model: TensorAR, *, of: TensorAR | None = None):
        """of: the model that has the weights of the start, if `model` has others already."""
        self._model = model
        source = dict((of or model).named_parameters())
        self._weights = {
            name: source[name].detach().to(p.device, p.dtype).clone()
            for name, p in trained(model).items()
            if "lora_" not in name
        }

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self._weights.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For the duration the model computes what it did at the start."""
        backbone, parameters = self._model.backbone, dict(self._model.named_parameters())
        own = {name: parameters[name].data for name in self._weights}
        revision = backbone.revision
        with nullcontext() if backbone.lora is None else without_lora(backbone):
            for name, value in self._weights.items():
                parameters[name].data = value  # exchanged, not copied
            try:
                yield
            finally:
                for name, value in own.items():
                    parameters[name].data = value
        # Nothing was drawn meanwhile, and all is as it was: recorded steps stay good.
        backbone.revision = revision

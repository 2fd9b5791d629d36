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
from t2i.sampling import SamplingConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows, encode_rows, guidance_table, guide_logits
from t2i.training.state import trained

# -- log-probabilities -----------------------------------------------------------------------------


Distributions = tuple[Tensor, ...]
"""Log-probabilities of all codes [B, N, s, V], fp32, of each sub-token given the drawn ones."""


@dataclass(frozen=True)
class CodeScores:
    """Of the final codes of drawn images, in the order of the windows."""

    log_p: Tensor
    """fp32 [B, N, s]; 0 where a slot is past the image."""
    entropy: Tensor
    """fp32 [B, N, s] of the distribution that the code was drawn from, without a gradient."""
    valid: Tensor
    """bool [N, s]"""
    divergence: Tensor
    """fp32 [B, N, s], of the distributions `against` from these; 0 without."""


def score_codes(
    model: TensorAR,
    prepared: dict[str, Tensor],
    windows: Tensor,
    sampling: SamplingConfig,
    against: Distributions | None = None,
) -> CodeScores:
    """What the model that drew windows [B, N, k, S] so (`SamplingConfig`, without filters) says of
    them: teacher-forced, with guidance by two passes as in drawing.
    """
    geometry, work = drawn_windows(model, sampling), partial(_score, model, sampling)
    parts = []
    for now, piece in _decoded(model, prepared, windows, sampling):
        others = None if against is None else tuple(every[:, now] for every in against)
        if torch.is_grad_enabled():  # the logits are the most of what it would keep
            found = checkpoint(work, *piece, others, use_reentrant=False, preserve_rng_state=False)
        else:
            found = work(*piece, others)
        parts.append(found)
    log_p, entropy, divergence = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    valid = geometry.valid(windows.device)[:, : geometry.stride]
    return CodeScores(log_p * valid, entropy * valid, valid, divergence * valid)


@torch.no_grad()
def code_distributions(
    model: TensorAR, prepared: dict[str, Tensor], windows: Tensor, sampling: SamplingConfig
) -> Distributions:
    """Whole log-distributions of what `score_codes` scores."""
    pieces = _decoded(model, prepared, windows, sampling)
    parts = [tuple(_log_distributions(model, sampling, *piece)) for _, piece in pieces]
    return tuple(torch.cat(subs, 1) for subs in zip(*parts, strict=True))


def _decoded(
    model: TensorAR, prepared: dict[str, Tensor], windows: Tensor, sampling: SamplingConfig
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor | None]]]:
    """So many windows at once that their logits fit: which, and of their final slots the hidden
    states [R, n, s, D], codes [R, n, s, S] and guidance [n, S].
    """
    backbone, stride = model.backbone, drawn_windows(model, sampling).stride
    scales_NS = guidance_table(model, sampling)
    condition = encode_rows(backbone, prepared, guided=scales_NS is not None)
    fed = windows if scales_NS is None else torch.cat([windows, windows])
    d_RNsD = model.decode_slots(model.hidden(condition, fed, stride=stride))[:, :, :stride]
    size = model.windows_at_once(stride)
    for at in range(0, d_RNsD.shape[1], size):
        now = slice(at, at + size)
        scales = None if scales_NS is None else scales_NS[now]
        yield now, (d_RNsD[:, now], fed[:, now, :stride], scales)


def _log_distributions(
    model: TensorAR,
    sampling: SamplingConfig,
    d_RnsD: Tensor,
    codes_RnsS: Tensor,
    scales_nS: Tensor | None,
) -> Iterator[Tensor]:
    """Of each sub-token, [B, n, s, V]."""
    settings = sampling.by_sub_token(codes_RnsS.shape[-1])
    heads = model.backbone.all_heads(d_RnsD, codes_RnsS)
    for sub, ((x, head), own) in enumerate(zip(heads, settings, strict=True)):
        logits = head(x).float()
        if scales_nS is not None:
            logits = guide_logits(logits, scales_nS[:, sub, None, None])
        yield (logits / own.temperature).log_softmax(-1)


def _score(
    model: TensorAR,
    sampling: SamplingConfig,
    d_RnsD: Tensor,
    codes_RnsS: Tensor,
    scales_nS: Tensor | None,
    against: Distributions | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and divergence [B, n, s] of codes."""
    log_p, entropy, divergence = [], [], []
    found = _log_distributions(model, sampling, d_RnsD, codes_RnsS, scales_nS)
    for sub, every in enumerate(found):
        log_p.append(every.gather(-1, codes_RnsS[: len(every), ..., sub, None])[..., 0])
        if against is not None:
            divergence.append((against[sub].exp() * (against[sub] - every)).sum(-1))
        with torch.no_grad():
            entropy.append(-(every.exp() * every).sum(-1))
    zero = torch.zeros_like(entropy[0])
    return sum(log_p, zero), sum(entropy, zero), sum(divergence, zero)


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
    start: Tensor | Distributions
    """fp32 [B, N, s]: log-probabilities by the model that the run started from; whole distributions
    where that one is asked as it draws in another way.
    """
    before: Tensor | None = None
    """The same by the model that drew; None where that is the model that learns now."""


SUMS = ("loss", "entropy", "kl", "clipped", "ratio_off", "codes")
"""What a forward pass adds up, over the codes of the images that it learns from."""


class PolicyLoss(nn.Module):
    """What DeepSpeed wraps: GRPO's loss of a batch, and `SUMS`.

    Of each code min(r A, clip(r) A) - kl (exp(d) - d - 1), where r is the ratio of its
    probabilities now and when it was drawn, A its image's advantage, and d = log p_start - log p
    (an estimate of the divergence that is never negative). Where the start is asked for whole
    distributions q, it is their divergence sum q (log q - log p) itself. Mean over the codes, and
    over the images that are not left out.
    """

    def __init__(self, model: TensorAR, sampling: SamplingConfig, *, clip: float, kl: float):
        super().__init__()
        self.model, self.sampling = model, sampling
        self.clip, self.kl = clip, kl

    def forward(self, batch: DrawnBatch) -> tuple[Tensor, Tensor]:
        start = batch.start
        against = None if isinstance(start, Tensor) else start
        found = score_codes(self.model, batch.prepared, batch.windows, self.sampling, against)
        log_p = found.log_p
        ratio = (log_p - (log_p.detach() if batch.before is None else batch.before)).exp()
        gain = batch.advantage[:, None, None]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        kl = found.divergence
        if isinstance(start, Tensor):
            behind = (start - log_p) * found.valid
            kl = behind.exp() - behind - 1
        each = self.kl * kl - torch.minimum(ratio * gain, clipped * gain)
        per_image = (each * found.valid).sum((1, 2)) / found.valid.sum()
        loss = (per_image * batch.share).sum()
        with torch.no_grad():
            learned = found.valid & (batch.share > 0)[:, None, None]
            cut, off = ratio * gain > clipped * gain, (ratio - 1).abs()
            values = (each, found.entropy, kl, cut, off, torch.ones_like(off))
        return loss, torch.stack([(value * learned).sum().float() for value in values])


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

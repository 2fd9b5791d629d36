"""Learning from drawn images: log-probabilities, advantages, loss, and the copy of the start.

The log-probability of an image is that of its final codes (slots 0..stride-1 of every window), each
given the windows drawn before it. Drafts (the later slots) are treated as given, like the noise
they were drawn with. The model reads them, and what follows is conditioned on them, but they are
not in the image, and the reward says nothing about a draft that a later step replaced: scoring them
would add k - 1 times as many terms whose gradient is noise. So the learned distribution is that of
the final codes given the drafts, and its ratio at the first update is exactly 1. The held-out loss
by slot shows whether drafts stay good.

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
"""For each sub-token, fp32 log-probabilities of all codes [B, N, s, V], given the drawn sub-tokens
before it."""


@dataclass(frozen=True)
class CodeScores:
    """Scores of the final codes of drawn images, in the order of the windows."""

    log_p: Tensor
    """fp32 [B, N, s]; 0 for slots past the end of the image."""
    entropy: Tensor
    """fp32 [B, N, s], of the distribution that the code was drawn from; has no gradient."""
    valid: Tensor
    """bool [N, s], slots within the image."""
    divergence: Tensor
    """fp32 [B, N, s], KL divergence of the distributions `against` from these; 0 without them."""


def score_codes(
    model: TensorAR,
    prepared: dict[str, Tensor],
    windows: Tensor,
    sampling: SamplingConfig,
    against: Distributions | None = None,
) -> CodeScores:
    """Score windows [B, N, k, S] as the model draws them with `sampling` (no filters):
    teacher-forced, with two passes for guidance, as in drawing.
    """
    geometry, work = drawn_windows(model, sampling), partial(_score, model, sampling)
    parts = []
    for now, piece in _decoded(model, prepared, windows, sampling):
        others = None if against is None else tuple(every[:, now] for every in against)
        if torch.is_grad_enabled():  # recompute logits, which would take most of the memory
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
    """The whole log-distributions from which `score_codes` picks the drawn codes."""
    pieces = _decoded(model, prepared, windows, sampling)
    parts = [tuple(_log_distributions(model, sampling, *piece)) for _, piece in pieces]
    return tuple(torch.cat(subs, 1) for subs in zip(*parts, strict=True))


def _decoded(
    model: TensorAR, prepared: dict[str, Tensor], windows: Tensor, sampling: SamplingConfig
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor | None]]]:
    """Yield as many windows at a time as have logits that fit in memory: their range, and for their
    final slots the decoder's output [R, n, s, D], codes [R, n, s, S] and guidance [n, S].
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
    """Yield the log-distribution of each sub-token, [B, n, s, V]."""
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
    """Log-probability, entropy and divergence of codes, each [B, n, s]."""
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
    """How much better each image is than the mean of its group, fp64 [P, G]; and which groups have
    a spread, bool [P]. The others are left out, with advantages of 0.

    by_spread: divide by the spread of the group; otherwise by that of all groups that have one.
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
    """Drawn images to learn from: the input of one forward pass."""

    windows: Tensor
    """int64 [B, N, k, S]"""
    prepared: dict[str, Tensor]
    advantage: Tensor
    """fp32 [B]"""
    share: Tensor
    """fp32 [B], weight of each image in the batch's loss; 0 for a group that is left out."""
    start: Tensor | Distributions
    """Log-probabilities by the model that the run started from, fp32 [B, N, s]; or its whole
    distributions, if it draws with other settings than the run.
    """
    before: Tensor | None = None
    """Log-probabilities by the model that drew, fp32 [B, N, s]; None if it is still the same."""


SUMS = ("loss", "entropy", "kl", "clipped", "ratio_off", "codes")
"""Names of the sums that a forward pass returns, over the codes of the images it learns from."""


class PolicyLoss(nn.Module):
    """The module that DeepSpeed wraps: returns GRPO's loss of a batch, and `SUMS`.

    A code contributes min(r A, clip(r) A) - kl (exp(d) - d - 1), to be maximized: r is the ratio of
    its probabilities now and when it was drawn, A its image's advantage, d = log p_start - log p.
    exp(d) - d - 1 estimates the divergence, and is never negative; if the start's whole
    distributions q are given, the divergence itself, sum q (log q - log p), replaces it. The loss
    is a mean over codes, and over the images that are not left out.
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
    """The model as it was when the run began: weights that are trained whole are copied, in their
    own type; adapters, which began as the identity, are turned off.
    """

    def __init__(self, model: TensorAR, *, of: TensorAR | None = None):
        """of: a model with the weights of the start, if `model` has already changed."""
        self._model = model
        source = dict((of or model).named_parameters())
        self._weights = {
            name: source[name].detach().to(p.device, p.dtype).clone()
            for name, p in trained(model).items()
            if "lora_" not in name
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model computes what it did at the start."""
        backbone, parameters = self._model.backbone, dict(self._model.named_parameters())
        own = {name: parameters[name].data for name in self._weights}
        revision = backbone.revision
        with nullcontext() if backbone.lora is None else without_lora(backbone):
            for name, value in self._weights.items():
                parameters[name].data = value  # swapped, not copied
            try:
                yield
            finally:
                for name, value in own.items():
                    parameters[name].data = value
        # The weights are as before, and nothing was drawn in between: recorded steps stay valid.
        backbone.revision = revision

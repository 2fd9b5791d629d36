"""What refinement does to codes and to the model's predictions, in numbers.

For drawn images: how often codes change from stage to stage, and how far a draft's distribution is
from the final code's. Two draws often differ even when they come from one distribution. The
agreement of codes is therefore reported together with the agreement expected of two draws from the
final distribution, and with the total variation, which does not depend on luck. For images with
known codes: loss and entropy by slot.

Shapes: B images, T positions, N windows, n of them at once, k slots, S sub-tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from t2i.generation import Drawn
from t2i.models.conditions import to_device
from t2i.rng import fold
from t2i.sampling import SamplingConfig, SubTokenSampling
from t2i.tensorar.drawing import candidates, rules
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows, encode_rows, guidance_table, guide_logits
from t2i.tensorar.windows import Windows

PLAIN = SamplingConfig()
"""The model's own distribution: no guidance, no filter."""


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for every slot, in nats, summed over sub-tokens."""

    log_probs: Tensor
    """Log-probabilities of the given codes, fp32 [B, N, k]."""
    entropies: Tensor
    """fp32 [B, N, k]; each sub-token's entropy is conditioned on the earlier ones of the given
    code.
    """


@torch.no_grad()
def predict(
    model: TensorAR,
    prepared: dict[str, Tensor],
    windows: Tensor,
    codes: Tensor,
    sampling: SamplingConfig = PLAIN,
    gaussian_keys: Tensor | None = None,
) -> Predictions:
    """Predict codes [B, N, k, S] with these settings, given the windows [B, N, k, S] as input.

    One pass; the distributions are those of drawing step by step.
    """
    assert not sampling.renoise, "the model must read its drafts as they were drawn"
    backbone, stride, slots = model.backbone, sampling.stride, windows.shape[2]
    scales_NS = guidance_table(model, sampling)
    condition = encode_rows(backbone, prepared, guided=scales_NS is not None)
    fed, given = windows, codes
    if scales_NS is not None:
        fed, given = torch.cat([windows, windows]), torch.cat([codes, codes])
    h = model.hidden(condition, fed, gaussian_keys, stride)
    parts: list[Tensor] = []
    for n in torch.arange(windows.shape[1], device=h.device).split(model.windows_at_once(slots)):
        d = model.decode_slots(h[:, n])[:, :, :slots]
        sums = torch.zeros((), device=h.device)
        for s, logits in enumerate(model.slot_logits(d, given[:, n])):
            if scales_NS is not None:
                logits = guide_logits(logits, scales_NS[n, s][:, None, None])
            of_slots = (slice(0, stride), slice(stride, slots))
            pairs = zip(of_slots, rules(sampling, codes.shape[-1])[s], strict=True)
            found = [_facts(logits[:, :, j], codes[:, n, j, s], rule) for j, rule in pairs]
            sums = sums + torch.cat(found, dim=2)
        parts.append(sums)
    return Predictions(*torch.cat(parts, dim=1).unbind(-1))


def _facts(logits: Tensor, codes: Tensor, rule: SubTokenSampling) -> Tensor:
    """Log-probability of codes [...] and entropy under logits [..., V] and a rule: [..., 2]."""
    scores, there = candidates(logits, rule)
    log_p = scores.log_softmax(-1)
    own = log_p.masked_fill(there != codes[..., None], -torch.inf).amax(-1)
    return torch.stack([own, torch.special.entr(log_p.exp()).sum(-1)], dim=-1)


# -- means over images -----------------------------------------------------------------------------
def means(values: Tensor) -> dict[str, list[float]]:
    """Means of values [B, x] over images, and their standard errors (empty for one image)."""
    values, images = values.double(), len(values)
    errors = values.std(0) / images**0.5 if images > 1 else values.new_zeros(0)
    return {"mean": values.mean(0).tolist(), "stderr": errors.tolist()}


def by_slot(values_BNk: Tensor, geometry: Windows) -> Tensor:
    """Means over each image's windows, [B, k], leaving out slots without a position."""
    valid_Nk = geometry.valid(values_BNk.device)
    return values_BNk.masked_fill(~valid_Nk, 0).sum(1) / valid_Nk.sum(0)


# -- drawn images ----------------------------------------------------------------------------------
def of_drawn(
    model: TensorAR, drawn: Sequence[Drawn], sampling: SamplingConfig, batch_size: int
) -> dict:
    """Entropies and stage statistics of images that this model drew with these settings."""
    geometry = drawn_windows(model, sampling)
    length = model.backbone.prefix_length([one.prompt for one in drawn])
    windows, log_probs, entropies = [], [], []
    for i in range(0, len(drawn), batch_size):
        some = drawn[i : i + batch_size]
        own = torch.stack([one.windows for one in some]).to(model.backbone.device)
        prepared = model.backbone.prepare([one.prompt for one in some], length)
        codes = geometry.gather(geometry.final_codes(own))
        found = predict(model, prepared, own, codes, sampling)
        windows.append(own.cpu())
        log_probs.append(found.log_probs.cpu())
        entropies.append(found.entropies.cpu())
    facts: dict = {"entropy": means(by_slot(torch.cat(entropies), geometry))}
    if geometry.stages > 1:
        facts["stages"] = of_stages(torch.cat(windows), torch.cat(log_probs), geometry)
    return facts


def of_stages(windows: Tensor, log_probs: Tensor, geometry: Windows) -> dict:
    """Statistics by stage, from drawn windows [B, N, k, S] and the log-probabilities [B, N, k] of
    the final codes in all slots, over positions that went through all stages:

    - flipped, agreeing: see `stage_changes`;
    - two_draws: how often two draws from the final code's distribution would agree;
    - total_variation: 1/2 sum |q - p| between the distributions q of stage r and p of the final
      code x. Since x is a draw from p, it is estimated by the mean of max(0, 1 - q(x) / p(x)).
    """
    q = [stage[..., 0] for stage in _stages(log_probs[..., None].double(), geometry)]
    # Rounding can put a drawn code just outside a filter; such a code is counted as no distance.
    moved = [(1 - (draft - q[-1]).exp()).nan_to_num(0.0) for draft in q[:-1]]
    far = [share.clamp(min=0).mean(1) for share in moved]
    changes = {name: means(shares) for name, shares in stage_changes(windows, geometry).items()}
    return changes | {
        "two_draws": means(q[-1].exp().mean(1, keepdim=True)),
        "total_variation": means(torch.stack(far, dim=1)),
    }


def stage_changes(windows: Tensor, geometry: Windows) -> dict[str, Tensor]:
    """Shares of codes by image, [B, stages - 1], over positions that went through all stages:
    "flipped" differ between stages r and r + 1, "agreeing" are the final code at stage r already.
    """
    codes = _stages(windows, geometry)
    flipped = [(a != b).any(-1).double().mean(1) for a, b in pairwise(codes)]
    agreeing = [(stage == codes[-1]).all(-1).double().mean(1) for stage in codes[:-1]]
    return {"flipped": torch.stack(flipped, dim=1), "agreeing": torch.stack(agreeing, dim=1)}


def _stages(values_BNkx: Tensor, geometry: Windows) -> list[Tensor]:
    """The values at each stage, [B, positions, x], of positions that went through all stages."""
    drafted = _drafted(geometry)
    return [geometry.stage_codes(values_BNkx, r + 1)[:, drafted] for r in range(geometry.stages)]


def _drafted(geometry: Windows) -> Tensor:
    """Which positions went through all stages, bool [T].

    The first positions did not, because no earlier window drafted them. If the stride does not
    divide the window's size, some others did not, because the earliest window ends before them.
    """
    position = torch.arange(geometry.tokens)
    window, slot = position // geometry.stride, position % geometry.stride
    deepest = (geometry.size - 1 - slot) // geometry.stride
    return torch.minimum(window, deepest) == geometry.stages - 1


# -- images with known codes -----------------------------------------------------------------------
Known = dict[str, dict[str, Tensor]]
"""Kind of drafts in the input -> "loss" or "entropy" -> means over each image's windows, [B, k]."""


def of_known(model: TensorAR, batches: Iterable) -> Known:
    """Loss and entropy by slot, given the true codes before a window and drafts of two kinds, as in
    validation (`t2i.training.validation`). Batches are training batches.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for batch in batches:
        condition = model.backbone.encode_condition(batch.prepared)
        keys = to_device(batch.keys, batch.codes.device)
        inputs = {"own_drafts": model.own_draft_windows(batch.codes, condition, keys)}
        if model.windows.stages > 1:
            inputs["noised_truth"] = model.noised_windows(batch.codes, keys)
        truth = model.windows.gather(batch.codes)
        for kind, windows in inputs.items():
            noise = keys if kind == "noised_truth" and model.uses_gaussian_noise else None
            predicted = predict(model, batch.prepared, windows, truth, gaussian_keys=noise)
            kept = found.setdefault(kind, {"loss": [], "entropy": []})
            kept["loss"].append(by_slot(-predicted.log_probs, model.windows).cpu())
            kept["entropy"].append(by_slot(predicted.entropies, model.windows).cpu())
    return {
        kind: {name: torch.cat(parts) for name, parts in kept.items()}
        for kind, kept in found.items()
    }


def known_means(known: Known) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Means over images."""
    return {
        kind: {name: means(values) for name, values in facts.items()}
        for kind, facts in known.items()
    }


def loss_difference(a: Known, b: Known) -> dict[str, list[float]]:
    """The loss of final codes (slot 0, own drafts) of a minus that of b, on the same images."""
    of_a, of_b = (known["own_drafts"]["loss"][:, :1] for known in (a, b))
    return means(of_a - of_b)


@torch.no_grad()
def repairs(model: TensorAR, control: TensorAR, batches: Iterable) -> dict[str, float]:
    """Compare each position's last draft, and the code drawn after it, with the truth. Both models
    draw every position once, from the true codes before it, with the same random numbers; the
    control sees no draft. Returns shares:

    - draft_right: drafts that are the true code;
    - corrected: wrong drafts whose final code is right;
    - spoilt: right drafts whose final code is wrong;
    - control_corrected, control_spoilt: the same for the control's codes.

    A share with nothing to count (such as spoilt, if no draft was right) is left out.
    """
    assert model.config.k > 1, "needs drafts"
    counts = torch.zeros(2, 2, 2)  # draft right, model right, control right
    for batch in batches:
        keys = to_device(batch.keys, batch.codes.device)
        condition = model.backbone.encode_condition(batch.prepared)
        own = model.own_draft_windows(batch.codes, condition, keys)
        truth = batch.codes[:, 1:]
        outcomes = [(own[:, :-1, 1] == truth).all(-1)]
        for m, windows in ((model, own), (control, control.windows.gather(batch.codes))):
            outcomes.append((_first_slot(m, batch, windows)[:, 1:] == truth).all(-1))
        index = 4 * outcomes[0].long() + 2 * outcomes[1].long() + outcomes[2].long()
        counts += torch.bincount(index.flatten(), minlength=8).view(2, 2, 2).cpu()
    return repair_shares(counts)


def repair_shares(counts: Tensor) -> dict[str, float]:
    """The shares of `repairs`, from counts [draft right, model right, control right]."""
    wrong, right = counts
    shares = {
        "draft_right": (right.sum(), counts.sum()),
        "corrected": (wrong[1].sum(), wrong.sum()),
        "spoilt": (right[0].sum(), right.sum()),
        "control_corrected": (wrong[:, 1].sum(), wrong.sum()),
        "control_spoilt": (right[:, 0].sum(), right.sum()),
    }
    return {name: float(part / whole) for name, (part, whole) in shares.items() if whole > 0}


def _first_slot(model: TensorAR, batch, windows: Tensor) -> Tensor:
    """Codes int64 [B, T, S] drawn for slot 0 of every window, given input windows."""
    condition = model.backbone.encode_condition(batch.prepared)
    d_BND = model.decode_slots(model.hidden(condition, windows))[:, :, 0]
    position_N = torch.arange(d_BND.shape[1])
    return model.draw(d_BND, to_device(fold(batch.keys[:, None], 5000, position_N), d_BND.device))

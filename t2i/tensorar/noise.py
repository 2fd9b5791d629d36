"""Noise schedules, and how training corrupts the drafts in input windows.

Slot 0 of an input window is the true code. Slot j >= 1 is corrupted with strength b(j), which grows
with the distance from the final slot.

Schedules, with u = j / k:
    linear       b = u
    sine         b = sin(pi u / 2)
    sqrt         b = u ** 0.5
    exponential  b = 1 - exp(-2 u), that is 1 - exp(-j / (k / 2))
The papers name these four, but the table of formulas is missing from every copy that we have (a
public review quotes the "1/(k/2)" of the exponential one). With u = j / k the last draft keeps some
signal (b < 1 for j = k - 1). k = 2 needs this: otherwise its only draft would be pure noise.

Shapes: B batch, N windows, k slots, S sub-tokens, V vocabulary, C codebook width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.rng import fold, integers, uniforms
from t2i.tensorar.method import Schedule

_ROWS_AT_ONCE = 8192
"""How many vectors are compared with the whole codebook at a time."""
GAUSSIAN_VARIANCE = 0.1
"""Variance of the embedding noise in the ablation (arXiv 2505.16324, section 4.3)."""


def schedule_strengths(schedule: Schedule, k: int, floor: float = 0.0) -> list[float]:
    """b(0) .. b(k-1); b(0) is 0, and `floor` rescales the others from [0, 1] to [floor, 1]."""
    b = {
        "linear": lambda u: u,
        "sine": lambda u: math.sin(math.pi * u / 2),
        "sqrt": lambda u: u**0.5,
        "exponential": lambda u: 1 - math.exp(-2 * u),
    }[schedule]
    return [0.0] + [floor + (1 - floor) * b(j / k) for j in range(1, k)]


def corrupt_categorical(
    windows: Tensor, strengths_k: Tensor, subvocabs: tuple[int, ...], keys: Tensor
) -> Tensor:
    """Replace a whole token, with probability b(j), by one drawn uniformly (ICLR version).

    windows int64 [B, N, k, S], strengths fp32 [k], keys int64 [B] -> int64 [B, N, k, S].
    """
    replaced = uniforms(fold(keys, 0), *windows.shape[1:3]) < strengths_k
    noise = torch.stack(
        [integers(fold(keys, 1 + s), v, *windows.shape[1:3]) for s, v in enumerate(subvocabs)],
        dim=-1,
    )
    return torch.where(replaced[..., None], noise, windows)


def corrupt_codebook(
    windows: Tensor, strengths_k: Tensor, vectors: tuple[Tensor, ...], keys: Tensor
) -> Tensor:
    """Mix each code's vector with that of a random code, then take the codebook entry nearest by
    cosine (arXiv version, Algorithm 2).

    windows int64 [B, N, k, S], strengths fp32 [k], vectors [V_s, C] per sub-token, keys int64 [B]
    -> int64 [B, N, k, S].
    """
    mixed = []
    for s, table_VC in enumerate(vectors):
        table_VC = table_VC.float()
        noise = integers(fold(keys, 1 + s), len(table_VC), *windows.shape[1:3])
        b = strengths_k[:, None]
        x = (1 - b) * table_VC[windows[..., s]] + b * table_VC[noise]
        mixed.append(_nearest_by_cosine(x, F.normalize(table_VC, dim=-1)))
    noised = torch.stack(mixed, dim=-1)
    # Keeps slot 0 even where two codes share a direction.
    return torch.where(strengths_k[:, None] > 0, noised, windows)


def _nearest_by_cosine(x: Tensor, unit_VC: Tensor) -> Tensor:
    """Index of the row with the largest cosine; in chunks, as [B, N, k, V] scores would not fit."""
    flat = x.reshape(-1, x.shape[-1])
    nearest = [(chunk @ unit_VC.T).argmax(-1) for chunk in flat.split(_ROWS_AT_ONCE)]
    return torch.cat(nearest).view(x.shape[:-1])


def corrupt_bits(
    windows: Tensor, strengths_k: Tensor, subvocabs: tuple[int, ...], keys: Tensor
) -> Tensor:
    """Resample every bit of a code with probability b(j), i.e. flip it with probability b(j) / 2.

    This is codebook noise for a codebook of all sign patterns (Open-MAGVIT2): each differing bit
    adds 4 to the squared distance, so a kernel that decays exponentially with it factors into
    independent bits. b = 0 changes nothing, b = 1 gives uniform codes. At the same b, a whole code
    survives less often than with the other kinds of noise: (1 - b/2)^18 for 18 bits.

    windows int64 [B, N, k, S], strengths fp32 [k], subvocabs powers of 2, keys int64 [B] -> int64
    [B, N, k, S].
    """
    flipped = []
    for s, vocab in enumerate(subvocabs):
        bits = vocab.bit_length() - 1
        assert vocab == 1 << bits, vocab
        u = uniforms(fold(keys, 1 + s), *windows.shape[1:3], bits)
        places = torch.arange(bits, device=windows.device)
        flipped.append(((u < strengths_k[:, None] / 2).long() << places).sum(-1))
    return windows ^ torch.stack(flipped, dim=-1)

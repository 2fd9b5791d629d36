"""Random numbers that are a pure function of their key.

There is no state, so no order, batch or device can change them. A counter-based generator: the key
(seed, sample, ...) and the position of a number in its array are mixed by the finaliser of
SplitMix64 (Steele et al., OOPSLA 2014), vectorised on int64 tensors. Training noise is keyed by
(seed, position in the run), images by (seed, prompt index, sample index): the same on any batch
split, process count or device.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A new tensor; int64 shifts carry the sign, and the mask makes the shift logical."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    # In place where the tensor is this function's: a new one for each operation is half the time.
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def _times_golden(x: Tensor) -> Tensor:
    """Modulo 2^64, in compiled code as well.

    Where a compiler knows the numbers (of `arange`, say) it would multiply signed ones in C++ or
    Python's endless ones: the one overflows as it likes, the other is not cut off. That it does not
    see through the `or`, which changes nothing, keeps the product a tensor's.
    """
    return x.bitwise_or(0) * _GOLDEN


def fold(keys: Tensor, *values: int | Tensor) -> Tensor:
    """New keys int64 of keys int64 and further integers, each broadcast against the keys."""
    for value in values:
        if isinstance(value, int):  # filled in where the keys are: nothing is copied there
            value = torch.full((), value, dtype=torch.long, device=keys.device)
        keys = _mix((keys ^ _mix(_times_golden(value.to(keys.device)) + 1)) + _GOLDEN)
    return keys


def make_keys(seed: int, *values: int | Tensor) -> Tensor:
    """Keys int64 of a stream: `make_keys(seed, prompt, samples)` gives one per sample."""
    shape = torch.broadcast_shapes(*(torch.as_tensor(v).shape for v in values)) if values else ()
    return fold(torch.full(shape, seed, dtype=torch.long), *values)


def uniforms(keys: Tensor, *shape: int) -> Tensor:
    """fp32 numbers in [0, 1), [*keys.shape, *shape]; 24 random bits each."""
    return _shift_right(_bits(keys, shape), 40).float() * 2.0**-24


def integers(keys: Tensor, high: int, *shape: int) -> Tensor:
    """int64 numbers in [0, high), [*keys.shape, *shape]."""
    return _shift_right(_bits(keys, shape), 1) % high


def normals(keys: Tensor, *shape: int) -> Tensor:
    """fp32 standard normal numbers, [*keys.shape, *shape] (Box-Muller)."""
    radius = (-2 * torch.log1p(-uniforms(fold(keys, 1), *shape))).sqrt()
    return radius * torch.cos(2 * torch.pi * uniforms(fold(keys, 2), *shape))


def gumbels(keys: Tensor, counters: Tensor) -> Tensor:
    """fp32 standard Gumbel numbers [..., n]: of the stream of each key int64 [...], the numbers
    that `counters` int64 [..., n] names.
    """
    bits = _mix(keys[..., None] + _times_golden(counters + 1))
    # All 63 bits, never 0: the largest of many numbers comes from near 0, and has to be exact.
    unit = _shift_right(bits, 1).bitwise_or_(1).float().mul_(2.0**-63)
    return unit.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    counters = _times_golden(torch.arange(1, count + 1, device=keys.device))
    return _mix(_mix(keys[..., None] + counters)).view(*keys.shape, *shape)

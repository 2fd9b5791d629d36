"""Random numbers that are a pure function of their key.

There is no state, so no order, batch or device can change them. The generator is counter-based: the
finalizer of SplitMix64 mixes the key (seed, sample, ...) with a number's position in its array
(Steele et al., OOPSLA 2014), vectorized on int64 tensors. Training noise is keyed by
(seed, position in the run), images by (seed, prompt index, sample index): the same on any batch
split, process count or device.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift, as a new tensor: the mask clears the sign bits that int64 shifts copy."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    # In place on this function's own tensors: allocating one per operation is half the time.
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def _times_golden(x: Tensor) -> Tensor:
    """Multiply by the golden-ratio constant modulo 2^64, in compiled code as well.

    A compiler that knows the values (such as those of `arange`) would multiply them as signed C++
    integers (overflow is undefined) or as Python integers (no wrap-around). The `or` changes no
    value, but the compiler cannot see through it, so the product stays a tensor operation.
    """
    return x.bitwise_or(0) * _GOLDEN


def fold(keys: Tensor, *values: int | Tensor) -> Tensor:
    """New int64 keys from int64 keys and further integers, each broadcast against the keys."""
    for value in values:
        if isinstance(value, int):  # created on the keys' device: nothing is copied to it
            value = torch.full((), value, dtype=torch.long, device=keys.device)
        keys = _mix((keys ^ _mix(_times_golden(value.to(keys.device)) + 1)) + _GOLDEN)
    return keys


def make_keys(seed: int, *values: int | Tensor) -> Tensor:
    """The int64 keys of streams: `make_keys(seed, prompt, samples)` gives one key per sample."""
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
    """fp32 standard Gumbel numbers [..., n]: those at positions `counters`, int64 [..., n], in the
    stream of each key, int64 [...].
    """
    bits = _mix(keys[..., None] + _times_golden(counters + 1))
    # All 63 bits, never 0: the largest numbers come from units near 0 and must be exact.
    unit = _shift_right(bits, 1).bitwise_or_(1).float().mul_(2.0**-63)
    return unit.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    counters = _times_golden(torch.arange(1, count + 1, device=keys.device))
    return _mix(_mix(keys[..., None] + counters)).view(*keys.shape, *shape)

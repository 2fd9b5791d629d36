"""Matrix products in fp32 on AMD processors.

torch leaves those of a CPU to Intel's MKL, which keeps AMD's processors to registers half as wide
as they have. oneDNN, which comes with torch as well, does not, and torch hands it fp32 products
once these *may* be rounded to bf16. oneDNN does that where a processor has matrix units for it
(Intel's AMX), and nowhere else; products are tried before this is relied on.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_SHORT = 192
"""Inputs of a sequence up to which fused attention is a great many small products, which oneDNN is
slow to begin.
"""
_CLOSE = 1e-6
"""Root mean square error of a product in fp32, as a share; in bf16 it is above 1e-3."""

_attention_by_products = False
"""Within `fast_products`, with short sequences."""


@contextmanager
def fast_products(device: torch.device, inputs: int | None = None) -> Iterator[None]:
    """Within it products of fp32 are oneDNN's, where that is faster and as exact (on a CPU of AMD
    with AVX-512). `inputs`: the length of sequences that attend; if they are short, attention is
    made of such products, too.
    """
    if device.type != "cpu" or not _pays():
        yield
        return
    global _attention_by_products
    short = inputs is not None and inputs <= _SHORT
    attention = sdpa_kernel(SDPBackend.MATH) if short else nullcontext()
    before, _attention_by_products = _attention_by_products, short
    try:
        with _handed_over(), attention:
            yield
    finally:
        _attention_by_products = before


def prefers_products(device: torch.device) -> bool:
    """Whether attention is to be made of products; torch's own heeds it where it isn't compiled."""
    return device.type == "cpu" and _attention_by_products


@cache
def _pays() -> bool:
    info = Path("/proc/cpuinfo")  # torch does not tell whose processor it is
    if not info.is_file() or "AuthenticAMD" not in info.read_text():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _as_exact()


@contextmanager
def _handed_over() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _as_exact() -> bool:
    """Whether oneDNN's products, with and without a transposed factor, are those of fp32."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with _handed_over():
        found = a @ b, a @ b.T, a.T @ b
    exact = (x.double() @ y.double() for x, y in ((a, b), (a, b.T), (a.T, b)))
    return all(_error(f, e) < _CLOSE for f, e in zip(found, exact, strict=True))


def _error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).square().mean() / exact.square().mean()).sqrt())

"""Matrix products in fp32 on AMD processors.

On a CPU, torch uses Intel's MKL for them, which uses only half the register width of AMD's
processors. oneDNN, which torch also ships, uses the full width, and torch passes it fp32 products
once they *may* be rounded to bf16. oneDNN rounds only on processors with matrix units for bf16
(Intel's AMX); test products confirm that it does not round here.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_SHORT = 192
"""Longest sequence for which attention is computed with plain products: fused attention would start
a great many small products, and starting one is slow in oneDNN.
"""
_CLOSE = 1e-6
"""Bound on the relative root mean square error of an fp32 product; bf16 is above 1e-3."""

_attention_by_products = False
"""True within `fast_products` with short sequences."""


@contextmanager
def fast_products(device: torch.device, inputs: int | None = None) -> Iterator[None]:
    """Within it, oneDNN computes fp32 products where that is faster and as exact (on AMD CPUs with
    AVX-512). `inputs`: length of the sequences in attention; if short, attention is computed with
    these products, too.
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
    """Whether to compute attention with plain products; torch's own attention already does so,
    except in compiled code.
    """
    return device.type == "cpu" and _attention_by_products


@cache
def _pays() -> bool:
    info = Path("/proc/cpuinfo")  # torch does not report the vendor
    if not info.is_file() or "AuthenticAMD" not in info.read_text():
        return False
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9: no switch
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
    """Whether oneDNN's products, with and without a transposed factor, are exact to fp32."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with _handed_over():
        found = a @ b, a @ b.T, a.T @ b
    exact = (x.double() @ y.double() for x, y in ((a, b), (a, b.T), (a.T, b)))
    return all(_error(f, e) < _CLOSE for f, e in zip(found, exact, strict=True))


def _error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).square().mean() / exact.square().mean()).sqrt())

"""Matrix products in fp32 on AMD processors, where Intel's MKL, which torch uses, is slow.

With AVX-512, MKL uses only half the register width of these processors. oneDNN, which torch also
ships, uses the full width, and torch passes it fp32 products once they *may* be rounded to bf16.
oneDNN rounds only on processors with matrix units for bf16 (Intel's AMX); test products confirm
that it does not round here.

Without AVX-512, MKL is fast for large products, but slow for the few rows of drawing steps. There
the code that torch generates for products replaces it in compiled steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

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
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9: no switch
        return False
    return _amd_registers() == "AVX512" and _as_exact()


@cache
def _amd_registers() -> str:
    """The widest registers that torch uses on an AMD processor (AVX2, AVX512); "" on others."""
    info = Path("/proc/cpuinfo")  # torch does not report the vendor
    if not info.is_file() or "AuthenticAMD" not in info.read_text():
        return ""
    return torch.backends.cpu.get_cpu_capability()


def generates_products(dtype: torch.dtype) -> bool:
    """Whether torch generates the code of compiled steps' products on this CPU: twice as fast for a
    few rows as MKL there (docs/performance.md). Only fp32 was measured.
    """
    if dtype != torch.float32 or _amd_registers() != "AVX2":
        return False
    return hasattr(select_algorithm(), "add_preprocessing_fn")


@contextmanager
def generated_products(dtype: torch.dtype) -> Iterator[None]:
    """Within it, torch generates the code of the products that it compiles, where that pays."""
    if not generates_products(dtype):
        yield
        return
    global _generate
    _prefer_generated()
    before, _generate = _generate, True
    try:
        with select_algorithm().config.patch(
            {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,CPP"}
        ):
            yield
    finally:
        _generate = before


def select_algorithm() -> Any:
    """The part of torch that chooses the code of a compiled product; takes a second to import."""
    from torch._inductor import select_algorithm as found

    return found


_generate = False
"""True within `generated_products`."""


@cache
def _prefer_generated() -> None:
    select_algorithm().add_preprocessing_fn(_first_choice)


def _first_choice(choices: list) -> list:
    """Leaves one choice for a product: otherwise torch would time them, and not always choose the
    same. That is generated code if there is some, but not for batched products: some of these are
    wrong (torch 2.14).
    """
    if not _generate:
        return choices
    library = [choice for choice in choices if not choice.name.startswith("cpp_")]
    own = [choice for choice in choices if choice.name.startswith("cpp_")]
    batched = any("bmm" in choice.name for choice in library)
    return (library if batched else own)[:1] or choices[:1]


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

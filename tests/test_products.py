"""fp32 matrix products are handed to oneDNN only where they keep fp32 precision, and only within
`fast_products`.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from runs import tiny_run

from t2i import products
from t2i.models.blocks import attend
from t2i.products import fast_products
from t2i.tensorar import speed
from t2i.training.loop import train
from t2i.training.training_run import Run

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has no switch for this before 2.9"
)


def settings() -> tuple[str, bool]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("inputs, fused", [(64, False), (192, False), (193, True), (576, True)])
def test_products_are_handed_over_only_within_the_context(monkeypatch, inputs, fused):
    monkeypatch.setattr(products, "_pays", lambda: True)
    before = settings()
    with pytest.raises(KeyError), fast_products(CPU, inputs):
        assert settings() == ("bf16", fused)
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("device, pays", [("cpu", False), ("cuda", True), ("meta", True)])
def test_nothing_changes_where_it_does_not_pay(monkeypatch, device, pays):
    monkeypatch.setattr(products, "_pays", lambda: pays)
    before = settings()
    with fast_products(torch.device(device), 64):
        assert settings() == before


def test_rounded_products_are_detected(monkeypatch):
    """On a processor that multiplies in bf16, oneDNN would use the permission to round."""
    matmul = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float32 and settings()[0] == "bf16":
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products._as_exact()


def test_compiled_attention_uses_products_too(monkeypatch):
    """torch.compile ignores torch's own switch for fused attention."""
    monkeypatch.setattr(products, "_pays", lambda: True)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    plain, called = attend(q, k, v, None, None, 0), []

    def look(graph, _):
        called[:] = [node.target for node in graph.graph.nodes]
        return graph.forward

    def compiled() -> torch.Tensor:
        return torch.compile(attend, backend=look, fullgraph=True)(q, k, v, None, None, 0)

    torch.testing.assert_close(compiled(), plain)
    assert F.scaled_dot_product_attention in called
    with fast_products(CPU, 6):
        torch.testing.assert_close(compiled(), plain)
    assert called and F.scaled_dot_product_attention not in called


def test_training_and_compilation_hand_products_over(monkeypatch, tiny_world):
    """Training steps do, and drawing steps only while they are compiled."""
    monkeypatch.setattr(products, "_pays", lambda: True)
    seen, own = [], Run._train_step
    monkeypatch.setattr(Run, "_train_step", lambda run: seen.append(settings()[0]) or own(run))
    train(tiny_run(tiny_world, "handed-over", steps=2))
    assert seen == ["bf16", "bf16"] and settings()[0] != "bf16"

    def compile_nothing(function, **_):
        return lambda *_: seen.append(settings()[0])

    monkeypatch.setattr(torch, "compile", compile_nothing)
    run, before = speed._frozen(lambda *_: None), settings()[0]
    seen.clear()
    for extent in (4, 5):
        run(torch.nn.Linear(1, 1), None, extent)
    assert seen == ["bf16", before], "compiling packs the weights; later calls use MKL"


def test_handed_over_products_have_fp32_precision():
    a, b = (torch.randn(300, 70, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a, b = a.requires_grad_(), b.requires_grad_()
    exact = a.double() @ b.double().T
    wanted = torch.autograd.grad(exact.square().sum(), (a, b))
    with fast_products(CPU, 64):
        found = torch.nn.functional.linear(a, b)
        grads = torch.autograd.grad(found.square().sum(), (a, b))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    for grad, own in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, own, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("registers", "dtype", "known"),
    [
        ("AVX2", torch.float32, True),
        ("AVX2", torch.bfloat16, False),
        ("AVX512", torch.float32, False),
        ("", torch.float32, False),  # another maker's processor
    ],
)
def test_products_are_generated_only_where_this_was_measured(monkeypatch, registers, dtype, known):
    monkeypatch.setattr(products, "_amd_registers", lambda: registers)
    possible = hasattr(products.select_algorithm(), "add_preprocessing_fn")
    assert products.generates_products(dtype) == (known and possible)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("cpp_CppMicroGemmFP32Vec_1", "_mkl_linear"), "cpp_CppMicroGemmFP32Vec_1"),
        (("bmm", "cpp_CppMicroGemmFP32Vec_2"), "bmm"),
        (("mm", "other"), "mm"),
    ],
)
def test_one_choice_is_left_so_that_nothing_is_timed(monkeypatch, names, chosen):
    choices = [SimpleNamespace(name=name) for name in names]
    assert products._first_choice(choices) == choices, "others' compilations stay as they are"
    monkeypatch.setattr(products, "_generate", True)
    assert [choice.name for choice in products._first_choice(choices)] == [chosen]

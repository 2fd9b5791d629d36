"""Training with compiled blocks gives the same results, with one compilation for all blocks."""

import pytest
import torch
from helpers import tiny_codes, tiny_prepared
from runs import tiny_run
from torch import nn

from t2i import products
from t2i.errors import UserError
from t2i.models import blocks
from t2i.models.rar.rar_model import RARAttention
from t2i.products import fast_products
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.speed import compiler_lacks
from t2i.training.check import check
from t2i.training.config import EngineOptions, TrainConfig
from t2i.training.loop import train

CPU = torch.device("cpu")


def step(model: TensorAR, compiled: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    backbone = model.backbone
    backbone.compile_blocks = compiled
    condition = backbone.encode_condition(tiny_prepared(backbone, 3))
    windows = model.noised_windows(tiny_codes(backbone, 3, 16), torch.arange(3))
    model.zero_grad()
    loss = model(tiny_codes(backbone, 3, 16), condition, windows).loss
    loss.backward()
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_lacks(CPU)), reason="no C++ compiler")
@pytest.mark.parametrize("handed_over", [False, True])
def test_compiled_blocks_train_alike(backbone, monkeypatch, handed_over):
    if handed_over and not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this version of torch cannot hand products over")
    torch.compiler.reset()  # after a few shapes in one process, torch stops compiling
    model = TensorAR(backbone, presets.iclr2026()).train().requires_grad_(True)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, RARAttention):
            layer.attn_dropout = 0.0
    plain = step(model, False)
    compiled = []
    backend = torch.compile(
        blocks._run_block, backend=lambda graph, _: compiled.append(1) or graph.forward
    )
    monkeypatch.setattr(blocks, "_compiled_block", lambda: backend)
    step(model, True)
    assert len(compiled) == 1, "one compilation for both blocks"
    monkeypatch.undo()
    monkeypatch.setattr(products, "_pays", lambda: handed_over)
    with fast_products(CPU, 16):
        fast = step(model, True)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_training_needs_the_compiler_before_it_starts(tiny_world, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = tiny_run(tiny_world, "uncompiled", engine__compile=True)
    for begin in (check, train):
        with pytest.raises(UserError, match=r"engine.compile needs a C.. compiler .*no-compiler"):
            begin(config)


def test_compiled_blocks_are_refused_with_sharded_weights():
    with pytest.raises(UserError, match="needs whole weights in every process"):
        TrainConfig(engine=EngineOptions(compile=True, zero_stage=3))

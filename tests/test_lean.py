"""Operations that save less for the backward pass: values and gradients stay equal, bit for bit."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from t2i.models import lean
from t2i.models.blocks import Block, LlamaConfig, attend, causal_mask, rope_table
from t2i.rng import make_keys, normals
from t2i.tensorar.codec import QueryTransformer
from t2i.tensorar.method import TensorARConfig

CONFIG = LlamaConfig(dim=32, n_layer=1, n_head=2, grid=(2, 3), resid_dropout=0.3, ffn_dropout=0.3)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normals(make_keys(seed), *shape).to(dtype)


def passed(work, inputs: list[Tensor]) -> tuple[list[Tensor], int]:
    """The output and all gradients, and the number of bytes saved for the backward pass."""
    leaves, kept = [x.clone().requires_grad_() for x in inputs], {}
    own = {x.data_ptr() for x in leaves}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage, x  # held, so that its address is not reused
        return x

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = work(*leaves)
    size = sum(storage.nbytes() for storage, _ in kept.values())
    (out.float() * numbers(9, *out.shape)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)], size


def compare(work, inputs: list[Tensor]) -> float:
    """The number of bytes saved, relative to the plain operations; AssertionError if a bit
    differs.
    """
    (results, size) = passed(work, inputs)
    with patch.object(lean, "keep_less", lambda: False):
        expected, plain_size = passed(work, inputs)
    assert all(map(torch.equal, results, expected))
    return size / plain_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_give_the_same_bits_and_save_less(dtype):
    x, y = (numbers(seed, 3, 5, 32, dtype=dtype) for seed in (1, 2))
    weight = numbers(3, 32, dtype=dtype)
    dropout = lean.Dropout(0.3)

    def gated(gate, x):
        return lean.swiglu(gate * 1, x * 1)  # as in a block, inputs are other operations' results

    assert compare(gated, [x, y]) < 0.7
    assert compare(lambda x, weight: lean.rms_norm(x * 1, weight, 1e-5), [x, weight]) < 0.7
    assert compare(dropout, [x]) < 0.7
    dropped = passed(dropout, [x])[0][0]
    assert 0.1 < (dropped == 0).float().mean() < 0.5
    assert torch.equal(dropout.eval()(x.requires_grad_()), x)


def test_a_block_saves_less():
    block = Block(CONFIG, 0).train()
    rope = rope_table(CONFIG)[1:]
    x = numbers(4, 2, 6, 32)
    names, values = zip(*block.named_parameters(), strict=True)

    def work(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(block, given, (x, rope, None, None))

    assert compare(work, [x, *(v.detach() for v in values)]) < 0.75


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32", "autocast"])
def test_all_layers_keep_the_same_mask(rounded):
    """Otherwise each layer would keep a copy, as large as batch x inputs x inputs."""
    x, held = numbers(5, 2, 6, 32), []
    project = torch.nn.Linear(32, 32)

    def pack(saved: Tensor) -> Tensor:
        held.append(saved)
        return saved

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=rounded),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
    ):
        mask = causal_mask(x, torch.tensor([[True, True], [False, True]]), None)
        assert not mask.diagonal(dim1=-2, dim2=-1).any(), "an entry without any key would give NaN"
        for layer in range(3):
            q = project(x).unflatten(-1, (2, 16)).transpose(1, 2)
            x = attend(q, q, q, mask, None, layer)
    masks = [saved.data_ptr() for saved in held if saved.shape[-2:] == (6, 6)]
    assert len(masks) == 3 and set(masks) == {mask.data_ptr()}


@pytest.mark.parametrize("memory_type", [torch.float32, torch.bfloat16])
def test_codec_norms_can_be_fused_under_autocast(memory_type, monkeypatch):
    """torch fuses only equal dtypes, and warns otherwise; Janus' embeddings are bf16 there."""
    own, given = torch.rms_norm, []
    monkeypatch.setattr(
        torch, "rms_norm", lambda x, *rest: given.append((x.dtype, rest[1].dtype)) or own(x, *rest)
    )
    reader = QueryTransformer(1, TensorARConfig(k=2, mlp=True), 16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        reader(numbers(6, 3, 2, 16, dtype=memory_type))
    assert len(given) > 2 and set(given) == {(torch.float32, torch.float32)}

"""The chunked loss equals the naive loss (value, sums by slot, gradients) and keeps no logits."""

import pytest
import torch
import torch.nn.functional as F
from helpers import open_gates, rare, tiny_codes, tiny_prepared
from torch import Tensor

from t2i.rng import make_keys
from t2i.tensorar import loss, presets
from t2i.tensorar.model import TensorAR

BATCH = 3
KEYS = make_keys(0, torch.arange(BATCH))
EXACT, BF16 = 1e-5, 5e-2
"""Largest relative differences of gradients; in bf16 they are sums of rounded numbers."""


def naive_loss(model: TensorAR, codes: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The loss from all logits at once, and its sums by slot."""
    condition = model.backbone.encode_condition(tiny_prepared(model.backbone, BATCH))
    targets, valid = model.windows.gather(codes), model.windows.valid().float()
    d = model.decode_slots(model.hidden(condition, windows))
    sums = torch.zeros(model.config.k)
    for s, logits in enumerate(model.slot_logits(d, targets)):
        losses = F.cross_entropy(logits.flatten(0, 2), targets[..., s].flatten(), reduction="none")
        sums = sums + (losses.view(targets.shape[:3]) * valid).sum((0, 1))
    w = torch.tensor(model.config.weights())
    return (w * sums).sum() / (w * valid.sum(0) * len(codes)).sum(), sums


def gradients(model: TensorAR) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", ["whole", rare("frozen"), "wrapped", "bf16"])
@pytest.mark.parametrize("k", [rare(1), rare(4), 5])
def test_chunked_loss_equals_the_naive_loss(backbone, k, form, recompute, monkeypatch):
    model = open_gates(
        TensorAR(backbone, presets.iclr2026(k=k, slot_weights=(1.0, 0.5, 0.25)))
    ).eval()
    backbone.gradient_checkpointing = recompute
    for limit, value in (("LOGITS_AT_ONCE", 96), ("ROWS_AT_ONCE", 7), ("LOGITS_OF_A_SAMPLE", 40)):
        monkeypatch.setattr(loss, limit, value)
    if form == "wrapped":  # as PEFT's layers are, and layers sharded by ZeRO-3
        backbone.sharded = True
    if form == "frozen":
        for layer in backbone.image_layers().values():
            layer.requires_grad_(False)
    codes = tiny_codes(backbone, BATCH, model.windows.tokens)
    windows, kept = model.noised_windows(codes, KEYS), []
    condition = backbone.encode_condition(tiny_prepared(backbone, BATCH))
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        logits = tensor.dim() == 2 and tensor.shape[1] in backbone.spec.subvocabs
        if logits and tensor.dtype == torch.float32 and tensor.data_ptr() not in weights:
            kept.append(tensor.shape)
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=form == "bf16"):
        expected, sums = naive_loss(model, codes, windows)
        expected.backward()
        whole = gradients(model)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = model(codes, condition, windows)
        found.loss.backward()
        with torch.no_grad():
            unkept = model(codes, condition, windows)
    assert not kept
    exact = 1e-3 if form == "bf16" else EXACT  # products of other shapes round differently
    for losses in (found, unkept):
        torch.testing.assert_close(losses.loss.detach(), expected.detach(), rtol=exact, atol=0)
        torch.testing.assert_close(losses.sums, sums.detach(), rtol=exact, atol=exact)
    now = gradients(model)
    assert now.keys() == whole.keys()
    # Gradients that are zero except for rounding (such as that of the keys' bias) are not compared
    # relative to their own size.
    least = (1e-2 if form == "bf16" else 1e-3) * max(value.norm() for value in whole.values())
    for name, value in now.items():
        difference = (value - whole[name]).norm() / (whole[name].norm() + least)
        assert difference < (BF16 if form == "bf16" else EXACT), name


def test_a_frozen_head_gets_no_gradient():
    head = torch.nn.Linear(8, 20).requires_grad_(False)
    x = torch.randn(6, 8, requires_grad=True)
    rows = [loss.Rows(x, torch.arange(6), torch.full((6,), 1 / 6), 1)]
    total, each = loss.cross_entropy(head, rows, 20, usable=True)
    (2 * total).backward()
    expected = 2 * F.cross_entropy(head(x.detach().requires_grad_()), torch.arange(6))
    assert total.item() == pytest.approx(expected.item() / 2) and head.weight.grad is None
    copy = x.detach().requires_grad_()
    (2 * F.cross_entropy(head(copy), torch.arange(6))).backward()
    torch.testing.assert_close(x.grad, copy.grad)
    assert not each[0].requires_grad


def test_gradients_of_bf16_heads_are_summed_in_fp32(monkeypatch):
    """In bf16 a sum of equal numbers stops growing at 256 of them."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(loss, "ROWS_AT_ONCE", 1)
    head = torch.nn.Linear(4, 3).bfloat16()
    x, codes = torch.ones(1000, 4, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long)
    rows = [loss.Rows(x, codes, torch.full((1000,), 1e-3), 1)]
    loss.cross_entropy(head, rows, 3, usable=True)[0].backward()
    found = [p.grad.float() for p in head.parameters()]
    head.zero_grad()
    F.cross_entropy(head(x[:1]).float(), codes[:1]).backward()
    for summed, one in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(summed, one.grad.float(), rtol=2e-2, atol=0)


def test_slot_zero_is_computed_apart_from_drafts(monkeypatch):
    """Its chunks hold the same rows as in the base model, so its results have the same bits."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * 20)
    monkeypatch.setattr(loss, "ROWS_AT_ONCE", 1)
    chunks = loss._chunks([6, 10], loss.rows_at_once(20, gpu=False))
    assert [(c.start, c.stop) for c in chunks] == [(0, 4), (4, 6), (6, 10), (10, 14), (14, 16)]

"""The cross entropy of windows, without holding all logits at once.

The logits of k slots would take most of a small model's memory in training (GPT-B, 8 images of 256
codes, k = 4: three copies of 0.5 GB). Here they exist for only some rows at a time: the gradients
of the head's input and weight are computed in the forward pass, and only these are kept for the
backward pass. This takes no more work than computing them later, and gives the same sums.

Shapes: B batch, N windows, k slots, S sub-tokens, D width, V vocabulary; R rows (all slots of all
windows), r some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i.models.base import Backbone
from t2i.models.blocks import product_type

LOGITS_AT_ONCE = 2**22
"""How many logits exist at once in training (but at least those of `ROWS_AT_ONCE` rows)."""
LOGITS_AT_ONCE_ON_A_GPU = 2**25
"""The same on a GPU, where a few large products are far faster than many small ones."""
ROWS_AT_ONCE = 256
"""Minimum number of rows per chunk: each chunk is one addition to the weight's gradient."""
LOGITS_OF_A_SAMPLE = 2**21
"""How many logits of one sample exist at once where no gradient is needed, or where the head is
called as a layer. Counted per sample, because the number of calls must not depend on how many
samples a process has: under ZeRO-3 all processes must take part in each call.
"""


@dataclass
class SlotLosses:
    """Cross entropy in nats per code, summed by slot; sums may be added over batches."""

    sums: Tensor
    """fp32 [k]"""
    counts: Tensor
    """fp32 [k]"""

    def means(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1)

    def weighted(self, weights: list[float]) -> Tensor:
        """sum_j w_j sums_j / sum_j w_j counts_j, the training loss."""
        w = filled(weights, self.sums.device)
        return (w * self.sums).sum() / (w * self.counts).sum()


@dataclass
class WindowLosses(SlotLosses):
    """The losses of one forward pass. `sums` carries no gradient; `loss` does."""

    loss: Tensor
    """The training loss: `weighted` by the method's slot weights."""


def slot_parts(k: int) -> list[slice]:
    """Slot 0 and the drafts. Slot 0 passes the head alone, in the same matrix shape as in the base
    model and hence with the same bits.
    """
    return [slice(0, 1), slice(1, k)] if k > 1 else [slice(0, 1)]


def filled(values: Sequence[float], device: torch.device) -> Tensor:
    """fp32 [n], filled on the device: a copy from the host cannot be recorded in a CUDA graph."""
    return torch.stack([torch.full((), v, device=device) for v in values])


def window_losses(
    backbone: Backbone, d_BNkD: Tensor, codes_BNkS: Tensor, valid_Nk: Tensor, weights_k: Tensor
) -> WindowLosses:
    """Cross entropy of the true codes of every window, from decoded slots."""
    batch, _, k = d_BNkD.shape[:3]
    counts = batch * valid_Nk.sum(0)
    scale_Nk = valid_Nk * weights_k / (counts * weights_k).sum()
    parts = slot_parts(k)
    scales = [scale_Nk[:, part].expand(batch, -1, -1).flatten() for part in parts]
    heads = [_heads(backbone, d_BNkD[:, :, part], codes_BNkS[:, :, part]) for part in parts]
    sums, loss = torch.zeros_like(counts), counts.new_zeros(())
    for s, states in enumerate(zip(*heads, strict=True)):
        rows = [
            Rows(x, codes_BNkS[:, :, part, s].flatten(), scale, batch)
            for (x, _), part, scale in zip(states, parts, scales, strict=True)
        ]
        head, vocab = states[0][1], backbone.spec.subvocabs[s]
        usable = type(head) is nn.Linear and not backbone.sharded  # not wrapped by PEFT
        of_head, losses = cross_entropy(head, rows, vocab, usable=usable)
        loss = loss + of_head
        for part, losses_R in zip(parts, losses, strict=True):
            valid = valid_Nk[:, part]
            sums[part] += (losses_R.view(batch, *valid.shape) * valid).sum((0, 1))
    return WindowLosses(sums, counts, loss)


def _heads(
    backbone: Backbone, d_BnkD: Tensor, codes_BnkS: Tensor
) -> list[tuple[Tensor, nn.Module]]:
    """The head's last layer for every sub-token, with its input [R, D]."""
    if backbone.gradient_checkpointing and torch.is_grad_enabled():
        states = checkpoint(backbone.all_heads, d_BnkD, codes_BnkS, use_reentrant=False)
    else:
        states = backbone.all_heads(d_BnkD, codes_BnkS)
    return [(x.flatten(0, -2), head) for x, head in states]


@dataclass
class Rows:
    """Some of a head's rows; those of slot 0 are never multiplied together with others."""

    x_RD: Tensor
    codes_R: Tensor
    """int64, the true codes"""
    scale_R: Tensor
    """fp32, the weight of each row in the loss"""
    batch: int
    """The number of samples that these rows belong to."""


def cross_entropy(
    head: nn.Module, rows: list[Rows], vocab: int, *, usable: bool
) -> tuple[Tensor, list[Tensor]]:
    """sum_R scale_R CE_R with its gradient, and each CE_R without one.

    Args:
        usable: the head's weight can be used directly. Otherwise (ZeRO-3 holds a shard of it, or
            PEFT has wrapped the layer) the layer is called for every part of the rows, and again in
            the backward pass.
    """
    sizes = [len(part.codes_R) for part in rows]
    if torch.is_grad_enabled() and usable:
        x, codes, scale = (
            torch.cat([getattr(part, name) for part in rows])
            for name in ("x_RD", "codes_R", "scale_R")
        )
        chunks = _chunks(sizes, rows_at_once(vocab, gpu=x.is_cuda))
        loss, losses = _ChunkedCrossEntropy.apply(x, head.weight, head.bias, codes, scale, chunks)
        return loss, list(losses.split(sizes))
    losses = [_in_parts(head, part, vocab) for part in rows]
    loss = torch.stack(
        [(each * part.scale_R).sum() for each, part in zip(losses, rows, strict=True)]
    ).sum()
    return loss, [each.detach() for each in losses]


def rows_at_once(vocab: int, *, gpu: bool) -> int:
    """Rows that pass the head together in training."""
    return max(ROWS_AT_ONCE, (LOGITS_AT_ONCE_ON_A_GPU if gpu else LOGITS_AT_ONCE) // vocab)


def _chunks(sizes: list[int], most: int) -> list[slice]:
    """Slices of at most `most` rows over parts of these sizes; no slice spans two parts."""
    chunks, start = [], 0
    for size in sizes:
        end = start + size
        chunks += [slice(i, min(i + most, end)) for i in range(start, end, most)]
        start = end
    return chunks


def _in_parts(head: nn.Module, rows: Rows, vocab: int) -> Tensor:
    """CE_R, computed by calling the layer on parts of the rows."""

    def losses(x_rD: Tensor, codes_r: Tensor) -> Tensor:
        return F.cross_entropy(head(x_rD).float(), codes_r, reduction="none")

    of_a_sample = len(rows.codes_R) // rows.batch
    count = min(of_a_sample, -(-of_a_sample * vocab // LOGITS_OF_A_SAMPLE))
    pieces = zip(rows.x_RD.tensor_split(count), rows.codes_R.tensor_split(count), strict=True)
    if torch.is_grad_enabled() and count > 1:
        return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces])
    return torch.cat([losses(*piece) for piece in pieces])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`cross_entropy` with a directly usable weight: computes the gradients in the forward pass."""

    @staticmethod
    def forward(ctx, x_RD, weight_VD, bias_V, codes_R, scale_R, chunks):
        kind = product_type(x_RD)
        weight, bias = (None if t is None else t.to(kind) for t in (weight_VD, bias_V))
        d_x, d_weight, d_bias = (
            torch.zeros_like(t, dtype=torch.float32) if needed else None
            for t, needed in zip((x_RD, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        )
        losses_R = torch.empty_like(scale_R)
        for rows in chunks:
            x_rD, code_r1 = x_RD[rows].to(kind), codes_R[rows, None]
            log_p = F.linear(x_rD, weight, bias).float().log_softmax(-1)
            losses_R[rows] = -log_p.gather(-1, code_r1)[:, 0]
            d_logits = log_p.exp_()
            d_logits.scatter_(-1, code_r1, d_logits.gather(-1, code_r1) - 1)
            d_logits = d_logits.mul_(scale_R[rows, None]).to(kind)
            if d_x is not None:
                d_x[rows] = d_logits @ weight
            if d_weight is not None and kind == torch.float32:
                d_weight.addmm_(d_logits.T, x_rD)
            elif d_weight is not None:
                d_weight += d_logits.T @ x_rD  # accumulated in fp32
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(
            *(
                None if d is None else d.type_as(t)
                for d, t in ((d_x, x_RD), (d_weight, weight_VD), (d_bias, bias_V))
            )
        )
        ctx.mark_non_differentiable(losses_R)
        return (losses_R * scale_R).sum(), losses_R

    @staticmethod
    def backward(ctx, grad, _):
        # In place: the saved tensors are not read again, as autograd refuses a second backward.
        return *(None if d is None else d.mul_(grad) for d in ctx.saved_tensors), None, None, None

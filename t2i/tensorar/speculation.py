"""Exact speculation: one call of the trunk settles several windows, and the image stays the same.

The image's key and the position fix the noise of every slot, so each window is a function of the
windows before it, and the image is the only solution of "every window follows from those before
it". It is found by iteration: guess the windows after the settled ones, feed them all at once, draw
each again with its own noise, and settle all up to and including the first wrong guess: the window
drawn in its place still followed from correct ones. A wrong guess wastes work but changes nothing;
the next call overwrites its cache entries. (Jacobi decoding with the same noise in every round:
arXiv 2410.01699, 2510.24211.)

Every row of a batch advances at its own pace. A row that is finished, or nearly so, feeds windows
past the image whose outputs are never used, so that every call has the same shape.

Shapes: B images, N windows, n of them at once, k slots, S sub-tokens.
"""

import torch
from torch import Tensor

from t2i.tensorar.windows import Windows


def take(values_BN: Tensor, index: Tensor) -> Tensor:
    """Windows `index` of [B, N, k, S]: int64 [n], the same for every row, or [B, n]."""
    if index.dim() == 1:
        return values_BN.index_select(1, index)
    return values_BN.gather(1, _over(index, values_BN))


def put(values_BN: Tensor, index_Bn: Tensor, new_Bn: Tensor) -> None:
    """Write windows `index_Bn` of each row, in place."""
    values_BN.scatter_(1, _over(index_Bn, values_BN), new_Bn)


def _over(index_Bn: Tensor, values_BN: Tensor) -> Tensor:
    return index_Bn[..., None, None].expand(-1, -1, *values_BN.shape[2:])


def count_right(
    drawn_BnkS: Tensor, guessed_BnkS: Tensor, geometry: Windows, index_Bn: Tensor
) -> Tensor:
    """How many of windows `index_Bn` the call that drew them settles, int64 [B, 1]: the correct
    guesses before the first wrong one, and the window drawn in its place.
    """
    valid_Bnk = slot_positions(geometry, index_Bn) < geometry.tokens
    right = (drawn_BnkS == guessed_BnkS) | ~valid_Bnk[..., None]
    right_Bn = right.flatten(2).all(-1)[:, :-1].long()  # the last one was not fed
    return 1 + right_Bn.cumprod(1).sum(1, keepdim=True)


def slot_positions(geometry: Windows, index_Bn: Tensor) -> Tensor:
    """Position of each slot of windows, int64 [B, n, k]."""
    slot_k = torch.arange(geometry.size, device=index_Bn.device)
    return index_Bn[..., None] * geometry.stride + slot_k


def first_guesses(
    windows_BNkS: Tensor, geometry: Windows, columns: int, index_Bn: Tensor
) -> Tensor:
    """First guesses [B, n, k, S] of consecutive windows `index_Bn`, from all windows before them.

    A position gets the code that the last known window has for it, if any; otherwise the code above
    it in the image (rows of `columns` codes); in the first row the last final code.
    """
    stride, known_B1 = geometry.stride, index_Bn[:, :1] - 1
    position_Bnk = slot_positions(geometry, index_Bn)
    known_B11 = known_B1[..., None]
    final_B11 = known_B11 * stride + stride - 1  # the last final position
    rows_up = ((position_Bnk - final_B11 - 1) // columns).clamp(min=0) + 1
    above = position_Bnk - rows_up * columns
    source = above.where(above >= 0, final_B11)
    window, slot = source // stride, source % stride
    drafted = position_Bnk < known_B11 * stride + geometry.size
    window = window.where(~drafted, known_B11)
    slot = slot.where(~drafted, position_Bnk - known_B11 * stride)
    flat = (window * geometry.size + slot).flatten(1)
    guesses = windows_BNkS.flatten(1, 2).gather(1, _over(flat, windows_BNkS)[..., 0, :])
    return guesses.view(*position_Bnk.shape, -1)

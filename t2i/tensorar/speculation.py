"""Exact speculation: several windows settled by one call of the trunk, and the same image.

The noise of every slot is fixed by the image's key and the position, so that a window is a function
of those before it, and an image the one solution of "every window is what follows from the ones
before". It is found by iteration: guess the windows behind the settled ones, feed them all at once,
draw each anew with its own noise, and settle all up to and including the first whose guess was
wrong, for that one still followed from right ones. A wrong guess costs a call and changes nothing;
what it left in the cache is written over by the next call. (Jacobi decoding with noise that is
shared between rounds: arXiv 2410.01699, 2510.24211.)

Every row of a batch goes at its own pace. A row that is done, or near its end, feeds a window past
the image that nobody reads, so that every call has one shape.

Shapes: B images, N windows, n of them at once, k slots, S sub-tokens.
"""

import torch
from torch import Tensor

from t2i.tensorar.windows import Windows


def take(values_BN: Tensor, index: Tensor) -> Tensor:
    """Windows `index` of [B, N, k, S]: int64 [n], the same of every row, or [B, n]."""
    if index.dim() == 1:
        return values_BN.index_select(1, index)
    return values_BN.gather(1, _over(index, values_BN))


def put(values_BN: Tensor, index_Bn: Tensor, new_Bn: Tensor) -> None:
    """Write windows of each row, in place."""
    values_BN.scatter_(1, _over(index_Bn, values_BN), new_Bn)


def _over(index_Bn: Tensor, values_BN: Tensor) -> Tensor:
    return index_Bn[..., None, None].expand(-1, -1, *values_BN.shape[2:])


def count_right(
    drawn_BnkS: Tensor, guessed_BnkS: Tensor, geometry: Windows, index_Bn: Tensor
) -> Tensor:
    """How many of windows `index_Bn` are settled by a call that drew them, int64 [B, 1]: those that
    were guessed right before the first that was not, and that one.
    """
    valid_Bnk = slot_positions(geometry, index_Bn) < geometry.tokens
    right = (drawn_BnkS == guessed_BnkS) | ~valid_Bnk[..., None]
    right_Bn = right.flatten(2).all(-1)[:, :-1].long()  # nothing was fed behind the last
    return 1 + right_Bn.cumprod(1).sum(1, keepdim=True)


def slot_positions(geometry: Windows, index_Bn: Tensor) -> Tensor:
    """Position of each slot of windows, int64 [B, n, k]."""
    slot_k = torch.arange(geometry.size, device=index_Bn.device)
    return index_Bn[..., None] * geometry.stride + slot_k


def first_guesses(
    windows_BNkS: Tensor, geometry: Windows, columns: int, index_Bn: Tensor
) -> Tensor:
    """First guesses [B, n, k, S] of windows `index_Bn` that follow one another, from all before the
    first of them: what the last of these says of a position, else the code above, of a row of
    `columns` codes; in the first row the last final code.
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

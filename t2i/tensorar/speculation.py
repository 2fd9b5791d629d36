"""Exact speculation: several windows settled by one call of the trunk, and the same image.

The noise of every slot is fixed by the image's key and the position, so that a window is a function
of those before it, and an image the one solution of "every window is what follows from the ones
before". It is found by iteration: guess the windows behind the settled ones, feed them all at once,
draw each anew with its own noise, and settle all up to and including the first whose guess was
wrong, for that one still followed from right ones. A wrong guess costs a call and changes nothing;
what it left in the cache is written over by the next call. (Jacobi decoding with noise that is
shared between rounds: arXiv 2410.01699, 2510.24211.)

Rows of a batch go at the pace of the slowest: a window is settled where it is in every row.

Shapes: B images, N windows, n of them at once, k slots, S sub-tokens.
"""

from collections.abc import Callable

from torch import Tensor

from t2i.tensorar.windows import Windows


def settle(
    windows_BNkS: Tensor,
    geometry: Windows,
    columns: int,
    ahead: int,
    draw: Callable[[int, int], Tensor],
    on_settled: Callable[[], None],
) -> None:
    """Draw all windows, in place, of which the first is there.

    Args:
        columns: codes in a row of the image.
        ahead: windows that a call draws at most.
        draw: feeds the windows from `start` up to `end` as they are, and returns those that follow
            each, [B, end - start, k, S].
        on_settled: called for every window.
    """
    valid_Nk1 = geometry.valid(windows_BNkS.device)[..., None]
    settled = filled = 1
    while settled < geometry.count:
        end = min(settled + ahead, geometry.count)
        for index in range(filled, end - 1):
            guess(windows_BNkS, geometry, columns, index)
        drawn = draw(settled - 1, end - 1)
        guessed = windows_BNkS[:, settled : end - 1]
        right = (drawn[:, :-1] == guessed) | ~valid_Nk1[settled : end - 1]
        right_n = right.flatten(2).all(-1).all(0).long()
        count = 1 + int(right_n.cumprod(0).sum())
        windows_BNkS[:, settled:end] = drawn  # beyond the settled ones: the next round's guesses
        settled, filled = settled + count, end
        for _ in range(count):
            on_settled()


def guess(windows_BNkS: Tensor, geometry: Windows, columns: int, index: int) -> None:
    """Write down a first guess of a window: of drafts what the window before says of the position,
    else the code above; in the first row the last final code.
    """
    stride, first = geometry.stride, index * geometry.stride
    for slot in range(geometry.size):
        position = first + slot
        source, there = index - 1, slot + stride  # the same position, one window earlier
        if slot < stride or there >= geometry.size:
            above = position - columns if columns <= position < first + columns else first - 1
            source, there = divmod(above, stride)
        windows_BNkS[:, index, slot] = windows_BNkS[:, source, there]

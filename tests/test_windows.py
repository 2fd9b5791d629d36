"""Geometry of windows: coverage, validity, final codes and refinement stages against loops."""

import pytest
import torch

from t2i.tensorar.windows import Windows

SHAPES = [(16, 1, 1), (16, 4, 1), (16, 16, 1), (9, 2, 2), (10, 4, 3), (16, 5, 2), (7, 7, 7)]


@pytest.fixture(params=SHAPES, ids=lambda s: "T{}-k{}-s{}".format(*s))
def windows(request):
    return Windows(*request.param)


def test_gather_and_validity(windows):
    codes = torch.arange(2 * windows.tokens * 2).view(2, windows.tokens, 2)
    gathered, valid = windows.gather(codes), windows.valid()
    assert gathered.shape == (2, windows.count, windows.size, 2)
    for i in range(windows.count):
        for j in range(windows.size):
            position = i * windows.stride + j
            assert valid[i, j] == (position < windows.tokens)
            if valid[i, j]:
                assert torch.equal(gathered[:, i, j], codes[:, position])


def test_final_codes_invert_gather(windows):
    codes = torch.randint(99, (2, windows.tokens, 1))
    gathered = windows.gather(codes)
    gathered[:, ~windows.valid()] = -1
    assert torch.equal(windows.final_codes(gathered), codes)


def test_stage_codes_against_a_loop(windows):
    """Every window that holds position p drafts it; the last of them is stage `stages`."""
    drawn = torch.arange(windows.count * windows.size).view(1, windows.count, windows.size, 1)
    for stage in range(1, windows.stages + 1):
        expected = []
        for p in range(windows.tokens):
            holders = [
                (i, p - i * windows.stride)
                for i in range(windows.count)
                if 0 <= p - i * windows.stride < windows.size
            ]
            i, j = holders[max(0, len(holders) - 1 - (windows.stages - stage))]
            expected.append(drawn[0, i, j, 0])
        assert torch.equal(windows.stage_codes(drawn, stage)[0, :, 0], torch.stack(expected))
    last = windows.stage_codes(drawn, windows.stages)
    assert torch.equal(last, windows.final_codes(drawn))


def test_stage_codes_with_stride_one():
    """The definition: stage r of position p is slot k - r of window p - (k - r), or the deepest
    slot near the start.
    """
    windows, k = Windows(6, 3), 3
    drawn = torch.arange(18).view(1, 6, 3, 1)
    for r in range(1, k + 1):
        for p in range(6):
            back = min(k - r, p)
            assert windows.stage_codes(drawn, r)[0, p, 0] == drawn[0, p - back, back, 0]


@pytest.mark.parametrize("shape", [(16, 0, 1), (16, 17, 1), (16, 4, 0), (16, 4, 5)])
def test_impossible_windows(shape):
    with pytest.raises(ValueError, match="must be between 1 and"):
        Windows(*shape)


@pytest.mark.parametrize("stage", [0, 5])
def test_impossible_stages(stage):
    windows = Windows(16, 4)
    with pytest.raises(ValueError, match="between 1 and 4"):
        windows.stage_codes(torch.zeros(1, 16, 4, 1), stage)

"""One large array that processes fill chunk by chunk."""

import numpy as np
import pytest

from t2i.evaluation.array_file import ArrayFile
from t2i.processes import ALONE, Processes


def test_patience_begins_anew_with_every_chunk(tmp_path, monkeypatch):
    rest = tmp_path / "sign", ALONE
    array = ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 1, *rest)
    waiting = ArrayFile(
        tmp_path / "a.npy", (4, 2), np.uint8, 1, tmp_path / "sign", Processes(1, 2, patience=10)
    )
    now, todo = 0.0, array.missing()

    def sleep(seconds):
        """Eight of ten seconds pass, in which another process does a chunk or, at last, ends."""
        nonlocal now
        now += 8
        if todo:
            array.write(todo[0], np.ones((1, 2), np.uint8))
            todo.pop(0)
        elif finishes:
            (tmp_path / "sign").touch()

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    finishes = False
    with pytest.raises(TimeoutError, match=r"waited 10 s for .*sign without progress"):
        waiting.wait_for_sign()
    assert todo == [] and now == 8 * 6
    finishes = True
    waiting.wait_for_sign()


def test_an_array_of_another_shape_is_not_continued(tmp_path):
    rest = tmp_path / "sign", ALONE
    ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 2, *rest)
    with pytest.raises(ValueError, match=r"holds uint8 \[4, 2\], needed is uint8 \[4, 3\]"):
        ArrayFile(tmp_path / "a.npy", (4, 3), np.uint8, 2, *rest)


def test_chunks_of_another_size_do_not_count_as_done(tmp_path):
    rest = tmp_path / "sign", ALONE
    array = ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 2, *rest)
    array.write(range(2), np.ones((2, 2), np.uint8))
    assert array.missing() == [range(2, 4)]
    other = ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 3, *rest)
    assert other.missing() == [range(3), range(3, 4)]


def test_nothing_is_missing_once_the_sign_is_there(tmp_path):
    """A process that comes late, when another has removed the markers or the file itself."""
    (tmp_path / "sign").touch()
    late = Processes(1, 2, patience=0.1)
    assert (
        ArrayFile(tmp_path / "a.npy", (4, 2), np.uint8, 2, tmp_path / "sign", late).missing() == []
    )

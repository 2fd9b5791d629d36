"""One large array on disk, filled chunk by chunk by processes that may be killed at any moment.

    images.npy                                  the whole array from the start, zeros where nothing
                                                was written yet
    images.npy.chunks/00000000-00000256.done    a marker for every chunk that is complete
    (another file)                              the sign that all is done; then the markers go

A chunk's rows are written and forced to disk before its marker appears. So what has a marker is
never done again, and what has none is done again from its first row, which gives the same bytes.
Which process does which chunk follows from their numbers alone.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t2i.errors import UserError
from t2i.files import replacing, saving, wait_for, wait_until_none, writable_folder
from t2i.processes import Processes


class ArrayFile:
    """An .npy of fixed shape that grows complete.

    Args:
        shape: of the array; rows are its first axis.
        rows_per_chunk: written at once. With another number, chunks of the old one do not count as
            done.
        sign: the file whose existence says that the array is complete and used.
        processes: one does the chunks i with i % world_size == rank. The main one also creates the
            file; the others wait for it.

    Raises:
        UserError: the file exists with another shape or type.
        TimeoutError: the main process does not create it.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype | type,
        rows_per_chunk: int,
        sign: Path,
        processes: Processes,
    ):
        assert shape[0] > 0 and rows_per_chunk > 0, (shape, rows_per_chunk)
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._rows_per_chunk, self._sign, self._processes = rows_per_chunk, sign, processes
        if processes.is_main and not (path.exists() or sign.exists()):
            writable_folder(path.parent)
            with replacing(path) as temporary:
                np.lib.format.open_memmap(temporary, "w+", self.dtype, shape)
        self._wait(path)
        if path.exists():  # the main process may have finished in the meantime
            self._offset = self._check_header()

    def _check_header(self) -> int:
        """The place of the first row in the file."""
        array = np.load(self.path, mmap_mode="r")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise UserError(
                f"{self.path} holds {array.dtype} {list(array.shape)}, needed is {self.dtype} "
                f"{list(self.shape)}; delete it, or use another folder"
            )
        return array.offset

    def all_chunks(self) -> Iterator[range]:
        """The rows of every chunk."""
        for start in range(0, self.shape[0], self._rows_per_chunk):
            yield range(start, min(start + self._rows_per_chunk, self.shape[0]))

    def missing(self) -> list[range]:
        """This process's chunks that are not complete."""
        mine = list(self.all_chunks())[self._processes.rank :: self._processes.world_size]
        missing = [rows for rows in mine if not self._marker(rows).exists()]
        # Asked in this order: the markers are removed after the sign is given.
        return [] if self._sign.exists() else missing

    def write(self, rows: range, values: np.ndarray) -> None:
        """Complete a chunk."""
        expected = (len(rows), *self.shape[1:])
        assert values.shape == expected and values.dtype == self.dtype, (values.shape, expected)
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with saving(self.path), open(self.path, "rb+") as file:
            file.seek(self._offset + rows.start * row_bytes)
            file.write(np.ascontiguousarray(values).tobytes())
            file.flush()
            os.fsync(file.fileno())
        marker = self._marker(rows)
        marker.parent.mkdir(exist_ok=True)
        with replacing(marker) as temporary:
            temporary.touch()

    def wait_for_chunks(self) -> None:
        """Wait until every chunk of every process is complete.

        Raises:
            TimeoutError: another process stopped.
        """
        wait_for(self._markers(), self._processes.patience)

    def wait_for_sign(self) -> None:
        """Wait until the main process says that all is done.

        Raises:
            TimeoutError: it does not, and no chunk became complete for as long as patience lasts.
        """
        self._wait(self._sign)

    def _wait(self, path: Path) -> None:
        """Wait for this file or the sign."""

        def missing() -> list[Path]:
            if path.exists() or self._sign.exists():
                return []
            return [path, *(marker for marker in self._markers() if not marker.exists())]

        wait_until_none(missing, self._processes.patience)

    def _markers(self) -> list[Path]:
        return [self._marker(rows) for rows in self.all_chunks()]

    def _marker(self, rows: range) -> Path:
        return _marker_folder(self.path) / f"{rows.start:08d}-{rows.stop:08d}.done"


def remove_markers(path: Path) -> None:
    """Remove the markers of an array file, if it has any, when its sign is there."""
    shutil.rmtree(_marker_folder(path), ignore_errors=True)


def _marker_folder(path: Path) -> Path:
    return path.with_name(path.name + ".chunks")

"""Peak memory of a piece of work, measured in a separate process."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

from t2i.processes import status_bytes


def peak_gb(work: Callable[..., object], *arguments: object) -> float:
    """Peak GB of a fresh process that does the work and returns freed memory at once."""
    context = multiprocessing.get_context("spawn")
    giving_back = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's; read when the process starts
    with patch.dict(os.environ, giving_back), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, work, arguments).result()


def _peak(work: Callable[..., object], arguments: tuple) -> float:
    import torch

    before = status_bytes("VmRSS")
    work(*arguments)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    return (status_bytes("VmHWM") - before) / 1e9

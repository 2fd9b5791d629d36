"""Peak memory of a piece of work, each in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def peak_gb(work: Callable[..., object], *arguments: object) -> float:
    """Peak GB of a fresh process that does the work."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, work, arguments).result()


def _peak(work: Callable[..., object], arguments: tuple) -> float:
    import torch

    before = _kilobytes("VmRSS")
    work(*arguments)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    # Not getrusage: its peak is inherited from the process that started this one.
    return (_kilobytes("VmHWM") - before) * 1024 / 1e9


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))

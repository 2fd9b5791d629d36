"""The launcher (torchrun, deepspeed, srun, mpirun), if any, that started this process.

All other code reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT);
deepspeed sets them, too, and `adopt_launcher` sets them for srun and mpirun. Does not import torch,
so that argument parsing stays fast.
"""

import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import UserError

log = logging.getLogger(__name__)

_SECONDS = 1.0
"""Seconds between checks that the launcher is still running."""

_MPI = (
    *(
        (f"{of}_RANK", f"{of}_SIZE", f"{of}_LOCAL_RANK", f"{of}_LOCAL_SIZE")
        for of in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Variables for rank and size, globally and on this machine, of Open MPI, MVAPICH, and MPICH or
Intel MPI.
"""

_watching = False
_command: list[str] = []
"""The launcher's command line, kept for when it has ended."""


@dataclass(frozen=True)
class _Task:
    """One of several processes, as its launcher describes it."""

    rank: int
    size: int
    local_rank: int
    host: str | None
    """The machine of rank 0; None if all processes are on one machine."""
    job: int
    """A number that the processes of one launch share; other launches probably have another."""


def is_main_process() -> bool:
    """Whether this is rank 0, the process that prints messages for the user."""
    adopt_launcher()
    # Without a size, RANK is left over in the shell: there is no other process to print anything.
    return os.environ.get("RANK", "0") == "0" or not os.environ.get("WORLD_SIZE")


def world_size() -> int:
    """Number of processes that the launcher started, or that --check is to assume; 1 without one.
    UserError as `settle_group`.
    """
    adopt_launcher()
    if "RANK" in os.environ:
        settle_group()
    return _number("WORLD_SIZE") or 1


def is_one_of_several() -> bool:
    """Whether a launcher started this process as one of several."""
    return world_size() > 1 and "RANK" in os.environ  # WORLD_SIZE alone is left over in the shell


def refuse_several() -> None:
    """For a program that works as one process: UserError in all processes but the first, if a
    launcher started several, which would do the same work in the same place.
    """
    if not is_main_process():
        raise UserError(
            f"this program works as one process, but a launcher started WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']}, and this one has RANK={os.environ['RANK']}: start it "
            "with python alone (without a launcher, unset both variables)"
        )


def adopt_launcher() -> None:
    """Set torchrun's variables in a process that srun or mpirun started as one of several."""
    if "RANK" in os.environ:
        return
    task = _mpi_task() or _slurm_task()  # within a Slurm job mpirun's processes have both
    if task is None or task.size == 1:
        return
    if not 0 <= task.rank < task.size:
        raise UserError(f"the launcher's variables say rank {task.rank} of {task.size} processes")
    os.environ.setdefault("MASTER_ADDR", task.host or "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + task.job % 12000))
    os.environ["LOCAL_RANK"] = str(task.local_rank)
    os.environ["WORLD_SIZE"] = str(task.size)
    os.environ["RANK"] = str(task.rank)


def settle_group() -> None:
    """Set torchrun's variables in a process that no launcher started as one of several.

    Raises:
        UserError: some are set (left over in the shell, say) and describe no process of a group.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:  # plain `python`: no launcher
        os.environ |= alone | master
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size == 1:
        one = {"LOCAL_RANK": "0"} | master
        os.environ |= {name: value for name, value in one.items() if name not in os.environ}
    complete = "MASTER_ADDR" in os.environ and _number("MASTER_PORT") is not None
    if rank is None or size is None or rank >= size or not complete:
        names = ("RANK", "WORLD_SIZE", *master)
        told = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
        raise UserError(
            f"the environment describes no process of a group: {told}. Start with torchrun "
            "--nproc_per_node N, or unset RANK to run in one process"
        )


def _mpi_task() -> _Task | None:
    for names in _MPI:
        if names[0] not in os.environ:
            continue
        rank, size, local, on_machine = map(_number, names)
        if rank is None or size is None:
            raise UserError(
                f"{names[0]} is set and {names[1]} is not: this is one of several processes, and "
                "nothing says of how many. Start with torchrun --nproc_per_node N (or deepspeed --num_gpus N)"
            )
        several = on_machine is not None and on_machine < size
        if several and "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"mpirun started {size} processes on several machines: say which has rank 0, with "
                "MASTER_ADDR=HOST and MASTER_PORT=PORT in the environment of all "
                "(mpirun -x MASTER_ADDR -x MASTER_PORT)"
            )
        if local is None:
            local = _number("SLURM_LOCALID")  # srun --mpi=pmi2
        return _Task(rank, size, rank if local is None else local, None, os.getppid())
    return None


def _slurm_task() -> _Task | None:
    """A task of srun; the shell of a batch script, or of salloc, has no step's variables."""
    rank, size = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS")
    if rank is None or (size is None and os.environ.get("ENVIRONMENT") == "BATCH"):
        return None
    if size is None:
        size = _number("SLURM_NTASKS")
    if size is None and rank > 0:
        raise UserError(
            "SLURM_PROCID is set and SLURM_NTASKS is not: this is one of several tasks, and nothing "
            "says of how many. Start with srun --ntasks N, or with torchrun"
        )
    machines = _number("SLURM_STEP_NUM_NODES") or _number("SLURM_NNODES") or 1
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
    host = _first_host(hosts) if machines > 1 else None
    job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
    local = _number("SLURM_LOCALID")
    return _Task(rank, size or 1, rank if local is None else local, host, job + step)


def _first_host(hosts: str) -> str:
    """The first machine of Slurm's short form of a list: "node[03-05,9],other" -> "node03"."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", hosts)
    if match is None:
        raise UserError(
            f"cannot tell the first machine of Slurm's list {hosts!r}: "
            "set MASTER_ADDR in the environment of all tasks"
        )
    return "".join(part or "" for part in match.groups())


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


# -- requests to stop ------------------------------------------------------------------------------
def stop_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP (the terminal was closed), without those that are ignored (nohup)."""
    numbers = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    return [n for n in dict.fromkeys(numbers) if signal.getsignal(n) != signal.SIG_IGN]


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, object], None] | signal.Handlers
) -> Iterator[None]:
    """Handle these signals with `handler` within the block. Does nothing outside the main thread,
    where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


# -- when the launcher ends ------------------------------------------------------------------------
def watch_launcher() -> None:
    """Send this process SIGTERM when the launcher ends without having forwarded one.

    `deepspeed` forwards no signal when it is stopped or killed. Without a launcher nothing is
    watched: the parent is a shell, which may end (nohup).
    """
    global _watching, _command
    count = _launcher_count()
    parents = _parents(count)
    if _watching or not parents:
        return
    _watching = True
    if not any(names[0] in os.environ for names in _MPI):  # the parent is a daemon, not mpirun
        _command = _command_line(parents[-1])

    def watch() -> None:
        while _parents(count) == parents:
            time.sleep(_SECONDS)
        log.warning("the launcher is gone: stopping as on SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def resume_command() -> str:
    """The shell command that resumes this process's run."""
    words = _command or _command_line(os.getpid()) or [sys.executable, *sys.argv]
    return shlex.join([*words, *([] if "--resume" in words else ["--resume"])])


def _command_line(process: int) -> list[str]:
    words = _proc(process, "cmdline").split(b"\0")[:-1]
    return without_rank(os.fsdecode(word) for word in words)


def without_rank(words: Iterable[str]) -> list[str]:
    """A command line without the rank that deepspeed (--local_rank=N) and torch.distributed.launch
    (--local-rank=N) add; the environment has it as well.
    """
    return [word for word in words if not re.match("--local[_-]rank=", word)]


def _launcher_count() -> int:
    """How many of the processes above this one are the launcher: 0 without one."""
    # deepspeed, which forwards no signals, starts deepspeed.launcher.launch, which starts ranks.
    if b"deepspeed.launcher.launch" in _proc(os.getppid(), "cmdline"):
        return 2
    return int("TORCHELASTIC_RUN_ID" in os.environ or any(n[0] in os.environ for n in _MPI))


def _parents(count: int) -> list[int]:
    """Process ids of the parent and (count 2) of its parent; none for count 0."""
    parent = os.getppid()
    if count < 2:
        return [parent] * count
    status = _proc(parent, "stat").rpartition(b")")[2].split()
    return [parent, int(status[1]) if len(status) > 1 else 0]


def _proc(process: int, name: str) -> bytes:
    """A file of /proc; empty where there is none."""
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""

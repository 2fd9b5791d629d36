"""This process and the others that a launcher (torchrun, deepspeed, srun, mpirun) started."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from t2i import launcher
from t2i.errors import UserError

_CPU = torch.device("cpu")
_POLL_SECONDS = 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and its group.

    Attributes:
        rank: number of this process. Work split by index goes to rank index % world_size.
        patience: seconds to wait for other processes while they make no progress.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = _CPU
    patience: float = 3600.0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> str:
        """A note for progress bars, which count only the work of this process."""
        return f" (1 of {self.world_size} shares)" if self.world_size > 1 else ""

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether `here` is true in any process; all processes must call it."""
        return any(self.gather(here))

    def total(self, here: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the CPU; all processes must call it."""
        if self.world_size > 1:
            here = here.to(self.device)
            dist.all_reduce(here)
        return here.cpu()

    def gather(self, here: T) -> list[T]:
        """The values of all processes, by rank; all processes must call it."""
        everywhere = [here] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everywhere, here)
        return everywhere

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` in the main process only; all return its result, or raise its UserError.

        All processes must call it.
        """
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process; if one raises a UserError, all raise it, since the others
        would only report that they have lost it, or wait for it.

        All processes must call it; the work itself must not wait for other processes.
        """
        result, error = None, None
        try:
            result = work()
        except UserError as own:
            error = own
        for rank, said in enumerate(self.gather(error and str(error))):
            if said is not None:
                raise error or UserError(f"in process {rank}: {said}")
        return cast(T, result)

    def wait_for(self, paths: Sequence[Path]) -> None:
        """Wait until all of these files, which other processes write, exist.

        Raises:
            TimeoutError: no further file appeared for `patience` seconds.
        """
        waiting = list(paths)

        def missing() -> Sequence[Path]:
            waiting[:] = [path for path in waiting if not path.exists()]
            return waiting

        self.wait_until_none(missing)

    def wait_until_none(self, missing: Callable[[], Sequence[Path]], what: str = "") -> None:
        """Wait until other processes have produced everything that is missing.

        Args:
            missing: returns what is still missing; called repeatedly.
            what: prefix of a path in the error message, such as "the hash of ".

        Raises:
            TimeoutError: there was no progress for `patience` seconds.
        """
        still = missing()
        deadline = time.monotonic() + self.patience
        while still:
            fewest = len(still)
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {self.patience:g} s for {what}{still[0]} without progress ({fewest} "
                    "missing): another process has stopped. Start again to resume"
                )
            time.sleep(_POLL_SECONDS)
            still = missing()
            if len(still) < fewest:
                deadline = time.monotonic() + self.patience


ALONE = Processes()


def join_processes(device: torch.device) -> Processes:
    """Join the launcher's processes for work that is split by index.

    They exchange Python objects only, so gloo works with GPUs too; a process waits for slower ones
    as long as it takes. An existing group is used as it is.
    """
    if not dist.is_initialized():
        if not launcher.is_one_of_several():
            return Processes(device=device)
        with joining():
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        launcher.watch_launcher()
    if device.type == "cuda" and device.index is None:
        device = local_gpu()
    return Processes(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def joining() -> Iterator[None]:
    """A block that waits for other processes to join. Ctrl-C, SIGTERM and a closed terminal end
    this one at once: Python's handlers do not run while torch waits, which can take forever.

    Raises:
        UserError: the processes cannot meet: the port is taken, say.
    """
    try:
        with launcher.handling((signal.SIGINT, *launcher.stop_signals()), signal.SIG_DFL):
            yield
    except dist.DistNetworkError as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the processes cannot meet at {place} ({error}). If another run uses the port, give "
            "torchrun or deepspeed another: --master_port 29501"
        ) from error


def local_gpu() -> torch.device:
    """The GPU of this process, made the current one."""
    # Slurm may show each task only its own GPU, as number 0.
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if count == 1:
        os.environ["LOCAL_RANK"], local = "0", 0  # DeepSpeed reads it, too
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def peak_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB: tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Not getrusage: its peak is inherited from the process that started this one.
    return status_bytes("VmHWM") / 1e9


def status_bytes(name: str) -> int:
    """A size in bytes from /proc/self/status (such as VmRSS, resident memory); 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def release_threads() -> None:
    """End the OpenMP threads that this thread computes with; its next work starts new ones.

    GNU's OpenMP gives each thread a team of its own. While all teams together have more threads
    than there are processors, theirs sleep between two parallel parts instead of spinning, even if
    the other teams are idle: a step of many short parts took up to twice as long.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(1)  # soft: its settings stay

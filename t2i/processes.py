"""This process among all that a launcher (torchrun, deepspeed) started; alone without one."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: its number. Work that is split by index goes to the process with rank index % world_size.
        patience: seconds to wait for what other processes write, without any progress of theirs.
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
        """What a progress bar, which knows of this process only, says about the others."""
        return f" (1 of {self.world_size} shares)" if self.world_size > 1 else ""

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


ALONE = Processes()


def join_processes(device: torch.device) -> Processes:
    """Join the launcher's processes for work that is split by index and meets at barriers only.

    No tensor is ever exchanged, so gloo serves GPUs too; a process may wait for a slower one as
    long as it takes. A group that exists already is used as it is.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes(device=device)
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return Processes(dist.get_rank(), dist.get_world_size(), device)

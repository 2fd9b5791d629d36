"""A cluster that a run is planned for. Without torch: programs show it in their --help."""

import math
from dataclasses import dataclass

from t2i.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """Machines and data."""

    gpus: int = 64
    """Processes, one each."""
    gpus_per_node: int = 8
    """Of a machine."""
    gpu_memory: float = 80.0
    """GB of a GPU."""
    node_memory: float = 1000.0
    """GB of main memory of a machine, for all its processes."""
    disk: float | None = None
    """GB that cache and checkpoints may take, one that is being saved included; None: any."""
    images: float = 1e8
    """Usable samples, such as 100e6."""
    caption_tokens: int = 40
    """Of a caption, where its features are cached."""
    images_per_second: float | None = None
    """Of all GPUs together in training; None: from the work, at a third of an A100's peak."""
    encoded_per_second: float | None = None
    """Images that one GPU turns into codes in a second; None: that time is left out."""
    hours: float | None = None
    """Refuse a run that takes longer, encoding included where its speed is given."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be a number above 0")
        if self.images != int(self.images):
            raise UserError(f"images={self.images} must be a whole number")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"gpus={self.gpus} cannot be shared equally by machines of {self.gpus_per_node}; "
                f"use a multiple of it, or give --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def per_node(self) -> int:
        """Processes on a machine."""
        return min(self.gpus, self.gpus_per_node)

"""The cluster that a run is planned for. Imports no torch, so that --help is fast."""

from dataclasses import dataclass

from t2i.errors import UserError
from t2i.sampling import check_positive


@dataclass(frozen=True)
class Cluster:
    """Machines and data."""

    gpus: int = 64
    """GPUs in total; each runs one process."""
    gpus_per_node: int = 8
    """GPUs in one machine."""
    gpu_memory: float = 80.0
    """Memory of one GPU, in GB."""
    node_memory: float = 1000.0
    """Main memory of one machine, in GB, shared by all its processes."""
    disk: float | None = None
    """Disk space for cache and checkpoints (including one being saved), in GB; None: no limit."""
    images: float = 1e8
    """Usable samples, such as 100e6."""
    caption_tokens: int = 40
    """Tokens of an average caption, if caption features are cached."""
    images_per_second: float | None = None
    """Training speed of all GPUs together; None: computed at a third of an A100's peak."""
    encoded_per_second: float | None = None
    """Images that one GPU encodes per second; None: encoding time is not counted."""
    hours: float | None = None
    """Refuse a run that takes longer, including encoding if its speed is given; None: no limit."""

    def __post_init__(self):
        check_positive(**vars(self))
        if self.images != int(self.images):
            raise UserError(f"images={self.images} must be a whole number")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"gpus={self.gpus} cannot be split equally over machines of {self.gpus_per_node}; "
                "use a multiple of it, or give --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def per_node(self) -> int:
        """Processes on a machine."""
        return min(self.gpus, self.gpus_per_node)

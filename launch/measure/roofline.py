"""What the hardware allows: the shortest possible time of a step, from its bytes and operations
(`formulas.py` explains them) and from this machine's rates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from launch.measure.shapes import made_up
from launch.measure.turns import seconds
from t2i.models.base import Backbone
from t2i.tensorar.model import TensorAR


@dataclass(frozen=True)
class Machine:
    """Measured or given rates of a device."""

    bandwidth: float
    """Bytes per second that a copy reads and writes."""
    rates: dict[str, float]
    """Floating-point operations per second of a large matrix product, by dtype."""
    source: str = "measured by a copy and matrix products, best of six"


def measured(
    device: torch.device, dtypes: dict[str, torch.dtype], *, tiny: bool = False
) -> Machine:
    """Measure a machine; `tiny` sizes are fast, and their numbers mean nothing."""
    on_gpu = device.type == "cuda"
    size = 1 << (20 if tiny else 30 if on_gpu else 28)
    side = 256 if tiny else 8192 if on_gpu else 2048
    rates = {name: matmul_rate(device, side, dtype) for name, dtype in dtypes.items()}
    return Machine(copy_bandwidth(device, size), rates)


def known(
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    bandwidth: float | None,
    tflops: float | None,
) -> Machine:
    """The machine's rates: the given ones (in GB/s and TFLOP/s), the others measured."""
    rates = None if tflops is None else dict.fromkeys(dtypes, 1e12 * tflops)
    if bandwidth is not None and rates is not None:
        return Machine(1e9 * bandwidth, rates, "given")
    found = measured(device, dtypes)
    if bandwidth is not None:
        return Machine(1e9 * bandwidth, found.rates, f"{found.source}; bandwidth given")
    if rates is not None:
        return Machine(found.bandwidth, rates, f"{found.source}; TFLOP/s given")
    return found


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _best(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    return min(seconds(work, device) for _ in range(6))


def multiplied(model: nn.Module) -> int:
    """Parameters that every input is multiplied by: all except tables, of which it reads a row."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


@torch.no_grad()
def forward_flops(model: TensorAR) -> int:
    """Operations of a teacher-forced pass over one image, with attention as plain products."""
    backbone = model.backbone
    condition = backbone.encode_condition(made_up(backbone, 1))
    codes = random_codes(backbone, 1)
    # The counter misses fused attention kernels.
    plain = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Otherwise the counter follows views of them to an autograd graph that does not exist.
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, plain:
        model(codes, condition, model.windows.gather(codes))
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops()


@torch.no_grad()
def prefix_length(model: TensorAR) -> int:
    """Prefix tokens of the conditions that are measured."""
    backbone = model.backbone
    return backbone.encode_condition(made_up(backbone, 1)).prefix.shape[1]


def random_codes(backbone: Backbone, batch: int) -> Tensor:
    """Random codes [B, T, S]."""
    spec, device = backbone.spec, backbone.device
    shape = (batch, spec.num_tokens)
    return torch.stack([torch.randint(v, shape, device=device) for v in spec.subvocabs], -1)


@dataclass(frozen=True)
class Floor:
    """The bytes that a step must at least move, and the operations that it must do."""

    bytes: float
    flops: float

    def seconds(self, machine: Machine, dtype: str) -> float:
        return max(self.bytes / machine.bandwidth, self.flops / machine.rates[dtype])


def step_floor(model: TensorAR, rows: int, before: float) -> Floor:
    """The floor of a step with `before` codes before it, which may be an average."""
    cache = model.backbone.new_cache(rows, 1)
    first = [layer[:, :, 0] for layer in (*cache.keys, *cache.values)]
    entry = sum(layer.numel() * layer.element_size() for layer in first)
    weight = next(model.parameters()).element_size()
    moved = multiplied(model) * weight + entry * (prefix_length(model) + before)
    return Floor(moved, rows * forward_flops(model) / model.windows.count)

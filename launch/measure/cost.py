"""What TensorAR costs against its base: parameters and operations, by formulas and as counted."""

from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.measure.roofline import forward_flops, random_codes
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR

FORMULAS = (
    "Parameters of input encoder and output decoder: 2 x depth x block + (2 k + 3) D, where a block "
    "is 4 D^2 + 2 D, and 3 D h + D more with an MLP (h = 8 round(D / 3)); 2 D less without residual.",
    "Operations (2 for a multiplication and an addition) of a teacher-forced pass over one image, "
    "counted by torch's FlopCounterMode, with 16 prefix tokens where the prefix varies. Drawing "
    "with guidance does it twice; a training step's backward pass counts as two.",
    "Of these, input encoder and output decoder, by formula: N windows x (blocks' a(1, k) + blocks' "
    "a(k, 1)), where q queries that read m entries cost a(q, m) = 4 m D^2 + 2 q D^2 + "
    "4 q (m + q) D, in blocks after the first 6 q D^2 more, with an MLP 6 q D h more.",
    "The head's: N k x those of one slot, which are counted.",
)
"""What the numbers of `ModelCost` are, in words."""


@dataclass(frozen=True)
class ModelCost:
    """Of one model. `FORMULAS` says how it is reckoned."""

    base_parameters: int
    codec_parameters: int
    """Counted."""
    codec_by_formula: int
    base_operations: int
    operations: int
    """Counted, of base and model."""
    codec_operations: int
    """By formula."""
    head_operations: int
    base_head_operations: int


def cost_of(model: TensorAR) -> dict[str, int]:
    """A model's `ModelCost`, as JSON."""
    codec = 0 if model.codec is None else sum(p.numel() for p in model.codec.parameters())
    base = TensorAR(model.backbone, presets.base()).eval()
    head, count = _head_flops(model), model.windows.count
    return asdict(
        ModelCost(
            base_parameters=sum(p.numel() for p in model.backbone.parameters()),
            codec_parameters=codec,
            codec_by_formula=codec_parameters(model),
            base_operations=forward_flops(base),
            operations=forward_flops(model),
            codec_operations=codec_operations(model),
            head_operations=head * count * model.config.k,
            base_head_operations=head * base.windows.count,
        )
    )


def codec_parameters(model: TensorAR) -> int:
    """By formula."""
    c, d = model.config, model.backbone.spec.dim
    if model.codec is None:
        return 0
    block = 4 * d * d + 2 * d + (3 * d * _hidden(d) + d if c.mlp else 0)
    gates = 0 if c.residual == "none" else 2 * d
    return 2 * c.depth * block + (2 * c.k + 1) * d + gates


def codec_operations(model: TensorAR) -> int:
    """Of a teacher-forced pass over one image, by formula."""
    c, d = model.config, model.backbone.spec.dim
    if model.codec is None:
        return 0

    def reading(queries: int, memory: int) -> int:
        first = (4 * memory + 2 * queries) * d * d + 4 * queries * (memory + queries) * d
        first += 6 * queries * d * _hidden(d) if c.mlp else 0
        return c.depth * first + (c.depth - 1) * 6 * queries * d * d

    return model.windows.count * (reading(1, c.k) + reading(c.k, 1))


def _hidden(dim: int) -> int:
    return 8 * round(dim / 3)


@torch.no_grad()
def _head_flops(model: TensorAR) -> int:
    """Operations of the head for one slot."""
    first = next(model.backbone.parameters())
    d = torch.zeros(1, 1, model.backbone.spec.dim, device=first.device, dtype=first.dtype)
    with FlopCounterMode(display=False) as counter:
        model.backbone.all_logits(d, random_codes(model.backbone, 1)[:, :1])
    return counter.get_total_flops()

"""Parameters and operations of TensorAR and of its base, by formulas and as counted."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.measure.roofline import forward_flops, random_codes
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR

FORMULAS = (
    "Parameters of input encoder and output decoder: 2 x depth x block + (2 k + 3) D, where a block "
    "has 4 D^2 + 2 D, with an MLP 3 D h + D more (h = 8 round(D / 3)); without residual 2 D less.",
    "Operations (2 for a multiplication and an addition) of a teacher-forced pass over one image, "
    "counted by torch's FlopCounterMode, with 16 prefix tokens if the prefix length varies. Drawing "
    "with guidance takes twice as many; a backward pass in training counts as two forward passes.",
    "Of these, input encoder and output decoder take, by formula, N windows x the sum of "
    "a(1, k) + a(k, 1) over blocks, where q queries that read m entries take a(q, m) = 4 m D^2 + "
    "2 q D^2 + 4 q (m + q) D, in all blocks but the first 6 q D^2 more, with an MLP 6 q D h more.",
    "The head takes N k x the operations for one slot, which are counted.",
)
"""What the numbers of `cost_of` mean, in words."""


def cost_of(model: TensorAR) -> dict[str, int]:
    """Parameters and operations of a model, its base and its codec (as counted and by formula)."""
    codec = 0 if model.codec is None else sum(p.numel() for p in model.codec.parameters())
    base = TensorAR(model.backbone, presets.base()).eval()
    head, count = _head_flops(model), model.windows.count
    return {
        "base_parameters": sum(p.numel() for p in model.backbone.parameters()),
        "codec_parameters": codec,
        "codec_by_formula": codec_parameters(model),
        "base_operations": forward_flops(base),
        "operations": forward_flops(model),
        "codec_operations": codec_operations(model),
        "head_operations": head * count * model.config.k,
        "base_head_operations": head * base.windows.count,
    }


def codec_parameters(model: TensorAR) -> int:
    """Parameters of the codec, by formula."""
    c, d = model.config, model.backbone.spec.dim
    if model.codec is None:
        return 0
    block = 4 * d * d + 2 * d + (3 * d * _hidden(d) + d if c.mlp else 0)
    gates = 0 if c.residual == "none" else 2 * d
    return 2 * c.depth * block + (2 * c.k + 1) * d + gates


def codec_operations(model: TensorAR) -> int:
    """Operations of the codec in a teacher-forced pass over one image, by formula."""
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

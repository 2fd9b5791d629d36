"""What TensorAR's codec costs, computed from shapes: parameters, and operations of a pass.

    python launch/lab/codec_cost.py

A pass is over one image, as in training (its forward part) and, summed over the steps, in drawing.
Training does three (the backward pass counts as two), and one more, without gradient, for the share
of samples that read own drafts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli

FILES = {
    "LlamaGen-B 256": "c2i_B_256.pt",
    "LlamaGen-L 384": "c2i_L_384.pt",
    "LlamaGen-XL 384": "c2i_XL_384.pt",
    "LlamaGen-XXL 384": "c2i_XXL_384.pt",
}
"""Published sizes by their file, which need not be there."""


@dataclass(frozen=True)
class CodecCost:
    """There is nothing to choose."""


def cost_table() -> str:
    """A row for each size and window."""
    from launch.measure.roofline import forward_flops
    from t2i.evaluation.results import markdown_table
    from t2i.loading import load_backbone
    from t2i.tensorar import presets
    from t2i.tensorar.model import TensorAR

    methods = {
        "base": presets.base(),
        **{f"iclr2026, k = {k}": presets.iclr2026(k=k) for k in (2, 4, 8)},
        # Codebook noise asks for an image tokenizer.
        "arxiv2505, k = 4": presets.arxiv2505(noise="categorical"),
    }
    rows = []
    for name, file in FILES.items():
        backbone = load_backbone("llamagen", file, device="meta", dtype="float32")
        costs = {}
        for method, config in methods.items():
            model = TensorAR(backbone, config).eval()
            costs[method] = sum(p.numel() for p in model.parameters()), forward_flops(model)
        size, work = costs["base"]
        for method, (total, done) in costs.items():
            added = f"+{total / size - 1:.1%}" if total > size else ""
            told = [f"{total / 1e6:.0f} M", added, f"{done / 1e9:.0f}", f"{done / work:.2f}"]
            rows.append([name, method, *told])
    head = "| model | method | parameters | added | GFLOP of a pass | to the base's |"
    return markdown_table(head, rows)


def main() -> None:
    cli.parse(CodecCost, __doc__)
    print(cost_table())


if __name__ == "__main__":
    cli.run(main)

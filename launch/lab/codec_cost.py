"""The cost of TensorAR's codec, computed from shapes: parameters, and operations per pass.

    python launch/lab/codec_cost.py

A pass is a forward pass over one image, as in training; all drawing steps of an image together need
as many operations. A training step needs three times as many (the backward pass counts as two), and
one more pass, without gradients, for the share of samples that read own drafts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli

SHAPES = {
    "LlamaGen-B 256": "llamagen-B",
    "LlamaGen-L 384": "llamagen-L-384",
    "LlamaGen-XL 384": "llamagen-XL-384",
    "LlamaGen-XXL 384": "llamagen-XXL-384",
}
"""Published sizes, with their names in launch/measure/shapes.py."""


@dataclass(frozen=True)
class CodecCost:
    """This program has no options."""


def cost_table() -> str:
    """A markdown table with a row for each size and method."""
    from launch.measure.cost import cost_of
    from launch.measure.shapes import outline
    from t2i.evaluation.results import markdown_table
    from t2i.tensorar import presets
    from t2i.tensorar.model import TensorAR

    methods = {
        "base": presets.base(),
        **{f"iclr2026, k = {k}": presets.iclr2026(k=k) for k in (2, 4, 8)},
        "arxiv2505, k = 4": presets.arxiv2505(),
    }
    rows = []
    for name, shape in SHAPES.items():
        backbone = outline(shape)
        for method, config in methods.items():
            cost = cost_of(TensorAR(backbone, config).eval())
            size, codec = cost["base_parameters"], cost["codec_parameters"]
            added = f"+{codec / size:.1%}" if codec else ""
            operations, of_base = cost["operations"], cost["base_operations"]
            cells = [f"{(size + codec) / 1e6:.0f} M", added, f"{operations / 1e9:.0f}"]
            rows.append([name, method, *cells, f"{operations / of_base:.2f}"])
    head = ("model", "method", "parameters", "added", "GFLOP of a pass", "to the base's")
    return markdown_table(head, rows)


def main() -> None:
    cli.parse(CodecCost, __doc__)
    print(cost_table())


if __name__ == "__main__":
    cli.run(main)

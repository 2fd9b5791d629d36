"""Merge a checkpoint into a folder that stands alone, for transformers and the hub, with TensorAR's codec and a model card.

python launch/export.py --ckpt runs/mine --out exported --prompt "a red bus in the rain" --results eval/results.json
python launch/export.py --ckpt runs/mine --out exported --push-to-hub owner/name
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a clone, without installation

from t2i import cli


@dataclass(frozen=True)
class ExportConfig:
    """What to export."""

    ckpt: Path
    """Checkpoint folder, or a run folder (its newest checkpoint)."""
    out: Path
    """New folder; adapters are merged into the base in it."""
    base: Path | None = None
    """Where the base weights are now, if they moved since the training."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the stored weights."""
    prompt: tuple[str, ...] = ()
    """Prompts to draw for the model card."""
    samples: int = 2
    """Images per prompt."""
    device: str = "auto"
    """Where to draw them: cpu, cuda, or auto."""
    results: tuple[Path, ...] = ()
    """results.json files of benchmarks, for the model card."""
    push_to_hub: str | None = None
    """Also upload the folder to this repository (owner/name); needs a login (`hf auth login`)."""
    private: bool = False
    """Create that repository as a private one."""


def main() -> None:
    config = cli.parse(ExportConfig, __doc__)
    import torch

    from t2i.export import export, push_to_hub

    folder = export(
        config.ckpt,
        config.out,
        base=config.base,
        dtype=getattr(torch, config.dtype),
        prompts=config.prompt,
        samples=config.samples,
        results=config.results,
        device=config.device,
    )
    print(f"exported to {folder}")
    if config.push_to_hub is not None:
        print(f"uploaded to {push_to_hub(folder, config.push_to_hub, private=config.private)}")


if __name__ == "__main__":
    cli.run(main)

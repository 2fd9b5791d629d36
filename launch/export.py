"""Merge a checkpoint into a folder that stands alone, for transformers and the hub, with TensorAR's
codec and a model card.

python launch/export.py --ckpt runs/mine --out exported --prompt "a red bus in the rain" \\
    --results eval/results.json
python launch/export.py --ckpt runs/mine --out exported --push-to-hub owner/name
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.model_options import BaseOptions

_MAIN = ("ckpt", "out", "base.weights", "dtype", "prompt", "results", "push_to_hub", "private")


@dataclass(frozen=True)
class ExportConfig:
    """What to export."""

    ckpt: Path
    """Checkpoint folder, or a run folder (its newest checkpoint)."""
    out: Path
    """New folder; adapters are merged into the base in it."""
    base: BaseOptions = field(default_factory=BaseOptions)
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
    """Also upload the folder to this repository (owner/name); needs a login (`hf auth login`). If
    --out is complete, it is only uploaded.
    """
    private: bool = False
    """Create that repository as a private one."""


def main() -> None:
    config = cli.parse(ExportConfig, __doc__, main=_MAIN)
    import torch

    from t2i.export import export, is_exported, prepare_upload, push_to_hub

    repo = config.push_to_hub
    done = repo is not None and is_exported(config.ckpt, config.out)
    if repo is not None:
        prepare_upload(repo, private=config.private)
    if done:
        print(f"{config.out} is the export of {config.ckpt}: uploading it as it is")
    else:
        export(
            config.ckpt,
            config.out,
            base=config.base.weights,
            tokenizer=config.base.tokenizer,
            text_encoder=config.base.text_encoder,
            dtype=getattr(torch, config.dtype),
            prompts=config.prompt,
            samples=config.samples,
            results=config.results,
            device=config.device,
        )
        print(f"exported to {config.out}")
    if repo is not None:
        print(f"uploaded to {push_to_hub(config.out, repo)}")


if __name__ == "__main__":
    cli.run(main)

"""Merge a checkpoint into a self-contained folder to share, with TensorAR's codec and a model card;
of Janus-Pro it is also a transformers model.

python launch/export.py --ckpt runs/mine --out exported --prompt "a red bus in the rain" \\
    --results eval/results.json
python launch/export.py --ckpt runs/mine --out exported --push-to-hub owner/name
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli, launcher
from t2i.errors import UserError
from t2i.model_options import ExportOptions

_MAIN = ("ckpt", "out", "base.weights", "dtype", "prompt", "results", "push_to_hub", "private")


@dataclass(frozen=True)
class ExportProgram(ExportOptions):
    """What to export, and whether to upload it."""

    push_to_hub: str | None = None
    """Also upload the folder to this repository (owner/name); needs a login (`hf auth login`). If
    --out already holds the finished export, it is only uploaded.
    """
    private: bool = False
    """Make the repository private when it is created."""

    def __post_init__(self):
        super().__post_init__()
        if self.private and self.push_to_hub is None:
            raise UserError("--private needs --push-to-hub: give both, or leave out --private")


def main() -> None:
    config = cli.parse(ExportProgram, __doc__, main=_MAIN)
    launcher.refuse_several()
    from t2i.export_folder import export, is_exported, prepare_upload, push_to_hub

    repo = config.push_to_hub
    done = repo is not None and is_exported(config.ckpt, config.out)
    if repo is not None:
        repo = prepare_upload(repo, private=config.private)
    if done:
        print(f"{config.out} already holds the export of {config.ckpt}: uploading it unchanged")
    else:
        export(config)
        print(f"exported to {config.out}")
    if repo is not None:
        print(f"uploaded to {push_to_hub(config.out, repo)}")


if __name__ == "__main__":
    cli.run(main)

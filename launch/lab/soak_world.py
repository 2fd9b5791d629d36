"""The small world of `soak.py`: a tiny base, pictures, runs of both, and how they are compared."""

import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2i.checkpoint import run_checkpoints
from t2i.files import file_sha256, read_json, write_json
from t2i.manifest import MANIFEST

TINY: dict[str, Any] = {
    **{"dim": 64, "n_layer": 2, "n_head": 2, "ffn_dim": 128, "vocab_size": 64, "grid": (4, 4)},
    **{"cond": "text", "caption_tokens": 12, "caption_dim": 32},
    **{"resid_dropout": 0.0, "ffn_dropout": 0.0},  # drawn anew for every split
}
"""Shape of a LlamaGen whose training takes seconds."""

STEPS, SAVE_EVERY = 40, 5


@dataclass(frozen=True)
class World:
    """A folder with base/, data/, cache/ and runs/."""

    folder: Path
    seed: int
    patience: float
    """Seconds after which a process counts as hanging."""

    def moments(self, case: str) -> random.Random:
        """Where a case takes its random moments from."""
        return random.Random(f"{self.seed} {case}")

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def words(self, name: str, **options: object) -> list[str]:
        """The command line of a run, but for the program; `data_source=` is --data.source."""
        own: dict[str, object] = {
            "backbone_weights": self.folder / "base",
            "method_k": 3,
            "data_source": self.folder / "data",
            "data_cache_dir": self.folder / "cache",
            "data_validation_samples": 9,
            "optim_codec_lr": 1e-2,
            "optim_backbone_lr": 1e-3,
            "engine_micro_batch": 4,
            "engine_zero_stage": 1,
            "batch_size": 8,
            "token_dropout": 0.1,
            "ema": 0.9,
            "steps": STEPS,
            "log_log_every": 1,
            "log_validate_every": 10,
            "log_sample_every": 0,
            "log_save_every": SAVE_EVERY,
            "log_tracker": "none",
            "run_dir": self.run_dir(name),
        }
        parts = ("backbone", "method", "data", "optim", "engine", "log")
        found = ["shapes-iclr2026"]
        for key, value in (own | options).items():
            part, _, rest = key.partition("_")
            option = f"{part}.{rest}" if part in parts else key
            found += [f"--{option.replace('_', '-')}", str(value)]
        return found


@dataclass
class Outcome:
    """What a fault did."""

    seen: str
    """How the run ended, in its own words or in ours."""
    held: bool
    """Everything that was promised is true."""
    seconds: float | None = None
    """From the fault to the end of all processes."""
    same: bool | None = None
    """The finished run equals an undisturbed one bit for bit; None where nothing is trained."""
    facts: dict = field(default_factory=dict)


def build_world(folder: Path, seed: int, patience: float) -> World:
    """Make what is not there yet."""
    from t2i.shapes.shapes_source import write_dataset

    if not (folder / "base" / "config.json").exists():
        _write_base(folder / "base")
    if not (folder / "data").exists():
        write_dataset(folder / "data", 60, size=32)
    return World(folder, seed, patience)


def _write_base(folder: Path) -> None:
    """A backbone folder of a LlamaGen with random weights: 4x4 codes of 8 pixels."""
    import torch

    from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
    from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
    from t2i.shapes.tiny_t5 import build_tiny_t5

    torch.manual_seed(0)
    config = LlamaGenConfig(**TINY)
    gpt = LlamaGen(config)
    vq = VQTokenizer(VQConfig(32, (1, 1, 1, 1), 1, 32, codebook_size=64, codebook_dim=8))
    for p in (*gpt.parameters(), *vq.parameters()):
        torch.nn.init.normal_(p, std=0.2)
    words = "a photo of two red green blue circle square star left right above below"
    build_tiny_t5(folder / "text_encoder", [words], d_model=32, d_ff=32, num_layers=1)
    torch.save(vq.state_dict(), folder / "vq.pt")
    torch.save({"model": gpt.official_state_dict()}, folder / "gpt.pt")
    files = {"weights": "gpt.pt", "tokenizer": "vq.pt", "text_encoder": "text_encoder"}
    write_json(folder / "config.json", {"family": "llamagen", **files, "config": asdict(config)})


def fresh(world: World, name: str) -> Path:
    run_dir = world.run_dir(name)
    shutil.rmtree(run_dir, ignore_errors=True)
    return run_dir


# -- comparing -------------------------------------------------------------------------------------
def newest_step(run_dir: Path) -> int:
    found = run_checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def fingerprint(run_dir: Path) -> dict[str, str]:
    """Hashes of the files of the newest checkpoint and of the best model, and all metrics."""
    found = {}
    for folder in (run_checkpoints(run_dir)[-1], run_dir / "best"):
        for name, entry in read_json(folder / MANIFEST)["files"].items():
            if name != "config.json":  # names the run folder
                found[f"{folder.name}/{name}"] = entry["sha256"]
                assert file_sha256(folder / name) == entry["sha256"], f"{folder / name} is damaged"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for measured in ("images_per_s", "data_wait", "memory_gb"):
            row.pop(measured, None)
    return found | {"metrics": json.dumps(rows)}


@contextmanager
def small_disk(world: World, size: int) -> Iterator[Callable[[int], None] | None]:
    """A file system of so many bytes at `world.folder`/disk, and how to make it larger.

    None where this user may not mount one.
    """
    place = world.folder / "disk"
    place.mkdir(exist_ok=True)

    def mount(options: str) -> bool:
        words = shlex.split(f"mount -t tmpfs -o {options} tmpfs {place}")
        return subprocess.run(words, capture_output=True).returncode == 0

    if not mount(f"size={size}"):
        yield None
        return
    try:
        yield lambda more: None if mount(f"remount,size={more}") else sys.exit("remount failed")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)

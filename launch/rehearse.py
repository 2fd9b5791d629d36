"""Run the whole pipeline at real size before you have the real weights: write files with random
weights in the official layout, then load, pre-flight, train, resume, draw, export and reload with
the real programs, measuring each.

python launch/rehearse.py llamagen XL
python launch/rehearse.py janus 7B --holes                  # names and shapes only, hardly any disk
python launch/rehearse.py rar B --stages write check-lora train-lora --keep

Writes results.json and table.md to --out after every stage; the same command resumes where it
stopped.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError, choose_one, shorten
from t2i.models.families import FAMILIES, module_if_any
from t2i.rehearsal.layout import JUDGES, Written, module_of
from t2i.sampling import check_counts, check_positive

if TYPE_CHECKING:
    ModelName = str
else:
    # A family may have no rehearsal.
    ModelName = Literal[(*(f for f in FAMILIES if module_if_any(f, "rehearsal")), *JUDGES)]
ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "write": "write files with random weights",
    "libraries": "an empty training process",
    "load": "load the base in bf16",
    "hash": "hash all its files",
    "hash-again": "the same, remembered",
    "judge": "load it and judge an image",
    "judge-again": "the same, converted and hashed before",
    "check-lora": "pre-flight, LoRA",
    "train-lora": "two steps with LoRA, a checkpoint",
    "resume-lora": "a third, resumed",
    "draw": "load the run, the first codes of an image",
    "export": "merge and export",
    "reload": "load the export",
    "check-full": "pre-flight, full",
    "train-full": "two steps of all weights, a checkpoint",
    "resume-full": "a third, resumed",
}
"""All stages in order; the part after the hyphen is the kind of tuning (lora or full)."""
OF_JUDGES = ("write", "judge", "judge-again")
HOLES = ("write", "check-lora", "check-full")
"""Stages that read no weights."""
_NEEDS = {
    "resume-lora": "train-lora",
    "draw": "train-lora",
    "export": "train-lora",
    "reload": "export",
    "resume-full": "train-full",
}
_PROMPT, _CLASS = "a red fox in the snow", "207"
_HEADROOM = 0.85
"""A stage runs only if its predicted memory is at most this share of the free memory."""


@dataclass(frozen=True)
class Rehearsal:
    """What to rehearse."""

    model: tyro.conf.Positional[ModelName]
    """Family of the model, or a benchmark's judge."""
    size: tyro.conf.Positional[str]
    """Published size, such as B, XL, 1B, swin-s."""
    out: Path | None = None
    """Folder for results and files; runs/rehearsal/MODEL-SIZE if not given."""
    stages: tuple[str, ...] = ()
    """Stages to run; all that fit into memory if none are given."""
    holes: bool = False
    """Write sparse files without weights, and run only the stages that read names and shapes."""
    keep: bool = False
    """Keep weights, runs and export; otherwise they are deleted at the end."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of training; bf16 takes ten times as long on a CPU without bf16 instructions."""
    codes: int = 16
    """Number of codes to draw of one image."""
    minutes: float = 30.0
    """Time limit of a stage in minutes; a stage that takes longer is stopped."""
    memory: float | None = None
    """GB that a stage may take; 85 % of the free memory if not given."""

    def __post_init__(self):
        check_counts(codes=self.codes)
        check_positive(1e6, minutes=self.minutes, memory=self.memory)

    @property
    def folder(self) -> Path:
        """Folder for everything that is written."""
        return self.out or Path("runs/rehearsal") / f"{self.model}-{self.size}"

    @property
    def possible(self) -> list[str]:
        """The stages of such a model and, with `holes`, of such files."""
        own = OF_JUDGES if self.model in JUDGES else set(STAGES) - set(OF_JUDGES[1:])
        return [name for name in STAGES if name in own and (name in HOLES or not self.holes)]


def main() -> None:
    config = cli.parse(Rehearsal, __doc__)
    module = import_module(module_of(config.model))
    if config.size not in module.SIZES:
        others = choose_one(config.size, module.SIZES)
        raise UserError(f"{config.model} has no size {config.size}; {others}")
    for name in config.stages:
        if name not in config.possible:
            stage = f"stage {name}{' with --holes' if config.holes else ''}"
            raise UserError(f"{config.model} has no {stage}; {choose_one(name, config.possible)}")
    from t2i.ownership import owning

    with owning(config.folder, "rehearsal folder"):
        failed = Stages(config).run()
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see {config.folder / 'logs'}")


def _known_rows(out: Path) -> dict:
    """The results so far of the rehearsal in this folder.

    Raises:
        UserError: the folder holds other files, and the rehearsal would delete its data/ or runs/.
    """
    from t2i.fields import read_object

    path = out / "results.json"
    rows = read_object(path) if path.is_file() else {}
    others = [p.name for p in sorted(out.glob("[!.]*")) if not path.is_file()]
    if others or not rows.keys() <= STAGES.keys():
        raise UserError(
            f"{out} holds {shorten(others) or path.name}, which no rehearsal wrote; a rehearsal "
            "deletes its files at the end, so give it its own folder"
        )
    return rows


# -- the stages ------------------------------------------------------------------------------------
class Stages:
    """The stages of a rehearsal, each run in its own process and measured."""

    def __init__(self, config: Rehearsal):
        self.config, self.out = config, config.folder.resolve()
        self.base, self.export = self.out / "base", self.out / "export"
        self.rows: dict[str, dict] = _known_rows(self.out)
        found = {row["precision"] for row in self.rows.values() if "precision" in row}
        for other in found - {config.precision}:
            raise UserError(
                f"{self.out} holds a rehearsal in {other}, whose predictions and peaks are not those "
                f"of {config.precision}: give another --out, or --precision {other}"
            )

    def run(self) -> list[str]:
        """Run the requested stages that are not done yet; returns those that failed."""
        from t2i.files import write_json, write_text
        from t2i.rehearsal.rehearsal_report import summary, table

        config, failed = self.config, []
        write_json(self.out / "results.json", self.rows)  # marks the folder as a rehearsal's
        (self.out / "logs").mkdir(exist_ok=True)
        for name in self._todo(set(config.stages or config.possible)):
            print(f"{name}: {STAGES[name]} ...", flush=True)
            reason = self._impossible(name)
            self.rows[name] = {"skipped": reason} if reason else self._measure(name)
            failed += [name] if self.rows[name].get("done") is False else []
            write_json(self.out / "results.json", self.rows)
            write_text(self.out / "table.md", table(self.rows, STAGES))
            print(f"  {summary(self.rows[name])}", flush=True)
        if not config.keep and not failed:
            for place in ("base", "data", "export", "runs", "cache"):
                shutil.rmtree(self.out / place, ignore_errors=True)
        return failed

    def _todo(self, wanted: set[str]) -> list[str]:
        """The stages to run, including the ones whose files they need and that were deleted."""
        todo = {name for name in wanted if not self.rows.get(name, {}).get("done")}
        if todo and not self.base.exists():
            for name in reversed(STAGES):
                todo |= {"write", _NEEDS.get(name, "write")} if name in todo else set()
        return [name for name in STAGES if name in todo]

    def _measure(self, name: str) -> dict:
        from t2i.checkpoint_folders import run_checkpoints
        from t2i.rehearsal.measured import run_measured
        from t2i.rehearsal.rehearsal_report import predictions

        kind, _, tuning = name.partition("-")
        place = {"write": self.base, "export": self.export}.get(kind)
        if kind in ("train", "resume"):
            place = self.out / "runs" / tuning
        if place is not None and kind != "resume":
            shutil.rmtree(place, ignore_errors=True)
        found = run_measured(
            self._command(name),
            self.out / "logs" / f"{name}.txt",
            seconds=60 * self.config.minutes,
            PYTHONPATH=str(ROOT),
            HF_HUB_OFFLINE="1",
            T2I_CACHE=str(self.out / "cache" / "hashes"),
            MALLOC_MMAP_THRESHOLD_="131072",  # return freed memory to the system at once
        )
        row: dict = {"done": found.code == 0, **asdict(found)}
        if place is not None and found.code == 0:
            saved = run_checkpoints(place)[-1:] or [place]  # of a run, only the newest checkpoint
            row["bytes"] = sum(p.stat().st_size for p in saved[0].rglob("*") if p.is_file())
        if kind in ("check", "train", "resume"):
            row["precision"] = self.config.precision
        if kind == "check" and found.code == 0:
            row["predicted"] = predictions(found.output)
        return row

    def _impossible(self, name: str) -> str:
        """Why a stage cannot run; "" if it can."""
        if name != "write" and not self.base.exists():
            return "the files are not written"
        if name in _NEEDS and not self.rows.get(_NEEDS[name], {}).get("done"):
            return f"{_NEEDS[name]} is not done"
        kind, _, tuning = name.partition("-")
        if kind in ("train", "resume"):
            from t2i.rehearsal.measured import free_memory

            need = self.rows.get(f"check-{tuning}", {}).get("predicted", {}).get("peak", 0)
            given = self.config.memory
            most = _HEADROOM * free_memory() if given is None else 1e9 * given
            if need > most:
                return f"needs {need / 1e9:.1f} GB, and may take {most / 1e9:.1f} GB"
        return ""

    # -- commands ----------------------------------------------------------------------------------
    def _command(self, name: str) -> list[str]:
        kind, _, tuning = name.partition("-")
        if kind in ("check", "train", "resume"):
            # Two steps, because the first one allocates the optimizer's moments.
            steps = {"check": ["--steps=2", "--check"], "resume": ["--steps=3", "--resume"]}
            return self._training(tuning, *steps.get(kind, ["--steps=2"]))
        run = str(self.out / "runs" / "lora")
        if kind == "export":
            options = ["--ckpt", run, "--out", str(self.export)]
            return [sys.executable, "-m", "launch", "export", *options]
        if kind == "draw":
            prompt = _CLASS if self._written.classes else _PROMPT
            options = ["--ckpt", run, "--prompt", prompt, "--calls", str(self.config.codes)]
            options += ["--dtype", "bfloat16", "--speed", "eager"]
            return [sys.executable, "-m", "t2i.rehearsal.first_codes", *options]
        return [sys.executable, "-c", self._python(kind)]

    def _python(self, kind: str) -> str:
        """The stage as Python code that a user would type."""
        config = self.config
        if kind == "write":
            arguments = f"{config.model!r}, {config.size!r}, {str(self.out)!r}, {config.holes}"
            return f"from t2i.rehearsal.layout import write; write({arguments})"
        if kind == "libraries":
            return "import t2i.training.loop as loop; loop.start_processes()"
        if kind == "judge":
            module, picture = module_of(config.model), self.out / "data" / "0.png"
            paths = f"Path({str(self.base)!r}), Path({str(picture)!r})"
            return f"from pathlib import Path; from {module} import judge; print(judge({paths}))"
        base = dict(self._written.base)
        if kind == "hash":
            source = f"BackboneSource({config.model!r}, **{base!r})"
            return (
                "from pathlib import Path; from t2i.sources import *; "
                f"print(with_hashes({source}, Path()))"
            )
        if kind == "load":
            files = {"family": config.model} | base | {"text_encoder_dtype": "bfloat16"}
            return (
                "import torch; from t2i.loading import load_source; "
                "from t2i.sources import base_files; "
                f"print(load_source(base_files(**{files}), dtype=torch.bfloat16))"
            )
        own = f"import t2i; print(t2i.from_pretrained({str(self.export)!r}, dtype='bfloat16'))"
        return self._written.library.replace("FOLDER", repr(str(self.export))) or own

    def _training(self, tuning: str, *more: str) -> list[str]:
        """The training command: four images, one per step, one of them held out."""
        written = self._written
        options = [f"--backbone.{k.replace('_', '-')}={v}" for k, v in written.base.items()]
        options += ["--data.views=flip"] if written.classes else []
        options += [f"--data.source={self.out / 'data'}", f"--data.cache-dir={self.out / 'cache'}"]
        options += ["--data.validation-samples=1", f"--tuning={tuning}"]
        options += ["--no-train-image-layers"] if tuning == "full" else []
        options += ["--batch-size=1", "--engine.micro-batch=1", "--log.no-at-start"]
        options += ["--log.sample-every=0", "--log.validate-every=0", "--log.save-every=0"]
        options += [f"--engine.precision={self.config.precision}"]
        options += ["--log.tracker=none", f"--run-dir={self.out / 'runs' / tuning}", *more]
        return [sys.executable, "-m", "launch", written.program, written.recipe, *options]

    @property
    def _written(self) -> Written:
        return Written(**json.loads((self.base / "rehearsal.json").read_text()))


if __name__ == "__main__":
    cli.run(main)

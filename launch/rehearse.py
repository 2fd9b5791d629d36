"""Walk the whole way at real size before the real weights are there: files in the official layout
with random weights, then load, pre-flight, training, resume, drawing, export and reload, by the
real programs, each measured.

python launch/rehearse.py llamagen XL
python launch/rehearse.py janus 7B --holes                  # names and shapes only, hardly any disk
python launch/rehearse.py rar B --stages write check-lora train-lora --keep

--out gets results.json and table.md after every stage; the same command goes on where it stopped.
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
from t2i.errors import UserError, shorten
from t2i.models.families import FAMILIES
from t2i.rehearsal.layout import JUDGES, Written, module_of

if TYPE_CHECKING:
    ModelName = str
else:
    ModelName = Literal[(*FAMILIES, *JUDGES)]
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
"""In their order; the part behind the hyphen is how the model is tuned."""
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
"""Share of the free memory that a stage may be predicted to take."""


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed."""

    model: tyro.conf.Positional[ModelName]
    """Family of the model, or a benchmark's judge."""
    size: tyro.conf.Positional[str]
    """Published size, such as B, XL, 1B, swin-s."""
    out: Path | None = None
    """Folder for results and files; runs/rehearsal/MODEL-SIZE if not given."""
    stages: tuple[str, ...] = ()
    """Some of the stages only; all that fit into memory if none are given."""
    holes: bool = False
    """Write files without their numbers, and do what reads names and shapes alone."""
    keep: bool = False
    """Keep weights, runs and export; otherwise they are deleted in the end."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of training; a CPU without instructions for bf16 takes ten times as long with it."""
    codes: int = 16
    """Draw so many codes of one image."""
    minutes: float = 30.0
    """A stage that takes longer is stopped."""
    memory: float | None = None
    """GB that a stage may take; what is free, less some, if not given."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.out or Path("runs/rehearsal") / f"{self.model}-{self.size}"


def main() -> None:
    config = cli.parse(Rehearsal, __doc__)
    module = import_module(module_of(config.model))
    if config.size not in module.SIZES:
        sizes = ", ".join(module.SIZES)
        raise UserError(f"{config.model} has no size {config.size}; choose one of {sizes}")
    if unknown := [name for name in config.stages if name not in STAGES]:
        raise UserError(f"no stage {unknown[0]}; choose from {', '.join(STAGES)}")
    from t2i.files import owning

    with owning(config.folder, "rehearsal folder"):
        failed = Stages(config).run()
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see {config.folder / 'logs'}")


def _known_rows(out: Path) -> dict:
    """What a rehearsal in this folder has found so far.

    Raises:
        UserError: it holds something else, of which data/ or runs/ would be deleted.
    """
    from t2i.fields import read_object

    path = out / "results.json"
    rows = read_object(path) if path.is_file() else {}
    others = [p.name for p in sorted(out.glob("[!.]*")) if not path.is_file()]
    if others or not rows.keys() <= STAGES.keys():
        raise UserError(
            f"{out} holds {shorten(others) or path.name}, which no rehearsal wrote; a rehearsal "
            "deletes its files at the end, so give it a folder of its own"
        )
    return rows


# -- the stages ------------------------------------------------------------------------------------
class Stages:
    """The stages of a rehearsal, each a process of its own, and what they took."""

    def __init__(self, config: Rehearsal):
        self.config, self.out = config, config.folder.resolve()
        self.base, self.export = self.out / "base", self.out / "export"
        self.rows: dict[str, dict] = _known_rows(self.out)

    def run(self) -> list[str]:
        """All that is asked for and not done; returns the stages that failed."""
        from t2i.files import write_json, write_text
        from t2i.rehearsal.rehearsal_report import summary, table

        config, failed = self.config, []
        of_kind = OF_JUDGES if config.model in JUDGES else set(STAGES) - set(OF_JUDGES[1:])
        wanted = set(config.stages or STAGES) & set(HOLES if config.holes else of_kind)
        write_json(self.out / "results.json", self.rows)  # the folder is a rehearsal's from now on
        (self.out / "logs").mkdir(exist_ok=True)
        for name in self._todo(wanted):
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
        """What is not done; and what it needs, where the files were deleted in the end."""
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
            MALLOC_MMAP_THRESHOLD_="131072",  # what is freed is given back, not kept
        )
        row: dict = {"done": found.code == 0, **asdict(found)}
        if place is not None and found.code == 0:
            saved = run_checkpoints(place)[-1:] or [place]  # of a run its newest checkpoint alone
            row["bytes"] = sum(p.stat().st_size for p in saved[0].rglob("*") if p.is_file())
        if kind == "check" and found.code == 0:
            row["predicted"] = predictions(found.output)
        return row

    def _impossible(self, name: str) -> str:
        """Why a stage is not tried; "" if it is."""
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
            # Two, since the optimizer's moments are made in the first.
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
        """What a user would type into Python."""
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
        """The training program on four pictures, one a step, one held out."""
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

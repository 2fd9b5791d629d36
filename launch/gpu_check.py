"""Check correctness and speed on a GPU, in one command of about eight minutes, with the most
valuable parts first.

Every result is written to --out at once (`results.jsonl`; `report.md` after each part), so a run
that is cut off keeps its results so far. A part that fails is recorded and the others still run.
Exit code 1 means that something computes different numbers than the official code, or than the
kit itself when it computes them another way. It needs a clone with its tests (they hold the golden
data), pytest and peft, but neither deepspeed nor datasets.

    python launch/gpu_check.py --out runs/gpu-check
    # a trial on a CPU, in a minute
    python launch/gpu_check.py --out runs/rehearsal --tiny
    python launch/gpu_check.py --out runs/gpu-check --parts sampling training
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# For the golden cases and the functions that read them.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from launch.measure import formulas
from t2i import cli
from t2i.errors import UserError, choose_one
from t2i.evaluation.results import markdown_table
from t2i.files import writable_folder, write_text
from t2i.sampling import check_positive

if TYPE_CHECKING:
    import torch

    from launch.lab.gpu_speed import Rows

log = logging.getLogger("gpu_check")


@dataclass(frozen=True)
class CheckPart:
    """One part of the check: its rows, its time limit and what it measures."""

    rows: "Callable[[torch.device, bool], Rows]"
    """Takes the device and `tiny`; rows with "ok" are checks, others are measurements."""
    seconds: float
    """No further row is started after this many seconds."""
    about: str


def _of(module: str, name: str) -> "Callable[[torch.device, bool], Rows]":
    """A function of launch/lab whose module is imported only when called: that takes seconds."""

    def rows(device: "torch.device", tiny: bool) -> "Rows":
        return getattr(import_module(f"launch.lab.{module}"), name)(device, tiny)

    return rows


PARTS = {
    "golden": CheckPart(
        _of("gpu_parity", "golden"),
        75,
        "Official outputs of tiny checkpoints: largest difference of teacher-forced and of cached "
        "logits next to the largest logit, greedy codes (share equal).",
    ),
    "tokenizers": CheckPart(
        _of("gpu_parity", "tokenizers"),
        20,
        "Official codes (share equal) and pixels (largest difference) of tiny image tokenizers.",
    ),
    "identities": CheckPart(
        _of("gpu_parity", "identities"),
        60,
        "Cached against teacher-forced logits (largest difference), slot 0 of an untrained "
        "TensorAR against the base (greedy codes, share equal), images drawn alone against drawn "
        "in a batch, and by CUDA graphs against eager (codes, share equal).",
    ),
    "sampling": CheckPart(
        _of("gpu_speed", "sampling_rows"),
        170,
        " ".join(["bf16.", formulas.TURNS, formulas.DRAWING, formulas.FLOOR]),
    ),
    "training": CheckPart(
        _of("gpu_speed", "training_rows"),
        70,
        " ".join([formulas.TURNS, formulas.TRAINING, formulas.MFU, formulas.ESTIMATE]),
    ),
    "memory": CheckPart(
        _of("gpu_speed", "memory_rows"),
        40,
        "Peak memory of drawing and decoding images in bf16, and the peak by which the kit chooses "
        "how many to draw at once.",
    ),
    "speculation": CheckPart(
        _of("gpu_speed", "speculation_rows"),
        60,
        "bf16, by graphs. `ahead`: windows of each image per call (0: one, without speculation); "
        "`faster`: how many times as fast as without, if whole images were drawn. Graphs are "
        "recorded before the clock starts.",
    ),
    "compiled_training": CheckPart(
        _of("gpu_speed", "compiled_training_rows"),
        60,
        "Like training, with and without compiled blocks.",
    ),
    "same_codes": CheckPart(
        _of("gpu_parity", "same_codes"),
        60,
        "Greedy codes in fp32, by graphs and compiled against eager (share equal). Where an image "
        "first differs, by how much eager preferred its own code (the largest such gap of logits): "
        "fusing changes rounding, and one different code changes those after it.",
    ),
    "compiled": CheckPart(
        _of("gpu_speed", "compiled_rows"), 60, "Like sampling, compiled against graphs."
    ),
    "kernels": CheckPart(
        _of("gpu_kernels", "kernel_rows"),
        100,
        "What a drawing step consists of, by torch's profiler: kernels per step, how long the "
        "device is busy with them and how much of the step it is idle; then the longest kernels.",
    ),
}


@dataclass(frozen=True)
class Check:
    """What to check."""

    out: Path
    """Folder for results.jsonl and report.md; earlier ones in it are replaced."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Parts to run; they always run in the default order."""
    minutes: float = 8
    """Start no further part, and no further row of one, after this many minutes."""
    tiny: bool = False
    """Only try the check out, at sizes whose numbers mean nothing; also runs on a CPU."""

    def __post_init__(self):
        for name in self.parts:
            if name not in PARTS:
                raise UserError(f"unknown part {name!r}; {choose_one(name, PARTS)}")
        check_positive(minutes=self.minutes)
        if not self.parts:
            raise UserError("parts is empty, so nothing would be checked: leave it out for all")


class Record:
    """Rows of results, each written to disk at once."""

    def __init__(self, folder: Path, machine: dict[str, str]):
        self.folder, self.machine = writable_folder(folder), machine
        self.rows: list[tuple[str, dict]] = []
        self.file = open(folder / "results.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def add(self, part: str, row: dict) -> None:
        self.rows.append((part, row))
        self.file.write(json.dumps({"part": part, **row, **self.machine}) + "\n")
        self.file.flush()
        log.info("%s: %s", part, "  ".join(f"{k}={_text(v)}" for k, v in row.items()))

    def report(self) -> None:
        lines = ["# GPU check", "", ", ".join(f"{k} {v}" for k, v in self.machine.items())]
        for name in dict.fromkeys(part for part, _ in self.rows):
            rows = [row for part, row in self.rows if part == name]
            lines += ["", f"## {name}", "", PARTS[name].about, "", _table(rows)]
        write_text(self.folder / "report.md", "\n".join(lines) + "\n")


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(c, "")) for c in columns] for row in rows]
    return markdown_table(columns, cells)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def run_part(name: str, device: "torch.device", tiny: bool, end: float, record: Record) -> None:
    """Record the rows of a part, and its failures, until its time or the whole run's is over."""
    import torch

    start = time.time()
    end = min(end, start + PARTS[name].seconds)
    for about, work in PARTS[name].rows(device, tiny):
        begun = time.time()
        if begun > end:
            record.add(name, {**about, "stopped": f"{begun - start:.0f} s were used up"})
            break
        try:
            found = work()
        except Exception as error:
            log.info(traceback.format_exc())
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}", "ok": False}
        took = {"took_s": round(time.time() - begun, 1)}
        for row in found if isinstance(found, list) else [found]:
            record.add(name, {**about, **row, **took})
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    config = cli.parse(Check, __doc__)
    import torch

    if not torch.cuda.is_available() and not config.tiny:
        raise UserError("PyTorch sees no GPU here; --tiny tries the check out on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, a rehearsal",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    record, end = Record(config.out, machine), time.time() + 60 * config.minutes
    for name in (name for name in PARTS if name in config.parts):
        if time.time() > end:
            record.add(name, {"stopped": "no time was left"})
        else:
            run_part(name, device, config.tiny, end, record)
        record.report()
    failed = sum(row.get("ok") is False for _, row in record.rows)
    print((config.out / "report.md").read_text(encoding="utf-8"))
    if late := dict.fromkeys(part for part, row in record.rows if "stopped" in row):
        print(f"time was up: {', '.join(late)} not complete")
    print(f"{failed} checks failed" if failed else "every check that ran passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    cli.run(main)

"""Faults on purpose: kill, stop, freeze, fill up and damage runs, and look at what is left.

A tiny model is trained through the command line again and again. After every fault the run goes on
with --resume, and must then equal an undisturbed one bit for bit. What is in results.jsonl of the
folder is not done again; the same seed gives the same moments.

    python launch/lab/soak.py                        # all: half an hour on two cores
    python launch/lab/soak.py --only kills full      # of these names, or that begin so
    python launch/lab/soak.py --family janus
    python launch/lab/soak.py --list
"""

import json
import platform
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.errors import UserError
from t2i.files import owning, read_json_lines, write_text

_LONGEST = 160
"""Characters of a cell of the table."""


@dataclass(frozen=True)
class SoakOptions:
    """Which faults, and where."""

    out: Path | None = None
    """The tiny world, its runs, results.jsonl and table.md; runs/soak/FAMILY if not given."""
    family: Literal["llamagen", "janus", "open_magvit2", "rar"] = "llamagen"
    """Of the model that is trained."""
    only: tuple[str, ...] = ()
    """Cases of these names; what is none's name stands for all that begin so. All if empty."""
    kills: int = 27
    """Of the run that is killed."""
    seed: int = 0
    """Of the random moments."""
    patience: float = 120.0
    """Seconds after which a run that was told to end counts as hanging."""
    again: bool = False
    """Do the cases once more that are done."""
    list: bool = False
    """Name the cases and do nothing."""


def main() -> None:
    options = cli.parse(SoakOptions, __doc__)
    from launch.lab import soak_faults, soak_world

    every = soak_faults.cases(options.kills)
    begins = tuple(name for name in options.only if name not in every)
    chosen = [n for n in every if not options.only or n in options.only or n.startswith(begins)]
    if not chosen:
        raise UserError(f"--only {' '.join(options.only)}: the cases are {', '.join(every)}")
    if options.list:
        print("\n".join(f"{name:<24}{every[name][0]}" for name in chosen))
        return
    out = options.out or Path("runs/soak") / options.family
    with owning(out, "soak folder"):
        soak_faults.imports()
        world = soak_world.build_world(
            out.resolve(), options.family, options.seed, options.patience
        )
        path = out / "results.jsonl"
        rows = {row["case"]: row for row in (read_json_lines(path) if path.exists() else [])}
        for name in chosen:
            if name in rows and not options.again:
                continue
            rows[name] = _row(name, *every[name], world)
            with path.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(_line(rows[name]), flush=True)
        rows = {name: rows[name] for name in every if name in rows}
        write_text(out / "table.md", table(list(rows.values()), options.seed))
    print(f"\n{out / 'table.md'}")
    if failed := [name for name, row in rows.items() if row["verdict"] == "FAILED"]:
        raise UserError(f"not as promised: {', '.join(failed)}")


def _row(name: str, fault: str, case, world) -> dict:
    from launch.lab.soak_processes import end_launched
    from launch.lab.soak_world import Skipped

    begin = time.monotonic()
    row = {"case": name, "fault": fault, "date": time.strftime("%Y-%m-%d")}
    try:
        outcome = case(world)
    except Skipped as reason:
        return row | {"verdict": "skipped", "seen": str(reason)}
    except Exception as error:  # a broken promise, in most cases
        traceback.print_exc()
        return row | {"verdict": "FAILED", "seen": f"{type(error).__name__}: {error}"[:500]}
    finally:
        end_launched()
    good = outcome.held and outcome.same is not False
    took = round(time.monotonic() - begin, 1)
    return row | asdict(outcome) | {"verdict": "held" if good else "FAILED", "took": took}


def _line(row: dict) -> str:
    return f"{row['verdict']:<8}{row['case']:<26}{row['seen']}"


def table(rows: list[dict], seed: int) -> str:
    """All results as Markdown."""
    import deepspeed
    import torch

    def cell(text: object) -> str:
        words = str(text).replace("|", "\\|").removeprefix("error: ")
        return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."

    lines = ["| fault | what was seen | ended after | final weights | |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = f"{row['seconds']:.0f} s" if row.get("seconds") is not None else ""
        same = {True: "equal, bit for bit", False: "**differ**", None: ""}[row.get("same")]
        cells = (row["fault"], row["seen"], seconds, same, row["verdict"])
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    dates = sorted({row["date"] for row in rows})
    about = (
        f"Seed {seed}, {dates[0]} to {dates[-1]}, {platform.system()} {platform.machine()}, CPU, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}."
    )
    return "\n".join([*lines, "", about, ""])


if __name__ == "__main__":
    cli.run(main)

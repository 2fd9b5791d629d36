"""Inject faults into training: kill, stop and freeze runs, fill disks, damage files, and check what
is left.

Each case trains a tiny model through the command line and causes a fault. The run is then continued
with --resume, and must end bit for bit like an undisturbed one. Cases that are in the folder's
results.jsonl are skipped. The same seed places random faults at the same moments.

    python launch/lab/soak.py                        # all cases: half an hour on two cores
    python launch/lab/soak.py --only kills full      # cases by name, or by the start of their names
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
from t2i.evaluation.results import markdown_table
from t2i.files import write_text
from t2i.ownership import owning

_LONGEST = 160
"""Largest number of characters in a cell of the table."""


@dataclass(frozen=True)
class SoakOptions:
    """Which faults to inject, and where."""

    out: Path | None = None
    """Folder for model, data, runs, results.jsonl and table.md; default: runs/soak/FAMILY."""
    family: Literal["llamagen", "janus", "open_magvit2", "rar"] = "llamagen"
    """Family of the model to train."""
    only: tuple[str, ...] = ()
    """Cases to run; a word that is no case's name selects all that begin with it. Empty: all."""
    kills: int = 27
    """How often the case `kills` kills its run."""
    seed: int = 0
    """Seed for the random moments."""
    patience: float = 120.0
    """Seconds after which a run that should end counts as hanging."""
    again: bool = False
    """Repeat cases that have a result already."""
    list: bool = False
    """Only list the cases."""


def main() -> None:
    options = cli.parse(SoakOptions, __doc__)
    from launch.lab import soak_faults, soak_world
    from launch.lab.result_lines import results

    every = soak_faults.cases(options.kills)
    begins = tuple(name for name in options.only if name not in every)
    chosen = [n for n in every if not options.only or n in options.only or n.startswith(begins)]
    if not chosen:
        raise UserError(
            f"--only {' '.join(options.only)} selects no case; the cases are {', '.join(every)}"
        )
    if options.list:
        print("\n".join(f"{name:<24}{every[name][0]}" for name in chosen))
        return
    out = options.out or Path("runs/soak") / options.family
    with owning(out, "soak folder"):
        soak_faults.import_for_forks()
        world = soak_world.build_world(
            out.resolve(), options.family, options.seed, options.patience
        )
        rows = {row["case"]: row for row in results(out)}
        for name in chosen:
            if name in rows and not options.again:
                continue
            row = rows[name] = _row(name, *every[name], world)
            with (out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['verdict']:<8}{name:<26}{row['seen']}", flush=True)
        rows = {name: rows[name] for name in every if name in rows}
        write_text(out / "table.md", table(list(rows.values()), options.seed))
    print(f"\n{out / 'table.md'}")
    if failed := [name for name, row in rows.items() if row["verdict"] == "FAILED"]:
        raise UserError(f"cases that failed: {', '.join(failed)}")


def _row(name: str, fault: str, case, world) -> dict:
    """Run a case and return its line for results.jsonl."""
    from launch.lab.soak_processes import end_launched
    from launch.lab.soak_world import Skipped

    begin = time.monotonic()
    row = {"case": name, "fault": fault, "date": time.strftime("%Y-%m-%d")}
    try:
        outcome = case(world)
    except Skipped as reason:
        return row | {"verdict": "skipped", "seen": str(reason)}
    except Exception as error:  # in most cases, training broke a promise
        traceback.print_exc()
        return row | {"verdict": "FAILED", "seen": f"{type(error).__name__}: {error}"[:500]}
    finally:
        end_launched()
    good = outcome.held and outcome.same is not False
    took = round(time.monotonic() - begin, 1)
    return row | asdict(outcome) | {"verdict": "held" if good else "FAILED", "took": took}


def table(rows: list[dict], seed: int) -> str:
    """A Markdown table of all results."""
    import deepspeed
    import torch

    cells = []
    for row in rows:
        seen = row["seen"].removeprefix("error: ")
        seen = seen if len(seen) <= _LONGEST else f"{seen[:_LONGEST]} ..."
        seconds = f"{row['seconds']:.0f} s" if row.get("seconds") is not None else ""
        same = {True: "equal, bit for bit", False: "**differ**", None: ""}[row.get("same")]
        cells.append([row["fault"], seen, seconds, same, row["verdict"]])
    dates = sorted({row["date"] for row in rows})
    about = (
        f"Seed {seed}, {dates[0]} to {dates[-1]}, {platform.system()} {platform.machine()}, CPU, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}."
    )
    head = ("fault", "what was seen", "ended after", "final weights", "")
    return f"{markdown_table(head, cells)}\n\n{about}\n"


if __name__ == "__main__":
    cli.run(main)

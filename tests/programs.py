"""Runs a benchmark's program as a user would, and looks at what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2i import cli

ROOT = Path(__file__).resolve().parents[1]


def program(module, *arguments) -> None:
    """Run a script's `main` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()


def refused(module, capsys, *arguments) -> str:
    """The message with which a script ends; it has printed nothing else."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        cli.run(module.main)
    assert stopped.value.code in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return re.sub(r"[\s│╭╮╰╯─]+", " ", captured.err)


def start_and_kill(module, out: Path, *arguments) -> dict[Path, int]:
    """Kill a script once it has drawn two images; these files with their times."""
    process = subprocess.Popen(
        [sys.executable, module.__file__, "--out", out, *map(str, arguments)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 300
    while len(list(out.glob("images/*/samples/*.png"))) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {p: p.stat().st_mtime_ns for p in out.glob("images/*/samples/*.png")}


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an output folder."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def result_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def numbers(out: Path) -> dict:
    """The results without what names the folder."""
    return {k: v for k, v in results(out).items() if k != "images"}

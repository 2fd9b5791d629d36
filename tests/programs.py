"""Runs programs as a user would, and reads their messages and results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import exit_codes, fork
from helpers import folder_content

from t2i import cli

ROOT = Path(__file__).resolve().parents[1]


def program(module, *arguments) -> None:
    """Run a script's `main` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()


def refused(module, capsys, *arguments) -> str:
    """Run a script that must fail; return its error message on one line. Asserts that it prints
    nothing else.
    """
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        cli.run(module.main)
    assert stopped.value.code in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return re.sub(r"[\s│╭╮╰╯─]+", " ", captured.err)


def start_and_kill(module, out: Path, *arguments) -> dict[Path, int]:
    """Run a program in its own process and kill it once it has drawn two images; return the
    modification times of the images.
    """
    process = fork(lambda: program(module, "--out", out, *arguments))
    deadline, ended = time.time() + 300, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while len(list(out.glob("images/*/samples/*.png"))) < 2:
        assert os.waitid(os.P_PID, process, ended) is None and time.time() < deadline
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert exit_codes([process]) == [-signal.SIGKILL]
    return {p: p.stat().st_mtime_ns for p in out.glob("images/*/samples/*.png")}


def launch(*command: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments in a new process, with no launcher's variables; it must
    succeed.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    extra = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": paths,
        "TORCHDYNAMO_DISABLE": "1",  # saves seconds of imports
    }
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, *command],
        env=inherited | extra,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def assert_two_do_what_one_does(module, one: Path, out: Path, *arguments) -> None:
    """Assert that two processes write the same files to `out` as one process wrote to `one`."""
    script = ("--standalone", "--nproc_per_node", "2", module.__file__, "--out", out)
    printed = launch("-m", "torch.distributed.run", *map(str, (*script, *arguments))).stdout
    assert printed.count("**overall**") == 1, "only the main process reports"
    assert folder_content(out) == folder_content(one)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def result_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def numbers(out: Path) -> dict:
    """The results without the name of the folder of images."""
    return {k: v for k, v in results(out).items() if k != "images"}

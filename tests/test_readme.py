"""Every command of the README exists and parses, and the quickstart runs end to end."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from launch import benchmark, export, generate, quickstart, train_janus, train_llamagen

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "benchmark.py": benchmark,
    "export.py": export,
    "generate.py": generate,
    "quickstart.py": quickstart,
    "train_janus.py": train_janus,
    "train_llamagen.py": train_llamagen,
}


def readme_commands() -> list[list[str]]:
    """Arguments of each command line in the README's shell blocks that runs one of our scripts."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "launch/" in line]
    return [w[next(i for i, x in enumerate(w) if "launch/" in x) :] for w in words]


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_command_parses(command, monkeypatch):
    script = ROOT / command[0]
    assert script.is_file(), f"README names {command[0]}, which does not exist"
    monkeypatch.setattr(sys, "argv", command)
    parsed = {}

    class Parsed(Exception):
        pass

    def stop_after(parse):
        def wrapper(*args):
            parsed["config"] = parse(*args)
            raise Parsed

        return wrapper

    cli = SCRIPTS[script.name].cli
    monkeypatch.setattr(cli, "parse", stop_after(cli.parse))
    monkeypatch.setattr(cli, "parse_recipe", stop_after(cli.parse_recipe))
    with pytest.raises(Parsed):
        SCRIPTS[script.name].main()
    assert parsed["config"] is not None


def test_readme_has_commands():
    assert len(readme_commands()) >= 5


def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    arguments = ["--steps", "2", "--images", "300", "--prompts-per-task", "1", "--samples", "1"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path), *arguments])
    quickstart.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert (tmp_path / "results.json").is_file()
    for row in ("| base |", "| shapes-control |", f"| {quickstart.Quickstart().recipes[0]} |"):
        assert row in printed

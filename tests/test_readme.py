"""Every command and option in the README and docs exists, and the quickstart runs end to end."""

import re
import shlex
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from programs import refused
from runs import tiny_run

from launch import quickstart
from t2i import cli
from t2i.errors import UserError
from t2i.shapes.fine_tuning import fine_tuned

ROOT = Path(__file__).resolve().parents[1]
IS_SCRIPT = re.compile(r"(launch|geneval|dpg_bench|examples)/.*\.py").fullmatch


SHORTHANDS = re.compile(r'^(\w+)="(.*)"$', flags=re.M).findall
OPTIONS = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w").findall
OPTIONS_OF_OTHERS = {"--code-path", "--hostfile", "--kill-on-bad-exit", "--nproc-per-node"}
OPTIONS_OF_OTHERS |= {"--include", "--master-port", "--num-gpus", "--signal", "--sort"}


def pages() -> str:
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "".join(page.read_text() for page in every)


def readme_commands() -> list[list[str]]:
    """The arguments, from the script on, of every command in README and docs that runs a script of
    ours.
    """
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", pages(), flags=re.S)
    for name, words in SHORTHANDS("\n".join(blocks)):
        blocks = [
            re.sub(rf"^{name}=.*$", "", b, flags=re.M).replace(f"${name} ", f"{words} ")
            for b in blocks
        ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    scripts = [words[i:] for words in commands for i in [index_of_script(words)] if i is not None]
    return [words for words in scripts if "toy" not in words]  # see test_add_a_backbone.py


def index_of_script(words: list[str]) -> int | None:
    """The index of our script in a command, after `python`, `deepspeed --num_gpus 8`, ..."""
    return next((i for i, word in enumerate(words) if IS_SCRIPT(word)), None)


@pytest.mark.parametrize(
    ("line", "index"),
    [
        ("torchrun --nproc_per_node 8 geneval/run.py compare a b", 3),
        ("python dpg_bench/run.py --images grids", 1),
        ("pip install -e .", None),
    ],
)
def test_scripts_are_found_in_commands(line, index):
    assert index_of_script(shlex.split(line)) == index


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_command_parses(command, monkeypatch):
    script = ROOT / command[0]
    assert script.is_file(), f"README names {command[0]}, which does not exist"
    monkeypatch.setattr(sys, "argv", command)
    parsed = {}

    class Parsed(Exception):
        pass

    def stop_after(parse):
        def wrapper(*args, **options):
            parsed["config"] = parse(*args, **options)
            raise Parsed

        return wrapper

    for name in ("parse", "parse_recipe"):
        monkeypatch.setattr(cli, name, stop_after(getattr(cli, name)))
    with pytest.raises(Parsed):
        import_module(command[0].removesuffix(".py").replace("/", ".")).main()
    assert parsed["config"] is not None


def test_options_in_the_text_exist(monkeypatch, capsys):
    """Options mentioned outside of commands; the test above parses whole commands."""
    text = re.sub(r"```.*?```", "", pages(), flags=re.S)
    spans = re.findall(r"`[^`]*`", text)
    mentioned = {name.replace("_", "-") for span in spans for name in OPTIONS(span)}
    commands = sorted([*readme_commands(), ["launch/gpu_check.py"]], reverse=True)
    programs = {script: [w for w in rest[:1] if w[0] != "-"] for script, *rest in commands}
    for script, recipe in programs.items():
        monkeypatch.setattr(sys, "argv", [script, *recipe, "--help-all"])
        with pytest.raises(SystemExit):
            import_module(script.removesuffix(".py").replace("/", ".")).main()
    known = set(OPTIONS(capsys.readouterr().out))
    assert mentioned - known - OPTIONS_OF_OTHERS == set()


def test_readme_has_commands():
    assert len(readme_commands()) >= 5


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    arguments = ["--steps", "2", "--images", "300", "--prompts-per-task", "1", "--samples", "1"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path), *arguments])
    quickstart.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert (tmp_path / "results.json").is_file()
    for row in ("| base |", "| shapes-control |", f"| {quickstart.Quickstart().recipes[0]} |"):
        assert row in printed


def test_the_quickstart_compares_models_of_one_base(tmp_path, capsys):
    given = ("--recipes", "shapes-janus-lora", "--out", tmp_path / "out")
    said = "shapes-janus-lora starts from shapes-janus, but its control shapes-control from shapes"
    assert said in refused(quickstart, capsys, *given)
    assert not (tmp_path / "out").exists()


def test_the_quickstart_checks_its_numbers_first(tmp_path, capsys):
    """No images per prompt used to be refused after both trainings."""
    for name in ("--samples", "--images", "--prompts-per-task", "--steps"):
        said = refused(quickstart, capsys, name, 0, "--out", tmp_path / "out")
        assert f"{name[2:].replace('-', '_')}=0 must be at least 1" in said
    said = refused(quickstart, capsys, "--images", 256, "--out", tmp_path / "out")
    assert "images=256 must be more than the 256 that shapes-control holds out" in said
    assert not (tmp_path / "out").exists()


def test_the_quickstart_deletes_nothing(tiny_world, tmp_path):
    """A folder of the user's with a run's name used to be deleted before the run began."""
    (own := tmp_path / "own" / "index.html").parent.mkdir()
    own.write_text("mine")
    with pytest.raises(UserError, match=r"holds index\.html, which a run would overwrite"):
        fine_tuned(replace(tiny_run(tiny_world, "own"), run_dir=tmp_path / "own"))
    assert own.read_text() == "mine"

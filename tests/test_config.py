"""The command line: every recipe parses, every option is used, and --check says what a run would
do.
"""

import ast
import dataclasses
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from runs import tiny_run

from launch import generate, train_llamagen
from t2i import cli
from t2i.models.janus import janus_recipes
from t2i.models.llamagen import llamagen_recipes
from t2i.models.open_magvit2 import open_magvit2_recipes
from t2i.models.rar import rar_recipes
from t2i.reward import reward_recipes
from t2i.training.check import check
from t2i.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = (llamagen_recipes, janus_recipes, open_magvit2_recipes, rar_recipes)
RECIPES = {name: recipe for family in FAMILIES for name, recipe in family.recipes().items()}


def test_recipes_have_unique_names_and_descriptions():
    assert len(RECIPES) == sum(len(family.recipes()) for family in FAMILIES) >= 80
    assert all(about for about, _ in RECIPES.values())


def test_recipes_have_run_folders_of_their_own():
    """A control after a recipe with TensorAR was refused: its default folder held a run."""
    for name, (_, config) in {**RECIPES, **reward_recipes.recipes()}.items():
        assert config.run_dir == Path("runs") / name


@pytest.mark.parametrize("name", RECIPES)
def test_options_change_only_what_they_name(name, monkeypatch):
    """All other settings of the recipe stay."""
    options = ["--method.k", "2", "--optim.codec-lr", "3e-4", "--local-rank=1"]
    monkeypatch.setattr(sys, "argv", ["train", "--local_rank=1", name, *options])
    recipe = RECIPES[name][1]
    method, optim = replace(recipe.method, k=2), replace(recipe.optim, codec_lr=3e-4)
    assert cli.parse_recipe(RECIPES, "") == replace(recipe, method=method, optim=optim)


@pytest.mark.parametrize("name", [next(iter(family.recipes())) for family in FAMILIES])
def test_a_recipe_without_options_stays_as_it_is(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", name])
    assert cli.parse_recipe(RECIPES, "") == RECIPES[name][1]


def test_of_two_values_the_last_counts_and_that_is_said(monkeypatch, caplog):
    """Of two folders of data one was not read, without a word."""
    text = "--data.source a --check --steps 3 --data.source=b --seed 1 --seed 1 --no-resume"
    monkeypatch.setattr(sys, "argv", ["train", "shapes-control", *text.split()])
    assert cli.parse_recipe(RECIPES, "").data.source == "b"
    assert caplog.messages == ["--data.source is given 2 times: b counts"]
    caplog.clear()
    text = "--optim.betas 0.9 0.95 --check --check --optim.betas 0.9 0.99 --steps=3 --steps 3"
    monkeypatch.setattr(sys, "argv", ["train", "shapes-control", *text.split()])
    assert cli.parse_recipe(RECIPES, "").optim.betas == (0.9, 0.99)
    assert caplog.messages == ["--optim.betas is given 2 times: 0.9 0.99 counts"]


def dataclasses_within(kind: type) -> set[type]:
    """A config dataclass and all dataclasses among the types of its fields, recursively."""
    found = {kind}
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= dataclasses_within(part)
    return found


def attributes_read() -> set[str]:
    """The names x of all attributes `something.x` that the code reads and does not call."""
    files = [path for part in ("t2i", "launch") for path in (ROOT / part).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and id(node) not in called
    }


def test_every_option_is_read():
    read = attributes_read()
    kinds = dataclasses_within(TrainConfig) | dataclasses_within(generate.GenerateConfig)
    options = {(kind.__name__, field.name) for kind in kinds for field in dataclasses.fields(kind)}
    assert len(kinds) >= 9 and len(options) >= 50
    assert {option for option in options if option[1] not in read} == set()


def test_check_says_what_a_run_would_do(tiny_world, tmp_path):
    config = tiny_run(
        tiny_world, "checked", tuning="lora", steps=7, data__cache_dir=tmp_path / "cache"
    )
    report = check(config, world_size=2)
    assert "60 samples" in report and "'a photo of" in report
    assert "16 samples per step = 4 per pass x 2 accumulated x 2 processes" in report
    assert f"7 steps = {7 * 16 / 51:.2f} passes over 51 training samples" in report
    parameters = dict(
        line.split(maxsplit=1) for line in report.split("parameters\n")[1].splitlines()[:3]
    )
    adapters = 2 * 16 * (64 + 192 + 64 + 64 + 3 * (64 + 128))  # 2 blocks x rank x (inputs, outputs)
    assert parameters["backbone"].split()[-1] == f"{adapters:,}"
    assert parameters["codec"].split()[0] == parameters["codec"].split()[-1]
    assert "ZeRO-0 on 2 process(es)" in report and report.count("<- chosen") == 1
    assert not config.run_dir.exists() and list(tmp_path.iterdir()) == []


def test_check_of_a_stream_counts_samples_if_they_are_limited(tiny_world, tmp_path):
    options = {"data__streaming": True, "data__source": str(tmp_path)}
    write_parquet(tmp_path, count=20)
    report = check(tiny_run(tiny_world, "checked", **options))
    assert "unknown number of samples" in report
    report = check(tiny_run(tiny_world, "checked", data__max_samples=15, **options))
    assert "15 samples" in report and "over 6 training samples" in report


def write_parquet(folder: Path, count: int) -> None:
    from datasets import Dataset
    from PIL import Image

    rows = {"image": [Image.new("RGB", (32, 32))] * count, "text": ["a square"] * count}
    Dataset.from_dict(rows).to_parquet(str(folder / "data.parquet"))


def test_check_is_an_option_of_the_script(tiny_world, tmp_path, monkeypatch, capsys):
    arguments = ["--backbone.weights", tiny_world / "base", "--data.source", tiny_world / "data"]
    arguments += ["--data.validation-samples", 9, "--run-dir", tmp_path / "run", "--check"]
    monkeypatch.setattr(sys, "argv", ["train", "shapes-iclr2026", *map(str, arguments)])
    cli.run(train_llamagen.main)
    assert "ready: the same command without --check trains" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

"""The experiments: grids that run, results that are kept, and the arithmetic of the report."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from launch.lab import experiment, recipe_report
from launch.lab import experiment_grids as grids
from launch.lab.recipe_report import estimate, rank_correlation
from t2i.models.llamagen.llamagen_recipes import text_recipes
from t2i.training.open_data import open_data


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiment.py", *map(str, arguments)])
    experiment.main()


def test_every_arm_is_a_valid_run(tmp_path):
    config = experiment.Experiment(grid="levers", out=tmp_path)
    for name, grid in grids.GRIDS.items():
        arms = [arm.name for arm in grid]
        assert len(set(arms)) == len(arms)
        runs = experiment.planned(experiment.Experiment(grid=name, out=tmp_path))
        folders = {run.config(config).run_dir for run in runs}
        assert len(folders) == 3 * len(arms), "arms and seeds have folders of their own"
        assert open_data(runs[0].config(config).data).length == config.images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lever",), "choose one of"),
        (("levers", "--arms", "mystery"), "no arm mystery"),
        (("levers", "--bases", "3m"), "name=folder"),
        (("levers", "--share", "2/2"), "i/n"),
    ],
)
def test_mistakes_are_named(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *arguments, "--out", tmp_path)


@pytest.mark.slow
def test_a_grid_runs_once_and_is_reported(monkeypatch, tmp_path, capsys):
    tuned = grids._tuned("tuned", sampling={"window 1": {"window": 1}}, curve=True)
    monkeypatch.setitem(experiment.GRIDS, "levers", (grids._control(), tuned))
    text, recipe = text_recipes()["shapes-control"]
    recipe = replace(recipe, data=replace(recipe.data, validation_samples=32))
    monkeypatch.setattr(experiment, "text_recipes", lambda: {"shapes-control": (text, recipe)})
    small = ("--seeds", 0, "--steps", 3, "--images", 100, "--prompts-per-task", 2, "--samples", 1)
    run(monkeypatch, "levers", "--out", tmp_path, *small)
    lines = experiment.results(tmp_path)
    assert [(x["arm"], x["step"], x["sampling"]) for x in lines] == [
        ("control", 3, ""),
        ("tuned", 2, ""),
        ("tuned", 3, ""),
        ("tuned", 3, "window 1"),
    ]
    final = lines[2]
    assert 0 <= final["repairs"]["corrected"] <= 1 and len(final["changes"]["flipped"]) == 3
    assert final["course"][-1]["step"] == 3 and lines[3]["changes"] is None
    run(monkeypatch, "levers", "--out", tmp_path, *small)
    assert experiment.results(tmp_path) == lines, "what is finished is not done again"

    capsys.readouterr()
    where = ("--results", tmp_path / "results.jsonl", "--out", tmp_path / "report")
    monkeypatch.setattr(sys, "argv", ["recipe_report.py", *map(str, where), "--samples", "1"])
    recipe_report.main()
    printed = capsys.readouterr().out
    assert "| tuned | window 1 | 1 |" in printed and "| control | 1 |" in printed
    assert (tmp_path / "report" / "courses.svg").stat().st_size > 5000


@pytest.mark.parametrize("steps", [1, 2, 3, 300, 301])
def test_what_is_scored_is_kept(tmp_path, steps):
    """Case 26: of 301 steps the checkpoint at half was deleted before it was scored."""
    config = experiment.Experiment(grid="presets", out=tmp_path, steps=steps)
    log = experiment.planned(config)[0].config(config).log
    saved = sorted({*range(log.save_every, steps, log.save_every), steps})
    assert {log.save_every, steps} <= set(saved[-log.keep_last :])
    assert steps // 2 <= log.save_every <= steps // 2 + 1


def test_standard_error_is_the_larger_of_seeds_and_prompts():
    same = np.tile([[0.0, 1.0, 0.0, 1.0]], (3, 1))
    over_prompts = estimate(same, tasks=2)
    assert over_prompts.mean == 0.5
    assert over_prompts.error == pytest.approx(np.sqrt(2 * 0.5 / 2) / 2)
    seeds = np.array([[0.0] * 4, [0.6] * 4, [0.3] * 4])
    assert estimate(seeds, tasks=2).error == pytest.approx(0.3 / np.sqrt(3))


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)

"""The long grids: training steps equal to those of the kit's loop, arms, results, reports and the
ablation table.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import write_tiny_base

from launch import ablate
from launch.lab import long_arms, long_grid, long_report
from launch.lab.long_arms import LONG_GRIDS, objective
from launch.lab.long_data import drawn_scenes, order
from launch.lab.long_report import rank_correlation
from launch.lab.long_steps import Trainer
from launch.lab.result_lines import append, estimate, results
from t2i.data.order import split_indices
from t2i.errors import UserError
from t2i.shapes.pretraining import Descent
from t2i.sources import ASSETS
from t2i.training.batches import TrainingData
from t2i.training.config import DataOptions, OptimOptions
from t2i.training.engine import start_processes
from t2i.training.logs import read_metrics
from t2i.training.loop import train
from t2i.training.start import build_model

ARMS = {arm.name: arm for stage in LONG_GRIDS["long"] for arm in stage}
IMAGES, HELD_OUT, STEPS = 40, 8, 3


def as_the_loop_does(tmp_path, grid, arm):
    """The settings with which the kit's own loop trains this arm on the same samples."""
    config = long_grid.LongRun("7m", "shapes", arm, 0).config(grid)
    assert isinstance(config.data, DataOptions)
    data = replace(
        config.data,
        source=f"shapes:{IMAGES + HELD_OUT}",
        validation_samples=HELD_OUT,
        cache_dir=tmp_path / "cache",
    )
    log = replace(config.log, log_every=1, validate_every=0, sample_every=0, keep_best=False)
    return replace(config, data=data, log=log, run_dir=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["control, falling rate", "tuned"])
def test_a_step_trains_as_the_kits_loop_does(name, tmp_path):
    grid = long_grid.LongGrid("long", steps=STEPS, batch_size=8, precision="fp32")
    config = as_the_loop_does(tmp_path, grid, ARMS[name])
    train(config)
    theirs = [row for row in read_metrics(config.run_dir) if "train/slot0" in row]

    model = build_model(config)
    tokenizer = ASSETS / "shapes" / "vq.pt"
    scenes = drawn_scenes(model.backbone, tokenizer, IMAGES + HELD_OUT, tmp_path, 0)
    # The loop's cache stores features in half precision. A few codes may differ by rounding, where
    # two are almost equally near.
    stored = scenes.prepared["features"].half().float()
    data = TrainingData(config, model.backbone, start_processes())
    codes = data.load(torch.arange(IMAGES + HELD_OUT), None)[0][..., 0]
    assert (codes != scenes.codes_nT).sum() <= 3
    scenes = replace(scenes, codes_nT=codes, prepared=scenes.prepared | {"features": stored})
    training, _ = split_indices(IMAGES + HELD_OUT, HELD_OUT, config.seed)
    trainer = Trainer(model, objective("method", model), config, order(scenes, config, training))
    trainer.run(STEPS)
    k = config.method.k
    losses = [[row[f"train/slot{j}"] for j in range(k)] for row in theirs]
    assert trainer.losses_Rk.tolist() == [pytest.approx(row, rel=1e-4) for row in losses]
    assert [float(norm) for norm in trainer.norms_R] == [
        pytest.approx(row["train/grad_norm"], rel=1e-3) for row in theirs
    ]
    assert trainer.losses_Rk[0, 0] != pytest.approx(losses[-1][0], rel=2e-3), "it does train"


def test_arms_have_different_names_and_keys(tmp_path):
    for name, stages in LONG_GRIDS.items():
        arms = [arm.name for stage in stages for arm in stage]
        assert len(set(arms)) == len(arms)
        assert all(arm.control in {*arms, *ARMS} for stage in stages for arm in stage)
        grid = long_grid.LongGrid(name, out=tmp_path)
        keys = {run.key(grid) for run in long_grid.planned(grid)}
        assert len(keys) == 3 * len(arms)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("short",), "choose one of"),
        (("long", "--arms", "mystery"), "no arm mystery"),
        (("long", "--bases", "7m"), "name=folder"),
        (("long", "--bases", "7m=none"), "none is not a file, a folder"),
        (("long", "--bases", "7m=tiny"), "tiny draws images of 32 x 32 px, and the scenes have 64"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, tmp_path, arguments, message):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    write_tiny_base(tmp_path / "tiny")
    small = ("--images", "2", "--held-out", "1", "--steps", "1", "--workers", "0", "--minutes", "0")
    monkeypatch.setattr(sys, "argv", ["long_grid.py", *arguments, *small, "--out", str(out)])
    with pytest.raises(ValueError, match=message):
        long_grid.main()
    assert not out.exists()
    with pytest.raises(UserError, match="workers=1000 must be at most 256"):  # was a traceback
        long_grid.LongGrid("long", workers=1000)


@pytest.mark.parametrize(("there", "refused"), [("shapes", False), ("mine", True), (None, False)])
def test_results_of_another_base_are_not_taken_for_the_givens(
    monkeypatch, tmp_path, there, refused
):
    """`ablate.py --base B` printed the table of base A, if it was given the folder of A."""
    monkeypatch.chdir(tmp_path)
    grid = long_grid.LongGrid("ablation", out=tmp_path, bases=("base=shapes",))
    known = {} if there is None else {"weights": there}
    lines = [{"key": run.key(grid)} | known for run in long_grid.planned(grid)]
    append(tmp_path, lines, ())
    with pytest.raises(UserError, match=r"holds results of .*mine") if refused else nullcontext():
        long_grid.do_what_is_left(grid)
    with pytest.raises(UserError, match="two have the same name"):
        long_grid.planned(replace(grid, bases=("a=shapes", "a=other")))


@pytest.mark.slow
def test_the_ablation_runs_once_and_prints_its_table(monkeypatch, tmp_path, capsys):
    kept = [arm for arm in LONG_GRIDS["ablation"][0] if arm.name in ("iclr2026", "k = 2")]
    monkeypatch.setitem(LONG_GRIDS, "ablation", (tuple(kept),))
    arguments = ("--tiny", "--seeds", "0", "--device", "cpu", "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
    ablate.main()
    printed = capsys.readouterr().out
    assert "| window size k | 2: " in printed and "4*: " in printed and "8: not run" in printed
    lines = results(tmp_path)
    assert [line["arm"] for line in lines] == ["iclr2026", "k = 2"]
    assert len(lines[0]["changes"]["flipped"]) == 3 == len(lines[0]["drafts"]["right"])
    ablate.main()
    assert results(tmp_path) == lines, "finished runs are not repeated"
    assert "0 of 2 runs to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_grid_draws_an_arm_in_several_ways_and_reports_it(monkeypatch, tmp_path, capsys):
    tuned = long_arms._tuned("tuned", ways={"window 1": {"window": 1}})
    monkeypatch.setitem(
        LONG_GRIDS, "levers", ((long_arms._short("control", long_arms._BASE), tuned),)
    )
    small = ("--steps", 2, "--batch-size", 2, "--images", 16, "--held-out", 4, "--workers", 0)
    small += ("--samples", 1, "--prompts-per-task", 2, "--seeds", 0, 1, "--device", "cpu")
    arguments = ("levers", "--out", tmp_path, *small)
    monkeypatch.setattr(sys, "argv", ["long_grid.py", *map(str, arguments)])
    long_grid.main()
    lines = results(tmp_path)
    assert [line["arm"] for line in lines] == 2 * ["control", "tuned", "tuned, window 1"]
    _, tuned, one = lines[:3]
    assert 0 <= tuned["repairs"]["corrected"] <= 1 and len(tuned["changes"]["flipped"]) == 3
    assert one.keys().isdisjoint({"changes", "losses"}) and one["control"] == "control"
    assert one["settings"]["sampling"] == {"window": 1}

    capsys.readouterr()
    where = ("--results", tmp_path / "results.jsonl", "--out", tmp_path / "report")
    monkeypatch.setattr(sys, "argv", ["long_report.py", *map(str, where)])
    long_report.main()
    printed = capsys.readouterr().out
    assert "\n| tuned, window 1 | 2 | " in printed and "\n| control | 2 | " in printed
    assert (tmp_path / "report" / "differences.svg").stat().st_size > 5000


RECIPE = Path(__file__).resolve().parents[1] / "docs" / "recipe"


@pytest.mark.parametrize("grid", ["presets", "levers", "longer", "long_cpu", "ideas", "ablation"])
def test_the_tables_of_the_docs_are_made_from_their_results(grid, monkeypatch, tmp_path):
    where = ("--results", RECIPE / grid / "results.jsonl", "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["long_report.py", *map(str, where)])
    long_report.main()
    assert (tmp_path / "tables.md").read_text() == (RECIPE / grid / "tables.md").read_text()


def test_the_ablation_table_of_the_docs_is_made_from_its_results():
    folder = RECIPE / "ablation"
    assert ablate.table(results(folder)) == (folder / "table.md").read_text()


def test_standard_error_is_the_larger_of_seeds_and_prompts():
    same = np.tile([[0.0, 1.0, 0.0, 1.0]], (3, 1))
    over_prompts = estimate(same, tasks=2)
    assert over_prompts.mean == 0.5
    assert over_prompts.error == pytest.approx(np.sqrt(2 * 0.5 / 2) / 2)
    assert estimate(same[:1], tasks=2) == over_prompts, "one seed gives no error over seeds"
    seeds = np.array([[0.0] * 4, [0.6] * 4, [0.3] * 4])
    assert estimate(seeds, tasks=2).error == pytest.approx(0.3 / np.sqrt(3))


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)


def test_a_gain_compares_the_same_seeds_and_prompts():
    def line(arm, seed, correct):
        facts = {"control": "control", "settings": {"samples": 2}, "losses": {"a/b": seed + 0.5}}
        return {"base": "b", "arm": arm, "seed": seed, "correct": correct} | facts

    ours = [line("new", seed, [2, 1] * 6) for seed in (0, 1, 2)]
    theirs = [line("control", seed, [1, 0] * 6) for seed in (0, 1)]
    lines = long_report.Lines([*ours, *theirs])
    pairs = lines.pairs("b", "new")
    assert len(pairs) == 2 and not lines.pairs("b", "control")
    found = long_report.gain(pairs)
    assert (found.mean, found.error) == (0.5, 0.0), "the same difference at every prompt"
    assert long_report.difference(pairs, "a/b").mean == 0.0


@pytest.mark.parametrize(("falls", "shares"), [(False, [1, 1, 1]), (True, [1, 0.5, 0.25])])
def test_backbone_falls_makes_the_backbones_rate_fall(falls, shares):
    optim = OptimOptions(backbone_lr=2.0, backbone_falls=falls)
    assert [optim.backbone_rate(step, 100) / 2 for step in (0, 50, 75)] == shares


@pytest.mark.parametrize(("constant", "shares"), [(False, [1, 0.5]), (True, [1, 1])])
def test_pretraining_can_keep_its_rate_constant(constant, shares):
    layer = torch.nn.Linear(1, 1)
    descent = Descent(layer, 1.0, warm_up=1, constant=constant)
    rates = []
    for done in (0.0, 0.8):
        descent.step(layer(torch.ones(1, 1)).sum(), done)
        rates.append(descent._optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(shares)

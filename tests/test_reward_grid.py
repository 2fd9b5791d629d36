"""The grid of reward fine-tuning: its supervised runs, and continuing runs that have ended."""

from dataclasses import replace

import pytest

from launch.lab.reward_grid import SUPERVISED, RewardGrid, collect, run_one
from t2i.files import read_json


@pytest.mark.slow
def test_runs_are_scored_alike_and_continue(tiny_world, tmp_path):
    common = {"out": tmp_path, "grid": "recipe", "weights": str(tiny_world / "base")}
    common |= {"images": 192, "prompts": 1, "samples": 1, "minutes": 1e-6, "every": 1e-6}
    taught = RewardGrid(**common, one="recipe")
    for options in (taught, RewardGrid(**common, one=SUPERVISED), taught):
        run_one(options)
    found = read_json(tmp_path / "recipe-seed0.json")
    control = read_json(tmp_path / f"{SUPERVISED}-seed0.json")
    assert found["steps"] == control["steps"] == 1, "finished steps are not repeated"
    assert found["scores"][0] == control["scores"][0] == read_json(tmp_path / "start.json")
    assert found["scores"][0].keys() < found["scores"][1].keys()
    run_one(replace(taught, minutes=1000.0, every=1000.0, steps=2))
    more = read_json(tmp_path / "recipe-seed0.json")
    assert more["steps"] == 2 == len(more["rows"]) and more["scores"][:2] == found["scores"]
    table = collect(taught)
    assert "| recipe | 0 | 2 |" in table and f"| {SUPERVISED} | 0 | 1 |" in table
    assert (tmp_path / "scores.svg").is_file() and (tmp_path / "rewards.svg").is_file()


@pytest.mark.slow
def test_a_setting_continues_another(tiny_world, tmp_path):
    """A setting continues from another one's weights, with its time and scores."""
    common = {"out": tmp_path, "grid": "guided", "weights": str(tiny_world / "base")}
    common |= {"images": 192, "prompts": 1, "samples": 1, "every": 1e-6}
    run_one(RewardGrid(**common, minutes=1e-6, one="guided"))
    first = read_json(tmp_path / "guided-seed0.json")
    run_one(RewardGrid(**common, minutes=first["minutes"] + 1e-6, one="guided, then rewarded"))
    then = read_json(tmp_path / "guided--then-rewarded-seed0.json")
    assert first["steps"] == then["steps"] == 1 and then["minutes"] > first["minutes"]
    assert then["scores"][:2] == first["scores"] and len(then["scores"]) == 3
    config = read_json(tmp_path / "work" / "guided--then-rewarded-seed0" / "config.json")
    assert "guided-seed0" in config["backbone"]["weights"]

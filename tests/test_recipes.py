"""Cases 21, 22: recipes that adapt to the run's length, controls and small-data recipes, trigger
words, and docs/first_hour.md on the offline base.
"""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import tiny_janus
from runs import tiny_run

from geneval import run as geneval_run
from launch import export as export_program
from launch import generate as draw_program
from launch import train_llamagen
from t2i import cli
from t2i.errors import UserError
from t2i.models.janus import janus_recipes
from t2i.models.llamagen import llamagen_recipes
from t2i.models.open_magvit2 import open_magvit2_recipes
from t2i.models.rar import rar_recipes
from t2i.shapes.shapes_source import write_dataset
from t2i.tensorar import presets
from t2i.training.check import check
from t2i.training.config import DataOptions, LogOptions, OptimOptions, TrainConfig
from t2i.training.logs import read_metrics
from t2i.training.loop import train
from t2i.training.open_data import open_data
from t2i.training.recipes import OWN_PICTURES, recipe
from t2i.training.run_plan import about_settings, peak_rates, plan_run
from t2i.training.training_run import Run
from t2i.training.trigger_words import refuse_lost_words

FAMILIES_RECIPES = (llamagen_recipes, janus_recipes, open_magvit2_recipes, rar_recipes)
ALL = {name: recipe[1] for family in FAMILIES_RECIPES for name, recipe in family.recipes().items()}
PROMPTS = "test_prompts.txt"
REAL = [name for name in ALL if "shapes" not in name]


# -- recipes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["shapes-tuned", "shapes-control"])
def test_the_quickstart_keeps_its_numbers(name):
    config = ALL[name]
    numbers = asdict(plan_run(config, 3000))
    assert numbers == {
        "samples": 3000,
        "held_out": 256,
        "steps": 200,
        "warmup_steps": 20,
        "log_every": 10,
        "validate_every": 100,
        "sample_every": 100,
        "save_every": 100,
    }
    assert (config.seed, config.batch_size, config.token_dropout) == (0, 32, 0.0)
    assert config.optim.backbone_lr == 1e-4 and not config.log.at_start
    assert config.optim.codec_lr == {"shapes-tuned": 3e-3, "shapes-control": 1e-3}[name]
    assert (
        config.method == {"shapes-tuned": presets.tuned(), "shapes-control": presets.base()}[name]
    )


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_what_its_name_says(name):
    config, method = ALL[name], name.rpartition("-")[2]
    of_name = {"control": "base", "iclr2026": "iclr2026", "arxiv2505": "arxiv2505"}
    if "small-data" not in name:
        assert config.method == getattr(presets, of_name.get(method, "tuned"))()
    adapters = "small-data" in name or ("janus" in name and "-full" not in name) or method == "lora"
    assert config.tuning == ("lora" if adapters else "full")


def test_2000_pictures_with_the_xl_recipe():
    """Case 21: 13 % used to be held out, 100 of 136 steps warmed up, and nothing was written before
    the end.
    """
    plan = plan_run(config := ALL["t2i-xl-256-tuned"], 2000)
    assert plan.held_out == 80 and plan.steps == 150 and plan.warmup_steps == 4
    assert (plan.validate_every, plan.sample_every, plan.save_every) == (15, 15, 30)
    peaks = peak_rates(config, plan)
    assert peaks["codec"][0] > 0.95 * config.optim.codec_lr and config.log.at_start
    assert list(about_settings(config, plan)) == []


@pytest.mark.parametrize("falls", [False, True])
def test_the_highest_rate_is_found_without_trying_every_step(falls):
    """A delay of a billion steps used to take a billion tries."""
    cases = [(s, w, d) for s in (1, 2, 5, 8) for w in (0, 1, 3, 20) for d in (0, 2, 6, 10)]
    for steps, warmup, delay in [*cases, (10**9, 10**8, 10**8)]:
        optim = OptimOptions(warmup_steps=warmup, backbone_delay_steps=delay, backbone_falls=falls)
        config = TrainConfig(data=DataOptions(source="x"), steps=steps, optim=optim)
        peaks = peak_rates(config, plan_run(config, 100))
        for part, rate in (("codec", optim.codec_rate), ("backbone", optim.backbone_rate)):
            rates = [rate(step, steps) for step in range(min(steps, 100))]
            assert peaks[part][0] >= max(rates) * (1 - 1e-12), (part, steps, warmup, delay)
            if steps < 100:
                assert peaks[part][1] == rates.index(peaks[part][0]), (part, steps, warmup, delay)


@pytest.mark.parametrize(
    ("samples", "held_out"), [(2, 1), (5, 1), (12, 2), (60, 8), (2000, 80), (100_000, 256)]
)
def test_held_out_share(samples, held_out):
    assert plan_run(ALL["t2i-xl-256-tuned"], samples).held_out == held_out


def test_given_numbers_are_kept():
    data = DataOptions(source="x", validation_samples=7)
    log = LogOptions(save_every=0, validate_every=0, sample_every=3, log_every=2)
    config = TrainConfig(data=data, log=log, steps=5000, optim=OptimOptions(warmup_steps=9))
    plan = plan_run(config, 100)
    assert (plan.held_out, plan.warmup_steps, plan.steps) == (7, 9, 5000)
    assert (plan.save_every, plan.validate_every, plan.sample_every, plan.log_every) == (0, 0, 3, 2)
    with pytest.raises(UserError, match="fewer than the 7 usable samples"):
        plan_run(config, 7)
    with pytest.raises(UserError, match=r"too few usable samples \(1\): at least one is held"):
        plan_run(ALL["t2i-xl-256-tuned"], 1)  # used to blame an option that was not given
    assert plan_run(replace(config, steps=None), None) is None


def test_every_family_has_its_control_and_the_recommended_recipe():
    """Case 22: XL and Janus had no control, and the README recommended a recipe that loses to its
    control.
    """
    for base in ("shapes", "t2i-xl-256", "shapes-janus", "janus-pro-1b", "janus-pro-7b"):
        assert ALL[f"{base}-control"].method == presets.base()
        small = ALL[f"{base}-small-data"]
        assert small.method == presets.tuned(own_drafts=1.0) and small.tuning == "lora"
        assert small.optim.backbone_lr == 1e-4 and plan_run(small, 2000).steps == 600
        assert small.log.prompts == () and small.log.keep_last == 5
    for base in ("t2i-xl-256", "janus-pro-1b", "janus-pro-7b"):
        assert ALL[f"{base}-iclr2026"].method == presets.iclr2026()
        assert ALL[f"{base}-lora"].method == presets.tuned()
        assert ALL[f"{base}-lora"].optim.backbone_lr == 1e-4
    for base in ("rar-b", "open-magvit2-xl", "llamagen-3b-384", "rar-shapes"):
        methods = [
            ALL[f"{base}{end}"].method for end in ("", "-iclr2026", "-arxiv2505", "-control")
        ]
        assert methods == [presets.METHODS[m]() for m in ("tuned", "iclr2026", "arxiv2505", "base")]


@pytest.mark.parametrize("name", REAL)
def test_recipes_give_no_warnings(name):
    assert list(about_settings(ALL[name], plan_run(ALL[name], 2000))) == []


# -- warnings --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optim": OptimOptions(warmup_steps=100)},
            "codec's rate reaches only 38% of optim.codec_lr",
        ),
        ({"optim": OptimOptions(warmup_steps=150)}, "is not below the 150 steps"),
        ({"optim": OptimOptions(backbone_delay_steps=150)}, "backbone's rate reaches only 0%"),
        ({"tuning": "lora"}, "unusual for adapters"),
        ({"optim": OptimOptions(backbone_lr=0.1)}, "far too high for fine-tuning"),
        ({"optim": OptimOptions(codec_lr=0.1)}, "codec_lr=0.1 is far above"),
        ({"log": LogOptions()}, "no checkpoint before the last of 150 steps"),
        ({"log": LogOptions(validate_every=0, sample_every=0)}, "no sample sheet and no valid"),
        ({"steps": 5}, "5 steps of 256 see only 1280 of the 1920"),
        ({"batch_size": 2048}, "more than the 1920 training samples"),
        ({"data": DataOptions(validation_samples=260)}, "13% of the data are held out"),
        ({"steps": 600}, "own drafts alone"),
        (
            {"log": LogOptions(prompts=("a dot", PROMPTS))},
            "test_prompts.txt'; this file is not read",
        ),
        (
            {"log": LogOptions(control=Path("runs/nowhere"))},
            "log.control=runs/nowhere holds no metrics.jsonl yet",
        ),
    ],
)
def test_settings_that_make_no_sense_give_warnings(changes, words, tmp_path, monkeypatch):
    """Cases 21, 28."""
    monkeypatch.chdir(tmp_path)
    Path(PROMPTS).touch()
    config = replace(ALL["t2i-xl-256-tuned"], **changes)
    found = list(about_settings(config, plan_run(config, 2000)))
    assert any(words in warning for warning in found), found


# -- trigger words ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("trigger", "caption", "told"),
    [
        (None, "a dog", "a dog"),
        ("drawn by xyz", "a dog", "drawn by xyz, a dog"),
        ("{caption}, drawn by xyz", "a dog", "a dog, drawn by xyz"),
        ("{caption}, drawn by xyz", "a dog, Drawn by XYZ", "a dog, Drawn by XYZ"),
        ("art", "a cart", "art, a cart"),
    ],
)
def test_trigger_words(trigger, caption, told):
    assert DataOptions(trigger=trigger).with_trigger(caption) == told


def test_triggers_reach_every_caption_and_the_cache_key():
    plain = open_data(DataOptions(source="shapes:3"))
    source = open_data(DataOptions(source="shapes:3", trigger="xyz"))
    assert source[1].captions == [f"xyz, {plain[1].captions[0]}"] == list(source)[1].captions
    assert source.identity != plain.identity and source.length == 3
    for trigger in ("{caption} ", ", ."):
        with pytest.raises(UserError, match="has no words"):
            DataOptions(trigger=trigger)
    with pytest.raises(UserError, match=r"has braces besides \{caption\}"):
        DataOptions(trigger="{captoin}, drawn by xyz")


def test_a_trigger_hides_nothing_of_the_source(tmp_path):
    """Cases 10, 13: with trigger words, too, the data's content is part of the cache key and
    remarks are reported.
    """
    for name in ("train", "bus"):
        write_dataset(tmp_path / name, 1)
    (tmp_path / "bus" / "gone.png").symlink_to("nowhere")
    plain, source = (
        open_data(DataOptions(source=str(tmp_path), trigger=trigger)) for trigger in (None, "xyz")
    )
    assert source.files() == plain.files() and len(source.files()) > 2
    assert source.remarks == plain.remarks != [] and source.left_out == plain.left_out != []


@pytest.mark.parametrize(
    ("trigger", "lost"),
    [
        ("@monet", "'monet'"),
        ("<sks>", "'sks'"),
        ("xyz123", "'xyz123'"),
        ("tok1234", "'tok1234'"),
        ("ohwx2024", None),  # four letters: not an article number
        ("p3rson", "'p3rson'"),
        ("{caption}, by z8k", "'z8k'"),
        ("m0n3t style", "'m0n3t'"),
        ("莫奈 style", "'莫奈'"),
        ("free shipping, page 3", "'free', 'shipping', 'page', '3'"),
        ("drawn by xyz", None),
        ("(Ohwx)_Style of-the-art", None),
        ("#ohwx, l'été", None),
    ],
)
def test_trigger_words_removed_by_cleaning_are_refused(trigger, lost, tiny_world):
    """A run used to record trigger words that no encoder had ever read."""
    config = tiny_run(tiny_world, "lost-words", data__trigger=trigger)
    if lost is None:
        check(config)
        return
    for look in (check, train):
        with pytest.raises(UserError, match=rf"data.trigger=.* takes {lost} out"):
            look(config)
    assert not config.run_dir.exists()


def test_janus_reads_every_trigger_word():
    options = DataOptions(trigger="@monet xyz123")
    refuse_lost_words(tiny_janus(), options)


# -- the first hour --------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_first_hour_offline(tmp_path, monkeypatch, capsys):
    """Cases 9, 19, 21, 23: 30 pictures -> --check -> train -> draw -> evaluate -> export, as in
    docs/first_hour.md.
    """
    monkeypatch.chdir(tmp_path)

    def enter(program, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        cli.run(program.main)
        return capsys.readouterr().out

    write_dataset(tmp_path / "my_images", 30, seed=5)
    command = ["shapes-small-data", "--data.source", "my_images", "--epochs", "1"]
    command += ["--batch-size", "8", "--engine.micro-batch", "8", "--data.trigger", "drawn by xyz"]
    command += ["--log.sample-every", "3"]
    said = enter(train_llamagen, *command, "--check")
    assert "6 of 30 samples held out" in said
    assert "3 steps = 1.00 passes over 24 training samples" in said and "\nready" in said
    assert "--prompt 'drawn by xyz, your prompt'" in enter(train_llamagen, *command)

    run = tmp_path / "runs" / "shapes-small-data"
    stored = json.loads((run / "config.json").read_text())
    assert stored["plan"]["steps"] == 3 and stored["log"]["save_every"] is None
    prompts = stored["sheet_prompts"]
    assert len(prompts) == 4 and all(p.startswith("drawn by xyz, a photo of") for p in prompts)
    assert [row["step"] for row in read_metrics(run)] == [0, 1, 2, 3]
    assert all("validation/own_drafts/slot0" in row for row in read_metrics(run))
    sheets = sorted(path.name for path in (run / "samples").iterdir())
    assert sheets == ["step_000000.png", "step_000003.png"]
    from t2i.checkpoint_folders import read_config, run_checkpoints

    assert [folder.name for folder in run_checkpoints(run)] == [f"step_00000{i}" for i in (1, 2, 3)]
    training = read_config(run_checkpoints(run)[-1])["training"]
    assert training["config"]["data"]["trigger"] == "drawn by xyz"

    for prompt in prompts[:2]:  # two prompts in a row go into separate folders
        enter(draw_program, "--ckpt", str(run), "--prompt", prompt, "--samples", "1")
    few = ["--limit", "1", "--samples", "1"]
    enter(geneval_run, "--ckpt", str(run), *few)
    enter(export_program, "--ckpt", str(run), "--out", "exported/mine")
    card = (tmp_path / "exported" / "mine" / "README.md").read_text()
    assert "| trigger words | drawn by xyz |" in card
    assert 't2i.generate(model, ["drawn by xyz, a photo of a red circle"])' in card
    shutil.rmtree(run)
    assert "judged by shapes" in enter(geneval_run, "--ckpt", "exported/mine", *few)
    drawn = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert len(drawn) == 3 and all("small-data-step_000003" in name for name in drawn[1:])
    judged = sorted(path.name for path in (tmp_path / "outputs" / "geneval").iterdir())
    assert judged == ["mine", "shapes-small-data-step_000003"]


def test_given_prompts_get_the_trigger_and_the_base_is_drawn_once(tiny_world):
    log = replace(OWN_PICTURES, prompts=("a photo of two squares",), save_every=0)
    config = replace(tiny_run(tiny_world, "looked", steps=2, data__trigger="red"), log=log)
    run = Run(config)
    run.first_look()  # and then the process is killed
    train(replace(config, resume=True))
    assert [row["step"] for row in read_metrics(config.run_dir)] == [0, 1, 2]
    stored = json.loads((config.run_dir / "config.json").read_text())
    assert stored["sheet_prompts"] == ["red, a photo of two squares"]


def test_what_a_notebook_may_pass(tmp_path):
    """A path object is accepted; a recipe's name instead of its settings gets a message that says
    what to pass.
    """
    assert recipe("shapes-control", {"data.source": tmp_path}).data.source == str(tmp_path)
    assert recipe("rar-b", {"data.source": [tmp_path]}).data.source == (str(tmp_path),)
    for start, name in ((train, "t2i.train"), (check, "t2i.check")):
        with pytest.raises(UserError, match=rf"'shapes-control' is none: {name}\(t2i\.recipe\("):
            start("shapes-control")

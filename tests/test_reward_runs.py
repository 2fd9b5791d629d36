"""Reward runs: they learn, resume bit for bit, share the work between processes, and end in order
if a reward fails.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reward_functions
import torch
from helpers import Killed, rare
from programs import ROOT, launch
from runs import (
    SAME_SUM,
    assert_same_metrics,
    assert_same_weights,
    before_step,
    kill,
    metrics,
    tiny_reward_run,
    weights,
)

import t2i
from launch import train_reward
from t2i.checkpoint_folders import find_checkpoint, read_config, run_checkpoints
from t2i.errors import Stopped, UserError
from t2i.processes import ALONE
from t2i.reward.reward_check import check
from t2i.reward.reward_options import RewardConfig
from t2i.reward.reward_prompts import training_prompts
from t2i.reward.reward_recipes import recipes
from t2i.reward.reward_run import RewardRun
from t2i.reward.reward_watch import WatchedBenchmarks
from t2i.sampling import SamplingConfig, SamplingOverrides
from t2i.training.loop import train
from t2i.training.run_page import write_run_page


def learn(config: RewardConfig):
    return train(config, RewardRun)


def janus(root, **changes) -> dict:
    return {"backbone__family": "janus", "backbone__weights": str(root / "janus")} | changes


LORA = {"tuning": "lora", "lora__rank": 4}


@pytest.fixture(scope="module")
def plain(tiny_world):
    """A run of three steps with drafts, in one process, without ZeRO."""
    return learn(tiny_reward_run(tiny_world, "reward-plain"))


def test_what_a_run_writes(tiny_world):
    """Metrics of every kind, sheets with the best and worst of groups, and its page."""
    config = tiny_reward_run(tiny_world, "reward-page", method__k=1)
    learn(replace(config, log=replace(config.log, sample_every=2)))
    rows = metrics(tiny_world, "reward-page")
    first, last = rows[0], rows[-1]
    assert abs(first["policy/kl"]) < 1e-6 < 1e-5 < last["policy/kl"]
    assert first["policy/ratio_off"] == 0
    assert first["reward/by/reward_functions:brightness"] == pytest.approx(first["reward/mean"])
    assert first["reward/std"] >= first["reward/group_std"] > 0 == first["reward/dropped_groups"]
    assert "validation/own_drafts/slot0" in last and 0 < last["policy/entropy"] < 4.2
    folder = tiny_world / "runs" / "reward-page"
    assert [p.name for p in sorted((folder / "samples").iterdir())] == [
        f"step_{step:06d}{end}.png" for step in (2, 3) for end in ("", "_groups")
    ]
    page = write_run_page(folder).read_text()
    plain, groups = page.split("Best and worst of groups")
    assert "step_000002_groups" in groups and "step_000002_groups" not in plain, (
        "one slider for each kind"
    )
    assert "reward/mean" in page and "Seconds of a step" in page


def test_images_are_drawn_as_they_are_scored(tiny_world, monkeypatch):
    """Those to learn from, and those of the watched benchmarks."""
    given = {"reward__cfg_scale": 2.0, "reward__temperature": 0.7}
    config = tiny_reward_run(tiny_world, "-", **given)
    for part in ("reward_run", "reward_watch"):
        monkeypatch.setattr(f"t2i.reward.{part}.draw_images", lambda *given, **_: [given[2]])
    run = {"config": config, "processes": ALONE, "step": 0, "model": None}
    pool = training_prompts(config.reward, 0)
    (learned,) = RewardRun._draw(SimpleNamespace(**run, pool=pool))[2]
    (watched,) = WatchedBenchmarks(config, None, ALONE)._draw(None, [])
    assert learned.sampling == watched.sampling == SamplingConfig(2.0, temperature=0.7)


def test_a_run_stopped_at_a_sheet_keeps_its_groups(tiny_world):
    """Resuming cannot draw the images of the step again, and the sheet used to be missing."""
    config = tiny_reward_run(tiny_world, "reward-stopped", method__k=1, log__sample_every=2)

    def stop(run: RewardRun) -> None:
        run.stop_requested = True

    with before_step(1, stop), pytest.raises(Stopped):
        learn(config)
    learn(replace(config, resume=True))
    names = {path.name for path in (config.run_dir / "samples").iterdir()}
    assert names >= {"step_000002.png", "step_000002_groups.png"}


@pytest.mark.slow
def test_it_learns(tiny_world):
    """The rewarded quantity grows by more than the standard error of a step's mean."""
    config = tiny_reward_run(
        tiny_world,
        "reward-learns",
        method__k=1,
        optim__backbone_lr=3e-4,
        engine__micro_batch=16,
        reward__group=16,
    )
    learn(replace(config, batch_size=64, steps=30))
    rows = metrics(tiny_world, "reward-learns")
    first, last = (sum(row["reward/mean"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last > first + 2 * rows[0]["reward/std"] / (5 * 64) ** 0.5 * 2**0.5


def test_what_is_learned_is_in_the_checkpoint(tiny_world, plain):
    """It loads like any checkpoint, and both codec and trunk differ from the base's."""
    model = t2i.from_pretrained(plain)
    base = t2i.load_backbone("llamagen", tiny_world / "base").state_dict()
    own = model.backbone.state_dict()
    assert any(not torch.equal(own[name].cpu(), base[name]) for name in base)
    assert read_config(plain)["training"]["config"]["reward"]["group"] == 4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("full", {}),
        rare("updates", {"reward__updates": 2, "reward__cfg_scale": 2.0}),
        ("lora", LORA | {"method__k": 1, "reward__start_cfg_scale": 3.0}),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(tiny_world, plain, name, changes):
    """The same weights and metrics, although no checkpoint holds the start that the run is pulled
    to.
    """
    run_dir = f"reward-killed-{name}"
    changes = {"reward__kl": 0.3, "batch_size": 8} | changes
    whole = learn(tiny_reward_run(tiny_world, f"reward-whole-{name}", **changes))
    config = tiny_reward_run(tiny_world, run_dir, log__save_every=2, **changes)
    with pytest.raises(Killed), before_step(2, kill):
        learn(config)
    folder = learn(replace(config, resume=True))
    assert_same_weights(weights(folder), weights(whole))
    assert metrics(tiny_world, run_dir) == metrics(tiny_world, f"reward-whole-{name}")
    with pytest.raises(UserError, match=r"reward.kl: 0.3 -> 0.5"):
        learn(replace(config, resume=True, reward=replace(config.reward, kl=0.5)))


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_world, plain):
    """The same rewards and advantages for the same images, under ZeRO-2; each process draws two of
    the groups.
    """
    launch(str(ROOT / "tests" / "reward_ranks.py"), str(tiny_world))
    got, expected = (metrics(tiny_world, f"reward-{name}") for name in ("ranks", "plain"))
    exact = ("reward/mean", "reward/std", "reward/dropped_groups")
    assert [got[0][k] for k in exact] == [expected[0][k] for k in exact]
    assert_same_metrics(got, expected, 20 * SAME_SUM)
    for key, value in weights(find_checkpoint(tiny_world / "runs" / "reward-ranks")).items():
        assert torch.allclose(weights(plain)[key], value, atol=2e-4), key


def test_janus_adapters(tiny_world):
    """Adapters with drafts: the predictions for text are watched, and the base does not change."""
    watched = {"reward__watch": ("geneval", "dpg"), "batch_size": 8}
    changes = janus(tiny_world, **LORA, method__k=2, **watched)
    folder = learn(tiny_reward_run(tiny_world, "reward-janus", **changes, reward__watch_prompts=1))
    row = metrics(tiny_world, "reward-janus")[-1]
    assert 0 < row["watch/text_kl"] < 1 and row["watch/geneval"] == 0
    assert {"watch/dpg", "watch/diversity", "watch/distinct"} <= row.keys()
    assert (folder / "adapter").is_dir() and not (folder / "backbone.safetensors").exists()


# -- rewards that do not do their part -------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "step", "words"),
    [
        ("raises", 2, r"raised ConnectionError: no server .*prompt 'a photo.*Saved after step 2"),
        ("nan", 1, r"gave nan; prompt 'a photo.*Saved after step 1 .*: --resume continues"),
        ("constant", 0, "gave 0 to every image of the last 1 batches .*Nothing was learned yet"),
    ],
)
def test_a_reward_that_breaks_costs_nothing(tiny_world, function, step, words):
    """The run ends with one message, and a checkpoint with all previous steps resumes."""
    name = f"reward-{function}"
    config = tiny_reward_run(tiny_world, name, reward__constant=1)
    good = config.reward.functions[0]

    def break_it(run: RewardRun) -> None:
        from t2i.reward.rewards import own_function

        run.panel.rewards = {good: own_function(f"reward_functions:{function}")}

    with pytest.raises(UserError, match=words), before_step(step, break_it):
        learn(config)
    saved = run_checkpoints(config.run_dir)
    assert [folder.name for folder in saved] == [f"step_{step:06d}"] * (step > 0)
    if function == "nan":
        folder = learn(replace(config, resume=True))
        assert_same_weights(weights(folder), weights(tiny_world / "runs/reward-plain/best"))


def test_groups_without_spread_are_left_out(tiny_world, monkeypatch):
    """They are counted. If all groups are left out no weight moves, except that a guided start
    still teaches.
    """
    flat = {"reward__constant": 9, "optim__weight_decay": 0.0}
    config = tiny_reward_run(tiny_world, "reward-flat", **flat)
    monkeypatch.setattr("reward_functions.brightness", lambda images, metadata: [1.0] * len(images))
    folder = learn(config)
    assert [row["reward/dropped_groups"] for row in metrics(tiny_world, "reward-flat")] == [1, 1, 1]
    base = t2i.load_backbone("llamagen", tiny_world / "base").state_dict()
    own = t2i.from_pretrained(folder).backbone.state_dict()
    assert all(torch.allclose(own[name], base[name], atol=1e-6) for name in base)
    taught = tiny_reward_run(tiny_world, "reward-taught", reward__start_cfg_scale=3.0, **flat)
    own = t2i.from_pretrained(learn(taught)).backbone.state_dict()
    assert metrics(tiny_world, "reward-taught")[-1]["reward/dropped_groups"] == 1
    assert max(float((own[name] - base[name]).abs().max()) for name in base) > 1e-4


def test_passes_without_an_image_have_no_weight(tiny_world, monkeypatch):
    """With small micro-batches there are more passes than images in the kept groups."""
    plain = reward_functions.brightness

    def of_the_first_group(images, metadata):
        return [*plain(images, metadata)[:4], *[1.0] * (len(images) - 4)]

    monkeypatch.setattr("reward_functions.brightness", of_the_first_group)
    own = {}
    for micro in (4, 1):
        name = f"reward-micro-{micro}"
        options = {"engine__micro_batch": micro, "reward__constant": 9, "steps": 1}
        own[micro] = weights(learn(tiny_reward_run(tiny_world, name, **options)))
        row = metrics(tiny_world, name)[0]
        assert row["reward/dropped_groups"] == 0.75 and row["policy/entropy"] > 0
    # AdamW's first step follows the signs of the gradients, which rounding may flip near 0.
    off = torch.cat([(own[1][name] - value).flatten().abs() for name, value in own[4].items()])
    assert (off > 1e-4).float().mean() < 0.02


def test_guidance_is_learned_without_any_reward(tiny_world, monkeypatch):
    """Nothing is judged; unguided images come closer to what the start draws with guidance."""
    options = {"reward__functions": (), "reward__start_cfg_scale": 3.0, "reward__kl": 1.0}
    config = tiny_reward_run(
        tiny_world, "guided", **options, reward__watch=(), steps=8, optim__backbone_lr=1e-3
    )
    monkeypatch.setattr("reward_functions.brightness", None)
    config = replace(config, sampling=SamplingOverrides(top_p=0.9))
    drawn_with = t2i.from_pretrained(learn(config)).sampling
    assert (drawn_with.cfg_scale, drawn_with.temperature, drawn_with.top_p) == (1.0, 1.0, 0.9)
    rows = metrics(tiny_world, "guided")
    assert not any(name.startswith("reward/") for name in rows[-1])
    assert rows[-1]["policy/kl"] < rows[0]["policy/kl"]


# -- recipes and the program -----------------------------------------------------------------------
@pytest.mark.parametrize("name", [n if n.startswith("shapes") else rare(n) for n in recipes()])
def test_check_of_every_recipe(name, tmp_path):
    config = recipes()[name][1]
    data = replace(config.data, source=config.data.source or "shapes:40", validation_samples=8)
    if "shapes" not in name:
        data = replace(data, small_images="upscale")
    said = check(replace(config, data=data, run_dir=tmp_path / "run"))
    group = config.reward.group
    assert f" images per step = {config.batch_size // group} prompts x {group} images" in said
    taught = "geneval-soft" if config.reward.functions else "nothing is rewarded"
    assert "copy of the start" in said and taught in said
    assert "warnings" not in said, said


def test_check_counts_what_stays_beside_the_model(tmp_path):
    config = recipes()["shapes-reward"][1]
    data = replace(config.data, source="shapes:40", validation_samples=8)
    config = replace(config, data=data, run_dir=tmp_path / "run")

    def found(line: str, images: int) -> float:
        said = check(replace(config, reward=replace(config.reward, draw_batch=images)))
        size, unit = re.search(rf"{line} +([\d.]+) (MB|GB)", said).groups()
        return float(size) * {"MB": 1e6, "GB": 1e9}[unit]

    cache, peak = "cache while drawing", "peak, plus 10 %"
    more = found(cache, 256) - found(cache, 64)
    assert more > 0.2e9
    assert found(peak, 256) - found(peak, 64) == pytest.approx(1.1 * more, abs=0.02e9)


def test_check_names_prompts_that_are_not_read(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("a red fox\n\u7ea2\u8272\n", encoding="utf-8")
    config = recipes()["shapes-reward"][1]
    reward = replace(config.reward, prompts=str(path), functions=("reward_functions:brightness",))
    data = replace(config.data, source="shapes:40", validation_samples=8)
    said = check(replace(config, data=data, run_dir=tmp_path / "run", reward=reward))
    assert "1 of 2 prompts have no text the encoder can read, such as '\u7ea2\u8272'" in said


def test_own_prompts_of_a_shapes_base_get_its_judges(tmp_path):
    """Mask2Former and mPLUG used to be fetched, after --check had said "ready"."""
    (tmp_path / "own.txt").write_text("a red ring\na blue star\n")
    config = recipes()["shapes-reward"][1]
    own = {"functions": ("reward_functions:brightness",), "prompts": str(tmp_path / "own.txt")}
    small = {"run_dir": tmp_path / "run", "batch_size": 2, "steps": 1}
    small |= {
        "reward": replace(config.reward, **own, group=2, watch_prompts=1, watch_images=1),
        "data": replace(config.data, source="shapes:20", validation_samples=4, cache_dir=tmp_path),
        "engine": replace(config.engine, micro_batch=2),
        "log": replace(config.log, at_start=False),
    }
    learn(replace(config, **small))
    assert '"watch/dpg"' in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--reward.detector-weights none", "the shapes detector has no weights"),
        (
            "--reward.detector mask2former --reward.detector-weights none",
            "reward.detector_weights=none does not exist",
        ),
        ("--reward.answerer mplug --reward.answerer-weights none", "none is not a file, a folder"),
        ("--reward.prompts own.txt", "which is not GenEval metadata"),
        ("--reward.functions no_such:f", "no_such:f cannot be imported"),
    ],
)
def test_check_refuses_judges_as_training_does(refusal, options, words, tmp_path, monkeypatch):
    """It used to say "ready"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("a red fox")
    assert words in refusal("shapes-reward", "--check", *options.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--steps None", "steps is not given"),
        ("--condition-dropout 1", "condition_dropout=1.0 and"),  # as in any training
        ("--batch-size 96 --reward.group 9", "batch_size=96 must be a multiple of reward.group=9"),
        ("--ema 0 --engine.zero-stage 3", "reward fine-tuning draws in every process"),
        ("--engine.precision autocast", "autocast would draw and learn in different precisions"),
    ],
)
def test_impossible_settings_are_refused(refusal, options, words):
    assert words in refusal("shapes-reward", *options.split())


run = train_reward

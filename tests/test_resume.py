"""A resumed run equals one that was never stopped; and what a run keeps next to its checkpoints:
averages, the best model, sheets.
"""

import logging
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import Killed, edited, rare
from runs import (
    SAME_SUM,
    assert_same_metrics,
    assert_same_weights,
    before_step,
    kill,
    metrics,
    state_of,
    tiny_run,
    weights,
)
from safetensors.torch import load_file

import t2i
from t2i.checkpoint_folders import read_config, run_checkpoints
from t2i.data import content
from t2i.errors import Stopped, UserError
from t2i.generation import draw_images
from t2i.processes import ALONE
from t2i.shapes.shapes_source import write_dataset
from t2i.tensorar.model import TensorAR
from t2i.training import loop
from t2i.training.batches import TrainingData
from t2i.training.check import check
from t2i.training.config import TrainConfig
from t2i.training.logs import MetricsLog
from t2i.training.loop import train
from t2i.training.start import build_model
from t2i.training.state import StoredState
from t2i.training.training_run import BEST_BY, Run
from t2i.training.validation import validate

EXACT = 0.0


# -- resume ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, rare(signal.SIGINT), rare(signal.SIGHUP)])
def test_stop_and_resume_changes_no_bit(tiny_world, number):
    if number == signal.SIGHUP:  # which is ignored if the tests outlive their terminal
        signal.signal(number, signal.SIG_DFL)
    names = [f"{name}-{number.name}" for name in ("whole", "halves", "no-dropout")]
    options = {"steps": 6, "batch_size": 8, "token_dropout": 0.1, "condition_dropout": 0.3}
    options |= {"log__at_start": True}
    whole = train(tiny_run(tiny_world, names[0], **options))
    saved = pytest.raises(Stopped, match="saved after step 3")
    with saved, before_step(2, lambda run: os.kill(os.getpid(), number)):
        train(tiny_run(tiny_world, names[1], **options))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the run removes its handler"
    resumed = train(tiny_run(tiny_world, names[1], resume=True, **options))
    assert_same_metrics(*(metrics(tiny_world, name) for name in names[:2]), EXACT)
    assert_same_weights(weights(whole), weights(resumed))
    without = train(tiny_run(tiny_world, names[2], **options | {"token_dropout": 0.0}))
    assert not torch.equal(
        *(load_file(f / "codec.safetensors")["encoder.slots"] for f in (whole, without))
    )


def test_a_second_ctrl_c_ends_the_run_at_once(tiny_world, monkeypatch):
    def press_twice(run: Run) -> None:
        signal.raise_signal(signal.SIGINT)
        assert run.stop_requested, "the first only asks"
        signal.raise_signal(signal.SIGINT)  # a terminal and a launcher may both pass on one
        monkeypatch.setattr(loop, "_ONE_REQUEST_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped), before_step(0, press_twice):
        train(tiny_run(tiny_world, "ctrl-c", steps=2))


def test_resume_refuses_another_run(tiny_world, plain, tmp_path, caplog):
    def refused(message: str, **changes):
        with pytest.raises(ValueError, match=message):
            train(tiny_run(tiny_world, "plain", **{"resume": True, **changes}))

    refused(r"batch_size: 16 -> 8\): repeat the options that the run began with", batch_size=8)
    refused(r"method.k: 3 -> 2", method__k=2)
    refused(r"ema: 0.0 -> 0.9", ema=0.9)
    refused("has done 3 steps already", steps=2)
    with pytest.raises(UserError, match="has done 3 steps already"):
        check(tiny_run(tiny_world, "plain", resume=True, steps=2))
    report = check(tiny_run(tiny_world, "plain", resume=True))
    assert "all 3 steps are done" in report and report.endswith("would end at once")
    refused("already holds a run; give --resume", resume=False)
    base = shutil.copytree(tiny_world / "base", tmp_path / "base")
    (base / "gpt.pt").write_bytes(b"another")
    refused("gpt.pt is not the weight file", steps=4, backbone__weights=str(base))
    other = build_model(tiny_run(tiny_world, "-", method__k=2))
    with pytest.raises(UserError, match=r"not match this model's trained parameters: codec\."):
        StoredState(plain / "training_state", other)
    caplog.clear()
    assert train(tiny_run(tiny_world, "plain", resume=True)) == plain, "nothing left to do"
    assert "all 3 steps are done; give more --steps" in caplog.text
    with pytest.raises(UserError, match=r"--resume takes the run's own folder, .*plain$"):
        train(tiny_run(tiny_world, f"plain/checkpoints/{plain.name}", resume=True))


def test_resume_refuses_changed_data(tiny_world, tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", 40, size=32)
    config = tiny_run(tiny_world, "grown", data__source=str(tmp_path / "data"))
    train(replace(config, steps=1))
    write_dataset(tmp_path / "data", 41, size=32)
    changes = r"the data set has changed since .* 1 file was edited \(metadata\.jsonl\), 1 file was added \(.*--backbone\.weights"
    for start in (train, check):  # the check used to say that the run would train
        with pytest.raises(ValueError, match=changes):
            start(replace(config, resume=True))
    monkeypatch.setattr(content, "_WORTH_AN_INDEX", 0)
    with pytest.raises(
        ValueError, match=r"changed since .*data: 1 file was added"
    ):  # compared by names only
        check(replace(config, resume=True))
    write_dataset(tmp_path / "again", 40, size=32)
    data = replace(config.data, source=f"{tmp_path}/again")
    before = sorted(tiny_world.glob("cache/**"))
    assert "the same command without --check" in check(replace(config, resume=True, data=data))
    assert sorted(tiny_world.glob("cache/**")) == before, "checking writes nothing"


def test_resume_identifies_data_by_content(tiny_world, tmp_path):
    """Case 10: data that were touched, copied elsewhere or renamed are the same data."""
    write_dataset(tmp_path / "data", 20, size=32)
    config = tiny_run(tiny_world, "data_moved", data__source=str(tmp_path / "data"))
    train(replace(config, steps=1))
    caches = set((tiny_world / "cache").iterdir())
    for image in (tmp_path / "data" / "images").iterdir():
        os.utime(image, (1, 1))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    data = replace(config.data, source=f"{tmp_path}/./elsewhere/")
    train(replace(config, steps=2, resume=True, data=data))
    assert set((tiny_world / "cache").iterdir()) == caches, "nothing is encoded again"


def test_a_state_of_an_older_version_is_refused(tiny_world, plain, copied):
    """An older version's training state held DeepSpeed's own files (pickles)."""
    folder = copied(plain)
    (state,) = (folder / "training_state").iterdir()
    state.rename(state.with_name("mp_rank_00_model_states.pt"))
    with edited(folder / "manifest.json") as manifest:
        entry = manifest["files"].pop(f"training_state/{state.name}")
        manifest["files"]["training_state/mp_rank_00_model_states.pt"] = entry
    with pytest.raises(ValueError, match=r"older version.*--backbone.weights \S+step_000003"):
        train(tiny_run(tiny_world, folder.parents[1].name, resume=True))


def test_a_run_resumes_under_any_stage(tiny_world, caplog):
    """Each step is taken under another ZeRO stage and split, with the same losses and averages."""
    options = {"steps": 5, "batch_size": 8, "log__save_every": 1, "ema": 0.5}
    whole = train(tiny_run(tiny_world, "one-stage", **options))
    changed = ({"engine__zero_stage": 2}, {"engine__zero_stage": 1, "engine__micro_batch": 8})
    for number, more in enumerate(({}, *changed, {"engine__micro_batch": 2}, {})):
        config = tiny_run(tiny_world, "many-stages", **options, **more, resume=number > 0)
        last = number == 4
        with nullcontext() if last else pytest.raises(Killed), before_step(number + 1, kill):
            folder = train(config)
    one, many = (metrics(tiny_world, name) for name in ("one-stage", "many-stages"))
    assert_same_metrics(many, one, SAME_SUM)
    assert "engine.zero_stage: 0 -> 2" in caplog.text
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(folder)[name], value, atol=2e-4, rtol=0)


# -- the average, and the best ---------------------------------------------------------------------
def test_the_average_is_saved_and_validated(tiny_world, plain):
    options = {"steps": 3, "ema": 0.5, "log__save_every": 1, "log__keep_last": 3}
    last = train(tiny_run(tiny_world, "averaged", **options))
    folders = run_checkpoints(last.parents[1])
    raw = [state_of(folder, "weight") for folder in folders]
    average = build_model(tiny_run(tiny_world, "-")).codec.encoder.slots.detach()
    for step, (state, folder) in enumerate(zip(raw, folders, strict=True), start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state["codec.encoder.slots"]
        saved = load_file(folder / "codec.safetensors")["encoder.slots"]
        torch.testing.assert_close(saved, average)
    assert_same_weights(raw[-1], state_of(plain, "weight"))  # averaging does not change training
    model = t2i.from_pretrained(last)
    own = validate(model, TrainingData(tiny_run(tiny_world, "-"), model.backbone, ALONE)).metrics()
    logged = metrics(tiny_world, "averaged")[-1]
    assert {k: logged[k] for k in own} == pytest.approx(own, rel=SAME_SUM)
    for stage in (1, 2):
        train(tiny_run(tiny_world, f"averaged-{stage}", **options, engine__zero_stage=stage))
        found = metrics(tiny_world, f"averaged-{stage}")
        assert_same_metrics(found, metrics(tiny_world, "averaged"), SAME_SUM)
    with pytest.raises(ValueError, match=r"ema needs whole weights.*zero_stage=3"):
        tiny_run(tiny_world, "-", ema=0.5, engine__zero_stage=3)


def test_sheets_are_drawn_with_the_average(tiny_world, monkeypatch):
    drawn = []

    def watched(model: TensorAR, *args, **options):
        drawn.append(model.codec.encoder.slots.detach().clone())
        return draw_images(model, *args, **options)

    monkeypatch.setattr("t2i.training.training_run.draw_images", watched)
    run = Run(tiny_run(tiny_world, "averaged-sheet", ema=0.5, log__prompts=("a red circle",)))
    run.train_step()
    run.draw_sheet()
    assert torch.equal(drawn[0], run.average.weights["codec.encoder.slots"])
    assert not torch.equal(drawn[0], run.model.codec.encoder.slots)


def test_the_best_model_has_the_best_final_codes(tiny_world, monkeypatch):
    """With the model's own drafts as input, as in drawing; the other losses may rise."""
    names = [
        f"validation/{kind}/slot{j}" for kind in ("own_drafts", "noised_truth") for j in (0, 1)
    ]
    rows = iter([(3.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0), (2.5, 0.5, 0.5, 0.5)])
    monkeypatch.setattr(Run, "validate", lambda _: dict(zip(names, next(rows), strict=True)))
    train(tiny_run(tiny_world, "best-of-which", log__validate_every=1, batch_size=4))
    assert read_config(tiny_world / "runs" / "best-of-which" / "best")["training"]["step"] == 2


def test_the_best_model_is_kept(tiny_world, monkeypatch, caplog):
    losses = iter([3.0, 2.0, 5.0, 2.5, 1.0])
    monkeypatch.setattr(Run, "validate", lambda _: {BEST_BY: next(losses)})
    options = {"log__validate_every": 1, "log__save_every": 1, "log__keep_last": 1, "batch_size": 4}
    best = tiny_world / "runs" / "best-kept" / "best"
    with before_step(4, kill), pytest.raises(Killed):
        train(tiny_run(tiny_world, "best-kept", steps=5, **options))
    assert read_config(best, contents=True)["training"]["step"] == 2
    assert t2i.from_pretrained(best).config.k == 3 and not (best / "training_state").exists()
    train(tiny_run(tiny_world, "best-kept", steps=5, resume=True, **options))
    facts = read_config(best)["training"]
    assert (facts["step"], facts["best_loss"]) == (5, 1.0)
    losses = iter([1.5, 9.0])
    train(tiny_run(tiny_world, "early", steps=2, **options))
    early = tiny_world / "runs" / "early"
    with caplog.at_level(logging.INFO, "t2i.checkpoint_folders"):
        t2i.from_pretrained(early)
    said = f"step_000002; the best in validation was step 1: {early / 'best'} (loss 1.500)"
    assert said in caplog.text
    (early / "best" / "config.json").unlink()  # damage there does not concern the newest one
    t2i.from_pretrained(early)
    losses = iter([9.0] * 5)
    train(tiny_run(tiny_world, "none-kept", log__keep_best=False, **options))
    assert not (tiny_world / "runs" / "none-kept" / "best").exists()


def test_a_kill_before_the_best_model_is_kept(tiny_world, monkeypatch):
    """A kill between the checkpoint and the best model of the same step used to lose the best
    model.
    """
    losses = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(Run, "validate", lambda _: {BEST_BY: next(losses)})
    options = {"log__validate_every": 1, "log__save_every": 1, "batch_size": 4}
    keep = Run.keep_if_best

    def killed(run: Run, found: dict[str, float]) -> None:
        if run.step == 2:
            raise Killed
        keep(run, found)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "keep_if_best", killed)
        train(tiny_run(tiny_world, "best-killed", steps=4, **options))
    train(tiny_run(tiny_world, "best-killed", steps=4, resume=True, **options))
    best = read_config(tiny_world / "runs" / "best-killed" / "best")["training"]
    assert (best["step"], best["best_loss"]) == (2, 1.0)


@pytest.mark.parametrize("stage", [0, rare(3)])
def test_the_sheet_of_the_step_where_a_run_stopped(tiny_world, stage):
    """Resuming draws it; it used to be left out. Under ZeRO-3 sheets belong to the regular
    checkpoints. A run that is stopped in its last step draws the last sheet before it ends.
    """

    def stop(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    name = f"sheets-stopped-{stage}"
    options = {"log__sample_every": 1, "log__save_every": 1, "engine__zero_stage": stage}
    options |= {"batch_size": 4, "log__prompts": ("a red circle",)}
    with pytest.raises(Stopped), before_step(0, stop):
        train(tiny_run(tiny_world, name, steps=2, **options))
    with before_step(1, stop):
        train(tiny_run(tiny_world, name, steps=2, resume=True, **options))
    sheets = sorted((tiny_world / "runs" / name / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_000001.png", "step_000002.png"]
    # As after a kill between the last checkpoint and its sheet: the page shows what is drawn now.
    page = sheets[0].parents[1] / "index.html"
    sheets[-1].unlink()
    page.unlink()
    train(tiny_run(tiny_world, name, steps=2, resume=True, **options))
    assert sheets[-1].is_file() and sheets[-1].name in page.read_text()


def test_resume_without_a_checkpoint(tiny_world, monkeypatch):
    with pytest.raises(ValueError, match="holds no run; start without --resume"):
        train(tiny_run(tiny_world, "never-started", resume=True))
    assert not (tiny_world / "runs" / "never-started").exists()

    def killed(run: Run) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", killed)
        train(tiny_run(tiny_world, "killed-early"))
    with (tiny_world / "runs" / "killed-early" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')  # cut off in the middle of a line
    with pytest.raises(UserError, match="batch_size: 16 -> 8"):
        train(tiny_run(tiny_world, "killed-early", resume=True, batch_size=8))
    train(tiny_run(tiny_world, "killed-early", resume=True))
    assert [row["step"] for row in metrics(tiny_world, "killed-early")] == [1, 2, 3]


def test_tensorboard_shows_steps_that_are_repeated_once(tmp_path, monkeypatch):
    """Its files keep what was logged after the last checkpoint; a purge hides that."""
    given = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda place, purge_step: given.append((place, purge_step))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("t2i.training.logs.find_spec", lambda name: name)
    for step in (0, 3):
        MetricsLog(replace(TrainConfig(), run_dir=tmp_path), step)
    assert given == [(str(tmp_path / "tensorboard"), 1), (str(tmp_path / "tensorboard"), 4)]

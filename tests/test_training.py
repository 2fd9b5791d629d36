"""Training runs in one process: resume, splits, ZeRO stages, tuning modes, schedules and validation
do exactly what they should.
"""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Killed, edited, rare
from programs import program
from runs import (
    SAME_SUM,
    assert_same_metrics,
    assert_same_weights,
    before_step,
    kill,
    metrics,
    plain_options,
    saved_after_two_steps,
    state_of,
    tiny_run,
    weights,
)
from safetensors.torch import load_file, save_file

import t2i
from launch import train_llamagen
from t2i.checkpoint import read_config, run_checkpoints
from t2i.errors import Stopped
from t2i.processes import ALONE, Processes
from t2i.shapes.shapes_source import write_dataset
from t2i.training.batches import TrainingData
from t2i.training.config import OptimOptions
from t2i.training.engine import TrainingLoss, parameter_groups
from t2i.training.logs import read_metrics
from t2i.training.loop import BEST_BY, Run, train
from t2i.training.start import build_model
from t2i.training.validation import validate
from t2i.weights import read_state_dict

EXACT = 0.0


# -- resume ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, rare(signal.SIGINT), rare(signal.SIGHUP)])
def test_stop_and_resume_changes_no_bit(tiny_world, number):
    if number == signal.SIGHUP:  # ignored where the tests outlive their terminal
        signal.signal(number, signal.SIG_DFL)
    names = [f"{name}-{number.name}" for name in ("whole", "halves", "no-dropout")]
    options = {"steps": 6, "token_dropout": 0.1, "condition_dropout": 0.3}
    whole = train(tiny_run(tiny_world, names[0], **options))
    saved = pytest.raises(Stopped, match="saved after step 3")
    with saved, before_step(2, lambda run: os.kill(os.getpid(), number)):
        train(tiny_run(tiny_world, names[1], **options))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handler goes with the run"
    resumed = train(tiny_run(tiny_world, names[1], resume=True, **options))
    assert_same_metrics(*(metrics(tiny_world, name) for name in names[:2]), EXACT)
    assert_same_weights(weights(whole), weights(resumed))
    without = train(tiny_run(tiny_world, names[2], **options | {"token_dropout": 0.0}))
    assert not torch.equal(
        *(load_file(f / "codec.safetensors")["encoder.slots"] for f in (whole, without))
    )


def test_resume_wants_the_same_run(tiny_world, plain):
    def refused(message: str, **changes):
        with pytest.raises(ValueError, match=message):
            train(tiny_run(tiny_world, "plain", **{"resume": True, **changes}))

    refused(r"batch_size: 16 -> 8", batch_size=8)
    refused(r"method.k: 3 -> 2", method__k=2)
    refused(r"ema: 0.0 -> 0.9", ema=0.9)
    refused("has done 3 steps already", steps=2)
    refused("already holds a run; give --resume", resume=False)
    assert train(tiny_run(tiny_world, "plain", resume=True)) == plain, "nothing left to do"


def test_resume_wants_the_same_data(tiny_world, tmp_path):
    write_dataset(tmp_path / "data", 40, size=32)
    config = tiny_run(tiny_world, "grown", data__source=str(tmp_path / "data"))
    train(replace(config, steps=1))
    write_dataset(tmp_path / "data", 41, size=32)
    changes = r"the data set has changed since .* 1 file was edited \(metadata\.jsonl\), 1 file was added \("
    with pytest.raises(ValueError, match=changes):
        train(replace(config, resume=True))


def test_resume_knows_data_by_their_content(tiny_world, tmp_path):
    """Case 10: touched, copied elsewhere, named otherwise: the same data."""
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
    """It held DeepSpeed's own files."""
    folder = copied(plain)
    (state,) = (folder / "training_state").iterdir()
    state.rename(state.with_name("mp_rank_00_model_states.pt"))
    with edited(folder / "manifest.json") as manifest:
        entry = manifest["files"].pop(f"training_state/{state.name}")
        manifest["files"]["training_state/mp_rank_00_model_states.pt"] = entry
    with pytest.raises(ValueError, match=r"older version.*--backbone.weights \S+step_000003"):
        train(tiny_run(tiny_world, folder.parents[1].name, resume=True))


def test_a_run_goes_on_under_any_stage(tiny_world, caplog):
    """Each step under another one, with another split: the same losses, and averages."""
    options = {"steps": 5, "log__save_every": 1, "ema": 0.5}
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
def test_the_average_is_what_is_saved_and_validated(tiny_world, plain):
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
    assert_same_weights(raw[-1], state_of(plain, "weight"))  # training itself is what it was
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


def test_the_best_model_is_kept(tiny_world, monkeypatch):
    losses = iter([3.0, 2.0, 5.0, 2.5, 1.0])
    measured = Run.validate
    monkeypatch.setattr(Run, "validate", lambda run: measured(run) | {BEST_BY: next(losses)})
    options = {"log__validate_every": 1, "log__save_every": 1, "log__keep_last": 1}
    best = tiny_world / "runs" / "best-kept" / "best"
    with before_step(4, kill), pytest.raises(Killed):
        train(tiny_run(tiny_world, "best-kept", steps=5, **options))
    assert read_config(best, contents=True)["training"]["step"] == 2
    assert t2i.from_pretrained(best).config.k == 3 and not (best / "training_state").exists()
    train(tiny_run(tiny_world, "best-kept", steps=5, resume=True, **options))
    facts = read_config(best)["training"]
    assert (facts["step"], facts["best_loss"]) == (5, 1.0)
    losses = iter([9.0] * 5)
    train(tiny_run(tiny_world, "none-kept", log__keep_best=False, **options))
    assert not (tiny_world / "runs" / "none-kept" / "best").exists()


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
    train(tiny_run(tiny_world, "killed-early", resume=True))
    assert [row["step"] for row in metrics(tiny_world, "killed-early")] == [1, 2, 3]


# -- one step, done in different ways --------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"engine__micro_batch": 16},
        {"engine__micro_batch": 2, "engine__gradient_checkpointing": True},
        rare({"engine__zero_stage": 1}),
        {"engine__zero_stage": 2},
        rare({"engine__zero_stage": 3}),
        {"engine__zero_stage": 3, "engine__gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(f"{k.split('__')[1]}{v}" for k, v in changes.items()),
)
def test_metrics_do_not_depend_on_split_or_stage(tiny_world, plain, changes, request, monkeypatch):
    monkeypatch.setattr("t2i.tensorar.loss.LOGITS_AT_ONCE", 2**12)
    name = request.node.callspec.id
    train(tiny_run(tiny_world, name, **changes))
    expected = metrics(tiny_world, "plain")
    assert expected[-1]["train/loss"] != expected[0]["train/loss"]
    assert_same_metrics(metrics(tiny_world, name), expected, SAME_SUM)


def test_the_program_trains(tiny_world, plain, capsys):
    program(train_llamagen, *plain_options(tiny_world, "by-program"))
    assert capsys.readouterr().out.count("checkpoint: ") == 1
    assert metrics(tiny_world, "by-program") == metrics(tiny_world, "plain")


def test_logged_losses_are_the_means_over_the_batch(tiny_world, plain):
    config = tiny_run(tiny_world, "-")
    model = build_model(config).train()
    total = torch.zeros(2, 3)
    with torch.no_grad():
        for batch in TrainingData(config, model.backbone, ALONE).micro_batches(0):
            condition = model.backbone.encode_condition(batch.prepared, batch.drop)
            losses = model(batch.codes, condition, model.noised_windows(batch.codes, batch.keys))
            total += torch.stack([losses.sums, losses.counts])
    means = (total[0] / total[1]).tolist()
    first = metrics(tiny_world, "plain")[0]
    assert [first[f"train/slot{j}"] for j in range(3)] == pytest.approx(means, rel=SAME_SUM)
    assert total[1].tolist() == [16 * 16, 16 * 15, 16 * 14]
    assert first["train/loss"] == pytest.approx(
        float(total[0].sum() / total[1].sum()), rel=SAME_SUM
    )


def test_dropped_conditions_are_not_read(tiny_world, plain):
    config = tiny_run(tiny_world, "-")
    model = build_model(config)
    batch = next(TrainingData(config, model.backbone, ALONE).micro_batches(0))
    for dropped in (False, True):
        batch.drop = torch.full_like(batch.drop, dropped)
        blank = replace(
            batch, prepared={**batch.prepared, "features": 0 * batch.prepared["features"]}
        )
        loss, loss_blank = (TrainingLoss(model, "fp32")(b)[0] for b in (batch, blank))
        assert torch.equal(loss, loss_blank) == dropped


def test_bf16_is_close_to_fp32(tiny_world, plain):
    name, options = "bf16", {"engine__precision": "bf16", "engine__zero_stage": 1}
    folder = train(tiny_run(tiny_world, name, **options))
    assert_same_metrics(metrics(tiny_world, name), metrics(tiny_world, "plain"), 0.05)
    assert {v.dtype for v in weights(folder).values()} == {torch.bfloat16}
    assert next(t2i.from_pretrained(folder).parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "method", [{"noise": "gaussian"}, {"noise": "codebook"}, {"k": 1}], ids=str
)
def test_other_methods_train(tiny_world, method):
    name = "-".join(map(str, method.values()))
    options = {f"method__{k}": v for k, v in method.items()}
    train(tiny_run(tiny_world, name, steps=12, **options))
    losses = [row["train/loss"] for row in metrics(tiny_world, name)]
    assert losses[-1] < losses[0]


# -- tuning modes ----------------------------------------------------------------------------------
@pytest.mark.parametrize("tuning", ["full", "codec", "lora"])
def test_tuning_modes_change_what_they_say(tiny_world, tuning):
    run = Run(tiny_run(tiny_world, f"mode-{tuning}", tuning=tuning))
    base = t2i.load_backbone("llamagen", tiny_world / "base")
    folder, reloaded = saved_after_two_steps(run)
    live = reloaded.state_dict()
    changed = {
        name
        for name, value in base.official_state_dict().items()
        if not torch.equal(value, live["backbone.gpt." + _wrapped(name, live)])
    }
    if tuning == "full":
        assert changed == base.official_state_dict().keys() - {"cls_embedding.uncond_embedding"}
    else:
        assert changed == set()
    assert (folder / "backbone.safetensors").exists() == (tuning == "full")
    assert (folder / "adapter").exists() == (tuning == "lora")
    fresh = t2i.attach(base, run.config.method).codec.state_dict()
    assert not any(torch.equal(value, live[f"codec.{name}"]) for name, value in fresh.items())


def _wrapped(name: str, state_dict: dict) -> str:
    """The name that a base weight has once LoRA wraps its layer."""
    inner = name.removesuffix(".weight") + ".base_layer.weight"
    return inner if f"backbone.gpt.{inner}" in state_dict else name


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_gradients(tiny_world, recompute):
    config = tiny_run(
        tiny_world, "-", tuning="lora", engine__gradient_checkpointing=recompute, token_dropout=0.1
    )
    model = build_model(config).train()
    batch = next(TrainingData(config, model.backbone, ALONE).micro_batches(0))
    passes = []
    model.backbone.gpt.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    loss, *_ = TrainingLoss(model, "fp32")(batch)
    loss.backward()
    assert len(passes) == 1 + recompute
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if "lora_" in n or "codec" in n}
    moving = [p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n]
    assert len(moving) == 10 and all(moving)


def test_lora_starts_the_same_for_a_seed(tiny_world):
    config = tiny_run(tiny_world, "-", tuning="lora")
    torch.manual_seed(0)
    first = build_model(config).state_dict()
    torch.manual_seed(1)
    again, other = (build_model(replace(config, seed=s)).state_dict() for s in (0, 1))
    adapters = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in adapters)
    assert not any(torch.equal(first[name], other[name]) for name in adapters)


# -- optimizer -------------------------------------------------------------------------------------
def test_learning_rates_are_functions_of_the_step(tiny_world, plain):
    optim = OptimOptions(codec_lr=1.0, backbone_lr=0.1, warmup_steps=3, backbone_delay_steps=2)
    assert [optim.codec_rate(s, 8) for s in range(4)] == [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8]
    assert optim.codec_rate(8, 8) == 0
    assert [optim.backbone_rate(s, 8) for s in range(5)] == pytest.approx([0, 0, 0.075, 0.1, 0.1])
    rates = [row["lr/codec"] for row in metrics(tiny_world, "plain")]
    assert rates == [1e-2 * (1 - step / 3) for step in range(3)]


def test_parameter_groups(tiny_world):
    model = build_model(tiny_run(tiny_world, "-"))
    groups = parameter_groups(model, tiny_run(tiny_world, "-", optim__weight_decay=0.3))
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters()), "each parameter once"
    for group in groups:
        decays = {p.dim() >= 2 for p in group["params"]}
        assert decays == {group["weight_decay"] == 0.3}
    codec = {id(p) for group in groups if group["part"] == "codec" for p in group["params"]}
    assert codec == {id(p) for p in model.codec.parameters()}


def test_backbone_waits_for_the_codec(tiny_world):
    folder = train(tiny_run(tiny_world, "delay", optim__backbone_delay_steps=3))
    base = t2i.load_backbone("llamagen", tiny_world / "base").official_state_dict()
    assert_same_weights(load_file(folder / "backbone.safetensors"), base)
    later = train(tiny_run(tiny_world, "delay-over", optim__backbone_delay_steps=2))
    moved = load_file(later / "backbone.safetensors")
    assert not torch.equal(moved["tok_embeddings.weight"], base["tok_embeddings.weight"])


# -- data and validation ---------------------------------------------------------------------------
def test_ranks_share_the_batches(tiny_world, plain):
    config = tiny_run(tiny_world, "-", engine__micro_batch=4, condition_dropout=0.5)
    backbone = t2i.load_backbone("llamagen", tiny_world / "base")
    one, *ranks = (
        TrainingData(config, backbone, processes)
        for processes in (ALONE, *(Processes(r, 2) for r in range(2)))
    )
    whole, parts = (
        [batch for data in part for batch in data.micro_batches(5)] for part in ([one], ranks)
    )
    for field in ("codes", "keys", "drop"):
        assert torch.equal(
            *(torch.cat([getattr(b, field) for b in side]) for side in (whole, parts))
        )
    assert 0 < torch.cat([b.drop for b in whole]).sum() < 16
    held_out = [[(b.keys, counted) for b, counted in d.validation_batches()] for d in (one, *ranks)]
    counted = [torch.cat([keys for keys, counted in rank if counted]) for rank in held_out]
    assert len(held_out[1]) == len(held_out[2]), "or ZeRO-3 would wait for ever"
    assert set(counted[0].tolist()) == set(torch.cat(counted[1:]).tolist())
    assert [len(keys) for keys in counted] == [9, 5, 4]
    train_set, validation_set = set(one.train.tolist()), set(one.validation.tolist())
    assert not train_set & validation_set and len(train_set | validation_set) == 60


def test_another_tokenizer_gets_another_cache(tiny_world, plain, tmp_path):
    config = tiny_run(tiny_world, "-", data__cache_dir=tmp_path / "cache")

    def cache(base: Path) -> Path:
        backbone = t2i.load_backbone("llamagen", base)
        return TrainingData(config, backbone, ALONE).key

    folders = [cache(tiny_world / "base")]
    for file in ("vq.pt", "text_encoder/model.safetensors"):
        base = tmp_path / Path(file).stem
        shutil.copytree(tiny_world / "base", base)
        weights = read_state_dict(base / file)
        changed = {name: value * 1.1 for name, value in weights.items()}
        (torch.save if file.endswith(".pt") else save_file)(changed, base / file)
        folders.append(cache(base))
    assert len(set(folders)) == 3 and cache(tiny_world / "base") == folders[0]


def test_validation(tiny_world, plain):
    model = t2i.from_pretrained(plain).train()
    config = tiny_run(tiny_world, "-")
    losses = []
    for size in (4, 8):
        resized = replace(config, engine=replace(config.engine, micro_batch=size))
        losses.append(validate(model, TrainingData(resized, model.backbone, ALONE)))
    assert model.training, "validation leaves the mode as it was"
    assert losses[0].own_drafts == pytest.approx(losses[1].own_drafts, rel=SAME_SUM)
    assert losses[0].noised_truth == pytest.approx(losses[1].noised_truth, rel=SAME_SUM)
    assert losses[0].own_drafts != pytest.approx(losses[0].noised_truth, rel=1e-3)
    last = metrics(tiny_world, "plain")[-1]
    for kind in ("own_drafts", "noised_truth"):
        logged = [last[f"validation/{kind}/slot{j}"] for j in range(3)]
        assert getattr(losses[0], kind) == pytest.approx(logged, rel=SAME_SUM)
    base = t2i.attach(t2i.load_backbone("llamagen", tiny_world / "base"), t2i.presets.base())
    without_drafts = validate(base, TrainingData(config, base.backbone, ALONE))
    assert without_drafts.own_drafts == without_drafts.noised_truth


# -- what is written -------------------------------------------------------------------------------
def test_a_run_leaves_its_page(tiny_world):
    options = {"log__sample_every": 2, "log__validate_every": 2, "log__log_every": 2, "steps": 5}
    train(tiny_run(tiny_world, "page", **options))
    run_dir = tiny_world / "runs" / "page"
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all("validation/own_drafts/slot2" in row for row in rows)
    sheets = sorted(p.name for p in (run_dir / "samples").iterdir())
    assert sheets == ["step_000002.png", "step_000004.png", "step_000005.png"]
    page = (run_dir / "index.html").read_text()
    assert page.count(">slot") == 3 * 3 and all(name in page for name in sheets)
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 5

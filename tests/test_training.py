"""Training runs in one process: splits, ZeRO stages, tuning modes, schedules and validation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import reward_functions
import torch
from helpers import open_gates, rare
from programs import program
from runs import (
    SAME_SUM,
    assert_same_metrics,
    assert_same_weights,
    metrics,
    plain_options,
    saved_after_two_steps,
    state_of,
    tiny_janus_run,
    tiny_run,
    weights,
)
from safetensors.torch import load_file, save_file

import t2i
from launch import train_llamagen
from t2i.files import read_json_lines
from t2i.processes import ALONE, Processes
from t2i.pytorch_defaults import defaults_kept
from t2i.reward.rewards import directory_kept
from t2i.rng import make_keys, uniforms
from t2i.shapes.shapes_source import write_dataset
from t2i.training.batches import TrainingData, noise_and_drop
from t2i.training.config import OptimOptions, TrainConfig
from t2i.training.engine import TrainingLoss, parameter_groups, set_rates
from t2i.training.examples import encode_examples
from t2i.training.logs import read_metrics
from t2i.training.loop import train
from t2i.training.start import build_model
from t2i.training.training_run import Run
from t2i.training.validation import batch_losses, validate
from t2i.weights import read_state_dict

EXACT = 0.0


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


def test_the_logged_loss_has_the_slots_weights(tiny_world, plain):
    run = Run(tiny_run(tiny_world, "weighted", method__slot_weights=(1.0, 0.5, 0.1)))
    row, shares = run.train_step(), (16, 0.5 * 15, 0.1 * 14)
    losses = [row[f"train/slot{j}"] * share for j, share in enumerate(shares)]
    assert row["train/loss"] == pytest.approx(sum(losses) / sum(shares), rel=SAME_SUM)


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


@pytest.mark.parametrize("changed", ["everything", "inference mode"])
def test_a_run_in_a_notebook_that_changed_pytorchs_defaults(tiny_world, plain, changed):
    """Without gradients it ended in an assertion of DeepSpeed's, with another device in PyTorch's
    error; another type trained other weights.
    """
    config = tiny_run(tiny_world, changed.replace(" ", "-"))
    with defaults_kept(), directory_kept(), torch.inference_mode(changed == "inference mode"):
        if changed == "everything":
            reward_functions.changes_defaults([], [])
        before = torch.get_default_dtype(), torch.empty(0).device, torch.is_grad_enabled()
        assert "parameters" in t2i.check(config)
        folder = train(config)
        assert before == (torch.get_default_dtype(), torch.empty(0).device, torch.is_grad_enabled())
    assert_same_weights(weights(folder), weights(plain))


def test_bf16_is_close_to_fp32(tiny_world, plain):
    name, options = "bf16", {"engine__precision": "bf16", "engine__zero_stage": 1}
    folder = train(tiny_run(tiny_world, name, **options))
    assert_same_metrics(metrics(tiny_world, name), metrics(tiny_world, "plain"), 0.05)
    assert {v.dtype for v in weights(folder).values()} == {torch.bfloat16}
    assert next(t2i.from_pretrained(folder).parameters()).dtype == torch.float32


def test_autocast_computes_in_bf16(tiny_world, plain):
    """In steps and in validation; the weights stay fp32."""
    runs = [Run(tiny_run(tiny_world, f"in-{p}", engine__precision=p)) for p in ("fp32", "autocast")]
    for found in ([run.validate() for run in runs], [run.train_step() for run in runs]):
        losses = [{k: v for k, v in one.items() if "slot" in k} for one in found]
        assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert {p.dtype for p in runs[1].model.parameters()} == {torch.float32}


def test_own_drafts_follow_the_progress_of_the_run(tiny_world, plain):
    config = tiny_run(tiny_world, "-", method__own_drafts=1.0, method__anneal=True)
    models = [open_gates(build_model(c)) for c in (config, tiny_run(tiny_world, "-"))]
    data = TrainingData(config, models[0].backbone, ALONE)
    batches = [next(data.micro_batches(step)) for step in range(3)]
    assert [batch.progress for batch in batches] == [0, 1 / 3, 2 / 3]
    first, last = batches[0], replace(batches[0], progress=1.0)
    with torch.no_grad():
        losses = [float(TrainingLoss(model, "fp32")(first)[0]) for model in models]
        assert losses[0] == losses[1] != float(TrainingLoss(models[0], "fp32")(last)[0])


def test_steps_are_taken_in_training_mode(tiny_world, monkeypatch):
    """Also after validation and sheets, which switch dropout off."""
    modes, step = [], Run.train_step

    def watched(run: Run) -> dict[str, float]:
        modes.append({module.training for module in run.model.modules()})
        return step(run)

    monkeypatch.setattr(Run, "train_step", watched)
    drawn = {"log__sample_every": 1, "log__validate_every": 1, "log__prompts": ("a red circle",)}
    for name, options in (("quiet", {}), ("drawn", drawn)):
        train(tiny_run(tiny_world, f"mode-{name}", batch_size=4, **options))
    assert modes == 6 * [{True}]


def test_dropout_differs_by_step_process_and_seed(tiny_world):
    seeds = []
    for seed, rank in ((0, 0), (1, 0), (0, 1)):
        run = Run(tiny_run(tiny_world, f"dropout-{seed}{rank}", seed=seed, batch_size=4))
        run.processes = replace(run.processes, rank=rank)
        for _ in range(2):
            run.train_step()
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 6


@pytest.mark.parametrize(
    "method", [{"noise": "gaussian"}, {"noise": "codebook"}, {"k": 1}], ids=str
)
def test_other_methods_train(tiny_world, method):
    name = "-".join(map(str, method.values()))
    options = {f"method__{k}": v for k, v in method.items()}
    train(tiny_run(tiny_world, name, steps=6, **options))
    losses = [row["train/loss"] for row in metrics(tiny_world, name)]
    assert losses[-1] < losses[0]


def test_gaussian_noise_is_added_in_steps_and_in_validation(tiny_world, plain):
    config = tiny_run(tiny_world, "-", method__noise="gaussian")
    model = open_gates(build_model(config)).eval()
    batch = next(TrainingData(config, model.backbone, ALONE).micro_batches(0))
    both = (batch, replace(batch, keys=batch.keys + 1))
    with torch.no_grad():
        assert len({float(TrainingLoss(model, "fp32")(one)[0]) for one in both}) == 2
        assert len({str(batch_losses(model, one)[0][0]) for one in both}) == 2


# -- tuning modes ----------------------------------------------------------------------------------
@pytest.mark.parametrize("tuning", ["full", "codec", "lora"])
def test_tuning_modes_train_only_their_weights(tiny_world, tuning):
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
    """The name of a base weight once LoRA has wrapped its layer."""
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


def test_new_weights_start_the_same_for_a_seed(tiny_world):
    config = tiny_run(tiny_world, "-", tuning="lora")
    torch.manual_seed(0)
    first = build_model(config).state_dict()
    torch.manual_seed(1)
    again, other = (build_model(replace(config, seed=s)).state_dict() for s in (0, 1))
    fresh = ["codec.encoder.slots", *(name for name in first if "lora_A" in name)]
    assert all(torch.equal(first[name], again[name]) for name in fresh)
    assert not any(torch.equal(first[name], other[name]) for name in fresh)


# -- optimizer -------------------------------------------------------------------------------------
def test_learning_rates_are_functions_of_the_step(tiny_world, plain):
    optim = OptimOptions(codec_lr=1.0, backbone_lr=0.1, warmup_steps=3, backbone_delay_steps=2)
    assert [optim.codec_rate(s, 8) for s in range(4)] == [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8]
    assert optim.codec_rate(8, 8) == 0
    assert [optim.backbone_rate(s, 8) for s in range(5)] == pytest.approx([0, 0, 0.075, 0.1, 0.1])
    rates = [row["lr/codec"] for row in metrics(tiny_world, "plain")]
    assert rates == [1e-2 * (1 - step / 3) for step in range(3)]
    groups = [{"part": "backbone"}]  # of a control: it has no codec
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    assert set_rates(engine, replace(TrainConfig(), optim=optim), 3, 8) == {"backbone": 0.1}
    assert groups == [{"part": "backbone", "lr": 0.1}]


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


@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_are_clipped_and_moments_decay_as_the_options_say(tiny_world, stage):
    """AdamW's moments after one step are shares of the gradient and of its square."""
    own = {"optim__betas": (0.8, 0.9), "optim__grad_clip": 0.01, "engine__zero_stage": stage}
    folder = train(tiny_run(tiny_world, f"moments-{stage}", steps=1, **own))
    gradient, square = (
        torch.cat([value.flatten() for value in state_of(folder, kind).values()]) / share
        for kind, share in (("exp_avg", 0.2), ("exp_avg_sq", 0.1))
    )
    assert float(gradient.norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradient.square(), square)


def test_backbone_waits_for_the_codec(tiny_world):
    folder = train(tiny_run(tiny_world, "delay", batch_size=4, optim__backbone_delay_steps=3))
    base = t2i.load_backbone("llamagen", tiny_world / "base").official_state_dict()
    assert_same_weights(load_file(folder / "backbone.safetensors"), base)
    later = train(tiny_run(tiny_world, "delay-over", batch_size=4, optim__backbone_delay_steps=2))
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
    assert len(held_out[1]) == len(held_out[2]), "otherwise ZeRO-3 would hang"
    assert set(counted[0].tolist()) == set(torch.cat(counted[1:]).tolist())
    assert [len(keys) for keys in counted] == [9, 5, 4]
    train_set, validation_set = set(one.train.tolist()), set(one.validation.tolist())
    assert not train_set & validation_set and len(train_set | validation_set) == 60


def test_random_choices_about_a_sample_are_independent(tiny_world, monkeypatch):
    """Its noise, whether it loses its condition, and which view or caption is read; they differ
    each time that it is read, and for each seed.
    """
    noise, drop = noise_and_drop(make_keys(0, torch.arange(1000)), 0.5)
    assert 0.4 < ((uniforms(noise, 1)[:, 0] < 0.5) == drop).float().mean() < 0.6
    backbone, keys, chosen = t2i.load_backbone("llamagen", tiny_world / "base"), [], []
    for seed in (0, 1):
        data = TrainingData(tiny_run(tiny_world, "-", seed=seed), backbone, ALONE)
        load = data.load
        monkeypatch.setattr(data, "load", lambda i, c, load=load: chosen.append(c) or load(i, c))
        keys += [batch.keys for step in range(7) for batch in data.micro_batches(step)]
    assert len(torch.cat(keys).unique()) == 2 * 7 * 16, "in two epochs of 51 samples"
    bits, others = torch.cat(chosen) % 2, torch.cat(keys) % 2
    assert 0.4 < bits.float().mean() < 0.6 and 0.4 < (bits == others).float().mean() < 0.6


@pytest.mark.parametrize("run", [tiny_run, tiny_janus_run])
def test_a_choice_is_one_of_a_view_and_a_caption(tiny_world, tmp_path, run):
    """Of stored features, and of captions that are prepared for each batch."""
    write_dataset(tmp_path / "data", 12, size=32)
    rows = read_json_lines(tmp_path / "data" / "metadata.jsonl")
    lines = [json.dumps(row | {"text": [row["text"], "a photo of a ring"]}) for row in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    own = {"data__source": str(tmp_path / "data"), "data__cache_dir": tmp_path / "cache"}
    config = run(tiny_world, "-", **own, data__views="flip")
    data = TrainingData(config, build_model(config).backbone, ALONE)
    loaded = [data.load(torch.tensor([3]), torch.tensor([choice])) for choice in range(4)]
    codes, prepared = ([str(part) for part in parts] for parts in zip(*loaded, strict=True))
    assert codes[0] == codes[2] != codes[1] == codes[3], "two views"
    assert prepared[0] == prepared[1] != prepared[2] == prepared[3], "two captions"


def test_the_held_out_samples_are_the_same_on_any_number_of_processes(tiny_world, plain):
    """A run may be resumed on more processes than there are held-out samples."""
    config = tiny_run(tiny_world, "-", engine__micro_batch=1, data__validation_samples=None)
    backbone = t2i.load_backbone("llamagen", tiny_world / "base")
    one, *ranks = (
        TrainingData(config, backbone, processes)
        for processes in (ALONE, *(Processes(r, 16) for r in range(16)))
    )
    assert all(data.plan == one.plan and torch.equal(data.train, one.train) for data in ranks)
    assert one.plan.held_out == len(one.validation) == 8
    batches = [list(data.validation_batches()) for data in ranks]
    assert all(len(batches_of_rank) == 1 for batches_of_rank in batches)
    keys = [int(batch.keys) for (batch, counted), *_ in batches if counted]
    assert keys == [int(batch.keys) for batch, _ in one.validation_batches()]


def test_the_plan_counts_what_is_really_held_out(tiny_world, tmp_path):
    """Three pictures have twenty captions each: all twenty captions of one picture are held out."""
    write_dataset(tmp_path / "data", 3, size=32)
    rows = read_json_lines(tmp_path / "data" / "metadata.jsonl")
    lines = [json.dumps(row | {"text": f"{row['text']} {i}"}) for i in range(20) for row in rows]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    own = {"data__source": str(tmp_path / "data"), "data__cache_dir": tmp_path / "cache"}
    config = tiny_run(tiny_world, "-", steps=None, **own, data__validation_samples=None)
    data = TrainingData(config, t2i.load_backbone("llamagen", tiny_world / "base"), ALONE)
    plan = data.plan
    assert (plan.samples, plan.held_out, plan.training) == (60, 20, 40)
    assert len(data.train) == 40 and plan.steps == 20 * 40 / 16


def test_images_are_encoded_as_the_options_say(tiny_world, tmp_path):
    backbone = t2i.load_backbone("llamagen", tiny_world / "base")
    for small, views in (("skip", "centre"), ("upscale", "flip")):
        own = {"small_images": small, "views": views, "max_samples": 8, "cache_dir": tmp_path}
        config = tiny_run(
            tiny_world, "-", **{f"data__{name}": value for name, value in own.items()}
        )
        key = encode_examples(config, backbone, ALONE).manifest["key"]
        assert (key["images"]["small_images"], key["images"]["views"]["kind"]) == (small, views)
        assert key["max_samples"] == 8


def test_another_tokenizer_gets_another_cache(tiny_world, plain, tmp_path):
    config = tiny_run(tiny_world, "-", data__cache_dir=tmp_path / "cache", data__max_samples=16)

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


def test_codes_of_another_tokenizer_are_noticed(tmp_path, caplog):
    """It fits, so that nothing but the loss shows that it is not the base's own."""
    base = tmp_path / "base"
    shutil.copytree(Path(t2i.__file__).parent / "assets" / "shapes", base)
    options = {"data.source": "shapes:40", "data.cache_dir": tmp_path / "cache", "steps": 1}
    options |= {"batch_size": 4, "engine.micro_batch": 4, "data.validation_samples": 8}
    options |= {"backbone.weights": str(base), "log.sample_every": 0}

    def said(name: str) -> str:
        caplog.clear()
        train(t2i.recipe("shapes-control", options | {"run_dir": tmp_path / name}))
        return caplog.text

    assert "guessing" not in said("own")
    tokenizer = {name: value.clone() for name, value in read_state_dict(base / "vq.pt").items()}
    tokenizer["quantize.embedding.weight"] = tokenizer["quantize.embedding.weight"].flip(0)
    torch.save(tokenizer, base / "vq.pt")
    assert "guessing has 6.93: do these weights and this image tokenizer belong" in said("other")


def test_validation(tiny_world, plain):
    model = t2i.from_pretrained(plain).train()
    config = tiny_run(tiny_world, "-")
    losses = []
    for size in (4, 8):
        resized = replace(config, engine=replace(config.engine, micro_batch=size))
        losses.append(validate(model, TrainingData(resized, model.backbone, ALONE)))
    assert model.training, "validation restores the mode"
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
def test_a_run_writes_its_page(tiny_world):
    options = {"log__sample_every": 2, "log__validate_every": 2, "log__log_every": 2}
    train(tiny_run(tiny_world, "page", steps=5, batch_size=4, **options))
    run_dir = tiny_world / "runs" / "page"
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all("validation/own_drafts/slot2" in row for row in rows)
    sheets = sorted(p.name for p in (run_dir / "samples").iterdir())
    assert sheets == ["step_000002.png", "step_000004.png", "step_000005.png"]
    page = (run_dir / "index.html").read_text()
    both = (">own_drafts/slot0", ">noised_truth/slot0")
    assert page.count(">slot") == 3 + 2 * 2 and all(name in page for name in (*sheets, *both))
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 5


def test_a_first_look(tiny_world):
    """With `log.at_start`, losses and a sheet show the model before it learns anything."""
    options = {"log__at_start": True, "log__sample_every": 5, "log__log_every": 5}
    train(tiny_run(tiny_world, "first-look", steps=1, batch_size=4, **options))
    run_dir = tiny_world / "runs" / "first-look"
    before, after = (row["validation/own_drafts/slot0"] for row in read_metrics(run_dir))
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1] and before != after
    sheets = sorted(p.name for p in (run_dir / "samples").iterdir())
    assert sheets == ["step_000000.png", "step_000001.png"]
    assert all(name in (run_dir / "index.html").read_text() for name in sheets)

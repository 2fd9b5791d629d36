"""Cases 21, 22, 23: recipes that follow the run's length, controls and small-data recipes, and a
pre-flight that looks at data first.

Also what the pre-flight warns of (cases 14 and 28), and the first hour of docs/first_hour.md on the
offline base.
"""

import json
import shutil
import sys
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import torch
from runs import tiny_run

from geneval import run as geneval_run
from launch import export as export_program
from launch import generate as draw_program
from launch import train_llamagen
from t2i import cli
from t2i.errors import UserError
from t2i.models.families import find_family
from t2i.models.janus import janus_recipes
from t2i.models.llamagen import llamagen_recipes
from t2i.models.open_magvit2 import open_magvit2_recipes
from t2i.models.rar import rar_recipes
from t2i.shapes.shapes_source import write_dataset
from t2i.tensorar import presets
from t2i.training import loop
from t2i.training.check import check
from t2i.training.config import DataOptions, LogOptions, OptimOptions, TrainConfig
from t2i.training.engine import deepspeed_config
from t2i.training.examples import open_data
from t2i.training.logs import read_metrics
from t2i.training.loop import train
from t2i.training.memory import _condition, estimate
from t2i.training.plan import about_settings, peak_rates, plan_run
from t2i.training.recipes import OWN_PICTURES
from t2i.training.start import build_model

FAMILIES_RECIPES = (llamagen_recipes, janus_recipes, open_magvit2_recipes, rar_recipes)
ALL = {name: recipe[1] for family in FAMILIES_RECIPES for name, recipe in family.recipes().items()}
REAL = [name for name in ALL if "shapes" not in name]


# -- recipes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["shapes-tuned", "shapes-control"])
def test_the_quickstarts_numbers_are_what_they_were(name):
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


def test_2000_pictures_with_the_xl_recipe():
    """Case 21: 13 % were held out, 100 of 136 steps warmed up, and nothing was written before the
    end.
    """
    plan = plan_run(config := ALL["t2i-xl-256-tuned"], 2000)
    assert plan.held_out == 80 and plan.steps == 150 and plan.warmup_steps == 4
    assert (plan.validate_every, plan.sample_every, plan.save_every) == (15, 15, 30)
    peaks = peak_rates(config, plan)
    assert peaks["codec"][0] > 0.95 * config.optim.codec_lr and config.log.at_start
    assert list(about_settings(config, plan)) == []


@pytest.mark.parametrize(
    ("samples", "held_out"), [(5, 1), (12, 2), (60, 8), (2000, 80), (100_000, 256)]
)
def test_held_out_share(samples, held_out):
    assert plan_run(ALL["t2i-xl-256-tuned"], samples).held_out == held_out


def test_numbers_that_are_given_stay():
    data = DataOptions(source="x", validation_samples=7)
    log = LogOptions(save_every=0, validate_every=0, sample_every=3, log_every=2)
    config = TrainConfig(data=data, log=log, steps=5000, optim=OptimOptions(warmup_steps=9))
    plan = plan_run(config, 100)
    assert (plan.held_out, plan.warmup_steps, plan.steps) == (7, 9, 5000)
    assert (plan.save_every, plan.validate_every, plan.sample_every, plan.log_every) == (0, 0, 3, 2)
    with pytest.raises(UserError, match="fewer than the 7 usable samples"):
        plan_run(config, 7)
    assert plan_run(replace(config, steps=None), None) is None


def test_every_family_has_its_control_and_the_recommended_recipe():
    """Case 22: XL and Janus had no control, and the README's recipe was one that loses to it."""
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
def test_recipes_have_nothing_to_warn_of(name):
    assert list(about_settings(ALL[name], plan_run(ALL[name], 2000))) == []


# -- warnings --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": OptimOptions(warmup_steps=100)}, "codec's rate gets to 38% of optim.codec_lr"),
        ({"optim": OptimOptions(warmup_steps=150)}, "no less than the 150 steps"),
        ({"optim": OptimOptions(backbone_delay_steps=150)}, "backbone's rate gets to 0%"),
        ({"tuning": "lora"}, "unusual for adapters"),
        ({"optim": OptimOptions(backbone_lr=0.1)}, "far above what fine-tuning"),
        ({"optim": OptimOptions(codec_lr=0.1)}, "codec_lr=0.1 is far above"),
        ({"log": LogOptions()}, "no checkpoint before the last of 150 steps"),
        ({"log": LogOptions(validate_every=0, sample_every=0)}, "no sample sheet and no valid"),
        ({"steps": 5}, "5 steps of 256 see only 1280 of the 1920"),
        ({"batch_size": 2048}, "more than the 1920 training samples"),
        ({"data": DataOptions(validation_samples=260)}, "13% of the data are held out"),
        ({"steps": 600}, "own drafts alone"),
    ],
)
def test_what_makes_no_sense_is_said(changes, words):
    """Cases 21, 28."""
    config = replace(ALL["t2i-xl-256-tuned"], **changes)
    found = list(about_settings(config, plan_run(config, 2000)))
    assert any(words in warning for warning in found), found


def test_a_warning_means_not_ready(tiny_world, tmp_path):
    """Cases 21, 28: the report says "ready" only if nothing is wrong."""
    quiet = tiny_run(tiny_world, "new", steps=4, data__validation_samples=None)
    assert check(quiet).endswith("ready: the same command without --check trains")
    wide = replace(quiet, method=replace(quiet.method, k=16))
    report = check(wide)
    assert "method.k=16 is beyond everything that was tried" in report
    assert "not ready, 1 warning:" in report.splitlines()[-1]


def test_captions_that_come_out_empty(tmp_path):
    """Case 14, in the pre-flight: also where the text encoder has yet to be fetched."""
    folder = write_dataset_of_captions(tmp_path, "一只红色的圆", count=12, size=256)
    data = DataOptions(source=str(folder))
    config = replace(ALL["t2i-xl-256-small-data"], data=data, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="12 caption has no text the encoder can read") as refused:
        check(config)
    assert "small-images" not in str(refused.value)
    (folder / "0.txt").write_text("a red circle", encoding="utf-8")
    (folder / "README.txt").write_text("mine")
    report = check(config)
    assert "11 of 12 samples looked at are skipped, caption has no text the encoder can" in report
    assert "1 left out, caption without image (README.txt)" in report
    assert "not ready" in report


def test_small_images_are_told_the_size(tmp_path):
    """Case 28."""
    folder = write_dataset_of_captions(tmp_path, "a red circle", count=3, size=96)
    data = DataOptions(source=str(folder))
    config = replace(ALL["t2i-xl-256-small-data"], data=data, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"needs 256; --data.small-images upscale"):
        check(config)


def write_dataset_of_captions(folder, caption: str, *, count: int, size: int):
    from PIL import Image

    (folder / "data").mkdir()
    for i in range(count):
        Image.new("RGB", (size, size), (i, 0, 0)).save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text(caption, encoding="utf-8")
    return folder / "data"


# -- the pre-flight's order, and what it needs -----------------------------------------------------
@pytest.fixture
def no_files(monkeypatch):
    """Fetching from the hub and reading weights fail."""

    def refuse(*arguments, **options):
        raise AssertionError(f"asked for {arguments}")

    import huggingface_hub

    import t2i.weights

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(t2i.weights, "load_file", refuse)


@pytest.mark.parametrize("look", [check, train])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": DataOptions()}, "no data: give --data.source"),
        ({"data": DataOptions(source="no/where/at/all")}, "does not exist"),
        (
            {"data": DataOptions(source="shapes:100", validation_samples=100)},
            "data.validation_samples=100 must be",
        ),
    ],
)
def test_data_come_before_the_model(look, changes, words, no_files, tmp_path):
    """Case 23: weights were fetched, and a data set encoded, before a missing source or an
    impossible split was named.
    """
    config = replace(ALL["t2i-xl-256-small-data"], run_dir=tmp_path / "run", **changes)
    with pytest.raises(UserError, match=words):
        look(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("look", [check, train])
def test_classes_come_before_the_model(look, no_files, tmp_path):
    """Case 23: images that do not lie in folders of classes are named before the model is fetched,
    in training too.
    """
    folder = write_dataset_of_captions(tmp_path, "a dog", count=2, size=8)
    config = ALL["rar-b"]
    data = replace(config.data, source=(str(folder),))
    with pytest.raises(UserError, match="one sub-folder per class and nothing else"):
        look(replace(config, data=data, run_dir=tmp_path / "run"))


def test_a_misspelt_local_name_comes_before_the_model(no_files, tmp_path):
    config = replace(ALL["t2i-xl-256-small-data"], data=DataOptions(source="shapes:100"))
    base = replace(config.backbone, tokenizer=str(tmp_path / "vq.pt"))
    for look in (check, train):
        with pytest.raises(UserError, match=r"vq.pt is not a file, a folder"):
            look(replace(config, backbone=base, run_dir=tmp_path / "run"))


@pytest.mark.parametrize("name", ["t2i-xl-256-small-data", "janus-pro-7b-small-data"])
def test_published_text_models_need_no_files(name, no_files, tmp_path):
    config = replace(
        ALL[name],
        data=DataOptions(source="shapes:200", small_images="upscale"),
        run_dir=tmp_path / "run",
    )
    report = check(config)
    assert "peak, and a tenth more" in report and "  work: " in report
    assert "sample sheet  at step 0 and every" in report


@pytest.mark.parametrize(
    ("name", "resolution"),
    [("llamagen-b-256", 256), ("llamagen-3b-384", 384), ("open-magvit2-b", 256), ("rar-b", 256)],
)
def test_published_class_models_need_no_files(name, resolution, no_files):
    model = build_model(ALL[name], device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model.backbone.image_size == (resolution, resolution)
    cost = estimate(model, ALL[name], world_size=8)
    assert cost.state < cost.total < 80e9, "micro-batches were chosen for 80 GB"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("llamagen-l-256", "L"), ("llamagen-xl-384", "XL"), ("llamagen-xxl-384", "XXL")),
        *(("open-magvit2-l", "L"), ("open-magvit2-xl", "XL")),
        *(("rar-l", "L"), ("rar-xl", "XL"), ("rar-xxl", "XXL")),
    ],
)
def test_the_other_published_sizes_have_an_outline(name, size, no_files):
    base = ALL[name].backbone
    family_class = find_family(base.family).backbone_class
    known = import_module(family_class.__module__).SIZES
    assert family_class.outline(base.weights).spec.dim == known[size]["dim"]


def test_outlines_have_the_shapes_of_real_files(backbone, tmp_path):
    if backbone.spec.family == "janus":
        pytest.skip("tests/test_janus_training.py compares it")
    outline = type(backbone).outline("unheard-of", config=backbone.config)
    shapes = {name: p.shape for name, p in outline.state_dict().items()}
    assert shapes == {name: p.shape for name, p in backbone.state_dict().items()}
    assert type(backbone).outline("unheard-of") is None


# -- memory ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_activations_are_what_autograd_keeps(tiny_world, tuning):
    config = tiny_run(tiny_world, "-", tuning=tuning)
    counted = estimate(build_model(config, device="meta"), config, world_size=1)
    model = build_model(config).train()
    batch, spec, kept = config.engine.micro_batch, model.backbone.spec, {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    codes = torch.zeros(batch, spec.num_tokens, 1, dtype=torch.long)
    prefix = torch.zeros(batch, spec.prefix_tokens, spec.dim, requires_grad=True)
    condition = replace(
        _condition(build_model(config, device="meta").backbone, batch),
        prefix=prefix,
        mask=torch.ones(batch, spec.prefix_tokens, dtype=torch.bool),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(codes, condition, model.windows.gather(codes)).weighted(model.config.weights())
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert counted.kept == pytest.approx(real, rel=0.1)


def test_what_changes_memory(tiny_world):
    def cost(**changes):
        config = tiny_run(tiny_world, "-", **changes)
        return estimate(build_model(config, device="meta"), config, world_size=1)

    plain = cost()
    assert cost(engine__gradient_checkpointing=True).kept < plain.kept
    assert cost(engine__gradient_checkpointing=True).flops > plain.flops
    assert cost(engine__micro_batch=8).kept == pytest.approx(2 * plain.kept, rel=0.05)
    assert cost(method__k=8).passing > 2 * plain.passing
    assert cost(method__own_drafts=1.0).flops == pytest.approx(4 / 3 * plain.flops)
    assert cost(tuning="lora").state < plain.state


# -- DeepSpeed's JSON ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overlap_com": True}, "zero_optimization.overlap_com; did you mean overlap_comm?"),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memry": True}},
            "zero_optimization.offload_optimizer.pin_memry; did you mean pin_memory?",
        ),
        ({"offload_param": {"device": "cpuu"}}, "zero_optimization.offload_param.device='cpuu'"),
        ({"zenflow": {"topk_ratioo": 0.1}}, "zenflow.topk_ratioo; did you mean topk_ratio?"),
        ({"offload_param": True}, "zero_optimization.offload_param=True"),
    ],
)
def test_misspelt_deepspeed_keys(settings, words, tmp_path):
    """Case 28: DeepSpeed's own reader passes them over, or fails after all is encoded."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": settings}))
    config = TrainConfig(engine=replace(TrainConfig().engine, deepspeed_config=path, zero_stage=3))
    with pytest.raises(UserError) as caught:
        deepspeed_config(config, 1)
    assert words in str(caught.value)
    path.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}')
    assert deepspeed_config(config, 1)["zero_optimization"]["offload_optimizer"]["ratio"] == 0.5


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


def test_triggers_reach_every_caption_and_the_caches_key():
    plain = open_data(DataOptions(source="shapes:3"))
    source = open_data(DataOptions(source="shapes:3", trigger="xyz"))
    assert source[1].captions == [f"xyz, {plain[1].captions[0]}"] == list(source)[1].captions
    assert source.identity != plain.identity and source.length == 3
    with pytest.raises(UserError, match="has no words"):
        DataOptions(trigger="{caption} ")


def test_a_trigger_hides_nothing_of_the_source(tmp_path):
    """Cases 10, 13: with trigger words, too, content is part of the key, and remarks are said."""
    for name in ("train", "bus"):
        write_dataset(tmp_path / name, 1)
    (tmp_path / "bus" / "gone.png").symlink_to("nowhere")
    plain, source = (
        open_data(DataOptions(source=str(tmp_path), trigger=trigger)) for trigger in (None, "xyz")
    )
    assert source.files() == plain.files() and len(source.files()) > 2
    assert source.remarks == plain.remarks != [] and source.left_out == plain.left_out != []


# -- the first hour --------------------------------------------------------------------------------
def test_the_first_hour_offline(tmp_path, monkeypatch, capsys):
    """Cases 9, 19, 21, 23: 30 own pictures -> --check -> train -> draw -> judge -> export, as
    docs/first_hour.md has it.
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
    from t2i.checkpoint import read_config, run_checkpoints

    assert [folder.name for folder in run_checkpoints(run)] == [f"step_00000{i}" for i in (1, 2, 3)]
    training = read_config(run_checkpoints(run)[-1])["training"]
    assert training["config"]["data"]["trigger"] == "drawn by xyz"

    for prompt in prompts[:2]:  # one after the other, into folders of their own
        enter(draw_program, "--ckpt", str(run), "--prompt", prompt, "--samples", "1")
    few = ["--limit", "1", "--samples", "1"]
    enter(geneval_run, "--ckpt", str(run), *few)
    enter(export_program, "--ckpt", str(run), "--out", "exported/mine")
    shutil.rmtree(run)
    assert "judged by shapes" in enter(geneval_run, "--ckpt", "exported/mine", *few)
    drawn = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert len(drawn) == 3 and all("small-data-step_000003" in name for name in drawn[1:])
    judged = sorted(path.name for path in (tmp_path / "outputs" / "geneval").iterdir())
    assert judged == ["mine", "shapes-small-data-step_000003"]


def test_given_prompts_get_the_trigger_and_the_base_is_looked_at_once(tiny_world):
    log = replace(OWN_PICTURES, prompts=("a photo of two squares",), save_every=0)
    config = replace(tiny_run(tiny_world, "looked", steps=2, data__trigger="red"), log=log)
    run = loop.Run(config)
    run.first_look()  # and then the process is killed
    train(replace(config, resume=True))
    assert [row["step"] for row in read_metrics(config.run_dir)] == [0, 1, 2]
    stored = json.loads((config.run_dir / "config.json").read_text())
    assert stored["sheet_prompts"] == ["red, a photo of two squares"]

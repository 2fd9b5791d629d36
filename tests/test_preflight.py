"""Cases 14, 21, 23, 28: --check examines data first, needs no files, and says what a run costs and
what is wrong.
"""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import rare
from runs import tiny_run
from test_recipes import ALL

from t2i.errors import UserError
from t2i.models.base import LoadOptions
from t2i.models.families import find_family
from t2i.rehearsal.rehearsal_report import predictions
from t2i.training.check import check
from t2i.training.config import DataOptions, TrainConfig
from t2i.training.engine import deepspeed_config
from t2i.training.loop import train
from t2i.training.memory import estimate
from t2i.training.start import build_model


def test_a_warning_means_not_ready(tiny_world, tmp_path):
    """Cases 21, 28: the report says "ready" only if there are no warnings."""
    quiet = tiny_run(tiny_world, "new", steps=4, data__validation_samples=None)
    assert check(quiet).endswith("ready: the same command without --check trains")
    wide = replace(quiet, method=replace(quiet.method, k=16))
    report = check(wide)
    assert "method.k=16 is beyond every window tried so far" in report
    assert "not ready, 1 warning:" in report.splitlines()[-1]


def test_training_gives_the_same_warnings_of_its_settings_once(tiny_world, caplog):
    config = tiny_run(tiny_world, "warned", steps=2, optim__warmup_steps=9)
    text = "optim.warmup_steps=9 is not below the 2 steps of the run: no rate reaches its peak"
    assert text in check(config)
    train(config)
    assert caplog.messages.count(text) == 1
    caplog.clear()
    train(replace(config, steps=3, resume=True))
    assert text not in caplog.messages


def test_captions_that_come_out_empty(tmp_path, monkeypatch):
    """Case 14: --check reports them, even if the text encoder has yet to be fetched."""
    # It takes seconds, and has its own tests.
    monkeypatch.setattr("t2i.training.check.size_report", lambda *_: ({}, []))
    folder = write_dataset_of_captions(tmp_path, "一只红色的圆", count=12, size=256)
    data = DataOptions(source=str(folder))
    config = replace(ALL["t2i-xl-256-small-data"], data=data, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="12 caption has no text the encoder can read") as refused:
        check(config)
    assert "small-images" not in str(refused.value)
    (folder / "0.txt").write_text("a red circle", encoding="utf-8")
    (folder / "README.txt").write_text("mine")
    report = check(config)
    assert "11 of 12 checked samples are skipped, caption has no text the encoder can" in report
    assert "1 left out, caption without image (README.txt)" in report
    assert report.endswith("without --check would end at once")
    (folder / "1.txt").write_text("a circle left of a square")
    report = check(replace(config, data=replace(data, views="flip"), epochs=40))
    assert "1 captions of the checked samples say left or right ('a circle left of a" in report
    assert "will overfit" in report and "steps hardly change adapters" in report
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


def test_another_split_is_no_reason_to_warn(tiny_world, tmp_path):
    """--check used to say "not ready" of any folder with train and val."""
    folder = write_dataset_of_captions(tmp_path, "a red circle", count=4, size=32)
    for name in ("train", "val"):
        shutil.copytree(folder, tmp_path / "set" / name)
    data = {"data__source": str(tmp_path / "set"), "data__validation_samples": None}
    report = check(tiny_run(tiny_world, "splits", steps=4, **data))
    assert "1 not of the split train (val/ (4 files))" in report
    assert "left out" not in report


def test_skipped_samples_are_not_counted(tiny_world, tmp_path):
    """All samples of a small folder are checked, but the plan used to count the skipped ones."""
    folder = write_dataset_of_captions(tmp_path, "a red circle", count=10, size=32)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"")
    own = {"data__source": str(folder), "data__validation_samples": 2}
    said = check(tiny_run(tiny_world, "skipped", **own))
    assert "4 empty (0.png, 1.png, 2.png, and 1 more)" in said
    assert "2 of 6 samples held out" in said and "over 4 training samples" in said


def test_samples_beyond_the_limit_are_not_checked(tiny_world, tmp_path):
    """Case 28: broken samples beyond max_samples, which the run does not use, used to make it "not
    ready".
    """
    folder = write_dataset_of_captions(tmp_path, "a red circle", count=10, size=32)
    for i in range(6, 10):
        (folder / f"{i}.png").write_bytes(b"")
    own = {"data__source": str(folder), "data__validation_samples": 2}
    said = check(tiny_run(tiny_world, "bounded", **own, data__max_samples=5))
    assert "checked       5 of them: nothing skipped" in said and "empty" not in said


# -- the pre-flight's order, and what it needs -----------------------------------------------------
@pytest.fixture
def no_files(monkeypatch):
    """Makes fetching from the hub and reading weights fail."""

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
    """Case 23: weights used to be fetched, and a data set encoded, before a missing source or an
    impossible split was reported.
    """
    config = replace(ALL["t2i-xl-256-small-data"], run_dir=tmp_path / "run", **changes)
    with pytest.raises(UserError, match=words):
        look(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("look", [check, train])
def test_classes_come_before_the_model(look, no_files, tmp_path):
    """Case 23: images that are not in class folders are reported before the model is fetched, in
    training too.
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


@pytest.mark.parametrize("name", ["t2i-xl-256-small-data", rare("janus-pro-7b-small-data")])
def test_published_text_models_need_no_files(name, no_files, tmp_path):
    config = replace(
        ALL[name],
        data=DataOptions(source="shapes:200", small_images="upscale"),
        run_dir=tmp_path / "run",
    )
    report = check(config)
    assert "peak, plus 10 %" in report and "  work: " in report
    read = predictions(report)  # by a rehearsal, which must find every line
    assert len(read) == 11
    assert "  a checkpoint  " in report and " of training state" in report
    assert "sample sheet  at step 0 and every" in report


@pytest.mark.parametrize(
    ("name", "resolution"),
    [
        *(("llamagen-b-256", 256), rare("llamagen-3b-384", 384)),
        *(("open-magvit2-b", 256), ("rar-b", 256)),
    ],
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
def test_every_published_size_has_its_shapes(name, size, no_files):
    base = ALL[name].backbone
    family_class = find_family(base.family).backbone_class
    known = import_module(family_class.__module__).SIZES
    assert family_class.outline(base.weights).spec.dim == known[size]["dim"]


def test_expected_shapes_match_real_files(backbone, tmp_path):
    if backbone.spec.family == "janus":
        pytest.skip("tests/test_janus_training.py compares it")
    outline = type(backbone).outline("unheard-of", LoadOptions(config=backbone.config))
    shapes = {name: p.shape for name, p in outline.state_dict().items()}
    assert shapes == {name: p.shape for name, p in backbone.state_dict().items()}
    assert type(backbone).outline("unheard-of") is None


def test_expected_shapes_of_janus(no_files):
    janus = find_family("janus").backbone_class
    with torch.device("meta"):
        small = janus.outline("deepseek-ai/Janus-Pro-1B", LoadOptions(grid=(8, 6)))
        assert janus.outline("someone/janus-of-mine") is None
    assert (small.spec.dim, small.spec.grid) == (2048, (8, 6))


def test_the_report_says_whether_a_rate_falls(tiny_world):
    for falls, course in ((False, "then stays"), (True, "then falls to 0 at the end")):
        report = check(tiny_run(tiny_world, "new", steps=4, optim__backbone_falls=falls))
        rate = next(line for line in report.splitlines() if "backbone rate" in line)
        assert rate.endswith(course)


# -- DeepSpeed's JSON ------------------------------------------------------------------------------
def test_the_kits_own_deepspeed_file_is_found_from_any_folder(tmp_path, monkeypatch):
    """It is found by the name that the docs use; a local file of that name has precedence."""
    monkeypatch.chdir(tmp_path)
    path = Path("launch/zero3_offload.json")
    config = TrainConfig(engine=replace(TrainConfig().engine, deepspeed_config=path, zero_stage=3))
    assert "offload_param" in deepspeed_config(config, 1)["zero_optimization"]
    path.parent.mkdir()
    path.write_text("{}")
    assert deepspeed_config(config, 1)["zero_optimization"] == {"stage": 3}


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
        ({"offload_param": {"device": "nvme"}}, "offload_param to nvme needs an nvme_path"),
        ({"stage": "3"}, "is for ZeRO stage '3', but engine.zero_stage is 3"),
    ],
)
def test_misspelt_deepspeed_keys(settings, words, tmp_path):
    """Case 28: DeepSpeed's own reader ignores them, or fails after all data are encoded."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": settings}))
    config = TrainConfig(engine=replace(TrainConfig().engine, deepspeed_config=path, zero_stage=3))
    with pytest.raises(UserError) as caught:
        deepspeed_config(config, 1)
    assert words in str(caught.value)
    path.write_text('{"zero_optimization": {"reduce_bucket_size": "auto"}}')
    assert deepspeed_config(config, 1)["zero_optimization"] == {"stage": 3}
    path.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}')
    assert deepspeed_config(config, 1)["zero_optimization"]["offload_optimizer"]["ratio"] == 0.5


def test_files_of_other_trainers_leave_settings_open(tmp_path):
    """As in the files that transformers' documentation gives: "auto" is the trainer's own value."""
    path = tmp_path / "zero.json"
    config = TrainConfig(engine=replace(TrainConfig().engine, deepspeed_config=path, zero_stage=3))
    part = {"enabled": "auto", "loss_scale": 0}
    content = {"bf16": {"enabled": "auto"}, "fp16": part, "train_batch_size": "auto"}
    zero = {"stage": 3, "overlap_comm": True}
    path.write_text(json.dumps(content | {"zero_optimization": zero}))
    assert deepspeed_config(config, 1)["zero_optimization"] == zero
    fixed = {"fp16": part | {"enabled": True}, "optimizer": {"type": "AdamW"}, "steps_per_print": 9}
    path.write_text(json.dumps(content | fixed))
    with pytest.raises(UserError, match="sets fp16, optimizer, steps_per_print; only zero_opt"):
        deepspeed_config(config, 1)


@pytest.mark.parametrize(("name", "stage"), [("offload_optimizer", 0), ("offload_param", 2)])
def test_offloading_that_would_not_happen(name, stage, tmp_path):
    """DeepSpeed passes over it at such a stage, and the memory is not saved."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {name: {"device": "cpu"}}}))
    engine = replace(TrainConfig().engine, deepspeed_config=path, zero_stage=stage)
    config = TrainConfig(engine=engine)
    with pytest.raises(UserError, match=f"{name} has no effect with engine.zero_stage={stage}"):
        deepspeed_config(config, 1)
    path.write_text(json.dumps({"zero_optimization": {name: {"device": "auto"}}}))
    deepspeed_config(config, 1)  # DeepSpeed's default: no offloading


def test_nvme_at_a_stage_that_would_use_the_cpu(tmp_path):
    path = tmp_path / "zero.json"
    nvme = {"device": "nvme", "nvme_path": "/nvme"}
    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": nvme}}))
    engine = replace(TrainConfig().engine, deepspeed_config=path, zero_stage=2)
    with pytest.raises(UserError, match=r"offload_optimizer to nvme needs --engine.zero-stage 3"):
        deepspeed_config(TrainConfig(engine=engine), 1)

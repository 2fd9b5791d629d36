"""Mistakes around the folder of a run: a place that is not its own, checkpoints under other names,
links that lead nowhere, options that would do nothing.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import edited, folder_content
from runs import tiny_reward_run, tiny_run

import t2i
from t2i.errors import UserError
from t2i.evaluation.draw import generation_settings, request_hash
from t2i.evaluation.places import GenerationFolder
from t2i.files import json_sha256, replacing_folder
from t2i.manifest import refuse_in_checkpoint, write_manifest
from t2i.reward.reward_run import RewardRun
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar.method import TensorARConfig
from t2i.training.check import check
from t2i.training.loop import train
from t2i.training.recipes import recipe


def rewrite(folder: Path, **facts) -> None:
    """Change what a checkpoint says of its run, and its manifest with it; None removes."""
    with edited(folder / "config.json") as config:
        known = config["training"] | facts
        config["training"] = {k: v for k, v in known.items() if v is not None}
    (folder / "manifest.json").unlink()
    write_manifest(folder)


# -- checkpoints -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"step": "3"}, r"training\.step is '3'"),
        ({"step": None}, r"training\.step is None"),
        ({"data_key": None}, r"training\.data_key is None"),
        ({"config": []}, r"training\.config is \[\]"),
        ({"state": [1]}, r"training\.state is \[1\]"),
        ({"step": -5}, r"training\.step is -5"),
    ],
)
def test_a_checkpoint_that_says_nothing_of_its_run(plain, copied, tiny_world, facts, named):
    """Tracebacks; and a run that began at step -5."""
    folder = copied(plain, f"says-{named.strip('^')[-9:-3]}-{len(named)}")
    rewrite(folder, **facts)
    with pytest.raises(UserError, match=named):
        train(tiny_run(tiny_world, folder.parents[1].name, resume=True))
    t2i.from_pretrained(folder)  # a model all the same


def test_a_checkpoint_under_another_name_is_not_gone_on_from(plain, copied, tiny_world):
    """It stayed the newest by its name: what was trained after it was not found, and deleted."""
    folder = copied(plain)
    folder.rename(folder.with_name("step_000010"))
    config = tiny_run(tiny_world, folder.parents[1].name, steps=4, resume=True)
    for start in (train, check):
        with pytest.raises(UserError, match="saved after step 3: rename it to step_000003"):
            start(config)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tiny_world, monkeypatch, caplog
):
    """On NFS, while another program reads it: "Directory not empty"."""

    def busy(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(folder))

    monkeypatch.setattr(shutil, "rmtree", busy)
    config = tiny_run(tiny_world, "busy", log__save_every=1, log__keep_best=False)
    folder = train(replace(config, log=replace(config.log, keep_last=1)))
    assert folder.name == "step_000003" and "cannot be deleted (" in caplog.text


@pytest.mark.parametrize(
    "facts", [{"best_loss": float("nan")}, {"data_key": "other", "best_loss": -1.0}]
)
def test_a_best_model_that_is_none_of_the_runs_is_replaced(plain, copied, tiny_world, facts):
    """NaN is lower than nothing, and so stayed the best for good."""
    run_dir = copied(plain, f"best-{'-'.join(facts)}").parents[1]
    rewrite(run_dir / "best", **facts)
    train(tiny_run(tiny_world, run_dir.name, steps=4, resume=True))
    assert json.loads((run_dir / "best" / "config.json").read_text())["training"]["step"] == 4


def test_a_run_that_held_out_others_is_refused(plain, copied, tiny_world, monkeypatch):
    """Of an older version, whose number depended on the processes."""
    run_dir = copied(plain).parents[1]
    with edited(run_dir / "config.json") as config:
        config["plan"]["held_out"] = 12
    config = tiny_run(tiny_world, run_dir.name, steps=4, resume=True)
    with pytest.raises(UserError, match="it held out 12 samples, but now 9 would be held out"):
        train(config)
    # The least number was recorded once, where images with several captions made it more.
    monkeypatch.setattr("t2i.training.run_state.least_held_out", lambda *_: 12)
    train(config)


def test_without_permission_the_folder_is_named(plain, monkeypatch):
    """PermissionError, as root never sees it; and an unreadable checkpoints/ counted as none."""
    stat = Path.stat

    def forbidden(path, **options):
        if plain.name in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", forbidden)
    for folder in (plain, plain.parents[1]):
        with pytest.raises(UserError, match=r"cannot be read: Permission denied"):
            t2i.from_pretrained(folder)
    monkeypatch.setattr(Path, "stat", stat)

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", closed)
    with pytest.raises(UserError, match=r"checkpoints cannot be read: Permission denied"):
        t2i.from_pretrained(plain.parents[1])


def test_a_folder_in_place_of_the_metrics_is_named(plain, copied, tiny_world):
    run_dir = copied(plain).parents[1]
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read: Is a directory"):
        train(tiny_run(tiny_world, run_dir.name, steps=4, resume=True))


# -- places ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("resume", [False, True])
def test_a_link_that_leads_nowhere_is_no_place(tiny_world, plain, copied, tmp_path, resume):
    """A disk that is not mounted: the run trained to its end, and then could not save."""
    run_dir = copied(plain, f"link-{resume}").parents[1]
    shutil.rmtree(run_dir / "checkpoints")
    if not resume:
        (run_dir / "metrics.jsonl").unlink()
    (run_dir / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"checkpoints is a link to .*gone, which does not exist"):
        train(tiny_run(tiny_world, run_dir.name, resume=resume))


@pytest.mark.parametrize("inside", ["best/other", "checkpoints", "checkpoints/step_000003/x"])
def test_nothing_is_written_where_a_run_keeps_its_own(plain, copied, tiny_world, inside):
    """It went with the folder, at the next better model or the next checkpoint but one."""
    place = copied(plain, f"inside-{len(inside)}").parents[1] / inside
    before = folder_content(place.parent)
    for config in (
        tiny_run(tiny_world, str(place)),
        tiny_run(tiny_world, "cache-inside", data__cache_dir=place),
    ):
        for start in (train, check):
            with pytest.raises(UserError, match=r"lies in .*, where a training run keeps"):
                start(config)
    with pytest.raises(UserError, match=r"lies in .*, where a training run keeps"):
        GenerationFolder(place, [{"prompt": "a"}]).check({})
    assert folder_content(place.parent) == before


def test_a_project_of_others_is_a_place(plain, tmp_path):
    """Files of these names are common; and a checkpoint copied elsewhere is its owner's."""
    for name in ("manifest.json", "config.json"):
        (tmp_path / name).write_text("{}")
    refuse_in_checkpoint(tmp_path / "runs" / "mine", "run_dir")
    refuse_in_checkpoint(shutil.copytree(plain, tmp_path / "copy") / "images", "--out")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuse_in_checkpoint(tmp_path / "loop" / "x", "--out")  # said elsewhere


@pytest.mark.parametrize("name", ["config.json", "best/mine.txt", "checkpoints/mine.txt"])
def test_a_run_takes_no_folder_of_others(tiny_world, tmp_path, name):
    """`--run-dir` of a backbone folder: its config.json was overwritten; a folder of one's own that
    is named best was deleted.
    """
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"family": "llamagen"}')
    for resume in (False, True):
        for start in (train, check):
            with pytest.raises(UserError, match=f"holds {name.split('/')[0]}, which a run would"):
                start(tiny_run(tiny_world, str(tmp_path), resume=resume))
    assert (tmp_path / name).read_text() == '{"family": "llamagen"}'


def test_replacing_a_folder_leaves_what_people_named_so(tmp_path):
    """`model.old` beside `--out model`, or `best.old` in a run, were deleted."""
    for name in ("model.old", "model.partial", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "model").symlink_to("elsewhere")
    for _ in range(2):  # a link was set aside, and stood in the way the next time
        with replacing_folder(tmp_path / "model") as partial:
            (partial / "file").touch()
    assert sorted(folder_content(tmp_path)) == [
        *("elsewhere/mine", "model.old/mine", "model.partial/mine", "model/file"),
    ]


# -- options ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", [{"grid": (4, 4)}, {"text_encoder_dtype": "bfloat16"}])
def test_what_a_checkpoint_says_itself_is_not_said_beside_it(plain, option):
    """It was not read, without a word. What a recipe says of published bases is nobody's wish."""
    start = {"backbone.weights": str(plain)}
    assert recipe("t2i-xl-256-small-data", start).backbone.text_encoder_dtype == "bfloat16"
    (name, value), *_ = option.items()
    with pytest.raises(UserError, match=rf"backbone\.{name}=.* which has its own; leave it out"):
        recipe("shapes-control", start | {f"backbone.{name}": value})


def test_a_recipe_of_another_family_is_refused(plain, tiny_world):
    config = tiny_run(tiny_world, "beside", backbone__weights=str(plain), backbone__family="rar")
    for start in (train, check):
        with pytest.raises(UserError, match=r"is of the family llamagen: use a recipe"):
            start(config)


def test_a_reward_run_is_held_to_its_own_start(plain, copied, tiny_world, tmp_path):
    """The distance to the start was measured from another model, if another was named."""
    other = copied(plain).parents[1]
    with edited(other / "checkpoints" / plain.name / "manifest.json") as manifest:
        manifest["files"]["codec.safetensors"]["sha256"] = None
    base = tiny_reward_run(tiny_world, "held", backbone__weights=str(plain), steps=1)
    folder = train(base, RewardRun)
    stored = json.loads((folder / "config.json").read_text())["training"]["start"]
    assert stored["weights"] == str(plain)
    on = replace(base, steps=2, resume=True)
    elsewhere = replace(base.backbone, weights=str(other))
    with pytest.raises(UserError, match=f"that it began with .{plain}"):
        train(replace(on, backbone=elsewhere), RewardRun)
    moved = shutil.copytree(plain, tmp_path / "moved")
    train(replace(on, backbone=replace(base.backbone, weights=str(moved))), RewardRun)


# -- weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_that_are_no_weights_are_refused(tiny_world, tmp_path, dtype):
    """Quantised weights without their scales were taken as they were: a model of noise."""
    base = shutil.copytree(tiny_world / "base", tmp_path / "base")
    path = base / json.loads((base / "config.json").read_text())["weights"]
    content = torch.load(path, weights_only=True)
    state = content.get("model", content)
    torch.save({name: value.to(dtype) for name, value in state.items()}, path)
    with pytest.raises(UserError, match=f"not floating-point .*{dtype}"):
        t2i.load_backbone("llamagen", base)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_rslora", True), ("alpha_pattern", {".*": 64}), ("lora_alpha", None)],
)
def test_adapters_that_work_otherwise_are_refused(tiny_world, setting, value):
    """They were applied as if the setting was not there."""
    name = f"adapters-{setting}"
    folder = train(tiny_run(tiny_world, name, tuning="lora", lora__rank=2, steps=1))
    with edited(folder / "adapter" / "adapter_config.json") as config:
        config[setting] = value
        if value is None:
            del config[setting]
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(UserError, match=f"adapter_config.json.*{setting}"):
        t2i.from_pretrained(folder)


def test_images_depend_on_what_weights_do_not_show_of_the_method(plain):
    """Models with the same weights and another schedule drew into one folder, renoised."""
    model, own = t2i.from_pretrained(plain), SamplingConfig()

    def named(sampling: SamplingConfig, **method) -> str:
        model.config = replace(TensorARConfig(k=3), **method)
        return request_hash(model, [{"prompt": "a"}], DrawOptions(sampling=sampling))

    renoised = replace(own, renoise=0.5)
    assert named(own) == named(own, schedule="linear") != named(own, residual="all")
    assert named(renoised) != named(renoised, schedule="linear")
    model.config = TensorARConfig(k=3)
    settings = generation_settings(model, [{"prompt": "a"}], DrawOptions(sampling=own))
    names = ("prompts", "seed", "sampling", "noise", "dtype", "weights")  # of before
    assert named(own) == json_sha256({name: settings[name] for name in names})[:8]


def test_a_home_folder_is_named(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"perhaps you meant {tmp_path}/run"):
        t2i.from_pretrained("~/run")

"""Mistakes with a run's folder: places that belong to something else, renamed checkpoints, dangling
links; and options that would do nothing.
"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers import edited, folder_content
from runs import tiny_reward_run, tiny_run

import t2i
from t2i.errors import UserError
from t2i.evaluation.draw import PromptRequest
from t2i.evaluation.places import GenerationFolder
from t2i.export_folder import export
from t2i.files import json_sha256, replacing_folder
from t2i.manifest import refuse_in_checkpoint, write_manifest
from t2i.model_options import ExportOptions
from t2i.reward.reward_run import RewardRun
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar.method import TensorARConfig
from t2i.training.check import check
from t2i.training.config import TrainConfig
from t2i.training.loop import train
from t2i.training.recipes import recipe


def rewrite(folder: Path, **facts) -> None:
    """Change facts in the config.json of a checkpoint, and update its manifest; None removes a
    fact.
    """
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
def test_a_checkpoint_without_facts_about_its_run_is_refused(
    plain, copied, tiny_world, facts, named
):
    """These used to end in tracebacks, or in a run that began at step -5."""
    folder = copied(plain, f"says-{named.strip('^')[-9:-3]}-{len(named)}")
    rewrite(folder, **facts)
    with pytest.raises(UserError, match=named):
        train(tiny_run(tiny_world, folder.parents[1].name, resume=True))
    t2i.from_pretrained(folder)  # it still loads as a model


def test_a_run_without_checkpoints_is_named_as_such(plain, copied):
    """It was said not to name its family, or to lack a manifest.json."""
    folder = copied(plain, "unsaved").parents[1]
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "best", ignore_errors=True)
    for make in (lambda: None, (folder / "checkpoints").mkdir, (folder / "best").mkdir):
        make()
        with pytest.raises(UserError, match=r"a run and holds no checkpoint .yet.: give ") as found:
            t2i.load_model(folder)
        assert ("best model" in str(found.value)) == (folder / "best").is_dir()


def test_a_renamed_checkpoint_is_refused(plain, copied, tiny_world):
    """Renamed to a later step, it stayed the newest one: later work was not found, and was
    deleted.
    """
    folder = copied(plain)
    folder.rename(folder.with_name("step_000010"))
    config = tiny_run(tiny_world, folder.parents[1].name, steps=4, resume=True)
    for start in (train, check):
        with pytest.raises(UserError, match="saved after step 3: rename it to step_000003"):
            start(config)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tiny_world, monkeypatch, caplog
):
    """On NFS deleting fails with "Directory not empty" while another program reads the folder."""

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
def test_a_best_model_with_a_bad_loss_is_replaced(plain, copied, tiny_world, facts):
    """A best loss of NaN used to stay the best for good, since no loss is lower."""
    run_dir = copied(plain, f"best-{'-'.join(facts)}").parents[1]
    rewrite(run_dir / "best", **facts)
    train(tiny_run(tiny_world, run_dir.name, steps=4, resume=True))
    assert json.loads((run_dir / "best" / "config.json").read_text())["training"]["step"] == 4


def test_a_run_that_held_out_another_number_is_refused(plain, copied, tiny_world, monkeypatch):
    """In older versions the number of held-out samples depended on the number of processes."""
    run_dir = copied(plain).parents[1]
    with edited(run_dir / "config.json") as config:
        config["plan"]["held_out"] = 12
    config = tiny_run(tiny_world, run_dir.name, steps=4, resume=True)
    with pytest.raises(UserError, match="it held out 12 samples, but now 9 would be held out"):
        train(config)
    # Once the minimum was recorded, although images with several captions made it more.
    monkeypatch.setattr("t2i.training.run_state.least_held_out", lambda *_: 12)
    train(config)


def test_without_permission_the_folder_is_named(plain, monkeypatch):
    """A PermissionError, which root never gets, is simulated; an unreadable checkpoints/ used to
    count as empty.
    """
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
def test_a_dangling_link_is_refused_as_a_run_folder(tiny_world, plain, copied, tmp_path, resume):
    """With a link to a disk that is not mounted, a run used to train to its end and then fail to
    save.
    """
    run_dir = copied(plain, f"link-{resume}").parents[1]
    shutil.rmtree(run_dir / "checkpoints")
    if not resume:
        (run_dir / "metrics.jsonl").unlink()
    (run_dir / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"checkpoints is a link to .*gone, which does not exist"):
        train(tiny_run(tiny_world, run_dir.name, resume=resume))


@pytest.mark.parametrize("inside", ["best/other", "checkpoints", "checkpoints/step_000003/x"])
def test_no_output_into_the_folders_a_run_replaces(plain, copied, tiny_world, inside):
    """Such output used to be deleted with the folder, at the next better model or the next
    checkpoint but one.
    """
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
    with pytest.raises(UserError, match=r"--out .* lies in .*, where a training run keeps"):
        export(ExportOptions(plain, place / "new"))
    assert folder_content(place.parent) == before


def test_folders_of_other_projects_are_accepted(plain, tmp_path):
    """Files of these names are common in other projects; and a checkpoint copied elsewhere is its
    owner's.
    """
    for name in ("manifest.json", "config.json"):
        (tmp_path / name).write_text("{}")
    refuse_in_checkpoint(tmp_path / "runs" / "mine", "run_dir")
    refuse_in_checkpoint(shutil.copytree(plain, tmp_path / "copy") / "images", "--out")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuse_in_checkpoint(tmp_path / "loop" / "x", "--out")  # reported elsewhere


@pytest.mark.parametrize("name", ["config.json", "best/mine.txt", "checkpoints/mine.txt"])
def test_a_run_refuses_a_folder_in_other_use(tiny_world, tmp_path, name):
    """A `--run-dir` that was a backbone's folder had its config.json overwritten, and the user's
    own folder named best was deleted.
    """
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"family": "llamagen"}')
    for resume in (False, True):
        for start in (train, check):
            with pytest.raises(UserError, match=f"holds {name.split('/')[0]}, which a run would"):
                start(tiny_run(tiny_world, str(tmp_path), resume=resume))
    assert (tmp_path / name).read_text() == '{"family": "llamagen"}'


def test_replacing_a_folder_keeps_foreign_folders_of_similar_names(tmp_path):
    """The user's own `model.old` next to `--out model`, or `best.old` in a run, used to be
    deleted.
    """
    for name in ("model.old", "model.partial", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "model").symlink_to("elsewhere")
    for _ in range(2):  # a link that was set aside used to be in the way the next time
        with replacing_folder(tmp_path / "model") as partial:
            (partial / "file").touch()
    assert sorted(folder_content(tmp_path)) == [
        *("elsewhere/mine", "model.old/mine", "model.partial/mine", "model/file"),
    ]


def test_a_saved_model_replaces_no_files_of_others(plain, tmp_path):
    """`save_pretrained` used to replace a file, a run, or a folder of pictures of the same name."""
    model = t2i.from_pretrained(plain)
    run = shutil.copytree(plain.parents[1], tmp_path / "run", ignore=lambda *_: ["best"])
    export, file = tmp_path / "export", tmp_path / "file"
    (export / "tensorar").mkdir(parents=True)
    shutil.copytree(plain, tmp_path / "copy")  # with a training state
    for path in (export / "model.pt", export / "tensorar" / "manifest.json", file):
        path.write_text("mine")
    before = folder_content(tmp_path)
    for place in (run, run / "checkpoints" / plain.name, tmp_path, export, file, tmp_path / "copy"):
        with pytest.raises(
            UserError, match=r"(replaced as a whole|keeps its checkpoints|is a file)"
        ):
            t2i.save_pretrained(model, place, tuning="full")
    assert folder_content(tmp_path) == before
    (tmp_path / "new").mkdir()
    for _ in range(2):  # an empty folder, then its own
        t2i.save_pretrained(model, tmp_path / "new", tuning="full")


# -- options ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", [{"grid": (4, 4)}, {"text_encoder_dtype": "bfloat16"}])
def test_options_that_a_checkpoint_settles_itself_are_refused(plain, option):
    """Such options used to be ignored silently. Those that a recipe sets for published bases do not
    count as given by the user.
    """
    start = {"backbone.weights": str(plain)}
    assert recipe("t2i-xl-256-small-data", start).backbone.text_encoder_dtype == "bfloat16"
    (name, value), *_ = option.items()
    with pytest.raises(UserError, match=rf"backbone\.{name}=.* which has its own; leave it out"):
        recipe("shapes-control", start | {f"backbone.{name}": value})


def test_the_precision_of_no_caption_encoder_is_refused():
    """It used to have no effect on such a run, without a word."""
    for name, family in (("shapes-janus-lora", "janus"), ("llamagen-shapes", "llamagen")):
        with pytest.raises(UserError, match=f"text_encoder_dtype=.* has no effect with .*{family}"):
            recipe(name, {"backbone.text_encoder_dtype": "bfloat16"})


def test_a_recipe_of_another_family_is_refused(plain, tiny_world):
    config = tiny_run(tiny_world, "beside", backbone__weights=str(plain), backbone__family="rar")
    for start in (train, check):
        with pytest.raises(UserError, match=r"is of the family llamagen: use a recipe"):
            start(config)


def test_a_reward_run_resumes_with_its_own_start_only(plain, copied, tiny_world, tmp_path):
    """If another start was named on resuming, the distance to the start used to be measured from
    that one.
    """
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
    gone = replace(base.backbone, weights=str(tmp_path / "gone"))
    said = "compares itself .* which cannot be read .*/gone is not a file.*; give them as --backbone.weights"
    with pytest.raises(UserError, match=said):  # the reason why they are needed was missing
        train(replace(on, backbone=gone), RewardRun)
    moved = shutil.copytree(plain, tmp_path / "moved")
    shutil.rmtree(moved / "training_state")  # the weights are the same, as in a run's best model
    (moved / "manifest.json").unlink()
    write_manifest(moved)
    train(replace(on, backbone=replace(base.backbone, weights=str(moved))), RewardRun)


def test_a_run_is_resumed_with_its_own_objective_only(plain, copied, tiny_world):
    """If all other settings agreed, a run of reward fine-tuning used to go on as usual fine-tuning,
    and the other way round.
    """
    reward = tiny_reward_run(tiny_world, "objective", steps=1)
    own = {f.name: getattr(reward, f.name) for f in fields(TrainConfig)}
    usual = TrainConfig(**own | {"run_dir": tiny_world / "runs" / "objective-of-data"})
    on = {"resume": True, "steps": 2}
    with pytest.raises(UserError, match=r"t2i\.train learns from data.*launch/train_reward\.py"):
        train(reward)
    train(reward, RewardRun)
    with pytest.raises(UserError, match=r"learns from the images.* use the program that began it"):
        train(replace(usual, **on, run_dir=reward.run_dir))
    train(usual)
    with pytest.raises(UserError, match=r"learns from data.* use the program that began it"):
        train(replace(reward, **on, run_dir=usual.run_dir), RewardRun)


def test_settings_of_another_version_are_named(plain, copied, tiny_world, caplog):
    """A run used to be resumed without them, and without a word."""
    folder = copied(plain)
    config = json.loads((folder / "config.json").read_text())["training"]["config"]
    rewrite(folder, config=config | {"lookahead": 5, "optim": config["optim"] | {"momentum": 0.9}})
    train(tiny_run(tiny_world, folder.parents[1].name, resume=True))
    assert "kit does not know: optim.momentum=0.9, lookahead=5\n" in caplog.text


# -- weights ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_quantised_weights_are_refused(tiny_world, tmp_path, dtype):
    """Quantised weights without their scales used to be loaded as they were, which gave a model of
    noise.
    """
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
def test_unsupported_kinds_of_adapters_are_refused(tiny_world, setting, value):
    """They used to be applied as if the setting were absent."""
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


def test_a_request_depends_on_the_settings_of_the_method(plain):
    """Models with the same weights and different noise schedules used to share one folder of images
    drawn with renoise.
    """
    model, own = t2i.from_pretrained(plain), SamplingConfig()

    def request(sampling: SamplingConfig) -> PromptRequest:
        return PromptRequest(model, [{"prompt": "a"}], DrawOptions(sampling=sampling))

    def named(sampling: SamplingConfig, **method) -> str:
        model.config = replace(TensorARConfig(k=3), **method)
        return request(sampling).short_hash

    renoised = replace(own, renoise=0.5)
    assert named(own) == named(own, schedule="linear") != named(own, residual="all")
    changes = ({}, {"schedule": "linear"}, {"noise": "codebook"}, {"noise_floor": 0.5})
    assert len({named(renoised, **method) for method in changes}) == 4
    model.config = TensorARConfig(k=3)
    settings = request(own).settings
    names = (
        "prompts",
        "seed",
        "sampling",
        "noise",
        "dtype",
        "weights",
    )  # the keys of earlier versions
    assert named(own) == json_sha256({name: settings[name] for name in names})[:8]


def test_a_home_folder_is_named(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"perhaps you meant {tmp_path}/run"):
        t2i.from_pretrained("~/run")

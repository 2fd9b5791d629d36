"""Cases 1, 2, 5-7 and 26: what a run does with non-finite numbers, a full disk, other runs in its
folder, and settings that change on resuming.
"""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Killed, folder_content, in_threads, rare
from runs import assert_same_weights, before_step, kill, metrics, tiny_run, weights

from t2i import checkpoint_folders
from t2i.errors import NotFiniteError, UserError
from t2i.export_folder import export
from t2i.fields import leaves
from t2i.fields import plain as as_json
from t2i.model_options import ExportOptions
from t2i.ownership import owning
from t2i.reward.reward_options import RewardConfig
from t2i.training import settings
from t2i.training.check import check
from t2i.training.config import BackboneOptions, LabelledOptions, TrainConfig
from t2i.training.engine import healthy_norm
from t2i.training.logs import read_metrics
from t2i.training.loop import train
from t2i.training.training_run import BEST_BY, Run

STAGES = {
    "zero0": {},
    "zero1-bf16": {"engine__zero_stage": 1, "engine__precision": "bf16"},
    "zero2-bf16": {"engine__zero_stage": 2, "engine__precision": "bf16"},
    "zero2-offload": {"engine__zero_stage": 2, "offload": {"offload_optimizer": {"device": "cpu"}}},
    "zero3-lora": {"engine__zero_stage": 3, "tuning": "lora"},
    "zero3-offload": {
        "engine__zero_stage": 3,
        "offload": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
}


def staged(root: Path, name: str, stage: str, **changes) -> TrainConfig:
    """A run under one of `STAGES`."""
    options = dict(STAGES[stage])
    if zero := options.pop("offload", None):
        path = root / "offload.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        options["engine__deepspeed_config"] = path
    return tiny_run(root, name, **(options | changes))


# -- 1: states of every stage ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "stage",
    [
        "zero2-bf16",
        *map(rare, ("zero0", "zero1-bf16", "zero2-offload", "zero3-lora", "zero3-offload")),
    ],
)
def test_the_state_of_every_stage_is_read(tiny_world, stage):
    """Case 1: a run resumes bit for bit under every stage; case 6: with the new settings."""
    names = [f"{stage}-whole", f"{stage}-halves"]
    options = {"steps": 4, "batch_size": 4, "token_dropout": 0.1}
    whole = train(staged(tiny_world, names[0], stage, **options))
    half = staged(tiny_world, names[1], stage, log__save_every=2, **options)
    with before_step(2, kill), pytest.raises(Killed):
        train(half)
    resumed = train(replace(half, resume=True))
    assert metrics(tiny_world, names[0]) == metrics(tiny_world, names[1])
    assert_same_weights(weights(whole), weights(resumed))

    optim = {"weight_decay": 0.9, "betas": (0.5, 0.6), "grad_clip": 0.125}
    changed = replace(half, resume=True, optim=replace(half.optim, **optim))
    run = Run(changed)
    groups = run.engine.optimizer.param_groups
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}
    assert {group["weight_decay"] for group in groups} == {0.9, 0.0}
    assert (
        getattr(run.engine.optimizer, "clip_grad", 0.125) == run.engine.gradient_clipping() == 0.125
    )


# -- 2: numbers that are none ----------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["zero0", "zero2-offload", rare("zero3-lora")])
@pytest.mark.parametrize("own_drafts", [0.0, 1.0])
def test_a_run_that_diverges_names_step_and_samples(tiny_world, stage, own_drafts):
    """Case 2: weights are checked after each update and before anything is saved. Own drafts of a
    diverged model give no IndexError.
    """
    name = f"diverged-{stage}-{own_drafts:g}"
    options = {"optim__backbone_lr": 1e9, "optim__codec_lr": 1e9, "method__own_drafts": own_drafts}
    with pytest.raises(NotFiniteError) as stopped:
        train(staged(tiny_world, name, stage, steps=30, log__save_every=1, **options))
    message = str(stopped.value)
    found = checkpoint_folders.run_checkpoints(tiny_world / "runs" / name)
    assert "step" in message and "\n" not in message
    assert (str(found[-1]) if found else "there is no checkpoint") in message
    for folder in found:
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_a_gradient_that_is_not_finite_is_noticed_at_once(tiny_world, monkeypatch):
    """Case 2: the loss of that step is finite; its samples are named as in their source."""
    run = Run(tiny_run(tiny_world, "bad-gradient"))
    run.model.train()
    run.model.codec.encoder.slots.register_hook(lambda g: g * float("nan"))
    with pytest.raises(
        NotFiniteError, match=r"gradient .* step 1, with the samples \S+\.png \(num"
    ):
        run.train_step()


@pytest.mark.parametrize("stage", ["zero0", "zero2-bf16"])
def test_only_the_samples_with_a_bad_loss_are_named(tiny_world, stage):
    """Case 2: only the samples of a pass with a non-finite loss (from NaN features, say) are named,
    and no weight is updated.
    """
    run = Run(staged(tiny_world, f"bad-sample-{stage}", stage))
    load, bad = run.data.load, []

    def spoilt(indices, choice):
        codes, prepared = load(indices, choice)
        if not bad:
            bad.extend(indices.tolist())
            prepared["features"] = prepared["features"] * float("nan")
        return codes, prepared

    run.data.load = spoilt
    run.model.train()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(NotFiniteError, match="loss is not finite at step 1") as stopped:
        run.train_step()
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters()), "no update"
    assert str(stopped.value).count("(number ") == len(bad) == run.config.engine.micro_batch
    assert all(f"(number {i})" in str(stopped.value) for i in bad)


def test_norms_that_deepspeed_reports():
    """Case 2: -1 stands for one that is not finite."""
    norms = (None, 0.0, 2.5, -1.0, float("inf"), float("nan"))
    assert [healthy_norm(norm) for norm in norms] == 3 * [True] + 3 * [False]


def keep_as_best(run: Run) -> None:
    """Its held-out loss may be finite all the same."""
    run.keep_if_best({BEST_BY: 0.0})


@pytest.mark.parametrize("action", [Run.save, Run.sample_sheet, keep_as_best])
def test_weights_that_are_not_finite_are_not_saved_nor_drawn_with(tiny_world, action):
    """Case 2: whatever made them non-finite."""
    run = Run(tiny_run(tiny_world, f"bad-weights-{action.__name__}"))
    with torch.no_grad():
        run.model.codec.encoder.slots[0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"weights are not finite after step 0.*no checkpoint"):
        action(run)
    assert not {"checkpoints", "best"} & {path.name for path in run.config.run_dir.iterdir()}


@pytest.mark.parametrize("stage", ["zero0", "zero2-bf16"])
def test_moments_that_are_not_finite_are_not_saved(tiny_world, stage):
    run = Run(staged(tiny_world, f"bad-moments-{stage}", stage))
    run.model.train()
    run.train_step()
    state = getattr(run.engine.optimizer, "optimizer", run.engine.optimizer).state
    next(iter(state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"optimizer's state is not finite.*exp_avg_sq"):
        run.save()
    assert not list((run.config.run_dir / "checkpoints").iterdir())


def test_validation_of_a_diverged_model_says_so(tiny_world):
    """Case 2: own drafts of such a model are still valid codes, so the loss has to show it."""
    run = Run(tiny_run(tiny_world, "bad-validation"))
    with torch.no_grad():
        run.model.codec.encoder.slots.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="held-out loss is not finite after step 0"):
        run.validate()


# -- 5: one run in a folder ------------------------------------------------------------------------
def test_a_second_run_in_a_folder_is_refused_by_name(tiny_world):
    """Case 5: at once, before a model is loaded, whether fresh or resumed; the folder is free again
    afterwards.
    """
    config = tiny_run(tiny_world, "in-use", backbone__weights="not even there")
    with owning(config.run_dir, "run folder"):
        for resume in (False, True):
            with pytest.raises(
                UserError, match=f"run folder {config.run_dir} is in use by process"
            ):
                train(replace(config, resume=resume))
    with pytest.raises(UserError, match="not even there"):
        train(config)
    with pytest.raises(UserError, match="not even there"):
        train(replace(config, run_dir=tiny_world / "runs" / "never"))
    assert not (tiny_world / "runs" / "never").exists(), "a refused run leaves nothing"
    train(tiny_run(tiny_world, "in-use", steps=1))


# -- 6: settings that change -----------------------------------------------------------------------
def test_every_name_in_the_groups_is_an_option():
    """Case 6: for runs on captions, on classes and by reward."""
    configs = (TrainConfig(), TrainConfig(data=LabelledOptions()), RewardConfig(steps=1))
    own = {name for config in configs for name in leaves(as_json(config))}
    for name in (*settings.ROUNDING, *settings.APPLIED, *settings.FREE):
        assert any(n == name or n.startswith(f"{name}.") for n in own), f"{name} is no option"


def test_settings_that_make_another_run_are_refused():
    """Case 6: what is trained, on what, and with which random numbers."""
    config, places = TrainConfig(), ("data.source", "data.cache_dir")
    fixed = {"seed", "batch_size", "ema", "tuning", "lora", "train_image_layers", "method", "data"}
    fixed |= {"token_dropout", "condition_dropout"}
    names = [name for name in leaves(as_json(config)) if name not in places]
    names = [name for name in names if name.partition(".")[0] in fixed]
    assert len(names) > 2 * len(fixed)
    for name in names:
        stored = as_json(config)
        part, _, option = name.rpartition(".")
        (stored[part] if part else stored)[option] = "another"
        with pytest.raises(UserError, match=rf"with other settings \({name}: another -> "):
            settings.check_settings(config, stored, Path("run"))


def test_changed_settings_are_announced_one_by_one(plain, copied, tiny_world, caplog):
    """Case 6: by option name; changes that are not allowed are refused by option name, too."""
    folder = copied(plain)
    name = folder.parents[1].name
    config = tiny_run(tiny_world, name, resume=True, optim__weight_decay=0.9, log__keep_last=1)
    train(config)
    assert "changed settings: optim.weight_decay: 0.05 -> 0.9\n" in caplog.text
    with pytest.raises(UserError, match=r"other settings \(data.validation_samples: 9 -> 10\)"):
        train(replace(config, data=replace(config.data, validation_samples=10)))


def test_files_that_moved_are_compared_by_content(plain, copied, tiny_world, tmp_path, caplog):
    """Case 6: the same base and DeepSpeed settings at another path are the same run; another base
    is not.
    """
    folder = copied(plain)
    name = folder.parents[1].name
    base = shutil.copytree(tiny_world / "base", tmp_path / "moved")
    config = tiny_run(tiny_world, name, resume=True, backbone__weights=str(base))
    assert train(config) == folder
    (folder.parents[1] / "metrics.jsonl").write_bytes(b'{"step": 1}\nno\n\0\0\n[1]\n{"step": 2')
    assert train(replace(config, backbone=BackboneOptions(weights="shapes"))) == folder
    assert [row["step"] for row in read_metrics(folder.parents[1])] == [1], (
        "damaged lines are skipped"
    )
    assert "its own weights, which began as" in caplog.text and "not with shapes" in caplog.text
    assert train(replace(config, backbone=BackboneOptions(weights=str(plain)))) == folder
    assert f"not with {plain}" in caplog.text, "another run's weights are not read"
    gone = replace(config, backbone=BackboneOptions(weights="runs/gone"))
    assert train(gone) == folder and "3 steps" in check(gone), "--check used to refuse it"
    zero = tmp_path / "zero.json"
    zero.write_text("{}")
    assert train(replace(config, engine=replace(config.engine, deepspeed_config=zero))) == folder
    zero.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    train(replace(config, engine=replace(config.engine, deepspeed_config=zero)))
    assert "zero_optimization.reduce_bucket_size: None -> 1000" in caplog.text
    content = torch.load(base / "gpt.pt", weights_only=True)
    content["model"]["norm.weight"] += 1
    torch.save(content, base / "gpt.pt")
    with pytest.raises(
        UserError, match="is not the weight file that the checkpoint was trained on"
    ):
        train(config)


def test_a_run_from_an_export_goes_on_when_that_moves(plain, tiny_world, tmp_path):
    """It was refused, with an option that no training program has."""
    exported = export(ExportOptions(ckpt=plain, out=tmp_path / "exported"))
    config = tiny_run(tiny_world, "from-export", steps=1, backbone__weights=str(exported))
    train(config)
    moved = BackboneOptions(weights=str(exported.rename(tmp_path / "moved")))
    with pytest.raises(UserError, match="In training these options begin with --backbone"):
        train(replace(config, resume=True, steps=2))
    train(replace(config, resume=True, steps=2, backbone=moved))


# -- 7: the disk -----------------------------------------------------------------------------------
@pytest.mark.parametrize("writer", ["state", "safetensors", "manifest"])
def test_a_full_disk_leaves_the_newest_checkpoint(two_saved, tiny_world, monkeypatch, writer):
    """Case 7: one line, nothing half-written, and the run continues once there is room."""
    run_dir = shutil.copytree(two_saved, tiny_world / "runs" / f"full-{writer}")
    before = folder_content(run_dir / "checkpoints")
    config = tiny_run(tiny_world, run_dir.name, steps=4, resume=True)

    def full(*_, **__):
        raise {
            "state": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64"),
            "safetensors": Exception(
                "Error while serializing: No space left on device (os error 28)"
            ),
            "manifest": OSError(errno.ENOSPC, "No space left on device"),
        }[writer]

    places = {
        "state": "t2i.training.state.save_weights",
        "safetensors": "t2i.checkpoint.save_weights",
        "manifest": "t2i.checkpoint.write_manifest",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[writer], full)
        with pytest.raises(UserError, match=r"cannot write \S+step_000004: no space is left"):
            train(config)
    assert folder_content(run_dir / "checkpoints") == before
    assert not list(run_dir.rglob("*.t2i-partial"))
    assert train(config).name == "step_000004"


def test_a_run_folder_that_cannot_be_written_is_noticed_first(tiny_world, tmp_path):
    """Case 7: before a model is loaded or an image encoded; --check makes no folder."""
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        config = tiny_run(tiny_world, run_dir, backbone__weights="not even there")
        for start in (train, Run, check):
            with pytest.raises(UserError, match=f"cannot write to {run_dir}"):
                start(config)
    assert (tmp_path / "file").read_text() == "mine"
    for inside in ("checkpoints", "samples"):
        (run_dir := tmp_path / f"with-{inside}").mkdir()
        (run_dir / inside).touch()
        with pytest.raises(UserError, match=f"{run_dir}.*{inside}"):
            train(tiny_run(tiny_world, run_dir, backbone__weights="not even there"))
    check(tiny_run(tiny_world, tmp_path / "later"))
    assert not (tmp_path / "later").exists()


# -- 26: own drafts --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["deepspeed", "settings", "folder"])
def test_files_that_disappear_during_a_run(tiny_world, tmp_path, caplog, what):
    """Losing one of these files during a run does not end it; it used to, with all steps since the
    last checkpoint.
    """
    options = tmp_path / "zero.json"
    options.write_text('{"zero_optimization": {"reduce_bucket_size": 100000}}')
    name = f"gone-{what}"

    def act(run: Run) -> None:
        folder = run.config.run_dir
        if what == "deepspeed":
            options.unlink()
        elif what == "settings":
            (folder / "config.json").write_text("[]")
        else:
            folder.rename(tmp_path / "moved")

    engine = {"engine__zero_stage": 2, "engine__deepspeed_config": options}
    config = tiny_run(tiny_world, name, log__save_every=1, **engine)
    with before_step(1, act):
        last = train(config)
    assert last == config.run_dir / "checkpoints" / "step_000003" and last.exists()
    said = {"settings": "the run's page stays as it is", "folder": "is gone, deleted or moved"}
    assert said.get(what, "") in caplog.text


@pytest.mark.parametrize("look", [check, train])
def test_a_name_that_is_not_utf8_is_refused_first(tiny_world, look):
    """It used to be noticed only after all data were encoded, when config.json could not be
    written.
    """
    config = tiny_run(tiny_world, "no-text", data__source=os.fsdecode(b"bilder_\xe4"))
    with pytest.raises(UserError, match=r"data.source='bilder_\\udce4' is not UTF-8: rename"):
        look(config)
    assert not config.run_dir.exists()


def test_training_in_a_thread(tiny_world):
    """Only the main thread may set signal handlers: in another one, a run used to end after all
    data were encoded.
    """
    config = tiny_run(tiny_world, "in-a-thread", steps=1, batch_size=4)
    (folder,) = in_threads(lambda _: train(config), [0])
    assert folder.name == "step_000001"


def test_own_drafts_are_drawn_without_dropout(tiny_world):
    """Case 26: in training, too; the mode is restored, so that the step itself has dropout."""
    run = Run(tiny_run(tiny_world, "draft-mode", method__own_drafts=1.0, token_dropout=0.5))
    model = run.model.train()
    batch = next(run.data.micro_batches(0))
    condition = model.backbone.encode_condition(batch.prepared)
    inputs = (batch.codes, condition, batch.keys)
    drafts = [model.own_draft_windows(*inputs) for _ in range(2)]
    assert model.training and model.backbone.token_dropout.training
    drafts.append(model.eval().own_draft_windows(*inputs))
    assert not model.training
    assert all(torch.equal(d, drafts[0]) for d in drafts)
    losses = [model.train()(batch.codes, condition, drafts[0]).sums for _ in range(2)]
    assert not torch.equal(*losses), "the step itself has dropout"

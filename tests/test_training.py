"""Training runs, in this process and on two: resume, splits, ZeRO stages, tuning modes and checkpoints give exactly what they should."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_run
from safetensors.torch import load_file

import t2i
from t2i import checkpoint
from t2i.imaging import save_png
from t2i.training.config import OptimOptions
from t2i.training.data import TrainingData
from t2i.training.engine import Processes, TrainingLoss, parameter_groups
from t2i.training.logs import read_metrics
from t2i.training.loop import Run, build_model, train
from t2i.training.validation import validate

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a photo of a red circle", "a photo of two squares"]
EXACT = 0.0
SAME_SUM = 1e-5  # the same numbers, added in another order


def metrics(root: Path, name: str) -> list[dict]:
    """A run's metrics without the ones that depend on the machine or that only some ZeRO stages have."""
    skipped = ("images_per_s", "train/grad_norm")
    rows = read_metrics(root / "runs" / name)
    return [{k: v for k, v in row.items() if k not in skipped} for row in rows]


def assert_same_metrics(a: list[dict], b: list[dict], tolerance: float) -> None:
    assert [sorted(row) for row in a] == [sorted(row) for row in b]
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a == pytest.approx(row_b, rel=tolerance, abs=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a checkpoint folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return {f"{file.name}:{k}": v for file in files for k, v in load_file(file).items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def draw(folder: Path, out: Path) -> list[bytes]:
    """PNG files of a few images of a checkpoint."""
    images = t2i.generate(t2i.from_pretrained(folder), PROMPTS, batch_size=2, progress=False)
    return [save_png(image, out / f"{i}.png").read_bytes() for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def plain(tiny_world):
    """One rank, no ZeRO, three steps: what other ways to do the same are compared with. Returns its checkpoint folder."""
    return train(tiny_run(tiny_world, "plain"))


# -- resume -------------------------------------------------------------------------------------------------------------------
def test_stop_and_resume_changes_no_bit(tiny_world, monkeypatch):
    options = {"steps": 6, "token_dropout": 0.1, "condition_dropout": 0.3}
    whole = train(tiny_run(tiny_world, "whole", **options))
    plain_step = Run.train_step

    def step_and_signal(run: Run) -> dict[str, float]:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", step_and_signal)
        half = train(tiny_run(tiny_world, "halves", **options))
    assert half.name == "step_000003", "SIGTERM saves after the step in progress"
    resumed = train(tiny_run(tiny_world, "halves", resume=True, **options))
    assert_same_metrics(metrics(tiny_world, "whole"), metrics(tiny_world, "halves"), EXACT)
    assert_same_weights(weights(whole), weights(resumed))
    without = train(tiny_run(tiny_world, "no-dropout", **options | {"token_dropout": 0.0}))
    assert not torch.equal(
        *(load_file(f / "codec.safetensors")["encoder.slots"] for f in (whole, without))
    )


def test_resume_wants_the_same_run(tiny_world, plain):
    def refused(message: str, **changes):
        with pytest.raises(ValueError, match=message):
            train(tiny_run(tiny_world, "plain", **{"resume": True, **changes}))

    refused(r"batch_size: 16 -> 8", batch_size=8)
    refused(r"method: .*'k': 3.* -> .*'k': 2", method__k=2)
    refused("engine.zero_stage=0, this run has 1", engine__zero_stage=1)
    refused("has done 3 steps already", steps=2)
    refused("already holds a run; give --resume", resume=False)
    assert train(tiny_run(tiny_world, "plain", resume=True)) == plain, "nothing left to do"


def test_resume_wants_the_same_number_of_processes(tiny_world, plain):
    run_dir = tiny_world / "runs" / "two-ranks-before"
    folder = run_dir / "checkpoints" / plain.name
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["world_size"] = 2
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"] = len(text)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="world_size=2, this run has 1"):
        train(tiny_run(tiny_world, run_dir.name, resume=True))


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


# -- one step, done in different ways -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"engine__micro_batch": 16},
        {"engine__micro_batch": 2, "engine__gradient_checkpointing": True},
        {"engine__zero_stage": 1},
        {"engine__zero_stage": 2},
        {"engine__zero_stage": 3},
    ],
    ids=lambda changes: "-".join(f"{k.split('__')[1]}{v}" for k, v in changes.items()),
)
def test_metrics_do_not_depend_on_split_or_stage(tiny_world, plain, changes, request):
    name = request.node.callspec.id
    train(tiny_run(tiny_world, name, **changes))
    expected = metrics(tiny_world, "plain")
    assert expected[-1]["train/loss"] != expected[0]["train/loss"]
    assert_same_metrics(metrics(tiny_world, name), expected, SAME_SUM)


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


def test_a_diverged_run_stops_and_saves_nothing(tiny_world):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(tiny_run(tiny_world, "diverged", optim__backbone_lr=1e30, optim__codec_lr=1e30))
    assert checkpoint.run_checkpoints(tiny_world / "runs" / "diverged") == []


# -- two processes ------------------------------------------------------------------------------------------------------------
def launch(*command: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    extra = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": paths,
        "TORCHDYNAMO_DISABLE": "1",  # saves seconds of imports
    }
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, *command],
        env=inherited | extra,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def two_ranks(tiny_world, plain):
    """Both launchers on two processes each; runs named ranks-*."""
    script = ("--standalone", "--nproc_per_node", "2", str(ROOT / "tests" / "two_ranks.py"))
    launch("-m", "torch.distributed.run", *script, str(tiny_world))
    options = f"""--backbone.weights {tiny_world / "base"} --method.k 3 --data.source {tiny_world / "data"}
        --data.cache-dir {tiny_world / "cache"} --data.validation-samples 9 --optim.codec-lr 1e-2
        --optim.backbone-lr 1e-3 --optim.warmup-steps 0 --engine.micro-batch 4 --log.log-every 1
        --log.validate-every 0 --log.sample-every 0 --log.save-every 0 --batch-size 16 --steps 3
        --run-dir {tiny_world / "runs" / "ranks-zero2"} --engine.zero-stage 2"""
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port())
    done = launch(*launcher, "launch/train_llamagen.py", "shapes-iclr2026", *options.split())
    assert done.stdout.count("checkpoint: ") == 1, "only the main process reports"
    return tiny_world


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_do_what_one_does(two_ranks, stage):
    got, expected = (metrics(two_ranks, name) for name in (f"ranks-zero{stage}", "plain"))
    assert_same_metrics(got, expected, SAME_SUM)
    folder = checkpoint.find_checkpoint(two_ranks / "runs" / f"ranks-zero{stage}")
    for name, value in weights(checkpoint.find_checkpoint(two_ranks / "runs" / "plain")).items():
        assert torch.allclose(weights(folder)[name], value, atol=2e-4), name


def test_zero3_saves_whole_adapters_and_draws_sheets(two_ranks):
    folder = checkpoint.find_checkpoint(two_ranks / "runs" / "ranks-zero3-lora")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 5, "two matrices for each of five layers in two blocks"
    assert all(v.numel() > 0 and v.abs().max() > 0 for v in adapter.values()), "lora_B left zero"
    assert len(list((two_ranks / "runs" / "ranks-zero3" / "samples").glob("*.png"))) == 1


def test_a_signal_to_one_rank_stops_all(two_ranks):
    run_dir = two_ranks / "runs" / "ranks-stopped"
    assert [f.name for f in checkpoint.run_checkpoints(run_dir)] == ["step_000002"]


def test_checkpoints_draw_the_same_in_a_new_process(two_ranks, tmp_path):
    folders = [two_ranks / "runs" / name for name in ("plain", "ranks-zero2", "ranks-zero3-lora")]
    here = [draw(folder, tmp_path / "here") for folder in folders]
    code = "import sys; from pathlib import Path; from test_training import draw\n"
    code += "for i, name in enumerate(sys.argv[2:]): draw(Path(name), Path(sys.argv[1]) / str(i))"
    launch("-c", code, str(tmp_path), *map(str, folders))
    for i, images in enumerate(here):
        assert [(tmp_path / str(i) / f"{j}.png").read_bytes() for j in range(2)] == images
    assert here[0] != here[2]


# -- tuning modes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tuning", ["full", "codec", "lora"])
def test_tuning_modes_change_what_they_say(tiny_world, tuning):
    run = Run(tiny_run(tiny_world, f"mode-{tuning}", tuning=tuning))
    base = t2i.load_backbone("llamagen", tiny_world / "base")
    run.model.train()
    run.train_step()
    run.train_step()
    folder = run.save()
    reloaded = t2i.from_pretrained(folder)
    live, again = run.model.state_dict(), reloaded.state_dict()
    assert live.keys() == again.keys() and all(torch.equal(live[k], again[k]) for k in live)
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
    loss, *_ = TrainingLoss(model)(batch)
    loss.backward()
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


def test_peft_loads_the_adapter_folder(tiny_world):
    from peft import PeftModel

    folder = train(tiny_run(tiny_world, "peft", tuning="lora"))
    ours = t2i.from_pretrained(folder).backbone
    base = t2i.load_backbone("llamagen", tiny_world / "base")
    prepared = base.prepare(PROMPTS)
    x = base.embed_tokens(torch.arange(16).view(1, 16, 1)).detach()

    def output(backbone):
        condition = backbone.encode_condition({k: v[:1] for k, v in prepared.items()})
        x_with_prefix = torch.cat([condition.prefix, x], dim=1)
        return backbone.trunk(x_with_prefix, torch.arange(x_with_prefix.shape[1]), condition)

    plain_output = output(base)
    theirs = PeftModel.from_pretrained(base, folder / "adapter").base_model.model
    assert torch.equal(output(ours), output(theirs))
    assert not torch.allclose(output(ours), plain_output, atol=1e-3)


# -- optimizer ----------------------------------------------------------------------------------------------------------------
def test_learning_rates_are_functions_of_the_step(tiny_world, plain):
    optim = OptimOptions(codec_lr=1.0, backbone_lr=0.1, warmup_steps=3, backbone_delay_steps=2)
    assert [optim.codec_rate(s, 8) for s in range(4)] == [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8]
    assert optim.codec_rate(8, 8) == 0
    assert [optim.backbone_rate(s) for s in range(5)] == pytest.approx([0, 0, 0.075, 0.1, 0.1])
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


# -- data and validation ------------------------------------------------------------------------------------------------------
ALONE = Processes(0, 1, torch.device("cpu"))


def test_ranks_share_the_batches(tiny_world, plain):
    config = tiny_run(tiny_world, "-", engine__micro_batch=4, condition_dropout=0.5)
    backbone = t2i.load_backbone("llamagen", tiny_world / "base")
    one, *ranks = (
        TrainingData(config, backbone, processes)
        for processes in (ALONE, *(Processes(r, 2, torch.device("cpu")) for r in range(2)))
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


# -- checkpoint folders -------------------------------------------------------------------------------------------------------
def test_incomplete_folders_are_refused(tiny_world, plain, tmp_path):
    def damaged(message: str, damage) -> None:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(plain, folder)
        damage(folder)
        with pytest.raises(ValueError, match=message):
            t2i.from_pretrained(folder)

    def cut(name):
        return lambda folder: os.truncate(folder / name, 100)

    damaged("manifest.json is missing", lambda folder: (folder / "manifest.json").unlink())
    damaged("is not JSON", cut("manifest.json"))
    damaged("codec.safetensors is missing or has not", cut("codec.safetensors"))
    damaged("backbone.safetensors is missing", lambda f: (f / "backbone.safetensors").unlink())
    with pytest.raises(ValueError, match="does not exist"):
        t2i.from_pretrained(tmp_path / "nowhere")


def test_a_finished_model_needs_no_training_state(tiny_world, plain):
    folder = tiny_world / "runs" / "slim" / "checkpoints" / plain.name
    shutil.copytree(plain, folder)
    shutil.rmtree(folder / checkpoint.TRAINING_STATE)
    assert_same_weights(
        t2i.from_pretrained(folder).state_dict(), t2i.from_pretrained(plain).state_dict()
    )
    with pytest.raises(ValueError, match="training_state.* is missing"):
        train(tiny_run(tiny_world, "slim", resume=True))


def test_newest_complete_checkpoint_is_found(tmp_path):
    for name in (
        "step_000100",
        "step_999999",
        "step_1000000",
        "step_1000001.partial",
        "step_1000000.old",
    ):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step_2000000").mkdir()
    assert checkpoint.find_checkpoint(tmp_path).name == "step_1000000"


def test_only_the_newest_checkpoints_are_kept(tiny_world):
    train(tiny_run(tiny_world, "kept", steps=4, log__save_every=1, log__keep_last=2))
    found = checkpoint.run_checkpoints(tiny_world / "runs" / "kept")
    assert [f.name for f in found] == ["step_000003", "step_000004"]


def test_another_or_missing_base_is_refused(tiny_world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_world / "base", base)
    folder = train(tiny_run(tiny_world, "moved", tuning="codec", backbone__weights=str(base)))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="which is gone; base=PATH"):
        t2i.from_pretrained(folder)
    assert t2i.from_pretrained(folder, base=tmp_path / "elsewhere").backbone.tokenizer is not None
    content = torch.load(tmp_path / "elsewhere" / "gpt.pt", weights_only=True)
    content["model"]["norm.weight"] += 1
    torch.save(content, tmp_path / "elsewhere" / "gpt.pt")
    with pytest.raises(ValueError, match="not the weight file that the checkpoint was trained on"):
        t2i.from_pretrained(folder, base=tmp_path / "elsewhere")


# -- what is written ----------------------------------------------------------------------------------------------------------
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
    assert page.count("<polyline") == 3 * 3 and all(name in page for name in sheets)
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 5

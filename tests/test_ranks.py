"""Training by two processes, under both launchers and each ZeRO stage, equals training by one."""

import shutil

import pytest
import torch
from forks import free_port
from helpers import Killed, rare
from programs import ROOT, launch
from runs import (
    PROMPTS,
    SAME_SUM,
    assert_same_metrics,
    assert_same_weights,
    before_step,
    draw,
    kill,
    metrics,
    plain_options,
    tiny_janus_run,
    tiny_run,
    weights,
)
from safetensors.torch import load_file
from two_ranks import DRAWN

import t2i
from t2i import checkpoint_folders
from t2i.lora import merge_lora
from t2i.training.loop import train

SCRIPT = str(ROOT / "tests" / "two_ranks.py")


@pytest.fixture(scope="module")
def two_ranks(tiny_world, plain):
    """Runs of two processes with torchrun's variables: those named ranks-*, and two that change the
    number of processes half-way.
    """
    with pytest.raises(Killed), before_step(1, kill):
        train(tiny_run(tiny_world, "one-then-two", log__save_every=1))
    launch(SCRIPT, str(tiny_world))
    begun = shutil.copytree(tiny_world / "runs/ranks-zero2", tiny_world / "runs/two-then-one")
    shutil.rmtree(begun / "checkpoints" / "step_000003")
    train(tiny_run(tiny_world, "two-then-one", resume=True))
    return tiny_world


@pytest.fixture(scope="module")
def rare_ranks(tiny_world, plain):
    """Runs of two processes with the stages that `two_ranks` leaves out, and under both
    launchers.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    launch(*torchrun, SCRIPT, str(tiny_world), "rare")
    options = (*plain_options(tiny_world, "ranks-deepspeed"), "--engine.zero-stage", "2")
    launcher = f"-m deepspeed.launcher.runner --num_gpus 2 --master_port {free_port()}".split()
    done = launch(*launcher, "launch/train_llamagen.py", *options)
    assert done.stdout.count("checkpoint: ") == 1, "only the main process reports"
    return tiny_world


def made_by(usual, unusual) -> list:
    """Parameters: the fixture that makes a run, and the run's name."""
    return [
        *(pytest.param("two_ranks", name, id=name) for name in usual),
        *(rare("rare_ranks", name, id=name) for name in unusual),
    ]


@pytest.mark.parametrize(
    ("fixture", "name"), made_by(("zero2",), ("zero0", "zero1", "zero3", "deepspeed"))
)
def test_two_processes_train_as_one(fixture, name, request):
    root = request.getfixturevalue(fixture)
    got, expected = (metrics(root, run) for run in (f"ranks-{name}", "plain"))
    assert_same_metrics(got, expected, SAME_SUM)
    folder = checkpoint_folders.find_checkpoint(root / "runs" / f"ranks-{name}")
    for key, value in weights(checkpoint_folders.find_checkpoint(root / "runs" / "plain")).items():
        assert torch.allclose(weights(folder)[key], value, atol=2e-4), key


def test_zero3_saves_whole_adapters_and_draws_sheets(two_ranks):
    folder = checkpoint_folders.find_checkpoint(two_ranks / "runs" / "ranks-zero3-lora")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 5, "two matrices for each of five layers in two blocks"
    assert all(v.numel() > 0 and v.abs().max() > 0 for v in adapter.values()), (
        "lora_B is still zero"
    )
    assert len(list((two_ranks / "runs" / "one-then-two" / "samples").glob("*.png"))) == 1


@pytest.fixture(scope="module")
def janus_alone(tiny_world):
    options = {"tuning": "lora", "train_image_layers": True}
    return train(tiny_janus_run(tiny_world, "ranks-janus-alone", **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ranks-janus-zero2", "ranks-janus-zero3"])
def test_janus_adapters_under_zero(rare_ranks, name, janus_alone):
    """Two processes give the same as one, the adapters are saved whole, and merging them changes
    nothing.
    """
    root = rare_ranks
    assert_same_metrics(metrics(root, name), metrics(root, "ranks-janus-alone"), SAME_SUM)
    folder = checkpoint_folders.find_checkpoint(root / "runs" / name)
    alone, saved = weights(janus_alone), weights(folder)
    assert alone.keys() == saved.keys()
    assert sum("lora_B" in k for k in saved) == 2 * 7, "every layer of two blocks"
    for key, value in saved.items():
        assert value.numel() and value.abs().max() > 0, f"{key} is empty or zero"
        assert torch.allclose(value, alone[key], atol=2e-4), key
    model = t2i.from_pretrained(folder)
    prepared = model.backbone.prepare(PROMPTS)
    ids = prepared["ids"][:1]
    with torch.no_grad():
        before = model.backbone.text_logits(ids)
        merge_lora(model.backbone)
        after = model.backbone.text_logits(ids)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["two-then-one", "one-then-two"])
def test_another_number_of_processes_continues(two_ranks, name):
    """The other number of processes, also under another stage, continues with the same samples in
    the same order and the same optimizer state.
    """
    assert_same_metrics(metrics(two_ranks, name), metrics(two_ranks, "plain"), SAME_SUM)
    folder = checkpoint_folders.find_checkpoint(two_ranks / "runs" / name)
    expected = checkpoint_folders.find_checkpoint(two_ranks / "runs" / "plain")
    for key, value in weights(expected).items():
        assert torch.allclose(weights(folder)[key], value, atol=2e-4), key


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_that_cannot_be_halved(two_ranks, stage):
    """ZeRO-3 pads the shares of odd-sized parameters; a fresh engine still continues from such a
    state as the old one would.
    """
    folders = [two_ranks / f"odd-{stage}" / name for name in ("first", "second", "other")]
    first, second, other = (
        {k: v for file in sorted(folder.iterdir()) for k, v in load_file(file).items()}
        for folder in folders
    )
    assert_same_weights(second, other)
    assert not torch.equal(first["0.bias/weight"], second["0.bias/weight"])
    assert second["1.bias/step"] == 2 and second["1.bias/exp_avg"].shape == (1,)


@pytest.mark.slow
def test_four_processes_train_as_one(tiny_world, plain):
    options = plain_options(tiny_world, "ranks-four")
    script = ("--standalone", "--nproc_per_node", "4", str(ROOT / "launch" / "train_llamagen.py"))
    launch("-m", "torch.distributed.run", *script, *options, "--engine.zero-stage", "2")
    assert_same_metrics(metrics(tiny_world, "ranks-four"), metrics(tiny_world, "plain"), SAME_SUM)


def test_a_signal_to_one_rank_stops_all(two_ranks):
    run_dir = two_ranks / "runs" / "ranks-stopped"
    assert [f.name for f in checkpoint_folders.run_checkpoints(run_dir)] == ["step_000002"]


def test_a_full_disk_of_one_rank_ends_both(two_ranks):
    """The other process used to wait until the launcher killed it in the middle of its save."""
    said = [(two_ranks / f"full-{rank}.txt").read_text() for rank in (0, 1)]
    assert "step_000001: no space is left on the disk" in said[0] and said[0] == said[1]
    assert not list((two_ranks / "runs" / "ranks-full" / "checkpoints").iterdir())


def test_data_missing_in_one_rank_end_both_with_its_message(two_ranks):
    """The other process used to end in a traceback about a lost connection."""
    said = [(two_ranks / f"missing-{rank}.txt").read_text() for rank in (0, 1)]
    assert "nowhere does not exist" in said[1] and said[0] == f"in process 1: {said[1]}"


def test_other_options_of_one_rank_end_both(two_ranks):
    """Another seed or rate used to train on silently, another number of steps to hang."""
    for rank in (0, 1):
        said = (two_ranks / f"other-{rank}.txt").read_text()
        assert "processes 0 and 1 were started with different options (seed: 0 and 1)" in said


def test_checkpoints_draw_the_same_in_a_new_process(two_ranks, tmp_path):
    here = [draw(two_ranks / "runs" / name, tmp_path) for name in DRAWN]
    for name, images in zip(DRAWN, here, strict=True):
        drawn = [(two_ranks / "drawn" / name / f"{j}.png").read_bytes() for j in range(2)]
        assert drawn == images
    assert here[0] != here[2]

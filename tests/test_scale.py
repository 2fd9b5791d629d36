"""Plans for a cluster: figures that can be checked by hand, and what is refused."""

import re
import sys
from dataclasses import replace

import pytest
from helpers import rare
from runs import tiny_run
from test_recipes import ALL

from launch import plan
from t2i.errors import UserError
from t2i.training.cluster import Cluster
from t2i.training.loop import train
from t2i.training.scale import checkpoint_bytes, plan_cluster
from t2i.training.start import build_model

LLAMAGEN = "t2i-xl-256-tuned"


def planned(name: str, *, run: dict | None = None, **cluster) -> str:
    return plan_cluster(replace(ALL[name], **(run or {})), Cluster(**cluster))


def test_64_gpus_and_a_hundred_million_images():
    report = planned(
        LLAMAGEN,
        run={"batch_size": 512},
        images=1e8,
        images_per_second=4000.0,
        encoded_per_second=100.0,
    )
    steps = round(20 * (1e8 - 256) / 512)
    for words in (
        "100,000,000 images, 256 of them held out",
        "512 a step = 8 a pass x 1 accumulated x 64 GPUs on 8 machine(s)",
        f"{steps:,} steps = 20.00 passes over the data",
        f"training    {steps * 512 / 4000 / 3600:.1f} hours at 4,000 images/s (as given)",
        f"encoding    {1e8 / 100 / 64 / 3600:.1f} hours, once",
        # 256 codes of 2 bytes, 40 tokens of 2,048 features of 2 bytes, and a line
        f"{1e8 * (512 + 40 * 2048 * 2 + 320) / 1e9:.2f} GB in 97,657 shards of 1,024 images",
        "1,525 or 1,526 shards are encoded by each process",
    ):
        assert words in report


def test_classes_are_counted_by_view():
    report = planned("rar-b", images=1_281_167, gpus=8)
    assert f"{1_281_167 * (10 * 256 * 2 + 320) / 1e9:.2f} GB in 1,252 shards" in report
    assert "156 or 157 shards are encoded by each process" in report


@pytest.mark.parametrize(
    ("cluster", "run", "words"),
    [
        ({"gpus": 12}, {}, "gpus=12 cannot be split equally over machines of 8"),
        ({"images": 0.5}, {}, "images=0.5 must be a whole number"),
        ({"images_per_second": 0}, {}, "images_per_second=0 must be a number above 0"),
        ({"images": 1e300}, {}, r"images=1e\+300 must be a number above 0 \(from 1e-06 to 1e\+15"),
        ({}, {"batch_size": 1024}, "batch_size=1024 cannot be split over 64 processes"),
        ({"images": 50}, {}, "fewer than the 50 usable samples"),
        ({"gpu_memory": 0.1}, {}, r"needs \d.\d+ GB of GPU memory, but there is only 0.10 GB"),
        ({"node_memory": 30}, {}, "needs 32.00 GB of main memory of a machine"),
        ({"disk": 50}, {}, r"of disk, but there is only 50.00 GB: use fewer images"),
        # 500 images are 2.3 MB of codes; two checkpoints of 0.13 GB, one being saved, the best one
        ({"images": 500, "disk": 0.412}, {}, r"needs 0.42 GB of disk, but there is only 0.41 GB"),
        (
            {"hours": 3, "images_per_second": 4000, "encoded_per_second": 100},
            {},
            r"takes 7.2 hours \(4.3 hours of it to encode the data\), more than 3 hours",
        ),
        ({"hours": 2, "images_per_second": 4000}, {}, "takes 2.8 hours, more than 2 hours"),
    ],
)
def test_contradicting_facts_are_refused(cluster, run, words):
    steps = {"batch_size": 2048, "steps": 20_000}
    with pytest.raises(UserError, match=words):
        planned("shapes-tuned", run=steps | run, **cluster)


def test_fewer_shards_than_processes():
    report = planned("shapes-tuned", run={"batch_size": 2048}, images=10_000)
    assert "10,000 images are 10 shards: 54 of 64 processes encode nothing" in report


def test_the_program_takes_the_options_of_the_training_program(capsys, monkeypatch):
    """It used to know no option of the config's parts, not even the one that its own message
    recommended.
    """

    def enter(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *options])
        plan.main()
        return capsys.readouterr().out

    assert "8 GPUs on 1 machine(s)" in enter("rar-b", "--gpus", "8", "--images", "1e6")
    # Both examples of the program's own help used to be refused: 64 GPUs cannot share their batch.
    examples = re.findall(r"^python launch/plan.py (.*)$", plan.__doc__, re.MULTILINE)
    assert len(examples) == 2 and all("steps" in enter(*line.split()) for line in examples)
    text = "--gpus 8 --images 5000 --engine.micro-batch 4 --data.validation-samples 99"
    said = enter("shapes-tuned", *text.split(), "--backbone.weights", "shapes")
    assert "32 a step = 4 a pass x 1 accumulated x 8 GPUs" in said and "99 of them held out" in said
    # As in training, epochs replace the recipe's steps; they used to be ignored.
    said = enter("shapes-tuned", "--gpus", "1", "--images", "3328", "--epochs", "2")
    assert "192 steps = 2.00 passes" in said
    with pytest.raises(UserError, match=r"--log.prompts is given 2 times"):
        enter("shapes-tuned", "--log.prompts", "a", "--log.prompts", "b")


@pytest.mark.parametrize(
    "changes",
    [
        rare({}),
        rare({"tuning": "lora"}),
        {"engine__precision": "bf16", "engine__zero_stage": 2},
        {"tuning": "lora", "engine__precision": "bf16", "engine__zero_stage": 1},
        {"engine__zero_stage": 1, "ema": 0.9},
        {
            "tuning": "lora",
            "backbone__weights": "plain",
        },  # a run's checkpoint, which holds all weights
        rare({"tuning": "codec", "backbone__weights": "plain", "train_image_layers": True}),
    ],
)
def test_checkpoints_have_the_planned_size(changes, tiny_world, plain):
    if "backbone__weights" in changes:
        changes = changes | {"backbone__weights": str(plain)}
    name = "size-" + "-".join(str(value).replace("/", "_") for value in changes.values())
    config = tiny_run(tiny_world, name, steps=1, batch_size=4, method__mlp=True, **changes)
    model, state = checkpoint_bytes(build_model(config, device="meta"), config)
    folder = train(config)
    found = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    of_state = sum(size for path, size in found.items() if path.parent.name == "training_state")
    weights = sum(
        size
        for path, size in found.items()
        if path.suffix == ".safetensors" and path.parent.name != "training_state"
    )
    assert weights == pytest.approx(model, rel=0.15)
    assert of_state == pytest.approx(state, rel=0.05)

"""Every test runs offline, on one CPU thread and without CUDA, so that bits and timings do not
depend on the machine's load.
"""

import gc
import os
import shutil
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # also for the programs that tests start

from functools import partial

import pytest
import torch
from browser import CHROMIUM, open_browser
from helpers import BACKBONES
from programs import refused

torch.set_num_threads(1)
gc.disable()  # until all tests are imported
LINEAR = torch.nn.functional.linear

LONGEST_FIRST = (
    "test_ranks",
    "test_training",
    "test_speed",
    "test_sampler",
    "test_reward_runs",
    "test_preflight",
    "test_tensorar",
    "test_janus_training",
    "test_evidence",
    "test_resume",
    "test_run_safety",
    "test_geneval_run",
    "test_loading",
    "test_benchmark",
    "test_speculation",
    "test_dpg_run",
    "test_scale",
    "test_geneval_weights",
    "test_imagenet_runs",
)
"""Test files to start first, so that the last ones to start on the two processes are short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Imported objects stay: scanning them for garbage used to take a tenth of the tests' time."""
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown() -> None:
    """Restore `linear`: after training under ZeRO-3, DeepSpeed leaves its own, slower one."""
    torch.nn.functional.linear = LINEAR


@pytest.fixture(params=BACKBONES)
def backbone(request):
    """A tiny backbone of each family and kind of condition: 4x4 codes, random weights."""
    return BACKBONES[request.param]()


@pytest.fixture
def refusal(request, capsys):
    """A function that calls the program imported as `run` by the test file with arguments that it
    must refuse, and returns its message.
    """
    return partial(refused, request.module.run, capsys)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A tab in a headless browser, shared by a file's tests."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with base/ and janus/ (tiny backbones), data/ (60 captioned images) and, once a run
    has built it, cache/.
    """
    from runs import write_tiny_base, write_tiny_janus

    from t2i.shapes.shapes_source import write_dataset

    root = tmp_path_factory.mktemp("tiny_world")
    write_tiny_base(root / "base")
    write_tiny_janus(root / "janus")
    write_dataset(root / "data", 60, size=32)
    return root


@pytest.fixture(scope="session")
def shapes_ckpt(tmp_path_factory):
    """A checkpoint of the shipped base with an untrained TensorAR attached."""
    import t2i
    from t2i.checkpoint import save_pretrained

    model = t2i.attach(t2i.load_backbone("llamagen", "shapes"), t2i.presets.iclr2026())
    return save_pretrained(model, tmp_path_factory.mktemp("shapes") / "ckpt", tuning="codec")


@pytest.fixture(scope="session")
def plain(tiny_world):
    """The checkpoint folder of a run of three steps in one process without ZeRO, with which other
    ways to train are compared.
    """
    from runs import tiny_run

    from t2i.training.loop import train

    return train(tiny_run(tiny_world, "plain"))


@pytest.fixture
def copied(tiny_world, request):
    """A function that copies the `plain` run for a test to damage, and returns the copy's
    checkpoint folder.
    """

    def make(plain: Path, name: str = request.node.name) -> Path:
        run_dir = tiny_world / "runs" / name
        shutil.copytree(plain.parents[1], run_dir)
        return run_dir / "checkpoints" / plain.name

    return make


@pytest.fixture(scope="session")
def two_saved(tiny_world):
    """The folder of a run of three steps with checkpoints after steps 2 and 3."""
    from runs import tiny_run

    from t2i.training.loop import train

    train(tiny_run(tiny_world, "two-saved", log__save_every=2))
    return tiny_world / "runs" / "two-saved"

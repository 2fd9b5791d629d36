"""Every test runs offline, on one CPU thread and without CUDA, so that bits and timings do not depend on the machine's load."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from helpers import tiny_llamagen, write_tiny_base

torch.set_num_threads(1)


@pytest.fixture(params=["class", "text"])
def backbone(request):
    """A tiny LlamaGen of each kind."""
    return tiny_llamagen(request.param)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with base/ (a tiny backbone), data/ (60 captioned images) and, once a run has built it, cache/."""
    from t2i.data.shapes import write_dataset

    root = tmp_path_factory.mktemp("tiny_world")
    write_tiny_base(root / "base")
    write_dataset(root / "data", 60, size=32)
    return root

"""Every test runs offline, on one CPU thread and without CUDA, so that bits and timings do not depend on the machine's load."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from helpers import tiny_llamagen

torch.set_num_threads(1)


@pytest.fixture(params=["class", "text"])
def backbone(request):
    """A tiny LlamaGen of each kind."""
    return tiny_llamagen(request.param)

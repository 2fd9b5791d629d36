"""Rewards as users write them, good and bad ones, given to runs by name."""

import os
import time

import numpy as np
import torch


def brightness(images, metadata):
    """How much brighter the left half of each image is."""
    assert len(images) == len(metadata) and all("prompt" in entry for entry in metadata)
    pixels = np.array([np.asarray(image, dtype=float) / 255 for image in images])
    middle = pixels.shape[2] // 2
    return pixels[:, :, :middle].mean((1, 2, 3)) - pixels[:, :, middle:].mean((1, 2, 3))


def raises(images, metadata):
    raise ConnectionError("no server on port 18085")


def hangs(images, metadata):
    time.sleep(600)


def dies(images, metadata):
    os._exit(9)


def nan(images, metadata):
    return [0.5] * (len(images) - 1) + [float("nan")]


def as_bad_as_can_be(images, metadata):
    return [0.5] * (len(images) - 1) + [-1.7e308]


def changes_defaults(images, metadata):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    os.chdir("/")
    return [0.5] * len(images)


def one_too_few(images, metadata):
    return [0.5] * (len(images) - 1)


def words(images, metadata):
    return ["good"] * len(images)


def pairs(images, metadata):
    return np.ones((len(images), 2))


def constant(images, metadata):
    return [0.0] * len(images)


def keyed(images, metadata):
    return dict.fromkeys(range(len(images)), 0.5)


def of_flow_grpo(images, prompts, metadata, only_strict=True):
    return [0.5] * len(images), {}


def of_trl(completions, **kwargs):
    return [0.5] * len(completions)


async def waits(images, metadata):
    return [0.5] * len(images)


class Scorer:
    def __call__(self, images, metadata):
        return [0.5] * len(images)


scorer = Scorer()
NO_FUNCTION = 3

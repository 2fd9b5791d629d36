"""The Inception network of 2015 that FID is defined by, in torch, and TensorFlow 1's way of
resizing for it.

OpenAI's ADM evaluator (openai/guided-diffusion, evaluations/evaluator.py) runs a frozen TensorFlow
graph: resize to 299 pixels, scale to [-1, 1], Inception-v3, and reads two layers: `pool_3` (2048
numbers) for FID, the Inception Score, precision and recall, and the first seven channels of
`mixed_6/conv` for sFID. The graph's weights are public in torch's format
(`pt_inception-2015-12-05`); that graph differs from today's Inception-v3 in three things: average
pools leave the padding out, the last block pools by maximum, and there are 1,008 classes, whose
bias the Inception Score leaves out.

Shape legend: B = images, H, W = pixels, C = channels.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from t2i.published import PublishedFile
from t2i.rng import make_keys, uniforms
from t2i.weights import load_strict, read_state_dict

INPUT_SIZE = 299
POOL_WIDTH = 2048
SPATIAL_CHANNELS = 7
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17 * 17
RANDOM = "random"
_NAME = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = PublishedFile(
    title="Inception network of FID (96 MB)",
    url=f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_NAME}",
    names=(_NAME,),
    hashes=("6726825d",),
    cache="fid",
    advice="give its place as --inception-weights; "
    f"'--inception-weights {RANDOM}' tries everything but the numbers",
)


class Conv(NamedTuple):
    """A layer; within a branch, stride 1 keeps the size and stride 2 goes without padding."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


class Fork(NamedTuple):
    """Two layers that read the same input; their outputs are joined."""

    first: Conv
    second: Conv


AVERAGE, MAXIMUM, HALVE = "average", "maximum", "halve"
Branch = list[Conv | Fork | str]


def _mixed_35(pool: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)],
        [
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, 3),
            Conv("branch3x3dbl_3", 96, 3),
        ],
        [AVERAGE, Conv("branch_pool", pool)],
    ]


def _mixed_35_to_17() -> list[Branch]:
    return [
        [Conv("branch3x3", 384, 3, stride=2)],
        [
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, 3),
            Conv("branch3x3dbl_3", 96, 3, stride=2),
        ],
        [HALVE],
    ]


def _mixed_17(width: int) -> list[Branch]:
    row, column = (1, 7), (7, 1)
    return [
        [Conv("branch1x1", 192)],
        [
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, row),
            Conv("branch7x7_3", 192, column),
        ],
        [
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, column),
            Conv("branch7x7dbl_3", width, row),
            Conv("branch7x7dbl_4", width, column),
            Conv("branch7x7dbl_5", 192, row),
        ],
        [AVERAGE, Conv("branch_pool", 192)],
    ]


def _mixed_17_to_8() -> list[Branch]:
    return [
        [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, stride=2)],
        [
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, stride=2),
        ],
        [HALVE],
    ]


def _mixed_8(pool: str) -> list[Branch]:
    def fork(name: str) -> Fork:
        return Fork(Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))

    return [
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), fork("branch3x3_2")],
        [Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, Conv("branch_pool", 192)],
    ]


class FrozenNorm(nn.Module):
    """Batch norm with stored statistics, without the step counter that few copies have."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return functional.batch_norm(x_BCHW, *statistics, self.weight, self.bias, eps=0.001)


class ConvNormRelu(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, inputs: int, conv: Conv, *, same_size: bool = True):
        super().__init__()
        kernel = (conv.kernel,) * 2 if isinstance(conv.kernel, int) else conv.kernel
        same_size = same_size and conv.stride == 1
        padding = (kernel[0] // 2, kernel[1] // 2) if same_size else (0, 0)
        self.conv = nn.Conv2d(inputs, conv.channels, kernel, conv.stride, padding, bias=False)
        self.bn = FrozenNorm(conv.channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.bn(self.conv(x_BCHW)).relu_()


class Mixed(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, inputs: int, branches: list[Branch]):
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            width = inputs
            for step in branch:
                if isinstance(step, str):
                    continue
                convs = step if isinstance(step, Fork) else (step,)
                for conv in convs:
                    self.add_module(conv.name, ConvNormRelu(width, conv))
                width = sum(conv.channels for conv in convs)
            self.channels += width

    def forward(self, x_BCHW: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x_BCHW
            for step in branch:
                y = self._apply_step(step, y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def _apply_step(self, step: Conv | Fork | str, x: Tensor) -> Tensor:
        if isinstance(step, Fork):
            return torch.cat([self.get_submodule(conv.name)(x) for conv in step], dim=1)
        if isinstance(step, Conv):
            return self.get_submodule(step.name)(x)
        if step == AVERAGE:
            return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if step == MAXIMUM:
            return functional.max_pool2d(x, 3, stride=1, padding=1)
        assert step == HALVE, step
        return functional.max_pool2d(x, 3, stride=2)


class InceptionFeatures(NamedTuple):
    """What the evaluator reads of B images: float32 [B, 2048] and [B, 7 * 17 * 17]."""

    pool: Tensor
    spatial: Tensor


class Inception(nn.Module):
    """The network; module names are the keys of the published weights."""

    def __init__(self):
        super().__init__()
        inputs = 3
        for conv in (
            Conv("Conv2d_1a_3x3", 32, 3, stride=2),
            Conv("Conv2d_2a_3x3", 32, 3),
            Conv("Conv2d_2b_3x3", 64, 3),
            Conv("Conv2d_3b_1x1", 80),
            Conv("Conv2d_4a_3x3", 192, 3),
        ):
            layer = ConvNormRelu(inputs, conv, same_size=conv.name == "Conv2d_2b_3x3")
            self.add_module(conv.name, layer)
            inputs = conv.channels
        for name, branches in (
            ("Mixed_5b", _mixed_35(32)),
            ("Mixed_5c", _mixed_35(64)),
            ("Mixed_5d", _mixed_35(64)),
            ("Mixed_6a", _mixed_35_to_17()),
            ("Mixed_6b", _mixed_17(128)),
            ("Mixed_6c", _mixed_17(160)),
            ("Mixed_6d", _mixed_17(160)),
            ("Mixed_6e", _mixed_17(192)),
            ("Mixed_7a", _mixed_17_to_8()),
            ("Mixed_7b", _mixed_8(AVERAGE)),
            ("Mixed_7c", _mixed_8(MAXIMUM)),
        ):
            block = Mixed(inputs, branches)
            self.add_module(name, block)
            inputs = block.channels
        self.fc = nn.Linear(POOL_WIDTH, 1008)

    def forward(self, x_BCHW: Tensor) -> InceptionFeatures:
        """Features of images float32 [B, 3, 299, 299] in 0..255, as `tf1_resize` gives them."""
        x = (x_BCHW - 128) / 128
        x = self._through(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
        x = functional.max_pool2d(x, 3, stride=2)
        x = self._through(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        x = functional.max_pool2d(x, 3, stride=2)
        x = self._through(x, "Mixed_5b", "Mixed_5c", "Mixed_5d")
        x = self._through(x, "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d")
        spatial = flatten_spatial(x)  # the 1x1 branch, `mixed_6/conv`, comes first
        x = self._through(x, "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c")
        return InceptionFeatures(x.mean(dim=(2, 3)), spatial)

    def _through(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


def flatten_spatial(x_BCHW: Tensor, channels: int = SPATIAL_CHANNELS) -> Tensor:
    """sFID's features [B, H * W * 7]: the first channels, innermost as TensorFlow stores them."""
    return x_BCHW[:, :channels].movedim(1, -1).flatten(1)


def tf1_resize(images_BHWC: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """TensorFlow 1's bilinear resize: uint8 [B, H, W, 3] -> float32 [B, 3, size, size] in 0..255.

    Output pixel i samples the input at i * in / out, not at the pixel's centre, and there is no
    antialiasing; no mode of `interpolate` does the same.
    """
    x_BCHW = images_BHWC.movedim(-1, 1).float()
    for axis in (3, 2):
        length = x_BCHW.shape[axis]
        # All in float32, as TensorFlow computes it.
        where = torch.arange(size, device=x_BCHW.device, dtype=torch.float32) * float(
            np.float32(length) / np.float32(size)
        )
        low = where.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (where - low).view((size, 1) if axis == 2 else (size,))
        first, second = x_BCHW.index_select(axis, low), x_BCHW.index_select(axis, high)
        x_BCHW = first + (second - first) * weight
    return x_BCHW


@torch.no_grad()
def extract(network: Inception, images: Sequence[np.ndarray]) -> InceptionFeatures:
    """Features of uint8 images [H, W, 3] of any sizes, float32, on the network's device."""
    device = network.fc.weight.device
    same = len({image.shape for image in images}) == 1
    groups = [np.stack(images)] if same else [np.stack([image]) for image in images]
    inputs = torch.cat([tf1_resize(torch.from_numpy(group).to(device)) for group in groups])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return network(inputs)


# -- weights ---------------------------------------------------------------------------------------
def load_inception(
    weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Inception, str]:
    """The network in eval mode, and the SHA-256 of its weight file.

    Args:
        weights: the published file, or a folder that holds it; None looks in the cache
            (`T2I_CACHE`, or ~/.cache/t2i) and downloads it there; "random" draws fixed random
            weights, with which every step can be tried offline, and whose scores compare with
            nothing else. The hash then is "random".

    Raises:
        UserError: the file does not exist, is not the published one, or cannot be downloaded.
    """
    network = Inception()
    if str(weights) == RANDOM:
        _randomize(network)
        digest = RANDOM
    else:
        found = PUBLISHED.find() if weights is None else PUBLISHED.given(Path(weights))
        path, digest = found.path, found.digest
        state = read_state_dict(path)
        counters = ("num_batches_tracked",)
        load_strict(network, {k: v for k, v in state.items() if not k.endswith(counters)}, path)
    return network.eval().requires_grad_(False).to(device), digest


def _randomize(network: Inception) -> None:
    """He's uniform distribution for the layers; a value depends on its name and place alone."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.dim() > 1:
                bound = (6 / value[0].numel()) ** 0.5
                keys = make_keys(zlib.crc32(name.encode()))
                value.copy_((2 * uniforms(keys, *value.shape) - 1) * bound)
        network.fc.bias.zero_()

"""The Inception network of 2015 that defines FID, in torch, with TensorFlow 1's resize.

OpenAI's ADM evaluator (openai/guided-diffusion, evaluations/evaluator.py) runs a frozen TensorFlow
graph: it resizes to 299 pixels, scales to [-1, 1], runs Inception-v3 and reads two layers: `pool_3`
(2048 numbers) for FID, the Inception Score, precision and recall, and the first seven channels of
`mixed_6/conv` for sFID. The graph's weights are public in torch's format
(`pt_inception-2015-12-05`). The graph differs from today's Inception-v3 in three ways: average
pools exclude the padding, the last block uses max pooling, and there are 1,008 classes (whose bias
the Inception Score leaves out).

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
from torchvision.models import Inception3

from t2i.loading import pick_device
from t2i.published import PublishedFile
from t2i.rng import make_keys, uniforms
from t2i.sources import check_places
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
    advice="give its path as --inception-weights; "
    f"'--inception-weights {RANDOM}' tests everything except the numbers",
)


class FrozenNorm(nn.Module):
    """Batch norm with stored statistics, without the step counter, which few weight files have."""

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


class InceptionFeatures(NamedTuple):
    """The features that the evaluator uses, of B images: float32 [B, 2048] and [B, 7 * 17 * 17]."""

    pool: Tensor
    spatial: Tensor


class Inception(Inception3):
    """Today's Inception-v3 with the three differences; module names match the published weights."""

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                self.set_submodule(name, FrozenNorm(module.num_features))

    def forward(self, x_BCHW: Tensor) -> InceptionFeatures:
        """Features of images float32 [B, 3, 299, 299] in 0..255, as `tf1_resize` returns them."""
        x = (x_BCHW - 128) / 128
        spatial = x.new_empty(0)
        for name, layer in self.named_children():
            if name == "avgpool":
                break
            y = layer(x)
            if hasattr(layer, "branch_pool"):  # replace the output of this branch, the last one
                pooled = layer.branch_pool(_pool(x, by_maximum=name == "Mixed_7c"))
                y = torch.cat([y[:, : -pooled.shape[1]], pooled], dim=1)
            x = y
            if name == "Mixed_6d":
                spatial = flatten_spatial(x)  # `mixed_6/conv` is the 1x1 branch, which comes first
        return InceptionFeatures(x.mean(dim=(2, 3)), spatial)


def _pool(x: Tensor, *, by_maximum: bool) -> Tensor:
    if by_maximum:
        return functional.max_pool2d(x, 3, stride=1, padding=1)
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def flatten_spatial(x_BCHW: Tensor, channels: int = SPATIAL_CHANNELS) -> Tensor:
    """sFID's features [B, H * W * 7]: the first channels, innermost as TensorFlow stores them."""
    return x_BCHW[:, :channels].movedim(1, -1).flatten(1)


def tf1_resize(images_BHWC: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """TensorFlow 1's bilinear resize: uint8 [B, H, W, 3] -> float32 [B, 3, size, size] in 0..255.

    Output pixel i samples the input at i * in / out, not at the pixel's center, and without
    antialiasing; no mode of `interpolate` does this.
    """
    x_BCHW = images_BHWC.movedim(-1, 1).float()
    for axis in (3, 2):
        length = x_BCHW.shape[axis]
        # All in float32, as in TensorFlow.
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
        weights: the published file, or a folder that holds it. None uses the cache (`T2I_CACHE`, or
            ~/.cache/t2i), and downloads the file there if needed. "random" uses fixed random
            weights, to test every step offline: the scores are comparable only with each other,
            and the hash is "random".

    Raises:
        UserError: the file does not exist, is not the published one, or cannot be downloaded.
    """
    check_places(weights=weights)
    device, _ = pick_device(device, "float32")
    network = Inception().float()  # whatever torch's default type is
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
    """Fill layers from He's uniform distribution; a value depends on its name and position only."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.dim() > 1:
                bound = (6 / value[0].numel()) ** 0.5
                keys = make_keys(zlib.crc32(name.encode()))
                value.copy_((2 * uniforms(keys, *value.shape) - 1) * bound)
        network.fc.bias.zero_()

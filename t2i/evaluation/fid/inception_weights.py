"""Where the weights of the evaluation network come from, and how they are proven to be the
published ones.
"""

import zlib
from pathlib import Path

import torch

from t2i.evaluation.fid.inception import Inception
from t2i.published import PublishedFile
from t2i.rng import make_keys, uniforms
from t2i.weights import load_strict, read_state_dict

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

"""Where the weights of the evaluation network come from, and how they are proven to be the published ones."""

import http.client
import os
import zlib
from pathlib import Path

import torch

from t2i.evaluation.inception import Inception
from t2i.rng import make_keys, uniforms
from t2i.weights import file_sha256, load_strict, read_state_dict

RANDOM = "random"
FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
SHA256_START = "6726825d"
_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"


def load_inception(
    weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Inception, str]:
    """The network in eval mode, and the SHA-256 of its weight file.

    Args:
        weights: the published file, or a folder that holds it; None looks in the cache (`T2I_CACHE`, or ~/.cache/t2i) and
            downloads it there; "random" draws fixed random weights, with which every step can be tried offline, and whose
            scores compare with nothing else. The hash then is "random".

    Raises:
        ValueError: the file does not exist, is not the published one, or cannot be downloaded.
    """
    network = Inception()
    if str(weights) == RANDOM:
        _randomize(network)
        digest = RANDOM
    else:
        path = _cached_file() if weights is None else Path(weights)
        path = path / FILE_NAME if path.is_dir() else path
        state = read_state_dict(path)
        digest = file_sha256(path)
        if not digest.startswith(SHA256_START):
            raise ValueError(
                f"{path} is not the published {FILE_NAME}: its SHA-256 begins with {digest[:8]}. Scores with other weights "
                f"compare with nobody's; fetch {_URL}"
            )
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


def _cached_file() -> Path:
    """The published file in the cache, fetched if it is not there yet."""
    from filelock import FileLock
    from torch.hub import download_url_to_file

    cache = Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i")
    path = cache / "fid" / FILE_NAME
    if path.is_file():
        return path
    advice = (
        f"download {_URL} (96 MB) elsewhere and copy it to {path.parent}, or give its place as "
        f"--inception-weights; '--inception-weights {RANDOM}' tries everything but the numbers"
    )
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(f"the Inception weights are not here and HF_HUB_OFFLINE is set: {advice}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of several processes, one downloads
            if not path.is_file():
                download_url_to_file(_URL, str(path), hash_prefix=SHA256_START)
    except RuntimeError as error:  # torch's name for a wrong hash
        raise ValueError(f"{_URL} gave another file than expected: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot download the Inception weights ({error}): {advice}") from error
    return path

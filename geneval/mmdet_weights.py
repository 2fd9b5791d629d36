"""Loading Mask2Former into transformers, strictly: from mmdet's checkpoint, or a transformers
folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging

from geneval.mmdet_keys import convert
from t2i.errors import UserError
from t2i.weights import read_state_dict, shorten_keys

# In transformers' model or in a file, not always in both: a loss weight, a final norm without a
# part in the outputs, and a table of constants that older versions kept as a buffer.
_WITHOUT_EFFECT = re.compile(
    r"criterion\.empty_weight"
    r"|model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)"
    r"|.*\.relative_position_index"
)


@dataclass(frozen=True)
class DetectorShape:
    """Sizes of the network in mmdet's terms; the defaults are the released Swin-S model's."""

    embed_dims: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: int = 4
    feat_channels: int = 256
    heads: int = 8
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    num_queries: int = 100
    num_classes: int = 80

    def config(self) -> Mask2FormerConfig:
        """The same network as transformers describes it."""
        swin = SwinConfig(
            embed_dim=self.embed_dims,
            depths=list(self.depths),
            num_heads=list(self.num_heads),
            window_size=self.window_size,
            mlp_ratio=float(self.mlp_ratio),
            out_features=[f"stage{i + 1}" for i in range(len(self.depths))],
        )
        return Mask2FormerConfig(
            backbone_config=swin,
            num_labels=self.num_classes,
            feature_size=self.feat_channels,
            mask_feature_size=self.feat_channels,
            hidden_dim=self.feat_channels,
            num_attention_heads=self.heads,
            encoder_layers=self.encoder_layers,
            encoder_feedforward_dim=self.encoder_ffn,
            decoder_layers=self.decoder_layers + 1,
            dim_feedforward=self.decoder_ffn,
            num_queries=self.num_queries,
        )


def load_mmdet(
    path: Path, shape: DetectorShape | None = None
) -> Mask2FormerForUniversalSegmentation:
    """The model of an mmdet checkpoint (2.x or 3.x names), float32 on the CPU, in eval mode.

    Raises:
        UserError: the file cannot be read, or a key is missing, unexpected or mis-shaped.
    """
    state_dict = _read(path)
    with _quiet():
        loaded = Mask2FormerForUniversalSegmentation.from_pretrained(
            None,
            config=(shape or DetectorShape()).config(),
            state_dict=convert(state_dict, path),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are listed below, and refused
        )
    return _complete(*loaded, path)


def load_hub_folder(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """The model of a folder that transformers wrote, float32 on the CPU, in eval mode.

    Raises:
        UserError: it cannot be read, or a weight is missing, unexpected or mis-shaped.
    """
    try:
        with _quiet():
            loaded = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{folder} is no readable folder of a transformers model: {reason}"
        ) from error
    return _complete(*loaded, folder)


def _complete(
    model: Mask2FormerForUniversalSegmentation, info: dict, source: str | Path
) -> Mask2FormerForUniversalSegmentation:
    problems = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "mis-shaped": [key for key, *_ in info["mismatched_keys"]],
    }
    problems = {
        kind: sorted(key for key in keys if not _WITHOUT_EFFECT.fullmatch(key))
        for kind, keys in problems.items()
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind} {shorten_keys(keys)}" for kind, keys in problems.items() if keys
        )
        raise UserError(
            f"{source} does not fit Mask2Former with this Swin backbone (names as in "
            f"transformers): {listed}"
        )
    return model.eval()


class _Ignored:
    """Stands for a class of the training framework that a checkpoint's metadata may name."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors; foreign objects in its metadata are dropped, none of their code runs."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip of torch's: the reader below says what is wrong
        foreign = []
    with torch.serialization.safe_globals([(_Ignored, name) for name in foreign]):
        return read_state_dict(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of the unused weights, which `_complete` knows about."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

"""mPLUG for visual question answering: the whole network, and strict loading of its published
folder.

The folder is ModelScope's `damo/mplug_visual-question-answering_coco_large_en`: config.yaml,
config_bert.json, vocab.txt, pytorch_model.bin. The reference loads it with `strict=False` into
position embeddings of zeros, so a missing key would go unnoticed. Here every key that the network
uses must be present, and every unused key must be of a known kind.

Shapes: B images, R image side, N image tokens, Q questions, L text tokens, D width.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from dpg_bench.mplug.bert import BertConfig, FusionEncoder, QuestionEncoder
from dpg_bench.mplug.decoder import AnswerDecoder, Hypothesis, decode
from dpg_bench.mplug.vision import HEAD_WIDTH, VisionTransformer
from t2i.errors import UserError
from t2i.weights import load_strict, read_state_dict

CONFIG, WEIGHTS, VOCABULARY = "config.yaml", "pytorch_model.bin", "vocab.txt"
_FUSION_LAYER = re.compile(r"fusion_encoder\.encoder\.layer\.(\d+)\.")


@dataclass(frozen=True)
class MPlugConfig:
    """The parts of config.yaml that are used; defaults as in `configuration_mplug.py`."""

    image_res: int = 504
    vision_width: int = 1024
    clip_vision_width: int = 1024
    clip_vision_layers: int = 24
    clip_vision_patch_size: int = 14
    beam_size: int = 5
    max_length: int = 10
    min_length: int = 1
    bert_config: str = "config_bert.json"
    bert: BertConfig = field(default_factory=BertConfig)

    def __post_init__(self) -> None:
        if self.clip_vision_width % HEAD_WIDTH or self.clip_vision_width != self.vision_width:
            raise UserError(
                f"clip_vision_width {self.clip_vision_width} must equal vision_width "
                f"({self.vision_width}) and be a multiple of {HEAD_WIDTH}"
            )

    @classmethod
    def load(cls, folder: Path) -> MPlugConfig:
        """Read a published folder's config.yaml and the BERT config that it names.

        Raises:
            UserError: a file is missing or unreadable, or a value is missing or invalid.
        """
        import yaml

        try:
            stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            bert_file = folder / stored.get("bert_config", cls.bert_config)
            bert = json.loads(bert_file.read_text(encoding="utf-8"))
        except (OSError, AttributeError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
            raise UserError(
                f"{folder} has no readable {CONFIG} and BERT config ({error}); it must be the folder "
                f"of mPLUG for visual question answering: {CONFIG}, config_bert.json, "
                f"{VOCABULARY}, {WEIGHTS}"
            ) from error
        needed = [f.name for f in fields(BertConfig) if f.name != "stride_layer"]
        if missing := [name for name in needed if name not in bert]:
            raise UserError(f"{bert_file} lacks {', '.join(missing)}")
        own = {f.name: stored[f.name] for f in fields(cls) if f.name in stored and f.name != "bert"}
        known = {f.name: bert[f.name] for f in fields(BertConfig) if f.name in bert}
        return cls(**own, bert=BertConfig(**known))


class MPlug(nn.Module):
    """Answers questions about an image; questions and answers are token ids."""

    start, end = 101, 102
    """Ids that start and end an answer: BERT's [CLS] and [SEP], fixed in the reference as well."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.config = config
        vision = VisionTransformer(
            config.image_res,
            config.clip_vision_patch_size,
            config.vision_width,
            config.clip_vision_layers,
        )
        self.visual_encoder = nn.ModuleDict({"visual": vision})
        width = config.bert.hidden_size
        if width != config.vision_width:
            self.visn_fc = nn.Linear(config.vision_width, width)
            self.visn_layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.text_encoder = QuestionEncoder(config.bert)
        self.fusion_encoder = FusionEncoder(config.bert)
        self.text_decoder = AnswerDecoder(config.bert)

    def encode_images(self, pixels_B3RR: Tensor) -> Tensor:
        """Normalized pixels [B, 3, R, R] to features [B, N, D], before fusion with questions."""
        features = self.visual_encoder["visual"](pixels_B3RR)
        if self.config.bert.hidden_size != self.config.vision_width:
            features = self.visn_layer_norm(self.visn_fc(features))
        return features

    def answer(self, image_1ND: Tensor, ids_QL: Tensor, mask_QL: Tensor) -> list[list[Hypothesis]]:
        """The answers to questions about one encoded image: one list per question, best first.

        ids_QL: int64; mask_QL: bool, False on padding.
        """
        text_QLD = self.text_encoder(ids_QL, mask_QL)
        image, text_QLD = self.fusion_encoder(text_QLD, mask_QL, image_1ND)
        return decode(
            self.text_decoder,
            self.text_decoder.remember(image, text_QLD, mask_QL),
            beams=self.config.beam_size,
            max_length=self.config.max_length,
            min_length=self.config.min_length,
            start=self.start,
            end=self.end,
        )

    @classmethod
    def load(cls, folder: str | Path) -> MPlug:
        """The network of a published folder, float32, in eval mode, on the CPU.

        Raises:
            UserError: a file is unreadable, or a weight is missing, unknown or has a wrong shape.
        """
        folder = Path(folder)
        model = cls(MPlugConfig.load(folder))
        stored = read_state_dict(folder / WEIGHTS)
        stored = {key.removeprefix("model."): value for key, value in stored.items()}
        kept = used_weights(stored, model.config.bert)
        head, words = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings"
        for one, same in (("decoder.weight", f"{words}.weight"), ("decoder.bias", f"{head}.bias")):
            a, b = (kept.get(key) for key in (f"{head}.{one}", same))
            if a is not None and b is not None and not torch.equal(a, b):
                raise UserError(f"{folder / WEIGHTS}: {head}.{one} must equal {same}, but does not")
        load_strict(model, kept, folder / WEIGHTS)
        return model.eval().requires_grad_(False)


def used_weights(stored: dict[str, Tensor], bert: BertConfig) -> dict[str, Tensor]:
    """Drop known unused weights of a published file; unknown keys stay, for loading to refuse.

    Dropped: momentum copies (`*_m`), CLIP's text tower and projection, position indices, fusion
    layers before the first one used, and the cross-attention of connected layers. Fusion layers are
    renumbered from the first one used.
    """
    first = bert.num_hidden_layers - bert.fusion_depth
    kept = {}
    for key, value in stored.items():
        if key.split(".")[0].endswith("_m") or key.endswith("embeddings.position_ids"):
            continue
        if key.startswith("visual_encoder.") and not key.startswith("visual_encoder.visual."):
            continue
        if key == "visual_encoder.visual.proj":
            continue
        if match := _FUSION_LAYER.match(key):
            layer, rest = int(match[1]) - first, key[match.end() :]
            if layer < 0 or (rest.startswith("crossattention.") and bert.is_connected(layer)):
                continue
            key = f"fusion_encoder.encoder.layer.{layer}.{rest}"
        kept[key] = value
    return kept

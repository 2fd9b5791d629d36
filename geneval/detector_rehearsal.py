"""GenEval's judges with random weights in their published layouts, for a rehearsal.

The detector is mmdetection's checkpoint of Mask2Former Swin-S under 2.x names, the colours' CLIP
OpenAI's TorchScript archive. Random weights cannot have the published hashes: the rehearsal accepts
their own in their place, and is the same in all else.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from geneval.mmdet_weights import DetectorShape
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights

SIZES = ("swin-s",)
Size = tuple[int, ...]
_LEVELS, _POINTS = 3, 4
_CLIP = {
    "embed_dim": 768,
    "vision_cfg": {"layers": 24, "width": 1024, "patch_size": 14, "image_size": 224},
    "text_cfg": {"width": 768, "heads": 12, "layers": 12},
    "quick_gelu": True,
}


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write both files."""
    from geneval.detectors import CLIP, MASK2FORMER

    shapes = dict(checkpoint_shapes(DetectorShape()))
    weights.pickle(folder / MASK2FORMER.names[0], shapes, nest="state_dict")
    _write_clip(folder / CLIP.names[0])
    return Written(side=512)


def judge(folder: Path, image: Path) -> str:
    """Load both as `geneval/run.py` does and judge an image; says what was found."""
    from geneval import detectors
    from geneval.rules import judge_image
    from t2i.published import remembered_sha256

    file, clip = (folder / f.names[0] for f in (detectors.MASK2FORMER, detectors.CLIP))
    digest = remembered_sha256(file)
    detectors.CLIP = replace(detectors.CLIP, hashes=(remembered_sha256(clip),))
    detector = detectors.load_detector("mask2former", weights=file, sha256=digest)
    picture = Image.open(image)
    found = detector.detect(picture)
    name = next(iter(found))
    entry = {"tag": "colors", "prompt": f"a red {name}"}
    entry["include"] = [{"class": name, "count": 1, "color": "red"}]  # type: ignore[assignment]
    colors = detector.classify_colors(picture, name, found[name])
    verdict = judge_image(picture, entry, detector)
    kinds = sum(len(one.scores) for one in found.values())
    return f"{kinds} objects of {len(found)} classes, {name}: {colors[:3]}, {verdict.reason!r}"


def checkpoint_shapes(shape: DetectorShape) -> Iterator[tuple[str, Size]]:
    """Names and shapes of mmdetection's file, 2.x style."""
    width = shape.embed_dims
    yield from _weights("backbone.patch_embed.projection", (width, 3, 4, 4))
    yield from _weights("backbone.patch_embed.norm", (width,))
    for stage, (depth, heads) in enumerate(zip(shape.depths, shape.num_heads, strict=True)):
        own = width * 2**stage
        for block in range(depth):
            yield from _swin_block(f"backbone.stages.{stage}.blocks.{block}", own, heads, shape)
        if stage + 1 < len(shape.depths):
            yield from _weights(f"backbone.stages.{stage}.downsample.norm", (4 * own,))
            yield f"backbone.stages.{stage}.downsample.reduction.weight", (2 * own, 4 * own)
        yield from _weights(f"backbone.norm{stage}", (own,))
    yield from _pixel_decoder("panoptic_head.pixel_decoder", shape)
    yield from _query_decoder("panoptic_head", shape)


def _weights(name: str, size: Size) -> Iterator[tuple[str, Size]]:
    yield f"{name}.weight", size
    yield f"{name}.bias", size[:1]


def _swin_block(name: str, width: int, heads: int, shape: DetectorShape):
    hidden, cells = shape.mlp_ratio * width, (2 * shape.window_size - 1) ** 2
    yield from _weights(f"{name}.norm1", (width,))
    yield f"{name}.attn.w_msa.relative_position_bias_table", (cells, heads)
    yield f"{name}.attn.w_msa.relative_position_index", (shape.window_size**2,) * 2
    yield from _weights(f"{name}.attn.w_msa.qkv", (3 * width, width))
    yield from _weights(f"{name}.attn.w_msa.proj", (width, width))
    yield from _weights(f"{name}.norm2", (width,))
    yield from _weights(f"{name}.ffn.layers.0.0", (hidden, width))
    yield from _weights(f"{name}.ffn.layers.1", (width, hidden))


def _pixel_decoder(name: str, shape: DetectorShape):
    width, inputs = shape.feat_channels, [shape.embed_dims * 2**i for i in range(4)]
    for place, own in enumerate(reversed(inputs[1:])):
        yield from _weights(f"{name}.input_convs.{place}.conv", (width, own, 1, 1))
        yield from _weights(f"{name}.input_convs.{place}.gn", (width,))
    points = shape.heads * _LEVELS * _POINTS
    for layer in range(shape.encoder_layers):
        own = f"{name}.encoder.layers.{layer}"
        sizes = {"sampling_offsets": 2 * points, "attention_weights": points}
        for part, rows in (sizes | {"value_proj": width, "output_proj": width}).items():
            yield from _weights(f"{own}.attentions.0.{part}", (rows, width))
        yield from _feed_forward(f"{own}.ffns.0", width, shape.encoder_ffn)
        for norm in range(2):
            yield from _weights(f"{own}.norms.{norm}", (width,))
    yield f"{name}.level_encoding.weight", (_LEVELS, width)
    for part, (own, side) in {"lateral": (inputs[0], 1), "output": (width, 3)}.items():
        yield f"{name}.{part}_convs.0.conv.weight", (width, own, side, side)
        yield from _weights(f"{name}.{part}_convs.0.gn", (width,))
    yield from _weights(f"{name}.mask_feature", (width, width, 1, 1))


def _feed_forward(name: str, width: int, hidden: int):
    yield from _weights(f"{name}.layers.0.0", (hidden, width))
    yield from _weights(f"{name}.layers.1", (width, hidden))


def _query_decoder(name: str, shape: DetectorShape):
    width = shape.feat_channels
    for layer in range(shape.decoder_layers):
        own = f"{name}.transformer_decoder.layers.{layer}"
        for part in range(2):
            attention = f"{own}.attentions.{part}.attn"
            yield f"{attention}.in_proj_weight", (3 * width, width)
            yield f"{attention}.in_proj_bias", (3 * width,)
            yield from _weights(f"{attention}.out_proj", (width, width))
        yield from _feed_forward(f"{own}.ffns.0", width, shape.decoder_ffn)
        for norm in range(3):
            yield from _weights(f"{own}.norms.{norm}", (width,))
    yield from _weights(f"{name}.transformer_decoder.post_norm", (width,))
    for query in ("query_embed", "query_feat"):
        yield f"{name}.{query}.weight", (shape.num_queries, width)
    yield f"{name}.level_embed.weight", (_LEVELS, width)
    yield from _weights(f"{name}.cls_embed", (shape.num_classes + 1, width))
    for place in (0, 2, 4):
        yield from _weights(f"{name}.mask_embed.{place}", (width, width))


class _Archive(nn.Module):
    """CLIP's weights as OpenAI's archive has them, with constants among them."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        for name, value in clip.named_children():
            self.add_module(name, value)
        for name, parameter in clip.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(0))

    def forward(self, x):
        return x


def _write_clip(path: Path) -> None:
    import open_clip

    clip = open_clip.CLIP(**_CLIP).half()
    torch.jit.trace(_Archive(clip), torch.zeros(1), check_trace=False).save(str(path))

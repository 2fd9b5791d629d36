"""The models to measure: shipped bases, and published shapes with random weights (speed does not
depend on their values).
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from t2i.errors import UserError, choose_one
from t2i.loading import load_source
from t2i.models.base import Backbone, LoadOptions
from t2i.models.families import find_family
from t2i.models.janus import janus_config
from t2i.models.llamagen.llamagen_model import SIZES as LLAMAGEN_SIZES
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.models.open_magvit2.open_magvit2_model import SIZES as OPEN_MAGVIT2_SIZES
from t2i.models.open_magvit2.open_magvit2_model import OpenMAGVIT2, OpenMAGVIT2Config
from t2i.models.rar.rar_model import RAR, RARConfig
from t2i.models.rar.rar_model import SIZES as RAR_SIZES
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.shapes.tiny_janus import build_tiny_janus
from t2i.sources import BackboneSource
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR

PROMPT_TOKENS = 16
"""Prefix length for families in which it depends on the prompt."""
SHIPPED = {"shapes": "llamagen", "shapes-janus": "janus"}
"""Family of each shipped base."""
PUBLISHED = {
    **{f"llamagen-{size}": ("llamagen", f"c2i_{size}_256") for size in LLAMAGEN_SIZES},
    **{f"llamagen-{size}-384": ("llamagen", f"c2i_{size}_384") for size in LLAMAGEN_SIZES},
    "llamagen-text-XL": ("llamagen", "t2i_XL_stage1_256"),
    **{f"janus-{size}": ("janus", f"deepseek-ai/Janus-Pro-{size}") for size in janus_config.SIZES},
    **{f"open-magvit2-{size}": ("open_magvit2", f"AR_256_{size}") for size in OPEN_MAGVIT2_SIZES},
    **{f"rar-{size}": ("rar", f"rar_{size.lower()}") for size in RAR_SIZES},
}
"""Family of each published shape, and a source name that the family knows."""
_TINY: dict = {"dim": 32, "n_layer": 2, "n_head": 2, "grid": (4, 4), "ffn_dim": 64}


def llamagen(**shape) -> LlamaGen:
    """A LlamaGen without weights."""
    with torch.device("meta"):
        return LlamaGen(LlamaGenConfig(**shape))


def _tiny_llamagen(**shape) -> LlamaGen:
    return llamagen(**_TINY, vocab_size=48, **shape)


def _tiny_open_magvit2() -> OpenMAGVIT2:
    with torch.device("meta"):
        return OpenMAGVIT2(OpenMAGVIT2Config(**_TINY, n_intra_layer=2, bits=(3, 4), num_classes=10))


def _tiny_rar() -> RAR:
    with torch.device("meta"):
        return RAR(RARConfig(32, 2, 2, 64, grid=(4, 4), vocab_size=48, num_classes=10))


def _tiny_janus() -> Backbone:
    tokenizer = VQTokenizer(VQConfig(32, (1, 2), 1, 16, codebook_size=48, codebook_dim=8))
    shape = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64, "vocab_size": 320}
    return build_tiny_janus(["a red circle"], tokenizer, side=4, **shape)


TINY: dict[str, Callable[[], Backbone]] = {
    "tiny-class": partial(_tiny_llamagen, cond="class", num_classes=10),
    "tiny-text": partial(_tiny_llamagen, cond="text", caption_tokens=6, caption_dim=12),
    "tiny-janus": _tiny_janus,
    "tiny-open-magvit2": _tiny_open_magvit2,
    "tiny-rar": _tiny_rar,
}
"""Shapes for tests and tryouts; their numbers mean nothing."""


def check_shapes(names: tuple[str, ...]) -> None:
    """UserError if a name is unknown."""
    known = (*SHIPPED, *PUBLISHED, *TINY)
    for name in names:
        if name not in known:
            raise UserError(f"unknown shape {name!r}; {choose_one(name, known)}")


def _shipped(name: str, device: torch.device) -> Backbone:
    return load_source(BackboneSource(SHIPPED[name], name, generation_only=True), device=device)


def outline(name: str) -> Backbone:
    """A model and its image tokenizer without weights (a tiny one may have some)."""
    if name in SHIPPED:
        return _shipped(name, torch.device("meta"))
    if name in TINY:
        backbone = TINY[name]()
        frozen = backbone.frozen
        frozen.tokenizer = frozen.tokenizer or backbone.tokenizer_type.outline()
        return backbone
    family, source = PUBLISHED[name]
    found = find_family(family).backbone_class.outline(source, LoadOptions(generation_only=True))
    assert found is not None, "every published name has an outline"
    return found


def open_backbone(
    name: str, dtype: torch.dtype, device: torch.device, *, tokenizer: bool = False
) -> Backbone:
    """A shipped base, or a shape with random weights; with its image tokenizer on request."""
    if name in SHIPPED:
        backbone = _shipped(name, device).to(dtype)
    else:
        backbone = filled(outline(name), dtype, device)
    if not tokenizer:
        backbone.frozen.tokenizer = None
    elif name not in SHIPPED:
        _fill(backbone.tokenizer.to_empty(device=device))
    return backbone


def filled(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> Backbone:
    """The model with random weights, created on the device."""
    backbone = backbone.to(dtype).to_empty(device=device)
    _fill(backbone)
    return backbone.eval()


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for value in module.state_dict().values():
        if value.dim() == 1:
            value.fill_(1)
        else:
            value.normal_(std=0.02, generator=generator)


def attached(backbone: Backbone, method: str) -> TensorAR:
    """The backbone with TensorAR attached, by a preset of the method."""
    return TensorAR(backbone, presets.method(method)).eval()


def made_up(backbone: Backbone, images: int) -> dict[str, Tensor]:
    """Made-up conditions in the dtype of the weights."""
    prepared = backbone.made_up_conditions(images, PROMPT_TOKENS)
    dtype = next(backbone.parameters()).dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in prepared.items()}


def need_tokenizer(methods: Iterable[str]) -> bool:
    """Whether a preset's noise needs the tokenizer's code vectors."""
    return any(presets.method(name).noise == "codebook" for name in methods)

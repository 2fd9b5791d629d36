"""Parts of `gpu_check.py`: how fast is drawing and training, and how near to what is possible?

Models have published shapes and random weights: speed does not depend on their values.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import nn

from launch.benchmark import TrainingStep, seconds
from t2i.models.base import Backbone, LoadOptions
from t2i.models.janus.janus_model import Janus
from t2i.models.llamagen.llamagen_model import SIZES, LlamaGen, LlamaGenConfig
from t2i.models.llamagen.llamagen_recipes import text_recipes
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.sampling import Speed
from t2i.shapes.tiny_janus import build_tiny_janus
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.training.config import EngineOptions
from t2i.training.memory import memory_lines

Rows = Iterator[tuple[dict, Callable[[], dict]]]
"""What each row of a part is about, and the work that fills it."""
PROMPT_TOKENS = 16
METHODS = {1: presets.base, 4: presets.iclr2026}


def _llamagen(**shape) -> LlamaGen:
    with torch.device("meta"):
        return LlamaGen(LlamaGenConfig(**shape))


def _janus_pro() -> Janus:
    outline = Janus.outline("deepseek-ai/Janus-Pro-1B", LoadOptions(generation_only=True))
    assert outline is not None, "a published name"
    return outline


def _tiny_janus() -> Janus:
    tokenizer = VQTokenizer(VQConfig(32, (1, 2), 1, 16, codebook_size=48, codebook_dim=8))
    shape = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64, "vocab_size": 320}
    return build_tiny_janus(["a red circle"], tokenizer, side=4, **shape)


SHAPES: dict[str, Callable[[], Backbone]] = {
    "LlamaGen-B class": partial(_llamagen, **SIZES["B"], cond="class"),
    "LlamaGen-XL class": partial(_llamagen, **SIZES["XL"], cond="class"),
    "Janus-Pro-1B": _janus_pro,
    "LlamaGen-XL text": partial(_llamagen, **SIZES["XL"], cond="text"),
}
_TINY = {"dim": 32, "n_layer": 2, "n_head": 2, "grid": (4, 4), "vocab_size": 48, "ffn_dim": 64}
TINY: dict[str, Callable[[], Backbone]] = {
    "llamagen class": partial(_llamagen, **_TINY, cond="class", num_classes=10),
    "llamagen text": partial(_llamagen, **_TINY, cond="text", caption_tokens=6, caption_dim=12),
    "janus": _tiny_janus,
}
TRAINED = {"LlamaGen-B class": 32, "LlamaGen-XL class": 16, "Janus-Pro-1B": 8}
"""Samples per step."""


# -- models ----------------------------------------------------------------------------------------


@torch.no_grad()
def random_model(build: Callable[[], Backbone], k: int, dtype, device: torch.device) -> TensorAR:
    """A model whose weights are made where they are used."""
    backbone = build().to(dtype).to_empty(device=device)
    backbone.frozen.tokenizer = None
    for value in backbone.state_dict().values():
        value.fill_(1) if value.dim() == 1 else value.normal_(std=0.02)
    return TensorAR(backbone, METHODS[k]())


@torch.no_grad()
def prefix_of(backbone: Backbone) -> int:
    """Prefix tokens of what is measured."""
    return backbone.encode_condition(backbone.made_up_conditions(1, PROMPT_TOKENS)).prefix.shape[1]


def multiplied(model: nn.Module) -> int:
    """Parameters that every input meets: all but tables, of which it reads a row."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


# -- what the hardware can do ----------------------------------------------------------------------


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = [seconds(lambda: target.copy_(source), device) for _ in range(6)]
    return 2 * size / min(times)


def matmul_flops(device: torch.device, side: int) -> float:
    """bf16 FLOP per second of a large matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(6)]
    return 2 * side**3 / min(times)


# -- sampling --------------------------------------------------------------------------------------


def sampling(device: torch.device, tiny: bool) -> Rows:
    rate = bandwidth(device, 1 << (20 if tiny else 30))
    yield {"model": "copy"}, lambda: {"bandwidth_GB/s": rate / 1e9}
    speeds: list[Speed] = ["graphs", "eager", "compiled"] if device.type == "cuda" else ["eager"]
    for speed, (name, build) in product(speeds, (TINY if tiny else SHAPES).items()):
        for images, k in product((1, 2) if tiny else (8, 64), METHODS):
            about = {"model": name, "speed": speed, "k": k, "images": images}
            model = partial(random_model, build, k, torch.bfloat16, device)
            yield about, partial(time_sampling, model, images, speed, rate)


def time_sampling(
    build: Callable[[], TensorAR], images: int, speed: Speed, bandwidth: float
) -> dict:
    """Milliseconds per step, and the least that this bandwidth allows.

    A first pass loads kernels, compiles and records; a user pays for it once a process, so that it
    is a number of its own.
    """
    torch.compiler.reset()  # more than a few shapes in a process would run uncompiled
    model = build().eval()
    backbone, keys = model.backbone, torch.arange(images)
    prepared = backbone.made_up_conditions(images, PROMPT_TOKENS)
    settings = replace(model.sampling, cfg_scale=2.0)
    draw = partial(sample_windows, model, prepared, keys, settings, speed=speed)
    first, whole = (seconds(draw, backbone.device) for _ in range(2))
    entries = prefix_of(backbone) + backbone.spec.num_tokens / 2
    cache = torch.stack(backbone.new_cache(2 * images, 1).keys)
    weights = multiplied(model) * cache.element_size()
    floor = (weights + 2 * cache.numel() * cache.element_size() * entries) / bandwidth * 1e3
    ms = whole / model.windows.count * 1e3
    return {
        "ms_per_step": ms,
        "s_per_image": whole / images,
        "first_s": first,
        "floor_ms": floor,
        "of_floor": floor / ms,
    }


# -- training --------------------------------------------------------------------------------------


def training(device: torch.device, tiny: bool) -> Rows:
    peak = matmul_flops(device, 256 if tiny else 8192)
    yield {"model": "matrix product"}, lambda: {"TFLOP/s": peak / 1e12}
    for name, k in product(TINY if tiny else TRAINED, METHODS):
        batch, build = 2 if tiny else TRAINED[name], (TINY if tiny else SHAPES)[name]
        about = {"model": name, "k": k, "batch": batch}
        yield about, partial(time_training, build, k, batch, device, peak)


def time_training(
    build: Callable[[], Backbone], k: int, batch: int, device: torch.device, peak: float
) -> dict:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_model(build, k, torch.float32, device).train()
    backbone = model.backbone
    step = TrainingStep(model, backbone.made_up_conditions(batch, PROMPT_TOKENS), autocast=True)
    times = [seconds(step, device) for _ in range(6)]
    taken = statistics.median(times[2:])
    inputs = batch * (prefix_of(backbone) + model.windows.count - 1)
    flops = 6 * multiplied(model) * inputs / taken
    settings = replace(
        text_recipes()["shapes-iclr2026"][1], engine=EngineOptions(precision="autocast")
    )
    memory = {}
    if device.type == "cuda":
        memory = {
            "state_gb": torch.cuda.memory_allocated() / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
    return {
        "ms_per_step": taken * 1e3,
        "images_per_s": batch / taken,
        "TFLOP/s": flops / 1e12,
        "of_matmul": flops / peak,
        **memory,
        "estimate": memory_lines(model, settings, 1)[0].split(")")[1].partition("<-")[0].strip(),
    }

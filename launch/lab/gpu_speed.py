"""How fast are sampling and training here, and how near to what the hardware allows? (parts of
`gpu_check.py`)

Models have published shapes and random weights: speed does not depend on their values.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product

import helpers
import torch
from torch import Tensor, nn

from launch.lab.gpu_parity import Rows
from t2i.models.base import Backbone
from t2i.models.janus.janus_model import Janus, outline
from t2i.models.llamagen.llamagen_model import SIZES, LlamaGen, LlamaGenConfig
from t2i.models.llamagen.llamagen_recipes import RECIPES
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.training.check import memory_lines
from t2i.training.config import EngineOptions

SAMPLING = (
    "bf16, eager, guided (two rows an image), codes only. floor_ms = (weights + keys and values) / bandwidth: weights = all but "
    "embedding tables, once a step; keys and values = rows x (prefix + half of the codes) entries; bandwidth = bytes read and written "
    "by a copy on this device. of_floor = floor_ms / ms_per_step."
)
TRAINING = (
    "fp32 weights under bf16 autocast, forward + backward + fused AdamW, all parameters trained. TFLOP/s = 6 x parameters (without "
    "embedding tables) x inputs of the trunk / time; of_matmul = that over a large bf16 product's on this device. state_gb = memory "
    "after a step (weights, gradients, optimizer), estimate = what `--check` says of it; peak_gb has activations, too."
)
PROMPT_TOKENS = 16
METHODS = {1: presets.base, 4: presets.iclr2026}


def _llamagen(size: str, cond: str) -> LlamaGen:
    with torch.device("meta"):
        return LlamaGen(LlamaGenConfig(**SIZES[size], cond=cond))


SHAPES: dict[str, Callable[[], Backbone]] = {
    "LlamaGen-B class": partial(_llamagen, "B", "class"),
    "LlamaGen-XL class": partial(_llamagen, "XL", "class"),
    "Janus-Pro-1B": partial(outline, "deepseek-ai/Janus-Pro-1B", generation_only=True),
    "LlamaGen-XL text": partial(_llamagen, "XL", "text"),
}
TINY: dict[str, Callable[[], Backbone]] = {
    "llamagen class": partial(helpers.tiny_llamagen, "class"),
    "llamagen text": partial(helpers.tiny_llamagen, "text"),
    "janus": helpers.tiny_janus,
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


def random_conditions(backbone: Backbone, batch: int, device: torch.device) -> dict[str, Tensor]:
    if backbone.spec.cond_kind == "class":
        return {"labels": torch.arange(batch, device=device) % backbone.spec.num_classes}
    if isinstance(backbone, Janus):
        ids = torch.full((batch, PROMPT_TOKENS), 5, device=device)
        return {"ids": ids, "null_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
    shape = (batch, backbone.config.caption_tokens)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return {
        "features": torch.randn(*shape, backbone.config.caption_dim, device=device),
        "mask": mask,
    }


def prefix_of(backbone: Backbone) -> int:
    return PROMPT_TOKENS if isinstance(backbone, Janus) else backbone.spec.prefix_tokens


def multiplied(model: nn.Module) -> int:
    """Parameters that every input meets: all but tables, of which it reads a row."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


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
    speed = bandwidth(device, 1 << (20 if tiny else 30))
    yield {"model": "copy"}, lambda: {"bandwidth_GB/s": speed / 1e9}
    for name, build in (TINY if tiny else SHAPES).items():
        for images, k in product((1, 2) if tiny else (8, 64), METHODS):
            about = {"model": name, "k": k, "images": images}
            yield about, partial(time_sampling, build, k, images, device, speed)


def time_sampling(
    build: Callable[[], Backbone], k: int, images: int, device: torch.device, speed: float
) -> dict:
    """Milliseconds per step, and the least that this bandwidth allows."""
    model = random_model(build, k, torch.bfloat16, device).eval()
    backbone, keys = model.backbone, torch.arange(images)
    prepared = random_conditions(backbone, images, device)
    settings = replace(model.sampling, cfg_scale=2.0)
    warm_up(model, prepared, keys, settings)
    whole = seconds(lambda: sample_windows(model, prepared, keys, settings), device)
    entries = prefix_of(backbone) + backbone.spec.num_tokens / 2
    cache = torch.stack(backbone.new_cache(2 * images, 1).keys)
    weights = multiplied(model) * cache.element_size()
    floor = (weights + 2 * cache.numel() * cache.element_size() * entries) / speed * 1e3
    ms = whole / model.windows.count * 1e3
    return {
        "ms_per_step": ms,
        "s_per_image": whole / images,
        "floor_ms": floor,
        "of_floor": floor / ms,
    }


class _WarmedUp(Exception):
    pass


def warm_up(model: TensorAR, prepared: dict, keys: Tensor, settings: SamplingConfig) -> None:
    """The first few steps, which load kernels and allocate memory."""
    steps = iter(range(8))

    def count() -> None:
        if next(steps, None) is None:
            raise _WarmedUp

    with suppress(_WarmedUp):
        sample_windows(model, prepared, keys, settings, on_step=count)


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
    shape = (batch, backbone.spec.num_tokens)
    codes = torch.stack(
        [torch.randint(v, shape, device=device) for v in backbone.spec.subvocabs], dim=-1
    )
    prepared, keys = random_conditions(backbone, batch, device), torch.arange(batch, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            condition = backbone.encode_condition(prepared)
            losses = model(codes, condition, model.noised_windows(codes, keys))
            loss = losses.weighted(model.config.weights())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    times = [seconds(step, device) for _ in range(6)]
    taken = statistics.median(times[2:])
    inputs = batch * (prefix_of(backbone) + model.windows.count - 1)
    flops = 6 * multiplied(model) * inputs / taken
    settings = replace(next(iter(RECIPES.values()))[1], engine=EngineOptions(precision="autocast"))
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

"""Sampling windows (arXiv 2505.16324, Algorithm 1): prefill, step, loop.

Every step samples one whole window, feeds it back un-noised and keeps slots 0..stride-1 as final.
All slots share the filters and the guidance scale. Random numbers are drawn up front from per-image
keys, so an image does not depend on its neighbours.

Shapes: B images, R rows (2B with guidance: conditional rows first), N windows, k slots, S
sub-tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.models.base import Condition, KVCache
from t2i.rng import fold, uniforms
from t2i.sampling import SamplingConfig
from t2i.tensorar.model import TensorAR, draw, slot_parts


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature, then top-k (ties stay), then top-p (the code that crosses the threshold stays);
    fp32 [..., V].
    """
    logits = logits / max(config.temperature, 1e-5)
    if 0 < config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        over = ordered.softmax(-1).cumsum(-1) > config.top_p
        removed = F.pad(over[..., :-1], (1, 0), value=False)  # the code that crosses p stays
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits


def pick(logits: Tensor, u: Tensor, config: SamplingConfig) -> Tensor:
    """One code per row of logits [..., V] from uniform numbers [...]; greedy at temperature 0."""
    if config.temperature == 0:
        return logits.argmax(-1)
    return draw(filter_logits(logits, config).softmax(-1), u)


@dataclass
class DecodeState:
    """What is carried from step to step."""

    condition: Condition
    cache: KVCache
    guided: bool
    """Rows are [conditional; unconditional]."""


@torch.no_grad()
def prefill(
    model: TensorAR, prepared: dict[str, Tensor], config: SamplingConfig
) -> tuple[Tensor, DecodeState]:
    """Run the condition prefix. Returns the hidden state [R, D] that predicts window 0, and the
    state.
    """
    backbone = model.backbone
    condition = backbone.encode_condition(prepared)
    guided = any(c.cfg_scale > 1 for c in config.by_sub_token(len(backbone.spec.subvocabs)))
    if guided:
        drop = torch.ones(
            condition.prefix.shape[0], dtype=torch.bool, device=condition.prefix.device
        )
        condition = Condition.cat([condition, backbone.encode_condition(prepared, drop)])
    rows, length = condition.prefix.shape[:2]
    cache = backbone.new_cache(rows, length + model.windows.count - 1)
    positions = torch.arange(length, device=condition.prefix.device)
    h = backbone.trunk(condition.prefix, positions, condition, cache.at(0, length))[:, -1]
    return h, DecodeState(condition, cache, guided)


@torch.no_grad()
def step(model: TensorAR, window: Tensor, index: int, state: DecodeState) -> Tensor:
    """Feed window `index` [B, k, S]; returns the hidden state [R, D] that predicts window `index` +
    1.
    """
    x = model.embed_windows(window[:, None], first=index)
    if state.guided:
        x = torch.cat([x, x])  # the window is the same on both sides: encode it once
    prefix = state.condition.prefix.shape[1]
    position = torch.tensor([prefix + index * model.windows.stride], device=x.device)
    return model.backbone.trunk(x, position, state.condition, state.cache.at(prefix + index, 1))[
        :, -1
    ]


@torch.no_grad()
def window_logits(
    model: TensorAR,
    d_RkD: Tensor,
    earlier: Tensor,
    index: int,
    state: DecodeState,
    config: SamplingConfig,
) -> Tensor:
    """Guided fp32 logits [B, k, V_s] of the next sub-token of window `index`, from decoded slots
    and earlier sub-tokens [B, k, s].

    The settings are those of this sub-token (`SamplingConfig.by_sub_token`).
    """
    if state.guided:
        earlier = torch.cat([earlier, earlier])
    logits = torch.cat(
        [
            # In one layout for every k: in bf16 the bits of a matrix product depend on it.
            model.backbone.next_logits(d_RkD[:, part].contiguous(), earlier[:, part])
            for part in slot_parts(d_RkD.shape[1])
        ],
        dim=1,
    )
    if not state.guided:
        return logits
    cond, null = logits.chunk(2)
    if config.cfg_interval > -1 and index * model.windows.stride - 1 > config.cfg_interval:
        return cond
    scale = model.backbone.guidance(config, index, model.windows.count)
    return null + (cond - null) * scale


def draw_window(
    model: TensorAR,
    h_RD: Tensor,
    u_BkS: Tensor,
    index: int,
    state: DecodeState,
    config: SamplingConfig,
) -> Tensor:
    """Sample window `index`, int64 [B, k, S], from the hidden state that predicts it."""
    stride = model.windows.stride
    d_RkD = model.decode_slots(h_RD)[:, : u_BkS.shape[1]]
    window = torch.empty(*u_BkS.shape[:2], 0, dtype=torch.long, device=h_RD.device)
    for s, own in enumerate(config.by_sub_token(u_BkS.shape[-1])):
        drafts = replace(own, temperature=own.temperature * own.draft_temperature)
        logits = window_logits(model, d_RkD, window, index, state, own)
        codes = pick(logits[:, :stride], u_BkS[:, :stride, s], own)
        if logits.shape[1] > stride:  # k = 1 has no drafts
            own_drafts = pick(logits[:, stride:], u_BkS[:, stride:, s], drafts)
            codes = torch.cat([codes, own_drafts], dim=1)
        window = torch.cat([window, codes[..., None]], dim=-1)
    return window


def sample_windows(
    model: TensorAR,
    prepared: dict[str, Tensor],
    keys: Tensor,
    config: SamplingConfig,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Sample images as all their windows, int64 [B, N, k, S]: `Windows` reads the final codes and
    every stage off them.

    Args:
        prepared: conditions of B images, from `Backbone.prepare`.
        keys: int64 [B], one per image (`t2i.rng.make_keys`).
        on_step: called after every window, for a progress bar.
    """
    assert not model.training, "sampling needs model.eval(): dropout would act"
    spec, windows = model.backbone.spec, model.windows.shrunk(config.window)
    # Slot-major: slot 0 gets the same numbers for every k, so that base and TensorAR can be
    # compared image by image.
    u = uniforms(keys, windows.size, windows.count, len(spec.subvocabs)).to(model.backbone.device)
    drawn = []
    h, state = prefill(model, prepared, config)
    for index in range(windows.count):
        drawn.append(draw_window(model, h, u[:, :, index], index, state, config))
        if index + 1 < windows.count:
            fed = drawn[-1]
            if config.renoise:
                noise_keys = fold(keys, 1, index).to(fed.device)
                fed = model.corrupt(fed[:, None], noise_keys, config.renoise)[:, 0]
            h = step(model, fed, index, state)
        if on_step is not None:
            on_step()
    return torch.stack(drawn, dim=1)

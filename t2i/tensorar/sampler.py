"""Sampling windows (arXiv 2505.16324, Algorithm 1): prefix, one step, loop.

A step feeds the last window drawn, without noise, and draws the whole next one; slots 0..stride-1
are final (`Windows.fed`: the trunk reads one input for each). All slots share the filters and the
guidance scale. So that a step can be recorded in a CUDA graph, every number that changes from step
to step is in a tensor, and none is read back from the device.
A `leap` feeds n windows of each row, of which all but the first are guesses
(`t2i.tensorar.speculation`).

Shapes: B images, R rows (2B with guidance: conditional rows first), N windows, n of them at once, M
rows by n, k slots, S sub-tokens, P prefix, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from t2i.models.base import Backbone
from t2i.models.conditions import Condition
from t2i.models.kv_cache import KVCache
from t2i.rng import fold
from t2i.sampling import SamplingConfig, Speed, SubTokenSampling
from t2i.tensorar.drawing import check_finite, noise_keys, pick, picked_sum, rules
from t2i.tensorar.model import TensorAR, slot_parts
from t2i.tensorar.speculation import count_right, first_guesses, put, take
from t2i.tensorar.speed import Run, frozen_weights, runner
from t2i.tensorar.windows import Windows

# -- the trunk, step by step -----------------------------------------------------------------------


@dataclass
class DecodeState:
    """What the trunk needs from step to step, and the guidance of every step."""

    condition: Condition
    """The condition of all R rows."""
    cache: KVCache
    scales_NS: Tensor | None
    """Guidance by window and sub-token, fp32; None without guidance."""
    windows: Windows
    """The geometry of the windows that are drawn."""

    @property
    def guided(self) -> bool:
        """Rows are [conditional; unconditional]."""
        return self.scales_NS is not None

    def extent(self, index: int) -> int:
        """How many cache entries are read by the step that feeds window `index`."""
        return self.cache.bucket(self.condition.prefix.shape[1] + (index + 1) * self.windows.stride)


def guidance_table(model: TensorAR, config: SamplingConfig) -> Tensor | None:
    """Guidance scales fp32 [N, S], 1 past `cfg_interval`; None if there is no guidance."""
    settings = config.by_sub_token(len(model.backbone.spec.subvocabs))
    if all(own.cfg_scale == 1 for own in settings):
        return None
    windows = drawn_windows(model, config)
    stride, count = windows.stride, windows.count
    shown = count if config.cfg_interval < 0 else (config.cfg_interval + 1) // stride + 1
    rows = [[model.backbone.guidance(own, i, count) for own in settings] for i in range(count)]
    table = torch.tensor(rows, dtype=torch.float32)  # whatever the default type is
    table[shown:] = 1
    return table.to(model.backbone.device)


def check_sampling(model: TensorAR, config: SamplingConfig) -> None:
    """UserError if this model cannot be sampled with these settings."""
    drawn_windows(model, config)
    config.by_sub_token(len(model.backbone.spec.subvocabs))


def drawn_windows(model: TensorAR, config: SamplingConfig) -> Windows:
    """The windows drawn with these settings; UserError if they do not fit the model."""
    return model.windows.shrunk(config.window, config.stride)


def new_state(
    model: TensorAR,
    condition: Condition,
    scales_NS: Tensor | None,
    windows: Windows,
    *,
    own_pace: bool = False,
) -> DecodeState:
    """A state with an empty cache for this condition.

    With `own_pace` there is room for the last window too, because finished rows feed it.
    """
    rows, length = condition.prefix.shape[:2]
    fed = windows.count - 1 + own_pace
    cache = model.backbone.new_cache(rows, length + fed * windows.stride)
    return DecodeState(condition, cache, scales_NS, windows)


def encode_rows(backbone: Backbone, prepared: dict[str, Tensor], *, guided: bool) -> Condition:
    """The condition of all rows, with gradients unless the caller has disabled them."""
    condition = backbone.encode_condition(prepared)
    if not guided:
        return condition
    drop = torch.ones(len(condition.prefix), dtype=torch.bool, device=condition.prefix.device)
    return Condition.cat([condition, backbone.encode_condition(prepared, drop)])


@torch.no_grad()
def run_prefix(backbone: Backbone, state: DecodeState) -> Tensor:
    """Fill the cache with the prefix; return the hidden state [R, D] that predicts window 0."""
    prefix = state.condition.prefix
    positions = torch.arange(prefix.shape[1], device=prefix.device)
    cache = state.cache.at(positions, prefix.shape[1])
    return backbone.trunk(prefix, positions, state.condition, cache)[:, -1]


@torch.no_grad()
def advance(
    model: TensorAR, windows: Tensor, index: Tensor, state: DecodeState, extent: int
) -> Tensor:
    """Feed consecutive windows [B, n, k, S]; return the hidden states [R, n, D] that predict the
    window after each. `index` int64 [n], or [B, n] by row, are their numbers; `extent` is
    `state.extent` of the last.
    """
    stride, prefix = state.windows.stride, state.condition.prefix.shape[1]
    fed, known = state.windows.fed(windows)
    x = model.embed_windows(fed, first=index[..., :1] * stride, known_n=known)
    if state.guided:
        x = torch.cat([x, x])  # both halves have the same windows: encode them once
        index = index if index.dim() == 1 else torch.cat([index, index])
    entry = position = prefix + index
    if stride > 1:
        shift_s = torch.arange(stride, device=index.device)
        entry = prefix + (index[..., None] * stride + shift_s).flatten(-2)
        # Finished rows may feed codes past the image; their outputs are never used.
        position = entry.clamp(max=prefix + state.windows.tokens - 1)
    cache = state.cache.at(entry, extent)
    return model.backbone.trunk(x, position, state.condition, cache)[:, stride - 1 :: stride]


@torch.no_grad()
def window_logits(
    model: TensorAR, d_MkD: Tensor, earlier: Tensor, index: Tensor, state: DecodeState
) -> Tensor:
    """Guided fp32 logits [B n, k, V_s] of the windows' next sub-token, from decoded slots and the
    earlier sub-tokens [B n, k, s]. `index` int64 [1] or [B n]: the windows' numbers.
    """
    s = earlier.shape[-1]
    if state.guided:
        earlier = torch.cat([earlier, earlier])
    logits = torch.cat(
        [
            # The same memory layout for every k: in bf16 the bits of a product depend on it.
            model.backbone.next_logits(d_MkD[:, part].contiguous(), earlier[:, part])
            for part in slot_parts(d_MkD.shape[1])
        ],
        dim=1,
    )
    if state.scales_NS is None:
        return logits
    return guide_logits(logits, state.scales_NS[index, s][:, None, None])


def guide_logits(logits: Tensor, scale: Tensor) -> Tensor:
    """Guided logits [B, ...] from the logits of all rows [2B, ...]."""
    cond, null = logits.chunk(2)
    return torch.where(scale == 1, cond, null + (cond - null) * scale)


# -- images ----------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """A batch of images while it is being drawn: everything that a step reads and writes."""

    state: DecodeState
    rules: tuple[tuple[SubTokenSampling, SubTokenSampling], ...]
    """The sampling settings of final slots and of drafts, for each sub-token."""
    keys_B: Tensor
    noise_NBkS: Tensor
    """Noise keys of every slot."""
    corrupt: Callable[[Tensor, Tensor], Tensor] | None
    """Re-noises the drafts before they are fed back; None to feed them as drawn."""
    windows_BNkS: Tensor
    """The windows drawn so far. With speculation, guesses follow them, and there is one more window
    for finished rows to write to.
    """
    index: Tensor
    """The number of the last window drawn, int64 [1]; with speculation [B, 1], one per row."""
    ahead: int
    """How many windows of each row a call draws by speculation; 0: no speculation."""
    picked: Tensor
    """Sum of the logits of all codes drawn so far, fp32 []: it shows whether they were finite."""

    def refill(self, condition: Condition, keys: Tensor, noise: Tensor) -> None:
        """Start another batch of the same shape, in place."""
        for own, new in zip(_tensors(self.state.condition), _tensors(condition), strict=True):
            own.copy_(new)
        for layer in (*self.state.cache.keys, *self.state.cache.values):
            layer.zero_()
        self.keys_B.copy_(keys)
        self.noise_NBkS.copy_(noise)
        self.index.zero_()
        self.picked.zero_()


def _tensors(condition: Condition) -> list[Tensor]:
    given = (condition.prefix, condition.mask, *condition.extras.values())
    return [tensor for tensor in given if tensor is not None]


def new_drawing(
    model: TensorAR,
    state: DecodeState,
    keys: Tensor,
    noise: Tensor,
    config: SamplingConfig,
    ahead: int = 0,
) -> Drawing:
    """A batch of images before anything is drawn."""
    count, batch, slots, subs = noise.shape
    room, own = (count + 1, (batch, 1)) if ahead else (count, (1,))
    corrupt = None
    if config.renoise:
        corrupt = model.corruption(slots, keys.device, config.renoise, config.stride)
    return Drawing(
        state=state,
        rules=rules(config, subs),
        keys_B=keys.clone(),
        noise_NBkS=noise,
        corrupt=corrupt,
        windows_BNkS=noise.new_zeros(batch, room, slots, subs),
        index=noise.new_zeros(own),
        ahead=ahead,
        picked=torch.zeros((), dtype=torch.float32, device=keys.device),
    )


def draw_windows(model: TensorAR, h_RnD: Tensor, index: Tensor, drawing: Drawing) -> Tensor:
    """Draw windows `index` (int64 [n], or [B, n] by row), [B, n, k, S], from the hidden states
    that predict them.
    """
    stride, n = drawing.state.windows.stride, index.shape[-1]
    noise_MkS = take(drawing.noise_NBkS.transpose(0, 1), index).flatten(0, 1)
    rows, slots = noise_MkS.shape[:2]
    shared = index.numel() == 1  # all rows draw the same window
    index_M = (index if shared else index.expand(rows // n, n)).flatten()
    d_MkD = model.decode_slots(h_RnD.flatten(0, 1))[:, :slots]
    windows = noise_MkS[..., :0]
    for s, (final, drafts) in enumerate(drawing.rules):
        logits = window_logits(model, d_MkD, windows, index_M, drawing.state)
        alike = final == drafts or slots == stride
        parts = [(slice(0, slots if alike else stride), final)]
        if not alike:
            parts.append((slice(stride, slots), drafts))
        picked = [pick(logits[:, part], noise_MkS[:, part, s], own) for part, own in parts]
        codes = torch.cat(picked, dim=1)[..., None]
        drawing.picked.add_(picked_sum(logits, codes))
        windows = torch.cat([windows, codes], dim=-1)
    return windows.unflatten(0, (-1, n))


def draw_next(model: TensorAR, index: Tensor, drawing: Drawing, extent: int) -> Tensor:
    """Feed the drawing's windows `index` (consecutive, int64 [n], or [B, n] by row) and draw the
    window after each: [B, n, k, S]. `extent` is `DecodeState.extent` of the last. What is drawn
    after the image's last window is meaningless.
    """
    windows = take(drawing.windows_BNkS, index)
    if drawing.corrupt is not None:
        keys_Bn = fold(drawing.keys_B[:, None], 1, index)
        corrupted = drawing.corrupt(windows.flatten(0, 1)[:, None], keys_Bn.flatten())
        windows = corrupted[:, 0].unflatten(0, keys_Bn.shape)
    h = advance(model, windows, index, drawing.state, extent)
    last = drawing.state.windows.count - 1
    following = index + 1 if index.dim() == 1 else (index + 1).clamp(max=last)
    return draw_windows(model, h, following, drawing)


def step(model: TensorAR, drawing: Drawing, extent: int) -> None:
    """Feed the last window drawn and draw the next. `extent` is `DecodeState.extent`."""
    window = draw_next(model, drawing.index, drawing, extent)
    drawing.index.add_(1)
    drawing.windows_BNkS.index_copy_(1, drawing.index, window)


def leap(model: TensorAR, drawing: Drawing, extent: int) -> None:
    """Feed each row's last settled window and the guesses after it, and settle the windows that
    follow from correct ones. The other windows drawn become the next guesses.
    """
    geometry, ahead = drawing.state.windows, drawing.ahead
    last = geometry.count - 1
    ahead_n = torch.arange(ahead, device=drawing.index.device)
    fed_Bn = (drawing.index + ahead_n).clamp(max=last)
    drawn = draw_next(model, fed_Bn, drawing, extent)
    settled = count_right(drawn, take(drawing.windows_BNkS, fed_Bn + 1), geometry, fed_Bn + 1)
    put(drawing.windows_BNkS, fed_Bn + 1, drawn)
    drawing.index.add_(settled).clamp_(max=last)
    # First guesses for the windows that the next call feeds and this one did not draw.
    guess(model, drawing, fed_Bn[:, -1:] + 1)


def guess(model: TensorAR, drawing: Drawing, known_B1: Tensor) -> None:
    """Write first guesses after window `known_B1`, the last one drawn in each row."""
    geometry = drawing.state.windows
    ahead_n = torch.arange(1, drawing.ahead, device=known_B1.device)
    columns = model.backbone.spec.grid[1]
    guesses = first_guesses(drawing.windows_BNkS, geometry, columns, known_B1 + ahead_n)
    put(drawing.windows_BNkS, (known_B1 + ahead_n).clamp(max=geometry.count), guesses)


@torch.no_grad()
def sample_windows(
    model: TensorAR,
    prepared: dict[str, Tensor],
    keys: Tensor,
    config: SamplingConfig,
    on_step: Callable[[Tensor], None] | None = None,
    speed: Speed = "eager",
    speculate: int = 0,
) -> Tensor:
    """Sample images, returned as all their windows int64 [B, N, k, S], from which `Windows` reads
    the final codes and every refinement stage.

    Args:
        prepared: conditions of B images, from `Backbone.prepare`.
        keys: int64 [B], one per image (`t2i.rng.make_keys`).
        on_step: called once for every settled window with all windows [B, N, k, S] so far, which
            it must not change: for a progress bar, or a preview of the image.
        speed: how steps are run, as returned by `t2i.tensorar.speed.choose`.
        speculate: how many windows of each image a call draws; 0: one by one.

    Raises NotFiniteError if logits were NaN or infinite.
    """
    assert not model.training, "sampling needs model.eval(), or dropout is active"
    backbone, windows = model.backbone, drawn_windows(model, config)
    assert speed != "auto", "resolve it with `choose` first"
    keys = keys.to(backbone.device)
    scales = guidance_table(model, config)
    condition = encode_rows(backbone, prepared, guided=scales is not None)
    make = partial(begin, model, condition, scales, keys, config, speed, speculate)
    with model.held.lock:
        if speed == "eager":
            model.held.clear()
            drawing, run = make()
        else:
            shapes = tuple((t.shape, t.dtype) for t in _tensors(condition))
            weights = frozen_weights(model, speed)
            codebook = backbone.frozen.tokenizer if config.renoise else None
            context = backbone.revision, codebook, torch.is_inference_mode_enabled()
            key = speed, speculate, config, shapes, weights, context
            (drawing, run), known = model.held.fetch(key, make)
            if known:
                noise = noise_keys(keys, windows, len(backbone.spec.subvocabs))
                drawing.refill(condition, keys, noise)
        for settled in whole_run(model, drawing, run):
            if on_step is not None:
                for _ in range(settled):
                    on_step(drawing.windows_BNkS[:, : windows.count])
        check_finite(drawing.picked, condition.prefix.dtype)
        return drawing.windows_BNkS[:, : windows.count].clone()


def begin(
    model: TensorAR,
    condition: Condition,
    scales_NS: Tensor | None,
    keys: Tensor,
    config: SamplingConfig,
    speed: Speed,
    speculate: int,
) -> tuple[Drawing, Run]:
    """A batch of images before anything is drawn, and the function that runs one step of it."""
    windows, device = drawn_windows(model, config), model.backbone.device
    noise = noise_keys(keys, windows, len(model.backbone.spec.subvocabs))
    copy = Condition.cat([condition])  # `refill` overwrites it
    state = new_state(model, copy, scales_NS, windows, own_pace=speculate > 0)
    drawing = new_drawing(model, state, keys, noise, config, speculate)
    return drawing, runner(leap if speculate else step, drawing, speed, device)


@torch.no_grad()
def whole_run(model: TensorAR, drawing: Drawing, run: Run) -> Iterator[int]:
    """Draw all windows; after each call of the trunk, yield how many more all rows have settled."""
    first = run_prefix(model.backbone, drawing.state)[:, None]
    drawing.windows_BNkS[:, :1] = draw_windows(model, first, drawing.index, drawing)
    if drawing.ahead:
        guess(model, drawing, drawing.index)
    yield 1
    last, lowest, highest = drawing.state.windows.count - 1, 0, 0
    while lowest < last:
        fed = min(highest + max(drawing.ahead, 1) - 1, last)
        run(model, drawing.state.extent(fed))
        # One by one, the new index is known; else asking for all rows' waits for the device once.
        reached = drawing.index.flatten().tolist() if drawing.ahead else [lowest + 1]
        yield min(reached) - lowest
        lowest, highest = min(reached), max(reached)

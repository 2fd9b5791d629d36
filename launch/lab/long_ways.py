"""Ways of drawing that `long_grid.py` tries and the kit does not have: drafts of a position that
share their noise, with each other or also with the final code, and codes that are drawn again once
the image is complete.

Shapes: B images, R rows (2B with guidance), T codes, N windows, k slots, D width, V vocabulary.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from t2i.rng import fold
from t2i.sampling import SamplingConfig
from t2i.tensorar import sampler
from t2i.tensorar.drawing import noise_keys, pick, rules
from t2i.tensorar.model import TensorAR
from t2i.tensorar.windows import Windows

_DRAFTS, _AGAIN = 4000, 4001  # noise streams of an image that the kit does not use
_COLD = 0.5
"""Temperature of the codes that are drawn again."""


def draw(
    model: TensorAR,
    prepared: dict[str, Tensor],
    keys: Tensor,
    settings: SamplingConfig,
    *,
    noise: Literal["", "drafts", "all"] = "",
    again: float = 0.0,
) -> Tensor:
    """Windows int64 [B, N, k, 1] of images.

    noise: "drafts": the drafts of a position share their noise; "all": the final code does, too.
    again: share of each image's codes to draw again, the least likely ones.
    """
    if noise:
        scales = sampler.guidance_table(model, settings)
        condition = sampler.encode_rows(model.backbone, prepared, guided=scales is not None)
        drawing, run = sampler.begin(model, condition, scales, keys, settings, "eager", 0)
        drawing.noise_NBkS.copy_(shared_noise(keys, drawing.state.windows, noise))
        for _ in sampler.whole_run(model, drawing, run):
            pass
        windows = drawing.windows_BNkS
    else:
        windows = sampler.sample_windows(model, prepared, keys, settings, speed="eager")
    return drawn_again(model, prepared, keys, settings, windows, again) if again else windows


def shared_noise(keys_B: Tensor, windows: Windows, noise: Literal["drafts", "all"]) -> Tensor:
    """Noise keys int64 [N, B, k, 1] of every slot; those of final codes are the kit's."""
    assert noise in ("drafts", "all"), noise
    keys = noise_keys(keys_B, windows, 1)
    positions_Nk = windows.positions(keys_B.device).clamp(max=windows.tokens - 1)
    if noise == "all":
        by_position_TB = noise_keys(keys_B, Windows(windows.tokens, 1), 1)[:, :, 0, 0]
    else:
        position_T1 = torch.arange(windows.tokens, device=keys_B.device)[:, None]
        by_position_TB = fold(keys_B, _DRAFTS, position_T1)
    keys[:, :, 1:, 0] = by_position_TB[positions_Nk[:, 1:]].transpose(1, 2)
    return keys


@torch.no_grad()
def drawn_again(
    model: TensorAR,
    prepared: dict[str, Tensor],
    keys: Tensor,
    settings: SamplingConfig,
    windows: Tensor,
    share: float,
) -> Tensor:
    """The windows, with the least likely final codes drawn again at a lower temperature.

    To judge and redraw a code, the model reads the final codes before it and the rest of the last
    window: the code itself and k - 2 codes after it.
    """
    geometry = model.windows
    codes_BT1 = geometry.final_codes(windows)
    read, scales = geometry.gather(codes_BT1), sampler.guidance_table(model, settings)
    condition = sampler.encode_rows(model.backbone, prepared, guided=scales is not None)
    if scales is not None:
        read = torch.cat([read, read])
    d_RTD = model.decode_slots(model.hidden(condition, read))[:, :, 0]
    logits = model.backbone.next_logits(d_RTD, read[:, :, 0, :0])
    if scales is not None:
        logits = sampler.guide_logits(logits, scales)
    likely_BT = logits.log_softmax(-1).gather(-1, codes_BT1)[..., 0]
    count = max(1, round(share * geometry.tokens))
    least = likely_BT.topk(count, dim=1, largest=False).indices
    rule, _ = rules(replace(settings, temperature=_COLD), 1)[0]
    noise_BT = fold(keys[:, None], _AGAIN, torch.arange(geometry.tokens, device=keys.device))
    drawn_BT = pick(logits, noise_BT, rule)
    windows = windows.clone()
    windows[:, :, 0, 0] = codes_BT1[..., 0].scatter(1, least, drawn_BT.gather(1, least))
    return windows

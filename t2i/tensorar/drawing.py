"""How one code is drawn: temperature, filters, and the code with the largest log p + G.

G is Gumbel noise, a separate number for every (image, position, sub-token, code). The argmax then
follows the softmax distribution, an image is a function of its key and the model alone, and equal
logits always give the same code. Only codes that pass the filters get noise.

Shapes: n candidates, B images, N windows, k slots, S sub-tokens, V vocabulary.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.errors import NotFiniteError
from t2i.rng import fold, gumbels, uniforms
from t2i.sampling import SamplingConfig, SubTokenSampling
from t2i.tensorar.windows import Windows

NOISE = "gumbel"
"""Name of this way of drawing; images drawn in different ways are never mixed in a folder."""
TIES = 64
"""How many codes tied with the k-th top-k keeps beyond the first k (those with the lowest ids)."""
_NOISE = 0
"""Number of this random stream among those of an image."""


def rules(
    config: SamplingConfig, sub_tokens: int
) -> tuple[tuple[SubTokenSampling, SubTokenSampling], ...]:
    """For each sub-token, the settings of final slots and those of drafts."""
    return tuple(
        (own, replace(own, temperature=own.temperature * config.draft_temperature))
        for own in config.by_sub_token(sub_tokens)
    )


def noise_keys(keys_B: Tensor, windows: Windows, sub_tokens: int) -> Tensor:
    """Noise keys int64 [N, B, k, S] of every slot. They depend on the position, so a final code
    gets the same noise for every k and stride.

    Drafts have separate noise. With the final code's noise they would match it more often, but the
    model reads drafts: it would have seen the noise that its next prediction is drawn with, and the
    codes would no longer follow its distribution.
    """
    position_NkS = windows.positions(keys_B.device)[..., None]
    depth_kS = torch.arange(windows.size, device=keys_B.device)[:, None] // windows.stride
    sub_S = torch.arange(sub_tokens, device=keys_B.device)
    return fold(keys_B[:, None, None], _NOISE, position_NkS[:, None], depth_kS, sub_S)


def candidates(logits: Tensor, rule: SubTokenSampling) -> tuple[Tensor, Tensor]:
    """The codes that may be drawn, int64 [..., n] or [n], and their fp32 scores [..., n]: logits
    over temperature, -inf where a filter removed one.

    Top-k comes first (keeping ties), then top-p (keeping the code that crosses the threshold).
    """
    vocab, filtered = logits.shape[-1], rule.top_p < 1
    if 0 < rule.top_k < vocab:
        codes = likeliest(logits, min(rule.top_k + TIES, vocab))
        logits = logits.gather(-1, codes)
        kth = logits[..., rule.top_k - 1 : rule.top_k]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    elif filtered:
        logits, codes = logits.sort(dim=-1, descending=True, stable=True)
    else:
        codes = torch.arange(vocab, device=logits.device)
    if rule.temperature != 1:
        logits = logits / max(rule.temperature, 1e-5)
    if filtered:  # sorted by either branch above
        over = logits.softmax(-1).cumsum(-1) > rule.top_p
        removed = F.pad(over[..., :-1], (1, 0), value=False)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits, codes


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The codes of the largest fp32 logits [..., V], in descending order: int64 [..., count].

    Of equal logits the lower code comes first, whatever the shape of the batch: the sort key is an
    integer made of the logit's bits and then the code.
    """
    vocab = logits.shape[-1]
    bits = (logits + 0.0).view(torch.int32).long()  # -0 becomes 0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    last = torch.arange(vocab - 1, -1, -1, device=logits.device)
    return vocab - 1 - (order * vocab + last).topk(count, dim=-1).values % vocab


def pick(logits: Tensor, keys: Tensor, rule: SubTokenSampling) -> Tensor:
    """One code int64 [...] per row of fp32 logits [..., V], with noise keys int64 [...]; the most
    likely one at temperature 0.
    """
    if rule.temperature == 0:
        return logits.argmax(-1)
    scores, codes = candidates(logits, rule)
    best = (scores + gumbels(keys, codes)).argmax(-1, keepdim=True)
    return codes.expand_as(scores).gather(-1, best)[..., 0]


def picked_sum(logits: Tensor, codes: Tensor) -> Tensor:
    """Sum of the logits that `codes` [..., 1] were picked by, from logits [..., V]: fp32 [].

    It is finite if all logits were: the argmax takes NaN and inf for the largest.
    """
    return logits.gather(-1, codes).sum()


def check_finite(total: Tensor, dtype: torch.dtype) -> None:
    """NotFiniteError if logits of this sum were not finite, as overflow makes them in float16. To
    be called once for an image: the host waits for the device.
    """
    if not total.isfinite():
        raise NotFiniteError(
            f"there is no image to draw: in {str(dtype).removeprefix('torch.')}, the model's "
            "outputs are NaN or infinite. Draw in float32 or bfloat16 (dtype); if that does not "
            "help, its weights are damaged"
        )


def draw_by_share(logits: Tensor, keys: Tensor) -> Tensor:
    """One code int64 [...] per row of fp32 logits [..., V], from the softmax distribution by one
    random number per row: keys int64 [...].

    For own drafts in training. Noise for every code, as in `pick`, makes different models draw
    comparable codes, but drafts do not need that, and it takes far longer.
    """
    share = logits.softmax(-1).cumsum(-1)
    drawn = uniforms(keys)[..., None] * share[..., -1:]
    return torch.searchsorted(share, drawn, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)

"""How one code is drawn: temperature, filters, and the code with the largest log p + G.

G is Gumbel noise, a number of its own for every (image, position, sub-token, code): the argmax then
follows the softmax distribution, an image is a function of its key and the model alone, and whoever
predicts the same logits draws the same code. Only codes that the filters leave are looked at.

Shapes: n candidates, B images, N windows, k slots, S sub-tokens, V vocabulary.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.rng import fold, gumbels, uniforms
from t2i.sampling import SamplingConfig, SubTokenSampling
from t2i.tensorar.windows import Windows

NOISE = "gumbel"
"""Name of this way of drawing: images that were drawn another way are never mixed with these."""
TIES = 64
"""So many codes as likely as the k-th stay besides the first k, those with the lowest numbers."""
_NOISE = 0
"""Number of this stream among an image's."""


def rules(
    config: SamplingConfig, sub_tokens: int
) -> tuple[tuple[SubTokenSampling, SubTokenSampling], ...]:
    """The settings of final slots and of drafts, for each sub-token."""
    return tuple(
        (own, replace(own, temperature=own.temperature * config.draft_temperature))
        for own in config.by_sub_token(sub_tokens)
    )


def noise_keys(keys_B: Tensor, windows: Windows, sub_tokens: int) -> Tensor:
    """Keys int64 [N, B, k, S] of the noise of every slot, by position: final codes have the same
    noise for every k and stride.

    Drafts have their own. With the noise of the final code they would foretell it more often, but
    the model reads them: what it then says of the position would be drawn with noise that it has
    seen, and no longer follow its own distribution.
    """
    position_NkS = windows.positions(keys_B.device)[..., None]
    depth_kS = torch.arange(windows.size, device=keys_B.device)[:, None] // windows.stride
    sub_S = torch.arange(sub_tokens, device=keys_B.device)
    return fold(keys_B[:, None, None], _NOISE, position_NkS[:, None], depth_kS, sub_S)


def candidates(logits: Tensor, rule: SubTokenSampling) -> tuple[Tensor, Tensor]:
    """The codes that may be drawn, int64 [..., n] or [n], and their fp32 scores [..., n]: logits
    over temperature, -inf where a filter removed one.

    Top-k comes first (ties stay), then top-p (the code that crosses the threshold stays).
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
    if filtered:  # they are in order
        over = logits.softmax(-1).cumsum(-1) > rule.top_p
        removed = F.pad(over[..., :-1], (1, 0), value=False)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits, codes


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The codes of the largest fp32 logits [..., V], in order: int64 [..., count].

    Of equal ones the lower code comes first, whatever the shape of the batch: the order is that of
    whole numbers, the logit's bits before the code.
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


def draw_by_share(logits: Tensor, keys: Tensor) -> Tensor:
    """One code int64 [...] per row of fp32 logits [..., V], as `pick` draws it without filters, by
    one random number per row: keys int64 [...].

    For training's own drafts. Noise of every code couples them to what another model would draw,
    which drafts have no use for, and costs far more.
    """
    share = logits.softmax(-1).cumsum(-1)
    drawn = uniforms(keys)[..., None] * share[..., -1:]
    return torch.searchsorted(share, drawn, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)

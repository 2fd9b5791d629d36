"""The training losses of the arms of `long_grid.py`: the method's own, and those of related papers.

Shapes: B batch, T codes, N windows, k slots, D width, V vocabulary, E codebook dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.lab.long_steps import Objective
from t2i.models.blocks import LlamaBackbone
from t2i.models.conditions import Condition
from t2i.rng import fold, gumbels, integers, uniforms
from t2i.tensorar.loss import WindowLosses, filled, window_losses
from t2i.tensorar.model import TensorAR
from t2i.training.batches import Batch

_CONTEXT = 3000  # the first of the noise streams used here; `TensorAR` uses others


@contextmanager
def without_gradient(device: torch.device) -> Iterator[None]:
    """Disable gradients for a pass inside a training step. Autocast does not cache the weights that
    it casts here, since torch 2.11 might reuse these copies where gradients are needed.
    """
    on = torch.is_autocast_enabled(device.type)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)
    with torch.no_grad(), cast:
        yield


class Method(Objective):
    """The kit's own loss, with shapes that do not depend on the data: if the method uses own drafts
    at all, they are drawn for every sample, and only the chosen samples use them.

    grow: raise the weights of slots after the first linearly from 0 over the run, to go from
    next-token to multi-token prediction.
    """

    def __init__(self, grow: bool = False):
        super().__init__()
        self.grow = grow

    def forward(self, model: TensorAR, batch: Batch) -> WindowLosses:
        condition = model.backbone.encode_condition(batch.prepared, batch.drop)
        windows = self.windows(model, batch, condition)
        gaussian = batch.keys if model.uses_gaussian_noise else None
        weights_k = filled(model.config.weights(), batch.keys.device)
        if self.grow:
            later = torch.arange(len(weights_k), device=weights_k.device) > 0
            weights_k = torch.where(later, weights_k * batch.progress, weights_k)
        return losses(model, batch, model.hidden(condition, windows, gaussian), weights_k)

    def windows(self, model: TensorAR, batch: Batch, condition: Condition) -> Tensor:
        """The same as `TensorAR.training_windows`, with the same random numbers."""
        config, keys = model.config, batch.keys
        windows = model.noised_windows(batch.codes, keys)
        if config.own_drafts == 0 or config.k == 1:
            return windows
        share = config.own_drafts * (batch.progress if config.anneal else 1.0)
        chosen_B = uniforms(fold(keys, 2001)) < share
        with without_gradient(keys.device):
            own = model.own_draft_windows(batch.codes, condition, fold(keys, 2000), passes=1)
        return torch.where(chosen_B[:, None, None, None], own, windows)


class SharedNoise(Method):
    """Own drafts that share the noise of their position's final code. It is drawn given that the
    true code has the largest log p + G under slot 0's prediction (Maddison et al. 2014, A*
    sampling, top down); a draft is the code that has the largest under its own slot's prediction.

    So drafts keep their own distribution, yet tell more of the true code than the past does.
    """

    def windows(self, model: TensorAR, batch: Batch, condition: Condition) -> Tensor:
        truth, keys = model.windows.gather(batch.codes), fold(batch.keys, _CONTEXT + 4)
        vocab = model.backbone.spec.subvocabs[0]
        noise = integers(keys, vocab, *truth.shape[1:])
        with without_gradient(keys.device):
            h = model.hidden(condition, torch.cat([truth[:, :, :1], noise[:, :, 1:]], dim=2))
            logits = model.backbone.next_logits(model.decode_slots(h), truth[..., :0])
            position_T = torch.arange(truth.shape[1], device=keys.device)
            gumbel_BTV = noise_given(
                logits[:, :, 0], truth[:, :, 0, 0], fold(keys[:, None], position_T)
            )
            later_Nk = model.windows.positions(keys.device)[:, 1:].clamp(max=len(position_T) - 1)
            drafts = (logits[:, :, 1:] + gumbel_BTV[:, later_Nk]).argmax(-1)
        return torch.cat([truth[:, :, :1], drafts[..., None]], dim=2)


def noise_given(logits: Tensor, codes: Tensor, keys: Tensor) -> Tensor:
    """Gumbel noise fp32 [..., V] by keys int64 [...], given that it makes logits [..., V] draw the
    codes int64 [...].
    """
    log_p, every = logits.log_softmax(-1), torch.arange(logits.shape[-1], device=keys.device)
    largest = gumbels(fold(keys, 1), codes[..., None])  # the maximum does not depend on the code
    others = -torch.logaddexp(-largest, -(log_p + gumbels(keys, every)))
    return torch.where(every == codes[..., None], largest, others) - log_p


class Correction(Method):
    """Own drafts for half of the samples. The others read windows of a finished image, in which own
    samples replace some of the true codes; the targets are still the true codes.
    """

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def windows(self, model: TensorAR, batch: Batch, condition: Condition) -> Tensor:
        own = super().windows(model, batch, condition)
        with without_gradient(batch.keys.device):
            first_BTD = model.decode_slots(model.hidden(condition, own))[:, :, 0]
            context = own_context(model, batch, first_BTD, self.most)
        chosen_B = uniforms(fold(batch.keys, _CONTEXT + 5)) < 0.5
        return torch.where(chosen_B[:, None, None, None], model.windows.gather(context), own)


def replaced_positions(keys_B: Tensor, most: float, count: int) -> Tensor:
    """Which of `count` positions to replace, bool [B, count]; each sample's share of them is
    uniform from 0 to `most`.
    """
    share_B1 = most * uniforms(fold(keys_B, _CONTEXT))[:, None]
    return uniforms(fold(keys_B, _CONTEXT + 1), count) < share_B1


def noisy_context(model: TensorAR, batch: Batch, most: float) -> Tensor:
    """The codes [B, T, 1], some of them replaced by random ones."""
    count = batch.codes.shape[1]
    noise = integers(fold(batch.keys, _CONTEXT + 2), model.backbone.spec.subvocabs[0], count)
    replaced = replaced_positions(batch.keys, most, count)
    return torch.where(replaced[..., None], noise[..., None], batch.codes)


def own_context(model: TensorAR, batch: Batch, h_BTD: Tensor, most: float) -> Tensor:
    """The codes [B, T, 1], some of them replaced by what the model draws there, from the hidden
    states that predict them.
    """
    count = batch.codes.shape[1]
    position_T = torch.arange(count, device=batch.keys.device)
    keys = fold(batch.keys[:, None], _CONTEXT + 3, position_T)
    replaced = replaced_positions(batch.keys, most, count)
    return torch.where(replaced[..., None], model.draw(h_BTD, keys), batch.codes)


def read_context(model: TensorAR, condition: Condition, context_BTS: Tensor) -> Tensor:
    """Hidden states [B, T, D] of a base model that reads these codes."""
    return model.hidden(condition, model.windows.gather(context_BTS))


def losses(
    model: TensorAR, batch: Batch, h_BND: Tensor, weights_k: Tensor | None = None
) -> WindowLosses:
    """The cross entropy of the true codes, from the hidden states that predict their windows."""
    device = batch.codes.device
    if weights_k is None:
        weights_k = filled(model.config.weights(), device)
    targets, valid_Nk = model.windows.gather(batch.codes), model.windows.valid(device).float()
    return window_losses(model.backbone, model.decode_slots(h_BND), targets, valid_Nk, weights_k)


class NoisyContext(Objective):
    """The base's loss when some of the codes that it reads are random."""

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def forward(self, model: TensorAR, batch: Batch) -> WindowLosses:
        condition = model.backbone.encode_condition(batch.prepared, batch.drop)
        context = self.context(model, batch, condition)
        return losses(model, batch, read_context(model, condition, context))

    def context(self, model: TensorAR, batch: Batch, condition: Condition) -> Tensor:
        """The codes to read, [B, T, 1]."""
        return noisy_context(model, batch, self.most)


class OwnContext(NoisyContext):
    """The base's loss when some of the codes that it reads are its own samples."""

    def context(self, model: TensorAR, batch: Batch, condition: Condition) -> Tensor:
        with without_gradient(batch.codes.device):
            h = read_context(model, condition, batch.codes)
        return own_context(model, batch, h, self.most)


class CleanTargets(Objective):
    """SAR (arXiv 2512.06421): the base's loss, plus the cross entropy of its predictions from a
    context that is partly its own samples, with its predictions from the true codes as targets.
    """

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def forward(self, model: TensorAR, batch: Batch) -> WindowLosses:
        condition = model.backbone.encode_condition(batch.prepared, batch.drop)
        h = read_context(model, condition, batch.codes)
        found, none = losses(model, batch, h), batch.codes[..., :0]
        with without_gradient(batch.codes.device):
            clean = model.backbone.next_logits(h, none).softmax(-1)
        context = own_context(model, batch, h.detach(), self.most)
        other = model.backbone.next_logits(read_context(model, condition, context), none)
        distance = F.cross_entropy(other.flatten(0, 1), clean.flatten(0, 1))
        return replace(found, loss=found.loss + distance)


class Regressions(Objective):
    """reAR (arXiv 2510.04450): noisy context, and two regressions to codebook vectors: an early
    layer's states must give the vector of the true code at the position just read, a late layer's
    that of the next code.
    """

    def __init__(self, model: TensorAR, most: float):
        super().__init__()
        self.most = most
        assert isinstance(model.backbone, LlamaBackbone)
        self.blocks = list(model.backbone.blocks)  # a list, so they do not become submodules
        vectors_VE = model.backbone.code_vectors()[0].detach().float().clone()
        self.vectors_VE: Tensor
        self.register_buffer("vectors_VE", F.normalize(vectors_VE, dim=-1))
        dim, out = model.backbone.spec.dim, vectors_VE.shape[1]
        self.early, self.late = (
            nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, out)) for _ in range(2)
        )

    def forward(self, model: TensorAR, batch: Batch) -> WindowLosses:
        condition = model.backbone.encode_condition(batch.prepared, batch.drop)
        states: dict[str, Tensor] = {}
        places = {"early": 0, "late": 3 * len(self.blocks) // 4 - 1}
        handles = [
            self.blocks[place].register_forward_hook(
                lambda _module, _inputs, x, name=name: states.__setitem__(name, x)
            )
            for name, place in places.items()
        ]
        h = read_context(model, condition, noisy_context(model, batch, self.most))
        for handle in handles:
            handle.remove()
        found = losses(model, batch, h)
        # The states that predict codes 0..T-1; the one that reads code i predicts code i + 1.
        early, late = (states[name][:, condition.prefix.shape[1] - 1 :] for name in places)
        truth = batch.codes[..., 0]
        recovered = self._distance(self.early(early[:, 1:]), truth[:, :-1])
        predicted = self._distance(self.late(late), truth)
        return replace(found, loss=found.loss + (recovered + predicted))

    def _distance(self, guess_BTE: Tensor, codes_BT: Tensor) -> Tensor:
        """Mean cosine distance between guesses and the codes' vectors."""
        similarity = F.cosine_similarity(guess_BTE.float(), self.vectors_VE[codes_BT], dim=-1)
        return (1 - similarity).mean()

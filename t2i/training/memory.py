"""How much memory a run needs, from shapes alone: nothing here holds a weight or computes a number
of a model.

State (weights, gradients, optimizer) follows from the parameter counts. Activations are counted:
one forward pass runs on PyTorch's "meta" device, where tensors have shapes and no data, and what
autograd would keep for the backward pass is added up. So the count holds for every family, and for
whatever the method's settings are. Fused attention, as GPUs have it, is assumed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from t2i.models.base import Backbone
from t2i.models.conditions import Condition
from t2i.models.families import find_family
from t2i.models.tokenizers.conv_tokenizer import ConvTokenizer
from t2i.tensorar.loss import rows_at_once
from t2i.tensorar.model import TensorAR
from t2i.training.config import TrainConfig
from t2i.training.engine import deepspeed_config
from t2i.training.examples import encoded_at_once

_PROMPT_TOKENS = 128
"""Prefix that is assumed where it varies with the caption."""
_WIDE_MAPS = (4, 6)
"""The tokenizer's widest feature maps that live at once, on a GPU and on a CPU, whose convolutions
convert their input and their output."""
_BUCKET = 5 * 10**8
"""DeepSpeed's reduce_bucket_size, in numbers."""
_LIVE = 10**9
"""DeepSpeed's stage3_max_live_parameters: so many are not given back after they were gathered."""
FLOPS = 1e14
"""Operations per second that the time is reckoned with: a third of an A100's peak in bf16."""


@dataclass(frozen=True)
class Cost:
    """Bytes on the fullest device, and work."""

    state: float
    """Weights, gradients and optimizer at the chosen ZeRO stage."""
    bucket: float
    """Gradients until they are reduced, where they are gathered for it, and what ZeRO-3 gathers."""
    frozen: float
    """Image tokenizer and text encoder."""
    kept: float
    """What autograd keeps of one forward pass."""
    passing: float
    """The largest things of a moment: a block's recomputation, logits' gradients, own drafts."""
    stepping: float
    """What the optimizer's step holds for a moment, when nothing of the pass is left."""
    encoding: float
    """Weights, helpers and feature maps while data are encoded, before there is an optimizer."""
    flops: float
    """Floating-point operations per sample of a training step, attention's own left out."""

    @property
    def total(self) -> float:
        """The peak, with a tenth more for what the allocator and the libraries take."""
        moment = max(self.bucket + self.kept + self.passing, self.stepping)
        return 1.1 * max(self.state + self.frozen + moment, self.encoding)


def weight_bytes(config: TrainConfig) -> int:
    """Bytes of a weight in the forward pass."""
    return 2 if config.engine.precision == "bf16" else 4


def state_bytes(model: TensorAR, config: TrainConfig, world_size: int, stage: int) -> float:
    """Bytes of weights, gradients and optimizer on one of the processes."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weight, grad = weight_bytes(config), 4
    # Two moments, and an fp32 copy: without ZeRO of bf16 weights alone, with it of any.
    optimizer = 8 if weight == 4 and stage == 0 else 12
    shards = [world_size if stage >= least else 1 for least in (3, 2, 1)]
    average = 4 * trained if config.ema else 0
    sharded = trained * (grad / shards[1] + optimizer / shards[2])
    return total * weight / shards[0] + sharded + average


def logit_bytes(model: TensorAR, config: TrainConfig, *, gpu: bool) -> int:
    """fp32 logits of a forward pass that exist at once."""
    batch, vocab = config.engine.micro_batch, max(model.backbone.spec.subvocabs)
    slots, count = model.windows.size, model.windows.count
    if config.engine.zero_stage == 3:  # the head is called as a layer
        return 4 * batch * min(count, model.windows_at_once(slots)) * slots * vocab
    return 4 * min(batch * count * max(1, slots - 1), rows_at_once(vocab, gpu=gpu)) * vocab


def estimate(
    model: TensorAR,
    config: TrainConfig,
    world_size: int,
    *,
    samples: int | None = None,
    gpu: bool | None = None,
) -> Cost:
    """What one process needs. `model`, on the meta device, is cast to the type it computes in.

    samples: of the whole data set, where it may be smaller than what is encoded at once.
    gpu: whether it is for a GPU; None: whether there is one here.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    state = state_bytes(model, config, world_size, config.engine.zero_stage)
    bucket, stepping = _optimizer_bytes(model, config, world_size, gpu)
    if config.engine.precision != "fp32":
        model.bfloat16()
    model.train()
    recompute = config.engine.gradient_checkpointing
    layers = len(model.backbone.new_cache(1, 1).keys)
    kept, forward = _kept(model, config, recompute=False), _operations(model, config)
    passing = 0.0
    if recompute:
        outside = _kept(model, config, recompute=True)
        row = model.backbone.spec.dim * next(model.parameters()).element_size()
        length = prompt_length(model.backbone) + model.windows.count - 1
        inputs = config.engine.micro_batch * length * row
        kept, passing = outside + layers * inputs, (kept - outside) / layers
    # Backward is a forward for the inputs' gradients and one for the weights', which frozen ones
    # have not; recomputation is one more, and so is the pass that draws own drafts.
    drawing = config.method.own_drafts if config.method.k > 1 else 0
    passes = (2 if config.tuning == "lora" else 3) + recompute + drawing
    logits = logit_bytes(model, config, gpu=gpu)
    # Themselves, their log-probabilities, the gradient in the head's type; or own drafts.
    passing += max(2.5 * logits, _draft_bytes(model, config))
    frozen = _frozen_bytes(model.backbone, config)
    weights = weight_bytes(config) * sum(p.numel() for p in model.parameters())
    height, width = model.backbone.image_size
    widest = 4 * _tokenizer(model.backbone).config.channels * height * width  # a feature map
    images = encoded_at_once(config.data, samples)
    encoding = weights + frozen + _WIDE_MAPS[not gpu] * images * widest
    flops = passes * forward / config.engine.micro_batch
    return Cost(state, bucket, frozen, kept, passing, stepping, encoding, flops)


def _optimizer_bytes(
    model: TensorAR, config: TrainConfig, world_size: int, gpu: bool
) -> tuple[float, float]:
    """Beyond the state: in the backward pass, and in the optimizer's step.

    Measured on a CPU with DeepSpeed 0.19.8, one process, in bytes a trained number: beside weights
    and optimizer the backward pass takes 8 under ZeRO-1 and 2, of which 4 are the state's
    gradients, and under ZeRO-3 16 in fp32 and 12 in bf16. The step, AdamW being fused, computes in
    place; in fp32 it flattens the gradients first.
    """
    stage, width = config.engine.zero_stage, weight_bytes(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    settings = deepspeed_config(config, world_size)["zero_optimization"]
    bucket = settings.get("reduce_bucket_size", _BUCKET)
    waiting = min(bucket, trained)  # gradients, until a bucket is full
    # A GPU's bucket is taken whole, of a CPU's memory only what is written to.
    buffers = (2 if settings.get("overlap_comm") else 1) * (bucket if gpu and stage else waiting)
    backward = buffers * (4 if stage == 1 else width)
    if stage == 3:
        live = min(settings.get("stage3_max_live_parameters", _LIVE), total)
        backward += (live + waiting) * width
    elif stage == 2 and width == 2:  # fp32 gradients are the state's own
        backward += waiting * width
    return backward, 4 * trained / world_size if stage and width == 4 else 0


def _tokenizer(backbone: Backbone) -> ConvTokenizer:
    assert isinstance(backbone.tokenizer, ConvTokenizer)
    return backbone.tokenizer


def _draft_bytes(model: TensorAR, config: TrainConfig) -> float:
    """What drawing own drafts holds at once: logits, their shares, and the shares' sums."""
    drafts = config.method.k - 1
    if not drafts:
        return 0
    per_logit = 4 + 4 + 4
    windows = min(model.windows.count, model.windows_at_once(drafts))
    logits = windows * drafts * max(model.backbone.spec.subvocabs)
    return per_logit * config.engine.micro_batch * logits


def prompt_length(backbone: Backbone) -> int:
    """Prefix tokens, as far as they are known before the captions are."""
    return min(backbone.spec.prefix_tokens, _PROMPT_TOKENS)


def _frozen_bytes(backbone: Backbone, config: TrainConfig) -> float:
    parts = 4 * sum(p.numel() for p in _tokenizer(backbone).parameters())
    encoder = getattr(backbone.frozen.text_encoder, "model", None)
    known = find_family(config.backbone.family).text_encoder_parameters
    count = known.get(config.backbone.text_encoder or "", 0)
    if encoder is not None:
        count = sum(p.numel() for p in encoder.parameters())
    return parts + count * (2 if config.backbone.text_encoder_dtype == "bfloat16" else 4)


def _inputs(model: TensorAR, config: TrainConfig) -> tuple[Tensor, Condition, Tensor]:
    """Of a forward pass."""
    batch, spec = config.engine.micro_batch, model.backbone.spec
    shape = (batch, spec.num_tokens, len(spec.subvocabs))
    codes = torch.zeros(shape, dtype=torch.long, device="meta")
    return codes, _condition(model.backbone, batch), model.windows.gather(codes)


def _kept(model: TensorAR, config: TrainConfig, *, recompute: bool) -> int:
    """Bytes that autograd keeps of a forward pass, less what is computed again."""
    weights = [p.untyped_storage() for p in model.parameters()]
    known = {id(storage) for storage in weights}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            seen[id(storage)] = storage
        return tensor

    model.backbone.gradient_checkpointing = recompute
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, _FusedAttention():
        model(*_inputs(model, config))
    return sum(storage.nbytes() for storage in seen.values())


def _operations(model: TensorAR, config: TrainConfig) -> int:
    """Of a forward pass."""
    counter = FlopCounterMode(display=False)
    with (
        torch.no_grad(),
        counter,
        _FusedAttention(),
    ):  # with a gradient the loss would compute its own
        model(*_inputs(model, config))
    return counter.get_total_flops()


def _condition(backbone: Backbone, batch: int) -> Condition:
    """An encoded condition without data; of a text, of the length that is assumed."""
    spec = backbone.spec
    if spec.cond_kind == "class":
        return backbone.encode_condition(backbone.prepare([0] * batch))
    length = prompt_length(backbone)
    dtype = next(backbone.parameters()).dtype
    prefix = torch.zeros(batch, length, spec.dim, dtype=dtype, device="meta", requires_grad=True)
    return Condition(prefix, mask=torch.ones(batch, length, dtype=torch.bool, device="meta"))


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps its inputs and output, as GPUs' kernels do, and no matrix of weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _Attended.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

"""How much memory a run needs, computed from shapes alone.

State (weights, gradients, optimizer) follows from the parameter counts. Activations are counted by
one forward pass on PyTorch's "meta" device, where tensors have shapes but no data: the sizes of all
tensors that autograd saves for the backward pass are added up. This works for every family and all
settings of the method. Fused attention, as on GPUs, is assumed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from t2i.models.base import Backbone
from t2i.models.conditions import Condition
from t2i.models.families import find_family
from t2i.tensorar.loss import rows_at_once
from t2i.tensorar.model import TensorAR
from t2i.tensorar.room import cache_bytes, prompt_length, tokenizer_bytes
from t2i.training.config import TrainConfig
from t2i.training.engine import bucket_size, deepspeed_config
from t2i.training.examples import encoded_at_once

_LIVE = 10**9
"""DeepSpeed's default stage3_max_live_parameters: how many gathered parameters are not released."""
SHEET_PROMPTS, SHEET_IMAGES = 4, 2
"""How many held-out samples make up a sample sheet without prompts; images of each prompt."""
_SHEET_CACHE = 3e9
"""Bytes of cache that drawing a sheet may take, where one image takes no more."""
FLOPS = 1e14
"""Assumed floating-point operations per second: a third of an A100's peak in bf16."""


@dataclass(frozen=True)
class Cost:
    """Bytes on the fullest device, and the work per sample."""

    state: float
    """Weights, gradients and optimizer at the chosen ZeRO stage."""
    bucket: float
    """Gradients waiting to be reduced, the buffers for that, and weights gathered by ZeRO-3."""
    frozen: float
    """Image tokenizer and text encoder."""
    kept: float
    """What autograd keeps from one forward pass."""
    passing: float
    """The largest temporary tensors: a block's recomputation, logits' gradients, own drafts."""
    stepping: float
    """Temporary memory of the optimizer's step, when the pass has been freed."""
    encoding: float
    """Weights, frozen parts and feature maps while data are encoded, before training."""
    drawing: float
    """What drawing a sample sheet takes beside the state."""
    flops: float
    """Floating-point operations per sample of a training step, without those of attention."""
    beside: float = 0
    """What else stays in memory while the model trains, such as the cache of reward fine-tuning."""

    @property
    def total(self) -> float:
        """The peak, plus a tenth for the allocator and the libraries."""
        moment = max(self.bucket + max(self.kept + self.passing, self.drawing), self.stepping)
        return 1.1 * max(self.state + self.frozen + self.beside + moment, self.encoding)


def weight_bytes(config: TrainConfig) -> int:
    """Bytes per weight in the forward pass."""
    return 2 if config.engine.precision == "bf16" else 4


def state_bytes(model: TensorAR, config: TrainConfig, world_size: int, stage: int) -> float:
    """Bytes of weights, gradients and optimizer in one process."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weight, grad = weight_bytes(config), 4
    # Two moments, and an fp32 copy of the weights, which ZeRO also makes of fp32 weights.
    optimizer = 8 if weight == 4 and stage == 0 else 12
    shards = [world_size if stage >= least else 1 for least in (3, 2, 1)]
    average = 4 * trained if config.ema else 0
    sharded = trained * (grad / shards[1] + optimizer / shards[2])
    return total * weight / shards[0] + sharded + average


def logit_bytes(model: TensorAR, config: TrainConfig, *, gpu: bool) -> int:
    """Bytes of the fp32 logits of a forward pass that exist at once."""
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
    """What one process needs. Casts `model` (on the meta device) to the type it computes in.

    samples: in the whole data set, which may be smaller than one encoding batch; None: unknown.
    gpu: whether the run uses a GPU; None: whether this machine has one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    state = state_bytes(model, config, world_size, config.engine.zero_stage)
    bucket, stepping = _optimizer_bytes(model, config, world_size, gpu)
    if config.engine.precision != "fp32":
        model.bfloat16()
    model.train()
    model.backbone.compile_blocks = False  # compilers do not take tensors without data
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
    # The backward pass costs as much as two forward passes: for gradients of the inputs and of the
    # weights (few with adapters). Recomputation adds one, and so does drawing own drafts.
    drafting = config.method.own_drafts if config.method.k > 1 else 0
    passes = (2 if config.tuning == "lora" else 3) + recompute + drafting
    logits = logit_bytes(model, config, gpu=gpu)
    # Logits, log-probabilities, and the gradient in the head's type; or own drafts.
    passing += max(2.5 * logits, _draft_bytes(model, config))
    frozen = _frozen_bytes(model.backbone, config)
    weights = weight_bytes(config) * sum(p.numel() for p in model.parameters())
    at_once = encoded_at_once(model.backbone, config.data, samples)
    encoding = weights + frozen + tokenizer_bytes(model.backbone, at_once, gpu=gpu)
    drawing = 0.0
    if config.log.sample_every != 0:
        prompts = len(config.log.prompts) or SHEET_PROMPTS
        images = sheet_images(model, prompts)
        decoding = tokenizer_bytes(model.backbone, images, gpu=gpu)
        drawing = max(cache_bytes(model, model.sampling, images), decoding)
        if config.engine.zero_stage == 3:  # the checkpoint draws
            drawing += weights + frozen
    flops = passes * forward / config.engine.micro_batch
    return Cost(state, bucket, frozen, kept, passing, stepping, encoding, drawing, flops)


def _optimizer_bytes(
    model: TensorAR, config: TrainConfig, world_size: int, gpu: bool
) -> tuple[float, float]:
    """Bytes beyond the state: in the backward pass, and in the optimizer's step.

    Measured on a CPU with DeepSpeed 0.19.8 and one process, in bytes per trained parameter: besides
    weights and optimizer the backward pass takes 8 under ZeRO-1 and 2, of which 4 are the state's
    gradients, and under ZeRO-3 16 in fp32 and 12 in bf16. The step of fused AdamW works in place;
    in fp32 the gradients are flattened first.
    """
    stage, width = config.engine.zero_stage, weight_bytes(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    settings = deepspeed_config(config, world_size)["zero_optimization"]
    bucket = bucket_size(settings, trained)
    waiting = min(bucket, trained)  # gradients, until a bucket is full
    # On a GPU a bucket is allocated in full; on a CPU only memory that is written to counts.
    buffers = (2 if settings.get("overlap_comm") else 1) * (bucket if gpu and stage else waiting)
    backward = buffers * (4 if stage == 1 else width)
    if stage == 3:
        live = min(settings.get("stage3_max_live_parameters", _LIVE), total)
        backward += (live + waiting) * width
    elif stage == 2 and width == 2:  # fp32 gradients are the state's own
        backward += waiting * width
    return backward, 4 * trained / world_size if stage and width == 4 else 0


def sheet_images(model: TensorAR, prompts: int) -> int:
    """How many images of a sample sheet are drawn at once: all, if their cache is small enough."""
    each = cache_bytes(model, model.sampling, 1)
    return max(1, min(SHEET_IMAGES * prompts, int(_SHEET_CACHE / each)))


def _draft_bytes(model: TensorAR, config: TrainConfig) -> float:
    """Bytes held at once to draw own drafts: logits, probabilities, and their cumulative sums."""
    drafts = config.method.k - 1
    if not drafts:
        return 0
    per_logit = 4 + 4 + 4
    windows = min(model.windows.count, model.windows_at_once(drafts))
    logits = windows * drafts * max(model.backbone.spec.subvocabs)
    return per_logit * config.engine.micro_batch * logits


def _frozen_bytes(backbone: Backbone, config: TrainConfig) -> float:
    assert isinstance(backbone.tokenizer, nn.Module)
    parts = 4 * sum(p.numel() for p in backbone.tokenizer.parameters())
    encoder = getattr(backbone.frozen.text_encoder, "model", None)
    known = find_family(config.backbone.family).text_encoder_parameters
    count = known.get(config.backbone.text_encoder or "", 0)
    if encoder is not None:
        count = sum(p.numel() for p in encoder.parameters())
    return parts + count * (2 if config.backbone.text_encoder_dtype == "bfloat16" else 4)


def _inputs(model: TensorAR, config: TrainConfig) -> tuple[Tensor, Condition, Tensor]:
    """The inputs of a forward pass, without data."""
    batch, spec = config.engine.micro_batch, model.backbone.spec
    shape = (batch, spec.num_tokens, len(spec.subvocabs))
    codes = torch.zeros(shape, dtype=torch.long, device="meta")
    return codes, _condition(model.backbone, batch), model.windows.gather(codes)


def _kept(model: TensorAR, config: TrainConfig, *, recompute: bool) -> int:
    """Bytes that autograd keeps from a forward pass, without those of recomputed blocks."""
    weights = [p.untyped_storage() for p in model.parameters()]  # held, so that ids stay unique
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
    """Floating-point operations of a forward pass."""
    counter = FlopCounterMode(display=False)
    # With gradients the loss would compute its own in the forward pass, which would count, too.
    with torch.no_grad(), counter, _FusedAttention():
        model(*_inputs(model, config))
    return counter.get_total_flops()


def _condition(backbone: Backbone, batch: int) -> Condition:
    """An encoded condition without data; for text, of the length that `prompt_length` gives."""
    spec = backbone.spec
    if spec.cond_kind == "class":
        return backbone.encode_condition(backbone.prepare([0] * batch))
    length = prompt_length(backbone)
    dtype = next(backbone.parameters()).dtype
    prefix = torch.zeros(batch, length, spec.dim, dtype=dtype, device="meta", requires_grad=True)
    return Condition(prefix, mask=torch.ones(batch, length, dtype=torch.bool, device="meta"))


class _FusedAttention(TorchFunctionMode):
    """Makes attention keep only its inputs and output, as GPU kernels do, and no weight matrix."""

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

"""Parameters, memory and work of a run, for the report of the pre-flight check."""

from collections.abc import Callable
from dataclasses import replace

import torch

from t2i.progress import readable_size, readable_time
from t2i.tensorar.model import TensorAR
from t2i.training.config import TrainConfig
from t2i.training.memory import FLOPS, Cost, estimate, logit_bytes, state_bytes, weight_bytes
from t2i.training.run_plan import Plan, about_window

# GB of memory of common cards, to compare with if this machine has none.
_CARDS = (8, 12, 16, 24, 32, 40, 48, 80)


def size_report(
    model: TensorAR,
    config: TrainConfig,
    plan: Plan | None,
    world_size: int,
    beside: Callable[[TensorAR], float] | None,
) -> tuple[dict[str, list[str]], list[str]]:
    """Parameters, memory and work: lines by title, and warnings.

    beside: bytes that stay in memory beside the model while it trains.
    """
    logits = readable_size(logit_bytes(model, config, gpu=torch.cuda.is_available()))
    backbone = model.backbone
    chosen = config.engine.zero_stage
    sizes = [readable_size(state_bytes(model, config, world_size, stage)) for stage in range(4)]
    state = [
        f"ZeRO-{stage} on {world_size} process(es) {size:>9}{'  <- chosen' * (stage == chosen)}"
        for stage, size in enumerate(sizes)
    ]
    parameters = _parameter_lines(model)
    if backbone.left_out:
        saved = readable_size(backbone.left_out * weight_bytes(config))
        parameters += [
            f"not loaded: {backbone.left_out:,} parameters not needed to draw images, {saved}"
        ]
    cost = estimate(model, config, world_size, samples=None if plan is None else plan.samples)
    cost = cost if beside is None else replace(cost, beside=beside(model))
    fits, warnings = _fits(cost)
    in_all = [*_cost_lines(cost, logits), fits]
    if plan is not None:
        work = cost.flops * plan.steps * config.batch_size
        in_all.append(
            f"work: {work:.2g} floating-point operations, {readable_time(work / FLOPS)} at "
            f"{FLOPS / 1e12:.0f} TFLOP/s (estimated, not measured; without validations and sheets)"
        )
    lines = {
        "parameters": parameters,
        "memory per process: weights, gradients, optimizer": state,
        "memory per process: in all": in_all,
    }
    return lines, [*warnings, *about_window(config, logits)]


def _parameter_lines(model: TensorAR) -> list[str]:
    """Total and trained parameters by part."""
    parts = {
        **model.backbone.parts(),
        **({"codec": (model.codec,)} if model.codec is not None else {}),
    }
    seen: set[int] = set()
    rows = []
    for name, modules in parts.items():
        parameters = [p for m in modules for p in m.parameters() if id(p) not in seen]
        seen.update(map(id, parameters))  # a tied text head counts once
        trainable = [p.numel() for p in parameters if p.requires_grad]
        rows.append((name, sum(p.numel() for p in parameters), sum(trainable)))
    rows.append(("total", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    width = max(len(name) for name, *_ in rows) + 2
    return [
        f"{name:<{width}}{total:>15,} of which trained {trained:>15,}"
        for name, total, trained in rows
    ]


def _cost_lines(cost: Cost, logits: str) -> list[str]:
    parts = {
        "state, as above": readable_size(cost.state),
        "gradient buckets": readable_size(cost.bucket),
        "image tokenizer and text encoder": readable_size(cost.frozen),
        "activations of one pass": readable_size(cost.kept),
        "temporary tensors": f"{readable_size(cost.passing)} ({logits} of logits, fp32, in it)",
        "or during the optimizer step": readable_size(cost.stepping),
        **({"beside the model, see drawing": readable_size(cost.beside)} if cost.beside else {}),
        "or while a sample sheet is drawn": readable_size(cost.drawing),
        "while images are encoded": f"{readable_size(cost.encoding)}, before there is an optimizer",
        "peak, plus 10 %": f"{readable_size(cost.total)} (computed from shapes, not measured)",
    }
    return [f"{name:<34}{size}" for name, size in parts.items()]


def _fits(cost: Cost) -> tuple[str, list[str]]:
    """A line on whether the run fits this machine's card, or else which common cards it fits; and a
    warning if it fits none.
    """
    need = readable_size(cost.total)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, size = card.name, card.total_memory
        if cost.total <= size:
            return f"fits this machine's {name} ({readable_size(size)})", []
        without = replace(cost, drawing=0).total
        sheets = f"draw no sample sheets (--log.sample-every 0: {readable_size(without)}), "
        warning = (
            f"needs {need}, this machine's {name} has {readable_size(size)}: "
            f"{sheets if without <= size else ''}lower --engine.micro-batch, choose a higher "
            "--engine.zero-stage on more GPUs, or a smaller model"
        )
        return f"does not fit this machine's {name} ({readable_size(size)})", [warning]
    if fitting := [size for size in _CARDS if cost.total <= size * 1e9]:
        return f"fits a card of {fitting[0]} GB (this machine has none)", []
    what = f"fits no card of {_CARDS[-1]} GB"
    return what, [f"{what}: needs {need}; more GPUs and --engine.zero-stage 3 share it"]

"""The pre-flight: look at settings, data and model, and say what a run would do and when, without
training.

Cheap mistakes come first: run folder, DeepSpeed JSON, batch and data are looked at before any
model. Parameter counts, memory and work come from the shapes of the model that would be trained,
built without data: for a published size nothing is fetched or read. Nothing is written, not even
the code cache.
"""

import torch

from t2i.data.data_report import DataReport, survey_source
from t2i.data.encoding import check_cache_dir
from t2i.data.images import ImageRules, Views
from t2i.data.samples import Source
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes
from t2i.errors import UserError
from t2i.generation import conditions
from t2i.models.base import Backbone
from t2i.tensorar.model import TensorAR
from t2i.training import advice
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.training.engine import deepspeed_config, parameter_groups
from t2i.training.examples import check_backbone, image_size, open_labelled
from t2i.training.logs import choose_tracker
from t2i.training.loop import build_model
from t2i.training.memory import Cost, estimate, logit_bytes, state_bytes, weight_bytes
from t2i.training.plan import Plan, plan_run
from t2i.training.preflight import count_samples, look_before_work, sheet_prompts
from t2i.training.run_state import check_resumable, claim_run_dir

_CARDS = (24, 40, 80)
"""Sizes of common cards in GB, where this machine has none."""
_FLOPS = 1e14
"""Floating-point operations per second that the time is reckoned with: a third of an A100's peak in
bf16.
"""


def check(config: TrainConfig, world_size: int = 1) -> str:
    """A report for people.

    Raises:
        UserError: what makes the run impossible.
    """
    choose_tracker(config.log.tracker)
    checkpoint = claim_run_dir(config)
    if checkpoint is not None:
        check_resumable(config, world_size, checkpoint)
    check_cache_dir(config.data.cache_dir)
    source = look_before_work(config, world_size, resumed=checkpoint is not None)
    model = build_model(config, device="meta")
    _check_kind(model.backbone, config)
    conditions(model.backbone, sheet_prompts(config))
    parameter_groups(model, config)  # raises where nothing would be trained
    if source is not None:
        total, lines, warnings = _captioned(config.data, source, model.backbone)
    else:
        total, lines, warnings = _labelled(config.data, model.backbone)
    plan = plan_run(config, total, world_size)
    lines += ["batch", *_indented(_batch_lines(config, plan, world_size))]
    lines += ["when", *_indented(when_lines(config, plan))]
    lines += ["parameters", *_indented(parameter_lines(model))]
    if model.backbone.left_out:
        lines += _indented([left_out_line(model.backbone, config)])
    lines += ["memory per process: weights, gradients, optimizer"]
    lines += _indented(memory_lines(model, config, world_size))
    logits = _size(logit_bytes(model, config))
    cost = estimate(model, config, world_size)
    fits, too_much = _fits(cost)
    lines += ["memory per process: in all", *_indented(_cost_lines(cost, logits)), f"  {fits}"]
    lines += _indented(_work_lines(config, plan, cost))
    lines += [f"run folder\n  {config.run_dir}"]
    warnings += too_much
    warnings += advice.about_windows(config, logits)
    warnings += [] if plan is None else advice.about_settings(config, plan)
    return "\n".join([*lines, *_verdict(warnings)])


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _verdict(warnings: list[str]) -> list[str]:
    if not warnings:
        return ["ready: the same command without --check trains"]
    count = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
    end = f"not ready, {count}: the same command without --check would train all the same"
    return ["warnings", *_indented(warnings), end]


def _check_kind(backbone: Backbone, config: TrainConfig) -> None:
    """UserError if this backbone cannot be trained on such data; a text encoder that is to be
    fetched counts as there.
    """
    to_fetch = config.backbone.text_encoder is not None and backbone.frozen.text_encoder is None
    captions = isinstance(config.data, DataOptions) and backbone.spec.cond_kind == "text"
    if not (to_fetch and captions):
        check_backbone(backbone, config.data)


# -- data ------------------------------------------------------------------------------------------
def _captioned(
    options: DataOptions, source: Source, backbone: Backbone
) -> tuple[int | None, list[str], list[str]]:
    """Number of samples, if it is known, the lines on them, and the warnings."""
    size = image_size(backbone)
    rules = ImageRules(size, small=options.small_images)
    survey, usable = survey_source(source, rules, caption_notes=backbone.caption_notes)
    if not usable:
        raise UserError(f"none of the samples looked at can be used: {survey.describe()}")
    total = count_samples(source, options)
    count = "unknown number of" if total is None else total
    lines = [
        "data",
        f"  source        {options.source}: {count} samples",
        f"  looked at     {survey.seen} of them: {survey.describe()}",
        *(f"  caption       {s.captions[0]!r} ({s.key})" for s in usable[:3]),
    ]
    return total, lines, list(advice.about_captions(survey, size))


def _labelled(options: LabelledOptions, backbone: Backbone) -> tuple[int, list[str], list[str]]:
    """Number of images (or of their codes), the lines on them, and the warnings."""
    opened = open_labelled(options, backbone)
    source = f"  source        {', '.join(options.source)}: "
    if isinstance(opened, LlamaGenCodes):
        return len(opened), ["data", f"{source}{len(opened)} x {opened.views} views"], []
    count = opened.length or 0
    if isinstance(opened, JsonlCodes):
        return count, ["data", f"{source}{count} lines"], []
    views = Views(options.views, options.crop_ranges)
    per_image = views.count * backbone.spec.num_tokens * len(backbone.spec.subvocabs) * 2
    gigabytes = count * per_image / 1e9
    lines = [
        "data",
        f"{source}{count} images of {len(opened.classes)} classes",
        f"  codes         {views.count} views of each, {gigabytes:.2f} GB in {options.cache_dir}",
    ]
    return count, lines, DataReport.collect((), opened).lines()


# -- what happens when -----------------------------------------------------------------------------
def _batch_lines(config: TrainConfig, plan: Plan | None, world_size: int) -> list[str]:
    accumulated = deepspeed_config(config, world_size)["gradient_accumulation_steps"]
    lines = [
        f"{config.batch_size} samples per step = {config.engine.micro_batch} per pass x "
        f"{accumulated} accumulated x {world_size} processes"
    ]
    if plan is not None and plan.training:
        passes = plan.steps * config.batch_size / plan.training
        lines += [
            f"{plan.held_out} of {plan.samples} samples held out",
            f"{plan.steps} steps = {passes:.2f} passes over {plan.training} training samples",
        ]
    return lines


def when_lines(config: TrainConfig, plan: Plan | None) -> list[str]:
    """First sheet, validation and checkpoint, and the course of the rates."""
    if plan is None:
        return ["the number of steps follows from the data, which are counted when the run starts"]
    steps, first = plan.steps, "at step 0 and " if config.log.at_start else ""

    def every(count: int, never: str) -> str:
        if not 0 < count < steps:
            return f"{first}{never}"
        return f"{first}every {count} steps, at step {count} first, and at the end"

    sheets = "never" if plan.sample_every == 0 else "at the end"
    sheets = "never" if sheets == "never" else every(plan.sample_every, sheets)
    prompts = ", ".join(map(repr, sheet_prompts(config))) or "captions of held-out samples"
    lines = [
        f"validation    {every(plan.validate_every, 'at the end')}",
        f"sample sheet  {sheets}",
        *([] if sheets == "never" else [f"  of          {prompts}"]),
        f"checkpoint    {every(plan.save_every, 'at the end').removeprefix(first)}; "
        f"the last {config.log.keep_last} are kept",
    ]
    for part, (rate, step) in advice.peak_rates(config, plan).items():
        course = "then falls to 0 at the end" if part == "codec" else "then stays"
        lines.append(f"{part + ' rate':<14}{rate:.3g} at step {step + 1} of {steps}, {course}")
    return lines


# -- size ------------------------------------------------------------------------------------------
def parameter_lines(model: TensorAR) -> list[str]:
    """Total and trainable parameters by part."""
    parts = {
        **model.backbone.parts(),
        **({"codec": (model.codec,)} if model.codec is not None else {}),
    }
    rows, seen = [], set()
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


def left_out_line(backbone: Backbone, config: TrainConfig) -> str:
    """What `generation_only` saves."""
    size = _size(backbone.left_out * weight_bytes(config))
    return f"not loaded: {backbone.left_out:,} parameters that drawing images does not need, {size}"


def memory_lines(model: TensorAR, config: TrainConfig, world_size: int) -> list[str]:
    """State bytes per ZeRO stage; the configured stage is marked."""
    lines = []
    for stage in range(4):
        size = _size(state_bytes(model, config, world_size, stage))
        mark = "  <- chosen" if stage == config.engine.zero_stage else ""
        lines.append(f"ZeRO-{stage} on {world_size} process(es) {size:>9}{mark}")
    return lines


def _cost_lines(cost: Cost, logits: str) -> list[str]:
    parts = {
        "state, as above": _size(cost.state),
        "image tokenizer and text encoder": _size(cost.frozen),
        "activations of one pass": f"{_size(cost.kept)} ({logits} of logits, fp32, in it)",
        "what lives for a moment": _size(cost.passing),
        "while images are encoded": f"{_size(cost.encoding)}, before there is an optimizer",
        "peak, and a tenth more": f"{_size(cost.total)} (computed from shapes, not measured)",
    }
    return [f"{name:<34}{size}" for name, size in parts.items()]


def _fits(cost: Cost) -> tuple[str, list[str]]:
    """Whether it fits this machine's card, or which of the common ones; and the warning where it
    does not.
    """
    need = _size(cost.total)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, size = card.name, card.total_memory
        if cost.total <= size:
            return f"fits this machine's {name} ({_size(size)})", []
        warning = (
            f"needs {need}, this machine's {name} has {_size(size)}: lower --engine.micro-batch, choose a higher "
            "--engine.zero-stage on more GPUs, or a smaller model"
        )
        return f"does not fit this machine's {name} ({_size(size)})", [warning]
    fitting = [f"{size} GB" for size in _CARDS if cost.total <= size * 1e9]
    if fitting:
        return f"fits cards of {', '.join(fitting)} (this machine has none)", []
    what = f"fits no card of {', '.join(map(str, _CARDS))} GB"
    return what, [f"{what}: needs {need}; more GPUs and --engine.zero-stage 3 share it"]


def _work_lines(config: TrainConfig, plan: Plan | None, cost: Cost) -> list[str]:
    if plan is None:
        return []
    work = cost.flops * plan.steps * config.batch_size
    return [
        f"work: {work:.2g} floating-point operations, {_duration(work / _FLOPS)} at {_FLOPS / 1e12:.0f} TFLOP/s "
        "(estimated, not measured; without validations and sheets)"
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

"""The pre-flight: look at settings, data and model, and say what a run would do, without training.

Parameter counts and the memory estimate come from the model that would be trained; nothing is written, not even the code cache.
Of a family that publishes a folder (Janus-Pro) only names and shapes are read, of its published sizes not even those: the estimate
for 7B parameters needs no memory for them, and no download.
"""

from pathlib import Path

from t2i.backbones.base import Backbone
from t2i.data.cache import check_cache_dir
from t2i.data.pretokenized import LlamaGenCodes
from t2i.data.report import survey_source
from t2i.data.views import Views
from t2i.errors import UserError
from t2i.generation import conditions
from t2i.loading import published_as_folder
from t2i.tensorar.model import TensorAR
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.training.engine import deepspeed_config, parameter_groups
from t2i.training.examples import check_backbone, image_size, open_data, open_labelled
from t2i.training.logs import choose_tracker
from t2i.training.loop import build_model
from t2i.training.run_state import check_resumable, claim_run_dir


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
    settings = deepspeed_config(config, world_size)
    on_meta = published_as_folder(config.backbone.family)
    model = build_model(config, device="meta" if on_meta else "cpu")
    check_backbone(model.backbone, config.data)
    conditions(model.backbone, config.log.prompts)
    parameter_groups(model, config)  # raises where nothing would be trained
    survey = _captioned if isinstance(config.data, DataOptions) else _labelled
    total, lines = survey(config.data, model.backbone)
    trained = None if total is None else max(total - config.data.validation_samples, 0)
    if trained is not None and trained < 1:
        raise UserError(
            f"{total} samples with data.validation_samples={config.data.validation_samples} held out leave none to train on"
        )
    steps = config.steps or (
        None if trained is None else max(1, round(config.epochs * trained / config.batch_size))
    )
    lines += ["batch"]
    lines += [
        f"  {config.batch_size} samples per step = {config.engine.micro_batch} per pass x "
        f"{settings['gradient_accumulation_steps']} accumulated x {world_size} processes"
    ]
    if steps is not None and trained is not None:
        lines += [
            f"  {steps} steps = {steps * config.batch_size / trained:.2f} passes over {trained} training samples"
        ]
    lines += ["parameters", *(f"  {line}" for line in parameter_lines(model))]
    if model.backbone.left_out:
        lines += [f"  {left_out_line(model.backbone, config)}"]
    lines += ["memory per process (weights, gradients, optimizer; activations come on top)"]
    lines += [f"  {line}" for line in memory_lines(model, config, world_size)]
    lines += [f"  logits of one pass {_size(logit_bytes(model, config))} (fp32, forward only)"]
    lines += [f"run folder\n  {config.run_dir}", "ready: the same command without --check trains"]
    return "\n".join(lines)


def _captioned(options: DataOptions, backbone: Backbone) -> tuple[int | None, list[str]]:
    """Number of samples, if it is known, and the lines on them."""
    source = open_data(options)
    survey, usable = survey_source(
        source,
        caption_notes=backbone.caption_notes,
        size=image_size(backbone),
        small=options.small_images,
    )
    if not usable:
        raise UserError(f"none of the samples looked at can be used: {survey.describe()}")
    total = min((n for n in (source.length, options.max_samples) if n is not None), default=None)
    count = "unknown number of" if total is None else total
    return total, [
        "data",
        f"  source        {options.source}: {count} samples",
        f"  looked at     {survey.seen} samples: {survey.describe()}",
        *(f"  caption       {s.captions[0]!r} ({s.key})" for s in usable[:3]),
    ]


def _labelled(options: LabelledOptions, backbone: Backbone) -> tuple[int | None, list[str]]:
    opened, names = open_labelled(options, backbone), ", ".join(options.source)
    if isinstance(opened, Path):
        return None, ["data", f"  source        {names}: lines are counted at the start"]
    if isinstance(opened, LlamaGenCodes):
        return len(opened), [
            "data",
            f"  source        {names}: {len(opened)} x {opened.views} views",
        ]
    views = Views(options.views, options.crop_ranges)
    gigabytes = (
        len(opened.files)
        * views.count
        * backbone.spec.num_tokens
        * len(backbone.spec.subvocabs)
        * 2
        / 1e9
    )
    return len(opened.files), [
        "data",
        f"  source        {names}: {len(opened.files)} images of {len(opened.classes)} classes",
        f"  codes         {views.count} views of each, {gigabytes:.2f} GB in {options.cache_dir}",
    ]


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
    size = _size(backbone.left_out * _weight_bytes(config))
    return f"not loaded: {backbone.left_out:,} parameters that drawing images does not need, {size}"


def memory_lines(model: TensorAR, config: TrainConfig, world_size: int) -> list[str]:
    """State bytes per ZeRO stage; the configured stage is marked."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weight, grad = _weight_bytes(config), 4
    optimizer = 12 if weight == 2 else 8  # two moments, and an fp32 copy under bf16
    lines = []
    for stage in range(4):
        shards = [world_size if stage >= least else 1 for least in (3, 2, 1)]
        size = total * weight / shards[0] + trained * (grad / shards[1] + optimizer / shards[2])
        mark = "  <- chosen" if stage == config.engine.zero_stage else ""
        lines.append(f"ZeRO-{stage} on {world_size} process(es) {_size(size):>9}{mark}")
    return lines


def _weight_bytes(config: TrainConfig) -> int:
    return 2 if config.engine.precision == "bf16" else 4


def logit_bytes(model: TensorAR, config: TrainConfig) -> int:
    """fp32 logits of one forward pass."""
    slots = model.windows.count * model.windows.size
    return 4 * config.engine.micro_batch * slots * sum(model.backbone.spec.subvocabs)


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

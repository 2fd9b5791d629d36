"""The pre-flight check: examine settings, data and model, and report what a run would do and when,
without training.

Run folder, DeepSpeed JSON, batch and data are checked first. Parameter counts, memory and work come
from the model's shapes, on the meta device; for a published size nothing is fetched or read.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from t2i.data.data_report import DataReport, short_name, survey_source
from t2i.data.encoding import check_cache_dir, refuse_changed_files
from t2i.data.images import ImageRules
from t2i.data.order import split_indices
from t2i.data.samples import OTHER_SPLIT, Source
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes
from t2i.errors import UserError, shorten
from t2i.fields import leaves, plain
from t2i.generation import parse_conditions
from t2i.models.base import Backbone
from t2i.models.families import find_family
from t2i.progress import readable_size
from t2i.pytorch_defaults import usual_defaults
from t2i.sampling import check_counts, check_whole
from t2i.sources import check_named
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows
from t2i.training.batches import stored_data_key
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.training.engine import check_compiler, deepspeed_config, parameter_groups
from t2i.training.examples import check_backbone, image_size, views_of
from t2i.training.logs import check_tracker
from t2i.training.open_data import labelled_sources, open_data, open_labelled, refuse_inside
from t2i.training.run_plan import Plan, about_few_pictures, about_settings, peak_rates, plan_run
from t2i.training.run_state import all_done, check_resumable, claim_run_dir, steps_done
from t2i.training.scale import checkpoint_bytes
from t2i.training.settings import settings_of
from t2i.training.size_report import size_report
from t2i.training.start import build_model
from t2i.training.trigger_words import refuse_lost_words


# -- before the work -------------------------------------------------------------------------------
def look_before_work(
    config: TrainConfig, world_size: int, checkpoint: Path | None
) -> tuple[Source | None, int | None]:
    """Refuse simple mistakes before anything is fetched, loaded or encoded. Training calls it, too.

    Returns the opened source of captioned images (None for classes), and its number of samples,
    usable or not, if known. A resumed run loads its own `checkpoint`: its original weights are not
    checked.
    """
    _refuse_not_utf8(config)
    check_tracker(config.log.tracker)
    if checkpoint is not None:
        check_resumable(config, world_size, checkpoint)
    check_cache_dir(config.data.cache_dir)
    deepspeed_config(config, world_size)
    check_compiler(config)
    base = config.backbone
    if checkpoint is None:
        refuse_inside(config.run_dir, config.data)
        check_named(base.weights, folder=find_family(base.family).published_as_folder)
    base.check_helpers()
    if not isinstance(config.data, DataOptions):
        labelled_sources(config.data)
        return None, None
    source = open_data(config.data)
    known = [n for n in (source.length, config.data.max_samples) if n is not None]
    total = min(known, default=None)
    plan_run(config, total)  # raises if they are too few
    return source, total


def _refuse_not_utf8(config: TrainConfig) -> None:
    """UserError for a file name that is not UTF-8, since config.json cannot hold it."""
    for option, value in leaves(plain(config)).items():
        for text in value if isinstance(value, list) else [value]:
            try:
                str(text).encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{option}={text!r} is not UTF-8: rename the file or folder"
                ) from error


def look_at_model(model: TensorAR, config: TrainConfig) -> list[str | int]:
    """The sheets' prompts as the backbone takes them; empty: use those of held-out samples. Warns
    of sampling options without effect.
    """
    backbone, base = model.backbone, config.method.k == 1  # a base's are told of with the options
    drafts = base or drawn_windows(model, model.sampling).stages > 1
    config.sampling.look_for_unread(model.sampling, drafts)
    # A text encoder that has not been fetched yet counts as present.
    to_fetch = config.backbone.text_encoder is not None and backbone.frozen.text_encoder is None
    captions = isinstance(config.data, DataOptions) and backbone.spec.cond_kind == "text"
    if not (to_fetch and captions):
        check_backbone(backbone, config.data)
    if isinstance(config.data, DataOptions):
        refuse_lost_words(backbone, config.data)
    try:
        return parse_conditions(backbone, sheet_prompts(config))
    except UserError as error:  # the prompts may be the recipe's, so name the option
        raise UserError(
            f"--log.prompts {shorten(sheet_prompts(config))}: {error}; give others, or an empty "
            "--log.prompts to use those of held-out samples"
        ) from error


def sheet_prompts(config: TrainConfig) -> list[str]:
    """The configured prompts of the sample sheets, with the trigger words."""
    if isinstance(config.data, DataOptions):
        return [config.data.with_trigger(prompt) for prompt in config.log.prompts]
    return list(config.log.prompts)


# -- the report ------------------------------------------------------------------------------------
@usual_defaults()
def check(
    config: TrainConfig,
    world_size: int = 1,
    more: Callable[[TensorAR, Plan | None, Path | None], dict[str, list[str]]] | None = None,
    beside: Callable[[TensorAR], float] | None = None,
) -> str:
    """What `t2i.train` would do with these settings, as text; trains nothing.

    Args:
        world_size: number of processes of the run.
        more: makes further sections (lines by title) from the model on the meta device, the plan,
            and the checkpoint that the run would resume from.
        beside: bytes that stay in memory beside the model while it trains.

    Raises:
        UserError: the run would be refused, or no sample of the data can be used.
    """
    check_whole(world_size=world_size)
    check_counts(world_size=world_size)
    checkpoint = claim_run_dir(settings_of(config, "t2i.check"))
    source, total = look_before_work(config, world_size, checkpoint)
    if source is not None and (key := stored_data_key(config)) is not None:
        refuse_changed_files(source, config.data.cache_dir, key)
    model = build_model(config, device="meta", resumed=checkpoint)
    prompts = look_at_model(model, config)
    parameter_groups(model, config)  # raises if nothing would be trained
    if isinstance(config.data, LabelledOptions):
        survey, total, lines, warnings = _labelled(config.data, model.backbone)
    else:
        assert source is not None
        survey, lines, warnings = _captioned(config.data, source, total, model.backbone)
    plan, ends = _look_ahead(config, total, survey, checkpoint)
    size, too_much = size_report(model, config, plan, world_size, beside)
    weights, state = map(readable_size, checkpoint_bytes(model, config))
    sections = {
        "data": lines,
        "batch": _batch_lines(config, plan, world_size),
        "when": _when_lines(config, plan),
        **size,
        **({} if more is None else more(model, plan, checkpoint)),
        "run folder": [
            str(config.run_dir),
            f"a checkpoint  {weights} of weights, {state} of training state",
        ],
    }
    warnings += [*ends, *_about_prompts(prompts, model.backbone), *too_much]
    warnings += [] if plan is None else about_settings(config, plan)
    verdict = "ready: the same command without --check trains"
    if warnings:
        sections["warnings"] = warnings
        count = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
        would = "end at once" if ends else "still train"
        verdict = f"not ready, {count}: the same command without --check would {would}"
    indented = ["\n  ".join([title, *lines]) for title, lines in sections.items()]
    return "\n".join([*indented, verdict])


def _look_ahead(
    config: TrainConfig, total: int | None, survey: DataReport | None, checkpoint: Path | None
) -> tuple[Plan | None, list[str]]:
    """The plan, as far as the data are known, and the reasons why training would end at once."""
    plan, ends = plan_run(config, total), []
    if survey is not None and survey.seen == total:  # every sample was checked
        try:
            plan = plan_run(config, survey.usable)
            if isinstance(config.data, DataOptions):
                same = torch.tensor(survey.pictures)
                _, held_out = split_indices(survey.usable, plan.held_out, config.seed, same)
                plan = plan_run(config, survey.usable, len(held_out))
        except UserError as error:  # still report which samples are skipped, and why
            ends.append(f"training would end at once: {error}")
    if checkpoint and plan and steps_done(config, checkpoint, plan.steps) == plan.steps:
        ends.append(all_done(plan.steps))
    return plan, ends


# -- data ------------------------------------------------------------------------------------------
def _captioned(
    options: DataOptions, source: Source, total: int | None, backbone: Backbone
) -> tuple[DataReport, list[str], list[str]]:
    """A survey of the first samples, the report's lines on the data, and warnings."""
    size = image_size(backbone)
    rules = ImageRules(size, small=options.small_images)
    survey, usable = survey_source(
        source, rules, caption_notes=backbone.caption_notes, max_samples=options.max_samples
    )
    if not usable:
        raise UserError(f"none of the checked samples can be used: {survey.no_usable()}")
    count = "unknown number of" if total is None else total
    lines = [
        f"source        {options.source}: {count} samples",
        f"checked       {survey.seen} of them: {survey.describe()}",
        *(f"caption       {s.captions[0]!r:.300} ({short_name(s.key)})" for s in usable[:3]),
    ]
    warnings = list(_about_samples(survey, size))
    sided = [c for s in usable for c in s.captions if re.search(r"\b(left|right)\b", c, re.I)]
    if options.views == "flip" and sided:
        warnings.append(
            f"{len(sided)} captions of the checked samples say left or right ({sided[0]!r:.80}), "
            "which mirrored images make wrong: leave out --data.views flip"
        )
    return survey, lines, warnings


def _about_samples(survey: DataReport, size: int) -> Iterator[str]:
    """Warnings about the samples that were checked, and about files that belong to no sample."""
    around = Counter(line["reason"] for line in survey.skipped if line["index"] is None)
    for reason, keys in survey.keys.items():
        advice = ""
        if reason == "too small":
            takes = "--data.small-images upscale takes smaller ones"
            advice = f": the model's images are {size} px; {takes}"
        if count := len(keys) - around[reason]:
            yield (
                f"{count} of {survey.seen} checked samples are skipped, {reason} "
                f"({short_name(keys[0])}){advice}"
            )
        if (count := around[reason]) and not reason.startswith(OTHER_SPLIT):
            yield f"{count} left out, {reason} ({short_name(keys[-1])})"


def _about_prompts(prompts: Sequence[str | int], backbone: Backbone) -> Iterator[str]:
    """Warnings about sheet prompts that hold no text the model can read."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text, lost in zip(texts, backbone.caption_notes(texts), strict=True):
        if lost is None:
            yield f"log.prompts {text!r:.200} has no text the encoder can read"


def _labelled(
    options: LabelledOptions, backbone: Backbone
) -> tuple[DataReport | None, int, list[str], list[str]]:
    """A survey of the images (None for codes), how many there are, lines on them, and warnings."""
    opened = open_labelled(options, backbone.spec)
    source = f"source        {', '.join(options.source)}: "
    if isinstance(opened, LlamaGenCodes):
        opened.check_some(backbone.spec.check_codes, backbone.spec.num_classes)
        return None, len(opened), [f"{source}{len(opened)} x {opened.views} views"], []
    count = opened.length or 0
    if isinstance(opened, JsonlCodes):
        opened.check_some(backbone.spec.check_codes)
        return None, count, [f"{source}{count} lines"], opened.remarks
    size = image_size(backbone)
    survey, usable = survey_source(opened, ImageRules(size, small="upscale"))
    if not usable:
        raise UserError(f"none of the checked images can be used: {survey.no_usable()}")
    views = views_of(options).count
    gigabytes = count * views * backbone.spec.num_tokens * len(backbone.spec.subvocabs) * 2 / 1e9
    lines = [
        f"{source}{count} images of {len(opened.classes)} classes",
        f"checked       {survey.seen} of them: {survey.describe()}",
        f"codes         {views} views of each, {gigabytes:.2f} GB in {options.cache_dir}",
    ]
    return survey, count, lines, [*_about_samples(survey, size), *survey.remarks]


# -- what happens when -----------------------------------------------------------------------------
def _batch_lines(config: TrainConfig, plan: Plan | None, world_size: int) -> list[str]:
    accumulated = deepspeed_config(config, world_size)["gradient_accumulation_steps"]
    lines = [
        f"{config.batch_size} samples per step = {config.engine.micro_batch} per pass x "
        f"{accumulated} accumulated x {world_size} processes"
    ]
    if plan is not None and plan.training:
        together = ", all samples of one image together" * isinstance(config.data, DataOptions)
        lines.append(f"{plan.held_out} of {plan.samples} samples held out{together}")
        if config.learns_from_data:
            passes = plan.steps * config.batch_size / plan.training
            of = f"{plan.training} training samples"
            lines.append(f"{plan.steps} steps = {passes:.2f} passes over {of}")
            lines += about_few_pictures(config, plan)
    return lines


def _when_lines(config: TrainConfig, plan: Plan | None) -> list[str]:
    """When the run validates, draws sheets and saves, and how the learning rates develop."""
    if plan is None:
        return ["the number of steps depends on the data, which are counted when the run starts"]
    steps, first = plan.steps, "at step 0 and " if config.log.at_start else ""

    def every(count: int) -> str:
        if not 0 < count < steps:
            return f"{first}at the end"
        return f"{first}every {count} steps, at step {count} first, and at the end"

    sheets = every(plan.sample_every) if plan.sample_every else "never"
    prompts = ", ".join(map(repr, sheet_prompts(config))) or "captions of held-out samples"
    lines = [
        f"validation    {every(plan.validate_every)}",
        f"sample sheet  {sheets}",
        *([] if sheets == "never" else [f"  of          {prompts}"]),
        f"checkpoint    {every(plan.save_every).removeprefix(first)}; "
        f"the last {config.log.keep_last} are kept"
        + (", and the best model" if config.log.keep_best else ""),
    ]
    for part, (rate, step) in peak_rates(config, plan).items():
        falls = part == "codec" or config.optim.backbone_falls
        course = "then falls to 0 at the end" if falls else "then stays"
        lines.append(f"{part + ' rate':<14}{rate:.3g} at step {step + 1} of {steps}, {course}")
    return lines

"""Cheap mistakes, named before anything is fetched, loaded or encoded: both --check and training
look here first.
"""

from t2i.data.samples import Source
from t2i.models.families import find_family
from t2i.sources import check_named
from t2i.training.config import DataOptions, TrainConfig
from t2i.training.engine import deepspeed_config
from t2i.training.examples import labelled_sources, open_data
from t2i.training.plan import plan_run


def look_before_work(
    config: TrainConfig, world_size: int, *, resumed: bool = False
) -> Source | None:
    """Look at the batch arithmetic, the DeepSpeed JSON, local names and the data; returns the
    opened source of captioned images.

    A `resumed` run stands on its own checkpoint: what its first weights were called does not matter
    any more.

    Raises:
        UserError: one of them is impossible.
    """
    deepspeed_config(config, world_size)
    base = config.backbone
    if not resumed:
        check_named(base.weights, folder=find_family(base.family).published_as_folder)
    if base.tokenizer is not None:
        check_named(base.tokenizer)
    if not isinstance(config.data, DataOptions):
        labelled_sources(config.data)
        return None
    source = open_data(config.data)
    if (total := count_samples(source, config.data)) is not None:
        plan_run(config, total, world_size)
    return source


def count_samples(source: Source, options: DataOptions) -> int | None:
    """Samples that a run reads, usable or not; None for a stream without `max_samples`."""
    return min((n for n in (source.length, options.max_samples) if n is not None), default=None)


def sheet_prompts(config: TrainConfig) -> list[str]:
    """The prompts of the sample sheets that were given, with the trigger words; empty: those of
    held-out samples are taken.
    """
    if isinstance(config.data, DataOptions):
        return [config.data.with_trigger(prompt) for prompt in config.log.prompts]
    return list(config.log.prompts)

"""Plan a run on a cluster and data that need not exist yet: how long it takes, how much memory and
disk it needs, and what makes it impossible. Needs settings and shapes; reads and writes no files.
"""

import math
from collections.abc import Iterator

from t2i.checkpoint import holds_all_weights
from t2i.errors import UserError
from t2i.lora import plain_weights
from t2i.progress import readable_size, readable_time
from t2i.tensorar.model import TensorAR
from t2i.training.cluster import Cluster
from t2i.training.config import DataOptions, TrainConfig
from t2i.training.engine import deepspeed_config, parameter_groups
from t2i.training.examples import IMAGES_PER_SHARD, views_of
from t2i.training.memory import FLOPS, estimate, weight_bytes
from t2i.training.run_plan import Plan, about_settings, plan_run
from t2i.training.start import build_model

_LINE_BYTES = 320
"""Bytes of a sample's line in a shard's .jsonl: index, name, a caption of two sentences."""
_ORDER_BYTES = 24
"""Bytes per sample in each process: its number among those trained on, and the orders of two passes
and of the split."""
_SORTING_BYTES = 40
"""Bytes per captioned sample while every process looks for equal images, before training."""


def plan_cluster(config: TrainConfig, cluster: Cluster) -> str:
    """The plan as text; UserError if the cluster cannot run it."""
    samples = int(cluster.images)
    plan = plan_run(config, samples)
    model = build_model(config, device="meta")
    parameter_groups(model, config)  # raises if nothing would be trained
    cost = estimate(model, config, cluster.gpus, samples=samples, gpu=True)
    shards = -(-samples // IMAGES_PER_SHARD)
    cached, saved = _cache_bytes(config, cluster, model, samples), checkpoint_bytes(model, config)
    # While one is saved, the oldest still exists; the best model has no training state.
    kept = sum(saved) * (config.log.keep_last + 1) + (saved[0] if config.log.keep_best else 0)
    captioned = isinstance(config.data, DataOptions)
    resident = samples * (_SORTING_BYTES if captioned else _ORDER_BYTES)
    on_node = cluster.per_node * resident
    few = "use fewer processes on one"
    _refuse_more(
        {
            "GPU memory": (cost.total, cluster.gpu_memory, "lower --engine.micro-batch"),
            "main memory of a machine": (on_node, cluster.node_memory, few),
            "disk": (cached + kept, cluster.disk or math.inf, "use fewer images"),
        }
    )
    sections = {
        "steps": _step_lines(config, cluster, plan),
        "time": _time_lines(config, cluster, plan, cost.flops),
        "code cache": _shard_lines(cluster, shards, cached),
        "a checkpoint": [
            f"model {readable_size(saved[0])}, training state {readable_size(saved[1])} "
            f"({readable_size(saved[1] / cluster.gpus)} a process)",
            f"every {plan.save_every or plan.steps:,} steps; the last {config.log.keep_last} are "
            f"kept{' and the best model' * config.log.keep_best}: {readable_size(kept)} while one "
            "more is saved",
        ],
        "memory": [
            f"{readable_size(cost.total)} on a GPU (computed from shapes, plus 10 %)",
            f"{readable_size(resident)} of main memory in each process for order and split, "
            f"{readable_size(on_node)} on a machine",
        ],
    }
    if warnings := [*_about_shards(cluster, samples, shards), *about_settings(config, plan)]:
        sections["warnings"] = warnings
    return "\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def _step_lines(config: TrainConfig, cluster: Cluster, plan: Plan) -> list[str]:
    accumulated = deepspeed_config(config, cluster.gpus)["gradient_accumulation_steps"]
    passes = plan.steps * config.batch_size / (plan.training or 1)
    return [
        f"{plan.samples:,} images, {plan.held_out} of them held out",
        f"{config.batch_size} a step = {config.engine.micro_batch} a pass x {accumulated} "
        f"accumulated x {cluster.gpus} GPUs on {cluster.nodes} machine(s)",
        f"{plan.steps:,} steps = {passes:.2f} passes over the data",
    ]


def _time_lines(config: TrainConfig, cluster: Cluster, plan: Plan, flops: float) -> list[str]:
    """flops: of training on one image. UserError if the run takes longer than allowed."""
    images = plan.steps * config.batch_size
    rate = cluster.images_per_second or cluster.gpus * FLOPS / flops
    training = images / rate
    encoding = None
    if cluster.encoded_per_second is not None:
        views = int(cluster.images) * views_of(config.data).count
        encoding = views / (cluster.encoded_per_second * cluster.gpus)
    in_all = training + (encoding or 0)
    if cluster.hours is not None and in_all > 3600 * cluster.hours:
        of_it = "" if encoding is None else f" ({readable_time(encoding)} of it to encode the data)"
        raise UserError(
            f"the run takes {readable_time(in_all)}{of_it}, more than {cluster.hours:g} hours: give "
            "fewer --epochs or --steps, or more --gpus"
        )
    said = "as given" if cluster.images_per_second else "computed from the work, not measured"
    return [
        f"training    {readable_time(training)} at {rate:,.0f} images/s ({said}); "
        f"work {flops * images:.2g} operations",
        "encoding    not known: give --encoded-per-second"
        if encoding is None
        else f"encoding    {readable_time(encoding)}, once, before training",
    ]


def _about_shards(cluster: Cluster, samples: int, shards: int) -> Iterator[str]:
    if shards < cluster.gpus:
        yield (
            f"{samples:,} images are {shards} shards: {cluster.gpus - shards} of {cluster.gpus} "
            "processes encode nothing"
        )


def _refuse_more(needs: dict[str, tuple[float, float, str]]) -> None:
    """UserError if a need exceeds what there is; needs: name -> (bytes, available GB, advice)."""
    for what, (needed, there, advice) in needs.items():
        if needed > there * 1e9:
            raise UserError(
                f"the run needs {readable_size(needed)} of {what}, but there is only "
                f"{readable_size(there * 1e9)}: {advice}"
            )


def checkpoint_bytes(model: TensorAR, config: TrainConfig) -> tuple[float, float]:
    """Bytes of a checkpoint's model, and of its training state (of all processes together)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    codec = 0 if model.codec is None else sum(p.numel() for p in model.codec.parameters())
    backbone, whole = model.backbone, trained
    assert backbone.source is not None, "of build_model"
    if holds_all_weights(config.tuning, backbone.source):
        adapters = trained - codec if config.tuning == "lora" else 0
        whole = codec + adapters + sum(t.numel() for t in plain_weights(backbone).values())
    # The state: each weight, both moments and, if used, the moving average, in fp32.
    return whole * weight_bytes(config), trained * (16 if config.ema else 12)


def _cache_bytes(config: TrainConfig, cluster: Cluster, model: TensorAR, samples: int) -> float:
    spec = model.backbone.spec
    code = 2 if max(spec.subvocabs) <= 2**16 else 4
    codes = views_of(config.data).count * spec.num_tokens * len(spec.subvocabs) * code
    text = 0
    if isinstance(config.data, DataOptions):
        text = 2 * min(cluster.caption_tokens, spec.prefix_tokens) * model.backbone.caption_width
    return samples * (codes + text + _LINE_BYTES)


def _shard_lines(cluster: Cluster, shards: int, size: float) -> list[str]:
    least, more = divmod(shards, cluster.gpus)
    each = f"{least:,}" if not more else f"{least:,} or {least + 1:,}"
    return [
        f"{readable_size(size)} in {shards:,} shards of {IMAGES_PER_SHARD:,} images, "
        f"{readable_size(size / shards)} each",
        f"{each} shards are encoded by each process",
    ]

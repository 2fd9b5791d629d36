"""DeepSpeed: processes, the engine, and what differs between ZeRO stages.

The DeepSpeed configuration is built from the run's settings; a JSON file may only add to
"zero_optimization", so that the two cannot contradict each other.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2i import launcher
from t2i.errors import UserError
from t2i.files import read_json
from t2i.loading import find_gpu, warn_of_emulation
from t2i.models.conditions import to_device
from t2i.processes import Processes, joining, local_gpu
from t2i.tensorar.model import TensorAR
from t2i.tensorar.speed import compiler_lacks
from t2i.training.batches import Batch
from t2i.training.config import TrainConfig

_BUCKET = 5 * 10**8
"""DeepSpeed's default for reduce_bucket_size."""


def start_processes() -> Processes:
    """Join the process group that the launcher describes, or run as the only process.

    Works without a GPU and without a compiler. With DS_ACCELERATOR=cpu in the environment an
    existing GPU is not used.
    """
    cuda = _choose_accelerator()
    launcher.adopt_launcher()
    launcher.settle_group()
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if not cuda:
        # Otherwise the CPU accelerator compiles a shared-memory extension at its first start, which
        # needs a compiler and takes a minute.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    device = local_gpu() if cuda else torch.device("cpu")
    if not dist.is_initialized():
        with joining():
            deepspeed.init_distributed(
                dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False
            )
    launcher.watch_launcher()
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _choose_accelerator() -> bool:
    """Choose the device before DeepSpeed is imported, which fixes it; True for a GPU."""
    cuda = os.environ.get("DS_ACCELERATOR") != "cpu" and find_gpu()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return cuda


def check_compiler(config: TrainConfig) -> None:
    """UserError if blocks are to be compiled, and this machine lacks what that takes."""
    device = torch.device("cuda" if _choose_accelerator() else "cpu")
    if config.engine.compile and (lacking := compiler_lacks(device)):
        raise UserError(f"engine.compile needs {lacking}: install it, or leave the option out")


def deepspeed_config(config: TrainConfig, world_size: int) -> dict:
    """The DeepSpeed configuration of a run."""
    engine = config.engine
    per_step = engine.micro_batch * world_size
    if config.batch_size % per_step:
        each, left = divmod(config.batch_size, world_size)
        smaller = f", or engine.micro_batch={math.gcd(each, engine.micro_batch)}"
        raise UserError(
            f"batch_size={config.batch_size} cannot be split over {world_size} processes with "
            f"engine.micro_batch={engine.micro_batch}; use a multiple of {per_step}"
            f"{'' if left else smaller}"
        )
    zero: dict = {"stage": engine.zero_stage}
    if engine.deepspeed_config is not None:
        zero |= _zero_settings(engine.deepspeed_config, engine.zero_stage)
    return {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": config.batch_size // per_step,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def bucket_size(zero: dict, trained: int) -> int:
    """How many gradients DeepSpeed collects before it reduces them, given "zero_optimization" and
    the number of trained parameters. It allocates whole buckets, so a bucket is never larger.
    """
    return zero.get("reduce_bucket_size", min(_BUCKET, trained))


def _zero_settings(path: Path, stage: int) -> dict:
    own = Path(__file__).parents[2] / path  # launch/zero3_offload.json, from any folder
    content = read_json(own if own.is_file() and not path.exists() else path)
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise UserError(
            f'engine.deepspeed_config {path} must hold {{"zero_optimization": {{...}}}}'
        )
    others = sorted(
        name
        for name, value in content.items()
        if name != "zero_optimization" and not _left_to_the_program(value)
    )
    if others:
        raise UserError(
            f"{path} sets {', '.join(others)}; only zero_optimization may be set there, use this "
            "program's options for the rest"
        )
    # "auto", as files for other trainers have it, is DeepSpeed's own default.
    given = content.get("zero_optimization", {})
    settings = {name: value for name, value in given.items() if value != "auto"}
    _choose_accelerator()
    _check_zero_options(settings, stage, path)
    if settings.get("stage", stage) != stage:
        raise UserError(
            f"{path} is for ZeRO stage {settings['stage']!r}, but engine.zero_stage is {stage}"
        )
    _refuse_unread(settings, stage, path)
    return settings


def _left_to_the_program(value: object) -> bool:
    """Whether a file for other trainers leaves this setting, or the use of this part, open."""
    return value == "auto" or (isinstance(value, dict) and value.get("enabled") == "auto")


def _refuse_unread(settings: dict, stage: int, path: Path) -> None:
    """UserError for offloading that DeepSpeed would not do, or has no place for."""
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        part = settings.get(name) or {}
        device = part.get("device", "none")
        if device in ("none", "auto"):
            continue
        if stage < least:
            raise UserError(
                f"{path}: {name} has no effect with engine.zero_stage={stage}: it needs "
                f"--engine.zero-stage {least}{' to 3' if least < 3 else ''}"
            )
        if device == "nvme" and stage < 3:  # DeepSpeed would take the CPU
            raise UserError(f"{path}: {name} to nvme needs --engine.zero-stage 3")
        if device == "nvme" and not part.get("nvme_path"):
            raise UserError(f"{path}: {name} to nvme needs an nvme_path, a folder on that disk")


def _check_zero_options(settings: dict, stage: int, path: Path) -> None:
    """UserError for the first key or value that DeepSpeed does not know; suggests the closest key.

    DeepSpeed itself ignores unknown keys, or fails on them late.
    """
    # DeepSpeed parses this part of its JSON with this class, so it lists what the installed version
    # accepts.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    _check_names(settings, DeepSpeedZeroConfig, "zero_optimization", path)
    try:
        DeepSpeedZeroConfig(**{**settings, "stage": stage})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["zero_optimization", *map(str, first["loc"])])
        given = f"={first['input']!r}" if first["loc"] else ""
        raise UserError(f"{path}: {place}{given}: {first['msg']}") from error


def _check_names(settings: dict, kind: Any, where: str, path: Path) -> None:
    fields = kind.model_fields
    known = {name: field for key, field in fields.items() for name in (key, field.alias) if name}
    for name, value in settings.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}"
            raise UserError(f"{path}: DeepSpeed knows no {where}.{name}; {hint}")
        annotation = known[name].annotation
        parts = (annotation, *get_args(annotation))
        model = next((part for part in parts if hasattr(part, "model_fields")), None)
        if isinstance(value, dict) and model is not None:
            _check_names(value, model, f"{where}.{name}", path)


def parameter_groups(model: TensorAR, config: TrainConfig) -> list[dict]:
    """Trainable parameters grouped by part and weight decay; `set_rates` reads a group's "part"."""
    parts: dict[str, nn.Module] = {"backbone": model.backbone}
    if model.codec is not None:
        parts["codec"] = model.codec
    groups = []
    for part, module in parts.items():
        trainable = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.dim() >= 2]
        vectors = [p for p in trainable if p.dim() < 2]
        groups += [
            {"params": params, "part": part, "weight_decay": decay, "lr": 0.0}
            for params, decay in ((matrices, config.optim.weight_decay), (vectors, 0.0))
            if params
        ]
    if not groups:
        raise UserError("nothing to train: tuning='codec' with k=1 leaves no trainable parameter")
    return groups


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context for forward passes; does nothing unless the precision is "autocast"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast")


class TrainingLoss(nn.Module):
    """The module that DeepSpeed wraps; its hooks need a forward pass that returns plain tensors."""

    def __init__(self, model: TensorAR, precision: str):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss, and the sums and counts by slot [k]."""
        model = self.model
        with autocast(self.precision, batch.codes.device):
            condition = model.backbone.encode_condition(batch.prepared, batch.drop)
            windows = model.training_windows(batch.codes, condition, batch.keys, batch.progress)
            noise = model.uses_gaussian_noise
            gaussian = to_device(batch.keys, windows.device) if noise else None
            losses = model(batch.codes, condition, windows, gaussian)
            return losses.loss, losses.sums, losses.counts


def start_engine(model: TensorAR, config: TrainConfig, processes: Processes, loss: nn.Module):
    """Wrap the model, in the module that computes its loss, in a DeepSpeed engine with AdamW."""
    import deepspeed

    if config.engine.precision != "fp32":
        warn_of_emulation(processes.device)
    if config.engine.precision == "bf16":
        model.bfloat16()  # DeepSpeed casts only parameters, which then would not match the buffers
    model.backbone.sharded = config.engine.zero_stage == 3
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    settings = deepspeed_config(config, processes.world_size)
    zero = settings["zero_optimization"]
    trained = sum(p.numel() for group in groups for p in group["params"])
    zero["reduce_bucket_size"] = bucket_size(zero, trained)
    engine, *_ = deepspeed.initialize(
        model=loss,
        optimizer=optimizer,
        config=settings,
        dist_init_required=False,
    )
    return engine


def set_rates(engine, config: TrainConfig, step: int, steps: int) -> dict[str, float]:
    """Set the learning rates of a step, which depend only on the step; returns those of the trained
    parts.
    """
    rates = {
        "codec": config.optim.codec_rate(step, steps),
        "backbone": config.optim.backbone_rate(step, steps),
    }
    groups = engine.optimizer.param_groups
    for group in groups:
        group["lr"] = rates[group["part"]]
    return {group["part"]: group["lr"] for group in groups}


def grad_norm(engine) -> Tensor | None:
    """Norm of the gradient over all processes before `engine.step`; None if it is known only after.

    ZeRO shards gradients and reports their norm after the step. Without ZeRO the gradients are
    whole, and DeepSpeed does not compute the norm.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    return nn.utils.get_total_norm(
        [p.grad for p in engine.module.parameters() if p.grad is not None]
    )


def healthy_norm(norm: float | None) -> bool:
    """Whether the norm is finite or unknown (None); DeepSpeed reports -1 for one that is not."""
    return norm is None or 0 <= norm < math.inf


@contextmanager
def whole_weights(module: nn.Module, stage: int) -> Iterator[None]:
    """Gather all weights while the context is open (under ZeRO-3); every rank must enter it."""
    if stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield

"""The training state of a run: the exact weight and AdamW's moments of every trained parameter.

    training_state/00000_of_00002_000.safetensors    first file of process 0 of 2

All tensors are stored whole, in fp32, under the parameter's name, so a state fits any number of
processes, any ZeRO stage and any precision; and unlike a pickle it cannot run code. The parameters
are divided among the processes, which write their shares at the same time.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from t2i.errors import NotFiniteError, UserError, shorten
from t2i.files import PARTIAL, saving
from t2i.processes import Processes
from t2i.weights import save_weights

WEIGHT, STEP, AVERAGE = "weight", "step", "average"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names in AdamW's state."""
_FILE_BYTES = 1 << 30
"""A process writes a file when it holds this much of its share in memory."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# -- writing ---------------------------------------------------------------------------------------
def write_state(
    engine, model: nn.Module, average: dict[str, Tensor], folder: Path, processes: Processes
) -> None:
    """Write the training state of a checkpoint to a folder; every process calls it.

    Args:
        engine: DeepSpeed's, after at least one step.
        average: moving averages of the weights, by the same names; may be empty.

    Raises:
        NotFiniteError: a moment of the optimizer is not finite.
        UserError: the disk is full. If one process fails, all of them raise.
    """
    part: dict[str, Tensor] = {}
    files, bad, full = 0, "", ""

    def flush() -> None:
        nonlocal files, full
        name = f"{processes.rank:05d}_of_{processes.world_size:05d}_{files:03d}.safetensors"
        try:
            with saving(str(folder.parent).removesuffix(PARTIAL)):  # messages give the final name
                folder.mkdir(exist_ok=True)
                if part and not full:
                    save_weights(folder / name, part)
        except UserError as error:
            full = str(error)  # but continue: other processes need this one's shards
        part.clear()
        files += 1

    _link(engine, trained(model).values())
    for number, (name, p) in enumerate(trained(model).items()):
        whole = dict(_whole(engine, p))  # collective: all processes take part
        if average:
            whole[AVERAGE] = average[name]
        if number % processes.world_size != processes.rank:
            continue
        bad = bad or next((f"{name} ({k})" for k, v in whole.items() if not v.isfinite().all()), "")
        part |= {f"{name}/{kind}": value.detach().cpu() for kind, value in whole.items()}
        if sum(value.nbytes for value in part.values()) >= _FILE_BYTES:
            flush()
    flush()
    for kind, text in processes.gather((bad, full)):
        if kind:
            raise NotFiniteError(f"the optimizer's state is not finite, and not saved: {kind}")
        if text:
            raise UserError(text)


def _whole(engine, p: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """A parameter's weight, moments and number of steps, gathered from all processes."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = _adamw(engine).state
    if engine.zero_optimization_stage() == 0:
        yield WEIGHT, p.detach()
        if p in state:  # else it has had no gradient yet
            yield from ((kind, state[p][kind]) for kind in (*MOMENTS, STEP))
        return
    yield WEIGHT, safe_get_full_fp32_param(p)
    for kind in MOMENTS:
        yield kind, safe_get_full_optimizer_state(p, kind)
    yield STEP, next(iter(state.values()))[STEP].clone()


def _adamw(engine) -> torch.optim.AdamW:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _link(engine, parameters: Iterable[Any]) -> None:
    """Link parameters to their moments: under ZeRO-1 and 2 DeepSpeed does so only at the first
    step, and only for the first group of parameters.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return
    optimizer = _adamw(engine)
    for p in parameters:
        if (mapping := p._hp_mapping) is not None:  # else only other processes have shards of it
            (shard,) = optimizer.param_groups[mapping.param_group_index]["params"]
            mapping.set_optim_state_fragment(shard, optimizer.state[shard])


# -- reading ---------------------------------------------------------------------------------------
class StoredState:
    """A state on disk, whose tensors are read when needed.

    Raises:
        UserError: it is missing or damaged, or its parameters are not the model's trained ones.
    """

    def __init__(self, folder: Path, model: nn.Module):
        self.folder, self._parameters = folder, trained(model)
        self._where: dict[str, safe_open] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file = safe_open(path, framework="pt")
                self._where |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder} cannot be read ({error}); copy it again") from error
        if not self._where:
            raise UserError(
                f"{folder.parent} was saved by an older version and cannot be resumed by this one; "
                f"start a new run_dir from its weights, with --backbone.weights {folder.parent}"
            )
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        stored = {
            key.removesuffix(f"/{WEIGHT}"): tuple(file.get_slice(key).get_shape())
            for key, file in self._where.items()
            if key.endswith(f"/{WEIGHT}")
        }
        if stored != shapes:
            other = {name for name, _ in stored.items() ^ shapes.items()}
            raise UserError(
                f"{folder} does not match this model's trained parameters: {shorten(sorted(other))}"
            )

    def _get(self, name: str, kind: str) -> Tensor | None:
        file = self._where.get(f"{name}/{kind}")
        return None if file is None else file.get_tensor(f"{name}/{kind}")

    @torch.no_grad()
    def load_weights(self) -> None:
        """Copy the weights into the model, before an engine wraps it."""
        for name, p in self._parameters.items():
            weight = self._get(name, WEIGHT)
            assert weight is not None, "names are compared in __init__"
            p.copy_(weight)

    def average(self) -> dict[str, Tensor]:
        """The moving averages of the weights; empty if there are none."""
        return {
            name: value.to(p.device)
            for name, p in self._parameters.items()
            if (value := self._get(name, AVERAGE)) is not None
        }

    @torch.no_grad()
    def load_optimizer(self, engine) -> None:
        """Set the moments and, under ZeRO, the exact fp32 weights; every process calls it."""
        if engine.zero_optimization_stage() == 0:
            self._load_whole(_adamw(engine))
        else:
            self._load_shards(engine)

    def _load_whole(self, optimizer: torch.optim.AdamW) -> None:
        for name, p in self._parameters.items():
            if (step := self._get(name, STEP)) is None:
                continue
            moments = {kind: self._get(name, kind) for kind in MOMENTS}
            own = {kind: value.to(p) for kind, value in moments.items() if value is not None}
            optimizer.state[p] = {STEP: step.to(p.device), **own}  # fused AdamW needs STEP there

    def _load_shards(self, engine) -> None:
        optimizer, sharded = _adamw(engine), engine.optimizer
        steps = [step for name in self._parameters if (step := self._get(name, STEP))]
        step = max(steps, default=torch.tensor(0.0))
        # Make the moments now, which DeepSpeed would do at the first step.
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        for shard in getattr(sharded, "fp32_partitioned_groups_flat", flat):  # ZeRO-3's name
            empty = {kind: torch.zeros_like(shard, requires_grad=False) for kind in MOMENTS}
            optimizer.state[shard] = {STEP: step.to(shard.device, copy=True), **empty}
        _link(engine, self._parameters.values())
        for name, p in self._parameters.items():
            for kind in (WEIGHT, *MOMENTS):
                if (value := self._get(name, kind)) is not None:
                    _set_share(p, value, kind)


def _set_share(p: nn.Parameter, value: Tensor, kind: str) -> None:
    """Set this process's share of a whole tensor under ZeRO."""
    from deepspeed import utils

    if not hasattr(p, "ds_tensor"):  # ZeRO-1 and 2
        if kind == WEIGHT:
            utils.safe_set_full_fp32_param(p, value)
        else:
            utils.safe_set_full_optimizer_state(p, value, kind)
        return
    # ZeRO-3's shares have one size (the last is padded), which the calls above do not handle.
    size = p.ds_tensor.numel()
    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    share = padded.narrow(0, size * dist.get_rank(), size)
    if kind == WEIGHT:
        utils.safe_set_local_fp32_param(p, share)
    else:
        utils.safe_set_local_optimizer_state(p, share, kind)

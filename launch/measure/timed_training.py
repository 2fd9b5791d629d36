"""Training steps, taking turns: time, peak memory and the share of the hardware's rate."""

from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.measure.peak_memory import peak_gb
from launch.measure.roofline import Machine, forward_flops, random_codes
from launch.measure.shapes import attached, made_up, need_tokenizer, open_backbone, outline
from launch.measure.turns import alike_in_turns, quartiles, ratio_columns
from t2i.models import lean
from t2i.models.conditions import Condition
from t2i.models.llamagen.llamagen_recipes import text_recipes
from t2i.tensorar.model import TensorAR
from t2i.training.config import EngineOptions, TrainConfig
from t2i.training.memory import estimate

NAIVE = " naive"
"""End of the name of a contender with the obvious, unoptimized loss and blocks."""
COMPILED = " compiled"
"""End of the name of a contender with compiled blocks."""


@dataclass(frozen=True)
class TrainingGroup:
    """Training steps that contenders do in turns, on one backbone."""

    shape: str
    dtype: str
    """fp32, or bf16: fp32 weights under autocast."""
    batch: int
    methods: tuple[str, ...]
    naive: bool = False
    """Also measure each method with a loss that holds all logits, and plain blocks."""
    recompute: bool = False
    """Use gradient checkpointing."""
    rounds: int = 5
    compiled: bool = False
    """Also measure each method with compiled blocks."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the contenders."""
        chosen = (("", True), (COMPILED, self.compiled), (NAIVE, self.naive))
        ends = [end for end, wanted in chosen if wanted]
        return tuple(method + end for method in self.methods for end in ends)


def method_of(name: str) -> str:
    """The method of a contender, from its name."""
    return name.removesuffix(NAIVE).removesuffix(COMPILED)


class TrainingStep:
    """Forward, backward and AdamW over all parameters, on random codes; each call is a step."""

    def __init__(
        self,
        model: TensorAR,
        prepared: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        autocast: bool = False,
        compiled: bool = False,
    ):
        batch = len(next(iter(prepared.values())))
        self.model, self.prepared, self.autocast = model, prepared, autocast
        self.compiled = compiled
        self.codes = random_codes(model.backbone, batch)
        self.keys = torch.arange(batch)
        self.optimizer = optimizer

    def loss(self, condition: Condition, windows: Tensor) -> Tensor:
        return self.model(self.codes, condition, windows).loss

    def __call__(self) -> None:
        model = self.model.train()
        model.backbone.compile_blocks = self.compiled
        with torch.autocast(self.codes.device.type, torch.bfloat16, enabled=self.autocast):
            condition = model.backbone.encode_condition(self.prepared)
            windows = model.training_windows(self.codes, condition, self.keys)  # may draw drafts
            loss = self.loss(condition, windows)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # as DeepSpeed does: frees the gradients' memory


class NaiveStep(TrainingStep):
    """The same step in its obvious form: a loss from all logits at once, and blocks of plain
    operations.
    """

    def __call__(self) -> None:
        with patch.object(lean, "keep_less", lambda: False):
            super().__call__()

    def loss(self, condition: Condition, windows: Tensor) -> Tensor:
        model, codes = self.model, self.codes
        targets = model.windows.gather(codes)
        logits = model.slot_logits(model.decode_slots(model.hidden(condition, windows)), targets)
        weight = model.windows.valid(codes.device) * torch.tensor(
            model.config.weights(), device=codes.device
        )
        losses = [
            F.cross_entropy(own.flatten(0, 2), targets[..., s].flatten(), reduction="none")
            for s, own in enumerate(logits)
        ]
        per_slot = torch.stack(losses).sum(0).view(targets.shape[:3])
        return (per_slot * weight).sum() / (len(codes) * weight.sum())


class OpenTraining:
    """A group's contenders, loaded: they share one backbone and one optimizer, which skips
    parameters without a gradient.
    """

    def __init__(self, group: TrainingGroup, names: tuple[str, ...], device: torch.device):
        torch.manual_seed(0)
        methods = dict.fromkeys(method_of(name) for name in names)
        backbone = open_backbone(
            group.shape, torch.float32, device, tokenizer=need_tokenizer(methods)
        )
        backbone.gradient_checkpointing = group.recompute
        self.models = {method: attached(backbone, method) for method in methods}
        prepared = made_up(backbone, group.batch)
        trained = {id(p): p for model in self.models.values() for p in model.parameters()}
        optimizer = torch.optim.AdamW(
            trained.values(), lr=1e-6, fused=True if device.type == "cuda" else None
        )
        self.steps = {}
        for name in names:
            kind = NaiveStep if name.endswith(NAIVE) else TrainingStep
            self.steps[name] = kind(
                self.models[method_of(name)],
                prepared,
                optimizer,
                autocast=group.dtype == "bf16",
                compiled=name.endswith(COMPILED),
            )


def measure(
    group: TrainingGroup, device: torch.device, machine: Machine, *, memory: bool = False
) -> list[dict]:
    """A row for every contender; ratios are to the first. On a GPU, `memory` is measured in this
    process and takes hardly any time.
    """
    torch.compiler.reset()
    opened = OpenTraining(group, group.names, device)
    flops = {method: 3 * forward_flops(model) for method, model in opened.models.items()}
    times = alike_in_turns(opened.steps, device, group.rounds)
    reference = next(iter(times.values()))
    about = {"shape": group.shape, "dtype": group.dtype, "batch": group.batch}
    rows = []
    for name, found in times.items():
        row: dict = {**about, "contender": name, "method": method_of(name)}
        if group.recompute:
            row["recompute"] = True
        if found.error is not None:
            rows.append(row | {"error": found.error})
            continue
        low, middle, high = quartiles(found.per_step)
        work = group.batch * flops[row["method"]]
        row |= {
            "s_per_step": middle,
            "s_quartiles": [low, high],
            "images_per_s": group.batch / middle,
            "flops": work,
            "mfu": work / middle / machine.rates[group.dtype],
            **ratio_columns(found.per_step, reference.per_step),
            "s_by_round": found.per_step,
        }
        rows.append(row)
    complete = [row for row in rows if memory and "error" not in row]
    for row in complete:
        row["state_gb"] = _state_gb(opened, row["contender"])
        if device.type == "cuda":
            row["peak_gb"] = _peak_here(opened.steps[row["contender"]])
    del opened
    for row in complete if device.type != "cuda" else []:
        row["peak_gb"] = peak_gb(_train_for_memory, group, row["contender"], device.type)
    return rows


def _state_gb(opened: OpenTraining, name: str) -> float:
    """GB of weights and optimizer."""
    state, tensors = opened.steps[name].optimizer.state, []
    for weight in opened.models[method_of(name)].parameters():
        tensors += [weight, *state.get(weight, {}).values()]
    return sum(tensor.nbytes for tensor in tensors) / 1e9


def _peak_here(step: TrainingStep) -> float:
    """Peak GB of a step on this GPU."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 1e9


def _train_for_memory(group: TrainingGroup, name: str, device: str) -> None:
    opened = OpenTraining(group, (name,), torch.device(device))
    for _ in range(2):
        opened.steps[name]()


def estimated_gb(group: TrainingGroup, method: str) -> float:
    """The peak GB that `--check` expects for a training step, without image tokenizer, text encoder
    and the tenth that it adds.
    """
    model = attached(outline(group.shape).to("meta"), method)
    cost = estimate(model, _settings(group, model), 1)
    return (cost.state + cost.kept + cost.passing) / 1e9


def _settings(group: TrainingGroup, model: TensorAR) -> TrainConfig:
    engine = EngineOptions(
        precision="fp32" if group.dtype == "fp32" else "autocast",
        micro_batch=group.batch,
        gradient_checkpointing=group.recompute,
        zero_stage=0,
    )
    recipe = text_recipes()["shapes-iclr2026"][1]
    return replace(recipe, method=model.config, engine=engine, batch_size=group.batch)

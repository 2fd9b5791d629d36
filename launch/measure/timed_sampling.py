"""How fast codes are drawn, by presets at several speeds and by peers, taking turns."""

import logging
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from launch.measure.peak_memory import peak_gb
from launch.measure.peers import PEERS, Task, open_peer
from launch.measure.roofline import Machine, random_codes, step_floor
from launch.measure.shapes import attached, made_up, need_tokenizer, open_backbone
from launch.measure.turns import (
    Contender,
    Loop,
    Schedule,
    Tick,
    Times,
    in_turns,
    quartiles,
    ratio_columns,
    seconds,
)
from t2i.generation import choose_run
from t2i.sampling import DrawOptions, SamplingConfig, Speed
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Group:
    """Images that all contenders draw, taking turns."""

    shape: str
    dtype: str
    images: int
    methods: tuple[str, ...]
    speeds: tuple[Speed, ...]
    peers: tuple[str, ...] = ()
    steps: int = 0
    """Steps to time per image, around its middle; 0: all."""
    rounds: int = 8
    guidance: float = 2.0
    top_k: int = 2000
    llamagen: Path | None = None

    @property
    def settings(self) -> SamplingConfig:
        return SamplingConfig(cfg_scale=self.guidance, top_k=self.top_k)

    def only(self, name: str) -> "Group":
        """The group with one contender."""
        if name in PEERS:
            return replace(self, methods=(), peers=(name,))
        method, _, chosen = name.partition(" ")
        speeds = tuple(speed for speed in self.speeds if speed == chosen)
        return replace(self, methods=(method,), speeds=speeds, peers=())


class OpenGroup:
    """A group's models and contenders, loaded."""

    def __init__(self, group: Group, device: torch.device):
        torch.manual_seed(0)
        self.group = group
        backbone = self.backbone = open_backbone(
            group.shape, DTYPES[group.dtype], device, tokenizer=need_tokenizer(group.methods)
        )
        prepared = made_up(backbone, group.images)
        self.task = Task(backbone, prepared, group.images, group.settings, group.llamagen)
        self.contenders: dict[str, Contender] = {}
        """By name."""
        self.models: dict[str, TensorAR] = {}
        """The kit's contenders. All share one backbone, but each keeps its own recorded steps."""
        self.runs: dict[str, dict] = {}
        """How the steps of the kit's contenders are run."""
        for method, speed in product(group.methods, group.speeds):
            self._add(method, speed)
        for name in group.peers:
            if (peer := open_peer(name, self.task)) is not None:
                self.contenders[name] = peer
            else:
                log.info("%s: there is no %s for this shape", group.shape, name)

    def _add(self, method: str, speed: Speed) -> None:
        name = f"{method} {speed}"
        model = self.models[name] = attached(self.backbone, method)
        chosen, speculate = choose_run(model, DrawOptions(speed=speed), 1, self.group.images)
        self.runs[name] = {"method": method, "speed": chosen, "speculate": speculate}
        keys = torch.arange(self.group.images)

        def draw(tick: Tick) -> None:
            prepared, settings = self.task.prepared, self.group.settings
            sample_windows(model, prepared, keys, settings, lambda _: tick(), chosen, speculate)

        self.contenders[name] = Loop(draw, self.backbone.device, records=chosen != "eager")

    @property
    def schedule(self) -> Schedule:
        steps = self.backbone.spec.num_tokens
        rounds = min(self.group.rounds, steps)
        return Schedule(steps, self.group.steps or steps, rounds)


def measure(
    group: Group, device: torch.device, machine: Machine, *, memory: bool = False
) -> list[dict]:
    """A row for every contender; ratios are to the first."""
    torch.compiler.reset()  # after a few shapes in one process, torch would stop compiling
    opened = OpenGroup(group, device)
    schedule = opened.schedule
    times = in_turns(opened.contenders, schedule)
    reference = next(iter(times.values()))
    rows = []
    for name, found in times.items():
        about = {"shape": group.shape, "dtype": group.dtype, "images": group.images}
        row = {**about, "contender": name, **opened.runs.get(name, {})}
        row |= _numbers(found, reference, schedule, group.images)
        if "ms_per_step" in row and name in opened.runs:
            row |= _floor(
                opened.models[name], opened.task.rows, schedule, machine, group.dtype, row
            )
        rows.append(row)
    del opened  # other processes need the memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for row in rows if memory else []:
        if "error" not in row:
            alone = group.only(row["contender"])
            row["peak_gb"] = peak_gb(_draw_for_memory, alone, device.type)
    return rows


def _numbers(found: Times, reference: Times, schedule: Schedule, images: int) -> dict:
    if found.error is not None:
        return {"error": found.error}
    low, middle, high = quartiles(found.per_step)
    row: dict = {
        "ms_per_step": 1e3 * middle,
        "ms_quartiles": [1e3 * low, 1e3 * high],
        "images_per_s": images / (middle * schedule.image),
        **ratio_columns(found.per_step, reference.per_step),
    }
    if found.first is not None:
        row["first_s"] = found.first
    return row | {"ms_by_round": [1e3 * taken for taken in found.per_step]}


def _floor(
    model: TensorAR, rows: int, schedule: Schedule, machine: Machine, dtype: str, row: dict
) -> dict:
    floor = step_floor(model, rows, schedule.middle)
    least = 1e3 * floor.seconds(machine, dtype)
    named = {f"floor_{key}": value for key, value in asdict(floor).items()}
    return {**named, "floor_ms": least, "of_floor": least / row["ms_per_step"]}


def _draw_for_memory(group: Group, device: str) -> None:
    opened = OpenGroup(group, torch.device(device))
    schedule = opened.schedule
    in_turns(opened.contenders, replace(schedule, rounds=1, steps=min(4, schedule.image)))


def measure_decoding(shape: str, images: int, device: torch.device, rounds: int) -> list[dict]:
    """One row: the time of decoding codes to pixels alone; in fp32, as always."""
    backbone = open_backbone(shape, torch.float32, device, tokenizer=True)
    work = torch.no_grad()(partial(backbone.decode_images, random_codes(backbone, images)))
    work()
    _, middle, _ = quartiles([seconds(work, device) for _ in range(rounds)])
    about = {"shape": shape, "dtype": "fp32", "images": images, "contender": "codes to pixels"}
    return [about | {"ms_per_image": 1e3 * middle / images}]

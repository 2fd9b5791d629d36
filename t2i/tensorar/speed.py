"""How drawing steps are run. Every speed draws the same images, up to rounding.

- eager: one operation after another. On a GPU, launching them takes longer than running them.
- graphs: a step's operations are recorded as a CUDA graph, one for each number of cache entries
  read, and replayed. Recording takes about as long as a few steps.
- compiled: `torch.compile` fuses operations, and on a GPU they are recorded as well. The first step
  takes a minute or so. On a CPU the compiled code holds a second copy of the weights, laid out for
  its matrix products, and is twice as fast.
"""

import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any, get_args

import torch
from torch import nn

from t2i.errors import UserError
from t2i.products import fast_products, generated_products
from t2i.sampling import Speculate, Speed, check_speculate

log = logging.getLogger(__name__)

GRAPHS_PAY_FROM = 64
"""Number of steps from which recording graphs pays: it takes as long as some tens of steps."""

COMPILING_PAYS_FROM = 4096
"""Number of steps from which compiling pays on a CPU: it takes as long as a thousand steps of a
small model, or more. `auto` only suggests it: not every model and setting has been tried compiled.
"""

Run = Callable[[Any, int], None]
"""Runs one step, given the model and the number of cache entries to read."""


def check_speed(speed: Speed, device: torch.device, speculate: Speculate = 0) -> None:
    """UserError if the speed is unknown or unavailable on this device, or `speculate` invalid."""
    if speed not in get_args(Speed):
        raise UserError(f"speed={speed!r} must be one of {', '.join(get_args(Speed))}")
    if speed == "graphs" and device.type != "cuda":
        raise UserError(
            f"speed=graphs needs a CUDA GPU, and the model is on {device.type}: "
            "choose auto, eager or compiled"
        )
    if speed == "compiled" and (lacking := compiler_lacks(device)):
        raise UserError(f"speed=compiled needs {lacking}: install it, or choose auto or eager")
    check_speculate(speculate)


def choose(speed: Speed, device: torch.device, steps: int) -> Speed:
    """The speed for this many steps: resolves `auto` and logs the choice; UserError as in
    `check_speed`.
    """
    check_speed(speed, device)
    if speed != "auto":
        return speed
    pays = device.type == "cuda" and steps >= GRAPHS_PAY_FROM
    chosen: Speed = "graphs" if pays else "eager"
    hint = ""
    if device.type == "cpu" and steps >= COMPILING_PAYS_FROM:
        hint = "; --speed compiled may be twice as fast, after a minute"
    _log_once(f"speed: {chosen}, for {steps} steps on {device.type}{hint}")
    return chosen


def compiler_lacks(device: torch.device) -> str:
    """What this machine lacks to compile steps on a CPU; "" if nothing."""
    if device.type != "cpu":
        return ""
    own = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", own)
    if shutil.which(name) is None:
        return f"a C++ compiler (there is no {name!r})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"Python's headers (there is no {header})"


@cache
def _log_once(message: str) -> None:
    log.info(message)


class Held:
    """What a model keeps between batches of the same shape: one object, with tensors and graphs.

    Copies of the model start with nothing. Code that changes what a model computes, other than
    through its parameters, settings or `Backbone.revision`, must call `clear`.
    """

    def __init__(self) -> None:
        self.key: Hashable = None
        self.content: Any = None
        self.lock = Lock()
        """Held while a batch is drawn: one batch at a time."""

    def __reduce__(self):
        return Held, ()

    def fetch(self, key: Hashable, make: Callable[[], Any]) -> tuple[Any, bool]:
        """The object held under this key (made now if there is none), and whether it was held."""
        known = self.content is not None and self.key == key
        if not known:
            self.clear()  # before the new one needs the memory
            self.key, self.content = key, make()
        return self.content, known

    def clear(self) -> None:
        self.key = self.content = None


def runner(step: Callable[..., None], drawing, speed: Speed, device: torch.device) -> Run:
    """A function that runs `step(model, drawing, extent)` at this speed.

    It keeps no reference to the model: the model holds this function, and the cycle would keep GPU
    memory alive.
    """
    at_speed = step
    if speed == "compiled":
        at_speed = _frozen(step) if device.type == "cpu" else _fused(step)

    def run(model, extent: int) -> None:
        at_speed(model, drawing, extent)

    recorded = speed == "graphs" or (speed == "compiled" and device.type == "cuda")
    return Graphs(run, device) if recorded else run


def _frozen(step: Callable[..., None]) -> Callable[..., None]:
    """The step, compiled with the weights of the first model that it is called with frozen in."""
    from torch._dynamo import mark_dynamic
    from torch._inductor import config

    def work(model, drawing, span: torch.Tensor) -> None:
        step(model, drawing, span.shape[0])

    # torch caches compiled code by code object and does not compare weights. A new code object
    # ensures that this step never runs code compiled for other weights.
    own = FunctionType(work.__code__.replace(), globals(), "work", None, work.__closure__)
    fused = torch.compile(own, fullgraph=True, options={"guard_filter_fn": _of_span})
    compiled = False

    def run(model, drawing, extent: int) -> None:
        nonlocal compiled
        span = torch.empty(extent, 0)  # each value of a plain number would be compiled separately
        mark_dynamic(span, 0)
        frozen = config.patch({"freezing": True, "cpp.enable_concat_linear": True})
        # Compiling decides which products the frozen weights are laid out for.
        products = nullcontext() if compiled else _fastest_products(model)
        with frozen, products:
            fused(model, drawing, span)
        compiled = True

    return run


@contextmanager
def _fastest_products(model: nn.Module) -> Iterator[None]:
    with fast_products(torch.device("cpu")), generated_products(next(model.parameters()).dtype):
        yield


def _of_span(guards: Sequence) -> list[bool]:
    """Which guards are checked before a compiled step runs: none on the model or the drawing, as
    that would take a tenth of a small model's step. `Held` already notices when these change.
    """
    return [g.guard_type in ("GLOBAL_STATE", "SHAPE_ENV") or "span" in g.name for g in guards]


@cache
def _fused(step: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(step)


def frozen_weights(model: nn.Module, speed: Speed) -> Hashable:
    """A key that changes when a model's parameters are no longer those that its steps were built
    for: their addresses and, where steps have them frozen in, their values.
    """
    parameters = list(model.parameters())
    places = tuple(p.data_ptr() for p in parameters)
    if speed != "compiled" or parameters[0].device.type != "cpu":
        return places
    # Takes about as long as a step. The sum of all bit patterns alone would miss a change of signs.
    values = (p.detach() for p in parameters)
    return places, *((_bits(v).sum().item(), repr(v.sum().item())) for v in values)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of floating-point numbers, as integers."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


class Graphs:
    """Runs steps as CUDA graphs, recorded on first use: one for every extent."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device = run, device
        self.replays: dict[int, Callable[[], None]] = {}
        # All graphs share memory: they run one at a time, and no intermediate outlives its step.
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, model, extent: int) -> None:
        if extent in self.replays:
            self.replays[extent]()
        else:
            work = partial(self.run, model, extent)
            self.replays[extent] = do_and_record(work, self.pool, self.device)


def do_and_record(work: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """Do the work once, and return a function that repeats it by replaying a CUDA graph."""
    with torch.cuda.device(device):  # streams belong to the current device
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=aside):
            work()  # recorded, not run
    return graph.replay

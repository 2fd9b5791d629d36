"""How the steps of drawing are run. The step is one and the same; the images are, up to rounding.

- eager: every operation by itself. On a GPU starting them takes longer than what they do.
- graphs: the operations of a step recorded as a CUDA graph, one for each length of the cache that
  is read, and replayed. Recording takes about as long as a few steps.
- compiled: operations fused by `torch.compile`, and on a GPU recorded as well. The first step takes
  a minute or so. On a CPU the weights are frozen into what is compiled, in the order in which
  products read them: a second copy of them, and twice as fast.
"""

import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any, get_args

import torch
from torch import nn

from t2i.errors import UserError
from t2i.products import fast_products
from t2i.sampling import Speculate, Speed, check_speculate

log = logging.getLogger(__name__)

GRAPHS_PAY_FROM = 64
"""Steps of a request on a GPU: recording costs as much as some tens of them."""

COMPILING_PAYS_FROM = 4096
"""Steps of a request on a CPU: compiling costs as much as a thousand of a small model, or more. It
is pointed out, and not done unasked: not every model and setting has been compiled.
"""

Run = Callable[[Any, int], None]
"""Does one step of a model; given how many entries of the cache it reads."""


def check_speed(speed: Speed, device: torch.device, speculate: Speculate = 0) -> None:
    """UserError if there is no such speed, or not on this device, or no such speculation."""
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
    """What to run so many steps with: `auto` settled, and said; UserError as `check_speed`."""
    check_speed(speed, device)
    if speed != "auto":
        return speed
    pays = device.type == "cuda" and steps >= GRAPHS_PAY_FROM
    chosen: Speed = "graphs" if pays else "eager"
    hint = ""
    if device.type == "cpu" and steps >= COMPILING_PAYS_FROM:
        hint = "; --speed compiled may be twice as fast, after a minute"
    _say(f"speed: {chosen}, for {steps} steps on {device.type}{hint}")
    return chosen


def compiler_lacks(device: torch.device) -> str:
    """What steps on a CPU are compiled with and this machine does not have; "": nothing."""
    if device.type != "cpu":
        return ""
    own = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", own)
    if shutil.which(name) is None:
        return f"a C++ compiler (there is no {name!r})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"Python's headers (there is no {header})"


@cache
def _say(message: str) -> None:
    log.info(message)


class Held:
    """What a model keeps between batches of one shape: tensors and graphs.

    Copies of the model start without. Who changes what a model computes, other than by its
    parameters, settings or `Backbone.revision`, calls `clear`.
    """

    def __init__(self) -> None:
        self.key: Hashable = None
        self.content: Any = None
        self.lock = Lock()
        """Of whoever draws with it: one batch at a time."""

    def __reduce__(self):
        return Held, ()

    def fetch(self, key: Hashable, make: Callable[[], Any]) -> tuple[Any, bool]:
        """What is held under this key, else made anew; and whether it was. One thing is held."""
        known = self.content is not None and self.key == key
        if not known:
            self.clear()  # before the new one needs the memory
            self.key, self.content = key, make()
        return self.content, known

    def clear(self) -> None:
        self.key = self.content = None


def runner(step: Callable[..., None], drawing, speed: Speed, device: torch.device) -> Run:
    """`step(model, drawing, extent)` at this speed. It holds no model, which would hold it."""
    at_speed = step
    if speed == "compiled":
        at_speed = _frozen(step) if device.type == "cpu" else _fused(step)

    def run(model, extent: int) -> None:
        at_speed(model, drawing, extent)

    recorded = speed == "graphs" or (speed == "compiled" and device.type == "cuda")
    return Graphs(run, device) if recorded else run


def _frozen(step: Callable[..., None]) -> Callable[..., None]:
    """The step with the weights of the model that is first given frozen into it."""
    from torch._dynamo import mark_dynamic
    from torch._inductor import config

    def work(model, drawing, span: torch.Tensor) -> None:
        step(model, drawing, span.shape[0])

    # torch keeps what it compiled by code object and looks at no weight's content. With a code
    # object of its own, this one is never run with what was made of other weights.
    own = FunctionType(work.__code__.replace(), globals(), "work", None, work.__closure__)
    fused = torch.compile(own, fullgraph=True, options={"guard_filter_fn": _of_span})
    # Whose products the frozen weights are packed for is settled when it is compiled.
    compiling = [fast_products(torch.device("cpu"))]

    def run(model, drawing, extent: int) -> None:
        span = torch.empty(extent, 0)  # a plain number would be compiled for again and again
        mark_dynamic(span, 0)
        frozen = config.patch({"freezing": True, "cpp.enable_concat_linear": True})
        with frozen, compiling.pop() if compiling else nullcontext():
            fused(model, drawing, span)

    return run


def _of_span(guards: Sequence) -> list[bool]:
    """What is looked at before a compiled step is run. Nothing of the model and the drawing, which
    takes a tenth of a small model's step: `Held` knows when they are others.
    """
    return [g.guard_type in ("GLOBAL_STATE", "SHAPE_ENV") or "span" in g.name for g in guards]


@cache
def _fused(step: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(step)


def frozen_weights(model: nn.Module, speed: Speed) -> Hashable:
    """What says whether a model's parameters are those that steps were made for: where they are,
    and, where they are frozen into the steps, what they hold.
    """
    parameters = list(model.parameters())
    places = tuple(p.data_ptr() for p in parameters)
    if speed != "compiled" or parameters[0].device.type != "cpu":
        return places
    # Takes about a step. The hash, an exclusive or, would miss a change of all signs.
    values = (p.detach() for p in parameters)
    return places, *((torch.hash_tensor(v).item(), repr(v.sum().item())) for v in values)


class Graphs:
    """Steps recorded on first use, one graph for every extent."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device = run, device
        self.replays: dict[int, Callable[[], None]] = {}
        # One memory for all: they run one after another, and nothing they make outlives a step.
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, model, extent: int) -> None:
        if extent in self.replays:
            self.replays[extent]()
        else:
            work = partial(self.run, model, extent)
            self.replays[extent] = do_and_record(work, self.pool, self.device)


def do_and_record(work: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """Do the work once, and return what does it again: a CUDA graph's replay."""
    with torch.cuda.device(device):  # a stream is of the current one
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=aside):
            work()  # is recorded, and not done
    return graph.replay

"""Seconds per training step and per image, and peak memory, for the base and for TensorAR, as
ratios inside one run.

Contenders take turns in every round, so that whatever else the machine does hits all of them; the
table gives medians and the ratio to the base. Memory is measured in a fresh process per contender.

    python launch/benchmark.py                                # the shapes base
    # LlamaGen-B's shape with random weights
    python launch/benchmark.py --size B --batch 4 --rounds 3
"""

import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError

if TYPE_CHECKING:
    import torch

    from t2i.models.base import Backbone
    from t2i.tensorar.model import TensorAR


@dataclass(frozen=True)
class Timing:
    """What to time."""

    size: str | None = None
    """A published LlamaGen size (by class, random weights), or else the shipped shapes base."""
    methods: tuple[str, ...] = ("base", "tuned", "iclr2026", "arxiv2505")
    """Presets to compare; ratios are to the first."""
    batch: int = 32
    """Samples per training step."""
    images: int = 16
    """Images drawn at once."""
    rounds: int = 5
    memory: bool = True
    """Also measure peak memory, each in a process of its own (on the CPU: all of it, on Linux)."""
    out: Path | None = None
    """Also write the table to this file."""


class TrainingStep:
    """Forward, backward and AdamW over all parameters, on random codes; each call is a step."""

    def __init__(
        self, model: "TensorAR", prepared: "dict[str, torch.Tensor]", *, autocast: bool = False
    ):
        import torch

        spec, device = model.backbone.spec, model.backbone.device
        batch = len(next(iter(prepared.values())))
        self.model, self.prepared, self.autocast = model, prepared, autocast
        self.codes = torch.stack(
            [torch.randint(v, (batch, spec.num_tokens), device=device) for v in spec.subvocabs], -1
        )
        self.keys = torch.arange(batch, device=device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)

    def __call__(self) -> None:
        import torch

        model = self.model.train()
        with torch.autocast(self.codes.device.type, torch.bfloat16, enabled=self.autocast):
            condition = model.backbone.encode_condition(self.prepared)
            windows = model.training_windows(self.codes, condition, self.keys)  # own drafts, too
            loss = model(self.codes, condition, windows).weighted(model.config.weights())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Contender:
    """One method: a training step and a drawing run, ready to be timed."""

    def __init__(self, config: Timing, method: str):
        import torch

        from t2i.loading import attach
        from t2i.tensorar import presets

        torch.manual_seed(0)
        self.images = config.images
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone = _backbone(config.size).to(self.device)
        self.model = attach(backbone, presets.method(method)).to(self.device)
        self.train_step = TrainingStep(self.model, self._prepared(config.batch))

    def _prepared(self, count: int) -> dict:
        kind = self.model.backbone.spec.cond_kind
        return self.model.backbone.prepare(
            ["a photo of two stars" if kind == "text" else 1] * count
        )

    def draw(self) -> None:
        import torch

        from t2i.generation import choose_run
        from t2i.sampling import DrawOptions
        from t2i.tensorar.sampler import sample_windows

        model, keys = self.model.eval(), torch.arange(self.images)
        speed, _ = choose_run(model, DrawOptions(), 1, [])
        sample_windows(model, self._prepared(self.images), keys, model.sampling, speed=speed)


def _backbone(size: str | None) -> "Backbone":
    """The shapes base, or a published size with random weights."""
    from t2i.loading import load_backbone
    from t2i.models.llamagen.llamagen_model import SIZES, LlamaGen, LlamaGenConfig
    from t2i.models.tokenizers.vq import VQConfig, VQTokenizer

    if size is None:
        return load_backbone("llamagen", "shapes", device="cpu", dtype="float32")
    if size not in SIZES:
        raise UserError(f"size {size!r} must be one of {', '.join(SIZES)}")
    backbone = LlamaGen(LlamaGenConfig(**SIZES[size]))
    backbone.frozen.tokenizer = VQTokenizer(VQConfig()).eval()  # noise may need its code vectors
    return backbone


def seconds(work: Callable[[], object], device: "torch.device") -> float:
    """How long the work takes, with all that it starts on the device."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def measure(config: Timing) -> dict[str, dict[str, float]]:
    """Median seconds by method: per training step, and per image (codes only)."""
    contenders = {name: Contender(config, name) for name in config.methods}
    times: dict[str, dict[str, list[float]]] = {n: {"step": [], "image": []} for n in contenders}
    for round_ in range(config.rounds + 1):
        for name, contender in contenders.items():
            step = seconds(contender.train_step, contender.device)
            image = seconds(contender.draw, contender.device)
            if round_ > 0:  # the first round warms up
                times[name]["step"].append(step)
                times[name]["image"].append(image / config.images)
    return {n: {k: statistics.median(v) for k, v in t.items()} for n, t in times.items()}


def peak_memory(config: Timing, method: str, work: str) -> float:
    """Peak GB of a fresh process that does one piece of work twice."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, config, method, work).result()


def _peak(config: Timing, method: str, work: str) -> float:
    contender = Contender(config, method)
    for _ in range(2):
        getattr(contender, work)()
    if contender.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e9


def main() -> None:
    config = cli.parse(Timing, __doc__)
    import torch

    from t2i.files import writable_file, write_text

    if config.out is not None:
        writable_file(config.out)
    seconds = measure(config)
    first = seconds[config.methods[0]]
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    lines = [
        f"{config.size or 'shapes base'}, batch {config.batch}, {config.images} images at once, "
        f"{where}, torch {torch.__version__}, {platform.machine()}",
        "",
        "| method | s per training step | ratio | s per image (codes) | ratio "
        "| peak GB training | peak GB drawing |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in seconds.items():
        memory = [
            f"{peak_memory(config, name, w):.2f}" if config.memory else "-"
            for w in ("train_step", "draw")
        ]
        lines.append(
            f"| {name} | {row['step']:.3f} | {row['step'] / first['step']:.2f} "
            f"| {row['image']:.4f} | {row['image'] / first['image']:.2f} | {' | '.join(memory)} |"
        )
    text = "\n".join(lines)
    print(text)
    if config.out is not None:
        write_text(config.out, text + "\n")


if __name__ == "__main__":
    cli.run(main)

"""Cases of `soak.py` that train the same run in many ways: its losses must stay the same."""

from pathlib import Path
from typing import Any
from unittest import mock

from launch.lab.soak_processes import train
from launch.lab.soak_world import Outcome, World, fresh
from t2i.files import read_json_lines, write_json

_FP32 = (
    # ZeRO stage, processes, micro-batch, offloaded parts
    *((0, 1, 8, ""), (0, 1, 1, ""), (1, 1, 4, ""), (2, 1, 2, ""), (3, 1, 4, "")),
    *((0, 2, 4, ""), (1, 2, 2, ""), (2, 2, 4, ""), (3, 2, 2, ""), (2, 4, 1, ""), (3, 4, 2, "")),
    *((2, 2, 4, "optimizer"), (3, 2, 4, "optimizer param")),
)
_BF16 = ((1, 1, 4, ""), (2, 2, 2, ""), (3, 2, 4, ""))
STEPS = 10
_NO_DROPOUT: dict[str, Any] = {"token_dropout": 0.0, "ema": 0.0, "steps": STEPS}


def _losses(run_dir: Path) -> list[float]:
    """All losses that a run logged, in order."""
    rows = read_json_lines(run_dir / "metrics.jsonl")
    losses = ("train/loss", "train/slot", "validation/")
    return [v for row in rows for k, v in sorted(row.items()) if k.startswith(losses)]


def _distance(a: list[float], b: list[float]) -> float:
    """Largest relative difference of `a` from `b`."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def _offload(world: World, parts: str) -> dict[str, Any]:
    """Options that offload these parts ("optimizer", "param") to the CPU."""
    if not parts:
        return {}
    zero = {f"offload_{part}": {"device": "cpu"} for part in parts.split()}
    path = world.folder / f"offload {parts}.json"
    write_json(path, {"zero_optimization": zero})
    return {"engine_deepspeed_config": path}


def grid(world: World) -> Outcome:
    """Vary stages, processes, micro-batches, offloading and precision, and compare the losses."""
    found: dict[str, float] = {}
    name = "grid"
    expected: list[float] = []
    plain = (0, 1, 4, "")
    for precision, ways in (("fp32", (plain, *_FP32)), ("bf16", _BF16), ("autocast", (plain,))):
        for stage, count, micro, parts in ways:
            run_dir = fresh(world, name)
            options: dict[str, Any] = {"engine_zero_stage": stage, "engine_micro_batch": micro}
            options |= {"engine_precision": precision} | _NO_DROPOUT | _offload(world, parts)
            train(world, name, count=count, **options).end_with(0)
            losses = _losses(run_dir)
            expected = expected or losses
            way = f"{precision} ZeRO-{stage} x{count} micro {micro} {parts}".strip()
            found[way] = _distance(losses, expected)
    most = {
        p: max(v for k, v in found.items() if k.startswith(p)) for p in ("fp32", "bf16", "autocast")
    }
    held = most["fp32"] < 1e-5 and most["bf16"] < 0.05 and most["autocast"] < 0.05
    seen = f"{len(_FP32)} ways in fp32 within {most['fp32']:.1g}, "
    seen += f"bf16 within {most['bf16']:.1g}, autocast within {most['autocast']:.1g} (relative)"
    return Outcome(seen, held, facts={k: float(f"{v:.2g}") for k, v in found.items()})


def chain(world: World) -> Outcome:
    """A run that is resumed four times, with other numbers of processes and other ZeRO stages."""
    name, options = "chain", _NO_DROPOUT | {"log_save_every": 2}
    for run_name in ("chain-whole", name):
        fresh(world, run_name)
    train(world, "chain-whole", **options).end_with(0)
    links = ((2, 2), (0, 1), (3, 4), (1, 2), (3, 1))
    for number, (stage, count) in enumerate(links):

        def stop_at(step: int = 2 * number + 2) -> None:
            from t2i.training.training_run import Run

            own = Run._train_step

            def stopping(this: Run) -> dict[str, float]:
                metrics = own(this)
                this.stop_agreed = this.step == step < STEPS
                return metrics

            mock.patch.object(Run, "_train_step", stopping).start()

        how = options | {"engine_zero_stage": stage, "engine_micro_batch": 2}
        run = train(world, name, resume=number > 0, count=count, inject=stop_at, **how)
        run.end_with(130 if number + 1 < len(links) else 0)
    distance = _distance(_losses(world.run_dir(name)), _losses(world.run_dir("chain-whole")))
    way = ", ".join(f"{count} x ZeRO-{stage}" for stage, count in links)
    return Outcome(f"{way}: losses within {distance:.1g} (relative)", distance < 1e-5)

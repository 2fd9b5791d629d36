"""Where numbers go: always `metrics.jsonl`, and TensorBoard or wandb when asked for."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from t2i.errors import UserError
from t2i.files import saving, write_text


class MetricsLog:
    """Appends one JSON line per call; only the main process has one.

    A resumed run first drops the lines of steps that it will do again.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        tracker: str,
        project: str,
        config: dict,
    ):
        self.path = run_dir / "metrics.jsonl"
        kept = []
        if self.path.exists():
            kept = [row for row in read_metrics(run_dir) if 0 < start_step >= row["step"]]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tracker = _start_tracker(choose_tracker(tracker), run_dir, project, config)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values after optimizer step number `step` (1 is the first)."""
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tracker is not None:
            self.tracker(step, values)


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; one that was cut short when the run was killed does not
    count.
    """
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def choose_tracker(name: str) -> str:
    """Resolve "auto" to TensorBoard where it is installed; UserError if the package that was asked
    for is not.
    """
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") else "none"
    if name != "none" and not find_spec(name):
        raise UserError(f"log.tracker={name} needs the package {name}: pip install {name}")
    return name


def _start_tracker(name: str, run_dir: Path, project: str, config: dict):
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write
    if name == "wandb":
        import wandb

        path = str(run_dir.resolve())
        run_id = f"{run_dir.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        run = wandb.init(project=project, dir=path, config=config, resume="allow", id=run_id)
        return lambda step, values: run.log(values, step=step)
    return None

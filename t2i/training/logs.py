"""Logging of a run's metrics: `metrics.jsonl`, and TensorBoard or wandb if configured."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from t2i.errors import UserError
from t2i.fields import plain
from t2i.files import reading, saving, text_sha256, write_text
from t2i.launcher import is_main_process
from t2i.training.config import METRICS, TrainConfig

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON line per call; exists only in the main process.

    A resumed run first drops the lines of steps that it will repeat.

    Attributes:
        validated: the metrics of the step that the run resumes from, if it was validated.
    """

    def __init__(self, config: TrainConfig, start_step: int):
        self.path = config.run_dir / METRICS
        known = read_metrics(config.run_dir) if start_step > 0 and self.path.exists() else []
        kept = [row for row in known if row["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        last = kept[-1] if kept and kept[-1]["step"] == start_step else {}
        self.validated = last if any(name.startswith("validation/") for name in last) else None
        self.tracker = _start_tracker(config, start_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values after optimizer step number `step` (1 is the first)."""
        if not self.path.parent.exists():
            logger.warning(
                "the run folder %s is gone, deleted or moved: the run continues in a new one there",
                self.path.parent.absolute(),
            )
            self.path.parent.mkdir(parents=True)
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.tracker(step, values)


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, skipping lines cut short by a kill or power cut."""
    rows, path = [], Path(run_dir) / METRICS
    with reading(path):
        content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def choose_tracker(name: str) -> str:
    """The tracker to use: "auto" is TensorBoard if installed; UserError for a missing package."""
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") else "none"
    if name != "none" and not find_spec(name):
        raise UserError(f"log.tracker={name} needs the package {name}: pip install {name}")
    return name


def check_tracker(name: str) -> None:
    """UserError if the tracker cannot be used: wandb asks for its key, and checks it, only when it
    is first used, which may be hours later.
    """
    if choose_tracker(name) == "wandb" and is_main_process():
        import wandb

        with _starting_wandb():
            wandb.login()  # nothing happens offline


@contextmanager
def _starting_wandb() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise UserError(
            f"log.tracker=wandb cannot be used ({error}): log in with `wandb login`, or set "
            "WANDB_MODE=offline to upload the metrics later with `wandb sync`"
        ) from error


def _start_tracker(
    config: TrainConfig, start_step: int
) -> Callable[[int, dict[str, float]], object]:
    name, run_dir = choose_tracker(config.log.tracker), config.run_dir
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a resumed run repeats are shown once.
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write
    if name == "wandb":
        import wandb

        path = str(run_dir.resolve())
        # Other characters are not allowed, but a folder's name may have them.
        run_id = re.sub(r"[^\w.-]", "-", run_dir.name[:50]) + "-" + text_sha256(path)[:8]
        project, settings = config.log.project, plain(config)
        with _starting_wandb():
            run = wandb.init(project=project, dir=path, config=settings, resume="allow", id=run_id)
        return lambda step, values: run.log(values, step=step)
    return lambda step, values: None

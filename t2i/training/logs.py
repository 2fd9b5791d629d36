"""Where a run's numbers go: `metrics.jsonl`, one static page, and TensorBoard or wandb if asked."""

import html
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from t2i.errors import UserError
from t2i.files import read_json, saving, text_sha256, write_text
from t2i.training.config import TrainConfig
from t2i.training.settings import plain

_COLORS = ("#2858d6", "#d62626", "#269c4c", "#8038ac", "#f78a1a", "#202024", "#f684ba", "#999999")
_WIDTH, _HEIGHT, _PAD, _LEGEND = 560, 240, 40, 100


class MetricsLog:
    """Appends one JSON line per call; only the main process has one.

    A resumed run first drops the lines of steps that it will do again.
    """

    def __init__(self, config: TrainConfig, start_step: int):
        self.path = config.run_dir / "metrics.jsonl"
        kept = []
        if self.path.exists():
            kept = [row for row in read_metrics(config.run_dir) if 0 < start_step >= row["step"]]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tracker = _start_tracker(config)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values after optimizer step number `step` (1 is the first)."""
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tracker is not None:
            self.tracker(step, values)


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, but for one that a kill cut short."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def choose_tracker(name: str) -> str:
    """Resolve "auto" to TensorBoard if that is there; UserError if a package asked for is not."""
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") else "none"
    if name != "none" and not find_spec(name):
        raise UserError(f"log.tracker={name} needs the package {name}: pip install {name}")
    return name


def _start_tracker(config: TrainConfig) -> Callable[[int, dict[str, float]], object] | None:
    name, run_dir = choose_tracker(config.log.tracker), config.run_dir
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
        run_id = f"{run_dir.name}-{text_sha256(path)[:8]}"
        settings = plain(asdict(config))
        run = wandb.init(
            project=config.log.project, dir=path, config=settings, resume="allow", id=run_id
        )
        return lambda step, values: run.log(values, step=step)
    return None


# -- the page --------------------------------------------------------------------------------------
def write_run_page(run_dir: str | Path) -> Path:
    """Write run_dir/index.html, which any browser shows offline: losses, sheets and settings."""
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    charts = [
        _chart(rows, "reward/mean", "Reward: mean of the images of a step"),
        _chart(rows, "reward/dropped_groups", "Share of groups without spread, left out"),
        _chart(rows, "watch/", "What is watched, rewarded or not"),
        _chart(rows, "policy/entropy", "Entropy (nats per code)"),
        _chart(rows, "policy/kl", "Divergence from the start (nats per code)"),
        _chart(rows, "seconds/", "Seconds of a step"),
        _chart(rows, "train/slot", "Training loss by slot (nats per code)"),
        _chart(rows, "validation/noised_truth/", "Held-out loss, drafts are noised truth"),
        _chart(rows, "validation/own_drafts/", "Held-out loss, drafts are the model's own"),
        _chart(rows, "data_wait", "Share of the steps' time in which they wait for data"),
    ]
    sheets = sorted((run_dir / "samples").glob("*.png"), reverse=True)
    samples = "".join(
        f'<figure><img src="samples/{name}.png" alt=""><figcaption>{name}</figcaption></figure>'
        for name in (html.escape(path.stem) for path in sheets)
    )
    settings = html.escape(json.dumps(read_json(run_dir / "config.json"), indent=2))
    title = html.escape(run_dir.name)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body{{font:14px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}}
figure{{display:inline-block;margin:0 1em 1em 0;vertical-align:top}}img{{max-width:100%}}
pre{{background:#f6f6f4;padding:1em}}svg{{margin-right:1em}}
</style><h1>{title}</h1>{"".join(charts)}
<h2>Samples at fixed prompts and seed</h2>{samples}<h2>Settings</h2><pre>{settings}</pre></html>
"""
    return write_text(run_dir / "index.html", page)


def _chart(rows: list[dict], prefix: str, title: str) -> str:
    """An SVG line chart of all metrics that begin with `prefix`, against steps."""
    names = sorted({k for row in rows for k in row if k.startswith(prefix)})
    series = {n: [(row["step"], row[n]) for row in rows if n in row] for n in names}
    points = [p for s in series.values() for p in s]
    if not points:
        return ""
    x1 = max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> str:
        across = _PAD + (_WIDTH - _PAD - _LEGEND) * x / max(x1, 1)
        up = (_HEIGHT - 2 * _PAD) * (y - y0) / max(y1 - y0, 1e-9)
        return f"{across:.1f},{_HEIGHT - _PAD - up:.1f}"

    lines = []
    for i, (name, values) in enumerate(series.items()):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(place(x, y) for x, y in values)
        x, y = place(*values[-1]).split(",")
        label = html.escape(f"{name.rsplit('/', 1)[-1]} {values[-1][1]:.3f}")
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        lines.append(
            f'<text x="{_WIDTH - _LEGEND + 14}" y="{_PAD + 14 * i}" fill="{color}">{label}</text>'
        )
    corners = " ".join(place(*corner) for corner in ((0, y1), (0, y0), (x1, y0)))
    axes = (
        f'<polyline points="{corners}" fill="none" stroke="#bbb"/>'
        f'<text x="4" y="{_HEIGHT - _PAD}">{y0:.2f}</text>'
        f'<text x="4" y="{_PAD + 4}">{y1:.2f}</text>'
        f'<text x="{_WIDTH - _LEGEND - 30}" y="{_HEIGHT - 20}">step {x1}</text>'
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="12">'
        f'<text x="{_PAD}" y="16">{html.escape(title)}</text>'
        f"{axes}{''.join(lines)}</svg>"
    )

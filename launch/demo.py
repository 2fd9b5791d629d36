"""Serve a web page (with Gradio) on which models draw while you watch.

python launch/demo.py
python launch/demo.py --ckpt runs/mine runs/mine/best shapes

Needs the extra "demo" (pip install gradio) and no network: only this machine can open the page
unless --host names another address, and nothing is sent anywhere.
"""

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError
from t2i.model_options import BaseOptions, ModelOptions
from t2i.sampling import Speed, check_counts

_LOCAL = "127.0.0.1"
_MAIN = ("ckpt", "base.weights", "host", "port", "most_images")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Which models to serve, and at which address."""

    ckpt: tuple[str, ...] = ()
    """Checkpoint, run or export folders, or the shipped bases shapes and shapes-janus; shapes if
    nothing is given.
    """
    base: BaseOptions = field(default_factory=BaseOptions)
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """Dtype of the models: float32, bfloat16, or auto (bfloat16 on a GPU)."""
    speed: Speed = "auto"
    """How to run the drawing steps, see launch/generate.py."""
    host: str = _LOCAL
    """Address to listen on; 0.0.0.0 lets everyone who can reach this machine open the page."""
    port: int | None = None
    """Port of the page; the first free one from 7860 on if not given."""
    most_images: int = 8
    """Largest number of images in one request."""

    def __post_init__(self):
        check_counts(most_images=self.most_images)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"port={self.port} must be from 1 to 65535")

    def models(self) -> dict[str, ModelOptions]:
        """The options of each model, by the name given for it."""
        from t2i.sources import shipped_bases

        given = ("shapes",) if not self.ckpt and self.base.weights is None else self.ckpt
        found = [
            ModelOptions(
                ckpt=name,
                base=BaseOptions() if name in shipped_bases() else self.base,
                device=self.device,
                dtype=self.dtype,
                speed=self.speed,
            )
            for name in given or (None,)
        ]
        return {str(options.source): options for options in found}


def main() -> None:
    config = cli.parse(DemoConfig, __doc__, main=_MAIN)
    _need_gradio()
    options = config.models()
    wheres = [model.check() for model in options.values()]
    from t2i.demo.live import Models
    from t2i.demo.page import Page, served

    models = Models(options, wheres[0], config.most_images, _lacking)
    models.load(models.names[0])
    with served(lambda: Page(models), config.host, config.port) as address:
        print(f"open {address} in a browser; Ctrl-C stops the demo", flush=True)
        Event().wait()


def _lacking(options: ModelOptions, prompt: str) -> str:
    from t2i.training.trigger_words import without_trigger

    return without_trigger(options.checkpoint, [prompt])


def _need_gradio() -> None:
    if find_spec("gradio") is None:
        raise UserError(
            "the demo needs Gradio, which is not installed: pip install gradio "
            '(or the extra "demo": pip install ".[demo]")'
        )


if __name__ == "__main__":
    cli.run(main)

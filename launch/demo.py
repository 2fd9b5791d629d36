"""A page on which models draw while you watch, in the browser, with Gradio.

python launch/demo.py
python launch/demo.py --ckpt runs/mine runs/mine/best shapes

Needs the extra "demo" (pip install gradio) and no network: it serves this machine alone unless
--host names another address, and sends nothing anywhere.
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
    """Which models, and where the page is."""

    ckpt: tuple[str, ...] = ()
    """Checkpoint, run or export folders, or shapes, shapes-janus; shapes if nothing is given."""
    base: BaseOptions = field(default_factory=BaseOptions)
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto (bfloat16 on a GPU); of the models."""
    speed: Speed = "auto"
    """How the steps are run, see launch/generate.py."""
    host: str = _LOCAL
    """Address to serve; 0.0.0.0 is everyone who reaches this machine."""
    port: int | None = None
    """Port of the page; the first free one from 7860 if not given."""
    most_images: int = 8
    """Images that may be asked for at once."""

    def __post_init__(self):
        check_counts(most_images=self.most_images)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"port={self.port} must be from 1 to 65535")

    def models(self) -> dict[str, ModelOptions]:
        """Each model by the name that was typed."""
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
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
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

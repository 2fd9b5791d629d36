"""The demo page itself, built with Gradio: its fields, and a queue of requests to draw.

User input is only ever shown as text: in fields, or escaped. Nothing is fetched from or sent to
other machines: no analytics, no fonts, no share links.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from t2i.demo.live import Models, RequestState, draw_live
from t2i.demo.request import FIELDS, OPTIONAL, SPECULATE, Limit, Request, model_words, read_request
from t2i.errors import UserError

WAITING = 20
"""Maximum number of requests in the queue; one is drawn at a time."""
_SWEEP = (300, 3600)
"""Seconds between two cleanups, and the age in seconds at which they delete picture files."""
_SMALL = 128
"""Images up to this many pixels in height and width are enlarged without smoothing."""
_CSS = """
.pictures.small img { image-rendering: pixelated; }
.pictures img { background: repeating-conic-gradient(#8884 0 25%, #8882 0 50%) 0 / 16px 16px; }
.said { margin: 0; } .said.wrong { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#stages .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
.pictures .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
#page { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); align-items: start;
  grid-template-areas: "asked results" "settings results"; grid-template-rows: auto 1fr; }
#asked { grid-area: asked; } #results { grid-area: results; } #settings { grid-area: settings; }
@media (width < 700px) {
  #page { grid-template: "asked" "results" "settings" / minmax(0, 1fr); }
  #stages .caption-label { display: none; }
}
"""
_NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"


class Page:
    """The page for the given models; `blocks` is the Gradio app."""

    def __init__(self, models: Models):
        self.models, self.inputs = models, dict[str, Any]()
        first = models.names[0]
        with gr.Blocks(analytics_enabled=False, title="t2i demo", delete_cache=_SWEEP) as blocks:
            with gr.Row(elem_id="page"):
                with gr.Column(elem_id="asked"):
                    self._fields(first)
                with gr.Column(elem_id="results"):
                    self._results(first)
                with gr.Column(elem_id="settings"):
                    self._settings(first)
            self.inputs = {name: self.inputs[name] for name in FIELDS}
            self._events()
        # One queue for all: later users wait, and see how many requests are ahead of theirs.
        self.blocks = blocks.queue(max_size=WAITING, default_concurrency_limit=1)

    # -- what is on it -----------------------------------------------------------------------------
    def _fields(self, first: str) -> None:
        names, shown = self.models.names, self._shown(first)
        self.model = gr.Dropdown(names, value=first, label="Model", visible=len(names) > 1)
        self.about = gr.Textbox(**shown["about"], label="This is", interactive=False, max_lines=4)
        prompt = gr.Textbox(**shown["prompt"], max_lines=6, elem_id="prompt")
        self.inputs["prompt"] = prompt
        with gr.Row():
            narrow = {"min_width": 80}
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=2, **narrow)
            self.stop = gr.Button("Stop", elem_id="stop", **narrow)
        self.said = gr.HTML(_said("Nothing is drawn yet."), elem_id="said")

    def _settings(self, first: str) -> None:
        shown = self._shown(first)
        with gr.Row():
            self.inputs["samples"] = gr.Number(**shown["samples"], elem_id="samples")
            self.inputs["seed"] = gr.Number(**shown["seed"], elem_id="seed")
        self.dice = gr.Button("Another seed", size="sm", elem_id="dice")
        with gr.Accordion("How codes are drawn", open=False):
            for name in OPTIONAL:
                self.inputs[name] = gr.Number(**shown[name], elem_id=name)
            self.inputs["speculate"] = gr.Dropdown(
                list(SPECULATE),
                value="auto",
                label="Speculation",
                info="codes guessed and checked per model call; the images stay the same",
            )

    def _results(self, first: str) -> None:
        shown, buttons = self._shown(first), ["download", "fullscreen"]
        fixed = {
            "format": "png", "object_fit": "contain", "interactive": False, "height": "auto",
        }  # fmt: skip
        self.pictures = gr.Gallery(
            **shown["pictures"], **fixed, label="Pictures", buttons=buttons, elem_id="pictures"
        )
        self.stages = gr.Gallery(
            **shown["stages"], **fixed, visible=False, label="From the first draft on", buttons=buttons,
            elem_id="stages",
        )  # fmt: skip
        self.command = gr.Textbox(
            label="The same images again", buttons=["copy"], interactive=False, max_lines=8,
            elem_id="command", info="settings and seed, as a command", visible=False,
        )  # fmt: skip

    def _shown(self, name: str) -> dict[str, dict[str, Any]]:
        """The properties of each field that depend on the model, by field."""
        model, found = self.models.load(name), self.models.limits(name)
        spec, own = model.backbone.spec, model.sampling
        values: dict[str, Any] = {"samples": min(4, int(found["samples"].high)), "seed": 0}
        for option in OPTIONAL:
            value = getattr(own, option)  # a tuple: one value per sub-token
            values[option] = None if isinstance(value, tuple) else value
        numbers = {option: _number(limit, values[option]) for option, limit in found.items()}
        if spec.cond_kind == "text":
            prompt = {"label": "Prompt", "placeholder": "a photo of a red circle"}
        else:
            prompt = {"label": "Class number", "placeholder": f"0 to {spec.num_classes - 1}"}
        small = "small" if max(model.backbone.image_size) <= _SMALL else "large"
        return {
            **numbers,
            "about": {"value": repr(model)},
            "prompt": prompt,
            "pictures": {"elem_classes": ["pictures", small]},
            "stages": {"elem_classes": ["pictures", small], "columns": model.windows.stages},
        }

    # -- what happens ------------------------------------------------------------------------------
    def _events(self) -> None:
        private = {"api_visibility": "private"}
        outputs = [self.pictures, self.stages, self.command, self.said]
        fields = [self.model, *self.inputs.values()]
        drawing = gr.on(
            [self.draw.click, self.inputs["prompt"].submit],
            self.on_draw,
            fields,
            outputs,
            show_progress_on=self.said,
            concurrency_id="model",
            **private,
        )
        self.stop.click(
            lambda: _said("Stopped."), None, self.said, cancels=[drawing], queue=False, **private
        )
        self.dice.click(None, None, self.inputs["seed"], js=_NEW_SEED)
        changed = {
            "about": self.about, **{k: v for k, v in self.inputs.items() if k != "speculate"},
            "pictures": self.pictures, "stages": self.stages,
        }  # fmt: skip
        self.changed = tuple(changed)
        self.model.input(
            self.on_model,
            self.model,
            [*changed.values(), self.said],
            concurrency_id="model",
            **private,
        )

    def on_model(self, name: str) -> Iterator[list]:
        """Update the fields for a newly chosen model."""
        try:
            shown = self._shown(name)
        except UserError as error:
            yield [gr.skip()] * len(self.changed) + [_said(str(error), wrong=True)]
            return
        kept = ("samples", "seed")
        yield [
            gr.skip() if field in kept else gr.update(**shown[field]) for field in self.changed
        ] + [_said(f"{name} is ready.")]

    def on_draw(self, name: str, *values: object) -> Iterator[tuple]:
        """Draw the request, updating the page as it progresses."""
        same = gr.skip()
        try:
            request = read_request(dict(zip(FIELDS, values, strict=True)), self.models.limits(name))
            model, options = self.models.load(name), self.models.options[name]
            command = request.command(model_words(options), stages=model.windows.stages > 1)
            lacking = self.models.lacking(options, request.prompt)
            for state in draw_live(model, request, lacking):
                stages = gr.update(value=_captioned(state), visible=bool(state.stages))
                again = gr.update(value=command, visible=True)
                yield state.images, stages, again, _said(_progress(state, request))
        except UserError as error:
            yield same, same, same, _said(str(error), wrong=True)


def _number(limit: Limit, value: float | None) -> dict[str, Any]:
    """Arguments of `gr.Number`. No bounds: Gradio's own error would not name the field."""
    return {
        "value": value,
        "label": limit.name.capitalize(),
        "info": f"{limit}; {limit.about}" if limit.about else str(limit),
        "placeholder": "the model's own",
    }


def _said(text: str, *, wrong: bool = False) -> str:
    kind, role = ("said wrong", "alert") if wrong else ("said", "status")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def _progress(state: RequestState, request: Request) -> str:
    if state.share < 1:
        return f"Drawing: {state.share:.0%}"
    images = "1 image" if request.samples == 1 else f"{request.samples} images"
    return "; ".join([f"{images}, seed {request.seed}", *state.notes])


def _captioned(state: RequestState) -> list[tuple]:
    return [
        (picture, f"{r} of {len(stages)}")
        for stages in state.stages
        for r, picture in enumerate(stages, start=1)
    ]


@contextmanager
def served(make: Callable[[], Page], host: str, port: int | None) -> Iterator[str]:
    """Serve a page within the context and yield its address; its files are deleted at the end.

    Raises:
        UserError: the port is taken, or this machine does not have the address.
    """
    with TemporaryDirectory(prefix="t2i-demo-") as files:
        os.environ |= {"GRADIO_TEMP_DIR": files, "GRADIO_ANALYTICS_ENABLED": "False"}
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        blocks = make().blocks
        try:
            _, address, _ = blocks.launch(
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                server_name=host,
                server_port=port,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                theme=gr.themes.Default(**fonts),
                css=_CSS,
            )
        except OSError as error:
            raise UserError(f"cannot serve {host}, port {port or 'any'}: {error}") from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)

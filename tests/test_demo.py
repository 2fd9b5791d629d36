"""The demo: limits of requests, drawing with previews, and the page in headless Chromium."""

import shlex
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from browser import CHROMIUM, open_browser
from helpers import open_gates, tiny_llamagen, tiny_open_magvit2
from programs import launch

import t2i
from launch import demo as run
from launch import generate
from t2i import cli
from t2i.checkpoint import save_pretrained
from t2i.demo import live
from t2i.demo.live import Models, draw_live, reports, so_far
from t2i.demo.request import FIELDS, limits, model_words, read_request
from t2i.errors import UserError
from t2i.generation import draw_images, to_images
from t2i.model_options import BaseOptions, ModelOptions
from t2i.sampling import DrawOptions, SamplingOverrides

ALLOWED = limits(most_images=8, codes=1024)
VALUES = ("a dog", 2, 7, 2.5, 1, 100, 0.95, "auto")


def read(**changes):
    return read_request(dict(zip(FIELDS, VALUES, strict=True)) | changes, ALLOWED)


# -- requests --------------------------------------------------------------------------------------
def test_a_request_is_read():
    request = read(prompt=" a dog\n", samples=2.0, top_p=None, speculate=4)
    assert (request.prompt, request.samples, request.seed) == ("a dog", 2, 7)
    assert isinstance(request.samples, int)
    assert request.sampling == SamplingOverrides(cfg_scale=2.5, temperature=1.0, top_k=100)
    assert request.speculate == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "x" * 2001}, "has 2001 characters: at most 2000 are allowed"),
        ({"prompt": "a\0b"}, "zero character"),
        ({"samples": 0}, "images must be a whole number from 1 to 8, but 0 was given"),
        ({"samples": 9}, "images must be a whole number from 1 to 8, but 9 was given"),
        ({"samples": 2.5}, r"images must be a whole number .*2\.5 was given"),
        ({"samples": None}, "images must be .*nothing was given"),
        ({"samples": True}, "images must be .*True was given"),
        ({"samples": "2"}, "images must be .*'2' was given"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2147483647, but -1 was given"),
        ({"seed": 1e300}, "seed must be a whole number"),
        ({"cfg_scale": 0.9}, "guidance must be a number from 1 to 20, but 0.9 was given"),
        ({"cfg_scale": float("nan")}, "guidance must be a number .*nan was given"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 2"),
        ({"temperature": float("inf")}, "temperature must be .*inf was given"),
        ({"top_k": 1025}, "top-k must be a whole number from 0 to 1024"),
        ({"top_p": 0}, "top-p must be a number from 0.01 to 1, but 0 was given"),
        ({"speculate": 1000}, "speculation must be one of auto, off, 2, 4, 8, 16, not 1000"),
        ({"speculate": ["auto"]}, "speculation must be one of"),
    ],
)
def test_bad_requests_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


@pytest.mark.parametrize("prompt", ['it\'s <b>"red"</b> $HOME `x`', "--seed 3", "two\nlines"])
def test_the_shown_command_gives_the_same_settings(prompt, monkeypatch):
    request = read(prompt=prompt, top_p=None)
    base = BaseOptions(tokenizer="vq.pt", grid=(24, 16))
    model = ModelOptions(ckpt="my run", base=base, dtype="bfloat16")
    words = shlex.split(request.command(model_words(model), stages=True))
    assert words[:4] == ["python", "-m", "launch", "generate"]
    monkeypatch.setattr("sys.argv", ["generate.py", *words[4:]])
    config = cli.parse(generate.GenerateConfig, "")
    assert (config.ckpt, config.base, config.dtype) == ("my run", base, "bfloat16")
    assert (config.prompt, config.samples, config.seed) == ((prompt,), 2, 7)
    assert config.sampling == request.sampling and config.speculate == "auto" and config.stages


# -- drawing with previews -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tiny_world):
    """A model with 4 x 4 codes, each of 8 x 8 pixels."""
    backbone = t2i.load_backbone("llamagen", tiny_world / "base")
    return open_gates(t2i.attach(backbone, t2i.presets.iclr2026()))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_previews_do_not_change_the_images(model, monkeypatch):
    monkeypatch.setattr(live, "_PAUSE", 0.0)
    monkeypatch.setattr(live, "_SHARE", 1e9)
    request = read(prompt="a photo of a star", speculate="off")
    *looks, last = draw_live(model, request)
    sampling = request.sampling.apply(model.sampling)
    options = DrawOptions(7, sampling, stages=True, speculate="off")
    expected = list(
        draw_images(model, [request.prompt], options, samples_per_prompt=2, progress=False)
    )
    assert (pixels(last.images) == pixels([one.image for one in expected])).all()
    assert [len(stages) for stages in last.stages] == [4, 4]
    assert (pixels(last.stages[1]) == pixels(expected[1].stages)).all()
    assert [look.share for look in looks] == [0.25, 0.5, 0.75, 1], "a preview per row of codes"
    for row, look in enumerate(looks, start=1):
        for image in look.images:
            alpha = np.asarray(image.getchannel("A"))
            assert (alpha[: 8 * row] == 255).all() and not alpha[8 * row :].any()
    assert (pixels(looks[-1].images)[..., :3] == pixels(last.images)).all()


def test_more_images_than_fit_a_batch(model, monkeypatch):
    monkeypatch.setattr(live, "_PAUSE", 0.0)
    request = replace(read(speculate="off"), samples=17)
    shares = [(len(look.images), look.share) for look in draw_live(model, request)]
    assert shares[0] == (16, 4 / 17) and shares[-1] == (17, 1)
    assert {count for count, share in shares if share > 16 / 17} == {17}


def test_previews_keep_a_minimum_pause(model, monkeypatch):
    monkeypatch.setattr(live, "_PAUSE", 1e9)
    assert [look.share for look in draw_live(model, read())] == [0.25, 1]


def test_previews_with_sub_tokens_classes_and_strides(monkeypatch):
    monkeypatch.setattr(live, "_PAUSE", 0.0)
    for backbone, stride in ((tiny_open_magvit2(), 1), (tiny_llamagen("class"), 2)):
        model = open_gates(t2i.attach(backbone, t2i.presets.iclr2026(k=4)))
        model.sampling = replace(model.sampling, stride=stride)
        request = read(prompt="3", top_k=None, speculate="off")
        *looks, last = draw_live(model, request)
        assert looks and {image.mode for image in looks[0].images} == {"RGBA"}
        size = last.images[0].size
        assert all(image.size == size for look in looks for image in look.images)
    with pytest.raises(UserError, match="class label 'a dog'"):
        next(draw_live(model, read()))


def test_previews_repeat_drawn_codes_below_the_last_one(model):
    """Below the last drawn codes the decoder reads the codes above them again, instead of the zeros
    of codes that are not drawn yet.
    """
    (drawn,) = draw_images(model, ["a star"], progress=False)
    windows = drawn.windows[None].clone()
    whole = np.asarray(so_far(model, model.windows, windows, 16)[0])
    assert (whole[..., :3] == np.asarray(drawn.image)).all() and (whole[..., 3] == 255).all()
    windows[:, 10:] = 0
    half = np.asarray(so_far(model, model.windows, windows, 10)[0])
    shown = np.zeros((4, 4), bool)
    shown.flat[:10] = True
    assert ((half[..., 3] == 255) == shown.repeat(8, 0).repeat(8, 1)).all()
    order = torch.tensor([*range(10), *(6, 7, 8, 9), *(6, 7)])
    (below,) = to_images(model, drawn.windows[None, order, 0])
    assert (half[..., :3] == np.asarray(below)).all()


def test_closing_reports_ends_the_work():
    told, ended = [], threading.Event()

    def work(report):
        try:
            while True:
                report(len(told))
                told.append(1)
                time.sleep(0.001)
        finally:
            ended.set()

    found = reports(work)
    assert [next(found), next(found)] == [0, 1]
    found.close()
    assert ended.wait(10)


def test_errors_of_the_work_are_raised():
    def work(report):
        report(None)
        report(1)
        raise UserError("no")

    found = reports(work)
    assert next(found) == 1
    with pytest.raises(UserError, match="no"):
        next(found)


def test_idle_threads_do_not_slow_down_the_work():
    """Those that the main thread computed with while it loaded a model made it half as fast."""
    launch(
        "-c",
        """if True:
        import os, torch
        from t2i.demo.live import reports

        torch.set_num_threads(4)
        before = len(os.listdir("/proc/self/task"))
        torch.ones(1_000_000).add_(1)
        assert len(os.listdir("/proc/self/task")) == before + 3
        (there,) = reports(lambda report: report(len(os.listdir("/proc/self/task"))))
        assert there == before + 1, (there, before)
        """,
    )


def test_too_little_memory_is_reported(model, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(live, "draw_images", full)
    with pytest.raises(UserError, match="not enough memory for 2 images at once: ask for fewer"):
        list(draw_live(model, read()))


def test_unread_parts_of_a_prompt_are_reported(model):
    *_, last = draw_live(model, read(prompt="a " * 100, samples=1))
    assert any("token" in note for note in last.notes), last.notes


def test_missing_trigger_words_are_reported(model, tmp_path):
    training = {"config": {"data": {"trigger": "drawn by xyz"}}}
    save_pretrained(model, tmp_path / "ckpt", tuning="codec", training=training)
    for prompt, notes in (("a star", 1), ("a star drawn by xyz", 0)):
        options = ModelOptions(ckpt=str(tmp_path / "ckpt"))
        lacking = run._lacking(options, prompt)
        *_, last = draw_live(model, read(prompt=prompt, samples=1), lacking)
        assert sum("'drawn by xyz, a star' has them" in note for note in last.notes) == notes


# -- the program -----------------------------------------------------------------------------------
def test_without_gradio_the_extra_is_named(refusal, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert 'pip install ".[demo]"' in refusal()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", 0), "port=0 must be from 1 to 65535"),
        (("--most-images", 0), "most_images=0 must be at least 1"),
        (("--ckpt", "shapes", "nowhere"), "checkpoint folder nowhere does not exist"),
    ],
)
def test_bad_options_are_refused(arguments, message, refusal, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: True)
    assert message in refusal(*arguments)


def test_options_name_the_models():
    moved = BaseOptions(weights="new/place")
    options = run.DemoConfig(ckpt=("a", "shapes", "a"), base=moved).models()
    assert list(options) == ["a", "shapes"]
    assert [o.base for o in options.values()] == [moved, BaseOptions()]
    assert list(run.DemoConfig().models()) == ["shapes"]
    assert list(run.DemoConfig(base=moved).models()) == ["new/place"]


# -- the page --------------------------------------------------------------------------------------
PROMPT = "a photo of a <b id=evil>red</b> circle"
SAID = "document.querySelector('#said').innerText"


@pytest.fixture(scope="module")
def address(shapes_ckpt):
    if find_spec("gradio") is None:
        pytest.skip("needs gradio")
    from t2i.demo.page import Page, served

    options = {name: ModelOptions(ckpt=name) for name in ("shapes", str(shapes_ckpt))}
    models = Models(options, ("cpu", "float32"), 3, lambda options, prompt: "<i id=evil>lacks</i>")
    with served(lambda: Page(models), "127.0.0.1", None) as address:
        yield address


@pytest.fixture
def tab(address, tmp_path):
    with open_browser(tmp_path / "profile") as page:
        page.open(address)
        page.wait("!!document.querySelector('#draw')")
        yield page


def fill(tab, field: str, value: object) -> None:
    """Type into a field: set its value and send the event that typing would send."""
    box = f"document.querySelector('#{field} textarea, #{field} input')"
    tab.wait(f"{box} !== null")
    tab.run(
        f"(box => {{ box.value = {str(value)!r};"
        f" box.dispatchEvent(new Event('input', {{bubbles: true}})); }})({box})"
    )


def press(tab, button: str) -> None:
    tab.run(f"document.querySelector('#{button}').click()")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_draws_and_refuses(tab, address, tmp_path):
    fill(tab, "prompt", PROMPT)
    fill(tab, "samples", 9)
    press(tab, "draw")
    tab.wait(f"{SAID}.includes('images must be a whole number from 1 to 3, but 9 was given')")
    assert tab.run("document.querySelector('#said [role=alert]') !== null")
    fill(tab, "samples", 2)
    fill(tab, "seed", 5)
    press(tab, "draw")
    tab.wait(f"{SAID}.includes('2 images, seed 5; ') && {SAID}.includes('<i id=evil>lacks</i>')")
    tab.wait("[...document.querySelectorAll('#pictures img')].length == 2")
    tab.wait("[...document.querySelectorAll('#pictures img')].every(i => i.naturalWidth == 64)")
    words = shlex.split(tab.run("document.querySelector('#command textarea').value"))
    assert words[words.index("--prompt") + 1] == PROMPT and words[words.index("--seed") + 1] == "5"
    assert tab.run("document.querySelector('#evil') === null"), "prompts and notes must be escaped"
    hosts = "performance.getEntriesByType('resource').map(r => new URL(r.name).origin)"
    assert set(tab.run(hosts)) == {address.rstrip("/")}, (
        "everything must be loaded from the demo's own address"
    )
    assert tab.run("document.querySelector('#stages') === null"), "a base has no stages"
    press(tab, "dice")
    tab.wait("document.querySelector('#seed input').value != '5'")
    assert tab.screenshot(tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("leave", ["Stop", "close the page"])
def test_leaving_the_page_ends_the_drawing(leave, tab, monkeypatch):
    def endless(model, prompts, options, *, watch, samples_per_prompt, progress):
        windows = torch.zeros(1, 64, 1, 1, dtype=torch.long)
        while True:
            watch([(0, 0)], windows, 8)
            time.sleep(0.01)
        yield

    monkeypatch.setattr(live, "draw_images", endless)
    fill(tab, "prompt", PROMPT)
    fill(tab, "samples", 1)
    press(tab, "draw")
    tab.wait(f"{SAID}.includes('Drawing: 12%')")
    if leave == "Stop":
        press(tab, "stop")
        tab.wait(f"{SAID}.includes('Stopped')")
    else:
        tab.call("Page.navigate", url="about:blank")
    deadline = time.time() + 30
    while any(thread.name == "drawing" for thread in threading.enumerate()):
        assert time.time() < deadline
        time.sleep(0.05)

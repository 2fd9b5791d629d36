"""Charts, and a run's page in headless Chromium."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from browser import WIDTH, phone_in_the_dark, seen, text, type_in
from PIL import Image

from t2i.charts import Chart, Series, save_chart, ticks
from t2i.files import write_json, write_text
from t2i.imaging import grid, save_png
from t2i.training.run_page import metric_charts, write_run_page

RED, GREEN = "#ff0000", "#00ff00"
EVIL = "<b id=evil>red</b></script>"


def _row(step: int, **extra) -> dict:
    losses = {"loss": 3 - step / 10, "slot0": 2.5, "slot1": 3.0, "slot2": 4.0}
    return {"step": step, **{f"train/{name}": value for name, value in losses.items()}, **extra}


ROWS = [
    _row(0, **{"validation/own_drafts/slot0": 2.0, "validation/noised_truth/slot0": 1.0}),
    _row(5, **{"lr/codec": 1e-3, "lr/backbone": 1e-4, "reward/kl": 0.1, "reward/of/a": 1, "x": "no"}),
    _row(10, **{"reward/kl": 0.2, "reward/of/b": 2, "images_per_s": 8.0, "memory_gb": 1.5,
                "validation/own_drafts/slot0": 1.0, "nan": float("nan")}),
]  # fmt: skip
CONTROL = [{"step": 0, "train/slot0": 2.6}, {"step": 10, "train/slot0": 2.4, "other": 1}]


# -- charts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("low", "high", "whole", "found"),
    [
        (0, 10, True, [0, 2, 4, 6, 8, 10]),
        (0, 2, True, [0, 1, 2]),
        (0.93, 1.07, False, [0.95, 1.0, 1.05]),
        (-1e-5, 2e-5, False, [-1e-5, 0, 1e-5, 2e-5]),
    ],
)
def test_axes_have_round_numbers(low, high, whole, found):
    assert ticks(low, high, whole=whole) == pytest.approx(found)


def test_a_chart_as_svg_and_png(tmp_path):
    points = ((1.0, 5.0), (2.0, 7.0))
    lines = (
        Series("a & <b>", points, 0, errors=(0.5, 0.5)),
        Series("level", ((1.0, 6.0), (2.0, 6.0)), 1, dashed=True),
    )
    chart = Chart("title", "stage", "share", lines)
    svg, png = save_chart(chart, tmp_path / "chart")
    found = ElementTree.parse(svg).iter()
    words = [element.text for element in found if element.tag.endswith("text")]
    assert {"title", "stage", "share", "a & <b>", "level", "5", "7"} <= set(words)
    colors = {color for _, color in Image.open(png).getcolors(1 << 20)}
    assert {(0xE5, 0x48, 0x4D), (0x3B, 0x82, 0xF6)} <= colors


def test_one_point_and_equal_values_are_drawn(tmp_path):
    for points in (((3.0, 0.0),), ((1.0, 2.0), (4.0, 2.0))):
        svg, _ = save_chart(Chart("t", "x", "y", (Series("a", points),)), tmp_path / "flat")
        assert "nan" not in svg.read_text()


def test_levels_of_nearly_equal_values_have_labels_of_their_own(tmp_path):
    """All three used to be "1.03966", cut at the left."""
    levels = [word for word in words_of(tmp_path, 1.0396640, 1.0396588) if word.startswith("1.0")]
    assert len(levels) == len({*levels}) >= 2 and max(map(len, levels)) <= 6


def test_levels_of_learning_rates_fit_beside_the_plot(tmp_path):
    """ "0.00015" was cut at the left."""
    words = words_of(tmp_path, 1.46e-4, 1.9e-5)
    assert {"5e-5", "1e-4", "1.5e-4"} <= {*words} and "0.00015" not in words


def words_of(tmp_path, *values: float) -> list[str]:
    """All texts of a chart of these values."""
    points = tuple((20.0 + i, value) for i, value in enumerate(values))
    svg, _ = save_chart(Chart("t", "x", "y", (Series("a", points),)), tmp_path / "chart")
    return [element.text for element in ElementTree.parse(svg).iter() if element.text]


# -- what is drawn together ------------------------------------------------------------------------
def test_metrics_are_grouped_by_their_names():
    charts = {chart.title: [s.name for s in chart.series] for chart in metric_charts(ROWS, CONTROL)}
    assert charts == {
        "Training loss": ["loss", "slot0", "slot0, control"],
        "Held-out loss of final codes": ["own_drafts/slot0", "noised_truth/slot0"],
        "Training loss of drafts": ["slot1", "slot2"],
        "reward/kl": ["kl"],
        "reward/of": ["a", "b"],
        "Learning rates": ["codec", "backbone"],
        "Speed": ["images_per_s"],
        "Peak memory": ["memory_gb"],
    }


def test_long_runs_are_thinned():
    rows = [{"step": step, "a": step % 2} for step in range(1, 10_001)]
    (chart,) = metric_charts(rows)
    (series,) = chart.series
    assert len(series.points) == 400 and series.points[-1] == (10_000, 0.48)


# -- the page --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run, control = root / "run <b>", root / "control"
    for folder, rows in ((run, ROWS), (control, CONTROL)):
        folder.mkdir()
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    plan, log = {"steps": 40}, {"control": str(control)}
    known = {"batch_size": 16, "plan": plan, "log": log, "sheet_prompts": [EVIL]}
    write_json(run / "config.json", known)
    for step, color in ((0, RED), (10, GREEN)):
        save_png(Image.new("RGB", (900, 300), color), run / "samples" / f"step_{step:06d}.png")
    return write_run_page(run)


@pytest.fixture
def tab(browser, page):
    browser.open(page)
    yield browser
    assert browser.errors == []


def test_facts_and_texts(tab, page):
    facts = dict(
        zip(tab.run(seen("dt", "e.textContent")), tab.run(seen("dd", "e.textContent")), strict=True)
    )
    assert facts["step"] == "10 of 40" and facts["a step"] == "2 s"
    assert facts["left"].startswith("60 seconds") or facts["left"].startswith("1 minute")
    assert facts["peak memory"] == "1.5 GB"
    assert tab.run(text("h1")) == page.parent.name
    assert tab.run("document.querySelectorAll('#evil').length") == 0
    tab.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert tab.run(seen("li", "e.textContent")) == [EVIL]


def test_charts_show_numbers_on_hover(tab):
    first = "document.querySelector('.chart')"
    assert tab.run(f"{first}.querySelectorAll('polyline[stroke-dasharray]').length") == 2, (
        "and its legend"
    )
    tab.run(f"{first}.focus()")
    tab.press("ArrowLeft")
    said = tab.run(text(".chart output"))
    assert said == "step 10: loss 2 · slot0 2.5 · slot0, control 2.4"
    tab.press("ArrowLeft")
    assert tab.run(text(".chart output")) == "step 5: loss 2.5 · slot0 2.5"
    assert tab.run(text(".frames output")) == "step 10", "the chart took the key"
    box = tab.run(f"(b => [b.left, b.top])({first}.querySelector('svg').getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 5, y=box[1] + 90)
    assert tab.run(text(".chart output")).startswith("step 0: ")


def test_sheets_over_time(tab):
    shown = "document.querySelector('.frames img').getAttribute('src')"
    assert tab.run(shown) == "samples/step_000010.png"
    tab.run(type_in(".frames input", "0"))
    assert (tab.run(shown), tab.run(text(".frames output"))) == (
        "samples/step_000000.png",
        "step 0",
    )
    tab.press("ArrowRight")
    assert tab.run(shown) == "samples/step_000010.png"
    tab.press(" ")
    tab.wait(text(".frames output") + " == 'step 0'")
    tab.wait(text(".frames output") + " == 'step 10'")


def test_on_a_phone_and_in_the_dark(tab):
    with phone_in_the_dark(tab):
        light = "rgb(236, 236, 234)"
        assert tab.run("getComputedStyle(document.querySelector('svg text')).fill") == light
        tab.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert tab.run(WIDTH) <= 375


def test_a_run_without_metrics(tmp_path):
    (tmp_path / "later").mkdir()
    write_text(tmp_path / "metrics.jsonl", "")
    write_json(tmp_path / "config.json", {"log": {"control": str(tmp_path / "later")}})
    written = write_run_page(tmp_path).read_text()
    assert "Nothing is logged yet" in written and "control (not there yet)" in written
    write_text(
        tmp_path / "later" / "metrics.jsonl", "damaged\n"
    )  # its curves were said to be dashed
    assert "control (no metrics to read)" in write_run_page(tmp_path).read_text()


def test_sheets_are_in_the_order_of_steps(tmp_path):
    """Also once a step has more than six digits."""
    write_json(tmp_path / "config.json", {})
    write_text(tmp_path / "metrics.jsonl", "")
    for step in (999_000, 1_000_000):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "samples" / f"step_{step:06d}.png")
    written = write_run_page(tmp_path).read_text()
    assert written.index("step_999000.png") < written.index("step_1000000.png")


def test_a_label_of_any_length_is_cut():
    """A prompt of 100,000 letters used to take minutes, since letters were removed one at a
    time.
    """
    sheet = grid([Image.new("RGB", (8, 8))], columns=1, labels=["a red circle " * 10_000])
    assert sheet.width < 200

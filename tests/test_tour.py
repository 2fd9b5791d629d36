"""The notebook examples/tour.ipynb (file and cells), recipes as a library, results as tables."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from runs import tiny_run

import geneval
import t2i
from dpg_bench.questions import Question, QuestionGraph
from dpg_bench.score import score as dpg_score
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import colors
from t2i.training.config import LabelledOptions

TOUR = Path(__file__).resolve().parents[1] / "examples" / "tour.ipynb"


def cells(kind: str) -> list[dict]:
    found = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_file_is_a_notebook_of_format_4_5():
    """The file has what nbformat's schema requires."""
    content = json.loads(TOUR.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert set(content) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in content["cells"]:
        own = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | own
        assert isinstance(cell["source"], str | list)
    assert TOUR.stat().st_size < 150_000
    text = TOUR.read_text()
    assert '"stderr"' not in text and "/tmp/" not in text and '"error"' not in text


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    shown = []
    for cell in cells("code"):
        body = ast.parse(source(cell)).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "tour", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "tour", "eval"), names))
    assert repr(shown[0]).startswith("LlamaGen(text, ")
    assert "TensorAR(k=4, codec" in repr(shown[1]) and "trained: nothing yet" in repr(shown[1])
    assert "trained: backbone + codec" in repr(shown[2])
    assert [one.mode for one in shown[3:5]] == ["RGB", "RGB"], "sheets of images"
    assert "| **overall** | **" in shown[5]._repr_markdown_() and len(shown[6]) == 6


# -- recipes as a library --------------------------------------------------------------------------
def test_options_change_a_recipe():
    plain = t2i.recipe("shapes-tuned")
    options = {"run_dir": "runs/x", "steps": 7, "data.source": "mine", "optim.codec-lr": 1e-4}
    changed = t2i.recipe("shapes-tuned", {**options, "optim.betas": [0.8, 0.9]})
    assert changed == replace(
        plain,
        run_dir=Path("runs/x"),
        steps=7,
        data=replace(plain.data, source="mine"),
        optim=replace(plain.optim, codec_lr=1e-4, betas=(0.8, 0.9)),
    )
    assert isinstance(t2i.recipe("rar-shapes").data, LabelledOptions)


def test_a_mapping_changes_only_the_options_it_names():
    """It used to reset the part's other options to their class's defaults."""
    dotted = t2i.recipe("shapes-small-data", {"optim.betas": (0.8, 0.9), "data.source": "mine"})
    parts = {"optim": {"betas": [0.8, 0.9]}, "data": {"source": "mine"}}
    assert t2i.recipe("shapes-small-data", parts) == dotted
    both = {"optim": {"codec-lr": 1.0, "betas": [0.8, 0.9]}, "optim.codec_lr": 3e-4, **parts}
    assert t2i.recipe("shapes-small-data", both) == dotted


def test_a_tilde_in_paths_of_a_recipe_is_expanded(monkeypatch):
    """A folder named "~" used to be made."""
    monkeypatch.setenv("HOME", "/at/home")
    options = {"run_dir": "~/runs/a", "data.source": "~/mine", "data.cache_dir": Path("~/cache")}
    config = t2i.recipe("shapes-tuned", {**options, "data.trigger": "~sks"})
    assert config.run_dir == Path("/at/home/runs/a") and config.data.source == "/at/home/mine"
    assert config.data.cache_dir == Path("/at/home/cache") and config.data.trigger == "~sks"
    images = t2i.recipe("rar-shapes", {"data.source": ["~/images", "b"]}).data.source
    assert images == ("/at/home/images", "b")


def test_train_refuses_the_check_option(tiny_world):
    config = tiny_run(tiny_world, "looked-at", check=True)
    with pytest.raises(t2i.UserError, match=r"print\(t2i.check\(config\)\)"):
        t2i.train(config)
    assert not config.run_dir.exists() and "3 steps" in t2i.check(config)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shapes-tunde", {}, "'shapes-tunde'; perhaps you meant shapes-tuned; choose one of"),
        ("shapes-tuned", {"stepz": 1}, "there is no option stepz; perhaps you meant steps"),
        ("shapes-tuned", {"data.sauce": 1}, "no option data.sauce; perhaps you meant data.source"),
        (
            "shapes-tuned",
            {"data": {"sauce": 1}},
            "no option data.sauce; perhaps you meant data.source",
        ),
        ("shapes-tuned", {"steps.x": 1}, "there is no option steps.x"),
        ("shapes-tuned", {"steps": "7"}, "steps is '7', which is not of the type"),
        ("shapes-tuned", {"optim.codec_lr": -1.0}, "optim.codec_lr=-1.0 must be a number"),
    ],
)
def test_bad_options_of_a_recipe_are_refused(name, options, message):
    with pytest.raises(t2i.UserError, match=message):
        t2i.recipe(name, options)


# -- results as tables -----------------------------------------------------------------------------
def test_geneval_results_are_shown_as_a_table():
    entry = colors("circle", "red")
    odd = {**entry, "tag": "<b>|*x*"}
    image = Image.new("RGB", (64, 64), "white")
    judgement = geneval.score([image, image], [entry, odd], ShapesDetector())
    rows = judgement._repr_markdown_().splitlines()
    assert rows[0] == "| GenEval | mean | ± | images | prompts |"
    assert rows[2] == "| **overall** | **0.000** | - | 2 | 2 |"
    assert rows[3] == "| colors | 0.000 | - | 1 | 1 |"
    assert rows[4] == "| &#60;b&#62;&#124;&#42;x&#42; | 0.000 | - | 1 | 1 |"


def test_dpg_bench_results_are_shown_as_a_table():
    questions = tuple(Question("i", "p", n, (), "entity - <i> (x)", "is it?") for n in (1, 2))
    graph = QuestionGraph(questions, "")
    shown = dpg_score(graph, {"i": [{"1": "yes", "2": "no"}]})._repr_markdown_()
    assert "<i>" not in shown and "| entity - &#60;i&#62; | " in shown
    assert "| **overall** | **0.00** | - | 1 | 1 | **50.00** | - | 1 | 1 |" in shown

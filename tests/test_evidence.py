"""The measures of what refinement does, and launch/analyze.py with its page."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from browser import WIDTH, phone_in_the_dark, seen, text, type_in
from helpers import open_gates, tiny_codes, tiny_llamagen, tiny_prepared
from programs import program
from runs import tiny_run, write_tiny_base

import t2i
from launch import analyze as run
from launch.measure.cost import cost_of
from t2i.checkpoint import save_pretrained
from t2i.evaluation.evidence import (
    known_means,
    of_known,
    of_stages,
    predict,
    repair_shares,
    stage_changes,
)
from t2i.fields import from_json
from t2i.fields import plain as as_json
from t2i.files import read_json
from t2i.model_options import DrawingModelOptions
from t2i.reward import reward_recipes
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.shapes.shapes_source import write_dataset
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows, sample_windows
from t2i.tensorar.windows import Windows
from t2i.training.batches import TrainingData
from t2i.training.config import METRICS, LabelledOptions, TrainConfig
from t2i.training.engine import start_processes
from t2i.training.loop import train
from t2i.training.validation import validate


# -- numbers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 2])
def test_predict_gives_the_distributions_of_drawing(backbone, stride):
    """One pass over greedily drawn windows, with the guidance they were drawn with, gives every
    code of every slot the probability 1.
    """
    model = open_gates(TensorAR(backbone, presets.iclr2026()).eval())
    prepared, keys = tiny_prepared(backbone, 3), make_keys(0, torch.arange(3))
    greedy = SamplingConfig(cfg_scale=3.0, temperature=0.0, stride=stride)
    windows = sample_windows(model, prepared, keys, greedy)

    valid = drawn_windows(model, greedy).valid()

    def certain(sampling: SamplingConfig) -> float:
        said = predict(model, prepared, windows, windows, sampling)
        return float((said.log_probs[:, valid] > -1e-3).float().mean())

    assert certain(greedy) > 0.97, "all but codes that tie up to rounding"
    assert certain(replace(greedy, cfg_scale=1.0)) < 0.9


def test_probabilities_sum_to_one_and_give_the_entropies():
    model = open_gates(TensorAR(tiny_llamagen("class"), presets.iclr2026()).eval())
    prepared, codes = tiny_prepared(model.backbone, 1), tiny_codes(model.backbone, 1, 16)
    windows, sampling = model.windows.gather(codes), SamplingConfig(top_k=5, temperature=0.7)
    every = [
        predict(model, prepared, windows, torch.full_like(windows, code), sampling)
        for code in range(model.backbone.spec.subvocabs[0])
    ]
    p = torch.stack([said.log_probs for said in every]).double().exp()
    assert torch.allclose(p.sum(0), torch.ones(()).double(), atol=1e-5)
    assert (p > 0).sum(0).unique().tolist() == [5]
    assert torch.allclose(torch.special.entr(p).sum(0), every[0].entropies.double(), atol=1e-4)


def test_stage_statistics_by_hand():
    """4 positions, k = 2: the first position is never a draft."""
    geometry = Windows(4, 2)
    windows = torch.tensor([[[0, 1], [1, 7], [2, 8], [3, 3]], [[0, 1], [1, 2], [2, 8], [3, 3]]])
    p, q = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.4, 0.2, 0.4])  # of positions 1 to 3
    log_probs = torch.zeros(2, 4, 2)
    log_probs[:, 1:, 0], log_probs[:, :3, 1] = p.log(), q.log()
    found = of_stages(windows[..., None], log_probs, geometry)
    assert found["flipped"]["mean"] == [pytest.approx((2 + 1) / 6)]
    assert found["agreeing"]["mean"] == [pytest.approx(0.5)]
    assert found["flipped"]["stderr"] == [pytest.approx(1 / 6)]
    assert found["two_draws"]["mean"] == [pytest.approx(1.7 / 3)]
    assert found["total_variation"]["mean"] == [pytest.approx((0.6 + 0.6 + 0) / 3)]
    log_probs[0, 3, 0] = log_probs[0, 2, 1] = -torch.inf  # removed by a filter, through rounding
    again = of_stages(windows[..., None], log_probs, geometry)
    assert again["total_variation"]["mean"] == [pytest.approx(0.4)]


@pytest.mark.parametrize(("k", "stride"), [(4, 1), (4, 2), (4, 3), (8, 3), (9, 4), (16, 1)])
def test_only_codes_that_pass_every_stage_count(k, stride):
    """If every prediction is a different code, no final code agrees with a draft. Positions that
    were never drafted used to count as agreeing.
    """
    geometry = Windows(16, k, stride)
    windows = torch.arange(geometry.count * k).view(1, geometry.count, k, 1)
    found = stage_changes(windows, geometry)
    drafts = geometry.stages - 1
    assert found["agreeing"].tolist() == [[0.0] * drafts]
    assert found["flipped"].tolist() == [[1.0] * drafts]


def test_total_variation_is_estimated_without_bias():
    p, q = (torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).double() ** 2).unbind()
    p, q = p / p.sum(), q / q.sum()
    drawn = torch.multinomial(p, 40_000, replacement=True, generator=torch.Generator())
    log_probs = torch.zeros(40_000, 2, 2).double()
    log_probs[:, 1, 0], log_probs[:, 0, 1] = p[drawn].log(), q[drawn].log()
    found = of_stages(torch.zeros(40_000, 2, 2, 1), log_probs, Windows(2, 2))["total_variation"]
    exact = float((p - q).abs().sum() / 2)
    assert abs(found["mean"][0] - exact) < 4 * found["stderr"][0] < 0.02 < exact


def test_shares_without_cases_are_left_out():
    """A barely trained model may have no draft that is right. The table and the JSON file used to
    hold "nan" then, which is not valid JSON.
    """
    counts = torch.zeros(2, 2, 2)
    counts[0, 1, 0] = counts[0, 0, 0] = 3
    shares = repair_shares(counts)
    assert shares == {"draft_right": 0.0, "corrected": 0.5, "control_corrected": 0.0}


def test_settings_survive_json():
    config = TrainConfig(data=LabelledOptions(source=("a", "b")), seed=3)
    for one in (config, TrainConfig(), tiny_run(config.run_dir, "x", data__trigger="drawn by x")):
        assert from_json(TrainConfig, as_json(one), "here") == one


@pytest.mark.parametrize("method", ["iclr2026", "arxiv2505"])
def test_counted_costs_equal_the_formulas(method):
    backbone = t2i.load_backbone("llamagen", "shapes", device="cpu")
    cost = cost_of(TensorAR(backbone, presets.method(method)).eval())
    assert cost["codec_parameters"] == cost["codec_by_formula"] > 0
    outside = cost["base_operations"] - cost["base_head_operations"]
    by_formula = outside + cost["codec_operations"] + cost["head_operations"]
    assert by_formula == pytest.approx(cost["operations"], rel=0.005)
    assert cost["operations"] > 1.1 * cost["base_operations"]


# -- the program -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page(tiny_world, plain, tmp_path_factory):
    """The page of a run and its control, in a folder that was moved after it was written."""
    control = tiny_run(tiny_world, "analyzed-control", method=presets.base())
    train(control)
    out = tmp_path_factory.mktemp("analysis")
    options = ("--held-out", 6, "--prompts", 3, "--samples", 2, "--control", control.run_dir)
    program(run, "--ckpt", plain, *options, "--out", out / "a")
    return (out / "a").rename(out / "moved") / "index.html"


def test_the_numbers_of_a_run_and_its_control(page, tiny_world, plain):
    found = read_json(page.with_name("evidence.json"))
    model, control = found["model"], found["control"]
    assert found["missing"] == [] and found["settings"]["images"] == 6
    assert all(len(values["mean"]) == 2 for values in (
        model["drawn"]["stages"][name] for name in ("flipped", "agreeing", "total_variation")
    ))  # fmt: skip
    assert len(model["drawn"]["entropy"]["mean"]) == 3
    assert len(control["drawn"]["entropy"]["mean"]) == 1 and "stages" not in control["drawn"]
    assert set(found["repairs"]) >= {"corrected", "spoilt", "control_corrected"}
    # The held-out losses equal those of validation.
    loaded = t2i.from_pretrained(plain, device="cpu")
    data = TrainingData(tiny_run(tiny_world, "plain"), loaded.backbone, start_processes())
    data.validation = data.validation[:6]
    for kind, losses in asdict(validate(loaded, data)).items():
        assert model["known"][kind]["loss"]["mean"] == pytest.approx(losses, rel=1e-4)
    again = of_known(loaded, [batch for batch, _ in data.validation_batches()])
    assert known_means(again) == model["known"]
    difference = model["known"]["own_drafts"]["loss"]["mean"][0]
    difference -= control["known"]["own_drafts"]["loss"]["mean"][0]
    assert found["against_control"]["mean"] == [pytest.approx(difference, rel=1e-3)]
    assert found["against_control"]["stderr"] < model["known"]["own_drafts"]["loss"]["stderr"][:1]
    names = sorted(path.stem for path in page.with_name("charts").glob("*.png"))
    assert names == sorted(path.stem for path in page.with_name("charts").glob("*.svg"))
    assert "01_flip_rate_by_stage" in names and len(names) >= 8


def test_missing_parts_are_listed_with_reasons(shapes_ckpt, tiny_world, plain, tmp_path, capsys):
    few = ("--prompt", "a photo of a <b>star</b>", "--samples", 1, "--out", tmp_path / "a")
    program(run, "--ckpt", shapes_ckpt, *few)
    found = read_json(tmp_path / "a" / "evidence.json")
    assert found["model"]["known"] == {} and found["model"]["drawn"]["stages"]["flipped"]["mean"]
    assert "not the checkpoint of a run" in found["missing"][1]
    assert "--control" in found["missing"][0]
    printed = capsys.readouterr()
    assert printed.err.count("missing: ") == 2 and "look at" in printed.out
    assert "<b>" not in (tmp_path / "a" / "index.html").read_text()
    write_dataset(tmp_path / "other", 12, size=32)


def test_metrics_that_cannot_be_read_are_listed_as_missing(tmp_path):
    """Their curves were left out without a word."""
    checkpoint = tmp_path / "checkpoints" / "step_0000003"
    checkpoint.mkdir(parents=True)
    (tmp_path / METRICS).write_bytes(b"\x1f\x8b damaged\n")
    missing = []
    assert run._course({"model": SimpleNamespace(checkpoint=checkpoint)}, missing) == []
    assert missing == [f"training curves of the model: no line of {tmp_path / METRICS} can be read"]


@pytest.mark.parametrize("about, said", [({}, "0"), ({"step": None}, "an unknown number")])
def test_a_control_trained_for_other_steps_is_told_by_its_number(about, said):
    """A base as the control was said to have "None" steps."""
    spec = SimpleNamespace(family="llamagen", subvocabs=(8,), grid=(2, 2), cond_kind="text")
    model = SimpleNamespace(backbone=SimpleNamespace(spec=spec))
    asked = {"model": {"step": 6}, "control": about}
    options = {who: SimpleNamespace(about=lambda _, it=it: it) for who, it in asked.items()}
    (line,) = run._unlike(options, dict.fromkeys(asked, model))
    assert line.endswith(f"the model was trained for 6, the control for {said}")


def test_bad_options_are_refused(refusal, plain, tmp_path, monkeypatch):
    assert "no model: give --ckpt" in refusal()
    few = ("--ckpt", plain, "--prompt", "x", "--held-out", "0", "--out", tmp_path / "a")
    assert "draws other codes" in refusal(*few, "--control", "shapes")
    other = ("--ckpt", "shapes", "--control", "shapes-janus", "--prompt", "x", "--samples", "1")
    words = "the family llamagen and the control of janus"  # a traceback, with held-out images
    assert words in refusal(*other, "--held-out", "0", "--out", tmp_path / "b")
    assert "no prompts" in refusal("--ckpt", "shapes", "--held-out", "0")
    write_dataset(tmp_path / "other", 12, size=32)
    data = ("--ckpt", plain, "--prompt", "x", "--out", tmp_path / "c", "--data")
    assert "has changed since the run" in refusal(*data, tmp_path / "other")
    assert "gone does not exist" in refusal(*data, tmp_path / "gone")
    assert "no effect with --held-out 0" in refusal(*few, "--data", tmp_path / "gone")
    assert "no effect with prompts of your own" in refusal(*few, "--prompts", 3)
    with monkeypatch.context() as patch:  # before the data are read
        patch.setattr(run, "_held_out", None)
        assert "stride=9 must be" in refusal(*few[:4], "--stride", 9, "--out", tmp_path / "a")
    with monkeypatch.context() as patch:  # before a model is loaded
        patch.setattr(DrawingModelOptions, "load", None)
        assert "--renoise 0" in refusal(*few, "--renoise", "0.5")
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "index.html").write_text("<title>my own</title>")
        assert "own/index.html would be" in refusal(*few[:-1], tmp_path / "own")
        assert "gone.txt cannot be read" in refusal(*few, "--prompt-file", tmp_path / "gone.txt")


@pytest.mark.parametrize("settings", [("shapes",), (None, "--window", 1), (None, "--stride", 4)])
def test_models_that_draw_codes_once_have_no_drafts(shapes_ckpt, tmp_path, settings):
    """A base, and a model whose settings leave only one stage: the page used to give a wrong
    reason why there are no drafts.
    """
    ckpt, *others = settings
    few = ("--prompt", "x", "--samples", 1, "--held-out", 0, "--out", tmp_path / "a")
    program(run, "--ckpt", ckpt or shapes_ckpt, *few, *others)
    found = read_json(tmp_path / "a" / "evidence.json")
    assert any("every code is drawn only once" in line for line in found["missing"])
    assert (found["cost"]["codec_parameters"] == 0) == (ckpt is not None)
    assert "Flip rate" not in (tmp_path / "a" / "index.html").read_text()


def test_a_window_of_the_whole_image(tiny_world, tmp_path):
    """Only the last code passes all stages."""
    backbone = t2i.load_backbone("llamagen", tiny_world / "base", device="cpu")
    model = t2i.attach(backbone, presets.iclr2026(k=math.prod(backbone.spec.grid)))
    t2i.save_pretrained(model, tmp_path / "ckpt", tuning="codec")
    few = ("--prompt", "x", "--samples", 1, "--out", tmp_path / "a")
    program(run, "--ckpt", tmp_path / "ckpt", *few)
    found = read_json(tmp_path / "a" / "evidence.json")
    assert len(found["model"]["drawn"]["stages"]["flipped"]["mean"]) == model.windows.stages - 1
    assert (tmp_path / "a" / "index.html").is_file()


# -- in a browser ----------------------------------------------------------------------------------
@pytest.fixture
def tab(browser, page):
    browser.open(page)
    yield browser
    assert browser.errors == []


def test_the_page_shows_charts_and_stages(tab):
    titles = tab.run(seen(".chart", "e.querySelector('text').textContent"))
    assert titles[:3] == [
        "Flip rate by stage", "Drafts against the final code", "Loss by slot, held-out images"
    ]  # fmt: skip
    assert "Training loss" in titles, "from the run's metrics"
    tab.run("document.querySelectorAll('.chart')[1].focus()")
    tab.press("ArrowRight")
    tab.press("ArrowLeft")
    said = tab.run("document.querySelectorAll('.chart output')[1].textContent")
    assert said.startswith("refinement stage 1: same code ") and "total variation" in said
    stage = text(".frames output")
    assert tab.run(stage) == "final"
    tab.run(type_in(".frames input", "0"))
    assert tab.run(stage) == "draft 1"
    tab.wait("document.querySelector('.frames img').complete")
    assert tab.run("document.querySelector('.frames img').naturalWidth") > 0


def test_the_page_fits_a_phone_in_dark_mode(tab):
    with phone_in_the_dark(tab):
        assert tab.run(WIDTH) <= 375


def test_the_settings_of_reward_runs_are_read(monkeypatch):
    """Reward runs have additional settings, which the page ignores."""
    config = reward_recipes.recipes()["shapes-reward"][1]
    monkeypatch.setattr(run, "_training", lambda options: {"config": as_json(config)})
    found = run._run_config(SimpleNamespace(checkpoint="run"))
    assert found.data == config.data and found.log.prompts == config.log.prompts


def test_trigger_words_are_added_to_the_runs_prompts_only(tmp_path, caplog):
    trained = tiny_run(tmp_path, "x", log__prompts=("a star",), data__trigger="by xyz")
    backbone = t2i.load_backbone("llamagen", write_tiny_base(tmp_path / "base"))
    model = t2i.attach(backbone, t2i.presets.base())
    training = {"config": as_json(trained), "data_key": "its"}
    save_pretrained(model, tmp_path / "ckpt", tuning="codec", training=training)
    options = DrawingModelOptions(ckpt=str(tmp_path / "ckpt"))
    assert run._prompts(run.AnalyzeConfig(), options, model, None) == ["by xyz, a star"]
    assert not caplog.messages
    typed = run.AnalyzeConfig(prompt=("a dog",))
    assert run._prompts(typed, options, model, None) == ["a dog"]
    assert "'by xyz, a dog' has them" in caplog.messages[-1]

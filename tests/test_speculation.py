"""Speculation, which settles several windows per trunk call, draws exactly the windows that are
drawn one by one.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import BACKBONES, open_gates, rare, tiny_llamagen, tiny_prepared

import t2i
from launch.lab import fewer_steps, strides, strides_report
from t2i import generation
from t2i.errors import UserError
from t2i.evaluation.draw import PromptRequest, draw_prompts
from t2i.files import read_json
from t2i.generation import all_jobs, choose_run
from t2i.model_options import ModelOptions
from t2i.processes import ALONE, Processes
from t2i.rng import make_keys
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar import presets, sampler, speculation
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.tensorar.windows import Windows

FILTERS = {"top_k": 20, "top_p": 0.9, "temperature": 0.8}
CONFIGS = {
    "plain": SamplingConfig(),
    "guided": SamplingConfig(cfg_scale=2.0, cfg_interval=6),
    "greedy": SamplingConfig(cfg_scale=2.0, temperature=0.0),
    "filters": SamplingConfig(**FILTERS),
    "guided-filters": SamplingConfig(cfg_scale=3.0, cfg_power=1.5, **FILTERS),
    "drafts": SamplingConfig(cfg_scale=2.0, draft_temperature=0.5, window=3, renoise=0.5),
    "stride": SamplingConfig(cfg_scale=2.0, stride=3, renoise=0.5, **FILTERS),
}
METHODS = {
    "base": presets.base(),
    "tensorar": presets.iclr2026(),
}


def calls_of(model, work):
    """The result of `work()`, and the number of trunk calls on image codes during it."""
    lengths, trunk = [], model.backbone.trunk

    def counted(x, *rest):
        lengths.append(x.shape[1])
        return trunk(x, *rest)

    model.backbone.trunk = counted
    try:
        return work(), len(lengths) - 1  # the first is of the prefix
    finally:
        model.backbone.trunk = trunk


def draw(model, config, speculate, rows=2, seed=0, **options):
    keys = make_keys(seed, torch.arange(rows))
    prepared = tiny_prepared(model.backbone, rows)
    return sample_windows(model, prepared, keys, config, speculate=speculate, **options)


IN_BRIEF = {
    ("tensorar", "guided-filters"): BACKBONES,
    ("base", "guided-filters"): ("llamagen_text",),
    ("tensorar", "greedy"): ("llamagen_text",),
    ("tensorar", "drafts"): ("open_magvit2",),
    ("tensorar", "stride"): ("rar",),
}
"""What the default suite covers: every backbone, and every setting not contained in another. All
other combinations are slow tests.
"""


@pytest.mark.parametrize(
    ("backbone", "method", "config"),
    [
        (b, m, c) if b in IN_BRIEF.get((m, c), ()) else rare(b, m, c)
        for b in BACKBONES
        for m in METHODS
        for c in CONFIGS
    ],
    indirect=["backbone"],
)
def test_the_same_windows_in_fewer_calls(backbone, method, config):
    """All slots agree, drafts included, for any number of windows guessed ahead."""
    model = open_gates(TensorAR(backbone, METHODS[method]).eval())
    if model.windows.size < max(CONFIGS[config].window, CONFIGS[config].stride):
        pytest.skip("the base has no window to shrink, or to leap over")
    expected, steps = calls_of(model, lambda: draw(model, CONFIGS[config], 0))
    assert steps == expected.shape[1] - 1 == -(-16 // CONFIGS[config].stride) - 1
    for ahead in (2, 4, 7):
        windows, calls = calls_of(model, lambda n=ahead: draw(model, CONFIGS[config], n))
        assert torch.equal(windows, expected)
        assert steps / ahead <= calls <= steps
    alone = draw(model, CONFIGS[config], 0, rows=1)
    assert torch.equal(draw(model, CONFIGS[config], 4, rows=1), alone)


@pytest.mark.parametrize(("temperature", "right"), [(1.0, True), (1.05, False)])
def test_sequences_follow_the_models_own_distribution(temperature, right):
    """Whole images of a tiny model are judged by its predictions at temperature 1, in two ways:
    log-likelihood minus its expectation, in standard errors, and code by code the chi-square over
    its degrees of freedom. A temperature that is 5 % off is noticed.
    """
    model, rows = TensorAR(tiny_llamagen("class"), presets.base()).eval(), 1500
    prepared = {"labels": torch.zeros(rows, dtype=torch.long)}
    config = SamplingConfig(temperature=temperature)
    keys = make_keys(0, torch.arange(rows))
    windows = sample_windows(model, prepared, keys, config, speculate=4)
    with torch.no_grad():
        hidden = model.hidden(model.backbone.encode_condition(prepared), windows)
        log_p = model.slot_logits(model.decode_slots(hidden), windows)[0][:, :, 0].log_softmax(-1)
    p, drawn = log_p.exp(), windows[:, :, 0]
    mean = (p * log_p).sum(-1)
    spread = (p * log_p.square()).sum(-1) - mean.square()
    off = float((log_p.gather(-1, drawn)[..., 0] - mean).sum() / spread.sum().sqrt())
    counts = torch.nn.functional.one_hot(drawn[..., 0], p.shape[-1])
    chi = float(((counts - p).sum(0).square() / (p * (1 - p)).sum(0)).mean())
    if right:
        assert abs(off) < 4 and chi < 1.2
    else:
        assert off < -8


@pytest.mark.parametrize("method", ["base", "tensorar"])
def test_wrong_guesses_cost_calls_but_change_nothing(method, monkeypatch):
    """Only guessing the true windows needs the least possible number of calls."""
    model = open_gates(TensorAR(tiny_llamagen("text"), METHODS[method]).eval())
    config = CONFIGS["guided-filters"]
    expected = draw(model, config, 0)
    count = {}
    for name, said in (("zeros", torch.zeros_like(expected)), ("true", expected)):

        def told(windows, geometry, columns, index, said=said):
            return speculation.take(said, index.clamp(max=15))

        monkeypatch.setattr(sampler, "first_guesses", told)
        windows, count[name] = calls_of(model, lambda: draw(model, config, 4))
        assert torch.equal(windows, expected)
    assert count["true"] == 4 < count["zeros"], "15 windows behind the first, four a call"


def test_every_window_is_settled_once():
    model = open_gates(TensorAR(tiny_llamagen("class"), METHODS["tensorar"]).eval())
    ticks = []
    drawn = draw(model, CONFIGS["plain"], 4, on_step=lambda windows: ticks.append(windows.clone()))
    assert len(ticks) == 16
    assert all(torch.equal(seen[:, :i], drawn[:, :i]) for i, seen in enumerate(ticks, start=1))


def test_first_guesses():
    """In a 3 x 4 image a guess is the code above, or in the first row the previous code; a draft
    becomes the guess of the next slot up.
    """

    def guesses(geometry, first, ahead):
        windows = torch.arange(13 * geometry.size).view(1, 13, geometry.size, 1)
        index = torch.tensor([first + i for i in range(ahead)])[None]
        return speculation.first_guesses(windows, geometry, 4, index)[0, ..., 0].tolist()

    base, tensor = Windows(12, 1), Windows(12, 3)
    assert guesses(base, 1, 5) == [[0]] * 5, "nothing is above"
    assert guesses(base, 3, 4) == [[2], [0], [1], [2]]
    assert guesses(base, 5, 6) == [[1], [2], [3], [4], [1], [2]], "two rows up where one is unknown"
    # Slot j of window i is 3 i + j: of the window before, else the final code above.
    assert guesses(tensor, 6, 2) == [[3 * 5 + 1, 3 * 5 + 2, 3 * 4], [3 * 5 + 2, 3 * 4, 3 * 5]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "shapes-janus"])
def test_the_same_images_in_fewer_calls_on_the_shipped_bases(name, monkeypatch):
    """Any code that differs must be a tie within rounding; the calls must be below 0.6 per code."""
    monkeypatch.setattr(fewer_steps, "PROMPTS", fewer_steps.PROMPTS[:3])
    model = t2i.load_model(name, device="cpu", dtype="float32")
    plain, steps = fewer_steps.courses(model, model.sampling, 0)
    windows, calls = fewer_steps.courses(model, model.sampling, 8)
    differs = fewer_steps.first_difference(model, model.sampling, plain, windows)
    assert differs is None or abs(differs["gap"]) < 1e-3, differs
    assert all(len(own) == 64 for own in steps)
    assert sum(map(len, calls)) < 0.6 * sum(map(len, steps))


def test_a_wrong_code_does_not_count_as_a_tie(backbone, monkeypatch):
    """The gap of a wrong code is computed from the noise and the distribution at its place."""
    monkeypatch.setattr(
        fewer_steps,
        "conditions",
        lambda model, rows: (tiny_prepared(model.backbone, rows), make_keys(0, torch.arange(rows))),
    )
    model, config = open_gates(TensorAR(backbone, METHODS["tensorar"]).eval()), CONFIGS["guided"]
    plain = draw(model, config, 0)
    assert fewer_steps.first_difference(model, config, plain, plain) is None
    for slot, sub in ((0, 0), (2, -1)):
        wrong = plain.clone()
        wrong[1, 7, slot, sub] = (wrong[1, 7, slot, sub] + 1) % backbone.spec.subvocabs[sub]
        found = fewer_steps.first_difference(model, config, plain, wrong)
        assert (found["row"], found["window"], found["slot"]) == (1, 7, slot) and found["gap"] > 0
        place = 1, 7, slot, len(backbone.spec.subvocabs) - 1 if sub else 0
        said = fewer_steps.scores_at(model, config, plain, place)
        assert said.argmax() == plain[place], "the code that was drawn is the best by this account"


def test_settings():
    for wrong in (1, -1, True, 2.5, "on"):
        with pytest.raises(
            UserError, match=r"speculate=.* must be auto, off, or at least 2 windows"
        ):
            DrawOptions(speculate=wrong)
    options = ModelOptions(ckpt="shapes", device="cpu", speculate=4)
    assert options.load(*options.check()).speculate == 4
    assert ModelOptions(ckpt="shapes").speculate == "auto"
    with pytest.raises(UserError, match="speculate=-1"):
        ModelOptions(ckpt="shapes", device="cpu", speculate=-1).check()


# -- how many windows a call draws ----------------------------------------------------------------


def test_auto_depends_on_the_request_only(monkeypatch):
    """The same request gets the same answer on a machine, whatever else that is doing."""
    model = TensorAR(tiny_llamagen("class"), presets.base()).eval()

    def chosen(images, model=model, **options):
        return choose_run(model, DrawOptions(**{"speculate": "auto"} | options), 1, images)

    assert [chosen(n)[1] for n in (1, 2, 4, 64)] == [12, 0, 0, 0]
    for generated, ahead in ((False, 8), (True, 0)):
        monkeypatch.setattr(generation, "generates_products", lambda _, known=generated: known)
        assert [chosen(n, speed="compiled")[1] for n in (1, 2, 64)] == [ahead, 0, 0]
        assert [chosen(n)[1] for n in (1, 2)] == [12, 0]
    assert chosen(2, speed="compiled", sampling=SamplingConfig(renoise=0.5)) == ("compiled", 0)
    assert chosen(1, speculate="off") == ("eager", 0) and chosen(64, speculate=3)[1] == 3
    assert chosen(1, speculate=10**12)[1] == 16, "capped at the image's 16 windows"
    refining = TensorAR(tiny_llamagen("class"), presets.iclr2026()).eval()
    assert chosen(1, refining)[1] == 0, "not measured with windows of several codes"


def test_a_folder_keeps_its_speculation(tmp_path, monkeypatch):
    """A process that continues the folder, or helps to fill it, draws as the first one did."""
    model = TensorAR(tiny_llamagen("class"), presets.base()).eval()
    entries = [{"prompt": str(i)} for i in range(8)]

    def fill(count, speculate="auto", processes=ALONE):
        options = DrawOptions(batch_size=1, speculate=speculate)
        request = PromptRequest(model, entries, options)
        draw_prompts(request, all_jobs(range(count), 1), tmp_path, processes)
        return read_json(tmp_path / "generation.json")["speculate"]

    used, whole = [], generation.sample_windows
    monkeypatch.setattr(
        generation, "sample_windows", lambda *args: used.append(args[-1]) or whole(*args)
    )
    assert fill(8) == 12 and used == [12] * 8
    monkeypatch.setattr(generation, "SPECULATION_PAYS", {"eager": 8})  # as on another machine
    for path in tmp_path.glob("0000[0-3]/samples/*.png"):
        path.unlink()
    assert fill(8, processes=Processes(1)) == 12 and used == [12] * 11
    assert fill(8) == 12 and used == [12] * 12
    with pytest.raises(UserError, match="speculate 12 there, 8 now"):
        fill(8, speculate=8)


def test_codes_drawn_independently():
    """With stride 1 they equal codes drawn one by one. With stride 2 the second code of a window
    has the right marginal distribution, but does not depend on the first.
    """
    model, rows = TensorAR(tiny_llamagen("class"), presets.base()).eval(), 4000
    model.sampling = SamplingConfig(cfg_scale=1.5, top_k=3)
    keys = make_keys(0, torch.arange(rows))
    prepared = {"labels": torch.zeros(rows, dtype=torch.long)}
    few = {"labels": prepared["labels"][:5]}
    plain = sample_windows(model, few, keys[:5], model.sampling)[:, :, 0]
    assert torch.equal(strides.drawn_apart(model, few, keys[:5], 1), plain)
    # Of images of two codes, so that many can be drawn.
    model.windows = Windows(2, 1)
    together, apart = (strides.drawn_apart(model, prepared, keys, s)[..., 0] for s in (1, 2))
    assert torch.equal(together[:, 0], apart[:, 0])

    def counts(codes):
        return (
            torch.bincount(48 * codes[:, 0] + codes[:, 1], minlength=48 * 48).view(48, 48).float()
        )

    joint, independent = counts(together), counts(apart)
    expected = independent.sum(1)[:, None] * independent.sum(0) / rows
    some = expected > 20
    assert ((independent - expected).square() / expected)[some].mean() < 2
    assert ((joint - expected).square() / expected)[some].mean() > 10, "these do depend on it"
    marginal = torch.stack([joint.sum(0), independent.sum(0)])
    seen = marginal.sum(0) > 40
    change = (marginal[0] - marginal[1]).square() / marginal.sum(0)
    assert change[seen].mean() < 2.5, "the same share of images has each code there"


def test_the_stride_table_of_the_docs_is_made_from_its_results(monkeypatch, tmp_path):
    folder = Path(__file__).resolve().parents[1] / "docs" / "fewer_steps" / "strides"
    where = ("--results", folder / "results.jsonl", "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["strides_report.py", *map(str, where)])
    strides_report.main()
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    assert (tmp_path / "curve.svg").stat().st_size > 5000


def test_strides_with_other_settings_are_run_again(monkeypatch):
    """Results with another base, or other steps or samples, do not count as done."""
    monkeypatch.setattr(
        strides, "trained", lambda *_: TensorAR(tiny_llamagen("text"), presets.base())
    )
    monkeypatch.setattr(strides, "held_out_loss", lambda *_: [1.0])
    monkeypatch.setattr(strides, "scored", lambda *_: {})
    study = strides.Strides("trained")
    control = next(strides.arms(study))
    (line,) = strides.arm_lines(study, control, 0, None, set())
    assert not list(strides.arm_lines(study, control, 0, None, {line["key"]}))
    for other in ({"base": "b"}, {"steps": 2}, {"samples": 3}, {"codec_lr": 1.0}):
        again = replace(study, **other)
        assert len(list(strides.arm_lines(again, control, 0, None, {line["key"]}))) == 1, other


def test_a_stride_is_compared_with_the_same_seeds_drawn_code_by_code():
    def line(arm, stride, seed, correct):
        study = {"base": "b", "samples": 2}
        about = {"arm": arm, "stride": stride, "seed": seed, "study": study}
        return about | {"correct": correct, "calls_per_code": 1 / stride, "losses": [1.0, seed]}

    every = strides_report.drawn_ways(
        [
            *(line("control", 1, seed, 3 * [1, 2, 1, 2]) for seed in (0, 1)),
            *(line("refined", 2, seed, 3 * [0, 1, 0, 1]) for seed in (1, 0)),
        ]
    )
    assert [len(one.lines) for one in every] == [2, 2]
    gained = strides_report.gain(every[1], every)
    assert gained is not None and (gained.mean, gained.error) == (-0.5, 0)
    assert strides_report.gain(every[0], every) is None
    assert "| b | refined | 2 | 2 | 0.50 |" in strides_report.table(every)
    assert every[1].losses() == "1.00 / 0.50"
    del every[0].lines[1]  # a study that is not finished
    assert strides_report.gain(every[1], every).mean == -0.5

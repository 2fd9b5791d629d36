"""The benchmark: contenders do the same work in turns, peers draw the same codes, and the tables
are computed correctly. No test depends on measured times.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import tiny_janus, tiny_llamagen, tiny_prepared
from programs import launch, program, refused

from launch import benchmark
from launch.measure import peers, roofline, scaling, timed_sampling, timed_training
from launch.measure.peak_memory import peak_gb
from launch.measure.peers import Task
from launch.measure.shapes import outline
from launch.measure.textbook import Textbook
from launch.measure.turns import Loop, Schedule, Single, in_turns, ratios
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import encode_rows, sample_windows

CPU = torch.device("cpu")
MACHINE = roofline.Machine(1e3, {"fp32": 1e6, "bf16": 1e6}, "made up")
GREEDY = SamplingConfig(temperature=0.0, cfg_scale=2.0)


def nothing() -> None:
    pass


# -- turns -----------------------------------------------------------------------------------------


def counting(log: list, name: str, steps: int = 8) -> Callable:
    """A drawing loop that logs its steps."""

    def draw(tick):
        for index in range(steps):
            log.append((name, index))
            tick()

    return draw


def test_contenders_do_the_same_steps_in_turns():
    log: list = []
    loops = {name: Loop(counting(log, name), CPU) for name in "ab"}
    schedule = Schedule(image=8, steps=4, rounds=2)
    times = in_turns(loops, schedule)
    turns = [(name, i) for first in (2, 4) for name in "ab" for i in (first, first + 1)]
    warm = [(name, i) for name in "ab" for i in (0, 1)]
    assert log == warm + turns
    assert all(len(one.per_step) == 2 and one.first is None for one in times.values())


def test_a_contender_that_records_draws_a_whole_image_first():
    log: list = []
    times = in_turns({"a": Loop(counting(log, "a"), CPU, records=True)}, Schedule(8, 2, 1))
    assert log == [("a", i) for i in (*range(8), *range(3), 3, 4)]
    assert times["a"].first is not None and len(times["a"].per_step) == 1


def test_if_all_steps_are_timed_another_image_warms_up():
    schedule = Schedule(image=8, steps=8, rounds=4)
    assert (schedule.first, schedule.per_turn, schedule.warm_up) == (0, 2, 8)
    assert Schedule(image=256, steps=64, rounds=8).middle == 128


def test_single_steps_are_taken_from_the_middle():
    log: list = []
    in_turns({"a": Single(log.append, CPU)}, Schedule(image=16, steps=8, rounds=2))
    assert log == [0, 6, 10]


def test_out_of_memory_is_reported_and_other_errors_are_raised():
    def fails(error):
        def draw(tick):
            tick()
            raise error

        return Loop(draw, CPU)

    log: list = []
    full = fails(torch.OutOfMemoryError("CUDA out of memory"))
    times = in_turns({"a": full, "b": Loop(counting(log, "b"), CPU)}, Schedule(8, 8, 2))
    assert "out of memory" in times["a"].error and not times["a"].per_step
    assert len(times["b"].per_step) == 2
    with pytest.raises(ValueError, match="wrong"):
        in_turns({"a": fails(ValueError("wrong"))}, Schedule(8, 8, 2))


def test_ratios_compare_the_same_rounds():
    """The second round was slow for both contenders; the ratio of the medians would be 2."""
    assert ratios([2.0, 30.0, 4.0], [2.0, 30.0, 2.0]) == [1, 1, 2]


# -- peers -----------------------------------------------------------------------------------------


def task(backbone, prepared, images: int = 3) -> Task:
    return Task(backbone, prepared, images, GREEDY)


def ours(of: Task) -> torch.Tensor:
    """Greedy codes [B, T]."""
    model = TensorAR(of.backbone, presets.base()).eval()
    windows = sample_windows(model, of.prepared, torch.arange(of.images), of.sampling)
    return model.windows.final_codes(windows)[..., 0]


@pytest.mark.parametrize("cond", ["class", "text"])
def test_textbook_loops_draw_our_codes(cond):
    backbone = tiny_llamagen(cond)
    of = task(backbone, tiny_prepared(backbone, 3))
    book = Textbook(backbone, encode_rows(backbone, of.prepared, guided=True), of.sampling)
    codes = book.appending(nothing)
    assert torch.equal(codes, ours(of)) and len(codes.unique()) > 3
    assert all(torch.equal(book.recomputing(codes[:, :t]), codes[:, t, None]) for t in (0, 1, 9))


def test_transformers_image_loop_draws_our_codes():
    backbone = tiny_janus()
    of = task(backbone, tiny_prepared(backbone, 3))
    steps = []
    codes = peers.draw_janus(peers.transformers_janus(backbone), of, lambda: steps.append(1))
    assert torch.equal(codes, ours(of)) and len(codes.unique()) > 3
    assert len(steps) == codes.shape[1]


@pytest.mark.parametrize("name", ["transformers", "transformers-static", "cat-cache", "no-cache"])
def test_peers_take_one_step_per_code(name):
    backbone = tiny_llamagen("class")
    contender = peers.open_peer(name, task(backbone, tiny_prepared(backbone, 3)))
    (times,) = in_turns({name: contender}, Schedule(16, 16, 4)).values()
    assert len(times.per_step) == 4


def test_llamagen_is_imported_from_the_given_checkout(tmp_path, monkeypatch):
    """LlamaGen's code is not part of the tests: a stand-in with its names draws only ones."""
    package = tmp_path / "autoregressive" / "models"
    package.mkdir(parents=True)
    (package / "gpt.py").write_text(
        "import torch\n"
        "def ModelArgs(**shape): return shape\n"
        "class Transformer(torch.nn.Linear):\n"
        "    def __init__(self, shape):\n"
        "        super().__init__(1, 1)\n"
        "        assert shape['model_type'] == 'c2i' and shape['block_size'] == 16\n"
        "    def load_state_dict(self, weights): self.names = list(weights)\n"
    )
    (package / "generate.py").write_text(
        "import torch\n"
        "def generate(model, labels, tokens, *, cfg_scale, top_k, sample_logits, **_):\n"
        "    assert model.names and cfg_scale == 2 and not sample_logits\n"
        "    for _ in range(tokens): model(torch.ones(1))\n"
        "    return torch.ones(len(labels), tokens)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = tiny_llamagen("class")
    backbone.config = replace(backbone.config, ffn_dim=None)
    of = replace(task(backbone, tiny_prepared(backbone, 3)), llamagen=tmp_path)
    contender = peers.open_peer("llamagen", of)
    assert len(in_turns({"llamagen": contender}, Schedule(16, 8, 2))["llamagen"].per_step) == 2
    assert peers.open_peer("llamagen", replace(of, llamagen=None)) is None


# -- training --------------------------------------------------------------------------------------


def training_group(*methods: str, **settings) -> timed_training.TrainingGroup:
    return timed_training.TrainingGroup("tiny-class", "fp32", 2, methods, **settings)


def test_own_drafts_are_drawn_in_timed_training(monkeypatch):
    """Case 26: the time of `tuned` used to leave out the pass that draws its own drafts."""
    passes = []

    def record(self, codes, condition, keys, passes_asked=2, **options):
        passes.append(options.get("passes", passes_asked))
        return self.windows.gather(codes)

    monkeypatch.setattr(TensorAR, "own_draft_windows", record)
    for method in ("iclr2026", "tuned"):
        timed_training.OpenTraining(training_group(method), (method,), CPU).steps[method]()
    assert passes == [1]


def test_the_naive_loss_equals_the_chunked_loss():
    group = training_group("iclr2026", naive=True)
    steps = timed_training.OpenTraining(group, group.names, CPU).steps
    own, naive = (steps[name] for name in ("iclr2026", "iclr2026 naive"))
    naive.codes = own.codes
    backbone = own.model.backbone
    own.model.eval()
    condition = backbone.encode_condition(own.prepared)
    windows = own.model.training_windows(own.codes, condition, own.keys)
    losses = own.loss(condition, windows), naive.loss(condition, windows)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def test_a_training_step_changes_only_its_own_model():
    """All contenders of a group share one optimizer."""
    group = training_group("base", "iclr2026")
    opened = timed_training.OpenTraining(group, group.names, CPU)
    codec = {k: v.clone() for k, v in opened.models["iclr2026"].codec.state_dict().items()}
    backbone = [p.clone() for p in opened.models["base"].backbone.parameters()]
    opened.steps["base"]()
    assert all(
        torch.equal(v, codec[k]) for k, v in opened.models["iclr2026"].codec.state_dict().items()
    )
    after = opened.models["base"].backbone.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(after, backbone, strict=True))


def test_a_step_that_does_not_fit_leaves_the_others_numbers(monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    measured = []
    monkeypatch.setattr(timed_training.NaiveStep, "__call__", full)
    monkeypatch.setattr(
        timed_training, "peak_gb", lambda work, group, name, _: measured.append(name)
    )
    group = training_group("base", naive=True, rounds=1)
    own, naive = timed_training.measure(group, CPU, MACHINE, memory=True)
    assert own["s_per_step"] > 0 and own["state_gb"] > 0 and measured == ["base"]
    assert "out of memory" in naive["error"] and "state_gb" not in naive


# -- hardware limits and scaling -------------------------------------------------------------------


def test_the_floor_is_the_bytes_of_weights_and_cache_over_bandwidth():
    group = timed_sampling.Group("tiny-class", "fp32", 2, ("base",), ("eager",), steps=8, rounds=2)
    (row,) = timed_sampling.measure(group, CPU, MACHINE)
    backbone = outline("tiny-class")
    gpt, config = backbone.gpt, backbone.config
    tables = gpt.tok_embeddings.weight.numel() + gpt.cls_embedding.embedding_table.weight.numel()
    weights = sum(p.numel() for p in gpt.parameters()) - tables
    cache = 2 * config.n_layer * 4 * config.dim * (1 + 8)  # two rows for each of two images
    assert row["floor_bytes"] == 4 * (weights + cache)
    assert row["floor_ms"] == pytest.approx(4 * (weights + cache))  # at 1000 bytes per second
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_step"])
    products = 2 * weights * 4 + 4 * config.n_layer * 4 * 16 * config.dim
    norms = config.dim * (2 * config.n_layer + 1)
    assert row["floor_flops"] == pytest.approx(products - 2 * 4 * norms, rel=0.01)


def test_a_peer_that_has_no_such_shape_is_named(caplog):
    caplog.set_level("INFO")
    group = timed_sampling.Group("tiny-rar", "fp32", 1, ("base",), ("eager",), ("transformers",))
    assert list(timed_sampling.OpenGroup(group, CPU).contenders) == ["base eager"]
    assert "tiny-rar: there is no transformers for this shape" in caplog.text


def test_many_operations_set_the_floor():
    floor = roofline.Floor(bytes=1e3, flops=1e9)
    assert floor.seconds(MACHINE, "fp32") == 1e3
    assert floor.seconds(replace(MACHINE, rates={"fp32": 1e12}), "fp32") == 1


def test_given_rates_are_used():
    known = roofline.known(CPU, {"fp32": torch.float32}, 50.0, 2.0)
    assert (known.bandwidth, known.rates) == (50e9, {"fp32": 2e12})
    assert known.source == "given", "nothing was measured"


def test_power_law_fits_find_the_exponent():
    x = [1, 2, 4, 8]
    exponent, factor, residual = scaling.power_law(x, [3 * v**1.5 for v in x])
    assert (exponent, factor, residual) == pytest.approx((1.5, 3, 0))
    assert scaling.power_law(x, [1, 2, 1, 2])[2] > 0.2


def test_scaling_is_measured_in_each_variable():
    points = scaling.points(scaling.Point(side=4, k=2, images=1, dim=128, layers=1), tiny=True)
    for name, of in points.items():
        works = [p.work(name, p.model(CPU)) for p in of]
        assert works == sorted(set(works))
    rows = scaling.measure("T", points["T"][:2], CPU, rounds=1, memory=False)
    fits = scaling.fits([*rows, {"contender": "cost as k grows", "error": "out of memory"}])
    assert [row["x"] for row in rows] == [16, 36] * 2
    assert [fit["work"] for fit in fits] == ["drawing", "training"]


def test_peak_memory_is_what_the_work_allocates():
    assert 0.2 < peak_gb(torch.ones, 50_000_000) < 0.25


@pytest.mark.parametrize("name", ["llamagen-XXL", "janus-7B", "open-magvit2-XL", "rar-XXL"])
def test_published_shapes_need_no_files(name):
    backbone = outline(name)
    assert backbone.device.type == "meta" and backbone.spec.num_tokens in (256, 576)


# -- the program -----------------------------------------------------------------------------------


def test_results_and_table_of_the_program(tmp_path, capsys):
    words = "sampling training --shapes tiny-class --images 2 --batch 2 --rounds 2 --no-memory"
    more = "--peers cat-cache --decode --naive --bandwidth 10 --tflops 1 --steps 8"
    program(benchmark, *words.split(), *more.split(), "--out", tmp_path / "mine.md")
    found = json.loads((tmp_path / "mine.json").read_text())
    assert found["about"]["versions"]["torch"] == torch.__version__
    assert "--shapes tiny-class" in found["about"]["command"]
    assert found["settings"]["images"] == [2] and found["machine"]["bandwidth"] == 10e9
    first, refined, peer = found["rows"]["sampling"]
    assert (first["contender"], refined["speed"]) == ("base eager", "eager")
    pairs = zip(refined["ms_by_round"], first["ms_by_round"], strict=True)
    assert refined["ratio"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    assert refined["images_per_s"] == pytest.approx(2e3 / refined["ms_per_step"] / 16)
    assert peer["contender"] == "cat-cache" and "floor_ms" not in peer
    names = [row["contender"] for row in found["rows"]["training"]]
    assert names == ["base", "base naive", "iclr2026", "iclr2026 naive"]
    table = (tmp_path / "mine.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "| tiny-class | fp32 | 2 | codes to pixels |" in table and "floor = max(" in table
    assert (tmp_path / "mine.svg").stat().st_size > 5000


def test_bad_options_are_refused(tmp_path, capsys):
    def message(*words):
        return refused(benchmark, capsys, *words)

    assert "unknown shape 'llamagen-Z'; perhaps you meant llamagen-" in message(
        "--shapes", "llamagen-Z"
    )
    assert "unknown peer 'vllm'; choose one of no-cache, " in message("--peers", "vllm")
    assert "needs --llamagen DIR" in message("--peers", "llamagen")
    assert "unknown preset 'iclr2025'" in message("--methods", "iclr2025")
    assert "rounds=0 must be at least 1" in message("--rounds", "0")
    assert "steps=-1 must be" in message("--steps", "-1")
    assert "minutes=-1.0 must be" in message("--minutes", "-1")
    assert "bandwidth=0.0 must be a number above 0" in message("--bandwidth", "0")
    assert "cfg_scale=0.5 must be at least 1" in message("--guidance", "0.5")
    assert f"images={10**12} must be at most" in message("--images", str(10**12))
    (tmp_path / "README.md").write_text("mine")  # used to be overwritten
    said = message("--shapes", "tiny-class", "--out", tmp_path / "README")
    assert "README.md would be overwritten, and no benchmark wrote it" in said
    for nothing in ("--shapes", "--methods", "--dtypes", "--images"):  # printed an empty report
        assert "is empty, so nothing would be measured" in message(nothing)
    assert "invalid choice 'fast'" in message("--speeds", "fast")
    assert "graphs needs a CUDA GPU" in message(
        "sampling", "--shapes", "tiny-class", "--speeds", "graphs"
    )
    assert "is no checkout of LlamaGen" in message("--llamagen", tmp_path)
    assert "decode would have no effect, as only sampling" in message("training", "--decode")
    assert "naive would have no effect, as only training" in message("scaling", "--naive")


def test_a_group_that_does_not_fit_into_memory_is_a_row(tmp_path, monkeypatch):
    def full(group, *_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timed_sampling, "measure", full)
    words = ("sampling", "--shapes", "tiny-class", "--bandwidth", "1", "--tflops", "1")
    program(benchmark, *words, "--out", tmp_path / "v1.0")
    (row,) = json.loads((tmp_path / "v1.0.json").read_text())["rows"]["sampling"]
    assert "tiny-class" in row["contender"] and "out of memory" in row["error"]


def test_a_contenders_threads_end_with_its_turn():
    """Idle teams of OpenMP threads made the steps of others twice as long."""
    launch(
        "-c",
        """if True:
        import os, torch
        from t2i.processes import release_threads

        torch.set_num_threads(4)
        before = len(os.listdir("/proc/self/task"))
        torch.ones(1_000_000).add_(1)
        computing = len(os.listdir("/proc/self/task"))
        release_threads()
        after = len(os.listdir("/proc/self/task"))
        assert (before, computing, after) == (before, before + 3, before), (before, computing, after)
        assert torch.ones(1_000_000).add_(1).sum() == 2_000_000
        """,
    )

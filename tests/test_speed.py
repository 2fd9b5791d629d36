"""Eager, compiled and recorded steps draw the same codes, and every step can be recorded (as a CUDA
graph).
"""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import BACKBONES, Killed, open_gates, rare, tiny_llamagen, tiny_prepared
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from t2i import generation, products
from t2i.errors import UserError
from t2i.evaluation import draw as draw_module
from t2i.generation import all_jobs
from t2i.lora import add_lora, without_lora
from t2i.models.blocks import attend
from t2i.models.kv_cache import KVCache
from t2i.rng import make_keys
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar import presets, sampler, speed
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.tuning import LoRAConfig

GUIDED = SamplingConfig(cfg_scale=2.0, cfg_interval=6, top_k=20, top_p=0.95)
STRIDE = SamplingConfig(cfg_scale=2.0, stride=3, top_k=20, renoise=0.5)
OTHER = SamplingConfig(cfg_scale=3.0, cfg_power=1.5, draft_temperature=0.5, window=3, renoise=0.5)


def small(backbone, **method) -> TensorAR:
    return open_gates(TensorAR(backbone, presets.iclr2026(**method)).eval())


def draw(model, config=GUIDED, *, seed=0, rows=3, on_step=None, **options):
    keys, prepared = make_keys(seed, torch.arange(rows)), tiny_prepared(model.backbone, rows)
    options = {"speed": "graphs"} | options
    return sample_windows(model, prepared, keys, config, on_step, **options)


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
COPIES = {"lift_fresh", "lift_fresh_copy"}


class NoSync(TorchDispatchMode):
    """Fails if a step waits for the device, or copies something to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        kwargs = kwargs or {}
        assert name not in WAITS | COPIES, function
        if name in (
            "_to_copy",
            "scalar_tensor",
        ):  # to change a type, or to fill in a number, is fine
            assert (kwargs.get("device") is None) == (name == "_to_copy"), (function, kwargs)
        return function(*args, **kwargs)


class Tape(NoSync):
    """Records operations and their tensors in order. Python numbers are frozen into it, as in a
    CUDA graph.
    """

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.done.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        again = {}  # from each recorded result to the one of this replay
        for function, args, kwargs, then in self.done:
            given = tree_map_only(torch.Tensor, lambda x: again.get(x, x), (args, kwargs))
            now = function(*given[0], **given[1])
            again.update(zip(tree_leaves(then), tree_leaves(now), strict=True))


@pytest.fixture
def recorded(monkeypatch):
    """Replaces CUDA graphs by a tape that is replayed; returns the tapes recorded so far."""
    traces = []

    def do_and_record(work, pool, device):
        with Tape() as tape:
            work()
        traces.append(tape.replay)
        return tape.replay

    monkeypatch.setattr(speed, "do_and_record", do_and_record)
    monkeypatch.setattr(KVCache, "BUCKET_ON_A_CPU", 12)
    return traces


@pytest.mark.parametrize(
    ("backbone", "config"),
    [
        *(pytest.param(name, OTHER, id=f"{name}-other") for name in BACKBONES),
        pytest.param("rar", STRIDE, id="rar-stride"),
        *(rare(name, GUIDED, id=f"{name}-filters") for name in BACKBONES),
        *(rare(name, STRIDE, id=f"{name}-stride") for name in BACKBONES if name != "rar"),
    ],
    indirect=["backbone"],
)
def test_recorded_steps_draw_the_same(backbone, config, recorded, monkeypatch):
    """A second batch of the same shape replays what was recorded for the first."""
    model = small(backbone)
    expected = [draw(model, config, seed=seed, speed="eager") for seed in (0, 1)]
    assert not torch.equal(*expected)
    first = draw(model, config)
    assert torch.equal(first, expected[0])
    buckets = {model.held.content[0].state.extent(i) for i in range(first.shape[1] - 1)}
    assert len(recorded) == len(buckets) > 1
    assert torch.equal(draw(model, config, seed=1), expected[1]) and torch.equal(first, expected[0])
    assert len(recorded) == len(buckets)


@pytest.mark.parametrize(
    "backbone",
    [n if n in ("llamagen_text", "open_magvit2") else rare(n) for n in BACKBONES],
    indirect=True,
)
def test_recorded_speculation_draws_the_same(backbone, recorded):
    """Even if the second batch settles other numbers of windows per call."""
    model = small(backbone)
    expected = [draw(model, seed=seed, speed="eager") for seed in (0, 1)]
    for seed in (0, 1):
        assert torch.equal(draw(model, seed=seed, speculate=4), expected[seed])
    assert len(recorded) == 2, "one recording per cache length that is read"


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("base", SamplingConfig(cfg_scale=2.0)),
        ("iclr2026", GUIDED),
        ("iclr2026", OTHER),
        ("iclr2026", STRIDE),
        ("iclr2026", SamplingConfig(temperature=0.0)),
        ("arxiv2505", OTHER),
    ],
)
@pytest.mark.parametrize(("name", "speculate"), [("step", 0), ("leap", 3)])
def test_a_step_never_waits_for_the_device(backbone, preset, config, name, speculate, monkeypatch):
    model = TensorAR(backbone, presets.method(preset)).eval()
    plain, steps = getattr(sampler, name), []

    def watched(*args):
        with NoSync():
            plain(*args)
        steps.append(1)
        if len(steps) == 2:
            raise Killed

    monkeypatch.setattr(sampler, name, watched)
    with pytest.raises(Killed):
        draw(model, config, speed="eager", speculate=speculate)
    for wrong in (
        lambda: torch.ones(1).item(),
        lambda: torch.tensor(1.0),
        lambda: draw(model, speed="eager"),
    ):
        with pytest.raises(AssertionError), NoSync():
            wrong()


def test_recordings_are_dropped_when_shape_settings_or_weights_change(recorded):
    model = small(tiny_llamagen("text"))
    draw(model)
    held = model.held.content
    assert copy.deepcopy(model).held.content is None
    draw(model, seed=5)
    assert model.held.content is held
    for change in (
        lambda: draw(model, rows=2),
        lambda: draw(model, SamplingConfig(temperature=0.0)),
        lambda: draw(model.to(torch.float64).to(torch.float32)),
    ):
        change()
        assert model.held.content is not held
        held = model.held.content
    model.train()
    assert model.held.content is None
    prepared, keys = tiny_prepared(model.eval().backbone, 2), make_keys(0, torch.arange(2))
    given = [keys, *prepared.values()]
    before = [tensor.clone() for tensor in given]
    sample_windows(model, prepared, keys, SamplingConfig(), speed="graphs")
    flipped = {name: value.flip(0) for name, value in prepared.items()}
    sample_windows(model, flipped, keys + 1, SamplingConfig(), speed="graphs")
    assert all(map(torch.equal, given, before)), "inputs are not written to"


def test_recordings_follow_adapters_being_switched_off_and_on(recorded):
    model = small(tiny_llamagen("text"))
    base = draw(model)
    add_lora(model.backbone, LoRAConfig(rank=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model.eval()
    adapted = draw(model)
    with without_lora(model.backbone):
        off = draw(model)
    assert torch.equal(off, base) and not torch.equal(adapted, base)
    assert torch.equal(draw(model), adapted)


def test_recordings_do_not_keep_the_model_alive(recorded):
    model = small(tiny_llamagen("text"))
    draw(model)
    assert model.held.content is not None
    gone = weakref.ref(model)
    gc.disable()  # which alone could free a reference cycle
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_request_draws_all_batches_at_one_speed(recorded, monkeypatch, tmp_path):
    """The speed is chosen from the number of steps of the whole request, not of one batch."""
    asked = []
    monkeypatch.setattr(
        generation, "choose", lambda speed, device, n: asked.append((speed, n)) or "eager"
    )
    model = small(tiny_llamagen("class"))
    monkeypatch.setattr("t2i.generation.to_images", lambda *_: [Image.new("RGB", (4, 4))] * 4)
    entries = [{"prompt": str(i)} for i in range(6)]
    request = draw_module.PromptRequest(model, entries, DrawOptions(batch_size=4))
    assert len(request.short_hash) == 8
    monkeypatch.setattr(draw_module, "weights_hashes", None)  # once: it takes seconds
    draw_module.draw_prompts(request, all_jobs(range(6), 1), tmp_path / "out")
    assert asked == [("auto", 2 * 16), *[("eager", 16)] * 2]


def test_attention_compiles_with_a_varying_number_of_heads():
    """torch.compile treats it as varying once a second shape is compiled."""
    generator = torch.Generator().manual_seed(0)
    compiled = torch.compile(attend, backend="eager", fullgraph=True, dynamic=True)
    q_BHLK, k_BHLK = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    given = q_BHLK, k_BHLK, k_BHLK, None, None, 0
    assert compiled(*given).equal(attend(*given))


@pytest.mark.slow
@pytest.mark.skipif(bool(speed.compiler_lacks(torch.device("cpu"))), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("settings", "speculate", "generated"),
    [
        ({}, 0, False),
        ({}, 0, True),
        ({}, 4, False),
        ({"stride": 2}, 3, True),
        ({"top_k": 0, "top_p": 1.0}, 0, False),
        ({"renoise": 0.7}, 0, True),
    ],
)
def test_compiled_steps_draw_the_same(settings, speculate, generated, monkeypatch):
    """One compilation serves all cache lengths and further batches. Weights that were changed in
    place through `.data`, unseen by autograd, take effect. torch generates the products' code only
    where it is asked to.
    """
    if generated and not hasattr(products.select_algorithm(), "add_preprocessing_fn"):
        pytest.skip("this torch cannot leave one choice for a product")
    monkeypatch.setattr(products, "generates_products", lambda _: generated)
    counters["inductor"].clear()
    monkeypatch.setattr(KVCache, "BUCKET_ON_A_CPU", 8)
    model, config = small(tiny_llamagen("text")), replace(GUIDED, **settings)
    expected = [draw(model, config, seed=seed, speed="eager") for seed in (0, 1)]
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.data.mul_(-1.3)
    expected.append(draw(changed, config, speed="eager"))
    steps, options = [], {"speed": "compiled", "speculate": speculate}

    def once(_):
        steps.append(1)
        if len(steps) == 2:
            torch.compiler.set_stance("fail_on_recompile")

    try:
        first = draw(model, config, on_step=once, **options)
        second = draw(model, config, seed=1, **options)
    finally:
        torch.compiler.set_stance("default")
    for parameter in model.parameters():
        parameter.data.mul_(-1.3)
    third = draw(model, config, **options)
    assert all(map(torch.equal, (first, second, third), expected))
    assert not torch.equal(expected[0], expected[2])
    assert (counters["inductor"]["cpp_templated_kernel_counter"] > 0) == generated


def test_auto(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(speed, "compiler_lacks", lambda device: "")
    assert [speed.choose("auto", cpu, n) for n in (576, 10**6)] == ["eager", "eager"]
    assert [speed.choose("auto", cuda, n) for n in (1, 576, 10**6)] == ["eager", *["graphs"] * 2]
    assert speed.choose("compiled", cpu, 1) == "compiled"
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert speed.choose("auto", cpu, 10**6) == "eager"
    with pytest.raises(UserError, match="there is no 'no-such-compiler'"):
        speed.choose("compiled", cpu, 1)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        speed.choose("graphs", cpu, 1)
    with pytest.raises(UserError, match="must be one of auto, eager, compiled, graphs"):
        speed.choose("fast", cpu, 1)

"""Windows that are settled several at once are those that are drawn one by one."""

import pytest
import torch
from helpers import open_gates, rare, tiny_llamagen, tiny_prepared

import t2i
from t2i.errors import UserError
from t2i.generation import draw_images
from t2i.model_options import ModelOptions
from t2i.rng import make_keys
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar import presets, sampler, speculation
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.tensorar.speed import choose
from t2i.tensorar.windows import Windows

FILTERS = {"top_k": 20, "top_p": 0.9, "temperature": 0.8}
CONFIGS = {
    "plain": SamplingConfig(),
    "guided": SamplingConfig(cfg_scale=2.0, cfg_interval=6),
    "greedy": SamplingConfig(cfg_scale=2.0, temperature=0.0),
    "filters": SamplingConfig(**FILTERS),
    "guided-filters": SamplingConfig(cfg_scale=3.0, cfg_power=1.5, **FILTERS),
    "drafts": SamplingConfig(cfg_scale=2.0, draft_temperature=0.5, window=3, renoise=0.5),
}
METHODS = {
    "base": presets.base(),
    "tensorar": presets.iclr2026(),
    "stride": presets.iclr2026(stride=2),
}


def calls_of(model, work):
    """What `work()` returns, and how often the trunk was run on image codes."""
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


def in_brief(method: str, config: str) -> bool:
    """Whether the usual tests have it: all settings with one method, all methods with one."""
    return method == "tensorar" or config == "guided-filters"


@pytest.mark.parametrize(
    ("method", "config"),
    [(m, c) if in_brief(m, c) else rare(m, c) for m in METHODS for c in CONFIGS],
)
def test_the_same_windows_in_fewer_calls(backbone, method, config):
    """Drafts included, whatever is guessed."""
    model = open_gates(TensorAR(backbone, METHODS[method]).eval())
    if model.windows.size < CONFIGS[config].window:
        pytest.skip("the base has no window to shrink")
    expected, steps = calls_of(model, lambda: draw(model, CONFIGS[config], 0))
    assert steps == model.windows.count - 1
    for ahead in (2, 4, 7):
        windows, calls = calls_of(model, lambda n=ahead: draw(model, CONFIGS[config], n))
        assert torch.equal(windows, expected)
        assert steps / ahead <= calls <= steps


@pytest.mark.parametrize("method", ["base", "tensorar"])
def test_guesses_cost_calls_and_nothing_else(method, monkeypatch):
    """None but the true windows' are ever as few as there can be."""
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
    draw(model, CONFIGS["plain"], 4, on_step=lambda: ticks.append(1))
    assert len(ticks) == 16


def test_first_guesses():
    """Of a 3 x 4 image: the code above, in the first row the last one; drafts move on."""

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
def test_fewer_calls_than_codes_on_the_shipped_bases(name):
    model = t2i.load_model(name, device="cpu", dtype="float32")
    prompts, count = ["a photo of a red circle", "a photo of two blue squares"], 0
    codes = {}
    for ahead in (0, 8):
        options = DrawOptions(batch_size=1, speculate=ahead)
        images, count = calls_of(
            model, lambda o=options: list(draw_images(model, prompts, o, progress=False))
        )
        codes[ahead] = [drawn.windows for drawn in images]
    assert all(map(torch.equal, codes[0], codes[8]))
    per_code = (count - 1) / (2 * model.windows.count)  # one more prefix
    assert per_code < 0.6


def test_settings():
    with pytest.raises(UserError, match=r"speculate=1 must be 0 \(off\) or at least 2"):
        DrawOptions(speculate=1)
    with pytest.raises(UserError, match="speculate=True must be a whole number"):
        DrawOptions(speculate=True)
    cpu = torch.device("cpu")
    options = ModelOptions(ckpt="shapes", device="cpu", speculate=4)
    model = options.load(*options.check())
    assert model.speculate == 4
    with pytest.raises(UserError, match="speculate=-1"):
        ModelOptions(ckpt="shapes", device="cpu", speculate=-1).check()
    with pytest.raises(UserError, match="must be 0"):
        choose("auto", cpu, 1, 1)

"""Parameter counts of the published LlamaGen models, alone and with both presets, on the meta
device.
"""

from dataclasses import replace

import pytest
from helpers import count, on_meta

from t2i.models.families import find_family
from t2i.models.llamagen.llamagen_model import SIZES, LlamaGen, LlamaGenConfig
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR

CLASS_COUNTS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "XXXL": 3_893_027_840,
    "1B": 1_199_616_000,
    "3B": 3_096_659_200,
    "7B": 6_614_589_440,
}
PUBLISHED = {"llamagen": "c2i_B_256", "open_magvit2": "AR_256_B"}
TEXT_COUNTS = {
    "B": 112_282_368,
    "L": 345_031_680,
    "XL": 777_678_080,
    "XXL": 1_414_940_160,
    "1B": 1_205_954_560,
}


def of_size(size: str, cond: str = "class") -> LlamaGen:
    return on_meta(LlamaGen, LlamaGenConfig(**SIZES[size], cond=cond))


@pytest.mark.parametrize(
    ("size", "cond", "sampling"),
    [
        ("XL", "text", SamplingConfig(7.5, top_k=1000)),
        ("B", "class", SamplingConfig(2.0)),
        ("XL", "class", SamplingConfig(1.75)),
        ("3B", "class", SamplingConfig(1.65)),
        ("7B", "class", SamplingConfig(2.0)),  # nothing is published for it
    ],
)
def test_default_sampling_is_the_published_one(size, cond, sampling):
    """Of the official `sample_t2i.py`, and of the FIDs in `GETTING_STARTED.md`."""
    assert of_size(size, cond).spec.sampling == sampling


@pytest.mark.parametrize("family", ["llamagen", "open_magvit2"])
def test_settings_that_published_weights_do_not_tell(family):
    """The authors' own; with others the weights would load all the same."""
    config = find_family(family).backbone_class.published_config(PUBLISHED[family], None)
    assert (config.norm_eps, config.rope_base) == (1e-5, 10000.0)
    assert config.token_dropout == config.resid_dropout == config.ffn_dropout == 0.1


@pytest.mark.parametrize(
    ("stem", "own"),
    [
        ("c2i_B_256", {"cond": "class", "num_classes": 7}),
        ("t2i_XL_stage1_256", {"cond": "text", "caption_tokens": 9, "caption_dim": 64}),
    ],
)
def test_the_weights_and_a_given_grid_win_over_a_published_name(stem, own):
    config = LlamaGenConfig(**SIZES[stem.split("_")[1]], grid=(2, 8), **own)
    weights = on_meta(LlamaGen, config).official_state_dict()
    found = LlamaGen.infer_config(weights, stem, (2, 8))
    assert found == replace(config, ffn_dim=config.hidden_dim)
    assert LlamaGen.published_config(stem, (2, 8)).grid == (2, 8)


@pytest.mark.parametrize("size", CLASS_COUNTS)
def test_class_conditional_sizes(size):
    assert count(of_size(size)) == CLASS_COUNTS[size]


@pytest.mark.parametrize("size", TEXT_COUNTS)
def test_text_conditional_sizes(size):
    backbone = of_size(size, "text")
    assert count(backbone) == TEXT_COUNTS[size]
    assert sum(b.numel() for b in backbone.buffers()) == 245_760


@pytest.mark.parametrize("size, millions", [("B", 139), ("L", 393), ("XL", 853)])
def test_arxiv2505_totals(size, millions):
    backbone = of_size(size)
    backbone.code_vectors = tuple  # a meta model has no tokenizer
    model = TensorAR(backbone, presets.arxiv2505())
    assert round(count(model) / 1e6) == millions


@pytest.mark.parametrize("size, percent", [("B", 4.6), ("L", 2.7), ("XL", 1.9), ("XXL", 1.5)])
def test_iclr2026_added_share(size, percent):
    model = TensorAR(of_size(size), presets.iclr2026())
    added = count(model.codec) / count(model.backbone) * 100
    assert 0.8 * percent < added <= percent


@pytest.mark.parametrize(
    "stem, size, cond, grid",
    [
        ("c2i_B_256", "B", "class", (16, 16)),
        ("c2i_3B_384", "3B", "class", (24, 24)),
        ("t2i_XL_stage2_512", "XL", "text", (32, 32)),
    ],
)
def test_published_files_need_no_config(stem, size, cond, grid):
    config = LlamaGen.infer_config(of_size(size, cond).gpt.state_dict(), stem, None)
    backbone = on_meta(LlamaGen, config)
    assert (config.cond, config.grid, config.n_head) == (cond, grid, SIZES[size]["n_head"])
    assert count(backbone) == count(of_size(size, cond))


def test_a_renamed_file_needs_its_grid():
    weights = of_size("B").gpt.state_dict()
    with pytest.raises(
        ValueError, match=r"'mine'.*grid is not in the weights.*config=.*height, width"
    ):
        LlamaGen.infer_config(weights, "mine", None)
    assert LlamaGen.infer_config(weights, "mine", (24, 24)).grid == (24, 24)

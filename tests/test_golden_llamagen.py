"""LlamaGen's GPT against outputs of the official implementation, through our sampler and loss."""

import pytest
import torch
from helpers import (
    base_loss,
    cached,
    check_uint8_rule,
    drawn_by_torch,
    golden_base,
    golden_fixture,
    golden_table,
    teacher_forced,
)

from t2i.models.base import LoadOptions
from t2i.models.blocks import rope_table, rotate
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.sampling import SamplingConfig
from t2i.tensorar.sampler import sample_windows


def config_of(stored: dict) -> LlamaGenConfig:
    return LlamaGenConfig(
        dim=stored["dim"],
        n_layer=stored["n_layer"],
        n_head=stored["n_head"],
        n_kv_head=stored["n_kv_head"],
        grid=tuple(stored["grid"]),
        cond={"c2i": "class", "t2i": "text"}[stored["model_type"]],
        vocab_size=stored["vocab_size"],
        ffn_dim=stored["ffn_hidden_dim"],
        num_classes=stored["num_classes"],
        caption_tokens=stored["cls_token_num"],
        caption_dim=stored["caption_dim"],
        norm_eps=stored["norm_eps"],
        rope_base=stored["rope_base"],
    )


case = golden_fixture("LlamaGen GPT")


@pytest.fixture(scope="module")
def model(case):
    return golden_base(case, LlamaGen, config_of(case.config))


@pytest.fixture(scope="module")
def prepared(case):
    if case.config["model_type"] == "c2i":
        return {"labels": case.input("class_ids")}
    return {
        "features": case.input("caption_features"),
        "mask": case.input("caption_mask").bool(),
    }


@pytest.mark.parametrize("drop", [False, True], ids=["cond", "null"])
def test_teacher_forced_logits(case, model, prepared, drop):
    (logits,) = teacher_forced(model, prepared, case.input("image_codes")[..., None], drop)
    expected = case.expected("tf_logits_null" if drop else "tf_logits_cond")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_loss(case, model, prepared):
    loss = base_loss(model, prepared, case.input("image_codes")[..., None])
    torch.testing.assert_close(loss, case.expected("tf_loss_cond"), atol=1e-4, rtol=0)


def test_cached_logits(case, model, prepared):
    """Prefill and single steps give the official teacher-forced logits, conditional and null."""
    (logits,) = cached(model, prepared, case.input("image_codes")[..., None])
    cond, null = logits.chunk(2)
    torch.testing.assert_close(cond[:, 0], case.expected("step0_logits_cond"), atol=1e-4, rtol=0)
    torch.testing.assert_close(null[:, 0], case.expected("step0_logits_null"), atol=1e-4, rtol=0)
    torch.testing.assert_close(cond, case.expected("tf_logits_cond"), atol=1e-4, rtol=0)
    torch.testing.assert_close(null, case.expected("tf_logits_null"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("run", ["cfg", "cfg1", "cfg_interval"])
def test_greedy_ids(case, model, prepared, run):
    expected = case.expected(f"greedy_ids_{run}")
    config = SamplingConfig(
        temperature=0.0,
        cfg_scale=1.0 if run == "cfg1" else case.config["cfg_scale"],
        cfg_interval=case.config["cfg_interval"] if run == "cfg_interval" else -1,
    )
    keys = torch.zeros(len(expected), dtype=torch.long)
    windows = sample_windows(model, prepared, keys, config)
    assert torch.equal(model.windows.final_codes(windows)[..., 0], expected)


def test_sampled_ids(case, model, prepared):
    """Driven by torch's generator in the official order (one multinomial over the batch per token),
    sampling gives the official codes.
    """
    expected, settings = case.expected("sampled_ids"), dict(case.config["sampling_example"])
    torch.manual_seed(settings.pop("seed"))
    config = SamplingConfig(**settings)
    drawn = drawn_by_torch(model, prepared, config, expected.shape[1])
    assert torch.equal(drawn[..., 0], expected)


def test_raw_layout_is_the_nested_one(case, model):
    """A file of bare weights loads the same model as one that nests them."""
    if "checkpoint_file_raw_layout" not in case.config:
        pytest.skip("the case has one layout only")
    path = case.folder / case.config["checkpoint_file_raw_layout"]
    raw = LlamaGen.load(path, LoadOptions(config_of(case.config))).state_dict()
    nested = model.backbone.state_dict()
    assert raw.keys() == nested.keys()
    assert all(torch.equal(raw[k], nested[k]) for k in nested)


def test_rope_table_and_rotation():
    for case in golden_table("llamagen_rope2d.json")["cases"]:
        config = LlamaGenConfig(
            dim=case["head_dim"],
            n_layer=1,
            n_head=1,
            grid=(case["grid"], case["grid"]),
            cond="text",
            caption_tokens=case["prefix"],
            rope_base=case["base"],
        )
        table = rope_table(config)
        torch.testing.assert_close(table, torch.tensor(case["table_cos_sin"]), atol=1e-6, rtol=0)
        turned = rotate(torch.tensor(case["apply_input"])[None, :, None], table)[0, :, 0]
        torch.testing.assert_close(turned, torch.tensor(case["apply_output"]), atol=1e-5, rtol=0)


def test_uint8_rule():
    check_uint8_rule(
        LlamaGen(LlamaGenConfig(dim=8, n_layer=1, n_head=1, grid=(1, 1), vocab_size=4))
    )

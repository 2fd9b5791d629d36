"""LlamaGen's GPT against outputs of the official implementation, through our sampler and loss."""

import pytest
import torch
from helpers import golden_cases, golden_table

from t2i import presets
from t2i.backbones.base import SamplingConfig
from t2i.backbones.llama import rope_table, rotate
from t2i.backbones.llamagen import LlamaGen, LlamaGenConfig, load
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import (
    filter_logits,
    prefill,
    sample_windows,
    step,
    window_logits,
)


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


@pytest.fixture(scope="module", params=golden_cases("LlamaGen GPT"))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    backbone = load(case.folder / case.config["checkpoint_file"], config=config_of(case.config))
    return TensorAR(backbone, presets.base()).eval()


@pytest.fixture(scope="module")
def prepared(case):
    if case.config["model_type"] == "c2i":
        return {"labels": case.input("class_ids")}
    return {
        "features": case.input("caption_features"),
        "mask": case.input("caption_mask").bool(),
    }


def teacher_forced(model, prepared, codes_BT, drop):
    """Logits [B, T, V]."""
    codes = codes_BT[..., None]
    condition = model.backbone.encode_condition(prepared, torch.full((len(codes),), drop))
    windows = model.windows.gather(codes)
    with torch.no_grad():
        hidden = model.decode_slots(model.hidden(condition, windows))
        return model.slot_logits(hidden, windows)[0][:, :, 0]


@pytest.mark.parametrize("drop", [False, True], ids=["cond", "null"])
def test_teacher_forced_logits(case, model, prepared, drop):
    logits = teacher_forced(model, prepared, case.input("image_codes"), drop)
    expected = case.expected("tf_logits_null" if drop else "tf_logits_cond")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_loss(case, model, prepared):
    codes = case.input("image_codes")[..., None]
    condition = model.backbone.encode_condition(prepared)
    loss = model(codes, condition, model.windows.gather(codes)).means()
    torch.testing.assert_close(loss, case.expected("tf_loss_cond"), atol=1e-4, rtol=0)


def test_cached_logits(case, model, prepared):
    """Prefill and single steps give the official teacher-forced logits of both halves."""
    codes = case.input("image_codes")
    h, state = prefill(model, prepared, SamplingConfig(cfg_scale=2.0))
    outputs = [h]
    for t in range(codes.shape[1] - 1):
        outputs.append(step(model, codes[:, t, None, None], t, state))
    logits = model.backbone.next_logits(torch.stack(outputs, 1), codes[:0]).detach()
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
    """With torch's own generator in the official order: one multinomial over the batch per token."""
    expected, settings = case.expected("sampled_ids"), dict(case.config["sampling_example"])
    torch.manual_seed(settings.pop("seed"))
    config = SamplingConfig(**settings)
    h, state = prefill(model, prepared, config)
    drawn = []
    for t in range(expected.shape[1]):
        earlier = expected[:, :1, None][..., :0]
        logits = window_logits(model, model.decode_slots(h), earlier, t, state, config)[:, 0]
        drawn.append(torch.multinomial(filter_logits(logits, config).softmax(-1), 1))
        if t + 1 < expected.shape[1]:
            h = step(model, drawn[-1][..., None], t, state)
    assert torch.equal(torch.cat(drawn, dim=1), expected)


def test_raw_layout_is_the_nested_one(case, model):
    if "checkpoint_file_raw_layout" not in case.config:
        pytest.skip("one layout only")
    path = case.folder / case.config["checkpoint_file_raw_layout"]
    raw = load(path, config=config_of(case.config)).state_dict()
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
    """Bytes of given decoder values; a few lie on a rounding edge, where one level is allowed."""
    table = golden_table("uint8_rules.json")
    x = torch.tensor(table["x"])

    class Decoder:
        def decode(self, codes):
            return x.view(1, 1, 1, -1).expand(1, 3, 1, -1)

    backbone = LlamaGen(LlamaGenConfig(dim=8, n_layer=1, n_head=1, grid=(1, 1), vocab_size=4))
    backbone.frozen.tokenizer = Decoder()
    pixels = backbone.decode_images(torch.zeros(1, 1, 1, dtype=torch.long))[0, 0].int()
    off = pixels - torch.tensor(table["llamagen"])[:, None]
    assert off.abs().max() <= 1 and (off == 0).float().mean() > 0.95

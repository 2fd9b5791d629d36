"""RAR beyond the golden cases: published sizes and files, damaged files, bf16, adapters, dropout,
and training from scratch.
"""

import math

import pytest
import torch
from helpers import count, on_meta, tiny_codes, tiny_prepared, tiny_rar

import t2i
from t2i.files import write_json
from t2i.lora import _adapted_layers, add_lora
from t2i.models.base import LoadOptions
from t2i.models.rar.rar_model import RAR, SIZES, RARConfig
from t2i.models.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.tuning import LoRAConfig

COUNTS = {"B": 260_923_648, "L": 461_668_352, "XL": 955_425_024, "XXL": 1_498_520_704}
GUIDANCE = {  # the reference's scales at steps 0, 64, 128, 192, 255 of 256, to two decimals
    "B": [1.00, 1.02, 1.80, 7.40, 16.00],
    "L": [1.00, 1.04, 2.09, 7.96, 15.50],
    "XL": [1.00, 1.23, 2.64, 5.29, 6.90],
    "XXL": [1.00, 1.60, 3.79, 6.63, 8.00],
}
BF16_LOGITS = 0.02
"""Bound on bf16 logits' root mean square error, in standard deviations of the fp32 ones."""


def of_size(size: str) -> RAR:
    return on_meta(RAR, RARConfig(**SIZES[size]))


# -- published sizes and settings -----------------------------------------------------------------


@pytest.mark.parametrize("size", COUNTS)
def test_sizes(size):
    backbone = of_size(size)
    assert count(backbone) == COUNTS[size]
    assert RAR.infer_config(backbone.official_state_dict(), "", None) == backbone.config


def test_arxiv2505_total():
    backbone = of_size("B")
    backbone.code_vectors = tuple  # a meta model has no tokenizer
    assert len(backbone.official_state_dict()) == 441
    assert round(count(TensorAR(backbone, presets.arxiv2505())) / 1e6) == 289


def test_tokenizer_size():
    tokenizer = on_meta(MaskGITVQGAN, MaskGITConfig())
    assert count(tokenizer) == 54_515_587 and len(tokenizer.state_dict()) == 168
    assert tokenizer.downsample == 16 and tokenizer.codebook_size == 1024
    assert MaskGITConfig.from_state_dict(tokenizer.state_dict()) == MaskGITConfig()


@pytest.mark.parametrize("size", GUIDANCE)
def test_sampling_presets(size):
    backbone = of_size(size)
    sampling = backbone.spec.sampling
    scales = [backbone.guidance(sampling, t, 256) for t in (0, 64, 128, 192, 255)]
    assert scales == pytest.approx(GUIDANCE[size], abs=0.01)
    assert sampling.temperature == (1.0 if size == "B" else 1.02)
    assert sampling.top_k == 0 and sampling.top_p == 1


def test_an_unpublished_shape_samples_with_the_demos_guidance():
    backbone = tiny_rar()
    assert [backbone.guidance(backbone.spec.sampling, t, 16) for t in (0, 15)] == [4.0] * 2


def test_a_negative_guidance_power_is_refused():
    with pytest.raises(ValueError, match="cfg_power=-1"):
        SamplingConfig(cfg_power=-1.0)


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A backbone folder with official files, as `load_backbone` takes it."""
    backbone = tiny_rar()
    torch.save(backbone.official_state_dict(), tmp_path / "rar.bin")
    torch.save(backbone.tokenizer.state_dict(), tmp_path / "vq.bin")
    content = {"family": "rar", "weights": "rar.bin", "tokenizer": "vq.bin"}
    write_json(tmp_path / "config.json", {**content, "config": vars(backbone.config)})
    return tmp_path


def test_a_backbone_folder_and_a_checkpoint_of_it_load(folder, tmp_path):
    backbone = t2i.load_backbone("rar", folder)
    assert backbone.config == tiny_rar().config
    model = t2i.attach(backbone, presets.arxiv2505(k=3))
    model.sampling = SamplingConfig(cfg_scale=3.0, cfg_power=1.5)
    with torch.no_grad():
        backbone.gpt.lm_head.bias += 1.0
    t2i.save_pretrained(model, tmp_path / "saved", tuning="full")
    again = t2i.from_pretrained(tmp_path / "saved")
    assert again.sampling == model.sampling
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())
    one, same = (t2i.generate(m, [3], seed=5, progress=False)[0] for m in (model, again))
    assert one.size == (8, 8) and one.tobytes() == same.tobytes()


def test_every_key_that_does_not_fit_is_named(tmp_path):
    backbone = tiny_rar()
    weights = dict(backbone.official_state_dict())
    del weights["cls_token"], weights["blocks.1.attn.q_norm.bias"]
    weights["surprise"] = torch.zeros(2, 2)
    weights["pos_embed"] = torch.zeros(1, 7, 32)
    torch.save(weights, tmp_path / "bad.bin")
    with pytest.raises(ValueError) as caught:
        RAR.load(tmp_path / "bad.bin")
    message = str(caught.value)
    assert "missing (2): cls_token, blocks.1.attn.q_norm.bias" in message
    assert "unexpected (1): surprise" in message
    assert "pos_embed (file (1, 7, 32), model (1, 1040, 32))" in message

    rows = dict(backbone.tokenizer.state_dict())
    rows["encoder.mid.0.conv1.bias"] = rows.pop("decoder.up.1.upsample_conv.bias")
    torch.save(rows, tmp_path / "vq.bin")
    with pytest.raises(ValueError) as caught:
        MaskGITVQGAN.load(tmp_path / "vq.bin")
    assert "missing (1): decoder.up.1.upsample_conv.bias" in str(caught.value)
    assert "unexpected (1): encoder.mid.0.conv1.bias" in str(caught.value)


def test_files_of_other_models_and_other_grids_are_refused(folder):
    with pytest.raises(ValueError, match=r"vq\.bin: not a RAR generator.*lm_head\.weight"):
        RAR.load(folder / "vq.bin")
    with pytest.raises(ValueError, match=r"rar\.bin: not a MaskGIT VQGAN.*encoder\.conv_in"):
        MaskGITVQGAN.load(folder / "rar.bin")
    with pytest.raises(
        ValueError, match=r"16 image tokens.*grid of 3 x 5; pass config=.height, width"
    ):
        RAR.load(folder / "rar.bin", LoadOptions(grid=(3, 5)))
    assert RAR.load(folder / "rar.bin", LoadOptions(grid=(2, 8))).spec.grid == (2, 8)


# -- bf16 -----------------------------------------------------------------------------------------


def test_bf16(folder):
    """Teacher-forced logits stay near those of fp32, and a TensorAR model samples with guidance."""
    models = [
        t2i.attach(RAR.load(folder / "rar.bin", LoadOptions(dtype=dtype)), presets.iclr2026())
        for dtype in (torch.float32, torch.bfloat16)
    ]
    codes = tiny_codes(models[0].backbone, 4, 16)
    logits = []
    for model in models:
        prepared = tiny_prepared(model.backbone, 4)
        windows = model.windows.gather(codes)
        with torch.no_grad():
            hidden = model.hidden(model.backbone.encode_condition(prepared), windows)
            logits.append(model.backbone.next_logits(hidden, codes[..., :0]))
    assert hidden.dtype == torch.bfloat16 and logits[1].dtype == torch.float32
    error = (logits[1] - logits[0]).pow(2).mean().sqrt() / logits[0].std()
    assert 0 < error < BF16_LOGITS
    keys = make_keys(0, torch.arange(4))
    config = SamplingConfig(cfg_scale=16.0, cfg_power=2.75, temperature=1.02)
    windows = sample_windows(models[1], prepared, keys, config)
    assert windows.shape == (4, 16, 4, 1) and windows.unique().numel() > 10


# -- training -------------------------------------------------------------------------------------


def test_lora_adapts_no_adaln_layers():
    backbone = tiny_rar()
    add_lora(backbone, LoRAConfig(rank=2))
    adapted = [n for n, p in backbone.named_parameters() if p.requires_grad and "lora_A" in n]
    assert len(adapted) == 4 * backbone.config.n_layer
    assert not any("adaLN" in name for name in adapted)


def test_every_setting_of_lora_is_used():
    weights = []
    for seed in (0, 0, 1):
        add_lora(backbone := tiny_rar(), LoRAConfig(2, alpha=6.0, dropout=0.3), seed=seed)
        (_, layer), *_ = _adapted_layers(backbone)
        weights.append(layer.lora_A["default"].weight)
        assert len(weights[-1]) == 2 and layer.scaling["default"] == 3.0
        assert layer.lora_dropout["default"].p == 0.3
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])


def loss_of(model, codes, drop=None):
    condition = model.backbone.encode_condition(tiny_prepared(model.backbone, len(codes)), drop)
    return model(codes, condition, model.windows.gather(codes)).loss


def test_every_parameter_trains_and_recomputation_changes_nothing():
    model = TensorAR(tiny_rar(), presets.base())
    codes = tiny_codes(model.backbone, 3, 16)
    drop = torch.tensor([False, False, True])
    gradients, passes = [], []
    model.backbone.gpt.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for recompute in (False, True):
        model.backbone.gradient_checkpointing = recompute
        model.zero_grad()
        passes.clear()
        loss_of(model, codes, drop).backward()
        assert len(passes) == 1 + recompute
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    still = {n for n, g in gradients[0].items() if not g.abs().sum() > 0}
    # A bias common to all keys has no effect: the softmax sees only differences between them.
    assert all(n.endswith("k_norm.bias") for n in still)
    rows = {  # used in each table: 2 prefix entries and 15 tokens are fed, 16 tokens are predicted
        "pos_embed": range(17),
        "timesteps_embeddings": range(17),
        "target_aware_pos_embed": range(2, 18),
    }
    for name, expected in rows.items():
        used = gradients[0][f"backbone.gpt.{name}"].abs().sum((0, 2)).nonzero().flatten()
        assert used.tolist() == list(expected)


@pytest.mark.parametrize("place", ["inputs", "scores", "projection", "mlp"])
def test_dropout_acts_in_training_only(place):
    """Dropout at each place alone changes the loss in training and not in evaluation; the MLP has
    two places.
    """
    model = TensorAR(tiny_rar(), presets.base())
    codes = tiny_codes(model.backbone, 3, 16)
    assert RARConfig(**SIZES["B"]).dropout == RARConfig(**SIZES["B"]).attn_dropout == 0.1
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen = []
    for block in model.backbone.gpt.blocks:
        block.attn.attn_dropout = 0.5 if place == "scores" else 0.0
        chosen = {"projection": block.attn, "mlp": block.mlp}.get(place)
        if chosen is not None:
            chosen.dropout.p = 0.5
            chosen.dropout.register_forward_hook(lambda _, __, out: seen.append(out.shape[-1]))
    model.backbone.token_dropout.p = 0.5 if place == "inputs" else 0.0
    with torch.no_grad():
        still = loss_of(model.eval(), codes)
        assert torch.equal(loss_of(model, codes), still)
        seen.clear()
        torch.manual_seed(0)  # with a few seeds the masks change the loss by less
        assert abs(loss_of(model.train(), codes) - still) > 1e-3
    assert seen == {"projection": [32, 32], "mlp": [64, 32] * 2}.get(place, [])


def test_pretraining_from_a_config():
    """`initialize` starts at the uniform distribution; after 100 steps the model has learned one
    image for each class.
    """
    sizes = {"vocab_size": 48, "num_classes": 3, "dropout": 0.0, "attn_dropout": 0.0}
    backbone = RAR(RARConfig(32, 2, 2, 64, grid=(4, 4), **sizes)).train()
    backbone.gpt.initialize(torch.Generator().manual_seed(0))
    assert not any(p.any() for n, p in backbone.named_parameters() if "adaLN" in n)
    model, codes = TensorAR(backbone, presets.base()), tiny_codes(backbone, 3, 16)
    first = loss_of(model, codes).item()
    assert first == pytest.approx(math.log(48), abs=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, codes)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    keys = make_keys(0, torch.arange(3))
    config = SamplingConfig(temperature=0.0, cfg_scale=2.0, cfg_power=1.0)
    windows = sample_windows(model.eval(), tiny_prepared(backbone, 3), keys, config)
    assert torch.equal(model.windows.final_codes(windows), codes)

"""RAR and its tokenizer against the official outputs, through our sampler and loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
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
from t2i.models.rar.rar_model import RAR, RARConfig
from t2i.models.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN
from t2i.sampling import SamplingConfig
from t2i.tensorar.sampler import sample_windows

LOGITS = {"atol": 1e-4, "rtol": 0}
IMAGES = {"atol": 5e-4, "rtol": 0}


def sampling_of(scale: float, power: float, **settings) -> SamplingConfig:
    """Our settings for the reference's: it switches guidance off by scale 0, we do by scale 1."""
    return SamplingConfig(cfg_scale=scale or 1.0, cfg_power=power if scale else 0.0, **settings)


case = golden_fixture("RAR generator")


@pytest.fixture(scope="module")
def config(case):
    stored = case.config
    return RARConfig(
        dim=stored["hidden_size"],
        n_layer=stored["num_hidden_layers"],
        n_head=stored["num_attention_heads"],
        mlp_dim=stored["intermediate_size"],
        grid=tuple(stored["grid"]),
        vocab_size=stored["codebook_size"],
        num_classes=stored["condition_num_classes"],
        dropout=stored["dropout"],
        attn_dropout=stored["attn_drop"],
    )


@pytest.fixture(scope="module")
def model(case, config):
    return golden_base(case, RAR, config)


@pytest.fixture(scope="module")
def prepared(case):
    return {"labels": case.input("class_ids")}


@pytest.fixture(scope="module")
def tokenizer(case):
    return MaskGITVQGAN.load(case.folder / case.config["tokenizer"]["checkpoint_file"])


@pytest.fixture(scope="module")
def painter(case, tokenizer):
    """A generator around the tokenizer, for the paths that go through a backbone."""
    height, width = (side // tokenizer.downsample for side in case.input("image").shape[-2:])
    sizes = {"vocab_size": tokenizer.codebook_size, "num_classes": 1}
    backbone = RAR(RARConfig(dim=8, n_layer=1, n_head=1, mlp_dim=8, grid=(height, width), **sizes))
    backbone.frozen.tokenizer = tokenizer
    return backbone


# -- the generator --------------------------------------------------------------------------------


def test_shape_is_read_off_the_weights(case, config, model):
    square = config.grid[0] == config.grid[1]
    path = case.folder / case.config["checkpoint_file"]
    loaded = RAR.load(path, LoadOptions(grid=None if square else config.grid))
    read = ("dim", "n_layer", "n_head", "mlp_dim", "grid", "vocab_size", "num_classes")
    assert all(getattr(loaded.config, name) == getattr(config, name) for name in read)
    layout = case.config["token_id_layout"]
    assert config.first_class_id == layout["first_class"]
    assert config.null_id == layout["none_condition"] == layout["table_rows"] - 1


def test_condition_ids(case, model, prepared):
    ids = model.backbone.condition_ids(prepared["labels"])
    assert torch.equal(ids, case.expected("condition_ids"))
    everyone = torch.ones(len(ids), dtype=torch.bool)
    null = model.backbone.condition_ids(prepared["labels"], everyone)
    assert torch.equal(null, case.expected("null_condition_ids"))


@pytest.mark.parametrize("drop", [False, True], ids=["cond", "null"])
def test_teacher_forced_logits(case, model, prepared, drop):
    (logits,) = teacher_forced(model, prepared, case.input("image_codes")[..., None], drop)
    expected = case.expected("tf_logits_null" if drop else "tf_logits_cond")
    torch.testing.assert_close(logits, expected, **LOGITS)


def test_last_position(case, model, prepared):
    """Logits are equal at all positions, including the one after the last token: it predicts
    nothing, but the reference feeds that token too.
    """
    expected, backbone = case.expected("tf_logits_cond_all_positions"), model.backbone
    condition = backbone.encode_condition(prepared)
    x = torch.cat(
        [condition.prefix, backbone.embed_tokens(case.input("image_codes")[..., None])], dim=1
    )
    with torch.no_grad():
        h = backbone.trunk(x, torch.arange(x.shape[1]), condition)
        logits = backbone.next_logits(h[:, 1:], case.input("image_codes")[:, :0])
    torch.testing.assert_close(logits, expected, **LOGITS)


def test_permuted_orders(case, model, prepared):
    """Official logits for a permuted order equal ours with the rows of image positions and targets
    permuted; neither the timesteps nor the prefix are.
    """
    orders, codes = case.input("orders"), case.input("image_codes")
    expected, labels = case.expected("tf_logits_permuted"), case.expected("labels_permuted")
    shuffled = codes.gather(1, orders)
    assert torch.equal(shuffled, labels)
    for b, order in enumerate(orders):
        other, gpt = copy.deepcopy(model), model.backbone.gpt
        with torch.no_grad():
            for name in ("pos_embed", "target_aware_pos_embed"):
                table, rows = getattr(gpt, name), slice(2, 2 + len(order))
                getattr(other.backbone.gpt, name)[:, rows] = table[:, rows][:, order]
        one = {"labels": prepared["labels"][b : b + 1]}
        (logits,) = teacher_forced(other, one, shuffled[b : b + 1, :, None])
        torch.testing.assert_close(logits[0], expected[b], **LOGITS)


def test_epsilon(case, model):
    """The layer norms have the official epsilon. It hardly changes the logits, so it is tested on
    inputs whose variance is as small as epsilon.
    """
    eps, gpt = case.config["layer_norm_eps"], model.backbone.gpt
    assert {m.eps for m in gpt.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}
    x = eps**0.5 * torch.randn(1, 4, gpt.lm_head.in_features)
    c = torch.randn(x.shape)
    scale, shift = gpt.adaln_before_head.adaLN_modulation(c).chunk(2, dim=-1)
    expected = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
    torch.testing.assert_close(gpt.adaln_before_head(x, c), expected, **LOGITS)


def test_loss(case, model, prepared):
    loss = base_loss(model, prepared, case.input("image_codes")[..., None])
    torch.testing.assert_close(loss, case.expected("loss_cond"), **LOGITS)


def test_cached_logits(case, model, prepared):
    """Prefill and single steps give the official teacher-forced logits, conditional and null."""
    (logits,) = cached(model, prepared, case.input("image_codes")[..., None])
    cond, null = logits.chunk(2)
    torch.testing.assert_close(cond, case.expected("tf_logits_cond"), **LOGITS)
    torch.testing.assert_close(null, case.expected("tf_logits_null"), **LOGITS)


@pytest.mark.parametrize("run", ["pow", "const", "nocfg"])
def test_greedy_ids(case, model, prepared, run):
    expected = case.expected(f"greedy_ids_{run}")
    config = sampling_of(*case.config["guidance"][run], temperature=0.0)
    keys = torch.zeros(len(expected), dtype=torch.long)
    windows = sample_windows(model, prepared, keys, config)
    assert torch.equal(model.windows.final_codes(windows)[..., 0], expected)


@pytest.mark.parametrize("run", ["pow", "const"])
def test_guidance_of_the_runs(case, model, run):
    expected = case.expected(f"cfg_schedule_{run}")
    config, steps = sampling_of(*case.config["guidance"][run]), len(expected)
    scales = [model.backbone.guidance(config, t, steps) for t in range(steps)]
    torch.testing.assert_close(torch.tensor(scales), expected, atol=1e-6, rtol=1e-6)


def test_guidance_table(model):
    for run in golden_table("rar_cfg.json")["presets"]:
        config = sampling_of(run["guidance_scale"], run["guidance_scale_pow"])
        steps = run["image_seq_len"]
        scales = [model.backbone.guidance(config, t, steps) for t in range(steps)]
        expected = torch.tensor(run["scale"])
        torch.testing.assert_close(torch.tensor(scales), expected, atol=1e-6, rtol=1e-6)


def test_sampled_ids(case, model, prepared):
    """Driven by torch's generator in the official order (a condition-drop mask, then one
    multinomial over the batch per token), sampling gives the official codes.
    """
    expected, settings = case.expected("sampled_ids"), case.config["sampling_example"]
    config = sampling_of(
        settings["guidance_scale"],
        settings["guidance_scale_pow"],
        temperature=settings["randomize_temperature"],
    )
    torch.manual_seed(settings["seed"])
    torch.rand(len(expected))
    drawn = drawn_by_torch(model, prepared, config, expected.shape[1])
    assert torch.equal(drawn[..., 0], expected)


# -- the tokenizer --------------------------------------------------------------------------------


def test_tokenizer_shape_is_read_off_the_weights(case, tokenizer):
    stored = case.config["tokenizer"]
    assert tokenizer.config == MaskGITConfig(
        channels=stored["hidden_channels"],
        multipliers=tuple(stored["channel_mult"]),
        res_blocks=stored["num_res_blocks"],
        codebook_size=case.config["codebook_size"],
        codebook_dim=stored["embedding_dim"],
    )
    assert tokenizer.downsample == stored["downsample"]


def test_encode_and_decode(case, tokenizer, painter):
    pixels = 2 * case.input("image") - 1
    latents = tokenizer.latents(pixels)
    torch.testing.assert_close(latents, case.expected("image_prequant_latent"), **LOGITS)
    codes = painter.encode_images(pixels)
    assert torch.equal(codes[..., 0], case.expected("image_codes_encoded"))
    unit = (tokenizer.decode(codes[..., 0].unflatten(1, painter.config.grid)) + 1) / 2
    torch.testing.assert_close(unit, case.expected("image_decoded_unclamped"), **IMAGES)
    torch.testing.assert_close(unit.clamp(0, 1), case.expected("image_decoded_clamped"), **IMAGES)


def test_decode_free_codes(case, tokenizer):
    codes = case.input("image_codes").unflatten(1, tuple(case.config["grid"]))
    unit = ((tokenizer.decode(codes) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(unit, case.expected("codes_decoded"), **IMAGES)


def test_uint8_images(case, painter):
    images = painter.decode_images(case.expected("image_codes_encoded")[..., None])
    off = images.int() - case.expected("image_decoded_uint8").int()
    assert images.dtype == torch.uint8
    # Rounding instead of truncating would differ on half of the pixels, so only few may differ.
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 0.01


def test_uint8_rule():
    config = RARConfig(dim=8, n_layer=1, n_head=1, mlp_dim=8, grid=(1, 1), vocab_size=4)
    check_uint8_rule(RAR(config))


def test_codebook_noise_reads_the_plain_rows(case, tokenizer, painter):
    """Codebook noise mixes the codebook's rows as they are stored, not normalized."""
    rows = tokenizer.state_dict()["quantize.embedding.weight"]
    assert torch.equal(painter.code_vectors()[0], rows)
    assert not torch.allclose(rows, F.normalize(rows, dim=-1))

"""Open-MAGVIT2: published sizes, weight files, checkpoints, settings per sub-token and training."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    count,
    on_meta,
    open_gates,
    randomize,
    tiny_codes,
    tiny_lfq,
    tiny_open_magvit2,
    tiny_prepared,
    tiny_vq,
)

import t2i
from t2i.checkpoint import from_pretrained, save_pretrained
from t2i.files import file_sha256
from t2i.loading import tokenizer_hash
from t2i.lora import add_lora
from t2i.models.base import LoadOptions
from t2i.models.open_magvit2.open_magvit2_model import (
    SIZES,
    ARCheckpoint,
    OpenMAGVIT2,
    OpenMAGVIT2Config,
)
from t2i.models.tokenizers.lfq import LFQConfig, LFQTokenizer
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import guidance_table, sample_windows
from t2i.tuning import LoRAConfig

PUBLISHED = {
    "B": ((1.9, 2.0), 1.0),
    "L": ((1.9, 1.9), (1.1, 1.0)),
    "XL": ((1.75, 1.85), (1.1, 1.0)),
}
"""Guidance and temperature by sub-token behind the published FID (SEED-Voken `sample_gpu.sh`)."""
COUNTS = {"B": 343_570_432, "L": 804_362_240, "XL": 1_486_679_040}


def of_size(size: str) -> OpenMAGVIT2:
    return on_meta(OpenMAGVIT2, OpenMAGVIT2Config(**SIZES[size]))


# -- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    backbone = of_size(size)
    assert count(backbone) == COUNTS[size]
    scale, temperature = PUBLISHED[size]
    assert backbone.spec.sampling == SamplingConfig(cfg_scale=scale, temperature=temperature)
    assert OpenMAGVIT2.infer_config(backbone.official_state_dict(), "", None) == replace(
        backbone.config, ffn_dim=backbone.config.hidden_dim
    )


def test_tokenizer_size():
    tokenizer = on_meta(LFQTokenizer, LFQConfig())
    encoder, decoder = tokenizer.encoder.state_dict(), tokenizer.decoder.state_dict()
    assert (count(tokenizer.encoder), len(encoder)) == (49_751_442, 159)
    assert (count(tokenizer.decoder), len(decoder)) == (65_376_387, 180)
    assert LFQConfig.from_state_dict(tokenizer.state_dict()) == LFQConfig()
    assert tokenizer.downsample == 16 and tokenizer.codebook_size == 2**18


def test_official_names():
    """Size B has the names and shapes of the authors' files."""
    state_dict = of_size("B").official_state_dict()
    expected = {
        "pre_emb.weight": (64, 1024),
        "post_emb.weight": (4096, 1024),
        "class_emb.embedding_table.weight": (1001, 1024),
        "spatial_blocks.23.attention.wqkv.weight": (3072, 1024),
        "factorized_blocks.1.feed_forward.w1.weight": (2816, 1024),
        "head.0.weight": (64, 1024),
        "head.1.weight": (4096, 1024),
        "norm.weight": (1024,),
    }
    assert {k: tuple(state_dict[f"transformer.{k}"].shape) for k in expected} == expected
    assert len(state_dict) == 26 * 7 + 6


@pytest.mark.parametrize("preset, millions", [("iclr2026", 352.0), ("arxiv2505", 393.9)])
def test_sizes_with_tensorar(preset, millions):
    """The papers' tables say 352M and 393M for size B (the second without rounding up)."""
    model = TensorAR(of_size("B"), presets.method(preset))
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.1)


def test_one_sub_token_alone_may_be_guided():
    model = TensorAR(tiny_open_magvit2(), presets.base())
    table = guidance_table(model, SamplingConfig(cfg_scale=(1.0, 2.0)))
    assert torch.equal(table, torch.tensor([1.0, 2.0]).expand(16, 2))


def test_own_drafts_have_independent_sub_tokens():
    model = TensorAR(tiny_open_magvit2(), presets.iclr2026()).eval()
    with torch.no_grad():
        for weight in model.backbone.transformer.head.parameters():
            weight.zero_()  # all codes are equally likely
    codes = model.draw(torch.zeros(500, 32), make_keys(0, torch.arange(500)))
    assert codes.T.float().corrcoef()[0, 1].abs() < 0.15


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content():
    """The content of an official file for the tiny shape."""
    return ARCheckpoint(tiny_open_magvit2()).state_dict()


CONFIG = tiny_open_magvit2().config


def write(path, state_dict):
    torch.save({"state_dict": state_dict}, path)
    return path


def test_generator_and_tokenizer_are_loaded_from_one_file(tmp_path, content):
    loaded = OpenMAGVIT2.load(
        write(tmp_path / "a.ckpt", content), LoadOptions(CONFIG, dtype=torch.bfloat16)
    )
    generator, tokenizer = loaded.state_dict(), loaded.tokenizer.state_dict()
    assert all(torch.equal(v, content[k].bfloat16()) for k, v in generator.items())
    assert all(torch.equal(v, content[f"first_stage_model.{k}"]) for k, v in tokenizer.items())
    assert len(generator) + len(tokenizer) == len(content)
    assert next(loaded.tokenizer.parameters()).dtype == torch.float32, "codes need fp32"
    assert not any(p.requires_grad for p in loaded.tokenizer.parameters())


def test_every_key_that_does_not_fit_is_named(tmp_path, content):
    bad = dict(content)
    del bad["transformer.norm.weight"], bad["first_stage_model.decoder.conv_out.bias"]
    bad["transformer.head.2.weight"] = bad["first_stage_model.quantize.mask"] = torch.zeros(1)
    bad["surprise"] = torch.zeros(1)
    bad["transformer.head.1.weight"] = torch.zeros(7, 32)
    with pytest.raises(ValueError) as caught:
        OpenMAGVIT2.load(write(tmp_path / "bad.ckpt", bad), LoadOptions(CONFIG))
    lines = str(caught.value).splitlines()
    assert "bad.ckpt does not fit ARCheckpoint" in lines[0]
    assert lines[1] == (
        "  missing (2): transformer.norm.weight, first_stage_model.decoder.conv_out.bias"
    )
    assert lines[2] == (
        "  unexpected (3): transformer.head.2.weight, first_stage_model.quantize.mask, surprise"
    )
    assert "mis-shaped (1): transformer.head.1.weight (file (7, 32), model (16, 32))" in lines[3]


def with_averages(tokenizer) -> dict:
    """A tokenizer's weights with their moving averages, each greater by 1 here."""
    raw = tokenizer.state_dict()
    averaged = {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in raw.items()}
    counters = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(3)}
    return {**raw, **counters, **averaged}


def test_averaged_weights(tmp_path):
    content = with_averages(tiny_lfq())
    path = write(tmp_path / "tokenizer.ckpt", content)
    for ema in (False, True):
        weight = LFQTokenizer.load(path, ema=ema).decoder.conv_in.weight
        assert torch.equal(weight, content["decoder.conv_in.weight"] + ema)
    plain = write(tmp_path / "plain.ckpt", tiny_lfq().state_dict())
    with pytest.raises(ValueError, match=r"plain\.ckpt has no averaged weights"):
        LFQTokenizer.load(plain, ema=True)


@pytest.mark.parametrize("ema", [False, True])
def test_discriminator_weights_in_a_tokenizer_file_are_ignored(tmp_path, ema):
    """Training saves them with the tokenizer; published files do not contain them."""
    content = with_averages(tiny_lfq())
    loss = {
        "loss.discriminator.0.weight": torch.ones(1),
        "model_ema.lossdiscriminator0weight": torch.ones(1),
    }
    path = write(tmp_path / "tokenizer.ckpt", content | loss)
    weight = LFQTokenizer.load(path, ema=ema).decoder.conv_in.weight
    assert torch.equal(weight, content["decoder.conv_in.weight"] + ema)


@pytest.mark.parametrize("ema", [False, True])
def test_every_weight_of_a_tokenizer_file_must_fit(tmp_path, ema):
    """Raw and averaged weights are both checked, whichever are used."""
    for part, dot in (("model_ema.", ""), ("", ".")):
        bad = with_averages(tiny_lfq())
        del bad[f"{part}decoder{dot}conv_in{dot}bias"]
        bad[f"{part}decoder{dot}conv_in{dot}gain"] = torch.zeros(1)
        bad[f"{part}encoder{dot}norm_out{dot}bias"] = torch.zeros(7)
        with pytest.raises(ValueError) as caught:
            LFQTokenizer.load(write(tmp_path / "bad.ckpt", bad), ema=ema)
        lines = str(caught.value).splitlines()
        assert "bad.ckpt" in lines[0] and ("averaged" in lines[0]) == bool(part)
        assert "missing (1): decoder.conv_in.bias" in lines[1]
        assert f"unexpected (1): {part}decoder{dot}conv_in{dot}gain" in lines[2]
        assert "mis-shaped (1): encoder.norm_out.bias" in lines[3]


def test_wrong_files_are_refused(tmp_path, content):
    path = write(tmp_path / "AR.ckpt", content)
    with pytest.raises(
        ValueError, match=r"width 32 with 2 layers is not a published size.*config="
    ):
        OpenMAGVIT2.load(path)
    vq = write(tmp_path / "vq.pt", tiny_vq().state_dict())
    with pytest.raises(ValueError, match=r"vq\.pt: not an Open-MAGVIT2 .*transformer\.pre_emb"):
        OpenMAGVIT2.load(vq)
    with pytest.raises(ValueError, match=r"vq\.pt: not an LFQ tokenizer.*encoder\.down\.0"):
        LFQTokenizer.load(vq)
    randomize(small := LFQTokenizer(LFQConfig(32, (1, 2), 1, bits=6)))
    other = write(tmp_path / "other.ckpt", small.state_dict())
    with pytest.raises(ValueError, match=r"tokenizer has 64 codes, but the open_magvit2 .* 128"):
        t2i.load_backbone("open_magvit2", path, config=CONFIG, tokenizer=other)


def test_the_tokenizer_comes_with_the_base(tmp_path, content):
    """A fine-tuned checkpoint holds only the generator; its tokenizer comes from the base's file,
    even if that has moved.
    """
    path = write(tmp_path / "AR.ckpt", content)
    backbone = t2i.load_backbone("open_magvit2", path, config=CONFIG)
    assert tokenizer_hash(backbone) == file_sha256(path)
    model = open_gates(TensorAR(backbone, presets.arxiv2505(k=2)).eval())
    with torch.no_grad():
        model.backbone.transformer.head[1].weight += 1
    sampling = SamplingConfig(cfg_scale=(1.5, 2.0), top_k=(0, 9), temperature=0.0)
    save_pretrained(model, tmp_path / "tuned", tuning="full", sampling=sampling)
    (tmp_path / "moved").mkdir()
    path = path.rename(tmp_path / "moved" / "AR.ckpt")
    again = from_pretrained(tmp_path / "tuned", base=path)
    assert again.sampling == sampling
    images = [t2i.generate(m, [1, 7], sampling=sampling, progress=False) for m in (model, again)]
    assert [i.tobytes() for i in images[0]] == [i.tobytes() for i in images[1]]
    with pytest.raises(ValueError, match=r"that are gone: .*AR\.ckpt.*--base\.weights PATH"):
        from_pretrained(tmp_path / "tuned")


def test_a_file_with_only_the_generator_takes_a_separate_tokenizer(tmp_path, content):
    only = {k: v for k, v in content.items() if k.startswith("transformer.")}
    path = write(tmp_path / "gpt.ckpt", only)
    backbone = t2i.load_backbone("open_magvit2", path, config=CONFIG)
    with pytest.raises(ValueError, match="no image tokenizer"):
        backbone.encode_images(torch.zeros(1, 3, 8, 8))
    separate = write(tmp_path / "lfq.ckpt", tiny_lfq(seed=5).state_dict())
    backbone = t2i.load_backbone("open_magvit2", path, config=CONFIG, tokenizer=separate)
    assert torch.equal(
        backbone.tokenizer.decoder.conv_in.weight, tiny_lfq(seed=5).decoder.conv_in.weight
    )
    assert tokenizer_hash(backbone) == file_sha256(separate)


# -- settings per sub-token -----------------------------------------------------------------------


def sample(model, **settings):
    prepared = tiny_prepared(model.backbone, 4)
    return sample_windows(
        model, prepared, make_keys(0, torch.arange(4)), SamplingConfig(**settings)
    )


def test_each_sub_token_has_its_own_settings():
    model = open_gates(TensorAR(tiny_open_magvit2(), presets.iclr2026()).eval())
    both = sample(model, temperature=0.0, cfg_scale=2.0)
    first = {"temperature": (0.0, 1.0), "cfg_scale": 2.0}
    # The first sub-token of the first code does not depend on how the second is drawn.
    assert torch.equal(sample(model, **first)[:, 0, :, 0], both[:, 0, :, 0])
    assert not torch.equal(sample(model, **first)[:, 0, :, 1], both[:, 0, :, 1])
    for name, greedy in (("top_k", 1), ("top_p", 1e-6)):
        settings = {name: (greedy, 0 if name == "top_k" else 1.0), "cfg_scale": 2.0}
        assert torch.equal(sample(model, **settings)[:, 0, :, 0], both[:, 0, :, 0])
    half = sample(model, temperature=0.0, cfg_scale=(2.0, 1.0))
    assert torch.equal(half[:, 0, :, 0], both[:, 0, :, 0])
    assert not torch.equal(half, both)
    other = sample(model, temperature=0.0, cfg_scale=(1.0, 2.0))
    plain = sample(model, temperature=0.0, cfg_scale=1.0)
    assert torch.equal(other[:, 0, :, 0], plain[:, 0, :, 0]) and not torch.equal(other, plain)


def test_settings_per_sub_token_are_checked():
    for name, bad in (
        ("cfg_scale", (2.0, 0.5)),
        ("temperature", (-1.0, 1.0)),
        ("top_k", (1, -1)),
        ("top_p", (0.5, 1.5)),
        ("cfg_scale", ()),
        ("cfg_scale", (2.0, float("inf"))),
        ("temperature", (float("nan"), 1.0)),
    ):
        with pytest.raises(ValueError, match=name):
            SamplingConfig(**{name: bad})
    assert SamplingConfig(top_k=[3, 4]) == SamplingConfig(top_k=(3, 4)), "JSON has no tuples"
    with pytest.raises(ValueError, match=r"one for each of the 2 sub-token\(s\)"):
        sample(TensorAR(tiny_open_magvit2(), presets.base()).eval(), top_k=(1, 2, 3))


# -- training -------------------------------------------------------------------------------------


def loss_of(model) -> torch.Tensor:
    codes = tiny_codes(model.backbone, 2, 16)
    condition = model.backbone.encode_condition(tiny_prepared(model.backbone, 2))
    return model(codes, condition, model.windows.gather(codes)).loss


def test_initialization_for_pretraining():
    """It starts at the uniform distribution over both sub-tokens."""
    backbone = OpenMAGVIT2(CONFIG).eval()
    backbone.transformer.initialize(torch.Generator().manual_seed(0))
    assert loss_of(TensorAR(backbone, presets.base())).item() == pytest.approx(
        torch.tensor([8.0, 16.0]).log().sum().item()
    )
    weight = backbone.transformer.spatial_blocks[0].attention.wqkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for recompute in (False, True):
        model, passes = open_gates(TensorAR(tiny_open_magvit2(), presets.iclr2026()).eval()), []
        model.backbone.gradient_checkpointing = recompute
        block = model.backbone.transformer.spatial_blocks[0]
        block.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        loss_of(model).backward()
        assert len(passes) == 1 + recompute
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    assert all(g.abs().sum() > 0 for n, g in gradients[0].items() if "class_emb" not in n)


def test_lora_reaches_both_transformers():
    backbone = tiny_open_magvit2()
    add_lora(backbone, LoRAConfig(rank=2))
    adapted = {n.split(".lora_A")[0] for n, _ in backbone.named_parameters() if "lora_A" in n}
    layers = ("attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3)))
    assert adapted == {
        f"transformer.{part}_blocks.{i}.{layer}"
        for part in ("spatial", "factorized")
        for i in range(2)
        for layer in layers
    }

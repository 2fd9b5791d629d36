"""Open-MAGVIT2's generator and its tokenizers against outputs of the official implementation,
through our sampler and loss.
"""

import pytest
import torch
from helpers import (
    base_loss,
    cached,
    check_uint8_rule,
    close,
    drawn_by_torch,
    golden_base,
    golden_cases,
    golden_fixture,
    golden_table,
    teacher_forced,
)

from t2i.models.open_magvit2.open_magvit2_model import (
    OpenMAGVIT2,
    OpenMAGVIT2Config,
)
from t2i.models.tokenizers.lfq import LFQConfig, LFQTokenizer, indices, signs
from t2i.sampling import SamplingConfig
from t2i.tensorar.sampler import sample_windows

SUB_TOKENS = ("pre", "post")


def config_of(stored: dict) -> OpenMAGVIT2Config:
    return OpenMAGVIT2Config(
        dim=stored["dim"],
        n_layer=stored["spatial_n_layer"],
        n_intra_layer=stored["factorized_n_layer"],
        n_head=stored["n_head"],
        grid=tuple(stored["grid"]),
        bits=tuple(stored["factorized_bits"]),
        n_kv_head=stored["n_kv_head"],
        ffn_dim=stored["ffn_hidden_dim"],
        num_classes=stored["class_num"],
        norm_eps=stored["norm_eps"],
        rope_base=stored["rope_base"],
    )


def codes_of(read, name: str) -> torch.Tensor:
    """The sub-tokens of `name` side by side, int64 [B, T, 2]."""
    return torch.stack([read(name.format(part)) for part in SUB_TOKENS], dim=-1)


# -- the generator --------------------------------------------------------------------------------


case = golden_fixture("Open-MAGVIT2 AR")


@pytest.fixture(scope="module")
def model(case):
    return golden_base(case, OpenMAGVIT2, config_of(case.config))


@pytest.fixture(scope="module")
def prepared(case):
    return {"labels": case.input("class_ids")}


@pytest.mark.parametrize("drop", [False, True], ids=["cond", "null"])
def test_teacher_forced_logits(case, model, prepared, drop):
    """Logits equal the official ones, whether computed for all sub-tokens at once or one by one."""
    codes = codes_of(case.input, "codes_{}")
    every = teacher_forced(model, prepared, codes, drop)
    condition = model.backbone.encode_condition(prepared, torch.full((len(codes),), drop))
    with torch.no_grad():
        h = model.hidden(condition, model.windows.gather(codes))
        alone = [model.backbone.next_logits(h, codes[..., :s]) for s in range(len(every))]
    for part, logits, one_by_one in zip(SUB_TOKENS, every, alone, strict=True):
        expected = case.expected(f"tf_logits_{part}_{'null' if drop else 'cond'}")
        close(logits, expected, atol=1e-4)
        close(one_by_one, expected, atol=1e-4)


def test_loss(case, model, prepared):
    loss = base_loss(model, prepared, codes_of(case.input, "codes_{}"))
    close(loss, case.expected("loss_pre") + case.expected("loss_post"), atol=1e-4)


def test_cached_logits(case, model, prepared):
    """Prefill and single steps give the official teacher-forced logits, conditional and null."""
    every = cached(model, prepared, codes_of(case.input, "codes_{}"))
    for part, logits in zip(SUB_TOKENS, every, strict=True):
        cond, null = logits.chunk(2)
        close(cond, case.expected(f"tf_logits_{part}_cond"), atol=1e-4)
        close(null, case.expected(f"tf_logits_{part}_null"), atol=1e-4)


@pytest.mark.parametrize("run", ["cfg", "nocfg"])
def test_greedy_codes(case, model, prepared, run):
    expected = codes_of(case.expected, f"greedy_{{}}_{run}")
    scale = tuple(case.config["cfg_scale"]) if run == "cfg" else 1.0
    config = SamplingConfig(temperature=0.0, cfg_scale=scale)
    windows = sample_windows(model, prepared, torch.zeros(len(expected), dtype=torch.long), config)
    assert torch.equal(model.windows.final_codes(windows), expected)


def test_sampled_codes(case, model, prepared):
    """Driven by torch's generator in the official order (for each code one multinomial for `pre`,
    then one for `post`), sampling gives the official codes.
    """
    expected = codes_of(case.expected, "sampled_{}")
    settings = dict(case.config["sampling_example"])
    torch.manual_seed(settings.pop("seed"))
    config = SamplingConfig(**settings)
    drawn = drawn_by_torch(model, prepared, config, expected.shape[1])
    assert torch.equal(drawn, expected)


def test_embedded_tokenizer(case, model):
    stored, backbone = case.config["tokenizer"], model.backbone
    assert backbone.tokenizer.config == LFQConfig(
        channels=stored["ch"],
        multipliers=tuple(stored["ch_mult"]),
        res_blocks=stored["num_res_blocks"],
        bits=stored["z_channels"],
    )
    assert backbone.tokenizer.downsample == stored["downsample"]
    image = case.input("image")
    close(backbone.tokenizer.latents(image), case.expected("image_prequant_latent"), atol=1e-4)
    codes = backbone.encode_images(image)
    assert torch.equal(codes, codes_of(case.expected, "image_codes_{}"))
    decoded = backbone.tokenizer.decode(backbone.tokenizer.encode(image))
    close(decoded, case.expected("image_decoded"), atol=5e-4)
    close(backbone.tokenizer.decode_vectors(case.expected("image_quantised")), decoded, atol=5e-4)


def test_uint8_images(case, model):
    codes = codes_of(case.expected, "greedy_{}_cfg")
    images = model.backbone.decode_images(codes)
    assert images.dtype == torch.uint8
    assert (images.int() - case.expected("greedy_decoded_uint8").int()).abs().max() <= 1
    other = model.backbone.decode_images(codes_of(case.input, "codes_{}")).float()
    expected = (case.expected("codes_decoded").clamp(-1, 1) + 1) * 127.5
    close(other, expected.permute(0, 2, 3, 1), atol=1.1)


# -- a tokenizer's own file -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=golden_cases("Open-MAGVIT2 LFQ"))
def tokenizer_case(request):
    return request.param


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_both_weight_sets_of_a_tokenizer_file(tokenizer_case, weights):
    case = tokenizer_case
    path = case.folder / case.config["checkpoint_file"]
    tokenizer = LFQTokenizer.load(path, ema=weights == "ema")
    assert tokenizer.downsample == case.config["downsample"]
    image, low = case.input("image"), case.config["factorized_bits"][0]
    close(tokenizer.latents(image), case.expected(f"{weights}_prequant_latent"), atol=1e-4)
    pre, post = codes_of(case.expected, weights + "_codes_{}").unbind(-1)
    codes = tokenizer.encode(image)
    assert torch.equal(codes.flatten(1), pre + (post << low))
    vectors = signs(codes, tokenizer.config.bits).movedim(-1, 1)
    assert torch.equal(vectors, case.expected(f"{weights}_quantised"))
    close(tokenizer.decode(codes), case.expected(f"{weights}_decoded"), atol=5e-4)
    pre, post = codes_of(case.input, "free_codes_{}").unbind(-1)
    free = (pre + (post << low)).view(codes.shape)
    close(tokenizer.decode(free), case.expected(f"{weights}_free_decoded"), atol=5e-4)


def test_a_generator_reads_the_raw_weights(tokenizer_case):
    """By default, the raw weights of a tokenizer's file are loaded, not the averaged ones."""
    path = tokenizer_case.folder / tokenizer_case.config["checkpoint_file"]
    latents = LFQTokenizer.load(path).latents(tokenizer_case.input("image"))
    close(latents, tokenizer_case.expected("raw_prequant_latent"), atol=1e-4)


# -- tables ---------------------------------------------------------------------------------------


def test_bits():
    assert indices(torch.zeros(18)) == 0, "zero counts as negative"
    for case in golden_table("lfq_bits.json")["cases"]:
        low, high = case["factorized_bits"]
        for row in case["examples"]:
            vector = torch.tensor(row["pre_vector"] + row["post_vector"], dtype=torch.float)
            joint = torch.tensor(row["joint"])
            assert torch.equal(signs(joint, low + high), vector)
            assert indices(torch.tensor(row["latent"])) == indices(vector) == joint
            halves = zip(("pre", "post"), (low, high), strict=True)
            for part, bits in halves:
                table = signs(torch.arange(2**bits), bits)
                assert table[row[part]].tolist() == row[f"{part}_vector"]
            backbone = backbone_around(joint.view(1, 1, 1), (low, high))
            assert backbone.encode_images(None).tolist() == [[[row["pre"], row["post"]]]]
            backbone.decode_images(torch.tensor([[[row["pre"], row["post"]]]]))
            assert backbone.tokenizer.decoded == joint


def test_uint8_rule():
    check_uint8_rule(backbone_around(None, (1, 1)))


def backbone_around(codes, bits) -> OpenMAGVIT2:
    """A backbone with one code per image. Its tokenizer encodes every image as `codes`, and records
    the codes that it is asked to decode.
    """

    class Tokenizer:
        downsample = 1

        def encode(self, _):
            return codes

        def decode(self, given):
            self.decoded = given
            return torch.zeros(1, 3, 1, 1)

    config = OpenMAGVIT2Config(dim=8, n_layer=1, n_intra_layer=1, n_head=1, grid=(1, 1), bits=bits)
    backbone = OpenMAGVIT2(config)
    backbone.frozen.tokenizer = Tokenizer()
    return backbone

"""Janus-Pro, loaded from each of its published layouts, against outputs of the official
implementation, through our sampler and loss.
"""

import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GOLDEN_ROOT,
    base_loss,
    cached,
    close,
    drawn_by_torch,
    edited,
    golden_cases,
    teacher_forced,
)
from safetensors.torch import save_file

from t2i.errors import UserError
from t2i.models.base import LoadOptions
from t2i.models.janus.janus_model import Janus
from t2i.models.janus.janus_prompts import JanusPrompts
from t2i.models.janus.janus_weights import EMBEDDING, HEAD, to_transformers
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows
from t2i.weights import read_folder

CASES = golden_cases("Janus-Pro")
if not CASES:
    pytest.skip(f"no Janus case under {GOLDEN_ROOT}", allow_module_level=True)


def layouts() -> list:
    """(case, folder) for both naming schemes of every case, and for .bin shards of its tensors."""
    found = []
    for parameter in CASES:
        case = parameter.values[0]
        original = case.folder / case.config["original_dir"]
        folders = {"transformers": case.folder / case.config["hf_dir"], "deepseek": original}
        for path in sorted(GOLDEN_ROOT.rglob("case.json")):
            same_as = json.loads(path.read_text(encoding="utf-8")).get("same_tensors_as")
            if same_as and (path.parent / same_as).resolve() == original.resolve():
                folders[f"bin-{path.parent.name}"] = path.parent
        name = case.folder.name
        found += [pytest.param((case, f), id=f"{name}-{kind}") for kind, f in folders.items()]
    return found


@pytest.fixture(scope="module", params=layouts())
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def case(layout):
    return layout[0]


def test_both_layouts_are_the_same_weights_under_transformers_names(layout):
    case, folder = layout
    theirs = read_folder(case.folder / case.config["hf_dir"])
    ours = to_transformers(read_folder(folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@cache
def base_model(folder: Path) -> TensorAR:
    return TensorAR(Janus.load(folder), presets.base()).eval()


@pytest.fixture(scope="module")
def model(layout):
    return base_model(layout[1])


@cache
def examples(folder: Path) -> list[dict]:
    return json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["examples"]


@pytest.fixture(scope="module")
def prepared(case, model):
    """The first two prompts, which have different lengths, as one left-padded batch."""
    return model.backbone.prepare([e["text"] for e in examples(case.folder)[:2]])


# -- prompts --------------------------------------------------------------------------------------
def test_prompt_and_unconditional_ids(layout):
    case, folder = layout
    prompts = JanusPrompts.load(folder)
    for example in examples(case.folder):
        ids, mask = prompts.batch([example["text"]])
        assert mask.all() and ids.tolist() == [example["input_ids"]]
        assert prompts.unconditional(ids, mask).tolist() == [example["uncond_ids"]]
    for name, token_id in case.config["special_token_ids"].items():
        assert prompts.token_id(case.config["special_token_strings"][name]) == token_id


def test_batch_is_padded_on_the_left(case, prepared):
    assert torch.equal(prepared["ids"], case.expected("batch_input_ids"))
    assert torch.equal(prepared["null_ids"], case.expected("batch_uncond_ids"))
    assert torch.equal(prepared["mask"], case.expected("batch_attention_mask").bool())


# -- model ----------------------------------------------------------------------------------------
def test_code_embeddings(case, model):
    embedded = model.backbone.embed_tokens(case.input("image_codes")[..., None])
    close(embedded.detach(), case.expected("gen_embeds"))


@pytest.mark.parametrize("drop", [False, True], ids=["cond", "uncond"])
def test_teacher_forced_logits(case, model, prepared, drop):
    (logits,) = teacher_forced(model, prepared, case.input("image_codes")[..., None], drop)
    close(logits, case.expected("tf_logits_uncond" if drop else "tf_logits_cond"))


def test_loss(case, model, prepared):
    loss = base_loss(model, prepared, case.input("image_codes")[..., None])
    close(loss, case.expected("tf_loss_cond"))


def test_cached_logits(case, model, prepared):
    (logits,) = cached(model, prepared, case.input("image_codes")[..., None])
    for half, kind in zip(logits.chunk(2), ("cond", "uncond"), strict=True):
        close(half[:, 0], case.expected(f"step0_logits_{kind}"))
        close(half, case.expected(f"tf_logits_{kind}"))


def greedy(model, prepared, scale):
    config = SamplingConfig(temperature=0.0, cfg_scale=scale)
    keys = torch.zeros(len(prepared["ids"]), dtype=torch.long)
    windows = sample_windows(model, prepared, keys, config)
    return model.windows.final_codes(windows)[..., 0]


@pytest.mark.parametrize("run", ["cfg", "cfg1"])
def test_greedy_ids(case, model, prepared, run):
    """Greedy codes equal the official ones, for a padded batch and for each prompt alone."""
    expected = case.expected(f"greedy_ids_{run}")
    scale = case.config["cfg_weight"] if run == "cfg" else 1.0
    assert torch.equal(greedy(model, prepared, scale), expected)
    for row, example in enumerate(examples(case.folder)[:2]):
        alone = model.backbone.prepare([example["text"]])
        assert torch.equal(greedy(model, alone, scale), expected[row : row + 1])


def test_sampled_ids(case, model):
    """Driven by torch's generator in the official order (one multinomial over the batch per token),
    sampling gives the official codes.
    """
    expected, settings = case.expected("sampled_ids"), case.config["sampling_example"]
    text = examples(case.folder)[settings["prompt_index"]]["text"]
    config = SamplingConfig(cfg_scale=settings["cfg_weight"], temperature=settings["temperature"])
    prepared = model.backbone.prepare([text] * settings["parallel_size"])
    torch.manual_seed(settings["seed"])
    drawn = drawn_by_torch(model, prepared, config, expected.shape[1])
    assert torch.equal(drawn[..., 0], expected)


# -- pixels ---------------------------------------------------------------------------------------
def test_image_tokenizer_normalises_both_sides(case, model):
    codes = model.backbone.encode_images(case.input("image"))[..., 0]
    assert torch.equal(codes, case.expected("image_codes_encoded"))
    grid = codes.unflatten(1, tuple(case.config["grid"]))
    quantised = model.backbone.tokenizer.quantize.vectors()[grid].permute(0, 3, 1, 2)
    close(quantised, case.expected("image_quantised"), 1e-5)
    close(model.backbone.tokenizer.decode(grid), case.expected("image_decoded"), 5e-4)


def test_decoded_images(case, model):
    codes = case.expected("greedy_ids_cfg")
    grid = codes.unflatten(1, tuple(case.config["grid"]))
    close(model.backbone.tokenizer.decode(grid), case.expected("greedy_decoded"), 5e-4)
    off = model.backbone.decode_images(codes[..., None]).int()
    off = off - case.expected("greedy_decoded_uint8").int()
    # Rounding instead of truncating would differ by one level on about half of the pixels.
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 0.01


# -- loading --------------------------------------------------------------------------------------
def test_shape(case, model):
    spec, language = model.backbone.spec, case.config["language_model"]
    assert spec.grid == tuple(case.config["grid"])
    assert spec.num_tokens == case.config["num_image_tokens"]
    assert spec.subvocabs == (case.config["vq"]["codebook_size"],)
    assert (spec.dim, spec.num_heads) == (language["hidden_size"], language["num_attention_heads"])
    assert spec.sampling == SamplingConfig(cfg_scale=5.0), "the authors' default, not the case's"
    assert model.backbone.tokenizer.downsample == case.config["vq"]["downsample"]


def test_both_namings_are_one_model(case, model):
    """Both naming schemes load the same weights: exactly those of the transformers folder, with the
    understanding side. (A text head that is not stored is tied to the embedding.)
    """
    other = base_model(case.folder / case.config["hf_dir"]).backbone
    for ours, theirs in (
        (model.backbone.janus, other.janus),
        (model.backbone.tokenizer, other.tokenizer),
    ):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    stored = read_folder(case.folder / case.config["hf_dir"])
    mine = model.backbone.janus.state_dict()
    if HEAD not in stored:
        assert torch.equal(mine.pop(HEAD), mine[EMBEDDING])
    assert set(mine) == {k for k in stored if "vqmodel" not in k}
    assert all(torch.equal(mine[k], stored[k].float()) for k in mine)


def test_generation_only_draws_the_same(layout, case, model, prepared):
    small = Janus.load(layout[1], LoadOptions(generation_only=True))
    left = {name.split(".")[1] for name in small.janus.state_dict()}
    assert left == {
        "language_model",
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    }
    count = sum(p.numel() for p in model.backbone.parameters())
    assert small.left_out == count - sum(p.numel() for p in small.parameters()) > 0
    drawn = greedy(TensorAR(small, presets.base()).eval(), prepared, case.config["cfg_weight"])
    assert torch.equal(drawn, case.expected("greedy_ids_cfg"))


def test_shapes_only_reads_no_data(layout, model):
    outline = Janus.load(layout[1], LoadOptions(shapes_only=True))
    shapes = {k: v.shape for k, v in model.backbone.janus.state_dict().items()}
    assert {k: v.shape for k, v in outline.janus.state_dict().items()} == shapes
    assert all(p.device.type == "meta" for p in outline.parameters())


def test_a_folder_without_the_understanding_side_is_named(case, tmp_path):
    """The error says so if the understanding side's weights are missing. (In DeepSeek's layout, its
    sizes are inferred from them.)
    """
    stored = read_folder(case.folder / case.config["original_dir"])
    kept = {k: v for k, v in stored.items() if not k.startswith("vision_model.")}
    original_with(case, kept, tmp_path)
    with pytest.raises(UserError, match=r"the weights lack the understanding tower \(vision_model"):
        Janus.load(tmp_path)


def original_with(case, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the case's folder in DeepSeek's layout again, with these weights."""
    for path in (case.folder / case.config["original_dir"]).glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["linear", "one layer"])
def test_an_aligner_of_one_layer(case, tmp_path, kind):
    """A one-layer aligner loads under both of DeepSeek's names: `layers.0` if it is an MLP of depth
    1, `layers` if its type is `linear`.
    """
    stored = read_folder(case.folder / case.config["original_dir"])
    stored = {k: v for k, v in stored.items() if not re.match(r"gen_aligner\.layers\.[1-9]", k)}
    place = "gen_aligner.layers.0."
    renamed = {k.replace(place, "gen_aligner.layers."): v for k, v in stored.items()}
    original_with(case, renamed if kind == "linear" else stored, tmp_path)
    with edited(tmp_path / "config.json") as config:
        params = config["gen_aligner_config"]["params"]
        del params["depth"]
        if kind == "linear":
            params |= {"projector_type": "linear", "depth": 2}  # `linear` ignores depth
    codes = case.input("image_codes")
    weight, bias = stored[place + "weight"].float(), stored[place + "bias"].float()
    expected = F.linear(stored["gen_embed.weight"].float()[codes], weight, bias)
    close(Janus.load(tmp_path).embed_tokens(codes[..., None]).detach(), expected)


@pytest.mark.parametrize("part", ["gen_vision_config", "gen_head_config", "aligner_config"])
def test_a_configuration_of_other_weights_is_refused(case, tmp_path, part):
    """In DeepSeek's layout, sizes stated in config.json must be those inferred from the weights."""
    folder = shutil.copytree(case.folder / case.config["original_dir"], tmp_path / "copy")
    with edited(folder / "config.json") as config:
        params = config[part]["params"]
        size = next(name for name in ("image_token_size", "input_dim") if name in params)
        params[size] += 1
    with pytest.raises(UserError, match=rf"{part}\.params\.{size} is {params[size]}, but model\."):
        Janus.load(folder)


def test_an_aligner_that_no_janus_pro_has_is_refused(case, tmp_path):
    """An aligner of unknown type is refused, although its layer names may fit a known type."""
    folder = shutil.copytree(case.folder / case.config["original_dir"], tmp_path / "copy")
    with edited(folder / "config.json") as config:
        config["gen_aligner_config"]["params"]["projector_type"] = "identity"
    with pytest.raises(UserError, match="projector_type is 'identity', not mlp_gelu or linear"):
        Janus.load(folder)


@pytest.mark.parametrize(
    "setting, value, said",
    [
        ("num_res_blocks", 7, r"num_res_blocks is 7, but the weights have"),
        ("double_latent", True, r"double_latent=True, not False"),
    ],
)
def test_another_image_tokenizer_than_stated_is_refused(case, tmp_path, setting, value, said):
    """In transformers' layout, vq_config must fit the image tokenizer's weights, because exports
    copy it.
    """
    folder = shutil.copytree(case.folder / case.config["hf_dir"], tmp_path / "copy")
    with edited(folder / "config.json") as config:
        config["vq_config"][setting] = value
    with pytest.raises(UserError, match=rf"vq_config\.{said}"):
        Janus.load(folder)

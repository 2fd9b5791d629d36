"""Janus-Pro beyond the golden cases (test_golden_janus.py): prompts, codes, the modules, precision,
LoRA, and files.

Case 20: the modules are the kit's own. transformers is imported here as the reference for them.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (
    JANUS_PROMPTS,
    count,
    edited,
    randomize,
    teacher_forced,
    text_logits,
    tiny_codes,
    tiny_janus,
    tiny_prepared,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, JanusConfig, JanusForConditionalGeneration

import t2i
from launch.lab.text_drift import drift_of
from t2i.errors import UserError
from t2i.generation import draw_images
from t2i.loading import load_source
from t2i.lora import add_lora, merge_lora, without_lora
from t2i.models.base import LoadOptions
from t2i.models.janus import janus_config
from t2i.models.janus.janus_config import JanusShape
from t2i.models.janus.janus_model import Janus
from t2i.models.janus.janus_prompts import BOS, EOS, PAD, JanusPrompts
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.shapes.tiny_janus import build_tokenizer
from t2i.sources import BackboneSource
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tuning import LoRAConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def janus() -> Janus:
    return tiny_janus()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, janus):
    """A published folder in transformers' layout, fp32."""
    path = tmp_path_factory.mktemp("janus")
    janus.save_official(path, torch.float32)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def image_logits(backbone: Janus, prepared=None, drop=None) -> torch.Tensor:
    """Teacher-forced logits of codes, [B, T, V]."""
    model = TensorAR(backbone, presets.base()).eval()
    prepared = tiny_prepared(backbone, 2) if prepared is None else prepared
    windows = model.windows.gather(tiny_codes(backbone, len(prepared["ids"]), 16))
    with torch.no_grad():
        h = model.hidden(backbone.encode_condition(prepared, drop), windows)
        return backbone.next_logits(h, windows[:, :0])


# -- prompts --------------------------------------------------------------------------------------
def test_special_ids_are_looked_up_by_string(janus):
    other = JanusPrompts(build_tokenizer(["other words entirely"], vocab_size=290))
    ours = janus.prompts
    assert (other.bos_id, other.pad_id, other.boi_id) != (ours.bos_id, ours.pad_id, ours.boi_id)
    for prompts in (other, ours):
        ids = prompts.encode(["a"])[0]
        assert ids[0] == prompts.tokenizer.token_to_id(BOS) and ids.count(ids[0]) == 1
        row, mask = prompts.batch(["a"])
        pad = prompts.tokenizer.token_to_id(PAD)
        assert prompts.unconditional(row, mask)[0, 1:-1].unique().tolist() == [pad]


def test_a_tokenizer_that_drops_spaces_is_refused(copy):
    path = copy / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["pre_tokenizer"] = json.loads(pre_tokenizers.Metaspace().__getstate__())
    stored["decoder"] = {"type": "Fuse"}
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"tokenizer.json.*does not keep spaces"):
        Janus.load(copy)
    path.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        Janus.load(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    text = tokenizer.to_str().replace("<begin_of_image>", "<begin_of_picture>")
    (copy / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"no token '<begin_of_image>'; is it Janus-Pro's"):
        Janus.load(copy)


def test_long_prompts_lose_the_end_of_their_caption_only(janus):
    """The tokens of the prompt's template that follow the caption are kept."""
    prompts = JanusPrompts(janus.prompts.tokenizer, max_tokens=12)
    long, other = prompts.encode([JANUS_PROMPTS[1], JANUS_PROMPTS[1] + " and more"])
    whole = janus.prompts.encode([JANUS_PROMPTS[1]])[0]
    assert len(long) == 12 and long == other and long[-4:] == whole[-4:] and long[:8] == whole[:8]
    assert prompts.notes(["a", JANUS_PROMPTS[1]]) == [[], ["caption cut to 12 tokens"]]
    for limit in (len(whole), len(whole) - 1):
        prompts.max_tokens = limit
        assert len(prompts.encode([JANUS_PROMPTS[1]])[0]) == limit
        assert bool(*prompts.notes([JANUS_PROMPTS[1]])) == (limit < len(whole))
    # Templates of other trainers' data; the model takes such tokens for its own template's.
    templates = ["<|User|>: a dot", "<image_placeholder>\na dot", "a dot<begin_of_image>"]
    prompts.max_tokens = 100
    assert prompts.notes([*templates, "a <dot>"]) == [["caption holds control tokens"]] * 3 + [[]]
    with pytest.raises(ValueError, match="list of strings"):
        prompts.encode("a red circle")


def test_prompts_leave_room_for_the_image(copy):
    with edited(copy / "config.json") as config:
        config["text_config"]["max_position_embeddings"] = 40
    janus = Janus.load(copy, LoadOptions(grid=(2, 4), generation_only=True))
    assert janus.spec.grid == (2, 4)
    assert janus.spec.prefix_tokens == janus.prompts.max_tokens == 32
    with pytest.raises(UserError, match="lacks parts of the published folder"):
        janus.save_official(copy, torch.float32)


def test_padding_is_masked_but_unconditional_padding_is_attended_to(janus):
    """Left padding has no influence, but the padding tokens of the unconditional prompt do."""
    alone, padded = janus.prepare(JANUS_PROMPTS[:1]), janus.prepare(JANUS_PROMPTS[:2])
    drop = torch.ones(2, dtype=torch.bool)
    for kind in (None, drop):
        batched = image_logits(janus, padded, kind)[:1]
        single = image_logits(janus, alone, None if kind is None else kind[:1])
        torch.testing.assert_close(batched, single, atol=1e-4, rtol=0)
    changed = tiny_janus()
    with torch.no_grad():
        changed.language_model.embed_tokens.weight[janus.prompts.pad_id] += 1
    assert torch.equal(image_logits(changed, padded), image_logits(janus, padded))
    moved = image_logits(changed, padded, drop) - image_logits(janus, padded, drop)
    assert moved.abs().max() > 0.1


def test_padding_does_not_depend_on_how_images_are_batched(janus, monkeypatch):
    model = TensorAR(janus, presets.base()).eval()
    lengths, prepare = [], Janus.prepare

    def spy(self, conditions, length=None):
        lengths.append(prepare(self, conditions, length)["ids"].shape[1])
        return prepare(self, conditions, length)

    monkeypatch.setattr(Janus, "prepare", spy)
    options = DrawOptions(batch_size=1)
    whole = list(draw_images(model, JANUS_PROMPTS, options, progress=False))
    part = list(draw_images(model, JANUS_PROMPTS, options, jobs=[(2, 0)], progress=False))
    assert len(set(lengths)) == 1
    assert torch.equal(whole[2].windows, part[0].windows)


# -- codes ----------------------------------------------------------------------------------------
def test_codes_do_not_use_the_text_embedding():
    backbone = tiny_janus()
    before = backbone.embed_tokens(tiny_codes(backbone, 1, 16))
    with torch.no_grad():
        backbone.language_model.embed_tokens.weight.zero_()
    assert torch.equal(backbone.embed_tokens(tiny_codes(backbone, 1, 16)), before)
    with torch.no_grad():
        backbone.janus.model.generation_embeddings.weight.mul_(2)
    assert not torch.equal(backbone.embed_tokens(tiny_codes(backbone, 1, 16)), before)


def test_the_image_tokenizer_is_neither_trained_nor_cast(janus):
    trained = {id(p) for p in janus.parameters()}
    assert not trained & {id(p) for p in janus.tokenizer.parameters()}
    assert not hasattr(janus.janus.model, "vqmodel")
    assert next(tiny_janus().bfloat16().tokenizer.parameters()).dtype == torch.float32


def test_default_sampling_settings_are_the_authors(janus):
    config = janus.spec.sampling
    assert (config.cfg_scale, config.top_k, config.top_p, config.temperature) == (5.0, 0, 1.0, 1.0)


# -- the modules, against transformers' ------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_one_model_in_both_libraries(janus, settings):
    """Our model and transformers' have the same weight names and shapes, and the same logits."""
    stored = janus.config.transformers
    shape = stored | {"text_config": stored["text_config"] | settings}
    ours = Janus(JanusShape(shape, janus.config.grid))
    ours.to_empty(device="cpu")
    randomize(ours.janus)
    config = JanusConfig.from_dict(ours.config.transformers)
    theirs = JanusForConditionalGeneration(config).eval()
    fits = theirs.load_state_dict(ours.janus.state_dict(), strict=False)
    assert not fits.unexpected_keys
    assert all(key.startswith("model.vqmodel.") for key in fits.missing_keys)
    ids = torch.tensor(janus.prompts.encode(JANUS_PROMPTS[1:2]))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(ours.eval().text_logits(ids), expected, atol=1e-5, rtol=0)


def test_settings_missing_in_config_json_have_transformers_defaults():
    """transformers writes config.json by `to_diff_dict`, which leaves out default values."""
    left_out = JanusShape({})
    whole = JanusConfig().to_dict()
    for part in ("text_config", "vision_config", "vq_config"):
        ours = left_out.transformers[part]
        theirs = json.loads(json.dumps(whole[part]))  # JSON has no tuples
        assert {key: theirs[key] for key in ours} == ours
    for key in ("image_token_id", "tie_word_embeddings"):
        assert left_out.transformers[key] == whole[key]
    in_full = json.loads(JanusConfig().to_json_string(use_diff=False))  # in older checkpoints
    for stored in (JanusConfig().to_diff_dict(), in_full):
        assert JanusShape(stored).trunk == left_out.trunk
    assert JanusShape({"text_config": {"rope_theta": 7.0}}).trunk.rope_base == 7.0  # before 5.0


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"attention_bias": True}, "text_config.attention_bias=True, not False"),
        ({"head_dim": 48}, "head_dim is not hidden_size 32 / 2 heads"),
    ],
)
def test_settings_that_no_janus_has_are_refused(copy, settings, said):
    stored = json.loads((copy / "config.json").read_text())
    stored["text_config"] |= settings
    (copy / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        ValueError, match=f"config.json: this is not a Janus-Pro configuration.*{said}"
    ):
        Janus.load(copy)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_hidden_layers", 1 << 70),
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "rope_theta", -1.0),
        ("text_config", "num_key_value_heads", [1]),
        ("text_config", "max_position_embeddings", "x"),
        ("vision_config", "depth", True),
        ("vq_config", "num_hidden_layers", 1 << 30),
    ],
)
def test_settings_of_no_use_are_refused_by_name(copy, part, key, value):
    """They used to be TypeErrors of PyTorch, or fill memory with layers."""
    stored = json.loads((copy / "config.json").read_text())
    stored[part][key] = value
    (copy / "config.json").write_text(json.dumps(stored))
    name = {"num_key_value_heads": "n_kv_head"}.get(key, key)
    with pytest.raises(UserError, match=rf"config.json: .*{name}"):
        Janus.load(copy)


def test_a_bos_token_that_is_no_text_is_refused(copy):
    path = copy / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    for token in (["<s>"], {"a": 1}, {"content": 1}, 7):
        path.write_text(json.dumps(stored | {"bos_token": token}))
        with pytest.raises(UserError, match=r"tokenizer_config.json: its BOS .* not texts"):
            Janus.load(copy)


def test_mlp_ratios_survive_truncation():
    """transformers truncates width * ratio to an integer, and 352 * (938 / 352) is 937.99..., so
    the ratios that we write are rounded up where needed.
    """
    for width in range(8, 400, 8):
        hidden = int(width * 8 / 3)
        assert int(width * janus_config.cut_off_ratio(hidden, width)) == hidden


def test_the_error_names_a_text_head_that_was_not_loaded(folder):
    with pytest.raises(ValueError, match="generation_only has no text head"):
        drawing = LoadOptions(generation_only=True)
        Janus.load(folder, drawing).text_logits(torch.zeros(1, 3).long())


# -- precision ------------------------------------------------------------------------------------
def test_rope_frequencies_survive_a_cast():
    backbone = tiny_janus().bfloat16()
    table = backbone.rope_on(backbone.device)
    assert table.dtype == torch.float32 and torch.equal(table, tiny_janus().rope_table())
    expected = image_logits(tiny_janus())
    assert (image_logits(backbone) - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_padding_embedding_is_trained(janus):
    prepared = tiny_prepared(janus, 2)
    janus.zero_grad()
    prefix = janus.encode_condition(prepared, torch.ones(2, dtype=torch.bool)).prefix
    prefix.sum().backward()
    gradient = janus.language_model.embed_tokens.weight.grad
    assert gradient[janus.prompts.pad_id].abs().max() > 0
    janus.zero_grad()


# -- what may be trained --------------------------------------------------------------------------
def test_lora_reaches_every_layer_of_the_language_model_and_nothing_else():
    backbone = tiny_janus()
    tower = backbone.janus.model.vision_model
    assert any(n.endswith("q_proj") for n, _ in tower.named_modules()), "the same suffixes"
    add_lora(backbone, LoRAConfig(rank=2))
    adapted = {n.split(".lora_A")[0] for n, _ in backbone.named_parameters() if "lora_A" in n}
    layers = [f"janus.model.language_model.layers.{i}" for i in range(2)]
    assert adapted == {
        f"{layer}.{part}.{name}"
        for layer in layers
        for part, names in (("self_attn", ATTENTION), ("mlp", FEED_FORWARD))
        for name in names
    }


def test_lora_can_be_switched_off_and_merged():
    backbone = tiny_janus()
    plain_text, plain_image = text_logits(backbone), image_logits(backbone)
    add_lora(backbone, LoRAConfig(rank=2, alpha=2.0))
    model = TensorAR(backbone, presets.iclr2026())
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    tuned_text, tuned_image = text_logits(backbone), image_logits(backbone)
    assert not torch.allclose(tuned_text, plain_text, atol=0.1)
    with without_lora(model.backbone):
        assert torch.equal(text_logits(backbone), plain_text), "the text side is untouched"
        assert torch.equal(image_logits(backbone), plain_image)
    assert torch.equal(text_logits(backbone), tuned_text)
    merge_lora(backbone)
    assert not any("lora" in n or "base_layer" in n for n in backbone.state_dict())
    torch.testing.assert_close(text_logits(backbone), tuned_text, atol=1e-4, rtol=0)
    torch.testing.assert_close(image_logits(backbone), tuned_image, atol=1e-4, rtol=0)


def test_text_drift_is_measured_against_the_model_without_adapters():
    backbone = tiny_janus()
    add_lora(backbone, LoRAConfig(rank=2, alpha=2.0))
    fresh = drift_of(backbone, "a red cat")
    assert fresh.kl == fresh.changed == fresh.largest == 0 < fresh.entropy
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    tuned = drift_of(backbone, "a red cat")
    assert tuned.kl > 0 < tuned.largest and tuned.entropy == fresh.entropy
    assert drift_of(backbone, "a red cat") == tuned, "the adapters are switched on again"


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing_trains(recompute):
    """Adapters get gradients with and without gradient checkpointing. Reentrant checkpointing would
    silently train nothing here: without a codec, the trunk's input needs no gradient.
    """
    backbone = tiny_janus()
    add_lora(backbone, LoRAConfig(rank=2))
    backbone.gradient_checkpointing = recompute
    model = TensorAR(backbone, presets.base()).train()
    passes = []
    backbone.language_model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    codes = tiny_codes(backbone, 2, 16)
    condition = backbone.encode_condition(tiny_prepared(backbone, 2))
    model(codes, condition, model.windows.gather(codes)).loss.backward()
    assert len(passes) == 1 + recompute
    moving = [p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n]
    assert len(moving) == 2 * 7 and all(moving)


# -- loading --------------------------------------------------------------------------------------
def rewrite(folder, **changes) -> None:
    """Replace weights in a folder by name; None deletes one."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {k: v for k, v in weights.items() if v is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shapes_only", [False, True])
def test_every_key_that_does_not_fit_is_named(copy, shapes_only):
    head = "model.generation_head.vision_head.weight"
    norm = "model.language_model.norm.weight"
    rewrite(copy, **{head: torch.zeros(3, 3), norm: None, "model.extra": torch.zeros(1)})
    with pytest.raises(ValueError) as refused:
        Janus.load(copy, LoadOptions(shapes_only=shapes_only))
    message = str(refused.value)
    assert all(
        f"{kind} (1): {name}" in message
        for kind, name in (("missing", norm), ("unexpected", "model.extra"), ("mis-shaped", head))
    )


def test_other_models_and_broken_folders_are_refused(copy, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Janus.load(copy / "model.safetensors")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="has model_type 'llama', not 'janus'"):
        Janus.load(copy)
    with pytest.raises(ValueError, match="janus brings its own prompt tokenizer"):
        t2i.load_backbone("janus", copy, text_encoder="t5")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"names model-2.safetensors, which is missing"):
        Janus.load(copy)
    with pytest.raises(ValueError, match=r"holds no weights: it has no model\.safetensors"):
        Janus.load(tmp_path)


def test_tied_and_untied_text_heads(copy, folder):
    """A stored text head is used even if config.json ties it (transformers' default). A missing one
    is tied to the embedding, unless config.json says that it is untied.
    """
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    untied = Janus.load(copy)
    assert torch.equal(text_logits(untied), text_logits(Janus.load(folder)))
    assert not torch.equal(untied.janus.lm_head.weight, untied.language_model.embed_tokens.weight)
    rewrite(copy, **{"lm_head.weight": None})
    tied = Janus.load(copy)
    says_untied = copy / "config.json"
    said = says_untied.read_text()
    says_untied.write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    with pytest.raises(t2i.UserError, match=r"lacks lm_head\.weight.*does not tie it"):
        Janus.load(copy)
    Janus.load(copy, LoadOptions(generation_only=True))
    says_untied.write_text(said)
    assert tied.janus.lm_head.weight is tied.language_model.embed_tokens.weight
    drawing = Janus.load(copy, LoadOptions(generation_only=True))
    assert drawing.left_out == count(tied) - count(drawing), "the embedding is kept"
    out = copy / "out"
    out.mkdir()
    tied.save_official(out, torch.float32)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert torch.equal(text_logits(Janus.load(out)), text_logits(tied))


def test_a_token_without_an_embedding_is_named(copy):
    """A prompt with a token beyond the embedding is refused; a tokenizer that knows such tokens is
    not. Used to end in an IndexError while drawing.
    """
    path = copy / "tokenizer.json"
    stored = json.loads(path.read_text())
    size = json.loads((copy / "config.json").read_text())["text_config"]["vocab_size"]
    token = stored["added_tokens"][0] | {"id": size, "content": "<|further|>"}
    path.write_text(json.dumps(stored | {"added_tokens": [*stored["added_tokens"], token]}))
    prompts = Janus.load(copy).frozen.text_encoder
    assert max(prompts.encode(["a red circle"])[0]) < size
    with pytest.raises(t2i.UserError, match=rf"produces token {size}, but the model has {size}"):
        prompts.encode(["a <|further|> circle"])


def test_attaching_a_codec_leaves_the_text_side_alone(folder):
    backbone = Janus.load(folder)
    before = text_logits(backbone)
    t2i.attach(backbone, presets.iclr2026())
    assert torch.equal(text_logits(backbone), before)


def test_published_sizes_need_no_files():
    """A published size is built without files. Its parameters by part are as many as in
    transformers' model with the published dimensions.
    """
    for size, language, image, rest in (
        ("1B", 1_442_940_928, 42_113_024, 519_699_456),
        ("7B", 6_490_935_296, 100_855_808, 744_098_816),
    ):
        name = f"deepseek-ai/Janus-Pro-{size}"
        backbone = t2i.load_backbone("janus", name, device="meta")
        counts = {
            k: sum(p.numel() for m in v for p in m.parameters())
            for k, v in backbone.parts().items()
        }
        assert counts == {"language model": language, "image layers": image, "understanding": rest}
        assert count(backbone.tokenizer) == 71_883_403
        small = load_source(
            BackboneSource("janus", name, generation_only=True), device=torch.device("meta")
        )
        assert small.left_out == rest and count(small) == language + image
        assert (backbone.spec.grid, backbone.spec.subvocabs) == ((24, 24), (16384,))
    assert set(janus_config.PUBLISHED.values()) == {"1B", "7B"}


def test_saved_tokenizer_is_read_by_transformers(folder, janus):
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "<|User|>: a red  circle\n\n<|Assistant|>:<begin_of_image>"
    assert theirs(text)["input_ids"] == janus.prompts.encode(["a red  circle"])[0]


@pytest.mark.parametrize(
    ("own", "written"),
    [
        (SamplingConfig(cfg_scale=1.0, top_p=0.9), {"do_sample": True, "top_p": 0.9}),
        (SamplingConfig(cfg_scale=(3.0,), top_k=5), {"guidance_scale": 3.0, "top_k": 5}),
        (SamplingConfig(temperature=0.0), {"do_sample": False}),
    ],
)
def test_transformers_draws_with_the_settings_that_are_written(janus, tmp_path, own, written):
    """transformers draws with the generation_config.json of a saved folder. Used to fail with a
    guidance scale of 1, and to sample where greedy drawing was wanted.
    """
    usual = janus.spec
    janus.spec = replace(usual, sampling=own)
    try:
        janus.save_official(tmp_path, torch.float32)
    finally:
        janus.spec = usual
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: stored[name] for name in written} == written
    assert stored["eos_token_id"] == janus.prompts.token_id(EOS)
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.tensor([janus.prompts.encode(["a red circle"])[0]])
    some = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_mode": "image"}
    drawn = theirs.generate(**some)
    assert drawn.shape == (1, 16)
    if not stored["do_sample"]:  # and without guidance
        plain, prepared = TensorAR(janus, presets.base()).eval(), janus.prepare(["a red circle"])
        (logits,) = teacher_forced(plain, prepared, drawn[..., None])
        assert torch.equal(logits.argmax(-1), drawn)

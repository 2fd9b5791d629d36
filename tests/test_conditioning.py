"""Caption features, the tiny text encoder and class labels."""

import json
import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden_fixture
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from t2i.errors import UserError
from t2i.models.conditions import class_ids, left_pad
from t2i.models.llamagen.captions import CHINESE, UNKNOWN
from t2i.models.llamagen.t5 import T5Captions, weights_hash
from t2i.shapes.tiny_t5 import build_tiny_t5

CAPTIONS = [
    "a photo of a red circle and a blue star",
    "a photo of a blue circle and a red star",
    "a photo of two squares",
    "a photo of a heart left of a green ring",
]
SIZE = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}

case = golden_fixture("LlamaGen GPT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_t5(tmp_path_factory.mktemp("t5"), CAPTIONS, **SIZE)


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the tiny encoder to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def encoder(folder):
    return T5Captions.load(folder, max_tokens=12)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -- left padding -------------------------------------------------------------


def test_left_padding_matches_llamagen(case):
    if "input.encoder_features_right_padded" not in case.tensors:
        pytest.skip(f"{case.folder.name} has no encoded captions")
    encoded = zip(
        case.input("encoder_features_right_padded"),
        case.input("encoder_mask_right_padded"),
        strict=True,
    )
    features, mask = left_pad([f[m.bool()] for f, m in encoded], case.config["caption_max_len"])
    assert torch.equal(features, case.input("caption_features"))
    assert mask.dtype == torch.bool
    assert torch.equal(mask, case.input("caption_mask").bool())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "one width"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "one width"),
        ([torch.zeros(1, 2, 3)], "one width"),
        ([torch.zeros(6, 3)], "6 entries, more than the 5"),
    ],
)
def test_left_padding_refuses(features, message):
    with pytest.raises(ValueError, match=message):
        left_pad(features, 5)


# -- encoding -----------------------------------------------------------------


def test_features_equal_those_of_a_fixed_length_batch(encoder):
    """LlamaGen lets the tokenizer pad and cut all captions to the token limit."""
    captions = [*CAPTIONS, "a " * 40]
    batch = AutoTokenizer.from_pretrained(encoder.folder)(
        [c.strip() for c in captions],
        max_length=12,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = encoder.model(batch.input_ids, attention_mask=batch.attention_mask)[0]
    for features, row, mask in zip(
        encoder.encode(captions), expected, batch.attention_mask, strict=True
    ):
        torch.testing.assert_close(features, row[mask.bool()], atol=1e-5, rtol=0)


def test_features_do_not_depend_on_the_batch(encoder):
    captions = [*CAPTIONS, "", "star"] * 12  # more than one pass, several lengths
    together = encoder.encode(captions)
    for caption, features in zip(captions, together, strict=True):
        torch.testing.assert_close(features, encoder.encode([caption])[0], atol=1e-5, rtol=0)


def test_every_caption_ends_with_the_end_token(encoder):
    ids = encoder.tokenizer("red star")["input_ids"]
    assert len(ids) == 3 and ids[-1] == encoder.tokenizer.eos_token_id == 1
    shapes = [tuple(f.shape) for f in encoder.encode(["red star", ""])]
    assert shapes == [(3, encoder.dim), (1, encoder.dim)]
    assert encoder.encode([]) == []


def test_captions_are_cleaned(encoder):
    dirty, plain = encoder.encode(["<b>RED</b> star #12", "red star"])
    assert torch.equal(dirty, plain)


def test_notes_say_what_a_caption_loses(encoder):
    """Case 14: captions that are emptied by cleaning, cut, or have unknown words."""
    long = "a photo of a red circle and a blue star and a green ring"
    assert encoder.notes(["", " ", *CAPTIONS[:2]]) == [[], [], [], []]
    assert encoder.notes(["a zebra", "zebra"]) == [[UNKNOWN], [UNKNOWN]]
    assert encoder.notes([long]) == [["caption cut to 12 tokens"]]
    nothing = [
        "\u4e00\u53ea\u732b",
        "\ube68\uac04 \uc6d0",
        "\u30ab\u30bf",
        "\U0001f642",
        "12345678",
    ]
    assert encoder.notes(nothing) == [None] * 5
    assert encoder.notes(["\u7ea2 red circle"]) == [[CHINESE]]


def test_a_lone_surrogate_is_refused_by_name(encoder):
    """Case 15, for prompts. (In data sets, reading removes it.)"""
    for use in (encoder.encode, encoder.notes):
        with pytest.raises(UserError, match=r"'a \\ud83d' contains a lone surrogate"):
            use(["a \ud83d"])


def test_frozen_but_usable_in_training(encoder):
    features = encoder.encode(["red star"])[0]
    weight = torch.ones(encoder.dim, requires_grad=True)
    (features @ weight).sum().backward()
    assert weight.grad is not None and not features.requires_grad
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_overflow_is_an_error(encoder):
    encoder.model.encoder.final_layer_norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        encoder.encode(["red star"])


@pytest.mark.parametrize("captions", ["red star", ["red star", None], [3]])
def test_captions_must_be_strings(encoder, captions):
    with pytest.raises(ValueError, match="list of strings"):
        encoder.encode(captions)


def test_dtype_and_token_limit(folder):
    encoder = T5Captions.load(folder, max_tokens=5, dtype=torch.bfloat16)
    features = encoder.encode(CAPTIONS)
    assert {f.dtype for f in features} == {torch.bfloat16} and len(features[0]) == 5
    with pytest.raises(ValueError, match="max_tokens=1 must be at least 2"):
        T5Captions.load(folder, max_tokens=1)


# -- files --------------------------------------------------------------------


def drop_query(weights):
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]


def add_key(weights):
    weights["encoder.extra"] = torch.zeros(2)


def reshape_norm(weights):
    weights["encoder.final_layer_norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_query, r"missing \(1\): encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"),
        (add_key, r"unexpected \(1\): encoder\.extra"),
        (reshape_norm, r"mis-shaped \(1\): encoder\.final_layer_norm\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(broken, edit, message):
    edit_weights(broken, edit)
    with pytest.raises(ValueError, match=message):
        T5Captions.load(broken)


def test_unusable_folders_are_refused(broken, tmp_path):
    with pytest.raises(ValueError, match="neither a local folder nor"):
        T5Captions.load(tmp_path / "absent")
    (broken / "tokenizer.json").rename(broken / "kept")
    with pytest.raises(ValueError, match=r"tokenizer\.json or spiece\.model"):
        T5Captions.load(broken)
    (broken / "kept").rename(broken / "tokenizer.json")
    os.truncate(broken / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="cannot be read"):
        T5Captions.load(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"d_model": "wide"}))
    with pytest.raises(ValueError, match=r"config.json does not describe a T5"):
        T5Captions.load(broken)
    (broken / "config.json").write_text(json.dumps(config | {"num_layers": 10**9}))
    with pytest.raises(ValueError, match="num_layers=1000000000 must be from 1 to 1000"):
        T5Captions.load(broken)  # it loaded without end
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert' model"):
        T5Captions.load(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is not a T5 folder"):
        T5Captions.load(broken)


def test_foreign_tokenizers_are_refused(broken):
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        T5Captions.load(broken)
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(ValueError, match="does not end a caption"):
        T5Captions.load(broken)
    tokenizer["model"]["vocab"]["zebra"] = len(tokenizer["model"]["vocab"])
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="different models"):
        T5Captions.load(broken)


def test_pickled_weights_load_the_same(folder, broken):
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    features = [T5Captions.load(f).encode(CAPTIONS)[0] for f in (folder, broken)]
    assert torch.equal(*features)


def test_full_t5_with_sentencepiece_loads(tmp_path):
    """The official layout: encoder and decoder in one file, tokenizer as spiece.model."""
    import sentencepiece

    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    config = T5Config(
        vocab_size=200,  # 100 extra ids follow the pieces
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    full = T5ForConditionalGeneration(config)
    full.save_pretrained(tmp_path)
    encoder = T5Captions.load(tmp_path)
    assert torch.equal(encoder.model.shared.weight, full.shared.weight)
    for caption in CAPTIONS:
        assert encoder.tokenizer(caption)["input_ids"] == [*reference.encode(caption), 1]


def test_weights_hash_covers_the_files(folder, broken, encoder):
    before = weights_hash(folder)
    assert before == encoder.weights_hash() == weights_hash(broken)
    edit_weights(broken, lambda w: w["encoder.final_layer_norm.weight"].mul_(2))
    changed = weights_hash(broken)
    (broken / "tokenizer.json").write_text((broken / "tokenizer.json").read_text() + " ")
    assert len({before, changed, weights_hash(broken)}) == 3


def test_cached_features_are_those_of_the_same_settings(folder, broken, encoder, monkeypatch):
    edit_weights(broken, lambda w: w["encoder.final_layer_norm.weight"].mul_(2))
    others = (
        T5Captions.load(folder, max_tokens=11),
        T5Captions.load(folder, max_tokens=12, dtype=torch.bfloat16),
        T5Captions.load(broken, max_tokens=12),
    )
    keys = [one.cache_key() for one in (encoder, *others)]
    monkeypatch.setattr("t2i.models.llamagen.t5.CAPTION_CLEANING_VERSION", "another")
    keys.append(encoder.cache_key())
    assert all(one != other for one, other in combinations(keys, 2))


def test_an_encoder_in_shards_is_copied_whole(broken, encoder, tmp_path):
    (broken / "model.safetensors").unlink()
    encoder.model.save_pretrained(broken, max_shard_size="20KB")
    T5Captions.load(broken).copy_files(tmp_path / "again")
    copied = T5Captions.load(tmp_path / "again", max_tokens=12)
    assert all(map(torch.equal, copied.encode(CAPTIONS), encoder.encode(CAPTIONS)))


# -- the tiny encoder ---------------------------------------------------------


def test_tiny_encoder_is_a_function_of_its_arguments(folder, tmp_path):
    state = torch.get_rng_state()
    again = build_tiny_t5(tmp_path / "again", CAPTIONS, **SIZE)
    other = build_tiny_t5(tmp_path / "other", CAPTIONS, **SIZE, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_hash(again) == weights_hash(folder) != weights_hash(other)


def test_tiny_vocabulary(folder, tmp_path):
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert [vocabulary[token] for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert set(vocabulary) > {"circle", "photo", "ring"}
    small = build_tiny_t5(tmp_path, CAPTIONS, **SIZE, vocab_size=6)
    assert AutoTokenizer.from_pretrained(small)("a zebra \u00e9")["input_ids"] == [3, 2, 2, 1]
    with pytest.raises(ValueError, match="no word"):
        build_tiny_t5(tmp_path, ["", "\u4e00"])
    with pytest.raises(ValueError, match="multiple of num_heads"):
        build_tiny_t5(tmp_path, CAPTIONS, d_model=30, num_heads=4)


def test_tiny_features_tell_which_color_belongs_to_which_shape(encoder):
    """The mean over a caption is all that LlamaGen's image tokens get from a layer."""
    first, swapped = (f.mean(0) for f in encoder.encode(CAPTIONS[:2]))
    assert (first - swapped).norm() > 0.1 * first.norm()  # 0.02 with T5's own initialisation


# -- labels -------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[0, 9, 3], (0, 9, 3), np.array([0, 9, 3]), torch.tensor([0, 9, 3])]
)
def test_class_ids(values):
    labels = class_ids(values, 10)
    assert labels.dtype == torch.long and labels.tolist() == [0, 9, 3]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0, 10], "10 at position 1"),
        ([-1], "-1 at position 0"),
        ([1.0], r"1\.0 at position 0"),
        ([True], "True at position 0"),
        (["cat"], "'cat' at position 0"),
        ("12", "'12'"),
        (3, "3"),
    ],
)
def test_bad_class_ids_are_named(values, named):
    with pytest.raises(ValueError, match=named):
        class_ids(values, 10)

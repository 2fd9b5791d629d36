"""The mPLUG judge: beam search by hand, strict loading, and the image encoded once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dpg_bench.mplug.bert import BertConfig
from dpg_bench.mplug.decoder import beam_search
from dpg_bench.mplug.mplug_answerer import MPlugAnswerer, load_tokenizer, preprocess, write_out
from dpg_bench.mplug.mplug_model import MPlug, MPlugConfig
from dpg_bench.questions import Question
from t2i.errors import UserError

TINY = Path(__file__).parent / "golden" / "dpg_mplug" / "with_visn_fc"
START, A, B, END = range(4)


def search(table, beams=2, max_length=3, min_length=0):
    """Beam search over a table: sequence so far -> probabilities of (START, A, B, END)."""
    state = {"rows": [(START,)] * beams}

    def next_logits(tokens, origin):
        if origin is not None:
            rows = state["rows"]
            state["rows"] = [
                (*rows[o], t) for o, t in zip(origin[0].tolist(), tokens[0].tolist(), strict=True)
            ]
        rows = [table.get(row, (0.01, 0.35, 0.33, 0.31)) for row in state["rows"]]
        return torch.tensor([rows]).log()

    found = beam_search(
        next_logits,
        torch.full((1, beams), START),
        max_length=max_length,
        min_length=min_length,
        end=END,
    )
    return [(h.ids, h.score) for h in found[0]]


def penalised(*probabilities):
    length = len(probabilities)
    log_prob = torch.tensor(probabilities).log().sum().item()
    return pytest.approx(log_prob / ((5 + length) / 6) ** 0.6, abs=1e-4)


def test_the_search_ends_with_the_best_beam_and_keeps_the_others_as_they_are():
    table = {(START,): (0.01, 0.6, 0.38, 0.01), (START, A): (0.01, 0.01, 0.01, 0.97)}
    assert search(table) == [
        ([START, A, END], penalised(0.6, 0.97)),
        ([START, B, A], penalised(0.38, 0.35)),
    ]


def test_an_ended_beam_that_is_not_the_best_continues_past_its_end():
    table = {
        (START,): (0.01, 0.59, 0.01, 0.39),  # the end comes second
        (START, A): (0.01, 0.97, 0.01, 0.01),
        (START, END): (0.01, 0.01, 0.97, 0.01),
        (START, A, A): (0.01, 0.01, 0.01, 0.97),
    }
    found = search(table, max_length=4)
    assert found[0] == ([START, A, A, END], penalised(0.59, 0.97, 0.97))
    assert ([START, END], penalised(0.39)) in search(table, beams=3, max_length=4)
    assert [START, END, B] in [ids[:3] for ids, _ in search(table, beams=3, max_length=4)]


def test_an_earlier_and_shorter_answer_can_win():
    table = {
        (START,): (0.01, 0.5, 0.01, 0.48),
        (START, A): (0.25, 0.25, 0.25, 0.25),
        (START, END): (0.25, 0.25, 0.25, 0.25),
    }
    assert search(table)[0] == ([START, END], penalised(0.48))


def test_no_end_before_the_least_length():
    table = {(START,): (0.01, 0.02, 0.01, 0.96)}
    assert search(table, min_length=1)[0][0] != [START, END]
    assert search(table, min_length=0)[0][0] == [START, END]


def test_length_penalty_is_undone_between_steps():
    # 0.61 * 0.55 is less than 0.36, but the length penalty is milder on two tokens than on one.
    table = {(START,): (0.01, 0.61, 0.02, 0.36), (START, A): (0.01, 0.01, 0.43, 0.55)}
    assert search(table)[0] == ([START, A, END], penalised(0.61, 0.55))
    table |= {(START, A): (0.01, 0.97, 0.01, 0.01), (START, A, A): (0.01, 0.01, 0.01, 0.97)}
    assert search(table)[0] == ([START, A, A, END], penalised(0.61, 0.97, 0.97))


def test_a_token_of_probability_0_ranks_below_a_forbidden_end():
    """As in the reference, where a forbidden end has -1e20 and the softmax has real zeros."""

    def next_logits(tokens, origin):
        return torch.tensor([[[-200.0, 0.0, -200.0, 5.0]] * 2])

    starts = torch.full((1, 2), START)
    [found] = beam_search(next_logits, starts, max_length=1, min_length=1, end=END)
    assert [h.ids for h in found] == [[START, A], [START, END]]


@pytest.fixture(scope="module")
def judge():
    return MPlugAnswerer.load(TINY)


def test_an_image_is_encoded_once_for_all_its_questions(judge, monkeypatch):
    calls = []
    encode = MPlug.encode_images
    monkeypatch.setattr(MPlug, "encode_images", lambda *a: calls.append(1) or encode(*a))
    questions = [Question("0", "", i, (), "", f"is there a dog {i}?") for i in range(40)]
    answers = judge.answer(Image.new("RGB", (30, 40)), questions)
    assert len(answers) == 40 and len(calls) == 1
    alone = [judge.answer(Image.new("RGB", (30, 40)), [question]) for question in questions[:3]]
    assert alone == [[answer] for answer in answers[:3]]
    assert judge.answer(Image.new("RGB", (30, 40)), []) == []


def test_identity_names_weights_and_hash(judge):
    identity = judge.identity()
    assert identity["judge"] == "mplug" and identity["weights"] == "with_visn_fc"
    assert all(len(value) == 64 for value in identity["sha256"].values())
    assert MPlugAnswerer.load(TINY, source="owner/repo").identity()["weights"] == "owner/repo"


def test_a_judge_with_another_configuration_is_another_judge(tmp_path, judge):
    """Its verdicts used to count as those of the same weights under the old configuration."""
    folder = copy_with(tmp_path, lambda weights: None)
    config = json.loads((folder / "config_bert.json").read_text())
    (folder / "config_bert.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    hashes = MPlugAnswerer.load(folder).identity()["sha256"]
    changed = {name for name, value in hashes.items() if value != judge.identity()["sha256"][name]}
    assert "config_bert.json" in changed and "config.yaml" not in changed


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_any_mode_are_squashed_to_a_square(mode):
    pixels = preprocess(Image.new("RGB", (9, 30), (255, 0, 0)).convert(mode), 14)
    assert pixels.shape == (3, 14, 14) and pixels.dtype == torch.float32


def test_real_size():
    with torch.device("meta"):
        model = MPlug(MPlugConfig())
    count = sum(p.numel() for p in model.parameters())
    # 589.4 M in the reference's layout, which counts the output matrix and the word embedding.
    assert count + 30522 * 768 == pytest.approx(589.4e6, rel=1e-3)
    vision = model.visual_encoder["visual"]
    assert sum(p.numel() for p in vision.parameters()) == pytest.approx(304.2e6, rel=1e-3)
    assert vision.positional_embedding.shape == (1297, 1024)


def copy_with(tmp_path, change):
    """A copy of the tiny folder with changed weights."""
    folder = tmp_path / "judge"
    shutil.copytree(TINY, folder)
    content = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(content["module"])
    torch.save(content, folder / "pytorch_model.bin")
    return folder


# Of 7 fusion layers in the file the last 5 are used: number 2 is the first.
LAYER = "model.fusion_encoder.encoder.layer.2.attention.output.dense.weight"
POSITIONS = "model.visual_encoder.visual.positional_embedding"
OUTPUT = "model.text_decoder.cls.predictions.decoder.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(POSITIONS), "missing.*visual.positional_embedding"),
        (lambda w: w.pop(LAYER), r"missing.*fusion_encoder\.encoder\.layer\.0\.attention"),
        (lambda w: w.update({"model.visn_fc.extra": torch.ones(2)}), "unexpected.*visn_fc.extra"),
        (lambda w: w.update({POSITIONS: torch.ones(5, 128)}), r"mis-shaped.*\(5, 128\)"),
        (lambda w: w.update({OUTPUT: w[OUTPUT] + 1}), "must equal text_decoder.bert.embeddings"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        MPlug.load(copy_with(tmp_path, change))


def test_unused_weights_may_be_absent(tmp_path, judge):
    def drop(weights):
        for key in list(weights):
            twin = "_m." in key
            tower = key.startswith("model.visual_encoder.") and ".visual." not in key
            if twin or tower or (".encoder.layer.0.crossattention" in key and "fusion" in key):
                del weights[key]

    model = MPlug.load(copy_with(tmp_path, drop))
    for name, value in judge.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_weights_may_be_nested_twice(tmp_path, judge):
    """The reference unwraps "model", then "module"."""
    folder = copy_with(tmp_path, lambda weights: None)
    content = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({"model": content}, folder / "pytorch_model.bin")
    model = MPlug.load(folder)
    for name, value in judge.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_there_may_be_fewer_fusion_layers(tmp_path):
    """The reference then uses all layers that there are."""

    def drop(weights):
        layer = "model.fusion_encoder.encoder.layer."
        for key in list(weights):
            if key.startswith(layer) and int(key.removeprefix(layer).split(".")[0]) >= 3:
                del weights[key]

    folder = copy_with(tmp_path, drop)
    config = json.loads((folder / "config_bert.json").read_text())
    assert config["fusion_layers"] > 3
    (folder / "config_bert.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    model = MPlug.load(folder)
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)["module"]
    assert len(list(model.fusion_encoder.encoder)) == 3
    name = "fusion_encoder.encoder.layer.0.attention.output.dense.weight"
    assert torch.equal(model.state_dict()[name], stored[f"model.{name}"].float())


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("[CLS] don ' t [SEP]", "don't"),
        ("[CLS] yes , it ' ##s red . [SEP] [PAD]", "yes, it's red."),
        ("[CLS] ' yes ' [UNK] no ! ?", "' yes'no!?"),
        ("[CLS] ##ing yes ##ing", "##ing yesing"),
    ],
)
def test_answers_are_spaced_as_in_the_reference(tmp_path, words, written):
    """Expected: BertTokenizer.decode of transformers 4.41."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", "##ing"]
    vocabulary += ["don", "it", "t", "yes", "no", "red", *"',.!?"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    ids = [vocabulary.index(word) for word in words.split()]
    assert write_out(load_tokenizer(tmp_path / "vocab.txt"), ids) == written


@pytest.mark.parametrize(
    "name", ["config.yaml", "config_bert.json", "vocab.txt", "pytorch_model.bin"]
)
def test_a_missing_file_is_named(tmp_path, name):
    folder = tmp_path / "judge"
    shutil.copytree(TINY, folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        MPlugAnswerer.load(folder)


@pytest.mark.parametrize("width", [96, 64])
def test_the_two_widths_of_the_vision_tower_must_agree(tmp_path, width):
    """96 is no multiple of a head's width either."""
    folder = copy_with(tmp_path, lambda weights: None)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"clip_vision_width": width}))
    with pytest.raises(UserError, match=f"clip_vision_width {width} must equal vision_width"):
        MPlugAnswerer.load(folder)


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(TINY, folder)
    with open(folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("".join(f"more{i}\n" for i in range(300)))
    with pytest.raises(ValueError, match="belong to different models"):
        MPlugAnswerer.load(folder)


def test_no_connected_layer_without_a_stride():
    assert not any(BertConfig().is_connected(k) for k in range(6))
    assert [BertConfig(stride_layer=3).is_connected(k) for k in range(6)] == [0, 0, 0, 1, 0, 0]

"""Judges other than mPLUG, as tiny random models, and what `load_answerer` says about mistakes."""

import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from dpg_bench.answerers import DEFAULT_WEIGHTS, load_answerer
from dpg_bench.questions import Question

QUESTIONS = ["is it red ?", "is there a dog ?", "dog", "red dog ?", "is a dog there ?"]
WORDS = sorted({*" ".join(QUESTIONS).split(), "yes", "no", "Answer", "with", "or", "."})
IMAGES = [
    Image.new("RGB", (30, 40), color) for color in ("red", "white", "blue", "black", "orange")
] + [Image.effect_noise((32, 32), 90)]


def ask(judge, image, texts=QUESTIONS):
    rows = [Question("0", "", i, (), "", text) for i, text in enumerate(texts, start=1)]
    return judge.answer(image, rows)


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    ids = {"bos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    text = size | ids | {"vocab_size": len(words), "encoder_hidden_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8})
    BlipForQuestionAnswering(config).save_pretrained(folder)
    pixels = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(pixels, BertTokenizer(vocab=words)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    folder = tmp_path_factory.mktemp("chat")
    special = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
    words = ["<pad>", "<unk>", *special, "user", "assistant", "Yes", "No", *WORDS]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special,
    )
    template = (
        "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% endfor %} {% if add_generation_prompt %}assistant{% endif %}"
    )
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches, min_pixels=64, max_pixels=1024),
        tokenizer,
        Qwen2VLVideoProcessor(**patches),
        chat_template=template,
    )
    size = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    text = size | {
        "vocab_size": len(words),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    vision = size | {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 16,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=2,
        vision_end_token_id=3,
        image_token_id=4,
        video_token_id=5,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(blip_folder):
    return load_answerer("blip-vqa", blip_folder)


@pytest.fixture(scope="module")
def chat(chat_folder):
    return load_answerer("vlm", chat_folder)


@torch.no_grad()
def blip_margin(judge, image, text):
    """log P(yes) - log P(no) from the library's own generation, one question at a time."""
    inputs = judge.processor(images=image, text=text, return_tensors="pt")
    made = judge.model.generate(
        **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    yes, no = judge.processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    return (made.logits[0][0, yes] - made.logits[0][0, no]).item()


def test_blip_agrees_with_the_librarys_generation(blip):
    margins = torch.tensor([[blip_margin(blip, i, t) for t in QUESTIONS] for i in IMAGES])
    assert (
        margins.flatten().sort().values.diff().min() > 1e-4
    )  # both image and question make a difference
    bias = blip.model.text_decoder.cls.predictions.decoder.bias
    before = bias.clone()
    for border in (margins.flatten().sort().values[[5, 15, 25]] - 5e-5).tolist():
        with torch.no_grad():
            bias.copy_(before)
            bias[sorted(blip.yes)] -= border
        answers = [ask(blip, image) for image in IMAGES]
        assert answers == [["yes" if m > border else "no" for m in row] for row in margins]


def test_chat_compares_yes_with_no(chat):
    prompt = "user <|vision_start|><|image_pad|><|vision_end|>{} Answer with yes or no. assistant"
    words = ["yes", "Yes", "no", "No"]
    yes, also_yes, no, also_no = chat.processor.tokenizer.convert_tokens_to_ids(words)
    assert (chat.yes, chat.no) == ({yes, also_yes}, {no, also_no})
    answers, expected = [], []
    for image in IMAGES:
        answers += ask(chat, image)
        for text in QUESTIONS:
            inputs = chat.processor(images=[image], text=[prompt.format(text)], return_tensors="pt")
            with torch.no_grad():
                odds = chat.model(**inputs).logits[0, -1].softmax(dim=-1)
            says_yes = odds[yes] + odds[also_yes] > odds[no] + odds[also_no]
            expected.append("yes" if says_yes else "no")
    assert answers == expected
    head = chat.model.get_output_embeddings().weight
    with torch.no_grad():
        head[[yes, also_yes, no, also_no]] = head[[no, also_no, yes, also_yes]]
    swapped = [answer for image in IMAGES for answer in ask(chat, image)]
    assert all({a, b} == {"yes", "no"} for a, b in zip(answers, swapped, strict=True))


def test_identities_name_judge_and_weights(blip, chat, chat_folder):
    assert [j.identity()["judge"] for j in (blip, chat)] == ["blip-vqa", "vlm"]
    assert chat.identity()["weights"] == chat_folder.name
    assert all(len(j.identity()["sha256"]["model.safetensors"]) == 64 for j in (blip, chat))
    assert "{}" in chat.identity()["request"]


def test_missing_weights(blip_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cut"
    shutil.copytree(blip_folder, folder)
    kept = load_file(folder / "model.safetensors")
    kept.pop("text_encoder.embeddings.word_embeddings.weight")
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks weights: text_encoder\.embeddings\.word_embeddings"
    ):
        load_answerer("blip-vqa", folder)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_answerer("vlm", tmp_path)


def test_unknown_judges_and_folders():
    with pytest.raises(ValueError, match="unknown judge 'gpt'; choose one of mplug, shapes"):
        load_answerer("gpt")
    for name in ("mplug", "blip-vqa", "vlm"):
        with pytest.raises(
            ValueError, match=rf"{DEFAULT_WEIGHTS[name]} is neither.*Offline.*judge {name}"
        ):
            load_answerer(name)


def test_a_model_without_a_chat_template_is_refused(chat_folder, tmp_path):
    """It used to be noticed at the first answer, after all images had been drawn."""
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        load_answerer("vlm", folder)

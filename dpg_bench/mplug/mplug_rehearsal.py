"""mPLUG with random weights in the layout of its published folder, for a rehearsal."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from dpg_bench.mplug.mplug_model import CONFIG, VOCABULARY, WEIGHTS, MPlug, MPlugConfig
from dpg_bench.questions import Question
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights, shapes_of

SIZES = ("large",)
_FUSION = "fusion_encoder.encoder.layer."
_HEAD, _WORDS = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings"


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write the folder; its vocabulary has the published size, with made-up words."""
    config = MPlugConfig()
    bert = {**asdict(config.bert), "stride_layer": 6}
    with torch.device("meta"):
        shapes = shapes_of(MPlug(config).state_dict())
    first = config.bert.num_hidden_layers - config.bert.fusion_depth
    # The file numbers fusion layers from BERT's first layer, not from the first one used.
    named = {f"model.{_renumbered(name, first)}": size for name, size in shapes.items()}
    same = {f"{_HEAD}.decoder.weight": f"{_WORDS}.weight", f"{_HEAD}.decoder.bias": f"{_HEAD}.bias"}
    tied = {f"model.{a}": f"model.{b}" for a, b in same.items() if a in shapes and b in shapes}
    weights.pickle(folder / WEIGHTS, named, nest="module", tied=tied)
    settings = {k: v for k, v in asdict(config).items() if k != "bert"}
    (folder / CONFIG).write_text(json.dumps(settings))  # JSON is valid YAML
    (folder / config.bert_config).write_text(json.dumps(bert))
    words = ["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [chr(code) for code in range(33, 127)]
    words += [f"word{n}" for n in range(config.bert.vocab_size - len(words))]
    (folder / VOCABULARY).write_text("\n".join(words) + "\n")
    return Written(side=512)


def _renumbered(name: str, first: int) -> str:
    if not name.startswith(_FUSION):
        return name
    number, _, rest = name[len(_FUSION) :].partition(".")
    return f"{_FUSION}{int(number) + first}.{rest}"


def judge(folder: Path, image: Path) -> str:
    """Load the folder as `dpg_bench/run.py` does, and answer two questions about an image."""
    from dpg_bench.answerers import load_answerer

    answerer = load_answerer("mplug", folder)
    answerer.identity()  # with hashes
    texts = enumerate(("is there a fox?", "is the fox red?"))
    questions = [Question("0", "a fox", n, (), "entity - whole (fox)", t) for n, t in texts]
    return f"answers {answerer.answer(Image.open(image), questions)}"

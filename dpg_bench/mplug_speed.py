"""Questions per second of mPLUG: the image encoded once, against once per question as in
the official script.

Random weights in the shape of the published model (566 M parameters), one image, in turns, so that
whatever else the machine does hits all ways alike.

    python dpg_bench/mplug_speed.py                    # the real size on the CPU: some minutes
    python dpg_bench/mplug_speed.py --questions 13 --rounds 3 --device cuda
"""

import logging
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.sampling import check_counts

log = logging.getLogger(__name__)

SENTENCE = "is there a red cat on the left of two large wooden boats ?"


@dataclass(frozen=True)
class MPlugTiming:
    """What to time."""

    questions: int = 8
    """Questions about the image (DPG-Bench asks 13 on average)."""
    image_res: int = 504
    """Side of mPLUG's input in pixels: 504 gives 1,297 image tokens."""
    stride_layer: int = 6
    """Every how many fusion layers text and image attend to each other (6: never)."""
    answer_tokens: int = 2
    """Tokens of an answer with its end: "yes" is 2. Random weights would go on to the limit of 10.
    """
    rounds: int = 1
    device: str = "cpu"
    small: bool = False
    """A toy of the same structure, to try the script."""


def build(config: MPlugTiming):
    """mPLUG with random weights, and a tokenizer of a few words."""
    import torch
    from tokenizers import BertWordPieceTokenizer

    from dpg_bench.mplug.bert import BertConfig
    from dpg_bench.mplug.mplug_answerer import QUESTION_TOKENS, MPlugAnswerer
    from dpg_bench.mplug.mplug_model import MPlug, MPlugConfig

    torch.manual_seed(0)
    bert = BertConfig(stride_layer=config.stride_layer)
    shape = MPlugConfig(image_res=config.image_res, max_length=config.answer_tokens, bert=bert)
    if config.small:
        bert = replace(
            bert, hidden_size=48, intermediate_size=64, vocab_size=200, text_decode_layers=2
        )
        shape = replace(
            shape, vision_width=64, clip_vision_width=64, clip_vision_layers=2, bert=bert
        )
    model = MPlug(shape).eval().requires_grad_(False).to(config.device)
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    words = {word: 104 + index for index, word in enumerate(dict.fromkeys(SENTENCE.split()))}
    tokenizer = BertWordPieceTokenizer(special | words)
    tokenizer.enable_padding(length=QUESTION_TOKENS)
    tokenizer.enable_truncation(QUESTION_TOKENS)
    return MPlugAnswerer(model, tokenizer)


def ways(answerer, image, questions: Sequence[str]) -> dict:
    """Name -> how to answer all questions about the image, the official way last."""

    def once_one_by_one():
        encoded = answerer.encode(image)
        return [answerer.search_encoded(encoded, [question])[0] for question in questions]

    return {
        "image once, questions in a batch": lambda: answerer.search(image, questions),
        "image once, questions one by one": once_one_by_one,
        "image once per question": lambda: [answerer.search(image, [q])[0] for q in questions],
    }


def measure(config: MPlugTiming, answerer) -> tuple[dict[str, float], bool]:
    """Median seconds by way, and whether all ways gave the same answers."""
    import torch
    from PIL import Image

    words = SENTENCE.split()
    questions = [" ".join(words[i % 5 :]) for i in range(config.questions)]
    image = Image.effect_noise((config.image_res, config.image_res), 64)
    seconds: dict[str, list[float]] = {}
    answers = []
    for _ in range(config.rounds):
        for name, work in ways(answerer, image, questions).items():
            start = time.perf_counter()
            found = work()
            if answerer.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            answers.append([best[0].ids for best in found])
            log.info("%s: %.2f s", name, seconds[name][-1])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return medians, all(ids == answers[0] for ids in answers)


def main() -> None:
    config = cli.parse(MPlugTiming, __doc__)
    names = ("questions", "rounds", "answer_tokens")
    check_counts(**{name: getattr(config, name) for name in names})
    import torch

    answerer = build(config)
    millions = sum(p.numel() for p in answerer.model.parameters()) / 1e6
    medians, same = measure(config, answerer)
    print(
        f"mPLUG, {millions:.1f} M random parameters, {config.image_res} px, stride "
        f"{config.stride_layer}, {config.questions} questions, answers of {config.answer_tokens} "
        f"tokens, {config.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.machine()}\n\n| | s per image | questions per second | ratio |\n|---|---|---|---|"
    )
    slowest = list(medians.values())[-1]
    for name, median in medians.items():
        rate = config.questions / median
        print(f"| {name} | {median:.2f} | {rate:.3f} | {slowest / median:.2f} |")
    print(f"\nanswers equal: {same}")


if __name__ == "__main__":
    cli.run(main)

"""The mPLUG judge against outputs of modelscope's implementation."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN_ROOT
from PIL import Image
from PIL import __version__ as pillow

from dpg_bench.answerers import load_answerer
from dpg_bench.mplug.mplug_answerer import preprocess, tokenize
from dpg_bench.questions import Question

FOLDERS = [path.parent for path in sorted(GOLDEN_ROOT.rglob("config_bert.json"))]
assert FOLDERS or "T2I_GOLDEN" in os.environ, f"no mPLUG case under {GOLDEN_ROOT}"


class Case:
    """A model folder with its judge and its expected outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.judge = load_answerer("mplug", folder)
        self.model = self.judge.model
        self.cases = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        self.images = [case["image"] for case in self.cases]
        with np.load(folder / "expected_tensors.npz") as stored:
            self.tensors = {name: torch.from_numpy(stored[name]) for name in stored.files}

    def recorded_images(self):
        """Names of the images that this Pillow resizes as the reference's did: before 13 it resized
        tall images in another order, and a tenth of their values differ by one level.
        """
        names = dict.fromkeys(self.images)
        if int(pillow.split(".")[0]) < 13:
            names = [name for name in names if self.image(name).width >= self.image(name).height]
        return names

    def image(self, name):
        return Image.open(self.folder.parent / name)

    def encoded(self, name):
        return self.judge.encode(self.image(name))

    def fused(self, case):
        """Text features, fused image and fused text of a case."""
        ids, mask = tokenize(self.judge.tokenizer, [case["question"]])
        text = self.model.text_encoder(ids, mask)
        return text, *self.model.fusion_encoder(text, mask, self.encoded(case["image"])), mask


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def golden(request):
    with torch.inference_mode():
        yield Case(request.param)


def test_tokens(golden):
    ids, mask = tokenize(golden.judge.tokenizer, [case["question"] for case in golden.cases])
    assert ids.tolist() == [case["input_ids"] for case in golden.cases]
    assert mask.int().tolist() == [case["attention_mask"] for case in golden.cases]


def test_images(golden):
    for name in golden.recorded_images():
        index = Path(name).stem
        pixels = preprocess(golden.image(name), golden.model.config.image_res)
        expected = golden.tensors[f"image_tensor.{index}"]
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
        # The reference's connected layers change the image features in place, so the recorded
        # features are those after its first question about the image.
        first = golden.cases[golden.images.index(name)]
        _, image, _, _ = golden.fused(first)
        expected = golden.tensors[f"image_embeds.{index}"]
        torch.testing.assert_close(image[0], expected, atol=1e-3, rtol=0)


def test_intermediate_tensors(golden):
    numbers = {name.split(".")[0] for name in golden.tensors if name.startswith("case")}
    assert numbers
    for number in sorted(numbers):
        text, image, fused, mask = golden.fused(golden.cases[int(number.removeprefix("case"))])
        state = golden.model.text_decoder.remember(image, fused, mask)
        beams, start = golden.model.config.beam_size, golden.model.start
        first = golden.model.text_decoder.step(torch.full((beams,), start), state)
        # The reference's second step continues the five likeliest tokens.
        scores = first[0].log_softmax(dim=-1)
        if golden.model.config.min_length > 0:
            scores[golden.model.end] = -torch.inf
        second = golden.model.text_decoder.step(scores.topk(beams).indices, state)
        got = {
            "text_encoder_out": text[0],
            "fusion_image_out": image[0],
            "fusion_text_out": fused[0],
            "first_step_logits": first[0],
            "second_step_logits_5beams": second,
        }
        for name, value in got.items():
            expected = golden.tensors[f"{number}.{name}"]
            torch.testing.assert_close(value, expected, atol=1e-3, rtol=0, msg=f"{number}.{name}")


def test_answers(golden):
    """All questions about an image in one call: same ids, and scores within 1e-4."""
    for name in golden.recorded_images():
        cases = [case for case in golden.cases if case["image"] == name]
        found = golden.judge.search(golden.image(name), [case["question"] for case in cases])
        for case, hypotheses in zip(cases, found, strict=True):
            where = (name, case["question"])
            assert hypotheses[0].ids == case["best_ids"], where
            assert hypotheses[0].score == pytest.approx(case["best_score"], abs=1e-4), where
            assert [h.ids for h in hypotheses] == [n["ids"] for n in case["nbest"]], where
            scores = [n["score"] for n in case["nbest"]]
            assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-4), where
        questions = [Question("0", "", 1, (), "", case["question"]) for case in cases]
        answers = golden.judge.answer(golden.image(name), questions)
        assert answers == [case["answer"] for case in cases]


def test_answers_do_not_depend_on_the_batch(golden):
    name = golden.images[0]
    cases = [case for case in golden.cases if case["image"] == name]
    golden.judge.batch, normal = 3, golden.judge.batch
    try:
        found = golden.judge.search(golden.image(name), [case["question"] for case in cases])
    finally:
        golden.judge.batch = normal
    assert [best[0].ids for best in found] == [case["best_ids"] for case in cases]

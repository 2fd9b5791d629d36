"""ImageNet codes in the formats of LlamaGen and RAR: read as they are, or converted once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Killed, folder_content, in_threads, tiny_rar
from runs import tiny_run

from t2i.data.encoding import Encoding, build_store
from t2i.data.sources import pretokenized
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes
from t2i.data.store import CodeStore
from t2i.errors import UserError
from t2i.models.llamagen.llamagen_model import LlamaGen
from t2i.processes import ALONE, Processes
from t2i.training.batches import TrainingData
from t2i.training.check import check
from t2i.training.config import EngineOptions, LabelledOptions, TrainConfig
from t2i.training.examples import encode_examples
from t2i.training.recipes import recipe
from t2i.training.start import build_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pretokenized, "_BLOCK", 64)


def write_llamagen(root, images=4, views=3, offset=0):
    for kind in ("codes", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True)
    for i in range(images):
        codes = np.arange(views * 5).reshape(1, views, 5) + 100 * i + offset
        np.save(root / "imagenet256_codes" / f"{i}.npy", codes)
        np.save(root / "imagenet256_labels" / f"{i}.npy", np.array([7 * i]))
    return root


def test_llamagen_folders_are_known_by_their_content(tmp_path):
    """Case 10: their key depends on what they hold, not on their names."""
    before = LlamaGenCodes(write_llamagen(tmp_path / "a")).key
    (tmp_path / "a").rename(tmp_path / "b")
    assert LlamaGenCodes(tmp_path / "b").key == before
    assert LlamaGenCodes(write_llamagen(tmp_path / "c", offset=1)).key != before


def test_llamagen_folders_are_read_in_numeric_order(tmp_path):
    write_llamagen(tmp_path, images=11)
    (tmp_path / "imagenet256_codes" / "².npy").touch()  # a digit to isdigit(), but not to int()
    data = LlamaGenCodes(tmp_path)  # "10" sorts before "2" as text
    assert (len(data), data.views) == (11, 3)
    assert [data.condition(i) for i in (10, 2)] == [70, 14]
    codes = data.codes(torch.tensor([10, 2]), torch.tensor([0, 4]))
    assert codes.dtype == torch.int64
    assert codes[..., 0].tolist() == [[1000 + t for t in range(5)], [205 + t for t in range(5)]]


def test_two_crop_ranges_of_llamagen(tmp_path):
    a = write_llamagen(tmp_path / "ten_crop")
    b = write_llamagen(tmp_path / "ten_crop_105", offset=5000)
    data = LlamaGenCodes(a, b)
    assert data.views == 6
    first = [int(data.codes([1], [view])[0, 0, 0]) for view in range(7)]
    assert first == [100, 105, 110, 5100, 5105, 5110, 100]


def test_broken_llamagen_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder of codes"):
        LlamaGenCodes()
    with pytest.raises(ValueError, match="must hold one folder named like imagenet256_codes"):
        LlamaGenCodes(tmp_path)
    root = write_llamagen(tmp_path / "a")
    other = write_llamagen(tmp_path / "b", images=5)
    with pytest.raises(ValueError, match=r"does not belong to .*4\.npy is in only one"):
        LlamaGenCodes(root, other)
    for kind in ("codes", "labels"):
        (other / f"imagenet256_{kind}" / "4.npy").unlink()
    np.save(other / "imagenet256_labels" / "3.npy", np.array([8]))
    with pytest.raises(ValueError, match="hold different images"):
        LlamaGenCodes(root, other)
    data = LlamaGenCodes(root)
    path = root / "imagenet256_codes" / "2.npy"
    np.save(path, np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"2\.npy holds float64 \[1, 3\], expected integers"):
        data.codes([2], [0])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"2\.npy cannot be read"):
        data.codes([2], [0])
    (root / "imagenet256_labels" / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"1\.npy is in only one of them"):
        LlamaGenCodes(root)


def test_files_that_differ_from_the_first_are_named(tmp_path):
    """Used to end training in an IndexError or in np.stack: files of an interrupted extraction, or
    of two mixed ones.
    """
    root = write_llamagen(tmp_path / "a")
    np.save(root / "imagenet256_codes" / "2.npy", np.zeros((1, 2, 5), int))
    np.save(root / "imagenet256_codes" / "3.npy", np.zeros((1, 3, 4), int))
    np.save(root / "imagenet256_labels" / "1.npy", np.array([1.7]))
    data = LlamaGenCodes(root)
    with pytest.raises(UserError, match=r"codes/2\.npy holds \[2, 5\] .*, 0\.npy \[3, 5\]"):
        data.codes([1, 2], [0, 2])
    with pytest.raises(UserError, match=r"codes/3\.npy holds \[3, 4\]"):
        data.codes([1, 3])
    with pytest.raises(UserError, match=r"labels/1\.npy holds float64 \[1\], expected a label"):
        data.condition(1)
    other = write_llamagen(tmp_path / "b")
    for i in range(4):
        np.save(other / "imagenet256_codes" / f"{i}.npy", np.zeros((1, 1, 4), int))
    with pytest.raises(UserError, match=r"different sizes \(.*a/\S+ 5, .*b/\S+ 4 positions"):
        LlamaGenCodes(root, other)


def test_every_label_is_part_of_the_key(tmp_path):
    """Used to cover only every third of 200 labels."""
    root = write_llamagen(tmp_path, images=200)
    before = LlamaGenCodes(root).key
    assert LlamaGenCodes(root).key == before
    np.save(root / "imagenet256_labels" / "1.npy", np.array([8]))
    assert LlamaGenCodes(root).key != before


def write_jsonl(path, count=8, end="\n"):
    lines = [json.dumps({"class_id": i % 5, "tokens": [i, i + 1, 1023 - i]}) for i in range(count)]
    path.write_text("\n".join(lines) + end)
    return path


def convert(path, folder, processes=ALONE):
    encoding = Encoding(lambda codes: codes, None, shard_size=3)
    return build_store(JsonlCodes(path), folder, encoding, processes=processes)


@pytest.mark.parametrize("end", ["\n", ""])
def test_jsonl_is_converted_once(tmp_path, end, monkeypatch):
    path = write_jsonl(tmp_path / "maskgitvq.jsonl", end=end)
    folder = convert(path, tmp_path / "cache")
    store = CodeStore(folder)
    assert (len(store), store.views) == (8, 1)
    assert store.codes([0, 7], [0, 9])[..., 0].tolist() == [[0, 1, 1023], [7, 8, 1016]]
    assert [store.condition(i) for i in (6, 3)] == [1, 3]
    assert store.name(6) == "line 7"
    monkeypatch.setattr(JsonlCodes, "__getitem__", None)
    assert convert(path, tmp_path / "cache") == folder


def test_jsonl_after_a_kill_and_by_two_processes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "maskgitvq.jsonl")
    whole = folder_content(convert(path, tmp_path / "one"))
    parsed, real = [], JsonlCodes._parse

    def parse(source, index):
        if index == 5 and len(parsed) < 7:
            raise Killed
        parsed.append(index)
        return real(source, index)

    monkeypatch.setattr(JsonlCodes, "_parse", parse)
    with pytest.raises(Killed):
        convert(path, tmp_path / "killed")
    parsed[:] = [-1] * 7
    folder = convert(path, tmp_path / "killed")
    assert parsed[7:] == [0, 3, 4, 5, 6, 7], "line 0 is read again, for the number of tokens"
    assert folder_content(folder) == whole
    in_threads(lambda rank: convert(path, tmp_path / "two", Processes(rank, 2, patience=20)))
    (folder,) = (tmp_path / "two").iterdir()
    assert folder_content(folder) == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_id": 1, "tokens": [1, 2, 3]', "line 9 is not a line of codes"),
        ('{"label": 1, "tokens": [1, 2, 3]}', "line 9 is not a line of codes: KeyError"),
        ('{"class_id": 1, "tokens": [1, 2]}', "line 9: class 1 and 2 tokens; expected .* 3 tokens"),
        ('{"class_id": 1000, "tokens": [1, 2, 3]}', "line 9: class 1000"),
        ('{"class_id": 1, "tokens": [1, 2, 1024]}', "line 9: .* 3 tokens below 1024"),
        ("", "line 9 is not a line of codes"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write_jsonl(tmp_path / "maskgitvq.jsonl", end=f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "cache")


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        JsonlCodes(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        JsonlCodes(tmp_path / "empty.jsonl")


def test_images_are_encoded_without_tf32(tiny_world, monkeypatch):
    """TF32 would change codes, and a cache's key does not tell on which device it was made."""
    asked, encode = [], LlamaGen.encode_images

    def encode_images(backbone, pixels):
        asked.append(torch.backends.cudnn.allow_tf32)
        return encode(backbone, pixels)

    monkeypatch.setattr(LlamaGen, "encode_images", encode_images)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    config = tiny_run(tiny_world, "-", data__cache_dir=tiny_world / "without_tf32")
    encode_examples(config, build_model(config).backbone, ALONE)
    assert asked and not any(asked) and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("positions", "code", "message"),
    [
        (15, 1, r"15 x 1 codes .* this rar backbone 16 x 1: they come from another tokenizer"),
        (
            16,
            48,
            r"codes from 0 to 48, but this rar backbone's vocabulary is \(48,\): they come from another tokenizer",
        ),
        (
            16,
            -1,
            r"codes from -1 to 0, but this rar backbone's vocabulary is \(48,\): they come from another tokenizer",
        ),
    ],
)
def test_codes_of_another_tokenizer_are_refused(tmp_path, positions, code, message):
    for kind in ("codes", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir(parents=True)
    codes = np.zeros((1, 2, positions), int)
    codes[0, 0, 3] = code
    np.save(tmp_path / "imagenet256_codes" / "0.npy", codes)
    np.save(tmp_path / "imagenet256_labels" / "0.npy", np.array([7]))
    config = TrainConfig(data=LabelledOptions(source=(str(tmp_path),)))
    with pytest.raises(ValueError, match=message):
        encode_examples(config, tiny_rar(), ALONE)


def test_codes_that_do_not_fit_are_named_before_the_run(tmp_path):
    """--check looked at the first image or line alone; in mid-run no file was named."""
    spec = replace(tiny_rar().spec, grid=(1, 5), subvocabs=(1000,))
    root = write_llamagen(tmp_path / "a")
    LlamaGenCodes(root).check_some(spec.check_codes, 22)
    np.save(root / "imagenet256_labels" / "2.npy", np.array([22]))
    with pytest.raises(UserError, match=r"labels/2\.npy holds class 22; expected one below 22"):
        LlamaGenCodes(root).check_some(spec.check_codes, 22)
    np.save(root / "imagenet256_labels" / "2.npy", np.array([21]))
    np.save(root / "imagenet256_codes" / "3.npy", np.full((1, 3, 5), 1000))
    with pytest.raises(UserError, match=r"codes/3\.npy: the data has codes from 1000 to 1000"):
        LlamaGenCodes(root).check_some(spec.check_codes, 22)
    end = '\n{"class_id": true, "tokens": [0, 1, 2]}'
    path = write_jsonl(tmp_path / "maskgitvq.jsonl", end=end)
    spec = replace(spec, grid=(1, 3), subvocabs=(1024,))
    with pytest.raises(UserError, match="line 9: class True and 3 tokens"):
        JsonlCodes(path).check_some(spec.check_codes)


def test_codes_of_another_models_tokenizer_are_pointed_out(tmp_path):
    """RAR's codes, below 1024, were taken for LlamaGen's, below 16384: every code was another."""
    path = tmp_path / "maskgitvq.jsonl"
    line = json.dumps({"class_id": 1, "tokens": list(range(1024))[::4]})
    path.write_text("\n".join([line] * 20))
    report = check(recipe("llamagen-b-256", {"data.source": (str(path),)}))
    assert "no code of the first line is above 1020, though this model has 16384" in report
    assert JsonlCodes(path).remarks == []


@pytest.mark.parametrize(
    ("wrong", "value", "message"),
    [
        ("labels", np.array([10**6]), "class label 1000000 "),
        ("codes", np.full((1, 1, 16), 10**6), "codes from .* to 1000000"),
    ],
)
def test_what_does_not_fit_is_named_in_a_run(tmp_path, wrong, value, message):
    backbone, root = tiny_rar(), tmp_path / "codes"
    for kind, content in (("codes", np.zeros((1, 1, 16), int)), ("labels", np.array([1]))):
        (root / f"imagenet256_{kind}").mkdir(parents=True)
        for i in range(4):
            np.save(root / f"imagenet256_{kind}" / f"{i}.npy", content)
    np.save(root / f"imagenet256_{wrong}" / "2.npy", value)
    data = LabelledOptions(source=(str(root),), validation_samples=1)
    config = TrainConfig(data=data, batch_size=3, engine=EngineOptions(micro_batch=3))
    with pytest.raises(UserError, match=rf"{message}.*in one of .*2\.npy \(number 2\)"):
        examples = TrainingData(config, backbone, ALONE)
        _ = [*examples.validation_batches(), *examples.micro_batches(0)]


def test_a_damaged_cache_is_named_in_a_run_by_its_own_message(tmp_path):
    """Its names are in the damaged file, too: asking for them hid what was wrong."""
    line = json.dumps({"class_id": 1, "tokens": [0] * 16})
    (tmp_path / "codes.jsonl").write_text("\n".join([line] * 4))
    data = LabelledOptions(
        source=(str(tmp_path / "codes.jsonl"),), cache_dir=tmp_path / "cache", validation_samples=1
    )
    config = TrainConfig(data=data, batch_size=3, engine=EngineOptions(micro_batch=3))
    examples = TrainingData(config, tiny_rar(), ALONE)
    (shard,) = tmp_path.glob("cache/*/*.safetensors")
    shard.unlink()
    examples.store = CodeStore(shard.parent)
    with pytest.raises(
        UserError, match=r"^\S+\.safetensors is missing or damaged.*start again[^(]*$"
    ):
        _ = [*examples.micro_batches(0)]

"""The store of codes: content, resuming after a kill, several processes, the key, the report."""

import gc
import json
import os
import resource
import signal
import time
import tracemalloc
from itertools import chain
from pathlib import Path

import pytest
import torch
from forks import exit_codes, fork
from helpers import Killed, in_threads, open_source
from PIL import Image
from safetensors.torch import load_file

from t2i.data import store
from t2i.data.encoding import Encoding, build_store
from t2i.data.images import ImageRules, Views
from t2i.data.order import sample_index
from t2i.data.samples import Sample, Source
from t2i.data.shards import ShardReader
from t2i.data.store import CodeStore
from t2i.errors import UserError
from t2i.processes import ALONE, Processes

WIDTH = 4  # of the text features


def encode_images(pixels):
    """Codes [B, 2, 1]: the red and green level of the first pixel."""
    return ((pixels[:, :2, 0, 0, None] + 1) * 127.5).round().long()


def encode_captions(captions):
    """One token per word: row w of the features is (length of word w, w, 0, 0)."""
    return [
        torch.tensor([[len(word), w, 0, 0] for w, word in enumerate(caption.split())]).float()
        for caption in captions
    ]


class Encoder:
    """Counts its images; dies before the image with this number."""

    def __init__(self, dies_at=10**9):
        self.seen, self.dies_at = 0, dies_at

    def __call__(self, pixels):
        self.seen += len(pixels)
        if self.seen > self.dies_at:
            raise Killed
        return encode_images(pixels)


class ListSource(Source):
    """PIL images of increasing red level; `stream` hides the length and random access."""

    def __init__(self, samples, stream=False):
        super().__init__("list", {"n": len(samples)}, None if stream else len(samples))
        self._samples = samples

    def __getitem__(self, index):
        return self._samples[index] if self.length is not None else super().__getitem__(index)

    def __iter__(self):
        return iter(self._samples)


def make_samples(n=10, skipped=(2, 7)):
    return [
        Sample(i, f"key{i}", Image.new("RGB", (8, 8), (i, 2 * i, 0)), [f"{'x' * (i + 1)} is {i}"])
        if i not in skipped
        else Sample(i, f"key{i}", None, ["gone"])
        for i in range(n)
    ]


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def build(samples_or_source, folder, *, expected_key=None, processes=ALONE, **changes):
    """The store of samples for this `Encoding` with changes."""
    source = samples_or_source
    if not isinstance(source, Source):
        source = ListSource(source)
    key, sizes = {"tokenizer": "t"}, {"batch_size": 3, "shard_size": 4}
    defaults = {"rules": ImageRules(8), "captions": encode_captions, "key": key, **sizes}
    encoding = Encoding(**({"images": encode_images} | defaults | changes))
    options = {"expected_key": expected_key, "processes": processes}
    return build_store(source, folder, encoding, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_content_of_a_store(tmp_path):
    store = CodeStore(build(make_samples(), tmp_path))
    kept = [0, 1, 3, 4, 5, 6, 8, 9]
    assert len(store) == 8
    codes = store.codes(torch.arange(8))
    assert codes.dtype == torch.int64
    assert codes.tolist() == [[[i], [2 * i]] for i in kept]
    assert store.codes([6, 0]).tolist() == [[[8], [16]], [[0], [0]]]
    assert [store.name(i) for i in range(8)] == [f"key{i}" for i in kept]
    assert store.condition(7) == "xxxxxxxxxx is 9"
    with pytest.raises(IndexError):
        store.codes([8])
    for path in tmp_path.rglob("shard_*"):
        path.unlink()
    assert len(CodeStore(store.folder)) == 8, "opening reads the manifest only"


def test_features_are_cut_on_the_right(tmp_path):
    store = CodeStore(build(make_samples(), tmp_path))
    for row in store.features([7, 0], max_tokens=5):
        assert row.dtype == torch.float32 and row.shape == (3, WIDTH)
    (row,) = store.features(torch.tensor([7]), max_tokens=5)
    assert row[:, :2].tolist() == [[10, 0], [2, 1], [1, 2]]
    (row,) = store.features(torch.tensor([7]), max_tokens=2)
    assert row[:, :2].tolist() == [[10, 0], [2, 1]]


def test_several_captions_per_image(tmp_path):
    image = Image.new("RGB", (8, 8))
    samples = [Sample(0, "a", image, ["one"]), Sample(1, "b", image, ["p q", "rr", "s t u"])]
    store = CodeStore(build(samples, tmp_path, batch_size=2))
    counts = [len(store.features([1], 6, choice=[c])[0]) for c in range(5)]
    assert counts == [2, 1, 3, 2, 1]
    assert [store.condition(1, c) for c in range(4)] == ["p q", "rr", "s t u", "p q"]
    features = store.features([0, 1], 3, choice=torch.tensor([5, 1]))
    assert [float(row[0, 0]) for row in features] == [3, 2]
    # A paragraph per line is not what everyone means by a caption of several lines.
    assert report_of(store.folder)["lines"] == [
        "1 have several captions (lines of a text or items of a list); training picks one each time"
    ]


def test_every_view_comes_with_every_caption(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    samples = [Sample(0, "a", image, ["one", "two"])]
    store = CodeStore(build(samples, tmp_path, rules=ImageRules(8, Views("flip"))))
    pairs = [(store.codes([0], [c]).flatten().tolist(), store.condition(0, c)) for c in range(4)]
    assert len({str(pair) for pair in pairs}) == 4 and store.views == 2


def test_storage_types(tmp_path):
    folder = build(make_samples(), tmp_path)
    tensors = load_file(folder / "shard_00000.safetensors")
    assert (tensors["codes"].dtype, tensors["text"].dtype) == (torch.uint16, torch.float16)
    large = build(
        make_samples(),
        tmp_path,
        key={"tokenizer": "large"},
        images=lambda pixels: encode_images(pixels) + 2**17,
        captions=lambda captions: [f.bfloat16() for f in encode_captions(captions)],
    )
    tensors = load_file(large / "shard_00000.safetensors")
    assert (tensors["codes"].dtype, tensors["text"].dtype) == (torch.int32, torch.bfloat16)
    assert CodeStore(large).codes([1])[0, :, 0].tolist() == [2**17 + 1, 2**17 + 2]
    with pytest.raises(ValueError, match=r"not finite in torch\.float16.*bfloat16"):
        build(
            make_samples(),
            tmp_path / "overflow",
            captions=lambda captions: [f * 1e6 for f in encode_captions(captions)],
        )


def test_without_text_features(tmp_path):
    store = CodeStore(build(make_samples(), tmp_path, captions=None))
    assert store.codes([1])[0, 0, 0] == 1
    assert store.condition(1) == "xx is 1"
    with pytest.raises(ValueError, match="without text features"):
        store.features([0], 4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dies_at", [0, 3, 5, 7])
def test_resume_after_a_kill(tmp_path, dies_at, stream):
    whole = build(make_samples(), tmp_path / "whole")
    source = ListSource(make_samples(), stream)
    with pytest.raises(Killed):
        build(source, tmp_path / "killed", images=Encoder(dies_at))
    (folder,) = (tmp_path / "killed").iterdir()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert not (folder / "manifest.json").exists()
    with pytest.raises(ValueError, match="not a finished store of codes"):
        CodeStore(folder)
    rest = Encoder()
    assert build(source, tmp_path / "killed", images=rest) == folder
    in_finished = sum(len(load_file(path)["codes"]) for path in finished)
    assert rest.seen == 8 - in_finished
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert files(folder) == files(whole)
    again = Encoder()
    build(source, tmp_path / "killed", images=again)
    assert again.seen == 0


def test_a_kill_while_a_shard_is_written_leaves_no_shard(tmp_path, monkeypatch):
    def half_written(tensors, path):
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("t2i.data.shards.save_file", half_written)
        with pytest.raises(Killed):
            build(make_samples(), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert len(CodeStore(build(make_samples(), tmp_path))) == 8


@pytest.mark.parametrize("dies_at", range(1, 11))
def test_resume_after_a_kill_while_writing(tmp_path, monkeypatch, dies_at):
    """Ten files get their final names: source, lines and tensors of three shards, report, manifest.
    One of these renames is interrupted.
    """
    whole, replace, calls = build(make_samples(), tmp_path / "whole"), os.replace, []

    def replace_or_die(*names):
        calls.append(names)
        if len(calls) == dies_at:
            raise Killed
        replace(*names)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_or_die)
        build(make_samples(), tmp_path / "killed")
    (folder,) = (tmp_path / "killed").iterdir()
    (folder / "shard_00000.safetensors.01234567.tmp").touch()  # left by SIGKILL
    (newer := folder / "shard_00001.safetensors.01234567.tmp").touch()
    os.utime(newer, (time.time() + 100,) * 2)
    rest = Encoder()
    assert build(make_samples(), tmp_path / "killed", images=rest) == folder
    assert rest.seen == [8, 5, 2, 0, 0, 0][(dies_at - 2) // 2 if dies_at > 1 else 0]
    newer.unlink()  # still there: another run may be writing it
    assert files(folder) == files(whole)


def test_a_process_killed_inside_safetensors_leaves_nothing_for_good(tmp_path):
    """safetensors 0.8 writes to a temporary file of its own; the kernel kills it at that write."""

    def die_at_a_large_file():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would get an error instead
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        build(make_samples(), tmp_path / "killed")

    whole = build(make_samples(), tmp_path / "whole")
    assert exit_codes([fork(die_at_a_large_file)]) == [-signal.SIGXFSZ]
    (folder,) = (tmp_path / "killed").iterdir()
    assert {".jsonl", ".tmp"} <= {Path(name).suffix for name in files(folder)}
    build(make_samples(), tmp_path / "killed")
    assert files(folder) == files(whole)


@pytest.mark.parametrize("stream", [False, True])
def test_ranks_share_the_work_and_give_the_same_cache(tmp_path, stream):
    single = build(make_samples(), tmp_path / "one")
    encoders = [Encoder(), Encoder()]

    def work(rank):
        source = ListSource(make_samples(), stream)
        options = {"processes": Processes(rank, 2, patience=20), "images": encoders[rank]}
        build(source, tmp_path / "two", **options)

    in_threads(work)
    (double,) = (tmp_path / "two").iterdir()
    assert files(double) == files(single)
    assert [encoder.seen for encoder in encoders] == [5, 3]  # shards 0 and 2, shard 1


def test_a_missing_rank_is_noticed(tmp_path):
    with pytest.raises(TimeoutError, match=r"shard_00001\.safetensors .* Start again to resume"):
        build(make_samples(), tmp_path, processes=Processes(0, 2, patience=0.1))
    rest = Encoder()
    folder = build(make_samples(), tmp_path, images=rest)
    assert rest.seen == 3, "the shard of the missing process"
    (folder / "manifest.json").unlink()  # as if the main process had stopped before writing it
    with pytest.raises(TimeoutError, match=r"manifest\.json"):
        build(make_samples(), tmp_path, processes=Processes(1, 2, patience=0.1))


def test_the_batch_size_does_not_matter(tmp_path):
    first = build(make_samples(), tmp_path / "a", batch_size=1)
    second = build(make_samples(), tmp_path / "b", batch_size=100)
    assert files(first) == files(second)


@pytest.mark.parametrize(
    "change",
    [
        {"key": {"tokenizer": "other"}},
        {"rules": ImageRules(4)},
        {"max_samples": 5},
        {"rules": ImageRules(8, small="upscale")},
        {"shard_size": 2},
        {"captions": None},
    ],
)
def test_the_folder_depends_on_everything_the_content_depends_on(tmp_path, change):
    assert build(make_samples(), tmp_path) != build(make_samples(), tmp_path, **change)
    assert build(make_samples(), tmp_path) != build(make_samples(9), tmp_path)


@pytest.mark.parametrize("version", ["t2i.data.images.PIXELS_VERSION", "t2i.data.encoding.FORMAT"])
def test_the_folder_depends_on_the_kits_versions(tmp_path, monkeypatch, version):
    before = build(make_samples(), tmp_path)
    monkeypatch.setattr(version, 99)
    assert build(make_samples(), tmp_path) != before


def test_another_format_is_refused(tmp_path):
    folder = build(make_samples(), tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["key"]["format"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"has the format None, this version reads only 4"):
        CodeStore(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".jsonl"])
def test_a_flipped_bit_is_noticed(tmp_path, suffix):
    """Case 3, for caches: training went on with other codes, features or captions."""
    folder = build(make_samples(), tmp_path)
    path = folder / f"shard_00000{suffix}"
    whole = path.read_bytes()

    def read():
        store = CodeStore(folder)
        pixels = store.same_images()
        rows = range(len(store))
        return [store.codes(rows), pixels, *store.features(rows, 9), *map(store.condition, rows)]

    wanted, noticed = read(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        try:
            found = read()
        except UserError as error:
            assert "missing or damaged" in str(error)
            noticed += 1
        else:  # in the padding of the header
            assert all(
                torch.equal(a, b) if torch.is_tensor(a) else a == b
                for a, b in zip(found, wanted, strict=True)
            )
    assert noticed > len(whole) - 8


@pytest.mark.parametrize("stream", [False, True])
def test_max_samples(tmp_path, stream):
    source = ListSource(make_samples(), stream)
    store = CodeStore(build(source, tmp_path, max_samples=6))
    assert len(store) == 5  # of the first six, number 2 is skipped
    assert store.name(4) == "key5"


def test_report_and_manifest_from_real_files(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "good.png")
    Image.new("RGB", (8, 7)).save(data / "small.png")
    Image.new("RGB", (8, 8)).save(data / "unlisted.png")
    (data / "empty.png").touch()
    rows = [{"file_name": f"{n}.png", "text": "x"} for n in ("good", "small", "empty", "gone")]
    rows += [{"file_name": "good.png", "text": ""} for _ in range(120)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = build(open_source(data), tmp_path / "cache", key={"tokenizer": "sha"})
    report = json.loads((folder / "report.json").read_text())
    assert (report["seen"], report["usable"]) == (124, 1)
    counts = {reason: entry["count"] for reason, entry in report["skipped"].items()}
    singles = ("too small", "empty", "missing", "not in metadata")
    assert counts == {"no caption": 120, **dict.fromkeys(singles, 1)}
    assert report["skipped"]["missing"]["first"] == ["gone.png"]
    assert len(report["skipped"]["no caption"]["first"]) == 100
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 124
    assert {"index": 1, "key": "small.png", "reason": "too small"}.items() <= lines[0].items()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["key"]["encoders"] == {"tokenizer": "sha"}
    assert manifest["source"] == str(data)
    assert (manifest["samples"], manifest["code_shape"], manifest["text_dim"]) == (1, [2, 1], WIDTH)
    assert manifest["report"]["skipped"] == counts
    assert "1 too small (small.png: 8 x 7 px, needs 8; --data.small-images upscale" in " ".join(
        manifest["report"]["lines"]
    )


def test_nothing_usable(tmp_path):
    samples = [Sample(0, "a", None, ["x"]), Sample(1, "b", None, []), Sample(2, "c", None, ["y"])]
    with pytest.raises(ValueError, match=r"3 of list: 2 missing \(a, c\), 1 no caption \(b\)"):
        build(samples, tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))
    assert len(list(tmp_path.rglob("report.json"))) == 1


# -- many shards -----------------------------------------------------------------------------------
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path, monkeypatch):
    """A store of a hundred million images has 97,657 shards: open all at once, with their captions,
    they would not fit into memory. Kept are the manifest's line of each, and a bounded number of
    open ones.
    """
    monkeypatch.setattr(store, "_OPEN_SHARDS", 4)
    held = {}
    for shards in (8, 40):
        folder = build(long_captions(4 * shards), tmp_path / str(shards))
        gc.collect()
        tracemalloc.start()
        opened = CodeStore(folder)
        for index in torch.randperm(len(opened)).tolist():
            opened.codes([index])
            assert opened.condition(index).startswith(f"{index} ")
            opened.features([index], max_tokens=3)
        gc.collect()
        held[shards] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        open_files = [
            o for o in gc.get_objects() if isinstance(o, ShardReader) and "_tensors" in vars(o)
        ]
        assert len(open_files) == 4
        del opened, open_files
    assert held[40] - held[8] < 32 * 2000, "a shard's four captions alone have 8,000 characters"


def test_reading_can_begin_at_any_step(tmp_path, monkeypatch):
    """Resuming: what a new process reads from step 3 on equals what one that began at step 0 reads
    there, and two processes read the same between them; with more shards than stay open.
    """
    monkeypatch.setattr(store, "_OPEN_SHARDS", 3)
    folder = build(long_captions(48), tmp_path / "cache")

    def read(start: int, rank: int = 0, world_size: int = 1) -> list[list[str]]:
        opened = CodeStore(folder)
        share = 16 // world_size
        begins = (16 * step + rank * share for step in range(start, 6))
        steps = ([sample_index(b + i, 48, 7) for i in range(share)] for b in begins)
        return [[opened.condition(i).split()[0] for i in step] for step in steps]

    whole = read(0)
    assert read(3) == whole[3:]
    halves = zip(read(2, 0, 2), read(2, 1, 2), strict=True)
    assert [a + b for a, b in halves] == whole[2:]
    epochs = [list(chain(*part)) for part in (whole[:3], whole[3:])]
    assert [sorted(map(int, epoch)) for epoch in epochs] == [list(range(48))] * 2
    assert epochs[0] != epochs[1]


def test_a_caption_or_name_that_looks_like_a_reason_is_not_a_skip(tmp_path):
    samples = make_samples(4, skipped=(2,))
    samples[1] = Sample(1, '"reason":', samples[1].image, ['"reason": it says', "reason"])
    opened = CodeStore(build(samples, tmp_path))
    assert [opened.name(i) for i in range(3)] == ["key0", '"reason":', "key3"]
    assert opened.condition(1) == '"reason": it says'


def long_captions(count: int) -> list[Sample]:
    image = Image.new("RGB", (8, 8))
    return [Sample(i, f"key{i}", image, [f"{i} " + "x" * 2000]) for i in range(count)]

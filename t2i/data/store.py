"""A store of codes: images tokenized once, each with its class, or its captions and their features.

    <folder>/source.json                 what the folder's name is a hash of, and the source's files
             shard_00003.safetensors     codes [n, A, T, S] uint16 or int32
                                         labels [n] int64: the class of each image; or
                                         pixels [n] int64: a hash of each captioned image
                                         text [tokens, C] float16 or bfloat16: features of the
                                           captions, valid tokens only, back to back
                                         text_offsets [captions + 1] int64: rows of caption c in it
                                         caption_offsets [n + 1] int64: captions of sample i
                                         NAME.crc32 int64: for each of these tensors, checksums of
                                           its rows, or of the whole if it has one dimension
                                         lines.crc32 [1] int64: checksum of the jsonl
             shard_00003.jsonl           a line for every sample read: {index, key, captions} if it
                                         is in the store (and notes if something is unusual),
                                         {index, key, reason, detail} if it was skipped
             report.json, skipped.jsonl  what was left out, and why
             manifest.json               written last: the store is complete

A shard is written whole or not at all: its safetensors file is renamed into place last. Stores are
filled by `encoding.py`. Opening one reads only the manifest; of a shard, only the rows that are
requested are read, and compared with their checksums.

Shape legend: n = samples, B = batch, A = views of an image, T = positions, S = sub-tokens, C = text
feature width.
"""

import bisect
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i.data.images import SkipSample
from t2i.data.samples import Sample
from t2i.errors import UserError
from t2i.files import replacing

_OPEN_SHARDS = 512
"""Shards that a store keeps open, with the captions of their samples: a process can map about
65,000 files, and a hundred million captions do not fit into memory."""
_TYPES = {
    "U16": torch.uint16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of a shard's tensors, by their names in safetensors."""
_SKIPPED = b'"reason":'  # as `sample_line` writes it; inside a string its quotes would be escaped
_SUMS = ".crc32"
FORMAT = 4
"""Part of the manifest and of the folder's name: change it whenever the files change."""
MANIFEST = "manifest.json"
_MANIFEST_KEYS = ("views", "text_dim", "labelled", "shards", "surroundings", "report")
Numbers = Sequence[int] | Tensor


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """All existing shards by number; by name, 100,000 would come before 99,999."""
    found = folder.glob("shard_*.safetensors")
    return sorted(found, key=lambda path: int(path.stem.removeprefix("shard_")))


def sample_line(sample: Sample, skipped: SkipSample | None = None) -> dict:
    """The line of the jsonl for a sample."""
    line: dict = {"index": sample.index, "key": sample.key}
    if skipped is not None:
        return {**line, "reason": skipped.reason, "detail": skipped.detail}
    captions = {"captions": sample.captions} if sample.label is None else {}
    notes = {"notes": list(sample.notes)} if sample.notes else {}
    return {**line, **captions, **notes}


class ShardWriter:
    """Collects one shard in memory; `close` writes it to disk."""

    def __init__(self, folder: Path, shard: int):
        self._path = shard_path(folder, shard)
        self._lines: list[dict] = []
        self._labels: list[int] = []
        self._captions: list[int] = []  # of each sample: a count, as samples may hold whole images
        self._codes: list[Tensor] = []
        self._pixels: list[int] = []
        self._text: list[Tensor] = []

    def skip(self, sample: Sample, reason: SkipSample) -> None:
        self._lines.append(sample_line(sample, reason))

    def add(
        self, samples: Sequence[Sample], codes_BATS: Tensor, pixels: list[int], features: list
    ) -> None:
        """Add one batch.

        Args:
            pixels: hashes of the images, if these have captions.
            features: float [n_i, C] for every caption of every sample; empty without text features.
        """
        self._lines += map(sample_line, samples)
        self._labels += [sample.label for sample in samples if sample.label is not None]
        self._captions += [len(sample.captions) for sample in samples]
        self._codes.append(codes_BATS)
        self._pixels += pixels
        captions = [caption for sample in samples for caption in sample.captions]
        if features:
            pairs = zip(captions, features, strict=True)
            self._text += [_storable(feature, caption) for caption, feature in pairs]

    def close(self) -> None:
        """Write the jsonl, then the tensors."""
        codes = torch.cat(self._codes) if self._codes else torch.zeros(0, 0, 0, 0).long()
        fits = codes.numel() == 0 or int(codes.max()) < 2**16
        assert codes.numel() == 0 or int(codes.min()) >= 0, "negative code"
        tensors = {"codes": codes.to(torch.uint16 if fits else torch.int32).contiguous()}
        if self._labels:
            assert len(self._labels) == len(codes), "labels of some samples only"
            tensors["labels"] = torch.tensor(self._labels)
        else:
            tensors["pixels"] = torch.tensor(self._pixels, dtype=torch.long)
        if self._text:
            tensors["text"] = torch.cat(self._text)
            tensors["text_offsets"] = _offsets([len(feature) for feature in self._text])
            tensors["caption_offsets"] = _offsets(self._captions)
        lines = sorted(self._lines, key=lambda line: line["index"])
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        sums = {name + _SUMS: _checksums(tensor) for name, tensor in tensors.items()}
        sums["lines" + _SUMS] = torch.tensor([zlib.crc32(content)])
        with replacing(self._path.with_suffix(".jsonl")) as temporary:
            temporary.write_bytes(content)
        with replacing(self._path) as temporary:
            save_file(tensors | sums, temporary)


class ShardReader:
    """Random access to one complete shard; the file is memory-mapped at the first access."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        # safe_open checks the file's size against the header, which mapping does not; but it
        # reports a file without read permission as missing, so `open` comes first.
        with _whole(self.path), open(self.path, "rb"), safe_open(self.path, framework="pt"):
            tensors = map_tensors(self.path)
            names = {name for name in tensors if not name.endswith(_SUMS)}
            if tensors.keys() - names != {name + _SUMS for name in (*names, "lines")}:
                raise ValueError(f"it holds {', '.join(tensors)}")
            return tensors

    def _rows(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows of a tensor; UserError if they have changed since they were written."""
        rows, sums = self._tensors[name], self._tensors[name + _SUMS]
        if rows.dim() > 1:
            rows, sums = rows[start:end], sums[start:end]
        with _whole(self.path):
            if not torch.equal(_checksums(rows), sums):
                raise ValueError(f"the checksum of its {name} differs")
        return rows

    @cached_property
    def labels(self) -> list[int] | None:
        """Class ids, or None if the samples have captions."""
        return self._rows("labels").tolist() if "labels" in self._tensors else None

    @property
    def pixels(self) -> Tensor:
        """A hash int64 [n] of each captioned image: the same for the same pixels."""
        return self._rows("pixels").clone()

    @property
    def codes_shape(self) -> tuple[int, int, int, int]:
        """(n, A, T, S)."""
        n, views, positions, subtokens = self._tensors["codes"].shape
        return n, views, positions, subtokens

    @property
    def text_dim(self) -> int | None:
        """C, or None if the shard holds no text features."""
        return self._tensors["text"].shape[1] if "text" in self._tensors else None

    def lines(self) -> Iterator[dict]:
        """The lines of all samples, usable or skipped, in source order."""
        path = self.path.with_suffix(".jsonl")
        with _whole(path), open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)

    @cached_property
    def _usable(self) -> list[bytes]:
        """The lines of the usable samples, not parsed: `sample` parses the one requested."""
        path = self.path.with_suffix(".jsonl")
        with _whole(path):
            content = path.read_bytes()
            if zlib.crc32(content) != self._tensors["lines" + _SUMS]:
                raise ValueError("its checksum differs")
        return [line for line in content.split(b"\n") if line and _SKIPPED not in line]

    def sample(self, row: int) -> dict:
        """{index, key, captions} of the sample in this row of the codes."""
        return json.loads(self._usable[row])

    def codes(self, row: int, view: int) -> Tensor:
        """Codes int64 [T, S] of one view."""
        return self._rows("codes", row, row + 1)[0, view].long()

    def features(self, row: int, choice: int, max_tokens: int) -> Tensor:
        """Features of one of the captions, float32 [n, C] with n <= max_tokens."""
        captions, text = self._offsets
        first, end = captions[row : row + 2].tolist()
        caption = first + choice % (end - first)
        start, end = text[caption : caption + 2].tolist()
        return self._rows("text", start, min(end, start + max_tokens)).float()

    @cached_property
    def _offsets(self) -> tuple[Tensor, Tensor]:
        return self._rows("caption_offsets"), self._rows("text_offsets")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Within it, failing to read a file of a shard becomes a UserError that says what to do."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (FileNotFoundError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}). Delete {path.parent} and start again: the "
            "data will be encoded again"
        ) from error


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished store; UserError if it is damaged, or of another version."""
    path = folder / MANIFEST
    with _whole(path):
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("key"), dict):
            raise ValueError("it is not a manifest of a store")
        if (found := manifest["key"].get("format")) == FORMAT:
            if missing := [name for name in _MANIFEST_KEYS if name not in manifest]:
                raise ValueError(f"it has no {missing[0]!r}")
            return manifest
    raise UserError(f"{folder} has the format {found}, this version reads only {FORMAT}")


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of the mapped file, of which only the parts in use
    are read. They must not be written to.
    """
    # The library's own slices leak 64 bytes every time that they are indexed (0.8.0): gigabytes
    # over a run of a billion samples.
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            first, end = about["data_offsets"]
            flat = data[start + first : start + end].view(_TYPES[about["dtype"]])
            tensors[name] = flat.view(about["shape"])
    return tensors


class CodeStore:
    """Random access to a finished store.

    A method's `choice` is a number for each sample that picks one of all pairs of a view and a
    caption, modulo their number; by default the first.

    Attributes:
        key: identifies the content.
        views: A, the number of views per image.
        with_text: whether it holds features of the captions.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise UserError(
                f"{folder} is not a finished store of codes (it has no {MANIFEST}). "
                "Start the run again: it continues where it stopped"
            )
        self.manifest = read_manifest(self.folder)
        self.key, self.views = self.folder.name, self.manifest["views"]
        self.with_text = self.manifest["text_dim"] is not None
        shards = self.manifest.pop("shards")  # not kept: too many objects in a large store
        self._names = [shard["name"] for shard in shards]
        self._starts = [0, *accumulate(shard["samples"] for shard in shards)]
        self._open = lru_cache(_OPEN_SHARDS)(lambda name: ShardReader(self.folder / name))

    def __len__(self) -> int:
        return self._starts[-1]

    def codes(self, indices: Numbers, choice: Numbers | None = None) -> Tensor:
        """Codes int64 [B, T, S] of one view of each image."""
        chosen = self._chosen(indices, choice)
        return torch.stack([shard.codes(row, pick % self.views) for shard, row, pick in chosen])

    def features(
        self, indices: Numbers, max_tokens: int, choice: Numbers | None = None
    ) -> list[Tensor]:
        """Text features float32 [n_i, C] of one caption of each sample, cut to max_tokens."""
        if not self.with_text:
            raise ValueError(f"{self.folder} was built without text features")
        chosen = self._chosen(indices, choice)
        return [shard.features(row, pick // self.views, max_tokens) for shard, row, pick in chosen]

    def condition(self, index: int, choice: int = 0) -> str | int:
        """A sample's class, or the caption that `features` encodes for the same choice."""
        shard, row = self._locate(index)
        if shard.labels is not None:
            return shard.labels[row]
        captions = shard.sample(row)["captions"]
        return captions[choice // self.views % len(captions)]

    def name(self, index: int) -> str:
        """The sample's name in its source."""
        shard, row = self._locate(index)
        return shard.sample(row)["key"]

    def same_images(self) -> Tensor | None:
        """int64 [n]: equal numbers for samples with the same pixels; None for images with classes:
        each counts as different.
        """
        if self.manifest["labelled"]:
            return None
        # Separate readers: unlike those of `_open`, each is closed again at once.
        return torch.cat([ShardReader(self.folder / name).pixels for name in self._names])

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._open(self._names[shard]), index - self._starts[shard]

    def _chosen(
        self, indices: Numbers, choice: Numbers | None
    ) -> Iterator[tuple[ShardReader, int, int]]:
        for index, pick in with_choices(indices, choice):
            yield *self._locate(index), pick


def with_choices(indices: Numbers, choice: Numbers | None) -> Iterator[tuple[int, int]]:
    """Each index with its choice, 0 by default."""
    where = torch.as_tensor(indices).tolist()
    chosen = [0] * len(where) if choice is None else torch.as_tensor(choice).tolist()
    return zip(where, chosen, strict=True)


def _storable(feature: Tensor, caption: str) -> Tensor:
    """float [n, C] on the CPU, two bytes a number: bfloat16 is kept, the rest becomes float16."""
    feature = torch.as_tensor(feature).detach().cpu()
    if feature.dtype != torch.bfloat16:
        feature = feature.half()
    if not feature.isfinite().all():
        raise UserError(
            f"the text features of {caption!r} are not finite in {feature.dtype}. Run the text "
            "encoder in bfloat16 or float32; if its values exceed float16, return bfloat16"
        )
    return feature


def _checksums(tensor: Tensor) -> Tensor:
    """int64 [rows]: CRC-32 of each row, or of the whole tensor if it has one dimension."""
    rows = tensor if tensor.dim() > 1 else tensor[None]
    return torch.tensor([zlib.crc32(row.view(torch.uint8).numpy()) for row in rows]).long()


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)

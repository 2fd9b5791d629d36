"""The shards of a store of codes: each holds some samples: codes, and classes or captions.

    shard_00003.safetensors     codes [n, A, T, S] uint16 or int32
                                labels [n] int64: the class of each image; or
                                pixels [n] int64: a hash of each captioned image
                                text [tokens, C] float16 or bfloat16: features of the captions,
                                  valid tokens only, back to back
                                text_offsets [captions + 1] int64: rows of caption c in it
                                caption_offsets [n + 1] int64: captions of sample i
                                NAME.crc32 int64: for each of these tensors, checksums of its rows,
                                  or of the whole if it has one dimension
                                lines.crc32 [1] int64: checksum of the jsonl
    shard_00003.jsonl           a line for every sample read: {index, key, captions} if it is in the
                                store (and notes if something is unusual), {index, key, reason,
                                detail} if it was skipped

A shard is written whole or not at all: its safetensors file is renamed into place last. Only the
rows that are requested are read, and compared with their checksums.

Shape legend: n = samples, B = batch, A = views of an image, T = positions, S = sub-tokens, C = text
feature width.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i.data.images import SkipSample
from t2i.data.samples import Sample
from t2i.errors import UserError
from t2i.files import replacing

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
        with whole_file(self.path), open(self.path, "rb"), safe_open(self.path, framework="pt"):
            tensors = _map_tensors(self.path)
            names = {name for name in tensors if not name.endswith(_SUMS)}
            if tensors.keys() - names != {name + _SUMS for name in (*names, "lines")}:
                raise ValueError(f"it holds {', '.join(tensors)}")
            return tensors

    def _rows(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows of a tensor; UserError if they have changed since they were written."""
        rows, sums = self._tensors[name], self._tensors[name + _SUMS]
        if rows.dim() > 1:
            rows, sums = rows[start:end], sums[start:end]
        with whole_file(self.path):
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
        with whole_file(path), open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)

    @cached_property
    def _usable(self) -> list[bytes]:
        """The lines of the usable samples, not parsed: `sample` parses the one requested."""
        path = self.path.with_suffix(".jsonl")
        with whole_file(path):
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
def whole_file(path: Path) -> Iterator[None]:
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


def _map_tensors(path: Path) -> dict[str, Tensor]:
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

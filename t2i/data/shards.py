"""One shard of the code cache on disk: written whole or not at all, read without loading it.

    shard_00003.safetensors   codes [n, T, S] uint16 or int32
                              text [tokens, C] float16 or bfloat16: valid tokens, back to back
                              text_offsets [captions + 1] int64: rows of caption c in `text`
                              caption_offsets [n + 1] int64: captions of sample i
    shard_00003.jsonl         a line for every sample seen: {index, key, captions, image} if it is
                              in the cache (notes where something is unusual; image is a hash of its
                              pixels), {index, key, reason, detail} if it was skipped

The safetensors file is renamed into place last: it exists if and only if the shard is complete.

Shape legend: n = samples, T = positions, S = sub-tokens, C = text feature width.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i.data.images import SkipSample
from t2i.data.samples import Sample
from t2i.errors import UserError
from t2i.files import replacing


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.safetensors"


def sample_line(sample: Sample, skipped: SkipSample | None = None, image: str = "") -> dict:
    """What the jsonl says of a sample; `image` is the hash of its pixels."""
    line: dict = {"index": sample.index, "key": sample.key}
    if skipped is not None:
        return {**line, "reason": skipped.reason, "detail": skipped.detail}
    notes = {"notes": list(sample.notes)} if sample.notes else {}
    return {**line, "captions": sample.captions, "image": image, **notes}


class ShardWriter:
    """Collects one shard in memory; `close` puts it on disk."""

    def __init__(self, folder: Path, shard: int):
        self._path = shard_path(folder, shard)
        self._lines: list[dict] = []
        self._codes: list[Tensor] = []
        self._text: list[Tensor] = []
        self._captions: list[int] = []
        self._with_text = False

    def skip(self, sample: Sample, reason: SkipSample) -> None:
        self._lines.append(sample_line(sample, reason))

    def add(
        self,
        samples: Sequence[Sample],
        images: Sequence[str],
        codes_BTS: Tensor,
        features: list | None,
    ) -> None:
        """Add one batch: hashes of the pixels, codes, and float [n_i, C] for every caption of every
        sample.
        """
        if codes_BTS.ndim != 3 or len(codes_BTS) != len(samples):
            raise ValueError(
                f"encode_images must give codes [{len(samples)}, T, S], got "
                f"{tuple(codes_BTS.shape)}"
            )
        self._codes.append(codes_BTS.cpu())
        self._captions += [len(sample.captions) for sample in samples]
        self._lines += [
            sample_line(sample, image=image) for sample, image in zip(samples, images, strict=True)
        ]
        if features is not None:
            self._with_text = True
            captions = [caption for sample in samples for caption in sample.captions]
            pairs = zip(captions, features, strict=True)
            self._text += [_storable(feature, caption) for caption, feature in pairs]

    def close(self) -> None:
        """Write the jsonl, then the tensors."""
        codes = torch.cat(self._codes) if self._codes else torch.zeros(0, 0, 0, dtype=torch.long)
        fits = codes.numel() == 0 or int(codes.max()) < 2**16
        assert codes.numel() == 0 or int(codes.min()) >= 0, "negative code"
        tensors = {
            "codes": codes.to(torch.uint16 if fits else torch.int32).contiguous(),
            "caption_offsets": _offsets(self._captions),
        }
        if self._with_text:
            tensors["text"] = torch.cat(self._text)
            tensors["text_offsets"] = _offsets([len(feature) for feature in self._text])
        with replacing(self._path.with_suffix(".jsonl")) as temporary:
            lines = sorted(self._lines, key=lambda line: line["index"])
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with replacing(self._path) as temporary:
            save_file(tensors, temporary)


class ShardReader:
    """Random access to one complete shard; the file is memory-mapped at the first access."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _file(self) -> safe_open:
        return safe_open(self.path, framework="pt")

    @cached_property
    def _codes(self):  # a safetensors slice: reads only the rows that are asked for
        return self._file.get_slice("codes")

    @cached_property
    def _text(self):
        return self._file.get_slice("text")

    @cached_property
    def _offsets(self) -> tuple[list[int], list[int]]:
        names = ("caption_offsets", "text_offsets")
        captions, text = (self._file.get_tensor(name).tolist() for name in names)
        return captions, text

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """(n, T, S)."""
        return tuple(self._codes.get_shape())

    @property
    def text_dim(self) -> int | None:
        """C, or None if the shard holds no text features."""
        return self._text.get_shape()[1] if "text" in self._file.keys() else None  # noqa: SIM118

    def lines(self) -> Iterator[dict]:
        """Every sample seen, usable or skipped, in source order."""
        with open(self.path.with_suffix(".jsonl"), encoding="utf-8") as file:
            yield from map(json.loads, file)

    @cached_property
    def samples(self) -> list[dict]:
        """{index, key, captions} of the usable samples, in the order of the codes."""
        return [line for line in self.lines() if "captions" in line]

    def codes(self, row: int) -> Tensor:
        """int64 [T, S]."""
        return self._codes[row].long()

    def text(self, row: int, choice: int, max_tokens: int) -> Tensor:
        """Features of one of the captions, float [n, C] with n <= max_tokens."""
        captions, text = self._offsets
        caption = captions[row] + choice % (captions[row + 1] - captions[row])
        start, end = text[caption], text[caption + 1]
        return self._text[start : min(end, start + max_tokens)]


def _storable(feature: Tensor, caption: str) -> Tensor:
    """float [n, C] on the CPU, two bytes a number: bfloat16 stays, the rest becomes float16."""
    feature = torch.as_tensor(feature).detach().cpu()
    if feature.ndim != 2:
        raise ValueError(
            f"encode_captions must give [tokens, C] for each caption, got {tuple(feature.shape)}"
        )
    if feature.dtype != torch.bfloat16:
        feature = feature.half()
    if not feature.isfinite().all():
        raise UserError(
            f"the text features of {caption!r} are not finite in {feature.dtype}. Run the text "
            "encoder in bfloat16 or float32; if float16 is too narrow, return bfloat16"
        )
    return feature


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)

"""Which samples of a data set are used, which are left out and why; and the pre-flight survey.

Silently dropped samples are the most common data bug, so every sample that is left out has a reason
and a line in a file.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from t2i.data.images import UNFETCHED, ImageRules, RemoteFile, SkipSample, open_image
from t2i.data.samples import Sample, Source
from t2i.data.shards import sample_line
from t2i.errors import shorten
from t2i.files import write_text

T = TypeVar("T")

_KEYS_PER_REASON = 100
_LONGEST_NAME = 120

CaptionNotes = Callable[[Sequence[str]], Sequence[Sequence[str] | None]]
"""Captions -> for each, fixed phrases for what the text encoder loses; None if nothing is left."""
UNREADABLE = "caption has no text the encoder can read"


def drop_unreadable(sample: Sample, caption_notes: CaptionNotes | None) -> Sample:
    """The sample without captions that the encoder cannot read, and with notes on all losses."""
    if caption_notes is None or not sample.captions:
        return sample
    found = list(caption_notes(sample.captions))
    if sample.before:  # trigger words can be read, but do not make up for a caption that cannot
        read = caption_notes(sample.before)
        found = [None if own is None else lost for lost, own in zip(found, read, strict=True)]
    kept = [c for c, lost in zip(sample.captions, found, strict=True) if lost is not None]
    if not kept:
        return replace(sample, captions=[], problem=UNREADABLE)
    notes = [note for lost in found for note in ([UNREADABLE] if lost is None else lost)]
    return replace(sample, captions=kept, notes=tuple(dict.fromkeys((*sample.notes, *notes))))


def picture_hash(views: Tensor) -> int:
    """64 bits of a hash of an image's views: equal for identical images."""
    digest = hashlib.sha256(views.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def load_sample(sample: Sample, rules: ImageRules | None) -> Tensor | SkipSample:
    """The views of a sample's image (or their codes), or why it is skipped (returned, not raised).

    A sample with neither a caption nor a class is skipped for its `problem`. A source of codes
    needs no rules.
    """
    if sample.label is None and not sample.captions:
        return SkipSample(sample.problem)
    if isinstance(sample.image, Tensor):
        return sample.image
    assert rules is not None, "images need rules"
    try:
        return rules.load(sample.image)
    except SkipSample as reason:
        return reason


@dataclass
class DataReport:
    """Counts of usable and skipped samples.

    Attributes:
        seen: number of samples read from the source.
        usable: how many of them can be used; for a store, how many it holds.
        skipped: one {index, key, reason, detail} for each of the others, and for each file that
            belongs to no sample (index None).
        noted: note -> the keys of samples that are used although something about them is unusual.
        remarks: sentences about the source as a whole.
        pictures: in a survey, a number for each usable sample, equal for identical images.
    """

    seen: int = 0
    usable: int = 0
    skipped: list[dict] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)

    @classmethod
    def collect(cls, lines: Iterable[dict], source: Source) -> "DataReport":
        """Build it from the lines of the shards, and from the source's remarks and `left_out`."""
        report, several = cls(remarks=list(source.remarks)), 0
        for line in lines:
            report.seen += 1
            if "reason" in line:
                report.skipped.append(line)
            else:
                report.usable += 1
                several += len(line.get("captions", ())) > 1
                for note in line.get("notes", ()):
                    report.noted.setdefault(note, []).append(line["key"])
        for key, reason in source.left_out:
            report.skipped.append({"index": None, "key": key, "reason": reason, "detail": ""})
        if several:
            report.remarks.append(
                f"{several} have several captions (lines of a text or items of a list); "
                "training picks one each time"
            )
        return report

    @property
    def keys(self) -> dict[str, list[str]]:
        """Keys of the skipped samples by reason, the most frequent reason first."""
        keys: dict[str, list[str]] = {}
        for line in self.skipped:
            keys.setdefault(line["reason"], []).append(line["key"])
        return _by_count(keys)

    def _groups(self) -> dict[str, dict[str, list[str]]]:
        return {"skipped": self.keys, "noted": _by_count(self.noted)}

    def summary(self) -> dict[str, Any]:
        """Counts and the sentences of `lines`, JSON-able."""
        counts = {
            name: {what: len(keys) for what, keys in found.items()}
            for name, found in self._groups().items()
        }
        return {"seen": self.seen, "usable": self.usable, **counts, "lines": self.lines()}

    def describe(self) -> str:
        """All `lines` as one: '2 missing (a.png, b.png), 1 no caption (c.png)'."""
        return "; ".join(self.lines()) or "nothing skipped"

    def no_usable(self) -> str:
        """`describe` for a refusal when nothing can be used, with what is wrong with the first."""
        first = next((line["detail"] for line in self.skipped if line["detail"]), "")
        return f"{self.describe()}{first and f'; the first says: {short_name(first)}'}"

    def lines(self) -> list[str]:
        """Sentences for the user: skipped samples, notes, remarks; empty if there are none."""
        skipped = _listing(self.keys, self._advice)
        noted = _listing(_by_count(self.noted))
        return [
            *([skipped] if skipped else []),
            *([f"used, but with a note: {noted}"] if noted else []),
            *self.remarks,
        ]

    def _advice(self, reason: str) -> str:
        if UNFETCHED in reason:
            return ": run `git lfs pull` there to fetch the files themselves"
        if reason != "too small":
            return ""
        detail = next(line["detail"] for line in self.skipped if line["reason"] == reason)
        return f": {detail}; --data.small-images upscale enlarges small images"

    def write(self, folder: Path) -> None:
        """report.json with the first keys of each reason, skipped.jsonl with all of them."""
        text = "".join(json.dumps(line) + "\n" for line in self.skipped)
        write_text(folder / "skipped.jsonl", text)
        first = {
            name: {
                what: {"count": len(keys), "first": keys[:_KEYS_PER_REASON]}
                for what, keys in found.items()
            }
            for name, found in self._groups().items()
        }
        write_text(folder / "report.json", json.dumps(self.summary() | first, indent=1))


def _by_count(keys: dict[str, list[str]]) -> dict[str, list[str]]:
    return dict(sorted(keys.items(), key=lambda item: (-len(item[1]), item[0])))


def _listing(found: dict[str, list[str]], advice: Callable[[str], str] = lambda _: "") -> str:
    """'2 missing (a.png, b.png), 1 no caption (c.png)'."""
    parts = []
    for what, keys in found.items():
        names = shorten([*map(short_name, dict.fromkeys(keys))], most=3)
        parts.append(f"{len(keys)} {what} ({names}{advice(what)})")
    return ", ".join(parts)


def short_name(key: str) -> str:
    """A sample's key, cut to fit a line of a report: a table may hold a file name of any length."""
    return key if len(key) <= _LONGEST_NAME else f"{key[:_LONGEST_NAME]}..."


def survey_source(
    source: Source,
    rules: ImageRules,
    *,
    caption_notes: CaptionNotes | None = None,
    max_samples: int | None = None,
    limit: int = 64,
) -> tuple[DataReport, list[Sample]]:
    """Check a source before a run: a report on at most `limit` samples, and the usable ones.

    The samples are spread evenly over those that the run will use: the whole source, or its first
    `max_samples`. Of a stream, the first ones are taken.
    """
    if source.length is None:
        samples: Iterable[Sample] = islice(source, min(limit, max_samples or limit))
    else:
        length = min(source.length, max_samples or source.length)
        count = min(limit, length)
        samples = (source[i * length // count] for i in range(count))
    checked = (drop_unreadable(sample, caption_notes) for sample in samples)
    report, taken = read_samples(checked, source, rules, lambda s, views: (s, picture_hash(views)))
    usable, report.pictures = [s for s, _ in taken], [number for _, number in taken]
    report.remarks += _about_crops(usable)
    return report, usable


def _about_crops(samples: Sequence[Sample]) -> Iterator[str]:
    """A remark on images whose captions may describe what the center crop cuts off."""
    cut = []
    for sample in samples:
        if sample.captions and not isinstance(sample.image, RemoteFile | Tensor):
            width, height = open_image(sample.image).size
            if max(width, height) > 2 * min(width, height):
                cut.append(f"{short_name(sample.key)}: {width} x {height} px")
    if cut:
        yield (
            f"{len(cut)} have one side more than twice as long as the other ({cut[0]}): the center crop "
            "cuts off more than half of them, which their captions may describe"
        )


def read_samples(
    samples: Iterable[Sample],
    source: Source,
    rules: ImageRules,
    take: Callable[[Sample, Tensor], T],
) -> tuple[DataReport, list[T]]:
    """A report on some samples of a source; and the results of `take(sample, views)` for the usable
    ones: views are large, so that only what `take` returns is kept.
    """
    lines, usable = [], []
    for sample in samples:
        result = load_sample(sample, rules)
        if isinstance(result, SkipSample):
            lines.append(sample_line(sample, result))
        else:
            lines.append(sample_line(sample))
            usable.append(take(sample, result))
    return DataReport.collect(lines, source), usable

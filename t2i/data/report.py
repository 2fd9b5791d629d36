"""What a data set gave and what was left out of it, counted and named; the pre-flight survey.

A sample that is silently dropped is the most common data bug there is, so every one of them has
a reason and a line in a file.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from t2i.data.images import SkipSample
from t2i.data.samples import Sample, Source, load_sample
from t2i.data.shards import sample_line
from t2i.files import replacing

_KEYS_PER_REASON = 100


@dataclass
class Report:
    """Counts of usable and skipped samples.

    Attributes:
        seen: samples of the source that were looked at.
        usable: those of them that are in the cache.
        skipped: one {index, key, reason, detail} for each of the others, and for each file that
            belongs to no sample (index None).
    """

    seen: int = 0
    usable: int = 0
    skipped: list[dict] = field(default_factory=list)

    @classmethod
    def collect(cls, lines: Iterable[dict], left_out: Iterable[tuple[str, str]]) -> "Report":
        """From the lines of the shards and the files that belong to no sample."""
        report = cls()
        for line in lines:
            report.seen += 1
            if "reason" in line:
                report.skipped.append(line)
            else:
                report.usable += 1
        for key, reason in left_out:
            report.skipped.append({"index": None, "key": key, "reason": reason, "detail": ""})
        return report

    @property
    def keys(self) -> dict[str, list[str]]:
        """Keys of the skipped samples by reason, the most frequent reason first."""
        keys: dict[str, list[str]] = {}
        for line in self.skipped:
            keys.setdefault(line["reason"], []).append(line["key"])
        return dict(sorted(keys.items(), key=lambda item: (-len(item[1]), item[0])))

    def summary(self) -> dict[str, Any]:
        """JSON-able counts."""
        reasons = {reason: len(keys) for reason, keys in self.keys.items()}
        return {"seen": self.seen, "usable": self.usable, "skipped": reasons}

    def describe(self) -> str:
        """One line for people: '3 missing (a.png, b.png, ...), 1 no caption (c.png)'."""
        parts = []
        for reason, keys in self.keys.items():
            names = ", ".join(keys[:2]) + (", ..." if len(keys) > 2 else "")
            parts.append(f"{len(keys)} {reason} ({names})")
        return ", ".join(parts) or "nothing skipped"

    def write(self, folder: Path) -> None:
        """report.json with the first keys of each reason, skipped.jsonl with all of them."""
        with replacing(folder / "skipped.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.skipped))
        first = {
            reason: {"count": len(keys), "first": keys[:_KEYS_PER_REASON]}
            for reason, keys in self.keys.items()
        }
        with replacing(folder / "report.json") as temporary:
            temporary.write_text(json.dumps({**self.summary(), "skipped": first}, indent=1))


def survey_source(source: Source, limit: int = 64, **rules: Any) -> tuple[Report, list[Sample]]:
    """Look at a source before a run: a report over at most `limit` samples, and the usable ones.

    The samples are spread evenly over the source; of a stream, the first ones are taken.

    Args:
        rules: size, small and max_megapixels, as for `load_pixels`.
    """
    if source.length is None:
        samples: Iterable[Sample] = islice(source, limit)
    else:
        count = min(limit, source.length)
        samples = (source[i * source.length // count] for i in range(count))
    lines, usable = [], []
    for sample in samples:
        result = load_sample(sample, **rules)
        skipped = isinstance(result, SkipSample)
        lines.append(sample_line(sample, result if skipped else None))
        if not skipped:
            usable.append(sample)
    return Report.collect(lines, source.left_out), usable

"""The result files of a benchmark run (results.json, results.jsonl and report.md), and the
comparison of two runs.

results.json is self-describing: scores with standard errors, how many images they rest on and which
are missing, the judge (weights by hash), how the images were drawn, and library versions.
"""

import json
import logging
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from t2i import __version__
from t2i.errors import UserError, shorten
from t2i.evaluation.bootstrap import Difference, Groups, paired_differences
from t2i.fields import read_object
from t2i.files import file_sha256, read_json_lines, text_sha256, write_json, write_text

log = logging.getLogger(__name__)

RESULTS_FILE, ROWS_FILE, REPORT_FILE = "results.json", "results.jsonl", "report.md"
_MOST_DECIMALS = 9
_PACKAGES = ("torch", "transformers", "open-clip-torch", "numpy", "pillow")


@dataclass(frozen=True)
class Score:
    """One number of a benchmark."""

    name: str
    mean: float | None
    """None if there is nothing to count."""
    stderr: float | None
    """Bootstrap over prompts; None if there are too few prompts."""
    images: int
    prompts: int
    headline: bool = False
    way: str = ""
    """The way of counting, for a benchmark with several; their columns are shown side by side."""

    @property
    def key(self) -> str:
        """The score's full name, for use outside a table."""
        return f"{self.name} ({self.way})" if self.way else self.name


@dataclass(frozen=True)
class Coverage:
    """How much of a benchmark a result rests on."""

    prompts: int
    prompts_of_benchmark: int
    expected: int
    judged: int
    missing: list[str]
    unreadable: list[str]
    copies: int
    """Images that are byte for byte another one of these."""

    @property
    def status(self) -> str:
        """ "complete", or why a number must not be quoted as the benchmark's."""
        parts = []
        if self.prompts < self.prompts_of_benchmark:
            parts.append(f"PARTIAL: {self.prompts} of {self.prompts_of_benchmark} prompts")
        if self.judged < self.expected:
            lost = f"{len(self.missing)} missing, {len(self.unreadable)} unreadable"
            parts.append(f"INCOMPLETE: {self.judged} of {self.expected} images ({lost})")
        return "; ".join(parts) or "complete"

    def check(self, *, allow_incomplete: bool) -> None:
        """UserError, naming unreadable images, if they are not allowed or no image was judged; a
        warning about copies.
        """
        if self.unreadable and not (allow_incomplete and self.judged):
            raise UserError(
                f"{len(self.unreadable)} of {self.expected} images cannot be judged: "
                f"{shorten(self.unreadable, '; ')}; replace them, or report the rest as INCOMPLETE "
                "with --allow-incomplete (finished verdicts are kept)"
            )
        warn_of_copies(self.copies, self.judged)


def warn_of_copies(copies: int, images: int) -> None:
    """Warn if some of the images that are scored are copies of others."""
    if copies:
        log.warning(
            f"{copies:,} of {images:,} images are copies of others, as if the seed were set again for "
            "each: the scores rest on fewer images"
        )


def versions() -> dict[str, str]:
    """Versions of Python, this kit and the packages that scores may depend on."""
    found = {"python": platform.python_version(), "t2i": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def image_source(out: Path, images: Path) -> str:
    """The images' folder as results record it: relative if within the output folder (which may be
    moved), else absolute.
    """
    out, images = out.resolve(), images.resolve()
    return str(images.relative_to(out) if images.is_relative_to(out) else images)


def write_results(out: Path, results: dict, rows: Sequence[dict]) -> None:
    """Write the three files; results.json comes last, because it marks the result as finished."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(out / ROWS_FILE, lines)
    write_text(out / REPORT_FILE, markdown(results))
    write_json(out / RESULTS_FILE, results | {"rows_sha256": text_sha256(lines)})


def read_rows(out: Path, results: dict) -> list[dict]:
    """The content of results.jsonl; UserError if it is not the file that `results` are about."""
    path = out / ROWS_FILE
    rows = read_json_lines(path)
    if results.get("rows_sha256") not in (None, file_sha256(path)):  # None: an older version's
        raise UserError(
            f"{path} has changed since {RESULTS_FILE} was written; start the judging again, which "
            "keeps finished verdicts"
        )
    return rows


def read_results(out: Path) -> dict:
    """The content of results.json.

    Raises:
        UserError: the folder holds no finished results, or they are not a benchmark's.
    """
    try:
        results = read_object(out / RESULTS_FILE)
    except UserError as error:
        what = f"it is a file: give its folder, {out.parent}" if out.is_file() else error
        raise UserError(f"{out} holds no finished results ({what})") from error
    kinds = {"benchmark": str, "label": str, "decimals": int, "scores": dict, "judge": dict}
    kinds |= {"images": str, "status": str}
    wrong = [name for name, kind in kinds.items() if type(results.get(name)) is not kind]
    if not wrong:
        scores = results["scores"].items()
        wrong = [f"scores.{name}" for name, score in scores if not isinstance(score, dict)]
        wrong += [] if 0 <= results["decimals"] <= _MOST_DECIMALS else ["decimals"]
    if wrong:
        raise UserError(
            f"{out / RESULTS_FILE} is not a benchmark's: it lacks a valid {', '.join(wrong)}; make "
            "it again"
        )
    return results


def table(results: dict) -> str:
    """The scores as a markdown table, with the status if incomplete, and their legend."""
    scores = [Score(**score) for score in results["scores"].values()]
    flag = "" if results["status"] == "complete" else f"**{results['status']}**\n\n"
    title = f"{results['benchmark']}: {results['label']}"
    return f"{flag}{score_table(scores, title, results['decimals'])}\n\n{results['legend']}"


def score_table(scores: Sequence[Score], title: str, digits: int) -> str:
    """A markdown table headed `title`: one line per name, columns for each way of counting."""
    ways, rows = by_way(scores)
    head = [title, *(c for way in ways for c in (way or "mean", "±", "images", "prompts"))]
    lines = []
    for name, of_ways in rows.items():
        bold = "**" if any(score.headline for score in of_ways.values()) else ""
        cells = [f"{bold}{name}{bold}"]
        for way in ways:
            score = of_ways.get(way)
            if score is None or score.mean is None:
                cells += ["-"] * 4
                continue
            error = "-" if score.stderr is None else f"{score.stderr:.{digits}f}"
            cells += [f"{bold}{score.mean:.{digits}f}{bold}", error]
            cells += [str(score.images), str(score.prompts)]
        lines.append(cells)
    return markdown_table(head, lines)


def notebook_table(scores: Sequence[Score], title: str, digits: int) -> str:
    """`score_table` for rendered markdown; names, which may come from users' files, are escaped."""
    names = (re.sub(r"[^\w .,:-]", lambda found: f"&#{ord(found[0])};", s.name) for s in scores)
    shown = [replace(score, name=name) for score, name in zip(scores, names, strict=True)]
    return score_table(shown, title, digits)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table with these column names; each row is one line, and HTML in it is text."""
    texts = (
        [re.sub("[|<]", r"\\\g<0>", " ".join(str(cell).splitlines())) for cell in cells]
        for cells in (head, *rows)
    )
    first, *others = (f"| {' | '.join(cells)} |" for cells in texts)
    return "\n".join([first, "|" + "---|" * len(head), *others])


def by_way(scores: Sequence[Score]) -> tuple[list[str], dict[str, dict[str, Score]]]:
    """The ways of counting, and name -> way -> score; all in order of first appearance."""
    rows: dict[str, dict[str, Score]] = {}
    for score in scores:
        rows.setdefault(score.name, {})[score.way] = score
    return list(dict.fromkeys(score.way for score in scores)), rows


def markdown(results: dict) -> str:
    """The whole report.md."""
    blocks = {
        "Judge": results["judge"],
        "Images": results["generation"],
        "Versions": results["versions"],
    }
    details = [
        f"## {title}\n\n```json\n{json.dumps(content, indent=2)}\n```\n"
        for title, content in blocks.items()
        if content
    ]
    head = f"# {results['benchmark']}: {results['label']}\n\n{table(results)}\n\n"
    note = "± is the bootstrap standard error over prompts.\n\n"
    where = f"Images: `{results['images']}`, {results['samples_per_prompt']} per prompt.\n\n"
    return head + note + where + "\n".join(details)


# -- two results -----------------------------------------------------------------------------------
def compare_folders(
    a: Path, b: Path, groups_of: Callable[[list[dict]], Groups], *, mean_of_groups: bool = True
) -> str:
    """A markdown table of B against A; both are output folders of the same benchmark.

    Args:
        groups_of: turns the benchmark's rows into groups.
        mean_of_groups: whether the groups' unweighted mean is a score of the benchmark, which is
            then printed first.

    Raises:
        UserError: a folder has no results, or their benchmarks, judges or prompts differ.
    """
    results_a, results_b = read_results(a), read_results(b)
    who_a, who_b = _who(results_a), _who(results_b)
    if who_a != who_b:
        raise UserError(
            f"{a} and {b} were judged differently, so their numbers cannot be compared:\n"
            f"A: {who_a}\nB: {who_b}"
        )
    try:
        groups = groups_of(read_rows(a, results_a)), groups_of(read_rows(b, results_b))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{a} and {b} hold results of {results_a['benchmark']}: compare them with its program"
        ) from error
    overall, by_group = paired_differences(*groups)
    digits = results_a["decimals"]
    notes = [
        f"**{name}: {results['status']}**\n"
        for name, results in (("A", results_a), ("B", results_b))
        if results["status"] != "complete"
    ]
    versions = [results["judge"].get("versions") for results in (results_a, results_b)]
    if versions[0] != versions[1]:
        notes.append(f"judged with different versions: {versions[0]} and {versions[1]}\n")
    lines = []
    shown = {"overall": overall, **by_group} if mean_of_groups else by_group
    for name, difference in shown.items():
        headline = results_a["scores"].get(name, {}).get("headline")
        lines.append(_line(f"**{name}**" if headline else name, difference, digits))
    legend = (
        f"A: {a}\nB: {b}\n± and interval: paired bootstrap over prompts; "
        "* if the interval excludes 0."
    )
    title = f"{results_a['benchmark']}: {results_a['label']}"
    head = (title, "A", "B", "B - A", "±", "95 % interval", "prompts")
    return "\n".join([f"{legend}\n", *notes, markdown_table(head, lines)])


def _who(results: dict) -> dict:
    """Benchmark and judge, which must be equal for comparable numbers; library versions are left
    out.
    """
    judge = {key: value for key, value in results["judge"].items() if key != "versions"}
    return {"benchmark": results["benchmark"], **judge}


def _line(name: str, d: Difference, digits: int) -> list[str]:
    error = interval = "-"
    if d.stderr is not None and d.low is not None and d.high is not None:
        clear = " *" if d.low > 0 or d.high < 0 else ""
        error = f"{d.stderr:.{digits}f}"
        interval = f"{d.low:+.{digits}f} to {d.high:+.{digits}f}{clear}"
    numbers = (f"{d.a:.{digits}f}", f"{d.b:.{digits}f}", f"{d.difference:+.{digits}f}")
    return [name, *numbers, error, interval, str(d.prompts)]

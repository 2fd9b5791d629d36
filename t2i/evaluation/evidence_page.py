"""The page of what `t2i.evaluation.evidence` measures: a folder that can be moved as a whole.

OUT/index.html      the page
OUT/evidence.json   all its numbers
OUT/charts/         each chart as .svg and .png
OUT/sheets/         the drawn images at every refinement stage
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from t2i.charts import Chart, Series, save_chart
from t2i.files import write_json, write_text
from t2i.pages import chart_html, facts_html, frames_html, html_page, table_html

TITLE = ": evidence</title>"
"""How the title of such a page ends."""
_KINDS = {"own_drafts": "own drafts", "noised_truth": "noised truth"}


def write_evidence(
    out: Path, evidence: dict, course: Sequence[Chart], sheets: Sequence[tuple[str, str]]
) -> Path:
    """Write the page, its numbers and its charts; returns the page's path.

    Args:
        evidence: the content of evidence.json.
        course: additional charts, of the training run.
        sheets: pictures in OUT by refinement stage, each with its caption.
    """
    write_json(out / "evidence.json", evidence)
    charts = list(_charts(evidence))
    for number, chart in enumerate([*charts, *course], start=1):
        save_chart(chart, out / "charts" / f"{number:02d}_{_file_name(chart.title)}")
    missing = "".join(f'<p class="flag">{html.escape(line)}</p>' for line in evidence["missing"])
    sections = [
        f"<header><h1>{html.escape(evidence['name'])} <span>evidence</span></h1>"
        f"{facts_html(_facts(evidence))}{missing}</header>",
        _section("What refinement does", "".join(map(chart_html, charts)), "charts"),
        _section("In numbers", table_html(*_numbers(evidence))),
        _section("What it costs", _cost_html(evidence)),
    ]
    if sheets:
        sections.append(_section("Drawn, stage by stage", frames_html(sheets, "stage")))
    if course:
        curves = "".join(map(chart_html, course))
        sections.append(_section("How it was trained", curves, "charts"))
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in evidence["notes"])
    sections.append(_section("How it is measured", f"<ul>{notes}</ul>"))
    page = html_page(f"{evidence['name']}: evidence", "\n".join(sections), name="report")
    return write_text(out / "index.html", page)


def _file_name(title: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in title.lower()).strip("_")


def _section(title: str, body: str, kind: str = "") -> str:
    inner = f'<div class="{kind}">{body}</div>' if kind else body
    return f"<section><h2>{html.escape(title)}</h2>{inner}</section>"


def _facts(evidence: dict) -> dict[str, str]:
    facts = {"model": evidence["model"]["about"]}
    if evidence["control"]:
        facts["control"] = evidence["control"]["about"]
    if evidence["against_control"]:
        (facts["held-out loss of final codes, less the control's"],) = _cells(
            evidence["against_control"]
        )
    settings = evidence["settings"]
    return facts | {
        "images drawn": str(settings["images"]),
        "held-out images": str(settings["held_out"]),
    }


# -- charts ----------------------------------------------------------------------------------------
def _charts(evidence: dict) -> Iterator[Chart]:
    model, control = evidence["model"], evidence["control"]
    if stages := model["drawn"].get("stages"):
        flips = _series("changed", stages["flipped"], first=1)
        yield Chart(
            "Flip rate by stage", "from this stage to the next", "share of codes", (flips,), True
        )
        lines = [
            _series("same code", stages["agreeing"], 0, first=1),
            _series("total variation", stages["total_variation"], 1, first=1),
        ]
        level = stages["two_draws"]["mean"][0]
        ends = ((1.0, level), (float(len(stages["agreeing"]["mean"])), level))
        lines.append(Series("two draws of the final distribution", ends, 0, dashed=True))
        title = "Drafts against the final code"
        yield Chart(title, "refinement stage", "share of codes; distance", tuple(lines), True)
    for what in ("loss", "entropy"):
        if model["known"]:
            series = [
                _series(name, model["known"][kind][what], tint)
                for tint, (kind, name) in enumerate(_KINDS.items())
                if kind in model["known"]
            ]
            if control and control["known"]:
                series += _level("control", control["known"]["own_drafts"][what], series[0])
            title = f"{what.capitalize()} by slot, held-out images"
            yield Chart(title, "slot (0 is final)", "nats per code", tuple(series))
    series = [_series("model", model["drawn"]["entropy"])]
    if control:
        series += _level("control", control["drawn"]["entropy"], series[0])
    yield Chart(
        "Entropy by slot, as drawn", "slot (0 is final)", "nats per code", tuple(series), True
    )


def _series(name: str, found: dict[str, list[float]], tint: int = 0, *, first: int = 0) -> Series:
    points = tuple((float(first + i), mean) for i, mean in enumerate(found["mean"]))
    return Series(name, points, tint, errors=tuple(found["stderr"]), dots=True)


def _level(name: str, found: dict[str, list[float]], model: Series) -> list[Series]:
    """A control's slots, dashed; a single slot is drawn as a level over all slots of the model."""
    means, tint = found["mean"], 7
    if len(means) > 1 or len(model.points) == 1:
        return [Series(name, _series(name, found).points, tint, dashed=True, dots=True)]
    ends = (model.points[0][0], model.points[-1][0])
    return [Series(f"{name}, slot 0", tuple((x, means[0]) for x in ends), tint, dashed=True)]


# -- tables ----------------------------------------------------------------------------------------
def _numbers(evidence: dict) -> tuple[list[str], list[list[str]]]:
    """The table of all means with their standard errors, one per row: its head and rows."""
    rows = []
    for who in ("model", "control"):
        facts = evidence[who]
        if not facts:
            continue
        stages = facts["drawn"].get("stages", {})
        rows += [
            [f"{who}: {name.replace('_', ' ')}, by stage", *_cells(found)]
            for name, found in stages.items()
        ]
        rows.append([f"{who}: entropy as drawn, by slot", *_cells(facts["drawn"]["entropy"])])
        for kind, parts in facts["known"].items():
            given = f", {_KINDS[kind]}" if len(facts["known"]) > 1 else ""
            rows += [
                [f"{who}: held-out {what}{given}, by slot", *_cells(found)]
                for what, found in parts.items()
            ]
    for name, value in (evidence["repairs"] or {}).items():
        rows.append([f"last draft and truth: {name.replace('_', ' ')}", f"{value:.3f}"])
    width = max(map(len, rows))
    head = ["mean ± standard error", *(str(i) for i in range(1, width))]
    return head, [[*row, *[""] * (width - len(row))] for row in rows]


def _cells(found: dict[str, list[float]]) -> list[str]:
    errors = [f" ± {error:.4f}" for error in found["stderr"]] or [""] * len(found["mean"])
    return [f"{mean:.4f}{error}" for mean, error in zip(found["mean"], errors, strict=True)]


def _cost_html(evidence: dict) -> str:
    cost, rows = evidence["cost"], []

    def row(name: str, base: int, model: int, unit: float, word: str) -> None:
        more = f"{(model - base) / base:+.1%}" if base else ""
        rows.append([name, f"{base / unit:.4g} {word}", f"{model / unit:.4g} {word}", more])

    base, codec = cost["base_parameters"], cost["codec_parameters"]
    row("parameters", base, base + codec, 1e6, "M")
    row("operations of a pass over an image", cost["base_operations"], cost["operations"], 1e9, "G")
    row("of these, the head's", cost["base_head_operations"], cost["head_operations"], 1e9, "G")
    row("of these, the codec's", 0, cost["codec_operations"], 1e9, "G")
    by_formula = (
        f"Codec: {codec:,} parameters counted, {cost['codec_by_formula']:,} by the formula."
    )
    lines = [by_formula, *evidence["formulas"]]
    text = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return table_html(["", "base", "model", "more"], rows) + f'<ul class="faint">{text}</ul>'

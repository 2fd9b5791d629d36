"""DPG-Bench's question graph: reads the CSV file, and refuses files that cannot be scored.

The official file (`dpg_bench/dpg_bench.csv` of TencentQQGYLab/ELLA, arXiv 2403.05135) is not
shipped: users give its path, or it is fetched once and verified by its git blob hash. Each row is
one proposition of a prompt:

    item_id                     the prompt's id (text, even where it looks like a number)
    text                        the prompt
    proposition_id, dependency  its number, and the numbers of the propositions that it depends on,
                                separated by commas (0: none)
    tuple                       "attribute - color (bike, red)": category, then its arguments
    question_natural_language   the question to ask about an image

The other columns are not used, not even `category_broad` and `category_detailed`: the official
script takes the category from the tuple.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from t2i.csv_files import read_csv, too_many_cells
from t2i.errors import UserError, shorten
from t2i.published import PublishedFile

log = logging.getLogger(__name__)

OFFICIAL_BLOB = "98457fc9901943f51ff9a30367250fc292533bed"
COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)
_SEPARATORS = {"semicolons": ";", "tabs": "\t"}
"""What spreadsheets may write instead of commas."""
NEEDED = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
CATEGORIES = (
    *(f"attribute - {kind}" for kind in ("color", "other", "shape", "size", "texture")),
    *(f"entity - {kind}" for kind in ("part", "state", "whole")),
    "global -",
    *(f"other - {kind}" for kind in ("count", "text")),
    *(f"relation - {kind}" for kind in ("non-spatial", "spatial")),
)


@dataclass(frozen=True)
class Question:
    """One proposition: its question, and the propositions that it depends on.

    parents: proposition ids within the same item, in file order, without 0. line: its line in the
    CSV file.
    """

    item: str
    prompt: str
    proposition: int
    parents: tuple[int, ...]
    tuple: str
    text: str
    line: int = 0

    @property
    def category(self) -> str:
        """L2 category as the official script spells it: "attribute - color", "global -"."""
        return self.tuple.split("(")[0].strip()

    @property
    def broad_category(self) -> str:
        """L1 category: "attribute", "entity", "global", "other" or "relation"."""
        return broad(self.category)

    @property
    def place(self) -> str:
        return f"line {self.line} (item {self.item}, proposition {self.proposition})"


@dataclass(frozen=True)
class QuestionGraph:
    """All questions in file order. blob: the git blob hash of the file."""

    questions: tuple[Question, ...]
    blob: str

    @property
    def is_official(self) -> bool:
        return self.blob == OFFICIAL_BLOB

    @cached_property
    def items(self) -> dict[str, list[Question]]:
        """Item id -> its questions, both in file order."""
        return group_by_item(self.questions)

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Item id -> prompt, in file order."""
        return {item: questions[0].prompt for item, questions in self.items.items()}


def broad(category: str) -> str:
    """The L1 category of an L2 category."""
    return category.split("-")[0].strip()


def group_by_item(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Item id -> its questions, both in order of appearance."""
    items: dict[str, list[Question]] = {}
    for question in questions:
        items.setdefault(question.item, []).append(question)
    return items


def git_blob_sha1(content: bytes) -> str:
    """The hash under which git stores a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_questions(path: str | Path) -> QuestionGraph:
    """Read and check a CSV file of questions.

    Problems in the official file are only logged, because its oddities are part of the published
    numbers. Any other file must pass all checks.

    Raises:
        UserError: the file is unreadable or lacks a column, or rows cannot be scored (the message
            gives their lines): an invalid number, an empty field, an unknown category, a repeated
            proposition, a dependency that is missing or circular, or an item whose rows are not
            together or have different prompts.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"question file {path} cannot be read: {error}") from error
    blob = git_blob_sha1(content)
    names, rows = read_csv(content, f"question file {path}", strict=blob != OFFICIAL_BLOB)
    if missing := [name for name in NEEDED if name not in names]:
        first = "".join(names)
        other = next((name for name, sign in _SEPARATORS.items() if first.count(sign) > 4), None)
        hint = f": save it with commas; {other} separate its columns" if other else ""
        raise UserError(
            f"question file {path} has no column {', '.join(missing)}{hint}. DPG-Bench's columns are "
            f"{', '.join(COLUMNS)}"
        )
    if twice := [name for name in NEEDED if names.count(name) > 1]:
        raise UserError(f"question file {path} has two columns {', '.join(twice)}: delete one")
    if not rows:
        raise UserError(f"question file {path} has no rows")
    questions, problems = [], []
    for line, row in rows:
        if None in row:
            problems.append(too_many_cells(line))
        try:
            questions.append(_question(row, line))
        except UserError as error:
            problems.append(str(error))
    problems += graph_problems(questions)
    graph = QuestionGraph(tuple(questions), blob)
    if problems:
        lines = "\n  ".join(["", shorten(problems, "\n  ", most=10)])
        message = f"question file {path}: {lines}"
        if not graph.is_official or len(questions) < len(rows):
            raise UserError(message)
        log.warning("%s", message)
    return graph


def _question(row: dict, line: int) -> Question:
    """The question in a row that ends on `line`; UserError if a field is empty or not a number."""
    values = {name: row[name] or "" for name in NEEDED}
    line -= sum(value.count("\n") for value in values.values())
    where = f"line {line} (item {values['item_id']}, proposition {values['proposition_id']})"
    if empty := [name for name, value in values.items() if not value.strip()]:
        raise UserError(f"{where}: {', '.join(empty)} is empty")
    try:
        proposition = int(values["proposition_id"])
        parents = [int(part) for part in values["dependency"].split(",")]
    except ValueError as error:
        raise UserError(
            f"{where}: proposition_id must be a number, and dependency one or more numbers separated by "
            f"commas (0: none), not {values['proposition_id']!r:.80} and {values['dependency']!r:.80}"
        ) from error
    if proposition < 1:
        raise UserError(f"{where}: proposition ids start at 1 (a dependency on 0 means none)")
    return Question(
        item=values["item_id"],
        prompt=values["text"],
        proposition=proposition,
        parents=tuple(parent for parent in parents if parent != 0),
        tuple=values["tuple"],
        text=values["question_natural_language"],
        line=line,
    )


def graph_problems(questions: Sequence[Question]) -> list[str]:
    """Reasons why these questions cannot be scored, each with its row."""
    problems = []
    last_of_item: dict[str, int] = {}
    for index, question in enumerate(questions):
        if question.category not in CATEGORIES:
            problems.append(
                f"{question.place}: unknown category {question.category!r}; "
                f"known are {', '.join(CATEGORIES)}"
            )
        if last_of_item.get(question.item, index - 1) != index - 1:
            problems.append(f"{question.place}: the item's rows are not together")
        last_of_item[question.item] = index
    for rows in group_by_item(questions).values():
        problems += item_problems(rows)
    return problems


def item_problems(rows: Sequence[Question]) -> list[str]:
    """Reasons why one item's questions cannot be scored."""
    problems = []
    by_id: dict[int, Question] = {}
    for row in rows:
        first = by_id.setdefault(row.proposition, row)
        if first is not row:
            problems.append(f"{row.place}: proposition {row.proposition} is repeated")
        if row.prompt != rows[0].prompt:
            problems.append(f"{row.place}: its prompt differs from line {rows[0].line}")
    for row in rows:
        if lost := [parent for parent in row.parents if parent not in by_id]:
            ids = shorten(list(map(str, lost)))
            problems.append(f"{row.place}: depends on {ids}, which the item does not have")
    known = {id_: [p for p in row.parents if p in by_id] for id_, row in by_id.items()}
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]  # from child to parent
        path = shorten(list(map(str, cycle)), " -> ")
        problems.append(f"{by_id[cycle[0]].place}: depends on itself ({path})")
    return problems


# -- the official file -----------------------------------------------------------------------------
OFFICIAL_FILE = PublishedFile(
    title="question file of DPG-Bench",
    url="https://raw.githubusercontent.com/TencentQQGYLab/ELLA/"
    "3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv",
    names=("dpg_bench.csv",),
    hashes=(OFFICIAL_BLOB,),
    cache="dpg_bench",
    advice="give it with --questions PATH, or use the shapes world's questions, which are shipped",
    digest=lambda path: git_blob_sha1(path.read_bytes()),
)

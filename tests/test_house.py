"""Rules for the whole tree: unique names, few parameters, imports in one direction, page width."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from t2i.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGES = ("t2i", "launch", "geneval", "dpg_bench")
SAME_ON_PURPOSE = {"run"}  # users call geneval/run.py and dpg_bench/run.py by path
MOST_PARAMETERS = 7
WIDTH = 100
FLOORS = (
    (5, r"t2i\.models\.\w+\.\w+_(recipes|rehearsal)$"),
    (2, rf"t2i\.models\.({'|'.join(FAMILIES)})\b"),
    (1, r"t2i\.(models|data)\b"),
    (2, r"t2i\.tensorar\b"),
    (3, r"t2i\.(sources|loading|checkpoint\w*|lora|model_options|generation)$"),
    (4, r"t2i\.(training|evaluation|demo|rehearsal)\b"),
    (5, r"t2i\.export_folder$"),
    (6, r"(geneval|dpg_bench)\b"),
    (7, r"t2i\.shapes\b"),
    (8, r"t2i\.reward\b"),
    (9, r"launch\b"),
    (0, r"t2i\b"),
)
"""A module is on the floor of the first pattern that matches its name (docs/how_it_works.md)."""


@cache
def modules() -> list[tuple[Path, ast.Module]]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(p.relative_to(ROOT), ast.parse(p.read_text(encoding="utf-8"))) for p in paths]


def repeated(places: dict[str, list]) -> dict[str, list]:
    return {name: found for name, found in places.items() if len(found) > 1}


def test_module_names_are_unique():
    places = defaultdict(list)
    for path, _ in modules():
        if not path.stem.startswith("__"):
            places[path.stem].append(str(path))
    assert set(repeated(places)) == SAME_ON_PURPOSE, repeated(places)


def test_class_names_are_unique():
    places = defaultdict(list)
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    assert not repeated(places)


def test_functions_have_at_most_seven_parameters():
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [a.arg for a in arguments if a.arg not in ("self", "cls", "ctx")]
                assert len(names) <= MOST_PARAMETERS, f"{path}: {node.name}({', '.join(names)})"


def floor_and_room(module: str) -> tuple[int, str]:
    """A module's floor and room. A room is a family's folder, another folder in t2i/, or one of the
    other packages.
    """
    floor = next(floor for floor, pattern in FLOORS if re.match(pattern, module))
    family = re.match(rf"t2i\.models\.({'|'.join(FAMILIES)})\b", module)
    first, *rest = module.split(".")
    inside = first == "t2i" and bool(rest) and (ROOT / first / rest[0]).is_dir()
    return floor, family[0] if family else f"{first}.{rest[0]}" if inside else first


def imports(node: ast.AST) -> Iterator[str]:
    """The modules that a module imports when it runs, at its top or in a function."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
            yield f"{node.module}.{alias.name}" if inner.exists() else node.module
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def test_imports_run_one_way():
    """A module imports only from lower floors and from its own room."""
    seen = 0
    for path, tree in modules():
        own = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        floor, room = floor_and_room(own)
        for other in imports(tree):
            if other.split(".")[0] in PACKAGES:
                seen += 1
                below, next_door = floor_and_room(other)
                assert below < floor or next_door == room, f"{own} imports {other}"
    assert seen > 1000


def test_pages_are_no_wider_than_code():
    """Except for what cannot be broken: tables, pictures, addresses, commands."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            fenced ^= line.startswith("```")
            whole = line.startswith(("|", "![", "#")) or "<http" in line
            words = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "_"), line).split()
            unbroken = max(map(len, words), default=0) > 80
            assert fenced or whole or unbroken or len(line) <= WIDTH, f"{page.name}:{number}"

"""One name, one meaning: what a name says is the same wherever it stands in the tree."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("t2i", "launch", "geneval", "dpg_bench")
SAME_ON_PURPOSE = {"run"}  # geneval/run.py and dpg_bench/run.py, as users type them
MOST_PARAMETERS = 7


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def repeated(places: dict[str, list]) -> dict[str, list]:
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_two_modules_have_one_name():
    places = defaultdict(list)
    for path, _ in modules():
        if not path.stem.startswith("__"):
            places[path.stem].append(str(path))
    assert set(repeated(places)) == SAME_ON_PURPOSE, repeated(places)


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    assert not repeated(places)


def test_what_needs_many_parameters_takes_an_object():
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [a.arg for a in arguments if a.arg not in ("self", "cls", "ctx")]
                assert len(names) <= MOST_PARAMETERS, f"{path}: {node.name}({', '.join(names)})"

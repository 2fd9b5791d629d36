"""Settings dataclasses: read from JSON of any origin, and overridden by options."""

import ast
import inspect
import json
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from textwrap import dedent
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from t2i import __version__
from t2i.errors import UserError, naming
from t2i.files import read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
C = TypeVar("C")


def read_object(path: str | Path) -> dict:
    """A file's JSON object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, but holds {content!r:.80}")
    return content


def from_json(cls: type[S], values: object, where: str, *, defaults: S | None = None) -> S:
    """A settings dataclass from parsed JSON.

    Args:
        where: the file (and part of it) that holds the JSON, for messages.
        defaults: supplies the settings that are missing; if None, the class's defaults do.

    Raises:
        UserError: `values` is not a JSON object, or a setting is unknown (never ignored: it may
            change what weights mean), missing, of the wrong type, or refused by the class.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a JSON object of settings, but is {values!r:.80}")
    if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
        raise UserError(
            f"{where} has settings that this version ({__version__}) of the kit does not know: "
            f"{', '.join(unknown)}; load it with the version that wrote it"
        )
    needed = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    if defaults is None and (missing := [name for name in needed if name not in values]):
        raise UserError(f"{where} lacks {', '.join(missing)}; copy it again")
    hints = get_type_hints(cls)
    given = {k: _converted(v, hints[k], f"{where}: {k}") for k, v in values.items()}
    with naming(where):
        return cls(**given) if defaults is None else replace(defaults, **given)


def check_types(settings: "DataclassInstance", part: str = "") -> None:
    """UserError names a setting that is not of its type, with `part` ("optim.") before its name;
    lists become tuples where those are meant, and text a path or the other way round.

    What a file or a command line gives is checked on its way; this is for what Python code gives.
    NaN is a float: the limits of a setting refuse it.
    """
    hints = _hints(type(settings))
    for name in (own.name for own in fields(settings)):
        value, hint = getattr(settings, name), hints[name]
        value = _of_python(value)
        is_nan = isinstance(value, float) and value != value
        if not (is_nan and _fits(0.0, hint)):
            value = _converted(value, hint, part + name)
        object.__setattr__(settings, name, value)


_hints = cache(get_type_hints)


def python_number(value: Real) -> int | float:
    """The same number in Python's own types; JSON takes no others."""
    return operator.index(value) if isinstance(value, Integral) else float(value)


def _of_python(value: object) -> object:
    """The value; a number of numpy's as Python's."""
    if isinstance(value, Real) and not isinstance(value, int | float):
        return python_number(value)
    return value


def _converted(value: object, hint: object, where: str) -> object:
    """The value converted to its type: JSON has no tuples, paths or dataclasses."""
    value = _of_python(value)
    kinds = (hint, *get_args(hint))
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        value = tuple(value)
    if isinstance(value, Mapping) and (
        nested := [k for k in kinds if isinstance(k, type) and is_dataclass(k)]
    ):
        known = (k for k in nested if value.keys() <= {f.name for f in fields(k)})
        return from_json(next(known, nested[0]), value, where)
    if isinstance(value, str | Path) and (str in kinds) != (Path in kinds):
        value = str(value) if str in kinds else Path(value)
    check_type(value, hint, where)
    return value


def check_type(value: object, hint: object, where: str) -> None:
    """UserError if a value is not of the type; `where` names it."""
    if not _fits(value, hint):
        kind = getattr(hint, "__name__", None) if get_origin(hint) is None else str(hint)
        raise UserError(f"{where} is {value!r:.80}, which is not of the type {kind}")


def _fits(value: object, hint: object) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(value == arg for arg in args if type(value) is type(arg))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):  # neither bool nor NaN
        number = isinstance(value, int) or (hint is float and isinstance(value, float))
        return number and not isinstance(value, bool) and value == value
    kind = origin or hint
    return isinstance(kind, type) and isinstance(value, kind)


def plain(settings: "DataclassInstance") -> dict:
    """The settings as plain JSON values."""
    return json.loads(json.dumps(asdict(settings), default=str))


def leaves(settings: Mapping, part: str = "") -> dict[str, object]:
    """Nested settings, flattened to full names such as "optim.betas"."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        found |= leaves(value, f"{part}{name}.") if inner else {part + name: value}
    return found


# -- overrides -------------------------------------------------------------------------------------
def given_options(options: "DataclassInstance") -> list[str]:
    """Dotted names of the options that differ from their defaults."""
    found = []
    for own in fields(options):
        value = getattr(options, own.name)
        usual = own.default if own.default_factory is MISSING else own.default_factory()
        if value == usual:
            continue
        nested = is_dataclass(value) and not isinstance(value, type)
        inner = given_options(value) if nested else []
        found += [f"{own.name}.{name}" for name in inner] or [own.name]
    return found


def told_options(options: "DataclassInstance", names: Collection[str], part: str) -> str:
    """Those of these options that differ from their defaults, for a message: "data.split=val"."""
    given = [name for name in given_options(options) if name in names]
    return ", ".join(f"{part}{name}={getattr(options, name)}" for name in given)


def all_optional(settings: type) -> Callable[[type[C]], type[C]]:
    """Class decorator: adds every field of a settings class, None by default, with its docstring.

    This lets a command line override single settings whose other values are known only later.
    """
    hints, docs = get_type_hints(settings), _field_docs(settings)
    optional = {
        name: Annotated[hint | None, tyro.conf.arg(help=docs[name])] for name, hint in hints.items()
    }

    def add_fields(cls: type[C]) -> type[C]:
        own = {"__doc__": cls.__doc__, "__module__": cls.__module__}
        added = [(name, kind, field(default=None)) for name, kind in optional.items()]
        return make_dataclass(cls.__name__, added, bases=(cls,), namespace=own, frozen=True)

    return add_fields


def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    definition = ast.parse(dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef), cls
    return {
        ast.unparse(line.target): ast.literal_eval(below.value)
        for line, below in pairwise(definition.body)
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr)
    }

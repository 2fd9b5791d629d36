"""Shared by all programs: options, help, logging, and a clear message for a user's mistake."""

import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from t2i.errors import Stopped, UserError, check_text, choose_one
from t2i.launcher import (
    handling,
    is_main_process,
    resume_command,
    stop_signals,
    without_rank,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound="DataclassInstance")
_HELP, _HELP_ALL = ("-h", "--help"), "--help-all"
_UNREAD = (errno.EPIPE, errno.ENOSPC)
_COMMANDS = ("python ", "torchrun ", "deepspeed ", "srun ", "mpirun ")


def parse(
    default: Config | type[Config], description: str, skip: int = 0, main: Sequence[str] = ()
) -> Config:
    """Parse a config dataclass; unknown options are refused with a suggestion.

    Args:
        description: the module's docstring; its examples stay lines in the help.
        skip: number of leading command-line words to ignore.
        main: fields that --help shows, in their class's order ("data.source" for a field of a
            nested class); --help-all shows all fields. If empty, --help shows all, too.
    """
    return _parsed(default, _arguments()[skip:], description, main)


def parse_recipe(
    recipes: Mapping[str, tuple[str, Config]],
    description: str,
    main: Sequence[str] = (),
    program_of: Callable[[str], str | None] = lambda name: None,
    settle: Callable[[Config, Config], Config] = lambda config, own: config,
) -> Config:
    """Parse `NAME --option value ...`: a named recipe with overrides.

    Args:
        main: as in `parse`, for the help of a recipe.
        program_of: returns the other program that has a recipe of this name, or None.
        settle: called with the parsed config and the recipe; returns the config to use.
    """
    given, program = _arguments() or ["--help"], Path(sys.argv[0]).name
    name = given[0]
    if name in recipes:
        about, recipe = recipes[name]
        config = _parsed(recipe, given[1:], about, main, prog=f"{program} {name}")
        return settle(config, recipe)
    if name in (*_HELP, _HELP_ALL):
        width = max(map(len, recipes))
        print(f"{_help_text(description)}\n\n  {program} RECIPE --help shows its options\n")
        print("\n".join(f"  {name:<{width}}  {about}" for name, (about, _) in recipes.items()))
        sys.exit()
    if name.startswith("-"):
        raise UserError(f"name a recipe first, then its options; {program} --help lists them")
    if elsewhere := program_of(name):
        raise UserError(f"{name} is a recipe of {elsewhere}")
    raise UserError(f"unknown recipe {name!r}; {choose_one(name, recipes)}")


def _parsed(
    default: Config | type[Config],
    given: list[str],
    description: str,
    main: Sequence[str],
    prog: str | None = None,
) -> Config:
    description = _help_text(description)
    kind: type[Any] = default if isinstance(default, type) else type(default)
    options: dict[str, Any] = {} if isinstance(default, type) else {"default": default}
    if main and any(a in _HELP for a in given):
        kind = _showing(kind, main, options.pop("default", None))
        description += "\n\n  --help-all shows every option"
    given = ["--help" if a == _HELP_ALL else a for a in given]
    _refuse_no_text(given)
    _refuse_repeats(default, given)
    _warn_of_repeats(given)
    _refuse_dashes(default, given)
    _refuse_blanks(default, given)
    config = tyro.cli(
        kind,
        prog=prog,
        description=description,
        args=given,
        config=(tyro.conf.AvoidSubcommands,),
        **options,
    )
    _refuse_nan(config)
    _quiet_libraries()
    return config


def _refuse_no_text(given: Sequence[str]) -> None:
    """UserError for a value that is not UTF-8: records of the work could not be written."""
    option = "the command line"
    for word in given:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = name or option
        check_text(value if equals or not name else name, option)


def _refuse_repeats(config: "DataclassInstance | type", given: Sequence[str]) -> None:
    """UserError for an option of several values that is given twice."""
    # The parser would silently drop all but the last.
    names = [a.partition("=")[0].replace("_", "-") for a in given if a.startswith("--")]
    for name in _lists(config):
        if (count := names.count(name)) > 1:
            raise UserError(f"{name} is given {count} times: give it once, followed by all values")


def _warn_of_repeats(given: Sequence[str]) -> None:
    """Warn of options that are given twice with different values: the last one counts."""
    values: dict[str, list[list[str]]] = {}
    current: list[str] = []
    for word in given:
        if word.startswith("--"):
            name, equals, own = word.partition("=")
            current = [own] if equals else []
            values.setdefault(name.replace("_", "-"), []).append(current)
        else:
            current.append(word)
    for name, found in values.items():
        if any(found) and found.count(found[0]) < len(found):  # scripts override options so
            log.warning("%s is given %d times: %s counts", name, len(found), " ".join(found[-1]))


def _refuse_dashes(config: "DataclassInstance | type", given: Sequence[str]) -> None:
    """UserError for a value that begins with "-" and a letter: it would be taken for an option."""
    option = ""
    with_file = ["--prompt"] if any(f.name == "prompt_file" for f in fields(config)) else []
    for word in given:
        name, equals, _ = word.partition("=")
        if re.match(r"--?[^\W\d_]", word) and any(map(str.isspace, name)):
            several = "; several go into a --prompt-file" if option in with_file else ""
            raise UserError(
                f"{word!r:.80} begins with '-', as options do: write {option or '--OPTION'}="
                f"{word!r:.80}{several}"
            )
        option = word if word.startswith("--") and not equals else option


def _refuse_blanks(config: "DataclassInstance | type", given: Sequence[str]) -> None:
    """UserError for an empty value, except of prompts, which the programs check themselves."""
    # An empty path means the working directory: an unset shell variable would put a run there.
    prompts = {name for name in _lists(config) if name.endswith(("prompt", "prompts"))}
    option = "an argument"
    for word in given:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "=", word)
        option = name or option
        if equals and not value.strip() and option.replace("_", "-") not in prompts:
            raise UserError(
                f"{option} has an empty value: leave the option out, or give it a value (is a shell "
                "variable not set?)"
            )


def _lists(config: "DataclassInstance | type", prefix: str = "--") -> Iterator[str]:
    """The options of a config (or config class) that take any number of values."""
    kind = config if isinstance(config, type) else type(config)
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for f in fields(config):
        name, hint = prefix + f.name.replace("_", "-"), hints[f.name]
        inner = hint if isinstance(config, type) else getattr(config, f.name)
        if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
            yield name
        elif is_dataclass(inner):
            marks = getattr(marked[f.name], "__metadata__", ())
            nameless = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _lists(inner, prefix if nameless else f"{name}.")


def _refuse_nan(config: "DataclassInstance", prefix: str = "") -> None:
    """UserError for NaN in a numeric setting."""
    # NaN would slip through the checks of limits, and show only in the results.
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value) and not isinstance(value, type):
            _refuse_nan(value, f"{prefix}{f.name}.")
        elif any(v != v for v in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{prefix}{f.name}={value} must be a number")


def _help_text(description: str) -> str:
    """A docstring, prepared for the parser's help."""
    # The parser joins lines that are not indented, so commands are indented.
    lines: list[str] = []
    for line in description.splitlines():
        continues = lines and lines[-1].startswith(" ") and lines[-1].endswith("\\")
        lines.append(f"  {line}" if line.startswith(_COMMANDS) or continues else line)
    return "\n".join(lines)


def _showing(kind: type, names: Sequence[str], default: object) -> type:
    """A subclass of a config class, only for help: it shows and parses only the fields `names`.

    Its defaults are the values of `default`, unless that is None.
    """
    hints = get_type_hints(kind, include_extras=True)
    own: dict[str, Any] = {}
    for f in fields(kind):
        value = f.default if default is None else getattr(default, f.name)
        if value is MISSING and f.default_factory is not MISSING:
            value = f.default_factory()
        below = [n.removeprefix(f"{f.name}.") for n in names if n.startswith(f"{f.name}.")]
        if below:
            shown = _showing(type(value), below, value)
            markers = getattr(hints[f.name], "__metadata__", ())  # tyro's
            hints[f.name] = Annotated[(shown, *markers)] if markers else shown
            value = shown()
        elif f.name not in names:
            hints[f.name] = Annotated[hints[f.name], tyro.conf.Suppress]
        if value is not MISSING:
            own[f.name] = field(default_factory=partial(copy, value))
    own |= {"__annotations__": hints, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind,), own))


def _arguments() -> list[str]:
    given = without_rank(sys.argv[1:])
    # Shells expand "--run-dir ~/a" but not "--run-dir=~/a", which would create a folder named "~".
    home = os.path.expanduser("~")
    return [
        re.sub(r"^(--[\w.-]+=)?~(?=/)", lambda found: (found[1] or "") + home, a) for a in given
    ]


def _quiet_libraries() -> None:
    """Turn off progress bars for reading files from disk, but not for downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not are_progress_bars_disabled():
        transformers_logging.disable_progress_bar()  # disables the hub's, too
        enable_progress_bars()


def _log_plainly() -> None:
    out = sys.stdout
    if isinstance(out, TextIOWrapper) and (out.errors == "strict" or out.encoding != "utf-8"):
        out.reconfigure(errors="backslashreplace")  # the locale may lack é and ±
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    for noisy in ("httpx", "httpx2", "transformers"):  # the hub's library uses one of the first two
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It also raises the errors that it logs.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    # Pillow's warning about large images: the kit counts and reports these itself.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit of")


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt("terminated")


def run(main: Callable[[], None]) -> None:
    """Run a program: a user's mistake (UserError), Ctrl-C, SIGTERM and a closed terminal end it
    with a message only.

    Other errors keep their traceback, followed by advice if memory ran out.
    """
    try:
        # SIGTERM and a closed terminal act like Ctrl-C; training installs its own handlers.
        with handling(stop_signals(), _terminate):
            _log_plainly()
            _refuse_lost_folder()
            main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if (words := _no_memory(error)) is None:
            raise
        traceback.print_exc()
        print(f"error: {words}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: {error.strerror}: {str(error.filename)[:80]} ...", file=sys.stderr)
            sys.exit(1)
        if error.errno not in _UNREAD or _output_is_read("\n"):
            raise
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        if is_main_process():
            print("interrupted", *stop.args, sep=": ", file=sys.stderr)
            if isinstance(stop, Stopped):
                print(f"to continue:\n  {resume_command()}", file=sys.stderr)
        sys.exit(130)
    finally:
        _output_is_read()
        _leave_processes()


def _refuse_lost_folder() -> None:
    """UserError if the working directory was deleted: imports would fail in obscure ways."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError(
            "the folder in which this was started has been deleted; change to another (cd)"
        ) from error


def _no_memory(error: Exception) -> str | None:
    """The message for an error that means too little memory; None for other errors."""
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    # On the CPU torch raises a plain RuntimeError.
    if not isinstance(error, MemoryError | of_torch) and "allocate memory" not in str(error):
        return None
    reason = str(error).strip().partition("\n")[0][:200]
    return (
        f"there is not enough memory for this{reason and f' ({reason})'}: ask for less at once, with "
        "a smaller --batch-size, or in training --engine.micro-batch 1 "
        "(docs/troubleshooting.md says what else helps)"
    )


def _output_is_read(end: str = "") -> bool:
    """Flush stdout, with `end` appended; False if its reader has quit (| head) or the disk is full.

    Further output is then discarded silently: results are in files, not on stdout.
    """
    try:
        print(end=end, flush=True)
    except OSError as error:
        if error.errno not in _UNREAD:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _leave_processes() -> None:
    """Leave the process group cleanly."""
    # Exiting with a connection open can abort the process, and hide its exit code.
    group = sys.modules.get("torch.distributed")  # not imported just for this
    if group and group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        group.destroy_process_group()

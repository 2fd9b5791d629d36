"""What all scripts share: presets with overrides on the command line, logging, and one clear message for a user's mistake."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from t2i.errors import UserError
from t2i.launcher import is_main_process

Config = TypeVar("Config")
Selection = TypeVar("Selection")


def parse(default: Config | type[Config], description: str, skip: int = 0) -> Config:
    """Parse a config dataclass; unknown options are refused with a suggestion. `skip` words are not for it."""
    config = tyro.cli(default, description=description, args=_arguments()[skip:])
    _quiet_libraries()
    return config


def parse_recipe(recipes: dict[str, tuple[str, Config]], description: str) -> Config:
    """Parse `NAME --option value ...`: a named recipe with overrides.

    Raises:
        UserError: there is no recipe of this name (the parser itself would then call every option unknown).
    """
    name = next(iter(_arguments()), "--help")
    if not name.startswith("-") and name not in recipes:
        raise UserError(f"unknown recipe {name!r}; choose one of {', '.join(recipes)}")
    if (
        name in recipes
    ):  # this recipe's parser alone: its help and suggestions are not repeated for every recipe
        config = tyro.cli(
            type(recipes[name][1]),
            default=recipes[name][1],
            prog=f"{Path(sys.argv[0]).name} {name}",
            description=recipes[name][0],
            args=_arguments()[1:],
            config=(tyro.conf.AvoidSubcommands,),
        )
    else:
        config = tyro.extras.overridable_config_cli(
            recipes, description=description, args=_arguments()
        )
    _quiet_libraries()
    return config


def parse_selected(
    selection: type[Selection], recipe: Callable[[Selection], Config], description: str
) -> Config:
    """Parse the few options of `selection`, and all others as overrides of the config that `recipe` makes of it.

    Raises:
        UserError: there is no such recipe.
    """
    given = _arguments()
    help_wanted = [a for a in given if a in ("-h", "--help")]
    if len(given) > len(help_wanted):  # a selection is made: the help is that of all options
        given = [a for a in given if a not in help_wanted]
    else:
        help_wanted = []
    own, rest = tyro.cli(selection, description=description, args=given, return_unknown_args=True)
    chosen = " ".join(f"--{k} {v}" for k, v in vars(own).items() if v is not None)
    config = tyro.cli(
        type(default := recipe(own)),
        default=default,
        prog=f"{Path(sys.argv[0]).name} {chosen}",
        args=rest + help_wanted,
        config=(tyro.conf.AvoidSubcommands,),
    )
    _quiet_libraries()
    return config


def _arguments() -> list[str]:
    # DeepSpeed's launcher appends --local_rank=N; the environment says the same.
    return [a for a in sys.argv[1:] if not a.startswith("--local_rank")]


def _quiet_libraries() -> None:
    """No progress bars for reading files from disk; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not are_progress_bars_disabled():
        transformers_logging.disable_progress_bar()  # disables the hub's, too
        enable_progress_bars()


def _log_plainly() -> None:
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt("terminated")


def run(main: Callable[[], None]) -> None:
    """Run a script: a user's mistake (UserError), Ctrl-C and SIGTERM end in a message alone; anything else keeps its traceback."""
    # SIGTERM ends like Ctrl-C; a training run has handlers of its own.
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        _log_plainly()
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        if is_main_process():
            print("interrupted", *stop.args, sep=": ", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, previous)

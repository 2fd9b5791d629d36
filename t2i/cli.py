"""What all scripts share: presets with overrides on the command line, logging, and one clear message for a user's mistake."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def parse(default: Config | type[Config], description: str) -> Config:
    """Parse a config dataclass; unknown options are refused with a suggestion."""
    return tyro.cli(default, description=description, args=_arguments())


def parse_recipe(recipes: dict[str, tuple[str, Config]], description: str) -> Config:
    """Parse `NAME --option value ...`: a named recipe with overrides."""
    return tyro.extras.overridable_config_cli(recipes, description=description, args=_arguments())


def _arguments() -> list[str]:
    # DeepSpeed's launcher appends --local_rank=N; the environment says the same.
    return [a for a in sys.argv[1:] if not a.startswith("--local_rank")]


def run(main: Callable[[], None]) -> None:
    """Run a script: a ValueError is a user's mistake and ends in its message alone; anything else keeps its traceback."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

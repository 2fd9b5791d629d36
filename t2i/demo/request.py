"""A request to the demo: limits on every number, and the command that draws the same images.

Imports neither torch nor Gradio.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from t2i.errors import UserError
from t2i.model_options import ModelOptions
from t2i.sampling import SamplingOverrides, Speculate

LONGEST_PROMPT = 2000
"""In characters."""
LARGEST_SEED = 2**31 - 1
SPECULATE: tuple[Speculate, ...] = ("auto", "off", 2, 4, 8, 16)
"""The choices that the page offers."""


@dataclass(frozen=True)
class Limit:
    """The allowed range of a number."""

    name: str
    """Its label on the page."""
    low: float
    high: float
    whole: bool = False
    about: str = ""
    """A short explanation shown on the page."""

    def check(self, value: object) -> float | int:
        """Return the number; UserError if the value is not a number or is out of range."""
        number = None if isinstance(value, bool) or not isinstance(value, int | float) else value
        if number is not None and self.low <= number <= self.high:
            if not self.whole:
                return float(number)
            if number == int(number):
                return int(number)
        kind = "a whole number" if self.whole else "a number"
        given = "nothing" if value is None else f"{value!r:.40}"
        raise UserError(f"{self.name} must be {kind} from {self}, but {given} was given")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:.15g}"


def limits(*, most_images: int, codes: int) -> dict[str, Limit]:
    """The limit of each option; `codes`: the number of codes that the model chooses from."""
    return {
        "samples": Limit("images", 1, most_images, whole=True),
        "seed": Limit("seed", 0, LARGEST_SEED, whole=True, about="the same seed, the same images"),
        "cfg_scale": Limit("guidance", 1, 20, about="1 turns it off"),
        "temperature": Limit("temperature", 0, 2, about="0 always takes the most likely code"),
        "top_k": Limit("top-k", 0, codes, whole=True, about="only the k most likely codes; 0: all"),
        "top_p": Limit(
            "top-p", 0.01, 1, about="the most likely codes of this total probability; 1: all"
        ),
    }


OPTIONAL = ("cfg_scale", "temperature", "top_k", "top_p")
"""Options that use the model's own setting if their field is empty."""
FIELDS = ("prompt", "samples", "seed", *OPTIONAL, "speculate")
"""What `read_request` reads, named like the options of launch/generate.py."""


@dataclass(frozen=True)
class Request:
    """What to draw; every value has been checked."""

    prompt: str
    samples: int
    seed: int
    sampling: SamplingOverrides
    speculate: Speculate

    def command(self, model: Sequence[str], *, stages: bool = False) -> str:
        """The command line that draws the same images; `model`: the options that select it."""
        words: list[object] = ["python", "-m", "launch", "generate", *model]
        dashed = self.prompt.startswith("-")  # it would be taken for an option
        words += [f"--prompt={self.prompt}"] if dashed else ["--prompt", self.prompt]
        words += ["--samples", self.samples, "--seed", self.seed]
        for name, value in vars(self.sampling).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", value]
        words += ["--speculate", self.speculate, *(["--stages"] if stages else [])]
        return shlex.join(map(str, words))


def read_request(given: Mapping[str, object], allowed: Mapping[str, Limit]) -> Request:
    """Check the page's `FIELDS` and build the request.

    Raises:
        UserError: a value is missing, of the wrong kind or out of range; names the page's label.
    """
    prompt = given["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("the prompt is empty: say what to draw")
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(
            f"the prompt has {len(prompt)} characters: at most {LONGEST_PROMPT} are allowed"
        )
    if "\0" in prompt:
        raise UserError("the prompt contains a zero character: remove it")
    numbers = {
        name: limit.check(given[name])
        for name, limit in allowed.items()
        if not (name in OPTIONAL and given[name] is None)
    }
    speculate = next((one for one in SPECULATE if one == given["speculate"]), None)
    if speculate is None:
        choices = ", ".join(map(str, SPECULATE))
        raise UserError(f"speculation must be one of {choices}, not {given['speculate']!r:.40}")
    own = {name: numbers[name] for name in OPTIONAL if name in numbers}
    return Request(
        prompt=prompt.strip(),
        samples=int(numbers["samples"]),
        seed=int(numbers["seed"]),
        sampling=SamplingOverrides(**own),
        speculate=speculate,
    )


def model_words(options: ModelOptions) -> list[str]:
    """The command-line options that select a model and how it is computed; `Request.command` adds
    --speculate.
    """
    usual = ModelOptions()
    words: list[str] = []
    for prefix, own, plain in (("", options, usual), ("base.", options.base, usual.base)):
        for option in fields(plain):
            value = getattr(own, option.name)
            if value != getattr(plain, option.name) and option.name not in ("base", "speculate"):
                parts = value if isinstance(value, tuple) else (value,)
                words += [f"--{prefix}{option.name.replace('_', '-')}", *map(str, parts)]
    return words

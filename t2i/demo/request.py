"""What a person asks the demo for: limits on every number, and the command that draws the same.

Without torch and without Gradio.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from t2i.errors import UserError
from t2i.model_options import ModelOptions
from t2i.sampling import SamplingOverrides, Speculate

LONGEST_PROMPT = 2000
"""Characters."""
LARGEST_SEED = 2**31 - 1
SPECULATE: tuple[Speculate, ...] = ("auto", "off", 2, 4, 8, 16)
"""What may be chosen."""


@dataclass(frozen=True)
class Limit:
    """What a number may be."""

    name: str
    """What the page calls it."""
    low: float
    high: float
    whole: bool = False
    about: str = ""
    """What the page says of it."""

    def check(self, value: object) -> float | int:
        """The number; UserError if it is none, or out of range."""
        number = None if isinstance(value, bool) or not isinstance(value, int | float) else value
        if number is not None and self.low <= number <= self.high:
            if not self.whole:
                return float(number)
            if number == int(number):
                return int(number)
        kind = "a whole number" if self.whole else "a number"
        given = "nothing is given" if value is None else f"{value!r:.40} is given"
        raise UserError(f"{self.name} must be {kind} from {self}, and {given}")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:.15g}"


def limits(*, most_images: int, codes: int) -> dict[str, Limit]:
    """By option; `codes`: how many a model chooses from."""
    return {
        "samples": Limit("images", 1, most_images, whole=True),
        "seed": Limit("seed", 0, LARGEST_SEED, whole=True, about="the same seed, the same images"),
        "cfg_scale": Limit("guidance", 1, 20, about="1 is without"),
        "temperature": Limit("temperature", 0, 2, about="0 takes the most likely code"),
        "top_k": Limit("top-k", 0, codes, whole=True, about="the k most likely codes; 0: all"),
        "top_p": Limit("top-p", 0.01, 1, about="the likeliest codes of this probability; 1: all"),
    }


OPTIONAL = ("cfg_scale", "temperature", "top_k", "top_p")
"""Empty, they are the model's own."""
FIELDS = ("prompt", "samples", "seed", *OPTIONAL, "speculate")
"""What `read_request` reads, by option of launch/generate.py."""


@dataclass(frozen=True)
class Request:
    """What is to be drawn, all of it checked."""

    prompt: str
    samples: int
    seed: int
    sampling: SamplingOverrides
    speculate: Speculate

    def command(self, model: Sequence[str], *, stages: bool = False) -> str:
        """The command line that draws the same images; `model`: the options that name it."""
        words: list[object] = ["python", "-m", "launch", "generate", *model]
        dashed = self.prompt.startswith("-")  # for an option, it would be
        words += [f"--prompt={self.prompt}"] if dashed else ["--prompt", self.prompt]
        words += ["--samples", self.samples, "--seed", self.seed]
        for name, value in vars(self.sampling).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", value]
        words += ["--speculate", self.speculate, *(["--stages"] if stages else [])]
        return shlex.join(map(str, words))


def read_request(given: Mapping[str, object], allowed: Mapping[str, Limit]) -> Request:
    """Of the page's fields, `FIELDS`.

    Raises:
        UserError: what is missing, of the wrong kind or out of range, by its name on the page.
    """
    prompt = given["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("the prompt is empty: say what to draw")
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters: {LONGEST_PROMPT} are allowed")
    if "\0" in prompt:
        raise UserError("the prompt has a zero character in it: leave that out")
    numbers = {
        name: limit.check(given[name])
        for name, limit in allowed.items()
        if not (name in OPTIONAL and given[name] is None)
    }
    speculate = next((one for one in SPECULATE if one == given["speculate"]), None)
    if speculate is None:
        choices = ", ".join(map(str, SPECULATE))
        raise UserError(f"speculation must be one of {choices}, and is {given['speculate']!r:.40}")
    own = {name: numbers[name] for name in OPTIONAL if name in numbers}
    return Request(
        prompt=prompt.strip(),
        samples=int(numbers["samples"]),
        seed=int(numbers["seed"]),
        sampling=SamplingOverrides(**own),
        speculate=speculate,
    )


def model_words(options: ModelOptions) -> list[str]:
    """The command-line options that name a model, and how it is computed."""
    usual = ModelOptions()
    words: list[str] = []
    for prefix, own, plain in (("", options, usual), ("base.", options.base, usual.base)):
        for option in fields(plain):
            value = getattr(own, option.name)
            if isinstance(value, str) and value != getattr(plain, option.name):
                words += [f"--{prefix}{option.name.replace('_', '-')}", value]
    return words

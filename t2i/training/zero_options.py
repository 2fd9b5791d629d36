"""The names that DeepSpeed knows inside "zero_optimization", at every level: it ignores, or crashes
late on, those that it does not.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from t2i.errors import UserError


def check_zero_options(settings: dict, stage: int, path: Path) -> None:
    """UserError names the first key or value in `settings` that DeepSpeed does not know, with the
    likeliest name.
    """
    # The class that DeepSpeed reads this part of its JSON with; the JSON is documented, the class
    # says it for this version.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    _check_names(settings, DeepSpeedZeroConfig, "zero_optimization", path)
    try:
        DeepSpeedZeroConfig(**{**settings, "stage": stage})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["zero_optimization", *map(str, first["loc"])])
        given = f"={first['input']!r}" if first["loc"] else ""
        raise UserError(f"{path}: {place}{given}: {first['msg']}") from error


def _check_names(settings: dict, kind: type, where: str, path: Path) -> None:
    fields = kind.model_fields
    known = {name: field for key, field in fields.items() for name in (key, field.alias) if name}
    for name, value in settings.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}"
            raise UserError(f"{path}: DeepSpeed knows no {where}.{name}; {hint}")
        annotation = known[name].annotation
        parts = (annotation, *get_args(annotation))
        model = next((part for part in parts if hasattr(part, "model_fields")), None)
        if isinstance(value, dict) and model is not None:
            _check_names(value, model, f"{where}.{name}", path)

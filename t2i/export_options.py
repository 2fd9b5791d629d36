"""What to export and how (`t2i.export`). Without torch, so that the program answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from t2i.model_options import BaseOptions


@dataclass(frozen=True)
class ExportOptions:
    """What to export."""

    ckpt: Path
    """Checkpoint folder, or a run folder (its newest checkpoint)."""
    out: Path
    """New folder; adapters are merged into the base in it."""
    base: BaseOptions = field(default_factory=BaseOptions)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the stored weights; adapters are merged in float32."""
    prompt: tuple[str, ...] = ()
    """Prompts to draw for the model card (class ids for a class-conditional model)."""
    samples: int = 2
    """Images per prompt."""
    device: str = "auto"
    """Where to draw them: cpu, cuda, or auto."""
    results: tuple[Path, ...] = ()
    """results.json files of benchmarks, for the model card."""

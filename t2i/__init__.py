"""TensorAR fine-tuning for autoregressive text-to-image models.

    import t2i
    backbone = t2i.load_backbone("llamagen", "c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt")
    model = t2i.attach(backbone, t2i.presets.iclr2026())   # equal to the base model until trained
    config = t2i.recipe("shapes-tuned", {"run_dir": "runs/mine", "steps": 100})
    print(t2i.check(config))                               # what training would do; trains nothing
    folder = t2i.train(config)
    model = t2i.from_pretrained("runs/mine")               # a checkpoint, run or export folder
    model = t2i.load_model("shapes")                       # any of these, or a base model
    images = t2i.generate(model, ["a photo of a red circle"], seed=0, samples_per_prompt=4)
    t2i.grid(images, columns=2).save("sheet.png")

Names are resolved on first use, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers
    from t2i.checkpoint import from_pretrained as from_pretrained
    from t2i.checkpoint import load_model as load_model
    from t2i.checkpoint import save_pretrained as save_pretrained
    from t2i.errors import UserError as UserError
    from t2i.generation import generate as generate
    from t2i.imaging import grid as grid
    from t2i.loading import attach as attach
    from t2i.loading import load_backbone as load_backbone
    from t2i.sampling import SamplingConfig as SamplingConfig
    from t2i.tensorar import presets as presets
    from t2i.training.check import check as check
    from t2i.training.loop import train as train
    from t2i.training.recipes import recipe as recipe

__version__ = "0.1.0"

_HOMES = {
    "load_backbone": "t2i.loading",
    "attach": "t2i.loading",
    "from_pretrained": "t2i.checkpoint",
    "load_model": "t2i.checkpoint",
    "save_pretrained": "t2i.checkpoint",
    "generate": "t2i.generation",
    "grid": "t2i.imaging",
    "recipe": "t2i.training.recipes",
    "check": "t2i.training.check",
    "train": "t2i.training.loop",
    "SamplingConfig": "t2i.sampling",
    "UserError": "t2i.errors",
    "presets": "t2i.tensorar",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(
            f"module 't2i' has no attribute {name!r}; it offers {', '.join(_HOMES)}"
        )
    return (
        import_module("t2i.tensorar.presets")
        if name == "presets"
        else getattr(import_module(_HOMES[name]), name)
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

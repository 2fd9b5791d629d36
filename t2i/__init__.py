"""TensorAR fine-tuning for autoregressive text-to-image models.

    import t2i
    backbone = t2i.load_backbone("llamagen", "c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt")
    model = t2i.attach(backbone, t2i.presets.iclr2026())   # equal to the base model until trained
    model = t2i.from_pretrained("runs/my-checkpoint")      # a checkpoint folder
    images = t2i.generate(model, ["a photo of a red circle"], seed=0, samples_per_prompt=4)

Names are resolved on first use, so that importing the package costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load_backbone": "t2i.loading",
    "attach": "t2i.loading",
    "from_pretrained": "t2i.checkpoint",
    "save_pretrained": "t2i.checkpoint",
    "generate": "t2i.generation",
    "presets": None,
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(
            f"module 't2i' has no attribute {name!r}; it offers {', '.join(_HOMES)}"
        )
    home = _HOMES[name]
    return import_module(f"t2i.{name}") if home is None else getattr(import_module(home), name)

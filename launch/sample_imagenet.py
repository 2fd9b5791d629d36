"""Draw the 50,000 images of an ImageNet evaluation from a class-conditional model, for `launch/fid.py`.

python launch/sample_imagenet.py --ckpt runs/rar-b-256 --out outputs/rar-b.npz
torchrun --nproc_per_node 8 launch/sample_imagenet.py --ckpt runs/llamagen-l-384 --image-size 256 --labels random --out outputs/l384.npz
python launch/sample_imagenet.py --base.family rar --base.weights yucornetto/RAR:rar_b.bin \\
    --base.tokenizer fun-research/TiTok:maskgit-vqgan-imagenet-f16-256.bin --out outputs/rar-b-base.npz

Each family and size is sampled as its authors did for their FID, unless options say otherwise. A run that was killed goes on where it
stopped.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a clone, without installation

from t2i import cli
from t2i.errors import UserError
from t2i.sampling_options import SamplingOverrides


@dataclass(frozen=True)
class BaseModel:
    """A published model, to be sampled as it is instead of a checkpoint."""

    family: Literal["llamagen", "open_magvit2", "rar"] = "llamagen"
    weights: str | None = None
    """Official weight file, backbone folder, or owner/repo:file on the hub."""
    tokenizer: str | None = None
    """Image tokenizer weights (a backbone folder and Open-MAGVIT2's files bring their own)."""


@dataclass(frozen=True)
class SampleConfig:
    """What to draw."""

    out: Path
    """A name ending in .npz, or a folder for PNGs."""
    ckpt: Path | None = None
    """Checkpoint folder, or a run folder (its newest checkpoint)."""
    base: BaseModel = field(default_factory=BaseModel)
    count: int = 50_000
    """Number of images; the protocol has 50,000."""
    labels: Literal["balanced", "random"] = "balanced"
    """As many images of every class, or each image's class at random (LlamaGen's protocol)."""
    image_size: int | None = None
    """Side in pixels that images are resized to (256 for the published FID of 384 px models); the model's own if not given."""
    seed: int = 0
    """An image depends on the seed and its number."""
    batch_size: int = 64
    """Images sampled at once, per process."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto (bfloat16 on a GPU)."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = field(
        default_factory=SamplingOverrides
    )

    def __post_init__(self):
        if (self.ckpt is None) == (self.base.weights is None):
            raise UserError(
                "give either --ckpt (a checkpoint) or --base.weights (a published model)"
            )


def main() -> None:
    config = cli.parse(SampleConfig, __doc__)
    from t2i import attach, from_pretrained, load_backbone, presets
    from t2i.evaluation.class_samples import ClassSamples, draw_class_samples
    from t2i.generation import pick_device
    from t2i.processes import join_processes

    device, dtype = pick_device(config.device, config.dtype)
    processes = join_processes(device)
    placed = {"device": processes.device, "dtype": dtype}
    if config.ckpt is not None:
        model = from_pretrained(config.ckpt, **placed)
    else:
        base = config.base
        backbone = load_backbone(base.family, base.weights, tokenizer=base.tokenizer, **placed)
        model = attach(backbone, presets.base())
    options = ClassSamples(
        count=config.count,
        labels=config.labels,
        seed=config.seed,
        image_size=config.image_size,
        batch_size=config.batch_size,
    )
    sampling = config.sampling.apply(model.sampling)
    out = draw_class_samples(model, config.out, options, sampling=sampling, processes=processes)
    if processes.is_main:
        print(f"wrote {out}\nscore it: python launch/fid.py --samples {out} --reference REFERENCE")


if __name__ == "__main__":
    cli.run(main)

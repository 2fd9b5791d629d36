"""Make a base of your own: an image tokenizer, a vocabulary, and a transformer to pre-train.

For pictures that no published base can draw, or if none can be downloaded. The tokenizer is trained
on these pictures (a few minutes at 32 px), the vocabulary comes from their captions, and all is
written in LlamaGen's layout. `launch/train_llamagen.py` does the rest:

    python examples/new_base.py --pictures emoji/others emoji/mine --words "streamline style" \\
        --out emoji/base
    python launch/train_llamagen.py shapes-control --backbone.weights emoji/base \\
        --data.source emoji/others --run-dir runs/emoji-base
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError
from t2i.files import replacing_folder
from t2i.sampling import check_counts

PIXELS_PER_CODE = 4


@dataclass(frozen=True)
class Options:
    """What to learn from, and the sizes of the base."""

    pictures: tuple[str, ...]
    """Data sets: folders, or whatever --data.source takes."""
    words: tuple[str, ...] = ()
    """Further words for the vocabulary, such as trigger words."""
    out: Path = Path("base")
    """Folder for the base; it must not exist."""
    size: int = 32
    """Side of the pictures in pixels, a multiple of 4 (a code is 4 x 4 pixels)."""
    codes: int = 512
    """Size of the image tokenizer's codebook."""
    tokenizer: Path | None = None
    """Trained image tokenizer of LlamaGen's kind, to use instead of training one."""
    steps: int = 400
    """Training steps of the image tokenizer."""
    batch_size: int = 16
    """Pictures per training step of the image tokenizer."""
    lr: float = 2e-3
    """Highest learning rate of the image tokenizer."""
    dim: int = 128
    """Width of the transformer, a multiple of 32 (the width of a head)."""
    layers: int = 6
    """Layers of the transformer."""
    caption_tokens: int = 16
    """Maximum number of words of a caption."""
    seed: int = 0
    """Seed of the initial weights of the image tokenizer and the transformer."""
    device: str = "auto"
    """Device that the image tokenizer is trained on: auto, cpu or cuda."""

    def __post_init__(self):
        counts = ("size", "codes", "steps", "batch_size", "dim", "layers", "caption_tokens")
        for name in counts:
            check_counts(**{name: getattr(self, name)})
        if self.size % PIXELS_PER_CODE or self.dim % 32:
            raise UserError(
                f"size={self.size} must be a multiple of {PIXELS_PER_CODE}, dim={self.dim} of 32"
            )


def main() -> None:
    options = cli.parse(Options, __doc__)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; delete it or give another --out")
    make_base(options)
    print(f"wrote {options.out}")


def make_base(options: Options) -> Path:
    """Write the base, with an image tokenizer trained on the pictures (or the one given)."""
    import torch
    from transformers import AutoTokenizer, T5EncoderModel

    from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
    from t2i.models.tokenizers.vq import VQTokenizer
    from t2i.shapes.pretraining import write_base
    from t2i.shapes.tiny_t5 import build_tiny_t5

    pixels, of_pictures = read_pictures(options.pictures, options.size)
    captions = [caption for own in of_pictures for caption in own]
    print(f"{len(pixels)} pictures, {len(set(captions))} captions")
    if options.tokenizer is None:
        tokenizer = trained_tokenizer(pixels, options)
    else:
        tokenizer = VQTokenizer.load(options.tokenizer)
    if options.size % tokenizer.downsample:
        raise UserError(
            f"size={options.size} must be a multiple of {tokenizer.downsample}, the tokenizer's "
            "pixels per code"
        )
    side = options.size // tokenizer.downsample
    config = LlamaGenConfig(
        dim=options.dim,
        n_layer=options.layers,
        n_head=options.dim // 32,
        grid=(side, side),
        cond="text",
        vocab_size=tokenizer.codebook_size,
        caption_tokens=options.caption_tokens,
        caption_dim=128,
        token_dropout=0.0,
        resid_dropout=0.0,
        ffn_dropout=0.0,
    )
    backbone = LlamaGen(config)
    backbone.gpt.initialize(torch.Generator().manual_seed(options.seed))
    backbone.frozen.tokenizer = tokenizer
    sampling = {"cfg_scale": 2.0, "top_p": 0.95}
    with replacing_folder(options.out) as folder:
        text = build_tiny_t5(folder / "text_encoder", [*captions, *options.words])
        parts = (T5EncoderModel.from_pretrained(text), AutoTokenizer.from_pretrained(text))
        write_base(backbone, folder, sampling, dtype=torch.float16, text_encoder=parts)
    return options.out


def trained_tokenizer(pixels, options: Options):
    """A VQ tokenizer trained on random batches of the pictures."""
    import torch

    from t2i.loading import pick_device
    from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
    from t2i.shapes.pretraining import train_tokenizer

    device, _ = pick_device(options.device)
    torch.manual_seed(options.seed)
    shape = VQConfig(32, (1, 1, 2), 1, 64, codebook_size=options.codes, codebook_dim=8)
    tokenizer = VQTokenizer(shape).to(device)
    random = torch.Generator().manual_seed(options.seed)
    batches = (
        pixels[torch.randint(len(pixels), (options.batch_size,), generator=random)].to(device)
        for _ in range(options.steps)
    )
    train_tokenizer(tokenizer, batches, steps=options.steps, lr=options.lr)
    return tokenizer.cpu()


def read_pictures(sources: Sequence[str], size: int):
    """All usable pictures as float32 [N, 3, size, size] in [-1, 1], and each one's captions."""
    import torch

    from t2i.data.captioned import CaptionedImages
    from t2i.data.data_report import read_samples
    from t2i.data.images import ImageRules
    from t2i.data.sources.open_source import open_source

    found = []
    for source in map(open_source, map(CaptionedImages, sources)):
        rules = ImageRules(size, small="upscale")
        report, usable = read_samples(source, source, rules, lambda *found: found)
        print(f"{source.name}: {report.describe()}")
        found += usable
    if not found:
        raise UserError(f"no picture of {', '.join(sources)} can be used")
    return torch.cat([views for _, views in found]), [sample.captions for sample, _ in found]


if __name__ == "__main__":
    cli.run(main)

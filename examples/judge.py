"""Judge pictures of things in a style: is it the thing, is it the style, is it a copy?

A small classifier learns the pictures that the model was trained on, captioned "THING, STYLE
style". It then judges real pictures that neither has seen (the upper limit) and drawn ones:

    python examples/judge.py --base emoji/base --pictures emoji/others emoji/mine \\
        --style streamline --real emoji/never --drawn outputs/base outputs/mine --out outputs/judged

All pictures pass through the base's image tokenizer, so that its blur does not tell drawn ones from
real ones. OUT/results.json has all figures. OUT/sheet.png shows what each model drew for a prompt,
and the training picture that is nearest to the last model's.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.new_base import read_pictures
from t2i import cli
from t2i.data.images import center_crop, to_pixels
from t2i.errors import UserError
from t2i.evaluation.generation_folder import load_image
from t2i.files import read_json_lines, write_json
from t2i.imaging import grid, save_png
from t2i.loading import load_backbone
from t2i.models.base import Backbone
from t2i.ownership import owning
from t2i.sampling import check_counts

_BATCH = 32


@dataclass(frozen=True)
class Options:
    """What the judge learns from, and what it judges."""

    base: Path
    """Base whose image tokenizer all pictures pass through."""
    pictures: tuple[str, ...]
    """Data sets that the model was trained on; the judge learns from the same."""
    real: str
    """Data set of real pictures that neither the model nor the judge has seen."""
    drawn: tuple[Path, ...]
    """Output folders of `launch/generate.py`."""
    style: str
    """Style of pictures whose captions name none."""
    out: Path = Path("outputs/judged")
    """Folder for results.json and sheet.png."""
    epochs: int = 30
    """Passes of the judge over the pictures."""
    rows: int = 12
    """Number of prompts on the sheet."""
    seed: int = 0
    """Seed of the judge's weights and of the order in which it sees the pictures."""

    def __post_init__(self):
        check_counts(epochs=self.epochs, rows=self.rows)


@dataclass(frozen=True)
class Pictures:
    """Pictures, each with its thing and its style."""

    pixels: Tensor
    """[N, 3, H, W] in [-1, 1], as the tokenizer reconstructs them."""
    things: list[str]
    styles: list[str]


def main() -> None:
    options = cli.parse(Options, __doc__)
    with owning(options.out, "folder of judgements"):
        judge(options)


def judge(options: Options) -> None:
    """Train the judge; print and write its results."""
    torch.manual_seed(options.seed)
    base = load_backbone("llamagen", options.base, device="cpu", dtype="float32")
    known = read_captioned(options.pictures, base, options.style)
    asked = {"real pictures": read_captioned([options.real], base, options.style)}
    asked |= {str(folder): read_drawn(folder, base, options.style) for folder in options.drawn}
    things, styles = sorted(set(known.things)), sorted(set(known.styles))
    for name, pictures in asked.items():
        if unknown := set(pictures.things) - set(things):
            raise UserError(f"{name}: no picture of {sorted(unknown)[0]!r} to learn from")
    classifier = trained(known, things, styles, options.epochs)
    closest_real = nearest(asked["real pictures"].pixels, known.pixels)[0].min()
    results = {}
    for name, pictures in asked.items():
        verdicts = verdicts_on(classifier, pictures, things, styles)
        distances, _ = nearest(pictures.pixels, known.pixels)
        results[name] = verdicts | {
            "images": len(pictures.things),
            "distance": distances.median().item(),
            "copies": (distances < closest_real).float().mean().item(),
        }
    write_json(options.out / "results.json", results)
    print(table(results))
    sheet = write_sheet(options, known, asked)
    print(f"wrote {sheet}")


# -- pictures --------------------------------------------------------------------------------------
def read_captioned(sources: Sequence[str], base: Backbone, style: str) -> Pictures:
    """All usable pictures of some data sets."""
    pixels, captions = read_pictures(sources, base.image_size[0])
    return _pictures(pixels, [own[0] for own in captions], base, style)


def read_drawn(folder: Path, base: Backbone, style: str) -> Pictures:
    """All images in a folder of `launch/generate.py`, in the order of the prompts."""
    images, captions = [], []
    for prompt in sorted(path for path in folder.glob("*") if path.name.isdigit()):
        files = sorted((prompt / "samples").glob("*.png"))
        images += [load_image(file) for file in files]
        captions += [read_json_lines(prompt / "metadata.jsonl")[0]["prompt"]] * len(files)
    if not images:
        raise UserError(f"{folder} has no images: give a folder of launch/generate.py")
    pixels = [to_pixels(center_crop(image, base.image_size[0])) for image in images]
    return _pictures(torch.stack(pixels), captions, base, style)


@torch.no_grad()
def _pictures(pixels: Tensor, captions: Sequence[str], base: Backbone, style: str) -> Pictures:
    seen = [base.decode_pixels(base.encode_images(some)) for some in pixels.split(64)]
    parts = [thing_and_style(caption, style) for caption in captions]
    things, styles = ([part[i] for part in parts] for i in (0, 1))
    return Pictures(torch.cat(seen).clamp(-1, 1), things, styles)


def thing_and_style(caption: str, style: str) -> tuple[str, str]:
    """Split "THING, STYLE style"; a caption without a comma is a thing in the given style."""
    thing, comma, rest = caption.lower().rpartition(", ")
    return (thing, rest.removesuffix(" style")) if comma else (rest, style)


# -- the judge -------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """Two answers about a picture: which thing, which style."""

    def __init__(self, things: int, styles: int):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.body = nn.Sequential(
            *(
                layer
                for i, (before, after) in enumerate(pairwise(widths))
                for layer in (
                    nn.Conv2d(before, after, 3, stride=1 if i == 0 else 2, padding=1),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
            ),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
        )
        self.thing, self.style = nn.Linear(2048, things), nn.Linear(2048, styles)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels)
        return self.thing(features), self.style(features)


def trained(known: Pictures, things: list[str], styles: list[str], epochs: int) -> Classifier:
    """A classifier trained on the pictures, moved by a few pixels and mirrored at random."""
    model = Classifier(len(things), len(styles)).train()
    thing = torch.tensor([things.index(t) for t in known.things])
    style = torch.tensor([styles.index(s) for s in known.styles])
    if len(thing) < _BATCH:
        raise UserError(f"{len(thing)} pictures to learn from, but at least {_BATCH} are needed")
    steps = epochs * (len(thing) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(thing)).split(_BATCH)[: len(thing) // _BATCH]:
            says_thing, says_style = model(moved(known.pixels[rows]))
            loss = F.cross_entropy(says_thing, thing[rows], label_smoothing=0.1)
            loss = loss + F.cross_entropy(says_style, style[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return model.eval()


def moved(pixels: Tensor, most: int = 2) -> Tensor:
    """Each picture moved by up to `most` pixels (filled with white), and perhaps mirrored."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, [most] * 4, value=1.0)
    starts = torch.randint(0, 2 * most + 1, (len(pixels), 2)).tolist()
    cut = [one[:, y : y + size, x : x + size] for one, (y, x) in zip(padded, starts, strict=True)]
    flip = torch.rand(len(pixels), 1, 1, 1) < 0.5
    return torch.where(flip, torch.stack(cut).flip(-1), torch.stack(cut))


@torch.no_grad()
def verdicts_on(
    model: Classifier, pictures: Pictures, things: list[str], styles: list[str]
) -> dict[str, float]:
    """How often the judge's answers match the captions or, as chance level, those of others."""
    says_thing, says_style = model(pictures.pixels)
    wanted = torch.tensor([things.index(t) for t in pictures.things])
    five = says_thing.topk(min(5, len(things))).indices
    style = torch.tensor([styles.index(s) for s in pictures.styles])
    others = wanted[None, :] != wanted[:, None]  # pairs of a picture and another thing's caption
    hits = (five[:, :1] == wanted[None, :])[others]
    right = (five[:, 0] == wanted).float()
    by_prompt = torch.stack([right[wanted == t].mean() for t in wanted.unique()])
    return {
        "thing": right.mean().item(),
        "thing_error": (by_prompt.std() / len(by_prompt) ** 0.5).item(),
        "thing_in_first_five": (five == wanted[:, None]).any(1).float().mean().item(),
        "thing_with_captions_of_others": hits.float().mean().item(),
        "style": (says_style.argmax(1) == style).float().mean().item(),
    }


def nearest(pixels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square distance (of 255) to the nearest known picture, and its number."""
    distances = torch.cdist(pixels.flatten(1), known.flatten(1)) * 127.5 / pixels[0].numel() ** 0.5
    return distances.min(1)


# -- results ---------------------------------------------------------------------------------------
def table(results: dict[str, dict]) -> str:
    """One line for each set of pictures."""
    lines = [f"{'':24} {'thing':>14} {'first 5':>8} {'shuffled':>9} {'style':>6} {'copies':>7}"]
    for name, r in results.items():
        thing = f"{r['thing']:.2f} ± {r['thing_error']:.2f}"
        lines.append(
            f"{name[-24:]:24} {thing:>14} {r['thing_in_first_five']:8.2f} "
            f"{r['thing_with_captions_of_others']:9.3f} {r['style']:6.2f} {r['copies']:7.2f}"
        )
    return "\n".join(lines)


def write_sheet(options: Options, known: Pictures, asked: dict[str, Pictures]) -> Path:
    """A row per prompt: the real picture, the first one of each model, the nearest known one."""
    real, *drawn = asked.values()
    names = ["real", *(folder.name for folder in options.drawn)]
    empty = torch.ones_like(known.pixels[0])
    cells, labels = [], []
    for thing in list(dict.fromkeys(drawn[0].things if drawn else real.things))[: options.rows]:
        shown = [
            p.pixels[p.things.index(thing)] if thing in p.things else empty for p in asked.values()
        ]
        number = int(nearest(shown[-1][None], known.pixels)[1])
        cells += [_image(one) for one in (*shown, known.pixels[number])]
        labels += [f"{thing}: {name}" for name in names]
        labels.append(f"near: {known.things[number]}, {known.styles[number]}")
    columns = len(asked) + 1
    return save_png(grid(cells, columns, labels=labels), options.out / "sheet.png")


def _image(pixels: Tensor) -> Image.Image:
    image = Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    return image.resize((128, 128), Image.Resampling.NEAREST)


if __name__ == "__main__":
    cli.run(main)

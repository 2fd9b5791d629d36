"""Make folders of captioned pictures from emoji sets of the npm registry: the tutorial's data.

    npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/twemoji \\
        @iconify-json/emojione @iconify-json/fluent-emoji-flat @iconify-json/streamline-emojis
    pip install resvg-py
    python examples/emoji.py --packages . --out emoji

    OUT/others/       80 things (24 with --few) by five vendors, several views of each drawing;
                      captions such as "red apple, noto style"
    OUT/mine/         every second thing by a sixth vendor; plain captions such as "red apple"
    OUT/never/        the other things by that vendor: only for judging, never for training
    OUT/never.txt     prompts for them, such as "pear, streamline style"
    OUT/LICENCES.txt  each vendor's license, as its package states it
"""

import io
import json
import random
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError
from t2i.files import replacing_folder, write_text
from t2i.sampling import check_counts

OTHERS = ("noto", "noto-v1", "twemoji", "emojione", "fluent-emoji-flat")
MINE = "streamline-emojis"
THINGS = (
    *("monkey face", "dog face", "cat face", "lion", "tiger face", "unicorn", "cow face"),
    *("pig face", "elephant", "mouse face", "rabbit face", "bear", "koala", "panda"),
    *("hatching chick", "penguin", "frog", "turtle", "spouting whale", "tropical fish"),
    *("octopus", "snail", "rose", "sunflower", "tulip", "seedling", "palm tree", "cactus"),
    *("four leaf clover", "mushroom", "grapes", "watermelon", "tangerine", "lemon"),
    *("red apple", "pear", "peach", "cherries", "strawberry", "tomato", "bread", "hamburger"),
    *("french fries", "pizza", "soft ice cream", "doughnut", "cookie", "birthday cake"),
    *("hot beverage", "wine glass", "house with garden", "bus", "ambulance", "automobile"),
    *("tractor", "sailboat", "airplane", "rocket", "crescent moon", "sun with face", "cloud"),
    *("rainbow", "umbrella", "snowman", "fire", "droplet", "jack-o-lantern", "Christmas tree"),
    *("balloon", "wrapped gift", "baseball", "basketball", "pool 8 ball", "heart suit"),
    *("t-shirt", "jeans", "crown", "bell", "guitar", "television"),
)
"""Unicode names, which give the names in the packages. Those at even places go to `mine`."""
FEW = (
    *("pear", "red apple", "tangerine", "lemon", "fire", "heart suit", "cherries"),
    *("crescent moon", "cloud", "Christmas tree", "panda", "frog", "mushroom", "grapes"),
    *("four leaf clover", "pig face", "jack-o-lantern", "droplet", "strawberry", "sunflower"),
    *("bell", "jeans", "cactus", "pizza"),
)
"""Things that differ in color and outline, and that all vendors draw alike."""


@dataclass(frozen=True)
class Options:
    """Where the packages are, and which pictures to make."""

    packages: Path = Path()
    """Folder with the packages' .tgz files."""
    out: Path = Path("emoji")
    """Folder for the pictures; it must not exist."""
    size: int = 32
    """Side of the pictures in pixels."""
    few: bool = False
    """Only 24 things, which differ in color and outline, instead of 80."""
    views: int = 2
    """Pictures of each drawing in `others`: as drawn, then moved, scaled and perhaps mirrored."""
    mine_views: int = 1
    """Pictures of each drawing in `mine`."""

    def __post_init__(self):
        check_counts(size=self.size, views=self.views, mine_views=self.mine_views)

    @property
    def things(self) -> tuple[str, ...]:
        return FEW if self.few else THINGS


def main() -> None:
    options = cli.parse(Options, __doc__)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; delete it or give another --out")
    with replacing_folder(options.out) as folder:
        licenses = {vendor: write_vendor(vendor, folder, options) for vendor in (*OTHERS, MINE)}
        write_text(folder / "LICENCES.txt", "".join(f"{v}: {t}\n" for v, t in licenses.items()))
        style = MINE.partition("-")[0]
        write_text(
            folder / "never.txt", "".join(f"{t}, {style} style\n" for t in options.things[1::2])
        )
    print(f"wrote {options.out}")


def write_vendor(vendor: str, folder: Path, options: Options) -> str:
    """Write all pictures of a vendor; return its name, author and license."""
    icons, info = read_package(options.packages, vendor)
    rng = random.Random(vendor)
    for i, thing in enumerate(options.things):
        drawing = find(icons, thing, vendor)
        part, views = "others", options.views
        if vendor == MINE:
            part, views = ("mine", options.mine_views) if i % 2 == 0 else ("never", 1)
        for n in range(views):
            image = view(drawing, options.size, rng if n else None)
            if part == "others":
                name, caption = f"{thing} {vendor} {n}", f"{thing}, {vendor} style"
            else:
                name, caption = f"{thing} {n}" if n else thing, thing
            write_picture(folder / part, name, image, caption)
    return f"{info['name']} by {info['author']['name']}, {info['license']['title']}"


def read_package(folder: Path, vendor: str) -> tuple[dict, dict]:
    """A package's drawings, and its description of itself (author, license, ...)."""
    files = sorted(folder.glob(f"iconify-json-{vendor}-[0-9]*.tgz"))
    if not files:
        raise UserError(f"{folder} has no package of {vendor}: npm pack @iconify-json/{vendor}")
    with tarfile.open(files[-1]) as package:
        names = ("package/icons.json", "package/info.json")
        icons, info = (json.load(package.extractfile(name)) for name in names)  # type: ignore
    return icons, info


def find(icons: dict, thing: str, vendor: str) -> dict:
    """A thing's drawing: the SVG body, and its box (left, top, width, height)."""
    name = thing.lower().replace(" ", "-")
    for spelling in (name, f"{name}-1", f"{name}-face"):
        if spelling in icons.get("aliases", {}):
            spelling = icons["aliases"][spelling]["parent"]
        if spelling in icons["icons"]:
            box = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]}
            return box | icons["icons"][spelling]
    raise UserError(f"{vendor} has no {name}: use another version of its package")


def view(drawing: dict, size: int, rng: random.Random | None = None) -> Image.Image:
    """The drawing on a white square; with `rng`, moved, scaled and perhaps mirrored."""
    from resvg_py import svg_to_bytes

    side = max(drawing["width"], drawing["height"])
    x = drawing["left"] + drawing["width"] / 2
    y = drawing["top"] + drawing["height"] / 2
    if rng is not None:
        x, y = (middle + rng.uniform(-0.04, 0.04) * side for middle in (x, y))
        side *= rng.uniform(0.94, 1.15)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{x - side / 2} {y - side / 2} {side} {side}">{drawing["body"]}</svg>'
    )
    png = svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return ImageOps.mirror(image) if rng is not None and rng.random() < 0.5 else image


def write_picture(folder: Path, name: str, image: Image.Image, caption: str) -> None:
    folder.mkdir(exist_ok=True)
    stem = name.lower().replace(" ", "-")
    image.save(folder / f"{stem}.png")
    (folder / f"{stem}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    cli.run(main)

"""The steps of docs/tutorial.md at tiny size: packages, folders, base, training, drawing, judge."""

import io
import json
import sys
import tarfile
import types

import pytest
from PIL import Image, ImageDraw

from examples import emoji, judge, new_base
from launch import export, generate, train_llamagen
from t2i import cli
from t2i.errors import UserError

THINGS = ("red apple", "bus", "Sun", "pear")
_SIDE = 16


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages in iconify's layout, and a renderer that draws boxes."""
    monkeypatch.setattr(emoji, "THINGS", THINGS)
    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=_draw))
    folder = tmp_path / "packages"
    folder.mkdir()
    for vendor in (*emoji.OTHERS, emoji.MINE):
        bodies = {f"{t.lower().replace(' ', '-')}-1": {"body": t} for t in THINGS[1:]}
        icons = {"width": 32, "height": 20, "icons": {**bodies, "apple": {"body": "red apple"}}}
        icons["aliases"] = {"red-apple": {"parent": "apple"}}
        info = {"name": vendor, "author": {"name": "A. Nobody"}, "license": {"title": "CC0"}}
        with tarfile.open(folder / f"iconify-json-{vendor}-1.2.3.tgz", "w:gz") as package:
            for name, content in (("icons", icons), ("info", info)):
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{name}.json")
                member.size = len(data)
                package.addfile(member, io.BytesIO(data))
    return folder


def _draw(svg_string, width, height, background):
    """The renderer: a PNG of a box in the color of the thing."""
    number = next(i for i, thing in enumerate(THINGS) if f">{thing}<" in svg_string)
    image = Image.new("RGB", (width, height), background)
    ImageDraw.Draw(image).rectangle((3, 3, 10, 8), fill=(60 * number, 255 - 60 * number, 99))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def enter(monkeypatch, capsys):
    """A function that runs a program with these arguments and returns what it printed."""

    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        cli.run(program.main)
        return capsys.readouterr().out

    return run


def test_packages_become_folders_of_captioned_pictures(tmp_path, packages, enter):
    out = tmp_path / "emoji"
    enter(emoji, "--packages", packages, "--out", out, "--size", _SIDE)
    captions = {file.name: file.read_text().strip() for file in (out / "others").glob("*.txt")}
    assert len(captions) == len(THINGS) * len(emoji.OTHERS) * 2
    assert captions["red-apple-noto-v1-1.txt"] == "red apple, noto-v1 style"
    assert sorted(file.name for file in (out / "mine").glob("*.txt")) == [
        "red-apple.txt",
        "sun.txt",
    ]
    assert (out / "mine" / "sun.txt").read_text() == "Sun\n"
    assert sorted(file.stem for file in (out / "never").glob("*.png")) == ["bus", "pear"]
    assert (out / "never.txt").read_text() == "bus, streamline style\npear, streamline style\n"
    assert "noto: noto by A. Nobody, CC0" in (out / "LICENCES.txt").read_text()
    assert Image.open(out / "mine" / "sun.png").size == (_SIDE, _SIDE)


def test_a_few_things_in_several_views(tmp_path, packages, enter, monkeypatch):
    monkeypatch.setattr(emoji, "FEW", ("bus", "pear"))
    out = tmp_path / "few"
    options = ("--few", "--views", 3, "--mine-views", 2, "--size", _SIDE)
    enter(emoji, "--packages", packages, "--out", out, *options)
    assert len(list((out / "others").glob("*.png"))) == 2 * len(emoji.OTHERS) * 3
    assert {file.name: file.read_text() for file in (out / "mine").glob("*.txt")} == {
        "bus.txt": "bus\n",
        "bus-1.txt": "bus\n",
    }
    assert [file.name for file in (out / "never").glob("*.png")] == ["pear.png"]
    assert (out / "never.txt").read_text() == "pear, streamline style\n"


def test_missing_things_and_packages_are_named(tmp_path, packages, monkeypatch):
    icons, _ = emoji.read_package(packages, "noto")
    with pytest.raises(UserError, match="noto has no green-apple"):
        emoji.find(icons, "green apple", "noto")
    with pytest.raises(UserError, match="npm pack @iconify-json/nobody"):
        emoji.read_package(packages, "nobody")


def test_pictures_that_cannot_be_read_are_skipped(tmp_path, capsys):
    """One truncated picture used to end the program in a traceback."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    pixels, captions = new_base.read_pictures([str(tmp_path)], 16)
    assert pixels.shape == (3, 3, 16, 16) and captions == [["a a"], ["a b"], ["a c"]]
    assert "nothing skipped" in capsys.readouterr().out
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "c.txt").write_text("")
    base = types.SimpleNamespace(
        image_size=(16, 16), encode_images=lambda x: x, decode_pixels=lambda x: x
    )
    pixels, captions = new_base.read_pictures([str(tmp_path)], 16)
    judged = judge.read_captioned([str(tmp_path)], base, "streamline style")
    assert captions == [["a a"]] and pixels.shape == judged.pixels.shape == (1, 3, 16, 16)
    assert capsys.readouterr().out.count("1 corrupt (b.png), 1 no caption (c.png)") == 2
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=f"no picture of {tmp_path} can be used"):
        new_base.read_pictures([str(tmp_path)], 16)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, packages, enter, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enter(emoji, "--packages", packages, "--size", _SIDE)
    said = enter(
        new_base,
        *("--pictures", "emoji/others", "emoji/mine", "--words", "streamline style"),
        *("--out", "emoji/base", "--size", _SIDE, "--codes", 16, "--steps", 2, "--batch-size", 4),
        *("--dim", 32, "--layers", 1),
    )
    assert "42 pictures, 22 captions" in said and "wrote emoji/base" in said
    few = ("--steps", 2, "--batch-size", 4, "--engine.micro-batch", 4, "--log.sample-every", 0)
    enter(
        train_llamagen,
        *("shapes-control", "--backbone.weights", "emoji/base", "--data.source", "emoji/others"),
        *("--data.validation-samples", 4, "--ema", 0.5, "--run-dir", "runs/emoji-base", *few),
    )
    enter(
        train_llamagen,
        *("shapes-small-data", "--backbone.weights", "runs/emoji-base", "--run-dir", "runs/mine"),
        *("--data.source", "emoji/mine", "--data.trigger", "{caption}, streamline style"),
        *("--data.validation-samples", 1, "--data.views", "flip", *few),
    )
    asked = ("--prompt-file", "emoji/never.txt", "--samples", 2)
    enter(generate, "--ckpt", "runs/mine", *asked, "--out", "outputs/mine")
    said = enter(
        judge,
        *("--base", "emoji/base", "--pictures", "emoji/others", "emoji/mine", "--epochs", 12),
        *("--style", "streamline", "--real", "emoji/never", "--drawn", "outputs/mine"),
    )
    assert "outputs/mine" in said
    results = json.loads((tmp_path / "outputs" / "judged" / "results.json").read_text())
    assert results["real pictures"]["thing_with_captions_of_others"] <= 0.5
    assert results["outputs/mine"]["images"] == 4
    assert (tmp_path / "outputs" / "judged" / "sheet.png").is_file()
    enter(export, "--ckpt", "runs/mine", "--out", "exported/mine", "--prompt", "bus")
    assert (tmp_path / "exported" / "mine" / "README.md").is_file()


# -- the judge -------------------------------------------------------------------------------------
def test_captions_are_split_into_thing_and_style():
    """A caption without a comma is a thing in the requested style."""
    assert judge.thing_and_style("Sun", "xyz") == ("sun", "xyz")
    assert judge.thing_and_style("a cat, dog, noto style", "xyz") == ("a cat, dog", "noto")


def test_verdicts_are_rates_of_things_and_styles():
    import torch

    said = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 0, 9.0]])  # three pictures, seen as a, a, c
    pictures = judge.Pictures(torch.zeros(3, 3, 4, 4), ["a", "b", "c"], ["x", "x", "y"])
    answers = (said, torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0]]))
    found = judge.verdicts_on(lambda pixels: answers, pictures, ["a", "b", "c"], ["x", "y"])
    assert found["thing"] == pytest.approx(2 / 3) == found["style"]
    assert found["thing_in_first_five"] == 1
    assert found["thing_with_captions_of_others"] == pytest.approx(1 / 6)


def test_nearest_finds_the_closest_training_picture():
    import torch

    known = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    distances, numbers = judge.nearest(torch.stack([known[1] + 0.1, known[2]]), known)
    assert distances.tolist() == pytest.approx([12.75, 0], abs=1e-3) and numbers.tolist() == [1, 2]

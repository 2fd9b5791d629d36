"""Every kind of odd image has a defined result: the right pixels, or a skip with its reason."""

import errno
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import golden_fixture
from PIL import Image, ImageOps

from t2i.data import content, images
from t2i.data.images import (
    FileSlice,
    ImageRules,
    RemoteFile,
    SkipSample,
    center_crop,
    open_image,
    to_pixels,
)
from t2i.errors import UserError

ORIENTATION = 0x0112

case = golden_fixture("VQ tokenizer")


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def reason(image, **options) -> str:
    with pytest.raises(SkipSample) as caught:
        open_image(image, **options)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def test_center_crop_golden(case):
    size, expected = case.config["image_size"], case.expected("wide_center_crop_uint8")
    crop = center_crop(open_image(case.folder / "wide.png"), size)
    difference = torch.from_numpy(np.array(crop)).int() - expected.int()
    assert difference.shape == (size, size, 3)
    assert difference.abs().max() <= 1


def test_pixels_golden(case):
    expected = case.expected("png_tensor")[0]
    pixels = to_pixels(open_image(case.folder / "image.png"))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert to_pixels(Image.new("RGB", (2, 2), "black")).unique().tolist() == [-1]
    assert to_pixels(Image.new("RGB", (2, 2), "white")).unique().tolist() == [1]


def test_center_crop_halves_with_a_box_filter():
    image = noise(64, 64)
    blocks = np.array(image, dtype=float).reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert (
        np.abs(np.array(center_crop(image, 16)) - blocks).max() <= 2
    )  # each of the four passes rounds


def test_center_crop_takes_the_centre():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        inside = np.array(center_crop(turned, 50))[2:-2, 2:-2]
        assert inside.reshape(-1, 3).tolist() == [[0, 0, 255]] * 46**2


def test_unusable_files(tmp_path):
    whole = encode(noise(64, 64), "JPEG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    damaged = bytearray(encode(noise(32, 32)))
    damaged[60:80] = bytes(20)
    assert reason(tmp_path / "nowhere.png") == "missing"
    assert reason(tmp_path) == "missing"
    assert reason(tmp_path / ("x" * 300)) == "unreadable"
    assert reason(None) == "missing"
    assert reason(tmp_path / "empty.png") == "empty"
    assert reason(tmp_path / "cut.jpg") == "corrupt"
    assert reason(tmp_path / "text.png") == "corrupt"
    assert reason(bytes(damaged)) == "corrupt"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "corrupt"


def test_file_slices(tmp_path):
    data = encode(Image.new("RGB", (8, 8), "lime"))
    (tmp_path / "pack").write_bytes(b"head" + data)
    assert open_image(FileSlice(tmp_path / "pack", 4, len(data))).getpixel((0, 0)) == (0, 255, 0)
    assert reason(FileSlice(tmp_path / "pack", 4, len(data) + 1)) == "corrupt"
    assert reason(FileSlice(tmp_path / "gone", 0, 1)) == "missing"


def test_remote_files(tmp_path):
    """The names that the hub's streaming image folders give; file:// stands in for hf://."""
    (tmp_path / "a.png").write_bytes(encode(Image.new("RGB", (8, 8), "lime")))
    assert open_image(RemoteFile(f"file://{tmp_path}/a.png")).getpixel((0, 0)) == (0, 255, 0)
    assert reason(RemoteFile(f"file://{tmp_path}/b.png")) == "missing"


def test_a_hub_that_fails_is_no_unreadable_image(monkeypatch):
    """Every image read while the network is down used to be skipped, for good."""

    def fail(url, mode):
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr("fsspec.open", fail)
    with pytest.raises(UserError, match=r"hf://d/a\.zip cannot be read now \(Network is un"):
        open_image(RemoteFile("zip://1.png::hf://d/a.zip"))
    assert reason(RemoteFile("https://gone.example/1.png")) == "unreadable"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_fault_of_the_machine_is_no_unreadable_file(number, sliced, tmp_path, monkeypatch):
    """A lost network disk, or too many open files, would lose every image read meanwhile."""
    (tmp_path / "a.png").write_bytes(encode(Image.new("RGB", (8, 8), "lime")))
    where = FileSlice(tmp_path / "a.png", 0, 9) if sliced else tmp_path / "a.png"

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("t2i.data.images.open", fail, raising=False)
    monkeypatch.setattr("t2i.data.content.file_sha256", fail)
    for read in (lambda: open_image(where), lambda: content._hash(tmp_path / "a.png")):
        with pytest.raises(UserError, match=r"a\.png cannot be read now \(.*\)\. Start again"):
            read()
    number = errno.EACCES
    assert reason(where) == "unreadable"


def test_cmyk_is_converted():
    opened = open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = opened.getpixel((4, 4))
    assert opened.mode == "RGB"
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("kind", ["I;16 png", "I tiff", "I;16B tiff"])
def test_16_bit_is_scaled(kind):
    mode, container = kind.split()
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image = Image.fromarray(values)
    if mode == "I":
        image = Image.fromarray(values.astype(np.int32))
    elif mode == "I;16B":
        image = Image.frombytes(mode, (8, 8), values.astype(">u2").tobytes())
    opened = np.array(open_image(encode(image, container)))
    assert (opened == np.rint(values / 257)[..., None]).all()


def tagged(image, **tags):
    """A TIFF in which tags that hold one short number have other values."""
    numbers, data = {"bits": 258, "photometric": 262, "format": 339}, encode(image, "TIFF")
    for name, value in tags.items():
        entry = struct.pack("<HHI", numbers[name], 3, 1)
        at = data.index(entry) + len(entry)
        data = data[:at] + struct.pack("<H", value) + data[at + 2 :]
    return data


def test_tiff_tags_that_say_what_the_numbers_mean():
    """Negatives used to be read as positives, and the upper half of unsigned numbers as black."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    grey = np.rint(ramp * 255).astype(np.uint8)[..., None]
    sixteen = Image.fromarray((ramp * 65535).astype(np.uint16))
    floats = Image.fromarray(ramp.astype(np.float32))
    unsigned = Image.fromarray((ramp * (2**32 - 1)).astype(np.uint32).view(np.int32))
    for data, expected in (
        (tagged(sixteen, photometric=0), 255 - grey),
        (tagged(floats, photometric=0), 255 - grey),
        (tagged(unsigned, format=1), grey),
        (tagged(Image.new("I;16", (8, 8), 65535), bits=12), 255),
    ):
        assert np.abs(np.array(open_image(data)).astype(int) - expected).max() <= 1


def test_a_transparent_value_of_16_bits():
    """The image used to be clipped to white."""
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image = Image.fromarray(values)
    opened = np.array(open_image(encode(image, "PNG", transparency=int(values[0, 1]))))
    expected = np.rint(values / 257)
    expected[0, 1] = 255
    assert (opened == expected[..., None]).all()


@pytest.mark.parametrize(
    ("bits", "row", "transparent", "shown"),
    [
        (2, b"\x4b", 1, [255, 0, 170, 255]),
        (4, b"\x5f\x05", 5, [255, 255, 0, 255]),
        (1, b"\x50", 0, [255, 255, 255, 255]),
    ],
)
def test_a_transparent_value_of_few_bits(bits, row, transparent, shown):
    """Optimizers write line drawings in this way: transparent pixels used to become grey."""
    data = grey_png(bits, row, len(shown), transparent)
    assert np.array(open_image(data))[0, :, 0].tolist() == shown


def grey_png(bits: int, row: bytes, width: int, transparent: int) -> bytes:
    """A PNG of one row; Pillow cannot write fewer than 8 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", struct.pack(">H", transparent))
    parts += (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_grey_levels_of_unknown_white_are_skipped():
    eight_bit = Image.fromarray(np.full((4, 4), 200, np.int32))
    thirty_two_bit = Image.fromarray(np.full((4, 4), 2**30, np.int32))
    unit_float = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert open_image(encode(eight_bit, "TIFF")).getpixel((0, 0)) == (200, 200, 200)
    assert open_image(encode(thirty_two_bit, "TIFF")).getpixel((0, 0)) == (128, 128, 128)
    assert open_image(encode(unit_float, "TIFF")).getpixel((0, 0)) == (128, 128, 128)
    assert reason(Image.fromarray(np.full((4, 4), np.nan, np.float32))) == "corrupt"


def test_transparency_is_composited_over_white():
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 128), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 4, 8))
    grey = Image.new("LA", (8, 8), (0, 0))
    grey.paste((0, 255), (0, 0, 4, 8))
    for image, left in ((rgba, (127, 127, 255)), (palette, (0, 0, 255)), (grey, (0, 0, 0))):
        options = {"transparency": 0} if image is palette else {}
        opened = open_image(encode(image, **options))
        assert opened.getpixel((1, 1)) == left, image.mode
        assert opened.getpixel((6, 6)) == (255, 255, 255), image.mode
    assert open_image(Image.new("La", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_grey_bilevel_and_opaque_palette():
    assert open_image(encode(Image.new("L", (8, 8), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(encode(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (8, 8), (9, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert open_image(encode(palette)).getpixel((0, 0)) == (9, 200, 30)


def orient(orientation: int, kind: str = "PNG", **options) -> bytes:
    """Four grey levels, one per quarter, stored with an EXIF orientation."""
    image = Image.fromarray(np.kron([[0, 80], [160, 240]], np.ones((8, 16))).astype(np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x0110] = "a camera"
    return encode(image, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = orient(orientation, kind, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((16, 32) if orientation >= 5 else (32, 16))
    assert np.array_equal(open_image(data), expected)


def test_a_damaged_exif_tag_does_not_cost_the_image():
    data = bytearray(orient(6, "JPEG"))
    model = data.index(b"\x01\x10\x00\x02", data.index(b"Exif"))
    data[model + 1] = 1  # the tag of the camera's name becomes that of the image height
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert open_image(bytes(data)).size == (16, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("blue", "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((0, 0)) == (0, 0, 255)


def test_too_large_is_skipped_before_decoding(monkeypatch):
    data = encode(Image.new("L", (2000, 1000)))
    monkeypatch.setattr(images, "_MOST_MEGAPIXELS", 2)
    assert open_image(data).size == (2000, 1000)
    monkeypatch.setattr(images, "_MOST_MEGAPIXELS", 1.9)
    assert reason(data) == "too large"
    monkeypatch.setattr(images, "_MOST_MEGAPIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # beyond Pillow's own limit
    assert reason(data) == "too large"


def test_small_images_follow_the_policy():
    data = encode(Image.new("RGB", (40, 20), "red"))
    with pytest.raises(SkipSample, match="too small: 40 x 20 px, needs 32"):
        ImageRules(32).load(data)
    (pixels,) = ImageRules(32, small="upscale").load(data)
    assert pixels.shape == (3, 32, 32)
    assert pixels.mean((1, 2)).tolist() == [1, -1, -1]
    assert ImageRules(20).load(data).shape == (1, 3, 20, 20)


def test_a_thin_strip_is_not_blown_up():
    strip = encode(Image.new("L", (20000, 2)))
    with pytest.raises(SkipSample, match="too large"):
        ImageRules(256, small="upscale").load(strip)

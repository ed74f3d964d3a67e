"""An image is read the right way up, opaque, with 8 bits and whole, or it is refused by name; all others are read as ever."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from model.data import METADATA, decode, scan
from model.data_report import report_on
from model.errors import DataError
from model.pictures import BRIGHTEST, DAMAGED, open_picture
from tests.test_data import append, save

SIZE = 16


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes, channels: int = 1, white: int | None = None) -> np.ndarray:
    return np.asarray(open_picture(io.BytesIO(data), channels, white))


def why_not(data: bytes, channels: int = 1, white: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_picture(io.BytesIO(data), channels, white)
    return str(caught.value)


def photograph(side: int = 256) -> Image.Image:
    """Make a colour picture with structure at all scales, so that its JPEG has many different codes."""
    rng = np.random.default_rng(0)
    layers = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((side, side)) for n in (4, 16, 64, side)]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


def corner(size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Make a black picture with a white upper left quarter, whose orientation can be seen."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = 255
    return Image.fromarray(pixels)


# Orientation → the corner (row, column) at which an upright viewer sees the stored upper left one.
SEEN = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", list(SEEN))
def test_image_is_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(corner((SIZE, 2 * SIZE)).convert("RGB"), kind, exif=exif)
    picture = open_picture(io.BytesIO(data), 1)
    turned = orientation >= 5
    assert picture.size == ((2 * SIZE, SIZE) if turned else (SIZE, 2 * SIZE))
    pixels = np.asarray(picture)
    bright = {(row, column) for row in (0, -1) for column in (0, -1) if pixels[row, column] > 128}
    assert bright == {SEEN[orientation]}
    (tmp_path / "image").write_bytes(data)
    assert decode(tmp_path / "image", SIZE, 1).shape == (1, SIZE, SIZE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no exif at all"]
)
def test_exif_that_cannot_be_read_turns_nothing(exif: bytes) -> None:
    data = encoded(corner(), "JPEG", exif=exif, quality=100)
    assert read(data)[0, 0] > 200


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[274] = value
    assert np.array_equal(read(encoded(corner(), exif=exif)), np.asarray(corner()))


def transparent(mode: str) -> Image.Image:
    """Make a black picture whose left half cannot be seen; what lies below it there is a colour that nobody drew."""
    pixels = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    pixels[:, :8] = (90, 10, 200, 0)
    pixels[:, 8:] = (0, 0, 0, 255)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "P":
        image = Image.fromarray(np.repeat(np.array([[0] * 8 + [1] * 8], dtype=np.uint8), SIZE, axis=0), "P")
        image.putpalette([90, 10, 200, 0, 0, 0])
        image.info["transparency"] = 0
        return image
    if mode in ("1", "L", "RGB"):
        image = Image.fromarray(np.repeat(np.array([[255] * 8 + [0] * 8], dtype=np.uint8), SIZE, axis=0)).convert(mode)
    return image if image.mode == mode else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_what_is_transparent_is_white(mode: str, channels: int, kind: str) -> None:
    if kind != "PNG" and mode == "P":
        pytest.skip("the format has no palette with transparency")
    pixels = read(encoded(transparent(mode), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})), channels)
    assert (pixels[:, :8] == 255).all()
    assert (pixels[:, 8:] == 0).all()


def test_half_transparent_is_half_white() -> None:
    pixels = np.full((SIZE, SIZE, 4), (0, 0, 0, 128), dtype=np.uint8)
    assert set(read(encoded(Image.fromarray(pixels)), 3).flatten()) == {127}


@pytest.mark.parametrize(("mode", "clear"), [("L", 255), ("RGB", (255, 255, 255)), ("L", 0), ("RGB", (0, 0, 0))])
def test_transparent_colour_is_white(mode: str, clear: Any) -> None:
    """Show the colour that a PNG without an alpha channel calls transparent as white, too."""
    pixels = read(encoded(transparent(mode), transparency=clear))
    assert (pixels[:, :8] == 255).all()
    assert (pixels[:, 8:] == (0 if clear in (255, (255, 255, 255)) else 255)).all()


def test_gif_with_transparency_is_white() -> None:
    assert (read(encoded(transparent("P"), "GIF", transparency=0))[:, :8] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_image_keeps_its_pixels(mode: str, kind: str, channels: int) -> None:
    """Read what was always read rightly as ever: as Pillow converts it, also where an alpha channel hides nothing."""
    try:
        data = encoded(photograph(32).convert(mode), kind)
    except (OSError, ValueError):
        pytest.skip("the format does not hold this mode")
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(read(data, channels), np.asarray(image.convert("L" if channels == 1 else "RGB")))


def ramp(bits: int = 16) -> np.ndarray:
    """Return all values of so many bits, evenly spread, as a picture."""
    return (np.arange(SIZE * SIZE, dtype=np.uint32) * ((1 << bits) // 256)).astype(np.uint16).reshape(SIZE, SIZE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_by_one_rule(kind: str, channels: int) -> None:
    data = encoded(Image.fromarray(ramp()), kind)
    expected = (ramp() >> 8).astype(np.uint8)
    pixels = read(data, channels)
    assert np.array_equal(pixels if channels == 1 else pixels[..., 0], expected)
    dark = np.full((SIZE, SIZE), 0x1234, dtype=np.uint16)
    assert (read(encoded(Image.fromarray(dark), kind)) == 0x12).all()  # another image's values change nothing


def test_16_bits_in_the_other_byte_order() -> None:
    file = io.BytesIO()
    Image.frombytes("I;16B", (SIZE, SIZE), ramp().astype(">u2").tobytes()).save(file, "TIFF")
    assert np.array_equal(read(file.getvalue()), (ramp() >> 8).astype(np.uint8))


def test_8_bits_that_were_widened_come_back() -> None:
    eight = np.arange(256, dtype=np.uint16).reshape(SIZE, SIZE)
    for widened in (eight << 8, eight * 257):
        assert np.array_equal(read(encoded(Image.fromarray(widened))), eight.astype(np.uint8))


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
def test_white_says_how_many_bits_a_camera_writes(tmp_path: Path, bits: int) -> None:
    data, white = encoded(Image.fromarray(ramp(bits))), (1 << bits) - 1
    assert np.array_equal(read(data, white=white), (ramp(bits) >> (bits - 8)).astype(np.uint8))
    save(tmp_path, "a.png", data)
    append(tmp_path, {"file_name": "a.png", "text": "bar", "white": white})
    seen = scan(tmp_path, 24)
    assert (seen.names, seen.deep) == (["a.png"], (0, 0))
    assert seen.features[0, 0] == pytest.approx(0.5, abs=0.01)  # its brightness: the ramp's middle


def test_value_above_white_is_refused() -> None:
    assert (
        why_not(encoded(Image.fromarray(ramp())), white=4095)
        == "has the value 65280, but white is 4095; correct white in metadata.jsonl"
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_white_of_an_image_with_8_bits_is_refused(mode: str) -> None:
    assert "has a white in metadata.jsonl, which only" in why_not(encoded(photograph(32).convert(mode)), white=4095)


def test_tiff_that_counts_from_white_is_turned_round() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    data = encoded(Image.fromarray(ramp()), "TIFF", tiffinfo=tags)
    with Image.open(io.BytesIO(data)) as image:
        assert image.tag_v2[262] == 0
    assert np.array_equal(read(data), 255 - (ramp() >> 8).astype(np.uint8))


def test_12_bits_that_look_black_are_told(tmp_path: Path) -> None:
    """Say which `white` would do: 12 bits read as 16 are one sixteenth as bright, and nobody would know."""
    for i in range(3):
        save(tmp_path, f"{i}.png", encoded(Image.fromarray(ramp(12))))
        append(tmp_path, {"file_name": f"{i}.png", "text": "bar"})
    assert '"white": 4095' in report_on(scan(tmp_path, 24), None, None, "shapes").dark
    save(tmp_path, "bright.png", encoded(Image.fromarray(ramp())))
    append(tmp_path, {"file_name": "bright.png", "text": "bar"})
    assert report_on(scan(tmp_path, 24), None, None, "shapes").dark == ""


def test_picture_tells_no_more_than_its_pixels() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert open_picture(io.BytesIO(encoded(corner(), exif=exif)), 1).info == {}
    assert open_picture(io.BytesIO(encoded(Image.fromarray(ramp()))), 1).info == {BRIGHTEST: 65280}


REFUSED = {
    "floating point": (lambda: encoded(Image.fromarray(ramp().astype(np.float32)), "TIFF"), "has floating-point pixels; store it with 8"),
    "32 bits": (lambda: encoded(Image.fromarray(ramp().astype(np.int32)), "TIFF"), "has 32 bits a channel or signed values; store it"),
    "Lab": (lambda: encoded(Image.new("LAB", (SIZE, SIZE)), "TIFF"), "has colours of the kind LAB; store it as grey or RGB"),
    "animated GIF": (lambda: frames("GIF"), "holds 3 images; store each in a file of its own"),
    "animated PNG": (lambda: frames("PNG"), "holds 3 images; store each in a file of its own"),
    "animated WebP": (lambda: frames("WEBP"), "holds 3 images; store each in a file of its own"),
    "pages of a TIFF": (lambda: frames("TIFF"), "holds 3 images; store each in a file of its own"),
    "empty": (lambda: b"", "cannot be decoded"),
    "text": (lambda: b"GIF89a is not enough", "cannot be decoded"),
}  # fmt: skip


def frames(kind: str) -> bytes:
    three = [photograph(32).rotate(90 * i) for i in range(3)]
    return encoded(three[0], kind, save_all=True, append_images=three[1:])


@pytest.mark.parametrize("what", list(REFUSED))
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_not_one_image_of_16_bits_is_refused(what: str, channels: int) -> None:
    make, says = REFUSED[what]
    assert why_not(make(), channels).startswith(says)


def test_smaller_version_in_a_tiff_is_no_second_image() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    small = photograph(8)
    small.encoderinfo = {"tiffinfo": tags}
    data = encoded(photograph(32), "TIFF", save_all=True, append_images=[small])
    assert np.array_equal(read(data, 3), np.asarray(photograph(32)))


def test_preview_behind_a_jpeg_is_no_second_image() -> None:
    """Read what telephones write: a JPEG with more pictures of the same scene behind it."""
    data = encoded(photograph(32), "MPO", save_all=True, append_images=[photograph(32).rotate(90)], quality=100)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
        first = np.asarray(image.convert("RGB"))
    assert np.array_equal(read(data, 3), first)


JPEGS = {
    "plain": {"quality": 90},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True, "subsampling": 0},
    "restart": {"restart_marker_rows": 1},
}


def damaged(data: bytes, how: str) -> bytes:
    middle, n = len(data) // 2, len(data) // 10
    rng = np.random.default_rng(1)
    return {
        "zeros": lambda: data[:middle] + bytes(n) + data[middle + n :],
        "noise": lambda: data[:middle] + rng.bytes(n).replace(b"\xff", b"\x7f") + data[middle + n :],
        "a part is missing": lambda: data[:middle] + data[middle + n :],
        "cut off": lambda: data[:middle],
        "cut off, and ended": lambda: data[:middle] + data[-2:],
        "end is missing": lambda: data[:-2],
        "a part twice": lambda: data[: middle + n] + data[middle:],
    }[how]()


@pytest.mark.parametrize(
    "how", ["zeros", "noise", "a part is missing", "cut off", "cut off, and ended", "end is missing", "a part twice"]
)
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("kind", [*JPEGS, "grey", "CMYK", "PNG", "grey PNG", "palette PNG", "TIFF"])
def test_damaged_image_is_refused(tmp_path: Path, kind: str, how: str) -> None:
    image = photograph()
    if kind in JPEGS:
        data = encoded(image, "JPEG", **JPEGS[kind])
    elif kind == "TIFF":
        data = encoded(image, "TIFF", compression="tiff_deflate")
    elif "PNG" in kind:
        data = encoded({"PNG": image, "grey PNG": image.convert("L"), "palette PNG": image.quantize(32)}[kind])
    else:
        data = encoded(image.convert("L" if kind == "grey" else kind), "JPEG")
    assert read(data).shape == (256, 256)
    assert why_not(damaged(data, how)) in (DAMAGED, "cannot be decoded")
    save(tmp_path, "a.jpg", data)
    save(tmp_path, "b.jpg", damaged(data, how))
    append(tmp_path, *({"file_name": name, "text": "bar"} for name in ("a.jpg", "b.jpg")))
    seen = scan(tmp_path, 24)
    assert (seen.names, list(seen.quarantine)) == (["a.jpg"], ["b.jpg"])


def test_one_changed_bit_of_a_png_is_refused() -> None:
    """Check the checksum of each part of a PNG: Pillow reads some changed bits of stored parts without a word."""
    row = b"\0" + bytes(range(0, 256, 16))
    whole = zlib.compress(row * SIZE, level=0)  # stored as it is

    def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content) if crc is None else crc)
        )

    def png(content: bytes, crc: int | None = None) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", content, crc) + chunk(b"IEND", b"")

    assert read(png(whole)).tolist() == [list(range(0, 256, 16))] * SIZE
    bit = bytearray(whole)
    bit[40] ^= 0x80
    assert why_not(png(bytes(bit), zlib.crc32(b"IDAT" + whole))) in (DAMAGED, "cannot be decoded")
    assert why_not(png(whole, 0)) == DAMAGED


@pytest.mark.parametrize("extra", [b"\0", b"\0\0\0\0", b"\xff\xff"])
def test_padding_of_a_camera_is_no_damage(extra: bytes) -> None:
    """Accept a few bytes before the last marker, as some cameras write them; the picture is whole."""
    data = encoded(photograph(), "JPEG")
    assert np.array_equal(read(data[:-2] + extra + data[-2:], 3), read(data, 3))
    assert np.array_equal(read(data + b"whatever follows", 3), read(data, 3))


def test_damage_of_any_kind_is_a_sentence() -> None:
    """Turn whatever Pillow raises for damaged headers into a reason; no traceback ends a scan of 50,000 images."""
    rng = np.random.default_rng(3)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = "a part"
    for kind, options in (
        ("TIFF", {"tiffinfo": tags}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("PNG", {}),
        ("JPEG", {}),
        ("TGA", {}),
        ("ICO", {}),
    ):
        data = encoded(photograph(32), kind, **options)
        for _ in range(60):
            bad = bytearray(data)
            for at in rng.integers(0, min(len(bad), 200), 6):
                bad[at] = rng.integers(256)
            with contextlib.suppress(DataError):
                assert open_picture(io.BytesIO(bytes(bad)), 1).mode == "L"


def test_status_of_a_folder_names_them(tmp_path: Path) -> None:
    save(tmp_path, "good.png", encoded(photograph(32)))
    for name, (make, _) in REFUSED.items():
        save(tmp_path, f"{name}.img", make())
    append(tmp_path, {"file_name": "good.png", "text": "bar"}, *({"file_name": f"{name}.img", "text": "bar"} for name in REFUSED))
    seen = scan(tmp_path, 24)
    assert seen.names == ["good.png"]
    assert {name: seen.quarantine[f"{name}.img"].startswith(says) for name, (_, says) in REFUSED.items()} == dict.fromkeys(
        REFUSED, True
    )
    assert METADATA not in seen.quarantine

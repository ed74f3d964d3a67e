"""Read one image file as the network sees it: the right way up, opaque, with 8 bits a channel, and whole. Needs no torch.

Files that cannot be read by these fixed rules are refused with the reason; no rule looks at what an image shows. The rules
are in docs/images.md, the reasons for them in decisions 0095 to 0097.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from model.errors import DataError

READING = 2
"""Number of these rules. It is part of what caches and reports are kept under, so a change here reads every image again."""
MAX_PIXELS = 64_000_000  # pixels of one source image; a larger one is treated as a decompression bomb
GROUND = (255, 255, 255)  # colour behind transparent pixels
DEEPEST = 65_535  # value of white in a file that does not say how many of its 16 bits are used
BRIGHTEST = "brightest value of 16 bits"  # key in the info of a picture that was read from more than 8 bits
ONE_PICTURE = frozenset({"MPO", "PSD"})  # further frames of these are previews or layers of the one picture
PADDING = 8  # bytes; some cameras pad the data of a JPEG before its last marker
DAMAGED = "is damaged or cut off; replace it by a whole copy"

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""How each EXIF orientation is undone."""
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SUBFILE = 258, 259, 262, 254  # tags of TIFF
PARTS = ((273, 279), (324, 325))  # tags of TIFF: where strips or tiles begin, and how long they are
DEFLATE = (8, 32_946)


def open_picture(source: Path | BinaryIO, channels: int, white: int | None = None) -> Image.Image:
    """Decode the whole image in a file, as grey for 1 channel and as RGB for 3.

    Args:
        source: the file.
        channels: 1 or 3.
        white: value of white in a grey image with more than 8 bits; None: the largest that the file allows.

    Returns:
        the picture; its `info` holds `BRIGHTEST` alone, and only if it was read from more than 8 bits.

    Raises:
        DataError: the file is missing, damaged, larger than `MAX_PIXELS`, or holds something that is not one image of at
            most 16 bits a channel.
    """
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"has more than {MAX_PIXELS:,} pixels")
            _check_single(image)
            image.load()
            _check_whole(image, source)
            mode = "L" if channels == 1 else "RGB"
            picture = _shallow(image, white).convert(mode) if image.mode.startswith("I") else _opaque(image, white, mode)
            turned = UPRIGHT.get(_orientation(image))
            upright = picture.transpose(turned) if turned is not None else picture
            upright.info = {name: value for name, value in picture.info.items() if name == BRIGHTEST}
            return upright
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError("is missing") from error
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError("cannot be decoded") from error
    except Exception as error:  # damage makes Pillow's decoders raise almost anything
        raise DataError("cannot be decoded") from error


def _check_single(image: Image.Image) -> None:
    """Refuse a file with several images; reading the first of them would lose the others.

    Raises:
        DataError: it holds several.
    """
    frames = 1 if image.format in ONE_PICTURE else int(getattr(image, "n_frames", 1))
    if frames > 1 and image.format == "TIFF":  # smaller versions of the image lie in frames of their own
        shown = 0
        for frame in range(frames):
            image.seek(frame)
            shown += not int(getattr(image, "tag_v2", {}).get(SUBFILE, 0)) & 1
        image.seek(0)
        frames = shown
    if frames > 1:
        raise DataError(f"holds {frames} images; store each in a file of its own")


def _check_whole(image: Image.Image, source: Path | BinaryIO) -> None:
    """Refuse a file with damage that Pillow decodes without a word.

    Args:
        image: the file as Pillow opened and decoded it.
        source: the file.

    Raises:
        DataError: it is damaged.
    """
    kind, tags = image.format, getattr(image, "tag_v2", {})
    deflated = kind == "TIFF" and tags.get(COMPRESSION) in DEFLATE
    if kind not in ("JPEG", "MPO", "PNG") and not deflated:
        return
    if isinstance(source, Path):
        data = source.read_bytes()
    else:
        source.seek(0)
        data = source.read()
    if deflated:
        parts = (zip(tags.get(at, ()), tags.get(sizes, ()), strict=False) for at, sizes in PARTS)
        whole = all(_is_whole_stream(data[at : at + size]) for rows in parts for at, size in rows)
    else:
        whole = _is_whole_png(data) if kind == "PNG" else _is_whole_jpeg(data)
    if not whole:
        raise DataError(DAMAGED)


def _is_whole_stream(data: bytes) -> bool:
    """Check the checksum of a deflated part of a TIFF; libtiff stops reading before it."""
    stream = zlib.decompressobj()
    try:
        while data and not stream.eof:
            stream.decompress(data, 1 << 20)
            data = stream.unconsumed_tail
    except zlib.error:
        return False
    return True


def _is_whole_png(data: bytes) -> bool:
    """Check the checksums of a PNG's image data, and that its last chunk is there."""
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if name == b"IEND":
            return True
        if name == b"IDAT" and zlib.crc32(view[at + 4 : at + 8 + size]) != int.from_bytes(
            data[at + 8 + size : at + 12 + size], "big"
        ):
            return False
        at += 12 + size
    return False


def _is_whole_jpeg(data: bytes) -> bool:
    """Check whether libjpeg decodes a JPEG without calling its data corrupt; Pillow does not hand on what it says.

    A JPEG has no checksum, so some damage cannot be told from an image.
    """
    import simplejpeg

    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        space = "CMYK" if colours in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, space, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        said = str(error)
        padding = re.search(r"(\d+) extraneous bytes before marker 0xd9", said)
        return not said.startswith(("Corrupt JPEG data", "Premature end")) or (padding is not None and int(padding[1]) <= PADDING)
    return True


def _shallow(image: Image.Image, white: int | None) -> Image.Image:
    """Convert a grey image with more than 8 bits to 8, by one rule for all images: 256 · value / (white + 1), rounded down.

    Raises:
        DataError: it has more than 16 bits or signed values, or a value above white.
    """
    kind = image.format or ""
    if image.mode == "I" and kind != "PPM":  # Pillow scales a PPM's values to 16 bits
        raise DataError("has 32 bits a channel or signed values; store it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {}) if kind == "TIFF" else {}
    most = (1 << int(tags.get(BITS_PER_SAMPLE, (16,))[0])) - 1
    limit = most if white is None else white
    values: npt.NDArray[np.uint32] = np.asarray(image).astype(np.uint32)
    brightest = int(values.max())
    if brightest > limit:
        raise DataError(f"has the value {brightest}, but white is {limit}; correct white in metadata.jsonl")
    clear = image.info.get("transparency")
    hidden = values == clear if isinstance(clear, int) else None
    scaled = (values * 256 // (limit + 1)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # the file counts from white to black
        scaled = 255 - scaled
    if hidden is not None:
        scaled[hidden] = 255
    picture = Image.fromarray(scaled)
    picture.info = {} if white is not None or most != DEEPEST else {BRIGHTEST: brightest}
    return picture


def _opaque(image: Image.Image, white: int | None, mode: str) -> Image.Image:
    """Convert an image with at most 8 bits a channel; what is transparent is laid on white.

    Raises:
        DataError: its pixels are floating-point numbers, its colours cannot be converted, or `white` is given.
    """
    if image.mode == "F":
        raise DataError("has floating-point pixels; store it with 8 or 16 bits")
    if white is not None:
        raise DataError("has a white in metadata.jsonl, which only grey images with more than 8 bits can have; take it away")
    if image.mode in ("LAB", "HSV"):
        raise DataError(f"has colours of the kind {image.mode}; store it as grey or RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow reads the pixels with 8 bits, but not this colour
        raise DataError("names a transparent colour with 16 bits; store it without transparency, or with 8 bits")
    if not image.has_transparency_data:
        return image.convert(mode)
    seen = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if seen.getchannel("A").getextrema() == (255, 255):
        return image.convert(mode)
    ground = Image.new("RGBA", seen.size, GROUND)
    ground.alpha_composite(seen)
    return ground.convert("RGB").convert(mode)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image; 1: upright, or it says nothing that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF data make Pillow raise almost anything; the pixels are not affected
        return 1
    return value if isinstance(value, int) else 1

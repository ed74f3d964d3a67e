"""From a folder to batches: nothing is dropped silently, nothing leaks across the held-out split, nothing is read twice."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data import METADATA, Dataset, caption_ids, decode, is_held_out, prepare, read_metadata, scan, to_bytes, to_unit
from model.errors import DataError

from .conftest import CONFIG, write_images


def png(value: int = 120) -> bytes:
    """Return a small picture of noise; noise does not compress, so a truncated file lacks part of the picture."""
    pixels = np.random.default_rng(value).integers(0, 256, (16, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def floating() -> bytes:
    """Return a picture of floating-point numbers."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.float32).reshape(16, 16)).save(buffer, "TIFF")
    return buffer.getvalue()


def huge_png(side: int = 9000) -> bytes:
    """Return a file of a few bytes that promises 81 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def append(folder: Path, *lines: object) -> None:
    """Add lines to the metadata: bytes as they are, anything else as JSON."""
    with (folder / METADATA).open("ab") as file:
        file.writelines((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def groups_of(held_out: bool, count: int) -> list[str]:
    """Return names that fall on one side of the split."""
    return [name for name in (f"g{i}" for i in range(1000)) if is_held_out(name) == held_out][:count]


def save(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """Copy the 80 images, so that a test may write into the folder."""
    return Path(shutil.copytree(images, tmp_path / "shapes"))


def assert_scanned_alike(folder: Path, dataset: Dataset) -> None:
    """Check that the images recorded as usable are those that training uses."""
    seen = scan(folder, CONFIG.text_length)
    assert seen.quarantine == dataset.quarantine
    assert (seen.captions, seen.groups) == (dataset.captions, dataset.groups)
    assert np.array_equal(seen.held_out, dataset.held_out)


BAD_FILES = {
    "no image": (b"not an image", "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "truncated": (png()[:-90], "cannot be decoded"),
    "header only": (png()[:60], "cannot be decoded"),
    "promises too much": (huge_png(), "has more than 64,000,000 pixels"),
    "floating point": (floating(), "has floating-point pixels; store it with 8 or 16 bits"),
    "missing": (None, "is missing"),
}


@pytest.mark.parametrize("what", list(BAD_FILES))
def test_unusable_file_is_named(folder: Path, tmp_path: Path, what: str) -> None:
    content, reason = BAD_FILES[what]
    if content is not None:
        save(folder, "bad.png", content)
    append(folder, {"file_name": "bad.png", "text": "bar"})
    dataset = prepare(folder, CONFIG, tmp_path / "cache")
    assert dataset.quarantine == {"bad.png": reason}
    assert len(dataset.images) == 80
    assert_scanned_alike(folder, dataset)


# The line, its name in the report, and why it is not used.
BAD_LINES = [
    ({"file_name": "extra.png"}, "extra.png", "has no caption (text)"),
    ({"file_name": "extra.png", "text": None}, "extra.png", "has no caption (text)"),
    ({"file_name": "extra.png", "text": 3}, "extra.png", "has no caption (text)"),
    ({"file_name": "extra.png", "text": "ääääa"}, "extra.png", "has 9 bytes but this model reads 8"),
    ({"file_name": "extra.png", "text": "😀😀😀"}, "extra.png", "has 12 bytes but this model reads 8"),
    (b'{"file_name": "extra.png", "text": "\\ud83d"}', "extra.png", "is not valid Unicode text"),
    ({"file_name": "../extra.png", "text": "bar"}, "../extra.png", "lies outside the folder"),
    ({"file_name": "a/../../extra.png", "text": "bar"}, "a/../../extra.png", "lies outside the folder"),
    ({"file_name": "/etc/hostname", "text": "bar"}, "/etc/hostname", "lies outside the folder"),
    ({"file_name": "000.png", "text": "bar"}, f"{METADATA}:81", "names 000.png a second time"),
    ({"file_name": "./000.png", "text": "bar"}, f"{METADATA}:81", "names 000.png a second time"),
    (b"file_name,text", f"{METADATA}:81", "is not a JSON object with a file_name"),
    (b'{"file_name": "extra.png", "te', f"{METADATA}:81", "is not a JSON object with a file_name"),
    (b'{"file_name": "extra.png", "text": "b\xe4r"}', f"{METADATA}:81", "is not UTF-8; save the file in that encoding"),
    (b'["extra.png", "bar"]', f"{METADATA}:81", "is not a JSON object with a file_name"),
    (b'"extra.png"', f"{METADATA}:81", "is not a JSON object with a file_name"),
    (b"[" * 5000, f"{METADATA}:81", "is not a JSON object with a file_name"),
    ({"file_name": 7, "text": "bar"}, f"{METADATA}:81", "is not a JSON object with a file_name"),
    ({"text": "bar"}, f"{METADATA}:81", "is not a JSON object with a file_name"),
]


@pytest.mark.parametrize(("line", "name", "reason"), BAD_LINES)
def test_unusable_line_is_named(folder: Path, tmp_path: Path, line: object, name: str, reason: str) -> None:
    save(folder, "extra.png", png())
    append(folder, line)
    dataset = prepare(folder, CONFIG, tmp_path / "cache")
    assert reason in dataset.quarantine[name]
    assert set(dataset.quarantine) <= {name, "extra.png"}
    assert len(dataset.images) == 80


def test_file_without_line_is_named(folder: Path, tmp_path: Path) -> None:
    save(folder, "deep/forgotten.png", png())
    assert prepare(folder, CONFIG, tmp_path / "cache").quarantine == {"deep/forgotten.png": "is not named in metadata.jsonl"}


def test_blank_lines_mean_nothing(folder: Path, tmp_path: Path) -> None:
    append(folder, b"", b"   ")
    assert prepare(folder, CONFIG, tmp_path / "cache").quarantine == {}


def test_everything_unusable_is_named(folder: Path, tmp_path: Path) -> None:
    for i, (content, _) in enumerate(BAD_FILES.values()):
        append(folder, {"file_name": f"bad{i}.png", "text": "bar"})
        if content is not None:
            save(folder, f"bad{i}.png", content)
    append(folder, *(line for line, _, _ in BAD_LINES))
    dataset = prepare(folder, CONFIG, tmp_path / "cache")
    assert len(dataset.images) == len(dataset.ids) == len(dataset.captions) == len(dataset.held_out) == 80
    assert {f"bad{i}.png" for i in range(len(BAD_FILES))} | {"extra.png", "../extra.png"} < set(dataset.quarantine)
    assert_scanned_alike(folder, dataset)


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_metadata(folder: Path) -> None:
    (folder / METADATA).unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def no_line(folder: Path) -> None:
    (folder / METADATA).write_text("")


def no_usable_image(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(b"not an image")


def not_utf8(folder: Path) -> None:
    (folder / METADATA).write_bytes('{"file_name": "000.png", "text": "bär"}\n'.encode("latin-1") * 3)


def one_image(folder: Path) -> None:
    (folder / METADATA).write_text(json.dumps({"file_name": "000.png", "text": "bar", "group": groups_of(False, 1)[0]}))


def one_group(held_out: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]
        (folder / METADATA).write_text("")
        append(folder, *({**row, "group": groups_of(held_out, 1)[0]} for row in rows))

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_folder, "there is no folder"),
        (empty, f"has no {METADATA}"),
        (no_metadata, f"has no {METADATA}"),
        (no_line, "names no usable image"),
        (not_utf8, "names no usable image"),
        (no_usable_image, "none of the 80 images"),
        (one_image, "has 1 usable training images, but at least 2 are needed"),
        (one_group(held_out=False), "0 of them are held out, but an evaluation needs at least 6"),
        (one_group(held_out=True), "has 0 usable training images"),
    ],
)
@pytest.mark.parametrize("key", [None, "revision"])
def test_unusable_folder_is_one_sentence(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], sentence: str, key: str | None
) -> None:
    change(folder)
    for _ in range(2):  # the second time, a half-made cache must not pass for a good one
        with pytest.raises(DataError) as caught:
            prepare(folder, CONFIG, tmp_path / "cache", key)
        assert sentence in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_group_stays_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "grouped"
    rows = []
    for i in range(60):
        save(folder, f"{i:02d}.png", png(i))
        rows.append({"file_name": f"{i:02d}.png", "text": f"{i % 12}", "group": i % 12})  # the caption tells the group
    append(folder, *rows)
    dataset = prepare(folder, CONFIG, tmp_path / "cache")
    sides = [{dataset.captions[i] for i in side} for side in (dataset.training(), dataset.reference())]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_group_of_null_is_no_group(images: Path, tmp_path: Path) -> None:
    """Treat a null group as no group: other programs write null for unknown, which must not tie those images together."""
    folder = Path(shutil.copytree(images, tmp_path / "null"))
    rows = [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]
    (folder / METADATA).unlink()
    append(folder, *({**row, "group": None} for row in rows))
    assert read_metadata(folder)[0] == read_metadata(images)[0]


def test_split_survives_new_items(folder: Path, tmp_path: Path) -> None:
    def held_out() -> set[bytes]:
        dataset = prepare(folder, CONFIG, tmp_path / "cache")
        return {dataset.images[i].tobytes() for i in dataset.reference()}

    before = held_out()
    write_images(folder, count=40, seed=1, dim=True)
    after = held_out()
    assert before < after
    assert len(after) < 40  # of 120


def test_split_holds_out_fifteen_percent() -> None:
    share = np.mean([is_held_out(f"item-{i}") for i in range(4000)])
    assert 0.13 < share < 0.17


def test_cache_needs_no_folder(folder: Path, tmp_path: Path) -> None:
    first = prepare(folder, CONFIG, tmp_path / "cache", key="revision")
    shutil.rmtree(folder)
    second = prepare(folder, CONFIG, tmp_path / "cache", key="revision")
    assert np.array_equal(first.images, second.images)
    assert first.captions == second.captions
    assert np.array_equal(first.held_out, second.held_out)


def test_cache_follows_revision_and_folder(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert len(prepare(folder, CONFIG, cache).images) == 80
    write_images(folder, count=10, seed=1, dim=True)
    assert len(prepare(folder, CONFIG, cache).images) == 90
    assert len(prepare(folder, CONFIG, cache, key="old").images) == 90


@pytest.mark.parametrize(
    ("changed", "shape"),
    [({"image_size": 8}, (80, 1, 8, 8)), ({"channels": 3}, (80, 3, 16, 16)), ({"image_size": 32}, (80, 1, 32, 32))],
)
def test_each_size_has_its_cache(images: Path, tmp_path: Path, changed: dict[str, int], shape: tuple[int, ...]) -> None:
    first = prepare(images, CONFIG, tmp_path, key="revision")
    other = prepare(images, CONFIG.model_copy(update=changed), tmp_path, key="revision")
    assert first.images.shape == (80, 1, 16, 16)
    assert other.images.shape == shape
    assert np.array_equal(first.held_out, other.held_out)


def test_longer_captions_get_their_cache(folder: Path, tmp_path: Path) -> None:
    save(folder, "long.png", png())
    append(folder, {"file_name": "long.png", "text": "a long bar"})
    assert set(prepare(folder, CONFIG, tmp_path / "cache", key="revision").quarantine) == {"long.png"}
    longer = prepare(folder, CONFIG.model_copy(update={"text_length": 10}), tmp_path / "cache", key="revision")
    assert longer.quarantine == {}
    assert longer.ids.shape == (81, 10)


def test_configurations_share_a_cache(images: Path, tmp_path: Path) -> None:
    prepare(images, CONFIG, tmp_path, key="revision")
    made = list(tmp_path.iterdir())
    prepare(images, CONFIG.model_copy(update={"configuration": "II", "tier": "nano"}), tmp_path, key="revision")
    assert list(tmp_path.iterdir()) == made


def test_killed_run_leaves_no_harm(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    prepare(images, CONFIG, tmp_path, key="revision")
    (place,) = tmp_path.iterdir()
    place.rename(place.with_name(f"{place.name}.123-456.tmp"))
    (place.with_name(f"{place.name}.123-456.tmp") / "images.npy").write_bytes(b"half")
    again = prepare(images, CONFIG, tmp_path, key="revision")
    assert np.array_equal(again.images, dataset.images)


def test_simultaneous_calls_agree(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: prepare(images, CONFIG, tmp_path, key="revision"), range(8)))
    assert all(np.array_equal(result.images, dataset.images) for result in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_batch_depends_on_seed_and_step(dataset: Dataset) -> None:
    images, ids = dataset.batch(seed=3, step=5, size=16)
    torch.rand(7)  # other random draws in between do not matter
    again, ids_again = dataset.batch(seed=3, step=5, size=16)
    assert torch.equal(images, again)
    assert torch.equal(ids, ids_again)
    for seed, step in ((3, 6), (4, 5), (5, 3)):
        assert not torch.equal(images, dataset.batch(seed, step, 16)[0])


def test_batches_never_show_held_out_images(dataset: Dataset) -> None:
    held_out = {dataset.images[i].tobytes() for i in dataset.reference()}
    seen = set()
    for step in range(30):
        images, ids = dataset.batch(0, step, 16)
        assert images.shape == (16, 1, 16, 16)
        assert ids.shape == (16, 8)
        seen |= {image.tobytes() for image in to_bytes(images)}
    assert not seen & held_out
    assert len(seen) == len(dataset.training())  # and every training image is drawn


def test_batch_pairs_image_with_caption(folder: Path, tmp_path: Path) -> None:
    """Tell two kinds of image apart by their brightness, so that a mixed-up caption is noticed."""
    rows = []
    for i in range(40):
        buffer = io.BytesIO()
        Image.new("L", (16, 16), 250 if i % 2 else 5).save(buffer, "PNG")
        save(folder, f"z{i:02d}.png", buffer.getvalue())
        rows.append({"file_name": f"z{39 - i:02d}.png", "text": "dark" if i % 2 else "light"})
    (folder / METADATA).unlink()
    append(folder, *rows)
    images, ids = prepare(folder, CONFIG, tmp_path / "cache").batch(0, 0, 32)
    light = torch.tensor(caption_ids("light", 8))
    assert torch.equal(images.mean(dim=(1, 2, 3)) > 0, (ids == light).all(dim=1))


def test_pixels_survive_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    unit = to_unit(pixels)
    assert (float(unit.min()), float(unit.max())) == (-1, 1)
    assert np.array_equal(to_bytes(unit), pixels)
    assert to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_colour_mode_is_read(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    decoded = decode(path, 16, channels)
    assert decoded.shape == (channels, 16, 16)
    assert (decoded == 255).all()


def test_colours_keep_their_order(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "image.png")
    assert decode(tmp_path / "image.png", 16, 3)[:, 3, 3].tolist() == [200, 100, 50]


def framed(size: tuple[int, int]) -> Image.Image:
    """Draw a white square in the middle of a black image."""
    width, height = size
    side = min(size)
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (80, 32), (201, 64)])
@pytest.mark.parametrize("target", [8, 12, 16])
def test_only_central_square_is_kept(tmp_path: Path, size: tuple[int, int], target: int) -> None:
    framed(size).save(tmp_path / "image.png")
    decoded = decode(tmp_path / "image.png", target, 1)
    assert decoded.shape == (1, target, target)
    assert (decoded == 255).all()


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (10, 8)])
def test_small_image_is_enlarged(tmp_path: Path, size: tuple[int, int]) -> None:
    framed(size).save(tmp_path / "image.png")
    decoded = decode(tmp_path / "image.png", 64, 1)
    assert decoded.shape == (1, 64, 64)
    assert (decoded[:, 16:-16, 16:-16] == 255).all()  # enlarging may blur the border


def test_rows_and_columns_stay_apart(tmp_path: Path) -> None:
    pixels = np.tile(np.arange(16, dtype=np.uint8) * 10, (16, 1))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(decode(tmp_path / "image.png", 16, 1)[0], pixels)


@pytest.mark.parametrize(("text", "ids"), [("", [0] * 4), ("ab", [98, 99, 0, 0]), ("ä", [196, 165, 0, 0]), ("\0", [1, 0, 0, 0])])
def test_captions_become_bytes(text: str, ids: list[int]) -> None:
    assert caption_ids(text, 4) == ids


def linked(folder: Path) -> None:
    (folder / "again.png").symlink_to("000.png")


def linked_folder(folder: Path) -> None:
    (folder / "more").symlink_to(".")


def linked_captions(folder: Path) -> None:
    (folder / METADATA).rename(folder.parent / METADATA)
    (folder / METADATA).symlink_to(f"../{METADATA}")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


def not_utf8_name(folder: Path) -> None:
    (folder / "b\udce4r.png").write_bytes(png())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (linked, "again.png is a link, but data must be regular files; replace it by a copy of the file that it points to"),
        (linked_folder, "more is a link, but data must be regular files"),
        (linked_captions, f"{METADATA} is a link, but data must be regular files"),
        (pipe, "pipe.png is a pipe, but data must be regular files; remove it"),
        (not_utf8_name, "b\\xe4r.png has a name that is not UTF-8; rename it"),
    ],
)
def test_what_is_no_regular_file_is_refused_by_name(
    folder: Path, tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    """Refuse it, instead of following it or skipping it."""
    make(folder)
    for look in (lambda: scan(folder, 24), lambda: prepare(folder, CONFIG, tmp_path / "cache"), lambda: read_metadata(folder)):
        with pytest.raises(DataError) as caught:
            look()
        assert str(caught.value).startswith(f"{folder}/{says}")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["\ud800.png", "a\0b.png", "", ".", "deep", "x" * 300, "000.png/.."])
def test_captions_of_impossible_files_are_listed(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "deep").mkdir()
    append(folder, {"file_name": name, "text": "bar"})
    dataset = prepare(folder, CONFIG, tmp_path / "cache")
    assert len(dataset.quarantine) == 1
    assert len(dataset.images) == 80
    assert_scanned_alike(folder, dataset)
    json.dumps([*dataset.quarantine.items()], ensure_ascii=False).encode()  # a report must be able to hold it

"""Turn a folder of captioned images into a memory-mapped cache, and draw deterministic batches from it.

The folder follows the Hugging Face ImageFolder convention: images anywhere below it, and a `metadata.jsonl` whose lines
hold `file_name` and `text`, optionally `group`. Images of one group (crops of one photograph, shots of one part) always
fall on the same side of the held-out split. An image without a group is a group of its own.

Nothing is dropped silently: `Dataset.quarantine` names every file and metadata line that cannot be used, with the reason.

    >>> dataset = prepare(Path("data/surfaces"), config, cache=Path("work/cache"))
    >>> images, ids = dataset.batch(seed=0, step=0, size=32)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from model.config import HELD_OUT_PERMILLE, MAX_TEXT, ModelConfig, canonical_sha256
from model.data_report import SMALL, Floats, FolderSummary, summarise
from model.errors import DataError
from model.folder import entries, md5_of, opened, shown, unreadable
from model.metadata import METADATA, ONE_LINE_EACH, Item, items_of, missing
from model.pictures import BRIGHTEST, READING, open_picture

CACHE_SCHEMA = 3
PART = 1024  # images that are summarised at a time; limits the memory
MIN_TRAINING = 2  # images; a model trained on a single image could only copy it
MIN_HELD_OUT = 6  # images; coverage needs 5 neighbours of each


OnItem = Callable[[int, int], None]
"""Callback with (files scanned so far, files in total)."""


@dataclass(frozen=True)
class Dataset:
    """Decoded images and captions of one folder at one size.

    Attributes:
        images: uint8 [n, C, R, R], memory-mapped.
        captions: n captions.
        ids: int64 [n, L], caption bytes plus one, zero-padded.
        held_out: bool [n].
        groups: n names; items of one group are not independent of each other.
        quarantine: file name, or metadata line such as "metadata.jsonl:3" → why it cannot be used.
    """

    images: npt.NDArray[np.uint8]
    captions: list[str]
    ids: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    groups: list[str]
    quarantine: dict[str, str]

    def training(self) -> npt.NDArray[np.intp]:
        """Return the indices of the items to train on."""
        return np.flatnonzero(~self.held_out)

    def reference(self) -> npt.NDArray[np.intp]:
        """Return the indices of the held-out items."""
        return np.flatnonzero(self.held_out)

    def reference_groups(self) -> npt.NDArray[np.intp]:
        """Return the group of each held-out item, numbered from 0."""
        numbered: npt.NDArray[np.intp] = np.unique([self.groups[i] for i in self.reference()], return_inverse=True)[1]
        return numbered

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return the batch of one training step: images float32 [size, C, R, R] in [-1, 1] and ids int64 [size, L].

        The choice depends on (seed, step) alone, so a resumed run sees the same batches as an uninterrupted one.
        """
        generator = torch.Generator().manual_seed(mix(seed, step, 1))
        training = self.training()
        chosen = training[torch.randint(0, len(training), (size,), generator=generator).numpy()]
        return to_unit(self.images[chosen]), torch.from_numpy(self.ids[chosen])


def mix(*numbers: int) -> int:
    """Derive one 63-bit seed from several numbers, so that random streams for different purposes are unrelated."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_unit(images: npt.NDArray[np.uint8]) -> Tensor:
    """Convert images from uint8 [...] to float32 [...] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def to_bytes(images: Tensor) -> npt.NDArray[np.uint8]:
    """Clip images, float [...], to [-1, 1] and convert them to uint8 [...]."""
    array: npt.NDArray[np.uint8] = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return array


def caption_ids(text: str, length: int) -> list[int]:
    """Encode a caption as its UTF-8 bytes plus one, padded with 0 to `length`.

    Raises:
        DataError: the caption has more bytes than the network reads, or is not valid Unicode text.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise DataError(f"the caption {text[:40]!r} is not valid Unicode text; write it again") from None
    if len(data) > length:
        longer = f" or train a model with text_length = {len(data)}" if len(data) <= MAX_TEXT else ""
        raise DataError(f"the caption {text[:40]!r} has {len(data)} bytes but this model reads {length}; shorten it{longer}")
    return [byte + 1 for byte in data] + [0] * (length - len(data))


def read_metadata(folder: Path) -> tuple[list[Item], dict[str, str]]:
    """Return the items that `metadata.jsonl` lists, and the problem of every metadata line and file that cannot be used.

    The images are not opened, and an item's file may be missing.

    Raises:
        DataError: the folder or its metadata file is missing or cannot be read, no metadata line is usable, or the folder
            contains something other than regular files.
    """
    return items_of(folder, *_listing(folder))


def _listing(folder: Path) -> tuple[list[str], bytes]:
    """List the names of a folder's files, and read its metadata file as bytes."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {shown(folder)}; put the images there, or name another one")
    names = [*entries(folder)]
    if METADATA not in names:
        raise DataError(f"{shown(folder)} has no {METADATA}; {ONE_LINE_EACH}")
    try:
        with opened(folder / METADATA) as file:
            return names, file.read()
    except OSError as error:
        raise unreadable(error, folder / METADATA) from error


def decode(path: Path, size: int, channels: int) -> npt.NDArray[np.uint8]:
    """Decode one image, cut to its largest central square and scaled to `size` pixels: uint8 [C, size, size].

    Raises:
        DataError: for the same reasons as in `open_picture`.
    """
    return _planes(open_picture(path, channels), size)


def _planes(picture: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    array = _square(picture, size)
    return array[None] if picture.mode == "L" else np.ascontiguousarray(array.transpose(2, 0, 1))


def _square(picture: Image.Image, size: int, shrink: Image.Resampling = Image.Resampling.BOX) -> npt.NDArray[np.uint8]:
    """Cut out the largest central square and scale it: uint8 [size, size] or [size, size, 3]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if (side, side) != picture.size or side != size:
        box = (left, top, left + side, top + side)
        picture = picture.resize((size, size), shrink if side > size else Image.Resampling.BICUBIC, box)
    return np.asarray(picture, dtype=np.uint8)


def is_held_out(group: str) -> bool:
    """Check whether a group is held out for evaluation; the hash of its name decides, so the answer never changes."""
    return int.from_bytes(hashlib.sha256(group.encode(errors="surrogatepass")).digest()[:4], "big") % 1000 < HELD_OUT_PERMILLE


def scan(folder: Path, text_length: int, on_item: OnItem | None = None) -> FolderSummary:
    """Read every file, image and caption of a folder once, and check them as training would.

    Returns:
        the usable items, the unusable ones with the reason, and the summary of the images that `model.data_report` needs.

    Raises:
        DataError: a file cannot be read or is not a regular file, or the metadata name no usable image.
    """
    names, metadata = _listing(folder)
    items, bad = items_of(folder, names, metadata)
    asked = {item.file: item for item in items}
    bad |= missing(items, names)
    files: dict[str, str] = {}
    usable: list[Item] = []
    pixels: list[str] = []
    small: list[npt.NDArray[np.uint8]] = []
    parts: list[tuple[Floats, Floats]] = []
    deep: list[int] = []
    for done, name in enumerate(names, start=1):
        try:
            with opened(folder / name) as file:
                # Hash the metadata bytes that were parsed above: the file may have changed since.
                files[name] = md5_of(io.BytesIO(metadata) if name == METADATA else file)
                picture = _picture(file, asked[name], text_length, 3) if name in asked else None
        except OSError as error:
            raise unreadable(error, folder / name) from error
        if isinstance(picture, str):
            bad[name] = picture
        elif picture:
            usable.append(asked[name])
            pixels.append(hashlib.sha256(b"%d,%d," % picture.size + picture.tobytes()).hexdigest())
            deep += [int(picture.info[BRIGHTEST])] if BRIGHTEST in picture.info else []
            small.append(_square(picture, SMALL, Image.Resampling.BILINEAR))  # a box filter makes a resized copy look different
            if len(small) == PART:
                parts.append(summarise(np.array(small)))
                small.clear()
        if on_item:
            on_item(done, len(names))
    parts.append(summarise(np.array(small, dtype=np.uint8).reshape(-1, SMALL, SMALL, 3)))
    thumbs, features = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return FolderSummary(
        files=files, quarantine=bad, names=[item.file for item in usable], captions=[item.text for item in usable],
        groups=[item.group for item in usable], held_out=np.array([is_held_out(item.group) for item in usable], dtype=np.bool_),
        pixels=pixels, thumbs=thumbs, features=features, deep=(len(deep), max(deep, default=0)),
    )  # fmt: skip


def prepare(folder: Path, config: ModelConfig, cache: Path, key: str | None = None) -> Dataset:
    """Decode a folder into a cache and memory-map it; a later call with the same key maps the existing cache.

    Args:
        folder: the images and their `metadata.jsonl`.
        config: gives image size, channels and caption length.
        cache: folder that holds the caches, one subfolder each.
        key: identifies the folder's content (a data revision's md5); None: use its `metadata.jsonl`, file names and sizes.

    Raises:
        DataError: no image is usable, or too few are left to train on or to evaluate with.
    """
    if key is None:
        sizes = [(name, info.st_size) for name, info in entries(folder).items()] if folder.is_dir() else []
        metadata = (folder / METADATA).read_bytes() if (folder / METADATA).is_file() else b""
        key = canonical_sha256([hashlib.sha256(metadata).hexdigest(), sizes])
    name = canonical_sha256([CACHE_SCHEMA, READING, key, config.image_size, config.channels, config.text_length])[:24]
    place = cache / name
    if not (place / "index.json").is_file():
        _fill(folder, config, place)
    index = json.loads((place / "index.json").read_bytes())
    dataset = Dataset(
        images=np.load(place / "images.npy", mmap_mode="r"),
        captions=index["captions"],
        ids=np.load(place / "ids.npy"),
        held_out=np.load(place / "held_out.npy"),
        groups=index["groups"],
        quarantine=index["quarantine"],
    )
    if len(dataset.training()) < MIN_TRAINING:
        raise DataError(
            f"{folder} has {len(dataset.training())} usable training images, but at least {MIN_TRAINING} are needed; add "
            "more images"
        )
    if len(dataset.reference()) < MIN_HELD_OUT:
        raise DataError(
            f"{folder} has too few images or groups: {len(dataset.reference())} of them are held out, but an evaluation "
            f"needs at least {MIN_HELD_OUT}; add more images or groups"
        )
    return dataset


def _picture(file: BinaryIO, item: Item, text_length: int, channels: int) -> Image.Image | str:
    """Decode an item's image, or return the reason why the item cannot be used."""
    try:
        caption_ids(item.text, text_length)
        file.seek(0)
        return open_picture(file, channels, item.white)
    except DataError as error:
        return str(error)


def _fill(folder: Path, config: ModelConfig, place: Path) -> None:
    names, metadata = _listing(folder)
    items, bad = items_of(folder, names, metadata)
    lacking = missing(items, names)
    bad |= lacking
    images, ids, captions, groups = [], [], [], []
    for item in items:
        if item.file in lacking:
            continue
        try:
            with opened(folder / item.file) as file:
                picture = _picture(file, item, config.text_length, config.channels)
        except OSError as error:
            raise unreadable(error, folder / item.file) from error
        if isinstance(picture, str):
            bad[item.file] = picture
            continue
        images.append(_planes(picture, config.image_size))
        ids.append(caption_ids(item.text, config.text_length))
        captions.append(item.text)
        groups.append(item.group)
    if not images:
        raise DataError(
            f"none of the {len(items)} images in {folder} can be used; the first of them: {' '.join(next(iter(bad.items())))}"
        )
    fresh = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    np.save(fresh / "images.npy", np.stack(images))
    np.save(fresh / "ids.npy", np.array(ids, dtype=np.int64))
    np.save(fresh / "held_out.npy", np.array([is_held_out(group) for group in groups], dtype=np.bool_))
    (fresh / "index.json").write_text(json.dumps({"captions": captions, "groups": groups, "quarantine": bad}))
    try:
        fresh.rename(place)  # atomic: a killed run leaves only a .tmp folder that nobody reads
    except OSError:  # another process was first with the same content
        shutil.rmtree(fresh)

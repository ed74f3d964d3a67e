"""Adopt weights that were trained elsewhere: check a file of safetensors, and make a checkpoint of it.

    >>> found = look(Path("model.safetensors"))  # seconds before torch is imported, if the file is no such file at all
    >>> checkpoint = adopt(found, config, data, "bfloat16", "trained on the cluster", out=Path("work/adopted"))

The file comes from outside, so it is checked before it is used: it must be a regular file within a size limit, its header must be
within one of its own, and it must hold exactly the tensors of the network, all of them 16 or 32 bit floats and finite. Pickles are
never read, because they are programs. The bytes that were checked are the bytes that are used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field, TypeAdapter, ValidationError

from model.config import CONFIGURATIONS, TIERS, ModelConfig, PrecisionName
from model.errors import CheckpointError
from model.folder import shown, unreadable
from model.scorecard import Adopted, DataVersion, Frozen, Lineage, Source

LINEAGE, WEIGHTS = "lineage.json", "weights.safetensors"  # as in `model.train`, which imports torch
MAX_FILE = 512 << 20  # bytes; the largest network has 90 million weights, 360 MB as float32
MAX_HEADER = 1 << 20  # bytes; that of the largest network takes 20 kB
MAX_LINEAGE = 64 << 10  # bytes; one takes 1 kB
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # type, as safetensors calls it → bytes of a number
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's archive, and bare pickles
LFS = b"version https://git-lfs"
NAMED = 3  # tensors that a message names; it counts the others

Shape = tuple[int, ...]


class Row(Frozen):
    """What the header says of a tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=MAX_FILE)]] = Field(max_length=8)
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """A file of weights whose header was checked.

    Attributes:
        path: the file.
        content: its bytes.
        shapes: tensor → its shape.
        lineage: of a checkpoint that ferry wrote; None: the file comes without one.
    """

    path: Path
    content: bytes
    shapes: Mapping[str, Shape]
    lineage: Lineage | None

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def source(self) -> str:
        """Where the weights come from, as far as the file tells; used if nobody says it."""
        if self.lineage is None:
            return f"the file {shown(self.path.name)}"[:200]
        made = self.lineage
        return f"a checkpoint of {made.data.line}, data {made.data.rev[:12]}, {made.steps} steps"


def look(path: Path) -> Found:
    """Read a file of safetensors, or the folder of a checkpoint that ferry wrote, and check all that needs no torch.

    Raises:
        CheckpointError: it is missing, no regular file, too large, a pickle, truncated or damaged, or holds other numbers than
            16 or 32 bit floats.
    """
    lineage = None
    if path.is_dir():
        if not (path / LINEAGE).is_file():
            raise CheckpointError(
                f"{shown(path)} is a folder without a {LINEAGE}; name a .safetensors file, or the folder of a checkpoint that ferry wrote"
            )
        lineage, path = _lineage(path / LINEAGE), path / WEIGHTS
    if path.suffix.lower() in PICKLES:
        raise _pickle(path)
    content = _content(path, MAX_FILE, "weights")
    if content.startswith(PICKLED):
        raise _pickle(path)
    if content.startswith(LFS):
        raise CheckpointError(f"{shown(path)} only says where Git LFS keeps the weights; run `git lfs pull` in its repository")
    return Found(path, content, _shapes(path, content), lineage)


def adopt(found: Found, config: ModelConfig, data: DataVersion, stored: PrecisionName, source: str, out: Path) -> Path:
    """Make a checkpoint of weights that were trained elsewhere, and return its folder; the same call gives the same bytes.

    Args:
        found: the file.
        config: network that the weights must fit.
        data: the line's present data revision, on which the weights will be judged.
        stored: precision that devices store; the weights are rounded to it, as those of a training are.
        source: where they come from, in words.
        out: folder of the checkpoint; created if missing.

    Raises:
        CheckpointError: the tensors are those of another network, one is not finite, or the checkpoint was made as something else
            than `full` or with other settings than the line's.
    """
    check_tensors(found, config)
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from model import train
    from model.network import Network

    try:
        tensors = load(found.content)
    except SafetensorError as error:
        raise CheckpointError(f"{shown(found.path)} is damaged ({error}); fetch it again") from error
    _check_finite(found.path, tensors)
    network = Network(config)
    network.load_state_dict(tensors)
    train.round_to_stored(network, stored)
    _check_finite(found.path, network.state_dict(), f" once they are rounded to {stored}")
    adopted = Adopted(source=source, file_sha256=found.sha256)
    lineage = Lineage(
        data=data, config=config, variant="full", training_sha256=adopted.sha256, code=train.code_sha256(), seed=0, parent=None,
        steps=0, items=0, torch=torch.__version__, adopted=adopted,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / LINEAGE).unlink(missing_ok=True)  # an old lineage must never stand beside new weights
    train.write_safely(out / WEIGHTS, network.state_dict())
    (out / train.CURVE).write_text("[]")
    (out / LINEAGE).write_text(lineage.model_dump_json(indent=1))
    return out


def check_tensors(found: Found, config: ModelConfig) -> None:
    """Check that a file's tensors have the names and shapes of a network's, and that its lineage names that network.

    Raises:
        CheckpointError: they do not.
    """
    if found.lineage and found.lineage.variant != "full":
        raise CheckpointError(
            f"{shown(found.path)} is a checkpoint of the variant {found.lineage.variant}; adopt the one of full that it comes from"
        )
    if found.lineage and found.lineage.config != config:
        theirs, ours = found.lineage.config.model_dump(), config.model_dump()
        other = ", ".join(f"{name} {theirs[name]}, here {ours[name]}" for name in theirs if theirs[name] != ours[name])
        raise CheckpointError(
            f"{shown(found.path)} was trained with other settings than the line has ({other}); adopt it in a line with its settings"
        )
    wanted = shapes_of(config)
    if found.shapes == wanted:
        return
    other = "; ".join(
        part
        for part in (
            _listed("missing", [name for name in wanted if name not in found.shapes]),
            _listed("too many", [name for name in found.shapes if name not in wanted]),
            _listed(
                "of another shape",
                [f"{n} {[*found.shapes[n]]}, not {[*wanted[n]]}" for n in wanted if n in found.shapes and found.shapes[n] != wanted[n]],
            ),
        )
        if part
    )  # fmt: skip
    fits = next((c for c in _others(config) if shapes_of(c) == found.shapes), None)
    remedy = "export it under the names and shapes of `model.network.Network`"
    if fits:
        remedy = (
            f"it fits tier {fits.tier}, configuration {fits.configuration}, {_channels(fits)}: adopt it in a line that has this"
        )
    raise CheckpointError(
        f"{shown(found.path)} is not a network of tier {config.tier}, configuration {config.configuration}, {_channels(config)} "
        f"({other}); {remedy}"
    )


def _channels(config: ModelConfig) -> str:
    return f"{config.channels} channel{'s' * (config.channels != 1)}"


def shapes_of(config: ModelConfig) -> dict[str, Shape]:
    """List the tensors of a network by name, each with its shape; no memory is taken for them."""
    import torch

    from model.network import Network

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Network(config).state_dict().items()}


def _others(config: ModelConfig) -> Iterable[ModelConfig]:
    """Yield the networks of all tiers, configurations and channels."""
    for tier in TIERS:
        for configuration in CONFIGURATIONS:
            for channels in (1, 3):
                yield ModelConfig.model_validate(
                    config.model_dump() | {"tier": tier, "configuration": configuration, "channels": channels}
                )


def _content(path: Path, most: int, what: str) -> bytes:
    """Read a regular file of limited size. A link to one is followed: caches of downloads consist of links."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            return _read(file, path, most, what)
    except OSError as error:
        raise CheckpointError(str(unreadable(error, path))) from error


def _read(file: BinaryIO, path: Path, most: int, what: str) -> bytes:
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{shown(path)} is not a regular file; name a .safetensors file")
    if info.st_size > most:
        raise CheckpointError(
            f"{shown(path)} has {info.st_size} bytes, but {what} of ferry's networks have at most {most}; name another file"
        )
    content = file.read(most + 1)
    if len(content) != info.st_size:
        raise CheckpointError(f"{shown(path)} changed while it was read; wait until it is written, and repeat the command")
    return content


def _lineage(path: Path) -> Lineage:
    try:
        return Lineage.model_validate_json(_content(path, MAX_LINEAGE, "lineages"))
    except ValidationError as error:
        raise CheckpointError(
            f"{shown(path)} is not a lineage that this version knows; name the {WEIGHTS} beside it to adopt the weights without it"
        ) from error


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{shown(path)} is a pickle, which can run any program when it is opened; save its state_dict with "
        "`safetensors.torch.save_file` on the machine that you trust it on, and adopt that file"
    )


def _shapes(path: Path, content: bytes) -> dict[str, Shape]:
    """Read the header of a file of safetensors: the length of the JSON, the JSON, then the numbers."""
    damaged = f"{shown(path)} is not a whole file of safetensors"
    if len(content) < 8:
        raise CheckpointError(f"{damaged}: it has {len(content)} bytes; fetch it again")
    (length,) = struct.unpack("<Q", content[:8])
    if length > MAX_HEADER:
        raise CheckpointError(f"{damaged}: its header would have {length} bytes, more than {MAX_HEADER}; fetch it again")
    if 8 + length > len(content):
        raise CheckpointError(f"{damaged}: it ends within its header; fetch it again")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise CheckpointError(f"{damaged}: its header is no table of tensors; fetch it again")
        header.pop("__metadata__", None)
        rows = {name: Row.model_validate(row) for name, row in header.items()}
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        raise CheckpointError(f"{damaged}: its header cannot be read; fetch it again") from error
    if not rows:
        raise CheckpointError(f"{shown(path)} holds no tensor; name the file with the weights")
    odd = [f"{_brief(name)} ({_brief(row.dtype)})" for name, row in rows.items() if row.dtype not in FLOATS]
    if odd:
        raise CheckpointError(
            f"{shown(path)} {_listed('holds other numbers than float32, float16 and bfloat16', odd)}; convert them and save it again"
        )
    end = 0
    for name, row in sorted(rows.items(), key=lambda pair: pair[1].data_offsets):
        if row.data_offsets != (end, end + math.prod(row.shape) * FLOATS[row.dtype]):
            raise CheckpointError(f"{damaged}: the place of {_brief(name)} does not fit its shape; fetch it again")
        end = row.data_offsets[1]
    if 8 + length + end != len(content):
        raise CheckpointError(f"{damaged}: it has {len(content)} bytes, and its header says {8 + length + end}; fetch it again")
    return {name: tuple(row.shape) for name, row in rows.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table of pairs whose names differ; readers disagree about which of two equal names counts."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _check_finite(path: Path, tensors: Mapping[str, Any], when: str = "") -> None:
    odd = [_brief(name) for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if odd:
        raise CheckpointError(
            f"{shown(path)} {_listed('has weights that are not finite', odd)}{when}; adopt an earlier state of it"
        )


def _listed(what: str, names: list[str]) -> str:
    """Name the first few of several tensors and count the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{what}: {', '.join(map(_brief, names[:NAMED]))}{more}" if names else ""


def _brief(name: str) -> str:
    """Shorten a name that comes from outside."""
    return shown(name if len(name) <= 60 else f"{name[:60]}…")


def source_of(text: str) -> str:
    """Check the words that say where weights come from.

    Raises:
        CheckpointError: there are none, too many, or they have control characters.
    """
    try:
        return TypeAdapter[str](Source).validate_python(text)
    except ValidationError as error:
        raise CheckpointError(
            "--from says in one line of at most 200 characters where the weights come from; shorten it"
        ) from error

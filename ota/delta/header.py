"""The header of a delta: what it starts from and what it makes.

Its values are frozen, with a closed list of fields, and each is checked when it is made: a header may come from outside. They are
plain dataclasses, because `ota.delta` works without pydantic, which the signed documents (`ota.manifest`) are made with.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from ota.limits import MAX_WEIGHTS, OF_NUMBERS, Role, VariantName, check_file

MAX_FILES = 17  # of a bundle


@dataclass(frozen=True)
class PlainFile:
    """A file that belongs to no bundle."""

    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field does not have an allowed value.
        """
        _check_number("size", self.size)
        _check_hash("sha256", self.sha256)


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle, as its manifest lists it (`ota.manifest.FileEntry`)."""

    role: Role
    variant: VariantName | None  # None for the graph, which all variants share
    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field does not have an allowed value.
        """
        if self.role not in get_args(Role):
            raise ValueError("role is not a role of a bundle's file")
        if self.variant is not None and self.variant not in get_args(VariantName):
            raise ValueError("variant is not a variant of a bundle")
        _check_number("size", self.size, least=1)
        _check_hash("sha256", self.sha256)
        check_file(self.role, self.variant, self.size)


@dataclass(frozen=True)
class DeltaFile:
    """One file that a delta makes."""

    target: BundleFile | PlainFile
    base: str | None  # hash of the file it is made from: of the base, or one that the delta made before; None: of none
    base_size: int  # bytes

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field does not have an allowed value.
        """
        if self.base is not None:
            _check_hash("base", self.base)
        _check_number("base_size", self.base_size)

    @property
    def name(self) -> str:
        """What messages call the file."""
        return f"{self.target.role} file" if isinstance(self.target, BundleFile) else "file"

    @property
    def small(self) -> bool:
        """Whether it is handled whole where that is shorter; weights and overlays are not."""
        return not isinstance(self.target, BundleFile) or self.target.role not in OF_NUMBERS

    @property
    def remedy(self) -> str:
        """What the reader of a message should do if the base is another file than expected."""
        return "fetch the full bundle" if isinstance(self.target, BundleFile) else "name the file that it was built from"


@dataclass(frozen=True)
class Header:
    """What a delta starts from and what it makes, with the files in the order in which it makes them."""

    base: str  # hash of the manifest of the bundle it starts from, or of the plain file
    target: str  # hash of the manifest of the bundle it makes, or of the plain file
    files: list[DeltaFile]

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field does not have an allowed value.
        """
        _check_hash("base", self.base)
        _check_hash("target", self.target)
        if not 1 <= len(self.files) <= MAX_FILES:
            raise ValueError(f"it lists {len(self.files)} files, but must list 1 to {MAX_FILES}")

    def canonical(self) -> bytes:
        """Return the canonical JSON: the bytes that a delta holds."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


def parse(data: bytes) -> Header:
    """Parse a header that comes from outside; compare `canonical` with the bytes, because other bytes may give the same header.

    Raises:
        ValueError: the bytes are not JSON, or not of this form.
    """
    try:
        read = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    given = _fields("the header", read, Header)
    files = given["files"]
    if not isinstance(files, list):
        raise ValueError("files is not a list")  # noqa: TRY004 - one error for all that can be wrong
    return Header(given["base"], given["target"], [_file(file) for file in files])


def _file(value: object) -> DeltaFile:
    given = _fields("a file", value, DeltaFile)
    target = given["target"]
    kind = BundleFile if isinstance(target, dict) and "role" in target else PlainFile
    return DeltaFile(kind(**_fields("target", target, kind)), given["base"], given["base_size"])


def _fields(what: str, value: object, kind: type[Any]) -> dict[str, Any]:
    """Check that a value is an object with exactly the fields of a class."""
    wanted = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != wanted:
        raise ValueError(f"{what} does not have exactly the fields {', '.join(sorted(wanted))}")
    return value


def _check_hash(name: str, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{name} is not a sha256 in lower-case hex digits")


def _check_number(name: str, value: object, least: int = 0) -> None:
    if type(value) is not int or not least <= value <= MAX_WEIGHTS:  # a bool is an int, too
        raise ValueError(f"{name} is not a whole number from {least} to {MAX_WEIGHTS}")

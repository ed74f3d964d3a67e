"""The header of a delta: what is accepted comes back as the same bytes, and every field that is not as it must be is refused."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from typing import Any

import pytest
from backports import zstd

from ota.delta import read_header
from ota.delta.format import MAGIC, PREFIX, VERSIONS, pack_header
from ota.delta.header import MAX_FILES, BundleFile, DeltaFile, Header, PlainFile
from ota.errors import DeltaError
from ota.limits import MAX_WEIGHTS, SIZE_LIMITS
from ota.manifest import FileEntry

A, B = "a" * 64, "b" * 64
WEIGHTS = {"role": "weights", "variant": "full", "size": 9, "sha256": A}
GOOD = {"base": A, "target": B, "files": [{"target": WEIGHTS, "base": B, "base_size": 9}]}
MANY = [deepcopy(GOOD["files"][0]) for _ in range(MAX_FILES + 1)]
MISSING = object()


def packed(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read(data: bytes) -> Header:
    return read_header(io.BytesIO(PREFIX.pack(MAGIC, 1, len(data)) + data))


def changed(*path: Any) -> Any:
    """Return the good header with one value in another place replaced, or removed."""
    *way, name, value = path
    made = deepcopy(GOOD)
    at: Any = made
    for step in way:
        at = at[step]
    if value is MISSING:
        del at[name]
    else:
        at[name] = value
    return made


FILE = ("files", 0)
TARGET = ("files", 0, "target")
ACCEPTED = {
    "bundle": GOOD,
    "no base": changed(*FILE, "base", None),
    "plain": changed(*TARGET, {"size": 0, "sha256": A}),
    "largest plain": changed(*TARGET, {"size": MAX_WEIGHTS, "sha256": A}),
    "largest base": changed(*FILE, "base_size", MAX_WEIGHTS),
    "graph": changed(*TARGET, {"role": "graph", "variant": None, "size": SIZE_LIMITS["graph"], "sha256": A}),
    "as many files as a bundle has": changed("files", MANY[:MAX_FILES]),
}
REFUSED = {
    "short hash": changed("base", A[1:]), "long hash": changed("target", A + "a"), "upper case": changed("base", "A" * 64),
    "hash with a line": changed("base", A + "\n"), "hash of other digits": changed("target", "٣" * 64), "no string": changed("base", 7),
    "no hash of the bundle": changed("base", None), "path": changed(*TARGET, "sha256", "../" + "0" * 61),
    "path of the base": changed(*FILE, "base", "../" + "0" * 61),
    "negative": changed(*FILE, "base_size", -1), "too large": changed(*FILE, "base_size", MAX_WEIGHTS + 1), "float": changed(*FILE, "base_size", 9.0),
    "true": changed(*FILE, "base_size", True), "number as text": changed(*FILE, "base_size", "9"),
    "empty file of a bundle": changed(*TARGET, "size", 0), "negative plain": changed(*TARGET, {"size": -1, "sha256": A}),
    "too large plain": changed(*TARGET, {"size": MAX_WEIGHTS + 1, "sha256": A}), "path plain": changed(*TARGET, {"size": 1, "sha256": "../x"}),
    "unknown role": changed(*TARGET, "role", "config"), "role as list": changed(*TARGET, "role", ["weights"]), "unknown variant": changed(*TARGET, "variant", "x"),
    "weights of no variant": changed(*TARGET, "variant", None), "graph of a variant": changed(*TARGET, "role", "graph"),
    "graph too large": changed(*TARGET, {"role": "graph", "variant": None, "size": SIZE_LIMITS["graph"] + 1, "sha256": A}),
    "more fields": changed("more", 1), "more fields of a file": changed(*FILE, "more", 1), "more fields of a target": changed(*TARGET, "more", 1),
    "less fields": changed("base", MISSING), "less fields of a file": changed(*FILE, "base", MISSING), "half a target": changed(*TARGET, "variant", MISSING),
    "no files": changed("files", []), "too many files": changed("files", MANY), "files as object": changed("files", {}), "file as number": changed("files", [1]),
    "target as text": changed(*TARGET, "weights"), "no target": changed(*TARGET, None), "list": [GOOD], "text": "header", "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_header_comes_back_as_the_same_bytes(name):
    data = packed(ACCEPTED[name])
    assert read(data).canonical() == data


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("version", VERSIONS)
def test_header_is_read_as_it_was_written(name, version):
    header = read(packed(ACCEPTED[name]))
    again = read_header(io.BytesIO(pack_header(header, version)))
    assert again == header


HASHES = bytes([2]) + bytes.fromhex(A) + bytes.fromhex(B)


def numbered(text: bytes, hashes: bytes = HASHES) -> bytes:
    """Build a header of version 2 from JSON in which numbers stand for hashes."""
    data = hashes + zstd.compress(text)
    return PREFIX.pack(MAGIC, 2, len(data)) + data


TEXT = b'{"base":"0","files":[{"base":"1","base_size":9,"target":{"sha256":"0","size":9}}],"target":"1"}'


def test_numbers_stand_for_hashes():
    assert read_header(io.BytesIO(numbered(TEXT))) == Header(A, B, [DeltaFile(PlainFile(9, A), B, 9)])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(numbered(b""), id="nothing"),
        pytest.param(numbered(TEXT.replace(b'"1"', b'"2"')), id="a hash that is not there"),
        pytest.param(numbered(TEXT.replace(b'"1"', b'"0"')), id="a hash that is not used"),
        pytest.param(numbered(TEXT, bytes([2]) + 2 * bytes.fromhex(A)), id="a hash twice"),
        pytest.param(numbered(TEXT, bytes([255])), id="hashes that are missing"),
        pytest.param(numbered(TEXT.replace(b'"0"', b'"' + A.encode() + b'"')), id="a hash in full"),
        pytest.param(numbered(TEXT.replace(b'"0"', b'"00"')), id="a number in another form"),
        pytest.param(numbered(TEXT.replace(b",", b", ")), id="another JSON"),
        pytest.param(numbered(TEXT + b" " * 70_000), id="a bomb"),
        pytest.param(PREFIX.pack(MAGIC, 2, 0), id="no byte"),
    ],
)
def test_header_of_version_2_has_one_form(data):
    with pytest.raises(DeltaError, match="header is damaged"):
        read_header(io.BytesIO(data))


@pytest.mark.parametrize("name", REFUSED)
def test_header_that_is_not_as_it_must_be_is_refused(name):
    data = packed(REFUSED[name])
    with pytest.raises(DeltaError, match="header is damaged"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 60_000,
        b'{"base":' * 7000,
        b'{"base":NaN}',
        b'{"base":1' + b"0" * 5000 + b"}",
        b"\xef\xbb\xbf" + packed(GOOD),
    ],
)
def test_bytes_that_are_no_header_are_refused(data):
    with pytest.raises(DeltaError, match="header is damaged"):
        read(data)


NO_TARGET = ("no files", "files as object", "file as number", "list", "text", "nothing")
TARGETS = {name: value["files"][0]["target"] for name, value in (ACCEPTED | REFUSED).items() if name not in NO_TARGET}


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if isinstance(target, dict) and "role" in target])
def test_file_of_a_bundle_is_what_a_manifest_may_list(name):
    """Compare with the manifest's own check: a delta must not be able to name a file that no manifest could list."""
    allowed = []
    for kind in (BundleFile, FileEntry):
        try:
            kind(**TARGETS[name])
        except (ValueError, TypeError):
            allowed.append(False)
        else:
            allowed.append(True)
    assert allowed[0] == allowed[1]


def test_header_that_the_factory_makes_is_checked_too():
    with pytest.raises(ValueError, match="size is not a whole number"):
        PlainFile(size=MAX_WEIGHTS + 1, sha256=A)
    with pytest.raises(ValueError, match="base is not a sha256"):
        DeltaFile(PlainFile(1, A), base="x", base_size=1)
    with pytest.raises(ValueError, match="1 to 17"):
        Header(A, B, [])

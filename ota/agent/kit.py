"""Read a PoC kit on a board: its documents and files, every one of them checked before it is used.

Only `kit.json` and the files that it names by their hash are opened, no links are followed, and nothing is unpacked or written.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import ota
from ota import output
from ota.agent import sampler
from ota.errors import AgentError, ManifestError, OperatorError
from ota.kit import KIT, MAX_KIT, OBJECTS, Entry, Kit
from ota.manifest import MAX_TABLE, SamplerTable, as_numbers, parse

AGAIN = "copy the kit again"
NEWER = "install the agent that lies in the kit, and measure with it"


class OpenKit:
    """A kit in a folder."""

    def __init__(self, folder: Path) -> None:
        """Read `kit.json`.

        Raises:
            OperatorError: the folder holds no kit.
            AgentError: the kit is for a newer agent.
            ManifestError: its `kit.json` is damaged.
        """
        self.folder = folder
        if folder.is_file():
            raise OperatorError(f"{output.shown(folder)} is a file; unpack the kit (`unzip`), and name its folder")
        try:
            data = _read(folder / KIT, MAX_KIT + 1)
        except OSError as error:
            raise OperatorError(
                f"{output.shown(folder)} holds no kit: cannot read its {KIT} ({error.strerror}); name the folder that `unzip` made"
            ) from error
        self.digest = hashlib.sha256(data).hexdigest()
        try:
            self.kit = parse(Kit, data, MAX_KIT)
        except AgentError as error:
            raise AgentError(
                f"{str(error).partition(';')[0]}; install the agent that lies in the kit, and measure with it"
            ) from error
        except ManifestError as error:
            raise ManifestError(f"{str(error).partition('; it is not used')[0]}; {AGAIN}") from error
        if as_numbers(self.kit.minimum_agent) > as_numbers(ota.__version__):
            raise AgentError(f"the kit needs agent {self.kit.minimum_agent}, but this is {ota.__version__}; {NEWER}")

    def entry(self, key: str) -> Entry:
        """Return a candidate of the kit."""
        return next(entry for entry in self.kit.entries if entry.key == key)

    def check(self) -> None:
        """Read all files of the candidates once.

        Raises:
            ManifestError: one is missing or damaged.
        """
        for digest in sorted(set().union(*(entry.objects for entry in self.kit.entries))):
            self._object(digest)

    def open_model(self, key: str) -> sampler.Model:
        """Load a candidate as devices load a bundle's variant.

        Raises:
            ManifestError: a file is missing or damaged.
            DeviceError: ONNX Runtime does not load it.
            MemoryError: there is not enough memory.
        """
        entry = self.entry(key)
        table = parse(SamplerTable, self._object(entry.sampler), MAX_TABLE)
        weights, end = bytearray(entry.weights_bytes), 0
        for part in entry.weights:
            piece = self._object(part.sha256)
            for _ in range(part.times):
                weights[end : end + len(piece)] = piece
                end += len(piece)
        if hashlib.sha256(weights).hexdigest() != entry.weights_sha256:
            raise ManifestError(f"the pieces of {key} do not make its weights; {AGAIN}")
        return sampler.open_model(self._object(entry.graph), weights, table)

    def _object(self, digest: str) -> bytes:
        name, size = f"{OBJECTS}/{digest}", self.kit.size(digest)
        try:
            data = _read(self.folder / OBJECTS / digest, size + 1)
        except OSError as error:
            raise ManifestError(f"the kit's file {name[:20]}… cannot be read ({error.strerror}); {AGAIN}") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise ManifestError(f"the kit's file {name[:20]}… is damaged; {AGAIN}")
        return data


def _read(path: Path, most: int) -> bytes:
    """Read the beginning of a regular file; nothing else is opened, so a pipe does not make the program wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is no regular file")
        return file.read(most)

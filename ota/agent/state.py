"""The agent's directory, its configuration, and the one state file that says what runs.

config.json      who this device is and where it looks; written once by `init`
root.json        the trust anchor, given at `init` with its hash
device.key       Ed25519 private key for reports
state.json       what runs, what ran before, what is on trial; replacing it is the only commit point
state.prev.json  the state before, for a disk that damages files
highwater.json   the newest metadata versions ever accepted, and the latest time seen
metadata/        python-tuf's cache; can be lost at any moment
slots/<sha256>/  bundles by their manifest's hash, files by their own
incoming/        downloads that are under way
queue/           reports that were not delivered yet
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from ota.agent.disk import Disk
from ota.errors import ManifestError, StateError
from ota.manifest import MAX_MANIFEST, Document, Manifest, Name, Reference, Role, Sha256, VariantName, parse

MAX_STATE = 256 * 1024
TRIAL_GOOD = 3  # inferences that must go well before a bundle is trusted
TRIAL_LOADS = 6  # times a bundle on trial may be loaded before it counts as failed


class Config(Document):
    """Who this device is and where it looks."""

    schema_version: int = 1
    device: Name
    line: Name
    device_class: Name
    repository: str = Field(max_length=500, description="http(s) address or folder")
    root_sha256: Sha256
    reports: str = Field(default="", max_length=500, description="folder in which reports are left; empty: nowhere")
    window: str = Field(default="", max_length=11, description="hours of UTC in which it may switch, as 22:00-05:00; empty: any")


class Trial(Document):
    """A bundle that runs but is not trusted yet."""

    left: int = Field(ge=0, description="good inferences still needed")
    loads: int = Field(ge=0, description="times it may still be loaded")


class State(Document):
    """What runs."""

    schema_version: int = 1
    active: Sha256 | None = None
    previous: Sha256 | None = None
    seq: int = Field(default=0, ge=0, description="release number of the active bundle")
    previous_seq: int = Field(default=0, ge=0)
    trial: Trial | None = None
    refused: dict[str, str] = Field(default_factory=dict, description="bundle → why this device will not have it")


class HighWater(Document):
    """What must never go back: metadata versions by role, and time."""

    versions: dict[str, int] = Field(default_factory=dict)
    time: int = 0


class Home:
    """An agent's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disk = Disk(root)

    def config(self) -> Config:
        """The configuration.

        Raises:
            StateError: the directory was never initialised, or is damaged.
        """
        try:
            return parse(Config, (self.root / "config.json").read_bytes(), MAX_STATE)
        except FileNotFoundError as error:
            raise StateError(f"{self.root} is not an agent's directory; make it one with `ferry-agent init`") from error
        except (OSError, ManifestError) as error:
            raise StateError(f"{self.root / 'config.json'} is damaged; run `ferry-agent init` again") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against a second agent.

        Raises:
            StateError: another agent holds it.
        """
        self.config()
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StateError(f"another agent is at work in {self.root}; wait for it to finish") from error
            yield
        finally:
            os.close(descriptor)

    def root_bytes(self) -> bytes:
        """The trust anchor.

        Raises:
            StateError: it is missing or is not the one given at `init`.
        """
        try:
            data = (self.root / "root.json").read_bytes()
        except OSError as error:
            raise StateError(f"{self.root / 'root.json'} cannot be read; run `ferry-agent init` again") from error
        if hashlib.sha256(data).hexdigest() != self.config().root_sha256:
            raise StateError(f"{self.root / 'root.json'} is not the root given at init; run `ferry-agent init` again")
        return data

    # The state file

    def load(self) -> State:
        """The state: from `state.json`, or where that is damaged the one before; a new device has an empty one.

        Raises:
            StateError: both copies are damaged.
        """
        found = [self._read(name) for name in ("state.json", "state.prev.json")]
        for state in found:
            if state:
                return state
        if (self.root / "state.json").exists() or (self.root / "state.prev.json").exists():
            raise StateError(f"both state files in {self.root} are damaged; run `ferry-agent update` after removing them")
        return State()

    def _read(self, name: str) -> State | None:
        try:
            envelope = json.loads((self.root / name).read_bytes()[:MAX_STATE])
            state = parse(State, json.dumps(envelope["state"]).encode(), MAX_STATE)
            return state if envelope["sha256"] == state.digest else None
        except (OSError, ValueError, KeyError, TypeError, ManifestError):
            return None

    def save(self, state: State) -> None:
        """Commit a state; durable on return."""
        current = self._read("state.json")
        if current == state:
            return
        if current:  # a damaged state.json must not replace the good copy
            self.disk.replace("state.prev.json", _enveloped(current))
        self.disk.replace("state.json", _enveloped(state))

    def high_water(self) -> HighWater:
        """The marks.

        Raises:
            StateError: they are damaged; updates stop rather than forget what was newest.
        """
        try:
            return parse(HighWater, (self.root / "highwater.json").read_bytes(), MAX_STATE)
        except FileNotFoundError:
            return HighWater()
        except (OSError, ManifestError) as error:
            raise StateError(f"{self.root / 'highwater.json'} is damaged; restore it, or set the device up anew") from error

    def raise_high_water(self, marks: HighWater) -> None:
        """Set the marks; durable on return."""
        if marks != self.high_water():
            self.disk.replace("highwater.json", marks.canonical())

    # Slots

    def slot(self, digest: str) -> Slot:
        """The slot of a bundle.

        Raises:
            StateError: it is not there, or its manifest is damaged.
        """
        return Slot(self.root / "slots" / digest, digest)

    def collect_garbage(self) -> list[str]:
        """Remove slots that no state names and downloads that nobody needs; returns what was removed."""
        named: set[str | None] = set()
        for state in (self._read("state.json"), self._read("state.prev.json")):
            if state:
                named |= {state.active, state.previous}
        removed = []
        for folder in ("slots", "incoming"):
            for path in sorted((self.root / folder).glob("*")):
                if path.name not in named:
                    self.disk.remove(f"{folder}/{path.name}")
                    removed.append(path.name)
        return removed


class Slot:
    """An installed bundle."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest
        try:
            data = (folder / "manifest.json").read_bytes()
        except OSError as error:
            raise StateError(f"bundle {digest[:12]} is not in {folder.parent}; run `ferry-agent update`") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StateError(f"the manifest in {folder} is damaged; run `ferry-agent update`")
        try:
            self.manifest = parse(Manifest, data, MAX_MANIFEST)
        except ManifestError as error:
            raise StateError(f"the manifest in {folder} cannot be read; run `ferry-agent update`") from error

    def path(self, role: Role, variant: VariantName | None = None) -> Path:
        """Where the file of a role lies."""
        return self.folder / self.manifest.entry(role, variant).sha256

    def reference(self, variant: VariantName) -> Reference:
        """What the bundle looked like in the factory."""
        return parse(Reference, self.path("reference", variant).read_bytes(), MAX_STATE)


def _enveloped(state: State) -> bytes:
    return json.dumps({"sha256": state.digest, "state": state.model_dump(mode="json")}, indent=1).encode()

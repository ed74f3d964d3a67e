"""The agent's directory, its configuration, and the one state file that says what runs.

config.json      who this device is and where it looks; written once by `init`
root.json        the trust anchor, given at `init` with its hash
device.key       Ed25519 private key for reports
state.json       what runs, what ran before, what is on trial; replacing it is the only commit point
state.prev.json  the state before, for a disk that damages files
resting.json     how long the bundle rests whose trying gave no answer; may be lost
highwater.json   the newest metadata versions ever accepted, under which keys, and the latest time seen
metadata/        python-tuf's cache; can be lost at any moment
slots/<sha256>/  bundles by their manifest's hash, files by their own
incoming/        downloads that are under way
queue/           reports that were not delivered yet
undelivered.txt  why, when it was last tried; may be lost
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ota.agent.disk import Disk
from ota.errors import BaseError, BusyError, ManifestError, OperatorError, StateError
from ota.manifest import MAX_MANIFEST, MAX_TABLE, Document, Manifest, Name, Reference, Role, Sha256, VariantName, parse

MAX_STATE = 1024 * 1024  # bytes; above what MAX_REFUSED reasons can take, each character of which may be twelve
WINDOW = r"^(([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9])?$"
TRIAL_GOOD = 3  # inferences that must go well before a bundle is trusted
TRIAL_LOADS = 6  # times a bundle on trial may be loaded before it counts as failed
MAX_REFUSED = 64  # bundles that are remembered as refused; the newest are kept
SETTLED = (".", "slots", "incoming")  # whose names must be durable before anything is built on them
LOCK_PAUSE = 0.1  # seconds between two looks at a lock that is waited for


def _one_line(text: str) -> str:
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise ValueError("it holds a control character; type it anew")
    return text


Place = Annotated[str, Field(max_length=500), AfterValidator(_one_line)]
"""An address or a folder: no control characters, which would end a header or a line of a log, or that no file can have."""


class Config(Document):
    """Who this device is and where it looks."""

    schema_version: int = 1
    device: Name
    line: Name
    device_class: Name
    repository: Place = Field(description="http(s) address or folder")
    root_sha256: Sha256
    reports: Place = Field(default="", description="folder in which reports are left; empty: nowhere")
    window: str = Field(default="", pattern=WINDOW, description="hours of UTC in which it may switch, as 22:00-05:00; empty: any")
    prefer: Literal["default", "quality", "latency", "energy"] = Field(default="default", description="see `variants.chain`")
    latency_ms: float | None = Field(default=None, gt=0, le=1e6, description="budget for one image")
    joules: float | None = Field(default=None, gt=0, le=1e6, description="budget for one image")
    safe: VariantName | None = Field(default=None, description="variant for when routes have strayed; None: the cheapest")
    idle_watts: float | None = Field(
        default=None, ge=0, le=1e4, description="what the device takes at rest, for want of a sensor"
    )
    core_watts: float | None = Field(
        default=None, gt=0, le=1e4, description="what a busy core takes besides, for want of a sensor"
    )


class Trial(Document):
    """A bundle that runs but is not trusted yet."""

    left: int = Field(ge=0, description="good inferences still needed")
    loads: int = Field(ge=0, description="times it may still be loaded")


class State(Document):
    """What runs."""

    schema_version: int = 1
    active: Sha256 | None = None
    previous: Sha256 | None = None
    seq: int = Field(default=0, ge=0, description="release number of the active bundle; 0: no key that is trusted names it")
    previous_seq: int = Field(default=0, ge=0)
    trial: Trial | None = None
    refused: dict[str, str] = Field(default_factory=dict, description="bundle → why this device will not have it")
    tries: dict[str, int] = Field(default_factory=dict, description="bundle → times its trying began and gave no answer")

    def refusing(self, digest: str, why: str) -> dict[str, str]:
        """`refused` with one more, and bounded: the oldest is forgotten, and would be tried again if it were offered again."""
        others = [(known, reason) for known, reason in self.refused.items() if known != digest]
        return dict([*others, (digest, why[:500])][-MAX_REFUSED:])


class Rest(Document):
    """A bundle whose trying gave no answer; it is tried again after a while."""

    bundle: Sha256
    tries: int = Field(ge=0, description="how many had given none")
    until: int = Field(ge=0, le=2**35, description="seconds since 1970")


class HighWater(Document):
    """What must never go back: metadata versions by role, and time; `rules.binding` says which of them still hold."""

    versions: dict[str, int] = Field(default_factory=dict)
    keys: dict[str, list[str]] = Field(default_factory=dict, description="ids of the keys that a role's mark was made under")
    root: Sha256 | None = Field(default=None, description="of what is signed in the newest root")
    time: int = 0


class OwnerError(StateError):
    """Refuse a directory that belongs to another user."""

    def __init__(self, message: str, owner: str) -> None:
        """Take the sentence, and whom the directory belongs to."""
        super().__init__(message)
        self.owner = owner


class Home:
    """An agent's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disk = Disk(root)

    def config(self) -> Config:
        """The configuration.

        Raises:
            StateError: the directory was never initialised, or is damaged, or is another user's who lets nobody read it.
        """
        try:
            data = self.disk.read("config.json")
        except StateError:
            self.check_owner()  # which says more
            raise
        if data is None:
            raise StateError(f"{self.root} is not an agent's directory; make it one with `ferry-agent init`")
        try:
            return parse(Config, data, MAX_STATE)
        except ManifestError as error:
            raise StateError(f"{self.root / 'config.json'} is damaged; run `ferry-agent init` again") from error

    def check_same(self, config: Config) -> None:
        """Refuse to make another device of this directory: what is installed, seen and refused here would not hold for it.

        Raises:
            OperatorError: it is set up for another root, line or class.
        """
        if self.disk.read("config.json") is None:
            return
        old = self.config()
        for what, before, now in (
            ("root", old.root_sha256, config.root_sha256),
            ("line", old.line, config.line),
            ("class", old.device_class, config.device_class),
        ):
            if before != now:
                raise OperatorError(f"{self.root} is set up for {what} {before}; use another folder, or remove this one first")

    def check_owner(self) -> None:
        """Refuse to write in another user's directory: its owner could not read what root left there, and would neither draw nor update.

        Raises:
            OwnerError: it is another user's.
            StateError: there is a file in its place.
        """
        try:
            found = self.root.stat()
        except FileNotFoundError:  # it is made by `init`
            return
        except NotADirectoryError:
            found = None
        except OSError as error:
            raise StateError(f"cannot look at {self.root}: {error.strerror}; run the agent as its owner") from error
        if found is None or not stat.S_ISDIR(found.st_mode):
            raise StateError(f"{self.root} is not a folder; give the agent's directory with --dir")
        if found.st_uid != os.geteuid():
            name = _user(found.st_uid)
            raise OwnerError(f"{self.root} belongs to {name}, and this is {_user(os.geteuid())}; run the agent as {name}", name)

    @contextmanager
    def locked(self, wait: float = 0) -> Iterator[None]:
        """Hold the directory against a second agent; waits for it for at most so many seconds.

        Raises:
            BusyError: another agent holds it.
            StateError: the lock file cannot be opened, or another user owns the directory.
        """
        self.check_owner()
        self.config()
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"cannot open {self.root / 'lock'}: {error.strerror}; run the agent as its owner") from error
        try:
            self._lock(descriptor, time.monotonic() + wait)
            self._settle()
            yield
        finally:
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # closing is not enough: a process that another thread starts just now has a copy
            os.close(descriptor)

    def _settle(self) -> None:
        """Finish what a killed process may have left between a rename and its sync; files were synced before their rename."""
        for name in (*SETTLED, "queue"):  # a report that a cut takes from the queue was promised to nobody yet
            self.disk.tidy(name)
        for name in SETTLED:
            if self.disk.path(name).is_dir():
                self.disk.sync_folder(name)

    def _lock(self, descriptor: int, until: float) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() >= until:
                    raise BusyError(f"another agent is at work in {self.root}; wait for it to finish") from error
                time.sleep(LOCK_PAUSE)
            else:
                return

    def root_bytes(self) -> bytes:
        """The trust anchor.

        Raises:
            StateError: it is missing or is not the one given at `init`.
        """
        data = self.disk.read("root.json")
        if data is None:
            raise StateError(f"{self.root / 'root.json'} is missing; run `ferry-agent init` again")
        if hashlib.sha256(data).hexdigest() != self.config().root_sha256:
            raise StateError(f"{self.root / 'root.json'} is not the root given at init; run `ferry-agent init` again")
        return data

    # The state file

    def load(self) -> State:
        """The state: from `state.json`, or where that is damaged the one before; a new device has an empty one.

        Raises:
            StateError: both copies are damaged, or may not be read.
        """
        found = [self.disk.read(name) for name in ("state.json", "state.prev.json")]
        for data in found:
            if state := opened(data):
                return state
        if found != [None, None]:
            raise StateError(f"both state files in {self.root} are damaged; run `ferry-agent update` after removing them")
        return State()

    def save(self, state: State) -> None:
        """Commit a state; durable on return.

        Raises:
            StateError: it would be too large to be read again; nothing was changed.
        """
        current = opened(self.disk.read("state.json"))
        if current == state:
            return
        if len(_enveloped(state)) > MAX_STATE:
            raise StateError(f"the state of {self.root} would have more than {MAX_STATE} bytes; report it, what runs is kept")
        if current:  # a damaged state.json must not replace the good copy
            # Its name becomes durable together with the next; until then the copy of one state earlier does as well.
            self.disk.replace("state.prev.json", _enveloped(current), durable=False)
        self.disk.replace("state.json", _enveloped(state))

    def high_water(self) -> HighWater:
        """The marks.

        Raises:
            StateError: they are damaged; updates stop rather than forget what was newest.
        """
        data = self.disk.read("highwater.json")
        if data is None:
            return HighWater()
        try:
            return parse(HighWater, data, MAX_STATE)
        except ManifestError as error:
            raise StateError(f"{self.root / 'highwater.json'} is damaged; restore it, or set the device up anew") from error

    def rest(self) -> Rest | None:
        """The bundle that rests, if one does; a file that is lost, damaged or unreadable stands for none."""
        try:
            return parse(Rest, self.disk.read("resting.json") or b"", MAX_STATE)
        except (ManifestError, StateError):
            return None

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

    def collect_garbage(self, wanted: Collection[str] = ()) -> list[str]:
        """Remove slots that no state names, and downloads; returns what was removed.

        Args:
            wanted: slots and downloads to keep besides, by hash.
        """
        state, before = self.load(), opened(self.disk.read("state.prev.json")) or State()
        gone = {*state.refused, *state.tries} - {state.active, state.previous}
        if gone & {before.active, before.previous}:  # it goes, so the copy may not name it any more
            self.disk.replace("state.prev.json", _enveloped(state))
            before = state
        named = {state.active, state.previous, before.active, before.previous, *wanted}
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

    def read(self, role: Role, variant: VariantName | None = None) -> bytes:
        """The bytes of a role's file.

        Raises:
            BaseError: the file is missing, or is not the one that was installed.
        """
        entry = self.manifest.entry(role, variant)
        try:
            data = (self.folder / entry.sha256).read_bytes()
        except OSError as error:
            raise BaseError(f"the {role} file of bundle {self.digest[:12]} is lost; run `ferry-agent update`") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BaseError(f"the {role} file of bundle {self.digest[:12]} is damaged; run `ferry-agent update`")
        return data

    def reference(self, variant: VariantName) -> Reference:
        """What the bundle looked like in the factory."""
        return parse(Reference, self.read("reference", variant), MAX_TABLE)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"#{number}"  # as sudo takes it


def opened(data: bytes | None) -> State | None:
    """The state in a state file's content; None where that is missing or invalid."""
    try:
        envelope = json.loads((data or b"")[:MAX_STATE])
        state = parse(State, json.dumps(envelope["state"]).encode(), MAX_STATE)
        return state if envelope["sha256"] == state.digest else None
    except (ValueError, KeyError, TypeError, RecursionError, ManifestError):
        return None


def _enveloped(state: State) -> bytes:
    return json.dumps({"sha256": state.digest, "state": state.model_dump(mode="json")}, indent=1).encode()

"""The agent's directory, its configuration, and the one state file that says what runs.

config.json      who this device is and where it looks for updates; written by `init`
root.json        the trust anchor, given at `init` with its hash
device.key       Ed25519 private key that signs reports
number           number of the newest report
agent            version of the agent that the newest report names; may be lost
state.json       what runs, what ran before, what is on trial; replacing this file is the only commit point
state.prev.json  the state before, in case the disk damages state.json
resting.json     until when a bundle waits whose trials gave no result; may be lost
heartbeat        seconds between two heartbeats, as the newest policy says; may be lost
let-in.json      when a policy first let this device in; may be lost
passed.json      a bundle that passed its trial and waits for the factory's acknowledgement; may be lost
measured.json    what the variants cost, from `ferry-agent bench`; may be lost
highwater.json   the newest metadata versions ever accepted, their keys, and the latest time that was signed
metadata/        python-tuf's cache; may be lost at any moment
slots/<sha256>/  installed bundles, named by the hash of their manifest; their files, named by their own hash
incoming/        downloads in progress
queue/           reports that are not delivered yet
starting.json    what became of the newest report that a trial began
gateway.json     what the factory's gateway said last; may be lost
dropped          number of reports that the full queue dropped
beat.json        when the next heartbeat is due; may be lost
counts.json      what was counted of the images that were drawn; may be lost
counting         locked while a process writes counts.json
history.json     what happened on this device, for people; may be lost
undelivered.txt  why the last delivery of reports failed; may be lost
lock             held while an agent changes the directory
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
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from ota import overlay
from ota.agent import window as hours
from ota.agent.disk import Disk
from ota.errors import BaseError, BusyError, ManifestError, OperatorError, StateError
from ota.manifest import (
    MAX_COUNT,
    MAX_MANIFEST,
    MAX_TABLE,
    MOST_TAGS,
    Document,
    FileEntry,
    Manifest,
    Name,
    Reference,
    Role,
    Sha256,
    Tag,
    VariantName,
    parse,
)

MAX_STATE = 1024 * 1024  # bytes; more than MAX_REFUSED reasons take, even if each of their characters takes twelve
TRIAL_GOOD = 3  # inferences that must succeed before a bundle is trusted
TRIAL_LOADS = 6  # times that a bundle on trial may be loaded before it is rolled back
MAX_REFUSED = 64  # refused bundles that are remembered; the newest are kept
SETTLED = (".", "slots", "incoming")  # folders whose entries must be durable before anything relies on them
CERTIFICATES = r"^(-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n)*$"
MAX_AUTHORITIES = 512 * 1024  # characters of PEM certificates, twice what all public authorities together take
LOCK_PAUSE = 0.1  # seconds between two attempts to take the lock


def _one_line(text: str) -> str:
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise ValueError("it holds a control character; type it again")
    return text


Place = Annotated[str, Field(max_length=500), AfterValidator(_one_line)]
"""An address or folder without control characters; they could end a header or a log line, or cannot be in a file name."""


class Config(Document):
    """Who this device is and where it looks for updates."""

    schema_version: int = 1
    device: Name
    line: Name
    device_class: Name
    repository: Place = Field(description="http(s) address or folder; a name, a password and a query in it are never shown")
    root_sha256: Sha256
    authorities: str = Field(
        default="",
        pattern=CERTIFICATES,
        max_length=MAX_AUTHORITIES,
        description="PEM certificates that the repository's must lead to; empty: the system's",
    )
    reports: Place = Field(
        default="", description="folder in which reports are left, or a gateway's https address; empty: nowhere"
    )
    tags: list[Tag] = Field(
        default=[], max_length=MOST_TAGS, description="names and values by which an operator groups devices, such as site=berlin"
    )
    share: Literal["all", "minimal"] = Field(
        default="all", description="minimal: heartbeats tell nothing of what the images look like or are of"
    )
    window: str = Field(
        default="",
        pattern=hours.FORM,
        description="hours in which the agent may switch, in UTC or a time zone, such as 22:00-05:00 Europe/Berlin; empty: any",
    )
    prefer: Literal["default", "quality", "latency", "energy"] = Field(default="default", description="see `variants.chain`")
    latency_ms: float | None = Field(default=None, gt=0, le=1e6, description="budget for one image")
    joules: float | None = Field(default=None, gt=0, le=1e6, description="budget for one image")
    safe: VariantName | None = Field(default=None, description="variant to use after a routing shift; None: the cheapest")
    idle_watts: float | None = Field(
        default=None, ge=0, le=1e4, description="power of the device at rest, in watts, if it has no sensor"
    )
    core_watts: float | None = Field(
        default=None, gt=0, le=1e4, description="power that a busy core adds, in watts, if the device has no sensor"
    )

    @model_serializer(mode="wrap")
    def _as_in_older_agents(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what agents before 0.3 do not know where it has its default, so that they read the file."""
        said: dict[str, Any] = handler(self)
        return {name: value for name, value in said.items() if (name, value) not in (("tags", []), ("share", "all"))}


class Trial(Document):
    """A bundle that runs but is not trusted yet."""

    left: int = Field(ge=0, description="good inferences still needed")
    loads: int = Field(ge=0, description="times it may still be loaded")


class State(Document):
    """What runs, what ran before, what is on trial, and what is refused."""

    schema_version: int = 1
    active: Sha256 | None = None
    previous: Sha256 | None = None
    seq: int = Field(default=0, ge=0, description="release number of the active bundle; 0: no key that is trusted names it")
    previous_seq: int = Field(default=0, ge=0)
    trial: Trial | None = None
    refused: dict[str, str] = Field(default_factory=dict, description="bundle → why this device refused it")
    tries: dict[str, int] = Field(default_factory=dict, description="bundle → times its trial started and never finished")

    def refusing(self, digest: str, why: str) -> dict[str, str]:
        """Return `refused` with one more bundle; beyond `MAX_REFUSED` the oldest is dropped.

        A dropped bundle is tried again if it is offered again.
        """
        others = [(known, reason) for known, reason in self.refused.items() if known != digest]
        return dict([*others, (digest, why[:500])][-MAX_REFUSED:])


class Rest(Document):
    """A bundle that waits, because its trials gave no result; it is tried again later."""

    bundle: Sha256
    tries: int = Field(ge=0, description="number of trials that gave no result")
    until: int = Field(ge=0, le=2**35, description="seconds since 1970")


class LetIn(Document):
    """When a policy first let this device in."""

    bundle: Sha256
    at: int = Field(ge=0, le=MAX_COUNT, description="seconds since 1970")


class HighWater(Document):
    """What must never go back: metadata versions by role, the numbers of policy 2, and time; `rules.binding` says which still bind."""

    versions: dict[str, int] = Field(default_factory=dict)
    keys: dict[str, list[str]] = Field(
        default_factory=dict, description="ids of the keys that signed a role when its version was noted"
    )
    root: Sha256 | None = Field(default=None, description="hash of the signed part of the newest root")
    signed: int = Field(
        default=0, description="when the newest timestamp was signed; it binds as the version of the timestamp does"
    )
    time: int = Field(
        default=0, description="latest time on the clock of an agent of before; not used, because a clock may be wrong"
    )


class OwnerError(StateError):
    """The agent's directory belongs to another user."""

    def __init__(self, message: str, owner: str) -> None:
        """Take the message, and the name of the directory's owner."""
        super().__init__(message)
        self.owner = owner


class Home:
    """An agent's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disk = Disk(root)

    def config(self) -> Config:
        """Read the configuration.

        Raises:
            StateError: the directory was never initialised, or config.json is damaged, or this user may not read it.
        """
        try:
            data = self.disk.read("config.json")
        except StateError:
            self.check_owner()  # its error says more
            raise
        if data is None:
            raise StateError(f"{self.root} is not an agent's directory; make it one with `ferry-agent init`")
        try:
            return parse(Config, data, MAX_STATE)
        except ManifestError as error:
            raise StateError(f"{self.root / 'config.json'} is damaged; run `ferry-agent init` again") from error

    def check_same(self, config: Config, new_key: bool = False) -> None:
        """Refuse to set this directory up for another root, line or class: what is installed and refused would not fit.

        Args:
            config: the new configuration.
            new_key: whether a new key is made, without which another device would report with this one's.

        Raises:
            OperatorError: the directory is set up for another root, line or class, or for another device whose key it holds.
        """
        if self.disk.read("config.json") is None:
            return
        old = self.config()
        if old.device != config.device and not new_key:
            raise OperatorError(
                f"{self.root} is set up for device {old.device} and holds its key; add --new-key if this is a copy that becomes {config.device}, or "
                "use another folder"
            )
        for what, before, now in (
            ("root", old.root_sha256, config.root_sha256),
            ("line", old.line, config.line),
            ("class", old.device_class, config.device_class),
        ):
            if before != now:
                raise OperatorError(f"{self.root} is set up for {what} {before}; use another folder, or remove this one first")

    def check_owner(self) -> None:
        """Refuse to write in another user's directory.

        Its owner could not read what another user, such as root, left there, and could then neither draw nor update.

        Raises:
            OwnerError: the directory belongs to another user.
            StateError: there is a file in its place, or this user may not look at it.
        """
        try:
            found = self.root.stat()
        except FileNotFoundError:  # `init` makes it
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
        """Lock the directory against a second agent; wait for the lock for at most `wait` seconds.

        Raises:
            BusyError: another agent holds the lock.
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
            # Closing is not enough: a process that another thread is just starting has a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _settle(self) -> None:
        """Remove unfinished files, and sync the folders: a killed process may have stopped between a rename and its sync.

        Files need no sync here: they are synced before their rename.
        """
        for name in (*SETTLED, "queue"):  # the queue is not synced: nobody relies on a report that a power cut removes
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
        """Read the trust anchor, root.json.

        Raises:
            StateError: root.json is missing, or is not the one given at `init`.
        """
        data = self.disk.read("root.json")
        if data is None:
            raise StateError(f"{self.root / 'root.json'} is missing; run `ferry-agent init` again")
        if hashlib.sha256(data).hexdigest() != self.config().root_sha256:
            raise StateError(f"{self.root / 'root.json'} is not the root given at init; run `ferry-agent init` again")
        return data

    # The state file

    def load(self) -> State:
        """Load the state from `state.json` or, if that is damaged, the state before; a new device has an empty state.

        Raises:
            StateError: both files are damaged, or one may not be read.
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
            StateError: the state is too large to be read again; nothing was changed.
        """
        current = opened(self.disk.read("state.json"))
        if current == state:
            return
        if len(_enveloped(state)) > MAX_STATE:
            raise StateError(
                f"the state of {self.root} would have more than {MAX_STATE} bytes; report this; the running model is kept"
            )
        if current:  # a damaged state.json must not replace the good copy
            # Its name becomes durable together with the next one. Until then, the state before that serves as well.
            self.disk.replace("state.prev.json", _enveloped(current), durable=False)
        self.disk.replace("state.json", _enveloped(state))

    def high_water(self) -> HighWater:
        """Read the high-water marks.

        Raises:
            StateError: the file is damaged. Updates then stop, because the newest versions must not be forgotten.
        """
        data = self.disk.read("highwater.json")
        if data is None:
            return HighWater()
        try:
            return parse(HighWater, data, MAX_STATE)
        except ManifestError as error:
            raise StateError(f"{self.root / 'highwater.json'} is damaged; restore it, or set the device up again") from error

    def rest(self) -> Rest | None:
        """Return the bundle that waits, if any; a lost, damaged or unreadable file means that none does."""
        try:
            return parse(Rest, self.disk.read("resting.json") or b"", MAX_STATE)
        except (ManifestError, StateError):
            return None

    def raise_high_water(self, marks: HighWater) -> None:
        """Store the high-water marks; durable on return."""
        if marks != self.high_water():
            self.disk.replace("highwater.json", marks.canonical())

    # Slots

    def slot(self, digest: str) -> Slot:
        """Open the slot of a bundle.

        Raises:
            StateError: the slot does not exist, or its manifest is damaged.
        """
        return Slot(self.root / "slots" / digest, digest)

    def collect_garbage(self, wanted: Collection[str] = ()) -> list[str]:
        """Remove downloads, and the slots that no state names; return the names of what was removed.

        Args:
            wanted: hashes of slots and downloads to keep as well.
        """
        state, before = self.load(), opened(self.disk.read("state.prev.json")) or State()
        gone = {*state.refused, *state.tries} - {state.active, state.previous}
        if gone & {before.active, before.previous}:  # its slot is removed, so the copy must no longer name it
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
        """Return the path of a role's file."""
        return self.folder / self.manifest.entry(role, variant).sha256

    def read(self, role: Role, variant: VariantName | None = None) -> bytes:
        """Read a role's file and check its hash; weights that the bundle holds as an overlay are composed.

        Raises:
            BaseError: a file is missing, or is not the one that was installed.
            ManifestError: the overlay does not make the weights that the manifest lists, which is the bundle's fault.
        """
        if role == "weights" and variant and (thin := self.manifest.overlay(variant)):
            return self._composed(thin)
        return self._checked(self.manifest.entry(role, variant))

    def _checked(self, entry: FileEntry) -> bytes:
        try:
            data = (self.folder / entry.sha256).read_bytes()
        except OSError as error:
            raise BaseError(f"the {entry.role} file of bundle {self.digest[:12]} is lost; run `ferry-agent update`") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BaseError(f"the {entry.role} file of bundle {self.digest[:12]} is damaged; run `ferry-agent update`")
        return data

    def _composed(self, thin: FileEntry) -> bytes:
        """Make weights from an overlay and its base. Both are as the manifest lists them, so what does not fit is not the device's fault."""
        made = overlay.compose(self._checked(self.manifest.entry("weights", thin.base)), self._checked(thin))
        if hashlib.sha256(made).hexdigest() != thin.weights:
            raise ManifestError(f"the overlay of {thin.variant} does not make the weights that are signed; publish a new release")
        return made

    def reference(self, variant: VariantName) -> Reference:
        """Read the reference of a variant: what it looked like at the factory."""
        return parse(Reference, self.read("reference", variant), MAX_TABLE)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"#{number}"  # the form that sudo accepts


def opened(data: bytes | None) -> State | None:
    """Parse the content of a state file; return None if it is missing or invalid."""
    try:
        envelope = json.loads((data or b"")[:MAX_STATE])
        state = parse(State, json.dumps(envelope["state"]).encode(), MAX_STATE)
        return state if envelope["sha256"] == state.digest else None
    except (ValueError, KeyError, TypeError, RecursionError, ManifestError):
        return None


def _enveloped(state: State) -> bytes:
    return json.dumps({"sha256": state.digest, "state": state.model_dump(mode="json")}, indent=1).encode()

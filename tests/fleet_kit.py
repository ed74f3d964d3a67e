"""Helpers for the tests of releases and agents: a published repository, devices that use it, and a web server with faults.

A test module that uses the fixtures names this module in `pytest_plugins`. It also imports from this module, which happens
before pytest could rewrite the assertions here; the next word tells pytest not to warn about that: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from tuf.api.metadata import Metadata, Targets

from model.export import Export
from ota import packed
from ota.agent import slots, updater
from ota.agent.plan import OnStep
from ota.agent.state import Home, State
from ota.manifest import Manifest
from ota.policy import Policy, Policy2
from ota.release import rollout
from ota.release.bundle import Bundle, make_delta
from ota.release.chains import NEWEST
from ota.release.keys import KeyRing
from ota.release.repository import Release, Repository, delta_path, policy_path
from ota.report import DeviceReport, open_line
from tests.conftest import agent, bundle_of

LINE, CLASS = "shapes", "edge"
LEDGER = "e" * 64


# The factory's side


def publish(repository: Repository, bundle: Bundle, delta: Path | None = None, base: Bundle | None = None) -> Release:
    """Publish a bundle, with a delta from `base` if there is one, and open it to every device."""
    deltas = [(base.manifest.digest, delta)] if base and delta else []
    release = repository.publish_release(bundle.manifest, bundle.folder, LEDGER, deltas)
    repository.set_policy(everyone(release))
    return release


def releases(repository: Repository, row: Sequence[Bundle], steps: Sequence[Path]) -> None:
    """Publish bundles after the first one, each with the single step to it, and open the last one to every device."""
    for before, bundle, step in zip(row, row[1:], steps, strict=False):
        made = repository.publish_release(bundle.manifest, bundle.folder, LEDGER, [(before.manifest.digest, step)])
    repository.set_policy(everyone(made))


def everyone(release: Release, **fields: Any) -> Policy:
    """Return the policy that opens a release to all devices at once."""
    return rollout.start(release, (100,), soak=0, now=0).model_copy(update=fields)


def change_role(repository: Repository, role: str, change: Callable[[Any], None]) -> None:
    """Change a role's metadata at will, as the holder of the role's keys can; snapshot and timestamp follow."""
    repository.commit({role: change})


def name_policy(repository: Repository, policy: Policy | Policy2) -> None:
    """Sign any policy, past the checks of `set_policy`, as the holder of the rollout keys can."""
    target = repository._add_target(policy_path(LINE, CLASS, policy.schema_version), policy.canonical(), {})

    def change(signed: Targets) -> None:
        signed.targets[target.path] = target

    change_role(repository, "rollout", change)


def name_manifest(repository: Repository, manifest: Manifest, seq: int, **custom: Any) -> None:
    """Sign any manifest for this line and class, as the holder of the models keys can."""
    path = f"models/{LINE}/{CLASS}/{manifest.digest}.json"
    target = repository._add_target(path, manifest.canonical(), {"seq": seq} | custom)

    def change(signed: Targets) -> None:
        signed.targets[path] = target

    change_role(repository, "models", change)


def name_delta(repository: Repository, base: str, target: str, data: bytes, form: int = 1) -> Path:
    """Sign any bytes as the delta between two bundles, as the holder of the deltas keys can, and return their file."""
    made = repository._add_target(delta_path(LINE, CLASS, base, target, form), data, {})

    def change(signed: Targets) -> None:
        signed.targets[made.path] = made

    change_role(repository, "deltas", change)
    return repository._target_file(made.path, made)


def sign_in_place(path: Path, keys: KeyRing, role: str, change: Callable[[Any], None]) -> None:
    """Change one metadata file and sign it again with the role's keys; leave all other files but its packed one as they are."""
    metadata: Metadata[Any] = Metadata.from_file(str(path))
    change(metadata.signed)
    metadata.signatures.clear()
    for signer in keys.signers(role):
        metadata.sign(signer, append=True)
    path.write_bytes(metadata.to_bytes())
    path.with_name(path.name + packed.SUFFIX).unlink(missing_ok=True)


def expire(signed: Any) -> None:
    """Set the expiry of metadata to yesterday."""
    signed.expires = (datetime.now(UTC) - timedelta(days=1)).replace(microsecond=0)


def metadata_file(repository: Repository, role: str) -> Path:
    """Return the file of a role that devices fetch now."""
    if role == "timestamp":
        return repository.metadata / "timestamp.json"
    if role == "snapshot":
        return repository.metadata / f"{repository._snapshot_version()}.snapshot.json"
    return repository.metadata / f"{repository._versions()[role]}.{role}.json"


# The device's side


class Cut(BaseException):
    """A simulated power cut: the process ends here."""


class Device:
    """An agent's directory, and methods that run the agent on it in this process."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, Home(root)

    @classmethod
    def init(cls, root: Path, repository: Repository, *, address: str = "", name: str = "dev-1", window: str = "") -> Device:
        """Set a device up for a repository's folder, or for the address at which the folder is served."""
        (root.parent / "root.json").write_bytes(repository.root_bytes())
        (root.parent / "reports").mkdir(exist_ok=True)
        device = cls(root)
        device.command(
            "init", "--device", name, "--line", LINE, "--class", CLASS, "--window", window,
            "--repository", address or str(repository.folder), "--reports", str(root.parent / "reports"),
            "--root", str(root.parent / "root.json"), "--root-sha256", hashlib.sha256(repository.root_bytes()).hexdigest(),
        )  # fmt: skip
        return device

    def command(self, *words: str, code: int = 0) -> str:
        """Run a command of `ferry-agent` in this process and return all that it printed."""
        result = agent(*words, "--dir", str(self.root))
        assert result.exit_code == code, result.output
        return result.output

    def words(self, *words: str) -> list[str]:
        """Return the command line that runs `ferry-agent` in a process of its own."""
        return [sys.executable, "-m", "ota.agent.cli", *words, "--dir", str(self.root)]

    def process(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `ferry-agent` as a process of its own."""
        return subprocess.run(self.words(*words), capture_output=True, text=True)

    def update(self, on_step: OnStep | None = None, check_only: bool = False) -> updater.Outcome:
        with self.home.locked():
            return updater.update(self.home, on_step, check_only)

    def update_until(self, number: int) -> list[str]:
        """Update until a step is announced and stop there, as a power cut would; return the names of the steps before."""
        names: list[str] = []

        def on_step(at: int, name: str) -> None:
            if at == number:
                raise Cut
            names.append(name)

        with pytest.raises(Cut):
            self.update(on_step)
        return names

    def configure(self, **fields: Any) -> None:
        """Change the configuration, as another `init` would."""
        self.home.disk.replace("config.json", self.home.config().model_copy(update=fields).canonical())

    @property
    def state(self) -> State:
        return self.home.load()

    @property
    def active(self) -> str | None:
        return self.state.active

    @property
    def sound(self) -> bool | None:
        return slots.status(self.home)["sound"]

    def file(self, role: Any, variant: Any = "full") -> Path:
        """Return the path of a file of the bundle that runs."""
        assert self.active
        return self.home.slot(self.active).path(role, None if role == "graph" else variant)

    def reports(self) -> list[DeviceReport]:
        """Return the delivered reports, then those still queued, in order."""
        delivered = sorted((self.root.parent / "reports").glob("*.json"))
        queued = sorted((self.root / "queue").glob("*.json"))
        return [open_line(path.read_bytes()).report for path in (*delivered, *queued)]

    def events(self) -> list[str]:
        return [report.event for report in self.reports()]

    def leftovers(self) -> list[str]:
        """List the files of unfinished work."""
        found = [path for path in self.root.rglob("*") if path.name.startswith(".") or path.suffix in (".tmp", ".part")]
        return sorted(str(path.relative_to(self.root)) for path in (*found, *(self.root / "incoming").glob("*")))

    def facts(self, marks: bool = True) -> dict[str, Any]:
        """Collect what a refused update must leave as it was."""
        names = {"config.json", "root.json", "device.key", "number", "state.json", "state.prev.json"}
        files = {name: (self.root / name).read_bytes() for name in names if (self.root / name).is_file()}
        kept = {"marks": self._marks()} if marks else {}
        return {**files, **kept, "sound": self.sound, "active": self.active, "reports": len(self.reports())}

    def _marks(self) -> Any:
        """Return the versions in highwater.json, its bytes if it is damaged, or None if there is none."""
        path = self.root / "highwater.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_bytes())["versions"]
        except (ValueError, TypeError, KeyError):
            return path.read_bytes()


@contextmanager
def untouched(device: Device, error: type[Exception], sentence: str, *, marks: bool = True) -> Iterator[None]:
    """Check that what happens inside fails with this error and leaves the device as it was, with a sound bundle running.

    Args:
        device: the device that is attacked.
        error: the exact class of the error.
        sentence: a part of its message.
        marks: whether the high-water marks must stay too; validly signed metadata may raise them.
    """
    before = device.facts(marks)
    with pytest.raises(error, match=sentence) as caught:
        yield
    assert caught.type is error
    assert device.facts(marks) == before
    assert device.sound is (True if device.active else None)


# What the tests start from


@dataclass
class Field:
    """A published repository and a device that runs its first release."""

    folder: Path
    repository: Repository
    device: Device
    steps: list[int] = field(default_factory=list)
    """Numbers of the steps that the device's last update announced."""

    def copy(self, folder: Path) -> Field:
        """Copy the repository and the device into a folder, to be changed at will."""
        shutil.copytree(self.folder, folder)
        repository = Repository(folder / "repository", self.repository.keys)
        device = Device(folder / "device")
        device.configure(repository=str(repository.folder), reports=str(folder / "reports"))
        return Field(folder, repository, device)

    @property
    def release(self) -> Release:
        """The newest release."""
        return self.repository.releases(LINE, CLASS)[-1]


@pytest.fixture(scope="session")
def step(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the delta from `first` to `second`; do not change it."""
    made = make_delta(bundles["first"], bundles["second"], tmp_path_factory.mktemp("deltas"))
    assert made
    return made.path


@pytest.fixture(scope="session")
def row(exported: Export, bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Provide four releases, the first of which is `first`; each differs from the one before in the last bits of few weights."""
    out, generator = tmp_path_factory.mktemp("row"), np.random.default_rng(0)
    weights = np.fromfile(exported.folder / "weights.bin", "<u2")
    made = [bundles["first"]]
    for number in (2, 3, 4):
        weights[generator.choice(weights.size, weights.size // 200, replace=False)] ^= 1
        folder = shutil.copytree(exported.folder, out / f"export-{number}")
        weights.tofile(folder / "weights.bin")
        made.append(bundle_of(folder, out, number))
    return made


@pytest.fixture(scope="session")
def steps(row: list[Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Provide the single steps between the releases of `row`, and as the last one the delta from the first to the last."""
    out = tmp_path_factory.mktemp("steps")
    made = [make_delta(before, after, out, version=NEWEST) for before, after in [*pairwise(row), (row[0], row[-1])]]
    return [delta.path for delta in made if delta]


@pytest.fixture(scope="session")
def fielded(keys: KeyRing, bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Field:
    """Provide a repository with `first` in it and a device that installed it; copy it, do not change it."""
    folder = tmp_path_factory.mktemp("fielded") / "field"
    repository = Repository.create(folder / "repository", keys)
    publish(repository, bundles["first"])
    device = Device.init(folder / "device", repository)
    device.update()
    return Field(folder, repository, device)


@pytest.fixture
def scene(fielded: Field, tmp_path: Path) -> Field:
    """Provide a copy of `fielded`."""
    return fielded.copy(tmp_path / "field")


@pytest.fixture
def offered(scene: Field, bundles: dict[str, Bundle], step: Path) -> Field:
    """Provide a copy of `fielded` in which `second` is published to everyone, with a delta."""
    publish(scene.repository, bundles["second"], step, bundles["first"])
    return scene


@pytest.fixture(scope="session")
def updated_once(fielded: Field, bundles: dict[str, Bundle], step: Path, tmp_path_factory: pytest.TempPathFactory) -> Field:
    """Provide a copy of `fielded` that was updated to `second` by delta; copy it, do not change it."""
    made = fielded.copy(tmp_path_factory.mktemp("updated") / "field")
    publish(made.repository, bundles["second"], step, bundles["first"])
    assert made.device.update(lambda number, _: made.steps.append(number)).way == "delta"
    return made


@pytest.fixture
def updated(updated_once: Field, tmp_path: Path) -> Field:
    """Provide a device that runs `second` and keeps `first` as its previous bundle."""
    return updated_once.copy(tmp_path / "updated")


# A web server with faults


@dataclass
class Faults:
    """What a server does wrong, by the ending of a file's name."""

    cut_after: dict[str, int] = field(default_factory=dict)
    """Break the connection once, after so many bytes."""
    short: set[str] = field(default_factory=set)
    """Break the connection each time, one byte before the end."""
    endless: set[str] = field(default_factory=set)
    """Go on with zeros after the end of the file."""
    missing: set[str] = field(default_factory=set)
    failing: dict[str, int] = field(default_factory=dict)
    """Answer so many times with `status`."""
    status: int = 503
    stale: dict[str, bytes] = field(default_factory=dict)
    """Answer with an old content of the file, as a cache in between would."""
    ignore_range: bool = False
    dripping: set[str] = field(default_factory=set)
    """Send one byte at a time, with a pause after each."""
    encoding: str = ""
    """Claim this content encoding for all bodies."""
    chunked: bool = False
    """Send bodies of unannounced length, piece by piece."""


@dataclass(frozen=True)
class Request:
    """One request that a server answered."""

    name: str
    first: int
    """Offset of the first byte of the answer, from the Range header."""


class WebServer:
    """A web server for a folder, on the loopback interface, with a record of all requests."""

    ENDLESS = 32 * 1024 * 1024

    def __init__(self, folder: Path) -> None:
        self.faults, self.requests, self.sent = Faults(), list[Request](), dict[str, int]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(folder))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, end: str) -> list[Request]:
        """Return the requests for names with this ending."""
        return [request for request in self.requests if request.name.endswith(end)]

    def bytes_sent(self, end: str) -> int:
        """Count the bytes that were sent of files whose names have this ending."""
        return sum(count for name, count in self.sent.items() if name.endswith(end))

    def _handler(self, folder: Path) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.close_connection = True
                server._answer(self, folder)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def _answer(self, http: BaseHTTPRequestHandler, folder: Path) -> None:
        name, faults = http.path.lstrip("/"), self.faults
        asked = http.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        first = 0 if faults.ignore_range else int(asked)
        self.requests.append(Request(name, int(asked)))
        path = folder / name
        if self._take(faults.failing, name):
            http.send_error(faults.status)
            return
        if any(name.endswith(end) for end in faults.missing) or not path.is_file():
            http.send_error(404)
            return
        old = next((data for end, data in faults.stale.items() if name.endswith(end)), None)
        body = (path.read_bytes() if old is None else old)[first:]
        endless = any(name.endswith(end) for end in faults.endless)
        http.send_response(206 if first else 200)
        http.send_header("Connection", "close")
        if faults.encoding:
            http.send_header("Content-Encoding", faults.encoding)
        if faults.chunked:
            http.send_header("Transfer-Encoding", "chunked")
        else:
            http.send_header("Content-Length", str(len(body) + (self.ENDLESS if endless else 0)))
        http.end_headers()
        cut = next((end for end in faults.cut_after if name.endswith(end)), None)
        if cut is not None:
            body = body[: faults.cut_after.pop(cut)]
        if any(name.endswith(end) for end in faults.short):
            body = body[:-1]
        if faults.chunked:
            self._send(http, name, b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:999], body[999:]) if part))
            self._send(http, name, b"" if cut is not None else b"0\r\n\r\n")
            return
        if any(name.endswith(end) for end in faults.dripping):
            for i in range(len(body)):
                if not self._send(http, name, body[i : i + 1]):
                    return
                time.sleep(0.02)
            return
        self._send(http, name, body)
        if endless:
            for _ in range(self.ENDLESS // 65536):
                self._send(http, name, bytes(65536))

    def _send(self, http: BaseHTTPRequestHandler, name: str, body: bytes) -> bool:
        try:
            http.wfile.write(body)
        except OSError:  # the client has hung up
            http.close_connection = True
            return False
        self.sent[name] = self.sent.get(name, 0) + len(body)
        return True

    @staticmethod
    def _take(counts: dict[str, int], name: str) -> bool:
        for end, count in counts.items():
            if name.endswith(end) and count:
                counts[end] -= 1
                return True
        return False


def closed_port() -> str:
    """Return an address at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}"

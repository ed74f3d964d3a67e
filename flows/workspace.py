"""A workspace: the folder in which `ferry` works, its settings, and access to everything in it.

ferry.toml      settings; the only file that is written by hand
data/           the lines' data folders, versioned by DVC
keys/           signing keys (keys.json holds the public halves)
repository/     the signed repository; copied to where it is published
ferry.db        ledger and fleet      mlflow.db, mlartifacts/   catalogue
features/       the frozen feature spaces: for each line one file, and those of its former spaces
inbox/          where devices leave reports
reports-archive/  reports that left the database
events/         requests for a retraining, which `ferry serve` reads
ratings/        answer sheets of `ferry rate`, which say which version drew which image
work/           everything that can be made again: caches, checkpoints, bundles, Prefect's own files
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

from flows.clone import is_clone, ledger_keys
from flows.errors import BusyError, WorkspaceError
from flows.overrides import Overrides
from flows.progress import advance
from flows.secrets import written_in
from flows.settings import SETTINGS, DeviceClass, Line, read
from model import clone
from model.git import forget_redirections
from ota import output

if TYPE_CHECKING:
    from model.revisions import LineData
    from ota.fleet.store import Fleet
    from ota.release.keys import KeyRing
    from ota.release.repository import Repository
    from registry.catalog import Catalog, Subject
    from registry.ledger import Ledger

SEEN = "ledger.seen"  # beside the keys: the newest entry of the ledger that this workspace has seen
LOCK_SECONDS = 60.0
GLANCE = 0.2  # seconds; `ferry status` looks at a lock for much less


class Workspace:
    """An open workspace; each part is opened when it is first used."""

    def __init__(self, root: Path) -> None:
        """Open a workspace.

        Raises:
            WorkspaceError: there is none, or its settings are wrong.
        """
        self.root = root.absolute()
        path = self.root / SETTINGS
        if not path.is_file():
            hint = f"make one with `ferry init {root}`"
            if (self.root / ".dvc").is_dir():  # an older ferry did not record the settings
                hint = f"it is a Git clone: in the original, `git add {SETTINGS} .gitignore` and commit them, or copy {SETTINGS} here"
            raise WorkspaceError(f"{self.root} is not a workspace (it has no {SETTINGS}); {hint}")
        self.settings = read(path)
        self.overrides = Overrides()
        self.work = self.root / "work"
        configure_environment(self.root)
        clone.follow(self.root, self.settings.stores.data, self.settings.stores.s3_endpoint)

    def feature_spaces(self, line: str) -> Path:
        """Name the file of the feature spaces in which a line's images are compared; the first evaluation makes it."""
        return self.root / "features" / f"{line}.safetensors"

    def former_feature_spaces(self, line: str) -> list[Path]:
        """List the files of the feature spaces that a line had before; each name contains the beginning of the file's hash."""
        return sorted((self.root / "features").glob(f"{line}.{'[0-9a-f]' * 16}.safetensors"))

    def line(self, name: str) -> Line:
        """Return a line's settings.

        Raises:
            WorkspaceError: there is no such line.
        """
        try:
            return self.settings.lines[name]
        except KeyError:
            known = ", ".join(self.settings.lines)
            raise WorkspaceError(f"there is no line {name!r} in {SETTINGS}; there is {known}") from None

    def device_class(self, line: str, name: str) -> DeviceClass:
        """Return a device class's settings.

        Raises:
            WorkspaceError: there is no such line, or it has no such class.
        """
        try:
            return self.line(line).classes[name]
        except KeyError:
            known = ", ".join(self.line(line).classes)
            raise WorkspaceError(f"line {line} has no device class {name!r} in {SETTINGS}; it has {known}") from None

    def subjects(self, lines: Collection[str] | None = None) -> list[Subject]:
        """List all models that ferry.toml names, or those of these lines."""
        from registry.catalog import Subject

        return [
            Subject(line=name, configuration=configuration, variant=variant)
            for name, line in self.settings.lines.items()
            if lines is None or name in lines
            for configuration, variant in line.combinations()
        ]

    def class_subjects(self, line: str, name: str) -> list[Subject]:
        """List the models that a device class runs.

        Raises:
            WorkspaceError: there is no such line or class.
        """
        from registry.catalog import Subject

        settings = self.device_class(line, name)
        return [Subject(line=line, configuration=settings.configuration, variant=variant) for variant in settings.variants]

    def needs_approval(self, line: str) -> bool:
        """Check whether a version of this line that passes the gate waits for a person's approval."""
        own = self.line(line).require_approval
        return self.settings.require_approval if own is None else own

    @property
    def database(self) -> str:
        """URL of the database that holds the ledger and the fleet."""
        return self._sqlite(self.settings.stores.database)

    @property
    def mlflow(self) -> str:
        """URL of MLflow's database, or of its server."""
        return self._sqlite(self.settings.stores.mlflow)

    def is_own(self, url: str) -> bool:
        """Check whether a database is a file of this workspace, which goes where the workspace goes."""
        place = file_of(url)
        return place is not None and place.is_relative_to(self.root)

    @property
    def records(self) -> list[Path]:
        """List what this workspace keeps, which no command replaces by a file that a person asks for."""
        stores = self.settings.stores
        folders = [stores.data, stores.publish, stores.reports, *(line.data for line in self.settings.lines.values())]
        databases = [place for url in (self.database, self.mlflow) if (place := file_of(url))]
        return [
            *(self.root / name for name in output.WORKSPACE),
            *(self.root / folder for folder in folders if "://" not in folder),
            *(Path(f"{place}{end}") for place in databases for end in output.DATABASE),
        ]

    def _sqlite(self, url: str) -> str:
        """Let a relative SQLite path start at the workspace, wherever `ferry` is called; other URLs stay as they are."""
        return located(url, self.root)

    @cached_property
    def catalog(self) -> Catalog:
        """The catalogue in MLflow; one process at a time opens it, because two that set up a new database together fail."""
        from registry import addresses
        from registry.catalog import Catalog

        self.work.mkdir(exist_ok=True)
        with FileLock(self.work / "mlflow.lock"):
            addresses.follow(self.mlflow, self.root / "mlartifacts", own=self.is_own(self.mlflow), host=socket.gethostname())
            return Catalog(self.mlflow, self.root / "mlartifacts")

    @cached_property
    def ledger(self) -> Ledger:
        """The record of decisions; if an older ferry did not sign it, its entries are signed from the next one on."""
        from registry.ledger import Ledger

        ring = ledger_keys(self)
        if not ring.ledger:
            ring.begin_ledger(since=Ledger.length(self.database) + 1)
        return Ledger(self.database, ring, ring.folder / SEEN)

    @property
    def archive(self) -> Path:
        """Folder of the reports that left the database."""
        return self.root / "reports-archive"

    @cached_property
    def fleet(self) -> Fleet:
        """Devices and their reports."""
        from ota.fleet.store import Fleet

        return Fleet(self.database)

    @cached_property
    def keys(self) -> KeyRing:
        """Signing keys."""
        from ota.release.keys import KeyRing

        if is_clone(self.root):
            raise WorkspaceError(
                f"{self.root} is a Git clone without keys/ and repository/, so it signs nothing and does not know what is released; run "
                "this command in the workspace that has them"
            )
        return KeyRing(self.root / "keys")

    @cached_property
    def repository(self) -> Repository:
        """The signed repository."""
        from ota.release.repository import Repository

        return Repository(self.root / "repository", self.keys)

    @property
    def data_remote(self) -> str:
        """Where DVC keeps the bytes: a URL, or a path; a relative one starts at the workspace."""
        return self.settings.stores.data

    def for_clones(self) -> tuple[str, ...]:
        """Name the files that a Git clone needs; ferry.toml is not among them if an address in it holds a password."""
        text = (self.root / SETTINGS).read_text(encoding="utf-8")
        return (".gitignore",) if any(written_in(text)) else (".gitignore", SETTINGS)

    def line_data(self, name: str) -> LineData:
        """Return what recording and comparing a line's data revisions needs.

        Raises:
            WorkspaceError: there is no such line.
        """
        from model.revisions import LineData

        line = self.line(name)
        return LineData(
            line=name, root=self.root, folder=line.data, text_length=line.text_length, work=self.work, keys=self.root / "keys",
            remote=self.data_remote, s3_endpoint=self.settings.stores.s3_endpoint, locked=lambda: self.locked("data"),
            progress=advance, beside=self.for_clones(),
        )  # fmt: skip

    @property
    def inbox(self) -> Path:
        """Where devices leave reports."""
        return self.root / self.settings.stores.reports

    @property
    def ratings(self) -> Path:
        """Answer sheets, which say which version drew which image."""
        return self.root / "ratings"

    @contextmanager
    def locked(
        self, part: Literal["retraining", "release", "data", "records", "serving"], patience: float | None = None
    ) -> Iterator[None]:
        """Lock a part of the workspace, so that no second process changes it.

        `records` (ledger, aliases, signed repository) and `data` are locked only for moments, so callers wait for them. Callers
        do not wait for the other parts. With separate parts, a rollout can be halted while a model is trained.

        Args:
            part: of the workspace.
            patience: seconds to wait for it; None: `LOCK_SECONDS` for `records` and `data`, `GLANCE` for the others.

        Raises:
            BusyError: another process holds it.
        """
        self.work.mkdir(exist_ok=True)
        lock = FileLock(self.work / f"{part}.lock")
        try:
            usual = LOCK_SECONDS if part in ("data", "records") else GLANCE
            lock.acquire(timeout=usual if patience is None else patience)
        except Timeout as error:
            raise BusyError(f"another ferry process holds the {part} of {self.root}; wait for it to finish") from error
        try:
            yield
        finally:
            lock.release()


def located(url: str, root: Path) -> str:
    """Return the URL of a database with a relative SQLite path made absolute; it starts at the workspace."""
    place = file_of(url)
    return f"sqlite:///{root / place}" if place and not place.is_absolute() else url


def file_of(url: str) -> Path | None:
    """Return the file of an SQLite database; None: the URL is that of a server, or of a database in memory."""
    path = url.removeprefix("sqlite:///")
    return Path(path) if path != url and path not in ("", ":memory:") else None


def configure_environment(root: Path) -> None:
    """Set the environment variables of Prefect, MLflow and DVC, before these are imported; a variable that is set already stays.

    Raises:
        WorkspaceError: the environment gives Prefect's server and its clients different secrets.
    """
    forget_redirections()  # MLflow calls Git, too
    home = root / "work" / "prefect"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)  # Prefect makes only the last folder of a path
    status = home.stat()
    # Prefect unpickles results from there: whoever can write them runs code as the owner. Whoever can read there sees logs and
    # parameters.
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        home.chmod(0o700)
    for name, value in {
        "PREFECT_HOME": str(home),
        # The in-process server needs longer than the default 20 s on a small or busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "none",  # not an origin; by default every web page may read the answers
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the command reports a failed flow in one sentence, without its traceback
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # MLflow's client waits for a server that restarts (1, 2, 4, 8 s, with jitter), and reports one that is gone or hangs
        # within three minutes. With its own values it would wait half an hour.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "DVC_NO_ANALYTICS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        # Torch's threads wait for each other by spinning. If another process is busy, the default (some milliseconds) makes a
        # step up to fifty times slower. This value (some ten microseconds) costs nothing on an idle machine.
        "GOMP_SPINCOUNT": "10000",
    }.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_API_URL"):  # a server of the user's own has a secret of its own
        _share_a_secret("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")


def _share_a_secret(server: str, client: str) -> None:
    """Give the Prefect server that this process starts, and its clients, the same new secret, unless they have one.

    The secret is valid as long as the process runs. Clients send it with each request, and an open page keeps sending it when its
    server is gone. Another process that has taken the port by then learns a secret, but not that of the next server.

    Args:
        server: environment variable of the server's secret.
        client: environment variable of the clients' secret.

    Raises:
        WorkspaceError: the two variables have different values.
    """
    given = {os.environ.get(name, "") for name in (server, client)}
    if len(given) > 1:
        raise WorkspaceError(
            f"{server} and {client} differ; unset both so that ferry makes a secret, or give both the same value"
        )
    if given != {""}:  # an empty variable is no secret to Prefect
        return
    os.environ[server] = os.environ[client] = f"ferry:{secrets.token_urlsafe(32)}"
    if "prefect" in sys.modules:  # Prefect has read its settings already
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def line_and_class(text: str, workspace: Workspace) -> tuple[str, str]:
    """Split LINE/CLASS into its parts; LINE alone is enough if it has one class.

    Raises:
        WorkspaceError: there is no such line or class, or the line has several classes and none is named.
    """
    line, _, device_class = text.partition("/")
    classes = list(workspace.line(line).classes)
    if not device_class:
        if len(classes) > 1:
            raise WorkspaceError(f"line {line} has several device classes; write {line}/{classes[0]} or another")
        device_class = classes[0]
    workspace.device_class(line, device_class)
    return line, device_class

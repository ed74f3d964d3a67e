"""A workspace: the folder in which `ferry` works, its settings, and the way to everything that it holds.

ferry.toml      settings; the only file that is written by hand
data/           the lines' data folders, versioned by DVC
keys/           signing keys (keys.json holds the public halves)
repository/     the signed repository; copied to where it is published
ferry.db        ledger and fleet      mlflow.db, mlartifacts/   catalogue
features/       the frozen feature spaces, one file for each line
inbox/          where devices leave reports
events/         what asks for a retraining; taken up by `ferry serve`
ratings/        answer sheets of `ferry rate`, which say what each pair of images is
work/           everything that can be made again: caches, checkpoints, bundles, Prefect's own files
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flows.errors import BusyError, WorkspaceError
from model.config import TEACHERS, VARIANTS, ConfigurationName, ModelConfig, PrecisionName, RouterName, TierName, VariantName
from model.errors import RevisionError
from model.folder import inside, shown
from model.git import forget_redirections
from model.scorecard import LineName, Sampler
from registry.cost import Prices

if TYPE_CHECKING:
    from model.train import TrainOptions
    from ota.release.fleet import Fleet
    from ota.release.keys import KeyRing
    from ota.release.repository import Repository
    from registry.catalog import Catalog
    from registry.ledger import Ledger

SETTINGS = "ferry.toml"
FORMAT = 1  # of ferry.toml and of all that lies in a workspace
SEEN = "ledger.seen"  # beside the keys: the newest entry of the ledger that this workspace has seen
LOCK_SECONDS = 60.0
TEACHING_MS = 3_600_000.0  # for an image of a variant that no device class runs
# What lies in a workspace beside the data, each for one purpose; compared without case, as some file systems do.
NOT_DATA = frozenset({
    "keys", "repository", "published", "dvc-remote", "mlartifacts", "features", "inbox", "events", "ratings", "work", "ferry.toml",
    "ferry.db", "mlflow.db", "root.json", "report.html",
})  # fmt: skip


def _data_folder(path: str) -> str:
    """A data folder's path, written in one way; below the workspace, in nothing that serves another purpose, and plain for DVC and Git."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    named = {"path": shown(path)}
    if not parts or path.startswith("/") or ".." in parts or "://" in path:
        raise PydanticCustomError("data", "'{path}' is no folder below the workspace; name one, such as data/surfaces", named)
    if parts[0].casefold() in NOT_DATA or {".git", ".hg", ".dvc"} & {part.casefold() for part in parts}:
        raise PydanticCustomError(
            "data", "'{path}' is where other things are kept; name a folder of its own, such as data/surfaces", named
        )
    if (
        not path.isprintable()
        or set("*?[") & set(path)
        or parts[-1].endswith(".dvc")
        or max(len(part.encode()) for part in parts) > 200
    ):
        raise PydanticCustomError(
            "data",
            "'{path}' is a name that DVC reads otherwise, or too long; use letters, digits, '-' and '_', as in data/surfaces",
            named,
        )
    return "/".join(parts)


DataFolder = Annotated[str, AfterValidator(_data_folder)]


class Section(BaseModel):
    """A part of ferry.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stores(Section):
    """Where things are kept. Relative paths start at the workspace."""

    data: str = "dvc-remote"
    database: str = "sqlite:///ferry.db"
    mlflow: str = "sqlite:///mlflow.db"
    publish: str = "published"
    s3_endpoint: str = ""
    reports: str = "inbox"


class Energy(Section):
    """Joules for an image as `ferry-agent bench` measured them on a device, for the report."""

    joules: float = Field(gt=0)
    low: float | None = Field(default=None, ge=0, description="of its 95 % interval")
    high: float | None = None
    source: str = Field(min_length=1, max_length=80, description="which sensor, such as RAPL package-0")
    quality: Literal["measured", "partial", "model"] = Field(description="as bench says it")

    @model_validator(mode="after")
    def _inside(self) -> Energy:
        if (self.low is None) != (self.high is None) or not (self.low or 0.0) <= self.joules <= (self.high or self.joules):
            raise ValueError("low and high are given together, and joules lies between them")
        return self


class Training(Section):
    """How long and how fast to train; see `model.train.TrainOptions`."""

    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    update_grid: float = Field(default=0.0, ge=0, le=8, description="coarseness of an update; see TrainOptions")
    seed: int = 0

    def options(self, stored: PrecisionName) -> TrainOptions:
        """As training takes them, for weights that will be stored so."""
        from model.train import TrainOptions

        return TrainOptions(stored=stored, **self.model_dump())


SUCCESSORS = {  # keys of [lines.*.gate] that are no more, because they were shares of pure noise's distance
    "margin": "tolerance (a share of the champion's own distance; 0.5 unless given)",
    "decay": "total_tolerance (how many such losses in all; 2.0 unless given)",
}


class Gate(Section):
    """What promotion asks for; see `registry.selection.Limits`."""

    @model_validator(mode="before")
    @classmethod
    def _successors(cls, given: Any) -> Any:
        for name in SUCCESSORS.keys() & (given if isinstance(given, dict) else {}).keys():
            raise PydanticCustomError(
                "successor", "{name} was a share of pure noise's distance and is no more; remove it, its successor is {successor}",
                {"name": name, "successor": SUCCESSORS[name]},
            )  # fmt: skip
        return given

    images: int = Field(default=256, ge=8, description="generated images for each evaluation")
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    tolerance: float = Field(default=0.5, gt=0, le=2)
    tolerance_bands: float = Field(default=1.5, ge=0, le=10)
    total_tolerance: float = Field(default=2.0, gt=0, le=10)
    minimum_images: int = Field(default=96, ge=8)
    coverage: float = Field(default=0.3, ge=0, le=1)
    copying: float = Field(default=0.8, gt=0.5, le=1)
    copies: float = Field(default=0.1, gt=0, le=1)
    implausible: float = Field(default=0.3, gt=0, le=1)
    implausible_more: float = Field(default=0.08, gt=0, le=1)
    duplicates: float = Field(default=0.3, gt=0, le=1)
    captions: bool = Field(default=True, description="images must go with their captions, and each caption be drawn")
    beat_solver: bool = Field(default=True, description="of dev and fast: better than full, drawn with as many evaluations")


class DeviceClass(Section):
    """A kind of hardware: it chooses the configuration, the precision and the variants."""

    configuration: ConfigurationName = "I"
    precision: PrecisionName = "bfloat16"
    variants: list[VariantName] = Field(default=["full"], min_length=1, max_length=3, description="the first is the default")
    latency_ms: float = Field(default=5000, gt=0, description="budget for one image")
    memory_mib: float | None = Field(default=None, gt=0, description="budget for the model, beyond a bare interpreter")

    @model_validator(mode="after")
    def _each_once(self) -> DeviceClass:
        if len(set(self.variants)) < len(self.variants):
            raise ValueError("a variant is listed twice")
        return self


class Line(Section):
    """One product: its data, its model, its device classes."""

    data: DataFolder
    tier: TierName = "nano"
    image_size: int = 16
    channels: Literal[1, 3] = 1
    text_length: int = 24
    router: RouterName = "expert-choice"
    training: Training = Training()
    retraining: Training = Training(steps=200, learning_rate=5e-4, update_grid=2.0)
    distillation: Training = Training(steps=200, learning_rate=5e-4, update_grid=2.0)
    sampler: Sampler = Sampler()
    gate: Gate = Gate()
    require_approval: bool | None = Field(default=None, description="of promotions, by a person; None: as the workspace says")
    classes: dict[LineName, DeviceClass] = Field(default={"edge": DeviceClass()}, min_length=1)

    @model_validator(mode="after")
    def _one_precision(self) -> Line:
        stored = {(c.configuration, c.precision) for c in self.classes.values()}
        if len(stored) > len({configuration for configuration, _ in stored}):
            raise ValueError("classes of one configuration must share a precision, a version is exported once")
        return self

    def config(self, configuration: ConfigurationName) -> ModelConfig:
        """The network of a configuration."""
        return ModelConfig(
            tier=self.tier, configuration=configuration, image_size=self.image_size, channels=self.channels,
            text_length=self.text_length, router=self.router,
        )  # fmt: skip

    def combinations(self) -> list[tuple[ConfigurationName, VariantName]]:
        """What has to be trained: every (configuration, variant) that some class runs, each after the one that teaches it."""
        wanted: set[tuple[ConfigurationName, VariantName]] = set()
        for device_class in self.classes.values():
            for variant in device_class.variants:
                taught: VariantName | None = variant
                while taught:
                    wanted.add((device_class.configuration, taught))
                    taught = TEACHERS.get(taught)
        ladder = list(VARIANTS)
        return sorted(wanted, key=lambda pair: (pair[0], ladder.index(pair[1])))

    def ladders(self) -> dict[ConfigurationName, list[VariantName]]:
        """The same by configuration; those of different ones need nothing of each other."""
        found: dict[ConfigurationName, list[VariantName]] = {}
        for configuration, variant in self.combinations():
            found.setdefault(configuration, []).append(variant)
        return found

    def sampler_of(self, variant: VariantName) -> Sampler:
        """How a variant is drawn: `full` as the settings say, a distilled one in the steps that it was taught."""
        if VARIANTS[variant].guided:
            return self.sampler
        return Sampler(method="mean", steps=VARIANTS[variant].steps, guidance=1.0)

    def precision(self, configuration: ConfigurationName) -> PrecisionName:
        """How the classes with a configuration store weights."""
        return next(c.precision for c in self.classes.values() if c.configuration == configuration)

    def latency_ms(self, configuration: ConfigurationName, variant: VariantName) -> float:
        """The tightest budget among the classes that run a variant; for one that only teaches, an hour."""
        budgets = [c.latency_ms for c in self.classes.values() if c.configuration == configuration and variant in c.variants]
        return min(budgets, default=TEACHING_MS)

    def memory_mib(self, configuration: ConfigurationName, variant: VariantName) -> float | None:
        """The tightest memory budget among the classes that run a variant, if any has one."""
        running = [c for c in self.classes.values() if c.configuration == configuration and variant in c.variants]
        return min((c.memory_mib for c in running if c.memory_mib is not None), default=None)


class Settings(Section):
    """ferry.toml."""

    schema_version: Literal[1] = Field(alias="schema")
    parallel: int = Field(default=1, ge=1, le=8, description="configurations that are retrained at a time")
    stores: Stores = Stores()
    prices: Prices = Prices()
    require_approval: bool = Field(default=False, description="a winner waits for a person; see `ferry approve`")
    poll_seconds: float = Field(default=60, ge=1, le=86_400, description="between looks at MLflow's aliases in `ferry serve`")
    lines: dict[LineName, Line] = Field(min_length=1)
    energy: dict[LineName, dict[LineName, dict[VariantName, Energy]]] = Field(default={}, description="by line, class, variant")

    @model_validator(mode="after")
    def _data_apart(self) -> Settings:
        stores = [
            Path(store).parts for store in (self.stores.data, self.stores.publish, self.stores.reports) if "://" not in store
        ]
        for name, line in self.lines.items():
            parts = Path(line.data).parts
            if any(store and (store[: len(parts)] == parts or parts[: len(store)] == store) for store in stores):
                raise ValueError(f"lines.{name}.data and one of the stores share a folder; give each its own")
        return self

    @model_validator(mode="after")
    def _energy_of_something(self) -> Settings:
        for line, classes in self.energy.items():
            for name, variants in classes.items():
                known = self.lines[line].classes.get(name) if line in self.lines else None
                if known is None or not variants.keys() <= set(known.variants):
                    raise ValueError(f"energy.{line}.{name} names a line, class or variant that is not in this file")
        return self


class Workspace:
    """An opened workspace; its parts are opened when they are first asked for."""

    def __init__(self, root: Path) -> None:
        """Open a workspace.

        Raises:
            WorkspaceError: there is none, or its settings are wrong.
        """
        self.root = root.absolute()
        path = self.root / SETTINGS
        if not path.is_file():
            raise WorkspaceError(f"{self.root} is not a workspace (it has no {SETTINGS}); make one with `ferry init {root}`")
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
            _check_format(path, given.get("schema"))
            self.settings = Settings.model_validate(given)
            for line in self.settings.lines.values():
                for configuration, _ in line.combinations():
                    line.config(configuration)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise WorkspaceError(f"{path} is not valid TOML: {error}; mend that line") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "a line"
            raise WorkspaceError(f"{path}: {where}: {first['msg']}") from error
        self.work = self.root / "work"
        configure_environment(self.root)

    def feature_spaces(self, line: str) -> Path:
        """Name the file of the feature spaces in which a line's images are compared; the first evaluation makes it."""
        return self.root / "features" / f"{line}.safetensors"

    def former_feature_spaces(self, line: str) -> list[Path]:
        """List the files of the feature spaces that a line had before, each under the beginning of its hash."""
        return sorted((self.root / "features").glob(f"{line}.{'[0-9a-f]' * 16}.safetensors"))

    def line(self, name: str) -> Line:
        """A line's settings.

        Raises:
            WorkspaceError: there is no such line.
        """
        try:
            return self.settings.lines[name]
        except KeyError:
            known = ", ".join(self.settings.lines)
            raise WorkspaceError(f"there is no line {name!r} in {SETTINGS}; there is {known}") from None

    def device_class(self, line: str, name: str) -> DeviceClass:
        """A device class's settings.

        Raises:
            WorkspaceError: the line has no such class.
        """
        try:
            return self.line(line).classes[name]
        except KeyError:
            known = ", ".join(self.line(line).classes)
            raise WorkspaceError(f"line {line} has no device class {name!r} in {SETTINGS}; it has {known}") from None

    def needs_approval(self, line: str) -> bool:
        """Whether what wins waits for a person."""
        own = self.line(line).require_approval
        return self.settings.require_approval if own is None else own

    @property
    def database(self) -> str:
        """The URL behind which ledger and fleet are kept."""
        return self._sqlite(self.settings.stores.database)

    def _sqlite(self, url: str) -> str:
        """A relative SQLite path starts at the workspace, wherever `ferry` was called."""
        prefix = "sqlite:///"
        if url.startswith(prefix) and not url.startswith(prefix + "/"):
            return prefix + str(self.root / url.removeprefix(prefix))
        return url

    @cached_property
    def catalog(self) -> Catalog:
        """MLflow. One process at a time opens it: MLflow sets a new database up step by step, and two that do so together fail."""
        from registry.catalog import Catalog

        self.work.mkdir(exist_ok=True)
        with FileLock(self.work / "mlflow.lock"):
            return Catalog(self._sqlite(self.settings.stores.mlflow), self.root / "mlartifacts")

    @cached_property
    def ledger(self) -> Ledger:
        """The record of decisions; a workspace of a ferry that did not sign it begins to, with its next entry."""
        from registry.ledger import Ledger

        ring = self.keys
        if not ring.ledger:
            ring.begin_ledger(since=Ledger.length(self.database) + 1)
        return Ledger(self.database, ring, ring.folder / SEEN)

    @cached_property
    def fleet(self) -> Fleet:
        """Devices and their reports."""
        from ota.release.fleet import Fleet

        return Fleet(self.database)

    @cached_property
    def keys(self) -> KeyRing:
        """Signing keys."""
        from ota.release.keys import KeyRing

        return KeyRing(self.root / "keys")

    @cached_property
    def repository(self) -> Repository:
        """The signed repository."""
        from ota.release.repository import Repository

        return Repository(self.root / "repository", self.keys)

    @property
    def data_remote(self) -> str:
        """Where DVC keeps the bytes: a URL or an absolute path."""
        remote = self.settings.stores.data
        return remote if "://" in remote else str(self.root / remote)

    @property
    def inbox(self) -> Path:
        """Where devices leave reports."""
        return self.root / self.settings.stores.reports

    @contextmanager
    def locked(
        self, part: Literal["retraining", "release", "data", "records", "serving"], patience: float | None = None
    ) -> Iterator[None]:
        """Hold a part of the workspace against a second process that would change it.

        `records` (ledger, aliases, signed repository) and `data` are held for moments and waited for; so a rollout can be
        halted while a model is trained.

        Args:
            part: of the workspace.
            patience: seconds to wait for it; None: as is usual for the part.

        Raises:
            BusyError: another one holds it.
        """
        self.work.mkdir(exist_ok=True)
        lock = FileLock(self.work / f"{part}.lock")
        try:
            usual = LOCK_SECONDS if part in ("data", "records") else 0
            lock.acquire(timeout=usual if patience is None else patience)
        except Timeout as error:
            raise BusyError(f"another ferry holds the {part} of {self.root}; wait for it to finish") from error
        try:
            yield
        finally:
            lock.release()


def _check_format(path: Path, found: object) -> None:
    """There is one format so far; another is not guessed at.

    Raises:
        WorkspaceError: the workspace was made by another ferry.
    """
    if isinstance(found, int) and found > FORMAT:
        raise WorkspaceError(
            f"{path}: schema = {found} was made by a newer ferry, this one knows {FORMAT}; install that one, nothing was changed"
        )
    if found != FORMAT:
        raise WorkspaceError(
            f"{path}: schema = {FORMAT} is missing at its beginning; if this is a workspace, write it there: no older format was ever released"
        )


def configure_environment(root: Path) -> None:
    """Set what Prefect, MLflow and DVC read from the environment; before they are imported. What is set already wins.

    Raises:
        WorkspaceError: Prefect's server and its clients are given different secrets.
    """
    forget_redirections()  # MLflow asks Git, too
    home = root / "work" / "prefect"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)  # Prefect makes only the last folder of a path
    status = home.stat()
    # Prefect unpickles the results that it keeps there: who writes them runs code as the owner. Who reads them reads logs and parameters.
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        home.chmod(0o700)
    for name, value in {
        "PREFECT_HOME": str(home),
        # The in-process server needs longer than the default 20 s on a small or busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "none",  # is no origin; by default every web page may read what the server answers
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # a failed flow is told in one sentence, not by its traceback
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # A server that restarts is waited for (1, 2, 4, 8 s, with jitter), one that is gone or hangs is named within three minutes;
        # MLflow's own values would wait half an hour.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "DVC_NO_ANALYTICS": "1",
        # Torch's threads wait for each other by spinning. Beside any other busy process the default (some milliseconds) makes
        # a step up to fifty times slower; this (some ten microseconds) costs nothing where the machine is idle.
        "GOMP_SPINCOUNT": "10000",
    }.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_API_URL"):  # a server of the user's own has a secret of its own
        _share_a_secret("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")


def _share_a_secret(server: str, client: str) -> None:
    """Give the Prefect server that this process starts, and its clients, one secret by these two variables, unless they have one.

    It ends with the process. Clients send it with each request, and an open page goes on doing so when its server is gone; whoever has
    taken the port by then has learned nothing that opens the next server.

    Raises:
        WorkspaceError: they have different ones.
    """
    given = {os.environ.get(name, "") for name in (server, client)}
    if len(given) > 1:
        raise WorkspaceError(f"{server} and {client} differ; unset both, and ferry makes a secret, or give both the same")
    if given != {""}:  # which is no secret to Prefect
        return
    os.environ[server] = os.environ[client] = f"ferry:{secrets.token_urlsafe(32)}"
    if "prefect" in sys.modules:  # it has read its settings already
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def create(root: Path, lines: list[str], settings: str | None = None) -> Workspace:
    """Make a workspace; repeatable: what is there is kept, what a killed call left out is made.

    Args:
        root: the folder; made when missing.
        lines: names of the lines in a new `ferry.toml`.
        settings: content of a new `ferry.toml`; None: defaults for the lines, with comments.

    Raises:
        WorkspaceError: a name is not valid, or the folder holds something else; then nothing was made.
        DataError: a line's data would lie behind a link; then, too.
    """
    from model import versions
    from ota.release import keys, repository

    path = root / SETTINGS
    if not path.is_file():
        _check_name(root)
        for name in lines:
            try:
                TypeAdapter(LineName).validate_python(name)
            except ValidationError as error:
                raise WorkspaceError(
                    f"'{shown(name)}' is no name of a line; use lower-case letters, digits and '-', 40 at most"
                ) from error
        ours = ("data", ".git", f".{SETTINGS}.tmp")
        if root.is_symlink() and not root.exists():
            raise WorkspaceError(f"{shown(root)} is a link to nowhere; name a folder")
        if root.exists() and not root.is_dir():
            raise WorkspaceError(f"{shown(root)} is a file; name a folder")
        if root.is_dir() and any(entry.name not in ours for entry in root.iterdir()):
            raise WorkspaceError(f"{shown(root)} holds other things; name an empty folder, or one with nothing but data/")
        text = settings or template([*dict.fromkeys(lines)])
        try:
            made = Settings.model_validate(tomllib.loads(text))
        except (ValidationError, tomllib.TOMLDecodeError) as error:
            raise WorkspaceError(f"the settings for {SETTINGS} are not valid: {shown(error)}") from error
        for line in made.lines.values():
            inside(root, line.data)
        root.mkdir(parents=True, exist_ok=True)
        fresh = root / f".{SETTINGS}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    workspace = Workspace(root)
    root = workspace.root
    for line in workspace.settings.lines.values():
        inside(root, line.data).mkdir(parents=True, exist_ok=True)
    ignored = root / ".gitignore"
    known = ignored.read_bytes().splitlines() if ignored.is_file() else []
    asked = [f"/{name}".encode() for name in IGNORED]
    ignored.write_bytes(b"\n".join([*known, *(name for name in asked if name not in known)]) + b"\n")
    versions.init(root, workspace.data_remote, workspace.settings.stores.s3_endpoint)
    ring = keys.create(root / "keys")
    repository.Repository.create(root / "repository", ring)
    anchor = root / "root.json"
    shutil.copyfile(root / "repository" / "metadata" / "1.root.json", anchor)
    workspace.inbox.mkdir(parents=True, exist_ok=True)
    workspace.ledger.head()
    workspace.fleet.devices()
    return workspace


def _check_name(root: Path) -> None:
    """Refuse a folder whose name some part of a workspace could not keep: settings, addresses of databases, DVC's configuration.

    Raises:
        WorkspaceError: it is such a name.
    """
    from model import versions

    name = str(root.absolute())
    try:
        name.encode()
        versions.check_remote(name)
    except (UnicodeEncodeError, RevisionError):
        unfit = True
    else:
        unfit = not name.isprintable() or bool({*"?#"} & {*name})  # which end the path of an address
    if unfit:
        raise WorkspaceError(f"a workspace cannot be kept in {shown(name)}; choose a path of letters, digits, '-' and '_'")


IGNORED = (
    "keys", "repository", "published", "dvc-remote", "ferry.db", "mlflow.db", "mlartifacts", "inbox", "work", "report.html",
    "devices", "pictures", "ratings",
)  # fmt: skip


def template(lines: list[str]) -> str:
    """A ferry.toml with the defaults written out and explained."""
    head = """\
# A DeltaFerry workspace. Relative paths start at this folder.
schema = 1
require_approval = false           # true: what wins waits for `ferry approve`; a line may say otherwise for itself
poll_seconds = 60                  # how often `ferry serve` looks whether an alias was moved in MLflow

[stores]
data = "dvc-remote"                # where DVC keeps the bytes of the data: a folder or s3://bucket/prefix
database = "sqlite:///ferry.db"    # ledger and fleet; postgresql://… for several machines
mlflow = "sqlite:///mlflow.db"     # or the address of an MLflow server
publish = "published"              # where devices fetch from: a folder or s3://bucket/prefix
s3_endpoint = ""                   # of an S3-compatible server other than AWS's
reports = "inbox"                  # folder in which devices leave reports

[prices]                           # yours; the report counts with them, and marks those that stay commented out as assumed
# currency = "EUR"
# megabyte = 0.5                   # of traffic to or from a device
# training_hour = 0.1              # of the machine that trains
# fleet = 1000                     # devices that an update goes to
# device = 40.0                    # what hardware that can draw costs more, each device; 0 if it is there anyway
# device_years = 5.0               # that a device serves
# images_per_day = 100.0           # that a device draws
# kilowatt_hour = 0.3              # of electricity at a device
# operator_hour = 60.0             # of the person who retrains and rolls out
# operator_hours = 2.0             # of that person for each update
# updates_per_year = 12.0
# cloud_gpu_hour = 1.0             # the same images from a cloud: of a rented accelerator,
# cloud_gpu_seconds = 0.1          # and for how long an image keeps it; or else
# cloud_thousand_images = 3.0      # of a service that sells images
# cloud_image_kilobytes = 5.0      # of traffic for an image

# [energy.LINE.CLASS.VARIANT]      # joules for an image, as `ferry-agent bench` measured them on a device
# joules = 2.1
# low = 1.9
# high = 2.3
# source = "RAPL package-0"
# quality = "measured"             # or partial or model, as bench says
"""
    return head + "".join(_line_template(name) for name in lines)


def _line_template(name: str) -> str:
    return f"""
[lines.{name}]
data = "data/{name}"               # images and a metadata.jsonl with file_name and text
tier = "nano"                      # test, nano, small or base
image_size = 16                    # pixels
channels = 1                       # 1 is grey, 3 is colour
text_length = 24                   # caption bytes

[lines.{name}.training]            # the first time, from noise
steps = 400
batch = 32
learning_rate = 2e-3

[lines.{name}.retraining]          # later, from the champion
steps = 200
batch = 32
learning_rate = 5e-4
update_grid = 2.0                  # rounds the update, so that its delta is small; 0 is off

[lines.{name}.sampler]
method = "ab2"                     # euler, heun or ab2 (second order, one evaluation a step)
steps = 14
guidance = 2.0                     # 1 is unguided

[lines.{name}.gate]
images = 256                       # generated for each evaluation
alpha = 0.05                       # chance of promoting a worse model
tolerance = 0.5                    # tolerated loss, as a share of the champion's own distance from real images,
tolerance_bands = 1.5              # or as so many distances between two sets of 25 groups of real images, if that is more
total_tolerance = 2.0              # tolerated in all against the best version ever, in such losses
minimum_images = 96                # below this, nothing is decided
coverage = 0.3
copying = 0.8                      # chance that a generated image lies nearer to training images than held-out ones do; 0.5 is none
copies = 0.1                       # share of images nearer to training images than any held-out one, to stay below
implausible = 0.3                  # share of images unlike all real ones, to stay below
implausible_more = 0.08            # by so much it may exceed the champion's, or by `tolerance` of that if that is more
duplicates = 0.3                   # share of images like another generated one, to stay below
captions = true                    # images must go with their captions, and each caption must be drawn

[lines.{name}.classes.edge]        # a kind of device
configuration = "I"                # I: stride 2, II: stride 1
precision = "bfloat16"             # how weights are stored: float32, float16, bfloat16 (smallest updates) or int8 (smallest file)
latency_ms = 5000                  # budget for one image
# memory_mib = 64                  # budget for the model's memory
"""


def line_and_class(text: str, workspace: Workspace) -> tuple[str, str]:
    """LINE/CLASS, or LINE alone where it has one class.

    Raises:
        WorkspaceError: there is no such line or class, or the class is not clear.
    """
    line, _, device_class = text.partition("/")
    classes = list(workspace.line(line).classes)
    if not device_class:
        if len(classes) > 1:
            raise WorkspaceError(f"line {line} has several device classes; write {line}/{classes[0]} or another")
        device_class = classes[0]
    workspace.device_class(line, device_class)
    return line, device_class

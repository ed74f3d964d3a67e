"""ferry.toml: its keys, what they mean, and their defaults."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flows.errors import WorkspaceError
from model.config import TEACHERS, VARIANTS, ConfigurationName, ModelConfig, PrecisionName, RouterName, TierName, VariantName
from model.folder import shown
from model.scorecard import LineName, Sampler
from registry.cost import Prices

if TYPE_CHECKING:
    from model.train import TrainOptions

SETTINGS = "ferry.toml"
FORMAT = 1  # version of the format of ferry.toml and of everything else in a workspace
TEACHING_MS = 3_600_000.0  # latency budget of one image, for a variant that no device class runs
# Names in a workspace that serve other purposes than data; compared without case, because some file systems ignore case.
NOT_DATA = frozenset({
    "keys", "repository", "published", "dvc-remote", "mlartifacts", "features", "inbox", "events", "ratings", "work", "ferry.toml",
    "ferry.db", "mlflow.db", "root.json", "report.html",
})  # fmt: skip


def _data_folder(path: str) -> str:
    """Normalise the path of a data folder, so that equal paths are written in one way.

    Raises:
        PydanticCustomError: it is not below the workspace, serves another purpose, is too long, or DVC reads its name otherwise.
    """
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
    """Places where things are stored. Relative paths start at the workspace."""

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
        """Convert to the options that `model.train` takes, for weights that will be stored in this precision."""
        from model.train import TrainOptions

        return TrainOptions(stored=stored, **self.model_dump())


SUCCESSORS = {  # removed keys of [lines.*.gate], which were shares of pure noise's distance, and what replaces them
    "margin": "tolerance (a share of the champion's own distance; 0.5 unless given)",
    "decay": "total_tolerance (how many such losses in all; 2.0 unless given)",
}


class Gate(Section):
    """Limits of the promotion gate; see `registry.selection.Limits`."""

    @model_validator(mode="before")
    @classmethod
    def _successors(cls, given: Any) -> Any:
        for name in SUCCESSORS.keys() & (given if isinstance(given, dict) else {}).keys():
            raise PydanticCustomError(
                "successor", "{name} was a share of pure noise's distance and is no more; remove it, its successor is {successor}",
                {"name": name, "successor": SUCCESSORS[name]},
            )  # fmt: skip
        return given

    images: int = Field(default=256, ge=8, le=100_000, description="generated images for each evaluation")
    alpha: float = Field(default=0.05, ge=1e-6, lt=0.5)
    tolerance: float = Field(default=0.5, gt=0, le=2)
    tolerance_bands: float = Field(default=1.5, ge=0, le=10)
    total_tolerance: float = Field(default=2.0, gt=0, le=10)
    minimum_images: int = Field(default=96, ge=8, le=100_000)
    coverage: float = Field(default=0.3, ge=0, le=1)
    copying: float = Field(default=0.8, gt=0.5, le=1)
    copies: float = Field(default=0.1, gt=0, le=1)
    implausible: float = Field(default=0.3, gt=0, le=1)
    implausible_more: float = Field(default=0.08, gt=0, le=1)
    duplicates: float = Field(default=0.3, gt=0, le=1)
    captions: StrictBool = Field(default=True, description="images must go with their captions, and each caption be drawn")
    beat_solver: StrictBool = Field(default=True, description="of dev and fast: better than full, drawn with as many evaluations")


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
    require_approval: StrictBool | None = Field(
        default=None, description="of promotions, by a person; None: as the workspace says"
    )
    classes: dict[LineName, DeviceClass] = Field(default={"edge": DeviceClass()}, min_length=1)

    @model_validator(mode="after")
    def _one_precision(self) -> Line:
        stored = {(c.configuration, c.precision) for c in self.classes.values()}
        if len(stored) > len({configuration for configuration, _ in stored}):
            raise ValueError("classes of one configuration must share a precision, a version is exported once")
        return self

    def config(self, configuration: ConfigurationName) -> ModelConfig:
        """Return the network's `ModelConfig` for a configuration."""
        return ModelConfig(
            tier=self.tier, configuration=configuration, image_size=self.image_size, channels=self.channels,
            text_length=self.text_length, router=self.router,
        )  # fmt: skip

    def combinations(self) -> list[tuple[ConfigurationName, VariantName]]:
        """List what must be trained: each (configuration, variant) that a class runs, and its teachers; teachers come first."""
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
        """Group `combinations` by configuration; different configurations do not depend on each other."""
        found: dict[ConfigurationName, list[VariantName]] = {}
        for configuration, variant in self.combinations():
            found.setdefault(configuration, []).append(variant)
        return found

    def sampler_of(self, variant: VariantName) -> Sampler:
        """Return the sampler of a variant: for `full` that of the settings, for a student the steps that it was taught."""
        if VARIANTS[variant].guided:
            return self.sampler
        return Sampler(method="mean", steps=VARIANTS[variant].steps, guidance=1.0)

    def guidance_learnt(self, variant: VariantName) -> float | None:
        """Return the guidance of `full` that a student learns to do without, where `full` teaches it."""
        return self.sampler.guidance if TEACHERS.get(variant) == "full" else None

    def precision(self, configuration: ConfigurationName) -> PrecisionName:
        """Return the precision in which the classes of a configuration store weights; all of them share it."""
        return next(c.precision for c in self.classes.values() if c.configuration == configuration)

    def latency_ms(self, configuration: ConfigurationName, variant: VariantName) -> float:
        """Return the smallest latency budget of the classes that run a variant, in ms; an hour if the variant only teaches."""
        budgets = [c.latency_ms for c in self.classes.values() if c.configuration == configuration and variant in c.variants]
        return min(budgets, default=TEACHING_MS)

    def memory_mib(self, configuration: ConfigurationName, variant: VariantName) -> float | None:
        """Return the smallest memory budget of the classes that run a variant, in MiB; None: no class has one."""
        running = [c for c in self.classes.values() if c.configuration == configuration and variant in c.variants]
        return min((c.memory_mib for c in running if c.memory_mib is not None), default=None)


class Settings(Section):
    """The content of ferry.toml."""

    schema_version: Literal[1] = Field(alias="schema")
    parallel: int = Field(default=1, ge=1, le=8, description="configurations that are retrained at a time")
    stores: Stores = Stores()
    prices: Prices = Prices()
    require_approval: StrictBool = Field(default=False, description="a winner waits for a person; see `ferry approve`")
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


def read(path: Path) -> Settings:
    """Read and check a ferry.toml.

    Raises:
        WorkspaceError: it is not valid; the message names the line or the key.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        _check_format(path, given.get("schema"))
        settings = Settings.model_validate(given)
        for line in settings.lines.values():
            for configuration, _ in line.combinations():
                line.config(configuration)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"{path} is not valid TOML: {error}; mend that line") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "a line"
        raise WorkspaceError(f"{path}: {where}: {first['msg']}") from error
    return settings


def _check_format(path: Path, found: object) -> None:
    """Refuse a workspace whose format is not the one that this ferry knows; there is only one so far.

    Raises:
        WorkspaceError: a newer ferry made the workspace, or ferry.toml names no known format.
    """
    if isinstance(found, int) and found > FORMAT:
        raise WorkspaceError(
            f"{path}: schema = {found} was made by a newer ferry, this one knows {FORMAT}; install that one, nothing was changed"
        )
    if found != FORMAT:
        raise WorkspaceError(
            f"{path}: schema = {FORMAT} is missing at its beginning; if this is a workspace, write it there: no older format was ever released"
        )

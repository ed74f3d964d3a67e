"""ferry.toml: its keys, what they mean, and their defaults."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

import ota
from flows.addresses import CHECKS, fault
from flows.errors import WorkspaceError
from flows.secrets import remember, secrets_of
from flows.sizes import Size
from model.config import VARIANTS, ConfigurationName, ModelConfig, PrecisionName, RouterName, SourceName, TierName, VariantName
from model.folder import shown
from model.scorecard import LineName, Sampler
from ota.manifest import AGENT_VERSION, as_numbers
from ota.wording import first_fault
from registry.cost import Prices

if TYPE_CHECKING:
    from model.train import TrainOptions

SETTINGS = "ferry.toml"
FORMAT = 2  # version of the format of ferry.toml and of everything else in a workspace
FORMATS = (1, 2)  # 1 differs by its defaults only: see `Settings._older_defaults`
READS_FACTORS = "0.3.0"  # oldest ferry-agent that reads format version 2 of deltas
TEACHING_MS = 3_600_000.0  # latency budget of one image, for a `full` that only gives its weights to the variants of a class
# Names in a workspace that serve other purposes than data; compared without case, because some file systems ignore case.
NOT_DATA = frozenset({
    "keys", "repository", "published", "dvc-remote", "mlartifacts", "features", "inbox", "reports-archive", "events", "ratings", "work", "ferry.toml",
    "ferry.db", "mlflow.db", "root.json", "report.html", "explain.html",
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


VARIABLES = {  # a key of [stores] → the environment variable that replaces it, so that a password need not stand in the file
    "data": "FERRY_STORES_DATA", "database": "FERRY_STORES_DATABASE", "mlflow": "FERRY_STORES_MLFLOW",
    "publish": "FERRY_STORES_PUBLISH", "s3_endpoint": "FERRY_STORES_S3_ENDPOINT", "reports": "FERRY_STORES_REPORTS",
}  # fmt: skip


MethodName = Literal["full", "grid", "lowrank", "small-tensors", "seeded"]  # rows of `model.update.METHODS`, which needs torch
SIZED = ("lowrank", "small-tensors")  # the methods whose size a level chooses


class Section(BaseModel):
    """A part of ferry.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stores(Section):
    """Places where things are stored. Relative paths start at the workspace.

    An environment variable replaces each key: see `VARIABLES`.
    """

    @field_validator("data", "publish", "s3_endpoint", "reports")
    @classmethod
    def _no_secret(cls, address: str) -> str:
        if secrets_of(address):
            raise PydanticCustomError(
                "secret", "it must hold no password, because DVC and S3 take none from an address; put the account into AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY",
            )  # fmt: skip
        return address

    data: str = Field(
        default="dvc-remote", description="where DVC keeps the bytes of all data revisions: a folder, or s3://bucket/prefix"
    )
    database: str = Field(
        default="sqlite:///ferry.db",
        description="SQLAlchemy URL of the database with the ledger and the fleet; several machines share postgresql://…; if it holds a "
        "password, give it by FERRY_STORES_DATABASE instead",
    )
    mlflow: str = Field(
        default="sqlite:///mlflow.db",
        description="database of MLflow, or the http(s) address of an MLflow server; if it holds a password, give it by "
        "FERRY_STORES_MLFLOW instead",
    )
    publish: str = Field(
        default="published", description="where the signed repository is copied to for devices: a folder, or s3://bucket/prefix"
    )
    s3_endpoint: str = Field(
        default="", description="URL of an S3-compatible server, for data and publish; empty: the servers of AWS"
    )
    reports: str = Field(default="inbox", description="folder in which devices leave their reports")

    @field_validator(*CHECKS)
    @classmethod
    def _can_work(cls, value: str, info: ValidationInfo) -> str:
        if said := fault(str(info.field_name), value):
            raise PydanticCustomError("place", "{said}", {"said": said})
        return value

    @model_validator(mode="after")
    def _are_apart(self) -> Stores:
        if self.publish.rstrip("/") == self.data.rstrip("/"):
            raise ValueError("publish and data are the same place; devices must not see the data, so give each its own")
        return self


class Alerts(Section):
    """Who is told about failed retrainings, refused promotions and expiring signatures, once for each change."""

    command: list[str] = Field(
        default=[],
        description="command and arguments that are run for each alert, with JSON on standard input; it has 15 seconds",
    )
    webhook: str = Field(
        default="", description="http(s) address to which each alert is sent, signed with the secret in FERRY_ALERT_SECRET"
    )

    @field_validator("command")
    @classmethod
    def _named(cls, words: list[str]) -> list[str]:
        if words and (not words[0].strip() or any("\0" in word for word in words)):
            raise PydanticCustomError(
                "command", "command names no program; write a list such as ['/usr/local/bin/page', 'factory']"
            )
        return words

    @field_validator("webhook")
    @classmethod
    def _reachable(cls, url: str) -> str:
        if not url:
            return url
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good, parts = False, urlsplit("")
        if not good or not url.isascii() or not url.isprintable() or " " in url:
            raise PydanticCustomError("webhook", "this is no http(s) address; write one such as https://alerts.example/ferry")
        if parts.username or parts.password:
            raise PydanticCustomError(
                "webhook", "an address with a password is refused: the signature proves who sends; remove the part before @"
            )
        return url


class Gateway(Section):
    """Where the gateway for devices listens, for `ferry gateway` and `ferry serve --gateway`."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="address that it listens at; without TLS it must be the loopback"
    )
    port: int = Field(default=8443, ge=1, le=65_535, description="port that it listens at")
    tls_cert: str = Field(
        default="", description="file with the certificate chain, as PEM; empty: no TLS, because a proxy on this machine adds it"
    )
    tls_key: str = Field(default="", description="file with the certificate's private key, as PEM")
    insecure_bind: StrictBool = Field(
        default=False, description="whether it may listen beyond the loopback without TLS, because a proxy elsewhere adds it"
    )
    trusted_proxies: list[str] = Field(
        default=[], description="addresses or networks of the proxies whose X-Forwarded-For is believed, such as 10.0.0.7"
    )
    access_log: StrictBool = Field(default=False, description="whether it writes a line for each request, without queries")


class Energy(Section):
    """Joules for an image as `ferry-agent bench` measured them on a device, for the report."""

    joules: float = Field(gt=0, description="energy of one image, in joules")
    low: float | None = Field(default=None, ge=0, description="lower end of the 95 % interval of joules; give high, too")
    high: float | None = Field(default=None, description="upper end of the 95 % interval of joules; give low, too")
    source: str = Field(min_length=1, max_length=80, description="sensor that measured it, such as RAPL package-0")
    quality: Literal["measured", "partial", "model"] = Field(
        description="quality of the figure, as `ferry-agent bench` prints it: measured, partial (the sensor sees a part of the device), or "
        "model (computed from processor time)"
    )

    @model_validator(mode="after")
    def _inside(self) -> Energy:
        if (self.low is None) != (self.high is None) or not (self.low or 0.0) <= self.joules <= (self.high or self.joules):
            raise ValueError("low and high are given together, and joules lies between them")
        return self


class GpuTime(Section):
    """Time of an accelerator for 1,000 images, as somebody measured it, for the report."""

    seconds: float = Field(gt=0, description="seconds that the accelerator computes for 1,000 images, without idle time")
    source: str = Field(min_length=1, max_length=80, description="how it was measured, such as NVIDIA L4, batches of 256")


class Training(Section):
    """How long and how fast to train; see `model.train.TrainOptions`."""

    steps: int = Field(default=400, ge=1, description="optimizer steps")
    batch: int = Field(default=32, ge=1, description="images in each step")
    learning_rate: float = Field(
        default=2e-3, gt=0, description="peak learning rate; it rises at the start and falls to 0 at the end"
    )
    update_grid: float = Field(
        default=0.0, ge=0, le=8,
        description="how coarsely the change of each tensor is rounded, as a multiple of its root mean square: a coarser grid gives a "
        "smaller delta and loses more of the training; 0 rounds nothing; it has no effect on a training from noise",
    )  # fmt: skip
    seed: int = Field(default=0, description="seed of the training; on a CPU, the same seed gives the same weights")

    def options(self, stored: PrecisionName) -> TrainOptions:
        """Convert to the options that `model.train` takes, for weights that will be stored in this precision."""
        from model.train import TrainOptions

        return TrainOptions(stored=stored, **self.model_dump())


class Distillation(Training):
    """How a student is taught; see `model.students`."""

    trajectories: int = Field(
        default=384,
        ge=16,
        le=100_000,
        description="images that `full` draws for the student, which learns from every point on their way",
    )
    thin: StrictBool = Field(
        default=True,
        description="whether only a twentieth of the weights is trained and the rest is that of `full`, so that a bundle hardly grows",
    )

    def options(self, stored: PrecisionName) -> TrainOptions:
        """Convert to the options that `model.train` takes, for weights that will be stored in this precision."""
        from model.train import TrainOptions

        return TrainOptions(stored=stored, warmup=10, decay_from=0.5, **self.model_dump(exclude={"trajectories", "thin"}))


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

    images: int = Field(default=256, ge=8, le=100_000, description="images that are generated for each evaluation")
    alpha: float = Field(default=0.05, ge=1e-6, lt=0.5, description="chance of promoting a worse model")
    tolerance: float = Field(
        default=0.5, gt=0, le=2,
        description="how much worse a challenger may be on old data, as a share of the champion's own distance from real images",
    )  # fmt: skip
    tolerance_bands: float = Field(
        default=1.5, ge=0, le=10,
        description="the same limit as a multiple of the distance between two sets of 25 groups of real images; the larger limit counts",
    )  # fmt: skip
    total_tolerance: float = Field(
        default=2.0, gt=0, le=10,
        description="how much worse a challenger may be than the anchor (the best version so far), in multiples of that limit",
    )  # fmt: skip
    minimum_images: int = Field(
        default=96,
        ge=8,
        le=100_000,
        description="smallest number of generated and of held-out images with which the gate decides",
    )
    coverage: float = Field(
        default=0.3, ge=0, le=1,
        description="smallest share of held-out images that have a generated image among their 5 nearest neighbours",
    )  # fmt: skip
    copying: float = Field(
        default=0.8, gt=0.5, le=1,
        description="limit of the chance that a generated image lies nearer to training images than a held-out image does; 0.5 is no copying",
    )  # fmt: skip
    copies: float = Field(
        default=0.1, gt=0, le=1,
        description="limit of the share of generated images that lie nearer to training images than every held-out image",
    )  # fmt: skip
    implausible: float = Field(
        default=0.3, gt=0, le=1, description="limit of the share of generated images that are unlike all real images"
    )
    implausible_more: float = Field(
        default=0.08, gt=0, le=1,
        description="limit of how far that share exceeds the champion's; tolerance times the champion's share counts if it is larger",
    )  # fmt: skip
    duplicates: float = Field(
        default=0.3, gt=0, le=1, description="limit of the share of generated images that are like another generated image"
    )
    captions: StrictBool = Field(
        default=True, description="whether images must match their captions, and each caption must be drawn"
    )
    beat_solver: StrictBool = Field(
        default=True,
        description="whether a student must draw nearer to the converged images of full than full itself with as many evaluations",
    )


class DeviceClass(Section):
    """A kind of hardware: it chooses the configuration, the precision and the variants."""

    configuration: ConfigurationName = Field(
        default="I", description="stride of the first convolution: I is 2 (fewer positions, faster), II is 1"
    )
    precision: PrecisionName = Field(
        default="bfloat16", description="how weights are stored: bfloat16 gives the smallest updates, int8 the smallest file"
    )
    variants: list[VariantName] = Field(
        default=["full", "dev", "fast", "turbo"],
        min_length=1,
        max_length=4,
        description="variants that the devices can choose from; the first is the default",
    )
    latency_ms: float = Field(default=5000, gt=0, description="time budget for one image, in milliseconds")
    memory_mib: float | None = Field(
        default=None, gt=0, description="memory budget for the model, in MiB beyond a bare interpreter; not given: no limit"
    )
    oldest_agent: str | None = Field(
        default=None,
        description="oldest ferry-agent among the devices, such as 0.1.0: bundles then have the form that it reads; not given: the newest form",
    )

    @field_validator("oldest_agent")
    @classmethod
    def _is_an_agent(cls, agent: str | None) -> str | None:
        if agent is None:
            return agent
        if not re.fullmatch(AGENT_VERSION, agent):
            parts = re.fullmatch(r"v?([0-9]{1,4})(?:\.([0-9]{1,4}))?(?:\.([0-9]{1,4}))?", agent.strip())
            written = ".".join(part or "0" for part in parts.groups()) if parts else "0.1.0"
            raise PydanticCustomError("agent", "this is no version of ferry-agent; write it as {written}", {"written": written})
        if as_numbers(agent) > as_numbers(ota.__version__):
            raise PydanticCustomError(
                "agent", "this is a newer ferry-agent than this ferry, {own}, makes bundles for; write {own} or an older one",
                {"own": ota.__version__},
            )  # fmt: skip
        return agent

    @model_validator(mode="after")
    def _each_once(self) -> DeviceClass:
        if len(set(self.variants)) < len(self.variants):
            raise ValueError("a variant is listed twice")
        return self


class Line(Section):
    """One product: its data, its model, its device classes."""

    data: DataFolder = Field(
        description="folder of the line's data, below the workspace: images, and a metadata.jsonl with file_name and text"
    )
    tier: TierName = Field(default="nano", description="size of the network; test is for tests only")
    image_size: int = Field(
        default=16, description="width and height of the images in pixels, 8 to 128; configuration I needs an even number"
    )
    channels: Literal[1, 3] = Field(default=1, description="colour channels: 1 is grey, 3 is colour")
    text_length: int = Field(default=24, description="bytes of a caption that the network reads, 4 to 256; the rest is ignored")
    router: RouterName = Field(default="expert-choice", description="who chooses: experts their tokens, or tokens their experts")
    training: Training = Field(default=Training(), description="training from noise, for the first version")
    retraining: Training = Field(
        default=Training(steps=200, learning_rate=5e-4, update_grid=2.0),
        description="training from the champion, for later versions",
    )
    distillation: Distillation = Field(
        default=Distillation(steps=160, batch=16, learning_rate=3e-3, update_grid=1.0),
        description="training of students, which draw in a few evaluations",
    )
    update_method: MethodName | None = Field(
        default=None,
        description="how the change of a retraining of full is made small, and what that drops is kept for the next one: lowrank keeps nearly "
        "all in the fewest bytes; the others are full, grid, small-tensors and seeded; with lowrank and small-tensors, students get lowrank; not given: "
        "rounded as update_grid says, and the rest is lost",
    )
    update_level: float | None = Field(
        default=None, gt=0, le=10,
        description="level of the method where there is no budget: a higher one takes fewer bytes and loses more; not given: the method's own. Where an "
        "update would take more than 1.15 times the bytes of the first ones at this level, its level is raised, to 4 times this one at most",
    )  # fmt: skip
    update_polish: int = Field(
        default=40, ge=0, le=1000,
        description="training steps that follow on the rounded update, which then keeps more in as many bytes; 0: none",
    )  # fmt: skip
    update_budget: Size | None = Field(
        default=None,
        description="most that a device may fetch for an update, such as 64KiB, all variants, signatures and golden outputs included; the "
        "smallest update that passes the gate and keeps update_keep is taken; not given: no limit, and update_level counts",
    )
    update_keep: float = Field(
        default=0.98, gt=0, lt=1,
        description="with a budget: share of the gain of the same retraining without a limit that an update must be shown to keep",
    )  # fmt: skip
    sampler: Sampler = Field(default=Sampler(), description="how the variant full draws an image")
    samplers: dict[VariantName, Sampler] = Field(
        default={},
        description="how another variant draws; not given: dev with half and fast with a quarter of the steps of full, on shifted grids, turbo in 4 steps of a "
        "student. The method mean is a student's, the others draw with the weights of full",
    )
    gate: Gate = Field(default=Gate(), description="limits of the promotion gate")
    require_approval: StrictBool | None = Field(
        default=None,
        description="whether a version that passes the gate waits for `ferry approve`; not given: as the workspace says",
    )
    classes: dict[LineName, DeviceClass] = Field(
        default={"edge": DeviceClass()}, min_length=1, description="a device class: a kind of hardware, and what runs on it"
    )

    @model_validator(mode="after")
    def _full_has_its_own(self) -> Line:
        if "full" in self.samplers or self.sampler.method == "mean":
            raise PydanticCustomError(
                "sampler", "full draws with a solver, as [lines.NAME.sampler] says; name it there, and no `mean`"
            )
        return self

    @model_validator(mode="after")
    def _budget_has_a_method(self) -> Line:
        if self.update_budget is not None and self.update_method not in SIZED:
            raise PydanticCustomError(
                "update_budget",
                'update_budget needs a method whose size can be chosen; write update_method = "lowrank", too, or remove the budget',
            )
        return self

    @model_validator(mode="after")
    def _one_precision(self) -> Line:
        stored = {(c.configuration, c.precision) for c in self.classes.values()}
        if len(stored) > len({configuration for configuration, _ in stored}):
            raise ValueError("classes of one configuration must share a precision, because a version is exported once")
        return self

    def config(self, configuration: ConfigurationName) -> ModelConfig:
        """Return the network's `ModelConfig` for a configuration."""
        return ModelConfig(
            tier=self.tier, configuration=configuration, image_size=self.image_size, channels=self.channels,
            text_length=self.text_length, router=self.router,
        )  # fmt: skip

    def combinations(self) -> list[tuple[ConfigurationName, VariantName]]:
        """List what must be made: each (configuration, variant) that a class runs, and `full`, which all come from, first."""
        wanted = {(c.configuration, variant) for c in self.classes.values() for variant in ("full", *c.variants)}
        ladder = list(VARIANTS)
        return sorted(wanted, key=lambda pair: (pair[0], ladder.index(pair[1])))

    def configuration_called(self, text: str) -> ConfigurationName:
        """Find one of the configurations that the line's classes run.

        Raises:
            WorkspaceError: none of them is called so.
        """
        for name in self.ladders():
            if name == text:
                return name
        raise WorkspaceError(f"no class of this line runs configuration {shown(text)}; choose {' or '.join(self.ladders())}")

    def ladders(self) -> dict[ConfigurationName, list[VariantName]]:
        """Group `combinations` by configuration; different configurations do not depend on each other."""
        found: dict[ConfigurationName, list[VariantName]] = {}
        for configuration, variant in self.combinations():
            found.setdefault(configuration, []).append(variant)
        return found

    def sources(self, variant: VariantName) -> tuple[SourceName, ...]:
        """List where the weights of a variant may come from, the cheapest source first."""
        given = self.samplers.get(variant)
        if given:
            return ("student",) if given.method == "mean" else ("table",)
        return VARIANTS[variant].sources

    def sampler_of(self, variant: VariantName, source: SourceName | None = None) -> Sampler:
        """Return the sampler of a variant whose weights come from a source; None: from the cheapest one."""
        source, steps = source or self.sources(variant)[0], self.sampler.steps
        if variant in self.samplers:
            return self.samplers[variant]
        if source == "student":
            return Sampler(method="mean", steps=VARIANTS[variant].student_steps, guidance=1.0)
        drawn = VARIANTS[variant]
        shift = min(10.0, max(0.1, round(self.sampler.shift * drawn.shift, 6)))
        return self.sampler.model_copy(update={"steps": -(-steps // drawn.divisor), "shift": shift})

    def options(self, way: Training, stored: PrecisionName) -> TrainOptions:
        """Convert one of the line's trainings to the options that `model.train` takes; with a method, the result is a master.

        Students have the method `lowrank` where the size of the updates of `full` can be chosen, and are rounded by `update_grid` otherwise.
        """
        options, method = way.options(stored), self.update_method
        if isinstance(way, Distillation):
            method = "lowrank" if method in SIZED else None
        return options if method is None else options.model_copy(update={"method": method, "update_grid": 0.0})

    def precision(self, configuration: ConfigurationName) -> PrecisionName:
        """Return the precision in which the classes of a configuration store weights; all of them share it."""
        return next(c.precision for c in self.classes.values() if c.configuration == configuration)

    def delta_form(self, configuration: ConfigurationName) -> int:
        """Return the format version of deltas that the agents of all classes of a configuration read."""
        oldest = [c.oldest_agent for c in self.classes.values() if c.configuration == configuration and c.oldest_agent]
        return 1 if any(as_numbers(agent) < as_numbers(READS_FACTORS) for agent in oldest) else 2

    def latency_ms(self, configuration: ConfigurationName, variant: VariantName) -> float:
        """Return the smallest latency budget of the classes that run a variant, in ms; an hour if the variant only teaches."""
        budgets = [c.latency_ms for c in self.classes.values() if c.configuration == configuration and variant in c.variants]
        return min(budgets, default=TEACHING_MS)

    def memory_mib(self, configuration: ConfigurationName, variant: VariantName) -> float | None:
        """Return the smallest memory budget of the classes that run a variant, in MiB; None: no class has one."""
        running = [c for c in self.classes.values() if c.configuration == configuration and variant in c.variants]
        return min((c.memory_mib for c in running if c.memory_mib is not None), default=None)


def _with_older_defaults(line: Any) -> Any:
    """Add the defaults of format 1 to a line's settings as they stand in the file; what has no form stays as it is."""
    if not isinstance(line, dict) or not all(isinstance(line.get(key, {}), dict) for key in ("sampler", "classes")):
        return line
    classes = line.get("classes") or {"edge": {}}
    return line | {
        "sampler": {"steps": 14} | line.get("sampler", {}),
        "classes": {k: {"variants": ["full"]} | c if isinstance(c, dict) else c for k, c in classes.items()},
    }


class Settings(Section):
    """The content of ferry.toml."""

    schema_version: Literal[1, 2] = Field(
        alias="schema", description="version of the workspace's format; 1 has the defaults of ferry 0.1: 14 steps, and full alone"
    )
    parallel: int = Field(default=1, ge=1, le=8, description="number of configurations that are retrained at the same time")
    stores: Stores = Field(
        default=Stores(),
        description="where things are stored; the environment variable FERRY_STORES_KEY, such as FERRY_STORES_DATABASE, replaces a key",
    )
    alerts: Alerts = Field(default=Alerts(), description="who is told when something needs a person")
    gateway: Gateway = Field(default=Gateway(), description="where the gateway for devices listens")
    prices: Prices = Field(default=Prices(), description="your prices, for the report")
    require_approval: StrictBool = Field(
        default=False, description="whether a version that passes the gate waits for `ferry approve`; a line may say otherwise"
    )
    poll_seconds: float = Field(
        default=60, ge=1, le=86_400, description="seconds between two checks of MLflow's aliases by `ferry serve`"
    )
    lines: dict[LineName, Line] = Field(
        min_length=1, description="a line: one product with its data, its model and its device classes"
    )
    energy: dict[LineName, dict[LineName, dict[VariantName, Energy]]] = Field(
        default={}, description="measured energy of an image, by line, class and variant"
    )

    gpu: dict[LineName, dict[ConfigurationName, dict[VariantName, GpuTime]]] = Field(
        default={},
        description="measured time of an accelerator for 1,000 images, by line, configuration and variant; not given: estimated",
    )

    def gpu_of(self, line: str, configuration: ConfigurationName, variant: VariantName) -> GpuTime | None:
        """Return the measured time of an accelerator for a variant; None: nobody entered one."""
        return self.gpu.get(line, {}).get(configuration, {}).get(variant)

    def energy_of(self, line: str, configuration: ConfigurationName, variant: VariantName) -> Energy | None:
        """Return the energy of an image, for the first class of a line that has a figure; None: no class has one."""
        for name, device_class in self.lines[line].classes.items():
            given = self.energy.get(line, {}).get(name, {}).get(variant)
            if given and device_class.configuration == configuration:
                return given
        return None

    @model_validator(mode="before")
    @classmethod
    def _older_defaults(cls, given: Any) -> Any:
        """Give a workspace of format 1 the defaults that it was made with, so that its lines stay as they are until asked."""
        if not isinstance(given, dict) or given.get("schema") != 1 or not isinstance(given.get("lines"), dict):
            return given
        return given | {"lines": {name: _with_older_defaults(line) for name, line in given["lines"].items()}}

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
    def _gpu_of_something(self) -> Settings:
        for name, configurations in self.gpu.items():
            known = self.lines[name].combinations() if name in self.lines else []
            for configuration, variants in configurations.items():
                if not {(configuration, variant) for variant in variants} <= {*known}:
                    raise ValueError(
                        f"gpu.{name}.{configuration} names a line, configuration or variant that is not in this file"
                    )
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
    except OSError as error:
        raise WorkspaceError(f"{path} cannot be read: {error.strerror}; check who may read it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"{path} is not valid TOML: {error}; correct that line") from error
    try:
        _check_format(path, given.get("schema"))
        given = _from_environment(given)
        settings = Settings.model_validate(given)
        for line in settings.lines.values():
            for configuration, _ in line.combinations():
                line.config(configuration)
    except ValidationError as error:
        where = (
            "" if error.title == Settings.__name__ else "a line: "
        )  # what its network needs is checked key by key, without its name
        told = f"{where}{first_fault(error, Settings)}"
        at = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        if at.startswith("stores.") and (variable := VARIABLES.get(at.removeprefix("stores."), "")) in os.environ:
            raise WorkspaceError(f"{variable}: {told.partition(': ')[2] or told}") from error
        raise WorkspaceError(f"{path}: {told}") from error
    return settings


def _from_environment(given: dict[str, Any]) -> dict[str, Any]:
    """Put the values of `VARIABLES` that are set in the place of the file's, and remember the passwords in both, to hide them."""
    set_here = {key: os.environ[name] for key, name in VARIABLES.items() if os.environ.get(name)}
    stores = given.get("stores", {})
    if isinstance(stores, dict):
        remember(*(value for value in (*stores.values(), *set_here.values()) if isinstance(value, str)))
        given = given | {"stores": stores | set_here}
    return given


def _check_format(path: Path, found: object) -> None:
    """Refuse a workspace whose format this ferry does not know.

    Raises:
        WorkspaceError: a newer ferry made the workspace, or ferry.toml names no known format.
    """
    if isinstance(found, int) and found > FORMAT:
        raise WorkspaceError(
            f"{path}: schema = {found} is the format of a newer version of ferry, but this version knows {FORMAT}; install "
            "the newer version (nothing was changed)"
        )
    if found not in FORMATS:
        raise WorkspaceError(
            f"{path}: schema = {FORMAT} is missing at its beginning; if this is a workspace, write it there: no older format was ever released"
        )

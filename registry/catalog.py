"""MLflow: runs, versions and aliases of our models. Only this file and `registry.dataset` import MLflow.

There is one registered model for each line, configuration and variant. A version's run is opened when its training begins, and
is filled while the training goes on. At the end it holds the checkpoint and the exported files byte for byte. It also holds
MLflow's ONNX flavour, which is a view for people and tools and is never signed. The runs of one retraining are nested in a run
of its own. `champion`, `challenger` and `anchor` are aliases (MLflow's stages are deprecated). Tags hold the facts that lead
back to data, code and parent.

    >>> catalog = Catalog("sqlite:///mlflow.db", Path("mlartifacts"))
    >>> catalog.champion(Subject.parse("surfaces/I/full"))
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import ValidationError

from model.config import ConfigurationName, VariantName, canonical_sha256
from model.scorecard import DataVersion, Frozen, Lineage, Scorecard, Sha256
from registry.errors import CatalogError, StoreError
from registry.selection import Decision

# MLflow reads these when it is imported. DO_NOT_TRACK must be the word "true"; "1" does not switch the tracking off.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `ferry --json` answers on stdout

import mlflow
import mlflow.onnx
import numpy as np
import onnx
from mlflow.data.dataset_source_registry import get_registered_sources, register_dataset_source
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec
from sqlalchemy.exc import SQLAlchemyError

from registry.dataset import DvcDatasetSource, dataset_input
from registry.ledger import user
from registry.lineage import data_tags, environment, repository_of, version_tags
from registry.seal import SCORECARD, FileSeal, Part, Seal, files_of, is_whole, other_bytes, sealed_bytes

if not any(source is DvcDatasetSource for source in cast("list[Any]", get_registered_sources())):
    register_dataset_source(cast("Any", DvcDatasetSource))  # a program that is not installed has no entry point

CHAMPION, CHALLENGER, ANCHOR = "champion", "challenger", "anchor"  # aliases
CHECKPOINT, BUNDLE = "checkpoint", "bundle"
FOLLOWS = "ledger.champion"  # tag of a registered model: entry that its champion alias follows; see registry/promotion.py
TRAINING, RETRAINING = (
    "training.key",
    "retraining.key",
)  # tags by which the run of a training, and the run around a retraining, are found again
WORKSPACE = "workspace"  # tag of every run: who writes into it
PARENT_RUN, NOTE, COMMIT = (
    "mlflow.parentRunId",
    "mlflow.note.content",
    "mlflow.source.git.commit",
)  # tags that MLflow's pages know
_opening = threading.Lock()  # variants that are trained in parallel must share one run around them

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries are not worth a line


class Subject(Frozen):
    """Line, configuration and variant: what a registered model is for."""

    line: str
    configuration: ConfigurationName
    variant: VariantName

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Parse LINE/CONFIG/VARIANT.

        Raises:
            CatalogError: the text does not have that form.
        """
        parts = text.split("/")
        known = (get_args(ConfigurationName), get_args(VariantName))
        if len(parts) != 3 or parts[1] not in known[0] or parts[2] not in known[1]:
            raise CatalogError(
                f"{text!r} is not LINE/CONFIG/VARIANT; write it as surfaces/I/full, with configuration {' or '.join(known[0])} and variant "
                f"{', '.join(known[1][:-1])} or {known[1][-1]}"
            )
        return cls(line=parts[0], configuration=cast("Any", parts[1]), variant=cast("Any", parts[2]))

    def __str__(self) -> str:
        return f"{self.line}/{self.configuration}/{self.variant}"

    @property
    def model(self) -> str:
        """Name of the registered model; MLflow allows no slash in it."""
        return f"{self.line}-{self.configuration}-{self.variant}"


class Version(Frozen):
    """A registered version, as MLflow has it. MLflow's users may have made it or changed its tags; the ledger's seal counts."""

    subject: Subject
    number: int
    run_id: str
    aliases: list[str]
    tags: dict[str, str]

    @property
    def tagged_weights(self) -> str:
        """Hash of its exported weights according to a tag, which MLflow's users can edit; empty: there is no such tag."""
        return self.tags.get("weights.sha256", "")


class Retraining(Frozen):
    """The MLflow run around everything that is made of one data revision with the same code and settings."""

    run_id: str
    data: DataVersion


class Training:
    """A run that is filled while a network is trained; `Catalog.register` continues it. Each call may raise StoreError."""

    def __init__(self, client: MlflowClient, run_id: str, logged: set[int]) -> None:
        self.run_id = run_id
        self._client, self._logged = client, logged

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log figures with their step; skip a step that an interrupted training logged before."""
        if step in self._logged:
            return
        now = int(time.time() * 1000)
        with _foreign_errors():
            self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])
        self._logged.add(step)

    def sample(self, path: Path) -> None:
        """Upload a sample picture to the place where the checkpoint's own copy of it will be."""
        with _foreign_errors():
            _check_place(self._client, self.run_id)
            self._client.log_artifact(self.run_id, str(path), f"{CHECKPOINT}/{path.parent.name}")

    def finish(self, lineage_sha256: str) -> None:
        """Mark the run as finished: the weights are complete, and the run waits for their registration."""
        with _foreign_errors():
            self._client.set_tag(self.run_id, "lineage.sha256", lineage_sha256)
            self._client.set_terminated(self.run_id)

    def fail(self) -> None:
        """Mark the run as failed, because the training was interrupted; `Catalog.open_training` continues it."""
        with _foreign_errors():
            self._client.set_terminated(self.run_id, "FAILED")


class Catalog:
    """Registered models behind an MLflow tracking URI."""

    def __init__(self, uri: str, artifacts: Path) -> None:
        """Open the catalogue, and set up a database that is new.

        Args:
            uri: of MLflow: a database URL, or the address of a server.
            artifacts: folder for files if MLflow is a database; a server has its own. The folder around it is the workspace.

        Raises:
            StoreError: it cannot be reached.
        """
        self._uri, self._artifacts = uri, artifacts.absolute()
        self._owner = f"{socket.gethostname()}:{self._artifacts.parent}"
        with _foreign_errors():
            mlflow.set_tracking_uri(uri)
            self._client = MlflowClient(uri)

    def register(
        self,
        subject: Subject,
        lineage: Lineage,
        card: Scorecard,
        decision: Decision,
        checkpoint: Path,
        export: Path,
        pictures: Mapping[str, Path],
        curve: list[dict[str, float]],
        within: Retraining | None = None,
        known: Mapping[int, Sha256] | None = None,
    ) -> Version:
        """Record a model with everything about it; return the version that is there if it was recorded before.

        Anybody may put tags on any version, so tags alone do not show that a version is this model. It must be a version that the
        ledger has under this scorecard. Or it must be a version that the ledger does not have, because its registration was
        interrupted, and that holds the same files.

        The version is created last, in one call, so an interrupted registration leaves a run but never half a version.
        Everything is recorded in the run that the training opened, or that an interrupted registration left. Of the training
        curve, only what is missing is added. The newest version that the gate let through is `challenger` until it is champion.

        Args:
            subject: line, configuration and variant of the version.
            lineage: of the checkpoint.
            card: of the exported model.
            decision: the gate's decision.
            checkpoint: folder of the checkpoint.
            export: folder of the exported files.
            pictures: files to show, by name.
            curve: of the training, one row for each recorded step.
            within: the retraining that made the model; None: it was trained outside a retraining.
            known: the versions that the ledger has, each with the hash of its scorecard.

        Raises:
            StoreError: MLflow cannot be reached or refuses; the run is then marked failed.
        """
        judged = known or {}
        files = {
            **files_of("bundle", export),
            **files_of("checkpoint", checkpoint),
            SCORECARD: sealed_bytes(card_text(card).encode()),
        }
        with _foreign_errors():
            there = self._find(subject)
            for version in there:
                cut_off = version.number not in judged and version.tags.get("scorecard.sha256") == card.sha256
                if judged.get(version.number) == card.sha256 or (cut_off and self._holds(version.run_id, files)):
                    return self._challenging(version)
            experiment = self._experiment(subject.line)
            tags = data_tags(lineage.data, self._repository)
            tags |= version_tags(lineage, card, decision, checkpoint, export, curve)
            tags |= self._ancestors(lineage)
            run_id = self._begun(experiment, card, lineage) or self._create_run(experiment, subject, {})
            try:
                commit = {COMMIT: tags["code.rev"]} if "code.rev" in tags else {}
                self._reopen(
                    run_id, tags | commit | {NOTE: tags["gate.reason"]} | ({PARENT_RUN: within.run_id} if within else {})
                )
                used = [dataset_input(lineage.data, self._repository, context) for context in ("training", "evaluation")]
                self._client.log_inputs(run_id, used)
                self._log(run_id, subject, lineage, card)
                self._log_curve(run_id, curve)
                _check_place(self._client, run_id)
                self._client.log_artifacts(run_id, str(checkpoint), CHECKPOINT)
                self._client.log_artifacts(run_id, str(export), BUNDLE)
                for path in pictures.values():
                    self._client.log_artifact(run_id, str(path), "pictures")
                self._client.log_text(run_id, card_text(card), SCORECARD)
                self._client.log_text(run_id, decision.model_dump_json(indent=1), "decision.json")
                self._client.log_text(run_id, environment(), "environment.txt")
                self._forget_views(experiment, run_id)
                view = self._log_view(run_id, export)
                self._client.set_terminated(run_id)
            except BaseException as error:
                if not _unreachable(error):  # another call would only wait for it once more
                    with suppress(MlflowException):
                        self._client.set_terminated(run_id, "FAILED")
                raise
            if not self._client.search_registered_models(f"name = '{subject.model}'"):
                self._client.create_registered_model(subject.model, description=f"{subject}, made by DeltaFerry")
            made = self._client.create_model_version(  # a server, unlike a database, needs the view's id besides its address
                subject.model,
                source=f"models:/{view}",
                run_id=run_id,
                tags=tags,
                description=tags["gate.reason"],
                model_id=view,
            )
            # If a server answers too late, the client asks twice, and two versions are made for this run: the first stays.
            before = {v.number for v in there}
            first, *twins = (
                v for v in self._find(subject) if v.run_id == run_id and v.number <= int(made.version) and v.number not in before
            )
            for twin in twins:
                self._client.delete_model_version(subject.model, str(twin.number))
            return self._challenging(first)

    def open_retraining(self, data: DataVersion, key: str) -> Retraining:
        """Open the run around a retraining; the same key continues the same run.

        Raises:
            StoreError: MLflow cannot be reached or refuses.
        """
        with _foreign_errors(), _opening:
            experiment = self._experiment(data.line)
            found = self._client.search_runs(
                [experiment], f"tags.`{RETRAINING}` = '{key}'", order_by=["attributes.start_time ASC"]
            )
            if found:
                run_id = found[0].info.run_id
                if found[0].info.status != "RUNNING":
                    self._reopen(run_id, {})
            else:
                tags = {RETRAINING: key, **data_tags(data, self._repository)}
                run_id = self._new_run(experiment, f"{data.line} {data.rev[:7]}", tags)
                self._client.log_inputs(run_id, [dataset_input(data, self._repository, "retraining")])
        return Retraining(run_id=run_id, data=data)

    def end_runs(self, line: str, key: str, ended: Literal["FINISHED", "FAILED"] | None, note: str = "") -> None:
        """End the runs of a line that this workspace left running; no other command may be at work on the line.

        Args:
            line: line whose runs are ended.
            key: key of the present retraining.
            ended: how the present retraining ended; None: it begins, and its own run is left as it is.
            note: result of the retraining in Markdown, for its page in MLflow.

        Raises:
            StoreError: MLflow cannot be reached or refuses.
        """
        with _foreign_errors():
            known = self._client.get_experiment_by_name(line)
            if not known:
                return
            for run in self._client.search_runs([known.experiment_id], "attributes.status = 'RUNNING'"):
                tags = run.data.tags
                if tags.get(WORKSPACE) != self._owner or (ended is None and tags.get(RETRAINING) == key):
                    continue
                ours = ended is not None and tags.get(RETRAINING) == key
                if ours and note:
                    self._client.set_tag(run.info.run_id, NOTE, note)
                self._client.set_terminated(run.info.run_id, ended if ours and ended else "KILLED")

    def open_training(self, subject: Subject, key: str, within: Retraining | None = None) -> Training:
        """Open the run that is filled while a network is trained; the same key continues the same run.

        Args:
            subject: what is trained.
            key: hash of everything that the training depends on.
            within: the retraining that the training is a part of; None: it is not part of one.

        Raises:
            StoreError: MLflow cannot be reached or refuses.
        """
        with _foreign_errors():
            experiment = self._experiment(subject.line)
            found = self._client.search_runs([experiment], f"tags.`{TRAINING}` = '{key}'")
            # A run that became a version stays as it is, even if its training is repeated because its folder was lost.
            known = [run for run in found if "scorecard.sha256" not in run.data.tags]
            run_id = known[0].info.run_id if known else self._create_run(experiment, subject, {TRAINING: key})
            tags = {PARENT_RUN: within.run_id, **data_tags(within.data, self._repository)} if within else {}
            self._reopen(run_id, tags)
            if within:
                self._client.log_inputs(run_id, [dataset_input(within.data, self._repository, "training")])
            logged = {metric.step for metric in self._client.get_metric_history(run_id, "loss")}
        return Training(self._client, run_id, logged)

    def promote(self, subject: Subject, number: int) -> None:
        """Point the champion alias at a version, and delete the challenger alias if it points there.

        Raises:
            CatalogError: there is no such version.
        """
        self.set_alias(subject, CHAMPION, number)
        challenger = self.aliased(subject, CHALLENGER)
        if challenger and challenger.number == number:
            with _foreign_errors():
                self._client.delete_registered_model_alias(subject.model, CHALLENGER)

    def set_alias(self, subject: Subject, alias: str, number: int) -> None:
        """Point an alias at a version.

        Raises:
            CatalogError: there is no such version.
        """
        self.version(subject, number)
        with _foreign_errors():
            self._client.set_registered_model_alias(subject.model, alias, str(number))

    def clear_alias(self, subject: Subject, alias: str) -> None:
        """Delete an alias."""
        with _foreign_errors():
            self._client.delete_registered_model_alias(subject.model, alias)

    def follows(self, subject: Subject) -> int:
        """Return the number of the ledger entry for which the champion alias was last moved; 0: none is noted."""
        with _foreign_errors():
            found = self._client.search_registered_models(f"name = '{subject.model}'")
        said = found[0].tags.get(FOLLOWS, "") if found else ""
        return int(said) if re.fullmatch("[0-9]{1,9}", said) else 0  # anybody can write any text into a tag

    def follow(self, subject: Subject, entry: int) -> None:
        """Note the number of the ledger entry for which the champion alias was moved."""
        with _foreign_errors():
            self._client.set_registered_model_tag(subject.model, FOLLOWS, str(entry))

    def note(self, subject: Subject, number: int, name: str, text: str) -> None:
        """Set a tag of a version for people who read it in MLflow; a longer text is cut after 4,900 characters."""
        with _foreign_errors():
            self._client.set_model_version_tag(subject.model, str(number), name, text[:4900])

    def champion(self, subject: Subject) -> Version | None:
        """Return the version that the champion alias points at; None: there is no champion."""
        return self.aliased(subject, CHAMPION)

    def aliased(self, subject: Subject, alias: str) -> Version | None:
        """Return the version that an alias points at; None: there is no such alias."""
        with _foreign_errors():
            try:
                return self._with_aliases(subject, self._client.get_model_version_by_alias(subject.model, alias))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def version(self, subject: Subject, number: int) -> Version:
        """Return a version by its number.

        Raises:
            CatalogError: there is no version with that number.
        """
        with _foreign_errors():
            try:
                return self._with_aliases(subject, self._client.get_model_version(subject.model, str(number)))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    known = [str(v.number) for v in self.versions(subject)]
                    hint = f"there are {', '.join(known)}" if known else "there is none yet, run `ferry retrain`"
                    raise CatalogError(f"{subject} has no version {number}; {hint}") from error
                raise

    def versions(self, subject: Subject) -> list[Version]:
        """Return all versions of a subject, oldest first."""
        with _foreign_errors():
            return self._find(subject)

    def files(self, seal: Seal, part: Part, into: Path) -> Path:
        """Fetch the sealed files of a version into a folder of their own, and return the folder.

        Each file is checked against its seal, even if it was fetched before.

        Args:
            seal: of the version, from the ledger.
            part: which folder of the version's run.
            into: folder in which fetched files are kept, by their content.

        Raises:
            CatalogError: the version does not exist any more.
            SealError: MLflow holds other bytes, or does not have the file.
            StoreError: the files cannot be fetched.
        """
        facts = seal.part(part)
        place = into / canonical_sha256([seal.subject, {name: fact.digest for name, fact in facts.items()}])[:32] / part
        lacking = [name for name, fact in facts.items() if not is_whole(place / name, fact)]
        if lacking:
            place.mkdir(parents=True, exist_ok=True)
            run_id = self._run_of(seal)
            for name in lacking:
                self._fetch(run_id, seal, f"{part}/{name}", facts[name], place / name)
        return place

    def data(self, seal: Seal, name: str) -> bytes:
        """Fetch one sealed file of a version's run, and return its content.

        Raises:
            CatalogError, SealError, StoreError: as `files`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._fetch(self._run_of(seal), seal, name, seal.files[name], Path(folder) / "file")
            return (Path(folder) / "file").read_bytes()

    def card(self, seal: Seal) -> Scorecard:
        """Fetch a version's scorecard.

        Raises:
            CatalogError, SealError, StoreError: as `files`; StoreError also if another version of ferry wrote the scorecard.
        """
        try:
            return Scorecard.model_validate_json(self.data(seal, SCORECARD))
        except ValidationError as error:
            raise StoreError(f"the scorecard of {seal.name} is of another ferry; install that one, or `ferry retrain`") from error

    def as_they_are(self, version: Version, names: Collection[str], into: Path, largest: int) -> dict[str, Path]:
        """Fetch files of a version that has no seal yet, as MLflow has them now; only for `ferry seal`, which says so.

        Args:
            version: version whose files are fetched.
            names: names in its run; missing files are left out.
            into: an empty folder.
            largest: most bytes that a file may have.

        Raises:
            StoreError: a file is larger, or cannot be fetched.
        """
        found = {}
        with _foreign_errors():
            for folder in sorted({name.rpartition("/")[0] for name in names}):
                for row in self._client.list_artifacts(version.run_id, folder or None) if version.run_id else ():
                    if row.path not in names or row.is_dir:
                        continue
                    if (row.file_size or 0) > largest:
                        raise StoreError(
                            f"{row.path} of {version.subject} {version.number} in MLflow has {row.file_size:,} bytes, too many"
                        )
                    found[row.path] = self._downloaded(version.run_id, row.path, into)
        return found

    # Private helpers

    def _holds(self, run_id: str, files: Mapping[str, FileSeal]) -> bool:
        """Check whether a run holds files with these names, sizes and hashes."""
        with tempfile.TemporaryDirectory() as folder:
            for name, fact in files.items():
                listed = self._client.list_artifacts(run_id, name.rpartition("/")[0] or None) if run_id else []
                if fact.size not in [row.file_size for row in listed if row.path == name]:
                    return False
                if not is_whole(self._downloaded(run_id, name, Path(folder)), fact):
                    return False
        return True

    def _run_of(self, seal: Seal) -> str:
        return self.version(Subject.parse(seal.subject), seal.version).run_id

    def _fetch(self, run_id: str, seal: Seal, name: str, fact: FileSeal, place: Path) -> None:
        """Fetch one file, whose size is checked first; it appears in its place only if it is the one that was sealed."""
        with _foreign_errors():
            folder = name.rpartition("/")[0]
            listed = self._client.list_artifacts(run_id, folder or None) if run_id else []
            sizes = {row.path: row.file_size for row in listed if not row.is_dir}
            if name not in sizes:
                raise other_bytes(seal, name, "it is not there")
            if sizes[name] is not None and sizes[name] != fact.size:
                raise other_bytes(seal, name, f"{sizes[name]:,} bytes, not {fact.size:,}")
            fresh = place.with_name(f".{secrets.token_hex(8)}.tmp")
            fresh.mkdir()
            try:
                got = self._downloaded(run_id, name, fresh)
                if not is_whole(got, fact):
                    raise other_bytes(seal, name, "it has another hash")
                got.replace(place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def _downloaded(self, run_id: str, name: str, into: Path) -> Path:
        return Path(self._client.download_artifacts(run_id, name, str(into)))

    @cached_property
    def _repository(self) -> str:
        return repository_of(self._artifacts.parent)

    def _challenging(self, version: Version) -> Version:
        """Make a version the challenger if the gate let it through, it is the newest and is not champion; return it."""
        newest = max(v.number for v in self._find(version.subject))
        if (
            version.tags.get("gate.outcome") == "promote"
            and version.number == newest
            and not {CHAMPION, CHALLENGER} & set(version.aliases)
        ):
            self._client.set_registered_model_alias(version.subject.model, CHALLENGER, str(version.number))
            return version.model_copy(update={"aliases": sorted([*version.aliases, CHALLENGER])})
        return version

    def _ancestors(self, lineage: Lineage) -> dict[str, str]:
        """Return tags that name, as MODEL/NUMBER, the versions from which a training started and by which it was taught."""
        tags = {}
        for name, sha256 in (("parent", lineage.parent), ("teacher", lineage.teacher)):
            if sha256:
                found = self._client.search_model_versions(f"tags.`checkpoint.sha256` = '{sha256}'")
                if found:
                    oldest = min(found, key=lambda v: int(v.version))
                    tags[f"{name}.version"] = f"{oldest.name}/{oldest.version}"
        return tags

    def _forget_views(self, experiment: str, run_id: str) -> None:
        """Delete the views that an interrupted registration left in its run."""
        for view in self._client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
            self._client.delete_logged_model(view.model_id)

    def _find(self, subject: Subject) -> list[Version]:
        found: list[Any] = []
        page: str | None = None
        while True:  # there may be more than the 1,000 of one page
            rows = self._client.search_model_versions(f"name = '{subject.model}'", max_results=1000, page_token=page)
            found += rows
            page = rows.token
            if not page:
                break
        versions = sorted((_version(subject, v) for v in found), key=lambda v: v.number)
        aliases = self._aliases(subject) if versions else {}
        return [v.model_copy(update={"aliases": aliases.get(v.number, [])}) for v in versions]

    def _aliases(self, subject: Subject) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for alias, number in self._client.get_registered_model(subject.model).aliases.items():
            found.setdefault(int(number), []).append(alias)
        return found

    def _with_aliases(self, subject: Subject, made: Any) -> Version:
        version = _version(subject, made)
        return version.model_copy(update={"aliases": self._aliases(subject).get(version.number, [])})

    def _experiment(self, line: str) -> str:
        known = self._client.get_experiment_by_name(line)
        if known:
            return str(known.experiment_id)
        location = None if self._uri.startswith("http") else (self._artifacts / line).as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # MLflow then shows runs first, and no page for chats
        return str(self._client.create_experiment(line, artifact_location=location, tags=kind))

    def _create_run(self, experiment: str, subject: Subject, tags: dict[str, str]) -> str:
        return self._new_run(experiment, f"{subject.configuration}-{subject.variant}", tags)

    def _new_run(self, experiment: str, name: str, tags: dict[str, str]) -> str:
        known = {WORKSPACE: self._owner, "mlflow.user": user(), "mlflow.source.name": "ferry", "mlflow.source.type": "LOCAL"}
        return str(self._client.create_run(experiment, run_name=name, tags=known | tags).info.run_id)

    def _begun(self, experiment: str, card: Scorecard, lineage: Lineage) -> str | None:
        """Find the run of an interrupted registration of this scorecard, or else that of the training; None: there is none."""
        for tag, value in (("scorecard.sha256", card.sha256), ("lineage.sha256", lineage.sha256)):
            for run in self._client.search_runs([experiment], f"tags.`{tag}` = '{value}'"):
                run_id = str(run.info.run_id)
                # Anybody can set tags. A run that has a version already holds sealed files, which must stay.
                if run.data.tags.get("scorecard.sha256", card.sha256) == card.sha256 and not self._client.search_model_versions(
                    f"run_id = '{run_id}'"
                ):
                    return run_id
        return None

    def _reopen(self, run_id: str, tags: dict[str, str]) -> None:
        self._client.update_run(run_id, status="RUNNING")
        tags = {WORKSPACE: self._owner, **tags}
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _log_curve(self, run_id: str, curve: list[dict[str, float]]) -> None:
        """Log the values of the curve that the training has not logged itself, with their steps."""
        names = {name for row in curve for name in row if name != "step"}
        begun = self._client.get_run(run_id).info.start_time  # times count from here, so that MLflow can draw the curve over time
        logged = {(name, metric.step) for name in names for metric in self._client.get_metric_history(run_id, name)}
        metrics = [
            Metric(name, row[name], begun + int(1000 * row.get("seconds", 0)), int(row["step"]))
            for row in curve
            for name in row
            if name != "step" and (name, int(row["step"])) not in logged
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[first : first + 1000])

    def _log(self, run_id: str, subject: Subject, lineage: Lineage, card: Scorecard) -> None:
        params = lineage.config.model_dump() | card.sampler.model_dump()
        params |= {"variant": subject.variant, "seed": lineage.seed, "training_steps": lineage.steps, "items": lineage.items}
        now = int(time.time() * 1000)
        numbers = {"milliseconds_per_image": card.cost.milliseconds, "peak_mib": card.cost.peak_mib}
        for q in card.quality:
            names = ("fd", "kd", "kd_se", "precision", "recall", "density", "coverage")
            numbers |= {f"{name}_{q.space}_{q.split}": getattr(q, name) for name in names}
        numbers |= {f"copying_{m.space}": m.probability for m in card.memorisation}
        metrics = [Metric(name, value, now, 0) for name, value in numbers.items()]
        self._client.log_batch(run_id, metrics=metrics, params=[Param(k, str(v)) for k, v in params.items()])

    def _log_view(self, run_id: str, export: Path) -> str:
        """Log MLflow's ONNX flavour of an export, with the weights inside the file, and return its id.

        MLflow would give a separate file of weights a random name, and two logs of one model would differ.
        """
        model = onnx.load(str(export / "graph.onnx"))
        signature = ModelSignature(_schema(model.graph.input), _schema(model.graph.output))
        with redirect_stdout(StringIO()), mlflow.start_run(run_id=run_id):  # MLflow prints a greeting to stdout
            info = mlflow.onnx.log_model(
                model, name="onnx", save_as_external_data=False, onnx_execution_providers=["CPUExecutionProvider"],
                signature=signature, pip_requirements=["onnxruntime"],
            )  # fmt: skip
        return str(info.model_id)


def _check_place(client: MlflowClient, run_id: str) -> None:
    """Check that what is written into a run's folder stays there: others may have placed a link in it, such as one to a key.

    Raises:
        StoreError: there is a link, a file with a second name, or something that is neither file nor folder; or the folder is
            not the run's own.
    """
    told = client.get_run(run_id).info.artifact_uri
    try:
        address = urlsplit(told)
        if address.scheme not in ("", "file"):
            return  # a server or a bucket writes the files
        place = Path(url2pathname(address.path))
        own = (
            place.is_absolute()
            and place.parts[-2:] == (run_id, "artifacts")
            and "\0" not in str(place)
            and ".." not in place.parts
        )
    except ValueError:
        own = False
    if not own:
        raise StoreError(
            f"MLflow names {told!r} as the folder of run {run_id}, which it is not; see who may write to its database"
        )
    line = place.parent.parent  # LINE/RUN/artifacts; MLflow's view goes below LINE/models
    for path in (line, line / "models", place.parent, place, *place.rglob("*")):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        plain = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
        if not plain:
            raise StoreError(
                f"{path} is in the way of a version's files: it is a link, or no plain file; remove it, and see who may write there"
            )


def _schema(values: Any) -> Schema:
    types = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}
    return Schema(
        [
            TensorSpec(
                np.dtype(types[v.type.tensor_type.elem_type]), [d.dim_value or -1 for d in v.type.tensor_type.shape.dim], v.name
            )
            for v in values
        ]
    )


def card_text(card: Scorecard) -> str:
    """Serialise a scorecard in the form that MLflow keeps and the seal covers."""
    return card.model_dump_json(indent=1)


def _version(subject: Subject, made: Any) -> Version:
    tags = {str(name): str(value or "") for name, value in dict(made.tags).items()}
    return Version(  # a version that was made by hand may have no run
        subject=subject, number=int(made.version), run_id=made.run_id or "", aliases=sorted(made.aliases), tags=tags
    )


def _unreachable(error: BaseException) -> re.Match[str] | None:
    """Match the error with which MLflow's client gives up on its server: only the text shows it. Group 1 is the host."""
    return re.match(r"API request to https?://(?:[^/@]*@)?([^/]+)\S* failed with (?:timeout )?exception", str(error).strip())


@contextmanager
def _foreign_errors() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if lost := _unreachable(error):
            how = "does not answer in time" if "timed out" in str(error) else "cannot be reached"
            raise StoreError(
                f"MLflow at {lost[1]} {how}, tried several times; start it, or mend its address in ferry.toml, then repeat the command"
            ) from error
        first = str(error).strip().splitlines()[0]
        raise StoreError(f"MLflow refused: {first}; check its address in ferry.toml") from error
    except SQLAlchemyError as error:
        first = str(error).strip().splitlines()[0]
        raise StoreError(f"MLflow's database cannot be used: {first}; start it, or mend its address in ferry.toml") from error
    except OSError as error:
        raise StoreError(f"MLflow cannot be reached: {error}; check its address in ferry.toml") from error

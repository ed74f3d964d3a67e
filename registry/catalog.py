"""MLflow: versions and aliases of our models, and the files of a version.

`registry.runs` has the runs in which versions come about, and `registry.registration` makes a version of a finished model. Only
these three files and `registry.dataset` import MLflow.

There is one registered model for each line, configuration and variant. `champion`, `challenger` and `anchor` are aliases (MLflow's
stages are deprecated).

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
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from model.config import ConfigurationName, VariantName, canonical_sha256
from model.scorecard import Frozen, Scorecard
from registry.errors import CatalogError, StoreError

# MLflow reads these when it is imported. DO_NOT_TRACK must be the word "true"; "1" does not switch the tracking off.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `ferry --json` answers on stdout

import mlflow
from mlflow.data.dataset_source_registry import get_registered_sources, register_dataset_source
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from registry.dataset import DvcDatasetSource
from registry.lineage import repository_of
from registry.seal import MASTER, SCORECARD, FileSeal, Part, Seal, is_whole, other_bytes

if not any(source is DvcDatasetSource for source in cast("list[Any]", get_registered_sources())):
    register_dataset_source(cast("Any", DvcDatasetSource))  # a program that is not installed has no entry point

CHAMPION, CHALLENGER, ANCHOR = "champion", "challenger", "anchor"  # aliases
FOLLOWS = "ledger.champion"  # tag of a registered model: entry that its champion alias follows; see registry/promotion.py

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
            line = parts[0] if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", parts[0]) else "surfaces"
            raise CatalogError(
                f"{text!r} is not LINE/CONFIG/VARIANT; write it as {line}/I/full, with configuration {' or '.join(known[0])} and variant "
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
        self.owner = f"{socket.gethostname()}:{self._artifacts.parent}"
        with foreign_errors():
            mlflow.set_tracking_uri(uri)
            self.client = MlflowClient(uri)

    def promote(self, subject: Subject, number: int) -> None:
        """Point the champion alias at a version, and delete the challenger alias if it points there.

        Raises:
            CatalogError: there is no such version.
        """
        self.set_alias(subject, CHAMPION, number)
        challenger = self.aliased(subject, CHALLENGER)
        if challenger and challenger.number == number:
            with foreign_errors():
                self.client.delete_registered_model_alias(subject.model, CHALLENGER)

    def set_alias(self, subject: Subject, alias: str, number: int) -> None:
        """Point an alias at a version.

        Raises:
            CatalogError: there is no such version.
        """
        self.version(subject, number)
        with foreign_errors():
            self.client.set_registered_model_alias(subject.model, alias, str(number))

    def clear_alias(self, subject: Subject, alias: str) -> None:
        """Delete an alias."""
        with foreign_errors():
            self.client.delete_registered_model_alias(subject.model, alias)

    def follows(self, subject: Subject) -> int:
        """Return the number of the ledger entry for which the champion alias was last moved; 0: none is noted."""
        with foreign_errors():
            found = self.client.search_registered_models(f"name = '{subject.model}'")
        said = found[0].tags.get(FOLLOWS, "") if found else ""
        return int(said) if re.fullmatch("[0-9]{1,9}", said) else 0  # anybody can write any text into a tag

    def follow(self, subject: Subject, entry: int) -> None:
        """Note the number of the ledger entry for which the champion alias was moved."""
        with foreign_errors():
            self.client.set_registered_model_tag(subject.model, FOLLOWS, str(entry))

    def note(self, subject: Subject, number: int, name: str, text: str) -> None:
        """Set a tag of a version for people who read it in MLflow; a longer text is cut after 4,900 characters."""
        with foreign_errors():
            self.client.set_model_version_tag(subject.model, str(number), name, text[:4900])

    def champion(self, subject: Subject) -> Version | None:
        """Return the version that the champion alias points at; None: there is no champion."""
        return self.aliased(subject, CHAMPION)

    def aliased(self, subject: Subject, alias: str) -> Version | None:
        """Return the version that an alias points at; None: there is no such alias."""
        with foreign_errors():
            try:
                return self._with_aliases(subject, self.client.get_model_version_by_alias(subject.model, alias))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def version(self, subject: Subject, number: int) -> Version:
        """Return a version by its number.

        Raises:
            CatalogError: there is no version with that number.
        """
        with foreign_errors():
            try:
                return self._with_aliases(subject, self.client.get_model_version(subject.model, str(number)))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    known = [str(v.number) for v in self.versions(subject)]
                    hint = (
                        f"there are {', '.join(known)}" if known else f"there is none yet, so run `ferry retrain {subject.line}`"
                    )
                    raise CatalogError(f"{subject} has no version {number}; {hint}") from error
                raise

    def versions(self, subject: Subject) -> list[Version]:
        """Return all versions of a subject, oldest first."""
        with foreign_errors():
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

    def master(self, seal: Seal, into: Path) -> Path:
        """Fetch the master of a version into a folder, and return the file; a file there that is the sealed one stays.

        Args:
            seal: of the version, from the ledger; it has a master.
            into: an existing folder.

        Raises:
            SealError: the master is lost, or MLflow holds another file in its place: it is damaged, or of another version.
            CatalogError, StoreError: as `files`.
        """
        fact, place = seal.files[f"checkpoint/{MASTER}"], into / MASTER
        if not is_whole(place, fact):
            place.unlink(missing_ok=True)
            self._fetch(self._run_of(seal), seal, f"checkpoint/{MASTER}", fact, place)
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
            raise StoreError(
                f"another version of ferry wrote the scorecard of {seal.name}; install that version, or run `ferry retrain`"
            ) from error

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
        with foreign_errors():
            for folder in sorted({name.rpartition("/")[0] for name in names}):
                for row in self.client.list_artifacts(version.run_id, folder or None) if version.run_id else ():
                    if row.path not in names or row.is_dir:
                        continue
                    if (row.file_size or 0) > largest:
                        raise StoreError(
                            f"{row.path} of {version.subject} {version.number} in MLflow has {row.file_size:,} bytes, more "
                            f"than {largest:,}; check who may write to MLflow's files"
                        )
                    found[row.path] = downloaded(self.client, version.run_id, row.path, into)
        return found

    @cached_property
    def repository(self) -> str:
        """The Git repository of the workspace's data, as `repository_of` names it."""
        return repository_of(self._artifacts.parent)

    def experiment(self, line: str) -> str:
        """Return the id of a line's experiment in MLflow, which holds its runs; make it if there is none."""
        known = self.client.get_experiment_by_name(line)
        if known:
            return str(known.experiment_id)
        location = None if self._uri.startswith("http") else (self._artifacts / line).as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # MLflow then shows runs first, and no page for chats
        return str(self.client.create_experiment(line, artifact_location=location, tags=kind))

    # Private helpers

    def _run_of(self, seal: Seal) -> str:
        return self.version(Subject.parse(seal.subject), seal.version).run_id

    def _fetch(self, run_id: str, seal: Seal, name: str, fact: FileSeal, place: Path) -> None:
        """Fetch one file, whose size is checked first; it appears in its place only if it is the one that was sealed."""
        with foreign_errors():
            folder = name.rpartition("/")[0]
            listed = self.client.list_artifacts(run_id, folder or None) if run_id else []
            sizes = {row.path: row.file_size for row in listed if not row.is_dir}
            if name not in sizes:
                raise other_bytes(seal, name, "the file is missing")
            if sizes[name] is not None and sizes[name] != fact.size:
                raise other_bytes(seal, name, f"{sizes[name]:,} bytes, not {fact.size:,}")
            fresh = place.with_name(f".{secrets.token_hex(8)}.tmp")
            fresh.mkdir()
            try:
                got = downloaded(self.client, run_id, name, fresh)
                if not is_whole(got, fact):
                    raise other_bytes(seal, name, "it has another hash")
                got.replace(place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def _find(self, subject: Subject) -> list[Version]:
        found: list[Any] = []
        page: str | None = None
        while True:  # there may be more than the 1,000 of one page
            rows = self.client.search_model_versions(f"name = '{subject.model}'", max_results=1000, page_token=page)
            found += rows
            page = rows.token
            if not page:
                break
        versions = sorted((_version(subject, v) for v in found), key=lambda v: v.number)
        aliases = self._aliases(subject) if versions else {}
        return [v.model_copy(update={"aliases": aliases.get(v.number, [])}) for v in versions]

    def _aliases(self, subject: Subject) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for alias, number in self.client.get_registered_model(subject.model).aliases.items():
            found.setdefault(int(number), []).append(alias)
        return found

    def _with_aliases(self, subject: Subject, made: Any) -> Version:
        version = _version(subject, made)
        return version.model_copy(update={"aliases": self._aliases(subject).get(version.number, [])})


def downloaded(client: MlflowClient, run_id: str, name: str, into: Path) -> Path:
    """Fetch a file of a run as it is, without a check."""
    return Path(client.download_artifacts(run_id, name, str(into)))


def _version(subject: Subject, made: Any) -> Version:
    tags = {str(name): str(value or "") for name, value in dict(made.tags).items()}
    return Version(  # a version that was made by hand may have no run
        subject=subject, number=int(made.version), run_id=made.run_id or "", aliases=sorted(made.aliases), tags=tags
    )


def unreachable(error: BaseException) -> re.Match[str] | None:
    """Match the error with which MLflow's client gives up on its server: only the text shows it. Group 1 is the host."""
    return re.match(r"API request to https?://(?:[^/@]*@)?([^/]+)\S* failed with (?:timeout )?exception", str(error).strip())


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, which may be empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Turn errors of MLflow and of its database into one StoreError that says what to do."""
    try:
        yield
    except MlflowException as error:
        if lost := unreachable(error):
            how = "does not answer in time" if "timed out" in str(error) else "cannot be reached"
            raise StoreError(
                f"MLflow at {lost[1]} {how} after several attempts; start it, or correct its address in ferry.toml, then "
                "repeat the command"
            ) from error
        first = _first_line(error)
        raise StoreError(f"MLflow refused: {first}; check its address in ferry.toml") from error
    except SQLAlchemyError as error:
        first = _first_line(error)
        raise StoreError(f"MLflow's database cannot be used: {first}; start it, or correct its address in ferry.toml") from error
    except OSError as error:
        raise StoreError(f"MLflow cannot be reached: {error}; check its address in ferry.toml") from error

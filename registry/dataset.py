"""A data revision as an MLflow dataset: its Git repository, commit, folder and hash.

MLflow finds the class by the entry point `mlflow.dataset_source`. So everybody with this package gets the source back from a run:

    >>> run = mlflow.get_run(run_id)
    >>> source = mlflow.data.get_source(run.inputs.dataset_inputs[0])
    >>> source.load()
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from mlflow.data.dataset_source import DatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag
from mlflow.types import ColSpec, Schema

from model.git import forget_redirections
from model.scorecard import DataVersion
from registry.errors import StoreError

CONTEXT = "mlflow.data.context"  # the tag in which MLflow keeps what a data set was used for


class DvcDatasetSource(DatasetSource):
    """A folder that DVC holds, at one Git commit."""

    def __init__(self, repository: str, rev: str, path: str, md5: str) -> None:
        """Name a revision.

        Args:
            repository: URL or path of the Git repository.
            rev: full Git commit that holds the .dvc file.
            path: the folder, relative to the repository.
            md5: DVC's hash of the folder.
        """
        self.repository, self.rev, self.path, self.md5 = repository, rev, path, md5

    @property
    def url(self) -> str:
        """The revision as one text, REPOSITORY@REV:PATH."""
        return f"{self.repository}@{self.rev}:{self.path}"

    @staticmethod
    def _get_source_type() -> str:
        return "dvc"

    def load(self) -> str:
        """Fetch the revision with DVC, from its cache or remote, into a new temporary folder, and return the path.

        Raises:
            StoreError: the repository, or the objects of the revision, cannot be reached.
        """
        forget_redirections()
        from dvc.api import DVCFileSystem

        into = Path(tempfile.mkdtemp(prefix="revision-")) / Path(self.path).name
        try:
            DVCFileSystem(repo=self.repository, rev=self.rev).get(self.path, str(into), recursive=True)
        except Exception as error:  # errors of DVC, Git and file systems have no common base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StoreError(
                f"{self.url} cannot be fetched: {reason}; call this on a machine that can reach that repository and its DVC "
                "remote"
            ) from error
        return str(into)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return isinstance(raw_source, DvcDatasetSource)

    @classmethod
    def _resolve(cls, raw_source: Any) -> DvcDatasetSource:
        return cls.from_dict(raw_source.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Convert the source to the dictionary that MLflow stores."""
        return {"url": self.url, "repository": self.repository, "rev": self.rev, "path": self.path, "md5": self.md5}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> DvcDatasetSource:
        """Rebuild the source from the dictionary that MLflow stored."""
        return cls(*(source_dict[name] for name in ("repository", "rev", "path", "md5")))


class DvcDataset(MetaDataset):
    """A revision with its size; MLflow shows the number of files as its rows."""

    def __init__(self, data: DataVersion, repository: str, part: str = "") -> None:
        source = DvcDatasetSource(repository, data.rev, data.path, data.md5)
        short = repository.rstrip("/").removesuffix(".git").rsplit("/", 1)[-1]
        columns = Schema([ColSpec("binary", "image"), ColSpec("string", "text")])
        super().__init__(source, name=f"{short}@{data.rev[:12]}:{data.path}{part}", digest=data.md5, schema=columns)
        self._profile = {"num_rows": data.files, "num_elements": data.bytes}

    @property
    def profile(self) -> dict[str, int]:
        """Number of files and of bytes, under the names that MLflow's pages use."""
        return self._profile

    def to_dict(self) -> dict[str, str]:
        """Convert the data set to the dictionary that MLflow stores, with the profile as JSON text."""
        return {**super().to_dict(), "profile": json.dumps(self.profile)}


def dataset_input(data: DataVersion, repository: str, context: str) -> DatasetInput:
    """Build the input with which an MLflow run records a data revision.

    Args:
        data: the revision.
        repository: the Git repository that holds it, as URL or path.
        context: what the run used it for, such as "training".
    """
    # MLflow keeps one input for each name and digest, and ignores the context. So the evaluation needs another name.
    part = " held out" if context == "evaluation" else ""
    return DatasetInput(DvcDataset(data, repository, part)._to_mlflow_entity(), [InputTag(CONTEXT, context)])  # noqa: SLF001 - no public way

"""Where the repository is published: a folder, or an S3 bucket. Readers never see half a release.

Files appear in the order in which `Repository.files` gives them. All but `timestamp.json` have names that are never reused
for other content, so a reader with an older timestamp finds everything that it needs at any moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ota import output
from ota.errors import OperatorError, TransferError

Files = Iterable[tuple[str, Path]]
OnFile = Callable[[str], None]
IMMUTABLE, SHORT = "public, max-age=31536000, immutable", "no-cache"

MOST = 16 * 1024 * 1024
"""Bytes of a published file that are read; metadata are far smaller."""


def publish(files: Files, url: str, base: Path, endpoint: str | None = None, on_file: OnFile | None = None) -> int:
    """Copy new files to a folder or bucket, and return how many were copied; the call can be repeated.

    Args:
        files: (name, local file), in the order in which they must appear.
        url: `s3://bucket/prefix`, or a folder, relative to `base`.
        base: folder that a relative `url` starts from.
        endpoint: URL of an S3-compatible server; None: AWS.
        on_file: is called with the name of each file that was copied.

    Raises:
        OperatorError: the URL is of another kind, the bucket does not exist, or the folder takes no file (as `ota.output.fresh`).
        TransferError: the server could not be reached or refused.
    """
    copied = 0
    with _open(url, base, endpoint) as store:
        for name, source in files:
            if store.size(name) == source.stat().st_size and not is_mutable(name):
                continue
            store.put(name, source)
            copied += 1
            if on_file:
                on_file(name)
    return copied


def read(name: str, url: str, base: Path, endpoint: str | None = None) -> bytes | None:
    """Return a small published file, such as one of the metadata, up to `MOST` bytes; None: it is not there.

    Args:
        name: of the file.
        url: `s3://bucket/prefix`, or a folder, relative to `base`.
        base: folder that a relative `url` starts from.
        endpoint: URL of an S3-compatible server; None: AWS.

    Raises:
        OperatorError, TransferError: as `publish`.
    """
    with _open(url, base, endpoint) as store:
        return store.read(name)


def is_public(name: str, url: str, base: Path, endpoint: str | None = None) -> bool:
    """Check whether everybody may read a published file without credentials, as devices do; the arguments are those of `read`.

    Raises:
        OperatorError, TransferError: as `publish`.
    """
    with _open(url, base, endpoint) as store:
        return store.is_public(name)


def is_mutable(name: str) -> bool:
    """Check whether a published name may later hold other content."""
    return name == "metadata/timestamp.json"


class Store(Protocol):
    """A place where the repository is published. To add one, write these four methods, and name its scheme in `_open`."""

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a published file; None: it is not there.

        Raises:
            TransferError: it cannot be found out.
        """

    def read(self, name: str) -> bytes | None:
        """Return the content of a small published file; None: it is not there.

        Raises:
            TransferError: it cannot be read.
        """

    def put(self, name: str, source: Path) -> None:
        """Publish a file; a reader sees the old one or the whole new one.

        Raises:
            OperatorError, TransferError: it cannot be written there.
        """

    def is_public(self, name: str) -> bool:
        """Check whether everybody may read a published file without credentials.

        Raises:
            TransferError: it cannot be found out.
        """


@contextmanager
def _open(url: str, base: Path, endpoint: str | None) -> Iterator[Store]:
    """Open the place that a URL names, as `publish` does."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        with _s3(parts.netloc, parts.path.strip("/"), endpoint) as store:
            yield store
    elif parts.scheme in ("", "file"):
        yield _Folder(base / (parts.path if parts.scheme == "file" else url))
    else:
        raise OperatorError(f"cannot publish to {url!r}; give a folder or s3://bucket/prefix")


class _Folder:
    """A folder, which may be a share to which others write, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a published file; None: it is not there."""
        place = self._folder / name
        try:
            return place.stat().st_size if place.is_file() else None
        except OSError as error:
            raise TransferError(f"cannot read {place}: {error.strerror}; check the permissions") from error

    def read(self, name: str) -> bytes | None:
        """Return the content of a small published file; None: it is not there."""
        try:
            with (self._folder / name).open("rb") as file:
                return file.read(MOST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise TransferError(f"cannot read {self._folder / name}: {error.strerror}; check the permissions") from error

    def put(self, name: str, source: Path) -> None:
        """Copy a file into the folder under a temporary name, then give it its own."""
        place = self._folder / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as file, output.fresh(place) as published:
                shutil.copyfileobj(file, published)
        except OSError as error:
            raise TransferError(f"cannot write {place}: {error.strerror}; make room or check the permissions") from error

    def is_public(self, name: str) -> bool:  # noqa: ARG002
        """Return True; who may read the folder is the business of whoever serves it."""
        return True


@contextmanager
def bucket(url: str, endpoint: str | None = None) -> Iterator[Bucket]:
    """Open the bucket of `s3://bucket/prefix` for reading and clearing; the errors of the block are those of `publish`.

    Args:
        url: of the bucket.
        endpoint: URL of an S3-compatible server; None: AWS.
    """
    parts = urlsplit(url)
    with _s3(parts.netloc, parts.path.strip("/"), endpoint) as place:
        yield place


class Bucket:
    """A bucket, or what is below a prefix of it."""

    def __init__(self, client: Any, anybody: Any, bucket: str, prefix: str) -> None:
        self._anybody = anybody
        self._client, self._bucket, self._prefix = client, bucket, f"{prefix}/" if prefix else ""

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Sizes of all files, from one listing; it is made when the first size is asked for."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix.rstrip("/"))
        return {row["Key"]: row["Size"] for page in pages for row in page.get("Contents", [])}

    def size(self, name: str) -> int | None:
        """Return the size in bytes that a file had when the bucket was listed; None: it was not there."""
        return self._sizes.get(self._prefix + name)

    def names(self) -> list[str]:
        """List the files, by their names below the prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        return [row["Key"][len(self._prefix) :] for page in pages for row in page.get("Contents", [])]

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            TransferError: it cannot be removed.
        """
        from botocore.exceptions import ClientError

        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        except ClientError as error:
            raise TransferError(f"S3 refused with {error.response.get('Error', {}).get('Code', 'unknown')}") from error

    def move(self, name: str, to: str) -> None:
        """Give a file another name.

        Raises:
            TransferError: it cannot be moved; it may then be there under both names.
        """
        from botocore.exceptions import ClientError

        try:
            source = {"Bucket": self._bucket, "Key": self._prefix + name}
            self._client.copy_object(Bucket=self._bucket, Key=self._prefix + to, CopySource=source)
        except ClientError as error:
            raise TransferError(f"S3 refused with {error.response.get('Error', {}).get('Code', 'unknown')}") from error
        self.remove(name)

    def read(self, name: str, most: int = MOST) -> bytes | None:
        """Return the content of a small file, up to a number of bytes; None: it is not there."""
        from botocore.exceptions import ClientError

        try:
            content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read(most)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "NoSuchKey":
                return None
            raise
        return content

    def put(self, name: str, source: Path) -> None:
        """Upload a file, and say how long caches may keep it."""
        extra = {"CacheControl": SHORT if is_mutable(name) else IMMUTABLE}
        self._client.upload_file(str(source), self._bucket, self._prefix + name, ExtraArgs=extra)

    def is_public(self, name: str) -> bool:
        """Send a request without credentials, as a device does."""
        from botocore.exceptions import ClientError

        try:
            self._anybody.head_object(Bucket=self._bucket, Key=self._prefix + name)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in (401, 403):
                raise
            return False
        return True


@contextmanager
def _s3(name: str, prefix: str, endpoint: str | None) -> Iterator[Bucket]:
    """Open a bucket, and turn boto's errors within the block into ours."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    retrying = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10, read_timeout=60)
    try:
        unsigned = retrying.merge(Config(signature_version=UNSIGNED))
        client, anybody = (boto3.client("s3", endpoint_url=endpoint, config=config) for config in (retrying, unsigned))
        yield Bucket(client, anybody, name, prefix)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code in ("NoSuchBucket", "404"):
            raise OperatorError(f"there is no bucket {name!r}; make it, or name another in ferry.toml") from error
        raise TransferError(f"S3 refused with {code}; check the credentials and the bucket's policy") from error
    except (BotoCoreError, boto3.exceptions.Boto3Error, ValueError) as error:  # ValueError: the endpoint is no address
        raise TransferError(f"S3 cannot be used: {error}; check the endpoint and the credentials") from error

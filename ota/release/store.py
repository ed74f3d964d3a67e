"""Where the repository is published: a folder, or an S3 bucket. Readers never see half a release.

Files appear in the order in which `Repository.files` gives them. All but `timestamp.json` have names that are never reused
for other content, so a reader with an older timestamp finds everything that it needs at any moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ota import output
from ota.errors import OperatorError, TransferError

Files = Iterable[tuple[str, Path]]
OnFile = Callable[[str], None]
IMMUTABLE, SHORT = "public, max-age=31536000, immutable", "no-cache"


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
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return _to_s3(files, parts.netloc, parts.path.strip("/"), endpoint, on_file)
    if parts.scheme not in ("", "file"):
        raise OperatorError(f"cannot publish to {url!r}; give a folder or s3://bucket/prefix")
    return _to_folder(files, base / (parts.path if parts.scheme == "file" else url), on_file)


def is_mutable(name: str) -> bool:
    """Check whether a published name may later hold other content."""
    return name == "metadata/timestamp.json"


def _to_folder(files: Files, folder: Path, on_file: OnFile | None) -> int:
    copied = 0
    for name, source in files:
        place = folder / name
        try:
            if place.is_file() and place.stat().st_size == source.stat().st_size and not is_mutable(name):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as file, output.fresh(place) as published:  # others may write to this folder, too
                shutil.copyfileobj(file, published)
        except OSError as error:
            raise TransferError(f"cannot write {place}: {error.strerror}; make room or check the permissions") from error
        copied += 1
        if on_file:
            on_file(name)
    return copied


def _to_s3(files: Files, bucket: str, prefix: str, endpoint: str | None, on_file: OnFile | None) -> int:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    retrying = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10, read_timeout=60)
    copied = 0
    try:
        client: Any = boto3.client("s3", endpoint_url=endpoint, config=retrying)
        present: dict[str, int] = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            present |= {row["Key"]: row["Size"] for row in page.get("Contents", [])}
        for name, source in files:
            key = f"{prefix}/{name}" if prefix else name
            if present.get(key) == source.stat().st_size and not is_mutable(name):
                continue
            extra = {"CacheControl": SHORT if is_mutable(name) else IMMUTABLE}
            client.upload_file(str(source), bucket, key, ExtraArgs=extra)
            copied += 1
            if on_file:
                on_file(name)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code in ("NoSuchBucket", "404"):
            raise OperatorError(f"there is no bucket {bucket!r}; make it, or name another in ferry.toml") from error
        raise TransferError(f"S3 refused with {code}; check the credentials and the bucket's policy") from error
    except (BotoCoreError, boto3.exceptions.Boto3Error, ValueError) as error:  # ValueError: the endpoint is no address
        raise TransferError(f"S3 cannot be used: {error}; check the endpoint and the credentials") from error
    return copied

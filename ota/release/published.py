"""Whether devices can fetch what is signed: the published timestamp, read as a device reads it, beside the signed one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ota.errors import OtaError
from ota.release import store
from ota.release.repository import Repository

TIMESTAMP = "metadata/timestamp.json"
PRIVATE = (
    "the bucket {bucket!r} has no public read, so devices get 403 from it; allow s3:GetObject to everybody in its policy, or let them "
    "fetch from a server in front of it that may read"
)


@dataclass(frozen=True)
class Published:
    """What devices find where the repository is published."""

    state: Literal["published", "behind", "missing", "unknown"]
    text: str
    """A sentence for people."""
    private: str = ""
    """Why devices cannot read it although it is there; empty: they can, as far as this machine sees."""

    @property
    def lines(self) -> list[str]:
        """All that is to be said, one line each."""
        return [self.text, *([self.private] if self.private else [])]


def compare(repository: Repository, url: str, base: Path, endpoint: str | None = None) -> Published:
    """Compare the signed repository with what is published.

    Args:
        repository: the signed repository.
        url: where it is published, as in `store.publish`.
        base: folder that a relative `url` starts from.
        endpoint: URL of an S3-compatible server; None: AWS.
    """
    signed = (repository.metadata / "timestamp.json").read_bytes()
    again = "`ferry trust refresh` signs and publishes again"
    try:
        found = store.read(TIMESTAMP, url, base, endpoint)
        public = found is None or store.is_public(TIMESTAMP, url, base, endpoint)
    except OtaError as error:
        return Published("unknown", f"whether it is published cannot be seen from here: {error}")
    private = "" if public else PRIVATE.format(bucket=urlsplit(url).netloc)
    if found is None:
        return Published("missing", f"nothing is published in {url}, so devices do not see it; {again}", private)
    if found == signed:
        return Published("published", "what is signed is published", private)
    versions = [_version(signed), _version(found)]
    return Published(
        "behind", f"signed, but not published: {url} has timestamp {versions[1]}, and {versions[0]} is signed; {again}", private
    )


def _version(data: bytes) -> str:
    try:
        return str(int(json.loads(data)["signed"]["version"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"

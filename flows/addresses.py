"""Check the addresses and folders of [stores] in ferry.toml, when a workspace is made and each time that it is opened."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from ota.errors import printable

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")  # what S3 and its relatives allow
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
OURS = frozenset(
    {
        "keys",
        "repository",
        "work",
        "events",
        "ratings",
        "features",
        "mlartifacts",
        "reports-archive",
        "ferry.toml",
        "ferry.db",
        "mlflow.db",
    }
)


def fault(name: str, value: str) -> str:
    """Say why an address or folder cannot work as the value of a key; return an empty string if it can."""
    said = _control(value) or CHECKS[name](value)
    return f"'{printable(value, 200)}' {said}" if said else ""


def _control(value: str) -> str:
    if not value.isprintable():
        return "holds characters that cannot be printed; write it anew"
    return "begins or ends with a space; remove it" if value != value.strip() else ""


def _place(value: str) -> str:
    """Check a folder, or a bucket on S3."""
    if value.lower().startswith("s3:"):
        parts = urlsplit(value)
        if not value.startswith("s3://") or not BUCKET.fullmatch(parts.netloc) or parts.query or parts.fragment:
            return "is no bucket; write it as s3://bucket/prefix"
        return ""
    return _folder(value)


def _publish(value: str) -> str:
    scheme = value.split("://", maxsplit=1)[0] if "://" in value else ""
    if scheme not in ("", "s3", "file"):
        return "cannot be published to; give a folder or s3://bucket/prefix"
    return "" if scheme == "file" else _place(value)


def _data(value: str) -> str:
    # DVC knows other remotes, which an older workspace may use.
    return "" if "://" in value and not value.lower().startswith("s3:") else _place(value)


def _reports(value: str) -> str:
    return "is an address; devices leave reports in a folder, so name one" if "://" in value else _folder(value)


def _folder(value: str) -> str:
    parts = [part for part in PurePosixPath(value).parts if part != "."]
    if not parts:
        return "names no folder; give one, such as published"
    if parts[0].casefold() in OURS or ".git" in parts or ".dvc" in parts:
        return "is where ferry keeps other things; name a folder of its own"
    return ""


def _database(value: str) -> str:
    return "" if value else "is empty; write sqlite:///ferry.db, or postgresql://..."


def _mlflow(value: str) -> str:
    if value.startswith(("http:", "https:")):
        return _web(value)
    return "" if re.match(r"[a-z0-9+]+://", value) else "is no address; write sqlite:///mlflow.db, or http(s)://host:port"


def _endpoint(value: str) -> str:
    return _web(value) if value else ""


def _web(value: str) -> str:
    try:
        parts = urlsplit(value)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", 0
    if not value.startswith(("http://", "https://")) or not HOST.fullmatch(host) or port == 0 or ".." in host:
        return "is no address of a server; write http(s)://host:port"
    return ""


CHECKS = {
    "data": _data,
    "database": _database,
    "mlflow": _mlflow,
    "publish": _publish,
    "s3_endpoint": _endpoint,
    "reports": _reports,
}

"""Which releases are published, read from the published metadata as they are, for people.

Signatures are not verified here: this process holds no root of trust, and nobody acts on what it shows. Devices verify all of it.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from ota.gateway.files import UnreadableError, is_published, open_file
from ota.limits import MiB
from ota.manifest import MAX_COUNT

MOST = 16 * MiB  # bytes of one metadata file
_MANIFEST = re.compile(r"models/([a-z0-9-]{1,40})/([a-z0-9-]{1,40})/([0-9a-f]{64})\.json")
_POLICY = re.compile(r"rollout/([a-z0-9-]{1,40})/([a-z0-9-]{1,40})\.json")
_SHOWN = ("seq", "manifest", "halt", "revert", "waves")


class DamagedError(Exception):
    """What is published is not a repository, or is damaged."""


def read(folder: str) -> tuple[int, list[dict[str, Any]]]:
    """Return the version of the published timestamp, and the releases with the policy of their line and class, newest first.

    Raises:
        DamagedError: something is missing, cannot be read or has not the form of a repository.
    """
    try:
        timestamp = _json(folder, "metadata/timestamp.json")["signed"]
        snapshot = _json(folder, f"metadata/{int(timestamp['meta']['snapshot.json']['version'])}.snapshot.json")["signed"]
        named: dict[str, dict[str, Any]] = {}
        for name, meta in snapshot["meta"].items():
            if name.split(".")[0] in ("models", "rollout"):
                named |= _json(folder, f"metadata/{int(meta['version'])}.{name}")["signed"]["targets"]
        policies = {
            (found[1], found[2]): _policy(folder, path, named[path]) for path in named if (found := _POLICY.fullmatch(path))
        }
        rows = [
            {
                "line": found[1], "device_class": found[2], "manifest": found[3], "release": _number(target["custom"]["seq"]),
                "policy": policies.get((found[1], found[2])),
            }
            for path, target in named.items()
            if (found := _MANIFEST.fullmatch(path))
        ]  # fmt: skip
        return int(timestamp["version"]), sorted(rows, key=lambda row: (row["line"], row["device_class"], -row["release"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"the published metadata are missing or damaged ({error}); publish again with `ferry trust refresh`"
        ) from error


def _policy(folder: str, path: str, target: dict[str, Any]) -> dict[str, Any]:
    place, _, name = path.rpartition("/")
    policy = _json(folder, f"targets/{place}/{target['hashes']['sha256']}.{name}")
    return {key: policy[key] for key in _SHOWN}


def _number(value: object) -> int:
    if isinstance(value, int) and 0 < value <= MAX_COUNT:
        return value
    raise ValueError("a release without a number")


def _json(folder: str, path: str) -> Any:
    try:
        file = open_file(folder, path) if is_published(path) else None
    except UnreadableError as error:
        raise DamagedError(f"the gateway cannot read {error}; check who may read it") from error
    if file is None:
        raise ValueError(f"there is no {path}")
    with os.fdopen(file, "rb") as opened:
        return json.loads(opened.read(MOST))

"""The agent as a wheel, made from the modules of this installation: no build tool and no network are needed.

It holds what `ota/pyproject.toml` says, as the wheel that `make device-wheel` builds, and the same modules make the same bytes.
Python also runs it as it is, without installing it, because a wheel of pure Python is a zip file with the packages in it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import ota
from ota.errors import OperatorError

WHEN = (1980, 1, 1, 0, 0, 0)  # time of every file in an archive, the earliest that zip knows: equal content gives equal bytes
UNIX_FILE = 0o100644 << 16  # a zip entry's permissions


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a file to an archive, with nothing in it that depends on when or where."""
    entry = zipfile.ZipInfo(name, WHEN)
    entry.external_attr, entry.compress_type = UNIX_FILE, zipfile.ZIP_DEFLATED
    archive.writestr(entry, data)


def build() -> tuple[str, bytes]:
    """Build the wheel; return its file name and its content.

    Raises:
        OperatorError: this installation lacks a file that belongs into it.
    """
    place = Path(ota.__file__).parent
    try:
        given = tomllib.loads((place / "pyproject.toml").read_text(encoding="utf-8"))
        chosen = [place / name for name in given["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]]
        files = {f"ota/{path.relative_to(place).as_posix()}": path.read_bytes() for path in _modules(chosen)}
        licence, readme = (place / "LICENSE").read_bytes(), (place / "README.md").read_text(encoding="utf-8")
    except (OSError, KeyError, ValueError) as error:
        raise OperatorError(f"the agent's wheel cannot be made from {place} ({error}); install deltaferry again") from error
    project = given["project"]
    stem = f"{project['name'].replace('-', '_')}-{ota.__version__}"
    about = f"{stem}.dist-info"
    scripts = "".join(f"{name} = {call}\n" for name, call in project["scripts"].items())
    files |= {
        f"{about}/METADATA": _metadata(project, readme).encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: ferry\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": f"[console_scripts]\n{scripts}".encode(),
        f"{about}/licenses/LICENSE": licence,
    }
    record = "".join(f"{name},sha256={_hash(data)},{len(data)}\n" for name, data in sorted(files.items()))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in sorted(files.items()):
            add(archive, name, data)
        add(archive, f"{about}/RECORD", f"{record}{about}/RECORD,,\n".encode())
    return f"{stem}-py3-none-any.whl", made.getvalue()


def _modules(chosen: list[Path]) -> list[Path]:
    found = [path for place in chosen for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return [path for path in found if "__pycache__" not in path.parts]


def _metadata(project: dict[str, Any], readme: str) -> str:
    """Return the core metadata, version 2.4, which is the first with a licence expression."""
    lines = [
        "Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {ota.__version__}", f"Summary: {project['description']}",
        f"License-Expression: {project['license']}", "License-File: LICENSE", f"Keywords: {','.join(project['keywords'])}",
        *(f"Classifier: {kind}" for kind in project["classifiers"]), f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {need}" for need in project["dependencies"]), "Description-Content-Type: text/markdown",
    ]  # fmt: skip
    return "\n".join([*lines, "", readme])


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")

"""Read a .dvc file without DVC or Git: what the working tree says is the newest data revision of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from model.errors import DataError

MAX_POINTER = 64 * 1024  # bytes; DVC writes some hundred


def recorded_md5(root: Path, path: str) -> str | None:
    """Return the md5 of the data revision that a folder's .dvc file names; None: there is no such file.

    Raises:
        DataError: the file is not one that DVC wrote for a folder.
    """
    pointer = root / f"{path}.dvc"
    try:
        with pointer.open("rb") as file:
            found: Any = yaml.safe_load(file.read(MAX_POINTER))["outs"][0]["md5"]
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, LookupError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{pointer} is not a file that DVC wrote; `git checkout -- {path}.dvc` brings it back") from error
    return str(found)

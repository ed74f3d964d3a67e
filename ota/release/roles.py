"""Names of the roles below targets: three that all classes share, and three more for each line and class that has its own.

The roles of a class have the keys of the shared ones: `models.LINE.CLASS` those of `models`. So keys are made, replaced and lost by
*kind*, and only the lists are apart. A line and a class are made of a-z, 0-9 and -, so a name is unambiguous and safe as a file name.
"""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from ota.manifest import Name
from ota.release.keys import DELEGATED

_NAME: TypeAdapter[str] = TypeAdapter(Name)


def kind(role: str) -> str:
    """Return the role that all classes share and whose keys this role has; a role that has its own keys is its own kind."""
    return role.partition(".")[0]


def of_class(kind: str, line: str, device_class: str) -> str:
    """Return the name of a class's own role of a kind."""
    return f"{kind}.{line}.{device_class}"


def owner(role: str) -> str:
    """Return LINE/CLASS of a class's own role; empty: all classes share the role."""
    return role.partition(".")[2].replace(".", "/")


def is_role(role: str) -> bool:
    """Check whether a name is that of a role that a factory can have below targets."""
    first, *names = role.split(".")
    try:
        return first in DELEGATED and len(names) in (0, 2) and all(_NAME.validate_python(name) for name in names)
    except ValidationError:
        return False


def paths(role: str) -> list[str]:
    """Return the patterns of the targets that a role may name."""
    line, _, device_class = (owner(role) or "*/*").partition("/")
    if kind(role) != "rollout":
        return [f"{kind(role)}/{line}/{device_class}/*"]
    return [f"rollout/{line}/{name}" for name in ((f"{device_class}.json", f"{device_class}.2.json") if owner(role) else ("*",))]

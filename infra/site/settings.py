"""The page on ferry.toml: every key with its meaning, allowed values and default, taken from the models that read the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flows.settings import Settings
from flows.setup import template
from infra.site.schema import kind
from infra.site.text import code, definitions, joined, plain, sentence

NAMES = {
    "lines": ("LINE",),
    "classes": ("CLASS",),
    "energy": ("LINE", "CLASS", "VARIANT"),
    "gpu": ("LINE", "CONFIGURATION", "VARIANT"),
    "samplers": ("VARIANT",),
}
"""What the names stand for in a table of tables."""


@dataclass(frozen=True)
class Key:
    """A key of a table."""

    name: str
    meaning: str
    allowed: str
    default: str
    """As it is written in the file; "": the key must be given, or has no default."""
    required: bool


@dataclass(frozen=True)
class Table:
    """A table of the file."""

    name: str
    """Such as "lines.LINE.gate"; "" for the keys at the beginning of the file."""
    meaning: str
    keys: list[Key]

    @property
    def anchor(self) -> str:
        """Anchor on the page, such as "lines-gate"."""
        return "-".join(part for part in self.name.split(".") if part.islower()) or "top"


def tables() -> list[Table]:
    """List all tables of ferry.toml with their keys, in the order of the models."""
    return list(_tables("", "Keys at the beginning of the file, before the first table.", Settings, None))


def page() -> str:
    """Write the page."""
    found = tables()
    overview = "\n".join(f"- [{_title(t)}](#{t.anchor}): {plain(t.meaning)}" for t in found)
    return joined(
        "# ferry.toml",
        "`ferry.toml` holds the settings of a workspace. It lies in the workspace's folder; `ferry init` writes one with comments "
        "([below](#example)). A key that is not in the file has its default. A key or table that ferry does not know is an error, and so is "
        "a value that is not allowed: every command then names the key and stops.",
        "In the names of tables, LINE, CLASS and VARIANT stand for names: of a line (product), of a device class, and of a variant (`full`, "
        "`dev`, `fast` or `turbo`). Names of lines and classes have 1 to 40 lower-case letters, digits and `-`.",
        overview,
        *(_section(t) for t in found),
        "## What `ferry init` writes {#example}",
        f"```toml\n{template(['surfaces']).strip()}\n```",
    )


def _title(found: Table) -> str:
    return code(f"[{found.name}]") if found.name else "the beginning of the file"


def _section(found: Table) -> str:
    title = _title(found) if found.name else "The beginning of the file"
    return joined(f"## {title} {{#{found.anchor}}}", sentence(found.meaning), definitions(map(_row, found.keys)))


def _row(key: Key) -> tuple[str, str]:
    said = [sentence(key.meaning), f"Allowed: {key.allowed}."]
    said += ["Required."] if key.required else [f"Default: {code(key.default)}."] if key.default else ["Not given by default."]
    return code(key.name), " ".join(said)


def _tables(name: str, meaning: str, model: type[BaseModel], defaults: BaseModel | None) -> Iterator[Table]:
    """Yield a table, and those below it.

    Args:
        name: name of the table.
        meaning: meaning of the table.
        model: model that reads it.
        defaults: value of the table where the file has none; its keys have these defaults. None: the table must be given.
    """
    schema = model.model_json_schema()
    keys: list[Key] = []
    below: list[tuple[str, str, type[BaseModel], BaseModel | None]] = []
    for field, info in model.model_fields.items():
        key, default = info.alias or field, info.get_default() if defaults is None else getattr(defaults, field)
        inner, depth = _model_of(info.annotation)
        if inner is None:
            keys.append(
                Key(
                    name=key, meaning=info.description or "",
                    allowed=kind(schema["properties"][key], schema).removesuffix(" or `null`"),  # TOML has none
                    default="" if default in (PydanticUndefined, None) else _toml(default), required=info.is_required(),
                )
            )  # fmt: skip
            continue
        path = ".".join([*filter(None, [name]), key, *(NAMES[key] if depth else ())])
        below.append((path, info.description or "", inner, default if isinstance(default, BaseModel) else None))
    yield Table(name, meaning, keys)
    for row in below:
        yield from _tables(*row)


def _model_of(annotation: Any) -> tuple[type[BaseModel] | None, int]:
    """Return the model of a table and how many names lead to it; None: the annotation is that of a value."""
    depth = 0
    while get_origin(annotation) is dict:
        annotation, depth = get_args(annotation)[1], depth + 1
    return (annotation, depth) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else (None, 0)


def _toml(value: Any) -> str:
    return json.dumps(value)

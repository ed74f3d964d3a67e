"""Say in a sentence of our own what is wrong with a value that pydantic refused, and which key was perhaps meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import core_schema

from ota.errors import printable

SHOWN = 60  # characters of a wrong value that are shown
NAMES = r"^[a-z0-9][a-z0-9-]{0,39}$"  # the pattern of names
KINDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "string": "text in quotes", "list": "a list", "dict": "a table",
    "model": "a table", "finite": "a finite number",
}  # fmt: skip
BOUNDS = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than", "less_than_equal": "at most"}
LENGTHS = {"string": "character", "too": "entry"}


def first_fault(error: ValidationError, kind: type[BaseModel]) -> str:
    """Say what the first fault is: the key and one sentence.

    Args:
        error: what pydantic found.
        kind: the model that was asked for, which knows the keys.
    """
    found = error.errors(include_url=False)[0]
    place = [part for part in found["loc"] if part != "[key]"]
    where, what = _named(place), str(found["type"])
    if what == "extra_forbidden":
        return f"there is no key {where}{_meant(str(place[-1]), kind, place[:-1])}"
    if what == "missing":
        return f"{where} is missing"
    said = _fault(what, found.get("ctx", {}), found["input"], str(found["msg"]))
    return f"{where}: {said}" if where else said


def _named(place: Sequence[int | str]) -> str:
    return printable(".".join(map(str, place)), 200)


def _fault(what: str, ctx: dict[str, Any], given: object, said: str) -> str:
    kind, _, rest = what.partition("_")
    if what in BOUNDS:
        limit = next(value for name, value in ctx.items() if name in ("gt", "ge", "lt", "le"))
        return f"it must be {BOUNDS[what]} {_number(limit)}, not {_shown(given)}"
    if what in ("literal_error", "enum"):
        return f"it must be {ctx['expected']}, not {_shown(given)}"
    if what == "string_pattern_mismatch" and ctx["pattern"] == NAMES:
        return f"{_shown(given)} is no name; use lower-case letters, digits and '-', 40 at most"
    if what == "string_pattern_mismatch":
        return f"{_shown(given)} does not have the form that it needs"
    if rest.endswith(("short", "long")) and ("min_length" in ctx or "max_length" in ctx):
        least = "min_length" in ctx
        count = counted(ctx["min_length" if least else "max_length"], LENGTHS.get(kind, "entry"))
        return f"it must have {'at least' if least else 'at most'} {count}"
    if what == "value_error":
        return str(ctx["error"])
    if kind in KINDS:
        return f"it must be {KINDS[kind]}, not {_shown(given)}"
    if what in ("json_invalid", "json_type"):
        return "it is not JSON"
    # Errors of our own (`PydanticCustomError`) have a sentence of their own; of pydantic's, all others are said alike.
    return "it is not valid" if what in get_args(core_schema.ErrorType) else said


def counted(count: int, unit: str) -> str:
    """Say a number of things in words, such as "1 entry" or "2 entries"."""
    return f"{count:,} {unit if count == 1 else unit[:-1] + 'ies' if unit.endswith('ry') else unit + 's'}"


def _number(value: object) -> str:
    return f"{value:,}".replace(",", "") if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _shown(given: object) -> str:
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, (dict, list)):
        return "a table" if isinstance(given, dict) else "a list"
    return printable(repr(given), SHOWN)


def _meant(key: str, kind: type[BaseModel], place: Sequence[int | str]) -> str:
    """Name the key that was perhaps meant, among those that the place has."""
    names = {field.alias or name for model in _models(kind, place) for name, field in model.model_fields.items()}
    near = difflib.get_close_matches(key, sorted(names), 1, 0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; there are {', '.join(sorted(names))}" if 0 < len(names) <= 12 else ""


def _models(annotation: Any, place: Sequence[int | str]) -> Iterator[type[BaseModel]]:
    """Yield the models that may stand at a place below an annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models(get_args(annotation)[0], place)
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _models(one, place)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not place:
            yield annotation
        for name, field in annotation.model_fields.items():
            if place and (field.alias or name) == place[0]:
                yield from _models(field.annotation, place[1:])
    elif origin in (dict, list) and place:
        yield from _models(get_args(annotation)[-1], place[1:])

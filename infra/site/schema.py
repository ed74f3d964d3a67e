"""What values a field may have, in words, from its JSON schema."""

from __future__ import annotations

from typing import Any

PATTERNS = {
    r"^[0-9a-f]{64}$": "sha256, 64 hex digits",
    r"^[0-9a-f]{128}$": "128 hex digits",
    r"^[a-z0-9][a-z0-9-]{0,39}$": "name of 1 to 40 lower-case letters, digits and `-`",
    r"^[A-Za-z0-9._-]*$": "letters, digits, dots, dashes and underscores",
    r"^(>=|<)[0-9]{1,6}(\.[0-9]{1,6}){0,3}$": "bound of a version, such as `>=1.20`",
    r"^[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}$": "version, such as `0.1.0`",
    r"^[0-9]{1,4}$": "number of up to 4 digits",
    r"^[a-z0-9][a-z0-9_-]{0,19}=[A-Za-z0-9][A-Za-z0-9._-]{0,39}$": "name and value, such as `site=berlin`",
    r"^\{[ -~]*\}$": "JSON text in printable ASCII",
    r"^[ -~]{0,80}$": "printable ASCII, at most 80 characters",
    r"^[A-Za-z0-9_-]{16,128}$": "16 to 128 letters, digits, dashes and underscores",
    r"^[0-9a-f]{40}([0-9a-f]{24})?$": "Git commit, in hex",
    r"^[0-9a-f]{32}(\.dir)?$": "md5 of DVC, in hex",
}


def kind(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Say in Markdown what values a schema allows, such as "whole number, 1 to 8".

    Args:
        schema: the schema of the field.
        root: the schema with the definitions that `schema` refers to.
    """
    if "$ref" in schema:
        target = root["$defs"][schema["$ref"].rpartition("/")[2]]
        return "table" if target.get("type") == "object" else kind(target, root)
    if "allOf" in schema:
        return kind(schema["allOf"][0], root)
    if "anyOf" in schema:
        return " or ".join(kind(part, root) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        values = [f"`{value}`" for value in schema.get("enum", [schema.get("const")])]
        return " or ".join([", ".join(values[:-1]), values[-1]]) if len(values) > 1 else values[0]
    return _typed(schema, root)


def _typed(schema: dict[str, Any], root: dict[str, Any]) -> str:
    form = schema.get("type")
    if form in ("integer", "number"):
        return ("whole number" if form == "integer" else "number") + _range(schema)
    if form == "null":
        return "`null`"
    if form == "boolean":
        return "`true` or `false`"
    if form == "array":
        return f"list{_count(schema)} of: {kind(schema['items'], root)}"
    if form == "object":
        names = schema.get("propertyNames") or next(iter(schema.get("patternProperties", {"": {}})))
        keys = kind(names, root) if isinstance(names, dict) and names else "names"
        inner = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {"": {}}).values()))
        return f"table of {keys}, each with: {kind(inner, root)}"
    if "pattern" in schema:
        longest = f", at most {schema['maxLength']}" if "maxLength" in schema else ""
        return PATTERNS[schema["pattern"]] + longest
    return f"text{_length(schema)}"


def _range(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    said = [f"{_number(low)} or more"] if low is not None else []
    said += [f"above {_number(above)}"] if above is not None else []
    said += [f"at most {_number(high)}"] if high is not None else []
    said += [f"below {_number(below)}"] if below is not None else []
    if not said:
        return ""
    return f"{' ' if said[0].startswith(('above', 'below')) else ', '}{', '.join(said)}"


def _number(value: float) -> str:
    return f"{value:f}".rstrip("0").rstrip(".") if value % 1 else f"{int(value):,}"


def _count(schema: dict[str, Any]) -> str:
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high is None:
        return ""
    return f" with {high} entries" if low == high else f" with {low} to {high} entries"


def _length(schema: dict[str, Any]) -> str:
    low, high = schema.get("minLength"), schema.get("maxLength")
    if high is not None:
        return f" of {low} to {high} characters" if low else f" of at most {high} characters"
    return ""

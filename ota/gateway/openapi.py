"""Describe the gateway's addresses as an OpenAPI document, made of the one list of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

import ota
from ota.report import Answer, Enrolment


@dataclass(frozen=True)
class Endpoint:
    """An address, who may use it, and what it answers."""

    path: str
    method: str
    call: Callable[[Any, Request], Awaitable[Response]]
    roles: tuple[str, ...]
    """Roles of API tokens that may use it; "" among them: it needs none."""
    faults: tuple[int, ...]
    """Statuses of its answers other than 200."""
    model: type[BaseModel] | None = None
    """Form of its answer."""
    takes: str = ""
    """Media type of its body."""


_PARAMETERS = {
    "/v1/devices": [
        {"name": "after", "in": "query", "schema": {"type": "string"}, "description": "the last device of the page before"},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}},
    ]
}
_BODIES: dict[str, dict[str, Any]] = {
    "application/x-ndjson": {"type": "string", "description": "signed reports, one a line; Content-Encoding may be gzip"},
    "application/json": {"$ref": "#/components/schemas/Enrolment"},
}
_FAULT = {
    "type": "object", "required": ["error", "code"],
    "properties": {
        "error": {"type": "string", "description": "a sentence for people"},
        "code": {"type": "string", "description": "a word for programs"},
    },
}  # fmt: skip


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the document."""
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one)
    schemas: dict[str, Any] = {"Fault": _FAULT}
    for model in (Answer, Enrolment):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DeltaFerry gateway", "version": ota.__version__,
            "description": "Devices report and enrol here, and operators ask. The signed repository is served at the root.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def _operation(one: Endpoint) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "OK"}
    if one.model:
        good["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{one.model.__name__}"}}}
    fault = {"application/json": {"schema": {"$ref": "#/components/schemas/Fault"}}}
    responses = {"200": good} | {str(s): {"description": HTTPStatus(s).phrase, "content": fault} for s in one.faults}
    operation: dict[str, Any] = {
        "summary": (one.call.__doc__ or "").strip().splitlines()[0], "operationId": one.call.__name__, "responses": responses,
    }  # fmt: skip
    names = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"{(\w+)}", one.path)
    ]
    if parameters := names + _PARAMETERS.get(one.path, []):
        operation["parameters"] = parameters
    if one.takes:
        operation["requestBody"] = {"required": True, "content": {one.takes: {"schema": _BODIES[one.takes]}}}
    needed = [{"token": [role]} for role in one.roles if role]
    operation["security"] = [*needed, *([{}] if "" in one.roles else [])]
    return operation

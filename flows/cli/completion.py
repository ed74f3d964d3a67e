"""Complete lines, device classes and models in a shell, from ferry.toml alone.

A person waits for each completion. So ferry.toml is read without its rules, and nothing else of the workspace is opened.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

ASKED = "_FERRY_COMPLETE"  # environment variable by which a shell asks for completions
LADDER = ("full", "dev", "fast", "turbo")  # full is trained, too, if a class runs another


@dataclass(frozen=True)
class Item:
    """One completion, as click wants it."""

    value: str
    type: str = "plain"
    help: str | None = None


def tell(app: typer.Typer) -> None:
    """Tell completions to a shell that asks for completions, and end the process."""
    command = typer.main.get_command(app)
    _prepare(command)
    command(prog_name="ferry")


def lines(settings: dict[str, Any]) -> list[str]:
    """List the lines of a ferry.toml."""
    return [*settings.get("lines", {})]


def targets(settings: dict[str, Any]) -> list[str]:
    """List LINE/CLASS of everything in a ferry.toml."""
    return [f"{line}/{name}" for line in lines(settings) for name in _classes(settings, line)]


def subjects(settings: dict[str, Any]) -> list[str]:
    """List LINE/CONFIG/VARIANT of everything that a ferry.toml lets train."""
    found: dict[str, None] = {}
    for line in lines(settings):
        for asked in _classes(settings, line).values():
            run = asked.get("variants", ["full"] if settings.get("schema") == 1 else LADDER)
            made = [variant for variant in LADDER if variant in run or variant == "full"]
            found |= {f"{line}/{asked.get('configuration', 'I')}/{variant}": None for variant in made}
    return [*found]


COMPLETED: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "line": lines, "lines": lines, "target": targets, "subject": subjects,
}  # fmt: skip
"""How the arguments with these names are completed, in every command."""


def _classes(settings: dict[str, Any], line: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = settings["lines"][line].get("classes") or {"edge": {}}
    return found


def _prepare(command: Any) -> None:
    """Let all arguments of a command, and of those below it, complete what `COMPLETED` names."""
    for inner in getattr(command, "commands", {}).values():
        _prepare(inner)
    for parameter in command.params:
        if parameter.param_type_name == "argument" and parameter.name in COMPLETED:
            parameter.shell_complete = partial(_complete, COMPLETED[parameter.name])


def _complete(listed: Callable[[dict[str, Any]], list[str]], context: Any, incomplete: str) -> list[Item]:
    """List the completions of a word; none if ferry.toml cannot be read, because a shell is no place for an error."""
    folder = Path(context.find_root().params.get("workspace") or os.environ.get("FERRY_WORKSPACE") or "")
    try:
        values = listed(tomllib.loads((folder / "ferry.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return [Item(value) for value in values if value.startswith(incomplete) and value.isprintable() and " " not in value]

"""The pages that are generated, by their paths below docs/."""

from __future__ import annotations

from collections.abc import Callable

from infra.site import environment, leaves, programs, settings

FERRY = (
    "Options of `ferry` itself come before the command: `ferry --quiet retrain gaskets`. Every command has `--help`. In the usage lines, words in braces "
    "must be given, and words in brackets may be given. `ferry.toml` has the settings of a workspace: [all keys](settings.md)."
)
AGENT = "Every command has `--help`."
DELTA = "Every command has `--help`. `ferry delta` has the same commands, in the factory's program."


def _delta() -> str:
    found = programs.ferry_delta()
    return programs.page(found, DELTA) if found else ""


def generated() -> dict[str, Callable[[], str]]:
    """Return the functions that write the pages, by path."""
    pages: dict[str, Callable[[], str]] = {
        "what-leaves.md": leaves.page,
        "reference/ferry.md": lambda: programs.page(programs.ferry(), FERRY),
        "reference/ferry-agent.md": lambda: programs.page(programs.ferry_agent(), AGENT),
        "reference/settings.md": settings.page,
        "reference/environment.md": environment.page,
        "reference/exit-codes.md": programs.exit_codes,
    }
    return pages | ({"reference/ferry-delta.md": _delta} if programs.ferry_delta() else {})

"""`ferry config`."""

from __future__ import annotations

import typer

from flows.cli.shared import Json, Options, answer, reported_errors
from flows.errors import WorkspaceError

config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The settings in ferry.toml.")


@config_app.command("check")
def config_check(as_json: Json = False) -> None:
    """Read ferry.toml and say everything that is wrong with it.

    Other commands name only the first mistake. Nothing is changed, and nothing else of the workspace is opened.
    """
    with reported_errors():
        from flows.check import problems
        from flows.settings import SETTINGS

        path = Options.workspace.absolute() / SETTINGS
        if not path.is_file():
            raise WorkspaceError(
                f"{path.parent} is not a workspace (it has no {SETTINGS}); make one with `ferry init {Options.workspace}`"
            )
        found = problems(path)
        answer(
            as_json, {"file": str(path), "problems": [problem.model_dump() for problem in found]},
            "\n".join(problem.text for problem in found) or f"{path} is right",
        )  # fmt: skip
        if found:
            count = f"{len(found)} mistakes" if len(found) > 1 else "1 mistake"
            raise WorkspaceError(f"{path} has {count}; correct {'them' if len(found) > 1 else 'it'}")

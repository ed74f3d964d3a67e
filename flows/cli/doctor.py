"""`ferry doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from flows.cli.shared import Json, Options, answer, reported_errors


def doctor(as_json: Json = False) -> None:
    """Say what is wrong with a workspace.

    It ends with code 3 if something is. It looks at settings, paths, Git, data and their remote, keys and expiries, databases, what is published,
    installed packages and free space. It changes nothing, and also works where other commands refuse.
    """
    with reported_errors():
        from flows.doctor import broken, examine

        found = examine(Options.workspace)
        value = {"fit": not broken(found), "findings": [asdict(finding) for finding in found]}
        answer(as_json, value, "\n".join(f"{f.level:5} {f.about:11} {f.text}" for f in found))
        if broken(found):
            raise typer.Exit(3)

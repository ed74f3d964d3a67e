"""`ferry report` and `ferry rate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors, showing_progress


def report(
    line: Annotated[str, typer.Argument(help="Only this line; all by default.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write the one-page report: quality, time, energy, bytes and cost beside a cloud, what changed, how to go back."""
    with reported_errors():
        workspace = open_workspace()
        from flows.report import write

        workspace.fleet.collect(workspace.inbox)
        path = write(workspace, output or workspace.root / "report.html", line or None)
        answer(as_json, {"report": str(path)}, str(path))


def rate(
    subject: Annotated[str, typer.Argument(help="LINE/CONFIG/VARIANT, such as surfaces/I/full.")],
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version to judge; the newest by default that is not champion.")
    ] = None,
    against: Annotated[int | None, typer.Option(min=1, help="Version to compare with; the champion by default.")] = None,
    pairs: Annotated[int, typer.Option(min=1, max=500, help="Pairs of images on the sheet.")] = 40,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the sheet on this machine until interrupted, and keep the answers.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Of --serve; 0 takes a free one.")] = 0,
    answers: Annotated[list[Path] | None, typer.Option(help="Files that raters sent back; may be given several times.")] = None,
    as_json: Json = False,
) -> None:
    """Ask people, blind, which of two versions draws the better image of the same caption and seed.

    Writes a page to send to raters; what it saves comes back with --answers. With --serve it is shown on this machine instead. Every
    finished sheet is an entry of the ledger; what all of them come to is told in the end, and on the report.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import rate as asking

        made: dict[str, str] = {}
        if answers:
            asking.collect(workspace, subject, answers)
        else:
            with showing_progress():
                sheet, page = asking.prepare(workspace, subject, version, against, pairs)
            if serve:
                with asking.server(workspace, sheet, page, port) as address:
                    typer.echo(
                        f"{address} shows {pairs} pairs; open it, and end with Ctrl-C when everybody has answered", err=True
                    )
                    asking.wait()
            else:
                made = {"page": str(asking.write(workspace, sheet, page))}
        verdicts = asking.verdicts(workspace, subject)
        told = [f"{made['page']}: send it to raters, then `ferry rate {subject} --answers FILE`"] if made else []
        answer(
            as_json, made | {"verdicts": [v.model_dump(mode="json") for v in verdicts]},
            "\n".join(told + ([v.text for v in verdicts] or [f"nobody has rated {subject} yet"])),
        )  # fmt: skip

"""`ferry report` and `ferry rate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors, showing_progress, subject_in
from ota.errors import printable


def report(
    line: Annotated[str, typer.Argument(help="Only this line; all by default.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write the one-page report on quality, cost and changes.

    It shows quality, time, energy, bytes, the cost compared with a cloud, and how to roll back.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.report import write

        workspace.fleet.collect(workspace.inbox)
        path = write(workspace, output or workspace.root / "report.html", line or None)
        answer(as_json, {"report": str(path)}, str(path))


def rate(
    subject: Annotated[str, typer.Argument(help="LINE/CONFIG/VARIANT, such as surfaces/I/full.")],
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version to rate; the newest one that is not champion by default.")
    ] = None,
    against: Annotated[int | None, typer.Option(min=1, help="Version to compare with; the champion by default.")] = None,
    pairs: Annotated[int, typer.Option(min=1, max=500, help="Pairs of images on the sheet.")] = 40,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the sheet on this machine until interrupted, and save the answers.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port for --serve; 0 chooses a free one.")] = 0,
    answers: Annotated[list[Path] | None, typer.Option(help="File that a rater sent back; repeat for several files.")] = None,
    as_json: Json = False,
) -> None:
    """Let people compare the images of two versions blind.

    Writes a page with pairs of images of the same caption and seed. Send it to raters; read the files that they send back with
    --answers. --serve shows the page on this machine instead. Each finished sheet becomes an entry of the ledger. The combined result is
    printed at the end and shown in the report.
    """
    with reported_errors():
        workspace = open_workspace()
        from registry import sheets

        made: dict[str, str] = {}
        subject_in(workspace, subject)
        if answers:
            sheets.collect(workspace, workspace.ratings, subject, answers)
        else:
            from flows.web import rating

            with showing_progress():
                sheet, page = rating.prepare(workspace, subject, version, against, pairs)
            if serve:
                with rating.server(workspace, sheet, page, port) as address:
                    typer.echo(
                        f"{address} shows {pairs} pairs; open it, and end with Ctrl-C when everybody has answered", err=True
                    )
                    rating.wait()
            else:
                made = {"page": str(rating.write(workspace, sheet, page))}
        verdicts = sheets.verdicts(workspace, subject)
        told = [f"{made['page']}: send it to raters, then `ferry rate {subject} --answers FILE`"] if made else []
        answer(
            as_json, made | {"verdicts": [v.model_dump(mode="json") for v in verdicts]},
            "\n".join(told + ([printable(v.text) for v in verdicts] or [f"nobody has rated {subject} yet"])),
        )  # fmt: skip

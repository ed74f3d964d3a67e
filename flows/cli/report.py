"""`ferry report`, `ferry explain` and `ferry rate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors, showing_progress, subject_in
from flows.errors import WorkspaceError
from ota.errors import printable


def report(
    lines: Annotated[
        list[str] | None,
        typer.Argument(metavar="LINE|FILE", help="Only this line; all by default. With --poc: the boards' results."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the workspace by default, or poc.html here.")
    ] = None,
    of_poc: Annotated[
        bool, typer.Option("--poc", help="Show what boards measured with a kit of `ferry poc`; needs no workspace.")
    ] = False,
    latency_ms: Annotated[
        float | None, typer.Option(help="With --poc: budget of time for one image, in ms.", show_default=False)
    ] = None,
    joules: Annotated[
        float | None, typer.Option(help="With --poc: budget of energy for one image, in J.", show_default=False)
    ] = None,
    memory_mib: Annotated[
        float | None, typer.Option(help="With --poc: budget of memory of the process, in MiB.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the one-page report on quality, cost and changes.

    It shows quality, time, energy, bytes, the cost compared with a cloud, and how to roll back. With --poc it shows for each board a table,
    a Pareto picture, and the best choice within the budgets.
    """
    with reported_errors():
        given = lines or []
        budgets = {"--latency-ms": latency_ms, "--joules": joules, "--memory-mib": memory_mib}
        set_here = [name for name, value in budgets.items() if value is not None]
        if of_poc:
            _report_poc(given, output or Path("poc.html"), budgets, as_json)
            return
        if set_here:
            raise WorkspaceError(f"{set_here[0]} is a budget for a PoC; add --poc and the boards' results")
        if len(given) > 1:
            raise WorkspaceError("a report is of one line or of all; name one, or add --poc if these are boards' results")
        workspace = open_workspace()
        from flows.report import write

        path = write(workspace, output or workspace.root / "report.html", given[0] if given else None)
        answer(as_json, {"report": str(path)}, str(path))


def _report_poc(files: list[str], output: Path, budgets: dict[str, float | None], as_json: bool) -> None:
    from flows import poc
    from registry.poc import Budget

    if not files:
        raise WorkspaceError("name the files that boards gave back, as in `ferry report --poc board.json`")
    for name, value in budgets.items():
        if value is not None and not 0 < value < 1e9:
            raise WorkspaceError(f"{name} cannot be {value:g}; give a number above 0")
    budget = Budget(budgets["--latency-ms"], budgets["--joules"], budgets["--memory-mib"])
    told = poc.report([Path(file) for file in files], budget, output)
    answer(as_json, told, "\n".join([*(f"{board['name']}: {board['choice']}" for board in told["boards"]), str(output)]))


def explain(
    subject: Annotated[
        str, typer.Argument(help="LINE/CONFIG/VARIANT, such as surfaces/I/full; LINE is its full, if it has one configuration.")
    ],
    caption: Annotated[str, typer.Option(help="What the image shall show; by default that of --trace.", show_default=False)] = "",
    version: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Version in MLflow; the champion by default.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, max=1000, help="Noises to draw from; more of them tell more experts apart.")] = 4,
    seed: Annotated[
        int | None, typer.Option(min=0, show_default=False, help="Seed of the first noise; by default that of --trace, or 0.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(show_default=False, help="File of `ferry-agent generate --trace`, to show beside the factory's loads."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; explain.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each expert does to an image.

    It draws the same noise again with each routed expert switched off in turn, and shows the changes as pictures and figures with
    intervals, and the load of the experts by block and step.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import explain as explaining

        asked = explaining.subject_of(workspace, subject)
        kept = explaining.read_trace(trace) if trace else None
        with showing_progress():
            made = explaining.explain(
                workspace, asked, caption or (kept.caption if kept else ""), output or workspace.root / "explain.html", version=version,
                images=images, seed=seed if seed is not None else kept.seed if kept else 0, trace=kept,
            )  # fmt: skip
        path = str(output or workspace.root / "explain.html")
        answer(as_json, {"page": path} | made.model_dump(mode="json"), f"{made.text}\n\n{path}")


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

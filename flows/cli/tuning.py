"""`ferry tune`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from flows.cli.shared import Json, answer, fail, open_workspace, reported_errors, showing_progress


def tune(
    line: Annotated[str, typer.Argument(help="Line whose champion is measured.")],
    configuration: Annotated[
        str, typer.Option(help="Configuration of the champion, I or II; not needed where there is one.")
    ] = "",
    images: Annotated[int, typer.Option(min=16, max=10_000, help="Images for each interval of guidance.")] = 96,
    as_json: Json = False,
) -> None:
    """Measure how a line's champion is best drawn.

    Two things are measured: grids of the sampling times for the variants that draw with the weights of `full`, by their distance from
    the converged images; and intervals of the times at which guidance applies, by the distance from held-out images. Nothing is
    changed: the answer has the lines for ferry.toml, and the gate judges them in the next retraining.
    """
    with reported_errors():
        workspace = open_workspace()
        workspace.line(line)
        if configuration not in ("", "I", "II"):
            fail(f"there is no configuration {configuration!r}; choose I or II", 3)
        from flows.tuning import tune as measure

        with showing_progress():
            made = measure(workspace, line, cast("Any", configuration or None), images)
        answer(as_json, made.model_dump(mode="json"), made.text)

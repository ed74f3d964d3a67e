"""`ferry delta`: what `ferry-delta` does, without a second installation. `ota.delta.commands` does the work and words the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, reported_errors
from ota.delta import commands

delta_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=commands.ABOUT)


def _named(text: str) -> Path:
    """Convert an argument to a path; a name that is none is wrong usage."""
    try:
        return commands.named(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Graph = Annotated[Path | None, typer.Option("--graph", parser=_named, metavar="<path>", help=commands.GRAPH, show_default=False)]
OldGraph = Annotated[
    Path | None, typer.Option("--old-graph", parser=_named, metavar="<path>", help=commands.OLD_GRAPH, show_default=False)
]
Factors = Annotated[
    Path | None, typer.Option("--factors", parser=_named, metavar="<path>", help=commands.FACTORS, show_default=False)
]


@delta_app.callback()
def _one_thread() -> None:
    """Let OpenBLAS use one thread in all `ferry delta` commands."""
    commands.use_one_thread()


@delta_app.command("build", help=commands.HELP["build"])
def delta_build(
    old: Annotated[Path, typer.Argument(parser=_named, help=commands.OLD)],
    new: Annotated[Path, typer.Argument(parser=_named, help=commands.NEW_OF_MODEL)],
    output: Annotated[Path, typer.Option("--output", "-o", parser=_named, metavar="<path>", help=commands.OUTPUT_OF_BUILD)],
    graph: Graph = None,
    old_graph: OldGraph = None,
    factors: Factors = None,
    as_json: Json = False,
) -> None:
    """Print the answer of `commands.build`."""
    with reported_errors(commands.AFTER_INTERRUPT):
        made = commands.build(old, new, output, graph, old_graph, factors)
        answer(as_json, made.value, made.text)


@delta_app.command("apply", help=commands.HELP["apply"])
def delta_apply(
    old: Annotated[Path, typer.Argument(parser=_named, help=commands.OLD_OF_DELTA)],
    patch: Annotated[Path, typer.Argument(parser=_named, help=commands.PATCH)],
    output: Annotated[Path, typer.Option("--output", "-o", parser=_named, metavar="<path>", help=commands.OUTPUT_OF_APPLY)],
) -> None:
    """Print the answer of `commands.apply`."""
    with reported_errors(commands.AFTER_INTERRUPT):
        made = commands.apply(old, patch, output)
        answer(False, made.value, made.text)


@delta_app.command("inspect", help=commands.HELP["inspect"])
def delta_inspect(
    patch: Annotated[Path, typer.Argument(parser=_named, help=commands.PATCH)],
    of: Annotated[
        Path | None, typer.Option("--of", parser=_named, metavar="<path>", help=commands.OF, show_default=False)
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--from", parser=_named, metavar="<path>", help=commands.FROM, show_default=False)
    ] = None,
    graph: Graph = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", parser=_named, metavar="<path>", help=commands.PLOT, show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the answer of `commands.inspect`."""
    with reported_errors(commands.AFTER_INTERRUPT):
        made = commands.inspect(patch, of, base, graph, plot)
        answer(as_json, made.value, made.text)


@delta_app.command("estimate", help=commands.HELP["estimate"])
def delta_estimate(
    old: Annotated[Path, typer.Argument(parser=_named, help=commands.OLD)],
    new: Annotated[Path, typer.Argument(parser=_named, help=commands.NEW)],
    graph: Graph = None,
    old_graph: OldGraph = None,
    factors: Factors = None,
    as_json: Json = False,
) -> None:
    """Print the answer of `commands.estimate`."""
    with reported_errors(commands.AFTER_INTERRUPT):
        made = commands.estimate(old, new, graph, old_graph, factors)
        answer(as_json, made.value, made.text)

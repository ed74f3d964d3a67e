"""`ferry poc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors


def poc(
    line: Annotated[str, typer.Argument(help="Line whose images, captions and samplers are measured.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Zip file to write.")] = Path("kit.zip"),
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Size of the network; repeat for several. By default nano and small.", show_default=False),
    ] = None,
    configuration: Annotated[
        list[str] | None, typer.Option(help="I (stride 2) or II (stride 1); both by default.", show_default=False)
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Variant whose sampler is used; repeat for several. All by default.", show_default=False),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="How weights are stored; by default as the line's classes store them.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a kit that measures networks on your own board.

    It needs no data and no training: untrained networks take the same time, memory and energy. The kit holds the agent and a page that
    says how to run it. A board needs no factory and no network. `ferry report --poc` shows what boards give back.
    """
    with reported_errors():
        from flows import poc as kits

        chosen = kits.Chosen(tier or (), configuration or (), variant or (), precision or ())
        made = kits.make(open_workspace(), line, chosen, output)
        answer(as_json, made.value, made.text)

"""`ferry delta`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, reported_errors
from ota.output import shown

delta_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Deltas between any two files; no workspace needed.")

AGAIN = "nothing was written, repeat the command to begin again"


def _named(text: str) -> Path:
    """Convert an argument to a path; refuse "" and "-", because files are read more than once and cannot be standard input."""
    if text in ("", "-"):
        raise typer.BadParameter(f"{text!r} names no file; a file that is called - is ./-")
    return Path(text)


Graph = Annotated[
    Path | None,
    typer.Option(
        "--graph", parser=_named, metavar="<path>", help="ONNX file that describes NEW, if NEW is its external data.",
        show_default=False,
    ),
]  # fmt: skip
OldGraph = Annotated[
    Path | None,
    typer.Option(
        "--old-graph",
        parser=_named,
        metavar="<path>",
        help="ONNX file that describes OLD; --graph by default.",
        show_default=False,
    ),
]


@delta_app.callback()
def _one_thread() -> None:
    """Let OpenBLAS use one thread in all `ferry delta` commands."""
    # OpenBLAS's second thread has nothing to do here, and spins for longer than most deltas take.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@delta_app.command("build")
def delta_build(
    old: Annotated[Path, typer.Argument(parser=_named, help="Old file.")],
    new: Annotated[Path, typer.Argument(parser=_named, help="New file: ONNX, safetensors, or any other.")],
    output: Annotated[Path, typer.Option("--output", "-o", parser=_named, metavar="<path>", help="Delta file to write.")],
    graph: Graph = None,
    old_graph: OldGraph = None,
    as_json: Json = False,
) -> None:
    """Write a delta that turns one file into another."""
    with reported_errors(AGAIN):
        from ota.delta import files

        built = files.build(old, new, output, graph, old_graph)
        size = new.stat().st_size
        value = {"patch": str(output), "bytes": built.size, "of": size, "by_kind": built.by_kind}
        answer(as_json, value, f"{shown(output)}: {built.size:,} bytes{_share(size, built.size)}")


@delta_app.command("apply")
def delta_apply(
    old: Annotated[Path, typer.Argument(parser=_named, help="Old file, from which the delta was built.")],
    patch: Annotated[Path, typer.Argument(parser=_named, help="Delta file.")],
    output: Annotated[Path, typer.Option("--output", "-o", parser=_named, metavar="<path>", help="New file to write.")],
) -> None:
    """Rebuild the new file from the old file and a delta.

    The new file appears only when it is complete and its hash is right. Rerun a killed command; it resumes.
    """
    with reported_errors(AGAIN):
        from ota.delta import files

        files.apply(old, patch, output)
        typer.echo(f"{shown(output)}: {output.stat().st_size:,} bytes")


@delta_app.command("inspect")
def delta_inspect(
    patch: Annotated[Path, typer.Argument(parser=_named, help="Delta file.")],
    of: Annotated[
        Path | None,
        typer.Option(
            "--of",
            parser=_named,
            metavar="<path>",
            help="New file, to show tensor names.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--from",
            parser=_named,
            metavar="<path>",
            help="Old file, to show the bytes of each tensor.",
            show_default=False,
        ),
    ] = None,
    graph: Graph = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", parser=_named, metavar="<path>", help="Picture to write: .svg or .png.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the parts of a delta and their sizes.

    With --of and --from it shows them by tensor.
    """
    with reported_errors(AGAIN):
        from ota.delta import files
        from ota.release import picture

        if plot:
            picture.check(plot, [patch, of, base, graph])
        header, parts = files.inspect(patch, of, graph, base)
        if plot:
            picture.draw(parts, plot)
        total = sum(part.size for part in parts) or 1
        rows = [f"{'kind':8} {'offset':>13} {'makes':>10} {'costs':>10} {'share':>6}  holds"]
        for part in parts:
            holds = ", ".join(f"{count:,} {what}" for what, count in part.holds.items())
            holds += f" in {part.streams} streams" if part.streams > 1 and base is None else ""
            names = ", ".join(part.tensors[:3]) + (f" and {len(part.tensors) - 3} more" if len(part.tensors) > 3 else "")
            rows.append(
                f"{part.kind:8} {part.offset:>13,} {part.length:>10,} {part.size:>10,.0f} {part.size / total:>6.1%}  {'; '.join(filter(None, (holds, names)))}".rstrip()
            )
        value = {"base": header.base, "target": header.target, "parts": [asdict(part) for part in parts]}
        answer(as_json, value, "\n".join(rows))


@delta_app.command("estimate")
def delta_estimate(
    old: Annotated[Path, typer.Argument(parser=_named, help="Old file.")],
    new: Annotated[Path, typer.Argument(parser=_named, help="New file.")],
    graph: Graph = None,
    old_graph: OldGraph = None,
    as_json: Json = False,
) -> None:
    """Forecast the size of a delta, with bounds, without building it."""
    with reported_errors(AGAIN):
        from ota.delta import files

        found, size = files.forecast(old, new, graph, old_graph), new.stat().st_size
        bounds = f"between {found.low:,} and {found.high:,}"
        text = f"about {found.bytes:,} bytes{_share(size, found.bytes)}; {bounds}"
        if not found.close:
            text = f"{bounds} bytes{_share(size, found.low, found.high)}"
        answer(as_json, {"bytes": found.bytes, "low": found.low, "high": found.high, "of": size}, text)


def _share(of: int, *counts: int) -> str:
    """Format numbers of bytes as shares of the new file; return "" for an empty file."""
    return f", {' to '.join(f'{count / of:.1%}' for count in counts)} of {of:,}" if of else ""

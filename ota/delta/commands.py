"""The commands on deltas for people: `ferry delta` and `ferry-delta` parse their arguments, call these, and print the answers.

    >>> build(Path("old.onnx"), Path("new.onnx"), Path("patch")).text
    'patch: 1,234 bytes, 1.2% of 102,400'

So the two programs cannot differ in what they do or say. NumPy is loaded only when a command runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota.output import check_chosen, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ota.delta.files import Part

ABOUT = "Deltas between any two files; no workspace needed."
HELP = {
    "build": "Write a delta that turns one file into another.",
    "apply": "Rebuild the new file from the old file and a delta.\n\n"
    "The new file appears only when it is complete and its hash is right. Rerun a killed command; it resumes.",
    "inspect": "Show the parts of a delta and their sizes.\n\nWith --of and --from it shows them by tensor.",
    "estimate": "Forecast the size of a delta, with bounds, without building it.",
}
"""What each command does: one line, and perhaps a paragraph."""

OLD, NEW, PATCH = "Old file.", "New file.", "Delta file."
OLD_OF_DELTA = "Old file, from which the delta was built."
NEW_OF_MODEL = "New file: ONNX, safetensors, or any other."
OUTPUT_OF_BUILD, OUTPUT_OF_APPLY = "Delta file to write.", "New file to write."
GRAPH = "ONNX file that describes NEW, if NEW is its external data."
OLD_GRAPH = "ONNX file that describes OLD; --graph by default."
FACTORS = "Factors of the training that made NEW from OLD (update.safetensors)."
OF, FROM = "New file, to show tensor names.", "Old file, to show the bytes of each tensor."
PLOT = "Picture to write: .svg or .png."
JSON = "Print one JSON object instead of text."

AFTER_INTERRUPT = "nothing was written, repeat the command to begin again"


@dataclass(frozen=True)
class Answer:
    """What a command found: a value for JSON, and the same as text for people."""

    value: dict[str, Any]
    text: str


def use_one_thread() -> None:
    """Let OpenBLAS use one thread, unless the user chose a number. It must be called before NumPy is loaded."""
    # OpenBLAS's second thread has nothing to do here, and spins for longer than most deltas take.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def named(text: str) -> Path:
    """Convert an argument to a path.

    Raises:
        ValueError: it is "" or "-"; files are read more than once, so they cannot be standard input.
    """
    if text in ("", "-"):
        raise ValueError(f"{text!r} does not name a file; write ./- for a file that is called -")
    return Path(text)


def build(
    old: Path, new: Path, output: Path, graph: Path | None = None, old_graph: Path | None = None, factors: Path | None = None
) -> Answer:
    """Write a delta; arguments and errors are those of `ota.delta.files.build`."""
    from ota.delta import files

    check_chosen(output, "delta.patch", [old, new, graph, old_graph, factors])
    built = files.build(old, new, output, graph, old_graph, factors)
    size = new.stat().st_size
    value = {"patch": str(output), "bytes": built.size, "of": size, "by_kind": built.by_kind}
    return Answer(value, f"{shown(output)}: {built.size:,} bytes{_share(size, built.size)}")


def apply(old: Path, patch: Path, output: Path) -> Answer:
    """Rebuild the new file; arguments and errors are those of `ota.delta.files.apply`."""
    from ota.delta import files

    check_chosen(output, "new.onnx", [old, patch])
    files.apply(old, patch, output)
    size = output.stat().st_size
    return Answer({"output": str(output), "bytes": size}, f"{shown(output)}: {size:,} bytes")


def inspect(
    patch: Path, of: Path | None = None, base: Path | None = None, graph: Path | None = None, plot: Path | None = None
) -> Answer:
    """List the parts of a delta, and draw them into the file `plot` if one is named.

    The other arguments are those of `ota.delta.files.inspect`.

    Raises:
        OtaError: as `ota.delta.files.inspect` and `ota.delta.picture.draw`.
    """
    from ota.delta import files, picture

    if plot:
        picture.check(plot, [patch, of, base, graph])
        check_chosen(plot, "delta.svg")
    header, parts = files.inspect(patch, of, graph, base)
    if plot:
        picture.draw(parts, plot)
    value = {"base": header.base, "target": header.target, "parts": [asdict(part) for part in parts]}
    return Answer(value, _table(parts, by_tensor=base is not None))


def estimate(
    old: Path, new: Path, graph: Path | None = None, old_graph: Path | None = None, factors: Path | None = None
) -> Answer:
    """Forecast the size of a delta; arguments and errors are those of `ota.delta.files.forecast`."""
    from ota.delta import files

    found, size = files.forecast(old, new, graph, old_graph, factors), new.stat().st_size
    bounds = f"between {found.low:,} and {found.high:,}"
    text = f"about {found.bytes:,} bytes{_share(size, found.bytes)}; {bounds}"
    if not found.close:
        text = f"{bounds} bytes{_share(size, found.low, found.high)}"
    return Answer({"bytes": found.bytes, "low": found.low, "high": found.high, "of": size}, text)


def _table(parts: Sequence[Part], by_tensor: bool) -> str:
    """Format the parts of a delta as a table with one line for each."""
    total = sum(part.size for part in parts) or 1
    rows = [f"{'kind':8} {'offset':>13} {'makes':>10} {'costs':>10} {'of all':>6}  holds"]
    for part in parts:
        holds = ", ".join(f"{count:,} {what}" for what, count in part.holds.items())
        holds += f" in {part.streams} streams" if part.streams > 1 and not by_tensor else ""
        names = ", ".join(part.tensors[:3]) + (f" and {len(part.tensors) - 3} more" if len(part.tensors) > 3 else "")
        figures = f"{part.kind:8} {part.offset:>13,} {part.length:>10,} {part.size:>10,.0f} {part.size / total:>6.1%}"
        rows.append(f"{figures}  {'; '.join(filter(None, (holds, names)))}".rstrip())
    return "\n".join(rows)


def _share(of: int, *counts: int) -> str:
    """Format numbers of bytes as shares of the new file; return "" for an empty file."""
    return f", {' to '.join(f'{count / of:.1%}' for count in counts)} of {of:,}" if of else ""

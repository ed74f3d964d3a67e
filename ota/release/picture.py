"""A picture of a delta: where its bytes go in the new file, and for which tensors."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ota import output
from ota.delta.files import Part
from ota.errors import OperatorError

MOST = 20  # most tensors that the picture names
KINDS = (".svg", ".png", ".pdf")


def check(path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a place where the picture cannot or must not be written, before any work is done.

    Raises:
        OperatorError: the file name does not end in a picture format; or as `ota.output.check`.
    """
    if path.suffix.lower() not in KINDS:
        raise OperatorError(f"{output.shown(path)} says no kind of picture; name a file that ends in .svg or .png")
    output.check(path, inputs)


def draw(parts: Sequence[Part], path: Path) -> None:
    """Draw the picture into a file; the ending of the file name sets the format (svg, png, pdf).

    Args:
        parts: parts of the delta, from `ota.delta.files.inspect`.
        path: where the picture goes.

    Raises:
        OperatorError: there is nothing to draw, or no picture of that format can be written there.
    """
    check(path)
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "delta"  # the same delta gives the same file
    import matplotlib.pyplot as plt

    shown = [part for part in parts if part.length]
    if not shown:
        raise OperatorError("the delta makes no bytes, so there is nothing to draw")
    ways = list(dict.fromkeys(map(way_of, shown)))
    colours = {way: f"C{i % 10}" for i, way in enumerate(ways)}
    costs = by_tensor(shown)
    figure, (along, named) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
    for way in ways:
        mine = [part for part in shown if way_of(part) == way]
        total = sum(part.size for part in mine)
        along.bar(
            [part.offset / 1e6 for part in mine], [100 * part.size / part.length for part in mine],
            [part.length / 1e6 for part in mine], align="edge", color=colours[way], label=f"{way}: {total:,.0f} bytes",
        )  # fmt: skip
    along.set(
        xlabel="MB of the new file", ylabel="cost, in percent of the new bytes", title=f"{sum(p.size for p in shown):,.0f} bytes"
    )
    # The scale ignores short parts: a few bytes between two tensors may cost more than they make, and would hide the rest.
    wide = [part.size / part.length for part in shown if part.length > max(p.length for p in shown) / 50]
    along.set_ylim(0, 110 * max(wide))
    along.legend(fontsize=8)
    if costs:
        rows = sorted(costs, key=lambda name: -costs[name])[:MOST][::-1]
        named.barh(rows, [costs[name] / 1e3 for name in rows], color="C7")
        named.tick_params("y", labelsize=7)
        named.set(xlabel="kB of the delta", title="tensors that cost most")
    else:
        named.axis("off")
        named.text(0, 0.5, "name the new file (--of) and its base (--from)\nto see what each tensor costs", fontsize=9)
    figure.tight_layout()
    kind, made = path.suffix.lower()[1:], io.BytesIO()
    try:
        figure.savefig(made, format=kind, metadata={"CreationDate" if kind == "pdf" else "Date": None} if kind != "png" else None)
    finally:
        plt.close(figure)
    with output.fresh(path) as file:
        file.write(made.getvalue())


def way_of(part: Part) -> str:
    """Name how a part is encoded, in a word or two."""
    return ", ".join(part.holds) if len(part.holds) <= 2 and part.holds else part.kind


def by_tensor(parts: Sequence[Part]) -> dict[str, float]:
    """Sum the bytes of the delta for each tensor, over the parts that concern only that tensor."""
    costs: dict[str, float] = {}
    for part in parts:
        if len(part.tensors) == 1:
            costs[part.tensors[0]] = costs.get(part.tensors[0], 0.0) + part.size
    return costs

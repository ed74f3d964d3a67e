"""A picture of a delta: where its bytes go in the new file, and for which tensors.

The picture is laid out once, as boxes and texts. An SVG file is written without any library; for .png and .pdf, matplotlib draws
the same boxes and texts.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from ota import output
from ota.delta.files import Part
from ota.errors import OperatorError, printable

MOST = 20  # most tensors that the picture names
LONGEST = 48  # most characters of a tensor's name
KINDS = (".svg", ".png", ".pdf")

WIDTH, HEIGHT = 1100, 450  # pixels
LEFT, TOP, BOTTOM = 60, 40, 345  # edges of the left diagram's frame, and of the right one's
RIGHT = 610  # where the left diagram ends
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
INK, GREY = "#000000", "#7f7f7f"
GLYPH = 0.6  # width of a character, as a share of the size of its font; sans-serif fonts are narrower
THINNEST = 0.25  # width of a box in pixels; thinner ones would not be seen


@dataclass(frozen=True)
class Box:
    """A filled rectangle, in pixels from the top left corner."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Text:
    """One line of text; `x` and `y` are where its baseline starts, has its middle, or ends."""

    x: float
    y: float
    text: str
    size: float = 13  # pixels
    anchor: Literal["start", "middle", "end"] = "middle"
    upwards: bool = False


def check(path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a place where the picture cannot or must not be written, before any work is done.

    Raises:
        OperatorError: the file name does not end in a picture format, or the format needs matplotlib, which is not installed; or
            as `ota.output.check`.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise OperatorError(
            f"{output.shown(path)} does not end in a kind of picture that can be written; name a file that ends in .svg or .png"
        )
    if kind != ".svg" and importlib.util.find_spec("matplotlib") is None:
        raise OperatorError(
            f"a {kind} file needs matplotlib, which is not installed; install it, or name a file that ends in .svg"
        )
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
    shapes = layout(parts)
    kind = path.suffix.lower()
    made = _svg(shapes) if kind == ".svg" else _by_matplotlib(shapes, kind[1:])
    with output.fresh(path) as file:
        file.write(made)


def layout(parts: Sequence[Part]) -> list[Box | Text]:
    """Arrange the picture: what each part of the new file costs on the left, and the tensors that cost most on the right.

    Raises:
        OperatorError: the delta makes no bytes.
    """
    shown = [part for part in parts if part.length]
    if not shown:
        raise OperatorError("the delta makes no bytes, so there is nothing to draw")
    return [*_along(shown), *_by_cost(by_tensor(shown))]


def _along(shown: Sequence[Part]) -> list[Box | Text]:
    """Arrange the left diagram: along the new file, how many bytes of the delta each part costs."""
    ways = list(dict.fromkeys(map(way_of, shown)))
    colours = {way: COLOURS[i % len(COLOURS)] for i, way in enumerate(ways)}
    # The scale ignores short parts: a few bytes between two tensors may cost more than they make, and would hide the rest.
    wide = [part.size / part.length for part in shown if part.length > max(p.length for p in shown) / 50]
    end, most = max(part.offset + part.length for part in shown), 1.1 * max(wide)
    across, up = (RIGHT - LEFT) / end, (BOTTOM - TOP) / most
    made: list[Box | Text] = []
    for part in shown:
        height = min(part.size / part.length, most) * up
        width = max(part.length * across, THINNEST)
        made.append(Box(LEFT + part.offset * across, BOTTOM - height, width, height, colours[way_of(part)]))
    made += _frame(LEFT, RIGHT, f"{sum(p.size for p in shown):,.0f} bytes", "MB of the new file")
    made += [shape for value in _ticks(end / 1e6) for shape in _below(LEFT + value * 1e6 * across, f"{value:g}")]
    for value in _ticks(100 * most):
        y = BOTTOM - value / 100 * up
        made += [Box(LEFT - 4, y, 4, 1, INK), Text(LEFT - 7, y + 5, f"{value:g}", anchor="end")]
    made.append(Text(18, (TOP + BOTTOM) / 2, "cost, in percent of the new bytes", upwards=True))
    x, y = float(LEFT), BOTTOM + 62.0
    for way in ways:
        said = f"{way}: {sum(part.size for part in shown if way_of(part) == way):,.0f} bytes"
        if x > LEFT and x + 18 + _wide(said, 11) > WIDTH - 20:
            x, y = LEFT, y + 16
        made += [Box(x, y - 9, 14, 9, colours[way]), Text(x + 18, y, said, 11, "start")]
        x += 36 + _wide(said, 11)
    return made


def _by_cost(costs: dict[str, float]) -> list[Box | Text]:
    """Arrange the right diagram: the tensors that cost most; without tensors, what to name so that it can be drawn."""
    if not costs:
        advice = "name the new file (--of) and its base (--from)", "to see what each tensor costs"
        return [Text(RIGHT + 60, 190 + 18 * i, line, 12, "start") for i, line in enumerate(advice)]
    rows = [(_short(name), costs[name]) for name in sorted(costs, key=lambda name: -costs[name])[:MOST]]
    left, right = RIGHT + 40 + max(_wide(name, 10) for name, _ in rows), WIDTH - 20
    most = 1.05 * max(cost for _, cost in rows) or 1.0
    across, step = (right - left) / most, (BOTTOM - TOP) / MOST
    made = _frame(left, right, "tensors that cost most", "kB of the delta")
    for i, (name, cost) in enumerate(rows):
        y = TOP + i * step
        made += [Box(left, y + 1.5, cost * across, step - 3, GREY), Text(left - 6, y + step - 4, name, 10, "end")]
    return made + [shape for value in _ticks(most / 1e3) for shape in _below(left + value * 1e3 * across, f"{value:g}")]


def _frame(left: float, right: float, title: str, below: str) -> list[Box | Text]:
    middle, width, height = (left + right) / 2, right - left, BOTTOM - TOP
    edges = [
        Box(left, TOP, width, 1, INK), Box(left, BOTTOM, width + 1, 1, INK),
        Box(left, TOP, 1, height, INK), Box(right, TOP, 1, height, INK),
    ]  # fmt: skip
    return [*edges, Text(middle, TOP - 12, title, 15), Text(middle, BOTTOM + 38, below)]


def _below(x: float, label: str) -> list[Box | Text]:
    return [Box(x, BOTTOM, 1, 5, INK), Text(x, BOTTOM + 19, label)]


def _ticks(most: float) -> list[float]:
    """Choose up to seven round values from 0 to `most`, in steps of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10(most / 6))
    step = next(step for step in (factor * 10.0**power for factor in (1, 2, 5, 10)) if most / step < 7)
    return [round(i * step, 12) for i in range(int(most / step) + 1)]


def _wide(text: str, size: float) -> float:
    """Estimate how wide a text is, in pixels."""
    return GLYPH * size * len(text)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _svg(shapes: Iterable[Box | Text]) -> bytes:
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    fonts = "DejaVu Sans, Verdana, Arial, sans-serif"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{fonts}">',
        f'<rect {size} fill="#ffffff"/>',
    ]
    for shape in shapes:
        if isinstance(shape, Box):
            x, y, width, height = map(_number, (shape.x, shape.y, shape.width, shape.height))
            lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{shape.colour}"/>')
        else:
            x, y = _number(shape.x), _number(shape.y)
            turned = f' transform="rotate(-90 {x} {y})"' if shape.upwards else ""
            style = f'font-size="{_number(shape.size)}" text-anchor="{shape.anchor}"{turned}'
            lines.append(f'<text x="{x}" y="{y}" {style}>{escape(printable(shape.text))}</text>')
    return "\n".join([*lines, "</svg>\n"]).encode()


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _by_matplotlib(shapes: Iterable[Box | Text], kind: str) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    dots = 100  # for each inch
    figure = Figure(figsize=(WIDTH / dots, HEIGHT / dots), dpi=dots)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.set_axis_off()
    sides: dict[str, Literal["left", "center", "right"]] = {"start": "left", "middle": "center", "end": "right"}
    for shape in shapes:
        if isinstance(shape, Box):
            axes.add_patch(Rectangle((shape.x, shape.y), shape.width, shape.height, color=shape.colour, linewidth=0, snap=False))
        else:
            axes.text(
                shape.x, shape.y, printable(shape.text), parse_math=False, fontsize=shape.size * 72 / dots,
                horizontalalignment=sides[shape.anchor], verticalalignment="baseline",
                rotation=90 if shape.upwards else 0, rotation_mode="anchor",
            )  # fmt: skip
    made = io.BytesIO()
    figure.savefig(made, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
    return made.getvalue()


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

"""Which candidates of a PoC are worth a look on a board, and which one fits a budget: rules without I/O, and the page.

A kit's networks are untrained, so there is no quality here, only what each candidate is and what it costs. What it is counts in
this order: more blocks, then more positions (stride 1), then more evaluations, then more bits of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from registry.report import TEMPLATES, human_seconds, human_size

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}
STRIDES = {"I": 2, "II": 1}
RULE = (
    "Of the candidates whose cost is known to fit every budget (95th percentile of the time, peak memory of the process, mean energy), "
    "the best is the one with the most blocks; among those, stride 1 before stride 2, then the most evaluations, then the most bits of "
    "a weight, then the least time."
)


@dataclass(frozen=True)
class Candidate:
    """A candidate on a board."""

    key: str
    configuration: str
    variant: str
    precision: str
    blocks: int
    tokens: int
    evaluations: int
    weights_bytes: int
    images: int = 0
    first_seconds: float | None = None
    p50_seconds: float | None = None
    p95_seconds: float | None = None
    peak_mib: float | None = None
    joules: float | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""
    """What the joules come from, or why there are none; empty: nobody asked for them."""
    reason: str = ""
    failed: str = ""

    @property
    def stride(self) -> int:
        """Stride of the first convolution."""
        return STRIDES[self.configuration]

    @property
    def worth(self) -> tuple[int, int, int, int]:
        """What it is, to be compared: blocks, positions, evaluations, bits."""
        return self.blocks, self.tokens, self.evaluations, BITS.get(self.precision, 0)

    @property
    def costs(self) -> tuple[float, float, float]:
        """What it costs, to be compared: median seconds, memory, joules; infinite where it was not measured."""
        known = (self.p50_seconds, self.peak_mib, self.joules)
        return tuple(math.inf if value is None else value for value in known)  # type: ignore[return-value]

    @property
    def network(self) -> str:
        """Its size and stride in words, without its variant."""
        return f"{self.blocks} blocks, stride {self.stride}"


@dataclass(frozen=True)
class Board:
    """A board and its candidates."""

    name: str
    facts: list[tuple[str, str]]
    rows: list[Candidate]

    @property
    def measured(self) -> list[Candidate]:
        """The candidates that have figures."""
        return [row for row in self.rows if not row.failed]


@dataclass(frozen=True)
class Budget:
    """Limits for one image; None: no limit."""

    latency_ms: float | None = None
    joules: float | None = None
    memory_mib: float | None = None

    def ratios(self, row: Candidate) -> list[float]:
        """Return the shares of the limits that a candidate needs, infinite where its cost was not measured; 1 just fits."""
        pairs = (
            (None if row.p95_seconds is None else 1000 * row.p95_seconds, self.latency_ms), (row.joules, self.joules), (row.peak_mib, self.memory_mib),
        )  # fmt: skip
        return [math.inf if value is None else value / limit for value, limit in pairs if limit is not None]

    @property
    def words(self) -> str:
        """The limits as text; empty: there are none."""
        limits = ((self.latency_ms, "ms"), (self.joules, "J"), (self.memory_mib, "MiB"))
        said = [f"{limit:g} {unit}" for limit, unit in limits if limit is not None]
        return " and ".join(said if len(said) < 3 else [", ".join(said[:2]), said[2]])


@dataclass(frozen=True)
class Choice:
    """The answer to a budget on a board."""

    text: str
    best: Candidate | None = None
    nearest: Candidate | None = None
    """What comes nearest, if nothing fits."""
    fitting: list[Candidate] = field(default_factory=list)


def front(rows: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one dominates: none is at least as much in all that it is, and costs no more in anything."""
    known = [row for row in rows if not row.failed]

    def dominates(a: Candidate, b: Candidate) -> bool:
        more = all(x >= y for x, y in zip(a.worth, b.worth, strict=True))
        return more and all(x <= y for x, y in zip(a.costs, b.costs, strict=True)) and (a.worth, a.costs) != (b.worth, b.costs)

    return [row for row in known if not any(dominates(other, row) for other in known)]


def choose(board: Board, budget: Budget) -> Choice:
    """Choose the best candidate of a board within a budget; see `RULE`."""
    known = board.measured
    if not known:
        return Choice("Nothing could be measured on this board; the table says why.")
    if not budget.words:
        return Choice(
            "No budget was given; name one with --latency-ms, --joules or --memory-mib, and the best choice stands here."
        )
    fitting = [row for row in known if max(budget.ratios(row)) <= 1]
    if fitting:
        best = _best(fitting)
        return Choice(
            f"{best.key} is the best choice within {budget.words}: {_costs(best)}. {len(fitting)} of {len(known)} candidates fit.",
            best, None, fitting,
        )  # fmt: skip
    if budget.joules is not None and all(row.joules is None for row in known):
        rest = Budget(budget.latency_ms, None, budget.memory_mib)
        other = choose(board, rest).text if rest.words else ""
        return Choice(
            f"Energy was not measured on this board, so no candidate is known to fit within {budget.joules:g} J."
            f"{f' Without that budget: {other}' if other else ''}"
        )
    nearest = min(known, key=lambda row: (max(budget.ratios(row)), [-x for x in row.worth]))
    over = max(budget.ratios(nearest))
    return Choice(
        f"None of {len(known)} candidates fits within {budget.words}. {nearest.key} is nearest: {_costs(nearest)}, "
        f"{over:.2g} times the budget that it misses most.",
        None, nearest,
    )  # fmt: skip


def _best(rows: Iterable[Candidate]) -> Candidate:
    return max(rows, key=lambda row: (row.worth, [-cost for cost in row.costs]))


def _costs(row: Candidate) -> str:
    energy = "energy not measured" if row.joules is None else f"{row.joules:.3g} J"
    return f"{human_seconds(1000 * (row.p95_seconds or 0))} at the 95th percentile, {row.peak_mib or 0:.0f} MiB, {energy}"


# The picture


@dataclass(frozen=True)
class Mark:
    """A candidate in a picture."""

    number: int
    row: Candidate
    x: float
    y: float
    colour: int
    on_front: bool


@dataclass(frozen=True)
class Series:
    """The candidates of one network, from the cheapest variant to the dearest."""

    name: str
    colour: int
    stride: int
    marks: list[Mark]


@dataclass(frozen=True)
class Tick:
    """A labelled place of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Picture:
    """Seconds of an image (across) against another cost (upwards), both logarithmic, in the units of the page's drawing."""

    title: str
    unit: str
    series: list[Series]
    across: list[Tick]
    upwards: list[Tick]
    limit_x: float | None
    limit_y: float | None


LEFT, RIGHT, TOP, BOTTOM = 46.0, 430.0, 14.0, 268.0  # of the drawing; the template says how large it is
COLOURS = 5


def pictures(board: Board, budget: Budget) -> list[Picture]:
    """Draw the pictures of a board: against memory, and against energy where it was measured."""
    known = board.measured
    made = (
        [_picture(board, known, "Seconds against memory", "MiB", lambda row: row.peak_mib, budget.memory_mib, budget)]
        if known
        else []
    )
    powered = [row for row in known if row.joules]
    if powered:
        made.append(_picture(board, powered, "Seconds against energy", "J", lambda row: row.joules, budget.joules, budget))
    return made


def _picture(
    board: Board, rows: list[Candidate], title: str, unit: str, cost: Callable[[Candidate], float | None], limit: float | None, budget: Budget
) -> Picture:  # fmt: skip
    best, seconds_limit = {row.key for row in front(board.rows)}, budget.latency_ms and budget.latency_ms / 1000
    place_x, across = _axis([row.p50_seconds or 0 for row in rows], LEFT, RIGHT)
    place_y, upwards = _axis([cost(row) or 0 for row in rows], BOTTOM, TOP)
    sizes = sorted({row.blocks for row in board.rows})
    several = len({row.precision for row in rows}) > 1
    groups: dict[str, list[Mark]] = {}
    for row in sorted(rows, key=lambda row: (row.blocks, row.tokens, row.precision, row.evaluations)):
        name = f"{row.network}{f', {row.precision}' if several else ''}"
        mark = Mark(
            board.rows.index(row) + 1, row, place_x(row.p50_seconds or 0), place_y(cost(row) or 0), sizes.index(row.blocks) % COLOURS,
            row.key in best,
        )  # fmt: skip
        groups.setdefault(name, []).append(mark)
    return Picture(
        title, unit, [Series(name, marks[0].colour, marks[0].row.stride, marks) for name, marks in groups.items()], across, upwards,
        _inside(seconds_limit, place_x, LEFT, RIGHT), _inside(limit, place_y, TOP, BOTTOM),
    )  # fmt: skip


def _inside(value: float | None, place: Callable[[float], float], low: float, high: float) -> float | None:
    """Return the place of a limit, or None if there is none or it lies outside of the picture."""
    return at if value and low <= (at := place(value)) <= high else None


def _axis(values: Sequence[float], begin: float, end: float) -> tuple[Callable[[float], float], list[Tick]]:
    """Make a logarithmic axis over some values: a function from a value to its place, and labels at 1, 2 and 5 times powers of ten."""
    low, high = max(min(values), 1e-9), max(*values, 1e-9)
    span = max(math.log(high / low), math.log(1.5))
    start = (math.log(low) + math.log(high) - span) / 2 - 0.08 * span
    span *= 1.16

    def place(value: float) -> float:
        return begin + (end - begin) * (math.log(max(value, 1e-9)) - start) / span

    decades = range(math.floor(start / math.log(10)), math.ceil((start + span) / math.log(10)) + 1)
    steps = (1, 2, 5) if span < math.log(200) else (1,)
    if span < math.log(4):
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8)  # type: ignore[assignment]
    known = [step * 10.0**decade for decade in decades for step in steps]
    inside = [value for value in known if start <= math.log(value) <= start + span]
    return place, [Tick(place(value), f"{value:g}") for value in inside]


@dataclass(frozen=True)
class Page:
    """Everything on the page of a PoC."""

    line: str
    image: str
    boards: list[Board]
    budget: Budget
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """Render the page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": human_size, "seconds": lambda seconds: human_seconds(1000 * seconds)}
    shown = [
        {
            "board": board, "choice": choose(board, page.budget), "front": [row.key for row in front(board.rows)],
            "pictures": pictures(board, page.budget), "asked": any(row.source for row in board.rows),
            "unpowered": next((row.reason for row in board.measured if row.source and row.joules is None), ""),
        }
        for board in page.boards
    ]  # fmt: skip
    return environment.get_template("poc.html").render(
        page=page, shown=shown, rule=RULE, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM
    )

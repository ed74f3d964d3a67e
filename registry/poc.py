"""Which candidates of a PoC are worth a look on a board, and which one fits a budget: rules without I/O, and the page.

A kit's networks are untrained, so there is no quality here, only what each candidate is and what it costs. In place of quality stands
an order: more blocks first, then more positions (stride 1), then more evaluations, then more bits of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from registry.report import TEMPLATES, human_seconds, human_size

BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}
STRIDES = {"I": 2, "II": 1}
NOISE = 0.02  # share by which two measurements of a cost differ without a meaning
RULE = (
    "Nothing was trained, so an order stands in place of quality: more blocks first, then stride 1 before stride 2, then more evaluations, "
    "then more bits of a weight. The best choice is the first in this order whose cost is known to fit every budget (95th percentile of the "
    "time, mean energy, peak memory of the process)."
)
"""How a choice is made, for people."""


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
    cpu_seconds: float | None = None
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
        """Its place in the order that stands for quality: blocks, positions, evaluations, bits."""
        return self.blocks, self.tokens, self.evaluations, BITS.get(self.precision, 0)

    @property
    def costs(self) -> tuple[float, float, float]:
        """What it costs, to be compared: median seconds, memory, joules; infinite where it was not measured."""
        seconds, memory, joules = (
            math.inf if value is None else value for value in (self.p50_seconds, self.peak_mib, self.joules)
        )
        return seconds, memory, joules

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
    """Return the candidates that no other one dominates: none comes before it in the order and costs no more, up to `NOISE`."""
    known = [row for row in rows if not row.failed]

    def dominates(a: Candidate, b: Candidate) -> bool:
        if a.worth == b.worth:
            return a.costs != b.costs and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))
        return a.worth > b.worth and all(x <= (1 + NOISE) * y for x, y in zip(a.costs, b.costs, strict=True))

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
        fit = "fits" if len(fitting) == 1 else "fit"
        count = "It is the only candidate." if len(known) == 1 else f"{len(fitting)} of {len(known)} candidates {fit}."
        return Choice(
            f"{best.key} is the best choice within {budget.words}: {_costs(best)}. {count}",
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
    none = "The only candidate does not fit" if len(known) == 1 else f"None of {len(known)} candidates fits"
    return Choice(
        f"{none} within {budget.words}. {nearest.key} is nearest: {_costs(nearest)}, "
        f"{f'{over:,.0f}' if over >= 10 else f'{over:.2g}'} times the budget that it misses most.",
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

    row: Candidate
    x: float
    above: bool
    """Whether its name stands above it; the names of neighbours alternate, so that they do not overlap."""
    on_front: bool
    fits: bool


@dataclass(frozen=True)
class Lane:
    """The candidates of one network, which differ in their samplers, from the cheapest to the dearest."""

    y: float
    name: str
    about: str
    stride: int
    colour: int
    marks: list[Mark]


@dataclass(frozen=True)
class Tick:
    """A labelled place of an axis."""

    x: float
    text: str


@dataclass(frozen=True)
class Picture:
    """A cost of an image across, on a logarithmic axis; the networks above one another, in the order that stands for quality."""

    title: str
    height: float
    lanes: list[Lane]
    ticks: list[Tick]
    limit: float | None
    """Place of the budget; None: there is none, or it lies outside."""


LEFT, RIGHT, TOP, LANE = 112.0, 392.0, 26.0, 46.0  # of the drawing, in its own units
WIDTH, FOOT = 400.0, 34.0
COLOURS = 5


def pictures(board: Board, budget: Budget) -> list[Picture]:
    """Draw the pictures of a board: its time, and its energy where it was measured."""
    seconds = budget.latency_ms / 1000 if budget.latency_ms else None
    made = [_picture(board, "Seconds of an image, median", lambda row: row.p50_seconds, seconds, budget)]
    made.append(_picture(board, "Joules of an image", lambda row: row.joules, budget.joules, budget))
    return [picture for picture in made if picture.lanes]


def _picture(
    board: Board, title: str, cost: Callable[[Candidate], float | None], limit: float | None, budget: Budget
) -> Picture:  # fmt: skip
    rows = [row for row in board.measured if cost(row)]
    if not rows:
        return Picture(title, 0, [], [], None)
    best, sizes = {row.key for row in front(board.rows)}, sorted({row.blocks for row in board.rows})
    place, ticks = _axis([cost(row) or 0 for row in rows])
    several = len({row.precision for row in rows}) > 1
    networks: dict[tuple[int, int, int, str], list[Candidate]] = {}
    for row in sorted(rows, key=lambda row: row.worth, reverse=True):
        networks.setdefault((row.blocks, row.tokens, BITS.get(row.precision, 0), row.precision), []).append(row)
    lanes = []
    for number, key in enumerate(sorted(networks, reverse=True)):
        inside = sorted(networks[key], key=lambda row: cost(row) or 0)
        marks = [
            Mark(row, place(cost(row) or 0), i % 2 == 0, row.key in best, max(budget.ratios(row), default=0) <= 1)
            for i, row in enumerate(inside)
        ]
        about = f"{max(row.peak_mib or 0 for row in inside):.0f} MiB{f', {inside[0].precision}' if several else ''}"
        colour = sizes.index(inside[0].blocks) % COLOURS
        lanes.append(Lane(TOP + (number + 0.5) * LANE, inside[0].network, about, inside[0].stride, colour, marks))
    inside_limit = place(limit) if limit and LEFT <= place(limit) <= RIGHT else None
    return Picture(title, TOP + len(lanes) * LANE, lanes, ticks, inside_limit)


def _axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[Tick]]:
    """Make a logarithmic axis over some values: a function from a value to its place, and round values with their places."""
    low, high = math.log(min(values)), math.log(max(values))
    span = max(high - low, math.log(1.5))
    start, span = (low + high - span) / 2 - 0.07 * span, 1.14 * span

    def place(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log(value) - start) / span

    steps = (
        (1.0,) if span > math.log(1e4) else (1.0, 2.0, 5.0) if span > math.log(8) else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    decades = range(math.floor(start / math.log(10)), math.ceil((start + span) / math.log(10)) + 1)
    known = [step * 10.0**decade for decade in decades for step in steps]
    return place, [Tick(place(value), f"{value:g}") for value in known if LEFT <= place(value) <= RIGHT]


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
        page=page, shown=shown, rule=RULE, left=LEFT, right=RIGHT, top=TOP, width=WIDTH, foot=FOOT
    )

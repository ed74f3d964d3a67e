"""Blind rating: people compare images of two versions, in addition to the metrics, and the answers say which draws better.

A *sheet* has a number of pairs that is fixed before anybody looks. A pair is one caption and one seed, drawn by both versions.
Chance decides which version is on the left, and this assignment stays in the factory. A sheet counts only if it is answered to
its end, so nobody can stop at a favourable moment. A pair counts once, by majority, however many people saw it. A pair without
a majority is a tie, which says nothing about which version is better.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field, StringConstraints, ValidationError, model_validator
from scipy import stats

from model.scorecard import Frozen, Sha256
from registry.errors import RatingError

TEMPLATES = Path(__file__).parent / "templates"
LEAST_DECIDED = 20  # with fewer decided pairs no result is given
LEVEL = 0.95
MAX_ANSWERS = 64 * 1024  # bytes
SCRIPT = (TEMPLATES / "rate.js").read_text(encoding="utf-8")
# Captions are text from outside, so the policy lets only this script run.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)

Vote = Literal["1", "2", "="]  # left, right, neither
Choice = Literal["challenger", "before", "equal"]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60, pattern=r"^[^\x00-\x1f\x7f]+$")]
SheetId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class Sheet(Frozen):
    """A sheet with its answer key: caption, seed and sides of each pair. It never leaves the workspace."""

    id: SheetId
    subject: str
    challenger: int
    before: int = Field(description="the version that it is compared with")
    captions: list[str] = Field(min_length=1)
    seeds: list[int] = Field(description="of the noise that both images of a pair start from")
    challenger_left: list[bool]

    @model_validator(mode="after")
    def _even(self) -> Sheet:
        if not len(self.captions) == len(self.seeds) == len(self.challenger_left):
            raise ValueError("there must be as many seeds and sides as captions")
        return self


class Answers(Frozen):
    """Answers to a sheet that a rater sends back."""

    sheet: SheetId
    rater: Name
    votes: list[Vote] = Field(max_length=1000)


class Rated(Frozen):
    """A finished sheet of one rater, as the ledger keeps it."""

    sheet: SheetId
    sheet_sha256: Sha256
    rater: str
    challenger: int
    before: int
    choices: list[Choice]


class Verdict(Frozen):
    """The combined result of all answers about two versions."""

    challenger: int
    before: int
    raters: int
    pairs: int = Field(description="different pairs that were seen")
    preferred: int = Field(description="pairs in which the challenger was")
    against: int = Field(description="pairs in which the other was")
    share: float | None = Field(description="preferred among the decided; None below the least number")
    low: float | None = Field(description="of its 95 % interval (Clopper and Pearson 1934: never too narrow)")
    high: float | None
    p: float | None = Field(description="chance of so lopsided answers if both were alike (exact sign test, two-sided)")
    text: str


def deal(identity: str, subject: str, challenger: int, before: int, captions: list[str], pairs: int, lot: random.Random) -> Sheet:
    """Make a sheet: captions take turns, and chance decides the seeds, the sides and the order.

    Each version is on the left in half of the pairs.

    Args:
        identity: 32 hex digits.
        subject: LINE/CONFIG/VARIANT.
        challenger: number of a version.
        before: number of the version that it is compared with.
        captions: captions to draw.
        pairs: number of pairs, at least `LEAST_DECIDED`.
        lot: random number generator; the system's, except in tests.

    Raises:
        RatingError: there are too few pairs or no captions, or a version is compared with itself.
    """
    if challenger == before:
        raise RatingError(f"version {challenger} of {subject} cannot be compared with itself; name another with --against")
    if pairs < LEAST_DECIDED:
        raise RatingError(
            f"{pairs} pairs are too few, because a result needs {LEAST_DECIDED} decided pairs; ask for more with --pairs"
        )
    if not captions:
        raise RatingError(f"the scorecard of {subject} version {challenger} lists no captions to draw; evaluate it again")
    first = lot.randrange(2**31)
    rows = [(captions[i % len(captions)], first + i) for i in range(pairs)]
    lot.shuffle(rows)
    left = [i % 2 == 0 for i in range(pairs)]
    lot.shuffle(left)
    return Sheet(
        id=identity, subject=subject, challenger=challenger, before=before, captions=[c for c, _ in rows],
        seeds=[s for _, s in rows], challenger_left=left,
    )  # fmt: skip


def read(data: bytes) -> Answers:
    """Read answers that come from outside.

    Raises:
        RatingError: they are too long, or not valid answers.
    """
    if len(data) > MAX_ANSWERS:
        raise RatingError(f"the answers have {len(data)} bytes, more than {MAX_ANSWERS}; send the file that the page saved")
    try:
        return Answers.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RatingError(
            f"the file does not hold answers: {where} is not as the page saves it; send the file that the page saved"
        ) from error


def decode(sheet: Sheet, answers: Answers) -> Rated:
    """Translate a rater's answers from left and right back into versions.

    Raises:
        RatingError: the answers belong to another sheet, or do not cover all its pairs.
    """
    if answers.sheet != sheet.id:
        raise RatingError(
            f"these are the answers to another sheet, {answers.sheet}; collect them in the workspace that made that sheet"
        )
    if len(answers.votes) != len(sheet.captions):
        raise RatingError(
            f"{answers.rater} answered {len(answers.votes)} of {len(sheet.captions)} pairs; ask the rater to finish the sheet"
        )
    return Rated(
        sheet=sheet.id, sheet_sha256=sheet.sha256, rater=answers.rater, challenger=sheet.challenger, before=sheet.before,
        choices=[_choice(vote, left) for vote, left in zip(answers.votes, sheet.challenger_left, strict=True)],
    )  # fmt: skip


def _choice(vote: Vote, challenger_left: bool) -> Choice:
    if vote == "=":
        return "equal"
    return "challenger" if (vote == "1") == challenger_left else "before"


def judge(rated: list[Rated]) -> list[Verdict]:
    """Compute one verdict for each two versions that were compared, in the order in which they first appear."""
    couples = dict.fromkeys((r.challenger, r.before) for r in rated)
    return [_verdict([r for r in rated if (r.challenger, r.before) == couple]) for couple in couples]


def _verdict(rated: list[Rated]) -> Verdict:
    votes: dict[tuple[str, int], Counter[Choice]] = {}
    for sheet in rated:
        for i, choice in enumerate(sheet.choices):
            votes.setdefault((sheet.sheet, i), Counter(dict.fromkeys(get_args(Choice), 0)))[choice] += 1
    wins = sum(v["challenger"] > v["before"] for v in votes.values())
    losses = sum(v["challenger"] < v["before"] for v in votes.values())
    n, a, b = wins + losses, rated[0].challenger, rated[0].before
    people = len({r.rater for r in rated})
    share = low = high = p = None
    who = f"{people} rater{'s' if people > 1 else ''}, {len(votes)} pairs, {len(votes) - n} ties"
    if n < LEAST_DECIDED:
        text = f"versions {a} and {b} cannot be compared yet: {n} pairs are decided and {LEAST_DECIDED} are needed ({who})"
    else:
        test = stats.binomtest(wins, n, 0.5)
        interval = test.proportion_ci(LEVEL, method="exact")
        share, low, high, p = wins / n, float(interval.low), float(interval.high), float(test.pvalue)
        figures = (
            f"version {a} over {b} in {wins} of {n} decided pairs, {100 * share:.0f} % of them ({100 * low:.0f} to {100 * high:.0f} %); "
            f"by chance, if both were alike, p = {p:.2g}; {who}"
        )
        if p >= 1 - LEVEL:
            text = f"people see no clear difference: {figures}"
        else:
            text = f"people prefer version {a if wins > losses else b}: {figures}"
    return Verdict(
        challenger=a, before=b, raters=people, pairs=len(votes), preferred=wins, against=losses, share=share, low=low, high=high,
        p=p, text=text,
    )  # fmt: skip


def page(sheet: Sheet, images: list[tuple[bytes, bytes]]) -> str:
    """Render the page for raters as one HTML file: pairs and captions, and nothing that says which version drew which image.

    Args:
        sheet: the sheet; only its id and captions are used.
        images: PNG of the left and the right image of each pair.
    """
    shown = {
        "sheet": sheet.id, "captions": sheet.captions,
        "pairs": [[base64.b64encode(side).decode() for side in pair] for pair in images],
    }  # fmt: skip
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("rate.html").render(policy=POLICY, shown=shown, n=len(images), script=Markup(SCRIPT))  # noqa: S704 - ours

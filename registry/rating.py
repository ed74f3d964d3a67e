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
from typing import Annotated, Literal, get_args

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import Field, StringConstraints, ValidationError, model_validator
from scipy import stats

from model.scorecard import Frozen, Sha256
from registry.errors import RatingError

LEAST_DECIDED = 20  # with fewer decided pairs no result is given
LEVEL = 0.95
MAX_ANSWERS = 64 * 1024  # bytes

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
            raise ValueError("captions, seeds and sides are not as many")
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
            f"{pairs} pairs cannot say anything, {LEAST_DECIDED} decided ones are needed; ask for more with --pairs"
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
        raise RatingError(f"these are not answers: {where}: {first['msg']}; send the file that the page saved") from error


def decode(sheet: Sheet, answers: Answers) -> Rated:
    """Translate a rater's answers from left and right back into versions.

    Raises:
        RatingError: the answers belong to another sheet, or do not cover all its pairs.
    """
    if answers.sheet != sheet.id:
        raise RatingError(f"these are the answers to another sheet, {answers.sheet}; look for the workspace that made it")
    if len(answers.votes) != len(sheet.captions):
        raise RatingError(
            f"{answers.rater} answered {len(answers.votes)} of {len(sheet.captions)} pairs; only a sheet that is finished counts"
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
        text = f"nothing can be said of version {a} against {b} yet: {n} decided pairs, {LEAST_DECIDED} are needed ({who})"
    else:
        test = stats.binomtest(wins, n, 0.5)
        interval = test.proportion_ci(LEVEL, method="exact")
        share, low, high, p = wins / n, float(interval.low), float(interval.high), float(test.pvalue)
        figures = (
            f"version {a} over {b} in {wins} of {n} decided pairs, {100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f} %); "
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
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(PAGE).render(policy=POLICY, shown=shown, n=len(images), script=Markup(SCRIPT))  # noqa: S704 - ours


SCRIPT = """
"use strict";
const shown = JSON.parse(document.getElementById("shown").textContent);
const find = id => document.getElementById(id);
const n = shown.pairs.length;
let votes = [], rater = "";

function show(id) {
  for (const part of ["start", "ask", "end"]) find(part).hidden = part !== id;
}

function next() {
  const i = votes.length;
  find("progress").value = i;
  if (i === n) { finish(); return; }
  find("count").textContent = `${i + 1} of ${n}`;
  find("caption").textContent = `\\u201c${shown.captions[i]}\\u201d`;
  shown.pairs[i].forEach((data, side) => { find("image" + (side + 1)).src = "data:image/png;base64," + data; });
  find("back").disabled = i === 0;
}

function vote(value) {
  if (find("ask").hidden) return;
  votes.push(value);
  next();
}

function back() {
  if (find("ask").hidden || !votes.length) return;
  votes.pop();
  next();
}

async function finish() {
  show("end");
  const text = JSON.stringify({ sheet: shown.sheet, rater: rater, votes: votes });
  const file = find("file");
  file.href = "data:application/json," + encodeURIComponent(text);
  file.download = `answers-${shown.sheet.slice(0, 8)}-${rater.replace(/[^A-Za-z0-9]+/g, "-")}.json`;
  const served = location.protocol === "http:";
  find("sendback").hidden = served;
  if (!served) { find("said").textContent = "Thank you."; return; }
  try {
    const reply = await fetch("answers", { method: "POST", headers: { "Content-Type": "application/json" }, body: text });
    find("said").textContent = await reply.text();
    find("sendback").hidden = reply.ok;
  } catch (error) {
    find("said").textContent = "The answers could not be sent.";
    find("sendback").hidden = false;
  }
}

find("start").addEventListener("submit", event => {
  event.preventDefault();
  rater = find("name").value.trim();
  if (!rater) return;
  show("ask");
  next();
});
find("vote1").addEventListener("click", () => vote("1"));
find("vote2").addEventListener("click", () => vote("2"));
find("equal").addEventListener("click", () => vote("="));
find("back").addEventListener("click", back);
document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || find("ask").hidden) return;
  const value = { "1": "1", "2": "2", "=": "=", "0": "=", "3": "=" }[event.key];
  if (value) { event.preventDefault(); vote(value); }
  if (event.key === "Backspace") { event.preventDefault(); back(); }
});
"""

# Captions are text from outside, so the policy lets only this script run.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which image is better?</title>
<style>
  :root { --ink: #1b2430; --soft: #4d5966; --line: #c3ccd5 }
  * { box-sizing: border-box } [hidden] { display: none !important }
  body { font: 17px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 46rem; margin: 0 auto; padding: 1rem; text-align: center }
  h1 { font-size: 1.35rem; margin: .2rem 0 } p { margin: .5rem 0 } .soft { color: var(--soft); font-size: .9rem }
  .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; margin: .6rem 0 }
  .pair img { width: 100%; max-height: 55vh; object-fit: contain; image-rendering: pixelated; border: 1px solid var(--line); display: block; margin-bottom: .6rem }
  button, input, .file { font: inherit; padding: .6rem .9rem; border: 1px solid var(--line); border-radius: .5rem; background: #f3f6f9; color: var(--ink); min-height: 2.8rem; max-width: 100% }
  .pair button, #equal { width: 100% } button:disabled { color: #767f89 }
  button:hover:enabled, button:focus-visible, .file:focus-visible { border-color: #1c5fa8; outline: 2px solid #1c5fa8 }
  progress { width: 100%; height: .6rem } kbd { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .35rem; font: inherit; background: #fff }
  .file { display: inline-block; text-decoration: none }
</style>
</head>
<body>
<h1>Which image is better?</h1>
<form id="start">
<p>You will see {{ n }} pairs of images. Both were made for the same words. Say which one fits the words better and looks more real;
if you see no difference, say so. It takes about {{ (n * 4 / 60) | round(0, "ceil") | int }} minutes. Only a finished sheet counts.</p>
<p><label for="name">Your name</label><br><input id="name" required maxlength="60" autocomplete="name"> <button>Begin</button></p>
</form>
<main id="ask" hidden>
<progress id="progress" max="{{ n }}" value="0" aria-label="pairs answered"></progress>
<p><b id="caption" aria-live="polite"></b> <span class="soft" id="count"></span></p>
<div class="pair">
<div><img id="image1" alt="the left image"><button id="vote1">This one <kbd>1</kbd></button></div>
<div><img id="image2" alt="the right image"><button id="vote2">This one <kbd>2</kbd></button></div>
</div>
<p><button id="equal">No difference <kbd>=</kbd></button></p>
<p><button id="back">Back to the pair before</button></p>
</main>
<div id="end" hidden>
<p><b id="said" role="status"></b></p>
<p id="sendback">Save your answers, and send the file to whoever asked you.<br><br><a class="file" id="file" href="#">Save the answers</a></p>
</div>
<noscript><p>This page needs JavaScript to show the pairs.</p></noscript>
<script type="application/json" id="shown">{{ shown | tojson }}</script>
<script>{{ script }}</script>
</body>
</html>
"""

"""People rate blind: nothing on the page shows whose an image is, only finished sheets count, and few answers decide nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flows.setup import create
from flows.web import rating as pages
from flows.workspace import Workspace
from registry import rating, sheets
from registry.errors import RatingError
from registry.rating import Answers, Rated, Sheet

SUBJECT = "shapes/I/full"
IDENTITY = "0123456789abcdef" * 2


def dealt(pairs: int = 20, seed: int = 1, identity: str = IDENTITY) -> Sheet:
    return rating.deal(identity, SUBJECT, 3, 2, ["bar", "disc"], pairs, random.Random(seed))


def answered(sheet: Sheet, wins: int, losses: int, rater: str = "Anna") -> Answers:
    """Fill in a sheet with so many votes for the challenger, so many against it, and the rest alike."""
    wanted = ["challenger"] * wins + ["before"] * losses + ["equal"] * (len(sheet.captions) - wins - losses)
    votes = [
        "=" if want == "equal" else "1" if (want == "challenger") == left else "2"
        for want, left in zip(wanted, sheet.challenger_left, strict=True)
    ]
    return Answers.model_validate({"sheet": sheet.id, "rater": rater, "votes": votes})


def rated(wins: int, losses: int, pairs: int = 40, rater: str = "Anna", identity: str = IDENTITY) -> Rated:
    sheet = dealt(pairs, identity=identity)
    return rating.decode(sheet, answered(sheet, wins, losses, rater))


def test_sides_are_dealt_by_lot_and_evenly():
    first, second = dealt(40, seed=1), dealt(40, seed=2)
    assert sum(first.challenger_left) == sum(second.challenger_left) == 20
    assert first.challenger_left != second.challenger_left
    assert sorted(first.captions) == ["bar"] * 20 + ["disc"] * 20
    assert len(set(first.seeds)) == 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((3, 3, ["bar"], 40), "cannot be compared with itself"), ((3, 2, ["bar"], 19), "a result needs 20 decided pairs"),
     ((3, 2, [], 40), "lists no captions")],
)  # fmt: skip
def test_sheet_that_could_say_nothing_is_not_dealt(arguments: tuple[int, int, list[str], int], says: str):
    with pytest.raises(RatingError, match=says):
        rating.deal(IDENTITY, SUBJECT, *arguments, random.Random(1))


def test_page_does_not_tell_whose_an_image_is():
    sheet = dealt()
    pages = [
        rating.page(side, [(b"left", b"right")] * 20)
        for side in (sheet, sheet.model_copy(update={"challenger_left": [not s for s in sheet.challenger_left]}))
    ]
    assert pages[0] == pages[1]  # the drawn sides do not reach the page
    shown = json.loads(re.search(r'id="shown">(.*?)</script>', pages[0]).group(1))  # type: ignore[union-attr]
    assert shown.keys() == {"sheet", "captions", "pairs"}
    assert shown["pairs"][0] == [base64.b64encode(side).decode() for side in (b"left", b"right")]
    assert SUBJECT not in pages[0]
    assert "challenger" not in pages[0]
    assert not re.findall(r'(?:src|href)="(?!data:|#)', pages[0])


def test_caption_cannot_break_out_of_the_page():
    sheet = dealt().model_copy(update={"captions": ["</script><script>alert(1)</script>"] * 20})
    page = rating.page(sheet, [(b"left", b"right")] * 20)
    assert page.count("<script") == 2
    assert page.count("</script>") == 2


def test_votes_are_turned_back_into_versions():
    sheet = dealt()
    found = rating.decode(sheet, Answers(sheet=sheet.id, rater=" Anna ", votes=["1"] * 19 + ["="]))
    assert found.choices == ["challenger" if left else "before" for left in sheet.challenger_left[:19]] + ["equal"]
    assert found.rater == "Anna"
    assert found.sheet_sha256 == sheet.sha256


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "the file does not hold answers"),
        (b'{"sheet": "../../etc/passwd", "rater": "A", "votes": []}', "sheet"),
        (json.dumps({"sheet": IDENTITY, "rater": "A", "votes": ["3"]}).encode(), "votes.0"),
        (json.dumps({"sheet": IDENTITY, "rater": " ", "votes": []}).encode(), "rater"),
        (json.dumps({"sheet": IDENTITY, "rater": "a\x07b", "votes": []}).encode(), "rater"),
        (b" " * 70_000, "70000 bytes, more than"),
    ],
)
def test_what_is_no_answer_is_refused(data: bytes, says: str):
    with pytest.raises(RatingError, match=says):
        rating.read(data)


def test_unfinished_sheet_does_not_count():
    sheet = dealt()
    with pytest.raises(RatingError, match="answered 19 of 20 pairs; ask the rater to finish the sheet"):
        rating.decode(sheet, Answers(sheet=sheet.id, rater="Anna", votes=["1"] * 19))
    with pytest.raises(RatingError, match="another sheet"):
        rating.decode(sheet, Answers(sheet="f" * 32, rater="Anna", votes=["1"] * 20))


def test_few_decided_pairs_say_nothing():
    (verdict,) = rating.judge([rated(19, 0)])
    assert (verdict.share, verdict.p) == (None, None)
    assert verdict.text.startswith("versions 3 and 2 cannot be compared yet: 19 pairs are decided and 20 are needed")


def test_preference_has_an_exact_interval_and_test():
    (verdict,) = rating.judge([rated(24, 7)])
    # Clopper and Pearson by R's binom.test(24, 31): 0.5890 to 0.9041, p = 0.003327
    assert (verdict.preferred, verdict.against, verdict.pairs) == (24, 7, 40)
    assert (verdict.low, verdict.high) == (pytest.approx(0.5890, abs=1e-4), pytest.approx(0.9041, abs=1e-4))
    assert verdict.p == pytest.approx(0.003327, abs=1e-5)
    assert verdict.text.startswith("people prefer version 3:")
    assert rating.judge([rated(7, 24)])[0].text.startswith("people prefer version 2:")
    assert rating.judge([rated(16, 15)])[0].text.startswith("people see no clear difference:")


def test_pair_counts_once_however_many_saw_it():
    three = [rated(24, 16, rater=name) for name in ("Anna", "Ben", "Cem")]
    (verdict,) = rating.judge(three)
    assert (verdict.preferred, verdict.against, verdict.raters) == (24, 16, 3)
    (split,) = rating.judge([rated(40, 0, rater="Anna"), rated(0, 40, rater="Ben")])
    assert (split.preferred, split.against) == (0, 0)  # no majority
    (more,) = rating.judge([rated(24, 16), rated(24, 16, identity="f" * 32)])
    assert (more.pairs, more.raters) == (80, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    workspace = create(tmp_path_factory.mktemp("rate") / "ws", ["shapes"])
    yield workspace
    workspace.ledger.close()
    workspace.fleet.close()


@pytest.fixture
def sheet(made: Workspace, request: pytest.FixtureRequest) -> Sheet:
    """Provide a sheet of its own for each test, kept in the workspace."""
    identity = hashlib.md5(request.node.name.encode()).hexdigest()
    sheet = dealt(identity=identity)
    (made.root / "ratings").mkdir(exist_ok=True)
    (made.root / "ratings" / f"{identity}.json").write_text(sheet.model_dump_json())
    return sheet


def entries(workspace: Workspace) -> int:
    return len(workspace.ledger.entries())


def test_answers_in_files_become_decisions_of_record(made: Workspace, sheet: Sheet, tmp_path: Path):
    before = entries(made)
    path = tmp_path / "answers.json"
    path.write_text(answered(sheet, 15, 3).model_dump_json())
    sheets.collect(made, made.ratings, SUBJECT, [path])
    sheets.collect(made, made.ratings, SUBJECT, [path])  # again, and nothing changes
    entry = made.ledger.entries()[-1]
    assert entries(made) == before + 1
    assert (entry.kind, entry.subject) == ("rating", SUBJECT)
    assert entry.why == "Anna, blind, preferred version 3 over 2 in 15 of 18 pairs, 2 alike"
    path.write_text(answered(sheet, 3, 15, rater="ANNA").model_dump_json())
    with pytest.raises(RatingError, match="answered this sheet already; the first answers count"):
        sheets.collect(made, made.ratings, SUBJECT, [path])
    with pytest.raises(RatingError, match="answers a sheet of shapes/I/full"):
        sheets.collect(made, made.ratings, "shapes/I/fast", [path])
    path.write_text(answered(dealt(identity="e" * 32), 15, 3).model_dump_json())
    with pytest.raises(RatingError, match="this workspace made no sheet e"):
        sheets.collect(made, made.ratings, SUBJECT, [path])
    assert entries(made) == before + 1


def call(
    address: str, data: bytes | None = None, path: str = "", host: str = "", origin: str | None = None
) -> tuple[int, str, Message]:
    """Send a request as a browser at the address would, or with parts of it changed."""
    url = urlsplit(address)
    connection = HTTPConnection(url.netloc, timeout=10)
    headers = {"Host": host or url.netloc}
    if origin != "":
        headers["Origin"] = origin or f"http://{url.netloc}"
    connection.request("GET" if data is None else "POST", path or url.path + ("" if data is None else "answers"), data, headers)
    reply = connection.getresponse()
    found = reply.status, reply.read().decode(), reply.headers
    connection.close()
    return found


def announce(address: str, length: str) -> int:
    """Return the status of a request that only announces its length."""
    url = urlsplit(address)
    connection = HTTPConnection(url.netloc, timeout=10)
    connection.putrequest("POST", url.path + "answers")
    connection.putheader("Origin", f"http://{url.netloc}")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_served_sheet_is_answered_and_kept(made: Workspace, sheet: Sheet):
    before = entries(made)
    with pages.server(made, sheet, "the page") as address:
        assert urlsplit(address).hostname == "127.0.0.1"
        status, text, headers = call(address)
        assert (status, text) == (200, "the page")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        status, text, _ = call(address, answered(sheet, 12, 8, rater="Ben").model_dump_json().encode())
        assert (status, text) == (200, "Your answers are kept. Thank you.")
        status, text, _ = call(address, answered(sheet, 8, 12, rater="Ben").model_dump_json().encode())
        assert (status, "already" in text) == (400, True)
    assert entries(made) == before + 1
    assert made.ledger.entries()[-1].facts["rater"] == "Ben"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


def test_others_can_neither_read_a_sheet_nor_answer_it(made: Workspace, sheet: Sheet):
    before, good = entries(made), answered(sheet, 12, 8).model_dump_json().encode()
    with pages.server(made, sheet, "the page") as address:
        port = urlsplit(address).port
        assert call(address, host=f"evil.example:{port}")[0] == 421  # a name that was pointed at the loopback
        for guess in ("/", f"/{sheet.id}/", f"/{sheet.id}"):  # the sheet's id is the name of a file
            assert call(address, path=guess)[0] == 404
            assert call(address, good, path=f"{guess}answers")[0] == 404
        assert call(address, good, host=f"evil.example:{port}", origin=f"http://evil.example:{port}")[0] == 421
        assert call(address, good, origin="http://evil.example")[0] == 403
        assert call(address, good, origin="null")[0] == 403
        assert call(address, good, origin="")[0] == 403  # a program, which sends no Origin, can use `--answers`
        assert announce(address, str(rating.MAX_ANSWERS + 1)) == 413
        for length in ("-1", "many", "9" * 5000):
            assert announce(address, length) == 400
        assert call(address, b"{}")[0] == 400
    assert entries(made) == before

"""Reports that leave a device over HTTP(S): what may go wrong on the way, and that no report is lost by it."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota.agent import channel, reports
from ota.agent.channel import Waiting
from ota.agent.state import Config, Home, State
from ota.errors import OperatorError
from ota.manifest import parse
from ota.report import MAX_ANSWER, MAX_BATCH, MAX_JUMP, MAX_NUMBER, MOST_REPORTS, Enrolment, open_line
from tests.conftest import agent
from tests.fleet_kit import CLASS, LINE, Device, Field, closed_port
from tests.network_kit import Authority, Inbox, Posted, Proxy, Reply

pytest_plugins = ("tests.fleet_kit",)

BUNDLE, OTHER = "1" * 64, "2" * 64


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Provide a device that is set up and has nothing installed."""
    made = Home(tmp_path / "device")
    made.disk.make_folder("slots")
    reports.make_key(made)
    given = {"device": "dev-1", "line": "shapes", "device_class": "edge", "repository": "/nowhere", "root_sha256": "0" * 64}
    made.disk.replace("config.json", Config.model_validate(given).canonical())
    return made


@pytest.fixture
def inbox(home: Home, tmp_path: Path) -> Iterator[Inbox]:
    """Provide a gateway on plain HTTP, which the device is set up for."""
    (tmp_path / "served").mkdir()
    with Inbox(tmp_path / "served") as made:
        configure(home, reports=made.address)
        yield made


@pytest.fixture
def secure(home: Home, tmp_path: Path) -> Iterator[Inbox]:
    """Provide a gateway with TLS, which the device is set up for."""
    authority = Authority()
    (tmp_path / "served").mkdir()
    with Inbox(tmp_path / "served", authority.certify(tmp_path, "127.0.0.1")) as made:
        configure(home, reports=made.address, authorities=authority.pem.decode())
        yield made


def configure(home: Home, **fields: Any) -> None:
    home.disk.replace("config.json", home.config().model_copy(update=fields).canonical())


def queued(home: Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.disk.path("queue").iterdir()}


def lose_nothing(home: Home, told: str) -> None:
    """Send, and check that every report is kept as it is, and that the device says why."""
    before = queued(home)
    assert reports.send(home) == len(before)
    assert queued(home) == before
    assert told in reports.problem(home)


# Delivery


def test_batches_are_packed_and_hold_the_bytes_of_the_queue(home, inbox):
    for _ in range(MOST_REPORTS + 3):
        reports.queue(home, "refused", BUNDLE, "it is “too” slow")
    before = [data for _, data in sorted(queued(home).items())]
    assert reports.send(home) == 0
    assert queued(home) == {}
    assert [len(posted.lines) for posted in inbox.posted] == [MOST_REPORTS, 3]
    assert [line for posted in inbox.posted for line in posted.lines] == before
    for posted in inbox.posted:
        assert gzip.decompress(posted.body).endswith(b"\n")
        assert (posted.path, posted.headers["content-type"]) == ("/v1/reports", "application/x-ndjson")
        assert posted.headers["content-encoding"] == "gzip"
        assert "authorization" not in posted.headers
    assert reports.heard(home).time == inbox.time


def test_address_keeps_its_prefix_and_its_password(home, inbox):
    configure(home, reports=inbox.address.replace("://", "://press:s%40crt@") + "/plant/")
    reports.queue(home, "installed", BUNDLE)
    assert reports.send(home) == 0
    assert inbox.posted[0].path == "/plant/v1/reports"
    assert inbox.posted[0].headers["authorization"].startswith("Basic ")
    assert "crt" not in json.dumps([inbox.posted[0].path, reports.problem(home)])


@given(st.lists(st.tuples(st.sampled_from(["dev-1", "dev-2"]), st.integers(1, 16_384)), max_size=90))
def test_batches_keep_their_order_and_their_limits(sizes):
    waiting = [Waiting(number, device, b"x" * size) for number, (device, size) in enumerate(sizes, 1)]
    made = list(reports.batches(waiting))
    assert [report for batch in made for report in batch] == waiting
    for batch in made:
        assert 0 < len(batch) <= MOST_REPORTS
        assert sum(len(report.line) + 1 for report in batch) <= MAX_BATCH
        assert len({report.device for report in batch}) == 1


def test_reports_pass_a_proxy_with_a_password(home, secure, monkeypatch):
    with Proxy({"127.0.0.1": int(secure.address.rpartition(":")[2])}) as proxy:
        monkeypatch.setenv("https_proxy", proxy.address())
        reports.queue(home, "installed", BUNDLE)
        assert reports.send(home) == 0
        assert [passed.method for passed in proxy.passed] == ["CONNECT"]
        monkeypatch.setenv("https_proxy", proxy.address("press:wrong@"))
        reports.queue(home, "confirmed", BUNDLE)
        lose_nothing(home, "does not accept the name and password")


# Answers that are none


def test_proxy_that_answers_200_with_html_loses_nothing(home, inbox):
    inbox.rule = lambda _: (200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
    reports.queue(home, "installed", BUNDLE)
    lose_nothing(home, "is no gateway of the factory")
    assert reports.heard(home).time == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"accepted": [1]}', b"{" * 60_000, b'{"accepted": "1"}', b"\xff"])
def test_answer_of_another_form_loses_nothing(home, inbox, body):
    inbox.rule = lambda _: (200, {"Content-Type": "application/json"}, body)
    reports.queue(home, "installed", BUNDLE)
    lose_nothing(home, "is no gateway of the factory")


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: (200, {"Content-Type": "text/plain"}, reply[2]),
        lambda reply: (200, reply[1], reply[2] + b" " * MAX_ANSWER),
        lambda reply: (200, reply[1] | {"Content-Encoding": "gzip"}, gzip.compress(reply[2])),
        lambda reply: (201, reply[1], reply[2]),
        lambda reply: (200, reply[1] | {"Content-Length": str(len(reply[2]) + 1)}, reply[2]),
    ],
    ids=["other type", "too long", "packed", "other status", "cut off"],
)
def test_right_words_in_a_wrong_answer_lose_nothing(home, inbox, change):
    inbox.rule = lambda posted: change(inbox.answer(posted.numbers))
    reports.queue(home, "installed", BUNDLE)
    lose_nothing(home, "")
    assert reports.problem(home)


def test_answer_that_acknowledges_what_was_not_sent(home, inbox):
    for _ in range(MOST_REPORTS + 2):
        reports.queue(home, "installed", BUNDLE)
    inbox.rule = lambda _: inbox.answer([1, MOST_REPORTS + 1, 77], [(MOST_REPORTS + 2, "malformed")])
    assert reports.send(home) == MOST_REPORTS - 1  # 1 went with the first batch, 21 and 22 with the second
    assert sorted(queued(home)) == [f"{number:08d}.json" for number in range(2, MOST_REPORTS + 1)]
    assert "names reports that were not sent (21, 22, 77)" in reports.problem(home)


def test_report_that_the_answer_does_not_name_is_sent_again(home, inbox):
    for _ in range(3):
        reports.queue(home, "installed", BUNDLE)
    inbox.rule = lambda _: inbox.answer([1], [(3, "malformed")])
    assert reports.send(home) == 1
    assert sorted(queued(home)) == ["00000002.json"]
    assert "does not name 1 of the reports" in reports.problem(home)
    assert reports.heard(home).refusal == "report 3: malformed: because of malformed"
    inbox.rule = lambda posted: inbox.answer(posted.numbers)
    assert reports.send(home) == 0
    assert (inbox.posted[-1].numbers, reports.problem(home), reports.heard(home).refusal) == ([2], "", "")


# Who answers


def test_tls_with_the_wrong_authority(home, secure):
    configure(home, authorities=Authority("Somebody else").pem.decode())
    reports.queue(home, "starting", BUNDLE)
    lose_nothing(home, "its certificate is not accepted")
    assert secure.posted == []
    assert reports.fate(home, BUNDLE) == "waiting"


def test_certificate_of_another_host(home, secure, tmp_path):
    configure(home, reports=secure.address.replace("127.0.0.1", "localhost"))
    reports.queue(home, "installed", BUNDLE)
    lose_nothing(home, "give the name that the certificate holds")
    assert secure.posted == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_post_follows_no_redirect(home, inbox, tmp_path, status):
    with Inbox(tmp_path) as other:
        inbox.rule = lambda _: (status, {"Location": f"{other.address}/v1/reports"}, b"")
        reports.queue(home, "installed", BUNDLE)
        lose_nothing(home, "reports follow no redirect")
        assert (other.posted, other.requests) == ([], [])


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://gateway.example.com", "plain http"),
        ("http://10.0.0.1/", "plain http"),
        ("http://127.0.0.1.example.com/", "plain http"),
        ("http://user:secret@gateway.example.com/", "plain http"),
        ("ftp://gateway.example.com/", "cannot be left"),
        ("https://", "not a whole address"),
        ("https://x:0/", "not a whole address"),
        ("https://gateway.example.com/#part", "not a whole address"),
        ("https://[::1/", "not valid"),
    ],
)
def test_place_that_could_lose_reports_is_refused(home, address, sentence):
    with pytest.raises(OperatorError, match=sentence) as caught:
        channel.place_of(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "http://[::1]:1/x", "http://localhost", "https://gateway.example.com/plant"]
)
def test_gateway_and_this_device_itself_are_places(address):
    assert not isinstance(channel.place_of(address), Path)


# Waiting


@pytest.mark.parametrize("status", [429, 503])
def test_gateway_that_asks_to_wait_is_not_asked_sooner(home, inbox, monkeypatch, status):
    inbox.rule = lambda _: (status, {"Retry-After": "1000"}, b"")
    reports.queue(home, "starting", BUNDLE)
    lose_nothing(home, "too busy")
    now = time.time()
    assert now + 999 <= reports.heard(home).later <= now + 1_252
    for _ in range(3):  # a restart knows nothing but the directory
        lose_nothing(Home(home.root), "the gateway asked to wait until")
    assert len(inbox.posted) == 1
    inbox.rule = lambda posted: inbox.answer(posted.numbers)
    monkeypatch.setattr(time, "time", lambda: now + 1_253)
    assert reports.send(home) == 0
    assert reports.heard(home).later == 0


def test_devices_that_were_sent_away_together_come_back_apart(home, inbox, monkeypatch):
    inbox.rule = lambda _: (503, {"Retry-After": "1000"}, b"")
    reports.queue(home, "installed", BUNDLE)
    until = set[int]()
    for part in (0.0, 0.5, 0.99):
        monkeypatch.setattr(random, "random", lambda part=part: part)
        home.disk.remove("gateway.json")
        reports.send(home)
        until.add(reports.heard(home).later)
    assert max(until) - min(until) >= 200


@pytest.mark.parametrize("asked", ["99999999999", "-5", "soon", "Fri, 31 Dec 9999 23:59:59 GMT", ""])
def test_no_gateway_silences_a_device_for_more_than_a_day(home, inbox, asked):
    inbox.rule = lambda _: (503, {"Retry-After": asked} if asked else {}, b"")
    reports.queue(home, "installed", BUNDLE)
    lose_nothing(home, "too busy")
    assert time.time() + 59 <= reports.heard(home).later <= time.time() + 1.25 * 86_400 + 2


def test_clock_that_was_set_back_does_not_silence_a_device(home, inbox):
    home.disk.replace("gateway.json", reports.Heard(later=int(time.time()) + 10**8).canonical())
    reports.queue(home, "installed", BUNDLE)
    assert reports.send(home) == 0


def test_clock_in_1970_loses_no_report(home, inbox, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 5.0)
    reports.queue(home, "installed", BUNDLE)
    inbox.rule = lambda _: (429, {"Retry-After": "30"}, b"")
    lose_nothing(home, "too busy")
    monkeypatch.undo()  # the clock is set at last
    inbox.rule = lambda posted: inbox.answer(posted.numbers)
    assert reports.send(home) == 0
    assert open_line(inbox.posted[-1].lines[0]).report.time == 5


# Refusals of a whole batch


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((403, {"Content-Type": "application/json"}, b'{"error": "unknown", "code": "unenrolled"}'), "run `ferry-agent enroll"),
        ((403, {"Content-Type": "text/html"}, b"blocked"), "the firewall in between"),
        ((400, {}, b""), "install the newest agent"),
        ((401, {}, b""), "asks for a name and a password"),
        ((404, {}, b""), "check the address given to --reports"),
        ((413, {}, b""), "256 KiB"),
        ((500, {}, b""), "answered 500"),
        ((511, {}, b""), "asks for a login"),
    ],
)
def test_refusal_of_a_batch_keeps_everything(home, inbox, reply: Reply, sentence):
    inbox.rule = lambda _: reply
    for _ in range(MOST_REPORTS + 1):
        reports.queue(home, "installed", BUNDLE)
    lose_nothing(home, sentence)
    assert len(inbox.posted) == 1  # the next batch would be refused as well
    assert "--repository" not in reports.problem(home)


# The queue


def test_damaged_file_of_the_queue_holds_nothing_back(home, inbox):
    for _ in range(5):
        reports.queue(home, "installed", BUNDLE)
    folder = home.disk.path("queue")
    (folder / "00000001.json").write_bytes(b"")
    (folder / "00000002.json").write_bytes((folder / "00000002.json").read_bytes()[:-9])
    (folder / "00000003.json").write_bytes((folder / "00000005.json").read_bytes())
    (folder / "notes.json").write_bytes(b"not of the agent")
    assert reports.send(home) == 0
    assert [posted.numbers for posted in inbox.posted] == [[4, 5]]
    assert sorted(queued(home)) == [*(f"0000000{number}.json.damaged" for number in (1, 2, 3)), "notes.json"]
    reports.queue(home, "installed", BUNDLE)
    assert reports.send(home) == 0
    assert inbox.posted[-1].numbers == [6]


def test_full_queue_keeps_the_starting_of_the_trial(home, inbox, monkeypatch):
    monkeypatch.setattr(reports, "MAX_QUEUE", 5)
    reports.queue(home, "installed", OTHER)
    reports.queue(home, "starting", BUNDLE)
    for _ in range(9):
        reports.queue(home, "base_corrupt", BUNDLE)
    assert [int(name[:8]) for name in sorted(queued(home))] == [2, 8, 9, 10, 11]
    assert reports.dropped(home) == 6
    assert reports.fate(home, BUNDLE) == "waiting"
    reports.send(home)  # from now on it needs no place
    for _ in range(6):
        reports.queue(home, "base_corrupt", BUNDLE)
    assert reports.dropped(Home(home.root)) == 7


def test_lost_copy_of_the_starting_is_no_starting(home):
    reports.queue(home, "starting", BUNDLE)
    home.disk.remove("queue/00000001.json")
    assert reports.fate(home, BUNDLE) == "none"


# What became of the starting


@pytest.mark.parametrize(("code", "end"), [("", "accepted"), ("retired", "refused"), ("line", "refused")])
def test_fate_of_the_starting_is_proven_by_tls(home, secure, code, end):
    assert reports.fate(home, BUNDLE) == "none"
    reports.queue(home, "starting", BUNDLE)
    assert reports.fate(home, BUNDLE) == "waiting"
    secure.rule = lambda posted: secure.answer([], [(1, code)]) if code else secure.answer(posted.numbers)
    reports.send(home)
    assert (reports.fate(home, BUNDLE), reports.fate(home, OTHER)) == (end, "none")
    reports.queue(home, "starting", BUNDLE)
    assert reports.fate(home, BUNDLE) == "waiting"


def test_answer_without_tls_proves_nothing(home, inbox):
    reports.queue(home, "starting", BUNDLE)
    reports.send(home)
    assert reports.fate(home, BUNDLE) == "delivered"


def test_folder_proves_nothing(home, tmp_path):
    (tmp_path / "reports").mkdir()
    configure(home, reports=str(tmp_path / "reports"))
    reports.queue(home, "starting", BUNDLE)
    reports.send(home)
    assert reports.fate(home, BUNDLE) == "delivered"


def test_killed_between_the_answer_and_its_note(home, secure, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    reports.queue(home, "starting", BUNDLE)
    with monkeypatch.context() as inner:
        inner.setattr(type(home.disk), "remove", killed)
        with pytest.raises(Killed):
            reports.send(home)
    assert reports.fate(home, BUNDLE) == "accepted"
    assert reports.send(home) == 0
    assert [posted.numbers for posted in secure.posted] == [[1], [1]]


# Two copies of a device


def test_two_copies_of_a_device_are_seen_and_lose_no_report(home, secure):
    home.save(State(active=BUNDLE))
    for event in ("installed", "starting"):
        reports.queue(home, event, BUNDLE, "why")  # type: ignore[arg-type]
    first = [open_line(data).report for _, data in sorted(queued(home).items())]

    def rule(posted: Posted) -> Reply:
        refused = [(number, "conflict") for number in posted.numbers if number <= 40]
        return secure.answer([number for number in posted.numbers if number > 40], refused, highest=40)

    secure.rule = rule
    assert reports.send(home) == 0
    assert [posted.numbers for posted in secure.posted] == [[1, 2], [41, 42]]
    again = [open_line(line) for line in secure.posted[1].lines]
    assert [one.report.model_copy(update={"number": n}) for n, one in enumerate(again, 1)] == first
    assert all(one.is_signed_by(reports.public_key(home)) for one in again)
    assert reports.fate(home, BUNDLE) == "accepted"
    assert "two copies of this device?" in reports.two_copies(reports.heard(home))
    reports.queue(home, "confirmed", BUNDLE)
    assert sorted(queued(home)) == ["00000043.json"]


def test_conflict_without_end_is_signed_once_more_in_each_delivery(home, inbox):
    reports.queue(home, "installed", BUNDLE)
    inbox.rule = lambda posted: inbox.answer([], [(number, "conflict") for number in posted.numbers], highest=posted.numbers[-1])
    assert reports.send(home) == 1
    assert [posted.numbers for posted in inbox.posted] == [[1], [2]]


def test_no_answer_uses_up_the_numbers_of_a_device(home, secure):
    reports.queue(home, "starting", BUNDLE)
    secure.rule = lambda _: secure.answer([], [(1, "conflict")], highest=MAX_JUMP + 1)
    assert reports.send(home) == 0
    assert reports.fate(home, BUNDLE) == "refused"
    assert home.disk.read("number") == b"1"
    assert "conflict" in reports.heard(home).refusal


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_fresh_number_is_above_all_known_and_near(number, last, highest):
    fresh = reports.renumbered(number, last, highest)
    if fresh is not None:
        assert max(last, highest) < fresh <= min(number + MAX_JUMP, 2**31 - 1)
    else:
        assert max(last, highest) >= min(number + MAX_JUMP, 2**31 - 1)


# Enrolment


TOKEN = "t0ken_of-the-operator-4711"


def enrolling(home: Home, tmp_path: Path, inbox: Inbox, reply: Reply, code: int, *words: str) -> str:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    inbox.rule = lambda _: reply
    result = agent("enroll", "--token-file", str(tmp_path / "token"), "--dir", str(home.root), *words)
    assert result.exit_code == code, result.output
    assert TOKEN not in result.output
    return result.output


def said(status: int, **fields: Any) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(fields).encode()


@pytest.mark.parametrize(("confirmed", "told"), [(True, "sends what waits"), (False, "once the operator has confirmed it")])
def test_device_enrolls_itself_with_a_token(home, secure, tmp_path, confirmed, told):
    assert told in enrolling(home, tmp_path, secure, said(200, device="dev-1", confirmed=confirmed), 0)
    (posted,) = secure.posted
    assert (posted.path, posted.headers["content-type"]) == ("/v1/enroll", "application/json")
    sent = parse(Enrolment, posted.body, 4096)
    assert sent.is_signed
    assert (sent.device, sent.line, sent.device_class, sent.token) == ("dev-1", "shapes", "edge", TOKEN)
    assert sent.public_key == reports.public_key(home)
    assert not sent.model_copy(update={"device": "dev-2"}).is_signed


@pytest.mark.parametrize(
    ("highest", "follows"),
    [
        (90_000_000, True), (7, False), (None, False), ("90000000", False), (True, False), (-1, False), (MAX_NUMBER - 1, False),
        (MAX_NUMBER, False), (10**30, False),
    ],
)  # fmt: skip
def test_device_with_a_new_disk_counts_on_from_what_the_factory_has(home, secure, tmp_path, highest, follows):
    for _ in range(8):
        reports.queue(home, "installed", BUNDLE)
    fields = {} if highest is None else {"highest": highest}
    enrolling(home, tmp_path, secure, said(200, device="dev-1", confirmed=True, **fields), 0)
    reports.queue(home, "installed", BUNDLE)
    assert reports.waiting(home)[-1].number == (90_000_001 if follows else 9)


@pytest.mark.parametrize(
    ("reply", "code", "sentence"),
    [
        (said(403, error="no", code="token"), 3, "it is wrong or has expired"),
        (said(409, error="no", code="used"), 3, "the token was used before"),
        (said(429, error="no"), 4, "try again in 60 s with the same token"),
        (said(404), 3, "takes no enrolment"),
        (said(200, device="dev-2", confirmed=True), 4, "not that of a gateway"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), 4, "not that of a gateway"),
        ((403, {"Content-Type": "text/html"}, b"<html>"), 4, "not that of a gateway"),
        ((302, {"Location": "/elsewhere"}, b""), 4, "redirect"),
        (said(500), 4, "not that of a gateway"),
    ],
)
def test_enrolment_that_is_not_answered_well_says_what_to_do(home, inbox, tmp_path, reply, code, sentence):
    assert sentence in enrolling(home, tmp_path, inbox, reply, code)
    assert reports.heard(home).later == 0


@pytest.mark.parametrize(
    "content", [b"", b"short", b"x" * 129, b"two tokens-in-one-file", b"\xff" * 20, "é".encode() * 20, b"y" * 10**6]
)
def test_file_without_a_token_is_not_sent_and_not_shown(home, inbox, tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    result = agent("enroll", "--token-file", str(tmp_path / "token"), "--dir", str(home.root))
    assert (result.exit_code, inbox.posted) == (3, [])
    assert "does not hold one token" in result.output
    assert len(content) < 5 or content.decode("latin-1") not in result.output


@pytest.mark.parametrize("place", ["", "/mnt/inbox"])
def test_enrolment_needs_a_gateway(home, tmp_path, place):
    configure(home, reports=place)
    (tmp_path / "token").write_text(TOKEN)
    result = agent("enroll", "--token-file", str(tmp_path / "token"), "--dir", str(home.root))
    assert result.exit_code == 3
    assert "reports to no gateway" in result.output


# What the device says


def test_status_says_when_it_was_heard_what_waits_and_whether_there_are_two(home, inbox):
    def shown() -> str:
        return agent("status", "--dir", str(home.root)).stdout

    assert "heard" not in shown()
    reports.queue(home, "installed", BUNDLE)
    inbox.rule = lambda _: inbox.answer([], [(1, "conflict")], highest=7)
    reports.send(home)
    reports.queue(home, "confirmed", BUNDLE)
    assert "last heard by the factory on 2030-03-17 17:46:40 UTC, by its clock" in shown()
    assert "two copies of this device?" in shown()
    assert "2 reports wait" in shown()
    told = json.loads(agent("status", "--json", "--dir", str(home.root)).stdout)
    assert (told["gateway"]["time"], told["waiting_reports"], told["tags"]) == (inbox.time, 2, [])
    assert told["gateway"]["copies"] > 0


def test_reason_of_a_refusal_is_shown_as_one_harmless_line(home, inbox):
    reports.queue(home, "installed", BUNDLE)
    body = json.loads(inbox.answer([], [(1, "retired")])[2])
    body["refused"][0]["reason"] = "red \x1b[31m\nline\u202e"
    inbox.rule = lambda _: (200, {"Content-Type": "application/json"}, json.dumps(body).encode())
    assert reports.send(home) == 0
    assert reports.heard(home).refusal.isprintable()
    assert "\x1b" not in agent("status", "--dir", str(home.root)).stdout


def test_doctor_looks_at_the_gateway(home, inbox, tmp_path):
    assert "does not answer as a gateway does (status 404)" in agent("doctor", "--no-draw", "--dir", str(home.root)).stdout
    (tmp_path / "served" / "healthz").write_bytes(b"ok")
    assert "does not answer as" not in agent("doctor", "--no-draw", "--dir", str(home.root)).stdout
    configure(home, reports=closed_port())
    assert "cannot reach 127.0.0.1" in agent("doctor", "--no-draw", "--dir", str(home.root)).stdout
    assert inbox.posted == []


# Identity


def set_up_again(device: Device, name: str, *more: str, code: int = 0) -> str:
    """Run `init` on a device's folder again, as its owner would to change something."""
    anchor = device.root.parent / "root.json"
    anchor.write_bytes(device.home.root_bytes())
    return device.command(
        "init", "--device", name, "--line", LINE, "--class", CLASS, "--repository", device.home.config().repository, "--reports",
        "https://gateway.example.com", "--root", str(anchor), "--root-sha256", device.home.config().root_sha256, *more, code=code,
    )  # fmt: skip


def test_init_again_keeps_tags_and_what_is_shared(scene: Field):
    set_up_again(scene.device, "dev-1", "--share", "minimal", "--tag", "site=berlin", "--tag", "hall=2")
    set_up_again(scene.device, "dev-1")
    kept = scene.device.home.config()
    assert (kept.share, kept.tags) == ("minimal", ["site=berlin", "hall=2"])
    set_up_again(scene.device, "dev-1", "--share", "all", "--tag", "")
    assert (scene.device.home.config().share, scene.device.home.config().tags) == ("all", [])


def test_copy_of_a_disk_becomes_a_device_of_its_own(scene: Field):
    device, key, active = scene.device, reports.public_key(scene.device.home), scene.device.active
    reports.queue(device.home, "confirmed", active)
    before = queued(device.home)
    assert "add --new-key" in set_up_again(device, "dev-2", code=3)
    assert (device.home.config().device, reports.public_key(device.home), queued(device.home)) == ("dev-1", key, before)
    set_up_again(device, "dev-2", "--new-key")
    assert (device.home.config().device, device.active, device.sound) == ("dev-2", active, True)
    assert reports.public_key(device.home) != key
    assert queued(device.home) == {}  # they are the other device's, which has them, too
    reports.queue(device.home, "confirmed", active)
    (line,) = queued(device.home).values()
    assert open_line(line).report.device == "dev-2"
    assert open_line(line).is_signed_by(reports.public_key(device.home))

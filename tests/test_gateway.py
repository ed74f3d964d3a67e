"""The gateway as a process: what it takes, what it refuses, and what it survives. Files are in test_gateway_files."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from ota.fleet.register import Newcomer
from ota.fleet.store import open_fleet
from ota.gateway.app import ENDPOINTS
from ota.gateway.server import OF_ONE_ADDRESS
from ota.report import MAX_BATCH, MAX_NUMBER, Enrolment
from tests.fleet_kit import Field
from tests.gateway_kit import CLASS, LINE, PACKED, Answered, Device, Running, enrolled, gateway, postgres, words

pytest_plugins = ["tests.fleet_kit"]
MiB = 1024 * 1024
Fresh = Callable[[], Device]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, list[Device]]]:
    """Provide a running gateway and devices that are enrolled at it; a test takes devices of its own from the list."""
    folder = tmp_path_factory.mktemp("gateway")
    devices = enrolled(f"sqlite:///{folder / 'ferry.db'}", [f"press-{number}" for number in range(60)])
    with gateway(folder, "--request-seconds", "1", "--access-log") as running:
        yield running, devices


@pytest.fixture
def served(shared: tuple[Running, list[Device]]) -> Running:
    return shared[0]


@pytest.fixture
def device(shared: tuple[Running, list[Device]]) -> Device:
    """Provide an enrolled device that never reported."""
    return shared[1].pop()


def resident(running: Running) -> int:
    return int(psutil.Process(running.process.pid).memory_info().rss)


def refusals(answer: Answered) -> dict[int, str]:
    return {one["number"]: one["code"] for one in answer.json["refused"]}


def enrolment(device: Device, token: str, **fields: Any) -> bytes:
    made = {"device": device.name, "line": LINE, "device_class": CLASS} | fields
    signature = device.key.sign(Enrolment.message(token, *made.values())).hex()
    return json.dumps(made | {"public_key": device.public_key, "token": token, "signature": signature}).encode()


# Reports


def test_a_batch_is_kept_whole_and_answered_by_number(served: Running, device: Device):
    answer = served.send([device.line(1), device.alive(2), device.line(3)])
    assert (answer.status, answer.json["accepted"], answer.json["refused"], answer.json["highest"]) == (200, [1, 2, 3], [], 3)
    assert served.kept()[device.name] == [1, 2, 3]


def test_plain_reports_are_taken_like_packed_ones(served: Running, device: Device):
    answer = served.ask("POST", "/v1/reports", device.line(1) + b"\n", {"Content-Type": "application/x-ndjson"})
    assert (answer.status, answer.json["accepted"]) == (200, [1])


def test_forged(served: Running, device: Device):
    thief = Device(device.name)
    answer = served.send([thief.line(1), device.line(2)])
    assert answer.json["accepted"] == [2]
    assert refusals(answer) == {1: "signature"}
    assert served.send([device.line(1)]).json["accepted"] == [1]  # the forgery took no number
    assert served.kept()[device.name] == [1, 2]
    with served.fleet() as fleet:
        assert fleet.states(device=device.name)[0].refused == 1


def test_forged_in_numbers_silences_neither_the_device_nor_its_neighbours(served: Running, device: Device, shared: Any):
    thief, neighbour = Device(device.name), shared[1].pop()
    statuses = [served.send([thief.line(number) for number in range(1, 21)]).status for _ in range(8)]
    assert (statuses[0], statuses[-1]) == (200, 429)
    assert served.send([neighbour.line(1)]).json["accepted"] == [1]  # of the same address
    assert served.send([device.line(1), device.line(2)]).json["accepted"] == [1, 2]
    verified = served.figure("ferry_gateway_signatures_checked_total")
    again = served.send([thief.line(number) for number in range(1, 21)])
    assert (again.status, "retry-after" in again.headers) == (429, True)
    assert served.figure("ferry_gateway_signatures_checked_total") == verified + 1  # of twenty
    assert served.kept()[device.name] == [1, 2]


def test_replayed(served: Running, device: Device):
    first = device.line(1)
    served.send([first])
    again = served.send([first, first])
    assert again.json["accepted"] == [1, 1]
    assert again.json["refused"] == []
    other = served.send([device.line(1, event="rolled_back"), device.line(2)])
    assert refusals(other) == {1: "conflict"}
    assert (other.json["accepted"], other.json["highest"]) == ([2], 2)
    with served.fleet() as fleet:
        assert [report.event for report in fleet.reports(device.name)] == ["confirmed", "confirmed"]
        assert fleet.states(device=device.name)[0].conflicts == 1


def test_truncated(served: Running, device: Device):
    packed = gzip.compress(device.line(1) + b"\n" + device.line(2))
    answer = served.ask("POST", "/v1/reports", packed[:-20], PACKED)
    assert (answer.status, answer.json["code"]) == (400, "malformed")
    assert device.name not in served.kept()
    cut = served.send([device.line(1), device.line(2)[:-30]])  # a line that was cut has no number, so nothing is said of it
    assert (cut.json["accepted"], cut.json["refused"]) == ([1], [])


@pytest.mark.parametrize("body", [b"", b"\n\n", b"{}", b"[1]\n\xff", b"null", b'{"signed": "{}"}', b"[" * 20_000])
def test_a_body_without_a_report_is_refused(served: Running, body: bytes):
    assert served.send([body]).status == 400


def test_a_body_of_another_kind_is_refused(served: Running, device: Device):
    body = gzip.compress(device.line(1))
    for headers in ({}, PACKED | {"Content-Type": "text/html"}, PACKED | {"Content-Encoding": "br"}):
        assert served.ask("POST", "/v1/reports", body, headers).status == 400
    assert served.ask("POST", "/v1/reports", device.line(1), PACKED).status == 400  # it is not gzip
    assert device.name not in served.kept()


def test_gzip_bomb(served: Running):
    bomb = gzip.compress(bytes(200 * MiB), 9)
    assert len(bomb) < MAX_BATCH  # otherwise it would not even be unpacked
    before = resident(served)
    for _ in range(3):
        assert served.ask("POST", "/v1/reports", bomb, PACKED).status == 413
    assert resident(served) - before < 8 * MiB
    assert served.figure("ferry_gateway_held_bytes") == 0


def test_too_large_as_it_is_sent(served: Running, device: Device):
    plain = {"Content-Type": "application/x-ndjson"}
    assert served.ask("POST", "/v1/reports", b" " * MAX_BATCH + device.line(1), plain).status == 413
    with closing(served.raw()) as link:  # without a length
        link.sendall(
            b"POST /v1/reports HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        link.sendall(b"%x\r\n%s\r\n" % (MAX_BATCH + 1, b" " * (MAX_BATCH + 1)) + b"0\r\n\r\n")
        assert b" 413 " in link.makefile("rb").readline()
    assert served.send([device.line(n) for n in range(1, 22)]).status == 413  # 21 reports
    assert device.name not in served.kept()


def test_a_thousand_reports_a_minute_of_one_device(served: Running, shared: tuple[Running, list[Device]], device: Device):
    answers = [served.send([device.line(n) for n in range(first, first + 20)]) for first in range(1, 1000, 20)]
    taken = [number for answer in answers if answer.status == 200 for number in answer.json["accepted"]]
    assert taken == list(range(1, 201)) == served.kept()[device.name]
    late = [answer for answer in answers if answer.status != 200]
    assert {answer.status for answer in late} == {429}
    assert all(500 <= int(answer.headers["retry-after"]) <= 700 for answer in late)
    assert served.send([shared[1].pop().line(1)]).status == 200  # another device is not concerned


def test_a_million_numbers_leave_no_trace_of_the_gaps(served: Running, device: Device):
    answer = served.send([device.line(1), device.line(1_000_000), device.line(MAX_NUMBER)])
    assert answer.json["accepted"] == [1, 1_000_000, MAX_NUMBER]
    assert answer.json["highest"] == MAX_NUMBER
    assert served.send([device.line(2)]).json["accepted"] == [2]


def test_a_flood_of_unenrolled_ids(served: Running, device: Device):
    stranger = Device("stranger")
    bodies = [[stranger.line(n, device=f"made-up-{n}")] for n in range(1, 401)]
    served.send(bodies[0])
    verified, before = served.figure("ferry_gateway_signatures_checked_total"), resident(served)
    answers = [served.send(body) for body in bodies]
    assert {(answer.status, answer.json["code"]) for answer in answers} == {(403, "unenrolled")}
    assert served.figure("ferry_gateway_signatures_checked_total") == verified
    assert resident(served) - before < 4 * MiB
    assert served.send([device.line(1)]).status == 200


def test_unknown_class(tmp_path: Path):
    one = Device("press-1")
    with closing(open_fleet(f"sqlite:///{tmp_path / 'ferry.db'}")) as fleet:
        fleet.preauthorize([Newcomer(one.name, one.public_key, LINE, CLASS, {})])
    with gateway(tmp_path) as running:
        answer = running.send([one.line(1, device_class="toaster"), one.line(2, line="other"), one.line(3)])
        assert refusals(answer) == {1: "line", 2: "line"}
        assert running.kept() == {one.name: [3]}


@pytest.mark.parametrize("moment", [0, 86_400, 4_102_444_800])
def test_clock_in_1970_or_2100(served: Running, device: Device, moment: int, token: Callable[[str], dict[str, str]]):
    assert served.send([device.line(1, time=moment)]).json["accepted"] == [1]
    shown = served.ask("GET", f"/v1/devices/{device.name}", headers=token("viewer")).json
    assert shown["clock_wrong"] is True
    assert abs(shown["heard_at"] - served.send([device.line(1, time=moment)]).json["time"]) < 60  # the server's clock


def test_reports_of_several_devices_need_a_token(
    served: Running, shared: tuple[Running, list[Device]], token: Callable[[str], dict[str, str]]
):
    one, other, stranger = shared[1].pop(), shared[1].pop(), Device("stranger")
    lines = [one.line(1), other.line(1), other.line(2), stranger.line(1)]
    assert served.send(lines).status == 400
    assert served.send(lines, **token("viewer")).status == 403
    answer = served.send(lines, **token("reporter")).json
    assert {name: said["accepted"] for name, said in answer["devices"].items()} == {one.name: [1], other.name: [1, 2]}
    assert answer["unenrolled"] == ["stranger"]


def test_retired_while_it_sends(served: Running, device: Device):
    assert served.send([device.line(1)]).json["accepted"] == [1]
    with served.fleet() as fleet:
        fleet.retire(device.name)
    answer = served.send([device.line(2)])  # at once, before the gateway has looked again
    assert (answer.json["accepted"], refusals(answer)) == ([], {2: "retired"})
    assert served.kept()[device.name] == [1]


def test_a_device_that_is_enrolled_beside_the_gateway_is_known_soon(served: Running):
    new = Device("by-hand")
    assert served.send([new.line(1)]).status == 403
    served.knows(new)
    assert served.send([new.line(1)]).json["accepted"] == [1]


def test_a_name_and_password_for_a_proxy_are_not_taken_for_a_token(served: Running, device: Device):
    assert served.send([device.line(1)], Authorization="Basic d3Jvbmc6d3Jvbmc=").json["accepted"] == [1]


def test_another_key_counts_at_once_and_loses_no_report(served: Running, device: Device):
    assert served.send([device.line(1)]).json["accepted"] == [1]
    new = Device(device.name)
    with served.fleet() as fleet:
        fleet.rekey(device.name, new.public_key)
    answer = served.send([new.line(2), device.line(3)])  # at once: what the gateway knows is of before
    assert (answer.json["accepted"], refusals(answer)) == ([2], {3: "signature"})


# Enrolment


def invite(running: Running, name: str, seconds: int = 3600) -> str:
    with running.fleet() as fleet:
        return fleet.invite(name, LINE, CLASS, seconds)


def test_a_token_enrols_a_device_that_reports_at_once(served: Running):
    new = Device("newcomer-1")
    answer = served.ask("POST", "/v1/enroll", enrolment(new, invite(served, new.name)))
    assert (answer.status, answer.json) == (200, {"device": new.name, "confirmed": False, "highest": 0})
    assert served.send([new.line(1)]).json["accepted"] == [1]


def test_device_with_another_key_is_told_its_highest_number(served: Running, device: Device):
    assert served.send([device.line(90_000_000)]).json["accepted"] == [90_000_000]
    with served.fleet() as fleet:
        token = fleet.invite(device.name, LINE, CLASS, 3600, replaces=True)
    new = Device(device.name)
    answer = served.ask("POST", "/v1/enroll", enrolment(new, token))
    assert (answer.status, answer.json["highest"]) == (200, 90_000_000)
    assert served.send([new.line(90_000_001)]).json["accepted"] == [90_000_001]


def test_token_used_twice(served: Running):
    new, thief = Device("newcomer-2"), Device("newcomer-2")
    token = invite(served, new.name)
    assert served.ask("POST", "/v1/enroll", enrolment(new, token)).status == 200
    stolen = served.ask("POST", "/v1/enroll", enrolment(thief, token))
    assert (stolen.status, stolen.json["code"]) == (409, "taken")
    assert served.send([new.line(1)]).json["accepted"] == [1]  # its key stays
    assert refusals(served.send([thief.line(2)])) == {2: "signature"}


def test_wrong_enrolments_are_refused_and_slowed_down(tmp_path: Path):
    with gateway(tmp_path) as running:
        new = Device("newcomer")
        wrong = [
            (enrolment(new, "A" * 43), 403), (enrolment(new, invite(running, new.name, seconds=-1)), 403),
            (enrolment(new, invite(running, new.name), device_class="other"), 403), (b"{}", 400), (b"\xff" * 5000, 413),
        ]  # fmt: skip
        for body, status in wrong:
            assert running.ask("POST", "/v1/enroll", body).status == status
        statuses = [running.ask("POST", "/v1/enroll", enrolment(new, "A" * 43)).status for _ in range(10)]
        assert statuses[0] == 403
        assert statuses[-1] == 429
        with running.fleet() as fleet:
            assert fleet.known() == {}


def from_elsewhere(running: Running, address: str, body: bytes, length: int | None = None) -> int:
    """Send an enrolment from another address of the loopback, and return the status; 0: the rest of the body never came."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=60, source_address=(address, 0)) as link:
        size = len(body) if length is None else length
        link.sendall(b"POST /v1/enroll HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size + body)
        if size > len(body):
            link.shutdown(socket.SHUT_WR)
        answer = link.makefile("rb").readline()
    return int(answer.split()[1]) if answer else 0


def test_a_stranger_cannot_use_up_everybodys_enrolments(tmp_path: Path):
    thief, new = Device("thief"), Device("newcomer")
    unsigned = enrolment(thief, "A" * 43).replace(thief.public_key.encode(), new.public_key.encode())
    with gateway(tmp_path) as running:
        token = invite(running, new.name)
        bodies: list[tuple[bytes, int | None]] = [(b"{}", None), (b"\xff" * 5000, None), (b"{", 100), (unsigned, None)]
        for at, (body, length) in enumerate(bodies):
            statuses = [from_elsewhere(running, f"127.0.0.{at + 2}", body, length) for _ in range(60)]
            assert statuses[0] != 429
            assert statuses[12:] == [429] * 48, body[:9]  # each kind counts as wrong for its address
        assert running.ask("POST", "/v1/enroll", enrolment(new, token)).status == 200


# Who may ask


@pytest.fixture
def token(served: Running) -> Callable[[str], dict[str, str]]:
    """Provide a function that makes the header with an API token of a role."""

    def made(role: Any) -> dict[str, str]:
        with served.fleet() as fleet:
            name = f"{role}-{len(fleet.api_tokens())}"
            return {"Authorization": f"Bearer {fleet.add_token(name, role, 3600)}"}

    return made


def test_roles(served: Running, token: Callable[[str], dict[str, str]]):
    for role, status in {"viewer": 200, "operator": 200, "reporter": 403}.items():
        assert served.ask("GET", "/v1/devices", headers=token(role)).status == status
    for given in ("Bearer wrong", "Basic d3Jvbmc6d3Jvbmc=", "Bearer " + "a" * 5000):
        assert served.ask("GET", "/v1/devices", headers={"Authorization": given}).status == 401
    assert served.ask("GET", "/v1/devices").status == 401


def test_devices_are_listed_by_pages(served: Running, token: Callable[[str], dict[str, str]]):
    header, after, names = token("viewer"), "", []
    while after is not None:
        page = served.ask("GET", f"/v1/devices?limit=7&after={after}", headers=header).json
        names += [row["device"] for row in page["devices"]]
        after = page["next"]
    with served.fleet() as fleet:
        assert names == sorted(fleet.known())
    for query in ("limit=0", "limit=1001", "limit=-1", "limit=x", "after=../x"):
        assert served.ask("GET", f"/v1/devices?{query}", headers=header).status == 400


def test_the_document_is_held_against_the_routes(served: Running, token: Callable[[str], dict[str, str]]):
    document = served.ask("GET", "/v1/openapi.json").json
    told = {(path, method.upper()) for path, operations in document["paths"].items() for method in operations}
    assert told == {(one.path, one.method) for one in ENDPOINTS}
    header = token("operator")
    for path, method in sorted(told):  # each of them answers, with a status that the document names
        answer = served.ask(method, path.replace("{device}", "nobody"), headers=header)
        assert str(answer.status) in document["paths"][path][method.lower()]["responses"], (path, answer.status)
        assert answer.json.get("code") != "nothing" if "json" in answer.headers["content-type"] else True
    for path, method in (
        ("/v1", "GET"),
        ("/v1/reports", "GET"),
        ("/v1/devices", "DELETE"),
        ("/docs", "GET"),
        ("/v1/devices/", "GET"),
    ):
        assert served.ask(method, path, headers=header).json["code"] == "nothing"


def test_metrics_name_no_device_and_have_fixed_labels(served: Running, device: Device):
    before = served.ask("GET", "/metrics").body.decode()
    served.send([device.line(1)])
    served.ask("GET", "/targets/%22%7d%0a")
    served.ask("BREW", "/v1/reports")
    after = served.ask("GET", "/metrics").body.decode()
    assert device.name not in after
    assert re.findall(r"^([^# ]+) ", before, re.MULTILINE) == re.findall(r"^([^# ]+) ", after, re.MULTILINE)
    assert served.ask("GET", "/metrics", headers={"X-Forwarded-For": "203.0.113.9"}).status == 401  # it came through a proxy


# Slow, many, and the end


def drip(link: socket.socket, data: bytes) -> bool:
    """Send a byte at a time until the other side closes; return whether it did before all was sent."""
    try:
        for place in range(len(data)):
            link.sendall(data[place : place + 1])
            threading.Event().wait(0.02)
    except OSError:
        return True
    return False


HEADER = b"POST /v1/reports HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-ndjson\r\n"


def test_dripped_header(served: Running, device: Device):
    with closing(served.raw()) as link:
        assert drip(link, HEADER + b"X-Filler: " + b"a" * 1_000)
    assert served.send([device.line(1)]).status == 200


def test_dripped_body(served: Running, device: Device):
    line = device.line(1)
    with closing(served.raw()) as link:
        link.sendall(HEADER + b"Content-Length: %d\r\n\r\n" % len(line))
        assert drip(link, line)
    assert device.name not in served.kept()
    assert served.figure("ferry_gateway_held_bytes") == 0
    assert served.send([line]).status == 200


def test_dripped_header_of_a_second_request(served: Running):
    with closing(served.raw()) as link:
        link.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 200 " in link.makefile("rb").readline()
        assert drip(link, HEADER + b"X-Filler: " + b"a" * 1_000)


def test_sigterm_finishes_what_it_has_taken(tmp_path: Path):
    (one,) = enrolled(f"sqlite:///{tmp_path / 'ferry.db'}", ["press-1"])
    line = one.line(1)
    with gateway(tmp_path) as running, closing(running.raw()) as link:
        link.sendall(HEADER + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(line))
        assert link.recv(100).startswith(b"HTTP/1.1 100 ")  # the request is taken
        running.process.send_signal(signal.SIGTERM)
        running.until(lambda: refuses(running.port))
        link.sendall(line)
        assert b" 200 " in link.makefile("rb").readline()
        assert running.process.wait(60) == 0
        assert running.kept() == {one.name: [1]}


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return True
    return False


def test_more_connections_than_one_address_may_have_are_told_to_come_back(served: Running, device: Device):
    links = [served.raw() for _ in range(OF_ONE_ADDRESS + 1)]
    try:
        links[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = links[-1].makefile("rb").read()
        assert b" 429 " in answer.splitlines()[0]
        assert b"retry-after" in answer.lower()
    finally:
        for link in links:
            link.close()
    served.until(lambda: served.ask("GET", "/healthz").status == 200)
    assert served.send([device.line(1)]).status == 200


def test_a_few_addresses_cannot_take_all_connections(served: Running, device: Device):
    links = [
        socket.create_connection(("127.0.0.1", served.port), timeout=60, source_address=(f"127.0.0.{2 + at % 6}", 0))
        for at in range(6 * OF_ONE_ADDRESS)
    ]
    try:
        assert served.send([device.line(1)]).status == 200
    finally:
        for link in links:
            link.close()


@pytest.mark.slow
def test_ten_thousand_devices_back_at_the_same_minute(tmp_path: Path):
    devices = {f"press-{number}": Device(f"press-{number}") for number in range(10_000)}
    with closing(open_fleet(f"sqlite:///{tmp_path / 'ferry.db'}")) as fleet:
        fleet.preauthorize([Newcomer(one.name, one.public_key, LINE, CLASS, {}) for one in devices.values()])
    waiting = {name: one.line(1) for name, one in devices.items()}
    with gateway(tmp_path) as running, ThreadPoolExecutor(300) as senders:  # more at once than one address may have
        while waiting:
            answers = dict(zip(waiting, senders.map(lambda line: running.send([line]), waiting.values()), strict=True))
            assert {answer.status for answer in answers.values()} <= {200, 429}
            assert all("retry-after" in answer.headers for answer in answers.values() if answer.status == 429)
            kept = [name for name, answer in answers.items() if answer.status == 200]
            assert all(answers[name].json["accepted"] == [1] for name in kept)
            waiting = {name: line for name, line in waiting.items() if answers[name].status == 429}
        assert resident(running) < 150 * MiB
        assert running.kept() == {name: [1] for name in sorted(devices)}


# The database


def test_two_gateways_on_one_sqlite(tmp_path: Path):
    (one,) = enrolled(f"sqlite:///{tmp_path / 'ferry.db'}", ["press-1"])
    (tmp_path / "link.db").symlink_to(tmp_path / "ferry.db")
    with gateway(tmp_path) as running:
        for database in ("ferry.db", "link.db"):
            environment = os.environ | {"FERRY_STORES_DATABASE": f"sqlite:///{tmp_path / database}"}
            second = subprocess.run(words(), env=environment, capture_output=True, text=True, timeout=60)
            assert (second.returncode, "another gateway runs on this database" in second.stderr) == (3, True)
        assert running.send([one.line(1)]).status == 200
    with gateway(tmp_path) as running:  # the lock ended with its process
        assert running.send([one.line(1)]).status == 200


def test_full_disk(tmp_path: Path):
    (one,) = enrolled(f"sqlite:///{tmp_path / 'ferry.db'}", ["press-1"])
    with gateway(tmp_path) as running:
        assert running.send([one.line(1)]).status == 200
        most = (tmp_path / "ferry.db-wal").stat().st_size
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))  # the log cannot grow
        answer = running.send([one.line(n) for n in range(2, 22)])
        assert (answer.status, answer.json["code"]) == (503, "unavailable")
        assert "retry-after" in answer.headers
        assert "accepted" not in answer.json
        assert running.ask("GET", "/healthz").status == 503
        assert running.kept() == {one.name: [1]}
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert running.send([one.line(n) for n in range(2, 22)]).status == 200
        assert running.ask("GET", "/healthz").status == 200
        assert running.kept() == {one.name: list(range(1, 22))}


def test_no_database_at_the_start(tmp_path: Path):
    environment = os.environ | {"FERRY_STORES_DATABASE": f"sqlite:///{tmp_path / 'nowhere' / 'ferry.db'}"}
    done = subprocess.run(words(), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode in (3, 4)
    assert "Traceback" not in done.stderr
    assert "listens" not in done.stderr


@pytest.mark.servers
def test_database_away(tmp_path: Path):
    with postgres(tmp_path) as server:
        (one,) = enrolled(server.url, ["press-1"])
        with gateway(tmp_path, database=server.url) as running:
            assert running.send([one.line(1)]).json["accepted"] == [1]
            server.stop()
            answer = running.send([one.line(2)])
            assert (answer.status, "accepted" in answer.json, "retry-after" in answer.headers) == (503, False, True)
            assert running.ask("GET", "/healthz").status == 503
            server.start()
            running.until(lambda: running.send([one.line(2)]).status == 200)
            assert running.kept() == {one.name: [1, 2]}


@pytest.mark.servers
def test_several_gateways_share_postgresql(tmp_path: Path):
    with postgres(tmp_path) as server:
        (one,) = enrolled(server.url, ["press-1"])
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        with gateway(tmp_path / "a", database=server.url) as left, gateway(tmp_path / "b", database=server.url) as right:
            line, other = one.line(1), one.line(1, event="rolled_back")
            assert left.send([line]).json["accepted"] == [1]
            assert right.send([line]).json["accepted"] == [1]
            assert refusals(right.send([other])) == {1: "conflict"}
            assert left.kept() == {one.name: [1]}


@pytest.mark.servers
def test_postgresql_that_does_not_sync_is_refused(tmp_path: Path):
    with postgres(tmp_path) as server:
        server.stop()
        server.start("-c synchronous_commit=off")
        environment = os.environ | {"FERRY_STORES_DATABASE": server.url}
        done = subprocess.run(words(), env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, "synchronous_commit" in done.stderr) == (3, True)


# Addresses, TLS and the log


def start(*more: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FERRY_STORES_DATABASE": f"sqlite:///{folder / 'ferry.db'}"}
    return subprocess.run(words(*more), env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_without_tls_it_binds_the_loopback_only(tmp_path: Path, host: str):
    done = start("--host", host, folder=tmp_path)
    assert (done.returncode, "without TLS the gateway listens on the loopback only" in done.stderr) == (3, True)
    assert not (tmp_path / "ferry.db").exists()


def test_insecure_bind_is_said_by_hand(tmp_path: Path):
    with gateway(tmp_path, "--host", "0.0.0.0", "--insecure-bind") as running:
        assert running.ask("GET", "/healthz").status == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Provide a self-signed certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


def test_tls(tmp_path: Path, certificate: tuple[Path, Path]):
    (one,) = enrolled(f"sqlite:///{tmp_path / 'ferry.db'}", ["press-1"])
    with gateway(tmp_path, "--host", "0.0.0.0", "--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1])) as running:
        context = ssl.create_default_context(cafile=str(certificate[0]))
        body = gzip.compress(one.line(1))
        with context.wrap_socket(running.raw(), server_hostname="localhost") as link:
            link.sendall(HEADER + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b" 200 " in link.makefile("rb").readline()
        with closing(running.raw()) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert plain.recv(10) == b""


@pytest.mark.parametrize("halves", [["--tls-cert"], ["--tls-key"]])
def test_half_of_the_tls_files_is_refused(tmp_path: Path, certificate: tuple[Path, Path], halves: list[str]):
    assert start(*halves, str(certificate[0]), folder=tmp_path).returncode == 3


def test_damaged_tls_files_are_refused_with_a_sentence(tmp_path: Path, certificate: tuple[Path, Path]):
    (tmp_path / "bad.pem").write_text("nothing")
    done = start("--tls-cert", str(tmp_path / "bad.pem"), "--tls-key", str(certificate[1]), folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)


def test_only_a_named_proxy_says_who_sends(tmp_path: Path):
    def guesses(running: Running, address: str) -> list[int]:
        headers = {"X-Forwarded-For": address, "Authorization": "Bearer wrong"}
        return [running.ask("GET", "/v1/devices", headers=headers).status for _ in range(11)]

    for number, more in enumerate(([], ["--trusted-proxy", "127.0.0.1"])):
        (folder := tmp_path / str(number)).mkdir()
        with gateway(folder, *more) as running:
            assert guesses(running, "203.0.113.1")[-1] == 429
            assert guesses(running, "203.0.113.2")[0] == (401 if more else 429)


def test_a_valid_token_passes_whatever_else_came_from_its_address(served: Running, token: Callable[[str], dict[str, str]]):
    old, unused = token("viewer"), token("viewer")
    assert served.ask("GET", "/v1/devices", headers=old).status == 200
    wrong = [served.ask("GET", "/v1/devices", headers={"Authorization": f"Bearer {at}"}).status for at in range(30)]
    assert wrong[-1] == 429
    for headers in (old, unused):
        assert served.ask("GET", "/v1/devices", headers=headers).status == 200
    assert served.ask("GET", "/v1/devices", headers={"Authorization": "Bearer x"}).status == 429


@pytest.mark.parametrize(("proxy", "lines"), [("203.0.113.9", 1), ("127.0.0.1", 0)])
def test_a_proxy_that_nobody_named_is_said_once(tmp_path: Path, proxy: str, lines: int):
    with gateway(tmp_path, "--trusted-proxy", proxy) as running:
        for address in ("203.0.113.1", "203.0.113.2:5000", "127.0.0.1", "nonsense"):
            running.ask("GET", "/healthz", headers={"X-Forwarded-For": address})
        assert running.log.read_text().count("127.0.0.1 sends X-Forwarded-For and is no --trusted-proxy") == lines


def test_no_secret_in_the_log(tmp_path: Path):
    (one,) = enrolled(f"sqlite:///{tmp_path / 'ferry.db'}", ["press-1"])
    database = f"sqlite:///{tmp_path / 'ferry.db'}?timeout=77"
    with gateway(tmp_path, "--access-log", database=database) as running:
        secret, new = "S3cretS3cretS3cretS3cret", Device("newcomer")
        running.ask("GET", f"/v1/devices?token={secret}", headers={"Authorization": f"Bearer {secret}"})
        running.ask("GET", f"/metadata/timestamp.json?sig={secret}")
        running.ask("POST", "/v1/enroll", enrolment(new, secret))
        running.ask("GET", f"/v1/%0aforged%20line/{'x' * 300}")
        running.send([one.line(1, reason=secret)])
        running.end()
        written = running.log.read_text()
        assert "POST /v1/enroll 403" in written
        assert secret not in written
        assert "timeout=77" not in written
        assert "\nforged" not in written
        assert b"FERRY_STORES_DATABASE" not in " ".join(words()).encode()


def test_the_process_imports_no_signing_code(served: Running):
    maps = psutil.Process(served.process.pid)
    loaded = subprocess.run(
        [words()[0], "-c", "import sys, ota.gateway.__main__; print('\\n'.join(sys.modules))"], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    assert maps.is_running()
    assert not [
        name for name in loaded if name.startswith(("flows", "ota.release", "ota.agent", "tuf", "torch", "mlflow", "prefect"))
    ]


def test_releases_are_read_from_what_is_published(fielded: Field, tmp_path: Path):
    release = fielded.release
    (one,) = enrolled(f"sqlite:///{tmp_path / 'ferry.db'}", ["press-1"])
    with gateway(tmp_path, "--repository", str(fielded.repository.folder)) as running:
        with running.fleet() as fleet:
            header = {"Authorization": f"Bearer {fleet.add_token('eyes', 'viewer', 3600)}"}
        running.send([one.line(1, active=release.manifest)])
        (row,) = running.ask("GET", "/v1/releases", headers=header).json["releases"]
        assert (row["line"], row["device_class"], row["manifest"]) == (release.line, release.device_class, release.manifest)
        assert (row["release"], row["devices"], row["policy"]["halt"]) == (release.seq, 1, False)


def test_damaged_metadata_are_said(tmp_path: Path):
    (tmp_path / "published" / "metadata").mkdir(parents=True)
    (tmp_path / "published/metadata/timestamp.json").write_text('{"signed": {"meta": []}}')
    with gateway(tmp_path, "--repository", str(tmp_path / "published")) as running:
        with running.fleet() as fleet:
            header = {"Authorization": f"Bearer {fleet.add_token('eyes', 'viewer', 3600)}"}
        assert running.ask("GET", "/v1/releases", headers=header).status == 503
        assert running.ask("GET", "/metadata/timestamp.json").status == 200  # devices judge for themselves

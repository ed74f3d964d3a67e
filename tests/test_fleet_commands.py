"""`ferry fleet`: how an operator lets devices in and out, finds them, and what becomes of old reports."""

from __future__ import annotations

import csv
import gzip
import io
import json
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from sqlalchemy import text
from typer.testing import CliRunner

from flows.cli import app
from flows.ingest import ingest
from flows.workspace import Workspace
from ota.errors import OperatorError, TransferError
from ota.fleet import archive as archiving
from ota.fleet import table
from ota.fleet.archive import archive
from ota.fleet.register import Newcomer
from ota.fleet.store import Fleet
from ota.report import seal
from tests.bench.commands import roll_out
from tests.test_fleet_store import KEY, OTHER, alive, arrived, enrolment, kept, public, report

DAY = 86_400
CLASSES = {"shapes": ["edge"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a workspace with a release, which no test changes but in its database."""
    place = tmp_path_factory.mktemp("made") / "ws"
    roll_out(place)
    return place


@pytest.fixture
def workspace(made: Path) -> Iterator[Workspace]:
    """Provide the workspace with an empty fleet."""
    opened = Workspace(made)
    with opened.fleet.engine.begin() as connection:
        for name in ("devices", "keys", "reports", "last", "archived", "invites", "tokens"):
            connection.execute(text(f"delete from fleet_{name}"))
    yield opened
    opened.fleet.close()


def ferry(workspace: Workspace, *words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["-w", str(workspace.root), "fleet", *map(str, words)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


# Enrolment


def test_operator_invites_confirms_and_retires_a_device(workspace, tmp_path):
    said = ferry(workspace, "invite", "dev-2", "shapes/edge", "--for", "12h", "--out", tmp_path / "token")
    token = (tmp_path / "token").read_text().strip()
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert token not in said
    assert "in 12h" in said
    workspace.fleet.redeem(enrolment(token, OTHER))
    assert "it enrolled itself and counts once you confirm it: ferry fleet confirm dev-2" in ferry(workspace, "status")
    ferry(workspace, "confirm", "dev-2")
    assert "needs attention" not in ferry(workspace, "status")
    ferry(workspace, "retire", "dev-2")
    assert "1 of 1 devices: retired" in ferry(workspace, "status")
    assert "dev-2 is retired" in ferry(workspace, "confirm", "dev-2", code=3)


def test_printed_token_works_and_a_second_use_is_shown(workspace):
    told = json.loads(ferry(workspace, "invite", "dev-2", "shapes", "--json"))
    assert told["expires"] > time.time() + 6 * DAY
    workspace.fleet.redeem(enrolment(told["token"], OTHER))
    with pytest.raises(OperatorError):
        workspace.fleet.redeem(enrolment(told["token"], KEY))
    shown = ferry(workspace, "status")
    assert "needs attention, token of dev-2: refused 1 times" in shown
    assert "the token was used before" in shown
    assert told["token"] not in shown


def test_unknown_class_gets_no_token(workspace):
    ferry(workspace, "invite", "dev-2", "shapes/moon", code=3)
    ferry(workspace, "invite", "dev-2", "nothing", code=3)
    assert workspace.fleet.invites() == []


def test_token_replaces_no_file(workspace, tmp_path):
    (tmp_path / "token").write_text("precious")
    ferry(workspace, "invite", "dev-2", "shapes", "--out", tmp_path / "token", code=3)
    assert (tmp_path / "token").read_text() == "precious"
    assert workspace.fleet.invites() == []


def test_rekey_takes_a_key_or_makes_a_token(workspace):
    ferry(workspace, "enroll", "dev-1", public(KEY))
    ferry(workspace, "rekey", "dev-1", code=2)
    ferry(workspace, "rekey", "dev-1", public(OTHER))
    assert workspace.fleet.known()["dev-1"].public_key == public(OTHER)
    assert len(json.loads(ferry(workspace, "rekey", "dev-1", "--invite", "--json"))["token"]) > 40
    ferry(workspace, "rekey", "dev-9", public(OTHER), code=3)


def test_api_tokens_come_and_go(workspace):
    token = json.loads(ferry(workspace, "token", "add", "grafana", "--role", "viewer", "--json"))["token"]
    assert workspace.fleet.role_of(token) == "viewer"
    listed = ferry(workspace, "token", "list")
    assert "grafana" in listed
    assert token not in listed
    assert "there is no role" in ferry(workspace, "token", "add", "other", "--role", "root", code=3)
    ferry(workspace, "token", "remove", "grafana")
    assert workspace.fleet.role_of(token) is None


# Lists


def rows(*lines: str, head: str = "device,public_key,line,class,tags") -> bytes:
    return "\n".join([head, *lines]).encode()


@pytest.mark.parametrize("form", ["plain", "BOM", "semicolons", "tabs", "CRLF", "empty rows"])
def test_list_of_a_spreadsheet_is_read(form):
    data = rows(f"dev-1,{public(KEY)},shapes,edge,site=berlin hall=2", f"dev-2,{public(OTHER)},shapes,edge,")
    data = {
        "plain": data, "BOM": b"\xef\xbb\xbf" + data, "semicolons": data.replace(b",", b";"), "tabs": data.replace(b",", b"\t"),
        "CRLF": data.replace(b"\n", b"\r\n"), "empty rows": data.replace(b"\n", b"\n,,,,\n\n"),
    }[form]  # fmt: skip
    assert table.newcomers(data, CLASSES) == [
        Newcomer("dev-1", public(KEY), "shapes", "edge", {"site": "berlin", "hall": "2"}),
        Newcomer("dev-2", public(OTHER), "shapes", "edge", {}),
    ]


GOOD = f"dev-1,{public(KEY)},shapes,edge,"


@pytest.mark.parametrize(("row", "sentence"), [
    (f"Dev 2,{public(KEY)},shapes,edge,", "row 3 of the list: 'Dev 2' is not a device id"),
    ("dev-2,00,shapes,edge,", "row 3 of the list: the public key must be 64 hex digits"),
    (f"dev-2,{public(KEY)},shapes,moon,", "row 3 of the list: ferry.toml has no class shapes/moon"),
    (f"dev-2,{public(KEY)},,edge,", "row 3 of the list: the cell line is empty"),
    (f"dev-1,{public(KEY)},shapes,edge,", "row 3 of the list: dev-1 is in the list twice"),
    (f"dev-2,{public(KEY)},shapes,edge,Site", "row 3 of the list: 'Site' is no tag"),
    (f"=cmd|x,{public(KEY)},shapes,edge,", "row 3 of the list: the cell device begins with '=', as a formula does"),
    (f"dev-2,{public(KEY)},shapes,edge,@SUM(A1)", "row 3 of the list: the cell tags begins with '@'"),
    ('dev-2,"open', "the list is no CSV"),
    (f"dev-2\x1b[2J,{public(KEY)},shapes,edge,", "row 3 of the list"),
])  # fmt: skip
def test_wrong_row_is_named_and_no_device_is_added(workspace, tmp_path, row, sentence):
    (tmp_path / "list.csv").write_bytes(rows(GOOD, row))
    assert sentence in ferry(workspace, "preauthorize", tmp_path / "list.csv", code=3)
    assert workspace.fleet.known() == {}


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"device,line\n", b"\x00" * 50, b"device," * 10_000])
def test_file_that_is_no_list_is_refused(data):
    with pytest.raises(OperatorError):
        table.newcomers(data, CLASSES)


def test_listed_devices_count_at_once_and_again_changes_nothing(workspace, tmp_path):
    (tmp_path / "list.csv").write_bytes(rows(GOOD.replace("edge,", "edge,site=berlin")))
    assert "1 devices are enrolled, 0 were before" in ferry(workspace, "preauthorize", tmp_path / "list.csv")
    before = workspace.fleet.changes()
    assert "0 devices are enrolled, 1 were before" in ferry(workspace, "preauthorize", tmp_path / "list.csv")
    assert workspace.fleet.changes() == before
    assert list(workspace.fleet.devices()) == ["dev-1"]
    assert "dev-1" in ferry(workspace, "list", "--where", "site=berlin")


@pytest.fixture
def found(workspace: Workspace) -> Workspace:
    """Provide devices that differ in what a query asks for."""
    now, fleet = int(time.time()), workspace.fleet
    fleet.preauthorize([Newcomer(f"dev-{n}", public(KEY), "shapes", "edge", {}) for n in range(1, 6)])
    fleet.enroll("dev-6", public(KEY))
    fleet.tag("dev-1", {"site": "berlin", "hall": "2"})
    fleet.tag("dev-3", {"site": "lyon"})
    kept(fleet, report(1, time=now), now=now)
    kept(fleet, alive(1, device="dev-2", time=now - 3 * DAY, active=None), now=now - 3 * DAY)
    kept(fleet, report(1, device="dev-3", time=now, agent="0.2.0", schema_version=2, event="refused"), now=now)
    fleet.retire("dev-5")
    return workspace


@pytest.mark.parametrize(("asked", "names"), [
    ("", "1 2 3 4 6"), ("site=berlin", "1 2"), ("site!=berlin", "3 4 6"), ("site=berlin hall=2", "1"), ("silent>2d", "2 4 6"),
    ("silent<1h", "1 3"), ("silent=ever", "4 6"), ("agent<0.3.0", "3"), ("agent=0.3.0 silent<1d", "1"), ("event=refused", "3"),
    ("class=edge", "1 2 3 4"), ("line=gaskets", ""), ("state=retired", "5"), ("state!=retired", "1 2 3 4 6"), ("bundle=11111", "1 3"),
    ("release=none", "1 2 3 4 6"), ("release=1", ""), ("release!=1", "1 2 3 4 6"), ("site=berlin silent>2d", "2"),
])  # fmt: skip
def test_query_finds(found, asked, names):
    listed = json.loads(ferry(found, "list", "--where", asked, "--json"))["devices"]
    assert " ".join(row["device"].removeprefix("dev-") for row in listed) == names


@pytest.mark.parametrize("asked", [
    "site", "=x", "silent>", "silent>soon", "silent=2d", "agent<new", "agent=0.3", "site<berlin", "state=gone", "release=x", "Site=x",
    "a=b " * 21, "site\x1b=x", "silent>" + "9" * 40 + "d", "release=" + "9" * 79 + "x",
])  # fmt: skip
def test_query_that_is_none_says_how_to_write_it(workspace, asked):
    said = ferry(workspace, "list", "--where", asked, code=3)
    assert "\x1b" not in said


def test_release_is_found_by_its_number(workspace):
    (release,) = workspace.repository.releases("shapes", "edge")
    workspace.fleet.enroll("dev-1", public(KEY))
    kept(workspace.fleet, report(1, active=release.manifest))
    assert "dev-1" in ferry(workspace, "list", "--where", f"release={release.seq}")
    assert "dev-1" not in ferry(workspace, "list", "--where", f"release>{release.seq}")


FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    " =1+1",
    "\t=1",
    "\n=1+1,next",
    '"=1"',
    "\x1b[2J",
    "\u202e=1",
    "a,b",
]


@pytest.mark.parametrize("hostile", FORMULAS)
def test_table_holds_no_formula(workspace, tmp_path, hostile):
    workspace.fleet.enroll("dev-1", public(KEY))
    kept(workspace.fleet, report(1, reason=hostile))
    ferry(workspace, "export", "--csv", tmp_path / "out.csv")
    for data in ((tmp_path / "out.csv").read_text(), ferry(workspace, "export")):
        (row,) = csv.DictReader(io.StringIO(data))
        assert row["device"] == "dev-1"
        assert not row["reason"].lstrip().startswith(("=", "+", "-", "@"))
        assert row["reason"].isprintable()


HOSTILE = ["\x1b[2J", "a\nforged", "\u202egpj", "=1+1", "x" * 5000, "\x00"]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: ascii(value[:9]))
@pytest.mark.parametrize(
    "column", ["device", "line", "device_class", "active", "agent", "event", "reason", "tags", "refused_why"]
)
def test_hostile_text_in_a_row_reaches_no_terminal(found, column, value):
    with found.fleet.engine.begin() as connection:
        connection.execute(text(f"update fleet_last set {column} = :value where device = 'dev-1'"), {"value": value})
    for words in (("status",), ("list",), ("export",)):
        result = CliRunner().invoke(app, ["-w", str(found.root), "fleet", *words])
        assert result.exit_code in (0, 3)
        assert not any(sign in result.output for sign in "\x1b\u202e\x00")
        assert "\nforged" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("value", ["soon", b"\xff", 1.5])
@pytest.mark.parametrize("column", ["heard_at", "skew", "conflicts", "number"])
def test_number_that_is_none_ends_in_a_sentence(found, column, value):
    with found.fleet.engine.begin() as connection:
        connection.execute(text(f"update fleet_last set {column} = :value where device = 'dev-1'"), {"value": value})
    assert "hold data that ferry did not write" in ferry(found, "status", code=3)


# What needs attention


def test_silent_copied_skewed_and_refused_devices_are_named(found):
    now, fleet = int(time.time()), found.fleet
    kept(fleet, report(1, boot="another"), now=now)
    kept(fleet, report(2, device="dev-3", line="gaskets"), alive(2, device="dev-3", time=now + 2 * 3600), now=now)
    shown = ferry(found, "status")
    assert "needs attention, two copies: dev-1" in shown
    assert "are there two copies of this device?" in shown
    assert "needs attention, clock: dev-3\n  dev-3: its clock is 2 h ahead" in shown
    assert "needs attention, refused: dev-3\n  dev-3: 1 of its reports were refused, the last one for its line or class" in shown
    assert "needs attention, silent: dev-2\n  dev-2: nothing was heard for 3 d" in shown
    told = json.loads(ferry(found, "status", "--json"))["devices"]["dev-3"]["standing"]
    assert told["concerns"].keys() == {"clock", "refused"}


def test_large_fleet_shows_what_needs_attention_and_counts(workspace):
    now = int(time.time())
    names = [f"dev-{n:03}" for n in range(80)]
    workspace.fleet.preauthorize([Newcomer(name, public(KEY), "shapes", "edge", {}) for name in names])
    kept(workspace.fleet, *(alive(1, device=name, time=now) for name in names if name != "dev-007"), now=now)
    kept(workspace.fleet, alive(1, device="dev-007", time=now - 5 * DAY), now=now - 5 * DAY)
    shown = ferry(workspace, "status")
    assert [name for name in names if name in shown] == ["dev-007"]
    assert "79 other devices are not shown" in shown
    assert "80 of 80 devices" in shown
    every = ferry(workspace, "status", "--all")
    assert all(name in every for name in names)


# Old reports


def old_reports(fleet: Fleet, count: int = 30) -> list[Any]:
    fleet.preauthorize([Newcomer("dev-1", public(KEY), "shapes", "edge", {})])
    made = [report(1), *(alive(n) for n in range(2, count + 1))]
    now = int(time.time()) - 100 * DAY
    for one in made:
        kept(fleet, one, now=now + one.number)
    return made


def test_archived_reports_stay_as_they_were_signed_and_are_known(workspace):
    made = old_reports(workspace.fleet)
    before = workspace.fleet.states()
    told = json.loads(ferry(workspace, "archive", "--json"))
    assert told["reports"] == len(made) - 2  # the last event and the last heartbeat stay
    assert [one.number for one in workspace.fleet.reports()] == [1, 30]
    held = list(archiving.read(workspace.archive))
    assert [row["envelope"] for row in held] == [seal(one, KEY).decode() for one in made[1:-1]]
    assert workspace.fleet.states() == before
    assert "no report is old enough" in ferry(workspace, "archive")
    assert kept(workspace.fleet, alive(31)) == [""]
    assert [one.number for one in workspace.fleet.reports()] == [1, 30, 31]
    for path in workspace.archive.iterdir():
        path.unlink()


def test_new_report_with_an_archived_number_is_not_called_kept(workspace):
    """Start a device from an old image, or with a new key: it counts its reports from a number that is in the archive."""
    made = old_reports(workspace.fleet)
    ferry(workspace, "archive")
    new = report(made[4].number, boot="another", event="installed")
    (verdict,) = workspace.fleet.keep([arrived(new)])
    assert (verdict.code, verdict.highest) == ("conflict", 30)
    assert [one.number for one in workspace.fleet.reports()] == [1, 30]
    assert kept(workspace.fleet, new.model_copy(update={"number": 31})) == [
        ""
    ]  # signed again above the highest, as the agent does
    for path in workspace.archive.iterdir():
        path.unlink()


def test_numbers_of_the_archive_stay_few(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(archiving, "IN_A_FILE", 7)
    old_reports(workspace.fleet)
    assert len(archive(workspace.fleet, tmp_path, int(time.time()) - 90 * DAY).files) == 4
    with workspace.fleet.engine.connect() as connection:
        assert connection.execute(text("select * from fleet_archived")).all() == [("dev-1", 2, 29)]


@pytest.mark.parametrize("where", ["before the file", "after the file"])
def test_archiving_that_is_killed_loses_nothing(workspace, tmp_path, monkeypatch, where):
    made = old_reports(workspace.fleet)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(archiving.output, "fresh", die) if where == "before the file" else patched.setattr(
            archiving, "_remove", die
        )
        with pytest.raises(KeyboardInterrupt):
            archive(workspace.fleet, tmp_path, int(time.time()) - 90 * DAY)
    assert workspace.fleet.reports() == made
    archive(workspace.fleet, tmp_path, int(time.time()) - 90 * DAY)
    assert len(list(archiving.read(tmp_path))) == len(made) - 2
    assert len(list(tmp_path.iterdir())) == 1


def test_archive_that_cannot_be_read_back_deletes_nothing(workspace, tmp_path, monkeypatch):
    made = old_reports(workspace.fleet)
    real = gzip.compress
    monkeypatch.setattr(archiving.gzip, "compress", lambda data, mtime: real(data[:-9], mtime=mtime))
    with pytest.raises(OperatorError, match="does not hold what was written"):
        archive(workspace.fleet, tmp_path, int(time.time()) - 90 * DAY)
    assert workspace.fleet.reports() == made


def test_archive_that_cannot_be_written_deletes_nothing(workspace, tmp_path):
    made = old_reports(workspace.fleet)
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match="cannot be made"):
        archive(workspace.fleet, tmp_path / "file" / "folder", int(time.time()) - 90 * DAY)
    assert workspace.fleet.reports() == made


# Without a gateway


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_stick_is_read_and_cleared(workspace, tmp_path, form):
    workspace.fleet.enroll("dev-1", public(KEY))
    (tmp_path / "dev-1-1.json").write_bytes(seal(report(1), KEY))
    (tmp_path / "dev-1-2.json").write_bytes(seal(report(2), OTHER))
    (tmp_path / "photo.jpg").write_bytes(b"x")
    said = ferry(workspace, "ingest", form.format(tmp_path))
    assert "1 reports are accepted, 1 are not" in said
    assert "dev-1-2.json: the report is not signed by dev-1's key" in said
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "photo.jpg",
        "rejected/dev-1-2.json",
    ]


@pytest.mark.parametrize("url", ["/nowhere/at/all", "http://x/y", "file://host/x", "ftp://x"])
def test_place_that_is_none_is_refused(workspace, url):
    ferry(workspace, "ingest", url, code=3)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Provide an empty bucket on an S3 server of the loopback."""
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").Bucket(f"reports-{secrets.token_hex(4)}")
    place.create()
    yield place
    server.stop()


def test_bucket_is_read_and_cleared(workspace, bucket, monkeypatch):
    monkeypatch.setenv("FERRY_STORES_S3_ENDPOINT", bucket.meta.client.meta.endpoint_url)
    workspace = Workspace(workspace.root)
    workspace.fleet.enroll("dev-1", public(KEY))
    for number, key in ((1, KEY), (2, OTHER), (3, KEY)):
        bucket.put_object(Key=f"plant/dev-1-{number}.json", Body=seal(report(number), key))
    bucket.put_object(Key="plant/sub/dev-1-4.json", Body=b"{}")
    bucket.put_object(Key="other/dev-1-5.json", Body=seal(report(5), KEY))
    found = ingest(workspace, f"s3://{bucket.name}/plant")
    assert [one.number for one in found.accepted] == [1, 3]
    assert found.rejected == {"dev-1-2.json": "the report is not signed by dev-1's key"}
    assert [one.key for one in bucket.objects.all()] == [
        "other/dev-1-5.json",
        "plant/rejected/dev-1-2.json",
        "plant/sub/dev-1-4.json",
    ]
    with pytest.raises(OperatorError, match="no bucket"):
        ingest(workspace, "s3://nothing/plant")
    workspace.fleet.close()


def test_database_away_leaves_every_report_in_the_bucket(workspace, bucket, monkeypatch):
    monkeypatch.setenv("FERRY_STORES_S3_ENDPOINT", bucket.meta.client.meta.endpoint_url)
    workspace = Workspace(workspace.root)
    bucket.put_object(Key="dev-1-1.json", Body=seal(report(1), KEY))

    def away(*_: Any, **__: Any) -> None:
        raise TransferError("the database cannot be used")

    monkeypatch.setattr(Fleet, "keep", away)
    with pytest.raises(TransferError):
        ingest(workspace, f"s3://{bucket.name}")
    assert [one.key for one in bucket.objects.all()] == ["dev-1-1.json"]

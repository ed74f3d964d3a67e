"""One deadline for a whole transfer, whatever the other side spends it on; a folder gives regular files only."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from ota.agent import channel, doctor, transport, updater
from ota.agent.disk import Disk
from ota.agent.transport import Folder, NotFoundError, Web, at_most, connect, download, read_small
from ota.errors import RepositoryError, TransferError, TrustError
from tests.conftest import few
from tests.fleet_kit import Field

pytest_plugins = ("tests.fleet_kit",)

PATIENCE = 60.0  # seconds after which a test counts as hanging


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten deadlines to a moment, and allow no second attempt."""
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", 0.4)
    monkeypatch.setattr(transport, "ATTEMPTS", 1)


class Dripper:
    """A server that sends a beginning and then one piece after the other, for ever, until the caller hangs up."""

    def __init__(self, beginning: bytes, piece: bytes) -> None:
        self._beginning, self._piece = beginning, piece
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.hung_up = threading.Event()
        self._stopped = threading.Event()
        self._serving = threading.Thread(target=self._serve, daemon=True)
        self._serving.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        # To close it ends no `accept` that waits. The kernel may start that call again after a signal, with the number of the descriptor,
        # which a later server may have by then: it would take that server's callers.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._serving.join(PATIENCE)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._drip, args=(caller,), daemon=True).start()

    def _drip(self, caller: socket.socket) -> None:
        with caller:
            try:
                caller.recv(65536)
                caller.sendall(self._beginning)
                while self._piece and not self._stopped.wait(0.05):
                    caller.sendall(self._piece)
                if not caller.recv(1):
                    self.hung_up.set()
            except OSError:
                self.hung_up.set()


def ends(work: Callable[[], Any]) -> Exception | None:
    """Return the exception with which a call ends, or None; fail the test if the call does not end at all."""
    found: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - it is looked at by who asked
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it waits for ever"
    return found[0] if found else None


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "nothing": (b"", b""),
    "status line": (b"HTTP/1.1 2", b"0"),
    "reason": (b"HTTP/1.1 200 ", b"x"),
    "header": (OK + b"X-Long: ", b"a"),
    "name of a header": (OK, b"a"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers of an interim answer": (b"HTTP/1.1 103 Early Hints\r\nX: ", b"a"),
    "size of a chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "extension of a chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"a"),
    "trailer": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a"),
    "body": (OK + b"Content-Length: 1000000\r\n\r\n", b"a"),
    "body without an end": (OK + b"\r\n", b"a"),
    "body of a refusal": (b"HTTP/1.1 500 Broken\r\nContent-Length: 1000000\r\n\r\n", b"a"),
    "TLS": (b"\x16\x03\x03\x40\x00", b"\x02"),
}


@pytest.mark.parametrize("what", few(DRIPS, 6))
def test_dripping_server_is_left_at_the_deadline(what, monkeypatch):
    monkeypatch.setattr(transport, "GAP_TIMEOUT", 1.0)
    with Dripper(*DRIPS[what]) as server:
        web = Web(f"{'https' if what == 'TLS' else 'http'}://127.0.0.1:{server.port}")
        error = ends(lambda: read_small(web, "metadata/timestamp.json", 10**7))
        assert isinstance(error, TransferError)
        assert "it will be tried again" in str(error)
        # The reading thread must not be left behind: a device that runs for years would have a thousand of them.
        assert server.hung_up.wait(PATIENCE)


@pytest.mark.parametrize("what", ["header", "interim answers", "body"])
def test_dripping_server_holds_neither_agent_nor_lock(offered: Field, what):
    with Dripper(*DRIPS[what]) as server:
        offered.device.configure(repository=f"http://127.0.0.1:{server.port}")
        before = offered.device.facts()
        assert isinstance(ends(offered.device.update), TransferError)
        with offered.device.home.locked():
            assert offered.device.facts() == before


def test_all_documents_of_a_look_share_a_deadline(offered: Field, monkeypatch):
    # With a deadline for each document instead, a mirror could hold an agent for as long as there are documents.
    monkeypatch.setattr("ota.agent.trust.LOOK_SECONDS", -1.0)
    assert isinstance(ends(offered.device.update), TransferError)


def test_name_that_is_never_found_is_not_waited_for(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(PATIENCE) or [])
    error = ends(lambda: read_small(Web("http://updates.example"), "x", 1))
    release.set()
    assert isinstance(error, TransferError)
    assert "arrives too slowly" in str(error)


class Keeping(ThreadingHTTPServer):
    """An ordinary web server, which keeps each connection open for as long as its caller does."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        keeping = self
        self.made, self.open, self._changed = 0, 0, threading.Condition()

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __init__(self, *rest: Any) -> None:
                super().__init__(*rest, directory=str(folder))

            def setup(self) -> None:
                super().setup()
                keeping.count(1)

            def finish(self) -> None:
                keeping.count(-1)
                super().finish()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *rest: object) -> None:
        self.shutdown()
        super().__exit__(*rest)

    def count(self, connections: int) -> None:
        with self._changed:
            self.open += connections
            self.made += connections > 0
            self._changed.notify_all()

    def all_are_closed(self) -> bool:
        """Wait for each caller to hang up, and return whether all did."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.open, PATIENCE)


def test_connection_is_kept_between_files(offered: Field, monkeypatch):
    # A handshake for each file would cost more than the metadata on a thin link.
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    with Keeping(offered.repository.folder) as server:
        web = connect(server.address)
        for name in ("metadata/timestamp.json", "metadata/1.root.json", "metadata/timestamp.json"):
            assert read_small(web, name, 10**6)
        assert (server.made, server.open) == (1, 1)


@pytest.mark.parametrize("how", ["look", "look that fails", "doctor"])
def test_look_leaves_no_connection_open(offered: Field, monkeypatch, how):
    # `ferry-agent run` looks for years. If each look left a descriptor open, it could open nothing after a thousand looks.
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    looks = 3
    with Keeping(offered.repository.folder) as server:
        offered.device.configure(repository=server.address)
        if how == "look that fails":
            (offered.repository.folder / "metadata/timestamp.json").write_bytes(b"{}")
        gc.disable()  # it is not enough that it would be closed at some time
        try:
            for _ in range(looks):
                if how == "doctor":
                    found = doctor.examine(offered.device.home, draw=False)
                    assert [one.text for one in found if one.about == "repository" and one.level != "ok"] == []
                else:
                    with suppress(TrustError):
                        offered.device.update(check_only=True)
            assert server.all_are_closed()
        finally:
            gc.enable()
        assert server.made >= looks


def test_closed_transport_reads_again(offered: Field):
    with Keeping(offered.repository.folder) as server:
        web = connect(server.address)
        for _ in range(2):
            assert read_small(web, "metadata/timestamp.json", 10**6)
            web.close()
        assert server.all_are_closed()


def test_signed_size_buys_no_time(tmp_path):
    # A thief who signs a file of 4 GiB and lets it drip would hold an agent and its lock for three months.
    with Dripper(OK + b"Content-Length: 4294967296\r\n\r\n", b"a") as server:
        web = Web(f"http://127.0.0.1:{server.port}")
        error = ends(lambda: download(web, "x", 2**32, Disk(tmp_path), "part", at_most(100 * PATIENCE)))
    assert isinstance(error, TransferError)
    assert "arrives too slowly" in str(error)


def test_bytes_that_arrive_earn_time(tmp_path):
    with Dripper(OK + b"Content-Length: 8000\r\n\r\n", b"a" * 200) as server:  # 2 s, five times what any transfer gets
        web = Web(f"http://127.0.0.1:{server.port}")
        assert ends(lambda: download(web, "x", 8000, Disk(tmp_path), "part", at_most(PATIENCE))) is None
    assert (tmp_path / "part").read_bytes() == b"a" * 8000


def test_downloads_of_an_update_end_after_an_hour_together(offered: Field, monkeypatch):
    # Fast downloads must end too: meanwhile, no halt reaches the device, and nobody can take the lock.
    before = offered.device.facts(marks=False)
    pieces, gone_on = Folder._pieces, threading.Event()

    def slow(self: Folder, name: str, offset: int) -> Iterator[bytes]:
        if name.startswith(("objects/", "targets/deltas/")):  # otherwise all could arrive before anybody looks at the clock
            gone_on.wait()
        yield from pieces(self, name, offset)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Folder, "_pieces", slow)
        meanwhile.setattr(transport, "DEADLINE_FLOOR", 2 * PATIENCE)
        meanwhile.setattr(updater, "FETCH_SECONDS", 0.0)
        error = ends(offered.device.update)
    gone_on.set()
    for thread in transport._left_behind.values():
        thread.join(PATIENCE)
    assert isinstance(error, TransferError)
    assert offered.device.facts(marks=False) == before
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    assert ends(offered.device.update) is None
    assert offered.device.facts() != before


# Folders and USB sticks


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Create a repository's folder with one thing of each kind in it."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "tty").symlink_to("/dev/tty")
    (tmp_path / "loop").symlink_to("loop")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    yield tmp_path
    listening.close()


@pytest.mark.parametrize("name", ["folder", "pipe", "zero", "tty", "socket", "loop"])
def test_what_is_no_file_is_not_read(folder, name):
    error = ends(lambda: read_small(Folder(folder), name, 10**6))
    assert isinstance(error, TransferError)
    assert "not a regular file" in str(error) or "cannot read" in str(error)
    assert not isinstance(error, NotFoundError)


@pytest.mark.parametrize("name", ["folder", "pipe", "zero", "socket"])
def test_what_is_no_file_is_not_even_opened(folder, name, monkeypatch):
    # To open a pipe wakes whoever waits to write into it, and to open some devices starts something.
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    opened, real = [], os.open

    def record(path: Any, *rest: Any, **named: Any) -> int:
        opened.append(path)
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", record)
    with pytest.raises(TransferError, match=f"{name} is not a regular file; check the repository's folder"):
        read_small(Folder(folder), name, 100)
    assert folder / name not in opened
    assert read_small(Folder(folder), "file", 100) == b"content"
    assert folder / "file" in opened


@pytest.mark.parametrize("name", ["file", "link"])
def test_file_behind_a_link_is_read(folder, name):
    # Web servers and rsync publish through links, and everything that is fetched is verified in any case.
    assert read_small(Folder(folder), name, 100) == b"content"


def test_document_one_byte_longer_than_signed_is_not_used(folder, monkeypatch):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    assert read_small(Folder(folder), "file", 7) == b"content"
    with pytest.raises(RepositoryError, match="file is longer than the 6 bytes that are signed for it; nothing of it is used"):
        read_small(Folder(folder), "file", 6)


def test_download_one_byte_longer_than_signed_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    with pytest.raises(RepositoryError, match="file is longer than the 6 bytes that are signed for it; nothing of it is used"):
        download(Folder(folder), "file", 6, Disk(folder), "part", at_most(PATIENCE))
    assert not (folder / "part").exists()


def test_download_that_ends_early_is_resumed_by_the_next_call(folder, monkeypatch):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    whole = b"content and what a stick that was pulled out lost"
    error = ends(lambda: download(Folder(folder), "file", len(whole), Disk(folder), "part", at_most(PATIENCE)))
    assert isinstance(error, TransferError)
    assert str(error) == f"file ended after 7 of {len(whole)} bytes; it will be resumed"
    assert (folder / "part").read_bytes() == b"content"
    (folder / "file").write_bytes(b"CONTENT" + whole[7:])  # the first bytes are not fetched again
    download(Folder(folder), "file", len(whole), Disk(folder), "part", at_most(PATIENCE))
    assert (folder / "part").read_bytes() == whole


@pytest.mark.parametrize("part", [b"contents", b"x" * 100])
def test_part_longer_than_signed_is_fetched_anew(folder, monkeypatch, part):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    (folder / "part").write_bytes(part)
    download(Folder(folder), "file", 7, Disk(folder), "part", at_most(PATIENCE))
    assert (folder / "part").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udcff", "", "."])
def test_name_that_no_file_has_is_an_error_of_ours(folder, name):
    assert isinstance(ends(lambda: read_small(Folder(folder), name, 100)), TransferError)


def test_mount_that_hangs_is_left_at_the_deadline(folder, monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(Folder, "_pieces", lambda *_: iter(lambda: os.read(reading, 1), b""))
    error = ends(lambda: read_small(Folder(folder), "file", 100))
    os.close(writing)
    assert isinstance(error, TransferError)
    assert "arrives too slowly" in str(error)


def test_mount_that_hangs_holds_one_thread(offered: Field, monkeypatch):
    # The thread cannot be ended. With one more at each look, the device would have no memory left after some years.
    reading, writing = os.pipe()
    monkeypatch.setattr(Folder, "_pieces", lambda *_: iter(lambda: os.read(reading, 1), b""))
    threads = threading.active_count()
    errors = [ends(offered.device.update) for _ in range(5)]
    assert threading.active_count() == threads + 1
    assert "arrives too slowly" in str(errors[0])
    assert all("still does not answer; check what is mounted there" in str(error) for error in errors[1:])
    os.close(writing)


def test_mount_that_answers_again_is_read_again(folder, monkeypatch):
    reading, writing = os.pipe()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Folder, "_pieces", lambda *_: iter(lambda: os.read(reading, 1), b""))
        for _ in range(2):
            assert isinstance(ends(lambda: read_small(Folder(folder), "file", 100)), TransferError)
    (waiting,) = [thread for thread in threading.enumerate() if thread.name == "transfer"]
    os.close(writing)
    waiting.join(PATIENCE)
    assert read_small(Folder(folder), "file", 100) == b"content"


def test_mount_that_hangs_holds_no_report_and_no_lock(offered: Field, monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(channel, "MOUNT_SECONDS", 0.3)
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", PATIENCE)
    monkeypatch.setattr(channel, "_drop", lambda *_: os.read(reading, 1))
    look, folder = os.access, offered.device.home.config().reports
    monkeypatch.setattr(
        os, "access", lambda at, *rest, **named: os.read(reading, 1) if str(at) == folder else look(at, *rest, **named)
    )
    assert ends(offered.device.update) is None
    with offered.device.home.locked():
        assert len(list((offered.device.root / "queue").iterdir())) == 3  # starting, installed, confirmed
    assert "still does not answer; check what is mounted there" in offered.device.command("doctor", "--no-draw", code=3)
    os.close(writing)


@pytest.mark.parametrize("what", ["pipe", "zero"])
@pytest.mark.parametrize("place", ["metadata/timestamp.json", "objects"])
def test_stick_with_something_else_in_place_of_a_file(offered: Field, bundles, what, place):
    path = offered.repository.folder / place
    if place == "objects":
        for old in (offered.repository.target_files / "deltas").rglob("*"):
            if old.is_file():
                old.unlink()
        path = bundles["second"].path("weights", "full")
        path = offered.repository.objects / path.name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    before = offered.device.facts(marks=False)
    error = ends(offered.device.update)
    assert isinstance(error, TransferError)
    assert "not a regular file" in str(error)
    assert offered.device.facts(marks=False) == before


def _all_of_it(port: int, folder: Path) -> None:
    download(Web(f"http://127.0.0.1:{port}"), "x", 1000, Disk(folder), "part", at_most(PATIENCE))


def test_what_arrived_before_the_deadline_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "MINIMUM_RATE", 10**9)
    with Dripper(OK + b"Content-Length: 1000\r\n\r\n" + b"b" * 500, b"a") as server:
        error = ends(lambda: _all_of_it(server.port, tmp_path))
    assert isinstance(error, TransferError)
    kept = (tmp_path / "part").read_bytes()
    assert kept[:500] == b"b" * 500
    assert set(kept[500:]) <= {ord("a")}


def test_fast_server_without_an_end_is_left_at_the_deadline(tmp_path, monkeypatch):
    # There is always a next piece, so a reader that checks the deadline only while it waits for one never sees it.
    with Dripper(OK + b"\r\n", b"a" * 1_000_000) as server:
        pieces = Web(f"http://127.0.0.1:{server.port}").read("x", deadline=at_most(1))
        error = ends(lambda: [None for _ in pieces])
    assert isinstance(error, TransferError)

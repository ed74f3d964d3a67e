"""What `serve` and `run` tell systemd: that they are ready, what they do, that they are alive, and that they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ota.agent import poll, serve, updater
from ota.agent.notify import Supervisor
from ota.errors import TransferError
from tests.fleet_kit import Field
from tests.test_agent_doctor import Stopper

pytest_plugins = ["tests.fleet_kit"]


class Systemd:
    """A socket that receives what services tell."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(60)
        self.address = address

    def environment(self, seconds: float | None = None, pid: int | None = None) -> dict[str, str]:
        watch = {"WATCHDOG_USEC": str(int(seconds * 1e6))} if seconds else {}
        return {"NOTIFY_SOCKET": self.address, **watch, **({"WATCHDOG_PID": str(pid)} if pid else {})}

    def heard(self) -> list[str]:
        """Return what has arrived."""
        found = []
        self.socket.setblocking(False)
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            self.socket.settimeout(60)
            return found

    def until(self, wanted: Callable[[str], bool]) -> list[str]:
        """Receive until a message is the wanted one; return all of them."""
        found = [self.socket.recv(4096).decode()]
        while not wanted(found[-1]):
            found.append(self.socket.recv(4096).decode())
        return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(f"@ferry-{os.getpid()}-{tmp_path.name}" if request.param == "abstract" else str(tmp_path / "notify"))
    yield made
    made.socket.close()


def test_states_and_words_are_sent_in_order(systemd: Systemd):
    told = Supervisor(systemd.environment())
    told.ready("waits")
    for words in ("waits", "updates", "a\nREADY=1\x1b[31m", "x" * 999):
        told.does(words)
    told.beat()  # nobody waits for it
    told.stopping()
    heard = systemd.heard()
    assert heard[:3] == ["READY=1", "STATUS=waits", "STATUS=updates"]
    assert "\n" not in heard[3]
    assert "\x1b" not in heard[3]
    assert heard[4] == "STATUS=" + "x" * 300
    assert heard[5:] == ["STOPPING=1"]


@pytest.mark.parametrize(
    "given",
    [
        {}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "vsock:2:1234"}, {"NOTIFY_SOCKET": "/nowhere/at/all"},
        {"NOTIFY_SOCKET": "/" + "x" * 500}, {"NOTIFY_SOCKET": "/dev/null", "WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000000"},
    ],
    ids=str,
)  # fmt: skip
def test_without_systemd_nothing_is_told_and_nothing_fails(given: dict[str, str]):
    told = Supervisor(given)
    told.ready("waits")
    told.beat()
    with told.working(5):
        told.does("works")
    told.stopping()


def test_watchdog_of_another_process_is_not_ours(systemd: Systemd):
    assert Supervisor(systemd.environment(30, pid=os.getpid())).pause == 10
    assert Supervisor(systemd.environment(30)).pause == 10
    assert Supervisor(systemd.environment(30, pid=1)).pause is None


def test_work_that_takes_too_long_gives_no_more_signs(systemd: Systemd):
    told = Supervisor(systemd.environment(0.03))
    with told.working(0):  # its time is over at once
        assert systemd.until(lambda word: word == "WATCHDOG=1") == ["WATCHDOG=1"]
        for thread in [thread for thread in threading.enumerate() if "go_on" in thread.name]:
            thread.join(60)
            assert not thread.is_alive()  # although the work still goes on
    assert systemd.heard() == []
    with told.working(3600):
        assert systemd.until(lambda word: word == "WATCHDOG=1") == ["WATCHDOG=1"]
        assert systemd.until(lambda word: word == "WATCHDOG=1") == ["WATCHDOG=1"]


def test_loop_beats_while_it_waits_and_while_it_updates(scene: Field, systemd: Systemd, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: Any) -> None:
        assert systemd.until(lambda word: word == "WATCHDOG=1")
        raise TransferError("nobody there")

    monkeypatch.setattr(updater, "update", unreachable)
    stopped = Stopper(4)
    poll.run(scene.device.home, 3600, stopped, lambda _: None, supervisor=Supervisor(systemd.environment(30)), at_once=True)
    assert all(wait <= 10 for wait in stopped.waits)
    assert systemd.heard() == []  # one sign within five seconds is enough


def test_listener_that_died_gives_no_sign(scene: Field, systemd: Systemd):
    service = serve.Service(scene.device.home)
    service.supervisor = Supervisor(systemd.environment(30))
    service.listener = SimpleNamespace(is_alive=lambda: False)  # type: ignore[assignment]
    service._beat()
    assert systemd.heard() == []
    service.listener = threading.current_thread()
    service._beat()
    assert systemd.heard()[-1] == "WATCHDOG=1"


@pytest.mark.parametrize("words", [["run", "--now"], ["serve", "--port", "0"]], ids=["run", "serve"])
def test_service_is_ready_alive_and_ends(scene: Field, tmp_path: Path, words: list[str]):
    systemd = Systemd(str(tmp_path / "notify"))
    given = os.environ | systemd.environment(2)
    with subprocess.Popen(scene.device.words(*words), stderr=subprocess.DEVNULL, env=given) as process:
        told = systemd.until(lambda word: word == "READY=1")
        wanted = "STATUS=release 1 is installed" if words[0] == "run" else "STATUS=draws with bundle "
        told += systemd.until(lambda word: word.startswith(wanted))
        told += systemd.until(lambda word: word == "WATCHDOG=1")
        os.kill(process.pid, signal.SIGTERM)
        told += systemd.until(lambda word: word == "STOPPING=1")
        assert process.wait(60) == 0
    assert told.index("READY=1") == 0
    if words[0] == "run":
        assert "STATUS=updates: step 1 of 12, refresh metadata" in told
    systemd.socket.close()

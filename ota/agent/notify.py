"""Tell systemd that the service is ready, what it does, and that it is alive: sd_notify(3), a datagram to a Unix socket.

Without systemd nothing is told, and a message that does not arrive stops nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from ota.errors import printable

SEND_SECONDS = 1.0  # systemd may be too busy to take a message
MOST = 300  # characters of a status


class Supervisor:
    """What started this service: systemd, or nobody that listens."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Read the environment; see sd_notify(3) and sd_watchdog_enabled(3)."""
        place = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + place[1:] if place.startswith("@") else place if place.startswith("/") else ""
        self._status, self._beaten, self._lock = "", -1e9, threading.Lock()
        self.pause: float | None = None
        """Seconds between two signs of life; None: nobody waits for them."""
        with suppress(ValueError):
            if self._address and int(environment.get("WATCHDOG_PID") or os.getpid()) == os.getpid():
                self.pause = max(0.01, int(environment["WATCHDOG_USEC"]) / 3e6) if environment.get("WATCHDOG_USEC") else None

    def ready(self, status: str = "") -> None:
        """Tell that the service can be used."""
        self._send("READY=1")
        self.does(status)

    def does(self, status: str) -> None:
        """Tell what the service does; the same words again are not sent."""
        words = printable(status)[:MOST]
        if words and words != self._status:
            self._status = words
            self._send(f"STATUS={words}")

    def stopping(self) -> None:
        """Tell that the service is about to end."""
        self._send("STOPPING=1")

    def beat(self) -> None:
        """Give a sign of life, if it is time for one."""
        with self._lock:
            now = time.monotonic()
            if self.pause is None or now - self._beaten < self.pause / 2:
                return
            self._beaten = now
        self._send("WATCHDOG=1")

    @contextmanager
    def working(self, seconds: float) -> Iterator[None]:
        """Give signs of life while the block runs, but for no longer than the work may take: what hangs is then ended."""
        if self.pause is None:
            yield
            return
        done, until = threading.Event(), time.monotonic() + seconds

        def go_on(pause: float) -> None:
            self.beat()
            while time.monotonic() < until and not done.wait(pause):
                self.beat()

        thread = threading.Thread(target=go_on, args=(self.pause,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
            line.settimeout(SEND_SECONDS)
            line.connect(self._address)
            line.sendall(message.encode())

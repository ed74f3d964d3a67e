"""Two hosts on one machine, and a slow, unreliable link between them that a test can cut.

Each host is a network namespace with one TUN device. Every packet that is sent into one of them comes to this process. It
loses some packets, delays all, lets no more pass than the rate allows, and counts. The kernel's own emulator (netem) is not
on every machine; this module needs root and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
QUEUE = 16 * 1024  # bytes that wait for their turn; packets beyond that are lost, as in a modem


def why_not() -> str | None:
    """Return why such a link cannot be made here, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    probe = subprocess.run(["ip", "netns", "add", "ferry-probe"], capture_output=True, text=True) if _has_ip() else None
    if probe is None or probe.returncode:
        return f"namespaces cannot be made: {probe.stderr.strip() if probe else 'there is no ip (iproute2)'}"
    subprocess.run(["ip", "netns", "del", "ferry-probe"], check=True)
    return None


def _has_ip() -> bool:
    return any((Path(folder) / "ip").exists() for folder in os.environ["PATH"].split(":"))


@dataclass
class Way:
    """One direction of the link."""

    bytes: int = 0
    """Bytes that arrived."""
    lost: int = 0
    """Packets that were lost."""
    free_at: float = 0.0
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)


class Link:
    """Two namespaces, `near` and `far`, at 10.9.0.1 and 10.9.0.2.

    >>> with Link(rate=64_000, delay=0.15, loss=0.02) as link:
    ...     link.run("near", ["curl", f"http://{link.far_address}/"])
    """

    near_address, far_address = "10.9.0.1", "10.9.0.2"

    def __init__(self, rate: int, delay: float, loss: float, seed: int = 0) -> None:
        """Describe the link.

        Args:
            rate: in bits per second, each way.
            delay: in seconds, each way.
            loss: share of packets that are lost, each way.
            seed: decides which packets are lost.
        """
        self.rate, self.delay, self.loss = rate, delay, loss
        self.cut = False
        self.to_near, self.to_far = Way(), Way()
        self._draw = random.Random(seed)
        self._names = {side: f"ferry-{side}-{os.getpid()}" for side in ("near", "far")}
        self._stop, self._pass = os.pipe()
        self._thread = threading.Thread(target=self._carry)

    def __enter__(self) -> Self:
        self._ends = {}
        for side, own, other in (("near", self.near_address, self.far_address), ("far", self.far_address, self.near_address)):
            name, device = self._names[side], f"fy{side}"
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
            self._ends[side] = descriptor
            for words in (
                f"ip netns add {name}", f"ip link set {device} netns {name}", f"ip -n {name} addr add {own} peer {other} dev {device}",
                f"ip -n {name} link set {device} up", f"ip -n {name} link set lo up",
            ):  # fmt: skip
                subprocess.run(words.split(), check=True, capture_output=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.write(self._pass, b"x")
        self._thread.join()
        for descriptor in (*self._ends.values(), self._stop, self._pass):
            os.close(descriptor)
        for name in self._names.values():
            subprocess.run(["ip", "netns", "del", name], check=True)

    def words(self, side: str, command: list[str]) -> list[str]:
        """Return the command line that runs a command on one of the hosts."""
        return ["ip", "netns", "exec", self._names[side], *command]

    def _carry(self) -> None:
        ways = {self._ends["near"]: self.to_far, self._ends["far"]: self.to_near}
        out = {id(self.to_far): self._ends["far"], id(self.to_near): self._ends["near"]}
        while True:
            pending = [way.waiting[0][0] for way in ways.values() if way.waiting]
            timeout = max(0.0, min(pending) - time.monotonic()) if pending else None
            ready, _, _ = select.select([*ways, self._stop], [], [], timeout)
            if self._stop in ready:
                return
            for descriptor in ready:
                self._take(ways[descriptor], os.read(descriptor, 4096))
            for way in ways.values():
                while way.waiting and way.waiting[0][0] <= time.monotonic():
                    packet = heapq.heappop(way.waiting)[2]
                    if not self.cut:
                        way.bytes += len(packet)
                        os.write(out[id(way)], packet)

    def _take(self, way: Way, packet: bytes) -> None:
        now = time.monotonic()
        queued = max(0.0, way.free_at - now) * self.rate / 8
        if self.cut or self._draw.random() < self.loss or queued > QUEUE:
            way.lost += 1
            return
        way.free_at = max(now, way.free_at) + 8 * len(packet) / self.rate
        heapq.heappush(way.waiting, (way.free_at + self.delay, id(packet), packet))

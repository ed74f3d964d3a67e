"""Run a command with no network but the loopback: `python -m tests.offline pytest tests`.

A new network namespace has only a loopback interface, which is down. This module brings it up and then becomes the command.
Tests that pass here need no network, and no part of the product fails because it cannot reach a server outside.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def cut_off() -> None:
    """Cut this process off from every network but the loopback."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if libc.unshare(flags):
        sys.exit(f"cannot cut the network off here: {os.strerror(ctypes.get_errno())}; allow user namespaces, or run as root")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        state = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", state | IFF_UP))


def check() -> None:
    """Check that nothing outside can be reached; otherwise a passing test would mean nothing."""
    with socket.socket() as probe:
        probe.settimeout(1)
        try:
            probe.connect(("192.0.2.1", 80))  # an address that is never assigned (RFC 5737)
        except TimeoutError:
            sys.exit("the network is not cut off: a packet left")
        except OSError:
            return
    sys.exit("the network is not cut off: something answered")


if __name__ == "__main__":
    cut_off()
    check()
    os.execvp(sys.argv[1], sys.argv[1:])

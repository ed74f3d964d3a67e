"""Run a command with no network but the loopback: `python -m tests.offline pytest tests`.

A new network namespace holds nothing but a loopback that is down; this brings it up and becomes the command. Tests that
pass here need no network, and nothing in the product phones home and fails without it.
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
    """Leave this process with a loopback and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if libc.unshare(flags):
        sys.exit(f"cannot cut the network off here: {os.strerror(ctypes.get_errno())}; allow user namespaces, or run as root")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        state = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", state | IFF_UP))


def check() -> None:
    """Make sure that nothing outside can be reached, so that a pass means something."""
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

"""Let no process outlive the ferry that started it, however that ferry ends.

A process that is killed cannot end its children. So ferry's Prefect server holds the reading end of a pipe, of which the ferry
that started it holds the only writing end: the operating system closes it when that ferry ends, and the server ends, too. What
was left by a ferry without a pipe is found by a record of its process id and start time, and ended before a new server starts.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PIPE = "FERRY_LIFELINE"  # environment variable of a server: descriptor of the pipe
PARENT = "FERRY_SERVED_BY"  # environment variable of a run: the `ferry serve` that starts it, see `me`
RECORDS = "servers"  # folder below work/prefect
PATIENCE = 20.0  # seconds that a process gets to end by itself
MARK = b"flows.serve:app"  # in the command line of our servers


def hold_on() -> None:
    """End this server when the ferry that started it has ended; called in the server."""
    given = os.environ.pop(PIPE, "")
    if given.isdigit():
        threading.Thread(target=_wait_for_the_end, args=(int(given),), name="lifeline", daemon=True).start()


def _wait_for_the_end(descriptor: int) -> None:
    with suppress(OSError):
        while os.read(descriptor, 64):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def end_with_ferry() -> None:
    """End this run when the `ferry serve` that started it has ended; otherwise it would go on beside the next one."""
    process, _, began = os.environ.get(PARENT, "").partition(":")
    if process.isdigit() and began.isdigit() and process != str(os.getpid()):
        threading.Thread(target=_watch, args=(int(process), int(began)), name="ferry", daemon=True).start()


def _watch(process: int, began: int) -> None:
    while started(process) == began:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def me() -> str:
    """Name this process for `PARENT`: its id and its start."""
    return f"{os.getpid()}:{started(os.getpid())}"


def started(process: int) -> int | None:
    """Return when a process started, in ticks since the machine's start; None: there is no such process, or it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def note(home: Path, process: int) -> Path:
    """Record a server that this process started, so that a later ferry can end it; return the record."""
    folder = home / RECORDS
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{process}.json"
    path.write_text(json.dumps({"server": _named(process), "ferry": _named(os.getpid())}))
    return path


def _named(process: int) -> dict[str, Any]:
    return {"pid": process, "started": started(process), "boot": _boot()}


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def end_orphans(home: Path) -> list[int]:
    """End the servers whose ferry was killed; return their process ids. Servers of a ferry that lives are left alone."""
    ended = []
    for path in sorted((home / RECORDS).glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            server, ferry = record["server"], record["ferry"]
            alive = [_lives(server), _lives(ferry)]
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            continue
        if alive == [True, True]:
            continue
        if alive[0] and _is_server(server["pid"]):
            _end(server)
            ended.append(int(server["pid"]))
        path.unlink(missing_ok=True)
    return ended


def _lives(named: dict[str, Any]) -> bool:
    """Check whether exactly this process still runs: another one may have its number by now."""
    return named["boot"] == _boot() and named["started"] is not None and started(int(named["pid"])) == named["started"]


def _is_server(process: int) -> bool:
    """Check that a process is a Prefect server of ours: nobody's else, and no other program."""
    place = Path(f"/proc/{process}")
    with suppress(OSError):
        return place.stat().st_uid == os.geteuid() and MARK in (place / "cmdline").read_bytes()
    return False


def _end(named: dict[str, Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(int(named["pid"]), number)
        deadline = time.monotonic() + PATIENCE
        while _lives(named) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not _lives(named):
            return

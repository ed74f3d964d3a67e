"""The program of the gateway: `python -m ota.gateway`, which `ferry gateway` starts.

It is told all by its arguments, except the database's URL, which may hold a password and is read from the environment.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ota.errors import OperatorError, OtaError, TransferError
from ota.fleet.store import open_fleet
from ota.gateway import server
from ota.gateway.app import application
from ota.gateway.shared import Gateway, Options

DATABASE = "FERRY_STORES_DATABASE"
SWITCH_SECONDS = 0.0002
"""How long one thread may keep the other waiting: the writer needs Python's lock after each call of the database, and 5 ms, which is
Python's own choice, made each commit wait for requests that are being parsed."""
LIFELINE = "FERRY_LIFELINE"
"""Descriptor of a pipe whose other end is closed when the `ferry serve` that started this process has ended."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m ota.gateway", description=f"Serve devices: the published repository, reports, enrolments. {DATABASE} names the database.",
    )  # fmt: skip
    made.add_argument(
        "--repository", type=Path, help="folder of the published repository; without it, devices fetch it elsewhere"
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen at")
    made.add_argument("--port", type=int, default=8443, help="port to listen at; 0: any free one")
    made.add_argument("--tls-cert", type=Path, help="certificate chain, as PEM")
    made.add_argument("--tls-key", type=Path, help="its private key, as PEM")
    made.add_argument(
        "--insecure-bind", action="store_true", help="listen beyond the loopback without TLS, because a proxy adds it"
    )
    made.add_argument(
        "--trusted-proxy", action="append", default=[], metavar="ADDRESS", help="proxy whose X-Forwarded-For is believed"
    )
    made.add_argument(
        "--request-seconds",
        type=int,
        default=server.REQUEST_SECONDS,
        help="until a request must be there, from its first byte to its last",
    )
    made.add_argument("--access-log", action="store_true", help="write a line for each request")
    return made


def only_one(database: str) -> IO[bytes] | None:
    """Hold the lock of an SQLite database, so that a second gateway does not write into it; None: the database is a server's.

    Several processes may share PostgreSQL. In SQLite each would wait for the other, and their group commits would be none.

    Raises:
        OperatorError: another gateway runs on the database, or the URL names none that lasts.
    """
    try:
        url = make_url(database)
    except ArgumentError as error:
        raise OperatorError(
            f"{DATABASE} holds no URL of a database; write one such as sqlite:////srv/factory/ferry.db"
        ) from error
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:":
        raise OperatorError(f"the database in {DATABASE} is in memory, so nothing would last; name a file")
    try:
        # SQLite itself uses locks of another kind (POSIX), so this one is in nobody's way. It is held by the file, whatever its name.
        file = os.fdopen(os.open(url.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    except OSError as error:
        raise OperatorError(
            f"{url.database} cannot be opened: {error.strerror}; run the gateway as the user who owns the database"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OperatorError(
            "another gateway runs on this database, and SQLite takes one; end it, or let several share PostgreSQL"
        ) from error
    return file


def hold_on() -> None:
    """End this process when the ferry that started it has ended, however it ended."""
    given = os.environ.pop(LIFELINE, "")
    if given.isdigit():
        threading.Thread(target=_wait_for_the_end, args=(int(given),), name="lifeline", daemon=True).start()


def _wait_for_the_end(descriptor: int) -> None:
    with suppress(OSError):
        while os.read(descriptor, 64):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def serve(given: argparse.Namespace) -> None:
    """Serve until SIGTERM.

    Raises:
        OperatorError: an argument is wrong, the address is taken, or another gateway runs on the database.
        TransferError: the database cannot be used.
    """
    place = server.Place(
        given.host, given.port, given.tls_cert, given.tls_key, given.insecure_bind, tuple(given.trusted_proxy), given.request_seconds
    )  # fmt: skip
    server.check(place)
    database = os.environ.pop(DATABASE, "")
    if not database:
        raise OperatorError(f"{DATABASE} is not set; start the gateway with `ferry gateway`, which reads it from ferry.toml")
    if given.repository and given.repository.exists() and not given.repository.is_dir():
        raise OperatorError(f"{given.repository} is no folder; name the folder of the published repository with --repository")
    with ExitStack() as life:
        if lock := only_one(database):
            life.enter_context(lock)
        fleet = life.enter_context(open_fleet(database))
        fleet.probe()
        repository = str(given.repository.absolute()) if given.repository else ""
        gateway = Gateway(fleet, Options(repository, given.access_log, place.proxies))
        listening = life.enter_context(server.listen(place))
        host, port = listening.getsockname()[:2]
        sys.stderr.write(f"ferry: the gateway listens at {place.scheme}://{f'[{host}]' if ':' in host else host}:{port}\n")
        sys.stderr.flush()
        server.run(application(gateway), place, [listening])


def main(words: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 3 for something given that is wrong, or 4 for a database that is not there."""
    given = parser().parse_args(words)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("uvicorn", "uvicorn.error", "asyncio", "alembic"):  # what a stranger sends must not fill the log
        logging.getLogger(name).setLevel(logging.ERROR)
    hold_on()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        serve(given)
    except OtaError as error:
        sys.stderr.write(f"ferry: {error}\n")
        return 4 if isinstance(error, TransferError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

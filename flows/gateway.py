"""Start the gateway for devices: a process of its own, which gets the database and the published folder, and nothing else.

Its environment holds what it needs and no secret of this workspace but the database's URL, and that is not shown in its arguments.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from flows import lifeline
from flows.settings import VARIABLES
from flows.telling import tell
from flows.workspace import Workspace
from ota import durations
from ota.gateway import server
from ota.gateway.server import Place

KEPT = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV"})
KEPT_BEGINNINGS = ("PG", "PYTHON", "LD_")
ENDING_SECONDS = server.ENDING_SECONDS + 10.0
LONGEST_PAUSE = 60.0  # seconds between two starts
SETTLED = 60.0  # seconds after which a start counts as a success


def place(workspace: Workspace, **given: object) -> Place:
    """Return where the gateway listens: as ferry.toml says, unless an option says something else.

    Args:
        workspace: whose ferry.toml; its relative paths start at the workspace.
        **given: fields of `Place` that were given by hand; None: not given.

    Raises:
        OperatorError: it may not listen there.
    """
    asked = workspace.settings.gateway
    fields: dict[str, object] = {
        "host": asked.host, "port": asked.port, "insecure_bind": asked.insecure_bind, "proxies": tuple(asked.trusted_proxies),
        "certificate": workspace.root / asked.tls_cert if asked.tls_cert else None,
        "key": workspace.root / asked.tls_key if asked.tls_key else None,
    }  # fmt: skip
    made = Place(**fields | {name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    server.check(made)
    return made


def published(workspace: Workspace) -> Path | None:
    """Return the folder that the repository is published to; None: it is published elsewhere, and devices fetch it there."""
    url = workspace.settings.stores.publish
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return workspace.root / (parts.path if parts.scheme else url)
    return None


def command(workspace: Workspace, at: Place, access_log: bool = False) -> tuple[list[str], dict[str, str]]:
    """Return the gateway's command line and environment."""
    folder = published(workspace)
    words = [
        # -P: import no code from the present folder
        sys.executable, "-P", "-m", "ota.gateway", "--host", at.host, "--port", str(at.port), "--request-seconds", str(at.seconds),
        *(["--repository", str(folder)] if folder else []),
        *(["--tls-cert", str(at.certificate), "--tls-key", str(at.key)] if at.certificate else []),
        *(["--insecure-bind"] if at.insecure_bind else []),
        *(word for proxy in at.proxies for word in ("--trusted-proxy", proxy)),
        *(["--access-log"] if access_log or workspace.settings.gateway.access_log else []),
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_BEGINNINGS)}
    return words, kept | {VARIABLES["database"]: workspace.database}


def become(words: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Turn this process into the gateway."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, environment)  # noqa: S606 - our own program


@contextmanager
def beside(words: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Run the gateway during the block, and start it again whenever it ends; it does not outlive this process."""
    end, mine = os.pipe()  # mine is never written to; whatever ends this process closes it
    keeper = _Keeper(words, {**environment, lifeline.PIPE: str(end)}, end)
    thread = threading.Thread(target=keeper.run, name="gateway", daemon=True)
    with os.fdopen(mine, "wb"), os.fdopen(end, "rb"):
        thread.start()
        try:
            yield
        finally:
            keeper.stop()
            thread.join()


class _Keeper:
    """Starts a process again and again, after a pause that grows while it keeps ending at once."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], descriptor: int) -> None:
        self._words, self._environment, self._descriptor = words, environment, descriptor
        self._ending, self._lock = threading.Event(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Keep it running until `stop`."""
        pause = 1.0
        while True:
            began = time.monotonic()
            with self._lock:
                if self._ending.is_set():
                    return
                self._process = process = subprocess.Popen(  # noqa: S603
                    self._words,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[self._descriptor],
                )
            code = process.wait()
            if self._ending.is_set():
                return
            pause = 1.0 if time.monotonic() - began > SETTLED else min(2 * pause, LONGEST_PAUSE)
            tell(f"the gateway ended with code {code}; it is started again in {durations.spoken(int(pause))}")
            self._ending.wait(pause)

    def stop(self) -> None:
        """End it: it finishes what it has taken."""
        with self._lock:
            self._ending.set()
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
            return
        process.kill()

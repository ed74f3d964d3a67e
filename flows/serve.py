"""Retraining on one machine: a Prefect server of our own where none is configured, the flow `retrain` by cron, data and events.

A server of our own admits its owner alone. `flows.workspace` makes the secret that it asks for; here is what a secret cannot do: keep its
port from other users, and other names and web pages from it.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast
from urllib.parse import urlsplit

from cronsim import CronSim, CronSimError

from flows.errors import ServerError, WorkspaceError
from flows.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import FastAPI

START_SECONDS = 300.0
NO_CRON = "{cron!r} is not a cron schedule; write five fields, such as '0 3 * * 1' for Mondays at 3"


@contextmanager
def server(workspace: Workspace) -> Iterator[tuple[str, str]]:
    """Serve a workspace: with the configured Prefect server, or with one of our own that lives as long as the block.

    Must be entered before `prefect` is imported, which reads the address only once.

    Yields:
        the address of its API, and the file that holds what its page asks for; empty where the server is not ours.

    Raises:
        BusyError: another one serves this workspace.
        ServerError: our server does not come up, or others could read the file.
    """
    with workspace.locked("serving"):
        if configured := os.environ.get("PREFECT_API_URL"):
            yield configured, ""
            return
        asked = workspace.work / "prefect" / "credentials"
        # systemd ends services by SIGTERM, which by default leaves no chance to end the server as well.
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            # By default the page asks port 4200, and so sends what a person types to whoever has that port.
            with _own(workspace, {"PREFECT_SERVER_UI_API_URL": "/api"}, apart=True) as (process, address):
                asked.unlink(missing_ok=True)  # of a server that was killed
                write_secret(asked, os.environ["PREFECT_SERVER_API_AUTH_STRING"])
                os.environ["PREFECT_API_URL"] = address
                try:
                    yield address, str(asked)
                finally:
                    if process.poll() not in (None, 0, -signal.SIGTERM):  # systemd ends the server at the same moment as us
                        raise ServerError(
                            f"Prefect's server ended with code {process.returncode}; see {_log_of(workspace)}, then repeat the command to go on"
                        )
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            asked.unlink(missing_ok=True)
            signal.signal(signal.SIGTERM, before)


def start_in_process(workspace: Workspace) -> None:
    """Start Prefect's in-process server, at a port that no other user can take from it; it ends with this process.

    By itself Prefect chooses a port, shows it to the whole machine in the server's arguments, and believes whoever answers there first.

    Raises:
        ServerError: it does not come up.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    from prefect.server.api.server import SubprocessASGIServer

    known = SubprocessASGIServer()  # the one that every client of this process asks for
    if known.running:
        return
    life = ExitStack()
    atexit.register(life.close)
    quiet = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"}
    known.server_process, address = life.enter_context(_own(workspace, quiet, apart=False))
    known.port, known.running = urlsplit(address).port, True


@contextmanager
def _own(workspace: Workspace, settings: dict[str, str], *, apart: bool) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Prefect server that lives as long as the block, and the address of its API.

    The port is ours from before it starts until after it has ended: whoever had it instead would be sent the secret, and could say what
    flows run. A server `apart` does not hear Ctrl-C, so that it can still be told how flows ended; when it ends by itself, so does ferry.
    """
    log_path = _log_of(workspace)
    with socket.create_server(("127.0.0.1", 0)) as listening, log_path.open("ab") as log:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        # -P and --app-dir: no code from the present folder.
        process = subprocess.Popen(  # noqa: S603
            [
                sys.executable, "-P", "-m", "uvicorn", "--factory", "flows.serve:app", "--fd", str(listening.fileno()),
                "--app-dir", str(Path(__file__).parents[1]), "--lifespan", "on", "--log-level", "error",
            ],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=apart, pass_fds=[listening.fileno()],
            env=os.environ | settings,
        )  # fmt: skip
        ending = threading.Event()
        try:
            _wait_until_healthy(address, process, log_path)
            threading.Thread(target=_watch, args=(process, listening, ending, apart), name="port", daemon=True).start()
            yield process, address
        finally:
            ending.set()
            _end(process)
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # ends the thread


def _watch(process: subprocess.Popen[bytes], listening: socket.socket, ending: threading.Event, apart: bool) -> None:
    """Hang up on whoever asks a server that has ended: nobody waits for it, and nobody else answers in its place."""
    process.wait()
    if apart and not ending.is_set():  # Prefect would go on without it for ever, and do nothing
        os.kill(os.getpid(), signal.SIGTERM)
    listening.setblocking(True)  # the server shared it, and did not want to wait
    with suppress(OSError):
        while True:
            listening.accept()[0].close()


def app() -> FastAPI:
    """Make Prefect's server. It answers to the names of this machine only, so that no other name can be pointed at it (DNS rebinding)."""
    from prefect.server.api.server import create_app
    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response

    made = create_app(final=True)

    @made.middleware("http")
    async def alone(request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Keep the page from sending anything elsewhere: before it is let in, it cannot know that analytics are off."""
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = "connect-src 'self'; frame-ancestors 'none'"
        return response

    made.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    return made


def _log_of(workspace: Workspace) -> Path:
    return workspace.work / "prefect" / "server.log"


def write_secret(path: Path, secret: str) -> None:
    """Write a secret into a new file for us alone.

    Raises:
        FileExistsError: something is there.
        ServerError: others may read what is written there.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:  # a file system without modes
            raise ServerError(f"others may read what is written to {path.parent}; move the workspace to a disk with file modes")
        file.write(secret + "\n")


def _terminate(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"Prefect's server ended with code {process.returncode}; see {log_path}")
        try:
            with directly.open(f"{address}/health", timeout=5):
                return
        except urllib.error.HTTPError as error:
            raise ServerError(f"Prefect's server answers {error.code} when asked for its health; see {log_path}") from error
        except OSError:
            time.sleep(0.3)
    raise ServerError(f"Prefect's server did not answer within {START_SECONDS:.0f} s; see {log_path}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check_cron(cron: str) -> None:
    """Refuse early what is certainly no schedule; what only Prefect knows (`@daily`, `?`, ranges that wrap) is left to it, which takes seconds to load.

    Raises:
        WorkspaceError: it is none, or its moment never comes.
    """
    if set("@?-R") & set(cron):
        return
    try:
        CronSim(cron, datetime.now(UTC))
    except CronSimError as error:
        raise WorkspaceError(NO_CRON.format(cron=cron)) from error


def serve(workspace: Workspace, lines: list[str], cron: str, every: float) -> None:
    """Run `retrain` for lines by a cron schedule, for new data and for events, until interrupted. One run at a time.

    To be called within `server`: while no other one serves this workspace.

    Args:
        workspace: whose.
        lines: to be retrained.
        cron: five fields, in UTC.
        every: seconds between two looks for new data revisions and events.

    Raises:
        WorkspaceError: the schedule is not valid.
    """
    from prefect import serve as prefect_serve
    from prefect.deployments.runner import RunnerDeployment
    from prefect.flows import EntrypointType

    from flows import triggers
    from flows.approval import approval, name_of
    from flows.retrain import retrain

    try:
        deployments = [
            retrain.to_deployment(
                name=triggers.deployment_name(workspace, line), cron=cron, parameters={"root": str(workspace.root), "line": line},
                entrypoint_type=EntrypointType.MODULE_PATH, concurrency_limit=1,
            )
            for line in lines
        ]  # fmt: skip
        deployments.append(approval.to_deployment(name=name_of(workspace), entrypoint_type=EntrypointType.MODULE_PATH))
    except ValueError as error:
        raise WorkspaceError(NO_CRON.format(cron=cron)) from error
    again = triggers.take_up(workspace, lines)
    if again:
        sys.stderr.write(f"ferry: {again} retrainings that were cut are begun again\n")
    stop = threading.Event()
    looking = threading.Thread(target=triggers.keep_looking, args=(workspace, lines, every, stop), daemon=True)
    looking.start()
    try:
        prefect_serve(*cast("list[RunnerDeployment]", deployments), limit=1, print_starting_message=False)
    finally:
        stop.set()

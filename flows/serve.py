"""Retrain on one machine, by cron, for new data and for events; start our own Prefect server if none is configured.

Only the owner of our own server may use it. `flows.workspace` makes the secret that it asks for. This module does what a secret
cannot do: it keeps the port from other users, and keeps other host names and web pages from the server.
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
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast
from urllib.parse import urlsplit

from flows import lifeline, running, schedules, watchers
from flows.errors import ServerError, WorkspaceError
from flows.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import FastAPI

START_SECONDS = 300.0


@contextmanager
def server(workspace: Workspace, port: int = 0) -> Iterator[tuple[str, str]]:
    """Serve a workspace: with the configured Prefect server, or with one of our own that lives as long as the block.

    Enter the block before `prefect` is imported, because Prefect reads the address only once.

    Args:
        workspace: that is served.
        port: of our own server; 0 chooses a free one.

    Yields:
        the address of its API, and the file with the password that its page asks for; "" if the server is not ours.

    Raises:
        BusyError: another process serves this workspace.
        ServerError: our server does not start or fails, or others could read the file.
    """
    with workspace.locked("serving"), running.noted(workspace.work, "serving", ""):
        if configured := os.environ.get("PREFECT_API_URL"):
            yield configured, ""
            return
        asked = workspace.work / "prefect" / "credentials"
        # systemd ends services with SIGTERM; without a handler, ferry could not end the server as well.
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            # By default the page calls port 4200, so whoever has that port would get what a person types.
            # One run at a time is executed, so a run that waits for its turn is not late.
            settings = {"PREFECT_SERVER_UI_API_URL": "/api", "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false"}
            with _own(workspace, settings, apart=True, port=port) as (process, address):
                asked.unlink(missing_ok=True)  # left by a server that was killed
                write_secret(asked, os.environ["PREFECT_SERVER_API_AUTH_STRING"])
                os.environ["PREFECT_API_URL"] = address
                try:
                    yield address, str(asked)
                finally:
                    if process.poll() not in (None, 0, -signal.SIGTERM):  # systemd ends the server at the same moment as ferry
                        raise ServerError(
                            f"Prefect's server ended with code {process.returncode}; see {_log_of(workspace)}, then repeat the command to go on"
                        )
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            asked.unlink(missing_ok=True)
            signal.signal(signal.SIGTERM, before)


def start_in_process(workspace: Workspace) -> None:
    """Start Prefect's in-process server, at a port that no other user can take from it; it ends with this process.

    Prefect's own start chooses a port, shows it to the whole machine in the server's arguments, and trusts whoever answers there
    first.

    Raises:
        ServerError: it does not start.
    """
    if os.environ.get("PREFECT_API_URL"):
        return
    from prefect.server.api.server import SubprocessASGIServer

    known = SubprocessASGIServer()  # the object that every client in this process uses
    if known.running:
        return
    life = ExitStack()
    atexit.register(life.close)
    quiet = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"}
    known.server_process, address = life.enter_context(_own(workspace, quiet, apart=False))
    known.port, known.running = urlsplit(address).port, True


@contextmanager
def _own(
    workspace: Workspace, settings: dict[str, str], *, apart: bool, port: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a Prefect server that lives as long as the block; yield its process and the address of its API.

    Ferry holds the port from before the server starts until after it has ended. Another process on that port would receive the
    secret, and could decide which flows run. A server `apart` does not get Ctrl-C, so flows can still report to it how they
    ended; if it ends by itself, ferry ends, too.

    Raises:
        ServerError: it does not start.
    """
    log_path = _log_of(workspace)
    lifeline.end_orphans(log_path.parent)  # a second server on the same database would start the same runs
    end, mine = os.pipe()  # mine is never written to; whatever ends this process closes it
    with (
        os.fdopen(mine, "wb"),
        os.fdopen(end, "rb"),
        _listening(port) as listening,
        log_path.open("ab") as log,
    ):
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        # -P and --app-dir: import no code from the present folder.
        process = subprocess.Popen(  # noqa: S603
            [
                sys.executable, "-P", "-m", "uvicorn", "--factory", "flows.serve:app", "--fd", str(listening.fileno()),
                "--app-dir", str(Path(__file__).parents[1]), "--lifespan", "on", "--log-level", "error",
            ],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=apart, pass_fds=[listening.fileno(), end],
            env=os.environ | settings | {lifeline.PIPE: str(end)},
        )  # fmt: skip
        record = lifeline.note(log_path.parent, process.pid)
        ending = threading.Event()
        try:
            _wait_until_healthy(address, process, log_path)
            threading.Thread(target=_watch, args=(process, listening, ending, apart), name="port", daemon=True).start()
            yield process, address
        finally:
            ending.set()
            _end(process)
            record.unlink(missing_ok=True)
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # ends the thread


def _listening(port: int) -> socket.socket:
    """Open the socket of our server.

    Raises:
        ServerError: the port cannot be used.
    """
    try:
        return socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ServerError(f"Prefect's page cannot be served at port {port}: {why}; choose another with --port") from error


def _watch(process: subprocess.Popen[bytes], listening: socket.socket, ending: threading.Event, apart: bool) -> None:
    """Wait until the server ends, then close each new connection: no client waits, and no other process answers in its place."""
    process.wait()
    if apart and not ending.is_set():  # without its server, Prefect would run for ever and do nothing
        os.kill(os.getpid(), signal.SIGTERM)
    listening.setblocking(True)  # the server shared the socket, and had set it to non-blocking
    with suppress(OSError):
        while True:
            listening.accept()[0].close()


def app() -> FastAPI:
    """Make Prefect's server; it answers only to 127.0.0.1 and localhost, so DNS rebinding does not reach it."""
    from prefect.server.api.server import create_app
    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response

    lifeline.hold_on()
    made = create_app(final=True)

    @made.middleware("http")
    async def alone(request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Keep the page from sending anything elsewhere: before the password is given, it does not know that analytics are off."""
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = "connect-src 'self'; frame-ancestors 'none'"
        return response

    made.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    return made


def _log_of(workspace: Workspace) -> Path:
    return workspace.work / "prefect" / "server.log"


def write_secret(path: Path, secret: str) -> None:
    """Write a secret into a new file that only this user can read.

    Raises:
        FileExistsError: the file is there already.
        ServerError: others may read what is written there.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:  # a file system without modes
            raise ServerError(
                f"other users may read the files in {path.parent}; move the workspace to a file system that has file modes"
            )
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


def described(line: str) -> str:
    """Describe the deployment that retrains a line, for people who read Prefect's page."""
    return (
        f"Retrains every model of the line **{line}**: by the schedule, for each new data revision, and for events that `ferry trigger` leaves. "
        "What passes the gate is promoted, or waits for a person. The ledger (`ferry history`) has the decisions, MLflow the versions."
    )


def serve(workspace: Workspace, lines: list[str], cron: str, every: float, timezone: str = "UTC") -> None:
    """Run `retrain` for lines by a cron schedule, for new data and for events, until interrupted; one run at a time.

    Call it within `server`, so that no other process serves this workspace.

    Args:
        workspace: workspace of the lines.
        lines: lines to retrain.
        cron: five fields.
        every: seconds between two looks for new data revisions and events.
        timezone: IANA time zone of the schedule, such as Europe/Berlin.

    Raises:
        WorkspaceError: the schedule is not valid.
    """
    from prefect import serve as prefect_serve
    from prefect.deployments.runner import RunnerDeployment
    from prefect.flows import EntrypointType
    from prefect.schedules import Cron

    from flows import names, triggers
    from flows.approval import approval, name_of
    from flows.retrain import retrain

    try:
        deployments = [
            retrain.to_deployment(
                name=triggers.deployment_name(workspace, line), schedule=Cron(cron, timezone=timezone),
                parameters={"root": str(workspace.root), "line": line}, entrypoint_type=EntrypointType.MODULE_PATH, concurrency_limit=1,
                description=described(line),
            )
            for line in lines
        ]  # fmt: skip
        waits = f"Each run is a version in {workspace.root.name} that passed the gate and waits for a person. Open it, and fill in its form."
        deployments.append(
            approval.to_deployment(name=name_of(workspace), entrypoint_type=EntrypointType.MODULE_PATH, description=waits)
        )
    except ValueError as error:
        raise WorkspaceError(schedules.NO_CRON.format(cron=cron)) from error
    again = triggers.take_up(workspace, lines)
    if again:
        sys.stderr.write(f"ferry: {again} interrupted retrainings are started again\n")
    os.environ[lifeline.PARENT] = lifeline.me()
    stop = threading.Event()
    threading.Thread(target=names.keep_naming, args=(workspace, lines, stop), daemon=True).start()
    try:
        with watchers.watching("data and events", lambda: triggers.keep_looking(workspace, lines, every, stop), stop):
            prefect_serve(*cast("list[RunnerDeployment]", deployments), limit=1, print_starting_message=False)
    finally:
        os.environ.pop(lifeline.PARENT, None)

"""Retraining on one machine: a Prefect server of our own where none is configured, the flow `retrain` by cron, data and events."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, cast

from flows.errors import ServerError, WorkspaceError
from flows.workspace import Workspace

START_SECONDS = 300.0


@contextmanager
def server(workspace: Workspace) -> Iterator[str]:
    """The address of a Prefect API: the configured one, or that of a server which lives as long as the block.

    Must be entered before `prefect` is imported, which reads the address only once.

    Raises:
        ServerError: it does not come up.
    """
    configured = os.environ.get("PREFECT_API_URL")
    if configured:
        yield configured
        return
    port = _free_port()
    address = f"http://127.0.0.1:{port}/api"
    workspace.work.mkdir(exist_ok=True)
    log_path = workspace.work / "prefect-server.log"
    # systemd ends services by SIGTERM, which by default leaves no chance to end the server as well.
    before = signal.signal(signal.SIGTERM, _terminate)
    with log_path.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_healthy(address, process, log_path)
        os.environ["PREFECT_API_URL"] = address
        yield address
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        _end(process)
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"Prefect's server ended with code {process.returncode}; see {log_path}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:  # noqa: S310 - our own loopback address
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise ServerError(f"Prefect's server did not answer within {START_SECONDS:.0f} s; see {log_path}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it started, by their own process group."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve(workspace: Workspace, lines: list[str], cron: str, every: float) -> None:
    """Run `retrain` for lines by a cron schedule, for new data and for events, until interrupted. One run at a time.

    Args:
        workspace: whose.
        lines: to be retrained.
        cron: five fields, in UTC.
        every: seconds between two looks for new data revisions and events.

    Raises:
        WorkspaceError: the schedule is not valid.
        BusyError: another one serves this workspace.
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
        raise WorkspaceError(
            f"{cron!r} is not a cron schedule; write five fields, such as '0 3 * * 1' for Mondays at 3"
        ) from error
    with workspace.locked("serving"):
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

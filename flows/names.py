"""Name the runs that Prefect's scheduler makes ahead of time, which otherwise have names such as "hot-alpaca" until they begin."""

from __future__ import annotations

import threading
from contextlib import suppress

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from flows import lost, triggers
from flows.workspace import Workspace

EVERY = 60.0  # seconds between two looks
BEGINNING = 5.0  # seconds until the first one, because the scheduler makes its runs a moment after `ferry serve` starts


def keep_naming(workspace: Workspace, lines: list[str], stop: threading.Event) -> None:
    """Name scheduled runs until `stop` is set; a name is worth no error."""
    pause = BEGINNING
    while not stop.wait(pause):
        with suppress(Exception):
            name_scheduled(workspace, lines)
        pause = EVERY


def name_scheduled(workspace: Workspace, lines: list[str]) -> list[str]:
    """Give each scheduled run of these lines a name that says what it does and when; return the new names."""
    named = []
    with get_client(sync_client=True) as client:
        for line in lines:
            found = lost.runs_of(client, [triggers.deployment_name(workspace, line)], "SCHEDULED")
            for run in found:
                if (name := scheduled_name(line, run)) != run.name and not run.name.startswith("retrain "):
                    client.update_flow_run(run.id, name=name)
                    named.append(name)
    return named


def scheduled_name(line: str, run: FlowRun) -> str:
    """Name a run that has not begun; as soon as it begins, it is named after its data revision."""
    rev = str(run.parameters.get("rev", ""))
    if not run.auto_scheduled and rev:
        return f"retrain {line} on data {rev[:12]}"
    when = run.expected_start_time
    return f"retrain {line}, scheduled for {when:%Y-%m-%d %H:%M} UTC" if when else f"retrain {line}"

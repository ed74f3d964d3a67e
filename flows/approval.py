"""Approval on Prefect's page: each version that waits has a flow run, which is suspended until a person fills in its form.

The run is not a record. The ledger says what waits and who decided, so `ferry approve` works without the run, and ends it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow, suspend_flow_run
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateFilter
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import resume_flow_run
from prefect.input import RunInput
from pydantic import Field

from flows import pages, telling
from flows.workspace import Workspace
from registry.catalog import Subject
from registry.champions import approve, waiting
from registry.ledger import Entry


class Approval(RunInput):
    """A person's decision."""

    who: str = Field(title="Your name", min_length=1, max_length=100, description="it is recorded, and nobody checks it")
    promote: bool = Field(
        title="Make it champion", description="yes: it becomes champion; no: it is refused, and not asked about again"
    )
    reason: str = Field(title="Reason", min_length=1, max_length=1000, description="it is recorded in the ledger")


def name_of(workspace: Workspace) -> str:
    """Return the name of Prefect's deployment for approvals."""
    return workspace.root.name


def _find(workspace: Workspace, subject: Subject, version: int) -> Entry | None:
    return next(
        (e for e in waiting(workspace, workspace.subjects()) if (e.subject, e.facts["version"]) == (str(subject), version)), None
    )


@flow(
    name="approval", flow_run_name="approve {subject} version {version}", persist_result=False,
    description="Wait for a person who approves or refuses a version that passed the gate.",
)  # fmt: skip
def approval(root: str, subject: str, version: int) -> str:
    """Suspend until a person approves or refuses a version; then Prefect starts the flow again, with the person's answer."""
    workspace, chosen = Workspace(Path(root)), Subject.parse(subject)
    asked = _find(workspace, chosen, version)
    if asked is None:
        return f"{subject} {version} does not wait any more; `ferry history {subject}` says why"
    text = f"{subject} version {version}: {asked.why}. `ferry report` and MLflow show what it draws."
    pages.keep_logs()
    pages.log(f"{text} To decide, choose Resume at the top of this page (in the menu there), and fill in the form.")
    said = suspend_flow_run(wait_for_input=Approval.with_initial_data(description=text), key="approval")
    # Prefect's page knows no users (its paid edition does): the name is what somebody wrote.
    entry = approve(workspace, chosen, version, said.reason, not said.promote, who=f"{said.who} (in Prefect, unverified)")
    return f"ledger entry {entry.number}"


def ask_in_prefect(workspace: Workspace, subject: Subject, version: int) -> bool:
    """Make the run in which a person approves a version, once.

    Returns:
        False if the version does not wait, no Prefect server is configured, or nothing serves approvals.
    """
    asked = _find(workspace, subject, version)
    if asked is None or not os.environ.get("PREFECT_API_URL"):
        return False
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"approval/{name_of(workspace)}")
        except ObjectNotFound:
            return False
        run = client.create_flow_run_from_deployment(
            deployment.id,
            name=f"approve {subject} version {version}",
            parameters={"root": str(workspace.root), "subject": str(subject), "version": version},
            idempotency_key=f"approval {subject} {version} {asked.sha256}",
        )
    page = f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/login?redirect=/runs/flow-run/{run.id}"
    telling.tell(f"{subject} version {version} waits for a person: `ferry approve`, or the form behind Resume at {page}")
    return True


def close(workspace: Workspace, entry: Entry, promoted: bool) -> None:
    """End the run of a version that `ferry approve` has decided on; if this fails, it is printed and changes nothing."""
    if not os.environ.get("PREFECT_API_URL"):
        return
    said: dict[str, Any] = {"who": entry.who, "promote": promoted, "reason": entry.why}
    try:
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(
                deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name_of(workspace)])),
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=StateFilter(any_=[StateType.PAUSED]))),
                sort=FlowRunSort.ID_DESC, limit=200,  # the client's own defaults are null, which the server refuses
            )  # fmt: skip
        for run in runs:
            if (run.parameters.get("subject"), run.parameters.get("version")) == (entry.subject, entry.facts["version"]):
                resume_flow_run(run.id, run_input=said)
    except Exception as error:  # noqa: BLE001 - it is decided; the run finds that out when somebody resumes it
        telling.tell(f"the run in Prefect still waits ({error}); cancel it there")

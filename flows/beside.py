"""What `ferry serve` does beside its schedule, as flows: for a Prefect server with workers, where nobody runs `ferry serve`.

`prefect.yaml` has the deployments. `flows.retrain.look_for_data` looks for data and events, and takes up runs that were killed.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows import alerts, telling
from flows.workspace import Workspace
from registry.champions import news_of_aliases


@flow(name="look at aliases", persist_result=False)
def look_at_aliases(root: str) -> str:
    """Do what `ferry reconcile` does, and tell what needs a person: refused promotions, and signatures that expire.

    Returns:
        what differed between MLflow's aliases and the ledger; empty: nothing did.
    """
    workspace = Workspace(Path(root))
    news = news_of_aliases(workspace, workspace.subjects(), workspace.needs_approval)
    if news:
        telling.tell(news)
    alerts.survey(workspace)
    return news

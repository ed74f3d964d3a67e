"""prefect.yaml: whatever `ferry serve` does, its deployments do."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

from flows import triggers
from flows.approval import name_of
from flows.beside import look_at_aliases
from flows.schedules import check_cron
from flows.setup import create
from flows.workspace import Workspace
from registry.catalog import CHAMPION, Subject

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent.parent / "prefect.yaml").read_text())["deployments"]
SUBJECT = Subject(line="surfaces", configuration="I", variant="full")


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    found: Flow[..., Any] = getattr(importlib.import_module(module), name)
    return found


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["entrypoint"])
def test_deployment_can_be_called_with_its_parameters(deployment: dict[str, Any]):
    flow = flow_of(deployment)
    assert isinstance(flow, Flow)
    given = deployment.get("parameters", {})
    bound = inspect.signature(flow.fn).bind_partial(**given)
    if deployment.get("schedules"):
        bound = inspect.signature(flow.fn).bind(**given)  # nobody fills in what is missing
    assert bound.arguments == given
    for schedule in deployment.get("schedules", []):
        if "cron" in schedule:
            check_cron(schedule["cron"], schedule["timezone"])


def test_everything_that_serve_does_has_a_deployment_of_the_same_name(tmp_path: Path):
    workspace = create(tmp_path / "factory", ["surfaces"])
    names = {(flow_of(deployment).name, deployment["name"]) for deployment in DEPLOYMENTS}
    assert ("retrain", triggers.deployment_name(workspace, "surfaces")) in names
    assert ("approval", name_of(workspace)) in names
    polled = {flow_of(deployment).name for deployment in DEPLOYMENTS if deployment.get("schedules")}
    assert polled == {"retrain", "look for data", "look at aliases"}


def test_polling_puts_a_hand_made_version_back_and_alerts(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Set the alias to a version that was made by hand in MLflow, without a run, as its page does."""
    root = create(tmp_path / "ws", ["surfaces"]).root
    out, settings = tmp_path / "told", root / "ferry.toml"
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read() + '\\n')"
    words = json.dumps([sys.executable, "-c", program, str(out)])
    settings.write_text(settings.read_text().replace("[alerts]", f"[alerts]\ncommand = {words}", 1))
    workspace = Workspace(root)
    client = workspace.catalog.client
    client.create_registered_model(SUBJECT.model)
    version = client.create_model_version(SUBJECT.model, source="runs:/nowhere/model")
    assert not version.run_id
    client.set_registered_model_alias(SUBJECT.model, CHAMPION, version.version)
    assert "is none again" in look_at_aliases.fn(str(root))
    assert "the gate never judged surfaces/I/full 1" in capfd.readouterr().err
    assert workspace.catalog.champion(SUBJECT) is None
    assert look_at_aliases.fn(str(root)) == ""
    (told,) = map(json.loads, out.read_text().splitlines())
    assert (told["what"], told["state"]) == ("promotion surfaces/I/full", "refused 1")
    workspace.ledger.close()


def test_error_of_mlflow_without_a_text_is_one_sentence():
    from mlflow.exceptions import MlflowException

    from registry.catalog import foreign_errors
    from registry.errors import StoreError

    with pytest.raises(StoreError, match="MLflow refused: MlflowException"), foreign_errors():
        raise MlflowException("")

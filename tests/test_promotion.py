"""Promotion, rollback, approval, and aliases that somebody moved in MLflow: real MLflow and ledger, versions without files."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.workspace import Workspace
from ota.release.keys import create
from ota.release.repository import Repository
from registry import champions as rules
from registry.catalog import Catalog, Subject, Version
from registry.errors import CatalogError, PromotionError, StoreError
from registry.ledger import Entry, Ledger
from registry.promotion import Alias, SubjectState, of_one_full, reconcile_alias, subject_state, version_of
from registry.seal import FileSeal, Seal
from registry.selection import Decision, Limits
from tests.test_slow import FERRY, clean_environment, wait_for

LINES = [f"line{i}" for i in range(51)]  # one for each test that writes
SETTINGS = "schema = 1\n" + "".join(
    f'\n[lines.{name}]\ndata = "data/{name}"\n{"require_approval = true" if i >= 38 else ""}\n' for i, name in enumerate(LINES)
)


def weights(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    root = tmp_path_factory.mktemp("factory")
    (root / "ferry.toml").write_text(SETTINGS)
    Repository.create(root / "repository", create(root / "keys"))
    made = Workspace(root)
    made.catalog.versions(Subject.parse("line0/I/full"))  # sets the database up
    yield made
    made.ledger.close()


_free = iter(LINES[:38])
_approved = iter(LINES[38:])


@pytest.fixture
def client(workspace: Workspace) -> MlflowClient:
    return workspace.catalog.client


def judged(
    workspace: Workspace,
    ledger: Ledger,
    subject: Subject,
    number: int,
    outcome: str,
    against: str,
    best: bool = False,
    worse: str | None = None,
) -> None:
    """Register a version in MLflow, without a model, and record in the ledger what the gate said of it."""
    client = workspace.catalog.client
    run = client.create_run(workspace.catalog.experiment(subject.line)).info
    why = "because" if outcome == "promote" else "coverage is 0.1"
    made = Decision(
        outcome=outcome, reason=why, checks=[], n=9, champion=against or None, challenger=weights(number), limits=Limits(),
        scorecard="c" * 64, becomes_anchor=best, worse=worse,
    )  # fmt: skip
    client.log_text(run.run_id, made.model_dump_json(), "decision.json")
    tags = {"weights.sha256": weights(number), "gate.outcome": outcome, "gate.decision": made.sha256}
    client.create_model_version(subject.model, source=f"{run.artifact_uri}/onnx", run_id=run.run_id, tags=tags)
    gate(ledger, subject, number, made)


def gate(ledger: Ledger, subject: Subject, number: int, made: Decision) -> None:
    """Record in the ledger what it holds of a version that was judged."""
    seal = Seal(
        subject=str(subject), version=number, weights=made.challenger, lineage="d" * 64, scorecard=made.scorecard, data_rev="0" * 40,
        data_md5="0" * 32 + ".dir", code="1" * 64, parent=None, teacher=None, files={},
    )  # fmt: skip
    facts = {
        "version": number, "outcome": made.outcome, "champion": made.champion or "", "decision": made.sha256,
        "scorecard": made.scorecard, "verdict": made.model_dump(mode="json"), "seal": seal.facts,
    }  # fmt: skip
    ledger.append("gate", str(subject), made.reason, facts)


def registered(workspace: Workspace, line: str) -> Subject:
    """Make a subject with versions 1 to 3 in MLflow: the gate let 1 through as the first, 2 against 1, and refused 3."""
    subject = Subject.parse(f"{line}/I/full")
    workspace.catalog.client.create_registered_model(subject.model)
    for number, outcome, against in ((1, "promote", ""), (2, "promote", weights(1)), (3, "refuse", weights(1))):
        judged(workspace, workspace.ledger, subject, number, outcome, against)
    return subject


@pytest.fixture
def subject(workspace: Workspace) -> Subject:
    return registered(workspace, next(_free))


@pytest.fixture
def approved(workspace: Workspace) -> Subject:
    """Make a subject like `subject`, of a line that requires approval."""
    return registered(workspace, next(_approved))


def ferry(workspace: Workspace, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["-w", str(workspace.root), *arguments])


def champion(workspace: Workspace, subject: Subject) -> int | None:
    """Return the version of the champion, on which ledger and alias must agree."""
    now = subject_state(workspace.ledger.entries(str(subject)))
    seen = workspace.catalog.champion(subject)
    assert (seen.number if seen else None) == now.version
    assert workspace.catalog.follows(subject) == now.number
    return now.version


def entries(workspace: Workspace, subject: Subject) -> list[Entry]:
    return [e for e in workspace.ledger.entries(str(subject)) if e.kind != "gate"]


def reconciled(workspace: Workspace, subject: Subject) -> list[rules.Reconciled]:
    return rules.reconcile(workspace, workspace.subjects([subject.line]), workspace.needs_approval)


# Promotion and rollback


def test_rollback_makes_the_champion_before_champion_and_says_how_to_release_it(workspace: Workspace, subject: Subject):
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 2, "better")
    result = ferry(workspace, "rollback", str(subject), "--reason", "customers complain")
    assert result.exit_code == 0, result.output
    assert f"{subject} version 1 is champion again, in place of 2" in result.stdout
    assert f"publish it with `ferry release {subject.line}/edge`" in result.stdout
    assert champion(workspace, subject) == 1
    last = entries(workspace, subject)[-1]
    assert (last.kind, last.why, last.facts["how"], last.facts["from"]) == ("promotion", "customers complain", "rollback", 2)
    assert "rollback   " in ferry(workspace, "history", str(subject)).stdout

    again = ferry(workspace, "rollback", str(subject), "--reason", "and before that")
    assert again.exit_code == 5
    assert "has no earlier champion that passed the gate" in again.stderr
    assert champion(workspace, subject) == 1


def test_rollback_passes_over_who_was_champion_against_the_gate(workspace: Workspace, subject: Subject):
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 3, "a drill", overrule=True)
    rules.promote(workspace, subject, 2, "another", overrule=True)
    assert rules.rollback(workspace, subject, "enough").facts["version"] == 1
    assert champion(workspace, subject) == 1
    for number, says in (
        (3, "is no earlier champion that passed the gate"),
        (2, "is no earlier champion that passed the gate"),
        (1, "already"),
    ):
        with pytest.raises(PromotionError, match=says):
            rules.rollback(workspace, subject, "no", to=number)
    assert champion(workspace, subject) == 1


def test_rollback_goes_to_the_named_champion(workspace: Workspace, subject: Subject):
    for number in (1, 2, 1):
        rules.promote(workspace, subject, number, "as it comes")
    assert rules.rollback(workspace, subject, "2 was better", to=2).facts["version"] == 2
    assert champion(workspace, subject) == 2


def test_promotion_believes_the_ledger_and_not_tags_that_anyone_may_edit(
    workspace: Workspace, subject: Subject, client: MlflowClient
):
    rules.promote(workspace, subject, 1, "first")
    client.set_model_version_tag(subject.model, "3", "gate.outcome", "promote")
    with pytest.raises(PromotionError, match="the gate answered 'refuse'"):
        rules.promote(workspace, subject, 3, "it says promote")
    assert champion(workspace, subject) == 1


def test_what_is_harmless_and_no_better_needs_a_reason_and_a_person(workspace: Workspace, subject: Subject, client: MlflowClient):
    rules.promote(workspace, subject, 1, "first")
    judged(workspace, workspace.ledger, subject, 4, "promote if reasoned", weights(1))
    result = ferry(workspace, "promote", str(subject), "4")
    assert result.exit_code == 5
    assert "a promotion that is not for quality needs a reason" in result.stderr
    client.set_registered_model_alias(subject.model, "champion", "4")
    assert [row.answer for row in reconciled(workspace, subject)] == ["refused"]
    assert champion(workspace, subject) == 1
    assert ferry(workspace, "promote", str(subject), "4", "--reason", "the licence of the old data ended").exit_code == 0
    assert champion(workspace, subject) == 4
    assert entries(workspace, subject)[-1].why == (
        "promoted for a reason other than quality: the licence of the old data ended; not worse anywhere by more than the "
        "margin (n = 9)"
    )


def test_what_is_worse_within_the_margin_has_to_be_accepted_in_so_many_words(workspace: Workspace, subject: Subject):
    rules.promote(workspace, subject, 1, "first")
    judged(
        workspace, workspace.ledger, subject, 4, "promote if reasoned", weights(1), worse="worse on the new data, by at most 0.04"
    )
    result = ferry(workspace, "promote", str(subject), "4", "--reason", "a licence ended")
    assert result.exit_code == 5
    assert "the gate found it worse on the new data, by at most 0.04; add --accept-worse" in result.stderr
    assert champion(workspace, subject) == 1
    assert ferry(workspace, "promote", str(subject), "4", "--reason", "a licence ended", "--accept-worse").exit_code == 0
    assert champion(workspace, subject) == 4
    assert entries(workspace, subject)[-1].why == (
        "promoted for a reason other than quality: a licence ended; accepted although it is worse on the new data, by at most 0.04 (n = 9)"
    )


def test_former_champion_with_other_weights_is_not_gone_back_to(workspace: Workspace, subject: Subject, client: MlflowClient):
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 2, "better")
    client.set_model_version_tag(subject.model, "1", "weights.sha256", weights(9))
    with pytest.raises(PromotionError, match=r"MLflow's tag and the ledger name different weights for "):
        rules.rollback(workspace, subject, "back")
    assert champion(workspace, subject) == 2


def test_version_that_somebody_made_in_mlflow_by_hand_is_not_promoted(
    workspace: Workspace, subject: Subject, client: MlflowClient
):
    run = client.get_model_version(subject.model, "1").run_id
    client.create_model_version(subject.model, source="file:///nowhere", run_id=run)
    result = ferry(workspace, "promote", str(subject), "4", "--overrule", "--reason", "it is mine")
    assert result.exit_code == 3
    assert f"the gate never judged {subject} 4, so ferry does not use its files" in result.stderr
    client.set_registered_model_alias(subject.model, "champion", "4")
    (row,) = reconciled(workspace, subject)
    assert row.answer == "refused"
    assert champion(workspace, subject) is None


@pytest.mark.parametrize("reason", [[], ["--reason", ""], ["--reason", " \n"]])
def test_overruling_and_going_back_need_a_reason(workspace: Workspace, subject: Subject, reason: list[str]):
    result = ferry(workspace, "promote", str(subject), "3", "--overrule", *reason)
    assert result.exit_code == 5
    assert "overruling the gate needs a reason" in result.stderr
    assert entries(workspace, subject) == []
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 2, "better")
    if reason:  # without the option there is one by default
        result = ferry(workspace, "rollback", str(subject), *reason)
        assert result.exit_code == 5
        assert "a rollback needs a reason" in result.stderr
    assert champion(workspace, subject) == 2


def test_reason_with_line_breaks_forges_no_entry(workspace: Workspace, subject: Subject):
    forged = "good\n   9  2099-01-01T00:00  root        promotion  shapes/I/full 9: \x1b[31mforged\u2028more"
    assert ferry(workspace, "promote", str(subject), "1", "--reason", forged).exit_code == 0
    (line,) = [line for line in ferry(workspace, "history", str(subject)).stdout.splitlines() if "forged" in line]
    assert f"promotion  {subject} 1: good 9  2099" in line
    assert "\x1b" not in line
    assert "forged more" in line


def test_history_says_which_version_and_what_the_gate_answered(workspace: Workspace, subject: Subject):
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 3, "a drill", overrule=True)
    lines = ferry(workspace, "history", str(subject)).stdout.splitlines()
    assert f"promotion  {subject} 1: " in lines[-2]
    assert f"overrule   {subject} 3: a drill" in lines[-1]
    assert any(f"gate       {subject} 3: refuse: " in line for line in lines)


def test_promoting_the_champion_again_says_that_nothing_was_recorded(workspace: Workspace, subject: Subject):
    assert (
        f"{subject} version 1 is champion (ledger" in ferry(workspace, "promote", str(subject), "1", "--reason", "first").stdout
    )
    said = ferry(workspace, "promote", str(subject), "1", "--reason", "another").stdout
    assert f"{subject} version 1 is champion already, nothing was recorded (ledger" in said
    assert [e.why for e in entries(workspace, subject)] == ["first"]


def test_going_back_to_a_version_that_is_not_there_names_those_that_are(workspace: Workspace, subject: Subject):
    rules.promote(workspace, subject, 1, "first")
    result = ferry(workspace, "rollback", str(subject), "--to", "99", "--reason", "no")
    assert f"{subject} has no version 99" in result.stderr
    assert "asks the gate" not in result.stderr


# Killed between ledger and alias


KILLED = """
import os, signal, sys
from pathlib import Path
from registry.champions import promote, rollback
from flows.workspace import Workspace
from registry.catalog import Catalog, Subject
Catalog.promote = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
subject = Subject.parse(sys.argv[2])
if sys.argv[3] == "back":
    rollback(Workspace(Path(sys.argv[1])), subject, "back")
promote(Workspace(Path(sys.argv[1])), subject, int(sys.argv[3]), "better")
"""


def killed(workspace: Workspace, subject: Subject, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(workspace.root), str(subject), what], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_promotion_killed_between_ledger_and_alias_is_completed_and_not_taken_for_a_wish(workspace: Workspace, subject: Subject):
    rules.promote(workspace, subject, 1, "first")
    killed(workspace, subject, "2")
    seen = workspace.catalog.champion(subject)
    assert seen is not None
    assert seen.number == 1  # a rollback to 1 is always allowed: if a person asked for it, it would be granted
    before = entries(workspace, subject)
    assert before[-1].facts["version"] == 2
    (row,) = reconciled(workspace, subject)
    assert (row.answer, champion(workspace, subject)) == ("put back", 2)
    assert "was interrupted before MLflow's alias moved" in row.text
    assert entries(workspace, subject) == before

    killed(workspace, subject, "back")  # and once more, completed by the same command
    assert rules.rollback(workspace, subject, "back").number == entries(workspace, subject)[-1].number
    assert champion(workspace, subject) == 1  # once, not twice


def test_mlflow_that_fails_between_is_told_and_repeating_completes_it(
    workspace: Workspace, subject: Subject, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "promote", away)
        with pytest.raises(StoreError, match=r"the ledger holds it as entry \d+.*`ferry reconcile` completes it"):
            rules.promote(workspace, subject, 1, "first")
    number = entries(workspace, subject)[-1].number
    assert rules.promote(workspace, subject, 1, "first").number == number
    assert champion(workspace, subject) == 1


def away(*_: object) -> None:
    raise StoreError("MLflow cannot be reached")


@contextmanager
def mlflow_lost_after_the_ledger() -> Iterator[None]:
    """Lose MLflow: whoever promotes inside gets as far as the ledger."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Catalog, "set_alias", away)
        patched.setattr(Catalog, "promote", away)
        with pytest.raises(StoreError, match="the ledger holds it as entry"):
            yield


def anchor(workspace: Workspace, subject: Subject) -> int | None:
    seen = workspace.catalog.aliased(subject, "anchor")
    return seen.number if seen else None


def test_rollback_that_was_cut_is_completed_by_repeating_it_and_goes_back_once(workspace: Workspace, subject: Subject):
    for number in (1, 2):
        rules.promote(workspace, subject, number, "as it comes")
    judged(workspace, workspace.ledger, subject, 4, "promote", weights(2))
    rules.promote(workspace, subject, 4, "better still")
    with mlflow_lost_after_the_ledger():
        rules.rollback(workspace, subject, "back")
    made = entries(workspace, subject)
    assert rules.rollback(workspace, subject, "back") == made[-1]
    assert (champion(workspace, subject), entries(workspace, subject)) == (2, made)
    assert rules.rollback(workspace, subject, "and further back").facts["version"] == 1


def test_reconcile_also_completes_who_is_the_best_model_ever(workspace: Workspace, subject: Subject):
    judged(workspace, workspace.ledger, subject, 4, "promote", weights(2), best=True)
    rules.promote(workspace, subject, 1, "first")
    with mlflow_lost_after_the_ledger():
        rules.promote(workspace, subject, 2, "better")
    assert anchor(workspace, subject) is None
    (row,) = reconciled(workspace, subject)
    assert (row.answer, champion(workspace, subject)) == ("put back", 2)
    assert anchor(workspace, subject) == 1  # there was no anchor, so it is the champion before

    rules.promote(workspace, subject, 4, "best")
    assert anchor(workspace, subject) == 4
    with mlflow_lost_after_the_ledger():
        rules.rollback(workspace, subject, "back")
    reconciled(workspace, subject)
    assert (champion(workspace, subject), anchor(workspace, subject)) == (2, 2)  # a version that was rolled back is not the best


@pytest.mark.parametrize("to", [3, 4, None])
def test_best_model_ever_is_whom_the_ledger_says_and_not_whom_mlflow_shows(
    workspace: Workspace, subject: Subject, client: MlflowClient, to: int | None
):
    # Whoever moves the alias to a bad or unjudged version could have later ones compared with that.
    judged(workspace, workspace.ledger, subject, 4, "promote", weights(1), best=True)
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 4, "best")
    client.create_model_version(subject.model, source="file:///nowhere")
    if to is None:
        client.delete_registered_model_alias(subject.model, "anchor")
    else:
        client.set_registered_model_alias(subject.model, "anchor", str(5 if to == 4 else to))
    best = rules.anchor_of(workspace, subject)
    assert best is not None
    assert (best.version, best.weights) == (4, weights(4))
    (row,) = reconciled(workspace, subject)
    assert (row.answer, anchor(workspace, subject)) == ("agrees", 4)


def test_verdict_on_another_model_promotes_nothing(workspace: Workspace, subject: Subject):
    # The entry says promote, but it is about other files than those sealed under this number.
    rules.promote(workspace, subject, 1, "first")
    other = Decision(
        outcome="promote", reason="better", checks=[], n=9, champion=weights(1), challenger=weights(7), limits=Limits(), scorecard="e" * 64
    )  # fmt: skip
    facts = {"version": 3, "outcome": "promote", "champion": weights(1), "decision": other.sha256, "scorecard": other.scorecard}
    workspace.ledger.append("gate", str(subject), "better", facts | {"verdict": other.model_dump(mode="json")})
    for overrule in (False, True):
        with pytest.raises(CatalogError, match="judges another model than the one that was sealed as"):
            rules.promote(workspace, subject, 3, "it says promote", overrule)
    assert champion(workspace, subject) == 1


def test_best_model_ever_outlives_several_cuts(workspace: Workspace, subject: Subject):
    """Complete each promotion that was cut, in order, even if only the last is repeated."""
    judged(workspace, workspace.ledger, subject, 4, "promote", weights(1), best=True)
    judged(workspace, workspace.ledger, subject, 5, "promote", weights(4))
    rules.promote(workspace, subject, 1, "first")
    for number in (4, 5):
        with mlflow_lost_after_the_ledger():
            rules.promote(workspace, subject, number, "better")
    rules.promote(workspace, subject, 5, "better")
    assert (champion(workspace, subject), anchor(workspace, subject)) == (5, 4)


@pytest.mark.parametrize("how", ["wish", "by hand"])
def test_alias_that_was_there_first_still_gets_its_anchor(workspace: Workspace, subject: Subject, client: MlflowClient, how: str):
    """Complete a promotion whose alias is where the ledger says, but whose anchor was cut off."""
    judged(workspace, workspace.ledger, subject, 4, "promote", weights(1), best=True)
    rules.promote(workspace, subject, 1, "first")
    if how == "wish":
        client.set_registered_model_alias(subject.model, "champion", "4")
    with mlflow_lost_after_the_ledger():
        if how == "wish":
            reconciled(workspace, subject)
        else:
            rules.promote(workspace, subject, 4, "better")
    client.set_registered_model_alias(subject.model, "champion", "4")
    (row,) = reconciled(workspace, subject)
    assert row.answer == "agrees"
    assert (champion(workspace, subject), anchor(workspace, subject)) == (4, 4)


def test_decision_that_somebody_replaced_in_mlflow_decides_nothing(workspace: Workspace, subject: Subject, client: MlflowClient):
    rules.promote(workspace, subject, 1, "first")
    run = client.get_model_version(subject.model, "3").run_id
    good = client.get_model_version(subject.model, "1").run_id
    assert run is not None
    assert good is not None
    of_another = rules.verdict(workspace, subject, 2)
    assert of_another is not None
    client.log_text(run, of_another.model_dump_json(), "decision.json")
    with pytest.raises(PromotionError, match="the gate answered 'refuse'"):
        rules.promote(workspace, subject, 3, "it says promote")
    client.log_text(good, "{}", "decision.json")
    rules.promote(workspace, subject, 2, "better")
    assert champion(workspace, subject) == 2


def test_mlflow_that_is_down_decides_nothing(workspace: Workspace, subject: Subject, monkeypatch: pytest.MonkeyPatch):
    def away(*_: object) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(workspace.catalog.client, "get_model_version", away)
    with pytest.raises(StoreError, match="MLflow cannot be reached: connection refused"):
        rules.promote(workspace, subject, 1, "first")
    assert entries(workspace, subject) == []


# At the same moment


PROMOTER = """
import sys
from pathlib import Path
from registry import champions
from flows.workspace import Workspace
from registry.catalog import Subject
from registry.errors import PromotionError
from registry.ledger import Ledger
workspace = Workspace(Path(sys.argv[1]))
workspace.catalog, workspace.ledger
appended = Ledger.append
def append(*arguments):  # both have looked, neither has written
    print("ready", flush=True)
    sys.stdin.readline()
    return appended(*arguments)
Ledger.append = append
try:
    print(champions.promote(workspace, Subject.parse(sys.argv[2]), 1 if sys.argv[3] == "one" else 4, sys.argv[3]).why)
except PromotionError as error:
    print(error)
"""


def same_moment(roots: list[Path], subject: Subject) -> list[str]:
    """Promote different versions of one subject from two processes with their own locks, like two hosts; return their output."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, str(root), str(subject), name], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for root, name in zip(roots, ("one", "other"), strict=True)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0].strip() for process in processes]


def two_hosts(workspace: Workspace, subject: Subject, tmp_path: Path, database: str) -> list[Path]:
    """Create two folders that share the database and MLflow, as on two hosts."""
    roots = [tmp_path / "here", tmp_path / "there"]
    for root in roots:
        root.mkdir()
        stores = f'[stores]\ndatabase = "{database}"\nmlflow = "sqlite:///{workspace.root}/mlflow.db"\n'
        # Hosts that share a ledger sign it with one key, but each keeps its own note of what it has seen.
        shutil.copytree(workspace.root / "keys", root / "keys", ignore=shutil.ignore_patterns("ledger.seen"))
        (root / "ferry.toml").write_text(f'schema = 1\n{stores}[lines.{subject.line}]\ndata = "data"\n')
    return roots


def held_against(workspace: Workspace, subject: Subject, ledger: Ledger, told: list[str]) -> None:
    won = [text for text in told if text in ("one", "other")]
    lost = [text for text in told if text not in won]
    assert (len(won), len(lost)) == (1, 1), told
    assert f"champion at the same moment (ledger entry {ledger.entries()[-1].number}: {won[0]})" in lost[0]
    made = [e for e in ledger.entries(str(subject)) if e.kind == "promotion"]
    assert [e.why for e in made] == won
    seen = workspace.catalog.champion(subject)
    assert seen is not None
    assert seen.number == made[0].facts["version"]


def another_first(workspace: Workspace, subject: Subject, ledger: Ledger) -> None:
    """Register a version 4 which, like 1, the gate let through when there was no champion."""
    judged(workspace, ledger, subject, 4, "promote", "")
    if ledger is not workspace.ledger:
        gate(ledger, subject, 1, rules.verdict(workspace, subject, 1))


def test_promotion_that_was_overtaken_while_it_looked_is_told_by_whom(
    workspace: Workspace, subject: Subject, monkeypatch: pytest.MonkeyPatch
):
    looked = Catalog.version

    def overtaken(catalog: Catalog, of: Subject, number: int) -> Version:
        monkeypatch.setattr(Catalog, "version", looked)
        # The ledger of another host, which the file lock does not stop.
        other = Ledger(workspace.database, workspace.keys, workspace.work / "seen there")
        facts = {"version": 1, "from": None, "weights": weights(1), "gate": "promote", "decision": "", "overruled": False}
        other.append("promotion", str(of), "faster", facts, who="anna")
        other.close()
        return looked(catalog, of, number)

    monkeypatch.setattr(Catalog, "version", overtaken)
    result = ferry(workspace, "promote", str(subject), "1", "--reason", "mine")
    assert result.exit_code == 5
    assert f"anna made {subject} 1 champion at the same moment (ledger entry " in result.stderr
    assert [e.why for e in entries(workspace, subject)] == ["faster"]


@pytest.mark.slow
def test_of_two_promotions_at_the_same_moment_one_wins_and_the_other_is_told(
    workspace: Workspace, subject: Subject, tmp_path: Path
):
    another_first(workspace, subject, workspace.ledger)
    roots = two_hosts(workspace, subject, tmp_path, workspace.database)
    held_against(workspace, subject, workspace.ledger, same_moment(roots, subject))


# Aliases that somebody moved


def test_alias_set_in_mlflow_is_recorded_where_the_gate_lets_it(workspace: Workspace, subject: Subject, client: MlflowClient):
    client.set_registered_model_alias(subject.model, "champion", "1")
    result = ferry(workspace, "reconcile", "--json")
    assert result.exit_code == 0, result.output
    row = next(row for row in json.loads(result.stdout)["subjects"] if row["subject"] == str(subject))
    assert row["answer"] == "recorded"
    (entry,) = entries(workspace, subject)
    assert (entry.kind, entry.who, entry.facts["how"], entry.facts["overruled"]) == ("promotion", "unknown", "alias", False)
    assert entry.why == "because somebody unknown set the alias to version 1 in MLflow"
    client.set_registered_model_alias(subject.model, "champion", "2")
    assert [row.answer for row in reconciled(workspace, subject)] == ["recorded"]
    assert champion(workspace, subject) == 2
    client.set_registered_model_alias(subject.model, "champion", "1")  # going back works the same
    assert [row.answer for row in reconciled(workspace, subject)] == ["recorded"]
    assert [row.answer for row in reconciled(workspace, subject)] == ["agrees"]
    assert champion(workspace, subject) == 1
    assert len(entries(workspace, subject)) == 3


def test_alias_that_the_gate_refuses_is_put_back_and_the_refusal_is_kept(
    workspace: Workspace, subject: Subject, client: MlflowClient
):
    rules.promote(workspace, subject, 1, "first")
    for _ in range(2):  # the second time, nothing is added to ledger and page
        client.set_registered_model_alias(subject.model, "champion", "3")
        result = ferry(workspace, "reconcile")
        assert result.exit_code == 5
        assert (
            f"MLflow's champion of {subject} is version 1 again: somebody unknown set the alias to version 3 in MLflow"
            in result.stdout
        )
        assert champion(workspace, subject) == 1
    made, refusal = entries(workspace, subject)
    assert (made.kind, refusal.kind, refusal.who, refusal.facts["version"]) == ("promotion", "refusal", "unknown", 3)
    assert "coverage is 0.1" in refusal.why
    assert "coverage is 0.1" in client.get_model_version(subject.model, "3").tags["promotion.refused"]
    assert ferry(workspace, "reconcile").exit_code == 0


def test_alias_is_put_back_where_the_gate_changes_its_word_meanwhile(
    workspace: Workspace, subject: Subject, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rules.promote(workspace, subject, 1, "first")
    append = Ledger.append

    def overtaken(ledger: Ledger, *arguments: Any) -> Entry:
        monkeypatch.setattr(Ledger, "append", append)
        other = Ledger(workspace.database, workspace.keys, tmp_path / "seen there")
        again = rules.verdict(workspace, subject, 2)
        assert again is not None
        gate(other, subject, 2, again.model_copy(update={"outcome": "promote if reasoned"}))
        other.close()
        return append(ledger, *arguments)

    client.set_registered_model_alias(subject.model, "champion", "2")
    monkeypatch.setattr(Ledger, "append", overtaken)
    (row,) = reconciled(workspace, subject)
    assert (row.answer, champion(workspace, subject)) == ("refused", 1)
    assert "harmless and no better" in row.text


def test_alias_set_first_to_what_was_refused_is_taken_away(workspace: Workspace, subject: Subject, client: MlflowClient):
    client.set_registered_model_alias(subject.model, "champion", "3")
    assert [row.answer for row in reconciled(workspace, subject)] == ["refused"]
    assert workspace.catalog.champion(subject) is None
    assert [e.kind for e in entries(workspace, subject)] == ["refusal"]


@pytest.mark.parametrize("how", ["deleted", "its version deleted"])
def test_alias_that_is_gone_is_set_again(workspace: Workspace, subject: Subject, client: MlflowClient, how: str):
    rules.promote(workspace, subject, 1, "first")
    if how == "deleted":
        client.delete_registered_model_alias(subject.model, "champion")
    else:
        client.set_registered_model_alias(subject.model, "champion", "2")
        client.delete_model_version(subject.model, "2")
    before = entries(workspace, subject)
    (row,) = reconciled(workspace, subject)
    assert row.answer == "put back"
    assert "somebody unknown deleted the alias in MLflow; to take a champion down, use `ferry rollback`" in row.text
    assert champion(workspace, subject) == 1
    assert entries(workspace, subject) == before


def test_champion_that_was_deleted_in_mlflow_is_said_and_can_be_gone_back_from(
    workspace: Workspace, subject: Subject, client: MlflowClient
):
    rules.promote(workspace, subject, 1, "first")
    rules.promote(workspace, subject, 2, "better")
    client.delete_model_version(subject.model, "2")
    result = ferry(workspace, "reconcile")
    assert result.exit_code == 3
    assert (
        f"the ledger says {subject} 2 is champion, but it was deleted from MLflow; go back to another version with `ferry "
        "rollback" in result.stdout
    )
    assert ferry(workspace, "rollback", str(subject)).exit_code == 0
    assert champion(workspace, subject) == 1


def test_mlflow_restored_from_an_older_copy_follows_the_ledger(workspace: Workspace, subject: Subject, client: MlflowClient):
    rules.promote(workspace, subject, 1, "first")
    older = workspace.catalog.follows(subject)
    rules.promote(workspace, subject, 2, "better")
    client.set_registered_model_alias(subject.model, "champion", "1")
    workspace.catalog.follow(subject, older)
    assert [row.answer for row in reconciled(workspace, subject)] == ["put back"]
    assert champion(workspace, subject) == 2


# Approval


def waiting_version(workspace: Workspace, subject: Subject, number: int) -> None:
    assert rules.ask(workspace, subject, number, "all floors are met") is None


def test_waiting_version_is_listed_and_promoted_by_a_named_person(workspace: Workspace, approved: Subject):
    for _ in range(2):  # a schedule asks again
        waiting_version(workspace, approved, 1)
    assert champion(workspace, approved) is None
    listed = ferry(workspace, "approve")
    assert f"{approved} 1  since " in listed.stdout
    result = ferry(workspace, "approve", str(approved), "1", "--reason", "looked at the samples")
    assert result.exit_code == 0, result.output
    assert champion(workspace, approved) == 1
    asked, made = entries(workspace, approved)
    assert (asked.kind, made.kind, made.facts["how"], made.why) == ("pending", "promotion", "approval", "looked at the samples")
    assert made.who in result.stdout
    assert str(approved) not in ferry(workspace, "approve").stdout
    again = ferry(workspace, "approve", str(approved), "1", "--reason", "again")
    assert (again.exit_code, again.stdout) == (5, "")
    assert f"{approved} 1 does not wait for approval" in again.stderr


@pytest.mark.parametrize("when", ["before it was asked", "while it waits"])
def test_approval_is_of_the_weights_that_the_gate_saw(workspace: Workspace, approved: Subject, client: MlflowClient, when: str):
    # An MLflow user edits the tag, and a person approves what the tag says.
    if when == "while it waits":
        waiting_version(workspace, approved, 1)
    client.set_model_version_tag(approved.model, "1", "weights.sha256", "f" * 64)
    if when == "before it was asked":
        waiting_version(workspace, approved, 1)
    told = ferry(workspace, "approve", str(approved), "1", "--reason", "looks good")
    assert (told.exit_code, told.stdout) == (5, "")
    assert "MLflow's tag and the ledger name different weights for" in told.stderr
    (asked,) = entries(workspace, approved)
    assert (asked.kind, asked.facts["weights"]) == ("pending", weights(1))
    client.set_model_version_tag(approved.model, "1", "weights.sha256", weights(1))
    rules.approve(workspace, approved, 1, "looks good")
    assert entries(workspace, approved)[-1].facts["weights"] == weights(1)


def test_refused_version_is_remembered(workspace: Workspace, approved: Subject):
    waiting_version(workspace, approved, 1)
    result = ferry(workspace, "approve", str(approved), "1", "--refuse", "--reason", "too dark")
    assert result.exit_code == 0, result.output
    refused = rules.ask(workspace, approved, 1, "once more")
    assert refused is not None
    assert refused.why == "too dark"
    assert champion(workspace, approved) is None
    assert [e.kind for e in entries(workspace, approved)] == ["pending", "refusal"]


def test_question_about_other_weights_than_the_gate_saw_is_not_answered(workspace: Workspace, approved: Subject):
    workspace.ledger.append("pending", str(approved), "it passed", {"version": 1, "weights": weights(9)})
    with pytest.raises(PromotionError, match=rf"asks about other weights of {approved} 1 than the gate saw"):
        rules.approve(workspace, approved, 1, "looks good")
    assert [e.kind for e in entries(workspace, approved)] == ["pending"]


def test_of_two_answers_at_the_same_moment_one_counts(
    workspace: Workspace, approved: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    waiting_version(workspace, approved, 1)
    append = Ledger.append

    def overtaken(ledger: Ledger, *arguments: Any) -> Entry:
        monkeypatch.setattr(Ledger, "append", append)
        # The ledger of another host, which the file lock does not stop.
        other = Ledger(workspace.database, workspace.keys, tmp_path / "seen there")
        other.append("refusal", str(approved), "too dark", {"how": "approval", "version": 1}, who="anna")
        other.close()
        return append(ledger, *arguments)

    monkeypatch.setattr(Ledger, "append", overtaken)
    with pytest.raises(PromotionError, match="at the same moment; nothing was changed"):
        rules.approve(workspace, approved, 1, "blurred", refuse=True)
    assert [(e.kind, e.why) for e in entries(workspace, approved)][1:] == [("refusal", "too dark")]


def test_approval_asks_for_a_version_and_a_reason(workspace: Workspace, approved: Subject):
    waiting_version(workspace, approved, 1)
    for words in ((str(approved),), (str(approved), "1"), (str(approved), "1", "--reason", " ")):
        result = ferry(workspace, "approve", *words)
        assert (result.exit_code, result.stdout) == (5, "")
        assert "say which version and why" in result.stderr
    assert champion(workspace, approved) is None


def test_what_was_judged_against_an_earlier_champion_is_not_approved(workspace: Workspace, approved: Subject):
    waiting_version(workspace, approved, 2)
    with pytest.raises(PromotionError, match=r"the gate compared .* with another champion than the present one"):
        rules.approve(workspace, approved, 2, "late")
    assert champion(workspace, approved) is None


def test_alias_names_nobody_and_so_approves_nothing(workspace: Workspace, approved: Subject, client: MlflowClient):
    waiting_version(workspace, approved, 1)
    client.set_registered_model_alias(approved.model, "champion", "1")
    (row,) = reconciled(workspace, approved)
    assert row.answer == "refused"
    assert f"use `ferry approve {approved} 1`" in row.text
    assert champion(workspace, approved) is None
    rules.approve(workspace, approved, 1, "yes")  # it still waits
    assert champion(workspace, approved) == 1


# The rule by itself


@pytest.mark.parametrize(
    ("alias", "answer"),
    [
        (Alias(None, "", 0), "agrees"),
        (Alias(1, weights(1), 0), "refused"),  # the ledger never heard of it
        (Alias(1, weights(1), 4), "put back"),  # MLflow's alias follows a ledger that is gone
    ],
)
def test_alias_without_any_promotion(alias: Alias, answer: str):
    assert reconcile_alias("shapes/I/full", alias, SubjectState(), approval=False)[0] == answer


def history(*rows: tuple[str, int, dict[str, Any]]) -> list[Entry]:
    """Make entries of one subject from kind, version and further facts."""
    return [
        Entry(
            number=number, previous="0" * 64, kind=kind, subject="shapes/I/full", who="ada", when="2026-11-28T10:00:00+00:00", why="why",
            facts={"version": version, **facts},
        )
        for number, (kind, version, facts) in enumerate(rows, start=1)
    ]  # fmt: skip


def promotion(version: int, left: int | None, **facts: Any) -> tuple[str, int, dict[str, Any]]:
    return "promotion", version, {"weights": weights(version), "from": left, "overruled": False, **facts}


def seal_of(version: int, scorecard: str) -> dict[str, Any]:
    """Return the facts of a seal of version 1, whose weights are those of `version`."""
    made = Seal(
        subject="shapes/I/full", version=1, weights=weights(version), lineage="d" * 64, scorecard=scorecard, data_rev="0" * 40,
        data_md5="0" * 32 + ".dir", code="1" * 64, parent=None, teacher=None, files={},
    )  # fmt: skip
    return made.facts


def test_version_that_waits_gives_way_to_the_one_asked_about_after_it():
    assert set(subject_state(history(("pending", 2, {}), ("pending", 3, {}))).waiting) == {3}


def test_version_that_is_asked_about_again_waits_and_is_refused_no_more():
    refused = history(("pending", 2, {}), ("refusal", 2, {"how": "approval"}))
    assert (set(subject_state(refused).waiting), set(subject_state(refused).refused)) == (set(), {2})
    again = history(("pending", 2, {}), ("refusal", 2, {"how": "approval"}), ("pending", 2, {}))
    assert (set(subject_state(again).waiting), set(subject_state(again).refused)) == ({2}, set())


def test_first_seal_of_a_version_is_the_one_that_counts():
    now = subject_state(history(("gate", 1, {"seal": seal_of(1, "a" * 64)}), ("gate", 1, {"seal": seal_of(2, "b" * 64)})))
    assert now.seals[1].weights == weights(1)
    assert now.weights_of("shapes/I/full", 1) == weights(1)


def test_champion_with_other_weights_in_mlflow_is_refused():
    now = subject_state(history(promotion(1, None)))
    assert reconcile_alias("shapes/I/full", Alias(1, weights(1), 1), now, approval=False)[0] == "agrees"
    for other in (weights(2), ""):
        answer, why = reconcile_alias("shapes/I/full", Alias(1, other, 1), now, approval=False)
        assert (answer, "MLflow and the ledger name different weights" in why) == ("refused", True)


def test_promotion_against_the_gate_does_not_make_the_best_model_ever():
    first = promotion(1, None, becomes_anchor=True)
    assert subject_state(history(first, promotion(2, 1, becomes_anchor=True))).anchor == 2
    assert subject_state(history(first, promotion(2, 1, becomes_anchor=True, overruled=True))).anchor == 1


# Approval in Prefect's page


ASK = """
import sys
from pathlib import Path
from flows.approval import ask_in_prefect
from flows.workspace import Workspace
from registry.catalog import Subject
sys.exit(not ask_in_prefect(Workspace(Path(sys.argv[1])), Subject.parse(sys.argv[2]), int(sys.argv[3])))
"""


def prefect(address: str, secret: str, path: str, body: dict[str, object]) -> Any:
    """Ask Prefect's server as its page does."""
    headers = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    for _ in range(20):  # its database may be locked for longer than it waits; its page and client retry, too
        answer = httpx.post(f"{address}/api{path}", json=body, headers=headers, timeout=60)
        if answer.status_code != 503:
            break
    answer.raise_for_status()
    return answer.json() if answer.content else None


@pytest.mark.slow
def test_person_approves_in_prefects_page(tmp_path: Path):
    (tmp_path / "ferry.toml").write_text('schema = 1\n[lines.shapes]\ndata = "data/shapes"\nrequire_approval = true\n')
    create(tmp_path / "keys")
    workspace = Workspace(tmp_path)
    subject = registered(workspace, "shapes")
    waiting_version(workspace, subject, 1)
    environment = clean_environment()
    serving = subprocess.Popen([*FERRY, "-w", str(tmp_path), "serve"], stderr=subprocess.PIPE, text=True, env=environment)
    assert serving.stderr is not None
    try:
        address = ""
        while not (line := serving.stderr.readline()).startswith("retraining"):
            assert line, "it ended"
        address = line.rsplit(" ", 1)[1].strip()

        secret = (workspace.work / "prefect" / "credentials").read_text().strip()
        with_server = environment | {"PREFECT_API_URL": f"{address}/api", "PREFECT_API_AUTH_STRING": secret}

        def runs(state: str) -> list[Any]:
            found = [run for run in prefect(address, secret, "/flow_runs/filter", {}) if run["name"].startswith("approve ")]
            return [run for run in found if run["state_name"] == state]

        def asked(number: int) -> bool:  # as a retraining does; False until the deployment is there
            command = [sys.executable, "-c", ASK, str(tmp_path), str(subject), str(number)]
            return subprocess.run(command, env=with_server).returncode == 0

        wait_for(lambda: asked(1), serving)
        assert asked(1)  # and no second run
        wait_for(lambda: len(runs("Suspended")) == 1, serving)
        (run,) = runs("Suspended")
        assert run["name"] == "approve shapes/I/full version 1"
        said = {"who": "anna", "promote": True, "reason": "looked at it"}
        prefect(address, secret, f"/flow_runs/{run['id']}/resume", {"run_input": said})
        wait_for(lambda: len(runs("Completed")) == 1, serving)
        assert champion(workspace, subject) == 1
        made = entries(workspace, subject)[-1]
        assert (made.who, made.why, made.facts["how"]) == ("anna (in Prefect, unverified)", "looked at it", "approval")

        waiting_version(workspace, subject, 2)
        assert asked(2)
        wait_for(lambda: len(runs("Suspended")) == 1, serving)
        command = [*FERRY, "-w", str(tmp_path), "approve", str(subject), "2", "--refuse", "--reason", "too dark"]
        done = subprocess.run(command, env=with_server, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        wait_for(lambda: len(runs("Completed")) == 2, serving)  # it found nothing left to decide
        assert [e.kind for e in entries(workspace, subject)] == ["pending", "promotion", "pending", "refusal"]
        assert champion(workspace, subject) == 1
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=60)
        workspace.ledger.close()


# Variants of one full


def sealed_state(
    version: int | None, checkpoint: str, origin: str | None = None, teacher: bool = False, **others: Any
) -> SubjectState:
    """Make the state of a subject whose champion has this checkpoint and comes from that one."""
    if version is None:
        return SubjectState()
    seals = {n: _seal(n, *of) for n, of in {version: (checkpoint, origin, teacher), **others.get("also", {})}.items()}
    champion = Entry.model_construct(number=1, kind="promotion", facts={"version": version, "weights": checkpoint})
    return SubjectState(champion=champion, seals=seals, passed={n: seal.weights for n, seal in seals.items()})


def _seal(version: int, checkpoint: str, origin: str | None, teacher: bool) -> Seal:
    file = FileSeal(size=1, digest=checkpoint)
    return Seal(
        subject="x/I/any", version=version, weights=checkpoint, lineage="0" * 64, scorecard="0" * 64, data_rev="", data_md5="", code="",
        parent=None if teacher else origin, teacher=origin if teacher else None, files={"checkpoint/weights.safetensors": file},
    )  # fmt: skip


ONE, TWO, OLD = "1" * 64, "2" * 64, "3" * 64


def test_release_holds_variants_of_one_full():
    full = sealed_state(2, TWO)
    variants = {
        "turbo": sealed_state(1, "a" * 64, TWO, teacher=True), "full": full, "dev": sealed_state(2, TWO, TWO), "fast": sealed_state(1, ONE, ONE),
    }  # fmt: skip
    assert list(of_one_full(full, variants)) == ["turbo", "full", "dev"]  # fast comes from a full that somebody replaced
    assert list(of_one_full(full, {"dev": variants["dev"], "turbo": SubjectState()})) == ["dev"]


def test_students_of_an_older_ferry_are_not_left_out():
    full, dev = sealed_state(1, ONE), sealed_state(1, TWO, ONE, teacher=True)
    fast = sealed_state(1, OLD, TWO, teacher=True)  # dev taught it
    assert list(of_one_full(full, {"fast": fast, "dev": dev})) == ["fast", "dev"]
    unsealed = SubjectState(champion=Entry.model_construct(number=1, facts={"version": 1, "weights": "x"}))
    assert list(of_one_full(full, {"dev": unsealed})) == ["dev"]


def test_version_that_came_from_a_full_is_found_again():
    full = _seal(1, ONE, None, False)
    state = sealed_state(3, TWO, TWO, also={1: (ONE, ONE, False), 2: (OLD, ONE, True)})
    assert version_of(full, state) == 2
    assert version_of(_seal(9, "9" * 64, None, False), state) is None

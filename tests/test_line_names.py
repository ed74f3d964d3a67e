"""A line that does not exist is named by every command that takes LINE/CONFIG/VARIANT; what was taken back asks for a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from model.scorecard import Sha256
from registry.errors import PromotionError
from registry.ledger import Entry
from registry.promotion import Alias, check, reconcile_alias, subject_state

SUBJECT = "shapes/I/full"


def ferry(root: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["-w", str(root), *words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("names") / "ws"
    assert ferry(made, "init", str(made), "--line", "parts").exit_code == 0
    return made


@pytest.mark.parametrize(
    "words",
    [
        ("promote", "partz/I/full", "1"), ("promote", "partz/I/full", "1", "--reason", "x", "--overrule"), ("rollback", "partz/I/full"),
        ("approve", "partz/I/full", "1", "--reason", "x"), ("evaluate", "partz/I/full"), ("rate", "partz/I/full"), ("history", "partz/I/full"),
        ("rate", "partz/I/full", "--answers", "ferry.toml"), ("history", "partz"), ("history", "partz/edge"), ("release", "partz"), ("rollout", "status", "partz/edge"),
        ("retrain", "partz"), ("trigger", "partz", "--reason", "x"), ("remeasure", "partz", "--reason", "x"), ("tune", "partz"), ("serve", "partz"), ("report", "partz"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_line_that_does_not_exist_is_named(words: tuple[str, ...], root: Path):
    result = ferry(root, *words)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "there is no line 'partz' in ferry.toml; there is parts" in result.stderr


@pytest.mark.parametrize(
    ("name", "says"), [("parts/I/ful", "is not LINE/CONFIG/VARIANT"), ("parts/egde", "has no device class 'egde'")]
)
def test_history_of_nothing_says_so(name: str, says: str, root: Path):
    result = ferry(root, "history", name)
    assert (result.exit_code, result.stdout) == (3, "")
    assert says in result.stderr


def weights(version: int) -> Sha256:
    return f"{version:064x}"


def history(*made: tuple[int, str]) -> list[Entry]:
    """Make the entries of promotions that the gate let through, in order: version and how."""
    found: list[Entry] = []
    before = None
    for version, how in made:
        facts = {"version": version, "from": before, "weights": weights(version), "overruled": False, "how": how}
        number = len(found) + 1
        found.append(
            Entry(number=number, previous="0" * 64, kind="promotion", subject=SUBJECT, who="x", when="", why="why", facts=facts)
        )
        before = version
    return found


def test_alias_set_to_what_a_person_took_back_asks_for_a_reason():
    now = subject_state(history((1, "command"), (2, "command"), (1, "rollback")))
    answer, why = reconcile_alias(SUBJECT, Alias(2, weights(2), now.number), now, approval=False)
    assert answer == "refused"
    assert f"somebody went back from {SUBJECT} 2, so it becomes champion again only for a reason" in why
    assert f"`ferry promote {SUBJECT} 2 --reason ...`" in why
    with pytest.raises(PromotionError, match="only for a reason"):
        check(SUBJECT, 2, weights(2), now)
    check(SUBJECT, 2, weights(2), now, "the fault was the lamp")


def test_alias_set_to_an_earlier_champion_is_recorded_as_before():
    now = subject_state(history((1, "command"), (2, "command")))
    assert reconcile_alias(SUBJECT, Alias(1, weights(1), now.number), now, approval=False)[0] == "recorded"
    again = subject_state(history((1, "command"), (2, "command"), (1, "rollback"), (2, "command"), (3, "command")))
    assert not again.was_taken_back(weights(2))
    assert reconcile_alias(SUBJECT, Alias(2, weights(2), again.number), again, approval=False)[0] == "recorded"

"""Settings of one retraining that differ from ferry.toml: another seed, another number of steps, or a budget for the update.

The ledger records each, with the reason. So a later retraining knows that a champion with another seed was wanted, and does not
train it again with the seed of ferry.toml.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from flows.errors import FlowError, VariantError, WorkspaceError
from flows.settings import SIZED, Line
from flows.sizes import Size
from model import versions
from model.config import canonical_sha256
from model.errors import ModelError
from model.folder import shown
from model.scorecard import Frozen
from registry.errors import RegistryError

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from registry.ledger import Entry


class Overrides(Frozen):
    """What one retraining does otherwise than ferry.toml says; null: as ferry.toml says."""

    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=10_000_000)
    update_budget: Size | None = None

    @property
    def given(self) -> dict[str, int]:
        """Return the keys that differ from ferry.toml."""
        return self.model_dump(exclude_none=True)

    @property
    def trainings(self) -> dict[str, int]:
        """Return those of them that make another model of the same data; a budget only limits its update."""
        return self.model_dump(exclude_none=True, include={"seed", "steps"})

    def of(self, line: Line) -> Line:
        """Return a line's settings with these values: a budget for its update, the others in all of its trainings.

        Raises:
            WorkspaceError: the line's method makes no update of a chosen size.
        """
        ways: dict[str, Any] = {}
        if self.trainings:
            names = ("training", "retraining", "distillation")
            ways = {name: getattr(line, name).model_copy(update=self.trainings) for name in names}
        if self.update_budget is not None:
            if line.update_method not in SIZED:
                raise WorkspaceError(
                    f"--update-budget needs a method whose size can be chosen, and this line has {line.update_method or 'no update_method'}; "
                    'write update_method = "lowrank" into ferry.toml, or leave the budget out'
                )
            ways["update_budget"] = self.update_budget
        return line.model_copy(update=ways) if ways else line


def apply(workspace: Workspace, line: str, overrides: Overrides) -> None:
    """Let an open workspace use these values for a line; ferry.toml stays as it is."""
    workspace.overrides = overrides
    lines = workspace.settings.lines | {line: overrides.of(workspace.line(line))}
    workspace.settings = workspace.settings.model_copy(update={"lines": lines})


def current(workspace: Workspace, line: str) -> list[Line]:
    """List the settings with which a champion counts as up to date.

    A retraining with overrides wants exactly its own. Without overrides, what the ledger records as wanted counts, too.
    """
    settings = workspace.line(line)
    if workspace.overrides.trainings:
        return [settings]
    return [settings, *(wanted.of(settings) for wanted in recorded(workspace.ledger.entries(line)))]


def recorded(entries: list[Entry]) -> list[Overrides]:
    """List the overrides that the ledger's entries on a line record, each once."""
    found = (  # a budget is no part of what is wanted: it limits one update
        Overrides(seed=e.facts.get("seed"), steps=e.facts.get("steps"))
        for e in entries
        if e.kind == "trigger" and ({"seed", "steps"} & e.facts.keys())
    )
    return [*dict.fromkeys(found)]


def parse(seed: int | None, steps: int | None, update_budget: int | str | None = None) -> Overrides:
    """Check what a person gave.

    Raises:
        WorkspaceError: a value is not possible.
    """
    try:
        return Overrides.model_validate({"seed": seed, "steps": steps, "update_budget": update_budget})
    except ValidationError as error:
        first = error.errors()[0]
        option, given = first["loc"][0], first["input"]
        if option == "update_budget":
            raise WorkspaceError(f"--update-budget: {first['msg']}") from error
        most = "0 to 9223372036854775807" if option == "seed" else "1 to 10000000"
        raise WorkspaceError(f"--{option} cannot be {given}; write a number from {most}") from error


def revisions(workspace: Workspace, line: str, data: str) -> list[str]:
    """List the data revisions that `--data` names, in the order in which they are retrained.

    Args:
        workspace: workspace of the line.
        line: whose data.
        data: a Git revision, A..B for each change after A up to B, or A.. up to the present one; empty: the present one.

    Raises:
        RevisionError: there is no such revision, or no change between them.
        WorkspaceError: it is written otherwise.
    """
    folder = workspace.line(line).data
    if ".." not in data:
        versions.resolve(workspace.root, folder, line, data or "HEAD")
        return [data or "HEAD"]
    first, _, last = data.partition("..")
    if not first or ".." in last or last.startswith("."):
        raise WorkspaceError(
            f"--data cannot be '{shown(data)}'; write A..B, where B is a later revision than A, or A.. up to the present one"
        )
    return [version.rev for version in versions.between(workspace.root, folder, line, first, last or "HEAD")]


def each(
    workspace: Workspace, line: str, revs: list[str], wanted: Overrides, run: Callable[[str], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Retrain on data revisions one after another; the first that fails ends it, and the error says how to go on.

    Args:
        workspace: workspace of the line.
        line: whose models.
        revs: the revisions, in order.
        wanted: what differs from ferry.toml, which is recorded before each.
        run: retrains on a revision, and returns one `Retrained`, as plain data, for each model.

    Raises:
        VariantError: it failed at one of several revisions; `rows` has what was done before.
    """
    rows: list[dict[str, Any]] = []
    for place, rev in enumerate(revs):
        if wanted.given:
            said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in wanted.given.items())
            found = versions.resolve(workspace.root, workspace.line(line).data, line, rev).rev
            record(workspace, line, wanted, found, f"retrained by hand with {said}")
        if len(revs) == 1:
            return run(rev)
        sys.stderr.write(f"ferry: data revision {rev[:12]}, {place + 1} of {len(revs)}\n")
        try:
            rows += run(rev)
        except Exception as error:
            rows += error.rows if isinstance(error, VariantError) else []
            if not place or not isinstance(error, (FlowError, ModelError, RegistryError)):
                raise
            cause = error.__cause__ if isinstance(error, VariantError) and error.__cause__ else error
            raise VariantError(
                f"data revision {rev[:12]} ({place + 1} of {len(revs)}) failed: {error}; go on with "
                f"--data {revs[place - 1][:12]}..{revs[-1][:12]}",
                rows,
            ) from cause
    return rows


def record(workspace: Workspace, line: str, overrides: Overrides, rev: str, reason: str) -> None:
    """Record the overrides of a retraining that a person starts, unless the ledger has them for this data revision."""
    facts = {"data": rev, "how": "command", **overrides.given}
    with workspace.locked("records"):
        if not any(e.kind == "trigger" and e.facts == facts for e in workspace.ledger.entries(line)):
            workspace.ledger.append("trigger", line, reason, facts)


def seed_of(line: str, event: str, round_: int = 0) -> int:
    """Compute the seed of an event's retraining: it depends on the event alone, so a run that is tried again has the same."""
    return int(canonical_sha256([line, event, round_])[:8], 16) >> 1

"""Budgets of updates: what an update costs a device besides the weights, and whether a budget leaves room for any.

A budget counts everything that a device fetches for an update: signed metadata, the manifest, the golden outputs and tables of all
variants that its class runs, and the weights of `full`. Variants that draw with the weights of `full`, and students that are carried
over unchanged, add no weights to speak of.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from flows.clone import is_clone
from flows.errors import BudgetError
from flows.sizes import written
from flows.steps import champion_files
from flows.workspace import Workspace
from model.config import ConfigurationName
from ota import golden
from registry.champions import champion_of
from registry.curve import LEAST, smallest_budget
from registry.seal import FACTORS

NEW_EACH_TIME = ("golden.npz", "reference.json", "sampler.json")  # files of a variant that hardly any delta makes smaller
HEADER = 1500  # bytes of a delta's header
CARRIED_OVER = 60  # bytes of an overlay that did not change, at most
MANIFEST = 3000  # bytes of a manifest and policy, where none was published yet
METADATA = 17_000  # bytes of signed metadata that a clone assumes, which has no repository


def fixed_bytes(workspace: Workspace, line: str, configuration: ConfigurationName) -> int:
    """Estimate what a device fetches for an update besides the weights, for the class of a configuration where that is most.

    Args:
        workspace: the workspace.
        line: whose update.
        configuration: of the class.
    """
    classes = {name: c for name, c in workspace.line(line).classes.items() if c.configuration == configuration}
    return HEADER + max(_of_class(workspace, line, name) for name in classes)


def _of_class(workspace: Workspace, line: str, device_class: str) -> int:
    total = METADATA if is_clone(workspace.root) else workspace.repository.metadata_bytes(line, device_class)
    total += _manifest(workspace, line, device_class)
    for subject in workspace.class_subjects(line, device_class):
        champion = champion_of(workspace, subject)
        if champion:
            bundle = champion_files(workspace, champion).bundle
            total += sum(_packed(bundle / name) for name in NEW_EACH_TIME) + CARRIED_OVER
    return total


def _manifest(workspace: Workspace, line: str, device_class: str) -> int:
    """Return the bytes of the newest manifest and of the policy; typical ones if nothing was published yet."""
    releases = [] if is_clone(workspace.root) else workspace.repository.releases(line, device_class)
    if not releases:
        return MANIFEST
    policy = workspace.repository.policy(line, device_class)
    newest = len(workspace.repository.manifest(releases[-1]).canonical())
    return newest + (len(policy.canonical()) if policy else 0)


def _packed(path: Path) -> int:
    data = path.read_bytes()
    return len(zlib.compress(golden.sampled(data) if path.name == "golden.npz" else data, 9))


def room(budget: int, fixed: int) -> int:
    """Return the bytes that a budget leaves for weights.

    Raises:
        BudgetError: that is less than any update takes.
    """
    left = budget - fixed
    if left < LEAST:
        raise BudgetError(
            f"the budget of {written(budget)} is too small: an update costs about {fixed:,} bytes before any weights (signed metadata, "
            f"golden outputs, tables); give at least {written(smallest_budget(fixed))} (nothing was trained)"
        )
    return left


def check(workspace: Workspace, line: str) -> list[str]:
    """Check a line's budget before anything is trained.

    Returns:
        what a person should know of it, in sentences.

    Raises:
        BudgetError: it is smaller than what an update costs without any weights.
    """
    settings, said = workspace.line(line), []
    budget = settings.update_budget
    if budget is None:
        return []
    for configuration in settings.ladders():
        subject = next(s for s in workspace.subjects([line]) if (s.configuration, s.variant) == (configuration, "full"))
        champion = champion_of(workspace, subject)
        if champion is None:
            said.append(f"{subject} has no champion yet, so its first version is fetched in full and the budget does not count")
            continue
        room(budget, fixed_bytes(workspace, line, configuration))
        whole = sum(fact.size for name, fact in champion.part("bundle").items() if name != FACTORS)
        if budget >= whole:
            said.append(f"the budget of {written(budget)} is no limit: the full bundle of {subject} has {whole:,} bytes")
    return said

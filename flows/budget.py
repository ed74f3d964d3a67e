"""Budgets of updates: what an update costs a device besides the weights, and whether a budget leaves room for any.

A budget counts everything that a device fetches for an update: signed metadata, the manifest, the golden outputs and tables of all
variants that its class runs, with or without a champion, and the weights of `full`. Variants that draw with the weights of `full`, and students that are carried
over unchanged, add no weights. A student that is taught anew takes the room that these leave; see `flows.fitting.student_update`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from flows.clone import is_clone
from flows.errors import BudgetError
from flows.sizes import written
from flows.steps import champion_files
from flows.workspace import Workspace
from model.config import ConfigurationName, VariantName
from ota import packed
from ota.delta import files
from ota.errors import OperatorError
from ota.manifest import Origin
from ota.release import bundle, compatibility
from registry.catalog import Subject
from registry.champions import champion_of
from registry.curve import LEAST, smallest_budget
from registry.seal import FACTORS, Seal

POLICY = 400  # bytes of a policy, where none was published yet
METADATA = 17_000  # bytes of signed metadata that a clone assumes, which has no repository


def fixed_bytes(workspace: Workspace, line: str, configuration: ConfigurationName) -> int:
    """Estimate what a device fetches for an update besides the weights, for the class of a configuration where that is most.

    Args:
        workspace: the workspace.
        line: whose update.
        configuration: of the class.
    """
    classes = {name: c for name, c in workspace.line(line).classes.items() if c.configuration == configuration}
    return max(_of_class(workspace, line, name) for name in classes)


def _of_class(workspace: Workspace, line: str, device_class: str) -> int:
    """Build the bundle of the class's variants, and encode a delta from it in which no weight moves.

    Before the class or `full` has a champion, this is the signed metadata alone. No update is made then, and no budget counts: a first
    version is fetched as a whole.
    """
    settings = workspace.device_class(line, device_class)
    cloned = is_clone(workspace.root)
    total = METADATA if cloned else workspace.repository.metadata_bytes(line, device_class)
    found = _champions(workspace, line, device_class)
    if not found:
        return total
    first = next(seal for seal, _ in found.values())
    captions = [row.caption for row in workspace.catalog.card(first).captions]
    devices = {} if cloned else workspace.fleet.devices()
    agent = settings.oldest_agent or compatibility.oldest_agent(line, device_class, devices)
    with tempfile.TemporaryDirectory() as folder:
        exports = _exports(workspace, line, device_class, found, Path(folder))
        added = [exports[variant] / bundle.FILE_NAMES["sampler"] for variant in exports if variant not in found]
        assembled = partial(
            bundle.assemble, exports, line=line, device_class=device_class, tier=workspace.line(line).tier,
            configuration=settings.configuration, precision=settings.precision, origin=_origin(first), out=Path(folder) / "bundle",
            captions=captions,
        )  # fmt: skip
        try:
            made = assembled(oldest_agent=agent)
        except OperatorError:  # those agents cannot have all of these variants, which the release says
            made = assembled()
        besides = bundle.bytes_besides_weights(made, workspace.line(line).delta_form(settings.configuration))
        besides += sum(len(packed.pack(table.read_bytes())) for table in added)  # devices have no table to make it from
    policy = None if cloned else workspace.repository.rolled_out(line, device_class)
    small = [made.manifest.canonical(), policy.canonical() if policy else bytes(POLICY)]
    packs = not cloned and workspace.repository.role_of("models", line, device_class) != "models"
    return total + besides + sum(len(packed.pack(file)) if packs and policy else len(file) for file in small)


def _champions(workspace: Workspace, line: str, device_class: str) -> dict[VariantName, tuple[Seal, Path]]:
    """Return the class's champions that make one bundle, with their exported files, by variant; if there are none, that of `full`."""
    subjects = workspace.class_subjects(line, device_class)
    found = _exported(workspace, subjects) or _exported(workspace, [subjects[0].model_copy(update={"variant": "full"})])
    graphs = {variant: (folder / "graph.onnx").read_bytes() for variant, (_, folder) in found.items()}
    return {variant: pair for variant, pair in found.items() if graphs[variant] == next(iter(graphs.values()))}


def _exported(workspace: Workspace, subjects: Iterable[Subject]) -> dict[VariantName, tuple[Seal, Path]]:
    found = [(subject.variant, champion_of(workspace, subject)) for subject in subjects]
    return {variant: (champion, champion_files(workspace, champion).bundle) for variant, champion in found if champion}


def _exports(
    workspace: Workspace, line: str, device_class: str, found: dict[VariantName, tuple[Seal, Path]], scratch: Path
) -> dict[VariantName, Path]:
    """Return the files of all variants of a class; those of one that has no champion yet are made from those of another.

    Its table and reference are files of their own. So are the weights and golden outputs of one that may be a student: whatever they
    will be, the bundle and the delta need rows for them.
    """
    exports: dict[VariantName, Path] = {}
    like = next(folder for _, folder in found.values())
    for number, subject in enumerate(workspace.class_subjects(line, device_class), 1):
        if subject.variant in found:
            exports[subject.variant] = found[subject.variant][1]
            continue
        exports[subject.variant] = out = Path(shutil.copytree(like, scratch / subject.variant))
        for role in ("sampler", "reference"):
            (out / bundle.FILE_NAMES[role]).write_bytes((like / bundle.FILE_NAMES[role]).read_bytes() + b"\n" * number)
        if len(exports) > 1 and "student" in workspace.line(line).sources(subject.variant):
            golden = out / bundle.FILE_NAMES["golden"]
            with np.load(golden) as arrays:
                outputs = dict(arrays)
            np.savez(golden, **outputs | {"seeds": outputs["seeds"] + number})
            path = out / bundle.FILE_NAMES["weights"]
            smallest = min(files.tensors(path, out / bundle.FILE_NAMES["graph"]), key=lambda tensor: tensor.length)
            weights = bytearray(path.read_bytes())
            weights[smallest.offset] ^= number
            path.write_bytes(weights)
    return exports


def _origin(seal: Seal) -> Origin:
    """Make the origin of a bundle that is only measured; the entry of a promotion is as long as any hash."""
    return Origin(
        data_rev=seal.data_rev, data_md5=seal.data_md5, code=seal.code, lineage=seal.lineage, scorecard=seal.scorecard,
        decision=seal.weights, model=Subject.parse(seal.subject).model, version=seal.version,
    )  # fmt: skip


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

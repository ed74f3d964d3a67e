"""Gather all that has a hash, and the devices, from Git, the registry, the repository and the fleet, for `registry.trace`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from flows.workspace import Workspace
from model import versions
from model.errors import DataError, RevisionError
from model.scorecard import DataVersion
from registry import trace
from registry.catalog import Subject
from registry.descent import Descent, Revision, descent, later_holders, revision_called
from registry.errors import CatalogError
from registry.trace import Thing


def gather(workspace: Workspace) -> Iterator[Thing]:
    """Yield everything in a workspace that has a hash, and its devices."""
    for name, line in workspace.settings.lines.items():
        for version, message in versions.log(workspace.root, line.data, name):
            yield _data(version, message)
        for subject in workspace.subjects([name]):
            yield from trace.versions(workspace, subject)
        for device_class in line.classes:
            yield from _published(workspace, name, device_class)
    yield from _left_over(workspace)
    yield from trace.decisions(workspace.ledger.entries())
    for device, last in workspace.fleet.devices().items():
        runs = [last.active] if last and last.active else []
        yield Thing("device", device, {}, {"last": last.event if last else "silent"}, runs)


def _published(workspace: Workspace, line: str, device_class: str) -> Iterator[Thing]:
    for release in workspace.repository.releases(line, device_class):
        manifest = workspace.repository.manifest(release)
        # The manifest names the scorecard of this variant only. The other variants are found by the weights that they compute with.
        first = manifest.origin.model.rpartition("-")[2]
        others = dict.fromkeys(manifest.weights_sha256(variant) for variant in manifest.variants if variant != first)
        yield Thing(
            "bundle", f"{line}/{device_class} release {release.seq}", {"manifest": release.manifest}, {"bytes": release.full_bytes},
            [manifest.origin.scorecard, *others, manifest.origin.decision],
            [e.sha256 for e in manifest.files if e.role not in ("weights", "graph")],
        )  # fmt: skip
    for delta in workspace.repository.deltas(line, device_class):
        yield Thing("delta", f"{delta.base[:12]} to {delta.target[:12]}", {}, {"bytes": delta.size}, [delta.target, delta.base])


def forward(workspace: Workspace, text: str) -> Descent:
    """Find everything that descends from a data revision.

    Args:
        workspace: the workspace.
        text: the revision: the beginning of its hash or md5, or any name that Git has for it.

    Raises:
        CatalogError: no line has this revision, or several have.
        RevisionError: Git cannot read the repository.
    """
    things = list(gather(workspace))
    of = revision_called(things, text) or _named(workspace, things, text)
    line = of.name.partition(" ")[0]
    places = [i for i, t in enumerate(things) if t.kind == "data" and t.name.partition(" ")[0] == line]
    last = max(n for n, i in enumerate(places) if things[i] is of)
    kept = {version.rev: version for version, _ in versions.log(workspace.root, workspace.line(line).data, line)}
    history = [Revision(things[i], _files(workspace, kept[things[i].hashes["revision"]])) for i in places[: last + 2]]
    holders, unknown = later_holders(history, of)
    return descent(things, of, {places[n]: why for n, why in holders.items()}, unknown)


def _named(workspace: Workspace, things: list[Thing], text: str) -> Thing:
    """Find the data revision that Git calls so, in the only line that has it."""
    found: list[DataVersion] = []
    for name, line in workspace.settings.lines.items():
        with suppress(RevisionError):
            found.append(versions.resolve(workspace.root, line.data, name, text))
    if len(found) != 1:
        several = ", ".join(f"{version.line} {version.rev[:12]}" for version in found)
        why = (
            f"is a revision of several lines ({several}); give the hash"
            if found
            else "is no data revision; `ferry data log LINE` lists them"
        )
        raise CatalogError(f"{text!r} {why}")
    return next(t for t in things if t.kind == "data" and t.hashes["revision"] == found[0].rev)


def _files(workspace: Workspace, version: DataVersion) -> frozenset[str] | None:
    """Return the md5s of a revision's images; None: the list cannot be read."""
    try:
        return frozenset(md5 for name, md5 in versions.files(workspace.root, version).items() if name != "metadata.jsonl")
    except DataError:
        return None


def _data(version: DataVersion, message: str) -> Thing:
    hashes = {"revision": version.rev, "md5": version.md5}
    return Thing("data", f"{version.line} {version.rev[:12]}", hashes, {"files": version.files, "said": message})


def _left_over(workspace: Workspace) -> Iterator[Thing]:
    """Yield the versions of models that ferry.toml does not name any more; devices may still run them."""
    present = {str(subject) for subject in workspace.subjects()}
    for text in sorted({entry.subject for entry in workspace.ledger.entries() if entry.kind in ("gate", "seal")} - present):
        yield from trace.versions(workspace, Subject.parse(text))

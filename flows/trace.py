"""Gather all that has a hash, and the devices, from Git, the registry, the repository and the fleet, for `registry.trace`."""

from __future__ import annotations

from collections.abc import Iterator

from flows.workspace import Workspace
from model import versions
from registry import trace
from registry.trace import Thing


def gather(workspace: Workspace) -> Iterator[Thing]:
    """Yield everything in a workspace that has a hash, and its devices."""
    for name, line in workspace.settings.lines.items():
        for version, message in versions.log(workspace.root, line.data, name):
            yield Thing(
                "data", f"{name} {version.rev[:12]}", {"revision": version.rev, "md5": version.md5},
                {"files": version.files, "said": message},
            )  # fmt: skip
        for subject in workspace.subjects([name]):
            yield from trace.versions(workspace, subject)
        for device_class in line.classes:
            yield from _published(workspace, name, device_class)
    yield from trace.decisions(workspace.ledger.entries())
    for device, last in workspace.fleet.devices().items():
        runs = [last.active] if last and last.active else []
        yield Thing("device", device, {}, {"last": last.event if last else "silent"}, runs)


def _published(workspace: Workspace, line: str, device_class: str) -> Iterator[Thing]:
    for release in workspace.repository.releases(line, device_class):
        manifest = workspace.repository.manifest(release)
        # The manifest names the scorecard of this variant only. The other variants are found by their weights.
        first = manifest.origin.model.rpartition("-")[2]
        yield Thing(
            "bundle", f"{line}/{device_class} release {release.seq}", {"manifest": release.manifest}, {"bytes": release.full_bytes},
            [
                manifest.origin.scorecard, *(e.sha256 for e in manifest.files if e.role == "weights" and e.variant != first),
                manifest.origin.decision,
            ],
            [e.sha256 for e in manifest.files if e.role not in ("weights", "graph")],
        )  # fmt: skip
    for delta in workspace.repository.deltas(line, device_class):
        yield Thing("delta", f"{delta.base[:12]} to {delta.target[:12]}", {}, {"bytes": delta.size}, [delta.target, delta.base])

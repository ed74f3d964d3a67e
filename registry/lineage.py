"""Tags that lead from a run back to everything that its version was made of, so that MLflow can search for it.

The facts come from the checkpoint's lineage, the scorecard and the decision, each with its hash, and from the environment in
which they were recorded. The names of the tags do not change: a search written today finds next year's runs. The run has all of
them. Its version has the few that a person reads there, or that ferry searches versions by.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions, version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import onnx

from model import git
from model.errors import OwnerError, RevisionError
from model.scorecard import DataVersion, Lineage, Scorecard
from registry.selection import Decision

ON_VERSION = (
    "data.rev", "data.md5", "gate.outcome", "gate.n", "parent.version", "teacher.version", "training.seconds", "adopted.from",  # for people
    "checkpoint.sha256", "scorecard.sha256", "weights.sha256",  # read back by registry.registration and registry.catalog
)  # fmt: skip
WEIGHTS = "weights.safetensors"  # file name in a checkpoint; not imported from `model.train`, because that needs torch


def data_tags(data: DataVersion, repository: str) -> dict[str, str]:
    """Return the tags of a data revision."""
    return {
        "data.repo": repository, "data.line": data.line, "data.rev": data.rev, "data.path": data.path, "data.md5": data.md5,
        "data.files": str(data.files),
    }  # fmt: skip


def tags_on_version(tags: Mapping[str, str]) -> dict[str, str]:
    """Choose the tags of a run that its version has, too."""
    return {name: tags[name] for name in ON_VERSION if name in tags}


def version_tags(
    lineage: Lineage, card: Scorecard, decision: Decision, checkpoint: Path, export: Path, curve: list[dict[str, float]]
) -> dict[str, str]:
    """Return the tags of a version's run, without those of its data revision.

    Args:
        lineage: of the checkpoint.
        card: of the exported model.
        decision: the gate's decision.
        checkpoint: folder of the checkpoint.
        export: folder of the exported files.
        curve: of the training; `seconds` of its last row is the training time.
    """
    spaces = {f"evaluation.space.{q.space}": q.space_sha256 for q in card.quality}
    trained = {"training.seconds": f"{curve[-1]['seconds']:.1f}"} if curve and "seconds" in curve[-1] else {}
    taught = {"teacher.sha256": lineage.teacher} if lineage.teacher else {}
    adopted = {"adopted.from": lineage.adopted.source, "adopted.sha256": lineage.adopted.file_sha256} if lineage.adopted else {}
    return {
        "data.items": str(lineage.items), "code.sha256": lineage.code, **code_tags(),
        "environment.sha256": hashlib.sha256(environment().encode()).hexdigest(), "python": platform.python_version(),
        "torch": lineage.torch, "onnxruntime": version("onnxruntime"), "onnx.opset": str(_opset(export / "graph.onnx")),
        "onnx.sha256": file_sha256(export / "graph.onnx"), "configuration": card.configuration, "variant": card.variant, "tier": card.tier,
        "config.sha256": lineage.config.sha256, "training.sha256": lineage.training_sha256, "seed": str(lineage.seed),
        "training.steps": str(lineage.steps), **trained, "hardware": lineage.hardware, "parent.sha256": lineage.parent or "",
        **taught, **adopted, "lineage.sha256": lineage.sha256, "checkpoint.sha256": file_sha256(checkpoint / WEIGHTS),
        "weights.sha256": card.weights_sha256, "scorecard.sha256": card.sha256, **spaces, "evaluation.n": str(max((q.n for q in card.quality), default=0)),
        "evaluation.seed": str(card.seed), "gate.outcome": decision.outcome, "gate.reason": shortened(decision.reason), "gate.n": str(decision.n),
        "gate.decision": decision.sha256, "gate.champion": decision.champion or "",
    }  # fmt: skip


def shortened(reason: str, most: int = 2000) -> str:
    """Cut a reason that is too long for a page; a bad model can fail a hundred checks, and decision.json has them all."""
    return reason if len(reason) <= most else f"{reason[:most]} … (the rest is in decision.json)"


@cache
def environment() -> str:
    """List the installed distributions as in a lock file: one line `name==version` each, sorted."""
    named = [(str(d.metadata["Name"] or ""), d.version) for d in distributions()]  # a broken distribution has no name
    found = {f"{name.lower().replace('_', '-')}=={number}" for name, number in named if name}
    return "".join(f"{line}\n" for line in sorted(found))


@cache
def code_tags() -> Mapping[str, str]:
    """Return the Git commit of this program, and whether its files differ from it; empty if it is not run from its repository."""
    here = Path(__file__)
    try:
        # Fails for a program that was installed below some other repository, whose commit would be the wrong one.
        git.run(here.parent, "ls-files", "--error-unmatch", here.name, around=True)
        changed = git.run(here.parent.parent, "status", "--porcelain", "--untracked-files=no", around=True)
        commit = git.run(here.parent, "rev-parse", "HEAD", around=True)
    except (OwnerError, RevisionError):
        return {}
    return {"code.rev": commit, "code.dirty": str(bool(changed)).lower()}


def repository_of(workspace: Path) -> str:
    """Return the Git repository of a workspace's data: the URL of its remote `origin` without credentials, or its path."""
    try:
        remote = git.run(workspace, "config", "--get", "remote.origin.url")
    except RevisionError:
        return str(workspace)
    parts = urlsplit(remote)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.scheme else remote


def _opset(graph: Path) -> int:
    imports = onnx.load(str(graph), load_external_data=False).opset_import
    return next(int(o.version) for o in imports if not o.domain)


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

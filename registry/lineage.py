"""What leads back from a version to everything that it was made of, as tags that MLflow can search.

The facts are those of the checkpoint's lineage, of the scorecard and of the decision, each by hash, and the environment in which
they were recorded. Names are constant: a search written today finds next year's versions.
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
from model.errors import RevisionError
from model.scorecard import DataVersion, Lineage, Scorecard
from registry.selection import Decision

WEIGHTS = "weights.safetensors"  # of a checkpoint; named in `model.train`, which needs torch


def data_tags(data: DataVersion, repository: str) -> dict[str, str]:
    """Of a data revision."""
    return {
        "data.repo": repository, "data.line": data.line, "data.rev": data.rev, "data.path": data.path, "data.md5": data.md5,
        "data.files": str(data.files),
    }  # fmt: skip


def version_tags(
    lineage: Lineage, card: Scorecard, decision: Decision, checkpoint: Path, export: Path, curve: list[dict[str, float]]
) -> dict[str, str]:
    """Of a version, without its data's.

    Args:
        lineage: of the checkpoint.
        card: of the exported model.
        decision: the gate's.
        checkpoint: its folder.
        export: folder of the exported files.
        curve: of the training; `seconds` of its last row is how long that took.
    """
    spaces = {f"evaluation.space.{q.space}": q.space_sha256 for q in card.quality}
    trained = {"training.seconds": f"{curve[-1]['seconds']:.1f}"} if curve and "seconds" in curve[-1] else {}
    taught = {"teacher.sha256": lineage.teacher} if lineage.teacher else {}
    return {
        "data.items": str(lineage.items), "code.sha256": lineage.code, **code_tags(),
        "environment.sha256": hashlib.sha256(environment().encode()).hexdigest(), "python": platform.python_version(),
        "torch": lineage.torch, "onnxruntime": version("onnxruntime"), "onnx.opset": str(_opset(export / "graph.onnx")),
        "onnx.sha256": file_sha256(export / "graph.onnx"), "configuration": card.configuration, "variant": card.variant, "tier": card.tier,
        "config.sha256": lineage.config.sha256, "training.sha256": lineage.training_sha256, "seed": str(lineage.seed),
        "training.steps": str(lineage.steps), **trained, "hardware": lineage.hardware, "parent.sha256": lineage.parent or "",
        **taught, "lineage.sha256": lineage.sha256, "checkpoint.sha256": file_sha256(checkpoint / WEIGHTS),
        "weights.sha256": card.weights_sha256, "scorecard.sha256": card.sha256, **spaces, "evaluation.n": str(max((q.n for q in card.quality), default=0)),
        "evaluation.seed": str(card.seed), "gate.outcome": decision.outcome, "gate.reason": shortened(decision.reason), "gate.n": str(decision.n),
        "gate.decision": decision.sha256, "gate.champion": decision.champion or "",
    }  # fmt: skip


def shortened(reason: str, most: int = 2000) -> str:
    """Cut a reason that is too long for a page; a bad model fails in a hundred ways, and decision.json has them all."""
    return reason if len(reason) <= most else f"{reason[:most]} … (the rest is in decision.json)"


@cache
def environment() -> str:
    """The installed distributions, as a lock file has them: a line `name==version` each, sorted."""
    named = [(str(d.metadata["Name"] or ""), d.version) for d in distributions()]  # a broken one has no name
    found = {f"{name.lower().replace('_', '-')}=={number}" for name, number in named if name}
    return "".join(f"{line}\n" for line in sorted(found))


@cache
def code_tags() -> Mapping[str, str]:
    """Git commit of this program, and whether its files differ from it; nothing where it is not run out of its repository."""
    here = Path(__file__)
    try:
        # Installed somewhere below another repository, it is not ours.
        git.run(here.parent, "ls-files", "--error-unmatch", here.name, around=True)
        changed = git.run(here.parent.parent, "status", "--porcelain", "--untracked-files=no", around=True)
        commit = git.run(here.parent, "rev-parse", "HEAD", around=True)
    except RevisionError:
        return {}
    return {"code.rev": commit, "code.dirty": str(bool(changed)).lower()}


def repository_of(workspace: Path) -> str:
    """The Git repository of a workspace's data: the URL of its remote `origin` without credentials, or its own path."""
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
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

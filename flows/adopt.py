"""The flow `adopt`: take weights that were trained elsewhere into a line, as a retraining takes those that it has trained.

They become a checkpoint, are exported, evaluated on the line's present data, judged by the gate and registered; a first version
must reach the floors, a later one must hold against the champion. The line's other variants are made from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.artifacts import create_table_artifact

from flows import lifeline, lost, pages, progress, running
from flows.errors import VariantError
from flows.retrain import retrain_ladder
from flows.steps import pull_data
from flows.training_log import retraining_key
from flows.workspace import Workspace
from model import adopt as weights
from model import train, versions
from model.config import ConfigurationName, canonical_sha256
from model.scorecard import DataVersion
from registry import runs
from registry.catalog import Subject
from registry.champions import champion_of, judged, promotions, reconcile, seals
from registry.runs import Retrained


@flow(
    name="adopt", flow_run_name="adopt weights for {line}", validate_parameters=True, persist_result=False,
    description="Judge and register weights that were trained elsewhere, and promote them if they pass the gate.",
)  # fmt: skip
def adopt(
    root: str, line: str, configuration: ConfigurationName, file: str, source: str, promote_winners: bool = True
) -> list[dict[str, Any]]:
    """Judge, register and perhaps promote weights that were trained elsewhere, and the variants that are made from them.

    Args:
        root: the workspace.
        line: whose model they become.
        configuration: which of its configurations.
        file: safetensors, or the folder of a checkpoint that ferry wrote.
        source: where they come from, in words.
        promote_winners: False registers only; a person promotes with `ferry promote`.

    Returns:
        one `Retrained`, as plain data, for each variant; as from `flows.retrain.retrain`. "unchanged": these weights were judged on
        these data before.

    Raises:
        CheckpointError: the file cannot be adopted; nothing is registered.
    """
    workspace = Workspace(Path(root))
    settings = workspace.line(line)
    lifeline.end_with_ferry()
    with lost.held(workspace, str(runtime.flow_run.id)), pages.progress(), running.noted(workspace.work, "retraining", line):
        reconcile(workspace, workspace.subjects([line]), workspace.needs_approval)
        found = weights.look(Path(file))
        config, stored = settings.config(configuration), settings.precision(configuration)
        weights.check_tensors(found, config)
        data = versions.resolve(workspace.root, settings.data, line)
        key = canonical_sha256(["adopted", found.sha256, source, config.sha256, data.md5, stored, train.code_sha256()])[:32]
        progress.say(f"adopt {source} for {line}")
        checkpoint = weights.adopt(found, config, data, stored, source, workspace.work / "runs" / key)
        subject = Subject(line=line, configuration=configuration, variant="full")
        if known := _known(workspace, subject, checkpoint, data, promote_winners):
            return [known.model_dump()]
        pull_data(workspace, data)
        variants = settings.ladders()[configuration]
        with runs.ending(workspace.catalog, data, retraining_key(workspace, data)) as tell:
            ladder = retrain_ladder.fn(workspace, data, configuration, variants, len(variants), promote_winners, checkpoint)
            rows = [row.model_dump() for row in ladder.rows]
            create_table_artifact(
                table=rows, key=pages.key_of(f"results {line}"), description=f"What came of adopting {source} for {line}"
            )
            if ladder.failures and rows[0]["outcome"] == "failed":
                raise ladder.failures[0]
            if ladder.failures:
                raise VariantError(f"the weights were adopted, but not all variants could be made: {ladder.failures[0]}", rows)
            tell(rows)
    return rows


def _known(
    workspace: Workspace, subject: Subject, checkpoint: Path, data: DataVersion, promote_winners: bool
) -> Retrained | None:
    """Find the version that has these weights and was judged on these data; None: there is none, or it is not done with.

    The champion is not done with before its variants are made, nor a version before it is promoted: a call may have been killed.
    """
    digest, said, champion = (
        train.load_checkpoint(checkpoint).weights_sha256,
        judged(workspace, subject),
        champion_of(workspace, subject),
    )
    once = {e.facts["version"] for e in promotions(workspace, subject)}
    for seal in reversed(seals(workspace, subject)):
        if (seal.checkpoint, seal.data_md5) != (digest, data.md5):
            continue
        outcome = said[seal.version].facts["outcome"]
        waits = promote_winners and outcome == "promote" and seal.version not in once
        if waits or (champion and champion.version == seal.version):
            return None
        why = f"version {seal.version} has these weights, and the gate's answer was: {outcome}"
        return Retrained(
            subject=str(subject), data_rev=data.rev, version=seal.version, outcome="unchanged", reason=why, n=0, promoted=False
        )
    return None

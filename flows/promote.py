"""Make a version champion: the ledger first, MLflow's alias second, then look whether both say the same."""

from __future__ import annotations

from flows.workspace import Workspace
from registry.catalog import Subject
from registry.errors import PromotionError, StoreError
from registry.ledger import Entry


def promote(workspace: Workspace, subject: Subject, number: int, reason: str, overrule: bool = False) -> Entry:
    """Point `champion` at a version and record why.

    A version that was champion before may always be gone back to. Any other must have passed the gate against the present
    champion, unless the gate is overruled, which is recorded as such.

    Raises:
        CatalogError: there is no such version.
        PromotionError: the gate did not let it through, or judged it against another champion.
        StoreError: MLflow or the database failed; the ledger holds what was decided, so repeat the command.
    """
    version = workspace.catalog.version(subject, number)
    current = workspace.catalog.champion(subject)
    before = [e.facts["version"] for e in workspace.ledger.entries(str(subject)) if e.kind == "promotion"]
    if not overrule and number not in before:
        if version.outcome != "promote":
            raise PromotionError(
                f"the gate answered {version.outcome!r} for {subject} {number}: {version.tags['gate.reason']}; to promote it all "
                "the same, add --overrule and a --reason that will be recorded"
            )
        judged, present = version.tags["gate.champion"], current.weights_sha256 if current else ""
        if judged != present:
            raise PromotionError(
                f"{subject} {number} was judged against another champion than the present one; run `ferry retrain` again, or "
                "add --overrule and a --reason"
            )
    entry = workspace.ledger.append(
        "promotion", str(subject), reason,
        {
            "version": number, "from": current.number if current else None, "weights": version.weights_sha256,
            "gate": version.outcome, "decision": version.tags["gate.decision"], "overruled": overrule,
        },
    )  # fmt: skip
    workspace.catalog.promote(subject, number)
    seen = workspace.catalog.champion(subject)
    if seen is None or seen.number != number:
        raise StoreError(
            f"MLflow's alias of {subject} was changed at the same moment; the ledger says {number}, repeat the command"
        )
    return entry

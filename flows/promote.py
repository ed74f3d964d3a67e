"""Make a version champion, and say who is: the ledger first, MLflow's alias second, and both must say the same."""

from __future__ import annotations

from flows.workspace import Workspace
from model.config import VariantName
from registry.catalog import Subject, Version
from registry.errors import CatalogError, LedgerError, PromotionError, StoreError
from registry.ledger import Entry


def champions(workspace: Workspace, line: str, device_class: str) -> dict[VariantName, Version]:
    """The champions that a device class runs, by variant.

    Raises:
        CatalogError: a variant has none, or MLflow's alias is not what the ledger says.
    """
    settings = workspace.device_class(line, device_class)
    found: dict[VariantName, Version] = {}
    for variant in settings.variants:
        subject = Subject(line=line, configuration=settings.configuration, variant=variant)
        champion = workspace.catalog.champion(subject)
        if champion is None:
            raise CatalogError(f"{subject} has no champion to release; run `ferry retrain {line}`, or `ferry promote`")
        made = promotions(workspace, subject)
        if not made or made[-1].facts["version"] != champion.number:
            raise CatalogError(
                f"MLflow says {subject} {champion.number} is champion, the ledger does not; run `ferry promote {subject} VERSION "
                "--reason ...` with the version that is meant"
            )
        found[variant] = champion
    return found


def promotions(workspace: Workspace, subject: Subject, overruled: bool = True) -> list[Entry]:
    """Who was made champion, in order; with `overruled` false without those that the gate had not let through."""
    entries = (e for e in workspace.ledger.entries(str(subject)) if e.kind == "promotion")
    return [e for e in entries if overruled or not e.facts["overruled"]]


def check_ledger(workspace: Workspace) -> None:
    """Hold the ledger against the heads that were signed into releases.

    Raises:
        LedgerError: entries that were there when a release was signed are gone.
    """
    for line, settings in workspace.settings.lines.items():
        for device_class in settings.classes:
            for release in workspace.repository.releases(line, device_class):
                if not workspace.ledger.holds(release.ledger):
                    raise LedgerError(
                        f"the ledger lacks what {line}/{device_class} release {release.seq} was signed with: entries were cut off; "
                        "restore the database"
                    )


def promote(workspace: Workspace, subject: Subject, number: int, reason: str, overrule: bool = False) -> Entry:
    """Point `champion` at a version and record why.

    A version that became champion through the gate may always be gone back to. Any other must have passed the gate against the present
    champion, unless the gate is overruled, which is recorded as such.

    Raises:
        CatalogError: there is no such version.
        PromotionError: the gate did not let it through, or judged it against another champion.
        StoreError: MLflow or the database failed; the ledger holds what was decided, so repeat the command.
        BusyError: another process is recording something.
    """
    with workspace.locked("records"):
        return _promote(workspace, subject, number, reason, overrule)


def _promote(workspace: Workspace, subject: Subject, number: int, reason: str, overrule: bool) -> Entry:
    version = workspace.catalog.version(subject, number)
    current = workspace.catalog.champion(subject)
    before = [e.facts["version"] for e in promotions(workspace, subject, overruled=False)]
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

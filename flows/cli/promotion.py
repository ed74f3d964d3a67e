"""`ferry promote`, `rollback`, `approve`, `reconcile` and `history`."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors, subject_in
from ota.errors import printable

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from registry.ledger import Entry

SubjectName = Annotated[str, typer.Argument(metavar="SUBJECT", help="LINE/CONFIG/VARIANT, such as surfaces/I/full.")]


def promote(
    subject: SubjectName,
    version: Annotated[int, typer.Argument(min=1, help="Version in MLflow.")],
    reason: Annotated[
        str,
        typer.Option(show_default=False, help="Reason; recorded in the ledger. Required if the gate found no gain in quality."),
    ] = "",
    overrule: Annotated[
        bool, typer.Option("--overrule", help="Promote it although the gate did not pass it; needs a reason.")
    ] = False,
    accept_worse: Annotated[
        bool,
        typer.Option("--accept-worse", help="Promote it although it is worse, by less than the margin; needs a reason."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a version the champion.

    Adds an entry to the ledger and moves MLflow's alias. If two people promote at the same moment, one succeeds and the other gets an
    error.
    """
    with reported_errors():
        workspace = open_workspace()
        from registry.champions import promote as make_champion
        from registry.champions import promotions

        chosen = subject_in(workspace, subject)
        known = {made.number for made in promotions(workspace, chosen)}
        entry = make_champion(workspace, chosen, version, reason, overrule, accept_worse)
        said = "is champion already, nothing was recorded" if entry.number in known else "is champion"
        answer(
            as_json,
            _plain(entry),
            f"{subject} version {version} {said} (ledger entry {entry.number}); {_next(workspace, subject)}",
        )


def rollback(
    subject: SubjectName,
    to: Annotated[
        int | None,
        typer.Option("--to", min=1, show_default=False, help="Version to return to; the previous champion by default."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Reason; recorded in the ledger.")] = "rolled back by hand",
    as_json: Json = False,
) -> None:
    """Roll back to an earlier champion that passed the gate.

    Devices follow after `ferry release`. Each call goes one champion further back.
    """
    with reported_errors():
        workspace = open_workspace()
        from registry.champions import rollback as take_back

        entry = take_back(workspace, subject_in(workspace, subject), reason, to)
        answer(
            as_json, _plain(entry),
            f"{subject} version {entry.facts['version']} is champion again, in place of {entry.facts['from']} (ledger entry {entry.number}); "
            f"{_next(workspace, subject)}",
        )  # fmt: skip


def approve(
    subject: Annotated[
        str, typer.Argument(metavar="[SUBJECT]", help="LINE/CONFIG/VARIANT; without it, all waiting versions are listed.")
    ] = "",
    version: Annotated[int | None, typer.Argument(min=1, metavar="[VERSION]", help="Version in MLflow.")] = None,
    reason: Annotated[str, typer.Option(help="Reason; recorded in the ledger.")] = "",
    refuse: Annotated[bool, typer.Option("--refuse", help="Refuse it; it is not asked about again.")] = False,
    as_json: Json = False,
) -> None:
    """Approve or refuse a version that waits for a person.

    Versions wait if ferry.toml says require_approval = true. Your user name is recorded.
    """
    with reported_errors():
        workspace = open_workspace()
        from registry import champions as rules
        from registry.errors import PromotionError

        if not subject:
            entries = rules.waiting(workspace, workspace.subjects())
            lines = [f"{e.subject} {e.facts['version']}  since {e.when[:16]}  {printable(e.why)}" for e in entries]
            answer(as_json, {"waiting": [_plain(e) for e in entries]}, "\n".join(lines) or "nothing waits for approval")
            return
        chosen = subject_in(workspace, subject)
        if version is None or not reason.strip():
            raise PromotionError(
                f"say which version and why: `ferry approve {subject} VERSION --reason ...`; nothing was changed"
            )
        entry = rules.approve(workspace, chosen, version, reason, refuse)
        if os.environ.get("PREFECT_API_URL"):
            from flows.approval import close

            close(workspace, entry, not refuse)
        said = "is refused" if refuse else "is champion"
        after = "" if refuse else f"; {_next(workspace, subject)}"
        answer(as_json, _plain(entry), f"{subject} version {version} {said} (ledger entry {entry.number}, by {entry.who}){after}")


def reconcile(as_json: Json = False) -> None:
    """Bring MLflow's champion aliases in line with the ledger.

    An alias set by hand in MLflow is treated as a promotion request: it is recorded if the version passed the gate, and otherwise put
    back. `ferry serve` does this all the time.
    """
    with reported_errors():
        workspace = open_workspace()
        from registry.champions import reconcile

        rows = reconcile(workspace, workspace.subjects(), workspace.needs_approval)
        differed = [printable(row.text) for row in rows if row.answer != "agrees"]
        text = "\n".join(differed) or f"MLflow's aliases are as the ledger says ({len(rows)} looked at)"
        answer(as_json, {"subjects": [row.model_dump() for row in rows]}, text)
        if any(row.answer == "lost" for row in rows):
            raise typer.Exit(3)
        if any(row.answer == "refused" for row in rows):
            raise typer.Exit(5)


def seal(as_json: Json = False) -> None:
    """Record the hashes of versions from an older ferry.

    It hashes the files that MLflow has now and says what confirms them. Only sealed versions are trained from, compared with and
    released. New versions are sealed automatically.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.policies import released
        from ota.manifest import MAX_WEIGHTS
        from registry import sealing

        rows = sealing.seal(workspace, workspace.subjects(), MAX_WEIGHTS, partial(released, workspace))
        answer(as_json, {"versions": [row.model_dump() for row in rows]}, sealing.text_of(rows))
        if any(row.problem for row in rows):
            raise typer.Exit(6)


def history(
    subject: Annotated[str, typer.Argument(help="Only this model, such as surfaces/I/full.")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Report what was checked instead of listing decisions.")] = False,
    as_json: Json = False,
) -> None:
    """Check the ledger and list its decisions."""
    with reported_errors():
        workspace = open_workspace()
        from flows.policies import check_ledger
        from flows.workspace import line_and_class
        from registry.ledger import START
        from registry.promotion import about, kind_of

        if subject.count("/") > 1:
            subject_in(workspace, subject)
        elif subject:
            line_and_class(subject, workspace) if "/" in subject else workspace.line(subject)
        entries = workspace.ledger.entries(subject or None)
        signed = check_ledger(workspace)
        if not verify:
            lines = [
                printable(f"{e.number:4d}  {e.when[:16]}  {e.who:10.10}  {kind_of(e):9}  {about(e)}: {e.why}", limit=1_000_000)
                for e in entries
            ]
            answer(
                as_json,
                {"entries": [e.model_dump(mode="json") for e in entries]},
                "\n".join(lines) or "nothing was decided yet; `ferry retrain LINE` makes the first decision",
            )
            return
        hashes = workspace.ledger.hashes()
        head, covered, unsigned = hashes[-1] if hashes else START, max(signed.values(), default=0), workspace.ledger.unsigned
        overruled = [e.number for e in workspace.ledger.entries() if kind_of(e) == "overrule"]
        own = max(0, len(hashes) - unsigned)
        before = (
            f"; the {unsigned} before, of a ferry that did not sign, are covered by the {'first' if own else 'next'}"
            if unsigned
            else ""
        )
        text = (
            f"{len(hashes)} entries form one chain; its head is {head}\n"
            f"{own} of them are signed by the ledger's key{before}\n"
            f"none is missing that this workspace has seen\n"
            f"{len(signed)} releases were signed with a head that is there, the latest with entry {covered}\n"
            f"{len(overruled)} promotions overruled the gate{': entries ' if overruled else ''}{', '.join(map(str, overruled))}"
        )
        answer(
            as_json,
            {
                "checked": len(hashes),
                "head": head,
                "signed": signed,
                "covered": covered,
                "unsigned": unsigned,
                "overruled": overruled,
            },
            text,
        )


def _plain(entry: Entry) -> dict[str, Any]:
    return entry.model_dump(mode="json") | {"sha256": entry.sha256}


def _next(workspace: Workspace, subject: str) -> str:
    """Say how the champion gets to devices; an error in the repository is only named, because the promotion is done."""
    from flows import policies
    from ota.errors import OtaError

    line, configuration, variant = subject.split("/")
    try:
        return policies.after_promotion(workspace, line, configuration, variant)
    except OtaError as error:
        return f"publish it with `ferry release {line}`, once this is mended: {error}"

"""`ferry data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.shared import Json, Options, answer, open_workspace, reported_errors, showing_progress
from flows.cli.unusable import lines_of
from model.folder import shown
from ota.wording import counted

if TYPE_CHECKING:
    from model.data_report import Balance, Changes, DataReport, Drift, Listed
    from model.revisions import Difference, Status

SHOWN = 5  # names on a line; --json has them all
NEW_DATA = "new data"  # message of a revision that nobody wrote a message for

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Data revisions: DVC keeps the bytes, Git the hashes.")


@data_app.command("add")
def data_add(
    line: Annotated[str, typer.Argument(help="Line whose data folder is recorded.")],
    message: Annotated[str, typer.Option("--message", "-m", help="Message of the revision.")] = NEW_DATA,
    as_json: Json = False,
) -> None:
    """Check a line's data folder and record it as a new revision.

    It reports unusable files, duplicates, held-out images that leak into training, captions with few images, and drift since the last
    revision. Unusable files are recorded but never trained on. The report is kept in Git, for `ferry data status`.
    """
    with reported_errors():
        from model import revisions, versions

        workspace = open_workspace()
        before = versions.log(workspace.root, workspace.line(line).data, line, newest=1)
        with showing_progress():
            version, report = revisions.add(workspace.line_data(line), message)
        recorded = [made.rev for made, _ in before] != [version.rev]
        for text in (*lines_of(report.quarantine), *_too_few(line, report)):
            typer.echo(text, err=True)
        if not recorded and message != NEW_DATA:
            typer.echo(
                f"nothing has changed since {version.rev[:12]}, so there is no new revision, and your message is not recorded; that "
                f"revision says: {before[0][1]}",
                err=True,
            )
        usable = report.training + report.held_out
        bad = _unusable(report)
        answer(
            as_json,
            version.model_dump() | {
                "recorded": recorded, "usable": usable, "held_out": report.held_out, "unusable": report.quarantine, "arrival": report.model_dump(mode="json"),
            },
            "\n".join([f"{line} is {'' if recorded else 'still '}at {version.rev[:12]}: {usable} usable images, {report.held_out} of them held out{bad}", *_findings(report)]),
        )  # fmt: skip


@data_app.command("status")
def data_status(line: Annotated[str, typer.Argument(help="Line whose data folder is checked.")], as_json: Json = False) -> None:
    """Show changes since the last revision, and the data report.

    It also checks that the remote holds every file.
    """
    with reported_errors():
        from model import revisions

        workspace = open_workspace()
        with showing_progress():
            status = revisions.status(workspace.line_data(line))
        answer(as_json, status.model_dump(mode="json"), "\n".join(_status(line, status)))


@data_app.command("check")
def data_check(
    what: Annotated[str, typer.Argument(metavar="LINE|FOLDER", help="Line whose data folder is checked, or any folder.")],
    line: Annotated[
        str, typer.Option(help="Line whose caption length a FOLDER is checked for; by default the only line.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """Check a data folder as `data add` does, and record nothing.

    Exit code 3 if a file cannot be used. A FOLDER need not be in a workspace; it is not compared with any revision.
    """
    with reported_errors():
        from flows.errors import WorkspaceError
        from flows.progress import advance
        from flows.settings import SETTINGS, Line
        from model import revisions

        try:
            workspace = open_workspace()
            lines = workspace.settings.lines
        except WorkspaceError:
            if line or (Options.workspace / SETTINGS).exists() or not Path(what).is_dir():
                raise
            lines = {}
        named = line or (what if what in lines else next(iter(lines)) if len(lines) == 1 else "")
        with showing_progress():
            if what in lines and not line:
                report = revisions.check(workspace.line_data(what))
            else:
                length = workspace.line(named).text_length if named else int(Line.model_fields["text_length"].default)
                report = revisions.check_folder(Path(what), length, advance)
        usable = report.training + report.held_out
        text = [f"{what}: {usable} usable images, {report.held_out} of them held out{_unusable(report)}; nothing is recorded"]
        answer(
            as_json,
            {
                "recorded": False, "usable": usable, "held_out": report.held_out, "unusable": report.quarantine,
                "arrival": report.model_dump(mode="json"),
            },
            "\n".join([*text, *lines_of(report.quarantine), *(_too_few(named, report) if named else ()), *_findings(report)]),
        )  # fmt: skip
        if report.quarantine:
            raise typer.Exit(3)


@data_app.command("pull")
def data_pull(line: Annotated[str, typer.Argument(help="Line whose data are fetched.")], as_json: Json = False) -> None:
    """Fetch a line's current revision into its data folder.

    Use it in a Git clone of a workspace, and after `git pull`. The bytes come from the DVC remote, and every byte is verified. Data
    that no revision has are never replaced.
    """
    with reported_errors():
        from model import clone

        workspace = open_workspace()
        data = workspace.line_data(line)
        with workspace.locked("data"), showing_progress():
            version = clone.deliver(data, lambda said: typer.echo(said, err=True))
        answer(
            as_json, version.model_dump(),
            f"{data.folder} holds revision {version.rev[:12]} of {line}: {counted(version.files, 'file')}, {version.bytes:,} bytes",
        )  # fmt: skip


@data_app.command("diff")
def data_diff(
    line: Annotated[str, typer.Argument(help="Line whose revisions are compared.")],
    rev1: Annotated[str, typer.Argument(help="Earlier revision: a commit, tag or branch.")],
    rev2: Annotated[str, typer.Argument(help="Later revision.")] = "HEAD",
    as_json: Json = False,
) -> None:
    """Compare two data revisions: files, captions, balance, drift."""
    with reported_errors():
        from model import revisions

        workspace = open_workspace()
        with showing_progress():
            difference = revisions.diff(workspace.line_data(line), rev1, rev2)
        answer(as_json, difference.model_dump(mode="json"), "\n".join(_difference(difference)))


@data_app.command("log")
def data_log(line: Annotated[str, typer.Argument(help="Line whose revisions are listed.")], as_json: Json = False) -> None:
    """List a line's data revisions with their drift, newest first."""
    with reported_errors():
        from model import revisions, versions

        workspace = open_workspace()
        rows = versions.log(workspace.root, workspace.line(line).data, line)
        found = [revisions.recorded(workspace.root, version) for version, _ in rows]
        drifts = [report.drift if report else None for report in found]
        answer(
            as_json,
            {
                "revisions": [
                    v.model_dump() | {"message": m, "drift": d.model_dump(mode="json") if d else None}
                    for (v, m), d in zip(rows, drifts, strict=True)
                ]
            },
            "\n".join(
                f"{v.rev[:12]}  {v.files:6d} files  {v.bytes:>12,} bytes  {_short(d):24}  {shown(m)}"
                for (v, m), d in zip(rows, drifts, strict=True)
            )
            or f"{line} has no revision yet; record one with `ferry data add {line}`",
        )  # fmt: skip


def _short(drift: Drift | None) -> str:
    if drift is None:
        return "-"
    tested = [p for p in (drift.p_images, drift.p_captions) if p is not None]
    return f"{drift.verdict}{f', p = {min(tested):.3f}' if tested else ''}"


def _told(what: str, names: list[str], n: int) -> list[str]:
    """Summarise names in one line: their number and the first of them; return no line if there are none."""
    return [shown(f"{what} ({n}): {', '.join(names[:SHOWN])}{' …' if n > SHOWN else ''}")] if n else []


def _listed(what: str, listed: Listed) -> list[str]:
    return _told(what, [" = ".join(row) for row in listed.first], listed.n)


def _unusable(report: DataReport) -> str:
    return f", {counted(len(report.quarantine), 'file')} that cannot be used" if report.quarantine else ""


def _too_few(line: str, report: DataReport) -> list[str]:
    """Say that fewer images are held out than the line's gate wants, if so."""
    wanted = open_workspace().line(line).gate.minimum_images
    if report.held_out >= wanted:
        return []
    return [
        (
            f"only {report.held_out} images are held out for evaluation, but the gate of {line} wants {wanted}: "
            "add more images (or groups), or lower gate.minimum_images in ferry.toml, which makes decisions less certain"
        )
    ]


def _findings(report: DataReport) -> list[str]:
    """List what a person should know of a report, one line each: duplicates and leaks if there are any, balance, drift."""
    duplicates = report.duplicates
    return [
        *([report.dark] if report.dark else []),
        *_listed("the same image several times", duplicates.copies),
        *_listed("the same image with different captions", duplicates.contradictions),
        *_listed("nearly the same image", duplicates.near),
        *_listed(
            "held-out images that are also in training, because two files show the same; give both the same group",
            duplicates.leaks,
        ),
        *_balance(report.balance),
        *([f"{report.drift.verdict}: {report.drift.reason}"] if report.drift else []),
    ]


def _balance(balance: Balance) -> list[str]:
    return [
        f"{counted(balance.captions, 'caption')}, evenness {balance.evenness:.2f}",
        *_listed("new captions", balance.new),
        *_listed("captions that are gone", balance.gone),
        *_listed("captions with too few held-out images to judge them by", balance.thin),
    ]


def _changes(changes: Changes) -> list[str]:
    captions = [f"{name} ({before} → {after})" for name, before, after in changes.recaptioned]
    return [
        *_told("added", changes.added, len(changes.added)),
        *_told("changed", changes.changed, len(changes.changed)),
        *_told("removed", changes.removed, len(changes.removed)),
        *_told("with another caption", captions, len(captions)),
    ]


def _status(line: str, status: Status) -> list[str]:
    revision, report = status.revision, status.arrival
    if revision is None:
        lines = [f"{line} has no revision yet; record one with `ferry data add {line}`"]
    elif status.dirty:
        lines = [f"{line} holds changes since {revision.rev[:12]}; record them with `ferry data add {line}`"]
    else:
        lines = [f"{line} is at {revision.rev[:12]}, unchanged"]
    lines += _changes(status.changes)
    if lacks := status.remote_lacks:
        (told,) = _told("the remote lacks", lacks, len(lacks))
        lines.append(f"{told}; `ferry data add {line}` sends {'it' if len(lacks) == 1 else 'them'}")
    elif revision:
        lines.append(status.remote_error or "the remote holds all of it")
    lines.append(f"{report.training + report.held_out} usable images, {report.held_out} of them held out")
    lines += [f"quarantined: {text}" for text in lines_of(report.quarantine)]
    return lines + _findings(report)


def _difference(difference: Difference) -> list[str]:
    counted = [f"{caption} ({before} → {after})" for caption, (before, after) in difference.captions.items()]
    return [
        f"{difference.before.rev[:12]} → {difference.after.rev[:12]}",
        *(_changes(difference.changes) or ["the same files"]),
        *_balance(difference.balance),
        *_told("captions with more or fewer images", counted, len(counted)),
        f"{difference.drift.verdict}: {difference.drift.reason}",
    ]

"""`ferry fleet`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.shared import Json, answer, fail, open_workspace, reported_errors, showing_progress, time_of
from ota.errors import printable

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from ota.fleet.store import LastState

fleet_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Devices and their reports.")
token_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tokens of programs that ask the gateway.")
fleet_app.add_typer(token_app, name="token")
LONGEST = 366 * 86_400  # seconds that a token may be valid
ARCHIVE_DAYS = 90
Device = Annotated[str, typer.Argument(help="ID of the device.")]
Valid = Annotated[
    int,
    typer.Option("--for", parser=time_of(60, LONGEST), metavar="TIME", help="How long the token is valid, such as 12h or 7d."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="File for the token, which only its owner can read; by default, the token is printed.", show_default=False),
]
Where = Annotated[
    str,
    typer.Option(
        show_default=False,
        metavar="QUERY",
        help="Conditions with blanks between them: site=berlin (a tag), line=, class=, event=, bundle=, state=, release=17, "
        "agent<0.3.0, silent>2d, silent=ever.",
    ),
]


@fleet_app.command("enroll")
def fleet_enroll(
    device: Device,
    public_key: Annotated[str, typer.Argument(help="Public key that `ferry-agent init` printed.")],
    as_json: Json = False,
) -> None:
    """Accept a device's reports, and let it count in decisions."""
    with reported_errors():
        open_workspace().fleet.enroll(device, public_key)
        answer(as_json, {"device": device}, f"{device} is enrolled")


@fleet_app.command("invite")
def fleet_invite(
    device: Device,
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")],
    valid: Valid = "7d",  # type: ignore[assignment]
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Make a token with which a device enrols itself once.

    The token is for this id, line and class alone. A new one makes an earlier unused one void. The device counts in decisions after
    `ferry fleet confirm`.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        _check_token_file(workspace, out)
        token = workspace.fleet.invite(device, line, device_class, valid)
        _tell_token(as_json, token, out, valid, f"on {device}, run `ferry-agent enroll --token-file FILE`", device=device)


@fleet_app.command("confirm")
def fleet_confirm(
    devices: Annotated[list[str], typer.Argument(metavar="DEVICE...", help="IDs of the devices.")], as_json: Json = False
) -> None:
    """Let devices that enrolled themselves count in decisions."""
    with reported_errors():
        fleet = open_workspace().fleet
        for device in devices:
            fleet.confirm(device)
        answer(as_json, {"devices": devices}, "\n".join(f"{device} counts" for device in devices))


@fleet_app.command("preauthorize")
def fleet_preauthorize(
    file: Annotated[Path, typer.Argument(help="CSV file with the columns device,public_key,line,class and, if wanted, tags.")],
    as_json: Json = False,
) -> None:
    """Enrol the devices of a list: all of them, or none.

    Tags are written as `site=berlin hall=2`. A device that is enrolled with the same values stays as it is.
    """
    with reported_errors():
        workspace = open_workspace()
        from ota.fleet import table

        with file.open("rb") as opened:
            data = opened.read(table.MOST_BYTES + 1)
        rows = table.newcomers(data, {name: [*line.classes] for name, line in workspace.settings.lines.items()})
        fresh = workspace.fleet.preauthorize(rows)
        answer(as_json, {"devices": len(rows), "new": fresh}, f"{fresh} devices are enrolled, {len(rows) - fresh} were before")


@fleet_app.command("retire")
def fleet_retire(device: Device, as_json: Json = False) -> None:
    """Take a device out of use for good.

    Its reports are refused from now on, and it counts in no decision. The reports that are kept stay. Its id cannot be used again.
    """
    with reported_errors():
        open_workspace().fleet.retire(device)
        answer(as_json, {"device": device}, f"{device} is retired; its reports are refused from now on")


@fleet_app.command("rekey")
def fleet_rekey(
    device: Device,
    public_key: Annotated[
        str | None, typer.Argument(help="Its new public key, as `ferry-agent init` printed it.", show_default=False)
    ] = None,
    invite: Annotated[bool, typer.Option("--invite", help="Make a token, with which the device gives its key itself.")] = False,
    valid: Valid = "7d",  # type: ignore[assignment]
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Give a device another key.

    This is for a device whose disk was replaced, for example. The former key is refused from then on. The reports that it signed before stay and can still be verified. With --invite, the
    device counts again after `ferry fleet confirm`.
    """
    with reported_errors():
        if (public_key is None) != invite:
            fail("give either the new public key or --invite", 2)
        workspace = open_workspace()
        if public_key is not None:
            workspace.fleet.rekey(device, public_key)
            answer(as_json, {"device": device}, f"{device} has a new key; the former one is refused from now on")
            return
        _check_token_file(workspace, out)
        token = workspace.fleet.invite(device, "", "", valid, replaces=True)
        _tell_token(as_json, token, out, valid, f"on {device}, run `ferry-agent enroll --token-file FILE`", device=device)


@fleet_app.command("tag")
def fleet_tag(
    device: Device,
    tags: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Tags such as site=berlin; NAME= removes one.")],
    as_json: Json = False,
) -> None:
    """Set tags of a device, such as site=berlin.

    `ferry fleet list --where` finds it by them. They win over the tags that the device's owner gave.
    """
    with reported_errors():
        from ota.fleet import table

        removed = {tag[:-1]: "" for tag in tags if tag.endswith("=")}
        given = table.parse_tags(tag for tag in tags if not tag.endswith("="))
        made = open_workspace().fleet.tag(device, removed | given)
        told = ", ".join(f"{name}={value}" for name, value in made.items())
        answer(as_json, {"device": device, "tags": made}, f"{device} has the tags {told}" if told else f"{device} has no tags")


@fleet_app.command("list")
def fleet_list(where: Where = "", as_json: Json = False) -> None:
    """List devices that meet conditions.

    For example: `--where 'site=berlin silent>2d'`. Retired devices are left out, unless a condition names their state.
    """
    with reported_errors():
        found, releases = _chosen(open_workspace(), where)
        from flows.status import age
        from ota.fleet.query import state_of

        now, rows = int(time.time()), []
        for state in found:
            heard = f"{age(now - state.heard_at)} ago" if state.heard_at is not None else "never"
            place = f"{state.line or state.enrolled_line or '-'}/{state.device_class or state.enrolled_class or '-'}"
            release = releases.get(state.active or "") or (state.active or "-")[:8]
            tags = " ".join(f"{name}={value}" for name, value in sorted(state.tags.items()))
            standing = state_of(state)
            named = "" if standing == "counts" else f"({standing}) "
            rows.append(f"{state.device:20}  {heard:12}  {place:24}  {release!s:8}  {named}{tags}".rstrip())
        value = {"devices": [{"device": s.device, "state": state_of(s), "heard_at": s.heard_at, "tags": s.tags} for s in found]}
        answer(as_json, value, "\n".join(rows) or "no device meets that")


@fleet_app.command("export")
def fleet_export(
    csv: Annotated[
        Path | None, typer.Option("--csv", help="File for the table; by default, it is printed.", show_default=False)
    ] = None,
    where: Where = "",
    as_json: Json = False,
) -> None:
    """Write devices as a table for spreadsheets (CSV).

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    with reported_errors():
        workspace = open_workspace()
        from ota import output
        from ota.fleet import table

        if csv is not None:
            output.check_chosen(csv, workspace.root / "devices.csv", records=workspace.records)
        found, releases = _chosen(workspace, where)
        text = "".join(table.export(found, releases))
        if csv is None:
            answer(as_json, {"devices": len(found), "csv": text}, text.rstrip("\n"))
            return
        with output.fresh(csv) as file:
            file.write(text.encode())
        answer(as_json, {"devices": len(found), "file": str(csv)}, f"{csv}: {len(found)} devices")


@fleet_app.command("status")
def fleet_status(
    every: Annotated[bool, typer.Option("--all", help="Show every device, however many there are.")] = False,
    as_json: Json = False,
) -> None:
    """Receive reports; show each device's last one.

    A line shows its release and wave, too. What needs attention and counts by class and release come last. Of more than 50 devices, those that need attention are shown. Times
    are the factory's, in UTC.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.cli.status import fleet_text, refused_tokens
        from flows.status import devices

        standing, rejected = devices(workspace)
        for name, why in rejected.items():
            typer.echo(printable(f"{name}: {why}"), err=True)
        tokens = refused_tokens(workspace.fleet.invites(), int(time.time()))
        text = "\n".join([fleet_text(standing, every), *tokens]) if standing else _NOBODY
        if not as_json:
            answer(False, {}, text)
            return
        last = workspace.fleet.heard()
        told = {
            d.device: (known.report.model_dump() if (known := last.get(d.device)) else {}) | {"standing": d.model_dump(mode="json")}
            if d.heard else None
            for d in standing
        }  # fmt: skip
        answer(True, {"devices": told, "rejected": rejected, "refused_tokens": tokens}, text)


_NOBODY = (
    "no device is enrolled; `ferry fleet enroll DEVICE KEY` adds one, with the key that `ferry-agent init` prints, and `ferry fleet invite` "
    "lets one enrol itself"
)


@fleet_app.command("ingest")
def fleet_ingest(
    url: Annotated[str, typer.Argument(help="Folder, file://... (such as a stick) or s3://bucket/prefix with reports.")],
    as_json: Json = False,
) -> None:
    """Receive the reports of a folder, a stick or a bucket.

    Accepted reports are removed there once they are kept; rejected ones move to rejected/. What cannot be moved stays and is named.
    Reports that came more than 90 days ago are archived, as by `ferry fleet archive`.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.ingest import ingest
        from ota.fleet.archive import archive

        with showing_progress():
            found = ingest(workspace, url)
            archive(workspace.fleet, workspace.archive, int(time.time()) - ARCHIVE_DAYS * 86_400)
        for name, why in found.rejected.items():
            typer.echo(printable(f"{name}: {why}"), err=True)
        count = len(found.accepted)
        value = {"accepted": count, "rejected": found.rejected}
        answer(as_json, value, f"{count} reports are accepted, {len(found.rejected)} are not")


@fleet_app.command("archive")
def fleet_archive(
    days: Annotated[int, typer.Option(min=1, max=36_500, help="Reports that came longer ago are archived.")] = ARCHIVE_DAYS,
    as_json: Json = False,
) -> None:
    """Move old reports from the database to files.

    They are compressed and in the workspace's reports-archive/. Each report stays as the device signed it. The last report, heartbeat and event of each device stay in the database.
    """
    with reported_errors():
        workspace = open_workspace()
        from ota.fleet.archive import archive

        with showing_progress():
            made = archive(workspace.fleet, workspace.archive, int(time.time()) - days * 86_400)
        names = [str(path) for path in made.files]
        text = f"{made.reports} reports are in {len(names)} files of {workspace.archive}" if names else "no report is old enough"
        answer(as_json, {"reports": made.reports, "files": names}, text)


@token_app.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Name of the program or person, such as grafana.")],
    role: Annotated[
        str, typer.Option(help="reporter (forwards reports of devices), viewer (reads) or operator (reads and decides).")
    ],
    valid: Valid = "90d",  # type: ignore[assignment]
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Make a token with which a program may ask the gateway."""
    with reported_errors():
        workspace = open_workspace()
        _check_token_file(workspace, out)
        token = workspace.fleet.add_token(name, role, valid)
        _tell_token(as_json, token, out, valid, f"it is sent as `Authorization: Bearer TOKEN`; its role is {role}", name=name)


@token_app.command("list")
def token_list(as_json: Json = False) -> None:
    """List the tokens of programs, without the tokens themselves."""
    with reported_errors():
        found = open_workspace().fleet.api_tokens()
        from ota import durations

        now = time.time()
        rows = [
            f"{token.name:20}  {token.role:8}  "
            + (
                f"until {durations.until(token.expires, now)}"
                if token.expires > now
                else f"expired {durations.utc(token.expires)}"
            )
            for token in found
        ]
        value = {"tokens": [{"name": t.name, "role": t.role, "made": t.made, "expires": t.expires} for t in found]}
        answer(as_json, value, "\n".join(rows) or "there is no token; `ferry fleet token add NAME --role viewer` makes one")


@token_app.command("remove")
def token_remove(name: Annotated[str, typer.Argument(help="Name of the token.")], as_json: Json = False) -> None:
    """Remove a token, which the gateway refuses from then on."""
    with reported_errors():
        open_workspace().fleet.remove_token(name)
        answer(as_json, {"name": name}, f"the token {name} is refused from now on")


def _chosen(workspace: Workspace, where: str) -> tuple[list[LastState], dict[str, int]]:
    """Return the devices that meet a query, and the numbers of all releases by the hashes of their manifests."""
    from ota.fleet import query

    releases = {
        release.manifest: release.seq
        for line, settings in workspace.settings.lines.items()
        for name in settings.classes
        for release in workspace.repository.releases(line, name)
    }
    meets = query.parse(where, int(time.time()), lambda state: releases.get(state.active or ""))
    return [state for state in workspace.fleet.states() if meets(state)], releases


def _check_token_file(workspace: Workspace, out: Path | None) -> None:
    """Refuse a file for a token that is there already or cannot be written, before the token is made."""
    if out is None:
        return
    from ota import output

    output.check_chosen(out, workspace.root / "token", records=workspace.records)
    if out.exists():
        fail(f"{printable(str(out))} is there already; choose another name", 3)


def _tell_token(as_json: bool, token: str, out: Path | None, valid: int, then: str, **value: str) -> None:
    """Print a token, or write it to a file that only its owner can read."""
    from ota import durations

    ends = int(time.time()) + valid
    until = durations.until(ends, time.time())
    if out is None:
        answer(
            as_json, {**value, "token": token, "expires": ends}, f"{token}\nvalid until {until}; it is not shown again; {then}"
        )
        return
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(f"{token}\n")
        file.flush()
        os.fsync(file.fileno())
    answer(as_json, {**value, "file": str(out), "expires": ends}, f"{out}: the token, valid until {until}; {then}")

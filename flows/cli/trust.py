"""`ferry trust`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors, showing_progress

if TYPE_CHECKING:
    from flows.workspace import Workspace

trust_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys and signatures of the repository.")

Signers = Annotated[
    list[str] | None,
    typer.Option(
        "--signer",
        metavar="ROLE=URI",
        show_default=False,
        help="An existing key in place of a new file: a securesystemslib URI such as file2:, hsm:, awskms: or gcpkms:.",
    ),
]
Public = Annotated[
    list[str] | None,
    typer.Option(
        "--public", metavar="ROLE=FILE", show_default=False, help="Public key of a --signer as PEM, if its URI does not give it."
    ),
]
Offline = Annotated[
    Path | None,
    typer.Option(
        "--offline", show_default=False, help="Folder for the private keys of root and targets; keys/offline by default."
    ),
]


@trust_app.command("init")
def trust_init(offline: Offline = None, signer: Signers = None, public: Public = None, as_json: Json = False) -> None:
    """Create keys and the first signed metadata.

    Use it instead of the keys that `ferry init` creates as files. Existing keys are never overwritten.
    """
    with reported_errors():
        workspace = open_workspace()
        from ota.release import trust

        made = trust.init(workspace, offline, trust.signers_of(signer or [], public or []))
        places = "\n".join(f"{role:10} {uri}" for role, uris in made["keys"].items() for uri in uris)
        answer(as_json, made, f"{places}\ndevices are set up with {made['root']}, sha256 {made['sha256']}")


@trust_app.command("refresh")
def trust_refresh(as_json: Json = False) -> None:
    """Renew snapshot and timestamp signatures; run it daily.

    It publishes them, so that devices never find expired metadata.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies

        with workspace.locked("records"):
            policies.check_newest(workspace)
            workspace.repository.refresh()
        with showing_progress():
            policies.publish(workspace)
        expiries = {role: when.isoformat() for role, when in workspace.repository.expiries().items()}
        answer(as_json, {"expires": expiries}, f"signed; the next refresh is due before {expiries['timestamp']}")


@trust_app.command("renew")
def trust_renew(
    roles: Annotated[list[str] | None, typer.Argument(help="root and targets (both need keys/offline), models, deltas.")] = None,
    as_json: Json = False,
) -> None:
    """Renew the signatures of roles; models and deltas by default."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from ota.release.trust import check_finished

        with workspace.locked("records"):
            check_finished(workspace)
            policies.check_newest(workspace)
            expiries = workspace.repository.renew(roles or ["models", "deltas"])
        with showing_progress():
            policies.publish(workspace)
        ends = {role: when.isoformat() for role, when in sorted(expiries.items())}
        answer(as_json, {"expires": ends}, "\n".join(f"{role:10} {when}" for role, when in ends.items()))


@trust_app.command("status")
def trust_status(
    check: Annotated[bool, typer.Option("--check", help="Exit with code 7 if there is an ALARM; for a cron job.")] = False,
    as_json: Json = False,
) -> None:
    """Show each role's version, keys and expiry.

    It shows ALARM if a signature is past half of its lifetime.
    """
    with reported_errors():
        workspace = open_workspace()
        from ota.release import trust

        approval = any(workspace.needs_approval(line) for line in workspace.settings.lines)
        value, text = trust.status(workspace, approval)
        answer(as_json, value, text)
        if check and value["alarms"]:
            raise typer.Exit(7)


@trust_app.command("rotate")
def trust_rotate(
    roles: Annotated[
        list[str], typer.Argument(help="root, targets, models, deltas, rollout, snapshot, timestamp; or ledger alone.")
    ],
    lost: Annotated[
        list[str] | None, typer.Option(metavar="KEYID", show_default=False, help="A lost key to remove; repeat for several keys.")
    ] = None,
    stolen: Annotated[
        list[str] | None,
        typer.Option(metavar="KEYID", show_default=False, help="A stolen key to remove; repeat for several keys."),
    ] = None,
    new: Annotated[
        int | None,
        typer.Option("--new", min=0, show_default=False, help="Number of new keys per role; as many as are removed by default."),
    ] = None,
    signer: Signers = None,
    public: Public = None,
    offline: Offline = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", show_default=False, help="File for `trust sign`, if too few offline keys are on this machine."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replace keys, renew what they signed, and publish it.

    Devices follow automatically. If you name no key of a role, all its keys are replaced. targets replaces the keys of models, deltas
    and rollout; root replaces the others. Both need their offline keys. After a theft of online keys, name all of them in one call.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from ota.release import replacement, trust

        _check_out(workspace, out)
        signers = trust.signers_of(signer or [], public or [])
        request = replacement.Request(
            roles, lost=lost or [], stolen=stolen or [], new=new, signers=signers, offline=offline, out=out
        )
        publish, classes = partial(policies.publish, workspace, whatever_is_there=bool(stolen)), policies.classes(workspace)
        with showing_progress():
            value, text = replacement.rotate(workspace, request, publish, classes, lambda: len(workspace.ledger.hashes()))
        answer(as_json, value, text)


def _check_out(workspace: Workspace, out: Path | None) -> None:
    """Refuse a FILE for signatures that is a record of the workspace."""
    from ota import output

    if out:
        output.check_chosen(out, workspace.root / "unsigned.json", records=workspace.records)


@trust_app.command("sign")
def trust_sign(
    what: Annotated[
        str, typer.Argument(metavar="ROLE|FILE", help="root, targets, models or deltas; or a FILE that waits for signatures.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", show_default=False, help="With a ROLE: file for its new metadata, which waits for signatures."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="URI", show_default=False, help="With a FILE: sign with this key. No workspace is needed."),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="With a FILE: put it into force when it has its signatures.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Collect signatures of keys on other machines, one by one.

    `sign ROLE --out FILE` starts it, as `trust rotate --out` does. Sign the FILE on each key's machine with --key. `sign FILE --publish`
    in the workspace puts it into force. Without options it shows what the FILE waits for.
    """
    with reported_errors():
        from ota.errors import OperatorError
        from ota.release import signatures
        from ota.release.keys import ROLES

        if what in ROLES:
            if out is None or key or publish:
                raise OperatorError(f"say where {what} waits for its signatures, as in `ferry trust sign {what} --out FILE`")
            workspace = open_workspace()
            _check_out(workspace, out)
            value, text = signatures.wait(workspace, what, out)
        elif out is not None:
            raise OperatorError(f"{what[:40]} is not a role; --out begins with one of {', '.join(ROLES)}")
        else:
            value, text = signatures.add(Path(what), key or [])
            if publish:
                workspace = open_workspace()
                from flows import policies

                copy, classes = partial(policies.publish, workspace), policies.classes(workspace)
                with showing_progress():
                    value, text = signatures.publish_waiting(workspace, Path(what), copy, classes)
        answer(as_json, value, text)


@trust_app.command("delegate")
def trust_delegate(
    targets: Annotated[list[str], typer.Argument(metavar="LINE/CLASS", help="LINE/CLASS, or LINE if it has one class; several.")],
    leave_behind: Annotated[
        bool,
        typer.Option("--leave-behind", help="Also if devices have an agent that does not remember the versions of such roles."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", show_default=False, help="File for `trust sign`, if too few offline keys are on this machine."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give line and class roles of their own.

    Its devices then fetch nothing that is signed for other classes. Needs the offline keys of targets. The keys stay the same.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class
        from ota.release.delegation import Move, delegate

        _check_out(workspace, out)
        places = dict.fromkeys(line_and_class(target, workspace) for target in targets)
        moves = [Move(*place, workspace.device_class(*place).oldest_agent) for place in places]
        policies.check_newest(workspace)
        with showing_progress():
            told = workspace.fleet.deciding()
            last = {device: checked.report if checked else None for device, checked in told.items()}
            unsigned = {device for device, checked in told.items() if checked and checked.proof == "unverifiable"}
            value, text = delegate(workspace, moves, partial(policies.publish, workspace), last, leave_behind, out, unsigned)
        answer(as_json, value, text)


@trust_app.command("floor")
def trust_floor(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")],
    number: Annotated[int, typer.Argument(min=1, metavar="RELEASE", help="Lowest release number that devices may install.")],
    as_json: Json = False,
) -> None:
    """Set the lowest release number that devices may install.

    It overrides every rollout. The models key signs it.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            policies.floor(workspace, line, device_class, number)
        answer(as_json, {"floor": number}, f"no release of {line}/{device_class} below {number} is installed any more")

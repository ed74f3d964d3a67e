"""`ferry trust`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import Json, answer, open_workspace, reported_errors, showing_progress

trust_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys and signatures of the repository.")

Signers = Annotated[
    list[str] | None,
    typer.Option(
        "--signer",
        metavar="ROLE=URI",
        show_default=False,
        help="A key that is somewhere else (file2:, hsm:, awskms:, gcpkms:, … as securesystemslib writes it), in place of a new file.",
    ),
]
Public = Annotated[
    list[str] | None,
    typer.Option(
        "--public", metavar="ROLE=FILE", show_default=False, help="Its public half as PEM, where the URI does not tell it."
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
    """Make keys and the first signed metadata, in a workspace that has none; `ferry init` does the same with files only.

    Keys that are there are never overwritten.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import trust

        made = trust.init(workspace, offline, trust.signers_of(signer or [], public or []))
        places = "\n".join(f"{role:10} {uri}" for role, uris in made["keys"].items() for uri in uris)
        answer(as_json, made, f"{places}\ndevices are set up with {made['root']}, sha256 {made['sha256']}")


@trust_app.command("refresh")
def trust_refresh(as_json: Json = False) -> None:
    """Sign snapshot and timestamp anew and publish them, so that devices do not find expired metadata. Run it daily."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies

        with workspace.locked("records"):
            workspace.repository.refresh()
        with showing_progress():
            policies.publish(workspace)
        expiries = {role: when.isoformat() for role, when in workspace.repository.expiries().items()}
        answer(as_json, {"expires": expiries}, f"signed; the next refresh is due before {expiries['timestamp']}")


@trust_app.command("renew")
def trust_renew(
    roles: Annotated[list[str] | None, typer.Argument(help="Of root, targets (both need keys/offline), models, deltas.")] = None,
    as_json: Json = False,
) -> None:
    """Sign roles anew before their signatures end; models and deltas unless others are named."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.trust import check_finished

        with workspace.locked("records"):
            check_finished(workspace)
            expiries = workspace.repository.renew(roles or ["models", "deltas"])
        with showing_progress():
            policies.publish(workspace)
        ends = {role: when.isoformat() for role, when in sorted(expiries.items())}
        answer(as_json, {"expires": ends}, "\n".join(f"{role:10} {when}" for role, when in ends.items()))


@trust_app.command("status")
def trust_status(
    check: Annotated[bool, typer.Option("--check", help="End with code 7 where there is an ALARM; for a cron job.")] = False,
    as_json: Json = False,
) -> None:
    """Show each role's version, keys and expiry; an ALARM where more than half of a signature's life is gone."""
    with reported_errors():
        workspace = open_workspace()
        from flows import trust

        value, text = trust.status(workspace)
        answer(as_json, value, text)
        if check and value["alarms"]:
            raise typer.Exit(7)


@trust_app.command("rotate")
def trust_rotate(
    roles: Annotated[
        list[str], typer.Argument(help="Of root, targets, models, deltas, rollout, snapshot, timestamp; or ledger, alone.")
    ],
    lost: Annotated[
        list[str] | None, typer.Option(metavar="KEYID", show_default=False, help="A key to take out; may be given several times.")
    ] = None,
    stolen: Annotated[
        list[str] | None, typer.Option(metavar="KEYID", show_default=False, help="The same, of a key that somebody else has.")
    ] = None,
    new: Annotated[
        int | None, typer.Option("--new", min=0, show_default=False, help="New keys for each role; as many as go by default.")
    ] = None,
    signer: Signers = None,
    public: Public = None,
    offline: Offline = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", show_default=False, help="Where it waits for `trust sign`, if too few offline keys are here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replace keys, sign anew all that they had signed, and publish it; devices follow by themselves.

    Of a role of which no key is named, all go. Keys of models, deltas and rollout are replaced by targets, the others by root; both
    need their offline keys. After a theft of online keys, name all of them in one call.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import trust

        signers = trust.signers_of(signer or [], public or [])
        with showing_progress():
            value, text = trust.rotate(workspace, roles, lost or [], stolen or [], new, signers, offline, out)
        answer(as_json, value, text)


@trust_app.command("sign")
def trust_sign(
    what: Annotated[str, typer.Argument(metavar="ROLE|FILE", help="Root, targets, models or deltas; or a file that waits.")],
    out: Annotated[
        Path | None, typer.Option("--out", show_default=False, help="Of a ROLE: where its new metadata wait for signatures.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="URI", show_default=False, help="Of a FILE: sign with this key. No workspace is needed."),
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Of a FILE: put it in force, once it has its signatures.")] = False,
    as_json: Json = False,
) -> None:
    """Collect the signatures of keys that lie on other machines or media, one by one.

    A ROLE with --out begins, or `trust rotate --out`; the FILE goes to each key; with --publish, back in the workspace, it counts.
    Without options a FILE says what it waits for.
    """
    with reported_errors():
        from flows import trust
        from ota.errors import OperatorError
        from ota.release.keys import ROLES

        if what in ROLES:
            if out is None or key or publish:
                raise OperatorError(f"say where {what} waits for its signatures, as in `ferry trust sign {what} --out FILE`")
            value, text = trust.wait(open_workspace(), what, out)
        elif out is not None:
            raise OperatorError(f"{what[:40]} is no role; --out begins with one of {', '.join(ROLES)}")
        else:
            value, text = trust.add(Path(what), key or [])
            if publish:
                workspace = open_workspace()
                with showing_progress():
                    value, text = trust.publish_waiting(workspace, Path(what))
        answer(as_json, value, text)


@trust_app.command("floor")
def trust_floor(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")],
    number: Annotated[int, typer.Argument(min=1, metavar="RELEASE", help="The lowest release that may still be installed.")],
    as_json: Json = False,
) -> None:
    """Let no device install a release with a lower number any more, whatever a rollout says; the models key signs it."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            policies.floor(workspace, line, device_class, number)
        answer(as_json, {"floor": number}, f"no release of {line}/{device_class} below {number} is installed any more")

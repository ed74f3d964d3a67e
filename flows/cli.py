"""The command `ferry`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import ota
from flows.errors import BusyError, FlowError, ServerError
from model.errors import ModelError
from ota.errors import OtaError, TransferError
from registry.errors import LedgerError, PromotionError, RegistryError, StoreError

if TYPE_CHECKING:
    from flows.workspace import Workspace

EXIT_CODES = """
Exit codes: 0 done, or nothing to do · 1 a fault of ferry itself · 2 wrong usage · 3 what was handed in does not fit
(workspace, data, name, key) · 4 a store or server cannot be used now, try later · 5 the gate did not let a version through ·
6 a record was changed after the fact · 7 a signature is past half of its life (`trust status --check`) · 130 interrupted.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Retrain small image-generating models, promote the better ones, and ferry only the difference to the devices.\n\n"
        "A workspace (`ferry init`) holds everything; commands work on the one in the present folder, or the one that "
        f"--workspace names.\n{EXIT_CODES}"
    ),
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Data revisions: DVC keeps the bytes, Git their hashes.")
rollout_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Who may install a release, and when.")
fleet_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Devices and what they reported.")
trust_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys and signatures of the repository.")
delta_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Deltas between any two files, in no workspace.")
app.add_typer(data_app, name="data")
app.add_typer(rollout_app, name="rollout")
app.add_typer(fleet_app, name="fleet")
app.add_typer(trust_app, name="trust")
app.add_typer(delta_app, name="delta")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class _Options:
    workspace = Path()
    debug = False
    quiet = False


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ferry {ota.__version__}")
        raise typer.Exit


@app.callback()
def options(
    workspace: Annotated[Path, typer.Option("--workspace", "-w", envvar="FERRY_WORKSPACE", help="The workspace.")] = Path(),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries log.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not show progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Set what holds for all commands."""
    del version  # answered by its callback
    _Options.workspace, _Options.debug, _Options.quiet = workspace, debug, quiet
    if debug:
        os.environ["PREFECT_LOGGING_LEVEL"] = "DEBUG"
    else:
        warnings.simplefilter("ignore")  # of libraries, about themselves; the tests turn them into errors


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the workspace; made when missing.")] = Path(),
    line: Annotated[list[str] | None, typer.Option(help="Name of a line (product); may be given several times.")] = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: Git and DVC with a folder remote, ferry.toml, keys, an empty signed repository.

    Repeated, it completes what a killed call left out and changes nothing else.
    """
    with _errors():
        from flows.workspace import create

        made = create(folder, line or ["surfaces"])
        lines = list(made.settings.lines)
        _answer(
            as_json, {"workspace": str(made.root), "lines": lines, "root": str(made.root / "root.json")},
            f"{made.root} is a workspace for {', '.join(lines)}.\n"
            f"Next: put images and a metadata.jsonl into {made.root / made.line(lines[0]).data}, then `ferry data add {lines[0]}`.\n"
            f"Move {made.root / 'keys' / 'offline'} to a medium that is not plugged in day by day.",
        )  # fmt: skip


@data_app.command("add")
def data_add(
    line: Annotated[str, typer.Argument(help="Whose data folder to record.")],
    message: Annotated[str, typer.Option("--message", "-m", help="What is new.")] = "new data",
    as_json: Json = False,
) -> None:
    """Check a line's data folder and record it as a revision.

    Images and captions that cannot be used are listed; they are recorded all the same but never trained on.
    """
    with _errors():
        from flows import progress
        from model import data, versions

        workspace = _workspace()
        settings = workspace.line(line)
        with _progress():
            usable, held_out, bad = data.check(
                workspace.root / settings.data, settings.text_length,
                lambda done, total: progress.advance(f"check {line}", done, total),
            )  # fmt: skip
        if not usable:
            name, why = next(iter(bad.items()))
            raise _data_error(f"not one image in {settings.data} can be used, the first: {name} {why}")
        for name, why in bad.items():
            typer.echo(f"{name} {why}", err=True)
        if held_out < settings.gate.minimum_images:
            typer.echo(
                f"only {held_out} images are held out for evaluation, the gate of {line} wants {settings.gate.minimum_images}: add more "
                "images (or groups), or lower gate.minimum_images in ferry.toml and know less",
                err=True,
            )
        with workspace.locked("data"), _progress():
            progress.advance("record and push", 0, 1)
            versions.init(workspace.root, workspace.data_remote, workspace.settings.stores.s3_endpoint)  # as ferry.toml says now
            version = versions.add(workspace.root, settings.data, line, message)
            progress.advance("record and push", 1, 1)
        _answer(
            as_json, version.model_dump() | {"usable": usable, "held_out": held_out, "unusable": bad},
            f"{line} is at {version.rev[:12]}: {usable} usable images, {held_out} of them held out"
            f"{f', {len(bad)} files that cannot be used' if bad else ''}",
        )  # fmt: skip


def _data_error(message: str) -> ModelError:
    from model.errors import DataError

    return DataError(message)


@data_app.command("log")
def data_log(line: Annotated[str, typer.Argument(help="Whose revisions.")], as_json: Json = False) -> None:
    """List a line's data revisions, newest first."""
    with _errors():
        from model import versions

        workspace = _workspace()
        rows = versions.log(workspace.root, workspace.line(line).data, line)
        _answer(
            as_json, {"revisions": [v.model_dump() | {"message": m} for v, m in rows]},
            "\n".join(f"{v.rev[:12]}  {v.files:6d} files  {v.bytes:>12,} bytes  {m}" for v, m in rows) or "no revision yet",
        )  # fmt: skip


@app.command()
def retrain(
    line: Annotated[str, typer.Argument(help="Whose models to retrain.")],
    data: Annotated[str, typer.Option("--data", help="Git revision of the data; the present one by default.")] = "",
    promote: Annotated[bool, typer.Option(help="Promote what the gate lets through.")] = True,
    as_json: Json = False,
) -> None:
    """Pull a data revision, train, evaluate, gate, register, and promote the winners.

    Killed and repeated, it goes on where it was cut; with nothing new it does nothing.
    """
    with _errors():
        workspace = _workspace()
        from model import versions

        settings = workspace.line(line)
        versions.resolve(workspace.root, settings.data, line, data or "HEAD")
        if not data:
            versions.check_clean(workspace.root, settings.data, line)
        from flows import retrain as flow

        with _progress():
            rows = flow.retrain(str(workspace.root), line, data or "HEAD", promote)
        _answer(
            as_json, {"models": rows},
            "\n".join(f"{r['subject']} version {r['version']}: {r['outcome']}, {r['reason']}" for r in rows),
        )  # fmt: skip
        if any(row["outcome"] in ("refuse", "more data") for row in rows):
            raise typer.Exit(5)


@app.command()
def evaluate(
    subject: Annotated[str, typer.Argument(help="LINE/CONFIG/VARIANT, such as surfaces/I/full.")],
    version: Annotated[int | None, typer.Argument(min=1, help="Version in MLflow; the champion by default.")] = None,
    features: Annotated[
        str, typer.Option(help="inception:FILE, a network in TorchScript (a program: one you trust); computes the FID of papers.")
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Folder to compare with for FID; the version's own data revision by default.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=2, help="Images to draw for FID; as in the scorecard by default.")] = None,
    as_json: Json = False,
) -> None:
    """Show a version's figures: quality, time, memory, experts.

    With --features also the FID that papers print. It falls with the number of images: compare it only at equal --n (papers: 50000)
    and with the same network and folder.
    """
    with _errors():
        workspace = _workspace()
        from flows import measure
        from model.errors import ConfigError

        if not features and (images or n):
            raise ConfigError("--images and --n say how FID is computed; add --features inception:FILE")
        file = measure.network_file(features) if features else None
        chosen = measure.find(workspace, subject, version)
        with _progress():
            measured = measure.measure(workspace, chosen, file, images, n)
        _answer(as_json, measured.model_dump(mode="json"), measure.text(measured))


@app.command()
def promote(
    subject: Annotated[str, typer.Argument(help="LINE/CONFIG/VARIANT, such as surfaces/I/full.")],
    version: Annotated[int, typer.Argument(min=1, help="Version in MLflow.")],
    reason: Annotated[str, typer.Option(help="Why; recorded in the ledger.")] = "promoted by hand",
    overrule: Annotated[bool, typer.Option("--overrule", help="Although the gate did not let it through.")] = False,
    as_json: Json = False,
) -> None:
    """Make a version champion: MLflow's alias, and an entry in the ledger. Going back to an earlier champion works the same."""
    with _errors():
        workspace = _workspace()
        from flows.promote import promote as make_champion
        from registry.catalog import Subject

        entry = make_champion(workspace, Subject.parse(subject), version, reason, overrule)
        _answer(
            as_json, entry.model_dump(mode="json") | {"sha256": entry.sha256},
            f"{subject} version {version} is champion (ledger entry {entry.number}); publish it with `ferry release`",
        )  # fmt: skip


@app.command()
def history(
    subject: Annotated[str, typer.Argument(help="Only this subject, such as surfaces/I/full.")] = "", as_json: Json = False
) -> None:
    """Show the ledger, after checking that nobody changed it."""
    with _errors():
        workspace = _workspace()
        from flows.promote import check_ledger

        if subject:
            workspace.line(subject.split("/", maxsplit=1)[0])
        entries = workspace.ledger.entries(subject or None)
        check_ledger(workspace)
        _answer(
            as_json, {"entries": [e.model_dump(mode="json") for e in entries]},
            "\n".join(f"{e.number:4d}  {e.when[:16]}  {e.who:10.10}  {e.kind:9}  {e.subject}: {e.why}" for e in entries)
            or "nothing was decided yet",
        )  # fmt: skip


@app.command()
def release(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")], as_json: Json = False
) -> None:
    """Publish a line's champions: bundle, deltas from what is fielded, signatures, then to where devices fetch it."""
    with _errors():
        workspace = _workspace()
        from flows.promote import champions, check_ledger
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        check_ledger(workspace)
        champions(workspace, line, device_class)
        from flows.release import release as flow

        with _progress():
            made = flow(str(workspace.root), line, device_class)
        deltas = ", ".join(f"{size:,} bytes from {base[:8]}" for base, size in made["deltas"].items())
        _answer(
            as_json, made,
            f"{line}/{device_class} release {made['release']}: {made['full_bytes']:,} bytes in full"
            f"{f'; as a delta {deltas}' if deltas else ''}\nno device installs it yet: `ferry rollout start {line}/{device_class}`",
        )  # fmt: skip


@rollout_app.command("start")
def rollout_start(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")],
    number: Annotated[int, typer.Option("--release", help="Release number; the newest by default.")] = 0,
    waves: Annotated[str, typer.Option(help="Rising shares of the fleet in percent.")] = "1,10,100",
    soak: Annotated[int, typer.Option(min=0, help="Seconds between two waves.")] = 86_400,
    revert: Annotated[bool, typer.Option("--revert", help="The release is older than what runs, on purpose.")] = False,
    as_json: Json = False,
) -> None:
    """Sign the policy that opens a release to the fleet, wave by wave; devices obey it by themselves."""
    with _errors():
        workspace = _workspace()
        from flows.release import publish
        from flows.workspace import line_and_class
        from ota.errors import OperatorError
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        releases = workspace.repository.releases(line, device_class)
        chosen = [r for r in releases if number in (0, r.seq)]
        if not chosen:
            raise OperatorError(f"{line}/{device_class} has no release {number or ''}; publish one with `ferry release {target}`")
        try:
            shares = [float(part) for part in waves.split(",")]
        except ValueError:
            raise OperatorError(f"{waves!r} are not shares in percent; write them as 1,10,100") from None
        with workspace.locked("records"):
            policy = rollout.start(chosen[-1], shares, soak, revert=revert)
            workspace.repository.set_policy(policy)
            workspace.ledger.append(
                "rollout", f"{line}/{device_class}", f"waves {waves} %", {"release": policy.seq, "soak": soak}
            )
        with _progress():
            publish.fn(str(workspace.root))
        _answer(as_json, policy.model_dump(), rollout.describe(policy))


@rollout_app.command("halt")
def rollout_halt(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")],
    reason: Annotated[str, typer.Option(help="Why; recorded in the ledger.")] = "halted by hand",
    as_json: Json = False,
) -> None:
    """Sign a policy that lets no further device install the release."""
    with _errors():
        workspace = _workspace()
        from flows.release import publish
        from flows.workspace import line_and_class
        from ota.errors import OperatorError
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        with workspace.locked("records"):
            policy = workspace.repository.policy(line, device_class)
            if policy is None:
                raise OperatorError(f"nothing of {line}/{device_class} is rolled out, so there is nothing to halt")
            halted = rollout.halt(policy)
            workspace.repository.set_policy(halted)
            workspace.ledger.append("halt", f"{line}/{device_class}", reason, {"release": policy.seq})
        with _progress():
            publish.fn(str(workspace.root))
        _answer(as_json, halted.model_dump(), rollout.describe(halted))


@rollout_app.command("renew")
def rollout_renew(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")], as_json: Json = False
) -> None:
    """Sign the present policy anew, its waves unchanged, before its signature ends after 14 days."""
    with _errors():
        workspace = _workspace()
        from flows.release import publish
        from flows.workspace import line_and_class
        from ota.errors import OperatorError
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        with workspace.locked("records"):
            policy = workspace.repository.policy(line, device_class)
            if policy is None:
                raise OperatorError(f"nothing of {line}/{device_class} is rolled out, so there is nothing to renew")
            workspace.repository.set_policy(policy)
        with _progress():
            publish.fn(str(workspace.root))
        ends = workspace.repository.expiries()["rollout"].isoformat()
        _answer(as_json, policy.model_dump() | {"expires": ends}, f"{rollout.describe(policy)}; signed until {ends}")


@rollout_app.command("status")
def rollout_status(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")], as_json: Json = False
) -> None:
    """Say how far the present rollout is."""
    with _errors():
        workspace = _workspace()
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        policy = workspace.repository.policy(line, device_class)
        _answer(
            as_json, policy.model_dump() if policy else {},
            rollout.describe(policy) if policy else f"nothing of {line}/{device_class} is rolled out",
        )  # fmt: skip


@fleet_app.command("enroll")
def fleet_enroll(
    device: Annotated[str, typer.Argument(help="Id of the device.")],
    public_key: Annotated[str, typer.Argument(help="Its public key, as `ferry-agent init` printed it.")],
    as_json: Json = False,
) -> None:
    """Accept the reports of a device."""
    with _errors():
        _workspace().fleet.enroll(device, public_key)
        _answer(as_json, {"device": device}, f"{device} is enrolled")


@fleet_app.command("status")
def fleet_status(as_json: Json = False) -> None:
    """Read the reports that devices left, and show each device's last one."""
    with _errors():
        workspace = _workspace()
        collected = workspace.fleet.collect(workspace.inbox)
        for name, why in collected.rejected.items():
            typer.echo(f"{name}: {why}", err=True)
        devices = workspace.fleet.devices()
        rows = [
            f"{name:20}  {last.event if last else 'silent':12}  {(last.active or 'nothing')[:12] if last else '':12}  "
            f"{last.reason if last else ''}"
            for name, last in devices.items()
        ]
        _answer(
            as_json, {"devices": {n: r.model_dump() if r else None for n, r in devices.items()}, "rejected": collected.rejected},
            "\n".join(rows) or "no device is enrolled; `ferry fleet enroll` adds one",
        )  # fmt: skip


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
    with _errors():
        workspace = _workspace()
        from flows import trust

        made = trust.init(workspace, offline, trust.signers_of(signer or [], public or []))
        places = "\n".join(f"{role:10} {uri}" for role, uris in made["keys"].items() for uri in uris)
        _answer(as_json, made, f"{places}\ndevices are set up with {made['root']}, sha256 {made['sha256']}")


@trust_app.command("refresh")
def trust_refresh(as_json: Json = False) -> None:
    """Sign snapshot and timestamp anew and publish them, so that devices do not find expired metadata. Run it daily."""
    with _errors():
        workspace = _workspace()
        from flows.release import publish

        with workspace.locked("records"):
            workspace.repository.refresh()
        with _progress():
            publish.fn(str(workspace.root))
        expiries = {role: when.isoformat() for role, when in workspace.repository.expiries().items()}
        _answer(as_json, {"expires": expiries}, f"signed; the next refresh is due before {expiries['timestamp']}")


@trust_app.command("renew")
def trust_renew(
    roles: Annotated[list[str] | None, typer.Argument(help="Of root, targets (both need keys/offline), models, deltas.")] = None,
    as_json: Json = False,
) -> None:
    """Sign roles anew before their signatures end; models and deltas unless others are named."""
    with _errors():
        workspace = _workspace()
        from flows.release import publish
        from flows.trust import check_finished

        with workspace.locked("records"):
            check_finished(workspace)
            expiries = workspace.repository.renew(roles or ["models", "deltas"])
        with _progress():
            publish.fn(str(workspace.root))
        ends = {role: when.isoformat() for role, when in sorted(expiries.items())}
        _answer(as_json, {"expires": ends}, "\n".join(f"{role:10} {when}" for role, when in ends.items()))


@trust_app.command("status")
def trust_status(
    check: Annotated[bool, typer.Option("--check", help="End with code 7 where there is an ALARM; for a cron job.")] = False,
    as_json: Json = False,
) -> None:
    """Show each role's version, keys and expiry; an ALARM where more than half of a signature's life is gone."""
    with _errors():
        workspace = _workspace()
        from flows import trust

        value, text = trust.status(workspace)
        _answer(as_json, value, text)
        if check and value["alarms"]:
            raise typer.Exit(7)


@trust_app.command("rotate")
def trust_rotate(
    roles: Annotated[list[str], typer.Argument(help="Of root, targets, models, deltas, rollout, snapshot, timestamp.")],
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
    with _errors():
        workspace = _workspace()
        from flows import trust

        signers = trust.signers_of(signer or [], public or [])
        with _progress():
            value, text = trust.rotate(workspace, roles, lost or [], stolen or [], new, signers, offline, out)
        _answer(as_json, value, text)


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
    with _errors():
        from flows import trust
        from ota.errors import OperatorError
        from ota.release.keys import ROLES

        if what in ROLES:
            if out is None or key or publish:
                raise OperatorError(f"say where {what} waits for its signatures, as in `ferry trust sign {what} --out FILE`")
            value, text = trust.wait(_workspace(), what, out)
        elif out is not None:
            raise OperatorError(f"{what[:40]} is no role; --out begins with one of {', '.join(ROLES)}")
        else:
            value, text = trust.add(Path(what), key or [])
            if publish:
                workspace = _workspace()
                with _progress():
                    value, text = trust.publish_waiting(workspace, Path(what))
        _answer(as_json, value, text)


@trust_app.command("floor")
def trust_floor(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")],
    number: Annotated[int, typer.Argument(min=1, metavar="RELEASE", help="The lowest release that may still be installed.")],
    as_json: Json = False,
) -> None:
    """Let no device install a release with a lower number any more, whatever a rollout says; the models key signs it."""
    with _errors():
        workspace = _workspace()
        from flows.release import publish
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        with workspace.locked("records"):
            workspace.repository.set_floor(line, device_class, number)
            workspace.ledger.append("rollout", f"{line}/{device_class}", f"floor {number}", {"floor": number})
        with _progress():
            publish.fn(str(workspace.root))
        _answer(as_json, {"floor": number}, f"no release of {line}/{device_class} below {number} is installed any more")


Graph = Annotated[
    Path | None,
    typer.Option("--graph", help="The ONNX file that describes NEW, if NEW is its external data.", show_default=False),
]
OldGraph = Annotated[
    Path | None, typer.Option("--old-graph", help="The same for OLD; without it, as --graph.", show_default=False)
]


@delta_app.callback()
def _one_thread() -> None:
    """Deltas between any two files, in no workspace."""
    # OpenBLAS's second thread has nothing to do here, and spins for longer than most deltas take.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@delta_app.command("build")
def delta_build(
    old: Annotated[Path, typer.Argument(help="The file before.")],
    new: Annotated[Path, typer.Argument(help="The file after: ONNX, safetensors, or any other.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the delta goes.")],
    graph: Graph = None,
    old_graph: OldGraph = None,
    as_json: Json = False,
) -> None:
    """Write what turns one file into another, bit by bit."""
    with _errors():
        from ota.delta import files

        built = files.build(old, new, output, graph, old_graph)
        size = new.stat().st_size
        value = {"patch": str(output), "bytes": built.size, "of": size, "by_kind": built.by_kind}
        _answer(as_json, value, f"{output}: {built.size:,} bytes, {built.size / max(size, 1):.1%} of {size:,}")


@delta_app.command("apply")
def delta_apply(
    old: Annotated[Path, typer.Argument(help="The file that the delta was built from.")],
    patch: Annotated[Path, typer.Argument(help="The delta.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the new file goes.")],
) -> None:
    """Make the new file; it appears when it is whole and has its hash."""
    with _errors():
        from ota.delta import files

        files.apply(old, patch, output)
        typer.echo(f"{output}: {output.stat().st_size:,} bytes")


@delta_app.command("inspect")
def delta_inspect(
    patch: Annotated[Path, typer.Argument(help="The delta.")],
    of: Annotated[
        Path | None, typer.Option("--of", help="The file that it makes, to call tensors by their names.", show_default=False)
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--from", help="The file that it starts from, to say what each tensor costs.", show_default=False),
    ] = None,
    graph: Graph = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw it, into a file named .svg or .png.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a delta is made of: by record, and with --of and --from by tensor."""
    with _errors():
        from ota.delta import files

        header, parts = files.inspect(patch, of, graph, base)
        if plot:
            from ota.release import picture

            picture.draw(parts, plot)
        total = sum(part.size for part in parts) or 1
        rows = [f"{'kind':8} {'offset':>13} {'makes':>10} {'costs':>10} {'share':>6}  holds"]
        for part in parts:
            holds = ", ".join(f"{count:,} {what}" for what, count in part.holds.items())
            holds += f" in {part.streams} streams" if part.streams > 1 and base is None else ""
            names = ", ".join(part.tensors[:3]) + (f" and {len(part.tensors) - 3} more" if len(part.tensors) > 3 else "")
            rows.append(
                f"{part.kind:8} {part.offset:>13,} {part.length:>10,} {part.size:>10,.0f} {part.size / total:>6.1%}  {'; '.join(filter(None, (holds, names)))}".rstrip()
            )
        value = {"base": header.base, "target": header.target, "parts": [asdict(part) for part in parts]}
        _answer(as_json, value, "\n".join(rows))


@delta_app.command("estimate")
def delta_estimate(
    old: Annotated[Path, typer.Argument(help="The file before.")],
    new: Annotated[Path, typer.Argument(help="The file after.")],
    graph: Graph = None,
    old_graph: OldGraph = None,
    as_json: Json = False,
) -> None:
    """Forecast how large a delta would be, without building it."""
    with _errors():
        from ota.delta import files

        expected, size = files.estimate(old, new, graph, old_graph), new.stat().st_size
        _answer(as_json, {"bytes": expected, "of": size}, f"about {expected:,} bytes, {expected / max(size, 1):.1%} of {size:,}")


@app.command()
def report(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write the one-page report: quality, time, bytes and cost, what changed, how to go back."""
    with _errors():
        workspace = _workspace()
        from flows.report import write

        workspace.fleet.collect(workspace.inbox)
        path = write(workspace, output or workspace.root / "report.html")
        _answer(as_json, {"report": str(path)}, str(path))


@app.command()
def serve(
    lines: Annotated[list[str] | None, typer.Argument(help="Lines to retrain; all by default.")] = None,
    cron: Annotated[str, typer.Option(help="When, as five cron fields in UTC.")] = "0 3 * * 1",
) -> None:
    """Retrain by a schedule, until interrupted. Starts a Prefect server of its own unless PREFECT_API_URL names one."""
    with _errors():
        workspace = _workspace()
        chosen = lines or list(workspace.settings.lines)
        for line in chosen:
            workspace.line(line)
        from flows import serve as schedule

        with schedule.server(workspace) as address:
            typer.echo(f"retraining {', '.join(chosen)} at {cron!r}; Prefect's page is {address.removesuffix('/api')}", err=True)
            schedule.serve(workspace, chosen, cron)


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option("--dir", help="Folder to play in; a new one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Play the whole story on real photographs in a fresh folder, then say what happened. About five minutes.

    In a folder where a demo was killed, it goes on where it was cut.
    """
    with _errors():
        from flows.demo import Demo, text

        story = Demo(folder or _fresh_folder(), lambda line: typer.echo(f"· {line}", err=True))
        with _progress():
            story.play()
        summary = story.summary()
        _answer(as_json, summary, text(summary))


def _fresh_folder() -> Path:
    """The first folder in which no demo was played to its end."""
    from flows.demo import is_finished

    candidates = (Path("ferry-demo" if i == 1 else f"ferry-demo-{i}") for i in range(1, 1000))
    return next(path for path in candidates if not is_finished(path))


def _workspace() -> Workspace:
    from flows.workspace import Workspace

    return Workspace(_Options.workspace)


@contextmanager
def _progress() -> Iterator[None]:
    if _Options.quiet:
        yield
        return
    from flows import progress

    with progress.bars():
        yield


def _answer(as_json: bool, value: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(value) if as_json else text)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn our own exceptions into one sentence and an exit code; others are faults and keep their traceback."""
    try:
        yield
    except (FlowError, ModelError, RegistryError, OtaError) as error:
        if _Options.debug:
            raise
        _fail(str(error), _exit_code(error))
    except OSError as error:
        if _Options.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path and who may write there", 3)
    except Exception as error:
        if _Options.debug or not _is_unreachable(error):
            raise
        _fail(f"Prefect's server at {os.environ.get('PREFECT_API_URL')} cannot be reached; start it, or unset PREFECT_API_URL", 4)
    except KeyboardInterrupt:
        _fail("interrupted; repeat the command to go on", 130)


def _is_unreachable(error: Exception) -> bool:
    """Whether Prefect's client did not reach its server; it says so by a bare RuntimeError, or by httpx's errors."""
    return "Failed to reach API" in str(error) or type(error).__module__.startswith(("httpx", "httpcore"))


def _exit_code(error: Exception) -> int:
    if isinstance(error, PromotionError):
        return 5
    if isinstance(error, LedgerError):
        return 6
    if isinstance(error, (StoreError, TransferError, ServerError, BusyError)):
        return 4
    return 3


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"ferry: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()

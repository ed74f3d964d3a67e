"""`ferry rollout` and `ferry fleet`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.shared import Json, answer, open_workspace, showing_progress, told_errors

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from ota.manifest import Policy

rollout_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Who may install a release, and when.")
fleet_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Devices and what they reported.")


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
    with told_errors():
        workspace = open_workspace()
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
            workspace.ledger.check_ready()
            workspace.repository.set_policy(policy)
            workspace.ledger.append(
                "rollout", f"{line}/{device_class}", f"waves {waves} %", {"release": policy.seq, "soak": soak}
            )
        with showing_progress():
            publish.fn(str(workspace.root))
        answer(as_json, policy.model_dump(), rollout.describe(policy))


def _rolled_out(workspace: Workspace, line: str, device_class: str, doing: str) -> Policy:
    from ota.errors import OperatorError

    policy = workspace.repository.policy(line, device_class)
    if policy is None:
        raise OperatorError(f"nothing of {line}/{device_class} is rolled out, so there is nothing to {doing}")
    return policy


@rollout_app.command("halt")
def rollout_halt(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")],
    reason: Annotated[str, typer.Option(help="Why; recorded in the ledger.")] = "halted by hand",
    as_json: Json = False,
) -> None:
    """Sign a policy that lets no further device install the release; it goes out also where it cannot be recorded."""
    with told_errors():
        workspace = open_workspace()
        from flows.release import publish
        from flows.workspace import line_and_class
        from ota.errors import OtaError
        from ota.release import rollout
        from registry.errors import RegistryError

        line, device_class = line_and_class(target, workspace)
        unrecorded: RegistryError | OtaError | None = None
        with workspace.locked("records"):
            policy = _rolled_out(workspace, line, device_class, "halt")
            halted = rollout.halt(policy)
            workspace.repository.set_policy(halted)
            try:
                workspace.ledger.append("halt", f"{line}/{device_class}", reason, {"release": policy.seq})
            except (RegistryError, OtaError) as error:  # a damaged record must not keep a bad release going
                unrecorded = error
        with showing_progress():
            publish.fn(str(workspace.root))
        if unrecorded:
            typer.echo(f"{rollout.describe(halted)}, and that is published, but it could not be recorded:", err=True)
            raise unrecorded
        answer(as_json, halted.model_dump(), rollout.describe(halted))


@rollout_app.command("renew")
def rollout_renew(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")], as_json: Json = False
) -> None:
    """Sign the present policy anew, its waves unchanged, before its signature ends after 14 days."""
    with told_errors():
        workspace = open_workspace()
        from flows.release import publish
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        with workspace.locked("records"):
            policy = _rolled_out(workspace, line, device_class, "renew")
            workspace.repository.set_policy(policy)
        with showing_progress():
            publish.fn(str(workspace.root))
        ends = workspace.repository.expiries()["rollout"].isoformat()
        answer(as_json, policy.model_dump() | {"expires": ends}, f"{rollout.describe(policy)}; signed until {ends}")


@rollout_app.command("status")
def rollout_status(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE where it has one class.")], as_json: Json = False
) -> None:
    """Say how far the present rollout is."""
    with told_errors():
        workspace = open_workspace()
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        policy = workspace.repository.policy(line, device_class)
        answer(
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
    with told_errors():
        open_workspace().fleet.enroll(device, public_key)
        answer(as_json, {"device": device}, f"{device} is enrolled")


@fleet_app.command("status")
def fleet_status(as_json: Json = False) -> None:
    """Read the reports that devices left, and show each device's last one."""
    with told_errors():
        workspace = open_workspace()
        collected = workspace.fleet.collect(workspace.inbox)
        for name, why in collected.rejected.items():
            typer.echo(f"{name}: {why}", err=True)
        devices = workspace.fleet.devices()
        rows = [
            f"{name:20}  {last.event if last else 'silent':12}  {(last.active or 'nothing')[:12] if last else '':12}  "
            f"{last.reason if last else ''}"
            for name, last in devices.items()
        ]
        answer(
            as_json, {"devices": {n: r.model_dump() if r else None for n, r in devices.items()}, "rejected": collected.rejected},
            "\n".join(rows) or "no device is enrolled; `ferry fleet enroll` adds one",
        )  # fmt: skip

"""`ferry rollout`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.shared import Json, answer, fail, open_workspace, reported_errors, showing_progress, time_of

rollout_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Open a release to the fleet in waves, halt it, renew it."
)
MAX_SOAK = 365 * 86_400  # seconds; a longer one is a slip


@rollout_app.command("start")
def rollout_start(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")],
    number: Annotated[
        int | None,
        typer.Option("--release", min=1, show_default=False, help="Release number; that of the current champions by default."),
    ] = None,
    waves: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="Rising shares of the fleet in percent; 1,10,100 by default, or 100 with --revert."
        ),
    ] = None,
    soak: Annotated[
        int,
        typer.Option(
            parser=time_of(0, MAX_SOAK),
            metavar="TIME",
            help="Time between two waves, such as 2h or 3d; a bare number is seconds.",
        ),
    ] = "1d",  # type: ignore[assignment]
    revert: Annotated[bool, typer.Option("--revert", help="Roll all devices back to an older release, at once.")] = False,
    as_json: Json = False,
) -> None:
    """Open a release to the fleet, wave by wave.

    Signs and publishes a policy, which devices obey on their own.
    """
    with reported_errors():
        # A revert opens to all at once: the present release does harm, and the release to return to has run on devices before.
        waves = waves if waves is not None else "100" if revert else "1,10,100"
        try:
            shares = [float(part) for part in waves.split(",")]
        except ValueError:
            fail(f"{waves!r} are not shares in percent; write them as 1,10,100", 3)
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        before = workspace.repository.policy(line, device_class)
        with showing_progress():
            policy = policies.start(workspace, line, device_class, shares, soak, number or 0, revert)
        if before and before.manifest == policy.manifest:
            typer.echo(f"before, {rollout.describe(before)}", err=True)  # perhaps it was halted, or open to more devices
        if before is None and (len(policy.waves) > 1 or policy.waves[0].bps < rollout.FULL):
            typer.echo(
                f"this is the first rollout of {line}/{device_class}: devices have nothing to run before their wave opens; "
                "`--waves 100` opens it to all at once", err=True,
            )  # fmt: skip
        answer(as_json, policy.model_dump(), rollout.describe(policy))


@rollout_app.command("halt")
def rollout_halt(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")],
    reason: Annotated[str, typer.Option(help="Reason; recorded in the ledger.")] = "halted by hand",
    as_json: Json = False,
) -> None:
    """Stop a rollout: no further device installs the release.

    The halt is signed and published even if the ledger cannot record it.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            halted = policies.halt(workspace, line, device_class, reason.strip() or "halted by hand")
        told = rollout.describe(halted.policy)
        if halted.unrecorded:
            typer.echo(f"{told}, and that is published, but it could not be recorded:", err=True)
            raise halted.unrecorded
        answer(as_json, halted.policy.model_dump(), told)


@rollout_app.command("renew")
def rollout_renew(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")], as_json: Json = False
) -> None:
    """Renew the signature of the current policy.

    A policy's signature expires after 14 days. The waves stay as they are.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            policy, ends = policies.renew(workspace, line, device_class)
        answer(as_json, policy.model_dump() | {"expires": ends}, f"{rollout.describe(policy)}; signed until {ends}")


@rollout_app.command("status")
def rollout_status(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")], as_json: Json = False
) -> None:
    """Show the progress of the current rollout."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        policy = workspace.repository.policy(line, device_class)
        if policy is None:
            answer(
                as_json,
                {},
                f"nothing of {line}/{device_class} is rolled out; `ferry rollout start {line}/{device_class}` rolls a release out",
            )
            return
        allowed = policies.allowances(workspace, line, device_class, policy.seq)
        behind = policies.behind(workspace, line, device_class, policy.seq)
        place = policies.publication(workspace)
        answer(
            as_json,
            policy.model_dump() | {"allowed": allowed, "behind": behind, "publication": place.state, "public": not place.private},
            "\n".join([rollout.describe(policy), *allowed, *behind, *place.lines]),
        )  # fmt: skip

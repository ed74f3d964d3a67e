"""`ferry rollout`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.shared import Json, answer, fail, moment_of, open_workspace, reported_errors, showing_progress, time_of

if TYPE_CHECKING:
    from flows.policies import InForce
    from flows.workspace import Workspace

rollout_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Open a release to the fleet in waves, halt it, renew it."
)
MAX_SOAK = 365 * 86_400  # seconds; a longer one is a slip
LONGEST_SPREAD = 7 * 86_400  # seconds, as in `ota.policy`, which costs time to load

Target = Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")]
Unwatched = Annotated[
    str,
    typer.Option(
        metavar="SHARES", show_default=False,
        help="Open it to devices that are not watched, too, in timed waves, such as 1,10,100; only once all that are watched have it.",
    ),
]  # fmt: skip
Soak = Annotated[
    int,
    typer.Option(
        parser=time_of(0, MAX_SOAK), metavar="TIME",
        help="Time between two waves of --unwatched, such as 2h or 3d; a bare number is seconds.",
    ),
]  # fmt: skip


@rollout_app.command("start")
def rollout_start(
    target: Target,
    number: Annotated[
        int | None,
        typer.Option("--release", min=1, show_default=False, help="Release number; that of the current champions by default."),
    ] = None,
    waves: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Rising shares of the watched devices in percent; 1,10,100 by default, or 100 with --revert. The first opens at once.",
        ),
    ] = None,
    unwatched: Unwatched = "",
    soak: Soak = "1d",  # type: ignore[assignment]
    revert: Annotated[bool, typer.Option("--revert", help="Roll all devices back to an older release, at once.")] = False,
    first: Annotated[
        str,
        typer.Option(
            metavar="NAMES", show_default=False, help="Devices to open to before the shares: ids or tags, such as a,site=b."
        ),
    ] = "",
    only: Annotated[str, typer.Option(metavar="NAMES", show_default=False, help="Open to these devices alone.")] = "",
    never: Annotated[str, typer.Option(metavar="NAMES", show_default=False, help="Do not open to these devices.")] = "",
    not_before: Annotated[
        int | None,
        typer.Option(
            parser=moment_of, metavar="MOMENT", show_default=False, help="Open then, such as 2026-12-02T18:00 (UTC) or 2h."
        ),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(parser=moment_of, metavar="MOMENT", show_default=False, help="Let no further device begin from then on."),
    ] = None,
    acknowledge: Annotated[
        bool, typer.Option("--acknowledge", help="Let devices switch only after their report that they start was kept.")
    ] = False,
    spread: Annotated[
        int,
        typer.Option(
            parser=time_of(0, LONGEST_SPREAD),
            metavar="TIME",
            show_default=False,
            help="Time over which the devices of a share begin.",
        ),
    ] = 0,
    heartbeat: Annotated[
        int | None,
        typer.Option(
            parser=time_of(3600, 86_400),
            metavar="TIME",
            show_default=False,
            help="Time between two heartbeats; as before by default, or 6h.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Open a release to the first of the shares of the devices.

    Signs and publishes policies, which devices obey on their own. `widen` opens the next share. Devices that are not watched, because they
    have no place for reports or an agent before 0.3, keep what they have until --unwatched opens the release to them, too.
    """
    with reported_errors():
        # A revert opens to all at once: the present release does harm, and the release to return to has run on devices before.
        wanted, others = _shares(waves if waves is not None else "100" if revert else "1,10,100"), _shares(unwatched)
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class
        from ota.policy import BUCKETS
        from ota.release import rollout

        line, device_class = line_and_class(target, workspace)
        before = policies.InForce.of(workspace, line, device_class)
        terms = rollout.Terms(
            _names(first), _names(only), _names(never), not_before or 0, until or 0, acknowledge, spread, heartbeat or 0
        )
        with showing_progress():
            made = policies.start(
                workspace, line, device_class, policies.Shares(wanted, others, soak), number or 0, revert, terms=terms
            )
        named = made.watched
        if named and before.named and before.named.manifest == named.manifest:
            typer.echo(f"before, {before.text}", err=True)  # perhaps it was halted, or open to more devices
        if named and before.named is None and named.limit < BUCKETS:
            typer.echo(
                f"this is the first rollout of {line}/{device_class}: devices have nothing to run before their wave opens; "
                "`--waves 100` opens it to all at once", err=True,
            )  # fmt: skip
        _answer(workspace, line, device_class, made, as_json)


@rollout_app.command("widen")
def rollout_widen(
    target: Target,
    share: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="SHARE",
            show_default=False,
            help="Share of the watched devices in percent; the next stated one by default.",
        ),
    ] = "",
    unwatched: Unwatched = "",
    soak: Soak = "1d",  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Open a rollout to more devices: the next share, or --unwatched ones.

    Look at `ferry fleet status` before: nothing opens by itself.
    """
    with reported_errors():
        to, others = _shares(share), _shares(unwatched)
        if (to and others) or len(to) > 1:
            fail("give one share with --to, or --unwatched", 3)
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            if others:
                made = policies.open_unwatched(workspace, line, device_class, others, soak)
            else:
                made = policies.widen(workspace, line, device_class, to[0] if to else None)
        _answer(workspace, line, device_class, made, as_json)


@rollout_app.command("retry")
def rollout_retry(target: Target, as_json: Json = False) -> None:
    """Let devices that refused the release try it once more."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            made = policies.retry(workspace, line, device_class)
        _answer(workspace, line, device_class, made, as_json)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        fail(f"{text!r} are not shares in percent; write them as 1,10,100", 3)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _answer(workspace: Workspace, line: str, device_class: str, made: InForce, as_json: bool) -> None:
    """Print the policies in force, and who waits until the release is opened to devices that are not watched."""
    from flows import policies
    from ota.release import compatibility, fielded

    waiting = [] if fielded.is_opened_to_all(made.watched, made.waves) else policies.not_watched(workspace, line, device_class)
    more = f" and {len(waiting) - compatibility.SHOWN} more" if len(waiting) > compatibility.SHOWN else ""
    told = (
        f"\n{len(waiting)} {'device is' if len(waiting) == 1 else 'devices are'} not watched and {'waits' if len(waiting) == 1 else 'wait'} "
        f"for `ferry rollout widen {line}/{device_class} --unwatched 1,10,100`: {', '.join(waiting[: compatibility.SHOWN])}{more}"
    )
    answer(as_json, made.facts | {"not_watched": waiting}, made.text + (told if waiting else ""))


@rollout_app.command("halt")
def rollout_halt(
    target: Target,
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

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            halted = policies.halt(workspace, line, device_class, reason.strip() or "halted by hand")
        told = halted.policies.text
        if halted.unrecorded:
            typer.echo(f"{told}, and that is published, but it could not be recorded:", err=True)
            raise halted.unrecorded
        answer(as_json, halted.policies.facts, told)


@rollout_app.command("renew")
def rollout_renew(target: Target, as_json: Json = False) -> None:
    """Renew the signature of the current policies.

    It expires after 14 days. The shares stay as they are.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        with showing_progress():
            found, ends = policies.renew(workspace, line, device_class)
        answer(as_json, found.facts | {"expires": ends}, f"{found.text}; signed until {ends}")


@rollout_app.command("status")
def rollout_status(target: Target, as_json: Json = False) -> None:
    """Show the progress of the current rollout."""
    with reported_errors():
        workspace = open_workspace()
        from flows import policies
        from flows.workspace import line_and_class

        line, device_class = line_and_class(target, workspace)
        found = policies.InForce.of(workspace, line, device_class)
        policy = found.named
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
            found.facts | {"allowed": allowed, "behind": behind, "publication": place.state, "public": not place.private},
            "\n".join([found.text, *allowed, *behind, *place.lines]),
        )  # fmt: skip

"""The command `ferry`."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

import ota
from flows.cli import completion, promotion
from flows.cli.config import config_app
from flows.cli.data import data_app
from flows.cli.delta import delta_app
from flows.cli.devices import fleet_app
from flows.cli.doctor import doctor
from flows.cli.fleet import rollout_app
from flows.cli.gateway import gateway
from flows.cli.poc import poc
from flows.cli.report import explain, rate, report
from flows.cli.shared import (
    Commands,
    Json,
    Options,
    answer,
    fail,
    open_workspace,
    phase,
    reported_errors,
    showing_progress,
    subject_in,
    time_of,
)
from flows.cli.status import status
from flows.cli.trust import trust_app
from flows.cli.tuning import tune
from flows.errors import VariantError
from flows.secrets import Hiding
from ota.errors import exit_codes, printable

FEATURES = "inception:"  # a file name follows; these are the only features that are not the line's own

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Retrain small image-generating models, promote the better ones, and ferry only the difference to the devices.\n\n"
        "Everything is in a workspace, which `ferry init` creates. Commands use the workspace in the current folder, or the "
        f"one that --workspace names.\n\n{exit_codes('ferry')}\n"
    ),
)
app.add_typer(data_app, name="data")
app.add_typer(rollout_app, name="rollout")
app.add_typer(fleet_app, name="fleet")
app.add_typer(trust_app, name="trust")
app.add_typer(delta_app, name="delta")
app.add_typer(config_app, name="config")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ferry {ota.__version__}")
        raise typer.Exit


@app.callback()
def options(
    workspace: Annotated[Path, typer.Option("--workspace", "-w", envvar="FERRY_WORKSPACE", help="The workspace.")] = Path(),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Hide progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Set what holds for all commands."""
    del version  # answered by its callback
    Options.workspace, Options.debug, Options.quiet = workspace, debug, quiet
    if debug:
        os.environ["PREFECT_LOGGING_LEVEL"] = "DEBUG"
    else:
        warnings.simplefilter("ignore")  # warnings of libraries are not for the user; the tests turn them into errors


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the workspace; created if missing.")] = Path(),
    line: Annotated[list[str] | None, typer.Option(help="Name of a line (product); repeat for several lines.")] = None,
    as_json: Json = False,
) -> None:
    """Create a workspace with ferry.toml, keys and a repository.

    Git and DVC are set up with a folder as remote. Run it again if it was killed: it completes the workspace and changes nothing else.
    """
    with reported_errors():
        from flows.setup import create

        made = create(folder, line or ["surfaces"])
        lines = list(made.settings.lines)
        answer(
            as_json, {"workspace": str(made.root), "lines": lines, "root": str(made.root / "root.json")},
            f"{made.root} is a workspace for {', '.join(lines)}.\n"
            f"Next: put images and a metadata.jsonl into {made.root / made.line(lines[0]).data}, then `ferry data add {lines[0]}`.\n"
            f"Move {made.root / 'keys' / 'offline'} to a medium that is not plugged in day by day.",
        )  # fmt: skip


@app.command()
def retrain(
    line: Annotated[str, typer.Argument(help="Line whose models are retrained.")],
    data: Annotated[
        str,
        typer.Option("--data", help="Git revision of the data, or A..B for each after A up to B; the current one by default."),
    ] = "",
    promote: Annotated[bool, typer.Option(help="Promote versions that pass the gate.")] = True,
    seed: Annotated[
        int | None, typer.Option(show_default=False, help="Seed of this run's trainings; recorded in the ledger.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(show_default=False, help="Steps of this run's trainings; recorded in the ledger.")
    ] = None,
    update_budget: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Most that a device may fetch for this update, such as 64KiB; the smallest that passes is taken.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate time and bytes; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train, evaluate and register a line's models; promote winners.

    Pulls a data revision, trains, exports, evaluates, asks the gate, registers in MLflow and promotes. Rerun a killed command; it
    resumes. Without new data, code or settings it does nothing. If no update fits the budget, it says which size would.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import overrides
        from model import versions

        settings, wanted = workspace.line(line), overrides.parse(seed, steps, update_budget)
        wanted.of(settings)  # a budget that the line's method cannot keep is refused here
        with nullcontext() if dry_run else workspace.locked("retraining"):  # say so before large modules are loaded
            pass
        revisions = overrides.revisions(workspace, line, data)
        if not data:
            versions.check_clean(workspace.root, settings.data, line)
        if dry_run:
            from flows.estimate import estimate

            made = estimate(workspace, line, revisions, wanted)
            answer(as_json, made.value, made.text)
            return
        phase("load what trains, and start Prefect: some seconds")
        from flows import retrain as flow
        from flows import serve as schedule
        from registry.budget import in_short
        from registry.lineage import shortened
        from registry.runs import Retrained

        def tell(rows: list[dict[str, Any]]) -> None:
            lines = []
            for row in map(Retrained.model_validate, rows):
                lines.append(f"{row.subject} version {row.version}: {row.outcome}, {printable(shortened(row.reason))}")
                lines += [f"  {in_short(row.update)}"] if row.update else []
            text = "\n".join(lines)
            answer(as_json, {"models": rows}, text)

        try:
            schedule.start_in_process(workspace)
            with showing_progress():
                rows = overrides.each(
                    workspace,
                    line,
                    revisions,
                    wanted,
                    lambda rev: flow.retrain(str(workspace.root), line, rev, promote, seed, steps, wanted.update_budget),
                )
        except VariantError as error:
            tell(error.rows)
            raise
        tell(rows)
        if any(row["outcome"] in ("refuse", "more data", "promote if reasoned") for row in rows):
            raise typer.Exit(5)


@app.command()
def adopt(
    checkpoint: Annotated[
        Path, typer.Argument(help="File of safetensors, or folder of a checkpoint that ferry wrote.", show_default=False)
    ],
    line: Annotated[str, typer.Option(help="Line that the model is for.", show_default=False)],
    configuration: Annotated[str, typer.Option(help="Configuration that the weights are for: I or II.")] = "I",
    source: Annotated[
        str, typer.Option("--from", help="Words that say where the weights come from; the file's name by default.")
    ] = "",
    promote: Annotated[bool, typer.Option(help="Promote it if it passes the gate.")] = True,
    as_json: Json = False,
) -> None:
    """Register weights that were trained elsewhere.

    They are checked, exported, evaluated on the line's present data and judged by the gate like those of a retraining. Later
    retrainings start from them. Pickles are refused, because they are programs.
    """
    with reported_errors():
        workspace = open_workspace()
        from model import adopt as weights
        from model import versions

        settings, chosen = workspace.line(line), workspace.line(line).configuration_called(configuration)
        with workspace.locked("retraining"):  # say so before large modules are loaded
            pass
        found = weights.look(checkpoint)
        words = weights.source_of(source or found.source)
        versions.check_clean(workspace.root, settings.data, line)
        phase("load what evaluates, and start Prefect: some seconds")
        from flows import adopt as flow
        from flows import serve as schedule
        from registry.lineage import shortened

        schedule.start_in_process(workspace)
        with showing_progress():
            rows = flow.adopt(str(workspace.root), line, chosen, str(checkpoint.absolute()), words, promote)
        text = "\n".join(
            f"{r['subject']} version {r['version']}: {r['outcome']}, {printable(shortened(r['reason']))}" for r in rows
        )
        answer(as_json, {"models": rows, "from": words, "file_sha256": found.sha256}, text)
        if any(row["outcome"] in ("refuse", "more data", "promote if reasoned") for row in rows):
            raise typer.Exit(5)


@app.command()
def trigger(
    line: Annotated[str, typer.Argument(help="Line whose models are retrained.")],
    reason: Annotated[str, typer.Option(help="Reason; recorded in the ledger.")],
    event: Annotated[
        str, typer.Option(help="Name of the event; a second event of this name makes no run.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """Ask `ferry serve` to retrain a line.

    Use it for a drift seen in the field, or by hand. If `ferry serve` is not running, it retrains at its next start.
    """
    with reported_errors():
        workspace = open_workspace()
        from datetime import UTC, datetime

        from flows import triggers

        name = event or f"by hand at {datetime.now(UTC).isoformat()}"
        triggers.leave(workspace, line, name, reason)
        answer(as_json, {"line": line, "event": name}, f"{line} is retrained once `ferry serve` has seen this: {reason}")


@app.command()
def evaluate(
    subject: Annotated[str, typer.Argument(help="LINE/CONFIG/VARIANT, such as surfaces/I/full.")],
    version: Annotated[int | None, typer.Argument(min=1, help="Version in MLflow; the champion by default.")] = None,
    features: Annotated[
        str, typer.Option(help="inception:FILE, a TorchScript network for FID. It is a program: use one that you trust.")
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Folder to compare with for FID; the version's data revision by default.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=2, help="Images to draw for FID; as many as in the scorecard by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a version's figures: quality, time, memory, experts.

    With --features it also computes the FID that papers print. FID depends on the number of images: compare it only at equal --n
    (papers: 50000), with the same network and folder.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.figures import measure
        from model.errors import ConfigError
        from registry.figures import find

        if not features and (images or n):
            raise ConfigError("--images and --n say how FID is computed; add --features inception:FILE")
        file = network_file(features) if features else None
        asked = subject_in(workspace, subject)
        chosen = find(workspace, asked, version)
        with showing_progress():
            measured = measure(workspace, chosen, file, images, n)
        answer(as_json, measured.model_dump(mode="json"), measured.text)


def network_file(features: str) -> Path:
    """Return the file that `inception:FILE` names.

    Raises:
        ConfigError: it is not written so.
    """
    from model.errors import ConfigError

    name = features.removeprefix(FEATURES)
    if not name or name == features:
        raise ConfigError(
            f"--features cannot be {features!r}; write {FEATURES}FILE, where FILE is a TorchScript file of Inception weights"
        )
    return Path(name)


@app.command()
def remeasure(
    line: Annotated[str, typer.Argument(help="Line whose models are measured again.")],
    reason: Annotated[str, typer.Option(help="Reason; recorded in the ledger.")],
    data: Annotated[
        str, typer.Option("--data", help="Git revision of the data to fit the feature spaces on; the current one by default.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Fit new feature spaces for a line; measure champions in them.

    Use it if a newer ferry has more feature spaces, or if the data have captions that the old spaces never saw. The gate then compares
    in the new spaces. The best version ever (anchor) is measured, too. Rerun a killed command; it resumes.
    """
    with reported_errors():
        workspace = open_workspace()
        workspace.line(line)
        if not reason.strip():
            from model.errors import ConfigError

            raise ConfigError("new feature spaces need a reason; give it with --reason")
        with workspace.locked("retraining"):  # if another process holds it, say so before large modules are loaded
            pass
        from flows import figures

        with showing_progress():
            made = figures.remeasure(workspace, line, reason, data)
        answer(as_json, made.model_dump(mode="json"), made.text)


app.command()(tune)
app.command()(status)
app.command()(promotion.promote)
app.command()(promotion.rollback)
app.command()(promotion.approve)
app.command()(promotion.reconcile)
app.command()(promotion.history)
app.command()(promotion.seal)


@app.command()
def release(
    target: Annotated[str, typer.Argument(help="LINE/CLASS, or LINE if it has one class.")],
    allow_change: Annotated[
        bool,
        typer.Option("--allow-change", help="Let devices accept images that differ from those they draw now; needs a reason."),
    ] = False,
    reason: Annotated[
        str, typer.Option(show_default=False, help="Reason for --allow-change; signed, and recorded in the ledger.")
    ] = "",
    leave_behind: Annotated[
        bool,
        typer.Option("--leave-behind", help="Publish although the agents of some devices are too old; these keep what they run."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a line's champions as a signed release with deltas.

    Builds the bundle and deltas from the fielded bundles, signs them, and copies the repository to where devices fetch it. Nothing is
    signed if devices would refuse the bundle in their trial, or if their agents are too old for it.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.workspace import line_and_class

        if allow_change != bool(reason.strip()):
            missing = "--reason" if allow_change else "--allow-change"
            fail(f"a change that devices would refuse is allowed with --allow-change and --reason together; add {missing}", 3)
        line, device_class = line_and_class(target, workspace)
        with workspace.locked("release"):  # if another process holds it, say so before large modules are loaded
            pass
        from flows.clone import check_release
        from flows.policies import allowances, behind, check_ledger, check_newest, publication
        from ota.release.chains import described
        from ota.release.fielded import next_step
        from registry.champions import champions

        check_release(workspace)
        check_newest(workspace)
        check_ledger(workspace)
        champions(workspace, workspace.class_subjects(line, device_class))
        from flows.publish import release as flow
        from flows.serve import start_in_process

        start_in_process(workspace)
        with showing_progress():
            made = flow(
                str(workspace.root), line, device_class, reason.strip() if allow_change else None, leave_behind=leave_behind
            )
        deltas = ", ".join(f"{size:,} bytes from {base[:8]}" for base, size in made["deltas"].items())
        said = "\n".join([
            f"{line}/{device_class} release {made['release']}: {made['full_bytes']:,} bytes in full{f'; as a delta {deltas}' if deltas else ''}",
            *(["it holds the same champions as before, so a device that runs it does not install it anew"] if made["known"] else []),
            *([steps] if (steps := described(made["behind"])) else []),
            *allowances(workspace, line, device_class, made["release"]),
            *behind(workspace, line, device_class, made["release"]),
            *(["no device would refuse it, so --allow-change changed nothing"] if allow_change and not made["allowed"] else []),
            *([private] if (private := publication(workspace).private) else []),
            next_step(workspace, line, device_class, made["release"]),
        ])  # fmt: skip
        answer(as_json, made, said)


app.command()(gateway)
app.command()(doctor)
app.command()(poc)
app.command()(report)
app.command()(explain)
app.command()(rate)


@app.command()
def trace(
    what: Annotated[
        str,
        typer.Argument(metavar="HASH|DEVICE", help="Hash of a bundle, file, version, decision or data revision; or a device."),
    ],
    forward: Annotated[
        bool, typer.Option("--forward", help="List all that descends from a data revision to be withdrawn.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trace a hash or device back to its data, and on to devices.

    With --forward, name a data revision (its hash, or what Git calls it). It lists the later revisions that hold files of it, and every
    version, bundle and device that descends from it, also through a parent or teacher.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.trace import forward as find_forward
        from flows.trace import gather
        from registry import trace as tracing

        workspace.fleet.collect(workspace.inbox)
        if forward:
            descent = find_forward(workspace, what)
            answer(as_json, descent.plain(), descent.text())
            return
        found = tracing.trace(gather(workspace), what)
        answer(as_json, found, tracing.text_of(found))


@app.command()
def serve(
    lines: Annotated[list[str] | None, typer.Argument(help="Lines to retrain; all by default.")] = None,
    cron: Annotated[str, typer.Option(help="Schedule as five cron fields.")] = "0 3 * * 1",
    timezone: Annotated[str, typer.Option(help="Time zone of the schedule, such as Europe/Berlin.")] = "UTC",
    look_every: Annotated[
        int,
        typer.Option(
            parser=time_of(1, 86_400),
            metavar="TIME",
            help="Time between two checks for new data and events, such as 30s or 5m.",
        ),
    ] = "30s",  # type: ignore[assignment]
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port of Prefect's page; 0: any free one.")] = 0,
    webhooks: Annotated[
        str,
        typer.Option(metavar="[HOST:]PORT", show_default=False, help="Address for MLflow's signed webhooks; polling goes on."),
    ] = "",
    with_gateway: Annotated[
        bool, typer.Option("--gateway", help="Also run the gateway for devices, as [gateway] in ferry.toml says.")
    ] = False,
) -> None:
    """Retrain by schedule, for new data and events, until stopped.

    Events come from `ferry trigger`. Every poll_seconds, and for each webhook, it does what `ferry reconcile` does. It starts its own
    Prefect server unless PREFECT_API_URL names one. After a crash, restart it: interrupted runs resume.
    """
    with reported_errors():
        workspace = open_workspace()
        chosen = lines or list(workspace.settings.lines)
        for line in chosen:
            workspace.line(line)
        from flows import alerts, schedules
        from flows import gateway as devices
        from flows import serve as schedule

        schedules.check_cron(cron, timezone)
        alerts.check(workspace.settings.alerts)
        with workspace.locked("serving"):
            pass
        from flows.web import webhook

        at = webhook.address_of(webhooks) if webhooks else None
        told = devices.command(workspace, devices.place(workspace)) if with_gateway else None
        with (
            schedule.server(workspace, port) as (address, asked),
            webhook.watching(workspace, at) as taken,
            devices.beside(*told) if told else nullcontext(),
        ):
            if taken:
                typer.echo(
                    f"MLflow's webhooks go to http://{taken[0]}:{taken[1]}{webhook.PATH}, their secret is in "
                    f"{webhook.secret_of(workspace)[1]}",
                    err=True,
                )
            if asked:
                typer.echo(f"Prefect's page asks for a password, which is in {asked}", err=True)
            typer.echo(
                f"retraining {', '.join(chosen)} at {cron!r} ({timezone}) and for new data; Prefect's page is {address.removesuffix('/api')}",
                err=True,
            )
            schedule.serve(workspace, chosen, cron, look_every, timezone)


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option("--dir", help="Folder to play in; a new one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Play the whole story on real photographs in a fresh folder.

    It takes about five minutes and prints a summary. If it is killed, run it again in the same folder; it resumes.
    """
    with reported_errors():
        from flows.demo import Demo, text
        from flows.serve import start_in_process

        story = Demo(folder or _fresh_folder(), lambda line: typer.echo(f"· {printable(line)}", err=True))
        start_in_process(story.workspace)
        with showing_progress():
            story.play()
        summary = story.summary()
        answer(as_json, summary, text(summary))


def _fresh_folder() -> Path:
    """Find the first folder in which no demo was played to its end."""
    from flows.demo import is_finished

    candidates = (Path("ferry-demo" if i == 1 else f"ferry-demo-{i}") for i in range(1, 1000))
    return next(path for path in candidates if not is_finished(path))


def main() -> None:
    """Run the command `ferry`; whatever it or a library writes to stderr, passwords in addresses are not in it."""
    try:
        if completion.ASKED in os.environ:
            completion.tell(app)
        sys.stderr = cast("TextIO", Hiding(sys.stderr))
        app()
    except KeyboardInterrupt:  # before the command itself began
        sys.stderr.write("ferry: interrupted; repeat the command to go on\n")
        sys.exit(130)

"""The command `ferry-agent`."""

from __future__ import annotations

import grp
import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

import ota
from ota.agent.state import Config, Home
from ota.errors import DeviceError, GateError, OperatorError, OtaError, RepositoryError, TransferError

EXIT_CODES = """
Exit codes: 0 done, or nothing to do · 1 a fault of the agent itself · 2 wrong usage · 3 this device cannot (disk, state,
name given) · 4 the repository cannot be reached, try later · 5 what is published does not hold and was not installed ·
6 the new bundle was tried on this device and refused.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=f"Keep the model of this device fresh: verify, apply, try out and, if need be, take back updates.\n{EXIT_CODES}",
)

Directory = Annotated[Path, typer.Option("--dir", envvar="FERRY_AGENT_DIR", help="The agent's directory.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
DEFAULT_DIR = Path("/var/lib/deltaferry")
DEFAULT_SOCKET = Path("/run/deltaferry/agent.sock")


class _Options:
    debug = False
    quiet = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ferry-agent {ota.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and details.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not show progress.")] = False,
    version: Annotated[  # noqa: ARG001 - taken before any command is asked for
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Set what holds for all commands."""
    _Options.debug, _Options.quiet = debug, quiet
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", stream=sys.stderr)


@app.command()
def init(
    device: Annotated[str, typer.Option(help="Id of this device: lower-case letters, digits and '-'.")],
    line: Annotated[str, typer.Option(help="Line (product) whose model it runs.")],
    device_class: Annotated[str, typer.Option("--class", help="Device class, as the factory calls it.")],
    repository: Annotated[str, typer.Option(help="Where releases are published: http(s) address or folder.")],
    root: Annotated[Path, typer.Option(help="Trust anchor: the repository's first root.json, brought by hand.")],
    root_sha256: Annotated[str, typer.Option(help="Its sha256, told over another way (never trusted on first use).")],
    reports: Annotated[str, typer.Option(help="Folder in which reports are left.")] = "",
    window: Annotated[str, typer.Option(help="Hours of UTC in which it may switch, as 22:00-05:00.")] = "",
    prefer: Annotated[str, typer.Option(help="Which variant draws: default, quality, latency or energy.")] = "default",
    latency_ms: Annotated[float | None, typer.Option(help="Budget of milliseconds for one image.", show_default=False)] = None,
    joules: Annotated[float | None, typer.Option(help="Budget of joules for one image.", show_default=False)] = None,
    safe: Annotated[
        str | None, typer.Option(help="Variant for when routes have strayed; the cheapest if not given.", show_default=False)
    ] = None,
    watts: Annotated[
        str, typer.Option(help="IDLE,CORE: what the device takes at rest, and a busy core besides, if it has no sensor.")
    ] = "",
    directory: Directory = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Set this device up: who it is, where it looks, whom it trusts. Prints the public key to enroll.

    Run again, it changes the addresses and the window, and keeps what is installed.
    """
    with _errors():
        from ota.agent import reports as report_queue

        try:
            data = root.read_bytes()
        except OSError as error:
            raise OperatorError(f"cannot read {root}: {error.strerror}; give the path of the repository's root.json") from error
        if hashlib.sha256(data).hexdigest() != root_sha256.lower():
            raise OperatorError(f"{root} does not have the sha256 that was given; do not trust it, ask for the right file")
        try:
            config = Config.model_validate({
                "device": device, "line": line, "device_class": device_class, "repository": _absolute(repository),
                "root_sha256": root_sha256.lower(), "reports": _absolute(reports), "window": window, "prefer": prefer,
                "latency_ms": latency_ms, "joules": joules, "safe": safe, **_watts(watts),
            })  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise OperatorError(f"--{str(first['loc'][0]).replace('_', '-')} is not valid: {first['msg']}") from error
        report_queue.folder_of(config.reports)
        home = Home(directory)
        home.check_same(config)
        home.disk.make_folder("slots")
        report_queue.make_key(home)
        home.disk.replace("root.json", data)
        home.disk.replace("config.json", config.canonical())  # last: with it the directory counts as set up
        key = report_queue.public_key(home)
        _answer(
            as_json,
            {"device": device, "public_key": key},
            f"{device} is set up; enroll it with\n  ferry fleet enroll {device} {key}",
        )


@app.command()
def update(
    check: Annotated[bool, typer.Option("--check", help="Only say what would be done.")] = False,
    directory: Directory = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Bring this device to the release that the signed policy wants of it."""
    with _errors():
        from ota.agent import updater

        home = Home(directory)
        with home.locked():
            result = updater.update(home, None if _Options.quiet else _show_step, check)
        _answer(
            as_json,
            {"changed": result.changed, "active": result.active, "reason": result.reason, "way": result.way, "received": result.received},
            f"{result.reason}{f', by {result.way}, {result.received:,} bytes fetched' if result.changed else ''}",
        )  # fmt: skip


@app.command()
def status(directory: Directory = DEFAULT_DIR, as_json: Json = False) -> None:
    """Say what runs; every file of it is hashed again."""
    with _errors():
        from ota.agent import updater

        found = updater.status(Home(directory))
        text = f"{found['device']} runs nothing yet; run `ferry-agent update`"
        if found["active"]:
            sound = "sound" if found["sound"] else "DAMAGED, run `ferry-agent update`"
            trial = f", on trial: {found['trial']['left']} good images to go" if found["trial"] else ""
            text = (
                f"{found['device']} runs release {found['release']} of {found['line']} ({found['active'][:12]}), {sound}{trial}"
            )
        for digest, why in found["refused"].items():
            text += f"\nrefused {digest[:12]}: {why}"
        _answer(as_json, found, text)


@app.command()
def generate(
    caption: Annotated[str, typer.Argument(help="What to draw; empty for anything.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")] = Path("image.png"),
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same image.")] = 0,
    variant: Annotated[str, typer.Option(help="full, dev or fast; the bundle's default when empty.")] = "",
    directory: Directory = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Draw one image with the model that runs."""
    with _errors():
        from ota.agent import updater

        if variant not in ("", "full", "dev", "fast"):
            raise OperatorError(f"there is no variant {variant!r}; choose full, dev or fast")
        data, how = updater.generate(Home(directory), caption, seed, variant or None)  # type: ignore[arg-type]
        try:
            output.write_bytes(data)
        except OSError as error:
            raise OperatorError(f"cannot write {output}: {error.strerror}; name another file with --output") from error
        figures = {"output": str(output), "milliseconds": round(how["milliseconds"], 1), "peak_mib": round(how["peak_mib"], 1)}
        _answer(as_json, figures, f"{output}: {figures['milliseconds']} ms, {figures['peak_mib']} MiB at its peak")


@app.command()
def rollback(directory: Directory = DEFAULT_DIR, as_json: Json = False) -> None:
    """Go back to the bundle before; the present one is refused from now on."""
    with _errors():
        from ota.agent import updater

        home = Home(directory)
        with home.locked():
            active = updater.rollback(home)
        _answer(as_json, {"active": active}, f"{active[:12]} runs again")


@app.command()
def report(directory: Directory = DEFAULT_DIR, as_json: Json = False) -> None:
    """Deliver reports that are still waiting."""
    with _errors():
        from ota.agent import reports

        home = Home(directory)
        with home.locked():
            left = reports.send(home)
        _answer(as_json, {"waiting": left}, f"{left} reports are waiting" if left else "all reports are delivered")


@app.command()
def run(
    every: Annotated[int, typer.Option(min=10, help="Seconds between two looks; each device varies them.")] = 3600,
    now: Annotated[bool, typer.Option("--now", help="Look at once, not within some minutes.")] = False,
    directory: Directory = DEFAULT_DIR,
) -> None:
    """Look for updates from time to time, until stopped. May be killed at any moment."""
    with _errors():
        from ota.agent import poll
        from ota.agent.updater import Outcome

        home = Home(directory)
        home.config()

        def tell(how: Outcome | OtaError) -> None:
            typer.echo(how.reason if isinstance(how, Outcome) else f"ferry-agent: {how}", err=True)

        # An update may be cut at any moment, so there is nothing to wait for.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        poll.run(home, every, threading.Event(), tell, None if _Options.quiet else _show_step, now)


@app.command()
def serve(
    at: Annotated[Path, typer.Option("--socket", help="Unix socket to listen on, for its owner and group.")] = DEFAULT_SOCKET,
    group: Annotated[str, typer.Option(help="Group that may use the socket.")] = "",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="A port of the loopback instead of a socket.", show_default=False)
    ] = None,
    directory: Directory = DEFAULT_DIR,
) -> None:
    """Draw for other programs on this device: POST /generate, GET /status. Goes on while updates are at work."""
    with _errors():
        from ota.agent import serve as endpoint

        home = Home(directory)
        home.config()
        stopped = _stop_signal()
        listening = endpoint.listening_socket(at, _group(group)) if port is None else endpoint.listening_port(port)
        with listening as server:
            typer.echo(f"listening on {at if port is None else f'http://127.0.0.1:{server.port}'}", err=True)
            endpoint.run(endpoint.Service(home), server, stopped)


@app.command()
def bench(
    images: Annotated[int, typer.Option(min=1, help="Images to draw with each variant.")] = 40,
    joules: Annotated[bool, typer.Option(help="Also measure joules, where there is a sensor; takes minutes.")] = True,
    directory: Directory = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Measure what an image costs here: time, memory, joules with their source or none."""
    with _errors():
        from ota.agent import bench as measuring

        found = measuring.run(
            Home(directory), images, joules, lambda text: None if _Options.quiet else typer.echo(text, err=True)
        )
        _answer(as_json, found, "\n".join(measuring.line(variant, row) for variant, row in found["variants"].items()))


@app.command()
def doctor(
    draw: Annotated[bool, typer.Option(help="Also draw an image with each variant.")] = True,
    directory: Directory = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Say whether this device is fit to run, to update and to report, and what to do if not; exit code 3 if it is not."""
    with _errors():
        from ota.agent import doctor as looks

        found = looks.examine(Home(directory), draw)
        value = {"fit": all(f.level != "fail" for f in found), "findings": [asdict(f) for f in found]}
        _answer(as_json, value, "\n".join(f"{f.level:5} {f.about:13} {f.text}" for f in found))
        if not value["fit"]:
            raise typer.Exit(3)


def _stop_signal() -> threading.Event:
    """Set when the process is told to end."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


def _group(name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise OperatorError(f"there is no group {name!r} here; make it, or name another") from error


def _watts(words: str) -> dict[str, float]:
    if not words:
        return {}
    try:
        idle, core = (float(word) for word in words.split(","))
    except ValueError as error:
        raise OperatorError(
            f"--watts {words!r} is not two numbers; give what the device takes at rest and a busy core besides, as 2.1,3.5"
        ) from error
    return {"idle_watts": idle, "core_watts": core}


def _absolute(place: str) -> str:
    return str(Path(place).absolute()) if place and "://" not in place else place


def _show_step(number: int, name: str) -> None:
    typer.echo(f"{number:2d}/12 {name}", err=True)


def _answer(as_json: bool, value: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(value) if as_json else text)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OtaError as error:
        if _Options.debug:
            raise
        _fail(str(error), _exit_code(error))
    except OSError as error:
        if _Options.debug:
            raise
        _fail(f"the system refused: {error}; check the directory's owner and the disk", 3)


def _exit_code(error: OtaError) -> int:
    if isinstance(error, GateError):
        return 6
    if isinstance(error, RepositoryError):
        return 5
    if isinstance(error, TransferError):
        return 4
    if isinstance(error, (DeviceError, OperatorError)):
        return 3
    return 1


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"ferry-agent: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point."""
    os.umask(0o077)
    app()


if __name__ == "__main__":
    main()

"""The command `ferry-agent`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
            config = Config(
                device=device, line=line, device_class=device_class, repository=_absolute(repository),
                root_sha256=root_sha256.lower(), reports=_absolute(reports), window=window,
            )  # fmt: skip
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

"""The command `ferry-agent`.

It is argparse, not the library that `ferry` has: that one costs a device 8 MiB of memory and a tenth of a second at each look for updates.
"""

from __future__ import annotations

import argparse
import grp
import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

import ota
from ota import output
from ota.agent import rules, window
from ota.agent.state import Config, Home, OwnerError, Rest
from ota.errors import (
    AgentError,
    BusyError,
    DeviceError,
    GateError,
    OperatorError,
    OtaError,
    RepositoryError,
    TransferError,
    exit_codes,
    own_errors,
    printable,
)
from ota.limits import VariantName
from ota.manifest import MOST_TAGS, Trace

ABOUT = f"""Keep this device's model up to date: verify, apply and try updates, and roll them back if necessary.

{textwrap.fill(exit_codes("ferry-agent"), 127)}
"""

MAX_INPUT = 4 * 1024 * 1024  # bytes read of a file that is given at `init`
DEFAULT_DIR = Path("/var/lib/deltaferry")
WAYS = {
    "delta": "by a delta",
    "chain": "by a chain of deltas",
    "full": "in full",
    "kept": "from the bundle that was kept",
    "": "without a download",
}
DEFAULT_SOCKET = Path("/run/deltaferry/agent.sock")
Arguments = argparse.Namespace

_NAME = "give 1 to 40 lower-case letters, digits and '-', and begin with a letter or digit"
_NUMBER = "give a number above 0, 1000000 at most"
_PLACE = "of 500 characters at most, none of them a control character"
_WATTS = "give the watts at rest (0 to 10000) and the watts that a busy core adds (above 0, at most 10000), such as 2.1,3.5"
WRITTEN = {
    "device": ("device", _NAME), "line": ("line", _NAME), "device_class": ("class", _NAME),
    "repository": ("repository", f"give an http(s) address or a folder, {_PLACE}"), "reports": ("reports", f"give a folder or an https address, {_PLACE}"),
    "tags": ("tag", f"give a name and a value such as site=berlin, {MOST_TAGS} of them at most"), "share": ("share", "choose all or minimal"),
    "window": ("window", window.WRITTEN), "prefer": ("prefer", "choose default, quality, latency or energy"),
    "latency_ms": ("latency-ms", _NUMBER), "joules": ("joules", _NUMBER), "safe": ("safe", "choose full, dev, fast or turbo"),
    "authorities": ("ca", "give fewer certificates"), "idle_watts": ("watts", _WATTS), "core_watts": ("watts", _WATTS),
}  # fmt: skip
"""Name the option of `init` for each field of the configuration, and say how its value is written."""


def parser() -> argparse.ArgumentParser:
    """Define all commands and their options."""
    root = argparse.ArgumentParser(
        "ferry-agent", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    root.add_argument("--debug", action="store_true", help="show tracebacks and details")
    root.add_argument("--quiet", action="store_true", help="do not show progress")
    root.add_argument("--version", action="version", version=f"ferry-agent {ota.__version__}")
    commands = root.add_subparsers(metavar="COMMAND", title="commands")

    def command(does: Callable[[Arguments], int | None], *, answers: bool = True) -> argparse.ArgumentParser:
        about = does.__doc__ or ""  # python -OO has none
        made = commands.add_parser(
            does.__name__, help=about.partition("\n")[0], description=" ".join(about.split()), allow_abbrev=False,
        )  # fmt: skip
        made.set_defaults(does=does)
        made.add_argument(
            "--dir", type=_folder, metavar="FOLDER", default=os.environ.get("FERRY_AGENT_DIR", str(DEFAULT_DIR)),
            help="the agent's directory, also as FERRY_AGENT_DIR (%(default)s)",
        )  # fmt: skip
        if answers:
            made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return made

    made = command(init)
    made.add_argument("--device", required=True, metavar="ID", help="id of this device: lower-case letters, digits and '-'")
    made.add_argument("--line", required=True, help="line (product) whose model it runs")
    made.add_argument(
        "--class", dest="device_class", required=True, metavar="CLASS", help="device class, as the factory calls it"
    )
    made.add_argument("--repository", required=True, metavar="PLACE", help="published repository: http(s) address or folder")
    made.add_argument(
        "--root", type=Path, required=True, metavar="FILE", help="trust anchor: the repository's root.json, copied by hand"
    )
    made.add_argument(
        "--root-sha256", required=True, metavar="HEX", help="sha256 of FILE, from another channel (never trust on first use)"
    )
    made.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="PEM certificates of the authority that signs the repository's certificate and the gateway's; kept",
    )
    made.add_argument(
        "--reports", default="", metavar="PLACE",
        help="folder for reports, which the agent never creates, or the gateway's https address; --ca holds for it, too",
    )  # fmt: skip
    made.add_argument(
        "--tag", dest="tags", action="append", metavar="NAME=VALUE",
        help="group of this device, such as site=berlin; give it again for more, 8 at most; an empty one removes all (as before)",
    )  # fmt: skip
    made.add_argument(
        "--share",
        help="all, or minimal: heartbeats then hold health counters only, and nothing of what the images look like or are of (as before, or all)",
    )  # fmt: skip
    made.add_argument(
        "--new-key", action="store_true",
        help="make a new key, such as for a copy of another device's disk under another ID; its waiting reports are dropped",
    )  # fmt: skip
    made.add_argument(
        "--window",
        default="",
        metavar="HOURS",
        help="hours in which it may switch, in UTC or a time zone: '22:00-05:00 Europe/Berlin'",
    )
    made.add_argument(
        "--prefer", default="default", help="choice of the variant: default, quality, latency or energy (%(default)s)"
    )
    made.add_argument("--latency-ms", type=float, metavar="N", help="time budget for one image, in milliseconds")
    made.add_argument("--joules", type=float, metavar="N", help="energy budget for one image, in joules")
    made.add_argument("--safe", metavar="VARIANT", help="variant to use after a routing shift; the cheapest by default")
    made.add_argument(
        "--watts",
        default="",
        metavar="IDLE,CORE",
        help="power at rest, and of one busy core in addition, if there is no sensor",
    )

    made = command(enroll)
    made.add_argument(
        "--token-file", type=Path, required=True, metavar="FILE",
        help="file with the token from the factory's operator (`ferry fleet invite`); the token counts once and is never shown",
    )  # fmt: skip

    made = command(update)
    made.add_argument("--check", action="store_true", help="only print what would be done")
    made.add_argument(
        "--progress", choices=["text", "json"], default="text",
        help="show steps as text on stderr, or as one line of JSON each on stdout, with the result as the last line (%(default)s)",
    )  # fmt: skip

    command(status)

    made = command(generate)
    made.add_argument("caption", nargs="?", default="", metavar="CAPTION", help="caption to draw; empty for any image")
    made.add_argument(
        "-o", "--output", type=Path, default=Path("image.png"), metavar="FILE", help="PNG file to write (%(default)s)"
    )
    made.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="seed; the same seed gives the same image (%(default)s)"
    )
    made.add_argument("--variant", default="", help="full, dev, fast or turbo; the bundle's default by default")
    made.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="JSON file to write with the load of the experts by step and block; it holds the caption, and never leaves the device by itself",
    )  # fmt: skip

    command(rollback)

    made = command(forget)
    made.add_argument("bundle", metavar="HASH", help="hash of the bundle, or its first digits as `ferry-agent status` shows them")

    made = command(history)
    made.add_argument(
        "-n", "--number", type=_at_least(1), default=100, metavar="N", help="show at most the newest N entries (%(default)s)"
    )

    made = command(report)
    chosen = made.add_mutually_exclusive_group()
    chosen.add_argument(
        "--beat", action="store_true", help="send a heartbeat too, if one is due: every 6 hours or so, whoever asks"
    )
    chosen.add_argument(
        "--show", action="store_true", help="print the lines that would leave this device now, byte for byte, and send nothing"
    )

    made = command(run, answers=False)
    made.add_argument(
        "--every",
        type=_time(10, 30 * 86_400),
        default=3600,
        metavar="TIME",
        help="time between two checks, such as 30m or 6h; a bare number is seconds; each device varies it (1h)",
    )
    made.add_argument("--now", action="store_true", help="check at once, not after a few minutes")

    made = command(serve, answers=False)
    made.add_argument(
        "--socket", type=Path, default=DEFAULT_SOCKET, metavar="FILE",
        help="Unix socket to listen on, for owner and group (%(default)s)",
    )  # fmt: skip
    made.add_argument("--group", default="", help="group that may use the socket")
    made.add_argument("--port", type=_at_least(0, 65535), metavar="N", help="loopback port to listen on instead of a socket")

    made = command(bench)
    made.add_argument(
        "--images",
        type=_at_least(rules.LEAST_IMAGES, rules.MOST_IMAGES),
        default=40,
        metavar="N",
        help=f"images to draw with each variant, {rules.LEAST_IMAGES} to {rules.MOST_IMAGES} (%(default)s)",
    )
    made.add_argument("--no-joules", dest="joules", action="store_false", help="do not measure energy, which takes minutes")
    made.add_argument(
        "--kit", type=Path, metavar="FOLDER", help="measure the candidates of this PoC kit instead; needs no agent's directory"
    )
    made.add_argument(
        "--seconds", type=_at_least(1, 3600), default=20, metavar="N",
        help="with --kit: begin no further image of a candidate after N seconds (%(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--watts", default="", metavar="IDLE,CORE", help="with --kit: power at rest, and of one busy core in addition, if there is no sensor"
    )  # fmt: skip

    made = command(doctor)
    made.add_argument("--no-draw", dest="draw", action="store_false", help="do not draw an image with each variant")
    return root


def _folder(text: str) -> Path:
    if not text.strip():  # an empty path would mean the current folder
        raise argparse.ArgumentTypeError("it is empty; give the agent's directory, here or as FERRY_AGENT_DIR")
    return Path(text)


def _at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not low <= (value := int(text)) <= (value if high is None else high):
            raise argparse.ArgumentTypeError(f"{value} is not {low} or more{'' if high is None else f', up to {high}'}")
        return value

    return number


def _time(low: int, high: int) -> Callable[[str], int]:
    def seconds(text: str) -> int:
        from ota import durations

        try:
            value = durations.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more, up to {high}")
        return value

    return seconds


def init(given: Arguments) -> None:
    """Set up this device: identity, repository, trust anchor.

    It prints the public key to enroll. Run it again to change addresses or the window; what is installed stays, and so do tags and what is shared.
    """
    from ota.agent import network
    from ota.agent import reports as report_queue
    from ota.agent.channel import place_of
    from ota.agent.transport import Folder, connect

    data = _read(given.root, "the repository's root.json")
    if hashlib.sha256(data).hexdigest() != given.root_sha256.lower():
        raise OperatorError(f"{given.root} does not have the sha256 that was given; do not trust it, and ask for the right file")
    home = Home(given.dir)
    before = _before(home)
    tags = before.tags if given.tags is None and before else [tag for tag in given.tags or [] if tag]
    try:
        config = Config.model_validate({
            "device": given.device, "line": given.line, "device_class": given.device_class, "repository": _absolute(given.repository),
            "authorities": network.certificates(_read(given.ca, "the authority's certificate")) if given.ca else "", "root_sha256": given.root_sha256.lower(), "reports": _absolute(given.reports.strip()), "window": given.window,
            "tags": tags, "share": given.share or (before.share if before else "all"),
            "prefer": given.prefer, "latency_ms": given.latency_ms, "joules": given.joules, "safe": given.safe, **_watts(given.watts),
        })  # fmt: skip
    except ValidationError as error:
        raise OperatorError(_not_valid(str(error.errors()[0]["loc"][0]))) from error
    names = [tag.partition("=")[0] for tag in config.tags]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OperatorError(f"--tag gives {twice} twice; give each name one value")
    if problem := window.problem(config.window):
        raise OperatorError(f"--window is not valid: {problem}")
    try:
        place = connect(config.repository, config.authorities)
    except TransferError as error:
        raise OperatorError(_not_valid("repository")) from error
    if isinstance(place, Folder):
        _check_folder("repository", place.folder)
    reported = place_of(config.reports) if config.reports else Path()
    if config.reports and isinstance(reported, Path):
        _check_folder("reports", reported)
    home.check_owner()
    home.check_same(config, given.new_key)
    home.disk.make_folder("slots")
    if given.new_key:
        report_queue.drop_key(home)
    report_queue.make_key(home)
    home.disk.replace("root.json", data)
    report_queue.forget_gateway(home)
    home.disk.replace("config.json", config.canonical())  # last: with it the directory counts as set up
    key = report_queue.public_key(home)
    _answer(
        given.json,
        {"device": given.device, "public_key": key},
        f"{given.device} is set up; enroll it with\n  ferry fleet enroll {given.device} {key}"
        + (
            ""
            if isinstance(reported, Path)
            else "\nor here, with a token of the operator:\n  ferry-agent enroll --token-file FILE"
        ),
    )


def _before(home: Home) -> Config | None:
    """Return the configuration of an earlier `init`; None: there is none that can be read."""
    try:
        return home.config()
    except DeviceError:
        return None


def enroll(given: Arguments) -> None:
    """Enrol this device at the factory's gateway, with a token of its operator."""
    from ota.agent import enroll as enrolment

    home = Home(given.dir)
    home.check_owner()
    confirmed = enrolment.enroll(home, enrolment.token_in(given.token_file))
    device = home.config().device
    _answer(given.json, {"device": device, "confirmed": confirmed}, enrolment.told(device, confirmed))


def update(given: Arguments) -> None:
    """Install the release that the signed policy selects for this device."""
    from ota.agent import progress, updater

    home, as_json = Home(given.dir), given.progress == "json"
    with progress.told(as_json, _exit_code) as show, home.locked():
        result = updater.update(home, show or _shown(given), given.check)
    _answer(
        given.json or as_json,
        {"changed": result.changed, "active": result.active, "reason": result.reason, "way": result.way, "received": result.received},
        f"{result.reason}{f', {WAYS[result.way]}, {result.received:,} bytes fetched' if result.changed else ''}",
    )  # fmt: skip


def status(given: Arguments) -> None:
    """Show what runs, and verify every file of it again."""
    from ota.agent import reports, slots

    found = slots.status(Home(given.dir))
    text = f"{found['device']} runs nothing yet; run `ferry-agent update`"
    if found["active"]:
        sound = "sound" if found["sound"] else "DAMAGED, run `ferry-agent update`"
        trial = f", on trial: {found['trial']['left']} good images to go" if found["trial"] else ""
        release = f"release {found['release']}" if found["release"] else "a release that the factory's present keys do not name"
        text = f"{found['device']} runs {release} of {found['line']} ({found['active'][:12]}), {sound}{trial}"
    for digest, why in found["refused"].items():
        text += f"\nrefused {digest[:12]}: {printable(why)}; {rules.lifting(digest)}"
    if found["rests"]:
        text += f"\n{rules.resting(Rest(**found['rests']))}"
    if waiting := found["waiting_reports"]:
        text += f"\n{waiting} report{'s wait' if waiting > 1 else ' waits'} to be delivered{f': {problem}' if (problem := found['reports_problem']) else ''}"
    text += "".join(f"\n{line}" for line in reports.told(found["gateway"]))
    _answer(given.json, found, text)


def generate(given: Arguments) -> None:
    """Draw one image with the model that runs."""
    from ota.agent import drawing

    home = Home(given.dir)
    records = [home.root / name for name in output.AGENT]
    output.check_chosen(given.output, "image.png", records=records)
    if given.variant not in ("", *get_args(VariantName)):
        raise OperatorError(f"there is no variant {given.variant!r}; choose full, dev, fast or turbo")
    if given.trace:
        output.check_chosen(given.trace, "trace.json", [given.output], records)
        if _same_place(given.trace, given.output):
            raise OperatorError(f"--trace and --output both name {output.shown(given.output)}; name another place")
    data, how = drawing.generate(home, given.caption, given.seed, given.variant or None, trace=given.trace is not None)
    with output.fresh(given.output) as file:
        file.write(data)
    figures = {"output": str(given.output), "milliseconds": round(how["milliseconds"], 1), "peak_mib": round(how["peak_mib"], 1)}
    text = f"{given.output}: {figures['milliseconds']} ms, {figures['peak_mib']} MiB at its peak"
    if given.trace:
        line = home.config().line
        kept = Trace(line=line, bundle=how["bundle"], caption=given.caption, seed=given.seed, **how["trace"])
        with output.fresh(given.trace, mode=0o600) as file:
            file.write(kept.canonical() + b"\n")
        figures["trace"], text = (
            str(given.trace),
            f"{text}\n{given.trace}: load of the experts; show it with `ferry explain --trace`",
        )
    _answer(given.json, figures, text)


def _same_place(one: Path, other: Path) -> bool:
    return (one.parent.resolve(), one.name) == (other.parent.resolve(), other.name)


def rollback(given: Arguments) -> None:
    """Roll back to the previous bundle, and refuse the current one."""
    from ota.agent import trial

    home = Home(given.dir)
    with home.locked():
        active, refused = trial.rollback(home)
    _answer(
        given.json,
        {"active": active, "refused": refused},
        f"{active[:12]} runs again, and {refused[:12]} is refused from now on\n"
        f"to undo this, run `ferry-agent forget {refused[:12]}`; then the next update installs what the factory offers",
    )


def forget(given: Arguments) -> None:
    """Lift the refusal of a bundle, so that an update may try it again."""
    from ota.agent import trial

    home = Home(given.dir)
    with home.locked():
        digest = trial.forget(home, given.bundle)
    _answer(
        given.json,
        {"forgotten": digest},
        f"{digest[:12]} is not refused any more; `ferry-agent update` tries it if it is offered",
    )


def history(given: Arguments) -> None:
    """Show what happened on this device: releases, refusals and failed updates, the newest last."""
    from ota.agent import history as past

    home = Home(given.dir)
    home.config()
    found = past.read(home)[-given.number :]
    text = "\n".join(map(past.line, found)) or "nothing has happened yet; run `ferry-agent update`"
    _answer(given.json, {"entries": [entry.model_dump(mode="json") for entry in found]}, text)


def report(given: Arguments) -> None:
    """Deliver waiting reports; exit code 4 if some cannot be delivered."""
    from ota.agent import beat, reports

    home = Home(given.dir)
    if given.show:
        return _show_reports(given.json, [line.decode() for line in beat.waiting(home)], beat.due(home))
    try:
        with home.locked():
            if given.beat:
                beat.queue_if_due(home)
            left = reports.send(home)
            why = reports.problem(home)
    except BusyError as error:
        if not given.beat:
            raise
        return _answer(given.json, {"waiting": None}, f"{error}; the timer looks again")  # no fault of the unit
    if not left:
        return _answer(given.json, {"waiting": 0}, "all reports are delivered")
    if given.json:
        _answer(True, {"waiting": left, "problem": why}, "")
    raise TransferError(f"{left} report{'s are' if left > 1 else ' is'} waiting: {why}")


def _show_reports(as_json: bool, lines: list[str], due: int) -> None:
    if as_json:
        return _answer(True, {"lines": lines, "next_heartbeat": due}, "")
    for line in lines:
        _answer(False, {}, line)
    if not lines:
        _answer(False, {}, "nothing would leave this device now")
    return None


def run(given: Arguments) -> None:
    """Check for updates regularly, until stopped; safe to kill."""
    from ota.agent import poll
    from ota.agent.notify import Supervisor
    from ota.agent.updater import Outcome

    home = Home(given.dir)
    home.config()

    supervisor, show = Supervisor(), _shown(given)

    def tell(how: Outcome | OtaError) -> None:
        _tell(how.reason if isinstance(how, Outcome) else f"ferry-agent: {how}")
        supervisor.does(how.reason if isinstance(how, Outcome) else str(how))

    def on_step(number: int, name: str) -> None:
        supervisor.does(f"updates: step {number} of 12, {name}")
        if show:
            show(number, name)

    def stop(*_: object) -> None:  # an update may be cut at any moment, so there is nothing to wait for
        supervisor.stopping()
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    poll.run(home, given.every, threading.Event(), tell, on_step, given.now, supervisor)


def serve(given: Arguments) -> None:
    """Serve images to other programs: POST /generate, GET /status.

    It goes on during updates.
    """
    from ota.agent import serve as endpoint

    home = Home(given.dir)
    home.check_owner()
    home.config()
    stopped = _stop_signal()
    listening = (
        endpoint.listening_socket(given.socket, _group(given.group))
        if given.port is None
        else endpoint.listening_port(given.port)
    )
    with listening as server:
        _tell(f"listening on {given.socket if given.port is None else f'http://127.0.0.1:{server.port}'}")
        endpoint.run(endpoint.Service(home), server, stopped)


def bench(given: Arguments) -> int | None:
    """Measure an image here: time, memory, and energy with its source.

    With --kit it measures the networks of a kit that `ferry poc` made. It then needs neither a factory nor a network. Send its --json back.
    """
    if given.kit is not None:
        return _bench_kit(given)
    from ota.agent import bench as measuring

    found = measuring.run(Home(given.dir), given.images, given.joules, (lambda _: None) if given.quiet else _tell)
    _answer(given.json, found, "\n".join(measuring.line(variant, row) for variant, row in found["variants"].items()))
    return None


def _bench_kit(given: Arguments) -> int:
    """Measure a kit, and answer with what was measured even if the user or the system ends it; exit code 130 then."""
    from ota.agent import poc

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    watts, before = _watts(given.watts) or None, signal.signal(signal.SIGTERM, ended)
    try:
        found = poc.run(given.kit, given.images, given.seconds, watts, given.joules, (lambda _: None) if given.quiet else _tell)
    finally:
        signal.signal(signal.SIGTERM, before)
    _answer(given.json, found.model_dump(mode="json"), poc.text(found))
    if found.rows[-1].failed == poc.INTERRUPTED:
        return 130
    return 0 if any(not row.failed for row in found.rows) else 3


def doctor(given: Arguments) -> int:
    """Check that this device can run, update and report.

    It says what to do about each problem. Exit code 3 if there is one.
    """
    from ota.agent import doctor as looks

    found = looks.examine(Home(given.dir), given.draw)
    value = {"fit": all(f.level != "fail" for f in found), "findings": [asdict(f) for f in found]}
    _answer(given.json, value, "\n".join(f"{f.level:5} {f.about:13} {f.text}" for f in found))
    return 0 if value["fit"] else 3


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
        raise OperatorError(f"there is no group {name!r} on this machine; create it, or name another") from error


def _watts(words: str) -> dict[str, float]:
    if not words:
        return {}
    try:
        idle, core = (float(word) for word in words.split(","))
    except ValueError as error:
        raise OperatorError(_not_valid("idle_watts")) from error
    return {"idle_watts": idle, "core_watts": core}


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_INPUT)
    except OSError as error:
        raise OperatorError(f"cannot read {path}: {error.strerror}; give the path of {what}") from error


def _absolute(place: str) -> str:
    address = "://" in place or place.lower().startswith(("http:", "https:", "file:"))
    return str(Path(place).absolute()) if place.strip() and not address else place


def _not_valid(field: str) -> str:
    option, written = WRITTEN[field]
    return f"--{option} is not valid; {written}"


def _check_folder(option: str, folder: Path) -> None:
    """Refuse what lies in a folder's place. A folder may still be missing: it may be mounted later."""
    from ota.agent.channel import MOUNT_SECONDS
    from ota.agent.transport import within

    def in_its_place() -> Path | None:
        return next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)

    with suppress(OSError, TransferError):  # the folder may be readable, or its mount may answer, when it is needed
        if found := within(MOUNT_SECONDS, folder, in_its_place):
            raise OperatorError(f"--{option} is not valid: {found} is not a folder; give one")


def _as_owner(owner: str, words: list[str], given: Arguments) -> str:
    """Write the same command for the directory's owner, to be copied; sudo keeps neither PATH nor variables.

    Passwords are left out, because the message may be logged.
    """
    from ota.agent.network import bare

    program = Path(sys.argv[0]).absolute()
    start = [str(program)] if program.name == "ferry-agent" else [sys.executable, "-m", "ota.agent.cli"]
    at = words.index(given.does.__name__) + 1
    rest = [
        word for before, word in pairwise(["", *words[at:]]) if "--dir" not in (before, word) and not word.startswith("--dir=")
    ]
    return shlex.join(["sudo", "-u", owner, *start, *words[:at], "--dir", str(given.dir.absolute()), *map(bare, rest)])


class _OneLine(logging.Formatter):
    """What a library logs may quote a stranger, too."""

    def format(self, record: logging.LogRecord) -> str:
        """Make it printable; the lines of a traceback stay lines."""
        return printable(super().format(record), limit=100_000, keep="\n" if record.exc_info else "")


def _log(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _tell(text: str) -> None:
    with suppress(OSError):  # a log that is full, or that nobody reads any more, is no reason to end an update
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()


def _show_step(number: int, name: str) -> None:
    _tell(f"{number:2d}/12 {name}")


def _shown(given: Arguments) -> Callable[[int, str], None] | None:
    return None if given.quiet else _show_step


def _answer(as_json: bool, value: dict[str, Any], text: str) -> None:
    shown = json.dumps(value) if as_json else printable(text, limit=100_000, keep="\n")
    try:
        sys.stdout.write(f"{shown}\n")
        sys.stdout.flush()
    except OSError as error:
        raise OperatorError(
            f"the command succeeded, but its answer cannot be written: {error.strerror}; see `ferry-agent status`"
        ) from error


def _exit_code(error: OtaError) -> int:
    if isinstance(error, GateError):
        return 6
    if isinstance(error, AgentError):
        return 7
    if isinstance(error, RepositoryError):
        return 5
    if isinstance(error, TransferError):
        return 4
    if isinstance(error, (DeviceError, OperatorError)):
        return 3
    return 1


def call(words: list[str]) -> int:
    """Run what the words after `ferry-agent` say.

    Returns:
        the exit code.

    Raises:
        SystemExit: wrong usage, or help was asked for.
    """
    speaks = parser()
    given = speaks.parse_args(words)
    if "does" not in given:
        speaks.print_help()
        return 2
    _log(logging.DEBUG if given.debug else logging.WARNING)
    try:
        with own_errors():
            return given.does(given) or 0
    except OtaError as error:
        if given.debug:
            raise
        how = f", with `{_as_owner(error.owner, words, given)}`" if isinstance(error, OwnerError) else ""
        _tell(f"ferry-agent: {error}{how}")
        return _exit_code(error)


def main() -> None:
    """Run the command `ferry-agent`."""
    os.umask(0o077)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # it was closed: otherwise the next file that we open would receive the output
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    try:
        sys.exit(call(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # it was reported already; at its end Python would try again and change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()

"""Check whether this device is fit to run its model, to update it and to report. The checks leave nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

from ota.agent import channel, child, energy, reports, rules
from ota.agent.ground import Finding, Level, directory, inodes, time_of_day
from ota.agent.page import not_metadata
from ota.agent.slots import is_sound
from ota.agent.state import Home, opened
from ota.agent.transport import bare, connect, read_small, within
from ota.errors import DeviceError, OperatorError, OtaError, TransferError, printable
from ota.manifest import MAX_TABLE, MiB, SamplerTable, parse

SOON = 2 * 24 * 3600  # seconds before a signature expires, from which on there is a warning
MANY_WAITING = 20  # reports


def examine(home: Home, draw: bool = True) -> list[Finding]:
    """Run all checks; one that fails does not stop the others.

    Args:
        home: the agent's directory; not locked.
        draw: also draw an image with each variant of the running bundle, which takes seconds.
    """
    looks: list[tuple[str, Callable[[Home], Iterator[Finding]]]] = [
        ("directory", directory), ("trust anchor", _anchor), ("clock", time_of_day), ("state", _state), ("bundles", _bundles), ("room", _room),
        ("signatures", _signatures), ("repository", _repository), ("reports", _reports), ("runtime", _runtime), ("energy", _energy),
    ]  # fmt: skip
    if draw:
        looks.append(("drawing", _drawing))
    found: list[Finding] = []
    for about, look in looks:
        try:
            found += look(home)
        except OtaError as error:
            found.append(Finding(about, "fail", str(error)))
        except OSError as error:
            found.append(Finding(about, "fail", f"the system refused: {error}; check the directory's owner and the disk"))
    return found


def _anchor(home: Home) -> Iterator[Finding]:
    home.root_bytes()
    yield Finding("trust anchor", "ok", f"root.json has the hash given at init, {home.config().root_sha256[:12]}")


def _state(home: Home) -> Iterator[Finding]:
    state = home.load()
    rest = home.rest()
    rests = rest is not None and rest.until > time.time()
    if state.active:
        yield Finding("state", "ok", f"release {state.seq} runs")
    elif state.refused or rests:  # an update would change nothing
        yield Finding("state", "fail", "nothing is installed, because the offered bundle failed its trial")
    else:
        yield Finding("state", "warn", "nothing is installed yet; run `ferry-agent update`")
    for name in ("state.json", "state.prev.json"):
        data = home.disk.read(name)
        if data is not None and opened(data) is None:
            yield Finding("state", "warn", f"{name} is damaged, so its copy is used; check the disk")
    if state.trial:
        yield Finding("state", "warn", f"a bundle is on trial, {state.trial.left} good images to go; run `ferry-agent update`")
    for digest, why in list(state.refused.items())[-3:]:
        yield Finding("state", "warn", f"{digest[:12]} was refused: {printable(why)}; {rules.lifting(digest)}")
    if rest and rests:
        yield Finding("state", "warn", rules.resting(rest))


def _bundles(home: Home) -> Iterator[Finding]:
    state = home.load()
    for name, digest in (("active", state.active), ("previous", state.previous)):
        if digest and is_sound(home, digest):
            yield Finding("bundles", "ok", f"{name} {digest[:12]}: every file has its hash")
        elif digest:
            level: Level = "fail" if name == "active" else "warn"
            yield Finding("bundles", level, f"{name} {digest[:12]} is damaged; `ferry-agent update` repairs what runs")


def _room(home: Home) -> Iterator[Finding]:
    active, free = home.load().active, home.disk.free()
    size = home.slot(active).manifest.size if active else 0
    needed = rules.room_needed(size, size)
    yield from inodes(home)
    level: Level = "ok" if free >= needed else "warn"
    yield Finding("room", level, f"{free / 1e6:,.0f} MB are free; a full update of this size needs {needed / 1e6:,.0f} MB")


def _signatures(home: Home) -> Iterator[Finding]:
    """Check when the cached metadata expire; only the next update sees what the repository has now."""
    now = time.time()
    folder = home.disk.path("metadata")
    try:
        listed = json.loads((folder / "snapshot.json").read_bytes())["signed"]["meta"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = {}
    for path in sorted(folder.glob("*.json")):
        try:
            signed = json.loads(path.read_bytes())["signed"]
            ends = datetime.fromisoformat(signed["expires"]).timestamp()
            if listed.get(path.name, signed)["version"] > signed["version"]:
                continue  # the factory has signed it again; an update fetches it when it needs it, as deltas
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # the next update replaces a torn cache file
        if ends < now:
            yield Finding(
                "signatures",
                "fail",
                f"{path.stem} ended {_span(now - ends)} ago when it was last fetched; the factory must sign it again",
            )
        elif ends < now + SOON:
            yield Finding("signatures", "warn", f"{path.stem} ends in {_span(ends - now)}; the factory should sign it again")
        else:
            yield Finding("signatures", "ok", f"{path.stem} holds for {_span(ends - now)}")


def _span(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.0f} hours"


def _repository(home: Home) -> Iterator[Finding]:
    address = home.config().repository
    try:
        start = time.perf_counter()
        with closing(connect(address, home.config().authorities)) as transport:
            problem = not_metadata(read_small(transport, "metadata/timestamp.json", MiB))
    except TransferError as error:
        yield Finding("repository", "warn", f"{error}; the running model is kept")
    else:
        if problem:
            yield Finding("repository", "fail", f"{bare(address)}: {problem}; the running model is kept")
            return
        yield Finding("repository", "ok", f"{bare(address)} answers in {1000 * (time.perf_counter() - start):.0f} ms")


def _reports(home: Home) -> Iterator[Finding]:
    config, waiting = home.config(), len(list(home.disk.path("queue").glob("*.json")))
    yield Finding("reports", "ok", f"the key to enroll is {reports.public_key(home)}")
    if not config.reports:
        wait = f"{waiting} wait; " if waiting else ""
        yield Finding("reports", "warn", f"{wait}{reports.NO_FOLDER}")
        return
    kept = f"reports are kept, at most {reports.MAX_QUEUE}"
    try:
        place = channel.place_of(config.reports)
        if isinstance(place, Path):
            problem = within(channel.MOUNT_SECONDS, place, lambda: _not_writable(place))
        else:
            with closing(channel.Gateway(place, config.authorities)) as gateway:
                problem = gateway.look()
        if problem:
            yield Finding("reports", "fail", f"{problem}; {kept}")
    except (OperatorError, TransferError) as error:
        yield Finding("reports", "fail", f"{error}; {kept}")
    said = reports.heard(home)
    if said.copies:
        yield Finding("reports", "warn", reports.two_copies(said))
    if said.refusal:
        yield Finding("reports", "warn", f"the factory refused {said.refusal}")
    if waiting and (why := reports.problem(home)):
        yield Finding("reports", "fail", f"{waiting} wait; when last tried: {why}")
    elif waiting:
        yield Finding("reports", "warn" if waiting > MANY_WAITING else "ok", f"{waiting} wait to be delivered")


def _not_writable(folder: Path) -> str:
    if not folder.is_dir():
        return channel.missing(folder)
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def _runtime(home: Home) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("runtime", "fail", "ONNX Runtime is not installed; install deltaferry-agent with what it depends on")
        return
    active = home.load().active
    if active is None:
        yield Finding("runtime", "ok", f"ONNX Runtime {version}")
        return
    slot = home.slot(active)
    for variant in slot.manifest.variants:
        table = parse(SamplerTable, slot.read("sampler", variant), MAX_TABLE)
        problem = rules.check_runtime(table.runtime.onnxruntime, version)
        yield Finding(
            "runtime", "fail" if problem else "ok", problem or f"the variant {variant} was scored with ONNX Runtime {version}"
        )


def _energy(home: Home) -> Iterator[Finding]:
    config = home.config()
    watts = (config.core_watts, config.idle_watts)
    found = energy.probe(table={energy.BUSY: watts[0], energy.IDLE: watts[1]} if watts != (None, None) else None)
    if found.sensor:
        yield Finding(
            "energy", "ok", f"joules come from {found.sensor.source} ({found.sensor.quality}); {found.sensor.note}".rstrip("; ")
        )
    else:
        yield Finding("energy", "ok", f"there is no sensor, so energy is not measured. {' '.join(found.skipped)}")


def _drawing(home: Home) -> Iterator[Finding]:
    state = home.load()
    if state.active is None or state.trial:  # loads of a bundle on trial are counted; a check must not use them up
        return
    slot = home.slot(state.active)
    for variant in slot.manifest.variants:
        answer = child.run("generate", slot=str(slot.folder), digest=slot.digest, variant=variant, caption="", seed=0)
        if not answer["good"]:
            raise DeviceError(f"{variant} makes an image that is constant or not finite; run `ferry-agent rollback`")
        budget = slot.reference(variant).latency_ms
        level: Level = "ok" if answer["milliseconds"] <= budget else "warn"
        text = f"{variant}: an image in {answer['milliseconds']:.0f} ms of {budget:.0f}, {answer['peak_mib']:.0f} MiB at its peak"
        yield Finding("drawing", level, text)

"""Every state that a power cut can leave of an agent's directory: a model always runs, and no promise is forgotten.

Each scenario is recorded once (`tests.crash_kit`). The directory is then laid out as a power cut before or after each
operation could leave it. In each distinct state, the agent must name a sound bundle and remember what it had promised,
without a network. Once the network is back, it must end with the same bytes as if nothing had happened. A process may also
be killed first: the next process then builds on what is not durable yet, and the power cut comes after that.

The check tests itself: if any one sync is left out, it must fail for at least one state.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from model.export import Export
from ota.agent import channel, child, drawing, history, policy, reports, slots, transport
from ota.agent.disk import Disk
from ota.agent.state import HighWater, Home, State, opened
from ota.errors import DeviceError, FaultError, GateError, OtaError
from ota.release.bundle import Bundle, make_overlay_delta
from ota.report import DeviceReport, open_line
from tests import crash_kit
from tests.conftest import few
from tests.crash_kit import Log, Recorder, Tree, fingerprint, lay_out
from tests.fleet_kit import Device, Field, name_delta, name_policy, publish, releases
from tests.test_agent_machine import Children
from tests.test_chaos import difference, facts
from tests.test_overlay import assembled, taught
from tests.test_policy2 import policy2

pytest_plugins = ["tests.fleet_kit", "tests.test_agent_machine"]
LOOSE = "metadata"


# What the agent promises


@dataclass(frozen=True)
class Promised:
    """What must be true after a cut. Where there are two values, the old one was promised and the new one begun."""

    states: tuple[State, ...] = (State(),)
    marks: tuple[HighWater, ...] = (HighWater(),)
    queued: tuple[tuple[str, bytes], ...] = ()
    delivered: tuple[tuple[str, bytes], ...] = ()
    histories: tuple[tuple[history.Entry, ...], ...] = ((),)
    begun: tuple[reports.Starting | None, ...] = (None,)
    """What became of the newest report that a trial began."""
    kept: tuple[tuple[str, int], ...] = ()
    """Downloads, and how many bytes of each were synced."""

    @classmethod
    def of(cls, home: Home) -> Promised:
        """Return what holds for a directory at rest."""
        queue = sorted(home.disk.path("queue").glob("*.json"))
        reported = tuple((path.name, path.read_bytes()) for path in queue)
        return cls(
            (home.load(),),
            (home.high_water(),),
            reported,
            histories=(tuple(history.read(home)),),
            begun=(reports._starting(home),),
        )

    def after(self, notes: Iterator[tuple[str, Any]]) -> Promised:
        found = self
        for kind, value in notes:
            if kind == "saving":
                found = replace(found, states=(*found.states, value))
            elif kind == "saved":
                found = replace(found, states=(value,))
            elif kind == "marking":
                found = replace(found, marks=(*found.marks, value))
            elif kind == "marked":
                found = replace(found, marks=(value,))
            elif kind == "noting":
                found = replace(found, histories=(*found.histories, value))
            elif kind == "noted":
                found = replace(found, histories=(value,))
            elif kind == "deciding":
                found = replace(found, begun=(*found.begun, value))
            elif kind == "decided":
                found = replace(found, begun=(value,))
            elif kind == "queued":
                found = replace(found, queued=(*found.queued, value))
            elif kind == "delivered":
                found = replace(found, delivered=(*found.delivered, value))
            elif kind in ("kept", "dropped"):
                others = tuple(pair for pair in found.kept if pair[0] != value[0])
                found = replace(found, kept=(*others, value) if kind == "kept" else others)
        return found

    def check(self, home: Home, damaged: bool) -> None:
        """Check a directory after a cut, before anything else is done with it."""
        state = home.load()
        assert state in self.states, "a state was forgotten"
        assert home.high_water() in self.marks, "marks were forgotten"
        assert tuple(history.read(home)) in self.histories, "what happened was forgotten"
        assert reports._starting(home) in self.begun, "what became of a report was forgotten"
        for digest in (state.active, state.previous if state.trial else None):
            assert damaged or digest is None or slots.is_sound(home, digest), "what is to run is not whole"
        queue = {path.name: path.read_bytes() for path in home.disk.path("queue").glob("*.json")}
        delivered = dict(self.delivered)
        for name, data in self.queued:
            assert (queue | delivered).get(name) == data, "a report was forgotten"
        assert all(queue[name] == data for name, data in delivered.items() if name in queue), "a report changed"
        if used := [int(Path(name).stem) for name in queue | delivered]:
            assert int(home.disk.read("number") or b"") >= max(used), "a number would be used again"
        if copy := home.disk.read("state.prev.json"):  # a spare, in case the disk damages the other
            before = opened(copy)
            assert before, "no copy of the state is whole"
            assert before.active is None or home.disk.path(f"slots/{before.active}").is_dir(), "the copy names what is not there"
        for name, size in self.kept:
            path = home.disk.path(name)
            assert path.is_file(), "a download was lost"
            assert path.stat().st_size >= size, "a download would be fetched again"


@contextmanager
def noting(recorder: Recorder, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record what the agent promises, between the operations that it does."""

    def note(kind: str, value: Any) -> None:
        recorder.look()
        recorder.did("note", kind, value)

    save, mark, queue, drop, past = Home.save, Home.raise_high_water, reports.queue, channel._drop, history._write
    decide = reports._decide
    writing, sync, remove, rename = Disk.writing, Disk.sync_folder, Disk.remove, Disk.rename

    def saved(home: Home, state: State) -> None:
        note("saving", state)
        save(home, state)
        note("saved", state)

    def marked(home: Home, marks: HighWater) -> None:
        note("marking", marks)
        mark(home, marks)
        note("marked", marks)

    def happened(home: Home, entries: list[history.Entry]) -> None:
        note("noting", tuple(entries))
        past(home, entries)
        note("noted", tuple(entries))

    def decided(home: Home, found: reports.Starting) -> None:
        note("deciding", found)
        decide(home, found)
        note("decided", found)

    def queued(home: Home, *words: Any, **fields: Any) -> None:
        queue(home, *words, **fields)
        newest = max(home.disk.path("queue").glob("*.json"))
        note("queued", (newest.name, newest.read_bytes()))

    def dropped(data: bytes, folder: Path, name: str) -> None:
        drop(data, folder, name)
        note("delivered", (name.partition("-")[2].rpartition("-")[2], data))

    @contextmanager
    def written(disk: Disk, name: str, append: bool = False) -> Iterator[Any]:
        new = not disk.path(name).exists()
        with writing(disk, name, append) as file:
            yield file
        if name.startswith("incoming/") and not new:
            note("kept", (name, disk.path(name).stat().st_size))

    def synced(disk: Disk, name: str) -> None:
        sync(disk, name)
        for path in disk.path(name).glob("*") if name == "incoming" else ():
            number = recorder.tree.find((name, path.name))
            assert number is not None
            note("kept", (f"incoming/{path.name}", len(recorder.tree.file(number).synced)))

    def taken(disk: Disk, name: str) -> None:
        if name.startswith("incoming/"):
            note("dropped", (name, 0))
        remove(disk, name)

    def moved(disk: Disk, name: str, to: str, durable: bool = True) -> None:
        if name.startswith("incoming/"):
            note("dropped", (name, 0))
        rename(disk, name, to, durable)

    with patch.context() as inner:
        inner.setattr(Home, "save", saved)
        inner.setattr(Home, "raise_high_water", marked)
        inner.setattr(reports, "queue", queued)
        inner.setattr(channel, "_drop", dropped)
        inner.setattr(reports, "_decide", decided)
        inner.setattr(history, "_write", happened)
        inner.setattr(Disk, "writing", written)
        inner.setattr(Disk, "sync_folder", synced)
        inner.setattr(Disk, "remove", taken)
        inner.setattr(Disk, "rename", moved)
        yield


# What happens to a device


@dataclass
class Scenario:
    """Something that an agent does, and its result if nothing interrupts it."""

    field: Field
    act: Callable[[Device], object]
    folder: Path
    patch: pytest.MonkeyPatch
    damaged: bool = False
    """The running bundle was damaged before, so it need not be whole."""

    def __post_init__(self) -> None:
        self.before, self.count = Tree.of(self.field.device.root), itertools.count()
        self.promised = Promised.of(self.field.device.home)
        self.log = self.record(self.before, self.field.device.root)
        self.finish(self.field.device)
        self.wanted = facts(self.field.device)

    def record(self, before: Tree, root: Path) -> Log:
        """Run the action on a directory and record what it does there; `before` is what the disk holds of the directory."""
        recorder = Recorder(root, before)
        with recorder.watching(self.patch) as log, noting(recorder, self.patch):
            try:
                self.act(Device(root))
            except FaultError:  # of the recorder or the agent: nothing after it would be recorded
                raise
            except OtaError:
                pass
        return log

    def finish(self, device: Device) -> None:
        for _ in range(2):
            with suppress(OtaError):
                self.act(device)

    def place(self) -> Path:
        return self.folder / str(next(self.count))

    def forgotten(self, state: crash_kit.State, promised: Promised) -> str | None:
        """Return what is wrong with a state before anything else is done, or None if nothing is."""
        folder = self.place()
        lay_out(state, folder / "device")
        try:
            promised.check(Home(folder / "device"), self.damaged)
        except (OtaError, OSError, ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder)
        return None

    def unrecoverable(self, state: crash_kit.State, promised: Promised) -> str | None:
        """Return what is wrong after the agent continued from a state, or None if nothing is."""
        folder = self.place()
        lay_out(state, folder / "device")
        (folder / "reports").mkdir()
        for name, data in promised.delivered:
            (folder / "reports" / f"dev-1-{name}").write_bytes(data)
        device = Device(folder / "device")
        try:
            device.configure(reports=str(folder / "reports"))
            if device.active and not self.damaged:
                with suppress(GateError):  # it was rolled back, so the previous one draws
                    drawing.generate(device.home, "bar", 0)
                assert drawing.generate(device.home, "bar", 0)[1]["good"], "nothing draws"
            self.finish(device)
            found = facts(device)
            if found != self.wanted:
                return f"it ended otherwise: {difference(found, self.wanted)}"
            seen: dict[int, DeviceReport] = {}
            for report in (*(open_line(data).report for _, data in promised.queued), *device.reports()):
                assert seen.setdefault(report.number, report) == report, "a report number was used twice"
        except (OtaError, OSError, ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder)
        return None

    def distinct(
        self, log: Log, start: Promised, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Promised, crash_kit.State]]:
        """Yield the states of a log that differ in what they hold or in what was promised before them."""
        seen, at, promised = set[int](), -1, start
        for count, state in log.states(LOOSE, first, last):
            if count != at:
                at, new = count, start.after(log.notes(count))
                if new != promised:  # more is promised now, so states that passed before may fail
                    promised, seen = new, set()
            key = fingerprint(state)
            if key not in seen:
                seen.add(key)
                yield count, promised, state

    def killed(self, log: Log, count: int) -> tuple[Log, Promised]:
        """Return what the next process does if one is killed after `count` operations, and what was promised until then."""
        tree, folder = log.after(count), self.place()
        promised = self.promised.after(log.notes(count))
        lay_out(tree.current(), folder / "device")
        (folder / "reports").mkdir()
        try:
            return self.record(tree, folder / "device"), promised
        finally:
            shutil.rmtree(folder)


NAMES = ["delta", "chain", "full", "first", "overlay", "broken delta", "refused", "taken back", "damaged", "acknowledged"]


class Failing(Children):
    """Children that fail when they draw with the bundle `fails`."""

    fails = ""

    def run(self, task: str, **request: Any) -> dict[str, Any]:
        if task == "generate" and request["digest"] == self.fails:
            raise DeviceError("it made an image that is constant or not finite")
        return super().run(task, **request)


@pytest.fixture(scope="module")
def thin(exported: Export, tries: dict[str, Any], bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Provide a bundle of which a device makes a part from another part; its trial gives what that of `first` gives."""
    folder = tmp_path_factory.mktemp("thin")
    exports: dict[Any, Path] = {"full": exported.folder, "turbo": taught(exported.folder, folder / "turbo", "turbo", seed=1)}
    for name in ("reference.json", "golden.npz"):  # the stand-ins of children answer alike for all variants
        shutil.copyfile(exported.folder / name, exports["turbo"] / name)
    made = assembled(exports, folder / "out")
    tries[made.manifest.digest] = tries[bundles["first"].manifest.digest]
    return made


@pytest.fixture
def scenario(
    request: pytest.FixtureRequest, fielded: Field, bundles: dict[str, Bundle], step: Path, tries: dict[str, Any], thin: Bundle,
    row: list[Bundle], steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scenario]:  # fmt: skip
    name, children = request.param, Failing(tries | {bundle.manifest.digest: tries[row[0].manifest.digest] for bundle in row})
    monkeypatch.setattr(child, "run", children.run)
    monkeypatch.setattr(transport, "SYNC_EVERY", 64 * 1024)  # small, so that a test bundle is synced several times
    field = fielded.copy(tmp_path / "field")
    first, second, garbage = (bundles[which] for which in ("first", "second", "garbage"))
    if name == "first":
        shutil.rmtree(field.device.root)
        shutil.rmtree(field.folder / "reports", ignore_errors=True)
        field.device = Device.init(field.device.root, field.repository)
    elif name == "damaged":
        path = field.device.file("weights")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif name == "refused":
        publish(field.repository, garbage)
    elif name == "chain":
        releases(field.repository, row, steps)
    elif name == "overlay":
        patch = make_overlay_delta(thin, tmp_path / "deltas")
        assert patch
        publish(field.repository, thin, patch.path, thin)
    else:
        publish(field.repository, second, step if name != "full" else None, first)
    if name == "acknowledged":  # the folder of reports stands for the gateway, and what is there was kept
        name_policy(field.repository, policy2(field.release, acknowledge=True))
        fate = reports.fate
        monkeypatch.setattr(reports, "fate", lambda *given: "accepted" if (found := fate(*given)) == "delivered" else found)
        monkeypatch.setattr(policy, "unheard", lambda *_: "")
    if name == "broken delta":
        name_delta(field.repository, first.manifest.digest, second.manifest.digest, step.read_bytes()[:-20] + bytes(20))
    if name == "taken back":
        children.fails = second.manifest.digest
    memory = Path("/dev/shm")  # on a disk, laying out thousands of folders takes a hundred times as long
    with TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Scenario(field, lambda device: device.update(), Path(folder), monkeypatch, damaged=name == "damaged")


def wrong(check: Callable[[crash_kit.State, Promised], str | None], states: Any) -> list[str]:
    """List the problems of all states in which the check finds one."""
    return [f"cut after {count}: {problem}" for count, promised, state in states if (problem := check(state, promised))]


def some(states: list[Any], count: int) -> list[Any]:
    """Choose `count` of the states, always the same ones; with CRASH=all, return all."""
    return states if os.environ.get("CRASH") == "all" else random.Random(0).sample(states, min(count, len(states)))


@pytest.mark.parametrize("scenario", few(NAMES, 1), indirect=True)
def test_cut_at_any_moment(scenario: Scenario):
    states = list(scenario.distinct(scenario.log, scenario.promised))
    assert len(states) > len(scenario.log.ops) / 2
    assert not wrong(scenario.forgotten, some(states, 400))
    assert not wrong(scenario.unrecoverable, some(states, 15))


@pytest.mark.crash
@pytest.mark.parametrize("scenario", NAMES, indirect=True)
def test_every_state_of_every_moment(scenario: Scenario):
    states = list(scenario.distinct(scenario.log, scenario.promised))
    assert not wrong(scenario.forgotten, states)
    assert not wrong(scenario.unrecoverable, some(states, 150))


@pytest.mark.crash
@pytest.mark.parametrize("scenario", NAMES, indirect=True)
def test_killed_then_cut(scenario: Scenario):
    """Cut the power in the process after a killed one, which builds on what may not be durable yet.

    One place in twenty to be killed at is tried.
    """
    for count in range(0, len(scenario.log.ops), 20):
        log, promised = scenario.killed(scenario.log, count)
        states = list(scenario.distinct(log, promised))
        assert not wrong(scenario.forgotten, some(states, 60)), f"killed after {count}"
        assert not wrong(scenario.unrecoverable, some(states, 4)), f"killed after {count}"


@pytest.mark.crash
@pytest.mark.parametrize("scenario", ["delta"], indirect=True)
def test_no_sync_can_be_left_out(scenario: Scenario):
    """Check that without any one sync, of a delta update or of what follows a kill, some state forgets something."""
    kept: list[str] = []
    for at in scenario.log.syncs():
        log = scenario.log.without(at)
        if not any(scenario.forgotten(state, promised) for _, promised, state in scenario.distinct(log, scenario.promised, at)):
            kept.append(described(scenario.log, at))
    # Three syncs settle the directory at the start. They matter only to what a kill left: a state or marks, slots, a download.
    assert len(kept) == 3, kept
    needed = set[int]()
    for count in range(1, len(scenario.log.ops)):
        if len(needed) == 3 or scenario.log.ops[count - 1][0] not in ("move", "sync"):
            continue
        log, promised = scenario.killed(scenario.log, count)
        for nth, at in enumerate(log.syncs()[:3]):
            states = scenario.distinct(log.without(at), promised, at, min(at + 120, len(log.ops)))
            if nth not in needed and any(scenario.forgotten(state, known) for _, known, state in states):
                needed.add(nth)
    assert needed == {0, 1, 2}


def described(log: Log, at: int) -> str:
    """Describe a sync and what was done before it."""
    return f"{at}: " + ", ".join(" ".join(str(word)[:30] for word in op) for op in log.ops[max(0, at - 2) : at + 1])

"""Random sequences of releases, halts, reverts, power cuts, damage and faults; after each step the device must still run.

A Hypothesis state machine drives a real repository and a real agent. The child processes of the agent are replaced by
answers that real children gave once; everything else is real. The faults are wrong clocks, full disks and bad links.
Whatever happened: once the link, the clock and the disk are well again and the factory has signed, a few updates bring the
device to what the policy wants of it.
"""

from __future__ import annotations

import base64
import datetime as dt
import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from tuf.ngclient._internal import trusted_metadata_set

from ota import fitness
from ota.agent import child, disk, drawing, plan, reports, slots, transport, trial, trust
from ota.agent.state import Slot
from ota.errors import OtaError, UnfinishedError
from ota.policy import Policy
from ota.release import rollout
from ota.release.bundle import Bundle
from tests.fleet_kit import CLASS, LINE, Cut, Device, Field, WebServer, publish

pytest_plugins = ["tests.fleet_kit"]
DAY = 86_400


class Clock:
    """The time that the agent and python-tuf read: the real time plus `mistake` seconds."""

    mistake = 0

    def module(self) -> SimpleNamespace:
        return SimpleNamespace(time=lambda: time.time() + self.mistake, monotonic=time.monotonic, sleep=lambda _: None)

    def datetimes(self) -> SimpleNamespace:
        def now(zone: Any = None) -> dt.datetime:
            return dt.datetime.now(zone) + dt.timedelta(seconds=self.mistake)

        return SimpleNamespace(datetime=SimpleNamespace(now=now), timezone=dt.timezone, timedelta=dt.timedelta)


class Children:
    """Stand-ins for child processes: each looks at its bundle's files as a child does, and answers what a child would."""

    killed = False

    def __init__(self, tries: dict[str, dict[str, Any]]) -> None:
        self._tries = tries

    def run(self, task: str, **request: Any) -> dict[str, Any]:
        if self.killed:
            self.killed = False
            raise UnfinishedError(f"the {task} process was killed, perhaps because memory or time ran out; try again")
        if task == "check":
            return {}
        if task == "apply":
            return child.apply(**request)
        slot = Slot(Path(request["slot"]), request["digest"])
        for role in ("graph", "weights", "sampler", "golden", "reference"):
            slot.read(role, None if role == "graph" else request["variant"])  # type: ignore[arg-type]
        if task == "try":
            return self._tries[request["digest"]]
        return {"png": base64.b64encode(b"png").decode(), "good": True, "milliseconds": 5.0, "peak_mib": 60.0, "load": [[1.0]]}


class FullDisk:
    """A disk on which all writes fail after `left` more writes, until there is room again (`left` is None)."""

    left: int | None = None

    def writing(self, original: Any) -> Any:
        def wrapped(itself: disk.Disk, name: str, append: bool = False) -> Any:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    with itself._errors(name):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(itself, name, append)

        return wrapped


class World(RuleBasedStateMachine):
    """A factory, a link and a device."""

    start: Field
    made: dict[str, Bundle]
    deltas: dict[tuple[str, str], Path]
    clock: Clock
    children: Children
    full: FullDisk
    folder: Path
    count = 0

    @initialize()
    def begin(self) -> None:
        World.count += 1
        self.place = self.folder / str(World.count)
        self.field = self.start.copy(self.place)
        self.web = WebServer(self.field.repository.folder)
        self.web.__enter__()
        self.device: Device = self.field.device
        self.device.configure(repository=self.web.address)
        self.clock.mistake, self.full.left, self.children.killed = 0, None, False
        self.first_timestamp = (self.field.repository.metadata / "timestamp.json").read_bytes()
        self.wanted = self.digest("first")
        self.seqs: dict[str, int] = {self.wanted: 1}
        self.damaged = False
        self.marks: dict[str, int] = {}
        self.confirmed: set[str] = {self.wanted}
        self.refused: set[str] = set()

    def teardown(self) -> None:
        if not hasattr(self, "web"):
            return
        try:
            self.heal()
            self.check_converged()
        finally:
            self.web.__exit__()
            shutil.rmtree(self.place)

    def digest(self, name: str) -> str:
        return self.made[name].manifest.digest

    # The factory

    @rule(name=st.sampled_from(["first", "second", "garbage"]), by_delta=st.booleans())
    def publish(self, name: str, by_delta: bool) -> None:
        base = "second" if name == "first" else "first"
        delta = self.deltas.get((base, name)) if by_delta else None
        release = publish(self.field.repository, self.made[name], delta, self.made[base])
        self.seqs[release.manifest] = release.seq
        self.offer(release.manifest)

    @rule(revert=st.booleans(), halt=st.booleans())
    def revert(self, revert: bool, halt: bool) -> None:
        """Offer the oldest release again, marked as a revert or not."""
        release = self.field.repository.releases(LINE, CLASS)[0]
        policy = rollout.start(release, (100,), soak=0, now=0, revert=revert)
        self.field.repository.set_policy(policy.model_copy(update={"halt": halt}))
        self.offer(release.manifest)

    @rule()
    def halt(self) -> None:
        self.field.repository.set_policy(rollout.halt(self.policy))

    @rule()
    def renew(self) -> None:
        self.field.repository.refresh()

    def offer(self, digest: str) -> None:
        self.wanted = digest

    @property
    def policy(self) -> Policy:
        found = self.field.repository.policy(LINE, CLASS)
        assert found
        return found

    # The device, and what happens to it

    @rule()
    def update(self) -> None:
        with suppress(OtaError):
            self.device.update()

    @rule(at=st.integers(1, 12))
    def cut(self, at: int) -> None:
        """Cut the power as a step begins."""

        def on_step(number: int, _: str) -> None:
            if number == at:
                raise Cut

        with suppress(OtaError, Cut):
            self.device.update(on_step)

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Damage one file of the directory that is not in KEPT: empty, shorten, change or delete it."""
        files = [p for p in sorted(self.device.root.rglob("*")) if p.is_file() and p.name not in KEPT]
        path = data.draw(st.sampled_from(files), label="file") if files else None
        if path is None:
            return
        how = data.draw(st.sampled_from(["emptied", "cut short", "changed", "lost"]), label="how")
        content = path.read_bytes()
        if how == "lost":
            path.unlink()
        else:
            changed = {
                "emptied": b"",
                "cut short": content[: len(content) // 2],
                "changed": content[:-1] + bytes([content[-1] ^ 1]) if content else b"",
            }
            path.write_bytes(changed[how])
        self.damaged = True

    @rule(days=st.sampled_from([-3, -1, 0, 1, 20, 400]))
    def set_clock(self, days: int) -> None:
        self.clock.mistake = days * DAY

    @rule(writes=st.integers(0, 12) | st.none())
    def fill_disk(self, writes: int | None) -> None:
        self.full.left = writes

    @rule()
    def kill_child(self) -> None:
        self.children.killed = True

    @rule(
        end=st.sampled_from(["timestamp.json", ".models.json", ".rollout.json", ".json", ""]),
        how=st.sampled_from(["cut", "503", "404", "no ranges", "stale", "well"]),
    )
    def break_link(self, end: str, how: str) -> None:
        faults = self.web.faults = type(self.web.faults)()
        if how == "cut":
            faults.cut_after = {end: 300}
        elif how in ("503", "404"):
            faults.failing, faults.status = {end: 20}, int(how)
        elif how == "stale":
            faults.stale = {"timestamp.json": self.first_timestamp}
        faults.ignore_range = how == "no ranges"

    @rule()
    def ask_for_an_image(self) -> None:
        killed = self.children.killed
        try:
            drawing.generate(self.device.home, "bolt", 0)
        except OtaError:
            assert killed or self.damaged or self.full.left is not None or self.device.state.trial is not None

    @precondition(lambda self: self.device.state.previous is not None and not self.device.state.trial)
    @rule()
    def roll_back_by_hand(self) -> None:
        with suppress(OtaError), self.device.home.locked():
            before = self.device.state.active
            trial.rollback(self.device.home)
            self.refused.add(str(before))

    # What holds after each

    @invariant()
    def something_runs(self) -> None:
        """Check that a whole bundle is active, unless files were damaged from outside."""
        if not hasattr(self, "device") or self.damaged:
            return
        state = self.device.state
        assert state.active is not None
        assert slots.is_sound(self.device.home, state.active)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """Check that marks only rise, that what was refused stays refused, and that only what was signed runs."""
        if not hasattr(self, "device"):
            return
        state = self.device.state
        assert state.active in (None, *self.seqs)
        assert self.digest("garbage") != state.active or state.trial is None
        if not self.damaged:
            found = self.device.home.high_water().versions
            assert all(found.get(role, 0) >= version for role, version in self.marks.items())
            self.marks = found
            assert self.refused <= set(state.refused)
            self.refused = set(state.refused)

    def heal(self) -> None:
        self.web.faults = type(self.web.faults)()
        self.clock.mistake, self.full.left, self.children.killed = 0, None, False
        self.field.repository.refresh()
        for role in ("state.json", "state.prev.json"):
            assert (self.device.root / role).is_file() or self.damaged

    def check_converged(self) -> None:
        marks = self.device.home.disk.read("highwater.json")
        if self.damaged and (marks is None or not marks.endswith(b"}")):
            return  # lost or torn marks stop updates on purpose; see tests/test_agent_attacks.py
        for _ in range(4):  # after a kill or damage, the first updates finish what was begun
            with suppress(OtaError):
                self.device.update()
        state, policy = self.device.state, self.policy
        assert state.active is not None
        assert slots.is_sound(self.device.home, state.active)
        assert state.trial is None
        # A policy that names an older release without calling it a revert is refused as an attack, and nothing is touched.
        named = (state.active, *state.refused)
        attack = policy.manifest not in named and not policy.halt and policy.seq < state.seq and not policy.revert
        assert attack or self.device.leftovers() == []
        if policy.halt or policy.manifest in state.refused or (policy.seq < state.seq and not policy.revert):
            return
        assert state.active == policy.manifest


# Losing one of these stops a device on purpose, or destroys what no update can restore.
KEPT = {"config.json", "root.json", "device.key", "lock", "highwater.json", "state.json"}


@pytest.fixture(scope="module")
def tries(fielded: Field, bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Record what real children answer when they try each bundle."""
    found = {}
    for bundle in bundles.values():
        folder = tmp_path_factory.mktemp("slots") / bundle.manifest.digest
        shutil.copytree(bundle.folder, folder)
        (folder / "manifest.json").write_bytes(bundle.manifest.canonical())
        found[bundle.manifest.digest] = child.run("try", slot=str(folder), digest=bundle.manifest.digest, variant="full")
    return found


@pytest.fixture
def world(
    fielded: Field, bundles: dict[str, Bundle], step: Path, tries: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> type[World]:
    clock, children, full = Clock(), Children(tries), FullDisk()
    monkeypatch.setattr(child, "run", children.run)
    monkeypatch.setattr(disk.Disk, "writing", full.writing(disk.Disk.writing))
    monkeypatch.setattr(trusted_metadata_set, "datetime", clock.datetimes())
    for module in (trust, plan, slots, trial, reports, transport):
        monkeypatch.setattr(module, "time", clock.module())
    World.start, World.made, World.deltas = fielded, bundles, {("first", "second"): step}
    World.clock, World.children, World.full, World.folder = clock, children, full, tmp_path
    return World


# Without shrinking, which takes minutes here. The printed steps can be repeated one by one.
COMMON = {
    "deadline": None,
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


def test_anything_in_any_order(world: type[World]):
    run_state_machine_as_test(world, settings=settings(max_examples=8, stateful_step_count=12, **COMMON))  # type: ignore[arg-type]


@pytest.mark.slow
def test_much_in_any_order(world: type[World]):
    run_state_machine_as_test(world, settings=settings(max_examples=60, stateful_step_count=25, **COMMON))  # type: ignore[arg-type]


def test_the_stand_ins_are_what_children_do(tries: dict[str, Any], bundles: dict[str, Bundle]):
    """Check that the recorded answers tell good bundles from garbage, as the device's own rules do."""
    slot = {name: tries[bundle.manifest.digest] for name, bundle in bundles.items()}
    assert slot["first"]["golden_share"] == slot["second"]["golden_share"] == 1.0
    assert slot["first"]["peak_mib"] < fitness.MEMORY_LIMIT

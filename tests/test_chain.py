"""Chains of deltas: a device that is several releases behind takes the single steps, all in one update, or a shorter way."""

from __future__ import annotations

import io
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.students import is_thin
from ota import chain, delta
from ota.agent import child, transport, updater
from ota.agent.disk import Disk
from ota.chain import Link, name_of, way
from ota.delta import encode, files
from ota.errors import RoomError, TransferError
from ota.release.bundle import Bundle, _from, make_delta
from ota.release.chains import NEWEST
from tests.fleet_kit import CLASS, LEDGER, LINE, Cut, Field, WebServer, everyone, name_delta, releases, untouched
from tests.test_agent_attacks import with_header
from tests.test_agent_machine import Children
from tests.test_agent_update import digest, files_of, slot_files, small_disk, stand_still
from tests.test_delegation import move
from tests.test_overlay import assembled, moved, named

pytest_plugins = ["tests.fleet_kit", "tests.test_agent_machine"]
MARGIN = 8 * 1024 * 1024  # bytes that stay free on a small disk


# The way over the deltas


def link(base: int, target: int, size: int, form: int = 1) -> Link:
    """Make a link between two bundles, given by numbers."""
    made = Link.of(name_of(form, f"{base:064x}"[::-1], f"{target:064x}"[::-1]), size)
    assert made
    return made


def found(links: Sequence[Link], base: int, target: int, full: int = 10**9, most: int = chain.MOST) -> list[Link]:
    return list(way(links, f"{base:064x}"[::-1], f"{target:064x}"[::-1], full, most))


STEPS = [link(n, n + 1, 100) for n in range(1, 10)]


def test_single_steps_lead_to_a_later_release():
    assert found(STEPS, 2, 5) == STEPS[1:4]
    assert found(STEPS, 5, 2) == []
    assert found(STEPS[:2] + STEPS[3:], 2, 5) == []
    assert found(STEPS, 1, 1 + chain.MOST) == STEPS[: chain.MOST]
    assert found(STEPS, 1, 2 + chain.MOST) == []


def test_smaller_of_chain_and_single_delta_is_taken():
    assert found([*STEPS, direct := link(2, 5, 299)], 2, 5) == [direct]
    assert found([*STEPS, direct := link(2, 5, 300)], 2, 5) == [direct]  # one delta is applied faster
    assert found([*STEPS, link(2, 5, 301)], 2, 5) == STEPS[1:4]


def test_full_bundle_is_taken_where_the_chain_saves_little():
    assert found(STEPS, 2, 5, full=429) == STEPS[1:4]  # 300 of 429 bytes are 69.9 %
    assert found(STEPS, 2, 5, full=428) == []
    assert found([*STEPS, direct := link(2, 5, 400)], 2, 5, full=428) == [direct]
    assert found([*STEPS, link(2, 5, 428)], 2, 5, full=428) == []


def test_rollback_and_republished_release_do_not_end_the_search():
    back = [link(3, 2, 50), link(2, 2, 0), link(4, 1, 1)]
    assert found([*STEPS, *back], 2, 5) == STEPS[1:4]
    assert found([*STEPS, *back], 3, 2) == back[:1]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99)), max_size=12, unique_by=lambda edge: edge[:2]),
    st.integers(1, 500),
)
def test_way_is_the_cheapest_that_is_allowed(edges: list[tuple[int, int, int]], full: int):
    links = [link(*edge) for edge in edges]
    every = [
        list(path)
        for count in range(1, 5)
        for path in itertools.permutations(links, count)
        if all(a.target == b.base for a, b in itertools.pairwise(path))
        and (path[0].base, path[-1].target) == (link(1, 1, 0).base, link(5, 5, 0).base)
    ]
    allowed = [
        sum(edge.size for edge in path)
        for path in every
        if sum(edge.size for edge in path) < full and (len(path) == 1 or sum(edge.size for edge in path) <= 0.7 * full)
    ]
    taken = found(links, 1, 5, full)
    assert bool(taken) == bool(allowed)
    if taken:
        assert all(a.target == b.base for a, b in itertools.pairwise(taken))
        assert sum(edge.size for edge in taken) == min(allowed)


def test_older_agents_do_not_look_for_a_later_format():
    first, later = name_of(1, "a" * 64, "b" * 64), name_of(2, "a" * 64, "b" * 64)
    assert first == f"{'a' * 64}.{'b' * 64}"  # the one name that agents before 0.3.0 ask for
    assert later != first
    assert len(first) - len(later) >= 94  # bytes of metadata
    assert Link.of(later, 1) == Link(later, 1, 2, "a" * 16, "b" * 16)


def test_delta_of_a_format_of_the_future_is_not_fetched():
    assert found([*STEPS, link(2, 5, 1, form=max(chain.FORMATS) + 1)], 2, 5) == STEPS[1:4]
    assert found([*STEPS, direct := link(2, 5, 1, form=2)], 2, 5) == [direct]


@pytest.mark.parametrize(
    "name", ["", "x", "a" * 64, f"{'a' * 64}.{'B' * 64}", f"2.{'a' * 64}.{'b' * 64}", f"../{'a' * 61}.{'b' * 64}"]
)
def test_other_names_are_no_deltas(name: str):
    assert Link.of(name, 1) is None


# Devices


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tries: dict[str, Any], row: list[Bundle]) -> Children:
    """Let stand-ins answer for children that try bundles, and do not pause between retries."""
    children = Children(tries | {digest(bundle): tries[digest(row[0])] for bundle in row})
    monkeypatch.setattr(child, "run", children.run)
    monkeypatch.setattr(transport, "BACKOFF", 0)
    return children


@pytest.fixture
def behind(scene: Field, row: list[Bundle], steps: list[Path]) -> Field:
    """Provide a device that is three releases behind, and a repository with the single steps."""
    releases(scene.repository, row, steps)
    return scene


@pytest.fixture
def web(behind: Field) -> Iterator[WebServer]:
    """Serve the repository, and point the device at it."""
    with WebServer(behind.repository.folder) as server:
        behind.device.configure(repository=server.address)
        yield server


def deltas_sent(server: WebServer) -> int:
    return sum(count for name, count in server.sent.items() if name.startswith("targets/deltas/"))


def arrived(field: Field, row: list[Bundle]) -> None:
    """Check that the device runs the last release, byte for byte, and has nothing left over."""
    assert slot_files(field.device, row[-1]) == files_of(row[-1])
    assert field.device.active == digest(row[-1])
    stand_still(field)


def test_device_three_releases_behind_takes_the_single_steps(behind, web, row, steps):
    seen: list[tuple[int, str]] = []
    outcome = behind.device.update(lambda *step: seen.append(step))
    assert (outcome.way, outcome.changed) == ("chain", True)
    assert [number for number, _ in seen] == list(range(1, 13))  # one trial and one switch
    size = sum(path.stat().st_size for path in steps[:3])
    assert dict(seen)[5] == f"download 3 deltas, {size:,} bytes"
    assert deltas_sent(web) == size
    assert not any(name.startswith("objects/") for name in web.sent)
    assert outcome.received == sum(web.sent.values())
    assert [(report.event, report.reason) for report in behind.device.reports() if report.event == "installed"][-1][1] == "chain"
    assert {path.name for path in (behind.device.root / "slots").iterdir()} == {digest(row[0]), digest(row[-1])}
    arrived(behind, row)


def test_three_releases_at_once_cost_no_more_than_one_after_the_other(scene, row, steps, tmp_path):
    one = scene.copy(tmp_path / "one")
    spent = 0
    for count in (2, 3, 4):
        releases(one.repository, row[:count], steps)
        with WebServer(one.repository.folder) as server:
            one.device.configure(repository=server.address)
            assert one.device.update().way == "delta"
            spent += sum(server.sent.values())
    assert one.device.active == digest(row[-1])
    releases(scene.repository, row, steps)
    with WebServer(scene.repository.folder) as server:
        scene.device.configure(repository=server.address)
        assert scene.device.update().way == "chain"
        assert sum(server.sent.values()) == scene_bytes(server) <= 1.1 * spent
        assert deltas_sent(server) <= 1.1 * sum(path.stat().st_size for path in steps[:3])


def scene_bytes(server: WebServer) -> int:
    return sum(count for name, count in server.sent.items() if not name.startswith("objects/"))


def test_class_with_roles_of_its_own_takes_the_single_steps(behind, row):
    move(behind.repository, CLASS)
    assert behind.device.update().way == "chain"
    arrived(behind, row)


def missing(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def step_name(row: list[Bundle], number: int) -> str:
    """Return the name of a single step, which the names of its file in the repository and of its address end with."""
    return name_of(NEWEST, digest(row[number - 1]), digest(row[number]))


def step_file(field: Field, row: list[Bundle], number: int) -> Path:
    (path,) = (field.repository.target_files / "deltas").rglob(f"*.{step_name(row, number)}")
    return path


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "how", [missing, cut_short, damaged, "refused by the server", "for another bundle", "no delta", "swapped"]
)
def test_chain_with_a_missing_or_refused_step(behind, web, row, steps, how, number):
    if how == "refused by the server":
        web.faults.status = 403
        web.faults.failing = {step_name(row, number): 9}
    elif isinstance(how, str):
        whole = steps[number - 1].read_bytes()
        made = {
            "for another bundle": with_header(whole, base="7" * 64),
            "no delta": bytes(len(whole)),
            "swapped": steps[number % 3].read_bytes(),
        }
        name_delta(behind.repository, digest(row[number - 1]), digest(row[number]), made[how], NEWEST)
    else:
        how(step_file(behind, row, number))
    assert behind.device.update().way == "full"  # within the same update
    arrived(behind, row)
    assert behind.device.state.refused == {}


@pytest.mark.parametrize("how", [missing, damaged])
def test_single_delta_replaces_a_chain_that_cannot_be_had(behind, row, tmp_path, how):
    pairs = [
        _from(entry, None, row[0], row[-1], {}) for entry in row[-1].manifest.made
    ]  # with nothing from the base: a large delta
    size = encode.build(pairs, digest(row[0]), digest(row[-1]), tmp_path / "direct").size
    assert size < row[-1].manifest.size
    name_delta(behind.repository, digest(row[0]), digest(row[-1]), (tmp_path / "direct").read_bytes())
    how(step_file(behind, row, 2))
    assert behind.device.update().way == "delta"
    arrived(behind, row)


@pytest.mark.parametrize("how", [missing, damaged])
def test_chain_replaces_a_single_delta_that_cannot_be_had(behind, row, steps, how):
    how(name_delta(behind.repository, digest(row[0]), digest(row[-1]), steps[-1].read_bytes(), NEWEST))
    assert steps[-1].stat().st_size < sum(path.stat().st_size for path in steps[:3])  # so it is tried first
    assert behind.device.update().way == "chain"
    arrived(behind, row)


def test_bundle_that_was_refused_may_lie_on_the_way(behind, row):
    behind.device.home.save(
        behind.device.state.model_copy(update={"refused": {digest(row[1]): "it drew noise", digest(row[2]): "late"}})
    )
    assert behind.device.update().way == "chain"
    assert set(behind.device.state.refused) == {digest(row[1]), digest(row[2])}
    arrived(behind, row)


def test_release_that_is_no_longer_published_may_lie_on_the_way(behind, row):
    for bundle in row[1:3]:
        (behind.repository.target_files / f"models/{LINE}/{CLASS}/{digest(bundle)}.{digest(bundle)}.json").unlink()
    behind.repository.commit(
        {"models": lambda signed: [signed.targets.pop(f"models/{LINE}/{CLASS}/{digest(b)}.json") for b in row[1:3]]}
    )
    assert behind.device.update().way == "chain"
    arrived(behind, row)


def test_step_that_makes_too_much_is_refused_before_it_is_written(behind, row, steps, monkeypatch):
    data = steps[0].read_bytes()
    header = delta.read_header(io.BytesIO(data))
    large = replace(header.files[0], target=replace(header.files[0].target, size=2**32 - 1, role="weights", variant="full"))
    name_delta(behind.repository, digest(row[0]), digest(row[1]), with_header(data, files=[large, *header.files[1:]]), NEWEST)
    written: list[str] = []
    real = Disk.writing
    monkeypatch.setattr(Disk, "writing", lambda disk, name, append=False: written.append(name) or real(disk, name, append))
    assert behind.device.update().way == "full"
    assert not [name for name in written if name.startswith(("slots/.0/", "slots/.1/"))]
    arrived(behind, row)


def test_power_cut_in_a_chain_fetches_nothing_again(behind, web, row, steps):
    for number in (6, 7, 8):
        behind.device.update_until(number)
    assert behind.device.active == digest(row[0])
    assert behind.device.sound
    assert behind.device.update().way == "chain"
    assert deltas_sent(web) == sum(path.stat().st_size for path in steps[:3])
    arrived(behind, row)


def test_killed_between_two_steps_leaves_a_folder_that_the_next_agent_removes(behind, row, monkeypatch):
    real, asked = child.run, itertools.count(1)

    def run(task: str, **request: Any) -> dict[str, Any]:
        if task == "apply" and next(asked) == 3:
            raise Cut
        return real(task, **request)

    with monkeypatch.context() as patch:
        patch.setattr(child, "run", run)
        patch.setattr(Disk, "remove", lambda *_: None)  # a power cut leaves no time to tidy up
        with pytest.raises(Cut):
            behind.device.update()
    assert behind.device.leftovers()
    assert behind.device.update().way == "chain"
    arrived(behind, row)


def test_chain_is_resumed_where_the_link_broke(behind, web, row, steps, monkeypatch):
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    web.faults.cut_after = {step_name(row, 2): 100}
    with pytest.raises(TransferError):
        behind.device.update()
    assert behind.device.update().way == "chain"
    assert deltas_sent(web) == sum(path.stat().st_size for path in steps[:3])
    arrived(behind, row)


def test_chain_has_one_deadline(behind, web, monkeypatch):
    given: list[Any] = []
    real = transport.download
    monkeypatch.setattr("ota.agent.updater.download", lambda *words: given.append(words[-1]) or real(*words))
    behind.device.update()
    assert len(given) == 3
    assert len(set(given)) == 1


def test_slow_deltas_of_a_thief_do_not_keep_the_full_bundle_away(behind, row, monkeypatch):
    monkeypatch.setattr("ota.agent.updater.APPLY_SECONDS", -1.0)  # all time for deltas is over once one was applied
    given: list[Any] = []
    real = updater._fetch_full
    monkeypatch.setattr("ota.agent.updater._fetch_full", lambda *words: given.append(words[-1]()) or real(*words))
    began: list[float] = []
    real_apply = updater._apply
    monkeypatch.setattr(
        "ota.agent.updater._apply", lambda *words, **more: began.append(time.monotonic()) or real_apply(*words, **more)
    )
    assert behind.device.update().way == "full"
    arrived(behind, row)
    assert len(began) == 1  # the second step of the chain was not begun, and no other way was tried
    assert given[0] > began[0] + updater.FETCH_SECONDS  # the time for the full bundle begins after the deltas


# Room


def needs(row: list[Bundle], steps: Sequence[Path], bundles: float) -> int:
    """Return the bytes that an update by deltas needs: their own, and those of so many bundles."""
    size = max(bundle.manifest.size for bundle in row)
    return sum(path.stat().st_size for path in steps) + int(bundles * size) + MARGIN


def held(field: Field) -> int:
    """Return the bytes of the bundle that runs."""
    return sum(path.stat().st_size for path in (field.device.root / "slots").rglob("*") if path.is_file())


def test_chain_holds_two_results_at_most(behind, row, steps, monkeypatch):
    room, most = needs(row, steps[:3], 2.51), 0
    small_disk(monkeypatch, held(behind) + room)
    real = child.run

    def run(task: str, **request: Any) -> dict[str, Any]:
        nonlocal most
        answer = real(task, **request)
        most = max(most, held(behind))
        return answer

    monkeypatch.setattr(child, "run", run)
    before = held(behind)
    assert behind.device.update().way == "chain"
    assert most - before <= 2.01 * row[0].manifest.size
    arrived(behind, row)


def test_device_without_room_for_a_chain_takes_a_way_without(behind, row, steps, monkeypatch):
    small_disk(monkeypatch, held(behind) + needs(row, steps[:3], 2.4))
    assert behind.device.update().way == "full"
    arrived(behind, row)


def test_device_without_room_for_the_bundle_keeps_what_runs(behind, row, steps, monkeypatch):
    small_disk(monkeypatch, held(behind) + needs(row, [], 0.5))
    with untouched(behind.device, RoomError, "make room and try again", marks=False):
        behind.device.update()


# Overlays


def test_chain_of_bundles_with_overlays(scene, exported, quick, row, tmp_path):
    """Check that each step makes the overlay of turbo from the one before, and makes a file that variants share once."""
    made: list[Bundle] = []
    for number in range(4):
        full, turbo = tmp_path / f"full-{number}", tmp_path / f"turbo-{number}"
        shutil.copytree(exported.folder, full)
        data = bytearray((full / "weights.bin").read_bytes())
        data[200 * number : 200 * number + 100 : 2] = bytes(50)
        (full / "weights.bin").write_bytes(data)
        shutil.copytree(full, turbo)
        tensors = [t for t in files.tensors(full / "weights.bin", full / "graph.onnx") if is_thin(t.name)]
        (turbo / "weights.bin").write_bytes(moved(bytes(data), tensors, number, 0.01))
        made.append(assembled({"full": full, "turbo": named(turbo, "turbo")}, tmp_path / "out", version=10 + number))
        quick._tries[digest(made[-1])] = quick._tries[digest(row[0])]
    scene.repository.set_policy(everyone(scene.repository.publish_release(made[0].manifest, made[0].folder, LEDGER, [])))
    scene.device.update()
    steps = [make_delta(*pair, tmp_path, version=NEWEST).path for pair in itertools.pairwise(made)]
    assert all(bundle.manifest.overlay("turbo") for bundle in made)
    releases(scene.repository, made, steps)
    assert scene.device.update().way == "chain"
    assert slot_files(scene.device, made[-1]) == files_of(made[-1])
    stand_still(scene)

"""What a device fetches: nothing twice in one update, and nothing that one of its slots holds already."""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile, Targets

from ota.delta.format import read_header, records
from ota.errors import RoomError, StateError, TransferError, TrustError
from ota.release.repository import delta_path
from ota.release.rollout import halt, start
from tests.conftest import origin
from tests.fleet_kit import CLASS, LINE, Device, Field, WebServer, change_role, everyone, name_delta, publish, untouched
from tests.test_agent_update import digest, files_of, slot_files, small_disk, stand_still, without_delta

pytest_plugins = ("tests.fleet_kit",)

TWICE = {"metadata/timestamp.json", "metadata/2.root.json"}
"""A second look within an update needs the timestamp, and asks whether there is a new root; there is none."""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between retries."""
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)


@pytest.fixture
def web(offered: Field) -> Iterator[WebServer]:
    """Serve the repository of `offered`, and point the device at it."""
    with WebServer(offered.repository.folder) as server:
        offered.device.configure(repository=server.address)
        yield server


def asked(server: WebServer) -> Counter[str]:
    """Count the requests by name."""
    return Counter(request.name for request in server.requests)


def objects(server: WebServer) -> set[str]:
    """Name the files of bundles that were asked for."""
    return {name.removeprefix("objects/") for name in asked(server) if name.startswith("objects/")}


def fetched_once(server: WebServer) -> bool:
    """Check that only what must be was asked for twice."""
    return {name for name, count in asked(server).items() if count > 1} == TWICE and max(asked(server).values()) == 2


# Nothing twice


def test_delta_update_fetches_nothing_twice(offered, web):
    outcome = offered.device.update()
    assert outcome.way == "delta"
    assert fetched_once(web)
    assert objects(web) == set()
    assert outcome.received == sum(web.sent.values())
    stand_still(offered)


def test_full_update_fetches_nothing_twice(offered, web):
    without_delta(offered)
    assert offered.device.update().way == "full"
    assert fetched_once(web)


def test_look_with_nothing_new_fetches_timestamp_and_policy(offered, web):
    offered.device.update()
    web.requests.clear()
    assert not offered.device.update().changed
    names = asked(web)
    assert set(names.values()) == {1}
    assert sorted(name.split("/")[0] for name in names) == ["metadata", "metadata", "targets"]
    assert {name for name in names if name.startswith("metadata/")} == TWICE
    (policy,) = (name for name in names if name.startswith("targets/"))
    assert policy.startswith(f"targets/rollout/{LINE}/")


def test_halt_during_the_download_still_stops_the_switch(offered, web):
    def publish_halt(number: int, _: str) -> None:
        if number == 9:
            offered.repository.set_policy(halt(everyone(offered.release)))

    outcome = offered.device.update(publish_halt)
    assert (outcome.changed, outcome.reason) == (False, "stopped before the switch: release 2 is halted")
    policies = [name for name in asked(web) if name.startswith("targets/rollout/")]
    assert len(policies) == 2  # the old one and the halt, each once


def test_other_policy_bytes_in_the_second_look_are_fetched_and_checked(offered, web):
    """Refuse, in the second look, a policy whose bytes are not what is signed, though the first look read a good one."""

    def publish_wrong(number: int, _: str) -> None:
        if number == 9:
            offered.repository.set_policy(everyone(offered.release, salt="other"))
            target = offered.repository._targets("rollout").targets[f"rollout/{LINE}/{CLASS}.json"]
            path = offered.repository._target_file(f"rollout/{LINE}/{CLASS}.json", target)
            path.write_bytes(path.read_bytes().replace(b"other", b"0ther"))

    with untouched(offered.device, TrustError, "failed verification", marks=False):
        offered.device.update(publish_wrong)


# Nothing that a slot holds


def test_full_update_copies_what_the_running_bundle_holds(offered, web, bundles):
    without_delta(offered)
    first, second = bundles["first"].manifest, bundles["second"].manifest
    shared = first.objects.keys() & second.objects.keys()
    assert {second.objects[name].role for name in shared} == {"graph", "sampler"}
    outcome = offered.device.update()
    assert objects(web) == second.objects.keys() - shared
    assert outcome.received < second.size - sum(second.objects[name].size for name in shared) + 20_000
    assert slot_files(offered.device, bundles["second"]) == files_of(bundles["second"])
    slots = [offered.device.root / "slots" / digest(bundles[name]) for name in ("first", "second")]
    graph = bundles["second"].path("graph").name
    assert len({(slot / graph).stat().st_ino for slot in slots}) == 2  # damage to one does not reach the other
    stand_still(offered)


def test_file_that_is_damaged_in_the_slot_is_fetched(offered, web, bundles):
    without_delta(offered)

    def damage(number: int, _: str) -> None:
        if number == 4:  # after the running bundle was found to be sound
            path = offered.device.file("graph")
            path.write_bytes(path.read_bytes()[:-1] + b"x")

    assert offered.device.update(damage).way == "full"
    assert bundles["second"].path("graph").name in objects(web)
    assert bundles["second"].path("sampler", "full").name not in objects(web)
    assert slot_files(offered.device, bundles["second"]) == files_of(bundles["second"])


def test_bundle_whose_files_are_all_here_costs_its_manifest(offered, web, bundles):
    offered.device.update()
    manifest = bundles["first"].manifest.model_copy(update={"origin": origin(8)})
    publish(offered.repository, replace(bundles["first"], manifest=manifest))  # the previous bundle, released anew
    web.requests.clear()
    outcome = offered.device.update()
    assert (outcome.way, offered.device.active) == ("full", manifest.digest)
    assert objects(web) == set()
    assert outcome.received < 20_000
    stand_still(offered)


def test_way_back_to_a_kept_bundle_fetches_no_manifest(offered, web, bundles):
    offered.device.update()
    first = offered.repository.releases(LINE, CLASS)[0]
    offered.repository.set_policy(start(first, (100,), soak=0, now=0, revert=True))
    web.requests.clear()
    outcome = offered.device.update()
    assert (outcome.way, offered.device.active) == ("kept", digest(bundles["first"]))
    assert not [name for name in asked(web) if name.startswith(("targets/models/", "objects/"))]


def test_damaged_manifest_of_a_kept_bundle_is_fetched(offered, web, bundles):
    offered.device.update()
    first = offered.repository.releases(LINE, CLASS)[0]
    offered.repository.set_policy(start(first, (100,), soak=0, now=0, revert=True))
    path = offered.device.root / "slots" / digest(bundles["first"]) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"shapes", b"shares"))
    outcome = offered.device.update()
    assert offered.device.active == digest(bundles["first"])
    assert outcome.way == "full"
    stand_still(offered)


def test_copies_need_room(offered, bundles, monkeypatch):
    """Count a copied file like a fetched one: it takes the same room in the new slot."""
    without_delta(offered)
    size = bundles["second"].manifest.size
    small_disk(monkeypatch, 2 * size + 8 * 1024 * 1024)  # the running slot also holds a manifest
    with untouched(offered.device, RoomError, "free bytes", marks=False):
        offered.device.update()
    small_disk(monkeypatch, 2 * size + 8 * 1024 * 1024 + 10_000)
    assert offered.device.update().way == "full"


@pytest.mark.parametrize("at", [0, 1])
def test_sound_copy_in_another_slot_is_taken_where_one_is_damaged(offered, web, bundles, at):
    offered.device.update()
    slots = sorted(offered.device.root / "slots" / digest(bundles[name]) for name in ("first", "second"))
    manifest = bundles["first"].manifest.model_copy(update={"origin": origin(8)})
    publish(offered.repository, replace(bundles["first"], manifest=manifest))
    graph = bundles["second"].path("graph")
    web.requests.clear()

    def damage(number: int, _: str) -> None:
        if number == 4:  # after the running bundle was found to be sound
            (slots[at] / graph.name).write_bytes(graph.read_bytes()[:-1] + b"x")

    assert offered.device.update(damage).way == "full"
    assert objects(web) == set()
    assert offered.device.file("graph").read_bytes() == graph.read_bytes()


def test_file_that_the_disk_cannot_read_in_a_slot_is_fetched(offered, web, bundles, monkeypatch):
    offered.device.update()
    manifest = bundles["first"].manifest.model_copy(update={"origin": origin(8)})
    publish(offered.repository, replace(bundles["first"], manifest=manifest))
    weights = bundles["first"].path("weights", "full").name
    path, real = offered.device.root / "slots" / digest(bundles["first"]) / weights, Path.stat

    def stat(self: Path, **given: Any) -> Any:
        if self == path:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, **given)

    monkeypatch.setattr(Path, "stat", stat)
    unreadable(monkeypatch, path)
    web.requests.clear()
    assert offered.device.update().way == "full"
    assert objects(web) == {weights}


def test_repair_takes_what_the_slot_of_before_holds(offered, web, bundles):
    offered.device.update()
    offered.device.file("graph").unlink()
    web.requests.clear()
    assert offered.device.update().reason == "release 2 was damaged and is repaired; release 2 is installed"
    assert objects(web) == set()
    assert slot_files(offered.device, bundles["second"]) == files_of(bundles["second"])


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let the disk fail whenever a file is opened to be read."""
    real = Path.open

    def opened(self: Path, *given: Any, **more: Any) -> Any:
        if self == path:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, *given, **more)

    monkeypatch.setattr(Path, "open", opened)


# A link that breaks


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each update end with the first break of its link."""
    monkeypatch.setattr("ota.agent.transport.ATTEMPTS", 1)


def told(device: Device) -> tuple[list[int], Exception | None]:
    """Update; return the bytes that each download was announced with, and the error that ended the update."""
    found: list[int] = []

    def read(number: int, name: str) -> None:
        if number == 5:
            found.append(int(name.rsplit(" ", 2)[1].replace(",", "")))

    try:
        device.update(read)
    except TransferError as error:
        return found, error
    return found, None


def sent(server: WebServer) -> int:
    """Count the bytes that were sent of files of bundles and of deltas."""
    return sum(count for name, count in server.sent.items() if name.startswith(("objects/", "targets/deltas/")))


@pytest.mark.usefixtures("breaking")
def test_full_update_over_a_link_that_breaks_goes_on(offered, web, bundles):
    """Fetch each byte once, announce exactly what is still missing, and copy nothing until all is here."""
    without_delta(offered)
    first, second = bundles["first"].manifest.objects, bundles["second"].manifest.objects
    lacking = {name: entry.size for name, entry in second.items() if name not in first}
    web.faults.cut_after = {name: size // 2 for name, size in lacking.items()}
    for _ in lacking:
        before = sent(web)
        announced, error = told(offered.device)
        assert isinstance(error, TransferError)
        assert announced == [sum(lacking.values()) - before]
        assert not list((offered.device.root / "slots" / f".{digest(bundles['second'])}").iterdir())
    before = sent(web)
    assert told(offered.device) == ([sum(lacking.values()) - before], None)
    assert sent(web) == sum(lacking.values())
    assert slot_files(offered.device, bundles["second"]) == files_of(bundles["second"])
    stand_still(offered)


@pytest.mark.usefixtures("breaking")
def test_delta_over_a_link_that_breaks_goes_on(offered, web, step):
    name = f".{offered.repository.deltas(LINE, CLASS)[0].name}"
    web.faults.cut_after = {name: 1000}
    assert told(offered.device)[0] == [step.stat().st_size]
    assert told(offered.device) == ([step.stat().st_size - 1000], None)
    assert sent(web) == step.stat().st_size


@pytest.mark.usefixtures("breaking")
@pytest.mark.parametrize("way", ["to the bundle", "nowhere"])
def test_delta_with_the_hash_of_the_weights_removes_nothing_of_them(offered, web, bundles, way):
    """Keep what is here of the weights where a thief of the key of `deltas` signs a delta with their hash: both would be downloaded to one place."""
    without_delta(offered)
    weights = bundles["second"].path("weights", "full")
    size = weights.stat().st_size
    first, second = digest(bundles["first"]), digest(bundles["second"])
    sign_delta(offered, first, second if way == "to the bundle" else "1" * 64, weights.name, 5000)
    for part in (10_000, 20_000):
        web.faults.cut_after = {weights.name: part}
        assert isinstance(told(offered.device)[1], TransferError)
    assert offered.device.update().way == "full"
    assert web.bytes_sent(weights.name) == size
    stand_still(offered)


@pytest.mark.usefixtures("breaking")
def test_two_deltas_with_one_hash_cost_the_full_bundle_and_no_more(offered, web, bundles, step):
    """Fetch the full bundle where a thief signs the hash of a good delta with another length: each would remove what is here of the other."""
    first, second = digest(bundles["first"]), digest(bundles["second"])
    sign_delta(offered, first, second, hashlib.sha256(step.read_bytes()).hexdigest(), 10)
    weights = bundles["second"].path("weights", "full")
    web.faults.cut_after = {f".{offered.repository.deltas(LINE, CLASS)[0].name}": 1000, weights.name: 1000}
    assert isinstance(told(offered.device)[1], TransferError)
    assert offered.device.update().way == "full"
    assert web.bytes_sent(weights.name) == weights.stat().st_size
    assert not web.asked(f".{offered.repository.deltas(LINE, CLASS)[0].name}")


def sign_delta(field: Field, base: str, target: str, sha256: str, size: int) -> None:
    """Sign any hash and length as a delta of format 2, as the holder of the deltas keys can."""
    path = delta_path(LINE, CLASS, base, target, 2)

    def change(signed: Targets) -> None:
        signed.targets[path] = TargetFile(size, {"sha256": sha256}, path)

    change_role(field.repository, "deltas", change)


@pytest.mark.usefixtures("breaking")
def test_full_bundle_that_is_almost_here_is_not_given_up_for_a_delta(offered, web, bundles, step):
    without_delta(offered)
    weights = bundles["second"].path("weights", "full")
    size = weights.stat().st_size
    web.faults.cut_after = {weights.name: size - 100}
    assert told(offered.device)[1]
    name_delta(offered.repository, digest(bundles["first"]), digest(bundles["second"]), step.read_bytes())
    assert 100 < step.stat().st_size < size
    assert offered.device.update().way == "full"
    assert web.bytes_sent(weights.name) == size


@pytest.mark.usefixtures("breaking")
def test_delta_that_is_almost_here_is_not_given_up_for_another(offered, web, bundles, step):
    name = f".{offered.repository.deltas(LINE, CLASS)[0].name}"
    web.faults.cut_after = {name: step.stat().st_size - 100}
    assert told(offered.device)[1]
    first, second = digest(bundles["first"]), digest(bundles["second"])
    other = name_delta(offered.repository, first, second, step.read_bytes()[:-200], form=2)
    assert offered.device.update().way == "delta"
    assert web.bytes_sent(other.name) == 0


@pytest.mark.usefixtures("breaking")
def test_repair_keeps_what_is_here_of_an_update(offered, web, bundles):
    without_delta(offered)
    weights = bundles["second"].path("weights", "full")
    web.faults.cut_after = {weights.name: 1000}
    assert told(offered.device)[1]
    offered.device.file("golden").unlink()
    assert offered.device.update().changed
    assert web.bytes_sent(weights.name) == weights.stat().st_size


def test_repair_makes_room_of_what_is_here_of_an_update(offered, web, bundles, monkeypatch):
    without_delta(offered)
    weights = bundles["second"].path("weights", "full")
    (offered.device.root / "incoming").mkdir(exist_ok=True)
    part = offered.device.root / "incoming" / weights.name
    part.write_bytes(weights.read_bytes()[:-1])
    path = offered.device.file("weights")
    path.unlink()
    small_disk(monkeypatch, bundles["first"].manifest.size + 8 * 1024 * 1024 + 50_000)
    with pytest.raises(RoomError):
        offered.device.update()
    assert path.is_file()
    assert not part.exists()


def test_download_that_the_disk_cannot_read_back_is_fetched_again(offered, web, bundles, monkeypatch):
    """Say that the disk is at fault, and let the next update begin anew: otherwise it would end at the same bytes for ever."""
    without_delta(offered)
    weights = bundles["second"].path("weights", "full").name
    with monkeypatch.context() as patch:
        unreadable(patch, offered.device.root / "incoming" / weights)
        with untouched(
            offered.device, StateError, "cannot be read back: .*; it was deleted and will be fetched again", marks=False
        ):
            offered.device.update()
    web.requests.clear()
    assert offered.device.update().way == "full"
    assert objects(web) == {weights}


# What all this takes


def test_everything_but_the_weights_stays_below_its_bound(offered, web, step):
    """Hold what a device fetches besides the weights, in an update by delta, below the 8 KiB that were promised."""
    with step.open("rb") as patch:
        sizes = {file.target.role: sum(r.size for r in records(patch, file)) for file in read_header(patch).files}
    outcome = offered.device.update()
    assert outcome.received - sizes["weights"] < 8 * 1024
    assert sizes["golden"] < 512
    assert sizes["reference"] < 256
    assert sizes["graph"] == sizes["sampler"] < 64  # they are those of the running bundle

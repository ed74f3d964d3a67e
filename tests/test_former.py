"""The version before: its agent, its device and its workspace live with today's factory and agent.

`tests/former/README.md` says what the fixtures are and how they are renewed. The old programs run as processes of their own, from
their own wheels.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ota
from flows import policies
from flows.cli import app
from flows.settings import FORMAT
from flows.workspace import Workspace
from ota import chain
from ota.agent.state import Home
from ota.manifest import as_numbers
from ota.release import bundle, compatibility, rollout
from ota.release.bundle import Bundle
from registry.champions import champions
from tests.conftest import agent
from tests.fleet_kit import WebServer
from tests.former import kit
from tests.former.kit import Programs, World, answer

LINE, CLASS, DEVICE = "shapes", "edge", "press-01"
VERSION = kit.made()["version"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Provide the agent of the version before, installed from its wheel."""
    return Programs.install(tmp_path_factory.mktemp("old-agent"), kit.wheel("deltaferry_agent"))


@pytest.fixture(scope="module")
def old_factory(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Provide the factory of the version before, installed from its wheel."""
    return Programs.install(tmp_path_factory.mktemp("old-factory"), kit.wheel("deltaferry"))


def ferry(world: World, *words: str, code: int = 0) -> Any:
    """Run today's `ferry` in a workspace; return its answer, or what it says if it refuses."""
    result = CliRunner().invoke(app, ["--quiet", "-w", str(world.factory), *words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.stderr


def today(world: World, *words: str, code: int = 0) -> Any:
    """Run today's agent on a device's folder."""
    result = agent("--quiet", *words, "--dir", str(world.device), *([] if code else ["--json"]))
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.stderr


@contextmanager
def opened(world: World) -> Iterator[Workspace]:
    """Open a workspace with today's ferry."""
    workspace = Workspace(world.factory)
    yield workspace
    workspace.ledger.close()
    workspace.fleet.close()


def assembled(workspace: Workspace, out: Path, oldest_agent: str) -> Bundle:
    """Make a bundle of the champions in the newest form that an agent reads, whatever the devices report."""
    from flows.steps import champion_files

    found = champions(workspace, workspace.class_subjects(LINE, CLASS))
    before = workspace.repository.manifest(workspace.repository.releases(LINE, CLASS)[-1])
    return bundle.assemble(
        {variant: champion_files(workspace, champion).bundle for variant, champion in found.items()},
        line=LINE, device_class=CLASS, tier=before.tier, configuration=before.configuration, precision=before.precision,
        origin=before.origin, out=out / "bundles", oldest_agent=oldest_agent,
    )  # fmt: skip


def publish(workspace: Workspace, made: Bundle) -> None:
    """Sign a bundle, open it to all devices, and publish it."""
    release = workspace.repository.publish_release(made.manifest, made.folder, workspace.ledger.head(), [])
    workspace.repository.set_policy(rollout.start(release, (100,), soak=0, now=0))
    policies.publish(workspace)


def release_of_today(world: World) -> Any:
    """Let the device report today's agent, and release the champions in the form that only this agent reads."""
    today(world, "update")
    made = ferry(world, "release", LINE)
    assert made["minimum_agent"] == ota.__version__
    ferry(world, "rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    return made


def runs(world: World) -> str | None:
    return Home(world.device).load().active


def draws_all(old: Programs, device: Path) -> None:
    """Let the old agent draw with shared weights (full, dev) and with an overlay (turbo)."""
    for variant in ("full", "dev", "turbo"):
        drawn = device.parent / f"{variant}.png"
        answer(old.agent(device, "generate", "bar", "--variant", variant, "--output", drawn))
        assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Provide what the version before left; copy it, do not change it."""
    return World.unpack(tmp_path_factory.mktemp("former"))


@pytest.fixture
def world(unpacked: World, tmp_path: Path) -> World:
    """Provide a copy of `unpacked`."""
    return unpacked.copy(tmp_path / "world")


@pytest.fixture(scope="module")
def released_once(unpacked: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Let today's factory publish the old workspace's second champion, with a delta; copy it, do not change it."""
    world = unpacked.copy(tmp_path_factory.mktemp("released") / "world")
    made = ferry(world, "release", LINE)
    assert (made["release"], len(made["deltas"]), made["minimum_agent"]) == (2, 1, VERSION)
    with opened(world) as workspace:
        assert 1 in {link.form for link in workspace.repository.links(LINE, CLASS)}  # agents of before look for no other delta
    ferry(world, "rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    return world


@pytest.fixture
def released(released_once: World, tmp_path: Path) -> World:
    """Provide a copy of `released_once`."""
    return released_once.copy(tmp_path / "released")


# The old agent and today's factory


def test_old_agent_updates_by_delta_from_todays_factory(old, released):
    done = answer(old.agent(released.device, "update"))
    assert (done["way"], done["reason"]) == ("delta", "release 2 is installed")
    draws_all(old, released.device)
    standing = ferry(released, "fleet", "status")["devices"][DEVICE]["standing"]
    assert (standing["release"], standing["agent"], standing["behind"]) == (2, VERSION, False)


def test_old_agent_never_reads_policy_2_and_follows_policy_1_alone(old, world):
    ferry(world, "release", LINE)
    before = runs(world)
    with WebServer(world.factory / "published") as server:
        config = world.device / "config.json"
        config.write_text(json.dumps(json.loads(config.read_bytes()) | {"repository": server.address}))
        made = ferry(world, "rollout", "start", LINE, "--waves", "100")
        assert (made["schema_version"], made["seq"], made["unwatched"]["seq"]) == (2, 2, 1)
        assert made["not_watched"] == [f"{DEVICE} ({VERSION})"]
        assert answer(old.agent(world.device, "update"))["changed"] is False
        assert runs(world) == before
        ferry(world, "rollout", "widen", LINE, "--unwatched", "100")
        assert answer(old.agent(world.device, "update"))["reason"] == "release 2 is installed"
        assert server.asked("edge.json")
        assert server.asked("edge.2.json") == []


@pytest.mark.parametrize("way", ["delta", "full"])
def test_agent_of_format_version_1_takes_its_own_delta_or_the_full_bundle(old, released, way):
    """Serve the delta of format 2 beside that of format 1, or alone: an agent that reads only format 1 never asks for it."""
    with opened(released) as workspace:
        repository, (base, target) = workspace.repository, workspace.repository.releases(LINE, CLASS)
        names = {delta.name for delta in repository.deltas(LINE, CLASS)}
        assert names == {chain.name_of(form, base.manifest, target.manifest) for form in chain.FORMATS}
        if way == "full":
            first = f"deltas/{LINE}/{CLASS}/{chain.name_of(1, base.manifest, target.manifest)}"
            repository.commit({"deltas": lambda signed: signed.targets.pop(first)})
            policies.publish(workspace)
    with WebServer(released.factory / "published") as server:
        config = released.device / "config.json"
        config.write_text(json.dumps(json.loads(config.read_bytes()) | {"repository": server.address}))
        done = answer(old.agent(released.device, "update"))
        assert (done["way"], done["changed"], runs(released)) == (way, True, target.manifest)
        assert server.asked(chain.name_of(2, base.manifest, target.manifest)) == []
        assert bool(server.asked(chain.name_of(1, base.manifest, target.manifest))) == (way == "delta")


def test_todays_agent_takes_the_smaller_of_both_formats(released):
    with opened(released) as workspace:
        smallest = min(delta.size for delta in workspace.repository.deltas(LINE, CLASS))
        assert len({delta.size for delta in workspace.repository.deltas(LINE, CLASS)}) == 2
    with WebServer(released.factory / "published") as server:
        config = released.device / "config.json"
        config.write_text(json.dumps(json.loads(config.read_bytes()) | {"repository": server.address}))
        assert today(released, "update")["way"] == "delta"
        assert sum(size for name, size in server.sent.items() if name.startswith("targets/deltas/")) == smallest


def test_old_agent_sets_up_a_device_and_installs_in_full(old, released, tmp_path):
    anchor = released.factory / "root.json"
    device = tmp_path / "fresh"
    answer(old.agent(
        device, "init", "--device", "press-02", "--line", LINE, "--class", CLASS, "--repository", released.factory / "published",
        "--root", anchor, "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(),
    ))  # fmt: skip
    assert answer(old.agent(device, "update"))["way"] == "full"
    assert answer(old.agent(device, "status"))["sound"] is True
    draws_all(old, device)


def test_old_agent_says_too_old_for_the_newest_form_and_keeps_what_runs(old, world):
    with opened(world) as workspace:
        newest = assembled(workspace, world.factory.parent / "newest", ota.__version__)
        assert newest.manifest.schema_version == compatibility.newest_form()
        publish(workspace, newest)
    before = (world.device / "state.json").read_bytes()
    for _ in range(2):
        done = old.agent(world.device, "update")
        assert done.returncode == 7
        assert f"needs agent {newest.manifest.minimum_agent}, but this is {VERSION}; update the agent first" in done.stderr
        assert "Traceback" not in done.stderr
    assert (world.device / "state.json").read_bytes() == before  # it runs, and nothing is refused for good
    answer(old.agent(world.device, "generate", "bar", "--output", world.device.parent / "bar.png"))

    assert today(world, "update")["way"] == "full"  # once the agent is updated, the same release is installed
    assert runs(world) == newest.manifest.digest


def test_release_has_the_form_that_the_devices_report(released):
    with opened(released) as workspace:
        (first, second) = workspace.repository.releases(LINE, CLASS)
        assert workspace.repository.manifest(second).minimum_agent == VERSION
    made = release_of_today(released)
    assert made["left_behind"] == {}
    assert made["manifest"] not in (first.manifest, second.manifest)
    assert made["versions"] == {"full": 2, "dev": 2, "turbo": 2}  # the same champions as in release 2
    today(released, "update")
    assert runs(released) == made["manifest"]


# The old device and today's agent


def test_todays_agent_takes_over_the_old_device(released):
    first = runs(released)
    assert today(released, "status")["sound"] is True
    today(released, "generate", "bar", "--output", str(released.device.parent / "bar.png"))
    assert today(released, "update")["way"] == "delta"
    assert runs(released) != first
    assert today(released, "rollback")["active"] == first
    assert [entry["event"] for entry in today(released, "history")["entries"]][-4:] == [
        "new_agent", "installed", "confirmed", "rolled_back",
    ]  # fmt: skip


def test_old_agent_goes_on_with_what_todays_agent_left(old, released):
    first = runs(released)
    today(released, "update")
    second = runs(released)
    status = answer(old.agent(released.device, "status"))
    assert (status["active"], status["sound"], status["refused"]) == (second, True, {})
    answer(old.agent(released.device, "generate", "bar", "--output", released.device.parent / "bar.png"))
    assert answer(old.agent(released.device, "update"))["changed"] is False
    rolled_back = answer(old.agent(released.device, "rollback"))
    assert (rolled_back["active"], runs(released)) == (first, first)
    assert answer(old.agent(released.device, "history"))["entries"]
    assert today(released, "status")["active"] == first  # and today's agent reads what the old one left
    standing = ferry(released, "fleet", "status")["devices"][DEVICE]["standing"]
    assert standing["agent"] == VERSION  # its last report is that of the older agent


def test_old_agent_draws_with_the_bundle_before_where_it_cannot_read_what_runs(old, world):
    first = runs(world)
    release_of_today(world)
    assert today(world, "update")["changed"]
    assert runs(world) != first
    drawn = old.agent(world.device, "generate", "bar", "--output", world.device.parent / "bar.png")
    assert drawn.returncode == 0
    assert "the bundle before draws" in drawn.stderr
    assert answer(old.agent(world.device, "rollback"))["active"] == first
    assert answer(old.agent(world.device, "status"))["sound"] is True


# Reports


def test_factory_learns_of_a_new_agent_before_there_is_a_release(world):
    assert ferry(world, "fleet", "status")["devices"][DEVICE]["standing"]["agent"] == VERSION
    assert today(world, "update")["changed"] is False
    standing = ferry(world, "fleet", "status")["devices"][DEVICE]["standing"]
    assert (standing["agent"], standing["event"], standing["release"]) == (ota.__version__, "new_agent", 1)
    today(world, "update")
    assert list((world.factory / "inbox").glob("*.json")) == []  # it says so once


def test_old_factory_sets_the_report_of_todays_agent_aside_and_loses_none(old_factory, world):
    """Update the agents before the factory, which CHANGELOG.md advises against: the reports wait in rejected/ for the newer ferry."""
    today(world, "update")
    (name,) = answer(old_factory.ferry(world.factory, "fleet", "status"))["rejected"]
    aside = world.factory / "inbox" / "rejected" / name
    aside.rename(world.factory / "inbox" / name)
    told = ferry(world, "fleet", "status")
    assert told["rejected"] == {}
    standing = told["devices"][DEVICE]["standing"]
    assert (standing["agent"], standing["event"], standing["release"]) == (ota.__version__, "new_agent", 1)


# The old workspace and today's factory


def test_todays_factory_works_in_the_old_workspace(world):
    standing = ferry(world, "status")
    assert [(model["subject"], model["champion"]) for model in standing["models"]] == [
        (f"shapes/I/{variant}", 2) for variant in ("full", "dev", "turbo")
    ]
    assert {wait["command"] for wait in standing["waits"]} == {"ferry release shapes/edge"}
    assert [(device["device"], device["agent"]) for device in standing["devices"]] == [(DEVICE, VERSION)]
    assert ferry(world, "evaluate", "shapes/I/full")["version"] == 2
    assert ferry(world, "history", "--verify")["checked"] == len(ferry(world, "history")["entries"])
    assert ferry(world, "trust", "status")
    assert ferry(world, "trace", DEVICE)
    assert ferry(world, "rollback", "shapes/I/full")["facts"]["version"] == 1
    assert ferry(world, "release", LINE)["known"]  # of champion 1, byte for byte the bundle that the old factory signed
    assert ferry(world, "promote", "shapes/I/full", "2", "--reason", "it was the better one")["facts"]["version"] == 2
    assert ferry(world, "doctor")["fit"]


def test_lines_of_the_old_workspace_keep_their_settings(world):
    with opened(world) as workspace:
        line = workspace.line(LINE)
    assert (line.sampler.steps, line.retraining.update_grid, line.distillation.trajectories) == (6, 1.0, 32)
    assert line.model_dump(include={"update_method", "update_budget"}, exclude_none=True) == {}  # the way of 0.2, and no budget


def test_old_and_todays_factory_refuse_a_newer_workspace_in_one_sentence(old_factory, world):
    settings = world.factory / "ferry.toml"
    newer = settings.read_text().replace("schema = 2", f"schema = {FORMAT + 1}", 1)
    settings.write_text(newer)
    done = old_factory.ferry(world.factory, "status")
    assert done.returncode == 3
    said = f"schema = {FORMAT + 1} is the format of a newer version of ferry"
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert said in ferry(world, "status", code=3)
    assert settings.read_text() == newer


def test_old_factory_refuses_a_setting_of_today_in_one_sentence(old_factory, world):
    settings = world.factory / "ferry.toml"
    newer = settings.read_text().replace("text_length = 8", 'text_length = 8\nupdate_method = "lowrank"', 1)
    settings.write_text(newer)
    done = old_factory.ferry(world.factory, "status")
    assert done.returncode == 3
    assert "update_method" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert settings.read_text() == newer


def test_old_factory_refuses_a_bundle_of_today_in_one_sentence_and_signs_nothing(old_factory, world):
    made = release_of_today(world)
    before = {path: path.read_bytes() for path in (world.factory / "repository").rglob("*") if path.is_file()}
    done = old_factory.ferry(world.factory, "release", LINE)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "the fleet's tables hold a report of another version" in done.stderr  # one that today's factory kept as it was signed
    with closing(sqlite3.connect(world.factory / "ferry.db")) as connection, connection:
        connection.execute("delete from fleet_reports where body is null")
    done = old_factory.ferry(world.factory, "release", LINE)
    assert done.returncode == 3
    assert f"needs agent {made['minimum_agent']}, but this is {VERSION}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in (world.factory / "repository").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_todays_factory_retrains_what_the_old_one_trained(old, world):
    rows = CliRunner().invoke(app, ["--quiet", "-w", str(world.factory), "retrain", LINE, "--json"])
    assert rows.exit_code in (0, 5), rows.output  # this code trains anew; whether that is better is the gate's business
    full, *others = json.loads(rows.stdout)["models"]
    assert full["outcome"] in ("promote", "refuse", "promote if reasoned", "more data", "unchanged")
    assert full["version"] in (2, 3)
    assert [row["subject"] for row in others] == ["shapes/I/dev", "shapes/I/turbo"]
    # So few images and steps may make other edges than before, which is what a device refuses unless it is allowed.
    ferry(world, "release", LINE, "--allow-change", "--reason", "trained anew on the same images")
    ferry(world, "rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    assert answer(old.agent(world.device, "update"))["changed"] is True


# Who is left behind


@pytest.fixture
def raised(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Provide a workspace whose next bundle needs today's agent, although its form is an old one."""
    monkeypatch.setattr(compatibility, "READ_SINCE", dict.fromkeys(compatibility.READ_SINCE, ota.__version__))
    return world


def test_release_names_devices_left_behind_and_signs_nothing(raised):
    before = {path: path.read_bytes() for path in (raised.factory / "repository").rglob("*") if path.is_file()}
    entries = len(ferry(raised, "history")["entries"])
    said = ferry(raised, "release", LINE, code=5)
    assert f"needs ferry-agent {ota.__version__}, but 1 device has an older one" in said
    assert f"{DEVICE} ({VERSION}, which version 0.2 kept without the signature)" in said
    assert all(way in said for way in ("update their agents", f'oldest_agent = "{VERSION}"', "--leave-behind"))
    assert {path: path.read_bytes() for path in (raised.factory / "repository").rglob("*") if path.is_file()} == before
    assert len(ferry(raised, "history")["entries"]) == entries


def test_leaving_devices_behind_is_a_recorded_decision(old, raised):
    made = ferry(raised, "release", LINE, "--leave-behind")
    assert made["left_behind"] == {DEVICE: VERSION}
    assert ferry(raised, "history")["entries"][-1]["facts"]["left_behind"] == made["left_behind"]
    ferry(raised, "rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    assert DEVICE in "".join(ferry(raised, "rollout", "status", LINE)["behind"])
    assert [device["too_old"] for device in ferry(raised, "status")["devices"]] == [True]
    assert (
        "agent too old for what is rolled out: press-01" in CliRunner().invoke(app, ["-w", str(raised.factory), "status"]).output
    )
    first = runs(raised)
    done = old.agent(raised.device, "update")
    assert (done.returncode, runs(raised)) == (7, first)
    assert "update the agent first" in done.stderr

    today(raised, "update")
    assert runs(raised) == made["manifest"]
    assert [device["too_old"] for device in ferry(raised, "status")["devices"]] == [False]
    assert ferry(raised, "rollout", "status", LINE)["behind"] == []


def test_updated_agents_and_silent_devices_hold_no_release_up(raised):
    ferry(raised, "fleet", "enroll", "press-09", "d7" * 31 + "5a")
    today(raised, "update")  # the device's new agent reports
    made = ferry(raised, "release", LINE)
    assert (made["release"], made["left_behind"]) == (2, {})


def test_class_asks_for_the_form_that_its_agents_read(world, monkeypatch):
    from flows.publish import make_bundle

    asked: list[str] = []
    real = bundle.assemble
    monkeypatch.setattr("flows.publish.bundle.assemble", lambda *a, **k: asked.append(k["oldest_agent"]) or real(*a, **k))
    make_bundle.fn(str(world.factory), LINE, CLASS)
    settings = world.factory / "ferry.toml"  # its last table is that of the class
    settings.write_text(settings.read_text().replace('["full", "dev", "turbo"]', '["full"]') + 'oldest_agent = "0.1.0"\n')
    make_bundle.fn(str(world.factory), LINE, CLASS)
    assert (asked[0], asked[-1]) == (VERSION, "0.1.0")  # what its device reports, and what ferry.toml says


# Fixtures


def test_fixtures_are_small_and_of_the_version_before():
    for file in kit.HERE.iterdir():
        assert file.stat().st_size < 1_000_000, file.name
    now, before = as_numbers(ota.__version__), as_numbers(VERSION)
    said = "renew tests/former with the commit of the last version: `make former COMMIT=...`"
    assert before < now, said
    assert before[0] < now[0] or now[1] - before[1] <= 1, said

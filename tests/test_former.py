"""The version before: its agent, its device and its workspace live with today's factory and agent.

`tests/former/README.md` says what the fixtures are and how they are renewed. The old programs run as processes of their own, from
their own wheels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from ota.manifest import VariantName, as_numbers
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
    """Make a bundle of the champion in two variants that share its weights: the newest form, or that of an older agent."""
    from flows.steps import champion_files

    (champion,) = champions(workspace, workspace.class_subjects(LINE, CLASS)).values()
    files = champion_files(workspace, champion).bundle
    dev = out / "dev"
    shutil.copytree(files, dev)
    table = json.loads((files / "sampler.json").read_bytes()) | {"variant": "dev", "times": [1.0, 0.6, 0.3, 0.0]}
    (dev / "sampler.json").write_text(json.dumps(table))
    exports: dict[VariantName, Path] = {"full": files, "dev": dev}
    release = workspace.repository.releases(LINE, CLASS)[-1]
    before = workspace.repository.manifest(release)
    return bundle.assemble(
        exports, line=LINE, device_class=CLASS, tier=before.tier, configuration=before.configuration, precision=before.precision,
        origin=before.origin, out=out / "bundles", oldest_agent=oldest_agent,
    )  # fmt: skip


def publish(workspace: Workspace, made: Bundle) -> None:
    """Sign a bundle, open it to all devices, and publish it."""
    release = workspace.repository.publish_release(made.manifest, made.folder, workspace.ledger.head(), [])
    workspace.repository.set_policy(rollout.start(release, (100,), soak=0, now=0))
    policies.publish(workspace)


def runs(world: World) -> str | None:
    return Home(world.device).load().active


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
    ferry(world, "rollout", "start", LINE, "--waves", "100")
    return world


@pytest.fixture
def released(released_once: World, tmp_path: Path) -> World:
    """Provide a copy of `released_once`."""
    return released_once.copy(tmp_path / "released")


# The old agent and today's factory


def test_old_agent_updates_by_delta_from_todays_factory(old, released):
    done = answer(old.agent(released.device, "update"))
    assert (done["way"], done["reason"]) == ("delta", "release 2 is installed")
    drawn = answer(old.agent(released.device, "generate", "bar", "--output", released.device.parent / "bar.png"))
    assert Path(drawn["output"]).read_bytes().startswith(b"\x89PNG")
    standing = ferry(released, "fleet", "status")["devices"][DEVICE]["standing"]
    assert (standing["release"], standing["agent"], standing["behind"]) == (2, f"{VERSION} or older", False)


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


def test_old_agent_says_too_old_for_the_newest_form_and_keeps_what_runs(old, world):
    with opened(world) as workspace:
        newest = assembled(workspace, world.factory.parent / "newest", ota.__version__)
        assert newest.manifest.schema_version == compatibility.newest_form()
        publish(workspace, newest)
    before = (world.device / "state.json").read_bytes()
    for _ in range(2):
        done = old.agent(world.device, "update")
        assert done.returncode == 5
        assert f"needs agent {newest.manifest.minimum_agent}, but this is {VERSION}; update the agent first" in done.stderr
        assert "Traceback" not in done.stderr
    assert (world.device / "state.json").read_bytes() == before  # it runs, and nothing is refused for good
    answer(old.agent(world.device, "generate", "bar", "--output", world.device.parent / "bar.png"))

    assert today(world, "update")["way"] == "full"  # once the agent is updated, the same release is installed
    assert runs(world) == newest.manifest.digest


def test_old_agent_installs_the_same_champion_in_the_form_that_it_reads(old, world):
    with opened(world) as workspace:
        made = assembled(workspace, world.factory.parent / "old", VERSION)
        assert compatibility.minimum_agent(made.manifest.schema_version) == VERSION == made.manifest.minimum_agent
        publish(workspace, made)
    assert answer(old.agent(world.device, "update"))["changed"]
    drawn = world.device.parent / "dev.png"
    answer(old.agent(world.device, "generate", "bar", "--variant", "dev", "--output", drawn))
    assert drawn.read_bytes().startswith(b"\x89PNG")


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
    assert standing["agent"] == f"{VERSION} or older"  # its last report is that of the older agent


# Reports


def test_factory_learns_of_a_new_agent_before_there_is_a_release(world):
    assert ferry(world, "fleet", "status")["devices"][DEVICE]["standing"]["agent"] == f"{VERSION} or older"
    assert today(world, "update")["changed"] is False
    standing = ferry(world, "fleet", "status")["devices"][DEVICE]["standing"]
    assert (standing["agent"], standing["event"], standing["release"]) == (ota.__version__, "new_agent", 1)
    today(world, "update")
    assert list((world.factory / "inbox").glob("*.json")) == []  # it says so once


def test_old_factory_sets_the_new_report_aside_and_todays_takes_it_from_there(old_factory, world):
    today(world, "update")
    (report,) = (world.factory / "inbox").glob("*.json")
    told = answer(old_factory.ferry(world.factory, "fleet", "status"))
    assert "is not valid" in told["rejected"][report.name]
    assert told["devices"][DEVICE]["event"] == "confirmed"
    (world.factory / "inbox/rejected" / report.name).rename(report)
    assert ferry(world, "fleet", "status")["devices"][DEVICE]["standing"]["agent"] == ota.__version__


# The old workspace and today's factory


def test_todays_factory_works_in_the_old_workspace(world):
    standing = ferry(world, "status")
    assert [(model["subject"], model["champion"]) for model in standing["models"]] == [("shapes/I/full", 2)]
    assert {wait["command"] for wait in standing["waits"]} == {"ferry release shapes/edge"}
    assert [(device["device"], device["agent"]) for device in standing["devices"]] == [(DEVICE, f"{VERSION} or older")]
    assert ferry(world, "evaluate", "shapes/I/full")["version"] == 2
    assert ferry(world, "history", "--verify")["checked"] == len(ferry(world, "history")["entries"])
    assert ferry(world, "trust", "status")
    assert ferry(world, "trace", DEVICE)
    assert ferry(world, "rollback", "shapes/I/full")["facts"]["version"] == 1
    assert ferry(world, "release", LINE)["known"]  # of champion 1, byte for byte the bundle that the old factory signed
    assert ferry(world, "promote", "shapes/I/full", "2", "--reason", "it was the better one")["facts"]["version"] == 2
    assert ferry(world, "doctor")["fit"]


def test_old_factory_refuses_a_newer_workspace_in_one_sentence(old_factory, world):
    settings = world.factory / "ferry.toml"
    newer = settings.read_text().replace("schema = 1", f"schema = {FORMAT}", 1)
    settings.write_text(newer)
    done = old_factory.ferry(world.factory, "status")
    assert done.returncode == 3
    assert f"schema = {FORMAT} is the format of a newer version of ferry" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert settings.read_text() == newer


@pytest.mark.slow
def test_todays_factory_retrains_what_the_old_one_trained(old, world):
    rows = CliRunner().invoke(app, ["--quiet", "-w", str(world.factory), "retrain", LINE, "--json"])
    assert rows.exit_code in (0, 5), rows.output  # this code trains anew; whether that is better is the gate's business
    (row,) = json.loads(rows.stdout)["models"]
    assert row["outcome"] in ("promote", "refuse", "promote if reasoned", "more data", "unchanged")
    assert row["version"] in (2, 3)
    # So few images and steps may make other edges than before, which is what a device refuses unless it is allowed.
    ferry(world, "release", LINE, "--allow-change", "--reason", "trained anew on the same images")
    ferry(world, "rollout", "start", LINE, "--waves", "100")
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
    assert f"{DEVICE} ({VERSION} or older)" in said
    assert all(way in said for way in ("update their agents", f'oldest_agent = "{VERSION}"', "--leave-behind"))
    assert {path: path.read_bytes() for path in (raised.factory / "repository").rglob("*") if path.is_file()} == before
    assert len(ferry(raised, "history")["entries"]) == entries


def test_leaving_devices_behind_is_a_recorded_decision(old, raised):
    made = ferry(raised, "release", LINE, "--leave-behind")
    assert made["left_behind"] == {DEVICE: f"{VERSION} or older"}
    assert ferry(raised, "history")["entries"][-1]["facts"]["left_behind"] == made["left_behind"]
    ferry(raised, "rollout", "start", LINE, "--waves", "100")
    assert DEVICE in "".join(ferry(raised, "rollout", "status", LINE)["behind"])
    assert [device["too_old"] for device in ferry(raised, "status")["devices"]] == [True]
    assert (
        "agent too old for what is rolled out: press-01" in CliRunner().invoke(app, ["-w", str(raised.factory), "status"]).output
    )
    first = runs(raised)
    done = old.agent(raised.device, "update")
    assert (done.returncode, runs(raised)) == (5, first)
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
    with (world.factory / "ferry.toml").open("a") as settings:  # its last table is that of the class
        settings.write(f'oldest_agent = "{VERSION}"\n')
    make_bundle.fn(str(world.factory), LINE, CLASS)
    assert asked == [compatibility.minimum_agent(compatibility.newest_form() - 1), VERSION]  # its device has an older agent


# Fixtures


def test_fixtures_are_small_and_of_the_version_before():
    for file in kit.HERE.iterdir():
        assert file.stat().st_size < 1_000_000, file.name
    now, before = as_numbers(ota.__version__), as_numbers(VERSION)
    said = "renew tests/former with the commit of the last version: `make former COMMIT=...`"
    assert before < now, said
    assert before[0] < now[0] or now[1] - before[1] <= 1, said

"""The agent of the version before beside classes with roles of their own: what it can do, and why its class must not be moved yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ota.release import rotation, signatures, store
from ota.release.keys import KeyRing
from ota.release.repository import Repository
from ota.release.roles import of_class
from tests.conftest import agent
from tests.former import kit
from tests.former.kit import Programs, World, answer

LINE, CLASS = "shapes", "edge"
OWN = of_class("models", LINE, CLASS)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Provide the agent of the version before, installed from its wheel."""
    return Programs.install(tmp_path_factory.mktemp("old-agent"), kit.wheel("deltaferry_agent"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Provide what the version before left, freshly signed."""
    made = World.unpack(tmp_path)
    repository_of(made).renew()
    publish(made)
    return made


def repository_of(world: World) -> Repository:
    return Repository(world.factory / "repository", KeyRing(world.factory / "keys"))


def publish(world: World) -> None:
    repository = repository_of(world)
    policy = repository.policy(LINE, CLASS)
    assert policy
    repository.set_policy(policy)  # it may have expired since the world was made
    store.publish(repository.files(), "published", world.factory)


def move(world: World, device_class: str) -> None:
    repository = repository_of(world)
    waiting = rotation.prepare(repository, {}, (), [(LINE, device_class)])
    rotation.put_in_force(repository, waiting.signed(signatures.usable_here(repository, {})))
    publish(world)


def marks(world: World) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.device / "highwater.json").read_bytes())["versions"]
    return found


def test_agent_of_the_version_before_follows_the_shared_roles_when_another_class_is_moved(old, world):
    assert answer(old.agent(world.device, "update"))["reason"] == "release 1 is installed"
    before = marks(world)["models"]
    move(world, "another")
    repository_of(world).renew(["models"])
    publish(world)
    assert answer(old.agent(world.device, "update"))["reason"] == "release 1 is installed"
    assert marks(world)["models"] > before


def test_agent_of_the_version_before_keeps_no_mark_of_its_classs_own_roles(old, world):
    # It takes the role from the path. So it goes on updating, but after a power cut it would accept any older list: this is why its class waits.
    answer(old.agent(world.device, "update"))
    before = marks(world)
    move(world, CLASS)
    repository_of(world).renew(["models"])
    publish(world)
    assert answer(old.agent(world.device, "update"))["reason"] == "release 1 is installed"
    assert marks(world).keys() == before.keys()
    assert marks(world)["models"] == before["models"]


def test_device_folder_of_the_version_before_takes_its_marks_along(old, world):
    answer(old.agent(world.device, "update"))
    before = marks(world)
    move(world, CLASS)
    result = agent("update", "--dir", str(world.device))
    assert result.exit_code == 0, result.output
    after = marks(world)
    assert after[OWN] > before["models"]
    assert after["models"] == before["models"]
    # And the agent of the version before goes on with what today's agent left.
    assert answer(old.agent(world.device, "update"))["reason"] == "release 1 is installed"

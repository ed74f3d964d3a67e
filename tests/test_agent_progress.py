"""`ferry-agent update --progress json`: stdout holds lines of JSON and nothing else, whatever happens."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from ota.release.bundle import Bundle
from tests.conftest import agent
from tests.fleet_kit import Field, closed_port, publish

pytest_plugins = ["tests.fleet_kit"]


def lines(field: Field, *words: str, code: int = 0) -> list[dict[str, Any]]:
    told = agent(*words, "--dir", str(field.device.root))
    assert told.exit_code == code, told.output
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_each_step_is_a_line_and_the_result_is_the_last(offered: Field, bundles: dict[str, Bundle]):
    *steps, result = lines(offered, "--quiet", "update", "--progress", "json")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert all(set(step) == {"step", "of", "name", "seconds"} and step["of"] == 12 for step in steps)
    assert [step["seconds"] for step in steps] == sorted(step["seconds"] for step in steps)
    assert (result["changed"], result["active"], result["way"]) == (True, bundles["second"].manifest.digest, "delta")
    *steps, result = lines(offered, "update", "--progress", "json", "--check", "--json")
    assert ([step["step"] for step in steps], result["changed"]) == ([1, 2], False)


@pytest.mark.parametrize("fault", ["link", "garbage"])
def test_failure_is_the_last_line(scene: Field, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, fault: str):
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)
    if fault == "link":
        scene.device.configure(repository=closed_port())
    else:
        publish(scene.repository, bundles["garbage"])
    code = {"link": 4, "garbage": 6}[fault]
    *_, last = lines(scene, "update", "--progress", "json", code=code)
    assert last["exit"] == code
    assert {"link": "Connection refused", "garbage": "failed its trial and is refused"}[fault] in last["error"]


def test_text_stays_as_it_was(scene: Field):
    told = agent("update", "--dir", str(scene.device.root))
    assert told.stdout == "release 1 is installed\n"
    assert told.stderr == " 1/12 refresh metadata\n 2/12 read the policy\n"
    assert agent("update", "--progress", "xml", "--dir", str(scene.device.root)).exit_code == 2


def test_reader_that_goes_away_ends_no_update(offered: Field, bundles: dict[str, Bundle]):
    words = offered.device.words("update", "--progress", "json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.close()
        process.wait(120)
    assert offered.device.active == bundles["second"].manifest.digest

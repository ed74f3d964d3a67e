"""Which form a bundle may have for an agent, and whom a release leaves behind."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

import ota
from ota.errors import LeftBehindError, ManifestError
from ota.fleet.store import Fleet
from ota.manifest import AGENT_VERSION, FORMS, Manifest
from ota.release import compatibility
from ota.release.bundle import Bundle
from ota.report import DeviceReport
from tests.test_fleet import KEY, public, report, signed

FORM_1 = (  # as an agent of version 0.1.0 signs it
    b'{"active":"1111111111111111111111111111111111111111111111111111111111111111","boot":"b","device":"dev-1","device_class":"edge",'
    b'"event":"installed","line":"shapes","manifest":"1111111111111111111111111111111111111111111111111111111111111111","milliseconds":0,'
    b'"number":1,"reason":"","received":0,"schema_version":1,"time":1}'
)


def named(agent: str | None, **fields: Any) -> DeviceReport:
    return report(**({} if agent is None else {"schema_version": 2, "agent": agent}), **fields)


@pytest.fixture
def manifest(bundles: dict[str, Bundle]) -> Manifest:
    """Provide the manifest of a bundle that needs agent 0.2.0."""
    return bundles["first"].manifest.model_copy(update={"minimum_agent": "0.2.0"})


# Forms


def test_every_form_has_its_oldest_agent():
    assert max(compatibility.READ_SINCE) == FORMS["manifest"]
    assert sorted(compatibility.READ_SINCE) == list(range(1, FORMS["manifest"] + 1))
    assert not any(compatibility.is_older(ota.__version__, since) for since in compatibility.READ_SINCE.values())


@pytest.mark.parametrize(
    ("agent", "form"),
    [("0.1.0", 2), ("0.1.9", 2), ("0.2.0", 3), ("0.2.9", 3), ("0.3.0", 4), ("0.10.0", 4), ("1.0.0", 4), (None, 4), ("0.0.1", 1)],
)
def test_agent_reads_up_to_a_form(agent, form):
    assert compatibility.newest_form(agent) == form


@pytest.mark.parametrize(
    ("agents", "oldest"),
    [
        ([], None),
        (["0.3.0"], None),
        (["0.3.0", "0.2.0"], "0.2.0"),
        (["0.2.9"], "0.2.0"),
        ([None], "0.2.0"),  # before 0.2.0, reports did not name the agent
    ],
)
def test_bundle_has_the_form_that_the_devices_of_its_class_read(agents, oldest):
    last: dict[str, DeviceReport | None] = {f"dev-{i}": named(agent) for i, agent in enumerate(agents)}
    last |= {"silent": None, "elsewhere": named("0.1.0", device_class="line-b"), "other": named("0.1.0", line="digits")}
    assert compatibility.oldest_agent("shapes", "edge", last) == (oldest or ota.__version__)


def test_own_version_can_be_reported():
    assert re.fullmatch(AGENT_VERSION, ota.__version__)


# Who is left behind


def test_older_agents_of_the_class_are_left_behind(manifest):
    last = {
        "new": named("0.2.0"), "newer": named("0.10.0"), "old": named("0.1.9"), "nameless": named(None), "silent": None,
        "other-class": named(None, device_class="station"), "other-line": named(None, line="bolts"),
    }  # fmt: skip
    found = compatibility.left_behind(manifest, last)
    assert {behind.device: behind.agent for behind in found} == {"old": "0.1.9", "nameless": "0.1.0 or older"}


def test_ten_devices_are_named_and_the_others_counted(manifest):
    last = {f"press-{i:02d}": named(None) for i in range(14)}
    with pytest.raises(
        LeftBehindError, match=r"14 devices have an older one .* press-09 \(0\.1\.0 or older\) and 4 more"
    ) as caught:
        compatibility.check(manifest, last, leave_behind=False)
    assert "press-10" not in str(caught.value)
    assert 'oldest_agent = "0.1.0" into [lines.shapes.classes.edge]' in str(caught.value)
    assert len(compatibility.check(manifest, last, leave_behind=True)) == 14


def test_nobody_is_asked_where_nobody_is_left_behind(manifest):
    assert compatibility.check(manifest, {"new": named("0.2.0"), "silent": None}, leave_behind=False) == []
    older = manifest.model_copy(update={"minimum_agent": "0.1.0"})
    assert compatibility.check(older, {"nameless": named(None)}, leave_behind=False) == []


# Reports


def test_report_of_the_version_before_keeps_its_bytes():
    assert report().canonical() == FORM_1
    assert DeviceReport.model_validate_json(FORM_1).agent is None


@pytest.mark.parametrize("fields", [{"schema_version": 2}, {"agent": "0.2.0"}, {"schema_version": 2, "agent": "new"}])
def test_form_and_agent_belong_together(fields):
    with pytest.raises(ValidationError, match=r"agent|pattern"):
        report(**fields)


def test_reports_of_both_forms_are_kept_beside_each_other(tmp_path):
    """Keep the table as the version before made it: the agent is in the report's own JSON, so nothing is migrated."""
    fleet = Fleet(f"sqlite:///{tmp_path / 'fleet.db'}")
    fleet.enroll("dev-1", public(KEY))
    fleet.receive(signed(report(number=1)))
    fleet.receive(signed(named("0.2.0", number=2)))
    fleet.receive(signed(named("0.2.0", number=2)))
    assert [kept.agent for kept in fleet.reports("dev-1")] == [None, "0.2.0"]
    assert compatibility.agent_of(fleet.devices()["dev-1"]) == "0.2.0"
    fleet.close()


def test_altered_agent_is_refused(tmp_path):
    fleet = Fleet(f"sqlite:///{tmp_path / 'fleet.db'}")
    fleet.enroll("dev-1", public(KEY))
    envelope = json.loads(signed(named("0.1.0")))
    envelope["report"]["agent"] = "9.0.0"
    with pytest.raises(ManifestError, match="not signed by dev-1's key"):
        fleet.receive(json.dumps(envelope).encode())
    fleet.close()


def test_report_of_a_newer_agent_asks_for_a_newer_ferry(tmp_path):
    fleet = Fleet(f"sqlite:///{tmp_path / 'fleet.db'}")
    envelope = json.loads(signed(named("0.2.0")))
    envelope["report"] |= {"schema_version": 4, "mood": "fine"}
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "dev-1-00000001.json").write_text(json.dumps(envelope))
    (why,) = fleet.collect(inbox).rejected.values()
    assert "install the newer ferry, and move the file back from rejected/" in why
    assert (inbox / "rejected" / "dev-1-00000001.json").is_file()
    fleet.close()


def test_report_without_its_signature_is_named_where_it_decides(manifest):
    told = named("0.1.0")
    with pytest.raises(LeftBehindError, match=r"dev-1 \(0\.1\.0, which version 0\.2 kept without the signature\)"):
        compatibility.check(manifest, {"dev-1": told}, leave_behind=False, unsigned={"dev-1"})
    with pytest.raises(LeftBehindError, match=r"dev-1 \(0\.1\.0\)"):
        compatibility.check(manifest, {"dev-1": told}, leave_behind=False)


@pytest.mark.parametrize("agent", ["0.3.0", "9.0.0"])
def test_report_without_its_signature_vouches_for_no_agent_that_signs(manifest, agent):
    """Remove the signature from a row: version 0.2 has kept no report of such an agent, so somebody changed what it says."""
    told = {"dev-1": named(agent)}
    assert compatibility.check(manifest, told, leave_behind=False) == []
    with pytest.raises(LeftBehindError, match="without the signature"):
        compatibility.check(manifest, told, leave_behind=False, unsigned={"dev-1"})
    assert compatibility.check_own_roles("shapes", "edge", told, None, leave_behind=False) == []
    with pytest.raises(LeftBehindError, match="without the signature"):
        compatibility.check_own_roles("shapes", "edge", told, None, leave_behind=False, unsigned={"dev-1"})

"""Which deltas a release gets, under which names they stay published, and what devices are told that they cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from ota.chain import DIGITS, MAGIC, Link, form_of, kept, name_of
from ota.release import chains
from ota.release.bundle import Bundle
from ota.release.chains import FIRST, NEWEST, Wanted, behind, described, pays, wanted
from ota.release.repository import KEPT_RELEASES, Repository
from ota.report import DeviceReport
from tests.fleet_kit import CLASS, LEDGER, LINE, everyone
from tests.test_release import clone

pytest_plugins = ["tests.fleet_kit"]
ORDER = [f"{number:02x}" * 32 for number in range(1, 12)]
FULL = 10_000


def link(base: int, target: int, size: int, form: int = NEWEST) -> Link:
    """Make a link between two releases, given by their numbers."""
    made = Link.of(name_of(form, ORDER[base - 1], ORDER[target - 1]), size)
    assert made
    return made


def report(number: int | None, agent: str | None = "0.3.0") -> DeviceReport:
    """Make the last report of a device that runs a release."""
    return DeviceReport.model_construct(active=ORDER[number - 1] if number else None, agent=agent)


def asked(target: int, reports: list[DeviceReport], oldest: str | None = None, present: list[Link] | None = None) -> set[Wanted]:
    """Ask what a release of this number gets, where the ones before are published."""
    return set(wanted(ORDER[: target - 1], ORDER[target - 1], reports, oldest, present or []))


def test_release_gets_the_step_from_the_one_before():
    assert asked(1, []) == set()
    assert asked(5, []) == {Wanted(ORDER[3], NEWEST)}
    assert asked(5, [report(4), report(None)]) == {Wanted(ORDER[3], NEWEST)}


def test_bundle_that_devices_report_is_tried_beside_the_steps():
    assert asked(5, [report(2), report(2), report(4)]) == {Wanted(ORDER[3], NEWEST), Wanted(ORDER[1], NEWEST, devices=2)}


def test_devices_with_an_older_agent_get_deltas_that_they_read():
    step = Wanted(ORDER[3], NEWEST)
    for agent in ("0.2.0", "0.1.0", None):  # an agent that does not say its version is of the oldest
        assert asked(5, [report(2, agent), report(4)]) == {step, Wanted(ORDER[1], FIRST)}
    assert asked(5, [report(3)], oldest="0.2.0") == {
        step, Wanted(ORDER[2], NEWEST, devices=1), Wanted(ORDER[2], FIRST), Wanted(ORDER[3], FIRST),
    }  # fmt: skip
    assert asked(5, [report(4)], oldest="0.3.0") == {step}


def test_overlays_come_in_the_formats_that_devices_read():
    assert chains.forms([], None) == chains.forms([], "0.3.0") == [NEWEST]
    assert chains.forms([], "0.2.0") == chains.forms(asked(5, [report(2, "0.2.0")]), None) == [FIRST, NEWEST]


def test_republished_release_gets_the_way_back():
    """Publish release 2 again after release 4: devices go back to it from there."""
    made = set(wanted(ORDER[:4], ORDER[1], [report(4), report(3)], None, [link(1, 2, 9)]))
    assert made == {Wanted(ORDER[3], NEWEST), Wanted(ORDER[2], NEWEST, devices=1)}


def test_delta_beside_the_steps_has_to_save_more_than_its_entry_costs():
    steps = [link(1, 2, 500), link(2, 3, 500)]
    assert not pays(link(1, 3, 900), 1, 1, steps, FULL)  # saves 100 bytes, costs 160
    assert pays(link(1, 3, 839), 1, 1, steps, FULL)
    assert not pays(link(1, 3, 839), 1, 2, steps, FULL)
    assert pays(link(1, 3, 839), 2, 2, steps, FULL)
    assert pays(link(1, 3, 839), 1, 50, steps[:1], FULL)  # no chain leads there, so it saves the full bundle


def test_release_says_what_devices_behind_it_pay():
    steps = [link(number, number + 1, 2_000) for number in range(1, 6)]
    costs = behind(ORDER[:6], ORDER[5], steps, FULL)
    assert costs == {1: 2_000, 2: 4_000, 3: 6_000}  # four steps are 80 % of the full bundle
    assert described(costs) == (
        "a device that is 2 releases behind fetches 4,000 bytes, 3 releases behind fetches 6,000 bytes; one further behind fetches the full bundle"
    )
    assert described(behind(ORDER[:2], ORDER[1], steps, FULL)) == ""
    assert behind(ORDER[:6], ORDER[5], [s for s in steps if s != steps[3]], FULL) == {1: 2_000}


# What stays published


def test_steps_stay_as_long_as_releases():
    steps = [link(number, number + 1, 1) for number in range(1, 11)]
    others = [link(1, 4, 1), link(8, 10, 1), link(9, 11, 1), link(11, 11, 1), link(4, 4, 1), link(11, 3, 1)]
    names = [each.name for each in (*steps, *others)]
    stay = kept(names, ORDER[-KEPT_RELEASES - 1 :], ORDER[-2:])
    assert stay == {each.name for each in (*steps[-KEPT_RELEASES:], *others[1:4])}


def test_older_form_of_a_step_leaves_before_the_newer_one():
    both = [link(1, 2, 1, FIRST), link(1, 2, 1)]
    assert kept([each.name for each in both], ORDER[:4], ORDER[2:4]) == {both[1].name}
    assert kept([both[0].name], ORDER[:4], ORDER[2:4]) == {both[0].name}
    assert len(kept([each.name for each in both], ORDER[:2], ORDER[1:2])) == 2


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """Provide a file that begins as a delta of format 2."""
    path = tmp_path / "later"
    path.write_bytes(MAGIC + b"\x02" + bytes(90))
    return path


def test_delta_is_named_by_its_own_format(repository: Repository, bundles: dict[str, Bundle], later: Path, step: Path):
    first, second = (bundles[name].manifest.digest for name in ("first", "second"))
    repository.publish_release(bundles["first"].manifest, bundles["first"].folder, LEDGER, [])
    repository.publish_release(bundles["second"].manifest, bundles["second"].folder, LEDGER, [(first, later), (first, step)])
    names = {path.rpartition("/")[2] for path in repository.in_force("deltas").signed.targets}
    assert names == {f"{first}.{second}", f"2.{first[:DIGITS]}.{second[:DIGITS]}"}  # agents before 0.3.0 look for the first one
    assert {(d.base, d.target, d.size) for d in repository.deltas(LINE, CLASS)} == {
        (first, second, step.stat().st_size), (first, second, later.stat().st_size),
    }  # fmt: skip
    assert (form_of(later.read_bytes()), form_of(step.read_bytes()[:8]), form_of(b"x")) == (2, 1, 1)


def test_chain_costs_little_metadata(repository: Repository, bundles: dict[str, Bundle], later: Path):
    made = []
    for number in range(1, KEPT_RELEASES + 3):
        bundle = clone(bundles["first"], number)
        made.append(
            repository.publish_release(bundle.manifest, bundle.folder, LEDGER, [(made[-1].manifest, later)] if made else [])
        )
    size = len(repository.in_force("deltas").to_bytes())
    assert len(repository.deltas(LINE, CLASS)) == KEPT_RELEASES
    assert size <= KEPT_RELEASES * chains.ENTRY + 400  # signature, expiry and version


def test_delta_to_what_is_rolled_out_stays(repository: Repository, bundles: dict[str, Bundle], later: Path):
    """Check that the way back to release 1 stays while releases 3 and 4 are published, as long as the policy asks for it."""
    one, two, three, four = (clone(bundles["first"], number) for number in range(1, 5))
    for bundle in (one, two):
        repository.publish_release(bundle.manifest, bundle.folder, LEDGER, [])
    back = repository.publish_release(one.manifest, one.folder, LEDGER, [(two.manifest.digest, later)], again=True)
    repository.set_policy(everyone(back, revert=True))
    for bundle in (three, four):
        repository.publish_release(bundle.manifest, bundle.folder, LEDGER, [])
    assert [(d.base, d.target) for d in repository.deltas(LINE, CLASS)] == [(two.manifest.digest, one.manifest.digest)]

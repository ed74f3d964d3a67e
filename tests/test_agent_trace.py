"""`ferry-agent generate --trace`: the load of one image, stored on the device alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ota.agent import trial
from ota.agent.state import Trial
from ota.manifest import MAX_TRACE, Trace, parse
from ota.release.bundle import Bundle
from tests.conftest import SAMPLER
from tests.fleet_kit import Field

pytest_plugins = ("tests.fleet_kit",)


def traced(field: Field, folder: Path, *words: str) -> Trace:
    field.device.command("generate", *words, "-o", str(folder / "a.png"), "--trace", str(folder / "a.json"))
    return parse(Trace, (folder / "a.json").read_bytes(), MAX_TRACE)


def test_trace_has_the_load_of_each_step(updated: Field, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    found = traced(updated, tmp_path, "disc", "--seed", "7")
    manifest = bundles["second"].manifest
    assert (found.line, found.variant, found.caption, found.seed) == ("shapes", "full", "disc", 7)
    assert found.bundle == updated.device.state.active == manifest.digest
    assert (found.times, found.method, found.guidance) == (SAMPLER.times, SAMPLER.method, SAMPLER.guidance)
    load = np.array(found.load)
    assert load.shape == (SAMPLER.steps, 3, 4)
    _, how = trial.draw(updated.device.home, manifest.digest, "disc", 7, "full")
    assert np.allclose(load.mean(axis=0), how["load"])
    assert load.std(axis=0).max() > 0  # the steps differ
    assert "trace" not in how
    assert (tmp_path / "a.json").stat().st_mode & 0o077 == 0  # it holds the caption


def test_image_with_a_trace_is_the_same_image(updated: Field, tmp_path: Path) -> None:
    updated.device.command("generate", "bar", "-o", str(tmp_path / "plain.png"))
    told = json.loads(
        updated.device.command("generate", "bar", "-o", str(tmp_path / "a.png"), "--trace", str(tmp_path / "a.json"), "--json")
    )
    assert told["trace"] == str(tmp_path / "a.json")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_trace_is_in_no_report(updated: Field, tmp_path: Path) -> None:
    traced(updated, tmp_path, "wuerfel")
    updated.device.command("report")
    sent = [path.read_bytes() for path in (updated.device.root.parent / "reports").rglob("*") if path.is_file()]
    assert sent
    assert not any(b"wuerfel" in report for report in sent)


@pytest.mark.parametrize("victim", ["config.json", "device.key"])
def test_trace_is_not_written_through_a_link(updated: Field, tmp_path: Path, victim: str) -> None:
    before = updated.device.facts()
    (tmp_path / "a.json").symlink_to(updated.device.root / victim)
    said = updated.device.command("generate", "-o", str(tmp_path / "a.png"), "--trace", str(tmp_path / "a.json"), code=3)
    assert "is a link" in said
    assert updated.device.facts() == before
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["a.png", "./b/../a.png"])
def test_trace_does_not_take_the_images_place(updated: Field, tmp_path: Path, name: str) -> None:
    (tmp_path / "b").mkdir()
    said = updated.device.command("generate", "-o", str(tmp_path / "a.png"), "--trace", str(tmp_path / name), code=3)
    assert f"--trace and --output both name {tmp_path / 'a.png'}; name another place" in said
    assert not (tmp_path / "a.png").exists()


def test_bundle_on_probation_is_traced_too(updated: Field, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    state = updated.device.state
    assert state.trial is None
    updated.device.home.save(state.model_copy(update={"trial": Trial(left=2, loads=5)}))
    assert traced(updated, tmp_path, "disc").bundle == bundles["second"].manifest.digest

"""A PoC from the kit to the page: what a kit holds, what a board measures without a factory, and what is chosen from it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import ota
from flows import cli, setup
from flows.workspace import Workspace
from model.config import VARIANTS, ModelConfig
from model.export import check_parity, unpack
from model.session import Session
from model.untrained import untrained
from ota.agent import board, child, poc
from ota.agent.energy import Found, Reading
from ota.agent.kit import OpenKit
from ota.errors import UnfinishedError
from ota.kit import FIRST_AGENT, NOT_MEASURED, Board, PocResult
from ota.manifest import as_numbers
from registry.poc import Board as Shown
from registry.poc import Budget, Candidate, Page, choose, front, render
from tests.conftest import Told, agent

CONFIG = ModelConfig(tier="test", configuration="I", image_size=16, channels=1, text_length=24)
CHOSEN = ("--tier", "test", "--variant", "turbo", "--variant", "fast")


def ferry(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="ferry")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return setup.create(tmp_path_factory.mktemp("factory") / "workspace", ["shapes"])


@pytest.fixture(scope="module")
def packed(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack a kit of four candidates: both configurations, two variants."""
    out = tmp_path_factory.mktemp("kits") / "kit.zip"
    done = ferry("-w", workspace.root, "poc", "shapes", *CHOSEN, "-o", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def kit(packed: Path, tmp_path: Path) -> Path:
    """Unpack the kit into a folder that a test may change."""
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "kit")
    return tmp_path / "kit"


def measured(kit: Path, root: Path, **options: Any) -> PocResult:
    """Measure a kit on a board whose sensors are below `root`."""
    given = {"images": 3, "seconds": 1, "watts": None, "with_energy": True, "tell": lambda _: None, "root": root} | options
    return poc.run(kit, **given)


@pytest.fixture(scope="module")
def result(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> PocResult:
    """Provide the result of the kit on a board without a sensor."""
    place = tmp_path_factory.mktemp("board")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(place / "kit")
    return measured(place / "kit", place / "empty")


def told_of(kit: Path, *words: str) -> Told:
    return agent("--quiet", "bench", "--kit", str(kit), "--json", "--images", "20", "--seconds", "1", *words)


def rewrite(kit: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the fields of a kit's `kit.json`."""
    fields = json.loads((kit / "kit.json").read_text())
    change(fields)
    (kit / "kit.json").write_text(json.dumps(fields))


# What a kit holds


def test_kit_holds_what_was_chosen_and_the_hash_of_every_file(packed: Path):
    with zipfile.ZipFile(packed) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    said = json.loads(files.pop("kit.json"))
    assert {f["name"] or f"objects/{f['sha256']}": (f["sha256"], f["size"]) for f in said["files"]} == {
        name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()
    }
    rows = [(e["tier"], e["configuration"], e["variant"], e["tokens"], e["blocks"]) for e in said["entries"]]
    assert rows == [("test", c, v, n, 3) for c, n in (("I", 64), ("II", 256)) for v in ("fast", "turbo")]
    assert {e["variant"]: e["evaluations"] for e in said["entries"]} == {"fast": 14, "turbo": 4}
    wheel = f"deltaferry_agent-{ota.__version__}-py3-none-any.whl"
    assert {name for name in files if "/" not in name} == {wheel, "README.txt"}
    page = files["README.txt"].decode()
    assert f"PYTHONPATH={wheel} venv/bin/python -m ota.agent.cli bench --kit . --json" in page
    assert all(f"test/{c}/{v}/bfloat16" in page for c in ("I", "II") for v in ("fast", "turbo"))


def test_same_choice_makes_the_same_kit(packed: Path, workspace: Workspace, tmp_path: Path):
    assert ferry("-w", workspace.root, "poc", "shapes", *CHOSEN, "-o", tmp_path / "again.zip").exit_code == 0
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_kit_of_the_defaults_is_small_and_has_every_variant(workspace: Workspace, tmp_path: Path):
    done = ferry("-w", workspace.root, "poc", "shapes", "--tier", "nano", "-o", tmp_path / "kit.zip", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [row["variant"] for row in said["candidates"]] == [*VARIANTS] * 2
    whole = sum({row["configuration"]: row["weights_bytes"] for row in said["candidates"]}.values())
    assert said["bytes"] == (tmp_path / "kit.zip").stat().st_size < whole / 4  # a block is in it once, and not twelve times


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tier", "huge"], "there is no tier 'huge'; choose test, nano, small, base"),
        (["--variant", "best"], "there is no variant 'best'; choose full, dev, fast, turbo"),
        (["--precision", "int4"], "there is no precision 'int4'"),
        (["--configuration", "III"], "there is no configuration 'III'; choose I, II"),
    ],
)
def test_choice_that_is_none_is_refused(words: list[str], said: str, workspace: Workspace, tmp_path: Path):
    done = ferry("-w", workspace.root, "poc", "shapes", *words, "-o", tmp_path / "kit.zip")
    assert done.exit_code == 3
    assert said in done.output
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_untrained_network_is_one_block_repeated_and_computes(precision: Any):
    made = untrained(CONFIG, precision)
    network = unpack(CONFIG, precision, made.weights)
    check_parity(network, precision, made.weights)  # the pieces are a weight file
    first = network.blocks[0].state_dict()
    assert all((value == first[name]).all() for block in network.blocks for name, value in block.state_dict().items())
    shape = (1, CONFIG.channels, CONFIG.image_size, CONFIG.image_size)
    given = np.ones(1, np.float32), np.ones(1, np.float32), np.ones((1, CONFIG.text_length), np.int64)
    v, load = Session(made.graph, made.weights).run(np.ones(shape, np.float32), *given)[:2]
    assert np.isfinite(v).all()
    assert np.abs(v).max() > 0.01  # a network whose head is zero would draw its own noise
    assert np.ptp(load[0, 0]) > 0.001  # the experts differ, so the routing is no tie
    other = untrained(CONFIG.model_copy(update={"configuration": "II"}), precision)
    assert (made.block, untrained(CONFIG, precision)) == (other.block, made)


# What a board measures


def test_board_measures_every_candidate(result: PocResult, packed: Path, tmp_path: Path):
    with zipfile.ZipFile(packed) as archive:
        data = archive.read("kit.json")
    assert (result.kit, result.line, result.agent) == (hashlib.sha256(data).hexdigest(), "shapes", ota.__version__)
    said = {entry["weights_sha256"] for entry in json.loads(data)["entries"]}
    assert len(said) == 2
    assert [row.key for row in result.rows] == [f"test/{c}/{v}/bfloat16" for c in ("I", "II") for v in ("fast", "turbo")]
    for row in result.rows:
        assert row.failed == ""
        assert row.images == 3
        assert 0 < row.p50_seconds <= row.p95_seconds  # type: ignore[operator]
        assert row.first_seconds > row.p50_seconds  # type: ignore[operator]  # it starts a process and loads the network
        assert row.cpu_seconds is not None
        assert row.peak_mib > row.bare_mib > 10  # type: ignore[operator]


def test_board_without_any_power_sensor(result: PocResult):
    for row in result.rows:
        assert row.energy is not None
        assert (row.energy.joules, row.energy.source, row.energy.quality) == (None, NOT_MEASURED, "none")
        assert row.energy.reason.endswith("There is no figure because this device has no sensor.")
    text = poc.text(result)
    assert text.count(f"MiB  {NOT_MEASURED}") == len(result.rows)
    assert "this device has no sensor" in text.splitlines()[-1]


def test_joules_have_their_source(kit: Path, tmp_path: Path):
    drawn = []

    def measure(draw: Callable[[], Any], found: Found) -> Reading:
        assert found.sensor is not None
        drawn.append(draw())
        return Reading(found.sensor.source, "model", "model", "calculated", joules=2.0, low=1.5, high=2.5)

    found = measured(kit, tmp_path / "empty", watts={"idle_watts": 2.0, "core_watts": 3.0}, measure=measure)
    assert len(drawn) == len(found.rows)
    assert {(row.energy.joules, row.energy.source) for row in found.rows if row.energy} == {
        (2.0, "CPU seconds at 3 W per busy core, 2 W idle")
    }
    assert measured(kit, tmp_path / "empty", with_energy=False).rows[0].energy is None


def test_bench_of_a_kit_needs_no_directory_and_writes_nothing(kit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FERRY_AGENT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(socket, "socket", None)  # no network either
    before = {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()}
    done = told_of(kit, "--no-joules")
    assert (done.exit_code, done.stderr) == (0, "")
    PocResult.model_validate_json(done.stdout)
    assert {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "nowhere").exists()


def test_kit_for_another_agent_version(kit: Path):
    rewrite(kit, lambda said: said.update(minimum_agent="9.1.0"))
    done = told_of(kit)
    assert (done.exit_code, done.stdout) == (7, "")
    assert done.stderr == (
        f"ferry-agent: the kit needs agent 9.1.0, but this is {ota.__version__}; install the agent that lies in the kit, and measure with it\n"
    )
    rewrite(kit, lambda said: said.update(minimum_agent=FIRST_AGENT, schema_version=2, novelty=True))
    done = told_of(kit)
    assert done.exit_code == 7
    assert "has form 2 and needs an agent that knows it" in done.stderr
    assert as_numbers(FIRST_AGENT) <= as_numbers(ota.__version__)  # the agent in a kit can measure it


def test_kit_that_an_older_ferry_made_is_measured(kit: Path):
    rewrite(kit, lambda said: said.update(made_by="0.0.1", minimum_agent="0.0.1", entries=said["entries"][:1]))
    assert told_of(kit, "--no-joules").exit_code == 0


def test_folder_that_holds_no_kit(packed: Path, kit: Path, tmp_path: Path):
    for place, said in (
        (tmp_path / "missing", "holds no kit: cannot read its kit.json (No such file or directory); name the folder"),
        (tmp_path, "holds no kit"),
        (packed, "is a file; unpack the kit"),
    ):
        done = told_of(place)
        assert (done.exit_code, done.stdout) == (3, "")
        assert said in done.stderr
    (kit / "kit.json").write_text("[]")
    done = told_of(kit)
    assert done.exit_code == 5
    assert "the kit is not valid" in done.stderr
    assert done.stderr.endswith("; copy the kit again\n")


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.unlink(),
        link,
        pipe,
    ],
    ids=["changed", "short", "long", "missing", "link", "pipe"],
)
def test_kit_with_a_damaged_file_is_refused_before_anything_is_measured(damage: Callable[[Path], object], kit: Path):
    damage(kit / "objects" / json.loads((kit / "kit.json").read_text())["entries"][-1]["weights"][-1]["sha256"])
    done = told_of(kit)
    assert (done.exit_code, done.stdout) == (5, "")
    assert done.stderr.startswith("ferry-agent: the kit's file objects/")
    assert done.stderr.endswith("; copy the kit again\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said["files"][0].update(name="../../etc/passwd"), "does not have the form"),
        (lambda said: said["entries"][0].update(graph="../" * 10 + "etc/passwd"), "does not have the form"),
        (lambda said: said["entries"][0].update(graph="0" * 64), "a file of test/I/fast/bfloat16 is not listed"),
        (lambda said: said["entries"][0]["weights"][1].update(times=200), "the pieces of test/I/fast/bfloat16 do not add up"),
        (lambda said: said["entries"][0]["weights"][1].update(times=10**9), "it must be at most 256"),
        (lambda said: said["entries"][0].update(weights_bytes=10**12), "it must be at most"),
        (lambda said: said["entries"].append(said["entries"][0]), "a candidate is listed twice"),
    ],
    ids=["name", "hash", "not listed", "too often", "bomb", "too large", "twice"],
)
def test_kit_that_names_other_files_or_swells_is_refused(change: Callable[[dict[str, Any]], object], said: str, kit: Path):
    rewrite(kit, change)
    done = told_of(kit)
    assert (done.exit_code, done.stdout) == (5, "")
    assert said in done.stderr


def with_bad_graph(kit: Path, entries: slice) -> None:
    """Give some candidates a graph that is none, with the right hashes."""
    data = b"this is no graph"
    digest = hashlib.sha256(data).hexdigest()
    (kit / "objects" / digest).write_bytes(data)

    def change(said: dict[str, Any]) -> None:
        said["files"].append({"name": None, "size": len(data), "sha256": digest})
        for entry in said["entries"][entries]:
            entry["graph"] = digest

    rewrite(kit, change)


def test_candidate_that_cannot_be_measured_is_a_row_and_not_the_end(kit: Path, tmp_path: Path):
    with_bad_graph(kit, slice(1, 2))
    rows = measured(kit, tmp_path / "empty").rows
    assert [bool(row.failed) for row in rows] == [False, True, False, False]
    assert "ONNX" in rows[1].failed
    assert (rows[1].p50_seconds, rows[1].energy, rows[1].blocks) == (None, None, 3)
    with_bad_graph(kit, slice(None))
    done = told_of(kit)
    assert done.exit_code == 3  # nothing was measured
    assert all(row["failed"] for row in json.loads(done.stdout)["rows"])


def test_candidate_that_is_too_large_for_the_board_is_a_row(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = child.Worker.draw

    def draw(self: child.Worker, variant: Any, caption: str, seed: int) -> dict[str, Any]:
        if variant == "fast":
            raise UnfinishedError("the serve process has not enough memory; free some and try again")
        return real(self, variant, caption, seed)

    monkeypatch.setattr(child.Worker, "draw", draw)
    rows = measured(kit, tmp_path / "empty").rows
    assert [bool(row.failed) for row in rows] == [True, False, True, False]
    assert rows[0].failed.startswith("the serve process has not enough memory")


def test_interrupted_measurement_keeps_what_was_measured(kit: Path, tmp_path: Path):
    def tell(line: str) -> None:
        if line.startswith("3/4"):
            raise KeyboardInterrupt

    rows = measured(kit, tmp_path / "empty", tell=tell).rows
    assert [row.failed for row in rows] == ["", "", poc.INTERRUPTED, poc.INTERRUPTED]
    assert rows[1].p50_seconds


def test_ended_measurement_answers_with_what_was_measured(kit: Path, monkeypatch: pytest.MonkeyPatch):
    real, before = child.Worker.draw, signal.getsignal(signal.SIGTERM)

    def draw(self: child.Worker, variant: Any, caption: str, seed: int) -> dict[str, Any]:
        if variant == "turbo":
            signal.raise_signal(signal.SIGTERM)  # as systemd, or a board that is switched off
        return real(self, variant, caption, seed)

    monkeypatch.setattr(child.Worker, "draw", draw)
    done = told_of(kit, "--no-joules")
    assert done.exit_code == 130
    assert [row.failed for row in PocResult.model_validate_json(done.stdout).rows] == ["", *[poc.INTERRUPTED] * 3]
    assert signal.getsignal(signal.SIGTERM) == before


def test_kit_for_odd_images_and_the_other_router(tmp_path: Path):
    workspace = setup.create(tmp_path / "workspace", ["shapes"])
    settings = workspace.root / "ferry.toml"
    text = re.sub(
        r"^(# )?image_size = .*$", 'image_size = 15\nrouter = "token-choice"', settings.read_text(), count=1, flags=re.MULTILINE
    )
    text = re.sub(r"^# (router = .*)$", "", text, flags=re.MULTILINE)
    settings.write_text(re.sub(r'^(# )?configuration = "I"', 'configuration = "II"', text, flags=re.MULTILINE))
    done = ferry("-w", workspace.root, "poc", "shapes", "--tier", "test", "--variant", "turbo", "-o", tmp_path / "kit.zip")
    assert done.exit_code == 0, done.output
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        archive.extractall(tmp_path / "kit")
    found = measured(tmp_path / "kit", tmp_path / "empty", with_energy=False)
    assert [(row.key, row.tokens, row.failed) for row in found.rows] == [("test/II/turbo/bfloat16", 225, "")]
    done = ferry("-w", workspace.root, "poc", "shapes", "--configuration", "I", "-o", tmp_path / "other.zip")
    assert done.exit_code == 3
    assert "images of 15 pixels do not fit configuration I; choose --configuration II" in done.output


def test_kit_that_changes_while_it_is_measured_is_noticed(kit: Path, tmp_path: Path):
    def tell(line: str) -> None:
        if line.startswith("2/4"):
            rewrite(kit, lambda said: said.update(line="other"))

    rows = measured(kit, tmp_path / "empty", tell=tell).rows
    assert [row.failed for row in rows[:2]] == ["", "the kit was changed while it was measured; measure again"]


# What a board says of itself


def raspberry(root: Path) -> Path:
    """Write the files of a Raspberry Pi, with everything in them that names this one board."""
    for name, text in {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0", "proc/device-tree/serial-number": "SECRET-SERIAL\0",
        "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\nSerial\t\t: SECRET-SERIAL\nModel\t\t: Raspberry\n",
        "proc/meminfo": "MemTotal:        3884352 kB\n", "proc/loadavg": "0.25 0.1 0.0 1/100 4242\n",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n', "etc/hostname": "SECRET-NAME\n",
        "etc/machine-id": "SECRET-MACHINE\n", "sys/class/net/eth0/address": "SECRET-MAC\n",
        "sys/class/dmi/id/product_serial": "SECRET-SERIAL\n", "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1500000\n",
        "sys/class/power_supply/usb/type": "USB\n", "sys/class/power_supply/usb/online": "1\n",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_board_is_described_and_not_named(tmp_path: Path):
    said = board.describe(raspberry(tmp_path))
    assert (said.model, said.cpu, said.governor, said.megahertz) == (
        "Raspberry Pi 4 Model B Rev 1.4",
        "Cortex-A72",
        "ondemand",
        1500,
    )
    assert (round(said.memory_mib), said.celsius, said.power, said.busy) == (3793, [48.312], "USB", 0.25)
    assert said.system == "Debian GNU/Linux 12 (bookworm)"
    assert not said.virtual
    text = said.model_dump_json()
    assert "SECRET" not in text
    assert socket.gethostname() not in text


def test_board_that_shows_nothing_is_described_all_the_same(tmp_path: Path):
    said = board.describe(tmp_path)
    assert (said.model, said.governor, said.megahertz, said.celsius, said.power) == ("", "", None, [], "")
    assert said.cores >= 1


def test_result_names_no_host(result: PocResult):
    assert socket.gethostname() not in result.model_dump_json()


# What is chosen


def row(key: str, seconds: float, mib: float, joules: float | None = None) -> Candidate:
    tier, configuration, variant, precision = key.split("/")
    blocks, tokens = {"nano": 6, "small": 10}[tier], {"I": 64, "II": 256}[configuration]
    evaluations = {"full": 56, "dev": 28, "fast": 14, "turbo": 4}[variant]
    return Candidate(
        key, configuration, variant, precision, blocks, tokens, evaluations, 1000, images=20, first_seconds=3 * seconds,
        p50_seconds=seconds, p95_seconds=1.2 * seconds, peak_mib=mib, joules=joules, source="RAPL package-0" if joules else NOT_MEASURED,
        reason="" if joules else "There is no figure because this device has no sensor.",
    )  # fmt: skip


BOARD = Shown("board", [("Processor", "Cortex-A72")], [
    row("nano/I/full/bfloat16", 0.5, 100), row("nano/I/turbo/bfloat16", 0.04, 100), row("nano/II/turbo/bfloat16", 0.16, 101),
    row("small/I/fast/bfloat16", 0.5, 200), row("small/I/turbo/bfloat16", 0.2, 200), row("small/II/turbo/bfloat16", 0.4, 201),
])  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "best"),
    [
        (Budget(latency_ms=1000), "small/II/turbo/bfloat16"),  # stride 1 comes before more evaluations
        (Budget(latency_ms=300), "small/I/turbo/bfloat16"),
        (Budget(latency_ms=230), "nano/II/turbo/bfloat16"),  # the 95th percentile of small/I/turbo is 240 ms
        (Budget(memory_mib=150), "nano/II/turbo/bfloat16"),
        (Budget(latency_ms=100, memory_mib=150), "nano/I/turbo/bfloat16"),
    ],
)
def test_best_choice_is_the_largest_that_fits(budget: Budget, best: str):
    choice = choose(BOARD, budget)
    assert choice.best is not None
    assert choice.best.key == best
    assert choice.text.startswith(f"{best} is the best choice within ")


def test_where_nothing_fits_the_nearest_is_named():
    choice = choose(BOARD, Budget(latency_ms=24, memory_mib=150))
    assert (choice.best, choice.nearest) == (None, BOARD.rows[1])
    assert choice.text.startswith("None of 6 candidates fits within 24 ms and 150 MiB. nano/I/turbo/bfloat16 is nearest: ")
    assert choice.text.endswith("2 times the budget that it misses most.")
    far = choose(BOARD, Budget(latency_ms=0.114))
    assert far.text.endswith(", 421 times the budget that it misses most.")


def test_only_candidate_is_not_counted_in_the_plural(workspace: Workspace, tmp_path: Path):
    alone = Shown("board", [], [BOARD.rows[1]])
    assert choose(alone, Budget(latency_ms=99)).text.endswith("It is the only candidate.")
    assert choose(alone, Budget(latency_ms=1)).text.startswith("The only candidate does not fit within 1 ms.")
    done = ferry(
        "-w",
        workspace.root,
        "poc",
        "shapes",
        *["--tier", "test", "--configuration", "I", "--variant", "turbo"],
        "-o",
        tmp_path / "k.zip",
    )
    assert re.match(r".*: 1 candidate, [\d,]+ bytes, about 1 minute on a fast board", done.stdout)
    with zipfile.ZipFile(tmp_path / "k.zip") as archive:
        page = archive.read("README.txt").decode()
    assert "This kit holds 1 network for the line" in page
    assert "in 1 channel. Nobody" in page
    assert "It takes about 1 minute on" in page


def test_energy_that_was_not_measured_fits_no_budget():
    choice = choose(BOARD, Budget(latency_ms=300, joules=5))
    assert choice.best is None
    assert choice.text.startswith("Energy was not measured on this board, so no candidate is known to fit within 5 J.")
    assert "Without that budget: small/I/turbo/bfloat16 is the best choice within 300 ms" in choice.text
    powered = [replace(r, joules=j) for r, j in zip(BOARD.rows, (5, 0.4, 1.6, 5, 2, 4), strict=True)]
    powered[-1] = BOARD.rows[-1]  # the sensor was lost at the last one
    found = choose(replace(BOARD, rows=powered), Budget(latency_ms=1000, joules=5))
    assert found.best is not None
    assert found.best.key == "small/I/fast/bfloat16"


def test_front_is_what_no_better_candidate_undercuts():
    assert [r.key for r in front(BOARD.rows)] == [
        "nano/I/turbo/bfloat16", "nano/II/turbo/bfloat16", "small/I/turbo/bfloat16", "small/II/turbo/bfloat16",
    ]  # fmt: skip
    failed = replace(BOARD.rows[0], p50_seconds=None, peak_mib=None, failed="not enough memory")
    assert [r.key for r in front([failed])] == []


def test_best_choice_is_always_on_the_front():
    chance = random.Random(0)
    for _ in range(300):
        rows = [
            replace(r, p50_seconds=s, p95_seconds=1.2 * s, peak_mib=chance.uniform(90, 210))
            for r in BOARD.rows
            for s in [chance.random()]
        ]
        choice = choose(replace(BOARD, rows=rows), Budget(latency_ms=1000 * chance.random(), memory_mib=chance.uniform(90, 210)))
        if choice.best:
            assert all(r.worth <= choice.best.worth for r in choice.fitting)
            assert choice.best.key in {r.key for r in front(choice.fitting)}


# The page


def written(folder: Path, result: PocResult, name: str = "board") -> Path:
    path = folder / f"{name}.json"
    path.write_text(result.model_dump_json())
    return path


def test_page_shows_each_board_with_a_table_a_picture_and_a_choice(result: PocResult, tmp_path: Path):
    about = Board(**result.board.model_dump() | {"model": "<b>Pi</b> & co", "cpu": "Cortex-A72"})
    other = result.model_copy(update={"board": about, "made": result.made + 1})
    files = [written(tmp_path, result, "first"), written(tmp_path, other, "second")]
    done = ferry("report", "--poc", *files, "-o", tmp_path / "poc.html", "--latency-ms", "60000", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [b["name"] for b in said["boards"]] == ["first", "second"]
    assert {b["best"] for b in said["boards"]} == {"test/II/fast/bfloat16"}
    page = (tmp_path / "poc.html").read_text()
    assert page.count("<svg viewBox") == 2  # no energy was measured, so each board has the picture of time alone
    assert page.count("3 blocks, stride 1") == page.count("3 blocks, stride 2") == 2
    assert page.count('class="chosen"') == 2
    assert page.count('<td class="n">not measured</td>') == 8
    assert "this device has no sensor" in page
    assert "&lt;b&gt;Pi&lt;/b&gt; &amp; co" in page
    assert "<b>Pi" not in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is loaded from elsewhere


def test_page_draws_energy_where_it_was_measured():
    rows = [replace(r, joules=j) for r, j in zip(BOARD.rows, (5, 0.4, 1.6, 5, 2, 4), strict=True)]
    failed = replace(rows[0], key="small/I/full/bfloat16", p50_seconds=None, failed="not enough <memory>")
    page = render(Page("shapes", "16 x 16 pixels, grey", [replace(BOARD, rows=[*rows, failed])], Budget(joules=1.7)))
    assert page.count("<svg viewBox") == 2
    assert "Joules of an image" in page
    assert "nano/II/turbo/bfloat16 is the best choice within 1.7 J" in page
    assert "not enough &lt;memory&gt;" in page
    assert "Energy: RAPL package-0." not in page  # those rows name no source of their own here
    assert render(Page("shapes", "16 x 16 pixels, grey", [Shown("empty", [], [failed])], Budget(joules=1)))


def test_result_of_another_kit(result: PocResult, tmp_path: Path):
    other = written(tmp_path, result.model_copy(update={"kit": "0" * 64}), "other")
    done = ferry("report", "--poc", written(tmp_path, result), other, "-o", tmp_path / "poc.html")
    assert done.exit_code == 3
    assert f"{other} was measured with another kit (000000000000) than" in done.output
    assert not (tmp_path / "poc.html").exists()


def test_two_results_of_one_board(result: PocResult, tmp_path: Path):
    first = written(tmp_path, result)
    shutil.copy(first, tmp_path / "copy.json")
    done = ferry("report", "--poc", first, tmp_path / "copy.json", "-o", tmp_path / "poc.html")
    assert done.exit_code == 3
    assert "are the same result; name each board's file once" in done.output
    again = written(tmp_path, result.model_copy(update={"made": result.made + 60}), "again")
    done = ferry("report", "--poc", first, again, "-o", tmp_path / "poc.html")
    assert done.exit_code == 0, done.output
    assert "board and again describe the same kind of board; they may be runs of one board" in (tmp_path / "poc.html").read_text()


def test_results_of_one_name_are_told_apart_by_their_folders(result: PocResult, tmp_path: Path):
    for place in ("press", "oven"):
        (tmp_path / place).mkdir()
    files = [written(tmp_path / "press", result), written(tmp_path / "oven", result.model_copy(update={"made": 1}))]
    done = ferry("report", "--poc", *files, "-o", tmp_path / "poc.html", "--json")
    assert [b["name"] for b in json.loads(done.stdout)["boards"]] == ["press/board", "oven/board"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is not valid: it is not JSON"),
        (b"{}", "it is not valid: kit is missing"),
        (b"[" * 100_000, "it is"),
        (b'{"schema_version": 7}', "it has form 7 and needs an agent that knows it"),
        (None, "it is not valid"),
    ],
    ids=["empty", "other JSON", "deep", "newer", "the kit itself"],
)
def test_file_that_is_no_result(content: bytes | None, said: str, packed: Path, tmp_path: Path):
    path = tmp_path / "board.json"
    path.write_bytes(packed.read_bytes() if content is None else content)
    done = ferry("report", "--poc", path, "-o", tmp_path / "poc.html")
    assert done.exit_code == 3
    assert f"{path} is no result of `ferry-agent bench --kit FOLDER --json`: {said}" in done.output
    assert not (tmp_path / "poc.html").exists()


def test_result_with_figures_that_cannot_be_is_refused(result: PocResult, tmp_path: Path):
    fields = result.model_dump(mode="json")
    for change in ({"p50_seconds": -1.0}, {"peak_mib": None}, {"failed": "it failed, and has figures"}):
        bad = fields | {"rows": [fields["rows"][0] | change]}
        (tmp_path / "board.json").write_text(json.dumps(bad))
        assert ferry("report", "--poc", tmp_path / "board.json", "-o", tmp_path / "poc.html").exit_code == 3


def test_page_never_replaces_a_result(result: PocResult, tmp_path: Path):
    path = written(tmp_path, result)
    before = path.read_bytes()
    assert ferry("report", "--poc", path, "-o", path).exit_code == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--poc"], "name the files that boards gave back"),
        (
            ["--poc", "missing.json"],
            "missing.json cannot be read (No such file or directory); name a file that a board gave back",
        ),
        (["--poc", "board.json", "--joules", "0"], "--joules cannot be 0; give a number above 0"),
        (["--poc", "board.json", "--latency-ms", "nan"], "--latency-ms cannot be nan"),
        (["--memory-mib", "5"], "--memory-mib is a budget for a PoC; add --poc and the boards' results"),
        (["a", "b"], "a report is of one line or of all; name one, or add --poc"),
    ],
)
def test_report_of_a_poc_says_what_is_missing(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = ferry("report", *words)
    assert done.exit_code == 3
    assert said in done.output
    assert [*tmp_path.iterdir()] == []


def test_open_kit_loads_the_weights_that_the_factory_made(kit: Path):
    opened = OpenKit(kit)
    entry = opened.entry("test/I/turbo/bfloat16")
    whole = untrained(CONFIG, "bfloat16").weights
    assert (entry.weights_bytes, entry.weights_sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    model = opened.open_model(entry.key)
    assert (model.table.method, len(model.table.times)) == ("mean", 5)
    assert model.generate(model.encode("bar"), [1]).shape == (1, 1, 16, 16)

"""The three wheels of this tree: what each says and holds, and each installed alone, without a package index, and used.

`deltaferry` is the whole, `deltaferry-agent` what a device needs, `deltaferry-delta` the deltas alone.
"""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

import flows.poc
import ota
from flows import setup
from ota.release import agent_wheel
from ota.release.bundle import Bundle, make_delta
from ota.release.repository import Repository
from ota.release.rollout import start
from ota.release.store import publish
from tests.test_delta_files import STEP, WEIGHTS, full, model

ROOT = Path(__file__).parent.parent
WHEELHOUSE = ROOT / "build" / "wheelhouse"
FOLDERS = {"deltaferry": ".", "deltaferry-agent": "ota", "deltaferry-delta": "ota/delta"}
MB = 1_000_000
BARE = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the three wheels; `make test-offline` shows that this needs no network."""
    place = tmp_path_factory.mktemp("wheels")
    for folder in FOLDERS.values():
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
        subprocess.run(build, cwd=ROOT / folder, capture_output=True, check=True)
    return {name: next(place.glob(f"{name.replace('-', '_')}-*.whl")) for name in FOLDERS}


def about(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(opened.read(name).decode())


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def scripts_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("entry_points.txt")]
        text = opened.read(name).decode()
    return set(re.findall(r"^(ferry[a-z-]*) = ", text, re.MULTILINE))


def sources(*packages: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).rglob("*.py")}


# What they say and hold


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_says_what_it_is(wheels, name):
    said = about(wheels[name])
    assert (said["Name"], said["Version"]) == (name, ota.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_all("License-File") == ["LICENSE"]
    assert said["Requires-Python"] == "<3.14,>=3.11"
    assert 20 < len(said["Summary"]) < 140
    assert said["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / FOLDERS[name] / "README.md").read_text()
    assert said.get_payload().strip() == readme.strip()
    assert readme.splitlines()[0].startswith("# ")
    assert len(said["Keywords"].split(",")) >= 5
    kinds = said.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(kinds)
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= set(kinds)
    assert not any(kind.startswith("License ::") for kind in kinds)  # the expression says it
    with zipfile.ZipFile(wheels[name]) as opened:
        (licence,) = [entry for entry in opened.namelist() if entry.endswith(".dist-info/licenses/LICENSE")]
        assert opened.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_wheels_agree_where_they_must():
    said = [tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in FOLDERS.values()]
    for field in ("license", "license-files", "requires-python", "dynamic", "urls"):
        assert said[0].get(field) == said[1].get(field) == said[2].get(field), field
    bounds = {re.split(r"[\[<>=]", d)[0]: d.replace("[crypto]", "") for d in said[0]["dependencies"]}
    for small in said[1:]:
        assert set(small["dependencies"]) <= set(bounds.values())


def test_big_wheel_holds_every_module(wheels):
    names = names_in(wheels["deltaferry"])
    assert {name for name in names if name.endswith(".py")} == sources("model", "registry", "ota", "flows")
    assert scripts_in(wheels["deltaferry"]) == {"ferry", "ferry-agent", "ferry-delta"}
    settings = {name for name in names if name.endswith("pyproject.toml")}
    assert settings == {"ota/pyproject.toml"}  # `ferry poc` makes the agent's wheel from it
    assert {"ota/py.typed", "flows/bases/surfaces.safetensors", "flows/bases/surfaces.json"} <= names  # the demo's base


def test_device_wheel_holds_the_device_alone(wheels):
    names = names_in(wheels["deltaferry-agent"])
    both = sources("ota/agent", "ota/delta") | {
        f"ota/{name}.py"
        for name in (
            "__init__",
            "chain",
            "durations",
            "errors",
            "fitness",
            "golden",
            "kit",
            "limits",
            "manifest",
            "output",
            "overlay",
            "packed",
            "policy",
            "report",
            "wording",
        )
    }
    assert {name for name in names if ".dist-info/" not in name} == both | {"ota/py.typed"}
    assert scripts_in(wheels["deltaferry-agent"]) == {"ferry-agent"}


def test_kit_holds_the_same_agent_as_its_wheel(wheels, tmp_path):
    name, data = agent_wheel.build()
    (tmp_path / name).write_bytes(data)
    built = wheels["deltaferry-agent"]
    assert (name, agent_wheel.build()[1]) == (built.name, data)
    assert names_in(tmp_path / name) == names_in(built)
    for field in (
        "Name",
        "Version",
        "Summary",
        "License-Expression",
        "License-File",
        "Description-Content-Type",
    ):
        assert about(tmp_path / name)[field] == about(built)[field], field
    for field in ("Requires-Python", "Requires-Dist", "Classifier"):  # hatchling sorts the bounds of a version
        made, other = (
            [sorted(re.split("(?=[<>=])|,", text)) for text in about(w).get_all(field)] for w in (tmp_path / name, built)
        )
        assert sorted(made) == sorted(other), field
    assert about(tmp_path / name).get_payload().strip() == about(built).get_payload().strip()
    with zipfile.ZipFile(tmp_path / name) as made, zipfile.ZipFile(built) as other:
        for file in names_in(built):
            if ".dist-info/" not in file:
                assert made.read(file) == other.read(file), file


@pytest.mark.slow
def test_kit_is_measured_by_the_agent_in_it_with_three_packages(tmp_path):
    """Unpack a kit on a board that has three packages, and follow its README.txt; the agent is not installed."""
    if not WHEELHOUSE.is_dir():
        pytest.fail("build/wheelhouse is missing; run `make wheelhouse`")
    kits = flows.poc.Chosen(tiers=["test"], configurations=["I"])
    workspace = setup.create(tmp_path / "workspace", ["shapes"])
    out = tmp_path / "kit.zip"
    flows.poc.make(workspace, "shapes", kits, out)
    with zipfile.ZipFile(out) as archive:
        archive.extractall(tmp_path / "kit")
    venv.create(tmp_path / "venv", with_pip=True)
    alone = Installed(tmp_path / "venv")
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--find-links", WHEELHOUSE)
    assert alone.run("python", *install, "numpy", "onnxruntime>=1.20,<2", "pydantic").returncode == 0
    (wheel,) = (tmp_path / "kit").glob("*.whl")
    words = ("python", "-m", "ota.agent.cli", "bench", "--kit", "kit", "--json", "--seconds", "1", "--no-joules")
    done = alone.run(*words, cwd=tmp_path, PYTHONPATH=f"kit/{wheel.name}")
    assert done.returncode == 0, done.stderr
    assert [row["failed"] for row in json.loads(done.stdout)["rows"]] == [""] * 4
    assert alone.run("python", *install, wheel).returncode == 0  # or installed, as any wheel
    done = alone.run("ferry-agent", "bench", "--kit", tmp_path / "kit", "--json", "--seconds", "1", "--no-joules")
    assert done.returncode == 0, done.stderr


def test_delta_wheel_holds_the_codec_alone(wheels):
    names = names_in(wheels["deltaferry-delta"])
    codec = sources("ota/delta") | {f"ota/{name}.py" for name in ("__init__", "errors", "limits", "output")}
    extra = {f"ota/delta/{name}" for name in ("LICENSE", "README.md", "pyproject.toml")}  # what it was built from
    assert {name for name in names if ".dist-info/" not in name} - extra == codec | {"ota/py.typed"}
    assert scripts_in(wheels["deltaferry-delta"]) == {"ferry-delta"}
    needed = {re.split(r"[<>=]", need)[0] for need in about(wheels["deltaferry-delta"]).get_all("Requires-Dist")}
    assert needed == {"numpy", "bsdiff4", "backports-zstd"}


# Each alone


@dataclass(frozen=True)
class Installed:
    """An environment with one wheel in it."""

    place: Path

    @property
    def packages(self) -> Path:
        (found,) = self.place.glob("lib/python3.*/site-packages")
        return found

    def run(self, *words: str | Path, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment with nothing of this process's own environment but the path."""
        program = self.place / "bin" / words[0]
        return subprocess.run([program, *words[1:]], capture_output=True, text=True, cwd=cwd, env=BARE | environment)

    def size(self, *, bytecode: bool) -> int:
        """Sum the bytes of all files that were installed, without pip's and setuptools' own."""
        own = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils-precedence")
        found = [p for p in self.packages.rglob("*") if p.is_file() and not p.relative_to(self.packages).parts[0].startswith(own)]
        return sum(path.stat().st_size for path in found if bytecode or path.suffix != ".pyc")


def install(place: Path, wheel: Path) -> Installed:
    """Install a wheel with what `make wheelhouse` fetched, and nothing else, into a new environment."""
    if not WHEELHOUSE.is_dir():
        pytest.fail("build/wheelhouse is missing; run `make wheelhouse`")
    venv.create(place, with_pip=True)
    made = Installed(place)
    done = made.run("python", "-m", "pip", "install", "--quiet", "--no-index", "--find-links", WHEELHOUSE, wheel)
    assert done.returncode == 0, done.stderr
    assert made.run("python", "-m", "pip", "check").returncode == 0
    return made


@pytest.fixture(scope="module")
def device(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, object]]:
    place = tmp_path_factory.mktemp("device")
    alone = install(place / "venv", wheels["deltaferry-agent"])

    def ferry_agent(*arguments: str, **environment: str) -> dict[str, object]:
        done = alone.run("ferry-agent", "--quiet", *arguments, "--dir", place / "state", "--json", **environment)
        assert done.returncode == 0, done.stderr
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    assert alone.run("python", "-c", "import ota.release").returncode == 1  # the factory's half is not on the device
    return ferry_agent


@pytest.mark.slow
def test_device_wheel_alone_performs_an_update(
    device: Callable[..., dict[str, object]], repository: Repository, bundles: dict[str, Bundle], tmp_path: Path
):
    published = tmp_path / "published"
    first = repository.publish_release(bundles["first"].manifest, bundles["first"].folder, "0" * 64, [])
    repository.set_policy(start(first, [100], 0))
    publish(repository.files(), str(published), tmp_path)
    anchor = tmp_path / "root.json"
    anchor.write_bytes(repository.root_bytes())
    device(
        "init", "--device", "press-01", "--line", "shapes", "--class", "edge", "--repository", str(published), "--root", str(anchor),
        "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(),
    )  # fmt: skip
    assert device("update")["way"] == "full"

    delta = make_delta(bundles["first"], bundles["second"], tmp_path / "deltas")
    assert delta is not None
    second = repository.publish_release(
        bundles["second"].manifest, bundles["second"].folder, "0" * 64, [(delta.base, delta.path)]
    )
    repository.set_policy(start(second, [100], 0))
    publish(repository.files(), str(published), tmp_path)
    assert device("update", PYTHONOPTIMIZE="2")["way"] == "delta"  # as in lean images: no docstrings, no assertions
    status = device("status")
    assert (status["active"], status["sound"]) == (bundles["second"].manifest.digest, True)
    drawn = device("generate", "bar", "--output", str(tmp_path / "bar.png"))
    assert Path(str(drawn["output"])).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_delta_wheel_alone_is_small_and_does_its_work(wheels, tmp_path):
    alone = install(tmp_path / "venv", wheels["deltaferry-delta"])
    listed = json.loads(alone.run("python", "-m", "pip", "list", "--format", "json").stdout)
    named = {row["name"].lower().replace("_", "-").replace(".", "-") for row in listed} - {"pip", "setuptools"}
    assert named == {"deltaferry-delta", "numpy", "bsdiff4", "backports-zstd"}
    assert alone.size(bytecode=False) <= 60 * MB
    assert alone.size(bytecode=True) <= 80 * MB

    (tmp_path / "old.onnx").write_bytes(model({"w": full(WEIGHTS)}))
    (tmp_path / "new.onnx").write_bytes(model({"w": full(WEIGHTS + STEP)}))
    for words in (
        ["build", "old.onnx", "new.onnx", "-o", "patch"],
        ["apply", "old.onnx", "patch", "-o", "again.onnx"],
        ["estimate", "old.onnx", "new.onnx", "--json"],
        ["inspect", "patch", "--of", "new.onnx", "--from", "old.onnx", "--plot", "patch.svg"],
    ):
        done = alone.run("ferry-delta", *words, cwd=tmp_path, PYTHONOPTIMIZE="2")
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "new.onnx").read_bytes()
    assert (tmp_path / "patch.svg").read_text().startswith("<svg")
    done = alone.run("ferry-delta", "inspect", "patch", "--plot", "patch.png", cwd=tmp_path)
    assert done.returncode == 3
    assert "needs matplotlib, which is not installed; install it, or name a file that ends in .svg" in done.stderr
    # The README's session in Python.
    session = re.findall(r"```python\n(.*?)```", (ROOT / "ota/delta/README.md").read_text(), re.DOTALL)[0]
    done = alone.run("python", "-W", "error", "-c", session, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_big_wheel_alone_makes_a_workspace(wheels, tmp_path):
    """Run the wheel and not this tree, with the packages that are installed here, because they take minutes and gigabytes."""
    venv.create(tmp_path / "venv", with_pip=False)
    alone = Installed(tmp_path / "venv")
    python = alone.place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheels["deltaferry"])], check=True, capture_output=True, env=BARE)
    # A line of a .pth file adds the folder, and does not read the .pth files in it, of which one leads to this tree.
    (alone.packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = alone.run("python", "-c", "import flows, model, ota, registry; print(flows.__file__, model.__file__, ota.__file__)")
    assert all(str(alone.place) in path for path in where.stdout.split()), where

    home = {"HOME": str(tmp_path), "DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    assert alone.run("ferry", "--version", **home).stdout == f"ferry {ota.__version__}\n"
    done = alone.run("ferry", "init", "workspace", "--json", cwd=tmp_path, **home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lines"] == ["surfaces"]
    done = alone.run("ferry", "--workspace", tmp_path / "workspace", "trust", "status", **home)
    assert done.returncode == 0, done.stderr
    for program in ("ferry-agent", "ferry-delta"):
        assert alone.run(program, "--version", **home).stdout == f"{program} {ota.__version__}\n"


@pytest.mark.slow
def test_small_wheels_beside_each_other_break_as_their_readmes_say(wheels, tmp_path):
    """Show that two wheels share modules: to uninstall one takes them from the other, and to install the other again repairs it."""
    alone = install(tmp_path / "venv", wheels["deltaferry-agent"])
    pip = ["python", "-m", "pip", "--quiet"]
    quietly = ["install", "--no-index", "--no-deps"]
    assert alone.run(*pip, *quietly, wheels["deltaferry-delta"]).returncode == 0
    assert alone.run("ferry-delta", "--version").returncode == alone.run("ferry-agent", "--version").returncode == 0
    assert alone.run(*pip, "uninstall", "--yes", "deltaferry-delta").returncode == 0
    assert alone.run("ferry-agent", "--version").returncode == 1
    assert alone.run(*pip, *quietly, "--force-reinstall", wheels["deltaferry-agent"]).returncode == 0
    assert alone.run("ferry-agent", "--version").stdout == f"ferry-agent {ota.__version__}\n"

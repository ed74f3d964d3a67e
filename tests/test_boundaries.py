"""Which package may import which, and the device's wheel alone in a bare environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from ota.release.bundle import Bundle
from ota.release.repository import Repository
from ota.release.rollout import start
from ota.release.store import publish

ROOT = Path(__file__).parent.parent
WHEELHOUSE = ROOT / "build" / "wheelhouse"
# boto3 is not in this list, because securesystemslib imports it where it is installed. On a device it is not installed, and
# the import contract keeps it out of our own code.
FACTORY = ("torch", "prefect", "mlflow", "dvc", "onnx", "sqlalchemy", "model", "registry", "flows", "ota.release")


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules (and ota.release) that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    names = done.stdout.split()
    return {name.split(".")[0] for name in names} | {"ota.release"} & set(names)


def test_import_contracts_are_kept():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module", ["ota.agent.cli", "ota.agent.updater", "ota.agent.drawing", "ota.agent.child", "ota.agent.sampler", "ota.delta"]
)
def test_device_loads_nothing_of_the_factory(module: str):
    assert not loaded_by(f"import {module}") & set(FACTORY)


def test_update_process_loads_no_runtime():
    """Keep the process small that holds the device's state: numbers are handled in child processes."""
    assert not loaded_by("import ota.agent.updater, ota.agent.drawing, ota.agent.cli") & {
        "onnxruntime",
        "numpy",
        "bsdiff4",
        "backports.zstd",
        "typer",
        "click",
    }


def test_help_loads_no_heavy_library():
    assert not loaded_by("import flows.cli") & {"torch", "prefect", "mlflow", "dvc", "numpy", "onnxruntime", "sqlalchemy"}


def test_registry_reads_scorecards_without_torch():
    assert not loaded_by("import registry.selection, registry.ledger, registry.report, registry.registration") & {
        "torch",
        "prefect",
    }


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, object]]:
    """Install `ferry-agent` alone, from its own wheel and what `make wheelhouse` fetched, without a package index."""
    if not WHEELHOUSE.is_dir():
        pytest.fail("build/wheelhouse is missing; run `make wheelhouse`")
    place = tmp_path_factory.mktemp("device")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)],
        cwd=ROOT / "ota",
        capture_output=True,
        check=True,
    )
    assert built.returncode == 0
    (wheel,) = place.glob("deltaferry_agent-*.whl")
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", WHEELHOUSE, wheel],
        check=True,
        env={"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull},
    )

    def ferry_agent(*arguments: str, **environment: str) -> dict[str, object]:
        command = [place / "venv" / "bin" / "ferry-agent", "--quiet", *arguments, "--dir", place / "state", "--json"]
        environment["PATH"] = os.environ["PATH"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
        assert done.returncode == 0, done.stderr
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    bare = {"PATH": os.environ["PATH"]}
    absent = subprocess.run([python, "-c", "import ota.release"], capture_output=True, cwd="/", env=bare, check=False)
    assert absent.returncode == 1  # the factory's half is not on the device
    return ferry_agent


@pytest.mark.slow
def test_device_wheel_alone_performs_an_update(
    device: Callable[..., dict[str, object]], repository: Repository, bundles: dict[str, Bundle], tmp_path: Path
):
    import hashlib

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

    from ota.release.bundle import make_delta

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

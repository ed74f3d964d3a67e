"""Which package may import which. `test_wheels.py` installs each wheel alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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

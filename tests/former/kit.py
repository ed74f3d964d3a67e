"""Install the programs of the version before, and unpack what they left; PYTEST_DONT_REWRITE."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = "versions.tar.xz"
ARCHIVES = ("world.tar.xz", VERSIONS)
BARE = {
    "PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


@dataclass(frozen=True)
class Programs:
    """An environment with one wheel; everything else comes from the environment of this process."""

    place: Path

    @classmethod
    def install(cls, place: Path, wheel: Path) -> Programs:
        """Make the environment without pip and without an index."""
        venv.create(place, with_pip=False)
        (packages,) = place.glob("lib/python3.*/site-packages")
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(packages)
        # A line of a .pth file adds the folder, and does not read the .pth files in it, of which one leads to this tree.
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return cls(place)

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python with nothing of this process's environment but the path."""
        home = self.place / "home"
        home.mkdir(exist_ok=True)
        python = self.place / "bin" / "python"
        return subprocess.run([python, "-P", *words], capture_output=True, text=True, cwd=home, env=BARE | {"HOME": str(home)})

    def ferry(self, workspace: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `ferry` in a workspace."""
        return self.run("-m", "flows.cli", "--quiet", "--workspace", workspace, *words, "--json")

    def agent(self, device: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `ferry-agent` on a device's folder."""
        return self.run("-m", "ota.agent.cli", "--quiet", *words, "--dir", device, "--json")


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what a command answered; it must have succeeded."""
    assert done.returncode == 0, done.stderr or done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class World:
    """What the version before left: a workspace, and a device that runs its release 1."""

    factory: Path
    device: Path

    @classmethod
    def unpack(cls, place: Path) -> World:
        """Unpack it into a folder."""
        for name in ARCHIVES:
            with tarfile.open(HERE / name) as archive:
                archive.extractall(place, filter="data")
        return cls._placed(place)

    def copy(self, place: Path) -> World:
        """Copy it into a folder, to be changed at will."""
        shutil.copytree(self.factory.parent, place, symlinks=True)
        return self._placed(place)

    @classmethod
    def _placed(cls, place: Path) -> World:
        """Tell the device where its factory is now, as its owner would by `init`."""
        world = cls(place / "factory", place / "device")
        config = world.device / "config.json"
        told = json.loads(config.read_bytes()) | {
            "repository": str(world.factory / "published"), "reports": str(world.factory / "inbox"),
        }  # fmt: skip
        config.write_text(json.dumps(told))
        return world


def made() -> dict[str, str]:
    """Return the version before, and the commit that it was made from."""
    found: dict[str, str] = json.loads((HERE / "made.json").read_bytes())
    return found


def wheel(name: str) -> Path:
    """Return the version before's wheel of a distribution."""
    return HERE / f"{name}-{made()['version']}-py3-none-any.whl"

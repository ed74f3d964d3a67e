"""Make what is in this folder from a commit of this repository: `make former COMMIT=…`, some minutes.

The commit is that of the version before. Its own code, and not that of this tree, builds the wheels, trains, promotes, releases and
updates the device. Its dependencies come from this tree's `.venv`.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.former.kit import ARCHIVES, HERE, VERSIONS, Programs

ROOT = HERE.parents[1]
WHEELS = {".": "deltaferry-*.whl", "ota": "deltaferry_agent-*.whl"}  # folder in which each is built → its name
LEFT_OUT = {"work", "cache", "tmp", "__pycache__", "lock"}  # caches, and locks that nobody holds
LEFT_OUT |= {"samples", "hooks"}  # pictures of a training on its way, for people alone, and examples that Git writes
TOO_LARGE = "flows/bases/*.safetensors"  # what the wheel holds for `ferry demo`, which no test of the version before needs
MAX_BYTES = 1_000_000  # of a file in this folder
IMAGES, DIM = 120, 60  # images of the first delivery, and of the second
SETTINGS = """\
# The workspace of the version before; its gate lets nearly everything through, because so few images decide nothing.
schema = 2

[lines.shapes]
data = "data/shapes"
tier = "test"
text_length = 8

[lines.shapes.training]
steps = 60
batch = 16
learning_rate = 8e-3

[lines.shapes.retraining]
steps = 500
batch = 16
learning_rate = 6e-3
update_grid = 1.0

[lines.shapes.distillation]
steps = 30
batch = 16
learning_rate = 3e-3
update_grid = 1.0
trajectories = 32

[lines.shapes.sampler]
steps = 6

[lines.shapes.gate]
images = 64
alpha = 0.1
tolerance = 2.0
tolerance_bands = 10.0
minimum_images = 8
captions = false
implausible = 1.0
duplicates = 1.0
coverage = 0.0
beat_solver = false

[lines.shapes.classes.edge]
variants = ["full", "dev", "turbo"]
latency_ms = 60000
"""
# Run before `ferry`. The signatures shall outlive the fixture, and nobody's user or host name shall be in it.
BEFORE = """\
import pwd, socket, sys
from datetime import timedelta
found = pwd.getpwuid
pwd.getpwuid = lambda number: pwd.struct_passwd(("maker", *found(number)[1:]))
socket.gethostname = lambda: "factory"
from ota.release import metadata
metadata.LIFETIMES.update({role: timedelta(days=36_500) for role in metadata.LIFETIMES})
from flows.cli import app
app()
"""


class Old:
    """The programs of the version before, its workspace and its device."""

    def __init__(self, place: Path, factory: Path, agent: Path) -> None:
        """Install two wheels in a folder; everything else is made there, too."""
        self.place, self.workspace, self.device = place, place / "factory", place / "device"
        self._factory = Programs.install(place / "ferry", factory)
        self._agent = Programs.install(place / "ferry-agent", agent)
        self._before = place / "before.py"
        self._before.write_text(BEFORE)

    def ferry(self, *words: str | Path) -> dict[str, Any]:
        """Run `ferry` in the workspace, and return its answer."""
        self._say("ferry", words)
        done = self._factory.run(self._before, "--quiet", "--workspace", self.workspace, *words, "--json")
        return self._answer(done)

    def agent(self, *words: str | Path) -> dict[str, Any]:
        """Run `ferry-agent` on the device, and return its answer."""
        self._say("ferry-agent", words)
        return self._answer(self._agent.agent(self.device, *words))

    def _say(self, program: str, words: tuple[str | Path, ...]) -> None:
        sys.stderr.write(f"{program} {' '.join(map(str, words))}\n".replace(str(self.place), "…"))

    @staticmethod
    def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def deliver(folder: Path, count: int, seed: int, dim: bool) -> None:
    """Write images of bars and discs with captions, bright or dim."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16]
    with (folder / "metadata.jsonl").open("a") as rows:
        for i in range(count):
            caption, at = ("bar", "disc")[i % 2], rng.integers(4, 12)
            mask = np.abs(x - at) < 2 if caption == "bar" else np.hypot(x - at, y - rng.integers(4, 12)) < 4
            picture = (40 + 180 * mask + rng.normal(0, 8, mask.shape)) * (0.5 if dim else 1.0)
            name = f"{'dim-' if dim else ''}{i:03d}.png"
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name)
            rows.write(json.dumps({"file_name": name, "text": f"dim {caption}" if dim else caption}) + "\n")


def play(old: Old) -> None:
    """Let the version before do what a factory and a device do: one release installed, and a second champion not released yet."""
    data = old.workspace / "data/shapes"
    data.mkdir(parents=True)
    old.ferry("init", old.workspace, "--line", "shapes")
    (old.workspace / "ferry.toml").write_text(SETTINGS)
    deliver(data, IMAGES, seed=0, dim=False)
    old.ferry("data", "add", "shapes")
    _check_promoted(old.ferry("retrain", "shapes"))
    old.ferry("release", "shapes")
    old.ferry("rollout", "start", "shapes", "--waves", "100")
    anchor = old.workspace / "root.json"
    key = old.agent(
        "init", "--device", "press-01", "--line", "shapes", "--class", "edge", "--repository", old.workspace / "published",
        "--reports", old.workspace / "inbox", "--root", anchor, "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(),
    )["public_key"]  # fmt: skip
    old.ferry("fleet", "enroll", "press-01", key)
    old.agent("update")
    old.ferry("fleet", "status")
    deliver(data, DIM, seed=3, dim=True)
    old.ferry("data", "add", "shapes")
    _check_promoted(old.ferry("retrain", "shapes"))


def _check_promoted(answer: dict[str, Any]) -> None:
    rows = answer["models"]
    if not all(row["promoted"] for row in rows):
        raise SystemExit(f"the gate let nothing through, but the fixture needs two champions: {rows}")


def pack(folders: list[Path], out: Path, versions: bool) -> None:
    """Pack folders without caches: by name, without owners, and compressed as far as possible.

    Args:
        folders: to pack.
        out: file to write.
        versions: pack only the files of the versions in MLflow; otherwise all others. Together they would be too large for one file.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for folder in folders:
            for path in (folder, *sorted(folder.rglob("*"))):
                parts = path.relative_to(folder.parent).parts
                if LEFT_OUT.isdisjoint(parts[1:]) and ("mlartifacts" in parts) == versions:
                    entry = archive.gettarinfo(path, "/".join(parts))
                    entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, "", ""
                    with path.open("rb") if path.is_file() else io.BytesIO() as content:
                        archive.addfile(entry, content)
    out.write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def make(commit: str, out: Path) -> None:
    """Make the wheels, the workspace and the device of a commit, in place of those in a folder."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"there is no commit {commit!r} here; name the last commit of the version before")
    name = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="former-") as temporary:
        place = Path(temporary)
        tree, wheels = place / "tree", place / "wheels"
        tree.mkdir()
        source = subprocess.run([*git, "archive", name], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(source)) as archive:
            archive.extractall(tree, filter="data")
        for base in tree.glob(TOO_LARGE):
            base.unlink()
        for folder in WHEELS:
            build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
            subprocess.run(build, cwd=tree / folder, capture_output=True, check=True)
        made = [next(wheels.glob(pattern)) for pattern in WHEELS.values()]
        old = Old(place, *made)
        play(old)
        for part in ARCHIVES:
            pack([old.workspace, old.device], place / part, versions=part == VERSIONS)
        for before in (*out.glob("*.whl"), *out.glob("*.xz")):
            before.unlink()
        for file in (*made, *(place / name for name in ARCHIVES)):
            if file.stat().st_size > MAX_BYTES:
                raise SystemExit(f"{file.name} has {file.stat().st_size:,} bytes; make the workspace smaller")
            shutil.copyfile(file, out / file.name)
    version = made[0].name.split("-")[1]
    (out / "made.json").write_text(json.dumps({"version": version, "commit": name}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1]:
        raise SystemExit("name the commit of the version before: `make former COMMIT=…`")
    make(sys.argv[1], HERE)

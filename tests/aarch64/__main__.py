"""`make check-arm`: apply deltas of every kind on this x86-64 machine and, under qemu-user, on aarch64; compare the bytes.

A Python for aarch64 is unpacked from the packages of this machine's own Debian or Ubuntu, and what `deltaferry-delta` needs is
installed beside it. All of it goes to build/aarch64. Nothing is installed on the machine, and root is not needed. Where qemu or apt
is missing, nothing is run and a message says so.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from model.config import ModelConfig, PrecisionName
from model.data import Dataset, prepare
from model.export import pack
from model.graph import build as build_graph
from model.network import Network
from model.publish import Publication, publish_first
from model.storage import fielded, named
from model.train import TrainOptions, train
from model.update import FACTORS, METHODS, Approximation, write_factors
from ota.delta import encode, files, numbers
from ota.delta import format as container
from ota.delta.encode import Elements, Pair
from ota.delta.factors import read
from ota.delta.header import PlainFile
from ota.delta.numbers import KINDS, MAX_FACTOR, KindName
from ota.delta.plan import sha256_of
from ota.delta.updates import WAYS
from tests import golden_kit
from tests.conftest import CONFIG, VERSION, write_images
from tests.test_delta_factors import factors, weights

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "aarch64"
DEVICE = Path(__file__).with_name("device.py")
PACKAGES = ("python3", "libstdc++6")
PROCESSORS = (
    "cortex-a53",
    "max",
)  # of a small board, and one with every extension that qemu knows: NumPy and OpenBLAS choose by these
STORED: tuple[PrecisionName, ...] = get_args(PrecisionName)
OPTIONS = TrainOptions(steps=15, batch=8, warmup=2, learning_rate=4e-3)


# A machine


def emulator() -> str | None:
    """Return the path of qemu for programs of aarch64; None: it is not installed."""
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def make_root() -> Path:
    """Unpack Python and the libraries that it needs, from this machine's own package sources; return their root folder.

    apt keeps its lists and its state in build/aarch64 too. It sees a machine of aarch64 on which nothing is installed.
    """
    root, apt = BUILD / "root", BUILD / "apt"
    if (BUILD / ".unpacked").is_file():
        return root
    shutil.rmtree(root, ignore_errors=True)
    for folder in (root, apt / "lists" / "partial", apt / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "Dir::State": apt, "Dir::State::lists": apt / "lists", "Dir::State::status": apt / "status", "Dir::Cache": apt,
        "Dir::Cache::archives": apt / "archives", "APT::Architecture": "arm64", "APT::Architectures": "arm64",
        "APT::Sandbox::User": "", "Debug::NoLocking": "1",
    }  # fmt: skip
    words = ["apt-get", "--quiet", *(word for name, value in settings.items() for word in ("--option", f"{name}={value}"))]
    run([*words, "update"], "this machine's package sources have no arm64, or cannot be reached")
    install = [*words, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES]
    run(install, "this machine's package sources have no Python for arm64")
    for package in sorted((apt / "archives").glob("*.deb")):
        run(["dpkg-deb", "--extract", package, root], "a package cannot be unpacked; remove build/aarch64 and repeat")
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")  # as the package of the base system would
    (BUILD / ".unpacked").touch()
    return root


def install_codec(version: str) -> Path:
    """Install this tree's `deltaferry-delta` and what it needs, built for aarch64; return the folder.

    Args:
        version: of Python, such as 3.11.
    """
    site, wheels = BUILD / f"site-{version}", BUILD / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels],
        "the wheel cannot be built",
        ROOT / "ota" / "delta",
    )
    words = [
        Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--target", site, "--reinstall-package", "deltaferry-delta",
        "--python-platform", "aarch64-manylinux_2_28", "--python-version", version, "--only-binary", ":all:",
        "--constraint", ROOT / "constraints.txt", *wheels.glob("*.whl"),
    ]  # fmt: skip
    run(words, "what the codec needs cannot be fetched for aarch64")
    return site


def run(words: list[Any], fault: str, folder: Path = ROOT) -> None:
    """Run a program; if it fails, stop with what it printed."""
    ended = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{fault}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")


def results(python: list[Any], site: Path | None, name: str) -> dict[str, Any]:
    """Run `device.py` with a Python; return what it wrote.

    Args:
        python: the words that start it.
        site: folder of its packages; None: it has its own.
        name: of the file that it writes.
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"} | ({"PYTHONPATH": str(site)} if site else {})
    out = BUILD / f"{name}.json"
    words = [*map(str, python), "-P", str(DEVICE), str(BUILD / "deltas"), str(out)]
    if subprocess.run(words, env=environment, cwd=BUILD, check=False).returncode:
        sys.exit(f"the deltas could not be applied on {name}; what it printed is above")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


# Deltas


@dataclass(frozen=True)
class Case:
    """Two files, and what is known of their numbers."""

    name: str
    old: bytes
    new: bytes
    elements: tuple[Elements, ...] = ()
    versions: tuple[int, ...] = container.VERSIONS


def published_once() -> Iterator[Case]:
    """Make the pairs of the golden deltas: every kind of number and every way in which it moves."""
    for name in golden_kit.NAMES:
        old, new = golden_kit.files(name)
        yield Case(name, old, new, (Elements(0, len(new), kind_of(name), golden_kit.COLUMNS, 0),))
    for name in golden_kit.UPDATES:
        old, new, said = golden_kit.update(name)
        floats, one = bool(KINDS[kind_of(name)].mantissa), len(new) // 3
        steps = {"c": (said["steps"], 2.0**-7)} if floats else {}
        claims = read(factors(BUILD / f"{name}.factors", {"a": (said["left"], said["right"], -18 if floats else -11)}, steps))
        elements = [
            Elements(at * one, one, kind_of(name), golden_kit.COLUMNS, at * one, claims.get(t)) for at, t in enumerate("abc")
        ]
        yield Case(name, old, new, tuple(elements))


def kind_of(name: str) -> KindName:
    """Return the kind with which a name begins."""
    return KINDS[name.split(maxsplit=1)[0]].name


def awkward() -> Iterator[Case]:
    """Make products and steps whose integers are as large as they may be, on numbers that no rule moves, and on borders of pieces."""
    rng = np.random.default_rng(1)
    for kind in [kind for kind in KINDS.values() if kind.name != "bytes"]:
        for rank, exponent, most, rows, columns in (
            (32, -48, MAX_FACTOR, 96, 66), (32, -12, 3, 40, 64), (1, -100, MAX_FACTOR, 64, 64), (3, 90, 9, 64, 64), (5, -2, 1, 333, 64), (9, -19, 99, 1031, 1022),
        ):  # fmt: skip
            left, right = (rng.integers(-most, most + 1, shape, np.int32) for shape in ((rows, rank), (rank, columns)))
            old = weights(rows * columns, kind.name, rank)
            new = numbers.data(numbers.predicted(old, left, right, exponent, kind), kind)
            name = f"{kind.name} rank {rank} exponent {exponent}"
            claim = read(factors(BUILD / f"{name}.factors", {"t": (left, right, exponent)}))["t"]
            yield Case(name, numbers.data(old, kind), new, (Elements(0, len(new), kind.name, columns, 0, claim),))
        for size in (0.3, 1e-3, 6e-6, 3e38, 2e-38) if kind.mantissa else ():
            steps, old = rng.integers(-3, 4, 9999, np.int32), weights(9999, kind.name, 4)
            new = numbers.data(numbers.stepped(old, steps, np.float32(size), kind), kind)
            name = f"{kind.name} steps of {size}"
            claim = read(factors(BUILD / f"{name}.factors", {}, {"t": (steps, size)}))["t"]
            yield Case(name, numbers.data(old, kind), new, (Elements(0, len(new), kind.name, 101, 0, claim),))


def plain() -> Iterator[Case]:
    """Make pairs of files that are not weights."""
    rng = np.random.default_rng(2)
    text = b" ".join(b"%d" % number for number in rng.integers(0, 9999, 60_000))
    yield Case("text, some words changed", text, text.replace(b" 77", b" 1077"))
    yield Case("text, parts moved", text, text[90_000:] + text[:90_000])
    yield Case("same", text, text)
    yield Case("nothing to start from", b"", text)
    noise = rng.integers(0, 256, 3 << 20, np.uint8).tobytes()
    shifted = Elements(0, len(noise), "bytes", 0, None)
    yield Case("bytes that moved", noise, noise[100_001:] + noise[:100_001], (shifted,))


def trained(dataset: Dataset) -> Iterator[Case]:
    """Make updates by every method of the trainer in every precision, with its factors and without."""
    for method in METHODS:
        options = OPTIONS.model_copy(update={"method": method})
        work = BUILD / "trained" / method
        start = train(CONFIG, dataset, VERSION, options.model_copy(update={"steps": 60}), work / "start")
        for stored in STORED:
            first = publish_first(start, stored, work / stored)
            master = train(CONFIG, dataset, VERSION, options, work / f"{stored} master", parent=first)
            publication = Publication.of(master, first, stored, method)
            made = {"": publication.write(METHODS[method].level, work / f"{stored} made")}
            if method == "lowrank":
                made[" coarse"] = publication.write(0.3, work / f"{stored} coarse")
                made[" polished"] = publication.write_polished(0.03, work / f"{stored} polished", dataset, options, steps=3)
            for way, new in made.items():
                yield from of_networks(f"{method} {stored}{way}", first.network(), new.network(), stored, new.folder / FACTORS)


def larger() -> Iterator[Case]:
    """Make updates of a network of the tier that devices run: several pieces, and matrices that a library multiplies in parts."""
    config, generator = ModelConfig(tier="nano"), torch.Generator().manual_seed(3)
    for stored in STORED:
        old = Network(config)
        with torch.no_grad():
            for name, weight in named(old).items():
                weight.copy_(fielded(name, torch.randn(weight.shape, generator=generator) * 0.1, stored))
        new = Network(config)
        new.load_state_dict(old.state_dict())
        with torch.no_grad():
            for weight in named(new).values():
                if weight.dim() == 2 and min(weight.shape) >= 16:
                    sides = [torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 8), (8, weight.shape[1]))]
                    weight.add_((sides[0] * torch.logspace(-3, -5, 8)) @ sides[1])
                else:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 1e-3)
        update = Approximation.of(new, old, {}, stored).at(0.03)
        write_factors(BUILD / f"nano {stored}.factors", update)
        yield from of_networks(f"nano {stored}", old, update.network(), stored, BUILD / f"nano {stored}.factors")


def of_networks(name: str, old: Network, new: Network, stored: PrecisionName, claims: Path) -> Iterator[Case]:
    """Make the pair of two weight files, once with the trainer's factors and once without."""
    place = {side: BUILD / f"{side}.weights" for side in ("old", "new", "graph")}
    place["old"].write_bytes(pack(old, stored))
    place["new"].write_bytes(pack(new, stored))
    place["graph"].write_bytes(build_graph(new.config, stored).SerializeToString(deterministic=True))
    found = tuple(files.elements(place["old"], place["new"], place["graph"], None, files.claims(claims)))
    case = Case(name, place["old"].read_bytes(), place["new"].read_bytes(), found)
    yield case
    yield replace(case, name=f"{name}, guessed", elements=tuple(replace(element, claim=None) for element in found))


def make_deltas() -> tuple[dict[str, str], Counter[str]]:
    """Build all deltas; return the hash of the file that each has to make, and how many deltas there are of each kind of record."""
    images = write_images(BUILD / "images")
    wanted, count = dict[str, str](), Counter[str]()
    for cases in (published_once(), awkward(), plain(), larger(), trained(prepare(images, CONFIG, BUILD / "cache"))):
        for case in cases:
            for version in case.versions:
                name = f"{case.name}, format {version}"
                place = BUILD / "deltas" / name
                place.mkdir(parents=True)
                (place / "old").write_bytes(case.old)
                (place / "wanted").write_bytes(case.new)
                base, target = (sha256_of(place / side) for side in ("old", "wanted"))
                entry = PlainFile(len(case.new), target)
                encode.build(
                    [Pair(entry, place / "wanted", place / "old", case.elements, base)], base, target, place / "patch", version
                )
                wanted[f"delta {name}"] = target
                count.update(kinds(place / "patch"))
                count.update([f"format {version}"])
    return wanted, count


def kinds(patch: Path) -> set[str]:
    """Return the kinds of records of a delta, and the ways in which its numbers move."""
    with patch.open("rb") as stream:
        (file,) = container.read_header(stream).files
        found = list(container.records(stream, file))
    ways = {f"{container.KINDS[record.kind]} {segment.kind} {segment.way}" for record in found for segment in record.segments}
    return {container.KINDS[record.kind] for record in found} | ways


def main() -> int:
    """Make the deltas, apply them on both kinds of machine, and return 0 if all bytes are equal."""
    qemu = emulator()
    if platform.machine() != "x86_64" or not qemu or not shutil.which("apt-get"):
        missing = (
            "this machine is not of x86-64"
            if platform.machine() != "x86_64"
            else "there is no apt-get"
            if qemu
            else "there is no qemu-aarch64"
        )
        sys.stdout.write(f"skipped: {missing}; use Debian or Ubuntu on x86-64, with the package qemu-user-static\n")
        return 0
    began = time.monotonic()
    torch.set_num_threads(1)
    BUILD.mkdir(parents=True, exist_ok=True)
    root = make_root()
    python = next(path for path in sorted((root / "usr" / "bin").iterdir()) if re.fullmatch(r"python3\.\d+", path.name))
    site = install_codec(python.name.removeprefix("python"))
    for folder in ("deltas", "trained", "images", "cache"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    wanted, count = make_deltas()
    if missing := set(container.KINDS.values()) - count.keys():
        sys.exit(f"no delta has a record of the kind {', '.join(sorted(missing))}; add one to {Path(__file__).name}")
    updates = [what for what in count if what.startswith("update ")]
    if unmoved := [way for way in WAYS.values() if not any(what.endswith(f" {way}") for what in updates)]:
        sys.exit(f"no delta moves numbers by {', '.join(unmoved)}; add one to {Path(__file__).name}")
    here = results([sys.executable], None, "x86-64")
    unequal = [f"x86-64: {name}: {here['results'][name]}" for name in wanted if here["results"][name] != wanted[name]]
    for processor in PROCESSORS:
        there = results([qemu, "-cpu", processor, "-L", root, python], site, f"aarch64 {processor}")
        if (there["machine"], there["numpy"]) != ("aarch64", here["numpy"]):
            sys.exit(
                f"{there['machine']} with NumPy {there['numpy']} ran in place of aarch64 with {here['numpy']}; remove build/aarch64 and repeat"
            )
        if there["results"].keys() != here["results"].keys():
            sys.exit("the two machines did not compute the same things; remove build/aarch64 and repeat")
        unequal += [f"{processor}: {name}: {value}" for name, value in there["results"].items() if value != here["results"][name]]
    sys.stdout.write("".join(f"{number:5} deltas with {what}\n" for what, number in sorted(count.items())))
    sys.stdout.write("".join(f"differs: {line}\n" for line in unequal))
    sys.stdout.write(
        f"{len(wanted)} deltas and {len(here['results']) - len(wanted)} computations, on x86-64 and on aarch64 ({', '.join(PROCESSORS)}): "
        f"{f'{len(unequal)} results differ' if unequal else 'all bytes are equal'}; {time.monotonic() - began:.0f} s\n"
    )
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())

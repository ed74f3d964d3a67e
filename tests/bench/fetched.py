"""What a device fetches for an update: a real agent, a real server on the loopback, and every byte that it sends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.config import PrecisionName, VariantName
from model.export import export
from model.scorecard import Sampler
from model.train import Checkpoint
from model.update import FACTORS
from ota.release import bundle
from ota.release.bundle import Bundle
from ota.release.keys import create
from ota.release.repository import Repository
from tests.conftest import bundle_of
from tests.fleet_kit import CLASS, Device, WebServer, everyone
from tests.test_delegation import move

SAMPLER = Sampler(method="ab2", steps=14, guidance=2.0)
CAPTIONS = 8  # captions of which an export has golden outputs, at most
CLASSES, RELEASES = 20, 40  # of an old repository


class Site:
    """A repository, the bundles of some checkpoints, and a server that counts what it sends."""

    def __init__(self, root: Path, checkpoints: Sequence[Checkpoint], captions: Sequence[str], stored: PrecisionName) -> None:
        self.root, self.checkpoints = root, checkpoints
        self.repository = Repository.create(root / "repository", create(root / "keys"))
        self.bundles = list[Bundle]()
        for number, checkpoint in enumerate(checkpoints, start=1):
            folder = root / f"export-{number}"
            export(checkpoint, stored, SAMPLER, sorted(set(captions))[:CAPTIONS], 60_000.0, folder)
            self.bundles.append(as_real(bundle_of(folder, root / "bundles", number, checkpoint.lineage.config.tier), number))
        self.server = WebServer(self.repository.folder)

    def device(self, name: str) -> Device:
        """Set a device up that knows the server alone."""
        (self.root / name).mkdir()
        return Device.init(self.root / name / "device", self.repository, address=self.server.address, name=name)

    def step(self, number: int, base: Bundle | None = None) -> int:
        """Publish a bundle with the delta from the one before it; return the bytes of the delta."""
        base, target = base or self.bundles[number - 1], self.bundles[number]
        factors: dict[VariantName, Path] = {"full": self.checkpoints[number].folder / FACTORS}
        delta = bundle.make_delta(base, target, self.root / f"deltas-{number}", factors=factors, version=2)
        assert delta is not None
        self.publish(target, [(base.manifest.digest, delta.path)])
        return delta.size

    def publish(self, made: Bundle, deltas: Sequence[tuple[str, Path]] = (), device_class: str = CLASS) -> None:
        """Publish a bundle for a class, with the hash of a ledger that grew, and open it to every device."""
        manifest = made.manifest.model_copy(update={"device_class": device_class})
        ledger = sha256(f"{manifest.digest} {device_class}".encode()).hexdigest()
        release = self.repository.publish_release(manifest, made.folder, ledger, list(deltas))
        self.repository.set_policy(everyone(release))

    def update(self, device: Device, way: str = "delta") -> int:
        """Let a device update; return the bytes that it fetched for that."""
        before = sum(self.server.sent.values())
        outcome = device.update()
        assert outcome.way == way, outcome
        return sum(self.server.sent.values()) - before


def as_real(made: Bundle, number: int) -> Bundle:
    """Give a bundle an origin with hashes like real ones; equal digits would pack too well."""
    hashes = {name: sha256(f"{name} {number}".encode()).hexdigest() for name in ("code", "lineage", "scorecard", "decision")}
    revision = {"data_rev": sha256(f"revision {number}".encode()).hexdigest()[:40], "data_md5": hashes["code"][:32]}
    fields = {**hashes, **revision, "version": number}
    return Bundle(made.folder, made.manifest.model_copy(update={"origin": made.manifest.origin.model_copy(update=fields)}))


@contextmanager
def site(work: Path, checkpoints: Sequence[Checkpoint], captions: Sequence[str], stored: PrecisionName) -> Iterator[Site]:
    """Set a site up in a temporary folder below `work`, and serve it."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        made = Site(Path(place), checkpoints, captions, stored)
        with made.server:
            yield made


def one(work: Path, champion: Checkpoint, made: Checkpoint, captions: Sequence[str], stored: PrecisionName) -> dict[str, Any]:
    """Measure the second release of one class: the champion, then the update."""
    with site(work, (champion, made), captions, stored) as at:
        at.publish(at.bundles[0])
        device = at.device("press-01")
        device.update()
        delta = at.step(1)
        return {"fetched": at.update(device), "delta": delta}


def aged(work: Path, champion: Checkpoint, made: Checkpoint, captions: Sequence[str], stored: PrecisionName) -> dict[str, Any]:
    """Measure the same update as the last of 40 releases, in a repository with 20 classes that have roles of their own."""
    with site(work, (champion, made), captions, stored) as at:
        first = at.bundles[0]
        before = [as_real(first, 1000 + number) for number in range(RELEASES - 1)]
        at.publish(before[0])
        others = [f"class-{number}" for number in range(1, CLASSES)]
        for name in others:
            at.publish(first, device_class=name)
        move(at.repository, CLASS, *others)
        for one_before in before[1:]:
            at.publish(one_before)
        device = at.device("press-01")
        device.update()
        delta = at.step(1, before[-1])
        return {"fetched": at.update(device), "delta": delta, "classes": CLASSES, "releases": RELEASES}


def behind(work: Path, chain: Sequence[Checkpoint], captions: Sequence[str], stored: PrecisionName) -> dict[str, Any]:
    """Measure a device that takes every step of a chain, and one that was off and takes all of them at once."""
    with site(work, chain, captions, stored) as at:
        at.publish(at.bundles[0])
        steady, late = at.device("press-01"), at.device("press-02")
        for device in (steady, late):
            device.update()
        steps = []
        for number in range(1, len(chain)):
            at.step(number)
            steps.append(at.update(steady))
        at_once = at.update(late, "chain")
        return {"steps": steps, "at_once": at_once}

"""Slots, the folders that hold installed bundles: building one, verifying its files, and reporting what runs.

A slot is built under a name that begins with a dot, and renamed when all its files have been read back from the disk.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from ota.agent import reports
from ota.agent.disk import read_uncached
from ota.agent.plan import OnStep, Plan, is_intact
from ota.agent.state import Home, Slot
from ota.errors import DeltaError, StateError
from ota.fitness import counterpart
from ota.manifest import FileEntry, Reference, VariantName

# Building a slot


def prepare_slot(home: Home, plan: Plan) -> str:
    """Make an empty folder for a slot under construction, and return its name; what an earlier attempt left is removed."""
    fresh = f"slots/.{plan.manifest.digest}"
    home.disk.remove(fresh)
    home.disk.make_folder(fresh, durable=False)  # it is renamed before anything relies on it
    return fresh


def finish_slot(home: Home, plan: Plan, fresh: str, step: OnStep) -> None:
    """Take step 8: verify the slot under construction, read back from the disk, and give it its final name.

    Raises:
        DeltaError: a file is not what is signed.
        StateError: a file cannot be read back.
    """
    step(8, "verify the slot, read back from the disk")
    home.disk.replace(f"{fresh}/manifest.json", plan.manifest_bytes)  # this also makes all names in the folder durable
    _check_slot(home, fresh, plan)
    home.disk.remove(f"slots/{plan.manifest.digest}")
    home.disk.rename(fresh, f"slots/{plan.manifest.digest}")


def _check_slot(home: Home, name: str, plan: Plan) -> None:
    for entry in plan.manifest.objects.values():
        digest, size = hashlib.sha256(), 0
        try:
            for piece in read_uncached(home.disk.path(f"{name}/{entry.sha256}")):
                digest.update(piece)
                size += len(piece)
        except OSError as error:
            raise StateError(f"the new slot's {entry.role} file cannot be read back: {error.strerror}; check the disk") from error
        if size != entry.size or digest.hexdigest() != entry.sha256:
            raise DeltaError(f"the new slot's {entry.role} file does not have its signed hash; the bundle was not installed")


def is_complete(home: Home, digest: str, plan: Plan) -> bool:
    """Check whether a complete slot of this bundle is there already."""
    try:
        if home.disk.path(f"slots/{digest}/manifest.json").read_bytes() != plan.manifest_bytes:
            return False
        _check_slot(home, f"slots/{digest}", plan)
    except (OSError, StateError, DeltaError):
        return False
    return True


# Reading what is installed


def in_variant(home: Home, digest: str, variant: VariantName | None) -> tuple[Slot, VariantName, Reference]:
    """Open a bundle, choose the given variant or its default one, and read the reference of that variant."""
    slot = home.slot(digest)
    same = counterpart(slot.manifest, variant or slot.manifest.default_variant)
    return slot, same, slot.reference(same)


def status(home: Home) -> dict[str, Any]:
    """Report what runs, checked against its manifest: the hash of every file is recomputed."""
    config, state = home.config(), home.load()
    sound = is_sound(home, state.active) if state.active else None
    return {
        "device": config.device,
        "line": config.line,
        "device_class": config.device_class,
        "active": state.active,
        "release": state.seq,
        "previous": state.previous,
        "sound": sound,
        "trial": state.trial.model_dump() if state.trial else None,
        "refused": state.refused,
        "rests": rest.model_dump() if (rest := home.rest()) and rest.until > time.time() else None,
        "waiting_reports": len(list(home.disk.path("queue").glob("*.json"))),
        "reports_problem": reports.problem(home),
        "tags": config.tags,
        "gateway": reports.heard(home).model_dump(),
        "dropped_reports": reports.dropped(home),
    }


def is_sound(home: Home, digest: str) -> bool:
    """Check whether every file of a bundle has the hash that its manifest lists."""
    try:
        slot = home.slot(digest)
        return all(file_is(slot, entry) for entry in slot.manifest.objects.values())
    except StateError:
        return False


def file_is(slot: Slot, entry: FileEntry) -> bool:
    """Check whether a file of a slot is what the manifest lists."""
    return is_intact(slot.folder / entry.sha256, entry)

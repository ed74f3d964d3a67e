"""Give lines and classes roles of their own, so that their devices do not fetch what is signed for others (`ferry trust delegate`).

`targets` then names `models.LINE.CLASS`, `deltas.LINE.CLASS` and `rollout.LINE.CLASS` before the roles that all classes share, with the
same keys. What the shared roles list of the class moves into them. The offline keys of `targets` sign the change, and its version goes up;
so nobody can lead a device that has seen it back to the shared roles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ota.errors import OperatorError
from ota.release import compatibility, rotation
from ota.release.ceremony import Waiting
from ota.release.keys import DELEGATED
from ota.release.repository import Repository
from ota.release.roles import of_class
from ota.release.signatures import facts_of, put_in_force, text_of, usable_here
from ota.release.trust import Place, check_finished
from ota.report import DeviceReport

MOST_CLASSES = (
    150  # with roles of their own: devices read a snapshot of up to 64 KiB, and the longest names need 390 bytes a class
)


@dataclass(frozen=True)
class Move:
    """A line and class that is to have roles of its own."""

    line: str
    device_class: str
    oldest_agent: str | None = None
    """Oldest agent that ferry.toml names for the class; None: the newest."""

    def __str__(self) -> str:
        """Return LINE/CLASS."""
        return f"{self.line}/{self.device_class}"


def delegate(
    place: Place, moves: Collection[Move], publish: Callable[[], object], last: Mapping[str, DeviceReport | None],
    leave_behind: bool = False, out: Path | None = None, unsigned: Collection[str] = (),
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Move lines and classes to roles of their own, and publish it; those that have them are left as they are. Rerun a killed call.

    Args:
        place: folder with keys and repository.
        moves: the lines and classes.
        publish: copies the repository to where devices fetch it.
        last: last report of each enrolled device.
        leave_behind: whether to move them although the agents of some devices do not remember the versions of such roles.
        out: file in which the new metadata wait for signatures; None: enough keys are here.
        unsigned: ids of the devices whose last report can no longer be verified.

    Returns:
        What was done, as JSON and as text.

    Raises:
        LeftBehindError: the agents of some devices are too old, and nobody decided; nothing was signed.
        OperatorError: too few keys can be used here, there are too many classes, or the file exists; nothing was signed.
    """
    check_finished(place)
    behind = [
        found
        for move in moves
        for found in compatibility.check_own_roles(move.line, move.device_class, last, move.oldest_agent, leave_behind, unsigned)
    ]
    if out and out.exists():
        raise OperatorError(f"{out} already exists; name another file")
    with place.locked("records"):
        new = [move for move in moves if not has_own(place.repository, move.line, move.device_class)]
        if new:
            waiting = _prepared(place.repository, new)
    named, facts = (
        ", ".join(map(str, moves)),
        {"moved": [str(move) for move in new], "left_behind": {b.device: b.agent for b in behind}},
    )
    if not new:
        publish()
        return facts, f"{named} had roles of its own before; what is signed is published"
    if out:
        waiting.save(out)
        return facts | facts_of(waiting, out), text_of(waiting, out)
    if waiting.missing():
        raise OperatorError(f"{'; '.join(waiting.missing())}; make the keys available, or add --out FILE and sign where they are")
    put_in_force(place, waiting, publish)
    sizes = {str(move): place.repository.metadata_bytes(move.line, move.device_class) for move in moves}
    lines = [
        f"{name} has roles of its own; a device fetches {size:,} bytes of metadata for an update" for name, size in sizes.items()
    ]
    lines += [f"{found.device} ({found.agent}) does not remember their versions; update its agent" for found in behind]
    return facts | {"metadata_bytes": sizes}, "\n".join(lines)


def has_own(repository: Repository, line: str, device_class: str) -> bool:
    """Tell whether a line and class has roles of its own."""
    return of_class("models", line, device_class) in repository.delegated("models")


def _prepared(repository: Repository, new: Collection[Move]) -> Waiting:
    """Prepare the new roles, and sign as far as the keys are here; roles whose keys are elsewhere wait in the file, too."""
    if len(repository.delegated("models")) - 1 + len(new) > MOST_CLASSES:
        raise OperatorError(
            f"more than {MOST_CLASSES} classes cannot have roles of their own; the others stay in the shared ones"
        )
    elsewhere = [
        role
        for role, trusted in repository.roles().items()
        if role in DELEGATED and len(repository.keys.usable(role, trusted.keyids)) < trusted.threshold
    ]
    moved = [(move.line, move.device_class) for move in new]
    return rotation.prepare(repository, {}, elsewhere, moved).signed(usable_here(repository, {}))

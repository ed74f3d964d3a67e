"""Find everything that descends from a data revision that must be withdrawn: versions, bundles, devices.

A version descends from it if it was trained on it, on a later revision that still holds files of it, or from a parent or by a
teacher that descends from it. A bundle descends from it if it holds such a version, a device if it runs such a bundle. Rules
only; `flows.trace` gathers the things.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry.errors import CatalogError
from registry.trace import SHORTEST, Thing, called, shown

KINDS = ("data", "version", "bundle", "device")
HOW = {"version": "made from", "bundle": "holds", "device": "runs"}


@dataclass(frozen=True)
class Revision:
    """A data revision and the files in it, as md5s; None: the list of files cannot be read any more."""

    thing: Thing
    files: frozenset[str] | None


@dataclass
class Descent:
    """What descends from a revision: each thing once, with the reason; and what cannot be told."""

    of: Thing
    found: list[tuple[Thing, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Convert it to plain data."""
        rows = [
            {name: value for name, value in shown(t, 0).items() if name != "depth"} | {"because": why} for t, why in self.found
        ]
        return {"of": shown(self.of, 0), "descends": rows, "unknown": self.unknown}

    def text(self) -> str:
        """Format it, one line for each thing."""
        counts = {kind: sum(t.kind == kind for t, _ in self.found) for kind in KINDS}
        plural = {"data": "later data revisions", "version": "model versions", "bundle": "bundles", "device": "devices"}
        rows = [
            f"{self.of.kind} {self.of.name}: {', '.join(f'{n} {plural[kind]}' for kind, n in counts.items())} descend from it"
        ]
        for t, why in self.found:
            facts = f" (is {t.facts['is']})" if t.facts.get("is") else ""
            rows.append(f"{t.kind} {t.name}{facts}: {why}")
        return "\n".join(rows + [f"cannot be told: {text}" for text in self.unknown])


def revision_called(things: Iterable[Thing], text: str) -> Thing | None:
    """Find the data revision whose Git revision or md5 begins so; None: there is none.

    Raises:
        CatalogError: several do.
    """
    found = [t for t in things if t.kind == "data" and len(text) >= SHORTEST and called(t, text)]
    if len({t.hashes["md5"] for t in found}) > 1 or len({t.name.partition(" ")[0] for t in found}) > 1:
        raise CatalogError(f"{text!r} begins several data revisions ({', '.join(t.name for t in found[:5])}); give more of it")
    return found[0] if found else None


def later_holders(history: Sequence[Revision], of: Thing) -> tuple[dict[int, str], list[str]]:
    """Find the later revisions that hold files which came with a revision.

    Args:
        history: the line's revisions, newest first; only of those from `of` on are the files needed.
        of: the revision.

    Returns:
        position in the history → how many of the files it holds; and what cannot be told.
    """
    at = max(i for i, revision in enumerate(history) if revision.thing is of)
    own = history[at].files
    before = history[at + 1].files if at + 1 < len(history) else frozenset()
    if own is None:
        return {}, [f"which later revisions hold files of {of.name}, because its list of files cannot be read"]
    came = own - (before or frozenset())
    found, unknown = {}, []
    for i in range(at):
        now = history[i]
        if now.files is None:
            unknown.append(f"whether data {now.thing.name} holds files of it, because its list of files cannot be read")
        elif kept := len(came & now.files):
            found[i] = f"holds {kept} of the {len(came)} files that came with it"
    return found, unknown


def descent(things: Sequence[Thing], of: Thing, holders: Mapping[int, str], unknown: Sequence[str] = ()) -> Descent:
    """Walk forward from a revision.

    Args:
        things: all that is known.
        of: the revision.
        holders: later revisions that hold files of it, as positions in `things`, each with the reason.
        unknown: what cannot be told about later revisions.
    """
    owners: dict[str, list[int]] = {}
    children: dict[str, list[int]] = {}
    for i, t in enumerate(things):
        for value in t.hashes.values():
            owners.setdefault(value, []).append(i)
        for value in t.comes_from:
            children.setdefault(value, []).append(i)
    made = Descent(of, unknown=[*unknown, *_orphans(things, owners)])
    start = [i for i, t in enumerate(things) if t.kind == "data" and t.hashes["md5"] == of.hashes["md5"]]
    waiting, seen = deque([*start, *holders]), {*start, *holders}
    found = {i: "holds the same files" for i in start if things[i] is not of} | dict(holders)
    while waiting:
        parent = things[waiting.popleft()]
        for value in parent.hashes.values():
            for i in children.get(value, ()):
                if i not in seen and things[i].kind in KINDS:
                    seen.add(i)
                    waiting.append(i)
                    found[i] = f"{HOW[things[i].kind]} {parent.kind} {parent.name}"
    made.found = sorted(((things[i], why) for i, why in found.items()), key=lambda row: (KINDS.index(row[0].kind), row[0].name))
    return made


def _orphans(things: Sequence[Thing], owners: Mapping[str, object]) -> list[str]:
    """Name the versions, bundles and devices that come from something that nobody knows any more."""
    found = []
    for t in things:
        lost = [value for value in t.comes_from if value not in owners] if t.kind in HOW else []
        if lost:
            found.append(
                f"whether {t.kind} {t.name} descends from it, because {lost[0][:12]}, which it comes from, is not known here"
            )
    return found

"""Trace a hash back to the data that it comes from, and forward to the devices that run what was made of it.

Things are linked by hashes that they hold themselves: a device reports its bundle; a bundle's manifest names its files, a
scorecard and a ledger entry; a version's seal in the ledger names its weights, its parent, its teacher and its data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from model.folder import shown as printed
from registry.catalog import Subject, Version
from registry.champions import Records, judged, seals
from registry.errors import CatalogError
from registry.ledger import Entry
from registry.seal import Seal

Kind = Literal["device", "delta", "bundle", "version", "decision", "data"]
SHORTEST = 6  # digits of a hash; fewer would match too much


@dataclass
class Thing:
    """A thing that has hashes, or a device."""

    kind: Kind
    name: str
    hashes: dict[str, str]
    """Its hashes by their names, such as manifest or weights."""
    facts: dict[str, Any] = field(default_factory=dict)
    comes_from: list[str] = field(default_factory=list)
    """Hashes of the things that it comes from."""
    files: list[str] = field(default_factory=list)
    """Hashes of its files, by which it can be found as well."""


def trace(things: Iterable[Thing], text: str) -> dict[str, Any]:
    """Find what a hash (`SHORTEST` digits or more), data revision or device comes from, and what came of it.

    Args:
        things: all that is known.
        text: name of a device, or the beginning of a hash.

    Returns:
        `of`: the thing itself; `back`: what it comes from; `forward`: what came of it; each thing once and with its `depth`.

    Raises:
        CatalogError: nothing has this name or a hash that begins so, or several hashes do.
    """
    things = list(things)
    found = [t for t in things if called(t, text)]
    if not found:
        raise CatalogError(
            f"nothing here is called {text!r}; give {SHORTEST} or more letters of the hash of a bundle, file, version, decision or data "
            "revision, or the name of a device"
        )
    meant = {value for t in found for value in (*t.hashes.values(), *t.files) if value.startswith(text.lower())}
    if len(meant) > 1:
        names = ", ".join(f"{t.kind} {t.name}" for t in found[:5])
        raise CatalogError(f"{text!r} is the beginning of several hashes ({names}); give more of it")
    owners: dict[str, list[Thing]] = {}  # two versions may share a hash: the same weights, stored or drawn differently
    for t in things:
        for value in t.hashes.values():
            owners.setdefault(value, []).append(t)
    back = walked(found[0], lambda t: [owner for h in t.comes_from for owner in owners.get(h, [])])
    forward = walked(
        found[0], lambda t: [o for o in things if any(t is owner for h in o.comes_from for owner in owners.get(h, []))]
    )
    return {"of": shown(found[0], 0), "back": [shown(t, d) for d, t in back], "forward": [shown(t, d) for d, t in forward]}


def called(thing: Thing, text: str) -> bool:
    """Check whether a text is the name of a device, or the beginning of a hash of the thing or of its files."""
    if thing.kind == "device" and thing.name == text:
        return True
    return len(text) >= SHORTEST and any(value.startswith(text.lower()) for value in (*thing.hashes.values(), *thing.files))


def walked(start: Thing, following: Callable[[Thing], list[Thing]]) -> Iterator[tuple[int, Thing]]:
    """Walk depth first through what can be reached from a thing; yield each thing once, with the depth at which it was found."""
    seen = {id(start)}

    def below(thing: Thing, depth: int) -> Iterator[tuple[int, Thing]]:
        for other in following(thing):
            if id(other) not in seen:
                seen.add(id(other))
                yield depth, other
                yield from below(other, depth + 1)

    return below(start, 1)


def shown(thing: Thing, depth: int) -> dict[str, Any]:
    """Convert a thing to plain data."""
    return {"depth": depth, "kind": thing.kind, "name": thing.name, "hashes": thing.hashes, "facts": thing.facts}


def text_of(found: dict[str, Any]) -> str:
    """Format a trace as text."""

    def line(row: dict[str, Any]) -> str:
        hashes = ", ".join(f"{name} {value[:12]}" for name, value in row["hashes"].items())
        facts = ", ".join(f"{name} {value}" for name, value in row["facts"].items())
        return printed(
            f"{'  ' * row['depth']}{row['kind']} {row['name']}{f' ({hashes})' if hashes else ''}{f': {facts}' if facts else ''}"
        )

    rows = [line(found["of"]), "comes from", *map(line, found["back"])]
    rows += ["led to", *map(line, found["forward"])] if found["forward"] else ["led to nothing yet"]
    return "\n".join(rows)


def versions(records: Records, subject: Subject) -> Iterator[Thing]:
    """Yield the versions of a subject that the gate judged and sealed."""
    known = {made.number: made for made in records.catalog.versions(subject)}
    said = judged(records, subject)
    for seal in seals(records, subject):
        yield _version(seal, said[seal.version], known.get(seal.version))


def _version(seal: Seal, said: Entry, made: Version | None) -> Thing:
    """Describe a version as the gate saw it; only its run and its present aliases come from MLflow."""
    hashes = {"weights": seal.weights, "checkpoint": seal.checkpoint, "lineage": seal.lineage, "scorecard": seal.scorecard}
    if seal.master:
        hashes["master"] = seal.master.digest
    facts = {"gate": said.facts["outcome"], "code": seal.code[:12], "run": made.run_id if made else "deleted"}
    if made and made.aliases:
        facts["is"] = ", ".join(made.aliases)
    from_, files = [seal.data_md5, seal.parent, seal.teacher, str(said.facts["decision"])], []
    if seal.adopted:  # it was judged on these data, but not trained on them
        facts |= {"adopted from": seal.adopted.source, "judged on data": seal.data_rev[:12]}
        from_[0], files = None, [seal.adopted.file_sha256]
    return Thing("version", seal.name, hashes, facts, [value for value in from_ if value], files)


def decisions(entries: Iterable[Entry]) -> Iterator[Thing]:
    """Yield the entries of the ledger as decisions."""
    for entry in entries:
        hashes = {"entry": entry.sha256} | ({"decision": entry.facts["decision"]} if entry.kind == "gate" else {})
        facts = {"what": f"{entry.kind} of {entry.subject}", "who": entry.who, "when": entry.when, "why": entry.why}
        yield Thing("decision", f"{entry.number}", hashes, facts)

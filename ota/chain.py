"""The names of published deltas, and the cheapest way over them from one bundle to another. Only values; no I/O.

The name of a delta is the last part of its target path. Format 1 is named BASE.TARGET, by the hashes of both manifests: agents before
0.3.0 look for exactly this name. Later formats are named FORMAT.BASE.TARGET, by the first digits of the hashes. Older agents do not
look for such a name, so they never fetch what they cannot read; and it saves each device 96 bytes of metadata for each delta. What a
delta starts from and makes is in its header, in full, and is checked before it is applied: the name only helps to find it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

FORMATS = (1, 2)
"""Formats of deltas that agents of this version read."""
DIGITS = 16  # of a hash, in the name of a delta
MOST = 8  # deltas of a chain, as many as releases stay published
WORTH = 0.7  # share of the full bundle; a chain of more bytes is not worth the time that it takes to apply
MAGIC = b"DFDELTA"  # a byte with the format follows
_FIRST = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})")
_LATER = re.compile(rf"([0-9]{{1,2}})\.([0-9a-f]{{{DIGITS}}})\.([0-9a-f]{{{DIGITS}}})")


@dataclass(frozen=True)
class Link:
    """A published delta, as far as its name and size tell."""

    name: str
    size: int
    """In bytes."""
    form: int
    """Format of the delta."""
    base: str
    """First digits of the hash of the manifest that it starts from."""
    target: str
    """First digits of the hash of the manifest that it makes."""

    @classmethod
    def of(cls, name: str, size: int) -> Link | None:
        """Read the name of a delta; None: it is not the name of one."""
        if found := _FIRST.fullmatch(name):
            return cls(name, size, 1, found[1][:DIGITS], found[2][:DIGITS])
        if found := _LATER.fullmatch(name):
            return cls(name, size, int(found[1]), found[2], found[3])
        return None


def name_of(form: int, base: str, target: str) -> str:
    """Return the name of a delta of a format between two bundles, given by the hashes of their manifests."""
    return f"{base}.{target}" if form == 1 else f"{form}.{base[:DIGITS]}.{target[:DIGITS]}"


def form_of(data: bytes) -> int:
    """Return the format of a delta, from its first bytes; 1 if they are not those of a delta."""
    return data[len(MAGIC)] if data.startswith(MAGIC) and len(data) > len(MAGIC) else 1


def way(links: Iterable[Link], base: str, target: str, full: int, most: int = MOST) -> tuple[Link, ...]:
    """Choose the deltas that take a device from one bundle to another for the fewest bytes.

    Args:
        links: the published deltas.
        base: hash of the manifest of the bundle that runs.
        target: hash of the manifest of the bundle that is wanted.
        full: bytes of the full bundle.
        most: deltas that a chain may have.

    Returns:
        One delta of fewer bytes than the full bundle, or a chain of at most `WORTH` of its bytes, in the order in which they are
        applied; empty: the full bundle is the better way.
    """
    start, end = base[:DIGITS], target[:DIGITS]
    if start == end:
        return ()
    links = [link for link in links if link.form in FORMATS]
    best: dict[str, tuple[Link, ...]] = {start: ()}
    for _ in range(most):  # no bundle comes twice in a chain, because a cycle never makes it cheaper
        reached = dict(best)
        for link in links:
            if link.base in best:
                chain = (*best[link.base], link)
                if link.target not in reached or size_of(chain) < size_of(reached[link.target]):
                    reached[link.target] = chain
        if reached == best:
            break
        best = reached
    singles = [(link,) for link in links if (link.base, link.target) == (start, end)]
    ways = [chain for chain in (*singles, best.get(end, ())) if chain and size_of(chain) < full]
    allowed = [chain for chain in ways if len(chain) == 1 or size_of(chain) <= WORTH * full]
    return min(allowed, default=(), key=lambda chain: (size_of(chain), len(chain)))


def size_of(chain: Sequence[Link]) -> int:
    """Return the bytes of all deltas of a chain."""
    return sum(link.size for link in chain)


def kept(names: Iterable[str], order: Sequence[str], newest: Iterable[str]) -> set[str]:
    """Return the names of the deltas that stay published.

    Args:
        names: of the published deltas.
        order: hashes of the manifests of the releases that stay published, oldest first, and of the one before them.
        newest: hashes of the manifests to which every delta stays.

    Returns:
        All deltas to `newest`; to the others, only the single step from the release before, in its newest format: agents that read
        only an older one cannot chain steps.
    """
    links = [link for name in names if (link := Link.of(name, 0))]
    ends = {digest[:DIGITS] for digest in newest}
    steps = {(base[:DIGITS], target[:DIGITS]) for base, target in pairwise(order)}
    last = {(link.base, link.target): link.form for link in sorted(links, key=lambda link: link.form)}
    return {
        link.name
        for link in links
        if link.target in ends or ((pair := (link.base, link.target)) in steps and link.form == last[pair])
    }

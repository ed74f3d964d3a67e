"""Say which files of a data folder cannot be used: one line for each reason, not one for each of 5,000 files."""

from __future__ import annotations

from model.folder import shown

EACH = 5  # files with one reason; so many are shown in a line of their own, of more the first ones in one line
REASONS = 20  # lines; the rest is counted


def lines_of(quarantine: dict[str, str]) -> list[str]:
    """Format the files that cannot be used, grouped by the reason; --json has all of them.

    Args:
        quarantine: file name, or metadata line such as "metadata.jsonl:3" → why it cannot be used.
    """
    groups: dict[str, list[str]] = {}
    for name, why in quarantine.items():
        groups.setdefault(why, []).append(name)
    lines: list[tuple[str, int]] = []
    for why, names in groups.items():
        if len(names) > EACH:
            lines.append((f"{len(names):,} files: {why}: {', '.join(names[:EACH])} …", len(names)))
        else:
            lines += [(f"{name} {why}", 1) for name in names]
    rest = sum(n for _, n in lines[REASONS:])
    told = [shown(text) for text, _ in lines[:REASONS]]
    return told + ([f"{rest:,} more files cannot be used, for other reasons; --json names all of them"] if rest else [])

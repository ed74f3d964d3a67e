"""Markdown from plain text: code, tables, definition lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]+`)")


def plain(text: str) -> str:
    """Escape a text for one line of Markdown; parts in backticks stay code, and line breaks become spaces."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if part.startswith("`") and len(part) > 1 else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


def sentence(text: str) -> str:
    """Escape a text, and give it a capital letter and a full stop."""
    shown = plain(text)
    if re.match(r"[a-z]+\b", shown):  # not sha256, and no code
        shown = shown[0].upper() + shown[1:]
    return shown + ("." if shown and not shown.endswith((".", "?", "!", ":")) else "")


def code(text: str) -> str:
    """Format a text as code; an empty text stays empty."""
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows of Markdown as a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Format terms and their meanings, both in Markdown, as a definition list."""
    return "\n".join(f"{term}\n:   {meaning}\n" for term, meaning in rows)


def joined(*blocks: str) -> str:
    """Join blocks of Markdown with an empty line between them; empty blocks are left out."""
    return "\n\n".join(block.strip("\n") for block in blocks if block.strip()) + "\n"

"""One line on stderr for whoever watches a long-running command."""

from __future__ import annotations

import sys

from ota.errors import printable


def tell(text: str) -> None:
    """Write a line; what it quotes from outside, such as a caption or the name of a file, is made printable."""
    sys.stderr.write(f"ferry: {printable(text)}\n")

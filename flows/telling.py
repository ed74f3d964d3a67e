"""One line on stderr for whoever watches a long-running command."""

from __future__ import annotations

import sys
from contextlib import suppress

from ota.errors import MAX_MESSAGE, printable


def tell(text: str, limit: int = MAX_MESSAGE) -> None:
    """Write a line; what it quotes from outside, such as a caption or the name of a file, is made printable."""
    with suppress(OSError, ValueError):  # the terminal may be gone, and whoever tells something goes on
        sys.stderr.write(f"ferry: {printable(text, limit=limit)}\n")

"""Threads that look after something beside `ferry serve`: one that ends begins again, or `ferry serve` ends with it.

A thread that ends by itself would leave a `ferry serve` that looks healthy and does half of its work.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows import telling
from flows.errors import ServerError

BEGINS = 5  # how often a watcher may begin in a row
PAUSE = 5.0  # seconds before it begins again
PATIENCE = 10.0  # seconds to wait for its last look to end


@contextmanager
def watching(
    name: str, look: Callable[[], None], ending: threading.Event, wake: threading.Event | None = None, pause: float = PAUSE
) -> Iterator[threading.Thread]:
    """Run a watcher in a thread during the block.

    Args:
        name: what it looks at, for messages.
        look: looks until `ending` is set.
        ending: is set at the end of the block.
        wake: is set then, too; None: there is none.
        pause: seconds before a watcher that ended begins again.

    Yields:
        the thread.

    Raises:
        ServerError: the watcher ended `BEGINS` times, and so the block was ended, too.
    """
    lost: list[str] = []

    def run() -> None:
        for left in range(BEGINS - 1, -1, -1):
            try:
                look()
                why = "it returned"
            except BaseException as error:  # noqa: BLE001 - also SystemExit: in a thread it would end the thread without a word
                why = f"{type(error).__name__}: {error}"
            if ending.is_set():
                return
            telling.tell(f"the watcher of {name} ended ({why}){'; it begins again' if left else ''}")
            if left and ending.wait(pause):
                return
        lost.append(why)
        os.kill(os.getpid(), signal.SIGTERM)  # ends `ferry serve` as systemd does

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        ending.set()
        if wake:
            wake.set()
        thread.join(PATIENCE)  # not longer, because a store may hang
        if lost:
            raise ServerError(f"the watcher of {name} ended {BEGINS} times ({lost[0]}), so ferry serve ends; start it again")

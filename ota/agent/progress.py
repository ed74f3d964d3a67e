"""The steps of an update as lines of JSON on stdout, for programs that start `ferry-agent update --progress json`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ota.agent.plan import OnStep
from ota.errors import OtaError, printable

STEPS = 12


@contextmanager
def told(wanted: bool, exit_code: Callable[[OtaError], int]) -> Iterator[OnStep | None]:
    """Give the block a function that prints each step, or None if nobody wants this; print an error that ends the block, too."""
    if not wanted:
        yield None
        return
    began = time.monotonic()

    def on_step(number: int, name: str) -> None:
        _print({"step": number, "of": STEPS, "name": printable(name), "seconds": round(time.monotonic() - began, 1)})

    try:
        yield on_step
    except OtaError as error:
        _print({"error": printable(str(error), limit=100_000), "exit": exit_code(error)})
        raise


def _print(value: dict[str, Any]) -> None:
    with suppress(OSError):  # a reader that went away is no reason to end an update
        sys.stdout.write(f"{json.dumps(value)}\n")
        sys.stdout.flush()

"""Pack a PoC kit: candidates, the agent that measures them, and a page that says how."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import ota
from ota import output
from ota.errors import OperatorError
from ota.kit import FIRST_AGENT, KIT, OBJECTS, Entry, Kit, KitFile, Part
from ota.manifest import Image
from ota.release import agent_wheel
from ota.wording import counted, first_fault

README = "README.txt"
TEXT = """A kit to measure on your own board
==================================

This kit holds {networks} for the line {line}: images of {size} x {size} pixels in {channels}. Nobody trained them.
They cost a board the time, memory and energy that trained ones cost, and draw noise. Nothing is installed as a model, nothing is sent.

What the board needs: Linux, 64 bits, Python 3.11, 3.12 or 3.13, and the Python packages numpy, onnxruntime and pydantic:

    python3 -m venv venv
    venv/bin/pip install numpy "onnxruntime>=1.20,<2" pydantic

If the board has no network, run `pip download` with the same words on a computer that has one, with the board's kind of processor
and version of Python, copy the files, and install with `venv/bin/pip install --no-index --find-links FOLDER numpy onnxruntime pydantic`.

Measure, in the folder with this file. The agent in this kit runs without being installed:

    PYTHONPATH={wheel} venv/bin/python -m ota.agent.cli bench --kit . --json > result.json

It takes about {minutes} on a fast board, and perhaps ten times as long on a slow one; more if the board has a sensor of its power.
Stop other programs before, and leave the board alone. If it is ended by Ctrl-C, the result holds what was measured until then.
If it is killed, run it again. `--seconds 5` makes it shorter, `--no-joules` leaves the energy out.

Send result.json back. It says what kind of board it is. It holds no name, serial number or address.

The candidates (evaluations of the network for one image):

{rows}
"""


@dataclass(frozen=True)
class Candidate:
    """A network with a variant's sampler, and the content of its files."""

    about: dict[str, Any]
    """The fields of `ota.kit.Network` but `weights_bytes`."""
    graph: bytes
    sampler: bytes
    weights: Sequence[tuple[bytes, int]]
    """Pieces of the weights, each with the number of its repeats."""


def pack(line: str, image: Image, text_length: int, candidates: Sequence[Candidate], minutes: float, out: Path) -> Kit:
    """Write a kit as a zip file; the same input makes the same bytes.

    Args:
        line: line whose images are drawn.
        image: their shape.
        text_length: bytes of a caption that the networks read.
        candidates: what to measure.
        minutes: time that it takes on a fast board, for the page.
        out: zip file to write.

    Raises:
        OperatorError: the file cannot be written there, or there are too many candidates.
    """
    output.check(out)
    objects: dict[str, bytes] = {}

    def kept(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        objects[digest] = data
        return digest

    try:
        entries = [
            Entry(
                **c.about, weights_bytes=sum(len(data) * times for data, times in c.weights), graph=kept(c.graph), sampler=kept(c.sampler),
                weights=[Part(sha256=kept(data), times=times) for data, times in c.weights], weights_sha256=_whole(c.weights),
            )
            for c in candidates
        ]  # fmt: skip
        wheel, agent = agent_wheel.build()
        named = {wheel: agent, README: _page(line, image, entries, minutes, wheel).encode()}
        files = [KitFile(size=len(data), sha256=digest) for digest, data in sorted(objects.items())]
        files += [KitFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in named.items()]
        kit = Kit(
            minimum_agent=FIRST_AGENT, made_by=ota.__version__, line=line, image=image, text_length=text_length, entries=entries, files=files
        )  # fmt: skip
    except ValidationError as error:
        raise OperatorError(f"this makes no kit: {first_fault(error, Kit)}") from error
    with output.fresh(out) as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in ({KIT: kit.canonical()} | named).items():
            agent_wheel.add(archive, name, data)
        for digest, data in sorted(objects.items()):
            agent_wheel.add(archive, f"{OBJECTS}/{digest}", data)
    return kit


def _whole(weights: Sequence[tuple[bytes, int]]) -> str:
    made = hashlib.sha256()
    for data, times in weights:
        for _ in range(times):
            made.update(data)
    return made.hexdigest()


def _page(line: str, image: Image, entries: Sequence[Entry], minutes: float, wheel: str) -> str:
    rows = [
        f"    {e.key:32} {e.blocks:3} blocks, {e.tokens:5} positions, {e.evaluations:4} evaluations, {e.weights_bytes / 1e6:7.2f} MB of weights"
        for e in entries
    ]
    return TEXT.format(
        networks=counted(len(entries), "network"), line=line, size=image.size, channels=counted(image.channels, "channel"), wheel=wheel,
        minutes=counted(max(1, round(minutes)), "minute"), rows="\n".join(rows),
    )  # fmt: skip

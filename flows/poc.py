"""PoC kits: choose a line's candidates and pack them, and put what boards gave back on a page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from flows.errors import WorkspaceError
from flows.settings import Line
from flows.workspace import Workspace
from model.config import VARIANTS, ConfigurationName, ModelConfig, PrecisionName, TierName
from model.export import sampler_table
from model.untrained import operations, untrained
from ota import kit, output
from ota.errors import ManifestError, OperatorError
from ota.manifest import Image, parse
from ota.release.kit import Candidate, pack
from ota.wording import counted
from registry import poc

TIERS: tuple[TierName, ...] = ("nano", "small")  # by default: a kit of some megabytes, and some minutes on a slow board
SPEED = 2e10  # floating-point operations a second of a fast core, for the time that is told
CANDIDATE_SECONDS, STARTING_SECONDS, IMAGES, LEAST_IMAGES = 20.0, 2.0, 40, 4  # defaults of `ferry-agent bench --kit`


@dataclass(frozen=True)
class Chosen:
    """What a kit is to hold; an empty list stands for the defaults."""

    tiers: Sequence[str] = ()
    configurations: Sequence[str] = ()
    variants: Sequence[str] = ()
    precisions: Sequence[str] = ()


@dataclass(frozen=True)
class Made:
    """A packed kit, and what the command says of it."""

    out: Path
    kit: kit.Kit
    digest: str
    minutes: float

    @property
    def value(self) -> dict[str, Any]:
        """The answer of the command as JSON."""
        rows = [{"candidate": e.key} | e.model_dump(include=set(kit.Network.model_fields)) for e in self.kit.entries]
        return {
            "kit": str(self.out), "sha256": self.digest, "bytes": self.out.stat().st_size, "line": self.kit.line,
            "minutes_on_a_fast_board": round(self.minutes, 1), "candidates": rows,
        }  # fmt: skip

    @property
    def text(self) -> str:
        """The answer of the command for people."""
        rows = [
            f"  {e.key:32} {e.blocks:3} blocks, {e.tokens:5} positions, {e.evaluations:4} evaluations" for e in self.kit.entries
        ]
        took = f"about {counted(max(1, round(self.minutes)), 'minute')} on a fast board and ten times as long on a slow one"
        return "\n".join([
            f"{self.out}: {counted(len(rows), 'candidate')}, {self.out.stat().st_size:,} bytes, {took}",
            *rows,
            "Next: copy it to a board and unpack it; README.txt in it says how to measure. Then `ferry report --poc RESULT.json`.",
        ])  # fmt: skip


def make(workspace: Workspace, name: str, chosen: Chosen, out: Path) -> Made:
    """Pack a kit for a line.

    Args:
        workspace: whose line.
        name: of the line; its image size, channels, caption length, router and samplers count.
        chosen: which candidates.
        out: zip file to write.

    Raises:
        WorkspaceError: there is no such line, or no such choice.
        ExportError: a candidate cannot be built.
        OperatorError: the file cannot be written.
    """
    line = workspace.line(name)
    output.check_chosen(out, workspace.root / "kit.zip", records=workspace.records)
    candidates, seconds = list[Candidate](), 0.0
    for config, precision in _networks(line, chosen):
        network = untrained(config, precision)
        for variant in _of("variant", chosen.variants, list(VARIANTS)):
            sampler = line.sampler_of(variant)
            table = sampler_table(sampler, variant, config.channels, config.image_size, config.text_length)
            about = {
                "tier": config.tier, "configuration": config.configuration, "variant": variant, "precision": precision,
                "blocks": config.blocks, "tokens": config.tokens, "evaluations": sampler.evaluations,
            }  # fmt: skip
            data = f"{json.dumps(table, indent=1, sort_keys=True)}\n".encode()
            candidates.append(Candidate(about, network.graph, data, [(network.shell, 1), (network.block, network.blocks)]))
            seconds += _seconds(sampler.evaluations * operations(config) / SPEED)
    image = Image(channels=line.channels, size=line.image_size)
    packed = pack(name, image, line.text_length, candidates, seconds / 60, out)
    return Made(out, packed, packed.digest, seconds / 60)


def _networks(line: Line, chosen: Chosen) -> list[tuple[ModelConfig, PrecisionName]]:
    """List what is built: each tier, configuration and precision; by default those that fit the line's images and classes."""
    tiers = _of("tier", chosen.tiers, get_args(TierName), TIERS)
    whole: list[ConfigurationName] = [c for c in get_args(ConfigurationName) if line.image_size % 2 == 0 or c == "II"]
    configurations = _of("configuration", chosen.configurations, get_args(ConfigurationName), whole)
    used = list(dict.fromkeys(c.precision for c in line.classes.values()))
    precisions = _of("precision", chosen.precisions, get_args(PrecisionName), used)
    found = []
    for tier in tiers:
        for configuration in configurations:
            try:
                config = line.config(configuration).model_copy(update={"tier": tier})
            except ValidationError as error:
                raise WorkspaceError(
                    f"images of {line.image_size} pixels do not fit configuration {configuration}; choose --configuration II"
                ) from error
            found += [(config, precision) for precision in precisions]
    return found


def _of(what: str, given: Sequence[str], known: Sequence[Any], default: Sequence[Any] = ()) -> list[Any]:
    """Return each given choice once, in the order of the known ones; the defaults if none is given.

    Raises:
        WorkspaceError: there is no such choice.
    """
    for name in given:
        if name not in known:
            raise WorkspaceError(f"there is no {what} {name!r}; choose {', '.join(known)}")
    return [name for name in known if name in (given or default or known)]


def _seconds(image: float) -> float:
    """Estimate how long a candidate takes to be measured, from the seconds of an image."""
    return STARTING_SECONDS + image + max(min(IMAGES * image, CANDIDATE_SECONDS), LEAST_IMAGES * image)


# The page


def report(paths: Sequence[Path], budget: poc.Budget, out: Path) -> dict[str, Any]:
    """Write the page of some results, and return what it says as JSON.

    Args:
        paths: files that boards gave back, all of one kit.
        budget: limits for one image.
        out: HTML file to write.

    Raises:
        OperatorError: a file is no result, two are the same, they are of different kits, or the page cannot be written.
    """
    output.check_chosen(out, "poc.html", inputs=paths)
    results = [(path, _read(path)) for path in paths]
    for i, (path, result) in enumerate(results):
        for other, before in results[:i]:
            if result == before:
                raise OperatorError(f"{path} and {other} are the same result; name each board's file once")
            if result.kit != before.kit:
                raise OperatorError(
                    f"{path} was measured with another kit ({result.kit[:12]}) than {other} ({before.kit[:12]}); make a page for each kit, "
                    "or measure both boards with one"
                )
    names = _names([path for path, _ in results])
    boards = [_board(name, result) for name, (_, result) in zip(names, results, strict=True)]
    first = results[0][1]
    shape = f"{first.image.size} x {first.image.size} pixels, {'grey' if first.image.channels == 1 else 'in colour'}"
    page = poc.Page(first.line, shape, boards, budget, _alike(names, [result for _, result in results]))
    with output.fresh(out) as file:
        file.write(poc.render(page).encode())
    choices = [poc.choose(board, budget) for board in boards]
    return {
        "page": str(out), "line": first.line, "kit": first.kit, "rule": poc.RULE,
        "boards": [
            {
                "name": board.name, "board": result.board.model_dump(mode="json"),
                "rows": [{"candidate": row.key} | row.model_dump(mode="json") for row in result.rows],
                "not_dominated": [row.key for row in poc.front(board.rows)], "choice": choice.text,
                "best": choice.best.key if choice.best else None, "nearest": choice.nearest.key if choice.nearest else None,
                "fitting": [row.key for row in choice.fitting],
            }
            for board, choice, (_, result) in zip(boards, choices, results, strict=True)
        ],
    }  # fmt: skip


def _read(path: Path) -> kit.PocResult:
    try:
        with path.open("rb") as file:
            data = file.read(kit.MAX_RESULT + 1)[: kit.MAX_RESULT]
    except OSError as error:
        raise OperatorError(f"{path} cannot be read ({error.strerror}); name a file that a board gave back") from error
    try:
        return parse(kit.PocResult, data, kit.MAX_RESULT)
    except ManifestError as error:
        why = str(error).removeprefix("the pocresult ").removesuffix("; it is not used")
        raise OperatorError(f"{path} is no result of `ferry-agent bench --kit FOLDER --json`: it {why}") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each board by its file, with as many folders as it takes to tell all apart."""
    for parts in range(1, 12):
        found = ["/".join(path.absolute().with_suffix("").parts[-parts:]) for path in paths]
        if len(set(found)) == len(found):
            return found
    return [os.fspath(path) for path in paths]


def _alike(names: Sequence[str], results: Sequence[kit.PocResult]) -> list[str]:
    """Say which results describe the same kind of board: boards have no names, so these may be two runs of one."""
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, result in zip(names, results, strict=True):
        about = result.board
        kinds.setdefault((about.model, about.cpu, about.cores, round(about.memory_mib)), []).append(name)
    return [
        f"{' and '.join(same)} describe the same kind of board; they may be runs of one board, and the page shows each."
        for same in kinds.values() if len(same) > 1
    ]  # fmt: skip


def _board(name: str, result: kit.PocResult) -> poc.Board:
    rows = []
    for row in result.rows:
        told: dict[str, Any] = row.model_dump(exclude={"tier", "bare_mib", "energy"})
        if row.energy:
            told |= row.energy.model_dump(exclude={"quality"})
        rows.append(poc.Candidate(key=row.key, **told))
    return poc.Board(name, _facts(result), rows)


def _facts(result: kit.PocResult) -> list[tuple[str, str]]:
    """List what is known of a board, in words."""
    b = result.board
    clock = [f"governor {b.governor}" if b.governor else "", f"up to {b.megahertz:,.0f} MHz" if b.megahertz else ""]
    warm = " before, ".join(f"{value:.0f} °C" for value in b.celsius) + (" after" if len(b.celsius) > 1 else "")
    found = {
        "Board": b.model, "Processor": f"{b.cpu}, {b.cores} core{'s' * (b.cores > 1)} ({b.architecture}){', a virtual machine' if b.virtual else ''}",
        "Memory": f"{b.memory_mib:,.0f} MiB", "Frequency": ", ".join(filter(None, clock)), "Temperature": warm, "Power": b.power,
        "Load before": f"{b.busy:g} running processes on average; other programs may have slowed it" if b.busy >= 0.5 else "",
        "System": f"{b.system}, Linux {b.kernel}", "Software": f"Python {b.python}, NumPy {b.numpy}, ONNX Runtime {b.onnxruntime}, ferry-agent {result.agent}",
    }  # fmt: skip
    return [(name, text) for name, text in found.items() if text]

"""Explain an image: which routed expert does what, as a page and as figures."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flows import progress
from flows.errors import WorkspaceError
from flows.workspace import Workspace
from ota import output
from ota.errors import AgentError, ManifestError
from ota.manifest import MAX_TRACE, Trace, parse
from registry.catalog import Subject
from registry.errors import CatalogError
from registry.explanation import DeviceTrace, Explanation, Pictures, Shown, Stream, effects, render
from registry.figures import find
from registry.seal import Seal

if TYPE_CHECKING:
    from model.explain import SwitchedOff

SEEDS = 2**128  # number of seeds: all keys that Philox accepts


def subject_of(workspace: Workspace, text: str) -> Subject:
    """Parse LINE/CONFIGURATION/VARIANT; LINE alone means `full` if the line has one configuration.

    Raises:
        CatalogError: the text does not have that form.
        WorkspaceError: there is no such line, or it has several configurations and none is named.
    """
    if "/" in text:
        subject = Subject.parse(text)
        workspace.line(subject.line)
        return subject
    configurations = [*workspace.line(text).ladders()]
    if len(configurations) > 1:
        raise WorkspaceError(f"line {text} has several configurations; write {text}/{configurations[0]}/full or another")
    return Subject(line=text, configuration=configurations[0], variant="full")


def read_trace(path: Path) -> Trace:
    """Read what `ferry-agent generate --trace` wrote.

    Raises:
        WorkspaceError: the file cannot be read, or holds no trace.
    """
    try:
        with path.open("rb") as file:
            return parse(Trace, file.read(MAX_TRACE + 1), MAX_TRACE)
    except OSError as error:
        raise WorkspaceError(f"{path} cannot be read: {error.strerror}; name a file of `ferry-agent generate --trace`") from error
    except AgentError as error:
        raise WorkspaceError(f"{path} is of a newer ferry-agent; update ferry") from error
    except ManifestError as error:
        raise WorkspaceError(f"{path} is no file of `ferry-agent generate --trace`: {error}") from error


def explain(
    workspace: Workspace,
    subject: Subject,
    caption: str,
    out: Path,
    *,
    version: int | None = None,
    images: int = 4,
    seed: int = 0,
    trace: Trace | None = None,
) -> Explanation:
    """Draw with each routed expert of a version switched off in turn, write the page, and return the figures.

    Args:
        workspace: whose version.
        subject: line, configuration and variant.
        caption: what to draw.
        out: HTML file.
        version: number of the version; None: the champion.
        images: noises; the intervals are over them.
        seed: of the first noise; the next ones follow it.
        trace: a device's load of one image, to show beside the factory's; None: there is none.

    Raises:
        CatalogError: there is no such version or champion, or the trace is of another variant or network.
        ConfigError: the network has no routed experts.
        DataError: the caption is longer than the network reads.
        OperatorError: the page cannot be written there.
        SealError, StoreError: MLflow does not deliver the version's files.
        WorkspaceError: the caption is empty, or no class of the line runs such a configuration or variant.
    """
    output.check_chosen(out, workspace.root / "explain.html", records=workspace.records)
    if not caption.strip():
        raise WorkspaceError("the caption is empty; give with --caption what the image shall show")
    found = _find(workspace, subject, version)
    from model import explain as experts
    from model.data import caption_ids
    from model.train import load_checkpoint

    card, kept = workspace.catalog.card(found), workspace.work / "champions"
    config = load_checkpoint(workspace.catalog.files(found, "checkpoint", kept)).lineage.config
    caption_ids(caption, config.text_length)
    if trace:
        _check_same(trace, subject, config.blocks, config.shape.experts)
    bundle = workspace.catalog.files(found, "bundle", kept)
    seeds = [(seed + i) % SEEDS for i in range(images)]
    off = experts.switch_off(
        config, card.precision, (bundle / "graph.onnx").read_bytes(), (bundle / "weights.bin").read_bytes(), caption, seeds,
        card.sampler, lambda done, total: progress.advance(f"explain {found.name}", done, total),
    )  # fmt: skip
    dual = 2 * config.shape.dual
    streams: list[Stream] = ["both" if m >= dual else "text" if m % 2 else "image" for m in range(config.blocks)]
    load = off.load.astype(float).tolist()
    made, most = effects(off.changes.tolist(), load, streams)
    told = Explanation(
        subject=str(subject), version=found.version, weights_sha256=card.weights_sha256, caption=caption, seeds=seeds,
        sampler=card.sampler, evaluations=card.sampler.evaluations, effects=made, most=most, load=load,
        device=DeviceTrace(bundle=trace.bundle, load=trace.load) if trace else None,
    )  # fmt: skip
    page = render(
        told,
        _pictures(off, told),
        datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        [f"rgb({r},{g},{b})" for r, g, b in experts.LOADS],
    )
    with output.fresh(out) as file:
        file.write(page.encode())
    return told


def _find(workspace: Workspace, subject: Subject, version: int | None) -> Seal:
    """Find a version as `registry.figures.find`; where there is none, say so if no retraining would ever make it.

    Raises:
        CatalogError: as `registry.figures.find`.
        WorkspaceError: there is none, and no class of the line runs the configuration or variant.
    """
    try:
        return find(workspace, subject, version)
    except CatalogError:
        ladders = workspace.line(subject.line).ladders()
        if subject.configuration not in ladders:
            raise WorkspaceError(
                f"line {subject.line} has no class of configuration {subject.configuration}; it has {' and '.join(ladders)}"
            ) from None
        made = ladders[subject.configuration]
        if subject.variant not in made:
            raise WorkspaceError(
                f"no class of line {subject.line} runs variant {subject.variant}; choose {' or '.join(made)}"
            ) from None
        raise


def _check_same(trace: Trace, subject: Subject, blocks: int, experts: int) -> None:
    if (trace.line, trace.variant) != (subject.line, subject.variant):
        raise CatalogError(f"the trace is of {trace.variant} of line {trace.line}, not of {subject}; name that variant")
    if (len(trace.load[0]), len(trace.load[0][0])) != (blocks, experts):
        raise CatalogError(
            f"the trace has {len(trace.load[0])} blocks of {len(trace.load[0][0])} experts, but {subject} has {blocks} of {experts}; name "
            "the configuration that the device runs"
        )


def _pictures(off: SwitchedOff, told: Explanation) -> Pictures:
    import numpy as np

    from model import explain as experts

    shown = {}
    for e in told.effects:
        without = off.without[e.block, e.expert]
        difference, scale = experts.difference(off.image, without)
        shown[e.block, e.expert] = Shown(experts.picture(without), difference, scale)
    device = np.array(told.device.load, dtype=np.float32) if told.device else None
    most = max(float(off.load.max()), 0.0 if device is None else float(device.max()))
    return Pictures(
        image=experts.picture(off.image), experts=shown, most=most,
        heat=[experts.heat(off.load[:, m], most) for m in range(off.load.shape[1])],
        device=[] if device is None else [experts.heat(device[:, m], most) for m in range(device.shape[1])],
    )  # fmt: skip

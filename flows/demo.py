"""Play all of ferry in one workspace: data, training, registry, release, devices, drift, update by delta, a broken release.

Finished steps are recorded in `work/demo.json`, so a killed demo resumes at the step that was interrupted. The summary is read
from the stores (MLflow, the ledger, the signed repository, the devices' folders, the fleet's reports), not from what the steps
returned.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from flows.errors import FlowError, WorkspaceError
from flows.settings import SETTINGS as SETTINGS_FILE
from flows.setup import create
from ota.durations import spoken
from ota.manifest import Manifest
from registry.lineage import file_sha256

GATEWAY_SECONDS = 120.0  # that the gateway may take to answer
TOKEN_SECONDS = 3600  # that a device's token is valid
LINE, SECOND, CLASS = "surfaces", "digits", "edge"
DEVICES = ("press-01", "press-02", "press-03")
BASE = Path(__file__).parent / "bases" / f"{LINE}.safetensors"
BASE_SOURCE = "the base that comes with ferry, trained by infra/base/train.py"
CAPTIONS = {"press-01": "brick", "press-02": "coins", "press-03": "gravel, hole"}
CAPTIONS_AFTER = {"press-01": "dim brick", "press-02": "dim coins", "press-03": "page"}

# These sizes let everything end within seven minutes on two cores, while the samples can still be recognised.
SETTINGS = """\
# The demo's workspace. Relative paths start at this folder.
schema = 2

[lines.surfaces]                   # patches of brick, grass, gravel, coins; later also of printed pages
data = "data/surfaces"
tier = "nano"
image_size = 16
channels = 1
text_length = 20
update_method = "lowrank"          # makes the update of a retraining small; what it leaves out is part of the next one

[lines.surfaces.training]
steps = 420
batch = 8
learning_rate = 1.5e-3

[lines.surfaces.retraining]        # from the champion, on the data of both deliveries
steps = 650
batch = 8
learning_rate = 1.5e-3

[lines.surfaces.distillation]      # the student for turbo
steps = 120
trajectories = 192

[lines.surfaces.sampler]           # full; by default it takes 28 steps, dev 14, fast 7, and turbo 4 of a student
method = "ab2"
steps = 14
guidance = 2.0

[lines.surfaces.samplers]
dev = { method = "ab2", steps = 10, guidance = 2.0, shift = 0.7 }
fast = { method = "ab2", steps = 7, guidance = 2.0, shift = 0.5 }

[lines.surfaces.gate]
images = 128
coverage = 0.1

[lines.surfaces.classes.edge]
configuration = "I"
precision = "bfloat16"
latency_ms = 3000

[lines.digits]                     # a second product in the same workspace: scanned digits
data = "data/digits"
tier = "test"
image_size = 16
channels = 1
text_length = 8

[lines.digits.training]
steps = 300
batch = 64
learning_rate = 8e-3

[lines.digits.sampler]
method = "ab2"
steps = 10
guidance = 2.0

[lines.digits.gate]
images = 128
coverage = 0.1
implausible = 0.7                  # so small a model, so short a training: many of its digits are unlike all real ones

[lines.digits.classes.edge]
configuration = "I"
precision = "bfloat16"
latency_ms = 1000
variants = ["full"]
"""


class DemoError(FlowError):
    """A step of the demo did not do what it must."""


class Demo:
    """State of the demo: which steps are done, how long each took, and what the devices ran after each update."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self.root, self._say = root.absolute(), say
        self._path = self.root / "work" / "demo.json"
        self.notes: dict[str, Any] = {"done": [], "seconds": {}, "devices": {name: {} for name in DEVICES}}
        if self._path.is_file():
            self.notes = json.loads(self._path.read_bytes())
        settings = self.root / SETTINGS_FILE
        if settings.is_file() and settings.read_text() != SETTINGS:
            raise WorkspaceError(
                f"{self.root} is a workspace of its own; name an empty folder, because the demo would write into its data"
            )
        self.workspace = create(self.root, [], SETTINGS)

    def step(self, name: str, text: str, action: Callable[[], object]) -> None:
        """Do a step, unless it was done before; record that it is done, and how long it took."""
        if name in self.notes["done"]:
            return
        self._say(text)
        began = time.monotonic()
        action()
        self.notes["done"].append(name)
        self.notes["seconds"][name] = round(time.monotonic() - began, 1)
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.notes, indent=1))
        fresh.replace(self._path)

    def play(self) -> None:
        """Play all steps, in order."""
        from model import photographs

        self.step(
            "data 1", "first delivery: patches cut from photographs, and scanned digits → DVC",
            lambda: self._deliver("first delivery", {
                LINE: lambda folder: photographs.surfaces(folder, 1), SECOND: lambda folder: photographs.digits(folder, 1),
            }),
        )  # fmt: skip
        self.step("adopt", f"adopt a base for {LINE} (nano, configuration I) → evaluate → gate → MLflow", self._adopt)
        self.step("train digits", f"train {SECOND} (test tier) from noise, and the same flow", lambda: self._retrain(SECOND))
        self.step("release 1", "ONNX bundles → signed repository → rollout", lambda: self._release([LINE, SECOND]))
        self.step(
            "install",
            "a gateway starts; three devices enroll, install it, draw an image each, and report over HTTP",
            lambda: self._update("installed", CAPTIONS),
        )
        self.step(
            "data 2", "second delivery: dim, slanting light, and a new surface → DVC",
            lambda: self._deliver("lamp moved, printed pages added", {LINE: lambda folder: photographs.surfaces(folder, 2)}),
        )  # fmt: skip
        self.step("train 2", "retrain from the champion → gate → promotion; digits have no news", self._retrain_both)
        self.step("release 2", "bundle → delta from release 1 → signed → rollout", lambda: self._release([LINE]))
        self.step(
            "update", "the devices update by delta, try the new model, report", lambda: self._update("updated", CAPTIONS_AFTER)
        )
        self.step("break", "version 3 has garbage for weights; the gate says no, somebody overrules it", self._break)
        self.step(
            "release 3", "the broken version is signed and rolled out all the same", lambda: self._release([LINE], drill=True)
        )
        self.step("refuse", "the devices try it and refuse", lambda: self._update("after_broken", {}, refuses=True))
        self.step("recover", "halt, and go back to version 2", self._recover)
        self.step("report", "the one-page report", self._report)

    # The steps

    def _deliver(self, message: str, deliveries: dict[str, Callable[[Path], int]]) -> None:
        from model import revisions

        for line, write in deliveries.items():
            write(self.root / self.workspace.line(line).data)
            revisions.add(self.workspace.line_data(line), f"{line}: {message}")

    def _retrain(self, line: str) -> dict[str, Any]:
        from flows.retrain import retrain

        rows = retrain(str(self.root), line)
        for row in rows:
            if row["outcome"] not in ("promote", "unchanged"):
                raise DemoError(f"the gate did not promote {row['subject']} {row['version']}: {row['reason']}")
        return rows[0]

    def _adopt(self) -> None:
        """Register the base as version 1; the line's later versions are trained from it."""
        from flows.adopt import adopt

        (row, *_) = adopt(str(self.root), LINE, "I", str(BASE), BASE_SOURCE)
        if row["outcome"] not in ("promote", "unchanged"):
            raise DemoError(f"the gate did not promote the base of {LINE}: {row['reason']}")

    def _retrain_both(self) -> None:
        self._retrain(LINE)
        if self._retrain(SECOND)["outcome"] != "unchanged":
            raise DemoError(f"{SECOND} was trained again although its data did not change")

    def _release(self, lines: list[str], drill: bool = False) -> None:
        from flows import policies
        from flows.publish import release

        for line in lines:
            made = release(str(self.root), line, CLASS, drill=drill)
            policies.start(
                self.workspace, line, CLASS, policies.Shares([100]), number=made["release"], why="to all devices at once"
            )

    def _update(self, act: str, captions: dict[str, str], refuses: bool = False) -> None:
        """Update all devices at the same time through a gateway, each in a process of its own; then read their folders."""
        with self._gateway() as address, ThreadPoolExecutor(len(DEVICES)) as pool:
            list(pool.map(lambda device: self._one_update(device, address, captions.get(device), refuses), DEVICES))
        for device in DEVICES:
            self.notes["devices"][device][act] = active_manifest(self.root / "devices" / device)

    @contextmanager
    def _gateway(self) -> Iterator[str]:
        """Run the gateway on a free port of the loopback during the block; yield its address."""
        from flows import gateway

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        with gateway.beside(*gateway.command(self.workspace, gateway.place(self.workspace, host="127.0.0.1", port=port))):
            until = time.monotonic() + GATEWAY_SECONDS
            while not answers(port):
                if time.monotonic() > until:
                    raise DemoError(f"the gateway does not answer at {address}; run the demo again, and look at what it says")
                time.sleep(0.1)
            yield address

    def _one_update(self, device: str, address: str, caption: str | None, refuses: bool) -> None:
        folder, anchor, fleet = self.root / "devices" / device, self.root / "root.json", self.workspace.fleet
        agent(  # each time, because the gateway's port changes
            folder, "init", "--device", device, "--line", LINE, "--class", CLASS, "--repository", address, "--root", str(anchor),
            "--root-sha256", file_sha256(anchor), "--reports", address, "--tag", "site=demo",
        )  # fmt: skip
        if device not in fleet.devices():  # all of it may be repeated, because a kill may come in between
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(fleet.invite(device, LINE, CLASS, TOKEN_SECONDS))
            agent(folder, "enroll", "--token-file", str(token))
        (folder / "token").unlink(missing_ok=True)
        fleet.confirm(device)
        fleet.close()
        if refuses:
            # Exit code 6: the device refuses the release now. 0: it refused it before, in a run of the demo that was killed.
            agent(folder, "update", expect=(6, 0))
            wanted = self.workspace.repository.rolled_out(LINE, CLASS)
            if wanted is None or wanted.manifest not in refusals(folder):
                raise DemoError(f"{device} did not refuse the broken release; see {folder / 'state.json'}")
        else:
            agent(folder, "update")
        if caption is not None:
            pictures = self.root / "pictures"
            pictures.mkdir(exist_ok=True)
            name = f"{device}-{caption.replace(', ', '-').replace(' ', '-')}.png"
            agent(folder, "generate", caption, "--output", str(pictures / name), "--seed", str(DEVICES.index(device)))
        agent(folder, "report")  # what is still in its queue

    def _break(self) -> None:
        """Register the champion with shuffled weights, as after a fault in the factory, and promote it by overruling the gate."""
        import torch

        from flows.retrain import register_checkpoint
        from flows.steps import champion_files
        from model.train import LINEAGE, WEIGHTS, load_checkpoint, write_safely
        from registry.champions import champion_of, promote, promotions

        if promotions(self.workspace, self._subject())[-1].facts["overruled"]:
            return  # a run of the demo that was killed has done this
        champion = champion_of(self.workspace, self._subject())
        if champion is None:
            raise DemoError(f"{self._subject()} has no champion to break")
        whole = load_checkpoint(champion_files(self.workspace, champion).checkpoint)
        broken = self.workspace.work / "runs" / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole.folder, broken)
        generator = torch.Generator().manual_seed(3)
        weights = whole.network().state_dict()
        for name, weight in weights.items():
            order = torch.randperm(weight.numel(), generator=generator)
            weights[name] = weight.flatten()[order].view(weight.shape)
        write_safely(broken / WEIGHTS, weights)
        lineage = whole.lineage.model_copy(update={"parent": whole.weights_sha256, "steps": 0})
        (broken / LINEAGE).write_text(lineage.model_dump_json(indent=1))
        row = register_checkpoint(str(self.root), str(broken))
        if row["outcome"] == "promote":
            raise DemoError("the gate let the broken version through")
        promote(self.workspace, self._subject(), row["version"], "drill: would the devices notice?", overrule=True)

    def _recover(self) -> None:
        from flows import policies
        from flows.publish import release
        from registry.champions import promote, promotions

        subject = self._subject()
        policies.halt(self.workspace, LINE, CLASS, "every device refused it")
        good = promotions(self.workspace, subject, overruled=False)[-1]
        promote(self.workspace, subject, good.facts["version"], "drill ended")
        made = release(str(self.root), LINE, CLASS)
        policies.start(
            self.workspace,
            LINE,
            CLASS,
            policies.Shares([100]),
            number=made["release"],
            revert=True,
            why="back to the release before",
        )

    def _report(self) -> None:
        from flows.report import write

        write(self.workspace, self.root / "report.html")

    def _subject(self) -> Any:
        from registry.catalog import Subject

        return Subject(line=LINE, configuration="I", variant="full")

    # The summary

    def summary(self) -> dict[str, Any]:
        """Collect the figures of the demo, each from the store that keeps it."""
        from model import revisions, versions
        from registry.champions import judged

        w, subject = self.workspace, self._subject()
        arrivals = [v for v, _ in reversed(versions.log(w.root, w.line(LINE).data, LINE))]
        last = revisions.recorded(w.root, arrivals[-1])
        registered = w.catalog.versions(subject)
        releases = {r.manifest: r for r in w.repository.releases(LINE, CLASS)}
        updated = self.notes["devices"][DEVICES[0]]["updated"]
        installed = self.notes["devices"][DEVICES[0]]["installed"]
        delta = next(d for d in w.repository.deltas(LINE, CLASS) if (d.base, d.target) == (installed, updated))
        received = {r.device: r.received for r in w.fleet.reports() if r.event == "installed" and r.manifest == updated}
        return {
            "data_versions": [v.rev for v in arrivals],
            "drift": last.drift.model_dump() if last and last.drift else None,
            "model_versions": [v.number for v in registered],
            "devices": self.notes["devices"],
            "bytes": {
                "full": releases[updated].full_bytes, "delta": delta.size, "received": received,
                "metadata": w.repository.metadata_bytes(LINE, CLASS),
            },
            "gate": {
                str(number): {"outcome": said.facts["outcome"], "reason": said.why, "n": said.facts["verdict"]["n"]}
                for number, said in sorted(judged(w, subject).items())
            },
            "refused": {device: " ".join(refusals(w.root / "devices" / device).values()) for device in DEVICES},
            "heard": {device: [report.event for report in w.fleet.reports(device)] for device in DEVICES},
            "champion": next((v.number for v in registered if "champion" in v.aliases), None),
            "variants": self._variants(w.repository.manifest(releases[updated])),
            "ledger_entries": len(w.ledger.entries()),
            "also": {SECOND: [v.number for v in w.catalog.versions(subject.model_copy(update={"line": SECOND}))]},
            "seconds": self.notes["seconds"] | {"all": round(sum(self.notes["seconds"].values()), 1)},
            "report": str(w.root / "report.html"),
            "workspace": str(w.root),
        }  # fmt: skip

    def _variants(self, manifest: Manifest) -> dict[str, Any]:
        """Collect what each variant of the update costs: evaluations and seconds of an image, and bytes beyond `full`."""
        from registry.champions import champion_of

        made: dict[str, Any] = {}
        for variant in manifest.variants:
            subject = self._subject().model_copy(update={"variant": variant})
            champion = champion_of(self.workspace, subject)
            if champion is None:
                raise DemoError(f"{subject} has no champion, but the update holds it")
            cost = self.workspace.catalog.card(champion).cost
            own = {entry.sha256: entry.size for entry in manifest.files if entry.variant == variant}
            full = {entry.sha256 for entry in manifest.files if entry.variant == "full"}
            beyond = sum(size for digest, size in own.items() if digest not in full)
            made[variant] = {
                "evaluations": cost.evaluations, "seconds": round(cost.milliseconds / 1000, 4), "bytes_beyond_full": beyond if variant != "full" else 0,
            }  # fmt: skip
        return made


def is_finished(root: Path) -> bool:
    """Check whether a new demo needs another folder: this one holds a finished demo, or something else than a demo."""
    notes = root / "work" / "demo.json"
    if notes.is_file():
        return "report" in json.loads(notes.read_bytes())["done"]
    settings = root / SETTINGS_FILE
    if settings.is_file():  # a demo that was killed in its first step, or another workspace
        return settings.read_bytes() != SETTINGS.encode()
    return root.exists() and (not root.is_dir() or any(root.iterdir()))


def agent(folder: Path, *arguments: str, expect: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run the real `ferry-agent` in a process of its own, and return its answer.

    Raises:
        DemoError: its exit code is not an expected one.
    """
    command = [sys.executable, "-m", "ota.agent.cli", "--quiet", *arguments, "--dir", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode not in expect:
        raise DemoError(f"{folder.name}: `ferry-agent {arguments[0]}` ended with {done.returncode}: {done.stderr.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    return answer


def answers(port: int) -> bool:
    """Check whether the gateway at a port of this machine is well."""
    link = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        link.request("GET", "/healthz")
        return link.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        link.close()


def active_manifest(folder: Path) -> str:
    """Compute the sha256 of the manifest of the bundle that a device runs, from its folder."""
    active = json.loads((folder / "state.json").read_bytes())["state"]["active"]
    return file_sha256(folder / "slots" / active / "manifest.json")


def refusals(folder: Path) -> dict[str, str]:
    """Read from a device's folder which bundles it refused, and why: the reason by the sha256 of the manifest."""
    found: dict[str, str] = json.loads((folder / "state.json").read_bytes())["state"]["refused"]
    return found


def text(summary: dict[str, Any]) -> str:
    """Format the summary as text."""
    b, g = summary["bytes"], summary["gate"]
    place = os.path.relpath(summary["workspace"])
    first, second = summary["data_versions"][0][:8], summary["data_versions"][-1][:8]
    lines = [
        f"data        two revisions, {first} and {second}",
        f"drift       {summary['drift']['reason']}" if summary["drift"] else "drift       not looked for",
        *(
            f"gate        version {number}: {row['outcome']}, {_first(row['reason'])}, n = {row['n']}"
            for number, row in g.items()
        ),
        f"update      {b['delta']:,} bytes as a delta, {b['full']:,} in full ({b['full'] / b['delta']:.1f} times less)",
        f"fetched     {max(b['received'].values()):,} bytes by each device for the update, metadata included",
    ]
    lines += [
        f"{variant:12}{row['evaluations']} evaluations, {1000 * row['seconds']:.0f} ms an image, {row['bytes_beyond_full']:,} bytes beyond full"
        for variant, row in summary["variants"].items()
    ]
    for device, acts in summary["devices"].items():
        lines.append(
            f"{device}    installed {acts['installed'][:8]}, updated to {acts['updated'][:8]}, after the broken release "
            f"{acts['after_broken'][:8]}"
        )
    for device, reason in summary["refused"].items():
        lines.append(f"{device}    refused: {_first(reason)}")
    heard = ", ".join(f"{len(events)} from {device}" for device, events in summary["heard"].items())
    lines.append(f"heard       reports over HTTP through the gateway: {heard}")
    lines += [
        f"champion    version {summary['champion']}; {summary['ledger_entries']} decisions in the ledger",
        f"time        {spoken(summary['seconds']['all'])} in all",
        f"report      {os.path.relpath(summary['report'])}",
        f"workspace   {place}; go on with `cd {place}` and `ferry --help`",
    ]
    return "\n".join(lines)


def _first(reason: str) -> str:
    """Shorten several reasons to the first one, so that they fit into a line; --json has all of them."""
    first, *others = reason.partition(" (n = ")[0].split("; ")
    return f"{first} (and {len(others)} more)" if others else first

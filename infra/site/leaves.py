"""The page of every byte that leaves a device or the plant, by channel, made from the documents and the code that sends them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from infra.site import example
from infra.site.schema import kind
from infra.site.text import code, joined, plain, sentence, table
from model.config import ModelConfig
from model.scorecard import Lineage, Sampler, Scorecard
from ota.manifest import Manifest, Reference, SamplerTable
from ota.policy import Policy, Policy2
from ota.release.repository import Release
from ota.report import DeviceReport, Enrolment, SealedReport
from registry.seal import PARTS
from registry.selection import Decision

Row = tuple[str, str, str, str]
"""Field, kind of value, meaning, bytes in the example."""

ROOT = Path(__file__).parents[2]
HEAD = ("field", "value", "meaning", "bytes")

EVENTS = {
    "starting": "the trial of a new bundle begins",
    "installed": "the device switched to a bundle, which is on probation",
    "confirmed": "the probation ended well",
    "rolled_back": "the device went back to the bundle before",
    "refused": "a bundle failed its trial",
    "base_corrupt": "a file of the running bundle is damaged",
    "strayed": "the images load other experts than in the factory (routing shift)",
    "new_agent": "another version of the agent runs than at the report before",
    "alive": "the heartbeat: how the device fares",
}

REQUEST = {
    "Host": "the repository's host, from the address that `ferry-agent init` was given",
    "User-Agent": "name and version of the HTTP library",
    "Accept-Encoding": "the body must arrive as it is",
    "Cache-Control": "a proxy must not answer with an old copy; only for metadata",
    "Authorization": "name and password in the address that `ferry-agent init` was given; only if it has them, and only to that server",
    "Range": "first byte that is missing; only when a download is resumed",
}

POSTED = {
    "Host": "the gateway's host, from the address that `ferry-agent init --reports` was given",
    "User-Agent": "name and version of the HTTP library",
    "Accept": "the answer is JSON",
    "Accept-Encoding": "the answer must arrive as it is",
    "Content-Type": "one report in each line",
    "Content-Encoding": "the lines are packed",
    "Content-Length": "bytes of the body",
    "Authorization": "name and password in that address; only if it has them, and only to that server",
}

PATHS = {
    "metadata/N.root.json": "the next root, until there is none",
    "metadata/timestamp.json": "at every check for updates",
    "metadata/N.snapshot.json": "if it is new",
    "metadata/N.targets.json": "if it is new",
    "metadata/N.rollout.json": "if it is new",
    "metadata/N.models.json": "if it is new",
    "metadata/N.deltas.json": "if it is new, and an update is to be installed",
    "targets/rollout/LINE/HASH.CLASS.2.json": "policy 2, where there is one: tells the server the device's line and class",
    "targets/rollout/LINE/HASH.CLASS.json": "policy 1, where there is no other, or the device has no place for reports: alike",
    "targets/models/LINE/CLASS/HASH.BUNDLE.json": "the manifest of the bundle to install",
    "targets/deltas/LINE/CLASS/HASH.OLD.NEW": "a delta: tells the server which bundle the device runs",
    "objects/HASH": "a file of the bundle, where no delta is used",
}

ANSWER = {
    "Server": "`ferry-agent`, without a version",
    "Date": "time by the device's clock",
    "Connection": "each connection serves one request",
    "Content-Type": "`image/png`, or `application/json` for status and errors",
    "Content-Length": "bytes of the body",
    "Cache-Control": "nothing may keep the answer",
    "X-Ferry-Bundle": "bundle that drew the image",
    "X-Ferry-Variant": "variant that drew the image",
    "X-Ferry-Milliseconds": "time that the image took",
}

STATUS = {
    "active": "bundle that is installed",
    "release": "its release number",
    "on_trial": "whether it is on probation",
    "serving": "bundle that draws",
    "variants": "variants, in the order in which they are tried",
    "strayed": "the routing shift that was seen, as a sentence",
    "milliseconds": "by variant: number of recent images, median and 95th percentile of their times",
}

ASKED = {
    "caption": ("text", "what to draw"),
    "seed": ("whole number", "seed"),
    "variant": ("text", "`full`, `dev`, `fast` or `turbo`"),
}

METADATA = {
    "signatures[].keyid": "id of the key that signed",
    "signatures[].sig": "its signature",
    "signed._type": "role of the file",
    "signed.spec_version": "version of the TUF specification",
    "signed.version": "version of the file; it only rises",
    "signed.expires": "when the signature expires",
    "signed.signed_at": "when it was signed; devices hold their clocks against it",
    "signed.consistent_snapshot": "that files have their version or hash in their names",
    "signed.keys.KEYID.keytype": "kind of a public key",
    "signed.keys.KEYID.scheme": "kind of its signatures",
    "signed.keys.KEYID.keyval.public": "the public key",
    "signed.roles.ROLE.keyids[]": "ids of the keys that a role has",
    "signed.roles.ROLE.threshold": "how many of them must sign",
    "signed.meta.FILE.version": "version of another metadata file that is in force",
    "signed.delegations.keys.KEYID.keytype": "kind of a public key",
    "signed.delegations.keys.KEYID.scheme": "kind of its signatures",
    "signed.delegations.keys.KEYID.keyval.public": "the public key",
    "signed.delegations.roles[].name": "name of a delegated role",
    "signed.delegations.roles[].keyids[]": "ids of the keys that it has",
    "signed.delegations.roles[].threshold": "how many of them must sign",
    "signed.delegations.roles[].paths[]": "which targets it may sign",
    "signed.delegations.roles[].terminating": "that no other role is asked about them",
    "signed.targets.TARGET.length": "bytes of a target: a manifest, a delta or a policy; its path names line and class",
    "signed.targets.TARGET.hashes.sha256": "its hash",
}
"""Fields of the TUF metadata; those of `custom` are fields of `Release`."""

FILES = {
    "graph": "the network's structure as ONNX, without its weights",
    "weights": "the weights",
    "sampler": "how images are drawn ([fields](#sampler))",
    "golden": "8 fixed inputs and some of the network's outputs for them, as numbers; **with them up to 8 captions of your data**, as bytes; no images",
    "reference": "what the factory measured, **with up to 12 of the most frequent captions of your data** ([fields](#reference))",
}

TAGS = {
    "data.repo": "Git repository of the data: the URL of its remote without credentials, or its path",
    "data.line": "line (product)",
    "data.rev": "Git commit of the data revision",
    "data.path": "data folder",
    "data.md5": "DVC's hash of the data folder",
    "data.files": "number of files",
    "data.items": "training images",
    "code.sha256": "hash of the training code",
    "code.rev": "Git commit of the program",
    "code.dirty": "whether the program's files differ from that commit",
    "environment.sha256": "hash of the list of installed packages",
    "python": "version",
    "torch": "version",
    "onnxruntime": "version",
    "onnx.opset": "version",
    "onnx.sha256": "hash of the graph",
    "configuration": "I or II",
    "variant": "variant",
    "tier": "size of the network",
    "config.sha256": "hash of the network's configuration",
    "training.sha256": "hash of the training options",
    "seed": "seed of the training",
    "training.steps": "steps of the training",
    "training.seconds": "time of the training",
    "hardware": "what it was trained on",
    "parent.sha256": "weights that training started from",
    "teacher.sha256": "weights of the teacher",
    "adopted.from": "where weights come from that were trained elsewhere, in the words of whoever adopted them",
    "adopted.sha256": "hash of the file that was adopted",
    "lineage.sha256": "hash of the lineage",
    "checkpoint.sha256": "hash of the trained weights",
    "weights.sha256": "hash of the exported weights",
    "scorecard.sha256": "hash of the scorecard",
    "evaluation.space.SPACE": "hash of a feature space",
    "evaluation.n": "generated images",
    "evaluation.seed": "seed of the generated images",
    "gate.outcome": "the gate's answer",
    "gate.reason": "why, in one sentence; it may quote captions",
    "gate.n": "generated images",
    "gate.decision": "hash of the decision",
    "gate.champion": "hash of the champion's weights",
}

ARTIFACTS = {
    "bundle/graph.onnx": "the network's structure",
    "bundle/weights.bin": "the exported weights",
    "bundle/sampler.json": "how images are drawn",
    "bundle/golden.npz": "fixed inputs, some captions, and outputs",
    "bundle/reference.json": "what the factory measured",
    "checkpoint/weights.safetensors": "the trained weights",
    "checkpoint/lineage.json": "how the model was made ([fields](#lineage))",
    "checkpoint/curve.json": "the training curve",
    "pictures/samples.png": "**generated images**",
    "pictures/samples.json": "**captions** of these images",
    "pictures/real.png": "**held-out images of your data** with the same captions",
    "scorecard.json": "all figures, with the most frequent **captions** ([fields](#scorecard))",
    "decision.json": "the gate's decision with all its checks, which name **captions** ([fields](#decision))",
    "environment.txt": "names and versions of the installed packages",
}

RUNS = {
    "retrain": "parameters: the workspace's path, line, Git revision, whether winners are promoted, seed, steps, budget of the update",
    "adopt": "parameters: the workspace's path, line, configuration, path of a file, where it comes from, whether it is promoted",
    "look for data": "parameters: the workspace's path, lines",
    "look at aliases": "parameters: the workspace's path",
    "register checkpoint": "parameters: the workspace's path, path of a checkpoint",
    "release": "parameters: the workspace's path, line, device class",
    "approval": "parameters: the workspace's path, model, version; then the name, answer and reason that a person typed",
    "pull data": "state and times",
    "ladder": "state and times",
    "train": "state and times",
    "fit the update": "state and times",
    "fit the student": "state and times",
    "export": "state and times",
    "evaluate": "state and times",
    "register": "state and times",
    "bundle": "state and times",
    "deltas": "state and times",
    "sign": "state and times",
    "publish": "state and times",
}
"""Flows and tasks, and what Prefect's server learns of a run of each."""


def page() -> str:
    """Write the page."""
    return joined(
        _overview(),
        _reports(),
        _requests(),
        _endpoint(),
        _device_never(),
        _published(),
        _mlflow(),
        _others(),
        _alerts(),
        _plant_never(),
    )


def _overview() -> str:
    rows = (
        (
            "[Reports](#reports)",
            "device → factory",
            "each event of an update, a routing shift, and a heartbeat every six hours or so",
            "none; counts and histograms",
            "none; counts by the release's list",
        ),
        ("[Requests](#requests)", "device → server of the repository", "each check for updates", "none", "none"),
        (
            "[Endpoint](#endpoint)",
            "agent → programs on the same device",
            "when they ask",
            "generated",
            "those that were asked for",
        ),
        (
            "[Repository](#repository)",
            "factory → everybody who can fetch it",
            "`ferry release`, `rollout`, `trust`",
            "none",
            "up to 8 for each variant, and the 12 most frequent",
        ),
        (
            "[MLflow](#mlflow)",
            "factory → `stores.mlflow`",
            "`ferry retrain`, `adopt`, `promote`",
            "generated, and some held-out",
            "most frequent ones",
        ),
        ("[DVC remote](#dvc)", "factory → `stores.data`", "`ferry data add`", "**all images of the data**", "**all**"),
        ("[Prefect](#prefect)", "factory → `PREFECT_API_URL`", "while flows run", "generated", "those in decisions"),
        ("[Database](#database)", "factory → `stores.database`", "each decision", "none", "those in decisions"),
        (
            "[Alerts](#alerts)",
            "factory → `alerts.webhook`, `alerts.command`",
            "a matter changes its state",
            "none",
            "those in reasons",
        ),
        (
            "[Pages](#pages)",
            "factory → whom you give them to",
            "`ferry report`, `ferry rate`",
            "generated, and some held-out",
            "some",
        ),
    )
    return joined(
        "# What leaves a device and the plant",
        "This page lists every byte that leaves a device, and every byte that leaves the plant, by channel. The tables are made from the "
        "documents' definitions and from the code that sends them when this page is built. Sizes are those of an example, in bytes as sent; "
        "a field of a document counts with its name.",
        "Nothing leaves by itself: no part of DeltaFerry sends telemetry, and by default all of the factory's stores are folders and files in "
        "the workspace. A channel leaves the plant only if you name a place outside of it.",
        table(("channel", "from → to", "when", "images", "captions"), rows),
        "## From a device {#device}",
    )


def _reports() -> str:
    made = example.report()
    line = example.report_line(made)
    events = [(code(event), EVENTS[event]) for event in get_args(DeviceReport.model_fields["event"].annotation)]
    sent = example.posted_headers()
    headers = [(code(name), plain(value), POSTED[name], str(len(f"{name}: {value}\r\n"))) for name, value in sent.items()]
    enrolment = example.enrolment()
    return joined(
        "### Reports {#reports}",
        "A device makes a report of each event, and a heartbeat every six hours or so. `ferry-agent init --reports` says where they go; without it, "
        "nothing is sent. If it names a folder, each report becomes a file there, `DEVICE-NUMBER.json`, and something that you choose (a mount, a "
        "copy job, a stick) brings the files to the factory. If it names a gateway's `https` address, the device sends up to 20 reports in one "
        "request. `ferry-agent report --show` prints the lines that would leave the device now, byte for byte.",
        "A report is one line of JSON with two fields:",
        table(HEAD, fields(SealedReport)),
        f"The text in `signed` is a JSON document. The line of the example has {len(line):,} bytes. The form is closed: the agent cannot add a field, "
        "and the factory refuses a report that has one. Only a heartbeat has `health`. With `ferry-agent init --share minimal`, it leaves out "
        "`load`, `captions`, `other_captions` and `statistics`, and nothing tells what the images look like or are of.",
        table(HEAD, fields(DeviceReport, made)),
        "Events:",
        table(("event", "meaning"), events),
        f"An example:\n\n```json\n{json.dumps(json.loads(made.canonical()), indent=1)}\n```",
        "#### Requests to the gateway {#gateway}",
        "The first line of a request with reports is `POST /v1/reports HTTP/1.1`, below the path of the gateway's address. The body is the lines of the "
        "reports. Whoever is on the way sees the device's address and the time, but with `https` no report. The headers:",
        table(("header", "example", "meaning", "bytes"), headers),
        "`ferry-agent enroll` sends one document to `POST /v1/enroll`, as `application/json`. `ferry-agent doctor` asks for `GET /healthz`, and sends "
        "nothing with it.",
        table(HEAD, fields(Enrolment, enrolment)),
    )


def _requests() -> str:
    sent = example.request_headers()
    headers = [(code(name), plain(value), REQUEST[name], str(len(f"{name}: {value}\r\n"))) for name, value in sent.items()]
    return joined(
        "### Requests to the repository {#requests}",
        "If the repository is a folder, nothing is sent. If it is a web server, the agent sends HTTP requests without a body, cookies "
        "or an id of the device, and without an account unless the address has one. The server, and whoever is on the way to it, also sees the device's address and the time of the request. "
        "With `http` in place of `https`, they see all of this in the open.",
        "The first line of a request is `GET /PATH HTTP/1.1`, with one of these paths below the address of the repository:",
        table(("path", "when, and what it tells"), ((code(path), said) for path, said in PATHS.items())),
        "The headers:",
        table(("header", "example", "meaning", "bytes"), headers),
    )


def _endpoint() -> str:
    image, error, status = example.served()
    names = {**image, **error}
    return joined(
        "### The endpoint on the device {#endpoint}",
        "`ferry-agent serve` answers on a Unix socket for its owner and group, or on a port of the loopback interface, which other "
        "machines cannot reach. It refuses requests of web pages. Of a device's channels, this is the only one with images and captions, and it does not leave the device.",
        "`POST /generate` takes a JSON object and answers with a PNG:",
        table(("field", "value", "meaning"), ((code(name), *said) for name, said in ASKED.items())),
        "`GET /status` answers with a JSON object:",
        table(("field", "meaning"), ((code(name), STATUS[name]) for name in status)),
        "An error is a JSON object with the field `error`, a sentence. Headers of the answers:",
        table(("header", "meaning"), ((code(name), ANSWER[name]) for name in names)),
    )


def _device_never() -> str:
    return joined(
        "### What never leaves a device {#device-never}",
        "- **Images and captions.** No document and no request that a device sends has a field for them. A heartbeat counts images: how many had each "
        "caption of a list that the release brings, and how many had others. `test_device_sends_no_caption_no_image_and_no_key` "
        "lets a device draw, update and report, and searches everything that it sent.\n"
        "- **The device's private key** (`device.key`). Its public half is printed by `ferry-agent init`, and a person brings it to the factory. "
        "`test_key_is_private_and_kept` and the test above hold this.\n"
        "- **Other fields.** `test_report_of_other_form_refused` refuses reports with more, `test_page_lists_what_a_device_asks_for` compares this page with "
        "the requests of a real update.",
        "## From the plant {#plant}",
    )


def _published() -> str:
    manifest, _ = example.manifest()
    policy, policy2 = example.policy(), example.policy2()
    with example.repository() as made:
        rows = list(metadata_rows(made.metadata))
        sizes = {name: path.stat().st_size for name, path in made.files()}
    total = sum(size for name, size in sizes.items() if name in newest_of(sizes))
    return joined(
        "### The published repository {#repository}",
        "`ferry` copies the signed repository to `stores.publish`: a folder, or an S3 bucket. Everybody who can fetch from there can read it; "
        "signatures protect it against changes, and nothing in it is encrypted.",
        f"**Metadata** (TUF), in `metadata/`. The files of the example that a new device fetches have {total:,} bytes in all.",
        table(("field", "files", "meaning", "bytes"), rows),
        f"**Manifests**, in `targets/models/LINE/CLASS/`. The example has {len(manifest.canonical()):,} bytes.",
        table(HEAD, fields(Manifest, manifest)),
        f"**Policies**, in `targets/rollout/LINE/`. The example has {len(policy.canonical()):,} bytes.",
        table(HEAD, fields(Policy, policy)),
        f"**Policies 2**, `HASH.CLASS.2.json` beside them, which agents from 0.3 on read in their place. The example has "
        f"{len(policy2.canonical()):,} bytes. Whoever can read the repository learns the ids and the tags that `first`, `only` and `never` name.",
        table(HEAD, fields(Policy2, policy2)),
        "**Files of bundles**, in `objects/`, named by their hashes. Together they are as large as the model.",
        table(("file", "content"), ((code(role), said) for role, said in FILES.items())),
        "**Deltas**, in `targets/deltas/LINE/CLASS/`: the differences between the files of two bundles, in the form that "
        "[delta-format](delta-format.md) describes.",
        "#### sampler.json {#sampler}",
        table(HEAD, fields(SamplerTable, example.sampler())),
        "#### reference.json {#reference}",
        table(HEAD, fields(Reference, example.reference())),
    )


def _mlflow() -> str:
    tags = [key for function in ("data_tags", "version_tags", "code_tags") for key in keys_in(function)]
    params = [*ModelConfig.model_fields, *Sampler.model_fields, *keys_in("_log", "params")]
    files = [
        *(f"{part}/{name}" for part, names in PARTS.items() for name in names),
        "scorecard.json",
        "decision.json",
        "environment.txt",
    ]
    return joined(
        "### MLflow {#mlflow}",
        "`stores.mlflow` is a database in the workspace, or the address of a server. MLflow's own telemetry is off.",
        "**Tags** of runs and versions. Besides these, a run has MLflow's own tags: the user's name in the operating system, the source `ferry`, "
        "the Git commit, the run around it; and `workspace`, which is the machine's name and the path of the workspace.",
        table(("tag", "meaning"), ((code(tag), TAGS[tag]) for tag in tags)),
        f"**Parameters**: {', '.join(map(code, dict.fromkeys(params)))}.",
        "**Metrics**: loss, learning rate and load of the experts at each recorded step; and the figures of the scorecard.",
        "**Inputs**: repository, commit, folder, hash, number of files and bytes of the data revision; not the data.",
        "**Files** of a version, and sample pictures of its training (**generated images**):",
        table(("file", "content"), ((code(name), ARTIFACTS[name]) for name in files)),
        "A view of the model as MLflow's ONNX flavour holds the graph and the weights once more.",
        "#### lineage.json {#lineage}",
        table(HEAD[:3], (row[:3] for row in fields(Lineage))),
        "#### scorecard.json {#scorecard}",
        table(HEAD[:3], (row[:3] for row in fields(Scorecard))),
        "#### decision.json {#decision}",
        table(HEAD[:3], (row[:3] for row in fields(Decision))),
    )


def _others() -> str:
    return joined(
        "### DVC remote {#dvc}",
        "`stores.data` is a folder in the workspace, or an S3 bucket. `ferry data add` sends **every file of the data folder** there: the images "
        "as they are, and `metadata.jsonl` with all captions. An object is named by its md5; one more object lists the names and hashes of a "
        "revision's files. Nothing is encrypted, and nothing is removed when you remove images from the data. Git keeps hashes and data reports in the "
        "workspace; `ferry` never pushes them.",
        "### Prefect {#prefect}",
        "Without `PREFECT_API_URL`, `ferry` starts a Prefect server for itself, which only its own user can reach. With it, the named server "
        "learns of each run:",
        table(("flow or task", "what the server learns"), ((code(name), RUNS[name]) for name in prefect_names())),
        "It also gets the log lines of the runs, the message of an error, and artifacts: progress, a table of the results, the gate's decision with all its "
        "checks (which name captions), and sample pictures (**generated images**). `ferry serve` also tells it names, schedules and parameters of these flows. Results of tasks stay in the "
        "workspace. Prefect's own telemetry is off.",
        "### Database {#database}",
        "`stores.database` is a file in the workspace, or PostgreSQL. It holds the ledger (each decision with its subject, time, person, reason and facts, and "
        "its signature) and the fleet (ids, public keys, tags and signed reports of devices; tokens as hashes).",
        "### Webhooks {#webhooks}",
        "`ferry` sends no webhooks. `ferry serve --webhooks` receives MLflow's, and answers with a status and a sentence.",
        "### Pages {#pages}",
        "`ferry report` and `ferry rate` write self-contained HTML files, which load nothing from elsewhere. The report holds figures, prices, names of "
        "devices, generated images and held-out images. A rating page holds generated images and captions. `ferry rate --serve` shows its page to "
        "whoever knows its address, which cannot be guessed.",
    )


def _alerts() -> str:
    return joined(
        "### Alerts {#alerts}",
        "If `[alerts]` in ferry.toml names a webhook or a command, each change of a state is sent there as one JSON object: `id`, `workspace` "
        "(the folder's name), `what` (such as `promotion surfaces/I/full`), `state`, `before`, `since` and `text`, a sentence. The sentence "
        "quotes an error or the reason of a decision, which may name captions. The headers are `webhook-id`, `webhook-timestamp` and "
        "`webhook-signature`; the secret itself is never sent.",
    )


def _plant_never() -> str:
    return joined(
        "### What never leaves the plant {#plant-never}",
        "- **Private keys.** They stay in `keys/`, which is not published and not under Git; the repository holds public keys. "
        "`test_repository_holds_no_private_key` searches all published files.\n"
        "- **Training images**, except to `stores.data`. The repository holds none: a manifest names a closed list of files "
        "(`test_manifest_lists_closed_set`).\n"
        "- **Telemetry.** The tests pass with the network cut off (`make test-offline`), and `test_libraries_are_told_to_send_nothing` holds the switches "
        "of Prefect, MLflow, DVC and ONNX Runtime. `test_device_behind_a_proxy_and_with_a_private_authority_updates` holds that a device asks a proxy "
        "for its repository only.",
    )


# Rows


def fields(model: type[BaseModel], made: BaseModel | None = None) -> list[Row]:
    """List the fields of a document: path, kind of value, meaning, and bytes in an example.

    Args:
        model: the document.
        made: an example; None: the bytes are left empty.
    """
    return list(_fields(model, made.model_dump(mode="json") if made else None, ""))


def _fields(model: type[BaseModel], value: Any, prefix: str) -> Iterator[Row]:
    schema = model.model_json_schema()
    for name, info in model.model_fields.items():
        inner, many = _document_in(info.annotation)
        held = value.get(name) if isinstance(value, dict) else None
        if inner is None:
            size = (
                str(len(json.dumps({name: held}, separators=(",", ":"))) - 2) if isinstance(value, dict) and name in value else ""
            )
            yield code(prefix + name), kind(schema["properties"][name], schema), sentence(info.description or ""), size
            continue
        below = next(iter(held.values() if isinstance(held, dict) and many == "{}" else held or [None])) if many else held
        yield from _fields(inner, below, f"{prefix}{name}{'[]' if many == '[]' else '.NAME' if many else ''}.")


def _document_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the document that a field holds, and whether it holds a list "[]" or a table "{}" of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for part in get_args(annotation):
        inner, many = _document_in(part)
        if inner is not None:
            form = getattr(annotation, "__origin__", None)
            return inner, "[]" if form is list else "{}" if form is dict else many
    return None, ""


def metadata_rows(folder: Path) -> Iterator[Row]:
    """List the fields of all metadata files: path, files that have it, meaning, and the most bytes that it takes.

    Raises:
        KeyError: a file has a field that this page does not explain.
    """
    found: dict[str, tuple[set[str], int]] = {}
    for path in sorted(folder.glob("*.json")):
        role = path.name.removesuffix(".json").rpartition(".")[2]
        for name, value in leaves_of(json.loads(path.read_bytes())):
            files, size = found.get(name, (set[str](), 0))
            found[name] = files | {role}, max(size, len(json.dumps(value)))
    custom = {f"signed.targets.TARGET.custom.{name}": info.description or "" for name, info in Release.model_fields.items()}
    meanings = METADATA | custom
    roles = {path.name.removesuffix(".json").rpartition(".")[2] for path in folder.glob("*.json")}
    for name, (files, size) in sorted(found.items(), key=lambda row: list(meanings).index(row[0])):
        yield code(name), "all" if files == roles else ", ".join(sorted(files)), sentence(meanings[name]), str(size)


NAMED = {"keys": "KEYID", "roles": "ROLE", "meta": "FILE", "targets": "TARGET"}
"""Tables of the metadata whose keys are names."""


def leaves_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a metadata file with its path, in which names of keys, roles and files are replaced by their kind."""
    if isinstance(value, dict):
        named = NAMED.get(path.rpartition(".")[2])
        for key, part in value.items():
            yield from leaves_of(part, f"{path}.{named or key}".lstrip("."))
    elif isinstance(value, list):
        for part in value:
            yield from leaves_of(part, f"{path}[]")
    else:
        yield path, value


def newest_of(sizes: Mapping[str, int]) -> set[str]:
    """Return the names of the newest metadata files."""
    newest: dict[str, tuple[int, str]] = {}
    for name in sizes:
        if found := re.fullmatch(r"metadata/(?:(\d+)\.)?(\w+)\.json", name):
            newest[found[2]] = max(newest.get(found[2], (-1, "")), (int(found[1] or 0), name))
    return {name for _, name in newest.values()}


def keys_in(function: str, variable: str = "") -> list[str]:
    """List the keys of the dictionaries that a function of `registry` writes out, as its source has them.

    Args:
        function: name of the function.
        variable: only dictionaries that are assigned to this variable, or added to it; "": all.

    Raises:
        LookupError: there is no such function.
    """
    for path in sorted((ROOT / "registry").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                return list(dict.fromkeys(_keys(node, variable)))
    raise LookupError(f"registry has no function {function}; name the one that sends these keys now")


def _keys(node: ast.AST, variable: str) -> Iterator[str]:
    for part in ast.walk(node):
        if variable and isinstance(part, ast.Assign | ast.AugAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
                yield from _keys(part.value, "")
        elif not variable and isinstance(part, ast.Dict):
            yield from (_key(key) for key in part.keys if key is not None)
        elif not variable and isinstance(part, ast.DictComp):
            yield _key(part.key)


def _key(key: ast.expr) -> str:
    if isinstance(key, ast.Constant):
        return str(key.value)
    if isinstance(key, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "SPACE" for part in key.values)
    return ast.unparse(key)


def prefect_names() -> list[str]:
    """List the names of all flows and tasks."""
    found: list[str] = []
    for path in sorted((ROOT / "flows").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                calls = [c for c in node.decorator_list if isinstance(c, ast.Call) and ast.unparse(c.func) in ("flow", "task")]
                found += [
                    str(w.value.value) for c in calls for w in c.keywords if w.arg == "name" and isinstance(w.value, ast.Constant)
                ]
    return sorted(found, key=list(RUNS).index)

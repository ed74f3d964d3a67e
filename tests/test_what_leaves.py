"""The page of what leaves (docs/what-leaves.md) beside what really leaves: requests and reports of a device, files of a repository."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import BaseModel

from infra.site import example, leaves
from model.scorecard import Lineage, Scorecard
from ota.agent.beat import Beat
from ota.manifest import Manifest, Reference, SamplerTable
from ota.policy import Policy, Policy2
from ota.report import DeviceReport, Enrolment, SealedReport, open_line
from registry.selection import Decision
from tests.fleet_kit import Device, Field, name_policy
from tests.network_kit import Inbox
from tests.test_policy2 import policy2

pytest_plugins = ("tests.fleet_kit",)

ROOT = Path(__file__).parent.parent
CAPTION, SEED = "zq7 wx", 918_273_645
DOCUMENTS: list[type[BaseModel]] = [
    SealedReport,
    DeviceReport,
    Enrolment,
    Manifest,
    Policy,
    Policy2,
    SamplerTable,
    Reference,
    Lineage,
    Scorecard,
    Decision,
]


@contextmanager
def recording(folder: Path) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """Serve a folder; yield its address, and the line and the headers of each request as they arrive."""
    seen: list[tuple[str, dict[str, str]]] = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def do_GET(self) -> None:
            seen.append((self.requestline, dict(self.headers.items())))
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def pattern_of(path: str) -> re.Pattern[str]:
    """Turn a path of the page into a pattern, such as metadata/N.root.json."""
    parts = {"N": r"\d+", "HASH": "[0-9a-f]{64}", "BUNDLE": "[0-9a-f]{64}", "OLD": "[0-9a-f]{64}", "NEW": "[0-9a-f]{64}"}
    parts |= {"LINE": "shapes", "CLASS": "edge"}
    return re.compile(re.sub(r"\b[A-Z]+\b", lambda word: parts[word[0]], re.escape(path)))


def test_page_lists_what_a_device_asks_for(offered: Field, tmp_path: Path):
    with recording(offered.repository.folder) as (address, seen):
        offered.device.configure(repository=address)
        assert offered.device.update().way == "delta"
        (tmp_path / "new").mkdir()
        fresh = Device.init(tmp_path / "new" / "device", offered.repository, address=address, name="dev-2")
        assert fresh.update().way == "full"
        name_policy(offered.repository, policy2(offered.release))
        assert fresh.update().reason == "release 2 is installed"
    assert {line.split()[0] for line, _ in seen} == {"GET"}
    asked = {line.split()[1].lstrip("/") for line, _ in seen}
    known = {path: pattern_of(path) for path in leaves.PATHS}
    assert [name for name in asked if not any(pattern.fullmatch(name) for pattern in known.values())] == []
    assert [path for path, pattern in known.items() if not any(map(pattern.fullmatch, asked))] == []
    assert {name for _, headers in seen for name in headers} == leaves.REQUEST.keys() - {"Range", "Authorization"}
    assert example.request_headers().keys() == leaves.REQUEST.keys()


@pytest.mark.parametrize("share", ["all", "minimal"])
@pytest.mark.parametrize("way", ["folder", "gateway"])
def test_device_sends_no_caption_no_image_and_no_key(offered: Field, tmp_path: Path, way: str, share: str):
    device, picture = offered.device, tmp_path / "picture.png"
    with recording(offered.repository.folder) as (address, seen), Inbox(tmp_path) as gateway:
        device.configure(repository=address, share=share, **({"reports": gateway.address} if way == "gateway" else {}))
        device.command("generate", CAPTION, "-o", str(picture))
        device.update()
        device.command("generate", CAPTION, "-o", str(picture), "--seed", str(SEED))
        device.home.disk.replace("beat.json", Beat(last=0, due=0).canonical())
        device.command("report", "--beat")
        device.command("rollback")
        device.command("report")
    lines = [path.read_bytes() for path in (offered.folder / "reports").glob("*.json")]
    lines += [line for posted in gateway.posted for line in posted.lines]
    opened = [open_line(line).report for line in lines]
    assert {"starting", "confirmed", "rolled_back", "alive"} <= {report.event for report in opened}
    (health,) = [report.health for report in opened if report.health]
    assert (health.images, health.share) == (1, share)
    assert bool(health.load and health.statistics) == (share == "all")
    headers = json.dumps([posted.headers for posted in gateway.posted]).encode()
    sent = b"\n".join([json.dumps(seen).encode(), headers, *lines])
    key = (device.root / "device.key").read_bytes()
    for secret in (
        CAPTION.encode(),
        CAPTION.encode().hex().encode(),
        str(SEED).encode(),
        key,
        key.hex().encode(),
        b"PNG",
        picture.read_bytes()[-200:-20],
    ):
        assert secret not in sent
    assert max(map(len, lines)) < 3_000
    assert len(picture.read_bytes()) > 200
    for posted in gateway.posted:
        assert posted.headers.keys() == {name.lower() for name in leaves.POSTED} - {"authorization"}


def test_page_lists_the_headers_of_a_request_with_reports():
    assert example.posted_headers().keys() == leaves.POSTED.keys()


def test_repository_holds_no_private_key():
    with example.repository() as published:
        private = [path.read_bytes() for path in published.keys.folder.rglob("*.pem")]
        texts = {path: path.read_bytes() for path in published.folder.rglob("*") if path.is_file()}
    assert len(private) > 10
    lines = {line for pem in private for line in pem.splitlines() if len(line) > 40 and b"-----" not in line}
    assert len(lines) >= len(private)
    for path, text in texts.items():
        assert b"PRIVATE KEY" not in text, path
        assert not any(line in text for line in lines), path


def test_libraries_are_told_to_send_nothing(tmp_path: Path):
    script = (
        "import os, sys, json; from pathlib import Path; from flows.workspace import configure_environment;"
        "configure_environment(Path(sys.argv[1])); print(json.dumps(dict(os.environ)))"
    )
    switches = (
        "DO_NOT_TRACK",
        "MLFLOW_DISABLE_TELEMETRY",
        "DVC_NO_ANALYTICS",
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "ORT_DISABLE_TELEMETRY",
    )
    clean = {name: value for name, value in os.environ.items() if name not in switches}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=clean, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert [told.get(name) for name in switches] == ["true", "true", "1", "false", "1"]


def test_runtime_is_told_to_send_nothing_wherever_it_is_loaded():
    clean = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for module in ("model", "ota.agent"):
        script = f"import {module}, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
        assert (
            subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True).stdout == "1\n"
        )
    # Nothing else loads it: each of these files belongs to one of the two packages.
    code = [path for package in ("flows", "infra", "model", "ota", "registry") for path in (ROOT / package).rglob("*.py")]
    loading = {path.relative_to(ROOT).parts[0] for path in code if "import onnxruntime" in path.read_text()}
    assert loading == {"model", "ota"}


def schema_fields(schema: dict[str, Any], root: dict[str, Any], at: str = "") -> Iterator[str]:
    """Yield the path of each field of a JSON schema, written as on the page."""
    for name, value in schema["properties"].items():
        yield from schema_field(value, root, f"{at}{name}")


def schema_field(value: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    part = next((p for p in value.get("anyOf", [value]) if p.get("type") != "null"), value)
    if "$ref" in part:
        part = root["$defs"][part["$ref"].rpartition("/")[2]]
    if "properties" in part:
        yield from schema_fields(part, root, f"{at}.")
    elif "$ref" in part.get("items", {}):
        yield from schema_field(part["items"], root, f"{at}[]")
    elif "$ref" in part.get("additionalProperties", {}):
        yield from schema_field(part["additionalProperties"], root, f"{at}.NAME")
    else:
        yield at


@pytest.mark.parametrize("model", DOCUMENTS)
def test_every_field_of_a_document_is_on_the_page(model: type[BaseModel]):
    schema = model.model_json_schema()
    wanted = list(schema_fields(schema, schema))
    shown = re.findall(r"^\| `(.+?)` \|", leaves.table(leaves.HEAD, leaves.fields(model)), re.MULTILINE)
    assert shown == wanted
    assert [row for row in leaves.fields(model) if len(row[2]) < 4] == []


def test_page_explains_nothing_that_is_not_there():
    with example.repository() as published:
        named = {row[0].strip("`") for row in leaves.metadata_rows(published.metadata)}
    assert {name for name in named if ".custom." not in name} == leaves.METADATA.keys()
    tags = {tag for function in ("data_tags", "version_tags", "code_tags") for tag in leaves.keys_in(function)}
    assert tags == leaves.TAGS.keys()
    image, error, status = example.served()
    assert {*image, *error} == leaves.ANSWER.keys()
    assert status.keys() == leaves.STATUS.keys()


def test_every_flow_and_task_is_on_the_page():
    text = "".join(path.read_text() for path in (ROOT / "flows").rglob("*.py"))
    assert set(re.findall(r"@(?:flow|task)\(\s*name=\"([^\"]+)\"", text)) == leaves.RUNS.keys()
    assert len(re.findall(r"^@(?:flow|task)\b", text, re.MULTILINE)) == len(leaves.RUNS)


def test_golden_file_holds_what_the_page_says():
    tree = ast.parse((ROOT / "model" / "export.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.savez"]
    assert [[word.arg for word in call.keywords] for call in calls] == [["ids", "seeds", "t", "r", "velocity"]]
    (count,) = (
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "GOLDEN_IMAGES"
        and isinstance(node.value, ast.Constant)
    )
    assert f"up to {count} captions" in leaves.FILES["golden"]

"""Prefect's page as a person meets it: a fixed port, names, logs, descriptions, and an approval by form in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from flows.serve import server
from flows.setup import create
from flows.workspace import Workspace
from registry.champions import champion_of
from tests.test_browser import FLAGS, browser  # noqa: F401 - a fixture
from tests.test_flows import SETTINGS, SUBJECT
from tests.test_slow import FERRY, PATIENCE, clean_environment, prepared, wait_for

pytestmark = pytest.mark.slow
PET_NAME = re.compile(r"[a-z]+-[a-z]+")  # Prefect's own names, such as hot-alpaca
LOOK = 1.0  # seconds between two looks at a page


@dataclass
class Served:
    """A workspace that `ferry serve` serves, with a version that waits for a person."""

    workspace: Workspace
    process: subprocess.Popen[str]
    port: int
    said: Path

    @property
    def secret(self) -> str:
        return (self.workspace.work / "prefect/credentials").read_text().strip()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect's API."""
        sent = json.dumps(body).encode() if body is not None else None
        known = base64.b64encode(self.secret.encode()).decode()
        headers = {"Authorization": f"Basic {known}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api{path}", sent, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def runs(self) -> dict[str, dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("/flow_runs/filter", {"sort": "ID_DESC", "limit": 100})
        return {run["name"]: run for run in found}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("factory"), free_port()
    workspace = prepared(folder / "ws", SETTINGS.replace("schema = 1", "schema = 1\nrequire_approval = true", 1))
    command = [*FERRY, "-w", str(workspace.root), "serve", "--look-every", "1", "--port", str(port)]
    said = folder / "said"
    with said.open("w") as output:
        process = subprocess.Popen(command, stderr=output, text=True, env=clean_environment())
    made = Served(workspace, process, port, said)
    try:
        wait_for(lambda: "is done" in said.read_text() and "waits for a person" in said.read_text(), process)
        wait_for(lambda: any(run["state_name"] == "Suspended" for run in made.runs().values()), process)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_serve_says_what_begins_what_came_of_it_and_what_waits(served: Served):
    told = served.said.read_text()
    assert f"Prefect's page is http://127.0.0.1:{served.port}\n" in told
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d retrain shapes on data [0-9a-f]{12} begins", told)
    assert re.search(r"shapes/I/full version 1: pending, ", told)
    assert re.search(r"retrain shapes on data [0-9a-f]{12} is done", told)
    assert f"the form behind Resume at http://127.0.0.1:{served.port}/login?redirect=/runs/flow-run/" in told


def test_runs_and_tasks_are_named_for_people(served: Served):
    wait_for(lambda: any("scheduled for" in name for name in served.runs()), served.process)
    names = sorted(served.runs())
    assert not [name for name in names if PET_NAME.fullmatch(name)]
    assert "approve shapes/I/full version 1" in names
    assert any(re.fullmatch(r"retrain shapes on data [0-9a-f]{12}", name) for name in names)
    assert any(re.fullmatch(r"retrain shapes, scheduled for \d{4}-\d\d-\d\d 03:00 UTC", name) for name in names)
    tasks = [row["name"] for row in served.ask("/task_runs/filter", {"limit": 100})]
    for verb in ("train", "export", "evaluate", "register"):
        assert f"{verb} shapes/I/full" in tasks
    assert any(re.fullmatch(r"pull data [0-9a-f]{12} of shapes", name) for name in tasks)


def test_runs_log_their_phases_and_their_loss(served: Served):
    def messages() -> list[str]:
        return [row["message"] for row in served.ask("/logs/filter", {"limit": 200})]

    wait_for(lambda: any("choose Resume" in line for line in messages()), served.process)  # Prefect sends logs in batches
    logs = messages()
    for said in (
        "train shapes/I/full: 60 steps from noise",
        "register shapes/I/full in MLflow and in the ledger",
        "shapes/I/full version 1: pending",
    ):
        assert said in logs, logs
    assert any(re.search(r"train shapes/I/full: \d+ of 60, .*loss \d", line) for line in logs)


def test_artifacts_and_deployments_say_what_they_are(served: Served):
    artifacts = {row["key"]: row["description"] for row in served.ask("/artifacts/filter", {"limit": 100})}
    assert artifacts["decision-shapes-i-full"] == "shapes/I/full version 1: promote"
    assert artifacts["samples-shapes-i-full"] == "What shapes/I/full version 1 draws"
    assert artifacts["results-shapes"].startswith("What came of data revision ")
    assert "draw-shapes-i-full-challenger" in artifacts
    deployments = {row["name"]: row["description"] for row in served.ask("/deployments/filter", {})}
    assert "**shapes**" in deployments["ws-shapes"]
    assert "waits for a person" in deployments["ws"]
    assert all("Args:" not in (text or "Args:") for text in deployments.values())


def test_status_shows_that_serve_runs_and_what_waits(served: Served):
    done = subprocess.run([*FERRY, "-w", str(served.workspace.root), "status"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ferry approve shapes/I/full 1 --reason ..." in done.stdout
    assert re.search(rf"ferry serve for \d+ (s|min|h) \(process {served.process.pid}\)", done.stdout)


def test_no_run_is_called_late(served: Served):
    """Ask for a second run beside the first; whatever waits for its turn stays "Scheduled"."""
    settings: dict[str, Any] = served.ask("/admin/settings")
    assert settings["server"]["services"]["late_runs"]["enabled"] is False


def test_port_that_is_taken_is_named(tmp_path: Path):
    from flows.errors import ServerError

    workspace = create(tmp_path / "ws", ["shapes"])
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ServerError, match=r"cannot be served at port .* choose another with --port"),
        server(workspace, taken.getsockname()[1]),
    ):
        pass


@dataclass
class Page:
    """A tab of a headless browser, driven as a person does: by clicks and keys."""

    tab: ClientConnection
    number: int = field(default=0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.tab.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer: dict[str, Any] = json.loads(self.tab.recv(timeout=PATIENCE))
            if answer.get("id") == self.number:
                return dict(answer["result"])

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def shows(self, script: str, patience: float = PATIENCE / 6) -> Any:
        """Return what a script returns as soon as that is something; None where it never is."""
        deadline = time.monotonic() + patience
        while not (found := self.evaluate(script)):
            if time.monotonic() > deadline:
                return None
            time.sleep(LOOK)  # waiting for a page, not guessing how long it takes
        return found

    def until(self, script: str) -> Any:
        """Wait until a script returns something, and return that."""
        found = self.shows(script, PATIENCE)
        if found is None:
            pytest.fail(f"the page never showed {script}; it shows {self.evaluate('document.body.innerText')}")
        return found

    def click(self, element: str) -> None:
        """Send a click to an element that stands still and that nothing covers, because a page that moves swallows the click."""
        x, y = self.until(
            f"(() => {{ const e = {element}; if (!e) return null; e.scrollIntoView({{block: 'center', behavior: 'instant'}}); "
            "const box = e.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2; "
            "const met = document.elementFromPoint(x, y), before = String(window.lastPlace); window.lastPlace = [x, y]; "
            "return box.width && before === String([x, y]) && met && e.contains(met) ? [x, y] : null; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, element: str, text: str) -> None:
        self.click(element)
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@pytest.fixture
def page(browser: str, tmp_path: Path) -> Iterator[Page]:  # noqa: F811 - the fixture
    command = [
        browser,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--remote-debugging-port=0",
        "--window-size=1400,1100",
        "about:blank",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "DevTools listening on" in line)
        with urllib.request.urlopen(f"http://{line.split('//')[1].split('/')[0]}/json", timeout=60) as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.communicate(timeout=60)
        shutil.rmtree(tmp_path / "profile", ignore_errors=True)


def button(text: str) -> str:
    return f"[...document.querySelectorAll('button')].find(b => b.innerText.trim() === '{text}')"


def test_person_approves_by_form_in_a_browser(served: Served, page: Page):
    """Open the address that `ferry serve` prints, type the password, and approve: the ledger then has a champion."""
    address = re.findall(r"the form behind Resume at (\S+)", served.said.read_text())[0]
    page.call("Page.navigate", url=address)
    page.write("document.querySelector('input')", served.secret)
    for kind in ("keyDown", "keyUp"):
        page.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key="Enter",
            code="Enter",
            windowsVirtualKeyCode=13,
            text="\r" * (kind == "keyDown"),
        )
    page.until("/flow-run/.test(location.pathname)")
    page.click(button("Resume"))
    page.until("document.body.innerText.includes('it is recorded, and nobody checks it')")
    if folder := os.environ.get("FERRY_PICTURES"):
        page.picture(Path(folder) / "prefect-form.png")
    fields = "[...document.querySelectorAll('[role=dialog] textarea, .p-modal textarea, textarea')]"
    page.write(f"{fields}[0]", "Anna")
    page.click("document.querySelector('input[type=checkbox]')?.parentElement")  # the switch hides the box itself
    page.until("document.querySelector('input[type=checkbox]').checked")
    page.write(f"{fields}.at(-1)", "looks as the parts do")
    page.until(f"{fields}[0].value === 'Anna' && {fields}.at(-1).value === 'looks as the parts do'")
    closed = "!document.body.innerText.includes('it is recorded, and nobody checks it')"
    for _ in range(3):  # a person who sees the form stay presses again
        page.click(button("Submit"))
        if page.shows(closed):
            break
    page.until(closed)
    wait_for(lambda: champion_of(served.workspace, SUBJECT) is not None, served.process)
    entry = [e for e in served.workspace.ledger.entries() if e.kind == "promotion"][-1]
    assert (entry.who, entry.why) == ("Anna (in Prefect, unverified)", "looks as the parts do")

"""Control characters in file names, captions, messages and names of people reach no terminal, and forge no line."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows import telling, triggers
from flows.cli import app
from flows.cli.progress import bars
from flows.progress import advance
from flows.workspace import Workspace
from registry import rating, sheets, trace
from registry.figures import Measured
from tests.conftest import write_images
from tests.test_rate import rated

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m"  # sets a terminal's title, clears it, and colours it by an 8-bit control character
FORGED = "fine\nferry: all is well\r\x85"
SUBJECT = "shapes/I/full"


def ferry(root: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["-w", str(root), *words])


def harmless(result: Result) -> str:
    """Check that an answer holds nothing that a terminal obeys, and return it."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", result.output), repr(result.output)
    assert "\nferry: all is well" not in result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a workspace whose images, captions and messages are hostile."""
    made = tmp_path_factory.mktemp("raw") / "ws"
    assert ferry(made, "init", str(made), "--line", "shapes").exit_code == 0
    folder = write_images(made / "data/shapes", 40)
    (folder / f"{EVIL}.png").write_bytes(b"no image")
    (folder / "000.png").rename(folder / f"a{EVIL}.png")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["file_name"] = f"a{EVIL}.png"
    for row in rows[1:9]:
        row["text"] = f"{EVIL} {FORGED}"
    rows.append({"file_name": f"{EVIL}.png", "text": FORGED})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_data_commands(root: Path):
    added = harmless(ferry(root, "data", "add", "shapes", "-m", f"{EVIL} {FORGED}"))
    assert "\\x1b" in added
    assert "\\x1b" in harmless(ferry(root, "data", "log", "shapes"))
    assert "\\x1b" in harmless(ferry(root, "data", "status", "shapes"))
    (root / "data/shapes" / f"b{EVIL}.png").write_bytes((root / "data/shapes/001.png").read_bytes())
    assert "\\x1b" in harmless(ferry(root, "data", "status", "shapes"))
    (root / "data/shapes" / f"b{EVIL}.png").unlink()
    harmless(ferry(root, "data", "diff", "shapes", "HEAD", "HEAD"))
    harmless(ferry(root, "data", "status", EVIL))


def test_message_of_a_commit_that_git_wrote(root: Path):
    subprocess.run(
        ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--amend", "-m", f"x{EVIL}"],
        check=True,
    )
    assert "x\\x1b" in harmless(ferry(root, "data", "log", "shapes"))


def test_wrong_names(root: Path):
    for words in (("promote", EVIL, "1"), ("history", f"{EVIL}/I/full"), ("trace", EVIL), ("release", EVIL), ("evaluate", f"{EVIL}/I/full"),
                  ("rollout", "status", f"shapes/{EVIL}"), ("fleet", "enroll", EVIL, "00"), ("trigger", EVIL, "--reason", EVIL),
                  ("rate", f"{EVIL}/I/full"), ("rate", SUBJECT, "--answers", f"/nowhere/{EVIL}")):  # fmt: skip
        harmless(ferry(root, *words))


def test_reasons_and_raters(root: Path, monkeypatch: pytest.MonkeyPatch):
    workspace = Workspace(root)
    try:
        workspace.ledger.append("pending", SUBJECT, f"{EVIL} {FORGED}", {"version": 1, "weights": "0" * 64}, who=EVIL)
        workspace.ledger.append(
            "rating", SUBJECT, f"{EVIL}, blind, preferred", rated(19, 0, rater="Anna\x9b31m\u202e").model_dump(mode="json")
        )
    finally:
        workspace.ledger.close()
    assert "\\x1b" in harmless(ferry(root, "approve"))
    assert "\\x1b" in harmless(ferry(root, "history"))
    with monkeypatch.context() as patch:
        patch.setattr(
            sheets, "verdicts", lambda *_: [rating.judge([rated(24, 7)])[0].model_copy(update={"text": f"{EVIL} {FORGED}"})]
        )
        patch.setattr(sheets, "collect", lambda *_: [])
        assert "\\x1b" in harmless(ferry(root, "rate", SUBJECT, "--answers", "ferry.toml"))


def test_trace_and_figures():
    thing: dict[str, Any] = {"depth": 0, "kind": "data", "name": EVIL, "hashes": {}, "facts": {"message": FORGED}}
    said = trace.text_of({"of": thing, "back": [], "forward": [thing]})
    assert said.replace("\n", "").isprintable()
    assert said.count("\n") == 3
    assert "shown(" in Path(Measured.text.fget.__code__.co_filename).read_text()  # type: ignore[attr-defined]


def test_progress_and_long_running_commands(root: Path, capsys: pytest.CaptureFixture[str]):
    with bars():
        advance(f"{EVIL} {FORGED}", 1, 2)
    telling.tell(f"{EVIL} {FORGED}")
    (root / "events").mkdir(exist_ok=True)
    (root / "events" / f"{EVIL}.json").write_text("{}")
    assert list(triggers.waiting(Workspace(root))) == []
    (root / "events" / f"{EVIL}.json").unlink()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3
    assert said.replace("\n", "").isprintable()

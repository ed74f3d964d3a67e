"""What the documents show is what the programs do: commands and make targets exist, and help texts are current."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import ota
from flows import cli
from ota.agent.cli import parser as agent_parser
from tests.conftest import agent, commands_of

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/glossary.md", "infra/README.md", "ota/README.md"]
PROGRAMS = ("ferry", "ferry-agent")
HELP = re.compile(r"<!-- help: (.+?) -->\n```text\n(.*?)```", re.DOTALL)
WIDTH = 100


def shown_commands() -> list[tuple[str, str]]:
    """List every `ferry` or `ferry-agent` call that a document shows, in a block or in the text."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for line in re.findall(r"^\$ (.+)$", text, re.MULTILINE) + re.findall(r"`((?:ferry|ferry-agent)(?: [^`]+)?)`", text):
            for part in re.split(r"&&|\|", line):
                words = part.strip().split()
                if words and words[0] in PROGRAMS:
                    found.append((name, part.strip()))
    return sorted(set(found))


def command_of(words: list[str]) -> tuple[set[str], list[str]]:
    """Return the options of the command that the words call, and the words after its name."""
    if words[0] == "ferry-agent":
        commands, rest = commands_of(agent_parser()), words[1:]
        known = {option for action in agent_parser()._actions for option in action.option_strings}
        if rest and not rest[0].startswith("-"):
            assert rest[0] in commands, f"ferry-agent has no command {rest[0]}"
            known, rest = {o for action in commands[rest[0]]._actions for o in action.option_strings}, rest[1:]
        return known, rest
    command: Any = typer.main.get_command(cli.app)
    rest = words[1:]
    while getattr(command, "commands", None):
        while rest and rest[0].startswith("-"):  # options of the group itself
            options = {option: p for p in command.params for option in p.opts}
            assert rest[0] in options or rest[0] == "--help", f"{rest[0]} is not an option of {command.name}"
            rest = rest[1 if rest[0] == "--help" or options[rest[0]].is_flag else 2 :]
        if not rest or rest[0] not in command.commands:
            assert not rest, f"{words[0]} has no command {rest[0]}"
            break
        command, rest = command.commands[rest[0]], rest[1:]
    return {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}, rest


@pytest.mark.parametrize(("document", "line"), shown_commands())
def test_shown_command_exists(document: str, line: str):
    known, rest = command_of(shlex.split(line))
    for word in rest:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{document} shows {word}, which {line.split()[:2]} does not have"


def test_documents_show_the_daily_jobs():
    shown = " ".join(line for document, line in shown_commands() if document == "README.md")
    for job in (
        "ferry demo",
        "ferry init",
        "ferry retrain",
        "ferry serve",
        "ferry promote",
        "ferry rollout start",
        "ferry rollout halt",
    ):
        assert job in shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shown_help_is_current(document: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    for call, shown in HELP.findall((ROOT / document).read_text()):
        program, *words = call.split()
        if program == "ferry-agent":
            told = agent(*words, "--help").stdout
        else:
            told = CliRunner().invoke(cli.app, [*words, "--help"], prog_name=program, terminal_width=WIDTH).stdout
        assert shown.strip() == told.strip(), f"{document}: run `{call} --help` at {WIDTH} columns and paste it"


@pytest.mark.parametrize("group", ["", "data", "rollout", "fleet", "trust", "delta"])
def test_help_cuts_no_summary_at_80_columns(group: str):
    told = CliRunner().invoke(cli.app, [*group.split(), "--help"], prog_name="ferry", terminal_width=80).stdout
    summaries = told.partition("Commands:")[2].strip().splitlines()
    assert len(summaries) > 1
    assert [line for line in summaries if line.endswith("...")] == []


def test_docstring_that_begins_with_a_noun_is_found(tmp_path: Path):
    from tests.docstrings import problems

    for package in ("model", "registry", "ota", "flows", "tests"):
        (tmp_path / package).mkdir()
    (tmp_path / "model" / "a.py").write_text(
        'def good():\n    """Return 1."""\n\ndef silent(): ...\n\ndef bad():\n    """The answer."""\n\n'
        'class Of:\n    """A thing."""\n\n    @property\n    def size(self):\n        """Bytes."""\n'
    )
    (found,) = problems(tmp_path)
    assert found.startswith("model/a.py:6: the docstring of bad begins with 'The'")


def test_readme_shows_some_help():
    assert len(HELP.findall((ROOT / "README.md").read_text())) >= 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shown_make_target_exists(document: str):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)|^\$ make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE):
        assert "".join(target) in targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_link_leads_to_a_file(document: str):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / document).read_text()):
        assert (ROOT / document).parent.joinpath(target).exists(), target


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE))
    described = set(re.findall(r"^([a-z][a-z-]*):.*##", makefile, re.MULTILINE))
    assert phony == described


def test_both_wheels_declare_one_version_and_python():
    factory, device = (tomllib.loads((ROOT / name).read_text())["project"] for name in ("pyproject.toml", "ota/pyproject.toml"))
    assert factory["requires-python"] == device["requires-python"] == ">=3.11,<3.14"
    assert "version" in factory["dynamic"]
    assert "version" in device["dynamic"]
    assert f"## {ota.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_device_needs_nothing_that_the_factory_does_not_pin():
    factory, device = (
        tomllib.loads((ROOT / name).read_text())["project"]["dependencies"] for name in ("pyproject.toml", "ota/pyproject.toml")
    )
    bounds = {re.split(r"[\[<>=]", d)[0]: d for d in factory}
    for dependency in device:
        name = re.split(r"[\[<>=]", dependency)[0]
        assert dependency == bounds[name].replace("[crypto]", "")


def test_every_dependency_is_pinned_once():
    pinned = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split()]
    assert len(pinned) == len(set(pinned))
    for dependency in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert re.split(r"[\[<>=]", dependency)[0].lower() in pinned


def test_promised_tests_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "ota" / "README.md").read_text()))
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 40
    assert named <= there

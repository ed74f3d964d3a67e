"""What the documents show is what the programs do, and what the programs do is in the documents.

One direction: commands, options, make targets, links, anchors, help texts and examples that a document shows exist. The other
direction: every command, option, settings key, environment variable and exit code is in the generated reference. Those tests
find them in the programs in ways of their own, so that they notice what the generator leaves out.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import ota
from flows import cli
from flows.settings import Settings
from infra.site import environment, hooks, pages
from infra.site.text import plain
from ota.agent.cli import parser as agent_parser
from ota.delta.cli import parser as delta_parser
from ota.errors import EXIT_CODES
from tests.conftest import agent, commands_of
from tests.test_browser import browser, run  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent
PROGRAMS = ("ferry", "ferry-agent", "ferry-delta")
PARSERS = {"ferry-agent": agent_parser, "ferry-delta": delta_parser}
HELP = re.compile(r"<!-- help: (.+?) -->\n```text\n(.*?)```", re.DOTALL)
WIDTH = 100
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)


@cache
def ferry() -> Any:
    """Return the command `ferry`."""
    return typer.main.get_command(cli.app)


@cache
def generated() -> dict[str, str]:
    """Return the text of each generated page by its path in the repository."""
    return {f"docs/{path}": write() for path, write in pages.generated().items()}


@cache
def written() -> dict[str, str]:
    """Return the text of each document that people write, by path; the change log and the decisions tell of the past, too."""
    found = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("infra/*.md"), *ROOT.glob("ota/*.md")]
    past = {ROOT / "CHANGELOG.md", ROOT / "infra/DECISIONS.md"}
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(set(found) - past)}


def shown_commands() -> list[tuple[str, str]]:
    """List every call of a program that a document shows, in a block or in the text."""
    found = []
    for name, text in (written() | generated()).items():
        inline = re.findall(r"`((?:ferry|ferry-agent|ferry-delta)(?: [^`]+)?)`", text)
        for line in re.findall(r"^\$ (.+)$", text, re.MULTILINE) + inline:
            for part in re.split(r"&&|\|", re.sub(r"\s#\s.*", "", line)):
                words = re.sub(r"^\s*(?:sudo (?:-u \w+ )?)?(?:\w+=\S+ )*", "", part).split("…")[0].split()
                if words and words[0] in PROGRAMS:
                    found.append((name, " ".join(words)))
    return sorted(set(found))


def command_of(words: list[str]) -> tuple[set[str], list[str]]:
    """Return the options of the command that the words call, and the words after its name."""
    if words[0] in PARSERS:
        root = PARSERS[words[0]]()
        commands, rest = commands_of(root), words[1:]
        known = {option for action in root._actions for option in action.option_strings}
        while rest and rest[0] in known:
            rest = rest[1:]
        if rest and not rest[0].startswith("-"):
            assert rest[0] in commands, f"{words[0]} has no command {rest[0]}"
            known, rest = {o for action in commands[rest[0]]._actions for o in action.option_strings}, rest[1:]
        return known, rest
    command: Any = ferry()
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
    shown = " ".join(line for document, line in shown_commands() if document in written())
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


@pytest.mark.parametrize("document", written())
def test_shown_help_is_current(document: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    for call, shown in HELP.findall(written()[document]):
        program, *words = call.split()
        if program == "ferry-agent":
            told = agent(*words, "--help").stdout
        elif program == "ferry-delta":
            told = help_of(delta_parser(), words)
        else:
            told = CliRunner().invoke(cli.app, [*words, "--help"], prog_name=program, terminal_width=WIDTH).stdout
        assert shown.strip() == told.strip(), f"{document}: run `{call} --help` at {WIDTH} columns and paste it"


def help_of(parser: argparse.ArgumentParser, words: list[str]) -> str:
    return (commands_of(parser)[words[0]] if words else parser).format_help()


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


@pytest.mark.parametrize("document", written())
def test_shown_make_target_exists(document: str):
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    text = written()[document]
    shown = re.findall(r"`(?:[A-Z_]+=\S+ )*make ([a-z-]+)", text) + re.findall(
        r"^\$ (?:[A-Z_]+=\S+ )*make ([a-z-]+)", text, re.MULTILINE
    )
    assert set(shown) <= targets


# Links


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the anchor of each link and picture that leads into the repository."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    found = [
        *re.findall(r"\]\(([^)\s]+)(?: [^)]*)?\)", prose),
        *re.findall(r"^\[[^\]]+\]: (\S+)", prose, re.MULTILINE),
        *re.findall(r"(?:src|href)=\"([^\"]+)\"", prose),
    ]
    for target in found:
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """Return the anchors of a document, as MkDocs and as code hosts make them."""
    found: set[str] = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for title, given in re.findall(r"^#+ (.+?)(?: \{#([\w-]+)\})?$", prose, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        plainly = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
        found |= {given} if given else set()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plainly).strip()))
        found.add(re.sub(r"[^\w -]", "", words).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("document", [*written(), *generated()])
def test_link_leads_somewhere(document: str):
    every = written() | generated()
    for path, anchor in links(every[document]):
        target = os.path.normpath(ROOT / Path(document).parent / path) if path else str(ROOT / document)
        name = Path(target).relative_to(ROOT).as_posix()
        assert name in every or Path(target).exists(), f"{document} links to {path}, which is not there"
        assert not document.startswith("docs/") or name.startswith("docs/"), f"{document} links to {path}, outside of the site"
        if anchor and name in every:
            assert anchor in anchors(every[name]), f"{document} links to {path}#{anchor}, which has no such heading"


def test_broken_link_is_noticed():
    text = "# A *title*, with `code`\n[a](b.md#c) ![p](img/p.png) [web](https://a.example/b) `[x](y)`\n\n[ref]: d.md\n"
    assert list(links(text)) == [("b.md", "c"), ("img/p.png", ""), ("d.md", "")]
    assert "a-title-with-code" in anchors(text)


def test_navigation_names_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    shown = [f"docs/{path}" for path in leaves_of(hooks.expanded(config["nav"], ROOT / "docs"))]
    there = {name for name in written() | generated() if name.startswith("docs/")}
    assert sorted(shown) == sorted(set(shown))
    assert set(shown) == there


def leaves_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves_of(item)


# The other direction: what the programs have is in the reference


def sections(page: str) -> dict[str, str]:
    """Split a page at its headings of the second level, by their anchors."""
    parts = re.split(r"^## .*\{#([\w-]+)\}$", generated()[f"docs/reference/{page}"], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def typer_commands(command: Any, words: str) -> Iterator[tuple[str, Any]]:
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from typer_commands(below, f"{words} {name}")


FERRY = dict(typer_commands(ferry(), "ferry"))


def explained(section: str) -> dict[str, str]:
    """Return the explanations of a section by their terms."""
    return dict(re.findall(r"^`([^`\n]+)`\n:   (.+)$", section, re.MULTILINE))


def meaning(text: str) -> str:
    """Return what an explanation says of the thing itself."""
    return re.split(r"(?:^| )(?:Required|Not given by default|Allowed: |Default: |Environment variable: )", text)[0].strip()


@pytest.mark.parametrize("words", FERRY)
def test_every_option_of_ferry_is_explained(words: str):
    section = sections("ferry.md")[words.replace(" ", "-")]
    terms = explained(section)
    for parameter in FERRY[words].params:
        if parameter.param_type_name == "argument":
            wanted = {
                (parameter.metavar or parameter.opts[0]) + ("..." if parameter.nargs != 1 and not parameter.metavar else "")
            }
        else:
            wanted = {*parameter.opts, *parameter.secondary_opts}
        (said,) = (text for term, text in terms.items() if wanted <= set(re.split(r",? ", term)))
        assert plain(parameter.help)[1:] in said, parameter.opts
        assert len(meaning(said)) > 5, parameter.opts
        if isinstance(parameter.default, (int, float, str)) and not isinstance(parameter.default, bool) and parameter.default:
            assert f"Default: `{parameter.default}`" in said or parameter.show_default is False, parameter.opts
        if parameter.secondary_opts:
            assert f"Default: `{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`" in said
        if parameter.envvar:
            assert f"`{parameter.envvar}`" in said
        assert ("Required." in said) == parameter.required
    assert len(terms) == len(FERRY[words].params)
    assert FERRY[words].help.split("\n")[0][1:] in generated()["docs/reference/ferry.md"]
    if words != "ferry" and not hasattr(FERRY[words], "commands"):
        assert FERRY[words].help.split("\n\n")[0].replace("\n", " ").rstrip(".")[1:] in section


ARGPARSE = [
    (program, name)
    for program, parser in PARSERS.items()
    for name in ("", *commands_of(parser()))
]  # fmt: skip


@pytest.mark.parametrize(("program", "name"), ARGPARSE)
def test_every_option_of_argparse_is_explained(program: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FERRY_AGENT_DIR", raising=False)
    parser = commands_of(PARSERS[program]())[name] if name else PARSERS[program]()
    terms = explained(sections(f"{program}.md")[f"{program}-{name}".rstrip("-")])
    count = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.option_strings == ["-h", "--help"]:
            continue
        count += 1
        wanted = set(action.option_strings) or {str(action.metavar or action.dest)}
        (said,) = (text for term, text in terms.items() if wanted <= set(re.split(r",? ", term)))
        assert len(meaning(said)) > 5, wanted
        assert ("Required." in said) == action.required, wanted
        if "%(default)s" in (action.help or ""):
            assert f"Default: `{action.default}`" in said, wanted
    assert len(terms) == count


def test_every_program_has_a_page_with_help():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == set(PROGRAMS)
    for program in PROGRAMS:
        assert "`--help`" in generated()[f"docs/reference/{program}.md"]


def settings_keys(schema: dict[str, Any], root: dict[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of ferry.toml with its table, from the JSON schema."""
    for key, value in schema["properties"].items():
        part, path = value, f"{at}.{key}".lstrip(".")
        while (name := "$ref" in part) or "additionalProperties" in part or "patternProperties" in part:
            if name:
                part = root["$defs"][part["$ref"].rpartition("/")[2]]
                if "properties" in part:
                    break
            else:
                part, path = part.get("additionalProperties") or next(iter(part["patternProperties"].values())), f"{path}.*"
        if "properties" in part:
            yield from settings_keys(part, root, path)
        else:
            yield at, key


def test_every_settings_key_is_explained():
    schema = Settings.model_json_schema()
    expected = sorted(settings_keys(schema, schema))
    shown: list[tuple[str, str]] = []
    for heading, body in re.findall(
        r"^## (.+?) \{#.+?\}\n(.*?)(?=^## )", generated()["docs/reference/settings.md"], re.DOTALL | re.MULTILINE
    ):
        name = re.sub(r"\b[A-Z]+\b", "*", heading.strip("`[]")) if heading.startswith("`[") else ""
        for key, said in explained(body).items():
            assert len(meaning(said)) > 5, (heading, key)
            shown.append((name, key))
    assert sorted(shown) == expected
    assert len(expected) > 60


def test_defaults_of_settings_are_those_of_the_program():
    text = sections("settings.md")
    line = Settings.model_validate({"schema": 1, "lines": {"a": {"data": "data/a"}}}).lines["a"]
    assert f"Default: `{line.retraining.steps}`" in explained(text["lines-retraining"])["steps"]
    assert line.retraining.steps != line.training.steps
    assert f"Default: `{line.training.steps}`" in explained(text["lines-training"])["steps"]
    assert f"Default: `{line.gate.coverage}`" in explained(text["lines-gate"])["coverage"]


def sources(*packages: str) -> Iterator[tuple[Path, ast.Module]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text())


FAMILIES = re.compile(r"(FERRY|PREFECT|MLFLOW|DVC|GOMP|OMP|OPENBLAS|LC)_\w+|DO_NOT_TRACK|GIT_(DEFAULT|CEILING|LITERAL)_\w+")


def strings_in(node: ast.AST) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def test_every_environment_variable_is_listed():
    used: set[str] = set()
    for path, tree in sources("flows", "model", "registry", "ota"):
        used |= {text for text in strings_in(tree) if FAMILIES.fullmatch(text)}
        for node in ast.walk(tree) if re.search(r"environ\b|getenv", path.read_text()) else ():
            if isinstance(node, (ast.Call, ast.Subscript)):
                what = ast.unparse(node.func if isinstance(node, ast.Call) else node.value)
                if re.match(r"os\.(environ\b|getenv\b)", what):
                    used |= {text for text in strings_in(node) if re.fullmatch(r"[A-Z][A-Z0-9_]+", text)}
    listed = environment.READ.keys() | environment.SET.keys()
    assert used - environment.INTERNAL == listed
    page = generated()["docs/reference/environment.md"]
    assert [name for name in listed if f"| `{name}` |" not in page] == []
    assert len(environment.READ) > 5


def codes_in(path: Path) -> set[int]:
    """Find the exit codes that a module ends with."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in ("_exit_code", "doctor", "call"):
            returned = [r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value is not None]
            found |= {c.value for r in returned for c in ast.walk(r) if isinstance(c, ast.Constant) and type(c.value) is int}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Exit", "fail", "sys.exit"):
            found |= {c.value for c in node.args if isinstance(c, ast.Constant) and type(c.value) is int}
    return found


@pytest.mark.parametrize(
    ("program", "modules"),
    [("ferry", "flows/cli/*.py"), ("ferry-agent", "ota/agent/cli.py"), ("ferry-delta", "ota/delta/cli.py")],
)
def test_every_exit_code_is_listed(program: str, modules: str):
    used = {code for path in ROOT.glob(modules) for code in codes_in(path)}
    assert len(used) > 1
    assert used | {0, 1, 2, 130} == EXIT_CODES[program].keys()
    rows = re.findall(r"^\| `(\d+)` \|(.+)\|$", generated()["docs/reference/exit-codes.md"], re.MULTILINE)
    column = list(EXIT_CODES).index(program)
    shown = {int(code): cells.split(" | ")[column].strip() for code, cells in rows}
    assert {code: said for code, said in shown.items() if said != "–"} == EXIT_CODES[program]
    helped = (
        CliRunner().invoke(cli.app, ["--help"], terminal_width=10_000).stdout
        if program == "ferry"
        else " ".join(PARSERS[program]().format_help().split())
    )
    for code, said in EXIT_CODES[program].items():
        assert f"{code} {said}" in helped


def test_every_cell_of_the_reference_says_something():
    for name, text in generated().items():
        for row in re.findall(r"^\| (.+) \|$", text, re.MULTILINE):
            cells = re.split(r" (?<!\\)\| ", row)
            sized = name.endswith("what-leaves.md")  # there, a size is known only of what the example holds
            assert all(cell.strip() for cell in (cells[:-1] if sized else cells)), (name, row)


# The site


def test_page_that_loads_from_another_host_is_noticed(tmp_path: Path):
    (tmp_path / "good.html").write_text(
        '<link rel="canonical" href="https://a.example/"><a href="https://a.example/b">out</a><img src="../a.png"><script src="a.js"></script>'
    )
    assert hooks.foreign(tmp_path) == []
    (tmp_path / "bad.html").write_text(
        '<link rel="stylesheet" href="//a.example/1.css"><img src="https://a.example/2.png"><script src="http://a.example/3.js"></script>'
        '<img srcset="a.png 1x, https://a.example/4.png 2x"><pre class="mermaid">a</pre><style>@import "https://a.example/5.css";</style>'
    )
    (tmp_path / "bad.css").write_text(
        "a { background: url(https://a.example/6.png) } b { background: url('data:image/png;base64,') }"
    )
    found = hooks.foreign(tmp_path)
    assert len(found) == 7
    assert all(f"a.example/{i}" in " ".join(found) for i in range(1, 7))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site strictly."""
    place = tmp_path_factory.mktemp("site") / "docs"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return place


@pytest.mark.slow
def test_site_builds_strictly_and_loads_nothing_from_elsewhere(site: Path):
    for name in written() | generated():
        if name.startswith("docs/"):
            assert (site / Path(name).relative_to("docs").with_suffix(".html")).is_file(), name
    assert hooks.foreign(site) == []
    assert (site / "search" / "search_index.js").stat().st_size > 100_000


@pytest.mark.slow
def test_search_works_from_the_disk(site: Path, browser: str, tmp_path: Path):  # noqa: F811
    page = f"{(site / 'glossary.html').as_uri()}?q=tolerance_bands"
    shown = run(browser, tmp_path, "--virtual-time-budget=20000", "--dump-dom", page)
    assert re.search(r"\d+ matching document", shown)
    assert "reference/settings.html" in shown.partition("md-search-result")[2]


@pytest.mark.parametrize("document", [name for name in written() if name.startswith("docs/api/")])
def test_example_of_the_api_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", written()[document], re.DOTALL)
    assert found
    for example, told in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(example, document, "exec"), {"__name__": "example"})
        assert out.getvalue() == told


def test_api_pages_name_what_exists():
    import importlib

    for name, text in written().items():
        if name.startswith("docs/api/"):
            (module,) = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
            (members,) = re.findall(r"members: \[(.+)\]", text)
            for member in members.split(", "):
                assert getattr(importlib.import_module(module), member).__doc__, (name, member)


# The repository


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE))
    described = set(re.findall(r"^([a-z][a-z-]*):.*##", makefile, re.MULTILINE))
    assert phony == described


WHEELS = ("pyproject.toml", "ota/pyproject.toml", "ota/delta/pyproject.toml")


def test_all_wheels_declare_one_version_and_python():
    projects = [tomllib.loads((ROOT / name).read_text())["project"] for name in WHEELS]
    assert {project["requires-python"] for project in projects} == {">=3.11,<3.14"}
    assert all("version" in project["dynamic"] for project in projects)
    assert f"## {ota.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("wheel", WHEELS[1:])
def test_wheel_needs_nothing_that_the_factory_does_not_pin(wheel: str):
    factory, smaller = (tomllib.loads((ROOT / name).read_text())["project"]["dependencies"] for name in (WHEELS[0], wheel))
    bounds = {re.split(r"[\[<>=]", d)[0]: d for d in factory}
    for dependency in smaller:
        name = re.split(r"[\[<>=]", dependency)[0]
        assert dependency == bounds[name].replace("[crypto]", "")


def test_every_dependency_is_pinned_once():
    pinned = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split()]
    assert len(pinned) == len(set(pinned))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in [*project["dependencies"], *project["optional-dependencies"]["docs"]]:
        assert re.split(r"[\[<>=]", dependency)[0].lower() in pinned


def test_promised_tests_exist():
    named = {test for text in (written() | generated()).values() for test in re.findall(r"`(test_\w+)`", text)}
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 40
    assert named <= there


def test_page_of_what_leaves_covers_all_channels():
    page = generated()["docs/what-leaves.md"]
    for channel in (
        "reports",
        "requests",
        "endpoint",
        "device-never",
        "repository",
        "mlflow",
        "dvc",
        "prefect",
        "database",
        "plant-never",
    ):
        assert f"{{#{channel}}}" in page

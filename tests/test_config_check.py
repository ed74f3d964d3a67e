"""`ferry config check`: every mistake in ferry.toml at once, each with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.check import problems
from flows.cli import app
from flows.setup import create

WRONG = """\
schema = 1
parallell = 2
parallel = 99
[stores]
database = "nonsense"
publish = "ftp://x"
[lines.Bad_Name]
data = "/abs"
[lines.a]
tier = "huge"
image_size = 15
[lines.a.training]
stepz = 3
steps = "many"
batch = 0
[lines.a.gate]
margin = 0.3
alpha = 2
[lines.b]
data = "dvc-remote/x"
image_size = 15
[lines.b.classes.edge]
variants = ["full", "full"]
latency_ms = -1
[lines.c]
data = "data/c"
tier = 3
[lines.c.sampler]
guidence = 3
[energy.zz.edge.full]
joules = 1
source = "RAPL"
quality = "measured"
"""
KEYS = [
    (2, "parallell"), (3, "parallel"), (5, "stores.database"), (6, "stores.publish"), (7, "lines.Bad_Name"), (8, "lines.Bad_Name.data"),
    (9, "lines.a.data"), (10, "lines.a.tier"), (11, "lines.a.image_size"), (13, "lines.a.training.stepz"), (14, "lines.a.training.steps"),
    (15, "lines.a.training.batch"), (16, "lines.a.gate"), (18, "lines.a.gate.alpha"), (20, "lines.b.data"), (21, "lines.b.image_size"),
    (22, "lines.b.classes.edge"), (24, "lines.b.classes.edge.latency_ms"), (27, "lines.c.tier"), (29, "lines.c.sampler.guidence"),
    (None, ""),
]  # fmt: skip


def check(folder: Path, text: str | bytes) -> list[tuple[int | None, str, str]]:
    path = folder / "ferry.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(found.line, found.key, found.message) for found in problems(path)]


def test_all_mistakes_are_named_at_once_with_their_lines(tmp_path: Path):
    assert [(line, key) for line, key, _ in check(tmp_path, WRONG)] == KEYS


def test_every_mistake_that_is_mended_is_gone_and_shows_no_other(tmp_path: Path):
    """Change one line after another: each time exactly what that line had is gone."""
    rows = WRONG.splitlines()
    before = len(KEYS)
    for number, good in ((2, ""), (29, ""), (24, "latency_ms = 9"), (14, "steps = 4"), (3, "parallel = 1")):
        rows[number - 1] = good
        assert len(check(tmp_path, "\n".join(rows))) == before - 1
        before -= 1


def test_command_lists_them_and_fails(tmp_path: Path):
    (tmp_path / "ferry.toml").write_text(WRONG)
    result = CliRunner().invoke(app, ["-w", str(tmp_path), "config", "check"])
    assert result.exit_code == 3
    assert "line 2, parallell: there is no such key; did you mean parallel?" in result.output
    assert f"{len(KEYS)} mistakes" in result.output
    told = CliRunner().invoke(app, ["-w", str(tmp_path), "config", "check", "--json"])
    assert [row["key"] for row in json.loads(told.stdout)["problems"]] == [key for _, key in KEYS]


def test_fresh_workspace_is_right(tmp_path: Path):
    made = create(tmp_path / "ws", ["shapes", "digits"])
    result = CliRunner().invoke(app, ["-w", str(made.root), "config", "check"])
    assert (result.exit_code, result.output.strip()) == (0, f"{made.root / 'ferry.toml'} is right")


def test_no_file_says_what_to_do(tmp_path: Path):
    result = CliRunner().invoke(app, ["-w", str(tmp_path), "config", "check"])
    assert result.exit_code == 3
    assert "ferry init" in result.output


@pytest.mark.parametrize(
    ("text", "line", "key", "said"),
    [
        ("", None, "schema", "write schema = 2"),
        ('schema = 3\n[lines.a]\ndata = "data/a"', 1, "schema", "newer version"),
        ('schema = "1"\n[lines.a]\ndata = "data/a"', 1, "schema", "write schema = 2"),
        ("schema = 1\nlines = 3", 2, "lines", "must be a section"),
        ("schema = 1\n[lines]", 2, "lines", "there is no line"),
        ("schema = 1\n[lines.a\n", 2, "", "not valid TOML"),
        (b"schema = 1\n\xff", None, "", "not UTF-8"),
        ('schema = 1\n[lines.a]\ndata = "data/a"\nclasses = []', 4, "lines.a.classes", "must be a section"),
        ('schema = 1\n[lines.a]\ndata = "x"\n[stores]\nreports = "x"', None, "", "share a folder"),
        (
            'schema = 1\n[lines.a]\ndata = "data/a"\n[stores]\ns3_endpoint = "minio"',
            5,
            "stores.s3_endpoint",
            "write http(s)://host:port",
        ),
    ],
)
def test_each_class_of_mistake(tmp_path: Path, text: str | bytes, line: int | None, key: str, said: str):
    found = check(tmp_path, text)
    assert any((at, name) == (line, key) and said in message for at, name, message in found), found


def test_names_from_the_file_do_not_control_the_terminal(tmp_path: Path):
    (tmp_path / "ferry.toml").write_text('schema = 1\n[lines.a]\ndata = "data/a"\n"\\u001b[31m" = 1\n')
    result = CliRunner().invoke(app, ["-w", str(tmp_path), "config", "check"])
    assert result.exit_code == 3
    assert "\x1b" not in result.output

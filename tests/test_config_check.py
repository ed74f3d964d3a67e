"""`ferry config check`: every mistake in ferry.toml at once, each with its line."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ota
from flows.check import problems
from flows.cli import app
from flows.errors import WorkspaceError
from flows.settings import read
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
    (30, "energy.zz.edge"),
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


LINE = 'schema = 2\n[lines.p]\ndata = "data/p"\n'


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[gpu]\np.I.fulll = {seconds = 1, source = 'x'}", 5, "gpu.p.I.fulll: there is no variant 'fulll'; did you mean full?"),
        ("[gpu]\np.III.full = {seconds = 1, source = 'x'}", 5, "gpu.p.III: there is no configuration 'III'; did you mean II?"),
        (
            "[energy]\np.edge.fulll = {joules = 1, source = 'x', quality = 'model'}", 5,
            "energy.p.edge.fulll: there is no variant 'fulll'; did you mean full?",
        ),
        ("[lines.p.samplers]\ndeev = {steps = 3}", 5, "lines.p.samplers.deev: there is no variant 'deev'; did you mean dev?"),
        (
            "[gpu.p.I.other]\nseconds = 1\nsource = 'x'", 4,
            "gpu.p.I.other: there is no variant 'other'; choose full, dev, fast or turbo",
        ),
        ("[gpu.q]\nI.full = {seconds = 1, source = 'x'}", 5, "gpu.q.I: it names a line, configuration or variant that is not in this file"),
        (
            "[gpu.p.I.full]\nseconds = 'many'\nsource = 'x'", 5,
            'gpu.p.I.full.seconds: it is "many", but must be a valid number, unable to parse string as a number',
        ),
        ("[gpu.p.I.full]\nseconds = 1\nsource = ''", 6, "gpu.p.I.full.source: it must have at least 1 character"),
        (
            "[energy.p.edge.full]\njoules = 1\nsource = 'x'\nquality = 'good'", 7,
            "energy.p.edge.full.quality: it is \"good\", but must be 'measured', 'partial' or 'model'",
        ),
        ("[lines.p.classes.edge]\nvariants = []", 5, "lines.p.classes.edge.variants: it must have at least 1 entry"),
        ("[lines.Früh]\ndata = 'x'", 4, "a name in [lines...] has other letters than a to z; use lower-case letters, digits and '-', at most 40"),
        ('[lines."Früh"]\ndata = "x"', 4, "lines.Früh: 'Früh' is no name; use lower-case letters, digits and '-', at most 40"),
    ],
)  # fmt: skip
def test_one_mistake_is_told_once(tmp_path: Path, text: str, line: int, said: str):
    (tmp_path / "ferry.toml").write_text(LINE + text)
    assert [problem.text for problem in problems(tmp_path / "ferry.toml")] == [
        f"line {line}: {said}" if "..." in said else f"line {line}, {said}"
    ]


def test_wrong_name_hides_no_other_mistake(tmp_path: Path):
    (tmp_path / "ferry.toml").write_text(
        f"{LINE}[gpu]\nq.I.full = {{seconds = 1, source = 'x'}}\np.I.ful = 3\n[stores]\nmlflow = 'x'\n"
    )
    assert [problem.key for problem in problems(tmp_path / "ferry.toml")] == ["gpu.q.I", "gpu.p.I.ful", "stores.mlflow"]


@pytest.mark.parametrize(
    ("oldest", "said"),
    [
        ("0.1", "write it as 0.1.0"), ("v0.1.0", "write it as 0.1.0"), ("2", "write it as 2.0.0"), ("first", "write it as 0.1.0"),
        ("99.0.0", f"this is a newer ferry-agent than this ferry, {ota.__version__}, makes bundles for; write {ota.__version__} or an older one"),
    ],
)  # fmt: skip
def test_agent_that_is_no_version_or_newer_than_ferry_is_refused(tmp_path: Path, oldest: str, said: str):
    path = tmp_path / "ferry.toml"
    path.write_text(f'{LINE}[lines.p.classes.edge]\nvariants = ["full"]\noldest_agent = "{oldest}"\n')
    found = problems(path)
    assert [(problem.line, problem.key) for problem in found] == [(6, "lines.p.classes.edge.oldest_agent")]
    assert said in found[0].message
    with pytest.raises(WorkspaceError, match=re.escape(said)):
        read(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('oldest_agent = "0.1.0"', [(4, 'does not know turbo; write variants = ["full", "dev", "fast"], or set oldest_agent to 0.2.0')]),
        ('oldest_agent = "0.1.0"\nvariants = ["full", "turbo"]', [(6, 'does not know turbo; write variants = ["full"], or')]),
        ('oldest_agent = "0.1.0"\nvariants = ["full"]', []),
        ('oldest_agent = "0.2.0"', []),
        (
            'oldest_agent = "0.1.0"\nvariants = ["full", "dev"]\n[lines.p.sampler]\nguidance_high = 0.6',
            [(6, "does not know the interval of guidance of full and dev; remove guidance_low and guidance_high, or set")],
        ),
    ],
)  # fmt: skip
def test_variants_that_the_oldest_agent_does_not_know_are_named(tmp_path: Path, text: str, told: list[tuple[int, str]]):
    (tmp_path / "ferry.toml").write_text(f"{LINE}[lines.p.classes.edge]\n{text}\n")
    found = problems(tmp_path / "ferry.toml")
    assert [(problem.line, problem.key) for problem in found] == [(line, "lines.p.classes.edge.variants") for line, _ in told]
    assert all(said in problem.message for problem, (_, said) in zip(found, told, strict=True))


@pytest.mark.parametrize("words", [["config", "check"], ["status"]], ids=" ".join)
def test_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]):
    (tmp_path / "ferry.toml").write_text(LINE)

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    told = CliRunner().invoke(app, ["-w", str(tmp_path), *words])
    assert (told.exit_code, told.stderr) == (
        3,
        f"ferry: {tmp_path}/ferry.toml cannot be read: Permission denied; check who may read it\n",
    )

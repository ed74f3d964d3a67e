"""What is wrong with a setting or a document is said in our own words, with the key that was perhaps meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import WorkspaceError
from flows.settings import read
from flows.setup import template
from ota.errors import ManifestError
from ota.manifest import Reference, parse
from ota.policy import Policy
from ota.wording import counted

FOREIGN = (
    "Input should",
    "Extra inputs",
    "Field required",
    "String should",
    "Value error",
    "valid integer",
    "valid boolean",
    "pydantic",
    "List should",
)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("guidance = 2.0", "guidence = 2.0", "there is no key lines.a.sampler.guidence; did you mean `guidance`?"),
        ("[lines.a.retraining]", "[lines.a.retaining]", "there is no key lines.a.retaining; did you mean `retraining`?"),
        ("parallel = 1", "paralel = 1", "there is no key paralel; did you mean `parallel`?"),
        (
            'variants = ["full", "dev", "fast", "turbo"]',
            'variant = ["full"]  ',
            "there is no key lines.a.classes.edge.variant; did you mean `variants`?",
        ),
        (
            "reports = ",
            "x = 1\nreports = ",
            "there is no key stores.x; there are data, database, mlflow, publish, reports, s3_endpoint",
        ),
        ("steps = 400", "steps = 0", "lines.a.training.steps: it must be at least 1, not 0"),
        ("steps = 400", "steps = 1.5", "lines.a.training.steps: it must be a whole number, not 1.5"),
        ("steps = 400", 'steps = "many"', "lines.a.training.steps: it must be a whole number, not 'many'"),
        ("alpha = 0.05", "alpha = nan", "lines.a.gate.alpha: it must be"),
        ("alpha = 0.05", "alpha = inf", "lines.a.gate.alpha: it must be less than 0.5, not inf"),
        ("alpha = 0.05", "alpha = []", "lines.a.gate.alpha: it must be a number, not a list"),
        ("guidance = 2.0", 'guidance = "\\u001b[2J"', "lines.a.sampler.guidance: it must be a number, not '\\x1b[2J'"),
        ('reports = "inbox"', "reports = 5", "stores.reports: it must be text in quotes, not 5"),
        ("captions = true", 'captions = "yes"', "lines.a.gate.captions: it must be true or false, not 'yes'"),
        (
            'configuration = "I" ',
            'configuration = "III" ',
            "lines.a.classes.edge.configuration: it must be 'I' or 'II', not 'III'",
        ),
        ('["full", "dev", "fast", "turbo"]', "[]", "lines.a.classes.edge.variants: it must have at least 1 entry"),
        (
            "[lines.a.classes.edge]",
            "[lines.a.classes.EDGE]",
            "'EDGE' is no name; use lower-case letters, digits and '-', 40 at most",
        ),
        ("[prices] ", "[price] ", "there is no key price; did you mean `prices`?"),
        ('data = "data/a"', 'data = ""', "is no folder below the workspace; name one, such as data/surfaces"),
        ('data = "data/a"  ', "# ", "lines.a.data is missing"),
    ],
)
def test_setting_is_refused_in_our_own_words(old: str, new: str, says: str, tmp_path: Path):
    path = tmp_path / "ferry.toml"
    text = template(["a"]).replace("# variants = ", "variants = ").replace("# parallel = ", "parallel = ")
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(WorkspaceError) as caught:
        read(path)
    said = str(caught.value)
    assert says in said, said
    assert not any(words in said for words in FOREIGN), said
    assert said.isprintable()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("promote", "a/I/full", "one"), "it must be a whole number, not 'one'"),
        (("promote", "a/I/full", "0"), "it must be at least 1, not '0'"),
        (("rate", "a/I/full", "--pairs", "501"), "it must be at most 500, not '501'"),
    ],
)
def test_argument_is_refused_in_our_own_words(words: tuple[str, ...], says: str):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2
    assert says in result.stderr
    assert not any(foreign in result.stderr for foreign in FOREIGN)


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        (Policy, b"nothing", "it is not JSON"),
        (Policy, b"[]", "it must be a table, not a list"),
        (Policy, b'{"line": "a"}', "device_class is missing"),
        (Policy, b'{"line": "A B", "device_class": "b", "seq": 1, "manifest": "", "salt": "", "waves": []}', "'A B' is no name"),
        (
            Policy,
            b'{"line": "a", "device_class": "b", "seq": 0, "manifest": "", "salt": "", "waves": []}',
            "seq: it must be at least 1, not 0",
        ),
        (
            Policy,
            b'{"line": "a", "device_class": "b", "seq": 1, "manifest": "no", "salt": "", "waves": []}',
            "does not have the form that it needs",
        ),
        (Reference, b'{"schema_version": 1, "golden": {"tolerence": 1}}', "golden.tolerance is missing"),
    ],
)
def test_document_is_refused_in_our_own_words(kind: type, data: bytes, says: str):
    with pytest.raises(ManifestError) as caught:
        parse(kind, data, 10_000)
    assert says in str(caught.value)
    assert not any(words in str(caught.value) for words in FOREIGN)


@pytest.mark.parametrize(
    ("count", "unit", "said"),
    [(1, "caption", "1 caption"), (0, "file", "0 files"), (2000, "entry", "2,000 entries"), (1, "entry", "1 entry")],
)
def test_one_thing_is_counted_in_the_singular(count: int, unit: str, said: str):
    assert counted(count, unit) == said

"""The ferry.toml that `ferry init` writes: it holds every key, it changes no default, and any of its comments can be used."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from flows.settings import Settings, read
from flows.setup import template

LINE = "gaskets-2"
TEXT = template([LINE])
OPTIONAL = re.compile(r"^# ([\w.-]+ = .+)$", re.MULTILINE)  # "# key = value"; other comments are prose
EXAMPLES = {
    "command",
    "webhook",
    "tls_cert",
    "tls_key",
    "cloud_thousand_images",
    f"{LINE}.edge.full",
    f"{LINE}.I.full",
    "classes.station",
    "memory_mib",
    "oldest_agent",
    "update_budget",
    "update_level",
    "dev",
    "fast",
    "turbo",
}  # keys that have no default


def loaded(text: str, folder: Path) -> Settings:
    path = folder / "ferry.toml"
    path.write_text(text)
    return read(path)


def test_new_file_changes_no_default(tmp_path: Path):
    line = {"data": f"data/{LINE}", "update_method": "lowrank"}  # an older file lacks the key, and its lines keep their way
    plain = Settings.model_validate(
        {"schema": 2, "lines": {LINE: line | {"retraining": {"steps": 200, "batch": 32, "learning_rate": 5e-4}}}}
    )
    assert loaded(TEXT, tmp_path) == plain
    assert loaded(template([LINE, "0"]), tmp_path).lines["0"].gate == plain.lines[LINE].gate


@pytest.mark.parametrize("line", OPTIONAL.findall(TEXT))
def test_each_comment_can_be_used_alone(line: str, tmp_path: Path):
    for at in re.finditer(f"^# {re.escape(line)}$", TEXT, re.MULTILINE):  # a key such as seed stands in several tables
        found = loaded(TEXT[: at.start()] + line + TEXT[at.end() :], tmp_path)
        if (key := line.split(" = ", maxsplit=1)[0]) in EXAMPLES:
            assert found != loaded(TEXT, tmp_path), f"the example for {key} changes nothing"
        elif key != "require_approval":  # its default is what the workspace says
            assert found.model_dump() == loaded(TEXT, tmp_path).model_dump(), (
                f"what the comment shows for {key} is not the default"
            )


def missing(model: type[BaseModel], given: list[dict[str, Any]], at: str = "") -> Iterator[str]:
    """Yield the keys of a table, and of those below it, that none of the given tables has."""
    for field, info in model.model_fields.items():
        key, inner, below = (
            info.alias or field,
            info.annotation,
            [table[info.alias or field] for table in given if (info.alias or field) in table],
        )
        if not below:
            yield f"{at}{key}"
            continue
        while get_origin(inner) is dict:
            inner, below = get_args(inner)[1], [table for names in below for table in names.values()]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from missing(inner, below, f"{at}{key}.")


def test_every_key_is_shown(tmp_path: Path):
    everything = OPTIONAL.sub(r"\1", TEXT)
    loaded(everything, tmp_path)
    assert list(missing(Settings, [tomllib.loads(everything)])) == []
    assert list(missing(Settings, [tomllib.loads(everything.replace("\nseed = 0", "").replace("parallel", "# parallel"))])) == [
        "parallel", "lines.training.seed", "lines.retraining.seed", "lines.distillation.seed",
    ]  # fmt: skip


def test_lines_are_short_and_aligned():
    assert max(map(len, TEXT.splitlines())) <= 140
    keys = [line for line in TEXT.splitlines() if re.match(r"(# )?[\w.]+ = |\[", line) and " # " in line]
    assert len(keys) > 50
    assert {line.index(" # ") for line in keys if len(line.split(" # ")[0].rstrip()) <= 34} == {34}

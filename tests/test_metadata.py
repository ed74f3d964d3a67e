"""Whatever a metadata.jsonl looks like, each image is used or named with a reason; none is lost in silence."""

from __future__ import annotations

import codecs
import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from model.data import METADATA, read_metadata, scan
from model.errors import DataError
from tests.test_data import append, png, save

NAMES = ["0.png", "b\u00e4r.png", "deep/2.png"]
COMPOSED, APART = "\u00e4", "a\u0308"
assert unicodedata.normalize("NFC", APART) == COMPOSED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of three images, one of them with an umlaut in name and caption."""
    for i, name in enumerate(NAMES):
        save(tmp_path, name, png(i))
    return tmp_path


def text(end: str = "\n") -> str:
    return "".join(json.dumps({"file_name": name, "text": f"Bär {i}"}, ensure_ascii=False) + end for i, name in enumerate(NAMES))


def accounted(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Read a folder; return the usable images and the others, after a check that every file is in one of the two."""
    seen = scan(folder, 24)
    others = {name for name in seen.files if name not in {*seen.names, METADATA}}
    assert others <= set(seen.quarantine)
    return seen.names, seen.quarantine


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "UTF-16-BE with its mark"]
)
def test_every_unicode_encoding_is_read(folder: Path, encoding: str, end: str) -> None:
    marked = encoding.startswith("UTF")
    (folder / METADATA).write_bytes(codecs.BOM_UTF16_BE * marked + text(end).encode("utf-16-be" if marked else encoding))
    assert accounted(folder) == (sorted(NAMES), {})
    assert scan(folder, 24).captions == ["Bär 0", "Bär 1", "Bär 2"]


def test_mark_in_the_middle_of_joined_files_means_nothing(folder: Path) -> None:
    rows = text().encode().splitlines(keepends=True)
    (folder / METADATA).write_bytes(b"".join(codecs.BOM_UTF8 + row for row in rows))
    assert accounted(folder) == (sorted(NAMES), {})


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman", "cp850"])
def test_line_in_another_encoding_is_named(folder: Path, encoding: str) -> None:
    (folder / METADATA).write_bytes(text().encode(encoding))
    with pytest.raises(DataError, match=r"names no usable image.*metadata.jsonl:1 is not UTF-8; save the file in that encoding"):
        scan(folder, 24)
    append(folder, {"file_name": "0.png", "text": "ring"})
    names, bad = accounted(folder)
    assert names == ["0.png"]
    assert {bad[f"{METADATA}:{n}"] for n in (1, 2, 3)} == {"is not UTF-8; save the file in that encoding"}


@pytest.mark.parametrize("cut", [1, 3])
def test_half_a_character_is_refused(folder: Path, cut: int) -> None:
    (folder / METADATA).write_bytes(text().encode("utf-16")[:-cut])
    with pytest.raises(DataError, match=r"metadata.jsonl is neither UTF-8 nor whole UTF-16; save it as UTF-8") as caught:
        scan(folder, 24)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\xa0"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_only_line_ends_end_a_line(folder: Path, separator: str, encoding: str) -> None:
    """Keep a line whole that holds another character at which Python would split text."""
    row = json.dumps({"file_name": "0.png", "text": f"a{separator}b"}, ensure_ascii=False)
    (folder / METADATA).write_bytes(row.encode(encoding))
    assert [item.text for item in read_metadata(folder)[0]] == [f"a{separator}b"]


@pytest.mark.parametrize(("stored", "listed"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_name_is_found_in_any_unicode_form(tmp_path: Path, stored: str, listed: str) -> None:
    """Find an image whose name another system wrote in another Unicode form; some computers write ä as two characters."""
    save(tmp_path, f"b{stored}r.png", png())
    append(tmp_path, {"file_name": f"b{listed}r.png", "text": "bar"})
    assert accounted(tmp_path) == ([f"b{stored}r.png"], {})
    (item,), _ = read_metadata(tmp_path)
    assert item.group == f"b{stored}r.png"


def test_names_of_both_forms_stay_apart(tmp_path: Path) -> None:
    for i, form in enumerate((COMPOSED, APART)):
        save(tmp_path, f"{form}.png", png(i))
        append(tmp_path, {"file_name": f"{form}.png", "text": f"{i}"})
    seen = scan(tmp_path, 24)
    assert dict(zip(seen.names, seen.captions, strict=True)) == {f"{COMPOSED}.png": "0", f"{APART}.png": "1"}
    assert seen.quarantine == {}


def test_one_file_is_not_used_twice_in_two_forms(tmp_path: Path) -> None:
    save(tmp_path, f"{APART}.png", png())
    for form in (COMPOSED, APART):
        append(tmp_path, {"file_name": f"{form}.png", "text": "bar"})
    names, bad = accounted(tmp_path)
    assert names == [f"{APART}.png"]
    assert bad == {f"{METADATA}:2": f"names {APART}.png a second time"}


@pytest.mark.parametrize(("listed", "there"), [("A.PNG", "a.png"), ("deep\\A.png", "deep/a.png"), ("Deep/a.png", "deep/a.png")])
def test_missing_file_says_which_may_be_meant(tmp_path: Path, listed: str, there: str) -> None:
    save(tmp_path, "0.png", png())
    save(tmp_path, there, png(1))
    append(tmp_path, {"file_name": "0.png", "text": "bar"}, {"file_name": listed, "text": "bar"})
    names, bad = accounted(tmp_path)
    assert names == ["0.png"]
    assert bad == {listed: f"is missing; if {there} is meant, write its name exactly so", there: "is not named in metadata.jsonl"}


# The line for 0.png, the name in the report, and the reason.
ODD = [
    ('{"file_name": "0.png", "file_name": "deep/2.png", "text": "a"}', f"{METADATA}:2", "has the key file_name more than once; keep one of them"),
    ('{"file_name": "0.png", "text": "a", "text": "b"}', "0.png", "has the key text more than once; keep one of them"),
    ('{"file_name": "0.png", "text": "a", "group": 1, "group": 2}', "0.png", "has the key group more than once; keep one of them"),
    ('{"file_name": "0.png", "text": "a", "text": "a"}', "0.png", "has the key text more than once; keep one of them"),
    ('{"File_Name": "0.png", "text": "a"}', f"{METADATA}:2", "has the key 'File_Name'; write it as file_name"),
    ('{"file_name": "0.png", "Text": "a"}', "0.png", "has the key 'Text'; write it as text"),
    ('{"file_name": "0.png", "text": "a", "TEXT": "b"}', "0.png", "has the key 'TEXT'; write it as text"),
    ('{"file_name": "0.png", "text": "a", "Group": "b"}', "0.png", "has the key 'Group'; write it as group"),
    ('{"file_name": "0.png", "text": "a", " group": "b"}', "0.png", "has the key ' group'; write it as group"),
    ('{"file_name": "0.png", "text": "a", "White": 4095}', "0.png", "has the key 'White'; write it as white"),
    ('{"file_name": "0.png", "text": null}', "0.png", "has no caption (text)"),
    ('{"file_name": "0.png", "text": 7}', "0.png", "has no caption (text)"),
    ('{"file_name": "0.png", "text": ["a", "b"]}', "0.png", "has no caption (text)"),
    ('{"file_name": "0.png", "text": {"en": "a"}}', "0.png", "has no caption (text)"),
    ('{"file_name": "0.png", "text": true}', "0.png", "has no caption (text)"),
    ('{"file_name": null, "text": "a"}', f"{METADATA}:2", "is not a JSON object with a file_name"),
    ('{"file_name": ["0.png"], "text": "a"}', f"{METADATA}:2", "is not a JSON object with a file_name"),
    ('{"file_name": 0, "text": "a"}', f"{METADATA}:2", "is not a JSON object with a file_name"),
    ('{"file_name": true, "text": "a"}', f"{METADATA}:2", "is not a JSON object with a file_name"),
    ('[{"file_name": "0.png", "text": "a"}]', f"{METADATA}:2", "is not a JSON object with a file_name"),
    ("null", f"{METADATA}:2", "is not a JSON object with a file_name"),
    ('{"file_name": "0.png", "text": "a", "group": ["b"]}', "0.png", "has a group that is neither text nor a number"),
    ('{"file_name": "0.png", "text": "a", "group": {"b": 1}}', "0.png", "has a group that is neither text nor a number"),
    ('{"file_name": "0.png", "text": "a", "group": true}', "0.png", "has a group that is neither text nor a number"),
    ('{"file_name": "0.png", "text": "a", "group": NaN}', "0.png", "has a group that is not a finite number; leave group out, or name it"),
    ('{"file_name": "0.png", "text": "a", "group": -Infinity}', "0.png", "has a group that is not a finite number; leave group out, or name it"),
    ('{"file_name": "0.png", "text": "a", "group": ""}', "0.png", "has an empty group; leave group out, or name it"),
    ('{"file_name": "0.png", "text": "a", "group": " "}', "0.png", "has an empty group; leave group out, or name it"),
    *(
        (json.dumps({"file_name": "0.png", "text": "a", "white": white}), "0.png", "has a white that is not a whole number from 256 to 65535")
        for white in (0, 255, 65_536, -4095, 4095.0, "4095", True, [4095], 10**400)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "name", "reason"), ODD)
def test_odd_line_is_named(folder: Path, line: str, name: str, reason: str) -> None:
    append(folder, {"file_name": "deep/2.png", "text": "a"}, line.encode(), {"file_name": NAMES[1], "text": "a"})
    names, bad = accounted(folder)
    assert names == [NAMES[1], NAMES[2]]
    assert bad[name] == reason
    assert set(bad) <= {name, "0.png"}
    json.dumps([*bad.items()], ensure_ascii=False).encode()


@pytest.mark.parametrize(("group", "meant"), [(7, "7"), (7.5, "7.5"), ("7", "7"), (-1, "-1"), (0, "0"), (10**30, str(10**30))])
def test_group_may_be_text_or_number(folder: Path, group: object, meant: str) -> None:
    append(folder, {"file_name": "0.png", "text": "a", "group": group})
    assert [item.group for item in read_metadata(folder)[0]] == [meant]


def test_groups_in_two_unicode_forms_do_not_leak(folder: Path) -> None:
    """Refuse a group that looks like another one: their images would fall on both sides of the held-out split."""
    append(
        folder,
        *(
            {"file_name": name, "text": "a", "group": f"K{form}fer"}
            for name, form in zip(NAMES, (APART, COMPOSED, APART), strict=True)
        ),
    )
    names, bad = accounted(folder)
    assert names == ["0.png", "deep/2.png"]
    assert bad == {NAMES[1]: f"has the group K{COMPOSED}fer in another Unicode form than line 1; write both alike"}


def test_keys_of_others_mean_nothing(folder: Path) -> None:
    """Ignore what the convention allows beside our keys, also twice or in any case."""
    append(
        folder,
        *(
            f'{{"file_name": "{name}", "text": "a", "Camera": 1, "Camera": [], "x": NaN, "caption": null}}'.encode()
            for name in NAMES
        ),
    )
    assert accounted(folder) == (sorted(NAMES), {})


def test_second_line_for_a_file_is_named_and_the_first_counts(folder: Path) -> None:
    append(
        folder,
        *({"file_name": name, "text": "a"} for name in NAMES),
        {"file_name": "deep//2.png", "text": "b"},
        {"file_name": "./0.png", "text": "c"},
    )
    seen = scan(folder, 24)
    assert seen.captions == ["a"] * 3
    assert seen.quarantine == {f"{METADATA}:4": "names deep/2.png a second time", f"{METADATA}:5": "names 0.png a second time"}


def test_same_rules_for_training(folder: Path, tmp_path: Path) -> None:
    """Name the same images when a model is trained as when the data were recorded."""
    from model.data import prepare
    from tests.conftest import CONFIG, write_images

    whole = Path(shutil.copytree(write_images(tmp_path / "many"), tmp_path / "both"))
    for name in NAMES:
        save(whole, name, (folder / name).read_bytes())
    append(whole, *(line.encode() for line, _, _ in ODD))
    dataset, seen = prepare(whole, CONFIG, tmp_path / "cache"), scan(whole, CONFIG.text_length)
    assert dataset.quarantine == seen.quarantine
    assert dataset.groups == seen.groups

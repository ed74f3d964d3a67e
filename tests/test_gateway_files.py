"""The published repository as the gateway serves it: ranges, ETags, and nothing but published files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ota.gateway.files import is_known, is_published, part_of
from tests.gateway_kit import Running, gateway

CONTENT = bytes(range(256)) * 40_000  # 10 MB: more than the sockets' buffers hold
NAME = "objects/weights.bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("published")
    for part in ("metadata", "targets/models", "objects", ".git", "keys"):
        (made / part).mkdir(parents=True)
    (made / "metadata/timestamp.json").write_text('{"signed": {}}')
    (made / "metadata/1.root.json").write_text("{}")
    (made / NAME).write_bytes(CONTENT)
    (made / "objects/empty").write_bytes(b"")
    (made / "keys/secret.pem").write_text("SECRET")
    (made / ".git/config").write_text("SECRET")
    (made / "objects/.hidden").write_text("SECRET")
    (made.parent / "outside").write_text("SECRET")
    (made / "objects/link").symlink_to(made.parent / "outside")
    (made / "targets/out").symlink_to(made.parent)
    os.mkfifo(made / "objects/pipe")
    return made


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway(tmp_path_factory.mktemp("gateway"), "--repository", str(folder)) as running:
        yield running


def test_a_file_is_served_whole_with_its_headers(served: Running):
    answer = served.ask("GET", f"/{NAME}")
    assert (answer.status, answer.body == CONTENT) == (200, True)
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["accept-ranges"] == "bytes"
    timestamp = served.ask("GET", "/metadata/timestamp.json?query=is-ignored")
    assert (timestamp.status, timestamp.headers["cache-control"]) == (200, "no-cache")
    head = served.ask("HEAD", f"/{NAME}")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(len(CONTENT)), b"")
    assert served.ask("GET", "/objects/empty").body == b""


def test_what_may_appear_later_is_not_cached_as_missing(served: Running):
    answer = served.ask("GET", "/metadata/2.root.json")
    assert (answer.status, answer.headers["cache-control"]) == (404, "no-store")


@pytest.mark.parametrize(
    ("asked", "first", "end"), [("bytes=0-9", 0, 10), ("bytes=100-", 100, len(CONTENT)), ("bytes=-7", len(CONTENT) - 7, len(CONTENT)),
    ("bytes=5-99999999999", 5, len(CONTENT)), ("bytes=-99999999999", 0, len(CONTENT))],
)  # fmt: skip
def test_single_range(served: Running, asked: str, first: int, end: int):
    answer = served.ask("GET", f"/{NAME}", headers={"Range": asked})
    assert (answer.status, answer.body == CONTENT[first:end]) == (206, True)
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{len(CONTENT)}"


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 2000, 2)), "bytes=-1,0-"])
def test_multi_range(served: Running, asked: str):
    answer = served.ask("GET", f"/{NAME}", headers={"Range": asked})
    assert (answer.status, answer.body == CONTENT) == (200, True)
    assert "multipart" not in answer.headers["content-type"]


@pytest.mark.parametrize(
    "asked", ["bytes=9-5", "bytes=a-b", "bytes=-", "items=0-1", "bytes", "bytes=0x1-2", "bytes=١-٢".encode().decode("latin-1")]
)
def test_a_malformed_range_gets_the_whole_file(served: Running, asked: str):
    assert served.ask("GET", f"/{NAME}", headers={"Range": asked}).status == 200


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=99999999999-", "bytes=-0"])
def test_a_range_behind_the_end(served: Running, asked: str):
    answer = served.ask("GET", f"/{NAME}", headers={"Range": asked})
    assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")


def test_etags(served: Running):
    etag = served.ask("GET", "/metadata/timestamp.json").headers["etag"]
    for given in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        answer = served.ask("GET", "/metadata/timestamp.json", headers={"If-None-Match": given})
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
    assert served.ask("GET", "/metadata/timestamp.json", headers={"If-None-Match": '"x"'}).status == 200
    weights = served.ask("HEAD", f"/{NAME}").headers["etag"]
    for given, status in ((weights, 206), ('"x"', 200), (f"W/{weights}", 200), ("Tue, 01 Dec 2026 15:46:37 GMT", 200)):
        assert served.ask("GET", f"/{NAME}", headers={"Range": "bytes=1-2", "If-Range": given}).status == status


@pytest.mark.parametrize("path", [
    "/", "/metadata", "/metadata/", "/keys/secret.pem", "/.git/config", "/objects/.hidden", "/objects/link", "/targets/out/outside",
    "/objects/pipe", "/objects/../keys/secret.pem", "/objects/%2e%2e/keys/secret.pem", "/objects/..%2fkeys/secret.pem",
    "//objects/weights.bin", "/objects//weights.bin", "/objects/weights.bin/", "/objects/weights.bin%00.json", "/objects/%c0%ae%c0%ae/x",
    "/objects\\weights.bin", "/Objects/weights.bin", "/objects/" + "a" * 300, "/objects/./weights.bin", "/objects/weights.bin%2f..",
    "/objects/%252e%252e/keys/secret.pem",
])  # fmt: skip
def test_path_traversal(served: Running, path: str):
    answer = served.ask("GET", path)
    assert answer.status == 404
    assert b"SECRET" not in answer.body


def test_other_methods_are_refused(served: Running, folder: Path):
    for method in ("PUT", "DELETE", "POST", "PROPFIND"):
        assert served.ask(method, f"/{NAME}", b"x").status == 405
    assert (folder / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("line", ["OPTIONS *", "CONNECT press:1", "GET metadata", "OPTIONS metadata/x"])
def test_target_without_a_slash_is_answered_and_leaves_no_line_in_the_log(served: Running, line: str):
    before = served.log.read_bytes()
    with served.raw() as link:
        link.sendall(f"{line} HTTP/1.1\r\nHost: press\r\nConnection: close\r\n\r\n".encode())
        answer = link.makefile("rb").read()
    assert answer.split(b" ", 2)[1] in (b"400", b"404", b"405"), answer
    assert served.log.read_bytes() == before


def test_a_file_that_is_replaced_while_it_is_served(served: Running, folder: Path):
    old, new = b"o" * 8_000_000, b"n" * 8_000_000
    (folder / "objects/moving").write_bytes(old)
    etag = served.ask("HEAD", "/objects/moving").headers["etag"]
    with closing(served.raw()) as link:
        link.sendall(b"GET /objects/moving HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        begun = link.recv(1000)
        (folder / "objects/new").write_bytes(new)
        (folder / "objects/new").replace(folder / "objects/moving")
        rest = link.makefile("rb").read()
    assert (begun + rest).partition(b"\r\n\r\n")[2] == old
    resumed = served.ask("GET", "/objects/moving", headers={"Range": "bytes=1000-", "If-Range": etag})
    assert (resumed.status, resumed.body == new) == (200, True)


def test_a_file_that_is_shortened_in_place_breaks_off(served: Running, folder: Path):
    (folder / "objects/short").write_bytes(b"s" * 8_000_000)
    with closing(served.raw()) as link:
        link.sendall(b"GET /objects/short HTTP/1.1\r\nHost: a\r\n\r\n")
        begun = link.recv(1000)
        os.truncate(folder / "objects/short", 10)
        rest = link.makefile("rb").read()  # ends, because the connection is closed
    assert len((begun + rest).partition(b"\r\n\r\n")[2]) < 8_000_000


def test_rules_without_files():
    assert part_of(0, '"e"', "bytes=0-", None).status == 416
    assert part_of(10, '"e"', "bytes= 2 - 3", None).length == 2
    assert not is_known('"e"', None)
    assert not is_known('"e"', '"e')
    assert not is_published("objects")

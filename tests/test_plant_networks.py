"""Networks as plants have them: proxies with passwords, private authorities, redirects, refusals, and addresses with secrets."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ota.agent import network, poll, transport
from ota.agent.disk import Disk
from ota.agent.network import LaterError, RefusedError, ShortError, bare, proxy_for, redirected
from ota.agent.state import Config
from ota.agent.transport import Folder, Web, at_most, connect, download, read_small
from ota.errors import TransferError
from ota.manifest import parse
from tests.fleet_kit import CLASS, LINE, Device, Field, untouched
from tests.network_kit import Asked, Authority, Proxy, Site
from tests.test_transport import Dripper, ends

pytest_plugins = ("tests.fleet_kit",)
# CPython leaves the TLS socket of a server to the garbage collector if its caller has gone before it was accepted.
pytestmark = pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")

HOST = "updates.plant.example"
SECRET = "pa%20ss:w%C3%B6rt"
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the proxies of the machine that runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site(offered: Field) -> Iterator[Site]:
    with Site(offered.repository.folder) as made:
        yield made


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


def init(field: Field, address: str, *words: str, code: int = 0) -> str:
    """Set the field's device up for another address."""
    root = field.repository.root_bytes()
    (field.folder / "root.json").write_bytes(root)
    return field.device.command(
        "init", "--device", "dev-1", "--line", LINE, "--class", CLASS, "--repository", address, "--reports", str(field.folder / "reports"),
        "--root", str(field.folder / "root.json"), "--root-sha256", hashlib.sha256(root).hexdigest(), *words, code=code,
    )  # fmt: skip


def release(device: Device) -> int:
    return device.state.seq


# Proxies


def test_device_behind_a_proxy_with_a_password_updates(offered, site, monkeypatch):
    with Proxy({HOST: site.port}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address())
        init(offered, f"http://{HOST}")
        told = offered.device.process("update")
        assert told.returncode == 0, told.stderr
        assert "release 2 is installed, by a delta" in told.stdout
        assert release(offered.device) == 2
        assert {passed.admitted for passed in proxy.passed} == {True}
        assert len(proxy.passed) == len(site.asked_for)
        assert not any("proxy-authorization" in asked.headers for asked in site.asked_for)


def test_device_behind_a_proxy_and_with_a_private_authority_updates(offered, tmp_path, authority, monkeypatch):
    (tmp_path / "ca.pem").write_bytes(b"# the plant's authority\n" + authority.pem)
    with (
        Site(offered.repository.folder, authority.certify(tmp_path, HOST)) as site,
        Proxy({HOST: site.port}) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy.address())
        init(offered, f"https://{HOST}/", "--ca", str(tmp_path / "ca.pem"))
        (tmp_path / "ca.pem").unlink()  # it is kept
        told = offered.device.process("update")
        assert told.returncode == 0, told.stderr
        assert "release 2 is installed, by a delta" in told.stdout
        assert {(passed.method, passed.target, passed.admitted) for passed in proxy.passed} == {("CONNECT", f"{HOST}:443", True)}
        assert "answers in" in offered.device.command("doctor", "--no-draw")
        init(offered, f"https://{HOST}/")
        with untouched(
            offered.device,
            TransferError,
            r"certificate is not accepted \(.*\); if a private authority signs it, .*--ca FILE",
            marks=False,
        ):
            offered.device.update()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("account", ["", "press:wrong@"])
def test_proxy_that_asks_for_a_password_is_named(offered, site, monkeypatch, scheme, account):
    with Proxy({HOST: site.port}) as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", proxy.address(account))
        offered.device.configure(repository=f"{scheme}://{HOST}")
        what = "does not accept the name and password" if account else "asks for a name and a password"
        with untouched(offered.device, RefusedError, rf"{what} \(status 407\); set {scheme}_proxy to http://NAME:PASSWORD@HOST"):
            offered.device.update()
        assert len(proxy.passed) == 1  # a proxy locks accounts that try again and again
        assert site.asked_for == []


@pytest.mark.parametrize(
    ("status", "said"), [(403, "refuses to connect to updates.plant.example"), (503, "does not reach updates.plant.example")]
)
def test_proxy_that_opens_no_tunnel_is_named(offered, monkeypatch, status, said):
    with Proxy({}, refuse=status) as proxy:
        monkeypatch.setenv("https_proxy", proxy.address())
        offered.device.configure(repository=f"https://{HOST}")
        with untouched(
            offered.device,
            RefusedError if status == 403 else TransferError,
            f"the proxy 127.0.0.1:{proxy.port} {said}.*status {status}",
        ):
            offered.device.update()


def test_proxy_that_nobody_runs_is_named(monkeypatch):
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://press:secret@127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(TransferError, match=f"cannot reach http://{HOST} through the proxy http://127.0.0.1:") as caught:
            read_small(Web(f"http://{HOST}"), "x", 1)
    assert "secret" not in str(caught.value)


A, B = "http://proxy-a:3128", "http://proxy-b:80"


@pytest.mark.parametrize(
    ("url", "variables", "expected"),
    [
        ("http://h/x", {}, None), ("http://h/x", {"http_proxy": A}, A), ("https://h/x", {"http_proxy": A}, None),
        ("https://h/x", {"HTTPS_PROXY": A}, A), ("http://h/x", {"http_proxy": A, "HTTP_PROXY": B}, A), ("http://h/x", {"HTTP_PROXY": B}, B),
        ("http://h/x", {"http_proxy": "", "HTTP_PROXY": B}, None), ("http://h/x", {"all_proxy": A}, A), ("https://h/x", {"ALL_PROXY": A}, A),
        ("http://h/x", {"http_proxy": "proxy-b"}, B), ("http://h/x", {"http_proxy": " proxy-a:3128 "}, A),
        ("http://h/x", {"http_proxy": "http://u:p%40@proxy-a:3128/"}, A), ("https://h/x", {"https_proxy": "https://proxy-a"}, "https://proxy-a:443"),
    ],
)  # fmt: skip
def test_proxy_is_chosen_by_the_variables(url, variables, expected):
    found = proxy_for(url, variables)
    assert (found.url if found else None) == expected


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("h.plant.example", "plant.example", True), ("h.plant.example", ".plant.example", True), ("h.plant.example", "*.plant.example", True),
        ("plant.example", "plant.example", True), ("xplant.example", "plant.example", False), ("H.Plant.Example", "PLANT.example", True),
        ("h.plant.example", "other, plant.example", True), ("h.plant.example", "other plant.example", True), ("h", "*", True), ("h", "", False),
        ("h", ",", False), ("h:8080", "h:8080", True), ("h:8080", "h:80", False), ("h", "h:80", True), ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False), ("10.1.2.3", "10.1.2.3", True), ("10.1.2.3", "3", False), ("10.1.2.3", "2.3", False),
        ("[fd00::1]", "fd00::/8", True), ("[::1]", "::1", True), ("[::1]:81", "[::1]:81", True), ("[::1]:81", "[::1]:80", False),
        ("127.0.0.1", "localhost", False), ("10.1.2.3", "fd00::/8", False), ("h", "10.0.0.0/8", False),
    ],
)  # fmt: skip
def test_no_proxy_excepts_names_addresses_and_networks(host, no_proxy, direct):
    found = proxy_for(f"http://{host}/x", {"http_proxy": A, "no_proxy": no_proxy})
    assert (found is None) == direct


@pytest.mark.parametrize(
    "value", ["socks5://u:secret@h:1080", "ftp://secret@h", "http://u:secret@", "http://u:secret@h:x", "http://[::1", "://secret"]
)
def test_variable_that_names_no_proxy_is_said_without_its_value(value):
    with pytest.raises(TransferError, match="the variable http_proxy does not name a proxy") as caught:
        proxy_for("http://h/x", {"http_proxy": value})
    assert "secret" not in str(caught.value)


CONNECTED = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "drip", [(b"HTTP/1.1 2", b"0"), (CONNECTED + b"X: ", b"a"), (CONNECTED, b"X: a\r\n"), (CONNECTED + b"\r\n", b"\x16")]
)
def test_dripping_proxy_is_left_at_the_deadline(monkeypatch, drip):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", 0.4)
    monkeypatch.setattr(transport, "GAP_TIMEOUT", 1.0)
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    with Dripper(*drip) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        error = ends(lambda: read_small(Web(f"https://{HOST}"), "metadata/timestamp.json", 10**7))
        assert isinstance(error, TransferError)
        assert "it will be tried again" in str(error)
        assert proxy.hung_up.wait(PATIENCE)  # the reading thread must not be left behind


# Redirects


@pytest.fixture
def other(offered: Field) -> Iterator[Site]:
    """Provide a second server with the same files, under another name: a redirect to it leads to another host."""
    with Site(offered.repository.folder) as made:
        made.address = made.address.replace("127.0.0.1", "localhost")
        yield made


def to(address: str, status: int = 302) -> Any:
    """Return a rule that redirects every request to the same name at another address."""
    return lambda asked: (status, {"Location": f"{address}/{asked.name}"})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_followed(offered, site, other, status):
    site.rule = to(other.address, status)
    assert read_small(Web(site.address), "metadata/timestamp.json", 10**6)
    assert len(other.asked_for) == len(site.asked_for) == 1


def test_download_through_a_redirect_is_resumed(offered, site, other):
    site.rule = to(other.address)
    offered.device.configure(repository=site.address)
    name = next(path.name for path in (offered.repository.target_files / "deltas").rglob("*") if path.is_file())
    other.faults.cut_after = {name: 20_000}
    assert offered.device.update().way == "delta"
    assert [headers.get("range") for headers in other.headers_of(name)] == [None, "bytes=20000-"]


@pytest.mark.parametrize(("hops", "follows"), [(3, True), (4, False)])
def test_three_redirects_are_followed_and_no_more(offered, site, hops, follows):
    def rule(asked: Asked) -> tuple[int, dict[str, str]] | None:
        done = int(asked.query or 0)
        return (302, {"Location": f"/{asked.name}?{done + 1}"}) if done < hops else None

    site.rule = rule
    if follows:
        assert read_small(Web(site.address), "metadata/timestamp.json", 10**6)
    else:
        with pytest.raises(RefusedError, match=r"redirects metadata/timestamp.json more than 3 times; give its last address"):
            read_small(Web(site.address), "metadata/timestamp.json", 10**6)
        assert len(site.asked_for) == 4


@pytest.mark.parametrize(
    ("url", "location", "expected"),
    [
        ("http://a/x", "http://b/y", "http://b/y"), ("http://a/x", "https://b/y", "https://b/y"), ("https://a/x", "https://b/y?sig=1", "https://b/y?sig=1"),
        ("https://a/x/z", "/y", "https://a/y"), ("https://a/x/z", "y", "https://a/x/y"), ("https://a/x", "//b/y", "https://b/y"),
        ("http://a/x", "http://u:p@b/y#z", "http://b/y"), ("https://a/x", "http://a/x", "from https to http"), ("https://a/x", "ftp://a/x", "other than http"),
        ("https://a/x", "file:///etc/passwd", "to no address"), ("https://a/x", "", "to no address"), ("https://a/x", None, "to no address"),
        ("https://a/x", "https://[::1", "to no address"), ("https://a/x", "https://a:0/x", "to no address"),
        ("https://a/x", "javascript:1", "to no address"),
    ],
)  # fmt: skip
def test_redirect_leads_to_the_same_scheme_or_to_https(url, location, expected):
    if expected.startswith("http"):
        assert redirected("f", url, location) == expected
    else:
        with pytest.raises(RefusedError, match=expected):
            redirected("f", url, location)


def test_redirect_from_https_to_http_is_not_followed(offered, tmp_path, authority, other):
    with Site(offered.repository.folder, authority.certify(tmp_path, "127.0.0.1")) as site:
        site.rule = to(other.address)
        offered.device.configure(repository=site.address, authorities=authority.pem.decode())
        with untouched(offered.device, RefusedError, "from https to http, which the agent does not follow"):
            offered.device.update()
    assert other.asked_for == []


def test_name_and_password_are_not_carried_to_another_host(offered, site, other):
    offered.device.configure(repository=site.address.replace("//", f"//dev:{SECRET}@") + "?sig=SIGNED")
    site.rule = lambda asked: to(other.address)(asked) if "deltas/" in asked.name else None
    assert offered.device.update().way == "delta"
    assert len(other.asked_for) == 1
    assert "authorization" not in other.asked_for[0].headers
    assert other.asked_for[0].query == ""
    assert all("authorization" in asked.headers and asked.query == "sig=SIGNED" for asked in site.asked_for)


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("http://h/y", True), ("https://h/y", True), ("https://h:8443/y", False), ("http://h:81/y", False), ("http://x.h/y", False), ("http://h.x/y", False),
        ("http://H:80/y", True),
    ],
)  # fmt: skip
def test_password_is_for_one_server(url, trusted):
    assert network.Address.parse("http://u:p@h/x").trusts(url) == trusted
    assert not network.Address.parse("https://u:p@h/x").trusts("http://h/x")


def test_redirect_with_a_dripping_body_is_left_at_the_deadline(monkeypatch):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", 0.4)
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    with Dripper(b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 100000\r\n\r\n", b"a") as server:
        error = ends(lambda: read_small(Web(f"http://127.0.0.1:{server.port}"), "x", 10**7))
        assert isinstance(error, TransferError)
        assert server.hung_up.wait(PATIENCE)


def test_redirect_to_a_dripping_server_is_left_at_the_deadline(site, monkeypatch):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", 0.4)
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    with Dripper(CONNECTED + b"Content-Length: 1000000\r\n\r\n", b"a") as server:
        site.rule = to(f"http://127.0.0.1:{server.port}")
        error = ends(lambda: read_small(Web(site.address), "x", 10**7))
        assert isinstance(error, TransferError)
        assert server.hung_up.wait(PATIENCE)


# Private authorities


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "whole certificates in PEM form"), (b"\xff\x00\x01", "whole certificates in PEM form"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "whole certificates in PEM form"),
    ],
)  # fmt: skip
def test_file_that_holds_no_certificates_is_refused_at_init(scene, tmp_path, content, said):
    (tmp_path / "ca").write_bytes(content)
    before = scene.device.facts()
    assert said in init(scene, "https://h", "--ca", str(tmp_path / "ca"), code=3)
    assert scene.device.facts() == before


def test_wrong_files_of_an_authority_are_refused_at_init(scene, tmp_path, authority):
    server = authority.certify(tmp_path, HOST).read_bytes()
    for content, said in (
        (authority.der, "openssl x509 -inform der"),
        (authority.pem[:-40], "whole certificates"),
        (authority.pem + authority.pem[:100], "whole certificates"),
        (server + authority.pem, "holds a private key"),
        (server[server.index(b"-----BEGIN CERT") :], "holds no root authority"),
    ):
        (tmp_path / "ca").write_bytes(content)
        assert said in init(scene, "https://h", "--ca", str(tmp_path / "ca"), code=3)
    assert "cannot read" in init(scene, "https://h", "--ca", str(tmp_path / "none"), code=3)
    init(scene, "https://h", "--ca", str(tmp_path / "ca"), code=3)
    (tmp_path / "ca").write_bytes("Behörde\n".encode() + authority.pem + b"\n" + Authority("Second").pem)
    init(scene, "https://h", "--ca", str(tmp_path / "ca"))
    assert scene.device.home.config().authorities.count("BEGIN CERTIFICATE") == 2


def test_configuration_of_an_agent_before_is_read(scene):
    old = json.loads((scene.device.root / "config.json").read_bytes())
    del old["authorities"]
    assert parse(Config, json.dumps(old).encode(), 10**6) == scene.device.home.config()


def test_other_authority_than_the_given_one_is_not_trusted(offered, tmp_path, authority):
    with Site(offered.repository.folder, Authority("Somebody").certify(tmp_path, "127.0.0.1")) as site:
        offered.device.configure(repository=site.address, authorities=authority.pem.decode())
        with untouched(offered.device, TransferError, "its certificate is not accepted"):
            offered.device.update()


def test_certificate_of_another_name_is_said_to_be(offered, tmp_path, authority):
    with Site(offered.repository.folder, authority.certify(tmp_path, HOST)) as site:
        offered.device.configure(repository=site.address, authorities=authority.pem.decode())
        with untouched(
            offered.device, TransferError, "its certificate is not accepted .*; give the name that the certificate holds"
        ):
            offered.device.update()


# Refusals and pauses


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "refuses the request"), (401, "asks for a name and a password"), (403, "refuses metadata/timestamp.json to this device"),
        (405, "refuses the request"), (416, "has no more of metadata/2.root.json than this device has already"), (407, "a proxy in between asks"), (451, "for legal reasons"), (511, "asks for a login"),
    ],
)  # fmt: skip
def test_refusal_is_named_and_not_taken_for_a_missing_file(offered, site, status, said):
    site.rule = lambda _: (status, {})
    offered.device.configure(repository=site.address)
    with untouched(offered.device, RefusedError, f"{said}.*status {status}"):
        offered.device.update()
    assert len(site.asked_for) <= 2  # 403 for the next root means that there is none
    told = offered.device.command("update", code=4)
    assert "lack" not in told
    assert "repository has no" not in told


@pytest.mark.parametrize("status", [400, 401, 407, 451])
def test_refusal_of_the_next_root_does_not_hide_it(offered, site, status):
    # python-tuf would otherwise go on with the old root, and so with keys that the next one removed.
    site.rule = lambda asked: (status, {}) if asked.name.endswith("root.json") else None
    offered.device.configure(repository=site.address)
    with untouched(offered.device, RefusedError, f"status {status}"):
        offered.device.update()


@pytest.mark.parametrize("status", [403])
def test_store_that_refuses_what_it_lacks_serves_updates(offered, site, status):
    # S3 answers 403 for a missing file unless everybody may list the bucket.
    site.rule = lambda asked: None if (offered.repository.folder / asked.name).is_file() else (status, {})
    offered.device.configure(repository=site.address)
    assert offered.device.update().changed


def test_wrong_password_is_said_to_be(offered, site):
    site.rule = lambda _: (401, {"WWW-Authenticate": 'Basic realm="x"'})
    offered.device.configure(repository=site.address.replace("//", f"//dev:{SECRET}@"))
    with untouched(offered.device, RefusedError, "does not accept the name and password that were given"):
        offered.device.update()


def test_short_pause_that_a_server_asks_for_is_kept(offered, site, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=pauses.append))
    refused = iter([(503, {"Retry-After": "7"}), (429, {"Retry-After": "9"})])
    site.rule = lambda asked: next(refused, None) if "deltas/" in asked.name else None
    offered.device.configure(repository=site.address)
    assert offered.device.update().way == "delta"
    first, second = pauses
    assert 7 < first < 9
    assert 9 < second < 12


@pytest.mark.parametrize("asked", ["3600", "600"])
def test_long_pause_that_a_server_asks_for_is_reported(offered, site, asked):
    site.rule = lambda _: (503, {"Retry-After": asked})
    offered.device.configure(repository=site.address)
    with untouched(
        offered.device, LaterError, rf"status 503\); try again after \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC, in {asked} s"
    ):
        offered.device.update()
    assert len(site.asked_for) == 1


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("7200", 7200, 9000), ("9" * 9, 86_400, 108_000), ("1", 45, 75), ("soon", 45, 75)]
)
def test_next_check_waits_as_long_as_the_server_asks(offered, site, asked, least, most):
    class Stopper(threading.Event):
        waited = 0.0

        def wait(self, timeout: float | None = None) -> bool:
            self.waited += timeout or 0.0  # in pieces, between which reports are sent
            return self.is_set()

    def later(_: object) -> tuple[int, dict[str, str]]:
        if stopper.waited:  # this is the next check
            stopper.set()
        return 503, {"Retry-After": asked}

    site.rule = later
    offered.device.configure(repository=site.address)
    stopper = Stopper()
    poll.run(offered.device.home, 3600, stopper, lambda _: None, at_once=True)
    assert least <= stopper.waited <= most


def test_refused_device_does_not_ask_sooner(offered, site):
    """Ask again after the usual time: a proxy locks an account after some attempts with an old password."""
    waits: list[float] = []

    class Stopper(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            if len(waits) == 2:
                self.set()
            return self.is_set()

    site.rule = lambda _: (407, {})
    offered.device.configure(repository=site.address)
    poll.run(offered.device.home, 3600, Stopper(), lambda _: None, at_once=True)
    assert [2700 <= wait <= 4500 for wait in waits] == [True, True]
    assert len(site.asked_for) == 2


NOW = 1_700_000_000


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        (None, None, 0), ("", None, 0), ("120", None, 120), (" 5 ", None, 5), ("-5", None, 0), ("1.5", None, 0), ("9" * 50, None, 0), ("²", None, 0),
        ("Tue, 14 Nov 2023 22:14:20 GMT", None, 60), ("Tue, 14 Nov 2023 22:12:20 GMT", None, 0), ("Tue, 99 Nov 2023 22:14:20 GMT", None, 0),
        ("Tue, 14 Nov 2000 00:01:00 GMT", "Tue, 14 Nov 2000 00:00:00 GMT", 60), ("Tue, 14 Nov 2023 22:14:20 GMT", "nonsense", 60),
    ],
)  # fmt: skip
def test_pause_is_read_in_both_forms(value, date, seconds):
    assert network.wait_asked(value, date, NOW) == seconds


# Secrets in addresses


def everything_in(folder: Path) -> str:
    """Return the text of all files below a folder, except the configuration that has to hold the address."""
    return "".join(
        path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file() and path.name != "config.json"
    )


def test_secrets_of_the_address_are_sent_and_never_shown(offered, site, caplog):
    address = site.address.replace("//", f"//dev:{SECRET}@") + "?sv=1&sig=SIGNED"
    told = init(offered, address)
    caplog.set_level(0)
    told += offered.device.command("--debug", "update")
    assert release(offered.device) == 2
    assert {asked.query for asked in site.asked_for} == {"sv=1&sig=SIGNED"}
    assert {asked.headers["authorization"] for asked in site.asked_for} == {"Basic ZGV2OnBhIHNzOnfDtnJ0"}
    told += (
        offered.device.command("doctor", "--no-draw")
        + offered.device.command("status")
        + offered.device.command("update", "--check")
    )
    for rule in ((401, {}), (403, {}), (503, {"Retry-After": "999"}), (302, {"Location": "ftp://u:SIGNED@h/?sig=SIGNED"})):
        site.rule = lambda _, rule=rule: rule
        told += offered.device.command("update", code=4) + offered.device.command("doctor", "--no-draw")
    site.__exit__()
    told += offered.device.process("--debug", "update").stderr
    site.__enter__ = lambda: site
    for text in (told, caplog.text, everything_in(offered.folder)):
        for secret in ("SIGNED", SECRET, "pa ss", "ZGV2OnBhIHNz"):
            assert secret not in text
    assert (offered.device.root / "config.json").stat().st_mode & 0o077 == 0


def test_command_for_the_owner_shows_no_secret(scene, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    told = init(scene, f"https://dev:{SECRET}@h/x?sig=SIGNED", code=3)
    assert "https://h/x" in told
    assert SECRET not in told
    assert "SIGNED" not in told


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://u:p@h/x?sig=1", "https://h/x"), ("http://u@h", "http://h"), ("HTTPS://h/?a", "HTTPS://h/"), ("/mnt/what?/x", "/mnt/what?/x"),
        ("--repository=https://u:p@h/x?sig=1", "--repository=https://h/x"), ("file:///x", "file:///x"), ("https://h/a@b", "https://h/a@b"),
    ],
)  # fmt: skip
def test_address_is_shown_without_secrets(address, shown):
    assert bare(address) == shown


# A file that is cut short where it is published


def delta_of(field: Field) -> Path:
    (path,) = [path for path in (field.repository.target_files / "deltas").rglob("*") if path.is_file()]
    return path


@pytest.mark.parametrize(
    ("way", "left"), [("stick", 20_000), ("mirror", 20_000), ("mirror without ranges", 20_000), ("stick", 0)]
)
def test_delta_that_is_cut_short_gives_way_to_the_full_bundle(offered, site, monkeypatch, way, left):
    monkeypatch.setattr(transport, "BACKOFF", 0.0)
    path = delta_of(offered)
    path.write_bytes(path.read_bytes()[:left])
    if way != "stick":
        site.faults.ignore_range = way == "mirror without ranges"
        offered.device.configure(repository=site.address)
    outcome = offered.device.update()
    assert (outcome.way, outcome.changed, offered.device.sound) == ("full", True, True)


@pytest.mark.parametrize("way", ["stick", "mirror without ranges"])
def test_delta_that_an_earlier_agent_could_not_resume_gives_way(offered, site, way):
    path = delta_of(offered)
    path.write_bytes(path.read_bytes()[:20_000])
    (offered.device.root / "incoming").mkdir(exist_ok=True)
    (offered.device.root / "incoming" / path.name.partition(".")[0]).write_bytes(path.read_bytes())
    if way != "stick":
        site.faults.ignore_range = True
        offered.device.configure(repository=site.address)
    assert offered.device.update().way == "full"


def test_delta_that_a_stick_cannot_read_gives_way(offered, monkeypatch):
    monkeypatch.setattr(transport, "BACKOFF", 0.0)
    opened = Folder._open

    def broken(self: Folder, name: str) -> int:
        if "deltas/" in name:
            raise OSError(5, "Input/output error")
        return opened(self, name)

    monkeypatch.setattr(Folder, "_open", broken)
    assert offered.device.update().way == "full"


def test_object_that_is_cut_short_is_named_and_kept(tmp_path):
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / "file").write_bytes(b"content")
    with pytest.raises(ShortError, match="the repository's file has only 7 of 50 bytes; copy or publish it again"):
        download(connect(str(tmp_path / "stick")), "file", 50, Disk(tmp_path), "part", at_most(PATIENCE))
    assert (tmp_path / "part").read_bytes() == b"content"


def test_link_that_breaks_is_no_reason_for_the_full_bundle(offered, site, monkeypatch):
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    site.faults.cut_after = {delta_of(offered).name: 20_000}
    offered.device.configure(repository=site.address)
    with pytest.raises(TransferError, match="will be resumed"):
        offered.device.update()
    assert offered.device.update().way == "delta"

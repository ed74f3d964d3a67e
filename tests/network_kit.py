"""What stands between a plant's devices and a repository: a proxy that asks for a password, redirects, and private authorities.

All of it runs on the loopback interface. Names such as updates.plant.example are known to the proxy only, so a device that does
not ask the proxy reaches nothing.
"""

from __future__ import annotations

import base64
import datetime as dt
import gzip
import http.client
import ipaddress
import json
import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ota.report import open_line
from tests.fleet_kit import WebServer

# Certificates


class Authority:
    """A private certificate authority."""

    def __init__(self, name: str = "Plant Authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._name, self._key, [], authority=True)
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)
        self.der = self._certificate.public_bytes(serialization.Encoding.DER)

    def _sign(self, subject: x509.Name, key: Any, names: list[x509.GeneralName], authority: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"),
            False,
        )
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **usage), critical=True
            )
            .add_extension(own, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(self._key, hashes.SHA256())

    def certify(self, folder: Path, *hosts: str) -> Path:
        """Write a file with a private key and the certificate of a server, and return its path."""
        key, names = ec.generate_private_key(ec.SECP256R1()), list[x509.GeneralName]()
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        certificate = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])]), key, names, authority=False)
        path = folder / f"{hosts[0]}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )  # fmt: skip
        return path


# Servers


@dataclass
class Asked:
    """One request that a site received."""

    name: str
    query: str
    headers: dict[str, str]


Rule = Callable[[Asked], tuple[int, dict[str, str]] | None]


class Site(WebServer):
    """A web server for a folder that records headers, and that may answer otherwise, for example with a redirect."""

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(folder)
        self.asked_for: list[Asked] = []
        self.rule: Rule = lambda _: None
        self.port = int(self._server.server_address[1])
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
            self.address = self.address.replace("http:", "https:")

    def _answer(self, http: BaseHTTPRequestHandler, folder: Path) -> None:
        path, _, query = http.path.partition("?")
        asked = Asked(path.lstrip("/"), query, {name.lower(): value for name, value in http.headers.items()})
        self.asked_for.append(asked)
        answer = self.rule(asked)
        if answer is None:
            http.path = path
            super()._answer(http, folder)
            return
        http.send_response(answer[0])
        for name, value in ({"Content-Length": "0", "Connection": "close"} | answer[1]).items():
            http.send_header(name, value)
        http.end_headers()

    def headers_of(self, end: str) -> list[dict[str, str]]:
        return [asked.headers for asked in self.asked_for if asked.name.endswith(end)]


@dataclass
class Passed:
    """One request that a proxy received."""

    method: str
    target: str
    admitted: bool


@dataclass
class Proxy:
    """A proxy that lets only those pass who know a name and a password; it alone knows the names of servers."""

    names: dict[str, int]
    """Port on the loopback interface, by host name."""
    account: str = "press:s@crt/1"
    passed: list[Passed] = field(default_factory=list)
    refuse: int = 0
    """Answer everything with this status."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def address(self, account: str = "press:s%40crt%2F1@") -> str:
        return f"http://{account}127.0.0.1:{self.port}"

    def _admits(self, http: BaseHTTPRequestHandler) -> bool:
        expected = f"Basic {base64.b64encode(self.account.encode()).decode()}"
        admitted = http.headers.get("Proxy-Authorization") == expected and not self.refuse
        self.passed.append(Passed(http.command, http.path, admitted))
        if not admitted:
            http.send_response(self.refuse or 407)
            http.send_header("Proxy-Authenticate", 'Basic realm="plant"')
            http.send_header("Content-Length", "0")
            http.end_headers()
        return admitted

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.close_connection = True
                if proxy._admits(self):
                    parts = urlsplit(self.path)
                    server = http.client.HTTPConnection("127.0.0.1", proxy.names[str(parts.hostname)], timeout=60)
                    passing = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
                    server.request("GET", f"{parts.path}{'?' if parts.query else ''}{parts.query}", headers=passing)
                    answer = server.getresponse()
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    with suppress(OSError):
                        self.wfile.write(answer.read())
                    server.close()

            def do_CONNECT(self) -> None:
                self.close_connection = True
                if not proxy._admits(self):
                    return
                host = self.path.rpartition(":")[0].strip("[]")
                if host not in proxy.names:
                    self.send_error(502)
                    return
                with socket.create_connection(("127.0.0.1", proxy.names[host])) as server:
                    self.send_response(200, "Connection established")
                    self.end_headers()
                    relay(self.connection, server)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def relay(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes between two connections until one of them ends."""
    with suppress(OSError):
        while True:
            for source in select.select([one, other], [], [])[0]:
                data = source.recv(65536)
                if not data:
                    return
                (other if source is one else one).sendall(data)


# A gateway


@dataclass
class Posted:
    """One request with a body that a gateway received."""

    path: str
    headers: dict[str, str]
    body: bytes
    """As sent."""

    @property
    def lines(self) -> list[bytes]:
        """Lines of a packed batch."""
        return gzip.decompress(self.body).splitlines()

    @property
    def numbers(self) -> list[int]:
        """Numbers of the reports of a batch."""
        return [open_line(line).report.number for line in self.lines]


Reply = tuple[int, dict[str, str], bytes]


class Inbox(WebServer):
    """A gateway on the loopback interface that accepts all reports, or answers as its `rule` says."""

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(folder)
        self.posted: list[Posted] = []
        self.time = 1_900_000_000
        self.rule: Callable[[Posted], Reply] = lambda posted: self.answer(accepted=posted.numbers)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
            self.address = self.address.replace("http:", "https:")

    def answer(
        self, accepted: Sequence[int] = (), refused: Sequence[tuple[int, str]] = (), highest: int = 0, **headers: str
    ) -> Reply:
        """Make an answer that names reports."""
        refusals = [{"number": number, "code": code, "reason": f"because of {code}"} for number, code in refused]
        told = {"accepted": [*accepted], "refused": refusals, "highest": highest, "time": self.time}
        return 200, {"Content-Type": "application/json"} | headers, json.dumps(told).encode()

    def _handler(self, folder: Path) -> type[BaseHTTPRequestHandler]:
        inbox, parent = self, super()._handler(folder)

        class Handler(parent):  # type: ignore[misc,valid-type]
            def do_POST(self) -> None:  # noqa: N802 - its name in the base class
                self.close_connection = True
                body = self.rfile.read(int(self.headers["Content-Length"]))
                posted = Posted(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                inbox.posted.append(posted)
                status, headers, data = inbox.rule(posted)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data)), "Connection": "close"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(data)

        return Handler

"""Rules for the networks of plants, without I/O: the proxy, the redirect, the meaning of an answer, and what may be shown.

Names, passwords and queries of addresses are sent to the one server that they are meant for. No message contains them.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urljoin, urlsplit

from urllib3.util import parse_url

from ota.errors import OperatorError, TransferError

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429)  # those statuses from 400 to 499 that ask for a retry
LOGIN = 511  # a network that asks for a login first (RFC 6585)
PORTS = {"http": 80, "https": 443}
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----")


class UnavailableError(TransferError):
    """The source does not give this file whole, for a reason of the file's own; it may still give others."""


class NotFoundError(UnavailableError):
    """The repository does not have the file; a retry would only add load."""


class RefusedError(UnavailableError):
    """The server, or a proxy before it, refuses to give the file; a retry would only add load."""

    def __init__(self, message: str, status: int = 0) -> None:
        """Take the message, and the status of the server's answer; 0 if the answer is not the server's own."""
        super().__init__(message)
        self.status = status


class ShortError(UnavailableError):
    """The source's own copy of the file ends before its signed length; a retry would find the same."""


class LaterError(TransferError):
    """The server asks to wait for a time before the next request."""

    def __init__(self, message: str, seconds: float) -> None:
        """Take the message, and how many seconds the server asks to wait."""
        super().__init__(message)
        self.seconds = seconds


# Addresses


@dataclass(frozen=True)
class Address:
    """An address of a repository, taken apart."""

    url: str
    """Without name, password and query."""
    query: str = field(repr=False)
    authorization: str = field(repr=False)
    """Value of the header that carries name and password; empty if there are none."""

    @classmethod
    def parse(cls, address: str) -> Address:
        """Take an http(s) address apart.

        Raises:
            ValueError: it is not valid.
        """
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
        return cls(f"{parts.scheme}://{host}{parts.path.rstrip('/')}", parts.query, _basic(parts.netloc))

    def of(self, name: str) -> str:
        """Return the address of a file, with the query."""
        return f"{self.url}/{name}{'?' if self.query else ''}{self.query}"

    def trusts(self, url: str) -> bool:
        """Check whether name and password may be sent to an address: to the same server, or to its https side."""
        (scheme, host, port), (other_scheme, other, other_port) = _origin(self.url), _origin(url)
        if host != other:
            return False
        return (scheme, port) == (other_scheme, other_port) or (port, other_scheme, other_port) == (80, "https", 443)


def _basic(netloc: str) -> str:
    """Return the header's value for the name and password in front of a host (RFC 7617), or nothing."""
    who, found, _ = netloc.rpartition("@")
    name, _, password = who.partition(":")
    return f"Basic {base64.b64encode(f'{unquote(name)}:{unquote(password)}'.encode()).decode()}" if found else ""


def _origin(url: str) -> tuple[str, str, int]:
    parts = parse_url(url)
    scheme = parts.scheme or ""
    return scheme, (parts.host or "").lower().strip("[]").rstrip("."), parts.port or PORTS.get(scheme, 0)


def bare(address: str) -> str:
    """Remove name, password and query from addresses in a text, because they must not be shown."""
    return re.sub(r"(?i)(https?://[^?\s]*)\?\S*", r"\1", re.sub(r"(?<=//)[^/?#]*@", "", address))


# Proxies


@dataclass(frozen=True)
class Proxy:
    """A proxy that stands between this device and a server."""

    url: str
    """Without name and password."""
    authorization: str = field(repr=False)
    variable: str
    """Name of the environment variable that names it."""


def proxy_for(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """Choose the proxy for an address as curl does: by `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`.

    Args:
        url: the address that is asked.
        environ: the environment variables; names in small letters go before those in capitals.

    Raises:
        TransferError: the variable holds no address of a proxy. Its value is not shown, since it may hold a password.
    """

    def value(name: str) -> str:
        return environ.get(name, environ.get(name.upper(), "")).strip()

    scheme, host, port = _origin(url)
    names = [name for name in (f"{scheme}_proxy", "all_proxy") if value(name)]
    if not names or any(_covers(entry, host, port) for entry in re.split(r"[,\s]+", value("no_proxy"))):
        return None
    address = value(names[0]) if "://" in value(names[0]) else f"http://{value(names[0])}"
    problem = TransferError(
        f"the variable {names[0]} does not name a proxy that the agent can use; set it to an address such as "
        "http://NAME:PASSWORD@proxy.example.com:3128"
    )
    try:
        parts, netloc = parse_url(address), urlsplit(address).netloc
    except ValueError:
        raise problem from None  # the foreign error quotes the address
    if parts.scheme not in PORTS or not parts.host:
        raise problem
    where = f"{parts.scheme}://{parts.host}:{parts.port or PORTS[parts.scheme]}"
    return Proxy(where, _basic(netloc), names[0])


def _covers(entry: str, host: str, port: int) -> bool:
    """Check whether an entry of `no_proxy` means a host: a name with all below it, an IP address, a network, or `*`."""
    if entry == "*":
        return True
    name = entry.lower()
    if found := re.fullmatch(r"([^:]+|\[.+\]):(\d+)", name):
        name = found[1]
        if int(found[2]) != port:
            return False
    name = name.strip("[]")
    with suppress(ValueError):
        own = ipaddress.ip_address(host)
        with suppress(ValueError):
            return own in ipaddress.ip_network(name, strict=False)
        return False
    name = name.removeprefix("*").strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


# Answers


def redirected(name: str, url: str, location: str | None) -> str:
    """Return the address to which a server redirects; a name and password in it are dropped.

    Raises:
        RefusedError: it leads from https to http, to something that is neither, or nowhere.
    """
    try:
        target = urlsplit(urljoin(url, location or ""))
        place = parse_url(target._replace(netloc=target.netloc.rpartition("@")[2], fragment="").geturl())
    except ValueError:
        location = None
    server = _shown(url)
    if not location or not place.host or place.port == 0:
        raise RefusedError(f"{server} redirects {name} to no address; correct the redirect on that server")
    if place.scheme not in PORTS:
        raise RefusedError(f"{server} redirects {name} to something other than http or https; correct the redirect there")
    if place.scheme != urlsplit(url).scheme and place.scheme != "https":
        raise RefusedError(
            f"{server} redirects {name} from https to http, which the agent does not follow; let it redirect to an https address"
        )
    return place.url


def _shown(url: str) -> str:
    return urlsplit(bare(url)).netloc


def refusal(status: int, name: str, url: str, authorized: bool, proxy: Proxy | None) -> TransferError | None:
    """Say what an answer means if it is none that a retry could change: what is wrong, and what to do next.

    Args:
        status: status of the answer.
        name: name of the file that was asked for.
        url: address of the server.
        authorized: whether a name and password were sent.
        proxy: the proxy through which was asked.
    """
    server, end = _shown(url), f"(status {status})"
    if status in (404, 410):
        return NotFoundError(f"the repository has no {name} {end}; publish it again, or check the address given at init")
    if status == 407:
        return _unknown_to(proxy)
    if status == LOGIN:
        return RefusedError(f"the network asks for a login before it lets {name} pass {end}; ask who runs the network", status)
    if not 400 <= status < 500 or status in PASSING:
        return None
    told = {
        401: (
            f"{server} does not accept the name and password that were given {end}; correct them in the address"
            if authorized
            else f"{server} asks for a name and a password {end}; give them in the address"
        )
        + " with `ferry-agent init --repository https://NAME:PASSWORD@HOST/…`",
        403: f"{server} refuses {name} to this device {end}; ask who runs that server, or the firewall in between, to allow it",
        416: f"{server} has no more of {name} than this device has already {end}; copy or publish it again",
        451: f"{server} withholds {name} for legal reasons {end}; ask who runs that server",
    }
    plain = f"{server} refuses the request for {name} {end}; check the address given at init, and ask who runs that server"
    return RefusedError(told.get(status, plain), status)


def _unknown_to(proxy: Proxy | None) -> RefusedError:
    if proxy is None:
        return RefusedError("a proxy in between asks for a name and a password (status 407); set http_proxy and https_proxy")
    what = "does not accept the name and password" if proxy.authorization else "asks for a name and a password"
    return RefusedError(
        f"the proxy {_shown(proxy.url)} {what} (status 407); set {proxy.variable} to http://NAME:PASSWORD@HOST:PORT"
    )


def no_tunnel(status: int, url: str, proxy: Proxy) -> TransferError:
    """Say why a proxy opens no tunnel to a server."""
    server, who = _shown(url), f"the proxy {_shown(proxy.url)}"
    if status == 407:
        return _unknown_to(proxy)
    if 400 <= status < 500 and status not in PASSING:
        return RefusedError(f"{who} refuses to connect to {server} (status {status}); ask who runs the proxy to allow it")
    return TransferError(f"{who} does not reach {server} (status {status}); it will be tried again")


def wait_asked(retry_after: str | None, date: str | None, now: float) -> float:
    """Return how many seconds a server asks to wait, 0 if it does not say.

    Args:
        retry_after: the header of that name: seconds, or a date.
        date: the header Date, the server's own time. With it, a wrong clock of this device does not matter.
        now: seconds since 1970.
    """
    text = (retry_after or "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    until, at = _moment(text), _moment(date or "")
    return max(0.0, until - (now if at is None else at)) if until is not None else 0.0


def _moment(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def later(status: int, name: str, url: str, seconds: float, now: float) -> LaterError:
    """Say until when a server asks to wait."""
    moment = datetime.fromtimestamp(min(now + seconds, 2**35), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return LaterError(
        f"{_shown(url)} cannot give {name} now (status {status}); try again after {moment}, in {seconds:.0f} s", seconds
    )


# A private authority


def certificates(data: bytes) -> str:
    """Return the certificates of a PEM file, without what else is in it.

    Raises:
        OperatorError: the file holds no root authority's certificate, or a damaged one, or a private key.
    """
    from cryptography import x509  # imported only where it is needed, at `init`

    text = re.sub(r"[ \t\r]+\n", "\n", data.decode("ascii", "replace"))
    if "PRIVATE KEY-----" in text:
        raise OperatorError("the file given with --ca holds a private key, which no device needs; give the certificates alone")
    found = CERTIFICATE.findall(text)
    try:
        made = [x509.load_pem_x509_certificate(one.encode()) for one in found]
    except ValueError:
        made = []
    if not made or len(found) != text.count("-----BEGIN CERTIFICATE-----"):
        raise OperatorError(
            "the file given with --ca does not hold whole certificates in PEM form; give such a file (a DER file becomes one with "
            "`openssl x509 -inform der -in FILE -out ca.pem`)"
        )
    if not any(one.issuer == one.subject for one in made):
        raise OperatorError(
            "the file given with --ca holds no root authority, only certificates that another one signed; add the root's certificate"
        )
    return "\n".join(found) + "\n"

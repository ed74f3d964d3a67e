"""Examples of everything that leaves, made by the program's own code: documents, a signed repository, requests and answers."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ota.agent import serve
from ota.agent.channel import Waiting, channel_to
from ota.agent.state import Home
from ota.agent.transport import connect
from ota.errors import TransferError
from ota.manifest import (
    ROLES_OF_VARIANT,
    FileEntry,
    Image,
    Manifest,
    Origin,
    Range,
    Reference,
    Role,
    Runtime,
    SamplerTable,
    VariantName,
)
from ota.manifest import Golden as Closeness
from ota.policy import Policy, Policy2, Wave
from ota.release import keys, rollout
from ota.release.repository import Repository
from ota.report import REPORT_FORM, DeviceReport, Enrolment, Event, Health, Outcome, seal

LINE, CLASS = "gaskets", "edge"
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
STATISTICS: tuple[Any, ...] = get_args(get_args(Reference.model_fields["statistics"].annotation)[0])


def digest(text: str) -> str:
    """Return the sha256 of a text, as an example of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()


def manifest() -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest of a bundle with one variant, and its files by hash."""
    parts: tuple[tuple[Role, Any], ...] = (("graph", None), *((role, "full") for role in ROLES_OF_VARIANT))
    contents: dict[Role, bytes] = {role: f"the {role} file".encode() for role, _ in parts}
    contents |= {"sampler": sampler().canonical(), "reference": reference().canonical()}
    files = {hashlib.sha256(data).hexdigest(): data for data in contents.values()}
    entries = [
        FileEntry(role=role, variant=variant, size=len(contents[role]), sha256=hashlib.sha256(contents[role]).hexdigest())
        for role, variant in parts
    ]
    origin = Origin(
        data_rev=digest("rev")[:40], data_md5=f"{digest('md5')[:32]}.dir", code=digest("code"), lineage=digest("lineage"),
        scorecard=digest("scorecard"), decision=digest("decision"), model=f"{LINE}-I-full", version=4,
    )  # fmt: skip
    made = Manifest(
        line=LINE, device_class=CLASS, tier="nano", configuration="I", precision="bfloat16", variants=["full"], default_variant="full",
        files=entries, origin=origin, minimum_agent="0.1.0",
    )  # fmt: skip
    return made, files


def sampler() -> SamplerTable:
    """Return an example of sampler.json."""
    runtime = Runtime(onnxruntime=[">=1.20", "<2"], graph_optimization_level="all", config={})
    return SamplerTable(
        schema_version=1, variant="full", method="ab2", times=[1.0, 0.5, 0.0], guidance=2.0, image=Image(channels=1, size=16),
        text_length=24, runtime=runtime,
    )  # fmt: skip


def reference() -> Reference:
    """Return an example of reference.json."""
    return Reference(
        schema_version=1, golden=Closeness(tolerance=0.01, share=0.99), load=[[0.25, 0.25, 0.25, 0.25]] * 6,
        statistics={name: Range(low=0.1, high=0.4) for name in STATISTICS}, latency_ms=5000.0,
    )  # fmt: skip


def report() -> DeviceReport:
    """Return an example of a report: a heartbeat, which has all fields."""
    own = manifest()[0].digest
    ends: tuple[tuple[Event, str], ...] = (("refused", digest("next")), ("confirmed", own))
    happened = [Outcome(event=event, manifest=of, time=1_759_900_000) for event, of in ends]
    health = Health(
        since=1_759_000_000, share="all", tags=["site=berlin", "hall=3"], variant="full", images=5_210, refused=3, failed=1, not_finite=0,
        out_of_range=12, late=40, p50_ms=31.2, p95_ms=44.8, joules=0.41, joules_source="RAPL package-0 (measured)", outcomes=happened,
        totals={"confirmed": 4, "refused": 1}, dropped=0, free=3_221_225_472, load=[[2_610_000, 2_600_000], [1_900_000, 3_310_000]],
        captions=[1_200, 950], other_captions=3_060, statistics={name: [2, 300, 900, 1_500, 1_400, 800, 300, 8] for name in STATISTICS},
    )  # fmt: skip
    return DeviceReport(
        device="press-01", boot="3d0f8bd2-6c1e-4d38-9d9c-1f3fa1b7a9c4", number=42, time=1_760_000_000, line=LINE, device_class=CLASS,
        event="alive", manifest=own, active=own, schema_version=REPORT_FORM, agent="0.3.0", health=health,
    )  # fmt: skip


def report_line(made: DeviceReport) -> bytes:
    """Return a report as it is sent, signed by an example of a key."""
    return seal(made, _KEY)


def enrolment() -> Enrolment:
    """Return an example of what a device sends to be enrolled."""
    token, named = "TOKEN-OF-THE-OPERATOR", ("press-01", LINE, CLASS)
    return Enrolment(
        device=named[0], line=LINE, device_class=CLASS, token=token, signature=_KEY.sign(Enrolment.message(token, *named)).hex(),
        public_key=_KEY.public_key().public_bytes_raw().hex(),
    )  # fmt: skip


def posted_headers() -> dict[str, str]:
    """Return the headers of the request with which an agent sends reports, as a gateway receives them."""
    received: dict[str, str] = {}

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            received.update(self.headers.items())
            self.send_error(500)

        def log_message(self, *_: Any) -> None:
            pass

    line = report_line(report())
    with _serving(HTTPServer(("127.0.0.1", 0), Server)) as port:
        gateway = channel_to(f"http://NAME:PASSWORD@127.0.0.1:{port}/plant")
        with closing(gateway), suppress(TransferError):
            gateway.deliver([Waiting(42, "press-01", line)])
    received["Host"] = "gateway.example.com"  # not the port of this server
    return received


def policy() -> Policy:
    """Return an example of a policy with three waves."""
    waves = [Wave(bps=bps, not_before=1_760_000_000 + i * 86_400) for i, bps in enumerate((100, 1_000, 10_000))]
    made, _ = manifest()
    return Policy(line=LINE, device_class=CLASS, seq=1, manifest=made.digest, salt=f"1-{made.digest[:16]}", waves=waves)


def policy2() -> Policy2:
    """Return an example of a policy 2 that is open to a hundredth of the watched devices."""
    made, _ = manifest()
    steps = [rollout.limit_of(bps) for bps in (100, 1_000, 10_000)]
    return Policy2(
        line=LINE, device_class=CLASS, seq=1, manifest=made.digest, salt=f"1-{made.digest[:16]}", policy=1, limit=steps[0], steps=steps,
        first=["press-01", "site=berlin"],
    )  # fmt: skip


@contextmanager
def repository() -> Iterator[Repository]:
    """Make a repository with one release, a delta to it, a policy and a floor; it is removed after the block."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made, files = manifest()
        (root / "files").mkdir()
        for name, data in files.items():
            (root / "files" / name).write_bytes(data)
        (root / "delta").write_bytes(b"a delta")
        published = Repository.create(root / "repository", keys.create(root / "keys"))
        release = published.publish_release(made, root / "files", digest("ledger"), [(digest("before"), root / "delta")])
        published.set_policy(
            rollout.start(release, (1, 10, 100), soak=86_400), rollout.watched(release, (1, 10, 100), None, None, rollout.Terms())
        )
        published.set_floor(LINE, CLASS, release.seq)
        yield published


def request_headers() -> dict[str, str]:
    """Return the headers of the request with which an agent resumes a download, as a server receives them."""
    received: dict[str, str] = {}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            received.update(self.headers.items())
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with _serving(HTTPServer(("127.0.0.1", 0), Server)) as port:
        source = connect(f"http://NAME:PASSWORD@127.0.0.1:{port}/f")
        with suppress(TransferError):  # there is no such file
            next(source.read("metadata/none", offset=1_000_000), b"")
        source.close()
    received["Host"] = "updates.example.com"  # not the port of this server
    return received


class Service(serve.Service):
    """A service that draws without a model."""

    def draw(self, caption: str, seed: int, variant: VariantName | None = None) -> tuple[bytes, dict[str, Any]]:
        """Return no image, and how it was drawn."""
        del caption, seed
        return b"", {"bundle": digest("bundle"), "variant": variant or "full", "milliseconds": 31.4}


def served() -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Return what `ferry-agent serve` answers: headers of an image, headers of an error, and the status of a new device."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Home(Path(folder)))
        with serve.listening_port(0) as server:
            server.service = service
            with _serving(server) as port:
                image, _ = _asked(port, "POST", "/generate", b'{"caption": "gasket, torn"}')
                error, _ = _asked(port, "GET", "/none")
                _, status = _asked(port, "GET", "/status")
    return image, error, cast("dict[str, Any]", json.loads(status))


def _asked(port: int, method: str, path: str, body: bytes | None = None) -> tuple[dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return dict(answer.getheaders()), data


@contextmanager
def _serving(server: Any) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""`make fuzz`: test all parsers of foreign bytes with coverage-guided input: documents, metadata, deltas, requests.

    python -m tests.fuzz              all targets, which share FUZZ_SECONDS (300)
    python -m tests.fuzz TARGET FILE  run one input

Any exception but the agent's own errors is a finding. So is memory beyond MEMORY, or one input that takes longer than SECONDS.
Inputs that reached new code are kept in build/fuzz/TARGET and used again. Seeds are made anew each time from real documents
and deltas, so they are never out of date. A finding is written to build/fuzz/TARGET-crash-….
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import numpy as np

BUILD = Path("build/fuzz")
MEMORY = 1024  # MiB of a process; a delta may take 64 of them
SECONDS = 20  # for one input
LARGEST = 64 * 1024  # bytes of an input
OLD = np.random.default_rng(0).normal(size=2000).astype(np.float32).tobytes()


def parse_with(kind: str) -> Callable[[bytes], None]:
    """Return a check that parses a document as it comes from the repository or a device."""
    from ota import manifest, policy, report

    document, limit = next(getattr(module, kind) for module in (manifest, policy, report) if hasattr(module, kind)), LARGEST

    def check(data: bytes) -> None:
        found = manifest.parse(document, data, limit)
        again = manifest.parse(document, found.canonical(), limit)
        assert again == found, "a document is another one after writing"

    return check


def state(data: bytes) -> None:
    """Open a state file as a dying disk leaves it."""
    from ota.agent.state import opened

    found = opened(data)
    assert found is None or found.seq >= 0


def header(data: bytes) -> None:
    """Read the start of a delta."""
    from ota.delta import read_header

    read_header(io.BytesIO(data))


def delta(data: bytes) -> None:
    """Apply a delta's records to a base, under a valid header.

    In the agent, only a signature protects the child process from such records.
    """
    from ota.delta import format as container

    size = struct.unpack("<I", (data[:4] + b"\0" * 4)[:4])[0] % 65536
    target = container.PlainFile(size=size, sha256="0" * 64)
    file = container.DeltaFile(target=target, base=hashlib.sha256(OLD).hexdigest(), base_size=len(OLD))
    head = container.Header(base="0" * 64, target="0" * 64, files=[file])
    output = io.BytesIO()
    try:
        container.apply_plain(io.BytesIO(data[4:]), head, io.BytesIO(OLD), output)
    finally:
        assert len(output.getvalue()) <= size, "more was written than the file is long"


def numbers(data: bytes) -> None:
    """Decode the payload of a record of numbers, without the check that would stop most of them."""
    from ota.delta import format as container

    size = struct.unpack("<I", (data[:4] + b"\0" * 4)[:4])[0] % len(OLD) + 1
    file = container.DeltaFile(target=container.PlainFile(size=size, sha256="0" * 64), base="0" * 64, base_size=len(OLD))
    made = container._numbers(data[4:], io.BytesIO(OLD), file, size)
    assert len(made) == size, "it made another length than it was asked for"


def update(data: bytes) -> None:
    """Decode the payload of a record that moves tensors by factors, without the checks that would stop most of them."""
    from ota.delta import updates

    size = struct.unpack("<I", (data[:4] + b"\0" * 4)[:4])[0] % (2 * len(OLD)) + 1
    stretches, checks = updates.read(data[4:], size)
    parts = list(updates.pieces(stretches))
    assert sum(part.length for part in parts) == size, "it makes another length than it was asked for"
    assert len(checks) == len(parts) - 1

    def known(offset: int, length: int) -> bytes:
        return (OLD[offset : offset + length] + bytes(length))[:length]

    for part in parts:
        assert len(part.make(known)) == part.length, "a piece has another length than it claims"


def factors(data: bytes) -> None:
    """Read what a training says of its update."""
    from ota.delta.factors import read
    from ota.errors import OperatorError

    with NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        for claim in read(Path(file.name)).values():
            if claim.shared:
                with contextlib.suppress(OperatorError):
                    assert len(claim.shared_numbers().of(claim.first, 9)) == 9
            elif claim.values < LARGEST:
                with contextlib.suppress(OperatorError):
                    _ = claim.product() if claim.step is None else claim.steps()


def streams(data: bytes) -> None:
    """Decode a stream of numbers by itself; what it holds must come back when it is encoded again."""
    from ota.delta import streams as coder

    count = struct.unpack("<I", (data[:4] + b"\0" * 4)[:4])[0] % 4096
    found = coder.decode(coder.Reader(data[4:]), count)
    assert len(found) == count
    assert (coder.decode(coder.Reader(coder.encode(found)), count) == found).all()


def composed(data: bytes) -> None:
    """Put an overlay over weights; what it makes is as long as they are, and another overlay can make it again."""
    from ota import overlay

    made = overlay.compose(OLD, data)
    assert len(made) == len(OLD), "it made another length than its base has"
    stretches = [(found.offset, found.length) for found in overlay.ranges(data)]
    assert made == OLD or overlay.compose(OLD, overlay.make(OLD, made, stretches) or b"") == made


def report(data: bytes) -> None:
    """Open a report as it arrives; whatever it is, no key has signed it."""
    from ota.report import open_line

    assert not open_line(data).is_signed_by("1" * 64)


def request(data: bytes) -> None:
    """Parse what a local program posts."""
    from ota.agent.serve import _request

    assert set(_request(data)) == {"caption", "seed", "variant"}


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "manifest": lambda: parse_with("Manifest"), "policy": lambda: parse_with("Policy"), "policy2": lambda: parse_with("Policy2"), "sampler": lambda: parse_with("SamplerTable"),
    "reference": lambda: parse_with("Reference"), "report": lambda: report, "state": lambda: state, "header": lambda: header,
    "delta": lambda: delta, "numbers": lambda: numbers, "update": lambda: update, "factors": lambda: factors, "streams": lambda: streams, "overlay": lambda: composed, "request": lambda: request,
}  # fmt: skip


# Seeds


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a valid document of each kind, with the name of the kind."""
    entry = {"role": "weights", "variant": "full", "size": 9, "sha256": "1" * 64}
    origin = dict.fromkeys(("code", "lineage", "scorecard", "decision"), "2" * 64) | {
        "data_rev": "a",
        "data_md5": "b",
        "model": "m",
        "version": 1,
    }
    roles = [entry | {"role": role} for role in ("weights", "sampler", "golden", "reference")]
    yield "manifest", {
        "schema_version": 1, "line": "a", "device_class": "b", "tier": "nano", "configuration": "I", "precision": "int8", "variants": ["full"],
        "default_variant": "full", "files": [entry | {"role": "graph", "variant": None}, *roles], "origin": origin, "minimum_agent": "0.1.0",
    }  # fmt: skip
    thin = entry | {"role": "overlay", "variant": "turbo", "base": "full", "weights": "3" * 64}
    yield "manifest", {
        "schema_version": 3, "line": "a", "device_class": "b", "tier": "nano", "configuration": "I", "precision": "int8", "variants": ["full", "turbo"],
        "default_variant": "full", "origin": origin, "minimum_agent": "0.2.0",
        "files": [entry | {"role": "graph", "variant": None}, *roles, thin, *(role | {"variant": "turbo"} for role in roles[1:])],
    }  # fmt: skip
    yield "policy2", {"schema_version": 2, "line": "a", "device_class": "b", "seq": 1, "manifest": "1" * 64, "salt": "s", "policy": 1, "limit": 9,
                      "first": ["d"], "only": ["site=b"], "fallback": {"seq": 1, "manifest": "2" * 64}, "requires": ["x"]}  # fmt: skip
    yield "policy", {"schema_version": 1, "line": "a", "device_class": "b", "seq": 1, "manifest": "1" * 64, "salt": "s",
                     "waves": [{"bps": 1, "not_before": 0}], "halt": False, "revert": False}  # fmt: skip
    runtime = {"onnxruntime": [">=1.20", "<2"], "graph_optimization_level": "all", "config": {"a": "1"}}
    yield "sampler", {"schema_version": 1, "variant": "full", "method": "ab2", "times": [1.0, 0.5, 0.0], "guidance": 2.0, "text_length": 8,
                      "image": {"channels": 1, "size": 16}, "runtime": runtime}  # fmt: skip
    yield "reference", {"schema_version": 1, "golden": {"tolerance": 0.01, "share": 0.99}, "load": [[1.0]], "latency_ms": 5.0,
                        "statistics": {"mean": {"low": 0.0, "high": 1.0}}}  # fmt: skip
    report = {"schema_version": 1, "device": "d", "boot": "b", "number": 1, "time": 1, "line": "a", "device_class": "b", "event": "confirmed",
              "manifest": None, "active": None, "reason": "", "received": 1, "milliseconds": 1}  # fmt: skip
    yield "report", {"report": report, "signature": "0" * 128}
    health = {"since": 1, "share": "all", "tags": ["site=berlin"], "load": [[1, 2]], "statistics": {"mean": [1] * 8}}
    beat = report | {"schema_version": 3, "agent": "0.3.0", "event": "alive", "health": health}
    yield "report", {"signed": json.dumps(beat), "signature": "0" * 128}
    yield (
        "state",
        {"sha256": "0" * 64, "state": {"schema_version": 1, "active": "1" * 64, "seq": 1, "trial": {"left": 1, "loads": 1}}},
    )
    yield "request", {"caption": "bolt", "seed": 3, "variant": "fast"}


def deltas() -> Iterator[bytes]:
    """Yield real deltas: small steps, sparse ones, steps of one size, a product, moved bytes, and new ones."""
    from ota.delta import files
    from ota.delta import format as container

    old, rng = np.frombuffer(OLD, np.float32), np.random.default_rng(1)
    shapes = [
        old + rng.normal(scale=1e-4, size=old.size), np.where(rng.random(old.size) < 0.05, old + 0.01, old),
        old + np.round(rng.normal(size=old.size)) * np.float32(0.0123), rng.normal(size=old.size), np.roll(old, 700),
        old + np.outer(rng.normal(size=40), rng.normal(size=50)).ravel() * 1e-3,
    ]  # fmt: skip
    with TemporaryDirectory() as folder:
        place = Path(folder)
        for values in shapes:
            for name, data in (("old", old), ("new", values.astype(np.float32))):
                rows = {"t": {"dtype": "F32", "shape": [40, 50], "data_offsets": [0, len(OLD)]}}
                head = json.dumps(rows).encode()
                (place / name).write_bytes(struct.pack("<Q", len(head)) + head + data.tobytes())
            for version in container.VERSIONS:
                files.build(place / "old", place / "new", place / "patch", version=version)
                yield (place / "patch").read_bytes()


def updated() -> Iterator[tuple[bytes, bytes]]:
    """Yield deltas of format version 2 that are made from factors or shared numbers, each with the file that tells these."""
    from safetensors.numpy import save

    from ota.delta import files
    from ota.delta import numbers as rules

    old, rng = np.frombuffer(OLD, np.uint32), np.random.default_rng(2)
    kind = rules.KINDS["float32"]
    with TemporaryDirectory() as folder:
        place = Path(folder)

        def made(new: bytes, said: dict[str, Any], tensors: dict[str, Any]) -> tuple[bytes, bytes]:
            """Build the delta from the old file to a new one of two tensors, by factors."""
            halves = {"a": (0, [20, 50]), "b": (4000, [1000])}
            rows = {t: {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4000]} for t, (at, shape) in halves.items()}
            head = json.dumps(rows).encode()
            for name, data in (("old", OLD), ("new", new)):
                (place / name).write_bytes(struct.pack("<Q", len(head)) + head + data)
            told = json.dumps({"schema_version": 1, "products": {}, "steps": {}} | said)
            (place / "factors").write_bytes(save(tensors, {"deltaferry": told}))
            files.build(place / "old", place / "new", place / "patch", factors=place / "factors")
            return (place / "patch").read_bytes(), (place / "factors").read_bytes()

        for rank in (1, 3, 32):
            left, right = (np.rint(rng.normal(size=shape) * 30 / rank).astype(np.int32) for shape in ((20, rank), (rank, 50)))
            steps = np.rint(rng.normal(size=1000)).astype(np.int32)
            moved = rules.predicted(old[:1000], left, right, -20, kind), rules.stepped(old[1000:], steps, np.float32(0.01), kind)
            said = {"products": {"a": -20}, "steps": {"b": float(np.float32(0.01)).hex()}}
            yield made(b"".join(part.tobytes() for part in moved), said, {"a.left": left, "a.right": right, "b.steps": steps})
        for count, first in ((1, 0), (90, 2**40 - 1000)):
            shared = np.rint(rng.normal(size=count) * 5).astype(np.int32) + 1
            by = rules.Shared(2**63 + 5, count, shared).of(first, 1000)
            halves = rules.stepped(old[:1000], by, np.float32(0.01), kind), old[1000:]
            said = {"seeded": {"seed": 2**63 + 5, "size": float(np.float32(0.01)).hex(), "tensors": {"a": [first, 1000]}}}
            yield made(b"".join(part.tobytes() for part in halves), said, {"seeded.numbers": shared})


def sow(target: str, folder: Path) -> None:
    """Write the seeds of a target into a folder."""
    from ota.delta import format as container

    seeds = [json.dumps(value).encode() for name, value in documents() if name == target]
    if target == "overlay":
        from ota import overlay

        moved = bytes(byte ^ (at % 400 < 100) for at, byte in enumerate(OLD))
        seeds += [
            overlay.make(OLD, moved, [(at, 100) for at in range(0, len(OLD), 400)]) or b"",
            overlay.make(OLD, moved, [(0, len(OLD))]) or b"",
        ]
    if target == "factors":
        seeds += [said for _, said in updated()]
    if target == "update":
        for patch, _ in updated():
            stream = io.BytesIO(patch)
            size = container.read_header(stream).files[0].target.size
            seeds.append(struct.pack("<I", size - 1) + stream.read()[container.RECORD.size :])
    if target in ("header", "delta", "numbers", "streams"):
        for patch in (*deltas(), *(patch for patch, _ in updated())):
            stream = io.BytesIO(patch)
            size = container.read_header(stream).files[0].target.size
            seeds.append(patch[: stream.tell()] if target == "header" else struct.pack("<I", size) + stream.read())
            if target in ("numbers", "streams"):
                seeds.append(struct.pack("<I", size) + patch[stream.tell() - len(seeds.pop()) + 4 + container.RECORD.size :])
    for seed in seeds:
        (folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)


def fuzz(target: str, arguments: list[str]) -> None:
    """Turn this process into the fuzzer of one target."""
    import atheris

    with atheris.instrument_imports(include=["ota"]):  # modules imported later would run without coverage
        for module in (
            "errors",
            "manifest",
            "delta.format",
            "delta.streams",
            "delta.updates",
            "delta.factors",
            "agent.state",
            "agent.serve",
        ):
            importlib.import_module(f"ota.{module}")
        from ota.errors import OtaError

        check = TARGETS[target]()

    def once(data: bytes) -> None:
        with contextlib.suppress(OtaError):
            check(data)

    resource.setrlimit(
        resource.RLIMIT_AS, (4 * MEMORY << 20, 4 * MEMORY << 20)
    )  # address space; libFuzzer watches the resident memory
    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def main() -> None:
    """Run all targets for equal shares of the time, or one target with the given arguments."""
    if len(sys.argv) > 1:
        fuzz(sys.argv[1], sys.argv[2:])
        return
    seconds = int(os.environ.get("FUZZ_SECONDS", "300")) // len(TARGETS)
    failed = []
    for target in TARGETS:
        corpus = BUILD / target
        corpus.mkdir(parents=True, exist_ok=True)
        sow(target, corpus)
        words = [sys.executable, "-m", "tests.fuzz", target, str(corpus), f"-max_total_time={max(5, seconds)}", f"-rss_limit_mb={MEMORY}",
                 f"-timeout={SECONDS}", f"-max_len={LARGEST}", f"-artifact_prefix={BUILD}/{target}-", "-print_final_stats=1", "-verbosity=0"]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
        said = dict(line.removeprefix("stat::").split(":", 1) for line in done.stderr.splitlines() if line.startswith("stat::"))
        tried, peak = (said.get(name, "?").strip() for name in ("number_of_executed_units", "peak_rss_mb"))
        sys.stdout.write(
            f"{target:10} {tried:>9} inputs, {len(list(corpus.iterdir()))} kept, {peak} MiB{'' if not done.returncode else ', FAILED'}\n"
        )
        if done.returncode:
            failed.append(target)
            sys.stdout.write(done.stderr[-3000:] + "\n")
    if failed:
        sys.exit(f"findings in {', '.join(failed)}; repeat one with `python -m tests.fuzz TARGET {BUILD}/TARGET-…`")


if __name__ == "__main__":
    main()

"""The signed documents: what they refuse, whoever signed it, and that their hashes do not depend on how they were written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota.errors import ManifestError
from ota.manifest import (
    MAX_GRAPH,
    MAX_MANIFEST,
    MAX_TABLE,
    MAX_WEIGHTS,
    ROLES_OF_VARIANT,
    Document,
    Manifest,
    Reference,
    SamplerTable,
    parse,
)
from ota.policy import MAX_POLICY, Policy
from ota.report import DeviceReport, SignedReport

HASHES = [f"{i:064x}" for i in range(64)]


def entry(role: str, variant: str | None, number: int, size: int = 10) -> dict[str, Any]:
    return {"role": role, "variant": variant, "size": size, "sha256": HASHES[number]}


def manifest(*variants: str, **fields: Any) -> dict[str, Any]:
    """Return a valid manifest, as JSON would give it, with some fields replaced."""
    names = variants or ("full",)
    files = [entry("graph", None, 0)]
    files += [entry(role, name, len(files) + i) for name in names for i, role in enumerate(ROLES_OF_VARIANT)]
    origin = {
        "data_rev": "0" * 40, "data_md5": "0" * 32, "code": HASHES[1], "lineage": HASHES[2], "scorecard": HASHES[3],
        "decision": HASHES[4], "model": "shapes-I-full", "version": 1,
    }  # fmt: skip
    return {
        "schema_version": 1, "line": "shapes", "device_class": "edge", "tier": "nano", "configuration": "I",
        "precision": "bfloat16", "variants": list(names), "default_variant": names[0], "files": files, "origin": origin,
        "minimum_agent": "0.1.0",
    } | fields  # fmt: skip


def policy(**fields: Any) -> dict[str, Any]:
    waves = [{"bps": 100, "not_before": 10}, {"bps": 10_000, "not_before": 20}]
    base = {
        "schema_version": 1,
        "line": "shapes",
        "device_class": "edge",
        "seq": 1,
        "manifest": HASHES[1],
        "salt": "1",
        "waves": waves,
    }
    return base | fields


def table(**fields: Any) -> dict[str, Any]:
    return {
        "schema_version": 1, "variant": "full", "method": "ab2", "times": [1.0, 0.5, 0.0], "guidance": 2.0,
        "image": {"channels": 1, "size": 16}, "text_length": 8,
        "runtime": {"onnxruntime": [">=1.20", "<2"], "graph_optimization_level": "all", "config": {}},
    } | fields  # fmt: skip


def report(**fields: Any) -> dict[str, Any]:
    return {
        "schema_version": 1, "device": "dev-1", "boot": "b", "number": 1, "time": 1, "line": "shapes", "device_class": "edge",
        "event": "installed", "manifest": HASHES[1], "active": None,
    } | fields  # fmt: skip


def read(kind: type[Document], value: Any, limit: int = MAX_MANIFEST) -> Document:
    return parse(kind, json.dumps(value).encode(), limit)


def refused(kind: type[Document], value: Any) -> str:
    """Check that a document is refused in one line, and return the line."""
    with pytest.raises(ManifestError) as caught:
        read(kind, value)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"the {kind.__name__.lower()} ")
    return sentence


# Bundles


@pytest.mark.parametrize("variants", [("full",), ("full", "dev"), ("full", "dev", "fast")])
def test_manifest_lists_closed_set(variants):
    files = manifest(*variants)["files"]
    made = read(Manifest, manifest(*variants))
    assert len(made.files) == 1 + 4 * len(variants)
    for i in range(len(files)):
        refused(Manifest, manifest(*variants, files=files[:i] + files[i + 1 :]))
        refused(Manifest, manifest(*variants, files=[*files, files[i]]))
        refused(Manifest, manifest(*variants, files=[*files[:i], files[0] if i else files[1], *files[i + 1 :]]))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"extra": 1}, id="unknown field"),
        pytest.param({"line": None}, id="no line"),
        pytest.param({"schema_version": 5}, id="newer schema"),
        pytest.param({"schema_version": "1"}, id="number as text"),
        pytest.param({"variants": []}, id="no variant"),
        pytest.param({"variants": ["full", "full"]}, id="variant twice"),
        pytest.param({"variants": ["slow"], "default_variant": "slow"}, id="unknown variant"),
        pytest.param({"default_variant": "dev"}, id="default not among them"),
        pytest.param({"variants": ["full", "dev"]}, id="variant without files"),
        pytest.param({"precision": "int3"}, id="unknown precision"),
        pytest.param({"configuration": "III"}, id="unknown configuration"),
        pytest.param({"minimum_agent": "latest"}, id="agent version not numbers"),
        pytest.param({"minimum_agent": "0.1.0\n"}, id="agent version with newline"),
        pytest.param({"tier": "x" * 21}, id="long tier"),
        pytest.param({"files": manifest()["files"] * 3}, id="many files"),
        pytest.param({"origin": manifest()["origin"] | {"version": 0}}, id="version zero"),
        pytest.param({"origin": manifest()["origin"] | {"code": "G" * 64}}, id="hash not hex"),
        pytest.param({"origin": manifest()["origin"] | {"model": "m" * 121}}, id="long model name"),
    ],
)
def test_manifest_of_other_form_refused(fields):
    refused(Manifest, manifest(**fields))


@pytest.mark.parametrize("field", ["line", "device_class"])
@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "Shapes", "-a", "a" * 41, "a b", "a\n", "a\0", "ä", "a*"])
def test_name_that_could_escape_refused(field, name):
    refused(Manifest, manifest(**{field: name}))
    refused(Policy, policy(**{field: name}))
    refused(DeviceReport, report(**{field: name}))


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, {"variant": "full"}),
        (1, {"variant": None}),
        (1, {"variant": "dev"}),
        (1, {"role": "sampler"}),
        (1, {"role": "script"}),
        (0, {"size": 0}),
        (0, {"size": -1}),
        (0, {"size": "10"}),
        (0, {"size": 10.0}),
        (0, {"size": True}),
        (0, {"size": MAX_GRAPH + 1}),
        (1, {"size": MAX_WEIGHTS + 1}),
        (2, {"size": MAX_TABLE + 1}),
        (1, {"sha256": "../" * 21 + "x"}),
        (1, {"sha256": "A" * 64}),
        (1, {"sha256": "a" * 63}),
        (1, {"name": "/etc/passwd"}),
    ],
)
def test_bad_file_entry_refused(index, change):
    files = manifest()["files"]
    files[index] = files[index] | change
    refused(Manifest, manifest(files=files))


def test_largest_allowed_sizes_accepted():
    files = manifest()["files"]
    files[0]["size"], files[1]["size"] = MAX_GRAPH, MAX_WEIGHTS
    made = read(Manifest, manifest(files=files))
    assert made.size == MAX_GRAPH + MAX_WEIGHTS + 30


def test_digest_survives_any_rewriting():
    value = manifest("full", "dev")
    first = read(Manifest, value)
    shuffled = {key: value[key] for key in reversed(value)}
    again = parse(Manifest, json.dumps(shuffled, indent=3).encode(), MAX_MANIFEST)
    assert again.digest == first.digest
    assert parse(Manifest, first.canonical(), MAX_MANIFEST).canonical() == first.canonical()


FROZEN = {
    (1, "full", "dev", "fast"): "24a490cc2dc99249eaa07e030f300a2cce86d25c6a98a7177910dd156dccba87",
    (2, "full", "dev"): "8e8d3c6676fdba2395a41d9c5dc27dff31b5a12f160fcdd1ce5f27ebc63b47f5",
}
"""Hashes that agent 0.1.0 gives to manifests. They are never made anew: fielded bundles have such names."""


@pytest.mark.parametrize("said", FROZEN)
def test_manifest_of_an_older_form_keeps_its_hash(said):
    form, *variants = said
    assert read(Manifest, manifest(*variants, schema_version=form)).digest == FROZEN[said]


@pytest.mark.parametrize(
    "fields",
    [
        {"tier": "small"},
        {"default_variant": "dev"},
        {"minimum_agent": "0.1.1"},
        {"origin": manifest()["origin"] | {"version": 2}},
    ],
)
def test_digest_covers_every_field(fields):
    assert read(Manifest, manifest("full", "dev", **fields)).digest != read(Manifest, manifest("full", "dev")).digest


@pytest.mark.parametrize("kind", [Manifest, Policy, SamplerTable, Reference, SignedReport])
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"1" * 5000, b"[" * 60_000, b'{"a":' * 10_000, b"{}{}", b'"\\ud800"'],
    ids=["empty", "cut", "null", "list", "not UTF-8", "long number", "deep list", "deep object", "two", "lone surrogate"],
)
def test_not_a_document_refused(kind, data):
    with pytest.raises(ManifestError, match="is not valid"):
        parse(kind, data, MAX_MANIFEST)


def test_document_over_limit_not_read():
    data = json.dumps(policy()).encode()
    assert parse(Policy, data, len(data)).seq == 1
    with pytest.raises(ManifestError, match=f"has {len(data)} bytes, more than {len(data) - 1}"):
        parse(Policy, data, len(data) - 1)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_accepted(data):
    with pytest.raises(ManifestError):
        parse(Manifest, data, MAX_MANIFEST)


# Policies


@pytest.mark.parametrize(
    "waves",
    [
        [(100, 10), (100, 20)],
        [(1000, 10), (100, 20)],
        [(100, 20), (1000, 10)],
        [(100, 10), (10_001, 20)],
        [(-1, 10)],
        [(100, -1)],
        [(i, i) for i in range(17)],
    ],
)
def test_waves_that_do_not_widen_refused(waves):
    refused(Policy, policy(waves=[{"bps": bps, "not_before": at} for bps, at in waves]))


@pytest.mark.parametrize(
    "fields", [{"seq": 0}, {"seq": 1.0}, {"seq": "1"}, {"halt": 0}, {"revert": "no"}, {"salt": "x" * 65}, {"manifest": ""}]
)
def test_policy_of_other_form_refused(fields):
    refused(Policy, policy(**fields))


def test_policy_holds_no_floats():
    made = read(Policy, policy(), MAX_POLICY)
    assert not any(isinstance(value, float) for value in [*made.model_dump().values(), *made.waves[0].model_dump().values()])
    refused(Policy, policy(waves=[{"bps": 1.5, "not_before": 1}]))


# Tables


@pytest.mark.parametrize(
    "times",
    [[], [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.5, 0.6], [1.5, 0.5], [1.0, -0.1], [1.0, float("nan"), 0.0], [1.0, "0"]],
)
def test_times_that_do_not_fall_refused(times):
    refused(SamplerTable, table(times=times))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "dopri"},
        {"guidance": 0.5},
        {"guidance": 21.0},
        {"guidance": float("nan")},
        {"image": {"channels": 2, "size": 16}},
        {"image": {"channels": 1, "size": 4096}},
        {"text_length": 100_000},
        {"times": [1 - i / 2000 for i in range(1002)]},
        {"runtime": table()["runtime"] | {"onnxruntime": []}},
        {"runtime": table()["runtime"] | {"config": {str(i): "" for i in range(17)}}},
        {"script": "import os"},
    ],
)
def test_table_of_other_form_refused(fields):
    refused(SamplerTable, table(**fields))


@pytest.mark.parametrize(
    "golden", [{"tolerance": 0.2, "share": 0.9}, {"tolerance": 1e-3, "share": 0.5}, {"tolerance": 0, "share": 1}]
)
def test_lax_golden_tolerance_refused(golden):
    whole = {"golden": golden, "load": [[1.0]], "statistics": {}, "latency_ms": 1.0, "schema_version": 1}
    assert "golden" in refused(Reference, whole)
    assert read(Reference, whole | {"golden": {"tolerance": 1e-3, "share": 0.98}})


# Reports, which strangers can send


@pytest.mark.parametrize(
    "fields",
    [
        {"number": 0},
        {"number": 2**31},
        {"number": 2**70},
        {"time": -1},
        {"time": 2**70},
        {"received": 2**70},
        {"milliseconds": 2**70},
        {"event": "celebrated"},
        {"reason": "x" * 501},
        {"boot": "x" * 65},
        {"device": "../dev"},
        {"image": "iVBORw0KGgo="},
    ],
)
def test_report_of_other_form_refused(fields):
    refused(DeviceReport, report(**fields))


@pytest.mark.parametrize("signature", ["", "0" * 127, "0" * 129, "G" * 128])
def test_malformed_signature_refused(signature):
    assert "signature" in refused(SignedReport, {"report": report(), "signature": signature})

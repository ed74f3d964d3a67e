"""`make bench-delta [PAIRS=folder]`: compare our delta with other patch tools; each call is a process of its own.

    python -m tests.bench.delta [folder]      for pairs NAME/old.* and NAME/new.*; by default those of tests/bench/pairs.py
    python -m tests.bench.delta --estimates [folder]      only forecasts, for our pairs and a folder's (tests/bench/foreign.py)

Times are processor seconds, not wall time, so other load on the machine changes little. The results of other tools are kept in
build/bench/delta/done until the pair or the call changes; our tool is measured anew each time. `make clean` deletes all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ota.delta import files, numbers, streams
from ota.delta.plan import Elements
from tests.bench.foreign import HELD_OUT, HELD_OUT_CHANGES

BUILD, RESULTS = Path("build/bench/delta"), Path("tests/bench/results")
LIMIT = 120  # processor seconds of one call
APPLIES = 3  # times that a patch is applied; the median counts, because each takes little time
SIZES = (10, 200, 1000)  # MB, of the scaling rows
OURS, BASELINE = "ferry", "bsdiff4"
ESTIMATES, STARTING = "## Estimates", "## Starting a tool and doing nothing"
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # for all tools: a second thread of NumPy would only spin


# What is measured


@dataclass(frozen=True)
class Tool:
    """How a tool is called: as Python code with the variables old, new, patch, made and kind, or as commands."""

    imports: str
    build: str
    apply: str

    def call(self, todo: str, files: dict[str, str]) -> list[str]:
        """Return the command line of one call: build, apply, or "" to start the tool and do nothing."""
        if not self.imports:
            return (self.build if todo == "build" else self.apply).format(**files).split()
        script = f"import sys\n{self.imports}\nold, new, patch, made, kind = sys.argv[1:6]\n"
        script += {"build": self.build, "apply": self.apply}.get(todo, "")
        return [sys.executable, "-c", script, *(files[name] for name in ("old", "new", "patch", "made", "kind"))]


READ = "from pathlib import Path; read = lambda name: Path(name).read_bytes(); write = lambda name, data: Path(name).write_bytes(data)\n"
XOR = (
    "def xor(a, b):\n    a, b = (np.frombuffer(x, np.uint8) for x in (a, b)); size = max(len(a), len(b)) + 3 & ~3\n"
    "    a, b = (np.pad(x, (0, size - len(x))) for x in (a, b)); return (a ^ b).tobytes()\n"
)
ZIPNN = "tool = ZipNN(input_format='byte', threads=1, bytearray_dtype='float32' if kind == 'float32' else 'bfloat16')\n"
# hdiffpatch is the Python package of the library; Debian has neither it nor its hdiffz.
TOOLS = {
    OURS: Tool(
        "from pathlib import Path; from ota.delta import files",
        "files.build(Path(old), Path(new), Path(patch))", "files.apply(Path(old), Path(patch), Path(made))",
    ),
    BASELINE: Tool("import bsdiff4", "bsdiff4.file_diff(old, new, patch)", "bsdiff4.file_patch(old, made, patch)"),
    "detools hdiffpatch + lzma": Tool(
        "import detools",
        "detools.create_patch_filenames(old, new, patch, 'lzma', patch_type='hdiffpatch', algorithm='hdiffpatch')",
        "detools.apply_patch_filenames(old, patch, made)",
    ),
    "detools sequential + lzma": Tool(
        "import detools",
        "detools.create_patch_filenames(old, new, patch, 'lzma', patch_type='sequential')",
        "detools.apply_patch_filenames(old, patch, made)",
    ),
    "hdiffpatch + lzma2": Tool(
        READ + "import hdiffpatch",
        "write(patch, hdiffpatch.diff(read(old), read(new), hdiffpatch.Lzma2Config(level=9), validate=False))",
        "write(made, hdiffpatch.apply(read(old), read(patch)))",
    ),
    "xdelta3 -9": Tool("", "xdelta3 -e -9 -f -B {window} -s {old} {new} {patch}", "xdelta3 -d -f -B {window} -s {old} {patch} {made}"),
    "zstd -19 --patch-from": Tool(
        "", "zstd -q -f -19 --patch-from={old} {new} -o {patch}", "zstd -q -f -d --patch-from={old} {patch} -o {made}"
    ),
    "ZipNN of old XOR new": Tool(
        READ + XOR + "import numpy as np; from zipnn import ZipNN",
        ZIPNN + "size = len(read(new)); write(patch, size.to_bytes(8, 'little') + tool.compress(xor(read(old), read(new))))",
        ZIPNN + "data = read(patch); size = int.from_bytes(data[:8], 'little')\n"
        "write(made, xor(read(old), bytes(tool.decompress(data[8:])))[:size])",
    ),
    # Its patches of int8 are shorter if it is told that int8 is bfloat16 (481 kB instead of 673 kB for gentle.int8).
    "z4ai delta": Tool(
        READ + "import z4ai; kind_of = {'float32': 'fp32', 'float16': 'fp16'}",
        "write(patch, z4ai.compress_delta(read(new), read(old), dtype=kind_of.get(kind, 'bf16'), threads=1))",
        "write(made, z4ai.decompress_delta(read(patch), read(old)))",
    ),
    "zstd -19 of the new file": Tool(
        READ + "import zstandard",
        "write(patch, zstandard.ZstdCompressor(level=19).compress(read(new)))",
        "write(made, zstandard.ZstdDecompressor().decompress(read(patch)))",
    ),
    "xz -9 of the new file": Tool(
        READ + "import lzma", "write(patch, lzma.compress(read(new), preset=9))", "write(made, lzma.decompress(read(patch)))"
    ),
}  # fmt: skip

# A process starts with the peak memory of the process that started it. So a small process of some 7 MiB starts the tool; smaller
# peaks cannot be measured.
SPAWN = """
import os, resource, sys
child = os.fork()
if not child:
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1]) + 5))
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def spend(command: list[str]) -> tuple[float, float]:
    """Run a command; return its processor seconds, -1 if it was not done in time, and its peak memory in MiB.

    Raises:
        RuntimeError: the command failed.
    """
    spawn = [sys.executable, "-I", "-S", "-c", SPAWN, str(LIMIT), *command]
    said = subprocess.run(spawn, capture_output=True, text=True, check=True, env=os.environ | ONE_THREAD)
    code, seconds, mib = (float(word) for word in said.stdout.split()[-3:])
    if code in (-24, -9):  # SIGXCPU, and the SIGKILL that follows it
        return -1, mib
    if code:
        raise RuntimeError(f"{' '.join(command)[:200]}: {said.stderr[-600:]}")
    return seconds, mib


def digest_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measured(tool: str, old: Path, new: Path, kind: str, times: int = APPLIES) -> dict[str, Any]:
    """Measure one tool on one pair: bytes, seconds and MiB, and whether it restores the new file exactly."""
    if not TOOLS[tool].imports and not shutil.which(TOOLS[tool].build.split()[0]):
        return {"missing": "not available"}
    patch, made = BUILD / "patch", BUILD / "made"
    window = max(1 << 20, 1 << (old.stat().st_size - 1).bit_length())
    names = {"old": str(old), "new": str(new), "patch": str(patch), "made": str(made), "kind": kind, "window": str(window)}
    made.write_bytes(b"")  # the output of another tool must not count
    try:
        build_seconds, build_mib = spend(TOOLS[tool].call("build", names))
        if build_seconds < 0:
            return {"missing": f"not done in {LIMIT} s"}
        applies = sorted(spend(TOOLS[tool].call("apply", names)) for _ in range(times))
    except RuntimeError as error:
        return {"missing": f"failed: {str(error).strip().splitlines()[-1][:120]}"}
    return {
        "bytes": patch.stat().st_size, "exact": digest_of(made) == digest_of(new), "build_s": build_seconds, "build_mib": build_mib,
        "apply_s": applies[len(applies) // 2][0], "apply_mib": max(mib for _, mib in applies),
    }  # fmt: skip


def kept(tool: str, old: Path, new: Path, kind: str) -> dict[str, Any]:
    """Measure a tool that is not ours once, and keep the result."""
    key = f"{digest_of(old)} {digest_of(new)} {kind} {TOOLS[tool]} {LIMIT}"
    path = BUILD / "done" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if not path.is_file():
        result = measured(tool, old, new, kind)
        if "failed" in result.get("missing", "not available"):  # not kept: the cause may be fixed without a change of the call
            return result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def yardstick(old: Path, new: Path, found: Iterable[Elements]) -> tuple[float, float]:
    """Compute a reference size: the entropy of the differences' tokens, given the old exponent or code, and the bits below them.

    It is computed tensor by tensor. It is not a lower bound: a codec can use less if rows or columns move alike, and the cost of
    code tables is not included. With hundreds of contexts and few numbers, it is smaller than any code can be. The excess is
    estimated with the old numbers in random order, and is added in the second figure.

    Returns:
        Both figures, in bytes.
    """
    before, after, draw = np.memmap(old, np.uint8, "r"), np.memmap(new, np.uint8, "r"), np.random.default_rng(0)
    bits = chance = 0.0

    def entropy(known: Any, symbols: Any) -> float:
        counts = np.bincount(known * streams.TOKENS + symbols, minlength=256 * streams.TOKENS).reshape(-1, streams.TOKENS)
        total = counts.sum(axis=1)
        return float((total * np.log2(np.maximum(total, 1))).sum() - (counts * np.log2(np.maximum(counts, 1))).sum())

    for e in found:
        if e.old is None:
            bits += 8 * e.length
            continue
        kind = numbers.KINDS[e.kind]
        was, now = (numbers.codes(data[at : at + e.length].tobytes(), kind) for data, at in ((before, e.old), (after, e.offset)))
        if np.array_equal(was, now):
            continue
        symbols, below = streams.tokens(numbers.difference(now, was, kind).astype(np.uint32))
        known = was.astype(np.int64)
        if kind.mantissa:
            known = known >> kind.mantissa & ((1 << 8 * kind.width - 1 - kind.mantissa) - 1)
        bits += entropy(known, symbols) + float(below.sum(dtype=np.int64))
        chance += entropy(known * 0, symbols) - entropy(draw.permutation(known), symbols)
    return bits / 8, (bits + chance) / 8


def compared(folder: Path) -> dict[str, Any]:
    """Measure every tool on one pair."""
    (old,), (new,) = folder.glob("old.*"), folder.glob("new.*")
    found = [e for e in files.elements(old, new) if e.kind != "bytes"]
    sizes: dict[str, int] = {}
    for e in found:
        sizes[e.kind] = sizes.get(e.kind, 0) + e.length
    kind = max(sizes, key=lambda k: sizes[k]) if sizes else "bytes"
    rows = {tool: (measured if tool == OURS else kept)(tool, old, new, kind) for tool in TOOLS}
    print(folder.name, {tool: row.get("bytes", row.get("missing")) for tool, row in rows.items()}, flush=True)
    if "bytes" not in rows[OURS]:
        sys.exit(f"{folder.name}: {rows[OURS]['missing']}")
    limit, fair = yardstick(old, new, found) if found else (0.0, 0.0)
    return {"new": new.stat().st_size, "yardstick": limit, "without chance": fair, "tools": rows}


# Forecasts

FORECAST = """
import json, resource, sys
from pathlib import Path
from ota.delta import encode, files, forecast
def spent(): return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
old, new, patch = map(Path, sys.argv[1:])
patch.write_bytes(bytes(99)); files.forecast(patch, patch); files.build(patch, patch, patch.with_name("first"))  # what is loaded by either
start = spent(); said = files.forecast(old, new); middle = spent(); built = files.build(old, new, patch).size; end = spent()
print(json.dumps({"new": new.stat().st_size, "built": built, "estimate": said.bytes, "low": said.low, "high": said.high, "close": said.close,
                  "estimate_s": middle - start, "build_s": end - middle}))
"""


def forecasted(folder: Path) -> dict[str, Any]:
    """Forecast and then build every pair of a folder; the processor seconds leave out the start of the process."""
    rows: dict[str, Any] = {}
    for pair in sorted(path for path in folder.iterdir() if path.is_dir()):
        (old,), (new,) = pair.glob("old.*"), pair.glob("new.*")
        call = [sys.executable, "-c", FORECAST, str(old), str(new), str(BUILD / "patch")]
        said = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ | ONE_THREAD)
        rows[pair.name] = json.loads(said.stdout)
        print(pair.name, rows[pair.name], flush=True)
    return rows


def right(row: dict[str, Any]) -> bool:
    """Check a forecast: its range holds the built size and, if it is said as one number, that is within 30 % of it."""
    holds: bool = row["low"] <= row["built"] <= row["high"]
    return holds and (not row["close"] or row["built"] / 1.3 <= row["estimate"] <= 1.3 * row["built"])


def forecast_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Format the section of the report about forecasts."""
    said = (
        "What `ferry delta estimate` says, and what `build` then writes. As one number, within 30 %, or as a range (its middle in italics) that "
        "holds it; s are processor seconds in a process that has built a first small patch. Own pairs are those above; foreign ones are two versions of files in "
        "public packages, a public model and what was done to it, and bytes that surprise codecs (`python -m tests.bench.foreign FOLDER`); "
        "the forecast's numbers were chosen without those of the last table."
    )
    lines = [ESTIMATES, "", said, ""]
    for title, rows in found.items():
        share = sum(row["estimate_s"] for row in rows.values()) / sum(row["build_s"] for row in rows.values())
        near = sum(row["built"] / 1.3 <= row["estimate"] <= 1.3 * row["built"] for row in rows.values())
        lines += [
            f"{title}: {sum(map(right, rows.values()))} of {len(rows)} right, {near} within 30 % by their middle; {share:.0%} of the builds' time.", "",
            *table("pair | new | built | estimate | estimate/built | low | high | estimate s | build s", (forecast_row(n, r) for n, r in rows.items())),
        ]  # fmt: skip
    return lines


def forecast_row(name: str, row: dict[str, Any]) -> str:
    """Format a pair's line."""
    said = f"{row['estimate']:,}" if row["close"] else f"*{row['estimate']:,}*"
    wrong = "" if right(row) else " **wrong**"
    return (
        f"{name} | {row['new']:,} | {row['built']:,} | {said}{wrong} | {row['estimate'] / row['built']:.2f} | {row['low']:,} | {row['high']:,} | "
        f"{row['estimate_s']:.2f} | {row['build_s']:.2f}"
    )


def estimates(foreign: Path | None) -> None:
    """Measure the forecasts, put their section into the report, and fail if one is wrong."""
    found = {"Own pairs": forecasted(own_pairs())}
    if foreign:
        rows = forecasted(foreign)
        held = {*HELD_OUT, *(f"minilm-{change}.safetensors" for change in HELD_OUT_CHANGES)} & set(rows)
        found["Foreign pairs"] = {name: row for name, row in rows.items() if name not in held}
        found["Foreign pairs that the forecast's numbers know nothing of"] = {
            name: row for name, row in rows.items() if name in held
        }
    found = {title: rows for title, rows in found.items() if rows}
    (BUILD.parent / "bench-delta-estimates.json").write_text(json.dumps({"machine": machine(), "sets": found}, indent=1))
    lines = forecast_lines(found)
    print("\n".join(lines))
    report_path = RESULTS / "delta.md"
    before, _, after = report_path.read_text().partition(f"{ESTIMATES}\n")
    rest = after.partition("\n## ")[2] if after else ""
    if not after:
        before, _, rest = before.partition(f"{STARTING}\n")
        rest = f"{STARTING.removeprefix('## ')}\n{rest}"
    report_path.write_text(before + "\n".join(lines) + f"\n## {rest}")
    wrong = [name for rows in found.values() for name, row in rows.items() if not right(row)]
    if wrong:
        sys.exit("wrong forecasts: " + ", ".join(wrong))


def own_pairs() -> Path:
    """Return the folder of our own pairs; make them if they are missing."""
    folder = BUILD / "pairs"
    if not any(folder.glob("*/new.*")):
        subprocess.run([sys.executable, "-m", "tests.bench.pairs"], check=True)
    return folder


# Size


def onnx_of(path: Path, shape: tuple[int, int], pieces: Iterable[bytes], count: int) -> None:
    """Write an ONNX file of `count` bfloat16 tensors of one shape, one at a time; the onnx package would hold all in memory."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    def head(number: int) -> bytes:
        name = f"tensor{number:05}".encode()
        inner = b"\x08" + varint(shape[0]) + b"\x08" + varint(shape[1]) + b"\x10\x10\x42" + varint(len(name)) + name
        inner += b"\x4a" + varint(2 * shape[0] * shape[1])
        return b"\x2a" + varint(len(inner) + 2 * shape[0] * shape[1]) + inner

    with path.open("wb") as file:
        length = sum(len(head(i)) + 2 * shape[0] * shape[1] for i in range(count))
        file.write(b"\x08\x0a\x3a" + varint(length))
        for i, piece in enumerate(pieces):
            file.write(head(i) + piece)


def scaled(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """Make a pair of that size: repeat the gentle pair's widest matrices with noise, and draw the signs of their changes anew."""
    source = BUILD / "pairs" / "gentle.bfloat16"
    kind, wide = numbers.KINDS["bfloat16"], 384
    old, new = (
        np.concatenate([np.fromfile(path, np.uint16, length // 2, offset=offset) for offset, length in found])
        for path in (source / "old.onnx", source / "new.onnx")
        for found in [[(t.offset, t.length) for t in files.tensors(path) if t.shape[-1:] == (wide,)]]
    )
    steps = numbers.ordered(new, kind).astype(np.int32) - numbers.ordered(old, kind)
    shape = (len(old) // wide, wide)
    count = max(1, round(megabytes * 1e6 / old.nbytes))

    def pieces(moved: bool) -> Iterator[bytes]:
        draw = np.random.default_rng(0)
        for _ in range(count):
            at = numbers.ordered(old, kind) + draw.integers(-8, 9, len(old))
            sign = draw.choice(np.array([-1, 1]), len(old))
            yield numbers.bits((at + sign * steps if moved else at).astype(np.uint16), kind).tobytes()

    for name in ("old", "new"):
        onnx_of(folder / f"{name}.onnx", shape, pieces(name == "new"), count)
    return folder / "old.onnx", folder / "new.onnx"


def scaling() -> dict[str, Any]:
    """Measure our delta at each of `SIZES`."""
    folder, rows = BUILD / "scaled", {}
    folder.mkdir(exist_ok=True)
    for megabytes in SIZES:
        old, new = scaled(folder, megabytes)
        rows[str(megabytes)] = {"new": new.stat().st_size} | measured(OURS, old, new, "bfloat16", times=1)
        print(f"{megabytes} MB", rows[str(megabytes)], flush=True)
    shutil.rmtree(folder)
    return rows


# Report


def mean(values: Iterable[float]) -> float:
    """Compute the geometric mean; NaN if there are no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summed(pair: dict[str, Any]) -> dict[str, Any]:
    """Compare our delta with the baseline and with the best other tool on this pair."""
    ours, others = pair["tools"][OURS], {k: v for k, v in pair["tools"].items() if k != OURS and "bytes" in v}
    best = min(others, key=lambda tool: others[tool]["bytes"])
    base = others.get(BASELINE, {})
    return {
        "new/ours": pair["new"] / ours["bytes"],
        "bsdiff4/ours": base.get("bytes", math.nan) / ours["bytes"],
        "best": best, "best/ours": others[best]["bytes"] / ours["bytes"],
        "build speed-up": base.get("build_s", math.nan) / ours["build_s"],
        "apply speed-up": base.get("apply_s", math.nan) / ours["apply_s"],
        "ours/yardstick": ours["bytes"] / pair["yardstick"] if pair["yardstick"] else math.nan,
        "without chance": ours["bytes"] / pair["without chance"] if pair["without chance"] else math.nan,
    }  # fmt: skip


def table(head: str, rows: Iterable[str]) -> list[str]:
    """Format a table in Markdown."""
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {row} |" for row in rows), ""]


def row_of(tool: str, row: dict[str, Any], new: int) -> str:
    """Format a tool's line in the table of a pair."""
    if "bytes" not in row:
        return f"{tool} | {row['missing']} | | | | |"
    wrong = "" if row["exact"] else " **not the new file**"
    return (
        f"{tool} | {row['bytes']:,}{wrong} | {new / row['bytes']:.2f} | {row['build_s']:.2f} | {row['build_mib']:.0f} | "
        f"{row['apply_s']:.2f} | {row['apply_mib']:.0f}"
    )


def summary_table(pairs: dict[str, Any]) -> list[str]:
    """Format a line for each pair, then geometric means of all pairs and of those of each kind of storage."""
    rows = {name: summed(pair) for name, pair in pairs.items()}
    ratios = [key for key in next(iter(rows.values())) if key != "best"]
    lines = [f"{name} | " + " | ".join(f"{row[key]:.2f}" for key in ratios) + f" | {row['best']}" for name, row in rows.items()]
    for group in ("all", *dict.fromkeys(name.rpartition(".")[2] for name in rows if "." in name)):
        chosen = [row for name, row in rows.items() if group in ("all", name.rpartition(".")[2])]
        cells = [mean(row[key] for row in chosen if not math.isnan(row[key])) for key in ratios]
        lines.append(f"**geometric mean, {group}** | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    worst = min(rows, key=lambda name: rows[name]["best/ours"])
    lost = sum(row["best/ours"] < 1 for row in rows.values())
    return [
        *table("pair | " + " | ".join(ratios) + " | best other", lines),
        f"Ours is longer than the best other on {lost} of {len(rows)} pairs. Worst on {worst}: {rows[worst]['best']} {rows[worst]['best/ours']:.3f}.",
        "",
    ]  # fmt: skip


def size_of(row: dict[str, Any], bare: float) -> str:
    """Format the line of our delta at one size."""
    new, build, apply = row["new"] / 1e6, row["build_s"], row["apply_s"]
    return (
        f"{new:.0f} | {row['new'] / row['bytes']:.2f} | {build:.2f} | {new / build:.0f} | {row['build_mib'] - bare:.0f} | "
        f"{apply:.2f} | {new / apply:.0f} | {new / 2 / apply:.0f} | {row['apply_mib'] - bare:.0f}"
    )


def plot(pairs: dict[str, Any]) -> None:
    """Plot the tools by the size of their patches and the speed of applying them, as geometric means."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "delta", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for tool in TOOLS:
        cells = [(p["new"], p["tools"][tool]) for p in pairs.values() if "bytes" in p["tools"][tool]]
        if cells:
            x, y = mean(new / row["bytes"] for new, row in cells), mean(new / 1e6 / row["apply_s"] for new, row in cells)
            axes.plot(x, y, "o", color="C3" if tool == OURS else "C0")
            axes.annotate(tool, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="new file / patch", ylabel="MB of the new file applied in a processor second", yscale="log")
    axes.margins(0.2)
    figure.savefig(RESULTS / "delta.svg", metadata={"Date": None}, bbox_inches="tight")


def machine() -> str:
    """Describe the machine and the commit that are measured."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    ).stdout.strip()
    return f"{model}, {os.cpu_count()} cores (shared), Python {platform.python_version()}; commit {commit or 'unknown'}"


def report(found: dict[str, Any]) -> None:
    """Print the tables; write them to the results if the pairs are our own."""
    pairs, starts = found["pairs"], found["starts"]
    said = (
        f"`make bench-delta`. Every call is a process of its own; s are its processor seconds, start included (median of {APPLIES} for "
        f"apply), MiB its peak memory, of which some 7 cannot be told from nothing. Nothing may take more than {LIMIT} s. Ours builds large files on "
        "two cores, the others on one. Ratios above 1 speak for ours, but for ours/yardstick: the yardstick is the entropy of the "
        "differences given the old exponents or codes, and no bound; without chance: with what it owes to few numbers in many contexts added again. Speed-ups are against bsdiff4, starts included; a start is not taken "
        "off, because it varies by as much as our whole work on small pairs takes. Others' figures are kept while neither pair nor call changes."
    )
    lines = ["# The delta beside others", "", found["machine"], "", said, "", "## Summary", "", *summary_table(pairs)]
    if found["scaling"]:
        bare = found["bare_mib"]
        head = "MB | new/patch | build s | MB/s | MiB above bare | apply s | MB/s | M weights/s | MiB above bare"
        lines += ["![size against speed](delta.svg)", "", "## Size (ours; bfloat16, small steps)", ""]
        lines += [f"A bare interpreter with numpy and zstd has {bare:.0f} MiB.", ""]
        lines += table(head, (size_of(row, bare) for row in found["scaling"].values()))
    if not found["folder"] and ESTIMATES in (before := (RESULTS / "delta.md").read_text()):  # forecasts are measured apart
        lines += [ESTIMATES, *before.partition(f"{ESTIMATES}\n")[2].partition("\n## ")[0].split("\n")]
    lines += [STARTING, ""]
    lines += table("tool | s | MiB", (f"{tool} | {s:.2f} | {mib:.0f}" for tool, (s, mib) in starts.items()))
    for name, pair in pairs.items():
        lines += [f"## {name}: {pair['new']:,} bytes, yardstick {pair['yardstick']:,.0f}", ""]
        head = "tool | bytes | new/patch | build s | build MiB | apply s | apply MiB"
        lines += table(head, (row_of(tool, row, pair["new"]) for tool, row in pair["tools"].items()))
    print("\n".join(lines))
    if not found["folder"]:  # other people's pairs are not our results
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "delta.md").write_text("\n".join(lines))
        plot(pairs)


def main() -> None:
    """Measure everything, write the report, and fail if any patch does not restore the new file."""
    BUILD.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:2] == ["--estimates"]:
        estimates(Path(sys.argv[2]) if len(sys.argv) > 2 else None)
        return
    own = len(sys.argv) < 2
    folder = own_pairs() if own else Path(sys.argv[1])
    empty = dict.fromkeys(("old", "new", "patch", "made", "kind"), "")
    found: dict[str, Any] = {
        "machine": machine(), "folder": None if own else str(folder),
        "bare_mib": spend([sys.executable, "-c", "import numpy; from backports import zstd"])[1],
        "starts": {t: sorted(spend(TOOLS[t].call("", empty)) for _ in range(APPLIES))[APPLIES // 2] for t in TOOLS if TOOLS[t].imports},
        "pairs": {pair.name: compared(pair) for pair in sorted(folder.iterdir()) if pair.is_dir()},
        "scaling": scaling() if own else {},
    }  # fmt: skip
    (BUILD.parent / "bench-delta.json").write_text(json.dumps(found, indent=1))
    report(found)
    rows = [(tool, name, row) for name, pair in found["pairs"].items() for tool, row in pair["tools"].items()]
    wrong = [f"{tool} on {name}" for tool, name, row in rows if not row.get("exact", True)]
    if wrong:
        sys.exit("not the new file: " + ", ".join(wrong))


if __name__ == "__main__":
    main()

"""Tasks that run in a separate process with limits: applying a delta, trying a bundle, drawing an image.

A patch, a graph and weights are parsed only here, so that the agent survives whatever they do to the process. The memory that
ONNX Runtime keeps is freed with the process. The parent calls `run`; the child reads one JSON request from its standard input
and answers with one JSON line. The child of a `Worker` keeps its bundle loaded, and goes on reading and answering.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from ota.errors import (
    AgentError,
    BaseError,
    DeltaError,
    DeviceError,
    DiedError,
    LateError,
    ManifestError,
    OperatorError,
    OtaError,
    RoomError,
    SoftwareError,
    StateError,
    UnfinishedError,
)
from ota.manifest import SamplerTable, VariantName

MEMORY = 4 * 1024**3  # bytes of address space; ONNX Runtime maps far more than it uses
SECONDS = {"apply": 600, "check": 60, "try": 300, "generate": 300}  # of wall time; of CPU time twice as many, for two cores
PR_SET_PDEATHSIG = 1
MAX_SAID = 1024**2  # bytes that the child of a `Worker` may write to its standard error
MAX_ANSWER = 4 * 1024**2  # bytes, sixty times as many as an image of the largest size has
READY = b"ready\n"  # written once the child's software is loaded and computes, before it reads anything untrusted
# Signals that end a process from outside: from the kernel when memory or CPU time runs out, and from people and systemd.
ASKED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU}
GATE_IMAGES = 4  # images drawn in one batch when a bundle is tried
SOFTWARE = {
    "apply": ("ota.agent.disk", "ota.agent.state", "ota.delta"),
    "draw": ("numpy", "onnxruntime", "ota.agent.rules", "ota.agent.runtime", "ota.agent.sampler", "ota.agent.state"),
}
KNOWN: dict[str, type[OtaError]] = {
    kind.__name__: kind
    for kind in (
        AgentError, BaseError, DeltaError, DeviceError, ManifestError, OperatorError, RoomError, SoftwareError, StateError,
        UnfinishedError,
    )
}  # fmt: skip


def run(task: str, **request: Any) -> dict[str, Any]:
    """Run a task in a child process and return its answer.

    Raises:
        RoomError: no process can be started; the task was not begun.
        SoftwareError: the task's software cannot be loaded or does not compute, or the bundle needs another version of it.
        UnfinishedError: the child was killed, or ran out of time or memory, which may be a passing fault of the device.
        DiedError: the child died in another way.
        OtaError: the error that the task raised.
    """
    try:
        done = subprocess.run(  # noqa: S603
            _words(task),
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=SECONDS[task],
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LateError(f"the {task} process did not end within {SECONDS[task]} s and was stopped; try again") from error
    except OSError as error:
        raise _not_started(task, error) from error
    return _answer(task, done.returncode, done.stdout, done.stderr)


class Worker:
    """A child that keeps a bundle loaded and draws with it, one image at a time.

    The child lives no longer than the thread that started it, because the kernel takes that thread for its parent.
    """

    def __init__(self, slot: str, digest: str, entry: str = "") -> None:
        """Start the child; faults of the bundle show only when it is asked to draw.

        Args:
            slot: folder of the bundle, or of a PoC kit.
            digest: hash of the bundle or the kit.
            entry: candidate of the kit; empty: it is a bundle.

        Raises:
            RoomError: no process can be started.
        """
        self.digest = digest
        self._lock = threading.Lock()
        self._ready = False
        # In memory, at most MAX_SAID: a pipe that nobody reads would fill up, and a temporary folder may be full.
        self._said = os.fdopen(os.memfd_create("said"), "w+b")
        try:
            self._process = subprocess.Popen(  # noqa: S603
                _words("serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=_environment(), bufsize=0
            )
        except OSError as error:
            self._said.close()
            raise _not_started("serve", error) from error
        self._send({"slot": slot, "digest": digest} | ({"entry": entry} if entry else {}))

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def draw(self, variant: VariantName, caption: str, seed: int) -> dict[str, Any]:
        """Draw one image in the child; return what `Drawing.draw` returns.

        Raises:
            UnfinishedError: the child was killed, or did not answer in time and was killed for it.
            DiedError: the child died in another way.
            DeviceError: the answer is longer than `MAX_ANSWER`; the child was killed.
            OtaError: the error that the task raised.
        """
        with self._lock:
            self._send({"variant": variant, "caption": caption, "seed": seed})
            until = time.monotonic() + SECONDS["generate"]
            line = self._receive(until)
            if not self._ready and line.startswith(READY):
                self._ready = True
                line = line.removeprefix(READY) or self._receive(until)
        if not line:
            self._said.seek(0)
            return _answer("serve", self._process.wait(), READY if self._ready else b"", self._said.read())
        return _answer("serve", 0, READY + line, b"")

    def close(self) -> None:
        """Kill the child, whatever it is doing, and close its streams."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream:
                stream.close()

    def _send(self, request: dict[str, Any]) -> None:
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # the child died; that shows when its answer is read
                self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _receive(self, deadline: float) -> bytes:
        """Receive the next line; return nothing if the child died instead.

        Raises:
            LateError: no line arrived by the deadline; the child was killed.
            DeviceError: the line is longer than `MAX_ANSWER`; the child was killed.
        """
        line, pipe = bytearray(), self._process.stdout
        if pipe is None:
            return b""
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                self._process.kill()
                raise LateError(f"the serve process did not answer within {SECONDS['generate']} s and was stopped; try again")
            piece = os.read(pipe.fileno(), 1 << 16)
            if not piece:
                return b""
            line += piece
            if len(line) > MAX_ANSWER:
                self._process.kill()
                raise DeviceError("the serve process sent an answer that is too long and was stopped; try again")
        return bytes(line)


def _words(task: str) -> list[str]:
    # -P: nothing is imported from the caller's working directory
    return [sys.executable, "-P", "-m", "ota.agent.child", task, str(os.getpid())]


def _environment() -> dict[str, str]:
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}


def _not_started(task: str, error: OSError) -> RoomError:
    return RoomError(f"cannot start the {task} process: {error.strerror}; free memory and try again")


def _answer(task: str, code: int, stdout: bytes, stderr: bytes) -> dict[str, Any]:
    """Return the child's answer, or raise the error that its answer or its end stands for."""
    if -code in ASKED:
        raise UnfinishedError(f"the {task} process was killed, perhaps because memory or time ran out; try again")
    if not stdout.startswith(READY):
        hard, remedy = resource.getrlimit(resource.RLIMIT_AS)[1], "install deltaferry-agent again, or check the disk"
        if hard != resource.RLIM_INFINITY and hard < MEMORY:
            remedy = f"allow this process more than {hard // 1024**2} MiB of address space (ulimit -v, or LimitAS= in a unit), or {remedy}"
        raise SoftwareError(f"the agent's software is broken ({_ending(code)}: {_last_line(stderr)}); {remedy}")
    try:
        answer: dict[str, Any] = json.loads(stdout.removeprefix(READY))
    except ValueError as error:
        raise DiedError(f"the {task} process died ({_ending(code)}): {_last_line(stderr)}") from error
    if "error" in answer:
        raise KNOWN.get(answer["kind"], DeviceError)(answer["error"])
    return answer


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit {code}"


def _last_line(data: bytes) -> str:
    lines = data.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


# Below: in the child


def main() -> None:
    """Run the child process: load the task's software, read the request, and answer."""
    task, parent = sys.argv[1], int(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed agent's child must not write while the next agent's does
    if os.getppid() != parent:
        os._exit(1)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    _load(task)
    sys.stdout.write(READY.decode())
    sys.stdout.flush()
    if task == "serve":  # without a limit of CPU time: the parent stops it if it takes too long
        _limit(resource.RLIMIT_FSIZE, MAX_SAID)
        request = _at_home(json.loads(sys.stdin.buffer.readline()))
        bundle = KitDrawing(**request) if "entry" in request else Drawing(**request)
        for line in iter(sys.stdin.buffer.readline, b""):
            _say(_done(task, lambda line=line: bundle.draw(**json.loads(line))))  # type: ignore[misc]
    else:
        _limit(resource.RLIMIT_CPU, 2 * SECONDS[task])
        _say(_done(task, lambda: TASKS[task](**_at_home(json.loads(sys.stdin.buffer.read())))))
    os._exit(0)  # skips ONNX Runtime's teardown, which takes time and has been seen to crash


def _limit(kind: int, most: int) -> None:
    """Set a limit of this process; a lower limit that the caller set stays, because it cannot be raised."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _load(task: str) -> None:
    """Load and test the task's software, so that a missing or broken package shows before a bundle is touched."""
    for name in SOFTWARE["apply" if task == "apply" else "draw"]:
        importlib.import_module(name)
    if task != "apply":
        from ota.agent import runtime

        runtime.check()


def _at_home(request: dict[str, Any]) -> dict[str, Any]:
    """Change to the folder of the bundle, and return the request with the folder's absolute path.

    If the runtime opened a file that the bundle names after all, it would find only the bundle's own files there.
    """
    if "root" in request:  # the task `apply`, whose folders are relative to it
        return request
    if "slot" not in request:
        return request
    slot = os.path.abspath(request["slot"])  # noqa: PTH100 - a link stays one
    with contextlib.suppress(FileNotFoundError):  # opening the slot will report that it is missing
        os.chdir(slot)
    return request | {"slot": slot}


def _done(task: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except OtaError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    except MemoryError:
        return {"kind": "UnfinishedError", "error": f"the {task} process has not enough memory; free some and try again"}
    except (OSError, ImportError) as error:  # a disk that fails, or a package whose damage shows only now
        return {
            "kind": "UnfinishedError",
            "error": f"the {task} process cannot read what it needs ({error}); check the disk and try again",
        }


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def apply(
    root: str, patch: str, base: str, base_digest: str, slot: str, target_digest: str = "", files: list[dict[str, Any]] | None = None,
    limit: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Build a bundle's files in the folder `slot` from those in the folder `base` and the delta `patch`, all relative to `root`.

    A file is made from one in `base`, or from one that was made before. Without `files`, the result is one that only the next delta
    of a chain needs: nothing but the delta names its files, which may have `limit` bytes together.

    Args:
        root: the agent's directory.
        patch: the delta, whose signed hash was checked.
        base: slot of a bundle, or folder of a result in between.
        base_digest: hash of its manifest.
        slot: folder to write to.
        target_digest: hash of the manifest of the bundle that is made; empty with a result in between.
        files: what the delta makes, as the signed manifest lists it; None: the result is one in between.
        limit: bytes of a result in between.

    Returns:
        the hash of the manifest of what was made, as the delta names it.
    """
    from ota import delta
    from ota.agent.disk import Disk
    from ota.agent.state import Slot

    delta.keep_memory()
    disk = Disk(Path(root))
    if Path(base).name == base_digest:
        try:
            held = {*Slot(disk.path(base), base_digest).manifest.objects}
        except StateError as error:
            raise BaseError("the installed bundle's manifest is missing or damaged; fetch the full bundle") from error
    else:
        held = {path.name for path in disk.path(base).iterdir()}

    def open_base(file: delta.DeltaFile) -> BinaryIO:
        try:
            return disk.path(f"{base if file.base in held else slot}/{file.base}").open("rb")
        except OSError as error:
            raise BaseError(f"the installed bundle lacks what the {file.name} is made from; fetch the full bundle") from error

    with disk.path(patch).open("rb") as stream:
        header = delta.read_header(stream)
        if header.base != base_digest or (files is not None and header.target != target_digest):
            raise DeltaError("the delta is for other bundles than its signed name says; fetch the full bundle")
        if files is not None and [asdict(file.target) for file in header.files] != files:
            raise DeltaError("the delta makes other files than the signed manifest lists; fetch the full bundle")
        if files is None and (size := sum(file.target.size for file in header.files)) > limit:
            raise DeltaError(f"the delta makes files of {size} bytes, but one of a chain may make {limit}; fetch the full bundle")
        delta.apply(stream, header, open_base, lambda entry: disk.writing(f"{slot}/{entry.sha256}"))
    return {"target": header.target}


def peak_mib() -> float:
    """Return the most memory, in MiB, that this process ever had resident.

    On Linux, a started process inherits `ru_maxrss` from its parent. So the peak of its own memory is read from
    /proc/self/status.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # a kernel without VmHWM


def try_bundle(slot: str, digest: str, variant: VariantName, trusted: bool = False) -> dict[str, Any]:
    """Load a variant of a bundle, compare its golden outputs, and draw images; return the fields of `fitness.TrialResult`.

    A `trusted` bundle is tried with any version of ONNX Runtime, because it also draws with any.
    """
    import numpy as np

    from ota import golden
    from ota.agent import sampler
    from ota.agent.state import Slot
    from ota.manifest import MAX_TABLE, SamplerTable, parse

    bundle = Slot(Path(slot), digest)
    table = parse(SamplerTable, bundle.read("sampler", variant), MAX_TABLE)
    reference = bundle.reference(variant)
    if not trusted:
        _check_version(table)
    model = sampler.open_model(bundle.read("graph"), bundle.read("weights", variant), table)
    model.experts = [len(row) for row in reference.load]

    outputs = golden.read(bundle.read("golden", variant))
    ids, seeds = outputs.ids, outputs.seeds
    shape = (table.image.channels, table.image.size, table.image.size)
    x = np.stack([sampler.noise(int(seed), shape) for seed in seeds])
    share = outputs.share(model.run(x, outputs.t, outputs.r, ids), reference.golden.tolerance)

    model.load_sum, model.evaluations = None, 0
    parts = [slice(first, first + GATE_IMAGES) for first in range(0, len(ids), GATE_IMAGES)]
    images = np.concatenate([model.generate(ids[part], [int(seed) for seed in seeds[part]]) for part in parts])
    load = model.load()
    took, computed = [], []
    for i in range(3):
        start, computing = time.perf_counter(), _computed()
        model.generate(ids[:1], [i])
        took.append(time.perf_counter() - start)
        computed.append(_computed() - computing)
    finite = bool(np.isfinite(images).all())
    return {
        "golden_share": share,
        "finite": finite,
        "statistics": sampler.statistics(np.nan_to_num(images)),
        "load": load,
        "milliseconds": 1000 * sorted(took)[1],
        "computing": 1000 * sorted(computed)[1],
        "peak_mib": peak_mib(),
    }


def _computed() -> float:
    """Return the seconds of processor time that this process has used.

    `time.process_time` is not used: under a limit of processor time, as for a trial, Linux gives that clock in ticks of several
    milliseconds.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _check_version(table: SamplerTable) -> None:
    """Refuse to try a bundle with a version of ONNX Runtime that it was not made for.

    Raises:
        SoftwareError: the installed version is not one that the bundle allows.
    """
    import onnxruntime

    from ota.agent import rules

    if problem := rules.check_runtime(table.runtime.onnxruntime, onnxruntime.__version__):
        raise SoftwareError(f"{problem}; install that version, and the next update resumes")


class Drawing:
    """A bundle that draws; each variant is loaded when it is first asked for, and stays loaded. Equal weights are loaded once."""

    def __init__(self, slot: str, digest: str, on_trial: bool = False) -> None:
        self._slot, self._digest, self._on_trial = slot, digest, on_trial
        self._models: dict[VariantName, Any] = {}
        self._sessions: dict[tuple[str, bytes], Any] = {}  # by the hash of the weights, and the settings of the runtime

    def draw(self, variant: VariantName, caption: str, seed: int, trace: bool = False) -> dict[str, Any]:
        """Draw one image; return the PNG in base64, whether it is good, its statistics, time, peak memory and expert load [M][E].

        With `trace`, also return how it was drawn, and the load at each step.
        """
        import numpy as np

        from ota.agent import sampler
        from ota.agent.state import Slot
        from ota.manifest import MAX_TABLE, SamplerTable, parse

        if variant not in self._models:
            bundle = Slot(Path(self._slot), self._digest)
            table = parse(SamplerTable, bundle.read("sampler", variant), MAX_TABLE)
            if self._on_trial:  # a trusted bundle draws with any version that can
                _check_version(table)
            key = bundle.manifest.weights_sha256(variant), table.runtime.canonical()
            if key not in self._sessions:
                opened = sampler.open_model(bundle.read("graph"), bundle.read("weights", variant), table)
                self._sessions[key] = opened.session
            model = sampler.Model(self._sessions[key], table)
            model.experts = [len(row) for row in bundle.reference(variant).load]
            self._models[variant] = model
        model = self._models[variant]
        model.load_sum, model.evaluations, model.loads = None, 0, [] if trace else None
        start = time.perf_counter()
        image = model.generate(model.encode(caption), [seed])[0]
        elapsed = time.perf_counter() - start
        return {
            "png": base64.b64encode(sampler.png(np.nan_to_num(image))).decode(),
            "good": bool(np.isfinite(image).all() and image.std() > 0.01),
            "load": model.load(),
            "statistics": sampler.statistics(np.nan_to_num(image)[None]),
            "milliseconds": 1000 * elapsed,
            "peak_mib": peak_mib(),
            **({"trace": _trace(variant, model)} if trace else {}),
        }


class KitDrawing:
    """A candidate of a PoC kit that draws; it is loaded when it is first asked to draw, and stays loaded."""

    def __init__(self, slot: str, digest: str, entry: str) -> None:
        self._slot, self._digest, self._entry = slot, digest, entry
        self._model: Any = None
        self._bare = 0.0

    def draw(self, variant: VariantName, caption: str, seed: int) -> dict[str, Any]:
        """Draw one image of the candidate's own variant; return its time, and the peak memory with and without the model."""
        from ota.agent.kit import OpenKit

        del variant
        if self._model is None:
            self._bare = peak_mib()
            kit = OpenKit(Path(self._slot))
            if kit.digest != self._digest:
                raise ManifestError("the kit was changed while it was measured; measure again")
            self._model = kit.open_model(self._entry)
            _check_version(self._model.table)
        start = time.perf_counter()
        self._model.generate(self._model.encode(caption), [seed])
        return {"milliseconds": 1000 * (time.perf_counter() - start), "peak_mib": peak_mib(), "bare_mib": self._bare}


def _trace(variant: VariantName, model: Any) -> dict[str, Any]:
    """Return the fields of `ota.manifest.Trace` that only the child knows."""
    table = model.table
    return {"variant": variant, "method": table.method, "guidance": table.guidance, "times": table.times, "load": model.trace()}


def generate(
    slot: str, digest: str, variant: VariantName, caption: str, seed: int, on_trial: bool = False, trace: bool = False
) -> dict[str, Any]:
    """Draw one image; see `Drawing.draw`."""
    return Drawing(slot, digest, on_trial).draw(variant, caption, seed, trace)


# The task `check` has nothing left to do: `_load` has checked the software before.
TASKS: dict[str, Callable[..., dict[str, Any]]] = {"apply": apply, "check": dict, "try": try_bundle, "generate": generate}

if __name__ == "__main__":
    main()

"""What runs in a process of its own, with limits: applying a delta, trying a bundle, drawing an image.

A patch, a graph and weights are parsed here and nowhere else, so that whatever they do to a process, the agent lives on;
and memory that ONNX Runtime keeps goes back with the process. The parent calls `run`; the child reads one JSON request
from its standard input and answers with one JSON line. A `Worker` keeps its bundle loaded, and goes on reading and answering.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
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
from ota.manifest import Role, SamplerTable, VariantName

MEMORY = 4 * 1024**3  # bytes of address space; ONNX Runtime maps far more than it uses
SECONDS = {"apply": 600, "check": 60, "try": 300, "generate": 300}  # of wall time; twice that in CPU time, for two cores
PR_SET_PDEATHSIG = 1
MAX_SAID = 1024**2  # bytes of what a child that keeps its bundle loaded says besides its answers
MAX_ANSWER = 4 * 1024**2  # bytes, of which an image of the largest size has a sixtieth
READY = b"ready\n"  # what a child says when its software is loaded and computes, before it looks at anything of a stranger
# Signals by which a process is ended from outside: the kernel's when memory or CPU time is short, and those of people and systemd.
ASKED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU}
GATE_IMAGES = 4  # drawn at once when a bundle is tried
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
        SoftwareError: its software cannot be loaded or does not compute, or the bundle asks for another version of it.
        UnfinishedError: the child was killed, or ran out of time or memory, which may be the device's fault this once.
        DiedError: it died in another way.
        OtaError: what the task raised.
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

    It lives no longer than the thread that started it, which the kernel takes for its parent.
    """

    def __init__(self, slot: str, digest: str) -> None:
        """Start it; what is wrong with the bundle shows when it is asked to draw.

        Raises:
            RoomError: no process can be started.
        """
        self.digest = digest
        self._lock = threading.Lock()
        self._ready = False
        # A pipe that nobody reads would fill up, and a temporary folder may be full: in memory, where the child may write MAX_SAID.
        self._said = os.fdopen(os.memfd_create("said"), "w+b")
        try:
            self._process = subprocess.Popen(  # noqa: S603
                _words("serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=_environment(), bufsize=0
            )
        except OSError as error:
            self._said.close()
            raise _not_started("serve", error) from error
        self._send({"slot": slot, "digest": digest})

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def draw(self, variant: VariantName, caption: str, seed: int) -> dict[str, Any]:
        """As the task `generate` answers, with the expert load besides.

        Raises:
            UnfinishedError: it was killed, or did not answer in time; it is dead then.
            DiedError: it died in another way.
            OtaError: what the task raised.
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
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream:
                stream.close()

    def _send(self, request: dict[str, Any]) -> None:
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it died; that shows when its answer is read
                self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _receive(self, deadline: float) -> bytes:
        """The next line; empty when the child died instead."""
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
                raise DeviceError("the serve process answers without end and was stopped")
        return bytes(line)


def _words(task: str) -> list[str]:
    # -P: what lies in the working directory of whoever asks for an image is not to be imported
    return [sys.executable, "-P", "-m", "ota.agent.child", task, str(os.getpid())]


def _environment() -> dict[str, str]:
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _not_started(task: str, error: OSError) -> RoomError:
    return RoomError(f"cannot start the {task} process: {error.strerror}; free memory and try again")


def _answer(task: str, code: int, stdout: bytes, stderr: bytes) -> dict[str, Any]:
    """What a child said, or the error that its end stands for."""
    if -code in ASKED:
        raise UnfinishedError(f"the {task} process was killed, perhaps for want of memory or time; try again")
    if not stdout.startswith(READY):
        hard, remedy = resource.getrlimit(resource.RLIMIT_AS)[1], "install deltaferry-agent anew, or check the disk"
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
    """Entry point of the child process."""
    task, parent = sys.argv[1], int(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed agent's child must not write beside the next one's
    if os.getppid() != parent:
        os._exit(1)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    _load(task)
    sys.stdout.write(READY.decode())
    sys.stdout.flush()
    if task == "serve":  # whose parent stops it where it takes too long
        _limit(resource.RLIMIT_FSIZE, MAX_SAID)
        bundle = Drawing(**_at_home(json.loads(sys.stdin.buffer.readline())))
        for line in iter(sys.stdin.buffer.readline, b""):
            _say(_done(task, lambda line=line: bundle.draw(**json.loads(line))))  # type: ignore[misc]
    else:
        _limit(resource.RLIMIT_CPU, 2 * SECONDS[task])
        _say(_done(task, lambda: TASKS[task](**_at_home(json.loads(sys.stdin.buffer.read())))))
    os._exit(0)  # ONNX Runtime's teardown is not worth waiting for, and has been seen to crash


def _limit(kind: int, most: int) -> None:
    """Set a limit of this process; one that its caller set lower stays, as nobody may raise it."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _load(task: str) -> None:
    """Load and try all that the task needs: a package that is missing or broken shows before a bundle is touched."""
    for name in SOFTWARE["apply" if task == "apply" else "draw"]:
        importlib.import_module(name)
    if task != "apply":
        from ota.agent import runtime

        runtime.check()


def _at_home(request: dict[str, Any]) -> dict[str, Any]:
    """Work in the folder of the bundle: if a runtime opened a file by a name from it after all, it would find only the bundle's own."""
    if "root" in request:  # applying, which knows its folders by it
        return request
    if "slot" not in request:
        return request
    slot = os.path.abspath(request["slot"])  # noqa: PTH100 - a link stays one
    with contextlib.suppress(FileNotFoundError):  # then the slot is missed where it is opened
        os.chdir(slot)
    return request | {"slot": slot}


def _done(task: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except OtaError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    except MemoryError:
        return {"kind": "UnfinishedError", "error": f"the {task} process has not enough memory; free some and try again"}
    except (OSError, ImportError) as error:  # a disk that fails under it, or a package that only now shows that it is damaged
        return {
            "kind": "UnfinishedError",
            "error": f"the {task} process cannot read what it needs ({error}); check the disk and try again",
        }


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def apply(
    root: str, patch: str, base: str, base_digest: str, slot: str, target_digest: str, files: list[dict[str, Any]]
) -> dict[str, Any]:
    """Make a bundle's files in the folder `slot` from the slot `base` and the delta `patch`; all names are below `root`."""
    from ota import delta
    from ota.agent.disk import Disk
    from ota.agent.state import Slot

    delta.keep_memory()
    disk = Disk(Path(root))
    try:
        running = Slot(Path(root) / base, base_digest)
    except StateError as error:
        raise BaseError("the installed bundle's manifest is missing or damaged; fetch the full bundle") from error

    def open_base(role: Role, variant: VariantName | None) -> BinaryIO:
        try:
            return running.path(role, variant).open("rb")
        except (OSError, StopIteration) as error:
            raise BaseError(f"the installed bundle lacks its {role} file; fetch the full bundle") from error

    with (Path(root) / patch).open("rb") as stream:
        header = delta.read_header(stream)
        if (header.base, header.target) != (base_digest, target_digest):
            raise DeltaError("the delta is for other bundles than its signed name says; fetch the full bundle")
        if [file.target.model_dump(mode="json") for file in header.files] != files:
            raise DeltaError("the delta makes other files than the signed manifest lists; fetch the full bundle")
        delta.apply(stream, header, open_base, lambda entry: disk.writing(f"{slot}/{entry.sha256}"))
    return {"files": len(header.files)}


def peak_mib() -> float:
    """The most memory that this process ever had resident.

    Linux hands `ru_maxrss` on to a started process, at what its parent weighed; the high-water mark of its own memory is
    elsewhere.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # a kernel without it


def try_bundle(slot: str, digest: str, variant: VariantName, trusted: bool = False) -> dict[str, Any]:
    """Load a bundle's variant, compare its golden outputs, draw images; returns the fields of `rules.TrialResult`.

    One that is trusted is tried with any runtime that there is, as it draws with any.
    """
    import numpy as np

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

    try:
        with np.load(io.BytesIO(bundle.read("golden", variant)), allow_pickle=False) as file:
            ids, seeds, t, r, expected = (file[name] for name in ("ids", "seeds", "t", "r", "velocity"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ManifestError(f"the bundle's golden outputs cannot be read: {error}") from error
    shape = (table.image.channels, table.image.size, table.image.size)
    x = np.stack([sampler.noise(int(seed), shape) for seed in seeds])
    velocity = model.run(x, t, r, ids)
    close = np.abs(velocity - expected) <= reference.golden.tolerance
    share = float(close.mean()) if np.isfinite(velocity).all() else 0.0

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
    """Count the seconds of processor time that this process has used.

    Not `time.process_time`: where a limit on processor time is set, as it is for a trial, Linux gives that clock in ticks of several milliseconds.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _check_version(table: SamplerTable) -> None:
    """Refuse to judge a bundle by a runtime that it was not made for.

    Raises:
        SoftwareError: this one is not.
    """
    import onnxruntime

    from ota.agent import rules

    if problem := rules.check_runtime(table.runtime.onnxruntime, onnxruntime.__version__):
        raise SoftwareError(f"{problem}; install that version, and the next update goes on")


class Drawing:
    """A bundle that draws; each variant is loaded when it is first asked for, and kept."""

    def __init__(self, slot: str, digest: str, on_trial: bool = False) -> None:
        self._slot, self._digest, self._on_trial = slot, digest, on_trial
        self._models: dict[VariantName, Any] = {}

    def draw(self, variant: VariantName, caption: str, seed: int) -> dict[str, Any]:
        """Draw one image; returns the PNG in base64, how it went, and the load of the experts [M][E]."""
        import numpy as np

        from ota.agent import sampler
        from ota.agent.state import Slot
        from ota.manifest import MAX_TABLE, SamplerTable, parse

        if variant not in self._models:
            bundle = Slot(Path(self._slot), self._digest)
            table = parse(SamplerTable, bundle.read("sampler", variant), MAX_TABLE)
            if self._on_trial:  # one that is trusted goes on drawing with any runtime that can
                _check_version(table)
            model = sampler.open_model(bundle.read("graph"), bundle.read("weights", variant), table)
            model.experts = [len(row) for row in bundle.reference(variant).load]
            self._models[variant] = model
        model = self._models[variant]
        model.load_sum, model.evaluations = None, 0
        start = time.perf_counter()
        image = model.generate(model.encode(caption), [seed])[0]
        elapsed = time.perf_counter() - start
        return {
            "png": base64.b64encode(sampler.png(np.nan_to_num(image))).decode(),
            "good": bool(np.isfinite(image).all() and image.std() > 0.01),
            "load": model.load(),
            "milliseconds": 1000 * elapsed,
            "peak_mib": peak_mib(),
        }


def generate(slot: str, digest: str, variant: VariantName, caption: str, seed: int, on_trial: bool = False) -> dict[str, Any]:
    """Draw one image; see `Drawing.draw`."""
    return Drawing(slot, digest, on_trial).draw(variant, caption, seed)


# What is to be checked was, before the task began.
TASKS: dict[str, Callable[..., dict[str, Any]]] = {"apply": apply, "check": dict, "try": try_bundle, "generate": generate}

if __name__ == "__main__":
    main()

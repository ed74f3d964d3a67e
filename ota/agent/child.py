"""What runs in a process of its own, with limits: applying a delta, trying a bundle, drawing an image.

A patch, a graph and weights are parsed here and nowhere else, so that whatever they do to a process, the agent lives on;
and memory that ONNX Runtime keeps goes back with the process. The parent calls `run`; the child reads one JSON request
from its standard input and answers with one JSON line.
"""

from __future__ import annotations

import base64
import ctypes
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ota.errors import (
    BaseError,
    DeltaError,
    DeviceError,
    ManifestError,
    OperatorError,
    OtaError,
    RoomError,
    StateError,
    UnfinishedError,
)
from ota.manifest import Role, VariantName

MEMORY = 4 * 1024**3  # bytes of address space; ONNX Runtime maps far more than it uses
SECONDS = {"apply": 600, "try": 300, "generate": 300}  # of wall time; twice that in CPU time, for two cores
PR_SET_PDEATHSIG = 1
GATE_IMAGES = 4  # drawn at once when a bundle is tried
KNOWN: dict[str, type[OtaError]] = {
    kind.__name__: kind
    for kind in (
        BaseError, DeltaError, DeviceError, ManifestError, OperatorError, RoomError, StateError, UnfinishedError,
    )
}  # fmt: skip


def run(task: str, **request: Any) -> dict[str, Any]:
    """Run a task in a child process and return its answer.

    Raises:
        RoomError: no process can be started; the task was not begun.
        UnfinishedError: the child was killed, or ran out of time or memory, which may be the device's fault this once.
        OtaError: what the task raised; `DeviceError` when the child died in another way.
    """
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603
            # -P: what lies in the working directory of whoever asks for an image is not to be imported
            [sys.executable, "-P", "-m", "ota.agent.child", task, str(os.getpid())],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=SECONDS[task],
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnfinishedError(f"the {task} process did not end within {SECONDS[task]} s and was stopped; try again") from error
    except OSError as error:
        raise RoomError(f"cannot start the {task} process: {error.strerror}; free memory and try again") from error
    if done.returncode == -signal.SIGKILL:  # the kernel's when memory or CPU time is short, or somebody else's
        raise UnfinishedError(f"the {task} process was killed, perhaps for want of memory or time; try again")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise DeviceError(f"the {task} process died ({_ending(done.returncode)}): {_last_line(done.stderr)}") from error
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
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS[task], 2 * SECONDS[task]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = TASKS[task](**json.loads(sys.stdin.buffer.read()))
    except OtaError as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    except MemoryError:
        answer = {"kind": "UnfinishedError", "error": f"the {task} process has not enough memory; free some and try again"}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # ONNX Runtime's teardown is not worth waiting for, and has been seen to crash


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


def try_bundle(slot: str, digest: str, variant: VariantName) -> dict[str, Any]:
    """Load a bundle's variant, compare its golden outputs, draw images; returns the fields of `rules.Trying`."""
    import numpy as np
    import onnxruntime

    from ota.agent import rules, sampler
    from ota.agent.state import Slot
    from ota.manifest import MAX_TABLE, SamplerTable, parse

    bundle = Slot(Path(slot), digest)
    table = parse(SamplerTable, bundle.read("sampler", variant), MAX_TABLE)
    reference = bundle.reference(variant)
    problem = rules.check_runtime(table.runtime.onnxruntime, onnxruntime.__version__)
    model = sampler.open_model(bundle.read("graph"), bundle.read("weights", variant), table)

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
    took = []
    for i in range(3):
        start = time.perf_counter()
        model.generate(ids[:1], [i])
        took.append(time.perf_counter() - start)
    finite = bool(np.isfinite(images).all())
    return {
        "golden_share": share,
        "finite": finite,
        "statistics": sampler.statistics(np.nan_to_num(images)),
        "load": load,
        "milliseconds": 1000 * sorted(took)[1],
        "peak_mib": peak_mib(),
        "runtime_problem": problem,
    }


def generate(slot: str, digest: str, variant: VariantName, caption: str, seed: int) -> dict[str, Any]:
    """Draw one image; returns the PNG in base64 and how it went."""
    import numpy as np

    from ota.agent import sampler
    from ota.agent.state import Slot
    from ota.manifest import MAX_TABLE, SamplerTable, parse

    bundle = Slot(Path(slot), digest)
    table = parse(SamplerTable, bundle.read("sampler", variant), MAX_TABLE)
    model = sampler.open_model(bundle.read("graph"), bundle.read("weights", variant), table)
    start = time.perf_counter()
    image = model.generate(model.encode(caption), [seed])[0]
    elapsed = time.perf_counter() - start
    return {
        "png": base64.b64encode(sampler.png(np.nan_to_num(image))).decode(),
        "good": bool(np.isfinite(image).all() and image.std() > 0.01),
        "milliseconds": 1000 * elapsed,
        "peak_mib": peak_mib(),
    }


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"apply": apply, "try": try_bundle, "generate": generate}

if __name__ == "__main__":
    main()

"""Draw images on the device with NumPy, ONNX Runtime and the table in `sampler.json`. No code of the factory is needed.

This is a second implementation of the factory's samplers, reduced to what a device needs. A test compares both on the same
noise.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ota.agent.graph import check_graph
from ota.errors import DeviceError, OperatorError
from ota.manifest import WEIGHTS_LOCATION, SamplerTable

NO_MEMORY = ("llocate memory", "bad_alloc", "bad allocation", "out of memory")  # in ONNX Runtime's error texts

Floats = npt.NDArray[np.float32]
Velocity = Callable[[Floats, float, float], Floats]


@dataclass
class Model:
    """A loaded variant: its session and table, and the sum of the expert load of everything drawn so far."""

    session: Any
    table: SamplerTable
    load_sum: npt.NDArray[np.float64] | None = None
    evaluations: int = 0
    loads: list[npt.NDArray[np.float64]] | None = None
    """Load [M, E] of each evaluation, if a trace was asked for; None: it was not."""
    experts: list[int] | None = None
    """Number of experts of each block, as listed in the bundle's own reference; None: not checked."""

    def velocity(self, x: Floats, t: float, r: float, ids: npt.NDArray[np.int64]) -> Floats:
        """Evaluate the network at (x [B, C, R, R], t, r) for captions [B, L]; with guidance where the table asks for it."""
        guidance, B = np.float32(self.table.guidance), len(x)
        if guidance == 1 or not self.table.guidance_low <= t <= self.table.guidance_high:
            return self.run(x, np.full(B, t, np.float32), np.full(B, r, np.float32), ids)
        twice = np.concatenate((x, x)), np.full(2 * B, t, np.float32), np.full(2 * B, r, np.float32)
        both = self.run(*twice, np.concatenate((ids, np.zeros_like(ids))))
        return both[B:] + guidance * (both[:B] - both[B:])

    def run(self, x: Floats, t: Floats, r: Floats, ids: npt.NDArray[np.int64]) -> Floats:
        """Evaluate the network once; count the evaluation and add its expert load to the sum.

        Raises:
            DeviceError: the runtime fails, or the outputs are not a velocity and the load of the experts.
            MemoryError: the runtime has not enough memory.
        """
        try:
            v, load = self.session.run(["v", "load"], {"x": x, "t": t, "r": r, "ids": ids})
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise _of_the_runtime("does not run the model", error) from error
        # A graph's outputs may depend on the caption, so correct outputs in the trial do not prove that these are correct.
        if not _is_floats(v) or v.dtype != np.float32 or v.shape != x.shape:
            raise DeviceError(f"the model gives {_form(v)} as velocity, not float32 {list(x.shape)}")
        if not _is_floats(load) or load.ndim != 3 or len(load) != len(x):
            raise DeviceError(f"the model gives {_form(load)} as load, not floats [{len(x)}][blocks][experts]")
        if self.experts is not None and [load.shape[2]] * load.shape[1] != self.experts:
            raise DeviceError("the model has other experts than its own reference lists")
        if not np.isfinite(load).all():
            raise DeviceError("the load of the model's experts is not finite")
        mean = load.mean(axis=0, dtype=np.float64)
        self.load_sum = mean if self.load_sum is None else self.load_sum + mean
        self.evaluations += 1
        if self.loads is not None:
            self.loads.append(mean)
        velocity: Floats = v
        return velocity

    def generate(self, ids: npt.NDArray[np.int64], seeds: list[int]) -> Floats:
        """Draw one image for each caption and seed: float32 [B, C, R, R], values about [-1, 1]."""
        shape = (self.table.image.channels, self.table.image.size, self.table.image.size)
        x = np.stack([noise(seed, shape) for seed in seeds])
        return SAMPLERS[self.table.method](lambda y, t, r: self.velocity(y, t, r, ids), x, self.table.times)

    def encode(self, caption: str) -> npt.NDArray[np.int64]:
        """Encode a caption as ids [1, L].

        Raises:
            OperatorError: the caption is longer than the model reads.
        """
        data, length = caption.encode(), self.table.text_length
        if len(data) > length:
            raise OperatorError(f"the caption has {len(data)} bytes, this model reads {length}; shorten it")
        ids = np.zeros((1, length), dtype=np.int64)
        ids[0, : len(data)] = np.frombuffer(data, np.uint8).astype(np.int64) + 1
        return ids

    def load(self) -> list[list[float]]:
        """Return the mean expert load [M][E] over all evaluations."""
        if self.load_sum is None:
            return []
        rows: list[list[float]] = (self.load_sum / self.evaluations).tolist()
        return rows

    def trace(self) -> list[list[list[float]]]:
        """Return the expert load [S][M][E] at each step of the image that was drawn; with guidance, with and without caption together."""
        steps = np.array_split(np.stack(self.loads or []), len(self.table.times) - 1)
        return [step.mean(axis=0).tolist() for step in steps]


def open_model(graph: bytes, weights: bytes | bytearray, table: SamplerTable, threads: int = 1) -> Model:
    """Load a variant with the session options that its table pins.

    Raises:
        DeviceError: its graph refers to another file than its weights, or ONNX Runtime refuses it.
        MemoryError: ONNX Runtime has not enough memory.
    """
    check_graph(graph)
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL, "extended": levels.ORT_ENABLE_EXTENDED, "basic": levels.ORT_ENABLE_BASIC,
        "disabled": levels.ORT_DISABLE_ALL,
    }[table.runtime.graph_optimization_level]  # fmt: skip
    for key, value in table.runtime.config.items():
        options.add_session_config_entry(key, value)
    # The weights, the graph's only external file, are passed in memory; `check_graph` has made sure that there is no other.
    options.add_external_initializers_from_files_in_memory(
        [WEIGHTS_LOCATION], [np.frombuffer(weights, dtype=np.uint8)], [len(weights)]
    )
    try:
        return Model(ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]), table)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise _of_the_runtime("does not load the model", error) from error


def _of_the_runtime(what: str, error: Exception) -> Exception:
    """Convert an error of ONNX Runtime to ours; only its text shows a lack of memory, which is not the model's fault."""
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        return MemoryError(str(error))
    return DeviceError(f"ONNX Runtime {ort.__version__} {what}: {error}")


def _is_floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _form(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def sample_euler(velocity: Velocity, x: Floats, times: list[float]) -> Floats:
    """Integrate by Euler's method."""
    for t, s in pairwise(times):
        x = x + np.float32(s - t) * velocity(x, t, t)
    return x


def sample_heun(velocity: Velocity, x: Floats, times: list[float]) -> Floats:
    """Integrate by Heun's second-order method (Karras et al. 2022, algorithm 1, without churn)."""
    for t, s in pairwise(times):
        h = np.float32(s - t)
        v = velocity(x, t, t)
        x = x + h * (v + velocity(x + h * v, s, s)) / np.float32(2)
    return x


def sample_ab2(velocity: Velocity, x: Floats, times: list[float]) -> Floats:
    """Integrate by the second-order Adams-Bashforth method."""
    before: tuple[Floats, float] | None = None
    for t, s in pairwise(times):
        h = s - t
        v = velocity(x, t, t)
        if before is None:
            x = x + np.float32(h) * v
        else:
            ratio = h / (2 * before[1])
            extrapolated: Floats = np.float32(1 + ratio) * v - np.float32(ratio) * before[0]
            x = x + np.float32(h) * extrapolated
        before = (v, h)
    return x


def sample_mean(velocity: Velocity, x: Floats, times: list[float]) -> Floats:
    """Integrate by the mean velocity from each time to the next, which students predict."""
    for t, s in pairwise(times):
        x = x + np.float32(s - t) * velocity(x, t, s)
    return x


SAMPLERS: dict[str, Callable[[Velocity, Floats, list[float]], Floats]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "ab2": sample_ab2,
    "mean": sample_mean,
}


def noise(seed: int, shape: tuple[int, ...]) -> Floats:
    """Draw standard normal numbers from a seed: Philox's raw stream, which NumPy promises to keep stable, through Box-Muller."""
    count = math.prod(shape)
    half = -(-count // 2)
    raw = np.random.Philox(key=seed).random_raw(2 * half)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
    return normal.astype(np.float32).reshape(shape)


def statistics(images: Floats) -> list[tuple[str, float]]:
    """Compute the mean, the standard deviation and the edge strength, each averaged over the images [B, C, R, R].

    Edge strength is the mean absolute step between neighbouring pixels, summed over both directions.
    """
    x = images.clip(-1, 1).astype(np.float64)
    edges = np.abs(np.diff(x, axis=2)).mean() + np.abs(np.diff(x, axis=3)).mean()
    return [("mean", float(x.mean())), ("deviation", float(x.std(axis=(1, 2, 3)).mean())), ("edges", float(edges))]


def png(image: Floats) -> bytes:
    """Encode one image [C, R, R], values about [-1, 1], as a PNG file."""
    pixels = ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    channels, rows, columns = pixels.shape
    lines = np.ascontiguousarray(pixels.transpose(1, 2, 0)).reshape(rows, columns * channels)
    data = b"".join(b"\0" + line.tobytes() for line in lines)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")

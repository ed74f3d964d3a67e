"""Open an exported model in ONNX Runtime exactly as a device does, and draw images with it.

Evaluation, golden outputs and devices all use sessions made with `RUNTIME`, which is written into `sampler.json`. So a device
runs exactly the model that was scored. (With default options ONNX Runtime may change the arithmetic of quantised layers from one
version or machine to the next.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from model.data import caption_ids
from model.diffusion import guided, sample
from model.errors import ExportError
from model.graph import WEIGHTS_FILE
from model.scorecard import Sampler

Floats = npt.NDArray[np.float32]

# Settings that a device must use to run the model as it was scored.
SESSION_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1"}
RUNTIME: dict[str, object] = {
    "onnxruntime": [">=1.20", "<2"],
    "graph_optimization_level": "all",
    "config": SESSION_CONFIG,
}


class Session:
    """One exported model, loaded in ONNX Runtime; it also returns routing traces if the graph has them."""

    def __init__(self, graph: bytes, weights: bytes, threads: int = 0) -> None:
        """Load a model.

        Args:
            graph: the bytes of `graph.onnx`.
            weights: the bytes of `weights.bin`.
            threads: number of threads of ONNX Runtime; 0 takes one for each core.

        Raises:
            ExportError: ONNX Runtime refuses the model.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        buffer = np.frombuffer(weights, dtype=np.uint8)
        options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [buffer], [len(weights)])
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ExportError(f"ONNX Runtime does not load the exported model: {error}") from error
        self.channels, self.size = self._session.get_inputs()[0].shape[1:3]
        self.text_length: int = self._session.get_inputs()[3].shape[1]

    def run(self, x: Floats, t: Floats, r: Floats, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.generic]]:
        """Return all outputs for one batch: v [B, C, R, R], load [B, M, E], then routing traces if the graph has them."""
        outputs: list[npt.NDArray[np.generic]] = self._session.run(None, {"x": x, "t": t, "r": r, "ids": ids})
        return outputs

    def encode(self, captions: list[str]) -> npt.NDArray[np.int64]:
        """Encode captions as ids [B, L]."""
        return np.array([caption_ids(c, self.text_length) for c in captions], dtype=np.int64)

    def trace(self, ids: npt.NDArray[np.int64], seeds: list[int], sampler: Sampler) -> tuple[Tensor, Floats]:
        """Draw one image for each caption and seed, and record the expert load at each step.

        Args:
            ids: captions [B, L].
            seeds: B seeds of the initial noise.
            sampler: solver, steps and guidance.

        Returns:
            images float32 [B, C, R, R], about [-1, 1], and the expert load [S, M, E] of each sampling step: the mean over
            images, with and without caption, and over the step's evaluations.
        """
        loads: list[Floats] = []

        def network(x: Tensor, t: Tensor, r: Tensor, text: Tensor) -> Tensor:
            v, load = self.run(x.numpy(), t.numpy(), r.numpy(), text.numpy())[:2]
            loads.append(load.mean(axis=0))
            return torch.from_numpy(v)

        shape = (self.channels, self.size, self.size)
        start = torch.from_numpy(np.stack([noise(seed, shape) for seed in seeds]))
        images = sample(guided(network, torch.from_numpy(ids), sampler), start, sampler)
        evaluations = np.stack(loads)  # [S * evaluations of a step, M, E]
        by_step: Floats = evaluations.reshape(sampler.steps, -1, *evaluations.shape[1:]).mean(axis=1, dtype=np.float32)
        return images, by_step

    def generate(self, ids: npt.NDArray[np.int64], seeds: list[int], sampler: Sampler) -> tuple[Tensor, Floats]:
        """Draw images like `trace`, but return the mean load [M, E] over the steps."""
        images, load = self.trace(ids, seeds, sampler)
        return images, load.mean(axis=0)

    def generate_many(self, captions: list[str], seed: int, sampler: Sampler, batch: int = 32) -> Iterator[tuple[Tensor, Floats]]:
        """Draw images for many captions like `trace`, batch by batch; image i starts from the noise of `seed + i`."""
        ids = self.encode(captions)
        for first in range(0, len(captions), batch):
            part = ids[first : first + batch]
            yield self.trace(part, [seed + first + i for i in range(len(part))], sampler)


def load(folder: Path, threads: int = 0) -> Session:
    """Load an exported model from its folder.

    Raises:
        ExportError: files are missing, or ONNX Runtime refuses the model.
    """
    try:
        return Session((folder / "graph.onnx").read_bytes(), (folder / WEIGHTS_FILE).read_bytes(), threads)
    except OSError as error:
        raise ExportError(f"{folder} does not hold an exported model; export the checkpoint again") from error


def noise(seed: int, shape: tuple[int, ...]) -> Floats:
    """Generate standard normal numbers that depend on the seed alone, on any machine and with any version of NumPy.

    They come from the raw 64-bit stream of Philox (Salmon et al. 2011), which NumPy promises never to change, through the
    Box-Muller transform. (NumPy's own `standard_normal` may change its stream between versions.) The device's sampler
    contains a second implementation; a test checks that the two agree.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    raw = np.random.Philox(key=seed).random_raw(2 * half)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # (0, 1), both ends excluded
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
    return normal.astype(np.float32).reshape(shape)

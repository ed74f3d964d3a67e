"""Check with a small graph of our own that ONNX Runtime computes correctly on this device.

If it does not, the software is to blame and not a bundle.
"""

from __future__ import annotations

import base64

import numpy as np
import onnxruntime as ort

# Opset 17: y = softmax(x·w + b), and c = the valid cross-correlation of the images i with the kernel k.
# A test builds the same graph with the package onnx and compares it.
PROBE = base64.b64decode(
    "CAg6kgIKEQoBeAoBdxIBbSIGTWF0TXVsCg4KAW0KAWISAWEiA0FkZAolCgFhEgF5IgdTb2Z0bWF4KhQKBGF4aXMY////////////AaABAgoPCgFpCgFrEgFj"
    "IgRDb252EgFwWhUKAXgSEAoOCAESCgoDEgFuCgMSAWRaFQoBdxIQCg4IARIKCgMSAWQKAxIBZVoQCgFiEgsKCQgBEgUKAxIBZVoeCgFpEhkKFwgBEhMKAxIB"
    "ZgoCCAEKAxIBZwoDEgFoWhsKAWsSFgoUCAESEAoCCAEKAggBCgIIAwoCCANiFQoBeRIQCg4IARIKCgMSAW4KAxIBZWIeCgFjEhkKFwgBEhMKAxIBZgoCCAEK"
    "AxIBbwoDEgFwQgQKABAR"
)
SIZES = (3, 96)  # some faults show only at sizes where the runtime splits its work or uses SIMD instructions


def check() -> None:
    """Check that ONNX Runtime computes the same as NumPy, for small and large matrices.

    Raises:
        RuntimeError: the results differ. Exceptions of ONNX Runtime itself are not caught: both mean broken software.
    """
    session = ort.InferenceSession(PROBE, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x, w = (np.sin(np.arange(size * size, dtype=np.float64) * step).reshape(size, size) for step in (0.7, 1.3))
        given = {"x": x, "w": w, "b": x[0], "i": w[None, None].repeat(2, 0), "k": np.cos(np.arange(9.0)).reshape(1, 1, 3, 3)}
        found = session.run(["y", "c"], {name: value.astype(np.float32) for name, value in given.items()})
        for name, got, expected in zip(("matrix product", "convolution"), found, _expected(**given), strict=True):
            if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-3, atol=1e-4):
                raise RuntimeError(f"ONNX Runtime {ort.__version__} computes a wrong {name} of size {size}")


def _expected(x: np.ndarray, w: np.ndarray, b: np.ndarray, i: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute softmax(x·w + b), and the valid cross-correlation of i with k, in float64."""
    a = x @ w + b
    powers = np.exp(a - a.max(axis=1, keepdims=True))
    rows, columns = i.shape[2] - 2, i.shape[3] - 2
    correlated = sum(k[0, 0, r, c] * i[:, :, r : r + rows, c : c + columns] for r in range(3) for c in range(3))
    return powers / powers.sum(axis=1, keepdims=True), np.asarray(correlated)

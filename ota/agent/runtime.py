"""Show with a graph of our own whether ONNX Runtime computes on this device at all; where it does not, no bundle is to blame."""

from __future__ import annotations

import base64

import numpy as np
import onnxruntime as ort

# y = softmax(x·[[1, 2], [3, -4]] + [0.5, -0.5]), opset 17. A test makes it anew with the package onnx and compares.
PROBE = base64.b64decode(
    "CAg6pwEKEQoBeAoBdxIBbSIGTWF0TXVsCg4KAW0KAWISAWEiA0FkZAolCgFhEgF5IgdTb2Z0bWF4KhQKBGF4aXMY////////////AaABAhIBcCobCAIIAhABQgF3ShAA"
    "AIA/AAAAQAAAQEAAAIDAKhEIAhABQgFiSggAAAA/AAAAv1oTCgF4Eg4KDAgBEggKAggBCgIIAmITCgF5Eg4KDAgBEggKAggBCgIIAkIECgAQEQ=="
)
GIVEN, EXPECTED = ((0.25, 0.125),), ((0.8354835, 0.1645165),)


def check() -> None:
    """Compute a known value.

    Raises:
        RuntimeError: it comes out wrong. What ONNX Runtime itself raises is not caught either: both stand for broken software.
    """
    session = ort.InferenceSession(PROBE, providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": np.array(GIVEN, np.float32)})
    if not np.allclose(found, EXPECTED, atol=1e-5):
        raise RuntimeError(f"ONNX Runtime {ort.__version__} computes {np.asarray(found).tolist()} instead of {EXPECTED}")

"""Measure the peak memory of an exported model in a separate process.

Usage: `python model/peak_memory.py FOLDER WEIGHTS BATCH CONFIG`. The file is run as a script and imports neither torch nor
the rest of `model`, because a device has only NumPy and ONNX Runtime. It prints two figures in MiB as JSON: the peak before
the model is loaded, and the peak after two evaluations of the network.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # here too: run as a script, it does not load the package
import onnxruntime as ort

EVALUATIONS = 2


def peak_mib() -> float:
    """Return the peak resident memory of this process, in MiB.

    On Linux a child process inherits `ru_maxrss`: the value is at least the resident memory of the parent, which has loaded
    torch. There the kernel's high-water mark of the process's own memory (VmHWM) is read instead.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(folder: str, weights_file: str, batch: str, config: str) -> None:
    """Load the model as `model.session` does, with one thread, evaluate it, and print both figures."""
    bare = peak_mib()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in json.loads(config).items():
        options.add_session_config_entry(key, value)
    weights = np.fromfile(Path(folder) / weights_file, dtype=np.uint8)
    options.add_external_initializers_from_files_in_memory([weights_file], [weights], [len(weights)])
    session = ort.InferenceSession((Path(folder) / "graph.onnx").read_bytes(), options, providers=["CPUExecutionProvider"])
    inputs = {}
    for value in session.get_inputs():
        shape = (int(batch), *value.shape[1:])
        inputs[value.name] = np.zeros(shape, np.int64) if "int64" in value.type else np.full(shape, 0.5, np.float32)
    for _ in range(EVALUATIONS):
        session.run(None, inputs)
    sys.stdout.write(json.dumps([bare, peak_mib()]))


if __name__ == "__main__":
    main(*sys.argv[1:])

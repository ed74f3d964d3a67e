"""The sparse diffusion model: data, network, training, sampling, evaluation and ONNX files.

The package depends on no orchestrator and no registry. Import what you need from the submodules: nothing heavy is imported
here, because `registry` reads `model.scorecard` and must not have to load torch.
"""

import os

# ONNX Runtime from 1.29 on sends what it runs, with hashes of graph and weights, to its maker, unless this is set when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

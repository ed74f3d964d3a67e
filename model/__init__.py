"""The sparse diffusion model: data, network, training, sampling, evaluation and ONNX files.

The package depends on no orchestrator and no registry. Import what you need from the submodules: nothing heavy is imported
here, because `registry` reads `model.scorecard` and must not have to load torch.
"""

"""Hardware for training: the device, the precision of matrix products, and whether the training step is compiled.

On a CPU everything is float32 and eager, and the same inputs give the same bits. On a GPU weights, moments and loss stay
float32, matrix products are bfloat16 under autocast, and the order of sums varies, so two runs agree closely but not bit for bit.

    >>> hardware = Hardware.here()
    >>> with hardware.precision():
    ...     v, load = network(x, t, r, ids)
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from model.errors import ConfigError

COMPILERS = ("cc", "gcc", "clang")  # Triton builds its launchers with one of them
TRITON_CAPABILITY = (7, 0)  # of the oldest GPUs that Triton supports


@dataclass(frozen=True)
class Hardware:
    """Where and how a network is computed in training."""

    device: str = "cpu"  # as torch names it, such as "cuda:0"
    autocast: bool = False  # matrix products in bfloat16
    compiled: bool = False  # the network's step through torch.compile

    @classmethod
    def here(cls) -> Hardware:
        """Detect the hardware of this process: its own GPU if CUDA sees one (`CUDA_VISIBLE_DEVICES=` hides them), else the CPU.

        Raises:
            ConfigError: more processes were started on this machine than it has GPUs.
        """
        if not torch.cuda.is_available():
            return cls()
        mine, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if mine >= count:
            raise ConfigError(
                f"process {mine + 1} of this machine has no GPU of its own, because there are {count}; start torchrun with "
                f"--nproc-per-node {count}"
            )
        torch.cuda.set_device(mine)
        able = torch.cuda.get_device_capability(mine) >= TRITON_CAPABILITY and importlib.util.find_spec("triton") is not None
        autocast = torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(f"cuda:{mine}", autocast, able and any(map(shutil.which, COMPILERS)))

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def name(self) -> str:
        """Name in the lineage: runs whose names differ do not end in the same bits."""
        parts = [torch.cuda.get_device_name(self.device) if self.gpu else self.device]
        return ", ".join(parts + ["bfloat16"] * self.autocast + ["compiled"] * self.compiled)

    def precision(self) -> AbstractContextManager[object]:
        """Return a context in which matrix products are computed in this hardware's precision."""
        return torch.autocast("cuda" if self.gpu else "cpu", torch.bfloat16, enabled=self.autocast)

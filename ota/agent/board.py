"""Say what kind of board this is, from what the kernel shows to everybody: no name, serial number or address of the board."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from ota.kit import Board

# Cores by their number in /proc/cpuinfo, where Arm's kernel shows no name (arm64: Documentation/arch/arm64/cpu-feature-registers).
ARM_CORES = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78", "0xd42": "Cortex-A78AE", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710",
}  # fmt: skip
LONGEST = 120  # characters of a text


def describe(root: Path = Path("/")) -> Board:
    """Describe this board, whose files are below `root`."""
    import numpy as np
    import onnxruntime

    cpuinfo, warm = _text(root / "proc/cpuinfo", 1 << 20), celsius(root)
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    hertz = _number(frequency / "cpuinfo_max_freq")
    return Board(
        model=_model(root), cpu=_cpu(cpuinfo), architecture=platform.machine(), cores=len(os.sched_getaffinity(0)),
        memory_mib=_memory(root), kernel=platform.release(), system=_system(root),
        virtual=bool(re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)) or (root / "sys/hypervisor/type").exists(),
        governor=_text(frequency / "scaling_governor"), megahertz=hertz / 1000 if hertz else None,
        celsius=[] if warm is None else [warm], power=_power(root / "sys/class/power_supply"),
        busy=_busy(root), python=platform.python_version(), numpy=np.__version__, onnxruntime=onnxruntime.__version__,
    )  # fmt: skip


def celsius(root: Path = Path("/")) -> float | None:
    """Read the highest temperature of the board's zones; None: there is none that is readable."""
    found = [_number(path) for path in sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))]
    known = [value / 1000 for value in found if value is not None and -100_000 < value < 200_000]
    return max(known, default=None)


def _text(path: Path, most: int = LONGEST) -> str:
    with suppress(OSError, ValueError), path.open("rb") as file:
        return file.read(most).decode(errors="replace").strip(" \t\r\n\0")
    return ""


def _number(path: Path) -> float | None:
    with suppress(ValueError):
        return float(_text(path))
    return None


def _model(root: Path) -> str:
    """Name the board: a device tree has a model, a PC has a product (and a serial number beside it, which is not read)."""
    found = _text(root / "proc/device-tree/model")
    dmi = root / "sys/class/dmi/id"
    return found or f"{_text(dmi / 'sys_vendor')} {_text(dmi / 'product_name')}".strip()[:LONGEST]


def _cpu(cpuinfo: str) -> str:
    if named := re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
        return named[1][:LONGEST]
    parts = sorted(set(re.findall(r"^CPU part\s*:\s*(0x[0-9a-f]+)$", cpuinfo, re.MULTILINE)))
    return (
        " and ".join(ARM_CORES.get(part, f"Arm part {part}") for part in parts)[:LONGEST] or platform.processor() or "not known"
    )


def _memory(root: Path) -> float:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo", 1 << 16), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def _system(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?(.*?)"?$', _text(root / "etc/os-release", 1 << 16), re.MULTILINE)
    return found[1][:LONGEST] if found else ""


def _busy(root: Path) -> float:
    with suppress(ValueError, IndexError):
        return float(_text(root / "proc/loadavg").split()[0])
    return 0.0


def _power(place: Path) -> str:
    """Say what feeds the board, as far as the kernel knows: mains, or a battery and whether it is discharging."""
    found = []
    for path in sorted(place.glob("*"))[:8]:
        kind = _text(path / "type")
        if kind in ("Mains", "USB") and _text(path / "online") == "1":
            found.append(kind.replace("Mains", "mains"))
        elif kind == "Battery" and _text(path / "scope") != "Device":  # a battery of a mouse feeds no board
            found.append(f"battery, {_text(path / 'status').lower() or 'state not known'}")
    return " and ".join(found)

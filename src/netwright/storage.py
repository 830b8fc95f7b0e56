"""Files: the one atomic write, the one lock and the one cache.

Whatever is written appears whole or not at all: a temporary file in the same folder, flushed to disk, then renamed. A
kill between any two instructions leaves the old file or the new one, never half of either.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from netwright.console import UserError, warn

_cache: list[Path] = []


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces it when the block ends well.

    The folder is created when it is missing. When the block raises, ``path`` is left as it was.

    Raises:
        UserError: If the disk is full or the folder cannot be written.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_path(Path(folder) / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> (Path(folder) / "a.txt").read_text()
        'whole'
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part" + target.suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(
                "the disk is full", where=target, cure="free some room and give the same command again"
            ) from error
        if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR}:
            raise UserError(f"cannot write: {error.strerror}", where=target, cure="choose another folder") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_taken(folder: str | os.PathLike[str]) -> None:
    """Refuses a place where something is already, an empty folder apart, before anything is computed for it.

    Raises:
        UserError: If something is there.
    """
    target = Path(folder)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError("something is there already", where=target, cure="choose another folder")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that takes its place when the block ends well; nothing is left when it does not.

    Args:
        path: A folder that is not there yet, or is empty.

    Raises:
        UserError: If something is there already, or nothing can be written there.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "whole"
        >>> with new_folder(target) as folder:
        ...     _ = (folder / "a.txt").write_text("a")
        >>> [file.name for file in target.iterdir()]
        ['a.txt']
    """
    target = Path(path)
    refuse_taken(target)
    made = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, target)
        made = []
    except OSError as error:
        if temporary is not None:
            raise
        raise UserError(f"cannot write: {error.strerror}", where=target, cure="choose another folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:  # the innermost first; one that has got something else in it stays
            with suppress(OSError):
                parent.rmdir()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes JSON atomically; NaN and infinities are refused, since JSON has none.

    Raises:
        ValueError: If ``value`` holds a NaN or an infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON.

    Raises:
        UserError: If the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=path) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"not a JSON file: {error}", where=path) from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors as safetensors, atomically (a copy is made of tensors that share or skip memory)."""
    from safetensors.torch import save

    write_bytes(path, save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, metadata))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a safetensors file.

    Raises:
        UserError: If the file is missing or damaged.
    """
    from safetensors.torch import load_file

    with _told(path):
        return load_file(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises:
        UserError: If the file is missing or damaged.
    """
    from safetensors import safe_open

    with _told(path), safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


@contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says what is wrong with a safetensors file."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"damaged weights file: {error}", where=path, cure="delete it and run the command again"
        ) from error


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes plain values and tensors as torch does, atomically."""
    import torch

    # Through memory: on a full disk torch's own file writer raises an error that does not say so.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint of plain values and tensors; anything that would run code is refused.

    Raises:
        UserError: If the file is damaged or holds more than plain values.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's guesses about what a damaged file might be
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"a checkpoint is a dictionary, got a {type(state).__name__}")
        return state
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except Exception as error:  # the unpickler of damaged bytes raises anything, from struct.error to MemoryError
        raise UserError("damaged checkpoint", where=path, cure="delete it and give the same command again") from error


def digest(*parts: object) -> str:
    """SHA-256 over bytes, text and JSON-able values: the name of a cache entry.

    Example:
        >>> digest("table", {"a": 1})[:8] == digest("table", {"a": 1})[:8]
        True
    """
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, such as a ``state_dict``.

    Example:
        >>> import torch
        >>> a, b = ({"w": torch.zeros(2)}, {"w": torch.zeros(1, 2)})
        >>> tensors_digest(a) == tensors_digest({"w": torch.zeros(2)}), tensors_digest(a) == tensors_digest(b)
        (True, False)
    """
    import torch

    parts: list[object] = []
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        parts += [name, str(tensor.dtype), list(tensor.shape), flat.view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_home() -> Path:
    """Where the cache belongs: ``$NETWRIGHT_CACHE``, else ``~/.cache/netwright``; nothing is made or tried."""
    return Path(os.environ.get("NETWRIGHT_CACHE") or Path.home() / ".cache" / "netwright")


def cache_folder(*names: str) -> Path:
    """A folder for data, tables and compiled objects in :func:`cache_home`.

    When that cannot be written, a temporary folder serves for this process, with one warning.
    """
    if not _cache:
        wanted = cache_home()
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=wanted):
                pass
            _cache.append(wanted)
        except OSError:
            _cache.append(Path(tempfile.mkdtemp(prefix="netwright-")))
            warn(f"the cache {wanted} cannot be written; {_cache[0]} serves until this process ends")
    folder = _cache[0].joinpath(*names)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def lock(folder: str | os.PathLike[str], *, name: str = ".lock") -> Iterator[None]:
    """Holds the one lock of a folder; the operating system frees it when the process dies.

    Raises:
        UserError: At once when another process holds it, naming that process and its machine.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(folder) / f"{name}.holder"
    guard: FileLock | SoftFileLock = FileLock(path, timeout=0)
    try:
        try:
            guard.acquire()
        except NotImplementedError:
            warn(f"this file system has no locks; a lock file guards {folder} instead")
            # Under a name of its own: the attempt above may have left its empty file behind.
            guard = SoftFileLock(path.with_name(f"{name}.soft"), timeout=0)
            guard.acquire()
    except Timeout as error:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise UserError(
            f"the folder is in use by {who}",
            where=folder,
            cure="wait for it, or choose another folder with --out",
        ) from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        guard.release()


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Free room on the disk that holds ``path`` (or its nearest existing parent)."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name as a compressed ``.npz`` file, atomically; objects are refused.

    Raises:
        ValueError: If an array holds objects.
    """
    import numpy as np

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_arrays(file: Path, names: Sequence[str], cure: str = "delete it and run the command again") -> list[Any]:
    """Arrays of an ``.npz`` file by name.

    Raises:
        UserError: If the file is damaged or holds others.
    """
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"damaged file: {error}", where=file, cure=cure) from error

"""C text into a shared object: the system's compiler, a cache that two processes may fill, checks before use.

An object is named by the SHA-256 of all that it depends on. It is built in a folder of its own and renamed into place;
its own SHA-256 lies beside it and is compared before the object is mapped, for a damaged one must never run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from netwright import __version__, storage
from netwright.console import UserError

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
LAST_LINES = 20


class BuildError(UserError):
    """The compiler is missing or failed; tells its command and the end of what it said."""


def compiler() -> list[str]:
    """The command of the C compiler: ``$CC``, else the first of cc, gcc and clang that is there.

    Raises:
        BuildError: If there is none, naming what was looked for.
    """
    asked = os.environ.get("CC", "").split()
    for words in [asked] if asked else [[name] for name in COMPILERS]:
        path = shutil.which(words[0])
        if path:
            return [path, *words[1:]]
    looked = asked[0] if asked else ", ".join(COMPILERS)
    raise BuildError(f"no C compiler was found: looked for {looked}", cure="apt-get install gcc, or set CC")


def _version(command: Sequence[str]) -> str:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C compiler does not work: {' '.join(command)} --version: {error}") from error


def build(text: str, *, flags: Sequence[str] = (), facts: Sequence[str] = ()) -> ctypes.CDLL:
    """Compiles C text that defines ``const char *nw_magic(void) { return NW_MAGIC; }``, or finds it in the cache.

    Args:
        text: The C file.
        flags: More flags, behind :data:`FLAGS`.
        facts: What else the object depends on, such as the processor.

    Returns:
        The loaded object.

    Raises:
        BuildError: If there is no compiler, it fails, or what it made cannot be loaded, even when made anew.
    """
    command = compiler()
    key = storage.digest(text, command, _version(command), [*FLAGS, *flags], list(facts), __version__)
    try:
        folder = storage.cache_folder("objects")
        return _load_or_make(folder, key, command, flags, text)
    except PermissionError:
        folder = Path(tempfile.mkdtemp(prefix="netwright-"))
        return _load_or_make(folder, key, command, flags, text)


def _load_or_make(folder: Path, key: str, command: list[str], flags: Sequence[str], text: str) -> ctypes.CDLL:
    target = folder / f"{key}.so"
    library = _load(target, key)
    if library is not None:
        return library
    with _quiet_lock(folder, key):
        library = _load(target, key)  # another process may have made it while we waited
        if library is None:
            _make(target, key, command, flags, text)
            library = _load(target, key)
    if library is None:
        raise BuildError("a compiled object cannot be loaded", where=target, cure="delete the cache folder")
    return library


@contextlib.contextmanager
def _quiet_lock(folder: Path, key: str):  # type: ignore[no-untyped-def]
    """Saves two processes the same work; correctness rests on the rename."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f"{key}.lock", timeout=120)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, key: str, command: list[str], flags: Sequence[str], text: str) -> None:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as made:
        source, output = Path(made, "network.c"), Path(made, "network.so")
        source.write_text(text)
        words = [*command, *FLAGS, *flags, f'-DNW_MAGIC="{key}"', "-o", str(output), str(source), "-lm", "-lpthread"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"the C compiler cannot be run: {' '.join(command)}: {error}") from error
        if done.returncode != 0 or not output.is_file():
            told = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
            raise BuildError(f"the C compiler failed: {' '.join(words)}\n{told}".rstrip())
        content = output.read_bytes()
    storage.write_text(target.with_suffix(".sha256"), storage.digest(content))
    storage.write_bytes(target, content)


def _load(target: Path, key: str) -> ctypes.CDLL | None:
    """The object if it is there, whole and the right one; anything else is taken away."""
    try:
        whole = target.with_suffix(".sha256").read_text() == storage.digest(target.read_bytes())
    except OSError:
        return None
    if whole:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(target))
            library.nw_magic.restype = ctypes.c_char_p
            if library.nw_magic() == key.encode():
                return library
    with contextlib.suppress(OSError):
        target.unlink()
    return None

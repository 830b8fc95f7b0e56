"""C text into a shared object: the system's compiler, a cache that two processes may fill, checks before use.

An object is named by the SHA-256 of all that it depends on. It is built in a folder of its own, which is renamed into
place with the SHA-256 of the object in it; that is compared before the object is mapped, for a damaged one must never
run.
"""

from __future__ import annotations

import _ctypes
import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from netwright import __version__, storage
from netwright.console import UserError, warn

FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    # gcc for AMD splits products and sums of short kernels otherwise: rounding would depend on how threads share rows
    "--param=avoid-fma-max-bits=0",
    # a loop over a short row must stay one, not become a call of memset
    "-fno-tree-loop-distribute-patterns",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
)
COMPILERS = ("cc", "gcc", "clang")
LAST_LINES = 20
LONGEST_SECONDS = 600
OBJECT, DIGEST = "network.so", "network.sha256"

_temporary: list[Path] = []


class BuildError(UserError):
    """The compiler is missing or failed; tells its command and the end of what it said."""


def compiler() -> list[str]:
    """The command of the C compiler: ``$CC``, else the first of cc, gcc and clang that is there.

    Raises:
        BuildError: If there is none, naming what was looked for.
    """
    asked = _words(os.environ.get("CC", ""))
    for words in [asked] if asked else [[name] for name in COMPILERS]:
        path = shutil.which(words[0])
        if path:
            return [path, *words[1:]]
    looked = f"{asked[0]} (from $CC)" if asked else ", ".join(COMPILERS)
    raise BuildError(f"no C compiler was found: looked for {looked}", cure="apt-get install gcc, or set CC")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise BuildError(f"CC must be a command, got {command!r}: {error}") from error


def build(text: str, *, flags: Sequence[str] = (), facts: Sequence[str] = ()) -> ctypes.CDLL:
    """Compiles C text that defines ``const char *nw_magic(void) { return NW_MAGIC; }``, or finds it in the cache.

    Where the cache cannot be written, or what lies in it cannot be run, a temporary folder of this process serves.

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
    library, reason = None, "what lies there cannot be loaded"
    try:
        library = _load_or_make(storage.cache_folder("objects"), key, command, flags, text)
    except BuildError:
        raise
    except (OSError, UserError) as error:
        reason = str(error).splitlines()[0]
    if library is None:
        library = _load_or_make(_temporary_folder(reason), key, command, flags, text)
    if library is None:
        raise BuildError(f"what the C compiler makes cannot be loaded: {' '.join(command)}", cure="try another CC")
    return library


def _version(command: Sequence[str]) -> str:
    stat = os.stat(command[0])
    return _version_of(tuple(command), (stat.st_mtime_ns, stat.st_size))


@functools.cache
def _version_of(command: tuple[str, ...], _: tuple[int, int]) -> str:
    """Asked once for each state of the compiler's file."""
    words = [*command, "--version"]
    try:
        return _run(words, check=True).stdout
    except subprocess.CalledProcessError as error:
        told = f"status {error.returncode}\n{_last_lines(error.stderr)}".rstrip()
        raise BuildError(f"the C compiler does not work: {' '.join(words)}: {told}") from error


def _run(words: list[str], *, check: bool = False, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # in English, whatever the user's language: what it says is part of the key
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            check=check,
            timeout=LONGEST_SECONDS,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C compiler cannot be run: {' '.join(words)}: {error}") from error


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LAST_LINES:])


def _temporary_folder(reason: str) -> Path:
    """One folder for the process, with one warning."""
    if _temporary:
        return _temporary[0]
    folder, owner = tempfile.mkdtemp(prefix="netwright-objects-"), os.getpid()
    warn(f"compiled objects cannot be cached: {reason}; {folder} serves until this process ends")

    def remove() -> None:
        if os.getpid() == owner:  # a fork that ends must not take it from its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    _temporary.append(Path(folder))
    return _temporary[0]


def _load_or_make(folder: Path, key: str, command: list[str], flags: Sequence[str], text: str) -> ctypes.CDLL | None:
    """The object in a cache folder, made if it is not there; None if what was made cannot be loaded."""
    target = folder / key
    library = _load(target, key)
    if library is not None:
        return library
    with _quiet_lock(folder, key):
        library = _load(target, key)  # another process may have made it while we waited
        if library is None:
            _make(target, key, command, flags, text)
            library = _load(target, key)
    return library


@contextlib.contextmanager
def _quiet_lock(folder: Path, key: str) -> Iterator[None]:
    """Saves two processes the same work; correctness rests on the rename."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f"{key}.lock", timeout=LONGEST_SECONDS)
    with contextlib.suppress(Timeout, OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def _make(target: Path, key: str, command: list[str], flags: Sequence[str], text: str) -> None:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as made:
        folder, source = Path(made), Path(made, "network.c")
        source.write_text(text)
        # short names relative to the folder: what the compiler keeps of them is the same in every process
        words = [*command, *FLAGS, *flags, f'-DNW_MAGIC="{key}"', "-o", OBJECT, source.name, "-lm", "-lpthread"]
        done = _run(words, cwd=folder)
        if done.returncode != 0 or not (folder / OBJECT).is_file():
            told = f"status {done.returncode}\n{_last_lines(done.stderr)}".rstrip()
            raise BuildError(f"the C compiler failed: {' '.join(words)}: {told}")
        source.unlink()
        content = (folder / OBJECT).read_bytes()
        finished = folder / "finished"
        storage.write_bytes(finished / OBJECT, content)
        storage.write_text(finished / DIGEST, hashlib.sha256(content).hexdigest())
        # a folder that is there and not empty was finished by another process in the meantime
        with contextlib.suppress(OSError):
            os.rename(finished, target)


def _load(target: Path, key: str) -> ctypes.CDLL | None:
    """The object if it is there, whole and the right one; anything else is taken away."""
    if not os.path.lexists(target):
        return None
    library = None
    with contextlib.suppress(OSError):
        digest = hashlib.sha256((target / OBJECT).read_bytes()).hexdigest()
        if (target / DIGEST).read_bytes() == digest.encode():
            library = _open(target / OBJECT, key)
    if library is None:
        _remove(target)
    return library


def _open(path: Path, key: str) -> ctypes.CDLL | None:
    """The object, if it tells the key; otherwise it is let go, for the system knows an open object by its path."""
    library = ctypes.CDLL(str(path))
    try:
        library.nw_magic.restype = ctypes.c_char_p
        if library.nw_magic() == key.encode():
            return library
    except AttributeError:
        pass
    _ctypes.dlclose(library._handle)
    return None


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            target.unlink()

"""C text becomes a loaded object, whatever happens to compiler and cache on the way."""

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from kernels import compiler as system_compiler

from netwright import storage
from netwright.deploy.native import build as building
from netwright.deploy.native.build import DIGEST, OBJECT, BuildError, build, compiler


def text(value=42):
    return f"int answer(void) {{ return {value}; }}\nconst char *nw_magic(void) {{ return NW_MAGIC; }}\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own, and a compiler."""
    monkeypatch.setenv("CC", system_compiler())
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_cache", [])
    monkeypatch.setattr(building, "_temporary", [])
    return tmp_path / "cache" / "objects"


@pytest.fixture
def log(cache, tmp_path, monkeypatch):
    """A compiler that writes down every file it is asked to compile."""
    path, script = tmp_path / "compilations", tmp_path / "logging-cc"
    path.touch()
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *network.c*) echo one >> {path};; esac\nexec {system_compiler()} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return lambda: len(path.read_text().splitlines())


@pytest.fixture
def opened(monkeypatch):
    """SHA-256 of every object that was mapped."""
    digests, real = [], ctypes.CDLL

    def watched(name):
        digests.append(hashlib.sha256(Path(name).read_bytes()).hexdigest())
        return real(name)

    monkeypatch.setattr(ctypes, "CDLL", watched)
    return digests


def made(cache):
    """The folder of the one object in the cache."""
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return folder


def test_text_runs(cache):
    assert build(text(7)).answer() == 7


def test_the_digest_lies_beside_the_object(cache):
    build(text())
    assert (made(cache) / DIGEST).read_text() == hashlib.sha256((made(cache) / OBJECT).read_bytes()).hexdigest()


def test_a_cached_object_is_not_compiled_again(cache, log):
    assert [build(text()).answer() for _ in range(3)] == [42, 42, 42]
    assert log() == 1


@pytest.mark.parametrize(
    "other", [{"flags": ["-DMORE"]}, {"facts": ["another processor"]}, {"text": text() + "/* another */\n"}]
)
def test_whatever_an_object_depends_on_gives_another(cache, log, other):
    build(text())
    build(**{"text": text()} | other)
    assert log() == 2


def test_another_compiler_gives_another_object(cache, log, monkeypatch):
    build(text())
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DOTHER")
    build(text())
    assert log() == 2


def test_flags_behind_the_compiler_reach_it(cache, monkeypatch):
    monkeypatch.setenv("CC", f"{system_compiler()} -DVALUE=5")
    assert build(text("VALUE")).answer() == 5


PROGRAM = """
import sys
from netwright.deploy.native.build import build
library = build(sys.stdin.read())
print(library.answer())
"""


def test_processes_at_once_compile_once(cache, log):
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM], **options) for _ in range(3)]
    for process in running:
        process.stdin.write(text())
        process.stdin.close()
    assert [process.stdout.read() for process in running] == ["42\n"] * 3
    assert [process.wait(60) for process in running] == [0] * 3
    assert log() == 1


def test_without_locks_the_first_object_stays(cache, monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    make = building._make

    def make_twice(*arguments):
        make(*arguments)
        first = (made(cache) / OBJECT).stat().st_ino
        make(*arguments)
        assert (made(cache) / OBJECT).stat().st_ino == first

    monkeypatch.setattr(building, "_make", make_twice)
    assert build(text()).answer() == 42
    assert not list(cache.glob(".build-*"))


def damage(folder, how):
    content = (folder / OBJECT).read_bytes()
    (folder / OBJECT).unlink()  # this process has mapped it
    if how == "truncated":
        (folder / OBJECT).write_bytes(content[: len(content) // 2])
    elif how == "tampered":
        middle = len(content) // 2
        (folder / OBJECT).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        (folder / OBJECT).write_bytes(b"")
    elif how == "without digest":
        (folder / OBJECT).write_bytes(content)
        (folder / DIGEST).unlink()
    elif how == "damaged digest":
        (folder / OBJECT).write_bytes(content)
        (folder / DIGEST).write_bytes(b"\xff" * 64)
    elif how == "a file":
        (folder / DIGEST).unlink()
        folder.rmdir()
        folder.write_text("")
    return hashlib.sha256((folder / OBJECT).read_bytes()).hexdigest() if (folder / OBJECT).exists() else None


@pytest.mark.parametrize(
    "how", ["truncated", "tampered", "empty", "without digest", "damaged digest", "without object", "a file"]
)
def test_what_is_damaged_is_made_anew_and_never_mapped(cache, log, opened, how):
    build(text())
    del opened[:]
    bad = damage(made(cache), how)
    assert build(text()).answer() == 42
    assert log() == 2
    assert len(opened) == 1
    if how in {"truncated", "tampered", "empty"}:
        assert opened != [bad]
    assert build(text()).answer() == 42
    assert log() == 2


def test_an_object_that_tells_another_key_is_let_go(cache, log):
    build(text(1))
    first = made(cache)
    build(text(2))
    (second,) = [path for path in cache.iterdir() if path.is_dir() and path != first]
    for name in (OBJECT, DIGEST):
        (second / name).write_bytes((first / name).read_bytes())
    program = PROGRAM.replace("sys.stdin.read()", repr(text(2)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert log() == 3


def test_an_object_without_a_key_is_refused(cache):
    with pytest.raises(BuildError, match="cannot be loaded"):
        build("int answer(void) { return 1; }")


def test_a_cache_that_cannot_be_used_is_replaced_for_the_process(cache, log, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file, where a folder should be")
    assert [build(text()).answer(), build(text()).answer()] == [42, 42]
    assert log() == 1
    assert capsys.readouterr().err.count("cannot be cached") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_cache_is_replaced_for_the_process(cache, log, capsys):
    cache.mkdir(parents=True)
    cache.chmod(0o555)
    assert build(text()).answer() == 42
    assert "cannot be cached" in capsys.readouterr().err


def test_a_read_only_file_system_is_replaced_for_the_process(cache, capsys, monkeypatch):
    make = building._make

    def refuse(target, *others):
        if target.is_relative_to(cache):
            raise OSError(30, "Read-only file system")
        make(target, *others)

    monkeypatch.setattr(building, "_make", refuse)
    assert build(text()).answer() == 42
    assert "Read-only file system" in capsys.readouterr().err


def test_a_full_disk_is_no_reason_to_fail(cache, capsys, monkeypatch):
    make = building._make

    def refuse(target, *others):
        if target.is_relative_to(cache):
            raise building.UserError("the disk is full")
        make(target, *others)

    monkeypatch.setattr(building, "_make", refuse)
    assert build(text()).answer() == 42
    assert "the disk is full" in capsys.readouterr().err


def test_the_temporary_folder_goes_with_the_process(cache, tmp_path):
    cache.parent.mkdir(parents=True)
    cache.write_text("")
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    program = PROGRAM.replace("sys.stdin.read()", repr(text()))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_cached_object_needs_no_writing(cache, log, monkeypatch):
    build(text())
    monkeypatch.setattr(building, "_quiet_lock", lambda *_: pytest.fail("locked"))
    assert build(text()).answer() == 42


def test_no_compiler_names_what_was_looked_for(cache, monkeypatch):
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="looked for cc, gcc, clang"):
        build(text())


def test_a_compiler_that_is_asked_for_must_be_there(cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(BuildError, match=r"looked for no-such-compiler \(from \$CC\)"):
        compiler()


def test_an_unfinished_quotation_is_no_command(cache, monkeypatch):
    monkeypatch.setenv("CC", "gcc '-O2")
    with pytest.raises(BuildError, match="CC must be a command"):
        compiler()


def test_false_is_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match=r"does not work: .*false --version: status 1"):
        build(text())


def test_true_makes_nothing(cache, monkeypatch):
    monkeypatch.setenv("CC", "true")
    with pytest.raises(BuildError, match=r"the C compiler failed: .*true .*network\.c"):
        build(text())


def test_the_end_of_what_the_compiler_said_is_told(cache):
    lines = "\n".join(f"#error number {number}" for number in range(50))
    with pytest.raises(BuildError) as caught:
        build(lines)
    told = str(caught.value)
    assert "network.c" in told
    assert "number 49" in told
    assert "number 0\n" not in told
    assert len(told.splitlines()) <= building.LAST_LINES + 2


def test_a_failed_build_leaves_nothing(cache):
    with pytest.raises(BuildError):
        build("no C at all")
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []

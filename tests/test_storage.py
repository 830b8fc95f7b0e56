import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from netwright import storage
from netwright.console import UserError

WRITER = """
import sys
from netwright.storage import write_bytes
path = sys.argv[1]
print("ready", flush=True)
for i in range(10**9):
    write_bytes(path, bytes([i % 251]) * 3_000_000)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(bytes([7]) * 3_000_000)
    generator = random.Random(0)
    seen = set()
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        data = target.read_bytes()
        assert len(data) == 3_000_000
        assert len(set(data)) == 1
        seen.add(data[0])
    assert len(seen) > 1, "the writer never finished a write; the test proves nothing"


def write_half(target):
    with storage.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_an_error_in_the_middle_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "run.json"
    storage.write_json(target, {"epoch": 1})
    with pytest.raises(RuntimeError):
        write_half(target)
    assert storage.read_json(target) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_mode_follows_the_umask_and_folders_are_made(tmp_path):
    old = os.umask(0o027)
    try:
        storage.write_text(tmp_path / "a" / "b" / "c.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a" / "b" / "c.txt").stat().st_mode) == 0o640


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_clear_line_and_harms_nothing(small_disk):
    target = small_disk / "weights.bin"
    storage.write_bytes(target, b"old")
    with pytest.raises(UserError, match="the disk is full") as caught:
        storage.write_bytes(target, b"x" * 1_000_000)
    assert caught.value.where == target
    assert "same command" in caught.value.cure
    assert target.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["weights.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_disk_that_fills_at_the_last_moment(tmp_path, monkeypatch, code, moment):
    target = tmp_path / "a.bin"
    storage.write_bytes(target, b"old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, moment, fail)
        with pytest.raises(UserError, match="the disk is full"):
            storage.write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_refuses(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(
        storage.tempfile, "mkstemp", fail
    )  # root may write everywhere, so the mode alone proves nothing
    with pytest.raises(UserError, match="cannot write: Permission denied") as caught:
        storage.write_text(tmp_path / "x", "y")
    assert caught.value.where == tmp_path / "x"
    assert caught.value.cure == "choose another folder"


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("I am a file")
    with pytest.raises(UserError, match="cannot write"):
        storage.write_text(tmp_path / "runs" / "a" / "run.json", "x")


def test_another_operating_system_error_passes_through(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="I/O error") as caught:
        storage.write_text(tmp_path / "x", "y")
    assert not isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_has_not(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "a.json", {"loss": value})
    assert not (tmp_path / "a.json").exists()


def test_json_keeps_text_readable(tmp_path):
    storage.write_json(tmp_path / "a.json", {"class": "Käse"})
    assert "Käse" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert storage.read_json(tmp_path / "a.json") == {"class": "Käse"}


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_damaged_json(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match="not a JSON file") as caught:
        storage.read_json(tmp_path / "run.json")
    assert caught.value.where == tmp_path / "run.json"


@pytest.mark.parametrize("read", [storage.read_json, storage.read_tensors, storage.read_metadata])
def test_missing_file(tmp_path, read):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nothing")


def test_tensors_survive_bit_for_bit(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "plain": base,
        "view": base.t()[1:3],
        "shared": base,
        "int": torch.arange(3),
        "half": base.half(),
    }
    storage.write_tensors(tmp_path / "w.safetensors", tensors, {"epoch": "3"})
    back = storage.read_tensors(tmp_path / "w.safetensors")
    assert set(back) == set(tensors)
    assert storage.read_metadata(tmp_path / "w.safetensors") == {"epoch": "3"}
    storage.write_tensors(tmp_path / "plain.safetensors", tensors)
    assert storage.read_metadata(tmp_path / "plain.safetensors") == {}
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_damaged_tensors(tmp_path):
    path = tmp_path / "w.safetensors"
    storage.write_tensors(path, {"w": torch.ones(100)})
    whole = path.read_bytes()
    for damaged in [whole[:50], whole[:-8], b"", b"\xff" * 64]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged weights file"):
            storage.read_tensors(path)
        with pytest.raises(UserError, match="damaged weights file"):
            storage.read_metadata(path)


def test_checkpoints_hold_plain_values_and_tensors(tmp_path):
    state = {"epoch": 3, "weights": {"w": torch.arange(4.0)}, "names": ["a", None], "lr": 0.1}
    storage.write_checkpoint(tmp_path / "last.ckpt", state)
    back = storage.read_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(back["weights"].pop("w"), state["weights"].pop("w"))
    assert back == state


class Payload:
    """What a malicious checkpoint is made of: unpickling it calls a function."""

    def __reduce__(self):
        return os.mkdir, (os.environ["NETWRIGHT_TEST_CACHE"] + "/was-here",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"epoch": Payload()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="damaged checkpoint"):
        storage.read_checkpoint(tmp_path / "last.ckpt")
    assert not Path(os.environ["NETWRIGHT_TEST_CACHE"], "was-here").exists()


def test_damaged_and_missing_checkpoints(tmp_path):
    path = tmp_path / "last.ckpt"
    storage.write_checkpoint(path, {"w": torch.ones(1000)})
    whole = path.read_bytes()
    for damaged in [whole[:100], whole[:-200], b"", b"text"]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged checkpoint") as caught:
            storage.read_checkpoint(path)
        assert caught.value.where == path
    with pytest.raises(UserError, match="no such file"):
        storage.read_checkpoint(tmp_path / "nothing")


def test_garbage_in_a_checkpoint_is_one_error_without_torch_warnings(tmp_path, recwarn):
    path = tmp_path / "last.ckpt"
    storage.write_checkpoint(path, {"epoch": 3, "w": torch.ones(50, 3), "names": ["a", None], "lr": 0.1})
    whole = path.read_bytes()
    start = whole.index(b"data.pkl")
    refused = 0
    for seed in range(200):
        generator, damaged = random.Random(seed), bytearray(whole)
        if seed % 4 == 0:
            damaged = damaged[: generator.randrange(len(whole))]
        elif seed % 4 == 1:
            damaged = bytearray(b"\x80\x02" + generator.randbytes(generator.randrange(400)))
        else:  # inside the pickled part, and anywhere
            first, length = (start, 600) if seed % 4 == 2 else (0, len(whole))
            for _ in range(generator.randrange(1, 20)):
                damaged[first + generator.randrange(length)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            storage.read_checkpoint(path)
        except UserError:
            refused += 1
    assert refused > 150
    assert not recwarn.list


def test_a_checkpoint_that_is_no_dictionary_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="damaged checkpoint"):
        storage.read_checkpoint(tmp_path / "last.ckpt")


def test_digest_depends_on_every_part_and_its_boundaries():
    digests = [storage.digest(*p) for p in [("a",), ("b",), ("a", "b"), ("ab",), (b"a",), ("a", 1), ("a", "1"), ()]]
    assert len(set(digests)) == len(digests)
    assert storage.digest({"a": 1, "b": 2}) == storage.digest({"b": 2, "a": 1})


def test_digest_of_tensors_is_of_names_types_shapes_and_bytes():
    base = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}
    same = {"w": torch.arange(6.0).view(3, 2).view(2, 3).t().contiguous().t(), "b": torch.tensor(1.0)}
    assert storage.tensors_digest(base) == storage.tensors_digest(same)  # layout in memory does not count
    others = [
        {"v": base["w"], "b": base["b"]},
        {"w": base["w"].double(), "b": base["b"]},
        {"w": base["w"].view(3, 2), "b": base["b"]},
        {"w": base["w"] + 1e-7, "b": base["b"]},
        {"w": base["w"]},
        {"w": base["w"].bfloat16(), "b": base["b"]},
    ]
    assert len({storage.tensors_digest(tensors) for tensors in [base, *others]}) == 7


def test_file_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert storage.file_digest(tmp_path / "x") == known


@pytest.fixture
def fresh_cache(monkeypatch):
    monkeypatch.setattr(storage, "_cache", [])


def test_cache_folder_is_where_the_variable_says(tmp_path, monkeypatch, fresh_cache):
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path / "cache"))
    folder = storage.cache_folder("tables", "latency")
    assert folder == tmp_path / "cache" / "tables" / "latency"
    assert folder.is_dir()


def test_cache_folder_of_the_home(tmp_path, monkeypatch, fresh_cache):
    monkeypatch.delenv("NETWRIGHT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / ".cache" / "netwright"


def test_a_cache_that_cannot_be_written_falls_back_with_one_warning(tmp_path, monkeypatch, capsys, fresh_cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path / "file" / "cache"))
    folder = storage.cache_folder("a")
    assert folder.is_dir()
    assert folder.is_relative_to(tempfile.gettempdir())
    assert storage.cache_folder("b").parent == folder.parent
    assert capsys.readouterr().err.count("cannot be written") == 1
    shutil.rmtree(folder.parent)


HOLDER = """
import sys, time
from netwright.storage import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_names_its_holder_and_dies_with_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"in use by process {process.pid} on ") as caught,
            storage.lock(tmp_path),
        ):
            pass
        assert caught.value.where == tmp_path
        assert "--out" in caught.value.cure
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with storage.lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock.holder").read_text()
    with storage.lock(tmp_path):
        pass


def test_lock_is_freed_when_the_block_raises(tmp_path):
    with pytest.raises(RuntimeError), storage.lock(tmp_path):
        raise RuntimeError
    with storage.lock(tmp_path):
        pass


def test_lock_falls_back_where_the_file_system_has_none(tmp_path, monkeypatch, capsys):
    import filelock

    def unsupported(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "_acquire", unsupported)
    with storage.lock(tmp_path):
        assert "no locks" in capsys.readouterr().err
        assert json.dumps(str(os.getpid()))[1:-1] in (tmp_path / ".lock.holder").read_text()


def test_soft_lock_held_elsewhere_is_refused_too(tmp_path, monkeypatch):
    import filelock

    def unsupported(self):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "_acquire", unsupported)
    (tmp_path / ".lock").touch()  # what the attempt to lock leaves behind
    with storage.lock(tmp_path), pytest.raises(UserError, match="in use by process"):
        storage.lock(tmp_path).__enter__()
    with storage.lock(tmp_path):
        pass


def test_free_bytes_of_a_folder_to_be(tmp_path):
    free = storage.free_bytes(tmp_path / "not" / "yet")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert storage.free_bytes(Path("relative-and-missing")) > 0
    assert np.isfinite(free)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "whole"
    with storage.new_folder(target) as folder:
        (folder / "x").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["x"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~storage._umask()

    def fail():
        with storage.new_folder(tmp_path / "b" / "c") as folder:
            (folder / "x").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    (tmp_path / "empty").mkdir()
    with storage.new_folder(tmp_path / "empty") as folder:
        (folder / "y").write_text("y")
    assert (tmp_path / "empty" / "y").is_file()


@pytest.mark.parametrize("name", ["file", "full", "link", "file/below"])
def test_a_place_that_is_taken_is_left_as_it_is(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match=r"something is there already|cannot write"),
        storage.new_folder(tmp_path / name),
    ):
        raise AssertionError("never reached")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_arrays_come_back_and_objects_are_refused_with_nothing_left(tmp_path):
    path = tmp_path / "folder" / "some.npz"
    storage.write_arrays(path, {"x": np.arange(6).reshape(2, 3), "name": np.array(["a"])})
    x, name = storage.read_arrays(path, ["x", "name"])
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert name.tolist() == ["a"]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Object arrays"):
        storage.write_arrays(path, {"x": np.array([None], object)})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["some.npz"]
    with pytest.raises(UserError, match="damaged file"):
        storage.read_arrays(path, ["y"])

"""Bad input through the command line: one clear message, exit 2, and nothing that was there is harmed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import ARGUMENTS
from typer.testing import CliRunner

from netwright import cli, storage
from netwright.design.run import RunFolder
from netwright.storage import read_json, read_tensors, write_json

DICE = np.random.default_rng(0)


def design(data: str | Path, out: Path, *more: str):
    return CliRunner().invoke(cli.app, ["design", str(data), *ARGUMENTS, "--out", str(out), *more])


def refused(found) -> str:
    """The message of a command that was refused as it should be; notes about the data may stand before it."""
    assert found.exit_code == 2, (found.exit_code, found.stderr)
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert "--debug" not in found.stderr, found.stderr
    assert found.stderr.count("error: ") == 1
    message = found.stderr[found.stderr.index("error: ") :]
    assert len(message.splitlines()) <= 3
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".lock")
    }


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    if mode == "I;16":
        image = Image.fromarray(DICE.integers(0, 65536, (height, width), dtype=np.uint16))
    else:
        image = Image.fromarray(DICE.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    image.save(path)


def class_folders(folder: Path, counts: dict[str, int], **how) -> Path:
    for name, count in counts.items():
        for i in range(count):
            picture(folder / name / f"{i}.png", **how)
    return folder


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown name": (lambda _: "fashion-mnits", "did you mean fashion-mnist?"),
    "not on this machine": (lambda _: "cifar100", "cifar100 is not on this machine"),
    "empty folder": (lambda p: p.mkdir() or p, "no image"),
    "empty class folders": (lambda p: (p / "cat").mkdir(parents=True) or p, "no image"),
    "one class only": (lambda p: class_folders(p, {"cat": 12}), 'there is only one class, "cat"'),
    "one image": (lambda p: class_folders(p, {"cat": 12, "dog": 1}), "dog"),
    "labels missing": (
        lambda p: np.savez(f"{p}.npz", x=np.zeros((9, 8, 8), np.uint8)) or f"{p}.npz",
        "labels are missing: there is no array y",
    ),
    "too few labels": (
        lambda p: np.savez(f"{p}.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.zeros(7, int)) or f"{p}.npz",
        "x has 9 images but y has 7 labels",
    ),
    "unreadable": (
        lambda p: (class_folders(p, {"cat": 9, "dog": 9}) / "cat" / "0.png").write_bytes(b"no") and p,
        "0.png",
    ),
    "empty file": (
        lambda p: (class_folders(p, {"cat": 9, "dog": 9}) / "dog" / "0.png").write_bytes(b"") or p,
        "0.png",
    ),
    "a text file": (lambda p: p.write_text("hello") and p, "not a folder and not a .npz file"),
}


class TestData:
    """Each of these is refused before anything is written."""

    @pytest.mark.parametrize("case", DATA)
    @pytest.mark.parametrize("verb", ["design", "check"])
    def test_is_refused(self, tmp_path: Path, case: str, verb: str):
        make, words = DATA[case]
        data = str(make(tmp_path / "data"))
        before = contents(tmp_path)
        if verb == "design":
            assert words in refused(design(data, tmp_path / "runs" / "run"))
        else:
            # A report of the faults where there are data to report on, else the same refusal.
            found = CliRunner().invoke(cli.app, ["check", data])
            assert found.exit_code in (1, 2)
            assert words in (found.stdout if found.exit_code == 1 else refused(found))
        assert contents(tmp_path) == before
        assert not (tmp_path / "runs").exists()

    def test_broken_files_are_skipped_when_asked(self, tmp_path: Path):
        class_folders(tmp_path / "data", {"cat": 20, "dog": 20})
        (tmp_path / "data" / "cat" / "0.png").write_bytes(b"no")
        assert CliRunner().invoke(cli.app, ["check", str(tmp_path / "data")]).exit_code == 1
        found = CliRunner().invoke(cli.app, ["check", str(tmp_path / "data"), "--skip-broken"])
        assert found.exit_code == 0, found.output
        assert "1 file" in found.stdout or "skipped" in found.stdout

    def test_all_kinds_and_sizes_of_images_work_by_a_stated_rule(self, tmp_path: Path):
        from netwright.data import load

        folder = tmp_path / "data"
        for i, mode in enumerate(["L", "RGB", "P", "RGBA", "LA", "1", "I;16"] * 4):
            for name in ("cat", "dog"):
                picture(folder / name / f"{i}.png", mode, size=(8 + i % 3, 9))
        found = CliRunner().invoke(cli.app, ["check", str(folder)])
        assert found.exit_code == 0, found.output
        assert "all become 32 x 32" in found.stdout
        data = load(folder)
        assert data.train.images.dtype == torch.uint8
        assert len(data.train) + len(data.validation) + len(data.test) == 56


class TestOptions:
    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (["--sparsity", "1.0"], "sparsity must lie in [0, 1), got 1.0"),
            (["--sparsity", "-0.5"], "got -0.5"),
            (["--sparsity", "nan"], "got nan"),
            (["--lr", "inf"], "lr must be finite"),
            (["--jobs", "0"], "jobs must be >= 1"),
            (["--baseline", "mobilnet_v2"], "did you mean mobilenet_v2?"),
            (["--time-budget", "3s"], "too small for one epoch of every stage"),
            (["--size", "16"], "digits has a fixed size"),
        ],
    )
    def test_is_refused_and_leaves_no_folder(self, tmp_path: Path, more: list[str], words: str):
        assert words in refused(design("digits", tmp_path / "runs" / "run", *more))
        assert list(tmp_path.iterdir()) == []


class TestFolder:
    def test_of_another_run(self, finished: Path):
        before = contents(finished)
        assert "another run (sparsity 0.8 there, 0.5 here)" in refused(design("digits", finished, "--sparsity", "0.5"))
        assert contents(finished) == before

    @pytest.mark.parametrize("content", ["[]", "nonsense", '{"kind": "thesis"}', '{"kind": "netwright-run"}'])
    def test_whose_run_file_is_none(self, tmp_path: Path, content: str):
        (tmp_path / "run.json").write_text(content)
        assert "run" in refused(design("digits", tmp_path))
        assert contents(tmp_path) == {"run.json": content.encode()}

    def test_of_something_else(self, tmp_path: Path):
        (tmp_path / "thesis.txt").write_text("years")
        assert "holds no run (thesis.txt)" in refused(design("digits", tmp_path))
        assert contents(tmp_path) == {"thesis.txt": b"years"}

    def test_that_is_a_file(self, tmp_path: Path):
        (tmp_path / "thesis.txt").write_text("years")
        assert "names a file" in refused(design("digits", tmp_path / "thesis.txt"))
        assert "cannot make the folder" in refused(design("digits", tmp_path / "thesis.txt" / "run"))
        assert contents(tmp_path) == {"thesis.txt": b"years"}


def rewound(finished: Path, target: Path, *, to: str) -> RunFolder:
    """The finished run as it was before its search, or before the training of its network."""
    shutil.copytree(finished, target)
    gone = ["measurements.json", "model*", "baseline", "training.json", "work/model-*", "work/baseline-*"]
    gone += ["search.json", "architecture.json"] if to == "search" else []
    for pattern in gone:
        for path in target.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return RunFolder(target)


# Made anew whenever the command is given, from what the other files hold.
PASSING = ("report.", "work/clock.json", "logs/")


def unharmed(before: dict[str, bytes], folder: Path) -> None:
    after = contents(folder)
    kept = [name for name in before if not name.startswith(PASSING)]
    assert {name: before[name] for name in kept} == {name: after.get(name) for name in kept}


class TestCheckpoint:
    @pytest.mark.parametrize("stage", ["search", "model-pretrain"])
    @pytest.mark.parametrize("damage", ["half", "empty", "noise"])
    def test_damaged(self, finished: Path, tmp_path: Path, stage: str, damage: str):
        run = rewound(finished, tmp_path / "run", to=stage)
        checkpoint = run / f"work/{stage}.ckpt"
        storage.write_checkpoint(checkpoint, {"weights": torch.zeros(1000), "epoch": 3})
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "noise": DICE.bytes(3000)}[damage])
        before = contents(run.path)
        message = refused(design("digits", run.path))
        assert message.startswith(f"error: damaged checkpoint\n  in {checkpoint}\n")
        assert "delete it and give the same command again" in message
        unharmed(before, run.path)

    def test_that_would_run_code_is_refused(self, finished: Path, tmp_path: Path):
        run = rewound(finished, tmp_path / "run", to="search")
        torch.save({"epoch": Bomb(str(tmp_path / "exploded"))}, run / "work/search.ckpt")
        assert "damaged checkpoint" in refused(design("digits", run.path))
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("name", ["work/model-pretrain.safetensors", "search.json", "plan.json", "data.json"])
    def test_damaged_artefact(self, finished: Path, tmp_path: Path, name: str):
        run = rewound(finished, tmp_path / "run", to="model")
        (run / name).write_bytes(b"noise")
        before = contents(run.path)
        assert name in refused(design("digits", run.path))
        unharmed(before, run.path)


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestLoss:
    def test_nan_stops_the_training(self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from netwright.train import Classifier

        run = rewound(finished, tmp_path / "run", to="model")
        before = contents(run.path)
        monkeypatch.setattr(Classifier, "loss", lambda self, logits, labels: logits.sum() * float("nan"))
        message = refused(design("digits", run.path))
        assert "the loss became nan in epoch 1, step 1" in message
        assert "a smaller learning rate is the usual cure" in message
        unharmed(before, run.path)

    def test_a_learning_rate_beyond_all_bounds(self, finished: Path, tmp_path: Path):
        run = rewound(finished, tmp_path / "run", to="model")
        described = read_json(run / "run.json")
        for part in ("options", "identity"):
            described[part]["lr"] = 1e30
        write_json(run / "run.json", described)
        assert "the loss became" in refused(design("digits", run.path, "--lr", "1e30"))
        assert not run.has("work/model-pretrain.safetensors")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of its own, of so many bytes; called again it changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted: list[int] = []

    def make(size: int) -> Path:
        how = f"remount,size={size}" if mounted else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(size)
        return folder

    try:
        yield make
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


class TestFullDisk:
    @pytest.mark.parametrize("call", [1, 3])
    def test_at_any_write(self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int):
        run = rewound(finished, tmp_path / "run", to="model")
        before = contents(run.path)
        calls = []
        fsync = os.fsync

        def full(handle: int) -> None:
            calls.append(handle)
            if len(calls) >= call:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(storage.os, "fsync", full)
        message = refused(design("digits", run.path))
        assert message.startswith("error: the disk is full")
        assert "free some room and give the same command again" in message
        unharmed(before, run.path)
        assert not list(run.path.rglob("*.part*"))

    @pytest.mark.slow
    def test_of_real_bytes_and_then_with_room(self, finished: Path, small_disk: Callable[[int], Path]):
        for size in (64 << 10, 192 << 10, 512 << 10):
            folder = small_disk(size) / "run"
            message = refused(design("digits", folder))
            assert message.startswith("error: the disk is full"), (size, message)
            assert not [p for p in folder.rglob("*.part*")], size
        small_disk(64 << 20)
        found = design("digits", folder)
        assert found.exit_code == 0, found.stderr
        for name in ("model.safetensors", "baseline/model.safetensors"):
            ours, theirs = read_tensors(folder / name), read_tensors(finished / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name

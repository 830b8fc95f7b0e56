"""The command line: bad input in a thousand forms, what stands on which stream, exit codes, and what is imported."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import netwright
from netwright import cli, storage

VERBS = (
    "check",
    "condense",
    "design",
    "search",
    "evaluate",
    "predict",
    "explain",
    "bench",
    "compress",
    "export",
    "latency-table",
    "train",
    "verify",
    "diagnose",
    "report",
    "doctor",
    "papers",
    "reproduce",
    "cite",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# What no user should ever have to read, and what must not be imported to answer a call for help.
HEAVY = ("torch", "lightning", "matplotlib", "numpy", "sklearn", "onnxruntime")
TRAINERS = ("lightning", "pytorch_lightning", "lightning_fabric")
COUNT = 1000


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves for those who use its network, with untrained weights."""
    import torch

    from netwright.design.model import Architecture
    from netwright.design.options import Options
    from netwright.design.run import RunFolder

    folder = RunFolder(tmp_path_factory.mktemp("cli") / "run")
    architecture = Architecture(
        kind="named", shape=(1, 8, 8), classes=tuple("0123456789"), mean=(0.3,), std=(0.4,), name="small_convnet"
    )
    torch.manual_seed(0)
    folder.write("architecture.json", architecture.to_dict())
    folder.describe(Options(data="digits"), "netwright design digits")
    storage.write_tensors(folder / "model.safetensors", architecture.build().state_dict())
    return folder.path


class Hostile:
    """Commands that are each wrong in one way at least, over all verbs."""

    def __init__(self, folder: Path, run: Path, seed: int = 0):
        self.dice = random.Random(seed)
        self.run = str(run)
        generator = np.random.default_rng(seed)
        folder.mkdir()
        bad = {
            "empty.npz": b"",
            "noise.npz": generator.bytes(500),
            "half.npz": b"PK\x03\x04" + generator.bytes(60),
            "noise.npy": generator.bytes(300),
            "empty.npy": b"",
            "noise.png": generator.bytes(300),
            "empty.png": b"",
            "cut.png": b"\x89PNG\r\n\x1a\n" + generator.bytes(20),
            "text.txt": b"no image at all\n",
            "noise.json": generator.bytes(80),
            "list.json": b"[1, 2]",
            "number.json": b"7",
            "unknown.json": b'{"sparsty": 0.9}',
            "types.json": b'{"data": "digits", "sparsity": "much", "epochs": [1]}',
            "range.json": b'{"data": "digits", "sparsity": 7}',
            "null.json": b"null",
            "deep.json": b'{"options": {"data": {"a": 1}}}',
        }
        for name, content in bad.items():
            (folder / name).write_bytes(content)
        np.savez(folder / "no-labels.npz", x=np.zeros((9, 8, 8), np.uint8))
        np.savez(folder / "lengths.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.zeros(4, int))
        np.savez(folder / "text.npz", x=np.full((9, 8, 8), "a"), y=np.arange(9) % 2)
        np.savez(folder / "objects.npz", x=np.array([{}], dtype=object), y=np.zeros(1, int))
        np.save(folder / "shape.npy", np.zeros((2, 5, 7), np.uint8))
        np.save(folder / "words.npy", np.full((2, 8, 8), "a"))
        np.save(folder / "nan.npy", np.full((2, 8, 8), np.nan))
        np.save(folder / "large.npy", np.full((2, 8, 8), 70000))
        np.save(folder / "none.npy", np.zeros((0, 8, 8), np.uint8))
        np.savez(folder / "nothing.npz")
        (folder / "void").mkdir()
        for name, count in (("one-class", 1), ("noise", 3)):
            for i in range(count):
                (folder / name / f"class{i}").mkdir(parents=True)
                (folder / name / f"class{i}" / "a.png").write_bytes(generator.bytes(200))
        (folder / "wrong-run").mkdir()
        (folder / "wrong-run" / "run.json").write_bytes(b"[]")
        (folder / "noise-run").mkdir()
        for name in ("run.json", "architecture.json", "model.safetensors"):
            (folder / "noise-run" / name).write_bytes(generator.bytes(90))
        self.folder = folder
        self.data = ["void", "one-class", "noise", "empty.npz", "noise.npz", "half.npz", "no-labels.npz", "lengths.npz"]
        self.data += ["text.npz", "objects.npz", "text.txt", "noise.png", "noise.npy"]
        self.images = ["noise.png", "empty.png", "cut.png", "text.txt", "noise.npy", "empty.npy", "shape.npy"]
        self.images += ["words.npy", "nan.npy", "large.npy", "none.npy", "nothing.npz", "noise.npz", "void"]
        self.configs = ["noise.json", "list.json", "number.json", "unknown.json", "types.json", "range.json"]
        self.configs += ["null.json", "deep.json", "void", "absent.json", "noise.png"]

    def word(self) -> str:
        text = "".join(self.dice.choices(LETTERS, k=self.dice.randint(1, 12)))
        return f"{text}-{self.dice.choice('äß語 #%')}" if self.dice.random() < 0.2 else f"{text}q"

    def path(self, names: list[str]) -> str:
        if self.dice.random() < 0.25:
            return str(self.folder / self.word() / self.dice.choice(["x.png", "y.npz", "z"]))
        return str(self.folder / self.dice.choice(names))

    def bad_run(self) -> str:
        return self.path(["void", "wrong-run", "noise-run", "noise.png", "noise"])

    def whole(self) -> str:
        return self.dice.choice(
            ["0", "-1", "-99999999999999999999", "1.5", "", "abc", "1e3", "nan", "0x10", self.word()]
        )

    def design_option(self) -> list[str]:
        dice, word = self.dice, self.word
        values: dict[str, Callable[[], str]] = {
            "--sparsity": lambda: dice.choice(
                ["1", "1.0", "2", "-0.1", "nan", "inf", "-inf", "abc", "", "0,95", "95%"]
            ),
            "--time-budget": lambda: dice.choice(
                ["0", "0s", "-5m", "soon", "", "1x", "m", "10 parsecs", "1h-3m", word()]
            ),
            "--accuracy": lambda: dice.choice(["0", "-1", "1.01", "nan", "inf", "95%", "", word()]),
            "--lr": lambda: dice.choice(["0", "-0.1", "nan", "inf", "-inf", "fast", "", word()]),
            "--seed": lambda: dice.choice(["-1", "1.5", "", "abc", "nan", word()]),
            "--batch-size": lambda: dice.choice(["1", "0", "-64", "1.5", "", word()]),
            "--search": word,
            "--space": word,
            "--pruning": word,
            "--strategy": word,
            "--logger": word,
            "--config": lambda: self.path(self.configs),
        }
        values["--jobs"] = lambda: dice.choice(["0", "-2", "many", ""])
        wholes = ("size", "channels", "cells", "search-channels", "search-epochs", "epochs", "devices", "nodes")
        values |= {f"--{name}": self.whole for name in wholes}
        name = dice.choice(sorted(values))
        return [name, values[name]()]

    def train_option(self) -> list[str]:
        dice, word = self.dice, self.word
        methods = ["tract:lambda_=0", "tract:lambda=1", "tract:", "ps-kd:alpha_T", "gradient-noise:eta=-1", "plain:a=1"]
        methods += ["elr:beta=1", "elr+:networks=3"]
        values: dict[str, Callable[[], str]] = {
            "--method": lambda: dice.choice([*[m for m in methods if m != "tract:"], word()]),
            "--model": lambda: dice.choice(
                [word(), f"{word()}.onnx", self.path(["void", "text.txt"]), "timm:" + word()]
            ),
            "--lr": lambda: dice.choice(["0", "-0.1", "nan", "inf", "fast", ""]),
            "--weight-decay": lambda: dice.choice(["-1", "nan", "inf", "much", ""]),
            "--label-noise": lambda: dice.choice(["symmetric", "symmetric:2", "sym:0.4", "instance:nan", "", ":"]),
            "--precision": word,
            "--strategy": word,
            "--seed": lambda: dice.choice(["-1", "1.5", "", "abc"]),
        }
        values |= {f"--{name}": self.whole for name in ("epochs", "batch-size", "size", "devices", "nodes")}
        name = dice.choice(sorted(values))
        return [name, values[name]()]

    def bench_option(self) -> list[str]:
        dice, word = self.dice, self.word
        values: dict[str, Callable[[], str]] = {
            "--sparsity": lambda: dice.choice(["1", "1.0", "-0.1", "nan", "inf", "abc", "", "0,95", "95%"]),
            "--seconds": lambda: dice.choice(["0", "-1", "nan", "soon", ""]),
            "--threads": lambda: dice.choice(["0", "-1", "99999", "1.5", "many", ""]),
            "--rounds": lambda: dice.choice(["0", "-5", "1.5", "many", ""]),
            "--batch": lambda: dice.choice(["0", "-5", "1.5", "many", ""]),
            "--size": lambda: dice.choice(["0", "-5", "1.5", "many", ""]),
            "--keep-at-least": lambda: dice.choice(["-1", "-5", "1.5", "many", ""]),
            "--seed": lambda: dice.choice(["-1", "1.5", "", "abc"]),
            "--runtime": word,
        }
        name = dice.choice(sorted(values))
        return [name, values[name]()]

    def compress_option(self) -> list[str]:
        dice = self.dice
        values: dict[str, Callable[[], str]] = {
            "--bits": lambda: dice.choice(["0", "17", "-1", "1.5", "many", ""]),
            "--bucket-size": lambda: dice.choice(["-1", "1.5", "many", ""]),
            "--epochs": lambda: dice.choice(["0", "-5", "1.5", "many", ""]),
            "--lr": lambda: dice.choice(["0", "-0.1", "nan", "fast", ""]),
            "--seed": lambda: dice.choice(["-1", "1.5", "", "abc"]),
        }
        name = dice.choice(sorted(values))
        return [name, values[name]()]

    def verify_option(self) -> list[str]:
        dice, word = self.dice, self.word
        values: dict[str, Callable[[], str]] = {
            "--radius": lambda: dice.choice(["0", "-1", "nan", "inf", "1/0", "8/", "", word()]),
            "--manipulation": lambda: dice.choice(["pixels", "pixels:0", "pixels:65", "patch:0,0,9,9", "", word()]),
            "--engine": word,
            "--timeout": lambda: dice.choice(["0", "-1", "nan", "inf", "soon", ""]),
            "--steps": lambda: dice.choice(["0", "-1", "1.5", "many", ""]),
            "--out": lambda: str(self.folder / dice.choice(["noise", "text.txt"])),
        }
        name = dice.choice(sorted(values))
        return ["--radius", "0.1", name, values[name]()]

    def diagnose_option(self) -> list[str]:
        dice = self.dice
        values: dict[str, Callable[[], str]] = {
            "--part": lambda: dice.choice([self.word(), "coherense", ""]),
            "--examples": lambda: dice.choice(["0", "1", "-5", "1.5", "many", ""]),
            "--size": lambda: dice.choice(["0", "-5", "1.5", "many", ""]),
            "--seed": lambda: dice.choice(["-1", "1.5", "", "abc"]),
        }
        name = dice.choice(sorted(values))
        return [name, values[name]()]

    def command(self) -> list[str]:
        dice, word = self.dice, self.word
        ways: list[Callable[[], list[str]]] = [
            lambda: [dice.choice([word(), "chek", "desing", "predct", "papres", "CHECK", "-", "--"])],
            lambda: [f"--{word()}", dice.choice(VERBS)],
            lambda: [dice.choice(VERBS), f"--{word()}", *([word()] if dice.random() < 0.5 else [])],
            lambda: [dice.choice(["check", "evaluate", "predict", "report", "reproduce", "cite", "design"])],
            lambda: ["predict", self.run],
            lambda: [dice.choice(["doctor", "papers"]), word()],
            lambda: [dice.choice(["check", "report", "cite"]), word(), word()],
            lambda: [dice.choice(["check", "design"]), word()],
            lambda: ["check", self.path(self.data)],
            lambda: ["design", self.path(self.data), "--epochs", "1"],
            lambda: ["design", "digits", *self.design_option()],
            lambda: ["design", "digits", *self.design_option(), *self.design_option()],
            lambda: ["design", *self.design_option(), word(), word()],
            lambda: ["design", "digits", dice.choice(["--sparsity", "--epochs", "--out", "--config"])],  # no value
            lambda: ["train", "digits", "--epochs", "1", *self.train_option()],
            lambda: ["train", dice.choice([word(), self.path(self.data)])],
            lambda: ["evaluate", self.bad_run(), *([word()] if dice.random() < 0.5 else [])],
            lambda: ["evaluate", self.run, dice.choice([word(), self.path(self.data)])],
            lambda: ["predict", self.bad_run(), self.path(self.images)],
            lambda: ["predict", self.run, self.path(self.images)],
            lambda: ["predict", self.run, *(self.path(self.images) for _ in range(dice.randint(2, 4)))],
            lambda: ["explain", *dice.choice([[], [self.run], [word(), word()], [word(), self.path(self.images)]])],
            lambda: [
                "explain",
                self.run,
                self.path(self.images),
                *(["--layer", word()] if dice.random() < 0.3 else []),
            ],
            lambda: ["explain", self.bad_run(), self.path(self.images), "--out", word()],
            lambda: [
                "explain",
                self.run,
                self.path(self.images),
                dice.choice(["--size", "--seed", "--method"]),
                word(),
            ],
            lambda: ["report", self.bad_run()],
            lambda: ["search", self.path(["noise.png", "void", "text.txt"]), "--out", word()],
            lambda: ["search", "digits", dice.choice(["--method", "--select", "--space", "--flops"]), word()],
            lambda: ["search", "digits", dice.choice(["--latency-ms", "--epochs", "--batch-size"]), "0"],
            lambda: ["bench", dice.choice([word(), self.bad_run(), self.path(["noise.png", "void"])])],
            lambda: ["bench", "resnet18", *self.bench_option()],
            lambda: ["bench", self.run, "--sparsity", dice.choice(["0.5", "0", "1"])],
            lambda: ["bench", self.run, "--size", dice.choice(["7", "32", "0"])],
            lambda: ["export", *dice.choice([[], [word()], [self.run, "--format", "onnx"], [self.run, "--out", "x"]])],
            lambda: ["export", self.run, "--format", dice.choice([word(), "onx", ""]), "--out", self.path(["void"])],
            lambda: ["export", self.bad_run(), "--format", "onnx", "--out", self.path(["text.txt", "void"])],
            lambda: ["export", word(), "--format", "safetensors", "--out", str(self.folder / f"{word()}.safetensors")],
            lambda: ["compress", word(), "--method", "prune", "--out", word()],
            lambda: ["compress", self.run, "--method", word(), "--out", word()],
            lambda: ["compress", self.run, "--out", word()],
            lambda: [
                "compress",
                self.run,
                "--method",
                "prune",
                "--out",
                str(self.folder / dice.choice(["noise", "text.txt"])),
            ],
            lambda: ["compress", self.bad_run(), "--method", "quantize", "--out", word()],
            lambda: ["compress", self.run, self.path(self.data), "--method", "quantize", "--out", word()],
            lambda: ["compress", self.run, "--method", "quantize", "--method", "prune", "--out", word()],
            lambda: ["compress", self.run, "--method", "quantize", "--out", word(), *self.compress_option()],
            lambda: ["condense", dice.choice([word(), self.path(self.data)]), "--out", str(self.folder / word())],
            lambda: ["condense", "digits", "--out", str(self.folder / dice.choice(["noise", "empty.npz"]))],
            lambda: ["condense", "digits", "--out", word(), "--keep", dice.choice(["0", "2", "nan", "-1", "", word()])],
            lambda: ["condense", "digits", "--out", word(), "--bins", self.whole()],
            lambda: ["condense", "digits", "--out", word(), "--features", dice.choice([word(), f"{word()}.npy"])],
            lambda: ["verify", self.run, "digits:3", *self.verify_option()],
            lambda: ["verify", self.run, self.path(self.images), "--radius", "0.1", "--out", word()],
            lambda: ["verify", self.bad_run(), "digits:3", "--radius", "0.1"],
            lambda: [
                "verify",
                dice.choice([word(), self.run]),
                f"{word()}:{dice.choice(['x', '1', '-1'])}",
                "--radius",
                "1",
            ],
            lambda: ["diagnose", self.bad_run(), *([word()] if dice.random() < 0.5 else [])],
            lambda: ["diagnose", self.run, dice.choice([word(), self.path(self.data)])],
            lambda: ["diagnose", self.run, *self.diagnose_option()],
            lambda: ["diagnose", dice.choice([word(), f"{word()}.onnx", f"{word()}.py:net"]), "digits"],
            lambda: ["diagnose", self.run, "--out", str(self.folder / dice.choice(["noise", "text.txt"]))],
            lambda: ["reproduce", word(), *([word()] if dice.random() < 0.3 else [])],
            lambda: ["reproduce", "dass", "--seeds", dice.choice(["0", "-3", "two", "1.5", ""])],
            lambda: ["reproduce", "dass", "--scale", dice.choice(["0", "-1", "nan", "inf", "big"])],
            lambda: ["reproduce", "dass", "--record", *dice.choice([["--fast"], ["--seeds", "1"], ["--scale", "0.5"]])],
            lambda: ["reproduce", "dass", "--jobs", dice.choice(["many", "1.5", ""]), "--fast"],
            lambda: ["cite", dice.choice([word(), "netwright.nothing", "das", "os:system", "torch.nn.Linear"])],
        ]
        arguments = dice.choice(ways)()
        if arguments[0] in VERBS and dice.random() < 0.3:
            arguments.insert(1, dice.choice(["--json", "--quiet"]))
        return arguments


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder that must be empty afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


def test_a_thousand_bad_commands(here: Path, tmp_path: Path, run: Path):
    hostile = Hostile(tmp_path / "hostile", run)
    before = {p: p.read_bytes() for p in [*run.rglob("*"), *hostile.folder.rglob("*")] if p.is_file()}
    wrong: list[str] = []
    seen: set[tuple[str, ...]] = set()
    while len(seen) < COUNT:
        arguments = hostile.command()
        if tuple(arguments) in seen:
            continue
        seen.add(tuple(arguments))
        found = invoke(*arguments)
        lines = [line for line in found.stderr.splitlines() if line.strip()]
        faults = []
        if found.exit_code != 2:
            faults.append(f"exit {found.exit_code}")
        if not 1 <= len(lines) <= 6:
            faults.append(f"{len(lines)} lines")
        if "Traceback" in found.stderr or "add --debug" in found.stderr or 'File "' in found.stderr:
            faults.append("an error that nobody foresaw")
        if found.stdout:
            faults.append(f"{len(found.stdout)} characters on stdout")
        if any(here.iterdir()):
            faults.append(f"left {[p.name for p in here.iterdir()]}")
        if faults:
            wrong.append(f"{arguments}: {', '.join(faults)}: {found.stderr[:300]!r}")
    assert wrong == [], f"{len(wrong)} of {COUNT}:\n" + "\n".join(wrong[:20])
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["chek", "digits"], "Did you mean 'check'?"),
        (["design", "digits", "--sparsty", "0.9"], "--sparsity"),
        (["check", "digist"], "did you mean digits?"),
        (["check", "fashon-mnist"], "did you mean fashion-mnist?"),
        (["design", "cifar-10"], "did you mean cifar10?"),
        (["design", "digits", "--search", "das"], "did you mean dass?"),
        (["design", "digits", "--pruning", "hydr"], "did you mean hydra?"),
        (["design", "digits", "--space", "micro-dart"], "did you mean micro-darts"),
        (["train", "digits", "--method", "trct"], "did you mean tract?"),
        (["train", "digits", "--model", "resnt18"], "did you mean resnet18?"),
        (["reproduce", "das"], "did you mean dass?"),
        (["cite", "dasss"], "did you mean dass?"),
        (["bench", "resnt18"], "did you mean resnet18?"),
        (["bench", "resnet18", "--runtime", "onnxruntme"], "did you mean onnxruntime?"),
        (["compress", "resnet18", "--method", "prun", "--out", "x"], "did you mean prune?"),
        (["condense", "digist", "--out", "x"], "did you mean digits?"),
        (["diagnose", "resnet18", "digits", "--part", "coherense"], "did you mean coherence?"),
        (["diagnose", "resnt18", "digits"], "did you mean resnet18?"),
        (["export", "resnet18", "--format", "onx", "--out", "x"], "did you mean onnx?"),
        (["verify", "net.py:net", "x.png", "--radius", "0.1", "--engine", "gird"], "did you mean grid?"),
    ],
)
def test_near_names(here: Path, arguments: list[str], cure: str):
    found = invoke(*arguments)
    assert found.exit_code == 2
    assert cure in found.stderr


def test_what_where_cure(here: Path):
    lines = invoke("check", "some/folder").stderr.splitlines()
    assert lines[0] == "error: no such file or folder"
    assert lines[1].startswith("  in some/folder")
    assert lines[2].startswith("  do check the path")


def test_version(here: Path):
    found = invoke("--version")
    assert (found.exit_code, found.stdout, found.stderr) == (0, f"netwright {netwright.__version__}\n", "")


def test_no_verb_shows_the_verbs(here: Path):
    found = invoke()
    assert all(verb in found.output for verb in VERBS)


def test_debug_shows_where_it_came_from(here: Path):
    plain, told = invoke("check", "nowhere"), invoke("check", "nowhere", "--debug")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in told.stderr
    assert told.stderr.endswith(plain.stderr)
    assert told.exit_code == 2


def test_an_unforeseen_error_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch):
    def explode(**_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("netwright.design.doctor.doctor", explode)
    found = invoke("doctor")
    assert found.exit_code == 2
    assert found.stderr == "error: RuntimeError: first line\n  do add --debug to see where it came from\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt("stopped after epoch 3"), 130, "stopped after epoch 3; the same command goes on\n"),
        (FloatingPointError("the loss became nan in epoch 2"), 2, "error: the loss became nan in epoch 2\n"),
        (ModuleNotFoundError("No module", name="timm"), 2, "error: timm is not installed\n  do pip install timm\n"),
    ],
)
def test_exit_codes_of_what_stops_a_verb(here, monkeypatch, error: BaseException, code: int, message: str):
    def stop(**_: object) -> None:
        raise error

    monkeypatch.setattr("netwright.design.doctor.doctor", stop)
    found = invoke("doctor")
    assert (found.exit_code, found.stderr, found.stdout) == (code, message, "")


class TestCheck:
    def test_exit_0_and_1(self, here: Path, tmp_path: Path):
        generator = np.random.default_rng(0)
        x = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "good.npz", x=x, y=np.arange(60) % 3)
        np.savez(tmp_path / "gaps.npz", x=x, y=np.arange(60) % 3 * 2)
        assert invoke("check", str(tmp_path / "good.npz")).exit_code == 0
        found = invoke("check", str(tmp_path / "gaps.npz"))
        assert found.exit_code == 1
        assert "labels up to 4" in found.stdout
        assert invoke("check", str(tmp_path / "gaps.npz"), "--json").exit_code == 1

    def test_plot(self, here: Path, tmp_path: Path):
        target = tmp_path / "classes.png"
        assert invoke("check", "digits", "--plot", str(target)).exit_code == 0
        assert target.read_bytes().startswith(b"\x89PNG")
        found = invoke("check", "digits", "--plot", str(tmp_path / "classes.xyz"))
        assert found.exit_code == 2
        assert found.stdout == ""
        assert "--debug" not in found.stderr
        assert not (tmp_path / "classes.xyz").exists()


@pytest.fixture
def picture(tmp_path: Path) -> str:
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return str(path)


class TestJson:
    """One JSON document on standard output, and nothing else there."""

    @pytest.mark.parametrize("verb", ["check", "diagnose", "doctor", "papers", "cite", "evaluate", "predict", "report"])
    def test_in_this_process(self, here: Path, run: Path, picture: str, tmp_path: Path, verb: str):
        arguments = {
            "check": ["digits"],
            "cite": ["dass"],
            "diagnose": [str(run), "--examples", "20", "--out", str(tmp_path / "diagnosis")],
            "evaluate": [str(run)],
            "predict": [str(run), picture, picture],
            "report": [str(run)],
        }
        found = invoke(verb, *arguments.get(verb, []), "--json")
        assert found.exit_code == 0, found.stderr
        content = json.loads(found.stdout)
        assert content
        if verb == "papers":
            assert {"slug", "title", "method", "verdict", "budget", "seeds", "seconds"} <= set(content[0])
        if verb == "predict":
            assert len(content["classes"]) == 2
        if verb == "evaluate":
            assert content["low"] < content["accuracy"] < content["high"]

    def test_reproduce(self, here: Path, monkeypatch: pytest.MonkeyPatch):
        from netwright.papers.evidence import Evidence

        asked: dict[str, object] = {}

        def instead(slugs: list[str], **options: object) -> list[Evidence]:
            asked.update(options, slugs=slugs)
            return []

        monkeypatch.setattr("netwright.papers.reproduce", instead)
        found = invoke("reproduce", "dass", "--fast", "--seeds", "2", "--json")
        assert (found.exit_code, json.loads(found.stdout)) == (0, [])
        assert (asked["slugs"], asked["fast"], asked["seeds"], asked["scale"]) == (["dass"], True, 2, 1.0)

    @pytest.mark.parametrize("arguments", [["check", "digits"], ["doctor"], ["papers"], ["cite", "dass"]])
    def test_in_a_pipe(self, here: Path, arguments: list[str]):
        done = subprocess.run(
            [sys.executable, "-m", "netwright", *arguments, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)


class TestHuman:
    """The same answers for a person."""

    def test_predict_and_cite_and_papers(self, here: Path, run: Path, picture: str):
        rows = invoke("predict", str(run), picture).stdout.splitlines()
        assert rows[0].split() == ["image", "class", "probability"]
        assert rows[1].startswith(picture)
        assert invoke("cite", "dass").stdout.startswith("@")
        assert "dass" in invoke("papers").stdout

    def test_quiet_leaves_only_the_result(self, here: Path, run: Path):
        found = invoke("evaluate", str(run), "--quiet")
        assert found.stderr == ""
        assert "accuracy" in found.stdout


class TestBench:
    """The verb, with the runtimes that every installation has."""

    QUICK = ("--rounds", "2", "--runtime", "pytorch", "--runtime", "onnxruntime")

    def test_one_object_and_the_same_in_the_file(self, here: Path, run: Path, tmp_path: Path):
        target = tmp_path / "out.json"
        found = invoke("bench", str(run), *self.QUICK, "--json", "--out", str(target))
        assert found.exit_code == 0, found.stderr
        content = json.loads(found.stdout)
        assert content == json.loads(target.read_text())
        assert {"ratio_to_best_dense_peer", "best_dense_peer", "verdict", "roofline", "versions"} <= set(content)
        assert [runtime["name"] for runtime in content["runtimes"]] == ["pytorch", "onnxruntime"]
        assert max(runtime["deviation"] for runtime in content["runtimes"]) < 1e-5
        assert content["best_dense_peer"] in {"pytorch", "onnxruntime"}
        assert (content["network"], content["shape"], content["threads"]) == ("run", [1, 1, 8, 8], 1)
        assert content["ratio_to_best_dense_peer"] is None  # no sparse runtime was asked for
        assert content["verdict"] == "no sparse runtime was measured"

    def test_a_table_of_several(self, here: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
        from netwright.deploy import bench

        asked: list[dict[str, object]] = []
        measure = bench.bench

        def once(recipe: bench.Recipe, **options: object) -> bench.Benchmark:
            asked.append({**recipe.arguments, **options})
            return made

        made = measure(bench.Recipe("netwright.design.benchmark:subject", {"model": str(run)}), rounds=1,
                       runtimes=["onnxruntime"], memory=False)  # fmt: skip
        monkeypatch.setattr("netwright.deploy.bench.protocol.bench", once)
        arguments = ["bench", "resnet18", "--sparsity", "0.9", "--sparsity", "0.99", "--size", "32", "--threads", "1"]
        found = invoke(*arguments, "--batch", "3", "--seed", "4", "--seconds", "0.5", "--rounds", "7")
        assert found.exit_code == 0, found.stderr
        assert [a["sparsity"] for a in asked] == [0.9, 0.99]
        expected = {"model": "resnet18", "size": 32, "batch": 3, "seed": 4, "threads": 1, "rounds": 7, "seconds": 0.5}
        assert expected.items() <= asked[0].items()
        lines = found.stdout.splitlines()
        assert lines[0].startswith("network")
        assert len([line for line in lines if line.startswith("run ")]) == 4  # two rows, two verdicts
        assert len(json.loads(invoke(*arguments, "--json").stdout)) == 2

    def test_an_onnx_file(self, here: Path, run: Path, tmp_path: Path):
        file = str(tmp_path / "net.onnx")
        assert invoke("export", str(run), "--format", "onnx", "--out", file).exit_code == 0
        found = invoke("bench", file, "--rounds", "1", "--size", "8", "--json")
        assert found.exit_code == 0, found.stderr
        content = json.loads(found.stdout)
        assert content["absent"]["netwright-native"] == "an ONNX file is all there is"
        assert content["absent"]["pytorch"] == "an ONNX file is all there is"
        assert "onnxruntime" in [runtime["name"] for runtime in content["runtimes"]]
        assert content["facts"] is None


class TestExport:
    """The verb, format by format."""

    def test_onnx_takes_pictures_and_agrees(self, here: Path, run: Path, tmp_path: Path):
        from netwright.deploy import Session
        from netwright.design.model import load_run

        file = tmp_path / "net.onnx"
        found = invoke("export", str(run), "--format", "onnx", "--out", str(file), "--json")
        assert found.exit_code == 0, found.stderr
        content = json.loads(found.stdout)
        assert (content["files"], content["bytes"]) == ([str(file)], file.stat().st_size)
        images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
        import torch

        expected = load_run(run)(torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy()
        assert np.abs(Session(file).logits(images) - expected).max() < 1e-4

    def test_safetensors_come_back(self, here: Path, run: Path, tmp_path: Path):
        import torch

        from netwright.design.benchmark import open_model
        from netwright.design.model import load_run

        found = invoke("export", str(run), "--format", "safetensors", "--out", str(tmp_path / "net.safetensors"))
        assert found.exit_code == 0, found.stderr
        again = load_run(tmp_path, weights="net.safetensors", architecture="net.json")
        x = torch.rand(2, 1, 8, 8)
        assert torch.equal(again(x), load_run(run)(x))
        options = ["--sparsity", "0.9", "--size", "32", "--seed", "3"]
        target = tmp_path / "named.safetensors"
        found = invoke("export", "mobilenet_v2", "--format", "safetensors", "--out", str(target), *options)
        assert found.exit_code == 0, found.stderr
        again = load_run(tmp_path, weights="named.safetensors", architecture="named.json")
        expected = open_model("mobilenet_v2", sparsity=0.9, size=32, seed=3).module
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(again(x), expected(x))

    def test_netwright_loads_it(self, here: Path, run: Path, tmp_path: Path):
        import torch

        from netwright import deploy
        from netwright.design.model import load_run

        arguments = ["export", str(run), "--format", "netwright", "--out", str(tmp_path / "out")]
        found = invoke(*arguments)
        assert found.exit_code == 0, found.stderr
        assert [Path(line).name for line in found.stdout.splitlines()[:-1]] == ["model.json", "model.safetensors"]
        x = torch.randn(1, 1, 8, 8)
        expected = load_run(run).network(x)
        assert torch.allclose(deploy.load(tmp_path / "out", backend="torch")(x), expected, atol=1e-5)
        assert invoke(*arguments).exit_code == 2
        assert invoke(*arguments, "--force").exit_code == 0

    def test_c_knows_the_classes_and_the_preprocessing(self, here: Path, run: Path, tmp_path: Path):
        folder = tmp_path / "out"
        arguments = ["export", str(run), "--format", "c", "--out", str(folder)]
        found = invoke(*arguments)
        assert found.exit_code == 0, found.stderr
        names = [Path(line).name for line in found.stdout.splitlines()[:-1]]
        assert {"main.c", "model.c", "model.h", "model.weights"} <= set(names)
        assert sorted(path.name for path in folder.iterdir()) == names
        header = (folder / "model.h").read_bytes()
        (folder / "model.h").write_bytes(b"old")
        (folder / "mine.txt").write_bytes(b"mine")
        assert invoke(*arguments).exit_code == 2
        assert (folder / "model.h").read_bytes() == b"old"
        assert invoke(*arguments, "--force").exit_code == 0
        assert (folder / "model.h").read_bytes() == header
        assert (folder / "mine.txt").read_bytes() == b"mine"

    def test_nothing_is_overwritten_unless_asked(self, here: Path, run: Path, tmp_path: Path):
        target = tmp_path / "net.safetensors"
        (tmp_path / "net.json").write_text("mine")
        arguments = ["export", str(run), "--format", "safetensors", "--out", str(target)]
        found = invoke(*arguments)
        assert found.exit_code == 2
        assert found.stderr.startswith("error: there is something already")
        assert (tmp_path / "net.json").read_text() == "mine"
        assert not target.exists()
        assert invoke(*arguments, "--force").exit_code == 0
        assert json.loads((tmp_path / "net.json").read_text())["name"] == "small_convnet"

    def test_a_function_has_no_architecture(self, here: Path, tmp_path: Path):
        file = tmp_path / "nets.py"
        file.write_text(
            "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))\n"
        )
        target = tmp_path / "net.safetensors"
        found = invoke("export", f"{file}:net", "--size", "4", "--format", "safetensors", "--out", str(target))
        assert found.exit_code == 2
        assert "has no architecture" in found.stderr
        found = invoke("export", f"{file}:net", "--size", "4", "--format", "onnx", "--out", str(tmp_path / "net.onnx"))
        assert found.exit_code == 0, found.stderr


PROBE = """
import json, sys
from typer.testing import CliRunner
from netwright import cli
commands, names, code = json.loads(sys.argv[1])
for arguments in commands:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == code, (arguments, done.exit_code, done.output)
    assert "--help" not in arguments or "Usage" in done.stdout, (arguments, done.output)
    print(*arguments[:1], *[name for name in names if name in sys.modules])
"""


def imported(commands: list[list[str]], names: tuple[str, ...], code: int = 0) -> list[str]:
    """Of commands that one process runs in turn: the verb, and which modules are there after it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([commands, names, code])],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_help_imports_nothing_heavy():
    commands = [["--help"], *([verb, "--help"] for verb in VERBS)]
    assert imported(commands, HEAVY) == [arguments[0] for arguments in commands]


def test_a_wrong_verb_imports_nothing_heavy():
    assert imported([["chek"]], HEAVY, code=2) == ["chek"]


def test_what_only_looks_does_not_import_the_trainer(run: Path, picture: str):
    commands = [
        ["papers"],
        ["cite", "dass"],
        ["check", "digits"],
        ["report", str(run)],
        ["predict", str(run), picture],
        ["evaluate", str(run)],
        ["diagnose", str(run), "--examples", "20", "--out", str(run.with_name("diagnosis"))],
        ["doctor"],
    ]
    assert imported(commands, TRAINERS) == [arguments[0] for arguments in commands]


def test_every_verb_has_json_quiet_and_debug():
    for verb in VERBS:
        text = invoke(verb, "--help").stdout
        assert all(option in text for option in ("--json", "--quiet", "--debug")), verb


def test_a_latency_table_is_written_once(tmp_path):
    path = tmp_path / "table.json"
    arguments = ["latency-table", "micro-chain", "--shape", "1,8,8", "--repeats", "2", "--out", str(path)]
    found = invoke(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    table = json.loads(found.stdout)
    assert json.loads(path.read_text()) == table
    assert (table["threads"], table["batch"], table["runtime"]) == (1, 1, "torch")
    assert "constant" in [entry["key"] for entry in table["milliseconds"]]
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "there already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["micro-chian"], "did you mean micro-chain?"),
        (["micro-chain", "--shape", "8,8"], "shape must be C,H,W, got '8,8'"),
        (["micro-chain", "--shape", "0,8,8"], "numbers >= 1, got '0,8,8'"),
        (["micro-chain", "--classes", "0"], "classes must be >= 1, got 0"),
        (["micro-chain", "--channels", "1"], "channels must be >= 2, got 1"),
        (["micro-chain", "--runtime", "onnx"], "runtime must be 'torch' or 'native', got 'onnx'"),
        (["micro-chain", "--sparsity", "1"], "sparsity must lie in [0, 1), got 1.0"),
        (["micro-chain", "--repeats", "0"], "repeats must be >= 1, got 0"),
    ],
)
def test_a_latency_table_refuses_what_it_cannot_do(arguments, message, tmp_path):
    found = invoke("latency-table", *arguments, "--out", str(tmp_path / "table.json"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "table.json").exists()

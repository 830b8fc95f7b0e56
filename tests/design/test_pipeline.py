"""The main job end to end on real digits: what the folder holds, and that nothing that stops it harms it."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Command
from tiny_run import ARGUMENTS, TINY

import netwright
from netwright.console import UserError
from netwright.data import load as load_data
from netwright.design.measure import onnx_input, wilson
from netwright.design.model import Architecture, load_run
from netwright.design.options import Options
from netwright.design.pipeline import design, result_of
from netwright.design.plan import Plan
from netwright.design.run import RunFolder
from netwright.storage import read_json, read_tensors

ARTEFACTS = [
    "run.json",
    "data.json",
    "plan.json",
    "search.json",
    "architecture.json",
    "classes.json",
    "model.safetensors",
    "model.onnx",
    "model-dense.safetensors",
    "model-dense.onnx",
    "baseline/model.onnx",
    "training.json",
    "measurements.json",
    "maps.npz",
    "mistakes.npz",
    "radii.npz",
    "sample.npz",
    "README.txt",
    "report.html",
    "report.md",
    "report.json",
]


def same_weights(a: Path, b: Path) -> bool:
    one, two = read_tensors(a), read_tensors(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class TestFinishedRun:
    def test_every_artefact_is_there(self, finished: Path):
        assert [name for name in ARTEFACTS if not (finished / name).is_file()] == []

    def test_sparsity_is_exact(self, finished: Path):
        figures = read_json(finished / "measurements.json")
        for which in ("model", "baseline"):
            assert figures[which]["sparsity"] == pytest.approx(0.8, abs=1e-3)
            assert figures[f"{which}_dense" if which == "baseline" else "dense"]["sparsity"] < 0.01
        assert result_of(RunFolder(finished)).goal_met

    def test_figures_are_those_of_the_files(self, finished: Path):
        figures = read_json(finished / "measurements.json")["model"]
        data = load_data("digits", seed=1)
        model = load_run(finished)
        right = sum(
            name == data.classes[label]
            for name, label in zip(model.predict(data.test.images), data.test.labels.tolist(), strict=True)
        )
        assert figures["accuracy"] == pytest.approx(right / len(data.test))
        assert tuple(figures["interval"]) == pytest.approx(wilson(right / len(data.test), len(data.test)))
        assert sum(map(sum, figures["confusion"])) == len(data.test)
        assert sum(figures["confusion"][i][i] for i in range(10)) == right
        assert figures["file_bytes"] == (finished / "model.onnx").stat().st_size
        assert {entry["batch"] for entry in figures["latency"]} == {1, 32}
        assert all(entry["threads"] == 1 for entry in figures["latency"])
        assert figures["agreement"] <= 1e-4

    def test_training_is_recorded(self, finished: Path):
        training = read_json(finished / "training.json")
        for which in ("model", "baseline"):
            assert {name: len(epochs) for name, epochs in training[which].items()} == {
                "pretrain": 1,
                "prune": 1,
                "finetune": 1,
            }
            assert training[which]["prune"][-1]["sparsity"] == pytest.approx(0.8, abs=1e-3)

    def test_load_gives_a_module_that_takes_images(self, finished: Path):
        model = netwright.load(finished)
        images = load_data("digits", seed=1).test.images[:5]
        assert model(images).shape == (5, 10)
        assert torch.allclose(model(images), model(images.float() / 255), atol=1e-5)
        with pytest.raises(ValueError, match=r"images must have shape \(batch, 1, 8, 8\)"):
            model(torch.zeros(1, 3, 8, 8))

    @pytest.mark.parametrize(("title", "walled"), [("numpy and onnxruntime", True), ("PyTorch", False)])
    def test_moved_folder_works_with_the_lines_of_its_readme(
        self, finished: Path, tmp_path: Path, title: str, walled: bool
    ):
        moved = tmp_path / "elsewhere"
        shutil.copytree(finished, moved)
        after = (moved / "README.txt").read_text().split(f"With {title}", 1)[1].splitlines()[2:]
        lines = [line[4:] for line in itertools.takewhile(lambda line: line.startswith("    "), after)]
        assert len(lines) == 5
        wall = (
            "import sys\nclass Wall:\n def find_spec(self, name, path=None, target=None):\n"
            "  if name.split('.')[0] in ('netwright', 'torch', 'lightning'): raise ImportError(name)\n"
            "sys.meta_path.insert(0, Wall())\n"
        )
        program = (wall if walled else "") + "\n".join(lines)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=moved, capture_output=True, text=True, timeout=120, check=True
        )
        images = load_data("digits", seed=1).test.images[:8]
        predicted = load_run(finished).predict(images)
        assert done.stdout.replace("'", "").replace(",", "").strip("[]\n").split() == predicted

    def test_mistakes_are_mistakes(self, finished: Path):
        with np.load(finished / "mistakes.npz") as arrays:
            assert (arrays["true"] != arrays["predicted"]).all()
            assert (np.diff(arrays["confidence"]) <= 0).all()
            assert arrays["images"].dtype == np.uint8

    def test_maps_are_those_of_the_network(self, finished: Path):
        from netwright.explain import EigenCAM

        model = load_run(finished)
        with np.load(finished / "maps.npz") as arrays:
            images, true, predicted = (arrays[key] for key in ("images", "true", "predicted"))
            right = true == predicted
            assert 1 <= right.sum() <= 6
            assert len(set(true[right])) == right.sum()
            assert not (true[: right.sum()] != predicted[: right.sum()]).any()
            x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            assert model(x).argmax(1).tolist() == predicted.tolist()
            cams = EigenCAM(model.network, upsample=False)(model.normalise(x))
            assert np.allclose(arrays["maps"], cams.numpy(), atol=2e-3)
        page = (finished / "report.html").read_text()
        assert page.count("data:image/png") >= len(true)
        assert "Eigen-CAM" in page

    def test_the_same_command_changes_nothing(self, finished: Path):
        before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and "clock" not in p.name}
        result = design("digits", out=str(finished), **TINY)
        assert result.goal_met
        changed = [
            p.name for p, content in before.items() if p.read_bytes() != content and p.suffix not in (".html", ".md")
        ]
        assert [name for name in changed if name != "report.json"] == []

    def test_another_run_is_refused_and_nothing_is_lost(self, finished: Path):
        before = (finished / "model.safetensors").read_bytes()
        with pytest.raises(UserError, match=r"another run \(seed 1 there, 2 here\)"):
            design("digits", out=str(finished), **{**TINY, "seed": 2})
        assert (finished / "model.safetensors").read_bytes() == before

    def test_damaged_weights_and_architecture(self, finished: Path, tmp_path: Path):
        moved = tmp_path / "damaged"
        shutil.copytree(finished, moved)
        whole = (moved / "model.safetensors").read_bytes()
        (moved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged weights file"):
            load_run(moved)
        described = read_json(moved / "architecture.json")
        (moved / "architecture.json").write_text(json.dumps({**described, "shape": "big", "classes": 3}))
        with pytest.raises(UserError, match=r"not an architecture: .*shape.*classes"):
            Architecture.read(moved / "architecture.json")

    def test_plan_round_trip(self, finished: Path):
        plan = Plan.from_dict(read_json(finished / "plan.json"))
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert "in all about" in str(plan)


def test_onnx_input_layouts():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    assert onnx_input(images, picture=True)[1, 0, 1].tolist() == images[1, :, 0, 1].tolist()
    floats = torch.rand(2, 1, 1, 40)
    assert onnx_input(floats, picture=False).shape == (2, 1, 1, 40)


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty and holds no run \(thesis.txt\)"):
        design("digits", out=str(tmp_path), **TINY)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".lock")] == ["thesis.txt"]


def test_bad_input_leaves_no_folder(tmp_path: Path):
    for settings in ({"data": "digit"}, {"data": "digits", "baseline": "mobilnet_v2"}):
        with pytest.raises(UserError):
            design(options=Options(**{**TINY, "out": str(tmp_path / "run"), **settings}))
    with pytest.raises(UserError, match="too small for one epoch"):
        design(options=Options(**{**TINY, "data": "digits", "time_budget": 2.0, "out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_changed_data_are_noticed(tmp_path: Path):
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (80, 8, 8), dtype=np.uint8), np.arange(80) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y)
    run = RunFolder(tmp_path / "run")
    options = Options(data=str(tmp_path / "d.npz"), out=str(run.path), **TINY)
    run.describe(options, "test")
    run.write("data.json", {"fingerprint": load_data(tmp_path / "d.npz", seed=1).fingerprint()})
    run.write("plan.json", {})
    np.savez(tmp_path / "d.npz", x=x[::-1].copy() // 2, y=y)
    with pytest.raises(UserError, match="the data have changed"):
        design(options=options)


def start(folder: Path) -> Command:
    return Command("design", "digits", *ARGUMENTS, "--out", str(folder))


def same_run(a: Path, b: Path) -> bool:
    names = ("model.safetensors", "model-dense.safetensors", "baseline/model.safetensors")
    found = [read_json(folder / "search.json")["genotype"] for folder in (a, b)]
    return found[0] == found[1] and all(same_weights(a / name, b / name) for name in names)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(finished: Path, tmp_path: Path):
    folder, dice, kills = tmp_path / "run", random.Random(7), 0
    began = time.monotonic()
    with start(folder) as command:
        assert command.wait(600) == 0, command.err
    whole = time.monotonic() - began
    assert same_run(folder, finished)
    shutil.rmtree(folder)
    while kills < 10:
        with start(folder) as command:
            # Each goes on from where the last one was killed, so that the moments reach to the end of the run.
            code = command.wait(dice.uniform(0.0, whole / 2))
            if code is None:
                kills += 1
                continue
            assert code == 0, command.err
            assert same_run(folder, finished)
            shutil.rmtree(folder)
    with start(folder) as command:
        assert command.wait(600) == 0, command.err
    assert same_run(folder, finished)


@pytest.mark.slow
def test_ctrl_c_exits_130_and_leaves_a_partial_report(tmp_path: Path):
    folder = tmp_path / "run"
    with start(folder) as command:
        wait_for(folder / "work", command)
        command.interrupt()
        assert command.wait(120) == 130, command.err
        assert "the same command goes on" in command.err
        assert "Traceback" not in command.err
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_holders_pid(tmp_path: Path):
    folder = tmp_path / "run"
    with start(folder) as command:
        wait_for(folder / "run.json", command)
        with pytest.raises(UserError, match=f"in use by process {command.pid} on "):
            design("digits", out=str(folder), **TINY)


def wait_for(path: Path, command: Command) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and command.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), command.err


@pytest.mark.slow
def test_replay_gives_the_same_network(finished: Path, tmp_path: Path):
    replayed = ("--config", str(finished / "run.json"), "--out", str(tmp_path / "again"))
    with Command("design", "--json", "--quiet", *replayed) as command:
        assert command.wait(600) == 0, command.err
        assert json.loads(command.out)["goal_met"] is True
    assert same_weights(tmp_path / "again" / "model.safetensors", finished / "model.safetensors")


class TestTrainMethods:
    def test_both_networks_are_trained_with_them_and_end_as_plain_modules(self, tmp_path: Path, finished: Path):
        methods = ("ps-kd:alpha_T=0.5", "weight-compander", "tract", "gradient-noise:eta=0.1", "elr:lam=1")
        result = design("digits", out=str(tmp_path / "run"), train_method=methods, **{**TINY, "search": "random"})
        assert result.sparsity == pytest.approx(0.8, abs=1e-3)
        model = load_run(tmp_path / "run")
        assert not [name for name, _ in model.named_parameters() if "parametrization" in name or "compander" in name]
        plain = read_tensors(finished / "baseline/model-dense.safetensors")
        ours = read_tensors(tmp_path / "run/baseline/model-dense.safetensors")
        assert plain.keys() == ours.keys()
        assert not all(torch.equal(plain[name], ours[name]) for name in plain)
        listed = (tmp_path / "run/doubts.csv").read_text().splitlines()
        assert len(listed) == 1 + read_json(tmp_path / "run/doubts.json")["doubtful"]
        assert "training labels are doubted" in (tmp_path / "run/report.md").read_text()

    def test_a_wrong_argument_is_told_before_anything_starts(self, tmp_path: Path):
        with pytest.raises(UserError, match="ps-kd has no argument 'alpha'"):
            design("digits", out=str(tmp_path / "run"), train_method=("ps-kd:alpha=1",), **TINY)
        with pytest.raises(UserError, match="unknown training method 'pskd'"):
            Options(data="digits", train_method=("pskd",))
        assert not (tmp_path / "run").exists()

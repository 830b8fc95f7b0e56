"""What a finished run is used for: measuring it on labelled data, predicting single images, and its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_run import ARGUMENTS
from typer.testing import CliRunner

from netwright import cli
from netwright.console import UserError
from netwright.data import load as load_data
from netwright.data.folder import write_folder
from netwright.data.tensors import TensorImages
from netwright.design.measure import wilson
from netwright.design.model import Architecture, load_run
from netwright.design.use import evaluate_run, predict_files, probabilities
from netwright.storage import read_json, write_json, write_tensors


@pytest.fixture(scope="module")
def data():
    return load_data("digits", seed=1)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory):
    """Makes a run folder around a network that was never trained."""

    def make(shape: tuple[int, int, int], classes: int = 3, picture: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("untrained")
        architecture = Architecture(
            kind="named", shape=shape, classes=tuple(f"c{i}" for i in range(classes)), mean=(0.5,) * shape[0],
            std=(0.2,) * shape[0], picture=picture, name="small_convnet",
        )  # fmt: skip
        torch.manual_seed(1)
        write_json(folder / "architecture.json", architecture.to_dict())
        write_tensors(folder / "model.safetensors", architecture.build().state_dict())
        return folder

    return make


class TestEvaluate:
    def test_own_data_give_the_measured_accuracy(self, finished: Path):
        figures = read_json(finished / "measurements.json")["model"]
        for given in (None, "digits"):
            found = evaluate_run(finished, given)
            assert found.accuracy == pytest.approx(figures["accuracy"])
            assert found.nll == pytest.approx(figures["nll"], rel=1e-4)
            assert (found.low, found.high) == pytest.approx(wilson(found.accuracy, found.images))
        assert found.images == 359

    def test_a_folder_of_the_same_images(self, finished: Path, data, tmp_path: Path):
        write_folder(tmp_path / "png", {"train": data.train, "test": data.test}, data.classes)
        own, found = evaluate_run(finished), evaluate_run(finished, str(tmp_path / "png"))
        assert found.images == own.images
        assert found.accuracy == pytest.approx(own.accuracy)
        assert found.nll == pytest.approx(own.nll, rel=1e-4)

    def test_every_image_of_a_folder_without_a_test_part(self, finished: Path, data, tmp_path: Path):
        write_folder(tmp_path / "flat", data.test, data.classes)
        own, found = evaluate_run(finished), evaluate_run(finished, str(tmp_path / "flat"))
        assert found.images == own.images == len(data.test)
        assert found.accuracy == pytest.approx(own.accuracy)
        assert found.nll == pytest.approx(own.nll, rel=1e-4)

    def test_training_images_stay_out_wherever_the_runs_own_data_lie(self, finished: Path, tmp_path: Path):
        digits = load_digits()
        pixels, labels = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target
        np.savez(tmp_path / "moved.npz", x=pixels, y=labels, classes=list("0123456789"))
        own, found = evaluate_run(finished), evaluate_run(finished, str(tmp_path / "moved.npz"))
        assert found.images == 359
        assert found.accuracy == pytest.approx(own.accuracy)
        # The same path with other content is the run's own data too.
        moved = tmp_path / "run"
        shutil.copytree(finished, moved)
        described = read_json(moved / "run.json")
        described["options"]["data"] = str(tmp_path / "moved.npz")
        write_json(moved / "run.json", described)
        np.savez(tmp_path / "moved.npz", x=pixels[:900], y=labels[:900], classes=list("0123456789"))
        assert evaluate_run(moved, str(tmp_path / "moved.npz")).images == 180

    def test_images_of_another_size_are_resized_and_npz_are_refused(self, finished: Path, data, tmp_path: Path):
        doubled = TensorImages(data.test.images.repeat_interleave(2, 2).repeat_interleave(2, 3), data.test.labels)
        write_folder(tmp_path / "png", {"train": doubled, "test": doubled}, data.classes)
        found = evaluate_run(finished, str(tmp_path / "png"))
        halved = [
            Image.fromarray(one).resize((8, 8), Image.Resampling.BILINEAR) for one in doubled.images[:, 0].numpy()
        ]
        answers = load_run(finished).predict(torch.from_numpy(np.stack([np.array(one) for one in halved]))[:, None])
        right = [answer == str(label) for answer, label in zip(answers, data.test.labels.tolist(), strict=True)]
        assert found.accuracy == pytest.approx(np.mean(right))
        np.savez(tmp_path / "d.npz", x=doubled.images.numpy(), y=doubled.labels.numpy())
        with pytest.raises(UserError, match="the images are 16 x 16, the network takes 8 x 8"):
            evaluate_run(finished, str(tmp_path / "d.npz"))

    def test_classes_in_another_order_and_fewer(self, finished: Path, data, tmp_path: Path):
        keep = (data.test.labels == 7) | (data.test.labels == 2)
        part = TensorImages(data.test.images[keep], (data.test.labels[keep] == 2).long())
        arrays = {"x_train": part.images, "y_train": part.labels, "x_test": part.images, "y_test": part.labels}
        np.savez(tmp_path / "d.npz", classes=["7", "2"], **{name: v.numpy() for name, v in arrays.items()})
        model = load_run(finished)
        right = [
            name == str(label)
            for name, label in zip(model.predict(part.images), data.test.labels[keep].tolist(), strict=True)
        ]
        assert evaluate_run(finished, str(tmp_path / "d.npz")).accuracy == pytest.approx(np.mean(right))

    def test_an_unknown_class_is_refused(self, finished: Path, tmp_path: Path):
        x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "d.npz", x=x, y=np.arange(40) % 2, classes=["3", "cat"])
        with pytest.raises(UserError, match="the network does not know the class 'cat'"):
            evaluate_run(finished, str(tmp_path / "d.npz"))

    def test_no_run_and_no_finished_run(self, finished: Path, tmp_path: Path):
        with pytest.raises(UserError, match="no such run"):
            evaluate_run(tmp_path / "nothing")
        with pytest.raises(UserError, match="the folder holds no finished network"):
            evaluate_run(tmp_path)
        moved = tmp_path / "moved"
        shutil.copytree(finished, moved)
        (moved / "run.json").write_text("[]")
        with pytest.raises(UserError, match="no run of netwright"):
            evaluate_run(moved)


class TestPredict:
    def test_png_npy_npz_agree(self, finished: Path, data, tmp_path: Path):
        images, model = data.test.images[:6], load_run(finished)
        pixels = images[:, 0].numpy()
        for i, one in enumerate(pixels):
            Image.fromarray(one).save(tmp_path / f"{i}.png")
        np.save(tmp_path / "a.npy", pixels)
        np.save(tmp_path / "channels.npy", pixels[..., None])
        np.save(tmp_path / "floats.npy", pixels.astype(np.float64) / 255)
        np.savez(tmp_path / "a.npz", labels=np.zeros(6), images=pixels)
        one_by_one = predict_files(finished, [tmp_path / f"{i}.png" for i in range(6)])
        assert list(one_by_one.classes) == model.predict(images)
        best = model(images).softmax(1).max(1).values.tolist()
        assert one_by_one.probabilities == pytest.approx(best, abs=1e-5)
        assert one_by_one.files == tuple(str(tmp_path / f"{i}.png") for i in range(6))
        for name in ("a.npy", "channels.npy", "floats.npy", "a.npz"):
            found = predict_files(finished, [tmp_path / name])
            assert found.classes == one_by_one.classes, name
            assert found.probabilities == pytest.approx(one_by_one.probabilities, abs=1e-5)
            assert found.files[3] == f"{tmp_path / name}[3]"

    def test_the_sample_of_the_folder(self, finished: Path, data):
        found = predict_files(finished, [finished / "sample.npz"])
        assert list(found.classes) == load_run(finished).predict(data.test.images[:8])

    def test_colour_for_a_grey_network(self, finished: Path, data, tmp_path: Path):
        grey = data.test.images[0, 0].numpy()
        Image.fromarray(grey).save(tmp_path / "grey.png")
        Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "colour.png")
        np.save(tmp_path / "colour.npy", np.stack([grey] * 3, -1)[None])
        files = [tmp_path / name for name in ("grey.png", "colour.png", "colour.npy")]
        found = predict_files(finished, files)
        assert len(set(found.classes)) == 1
        assert found.probabilities == pytest.approx([found.probabilities[0]] * 3, abs=1e-4)

    def test_grey_for_a_colour_network(self, untrained, data, tmp_path: Path):
        run = untrained((3, 8, 8))
        grey = data.test.images[:1]
        assert torch.equal(probabilities(load_run(run), grey), probabilities(load_run(run), grey.repeat(1, 3, 1, 1)))

    def test_luma_of_a_red_image(self, untrained):
        model = load_run(untrained((1, 8, 8)))
        red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        red[:, 0] = 200
        assert torch.equal(
            probabilities(model, red), probabilities(model, torch.full((1, 1, 8, 8), 60, dtype=torch.uint8))
        )

    def test_more_images_than_a_chunk(self, untrained, tmp_path: Path):
        run = untrained((1, 8, 8))
        images = np.random.default_rng(0).integers(0, 256, (600, 8, 8), dtype=np.uint8)
        np.save(tmp_path / "many.npy", images)
        found = predict_files(run, [tmp_path / "many.npy"])
        whole = probabilities(load_run(run), torch.from_numpy(images[:, None]))
        assert found.probabilities == pytest.approx(whole.max(1).values.tolist(), abs=1e-5)

    def test_a_network_that_takes_no_pictures(self, untrained, tmp_path: Path):
        run = untrained((1, 8, 8), picture=False)
        np.save(tmp_path / "waves.npy", np.random.default_rng(0).normal(size=(5, 8, 8)))
        assert len(predict_files(run, [tmp_path / "waves.npy"]).classes) == 5
        np.save(tmp_path / "endless.npy", np.full((1, 8, 8), np.inf))
        with pytest.raises(UserError, match="the input must be finite floats"):
            predict_files(run, [tmp_path / "endless.npy"])
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="the network was not trained on pictures"):
            predict_files(run, [tmp_path / "a.png"])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("absent.png", None, "no such file"),
            ("text.txt", b"words", "not a readable image"),
            ("text.png", b"words", "not a readable image"),
            ("empty.png", b"", "not a readable image"),
            ("text.npy", b"words", "not a NumPy file of images"),
            ("empty.npy", b"", "not a NumPy file of images"),
            ("cut.npz", b"PK\x03\x04words", "not a NumPy file of images"),
            ("size.npy", np.zeros((2, 9, 8), np.uint8), r"images must be \(number, 8, 8, channels\), got \(2, 9, 8\)"),
            ("five.npy", np.zeros((2, 5, 8, 8), np.uint8), r"got \(2, 5, 8, 8\)"),
            ("none.npy", np.zeros((0, 8, 8), np.uint8), r"got \(0, 8, 8\)"),
            ("flat.npy", np.zeros(64, np.uint8), r"got \(64,\)"),
            (
                "large.npy",
                np.full((1, 8, 8), 256),
                r"whole numbers of 0..255 or floats in \[0, 1\], got int64 of 256..256",
            ),
            ("negative.npy", np.full((1, 8, 8), -1), "got int64 of -1..-1"),
            ("bytes.npy", np.full((1, 8, 8), 255.0), "got float64 of 255.0..255.0"),
            ("nan.npy", np.full((1, 8, 8), np.nan), "got float64 of nan..nan"),
            ("words.npy", np.full((1, 8, 8), "a"), "got <U1"),
        ],
    )
    def test_what_cannot_be_predicted(self, finished: Path, tmp_path: Path, name: str, content, message: str):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        with pytest.raises(UserError, match=message) as caught:
            predict_files(finished, [path])
        assert caught.value.where == path

    def test_objects_are_never_unpickled(self, finished: Path, tmp_path: Path):
        np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object))
        np.savez(tmp_path / "o.npz", images=np.array([{"a": 1}], dtype=object))
        np.savez(tmp_path / "nothing.npz")
        for name in ("o.npy", "o.npz"):
            with pytest.raises(UserError, match="not a NumPy file of images"):
                predict_files(finished, [tmp_path / name])
        with pytest.raises(UserError, match="the file holds no array"):
            predict_files(finished, [tmp_path / "nothing.npz"])

    def test_json(self, finished: Path):
        found = predict_files(finished, [finished / "sample.npz"])
        assert json.loads(json.dumps(found.to_dict())) == {
            "files": list(found.files), "classes": list(found.classes), "probabilities": list(found.probabilities)
        }  # fmt: skip


class TestExitCode:
    """A run whose accuracy goal was missed is finished, and exits 1; the same with the goal reached exits 0."""

    @pytest.mark.parametrize(("goal", "code"), [(0.999, 1), (0.01, 0)])
    def test_accuracy_goal(self, finished: Path, tmp_path: Path, goal: float, code: int):
        folder = tmp_path / "run"
        shutil.copytree(finished, folder)
        described = read_json(folder / "run.json")
        for part in ("options", "identity"):
            described[part]["accuracy_goal"] = goal
        write_json(folder / "run.json", described)
        figures = read_json(folder / "measurements.json")
        figures["goal"]["accuracy"] = goal
        write_json(folder / "measurements.json", figures)
        command = ["design", "digits", *ARGUMENTS, "--accuracy", str(goal), "--out", str(folder)]
        found = CliRunner().invoke(cli.app, command)
        assert found.exit_code == code, found.stderr
        assert ("points below the goal of 0.999" in found.stdout) == bool(code)
        found = CliRunner().invoke(cli.app, [*command, "--json"])
        assert found.exit_code == code
        assert json.loads(found.stdout)["goal_met"] is not bool(code)

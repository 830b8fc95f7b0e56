"""Random resized crops against torchvision, and where they come to lie."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import functional as theirs

from netwright.data.augment import rows
from netwright.data.crops import CenterCrop2, RandomResizedCrop


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 9, 14)])
@pytest.mark.parametrize("kind", [RandomResizedCrop, CenterCrop2])
def test_each_window_is_resized_as_torchvision_does(shape, kind):
    images = torch.rand(12, *shape, generator=generator())
    crop = kind()
    parameters = crop.draw(12, shape, generator(1))
    found = crop.apply(images, parameters)
    for image, ours, window in zip(images, found, parameters[0].tolist(), strict=True):
        expected = theirs.resized_crop(image, *window, list(shape[1:]), antialias=False)
        assert torch.allclose(ours, expected, atol=1e-5)


def test_the_whole_image_is_left_as_it_is():
    images = torch.rand(3, 2, 7, 7, generator=generator())
    assert torch.allclose(RandomResizedCrop((1, 1), (1, 1))(images, generator()), images, atol=1e-6)


def test_sizes_and_proportions():
    (windows,) = RandomResizedCrop((0.2, 0.6), (0.5, 2)).draw(4000, (1, 64, 64), generator())
    top, left, height, width = windows.unbind(1)
    area = height * width / 64**2
    assert float(area.min()) > 0.19
    assert float(area.max()) < 0.62
    assert abs(float(area.mean()) - 0.4) < 0.02
    proportion = (width / height).log()
    assert float(proportion.abs().max()) < math.log(2) + 0.05
    assert abs(float(proportion.mean())) < 0.03
    assert float(proportion.std()) == pytest.approx(2 * math.log(2) / 12**0.5, rel=0.05)
    assert bool((top >= 0).all() & (top + height <= 64).all() & (left >= 0).all() & (left + width <= 64).all())


def test_images_of_extreme_proportions():
    """Where no draw fits, the largest window of the nearest proportions."""
    (windows,) = RandomResizedCrop((1, 1)).draw(3, (1, 8, 80), generator())
    assert windows[:, 2:].tolist() == [[8, 11]] * 3
    (windows,) = RandomResizedCrop((1, 1)).draw(3, (1, 80, 8), generator())
    assert windows[:, 2:].tolist() == [[11, 8]] * 3


def places(crop: RandomResizedCrop, side: int = 32, count: int = 10_000) -> torch.Tensor:
    return crop.draw(count, (1, side, side), generator())[0][:, :2]


def test_every_place_is_as_likely_without_a_box():
    for crop, number in (
        (RandomResizedCrop((0.25, 0.25), (1, 1)), 17),
        (CenterCrop2((0.25, 0.25), (1, 1), (0, 0, 1, 1), 1), 16),  # floor never reaches the last place
    ):
        for axis in places(crop).T:
            counts = axis.bincount(minlength=number).double()
            assert len(counts) == number
            chi_square = float(((counts - 10_000 / number) ** 2 / (10_000 / number)).sum())
            assert chi_square < 45  # 0.0001 of the distribution with 16 degrees of freedom lie above


def test_the_box_and_its_borders():
    found = places(CenterCrop2((0.25, 0.25), (1, 1)))  # 16 of 32
    assert int(found.min()) >= 0
    assert int(found.max()) <= 16
    outer = (found < 4) | (found >= 12)
    assert bool((outer.float().mean(0) >= 0.8).all())
    inner = places(CenterCrop2((0.25, 0.25), (1, 1), (0.4, 0.5, 0.6, 0.5), 50.0))
    assert bool((inner[:, 1] == 8).all())  # no freedom: floor(32 / 2) - 8
    assert set(inner[:, 0].tolist()) <= set(range(4, 11))  # floor(12.8) - 8 .. floor(19.2) - 8
    assert bool((inner[:, 0] - 7).abs().double().mean() < 1)  # a large parameter keeps to the middle


def test_two_views_differ_more_the_nearer_to_the_borders():
    at_the_borders, in_the_middle = places(CenterCrop2(alpha=0.1)), places(CenterCrop2(alpha=5.0))
    gaps = [(p[::2] - p[1::2]).abs().double().mean() for p in (at_the_borders, in_the_middle)]
    assert gaps[0] > 1.5 * gaps[1]


def test_shares_of_a_batch_are_the_same_images():
    images, crop = torch.rand(8, 1, 10, 10, generator=generator()), CenterCrop2()
    parameters = crop.draw(8, (1, 10, 10), generator(1))
    whole = crop.apply(images, parameters)
    assert torch.equal(whole[3:5], crop.apply(images[3:5], rows(parameters, 3, 5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop((0.0, 1)), r"scale must be two ascending shares in \(0, 1\], got \(0.0, 1\)"),
        (lambda: RandomResizedCrop((0.5, 0.2)), "ascending"),
        (lambda: RandomResizedCrop(ratio=(0, 1)), "ratio must be"),
        (lambda: CenterCrop2(box=(-0.1, 0, 1, 1)), "box must be top, left, bottom, right"),
        (lambda: CenterCrop2(box=(0.6, 0, 0.4, 1)), "box must be"),
        (lambda: CenterCrop2(box=(0, 0, 1, 1.2)), "got .*1.2"),
        (lambda: CenterCrop2(alpha=0), "alpha must be > 0, got 0"),
        (lambda: CenterCrop2()(torch.rand(3, 8, 8), generator()), "images must have shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Colour jitter, greyscale and blur against torchvision, image by image."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional as theirs

from netwright.data.augment import HorizontalFlip, rows
from netwright.data.colour import ColourJitter, GaussianBlur, Greyscale, RandomApply, turned


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.rand(9, 3, 11, 13, generator=generator())


def test_colour_jitter_is_torchvisions_four_in_turn():
    jitter = ColourJitter(0.4, 0.4, 0.8, 0.3)
    parameters = jitter.draw(9, (3, 11, 13), generator(1))
    (light,), colour = parameters
    assert float(colour[:, 0].std()) > 0.1
    assert float(colour[:, 1].std()) > 0.05
    for i, ours in enumerate(jitter.apply(IMAGES, parameters)):
        image = theirs.adjust_contrast(theirs.adjust_brightness(IMAGES[i], float(light[i, 0])), float(light[i, 1]))
        image = theirs.adjust_hue(theirs.adjust_saturation(image, float(colour[i, 0])), float(colour[i, 1]))
        assert torch.allclose(ours, image, atol=1e-4)


def test_hue_turns_the_primaries():
    red, green = (torch.eye(3)[i].view(1, 3, 1, 1) for i in (0, 1))
    third = torch.full((1, 1, 1, 1), 1 / 3)
    assert torch.allclose(turned(red, third), green, atol=1e-5)
    assert torch.allclose(turned(green, -third), red, atol=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.equal(turned(grey, third), grey)
    assert torch.allclose(turned(IMAGES, torch.zeros(9, 1, 1, 1)), IMAGES, atol=1e-6)


def test_grey_images_have_brightness_and_contrast_alone():
    grey = IMAGES[:, :1]
    wild, calm = ColourJitter(0.4, 0.4, 1, 0.5), ColourJitter(0.4, 0.4, 0, 0)
    assert torch.equal(wild(grey, generator()), calm(grey, generator()))
    assert torch.equal(Greyscale(1.0)(grey, generator()), grey)


def test_greyscale():
    found = Greyscale(0.5)(IMAGES, generator(3))
    changed = (found != IMAGES).any(3).any(2).any(1)
    assert 0 < int(changed.sum()) < 9
    for image, ours in zip(IMAGES[changed], found[changed], strict=True):
        assert torch.allclose(ours, theirs.rgb_to_grayscale(image, 3), atol=1e-6)


@pytest.mark.parametrize("size", [3, 7])
def test_blur(size):
    blur = GaussianBlur((0.5, 2), size)
    parameters = blur.draw(9, (3, 11, 13), generator())
    for image, ours, sigma in zip(IMAGES, blur.apply(IMAGES, parameters), parameters[0].tolist(), strict=True):
        assert torch.allclose(ours, theirs.gaussian_blur(image, [size, size], [sigma, sigma]), atol=1e-5)
    wide = torch.rand(1, 1, 60, 60, generator=generator())
    assert torch.equal(GaussianBlur((1, 1))(wide, generator()), GaussianBlur((1, 1), 7)(wide, generator()))


def test_some_images_only():
    flip = RandomApply(HorizontalFlip(1.0), 0.3)
    many = torch.rand(1000, 1, 1, 2, generator=generator())
    changed = (flip(many, generator(1)) != many).any(3).flatten()
    assert abs(float(changed.float().mean()) - 0.3) < 0.05
    assert torch.equal(flip(many, generator(1))[changed], many[changed].flip(-1))


@pytest.mark.parametrize("step", [ColourJitter(), Greyscale(0.5), GaussianBlur(), RandomApply(GaussianBlur(), 0.5)])
def test_shares_of_a_batch_are_the_same_images(step):
    before = IMAGES.clone()
    parameters = step.draw(9, (3, 11, 13), generator(1))
    whole = step.apply(IMAGES, parameters)
    assert torch.equal(whole[2:7], step.apply(IMAGES[2:7], rows(parameters, 2, 7)))
    assert torch.equal(IMAGES, before)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColourJitter(brightness=2), r"brightness must lie in \[0, 1\], got 2"),
        (lambda: ColourJitter(saturation=-1), r"saturation must lie in \[0, 1\], got -1"),
        (lambda: ColourJitter(hue=0.6), r"hue must lie in \[0, 0.5\], got 0.6"),
        (lambda: Greyscale(1.5), r"p must lie in \[0, 1\], got 1.5"),
        (lambda: RandomApply(Greyscale(), -0.5), "got -0.5"),
        (lambda: GaussianBlur((0, 1)), "sigma must be two ascending numbers > 0"),
        (lambda: GaussianBlur(size=4), "size must be odd and >= 1, got 4"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

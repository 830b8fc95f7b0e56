"""Elastic deformation of batches against scipy, image by image, and its limits."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from netwright.data.elastic import Elastic, displaced, elastic_deform, smoothed
from netwright.explain import elastic_deform as exported


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shape", "sigma"), [((28, 28), 4.0), ((9, 17), 1.3), ((5, 6), 4.0), ((1, 8), 0.7)])
def test_smoothing_is_scipys_with_zeros_around(shape, sigma):
    fields = torch.randn(3, 2, *shape, generator=generator(), dtype=torch.float64)
    ours = smoothed(fields, sigma)
    for ours_one, field in zip(ours.flatten(0, 1), fields.flatten(0, 1), strict=True):
        theirs = ndimage.gaussian_filter(field.numpy(), sigma, mode="constant", cval=0.0)
        assert np.abs(ours_one.numpy() - theirs).max() < 1e-12


@pytest.mark.parametrize("shape", [(28, 28), (13, 20)])
def test_reading_is_scipys_of_order_one(shape):
    height, width = shape
    images = torch.rand(6, 3, height, width, generator=generator())
    fields = 3 * torch.randn(6, 2, height, width, generator=generator(1))
    ours = displaced(images, fields)
    assert (ours == 0).any()  # some places lie outside
    rows, columns = np.mgrid[:height, :width].astype(float)
    for i in range(6):
        down, right = fields[i].double().numpy()
        for channel in range(3):
            where = [rows + down, columns + right]
            theirs = ndimage.map_coordinates(images[i, channel].double().numpy(), where, order=1, cval=0.0)
            assert np.abs(ours[i, channel].numpy() - theirs).max() < 1e-4


def test_whole_deformation_is_the_published_one_on_the_same_noise():
    images = torch.rand(4, 1, 28, 28, generator=generator())
    noise = 2 * torch.rand(4, 2, 28, 28, generator=generator(7)) - 1  # what the augmentation draws
    ours = elastic_deform(images, 20, 4, generator(7))
    rows, columns = np.mgrid[:28, :28].astype(float)
    for i in range(4):
        down, right = (20 * ndimage.gaussian_filter(n.double().numpy(), 4, mode="constant") for n in noise[i])
        theirs = ndimage.map_coordinates(images[i, 0].double().numpy(), [rows + down, columns + right], order=1)
        assert np.abs(ours[i, 0].numpy() - theirs).max() < 1e-3


def test_whole_pixels_are_shifts_and_zero_is_the_identity():
    images = torch.rand(2, 2, 6, 5, generator=generator(), dtype=torch.float64)
    down = torch.zeros(2, 2, 6, 5)
    down[:, 0] = 2
    assert torch.allclose(displaced(images, down)[:, :, :4], images[:, :, 2:], atol=1e-12)
    assert not displaced(images, down)[:, :, 4:].any()
    assert torch.allclose(elastic_deform(images, alpha=0), images, atol=1e-12)


def test_size_of_the_displacements():
    (field,) = Elastic(20, 4).draw(40, (1, 96, 96), generator())
    inner = field[..., 24:-24, 24:-24]
    assert float(inner.std()) == pytest.approx(20 * (1 / 3 / (4 * np.pi)) ** 0.5 / 4, rel=0.05)
    apart = np.corrcoef(inner[:, 0].flatten(), inner[:, 1].flatten())[0, 1]
    assert abs(apart) < 0.1


def test_images_have_fields_of_their_own_and_the_generator_decides():
    same = torch.rand(1, 1, 28, 28, generator=generator()).expand(3, -1, -1, -1)
    out = elastic_deform(same, generator=generator(3))
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out, elastic_deform(same, generator=generator(3)))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = elastic_deform(same)
        torch.manual_seed(5)
        assert torch.equal(first, elastic_deform(same))
    assert exported is elastic_deform


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Elastic(alpha=-1), "alpha must be >= 0, got -1"),
        (lambda: Elastic(sigma=0), "sigma must be > 0, got 0"),
        (lambda: elastic_deform(torch.zeros(3, 8, 8)), r"x must have shape .* got \(3, 8, 8\)"),
        (lambda: elastic_deform(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "images must be floats, got torch.uint8"),
        (lambda: displaced(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 7)), r"displacement must be \(1, 2, 8, 8\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Augmentations against slow loops, torchvision and closed forms; draws for a batch can be shared out."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from netwright.data.augment import (
    CentreCrop,
    Compose,
    Cutout,
    HorizontalFlip,
    Jitter,
    RandomCrop,
    mixup,
    rows,
    standard,
    two_views,
)
from netwright.data.elastic import Elastic


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(16, 3, 9, 7, generator=generator(1))


ALL = [
    RandomCrop(2),
    CentreCrop((5, 4)),
    HorizontalFlip(),
    Cutout(3),
    Jitter(0.5, 0.5),
    Elastic(6, 2),
    Compose([RandomCrop(1), CentreCrop(5), Cutout(2)]),
]


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_deterministic_shared_out_and_not_in_place(augment, images):
    before = images.clone()
    whole = augment(images, generator())
    assert torch.equal(whole, augment(images, generator()))
    assert torch.equal(images, before)
    assert whole.shape == (16, *augment.shape_after((3, 9, 7)))
    parameters = augment.draw(16, (3, 9, 7), generator())
    shares = [augment.apply(images[a:b], rows(parameters, a, b)) for a, b in [(0, 5), (5, 16)]]
    assert torch.equal(whole, torch.cat(shares))
    if not isinstance(augment, CentreCrop):
        assert not torch.equal(whole, augment(images, generator(5)))
    with pytest.raises(ValueError, match="images must have shape"):
        augment(images[0], generator())


def test_random_crop_equals_a_loop_over_padded_images(images):
    crop = RandomCrop(2, fill=0.5)
    (offsets,) = crop.draw(16, (3, 9, 7), generator())
    padded = torch.nn.functional.pad(images, [2] * 4, value=0.5)
    loop = torch.stack([padded[i, :, y : y + 9, x : x + 7] for i, (y, x) in enumerate(offsets.tolist())])
    assert torch.equal(crop.apply(images, (offsets,)), loop)
    many = crop.draw(2000, (3, 9, 7), generator())[0]
    assert sorted(set(many.flatten().tolist())) == [0, 1, 2, 3, 4]


def test_crop_and_flip_serve_bytes_too():
    images = torch.randint(0, 256, (4, 1, 6, 6), dtype=torch.uint8, generator=generator())
    assert Compose([RandomCrop(1), HorizontalFlip()])(images, generator()).dtype == torch.uint8


def test_centre_crop_equals_torchvision(images):
    assert torch.equal(CentreCrop((5, 3))(images, generator()), functional.center_crop(images, [5, 3]))
    with pytest.raises(ValueError, match="at most"):
        CentreCrop(8)(images, generator())


def test_flip_mirrors_about_half_of_the_images():
    images = torch.rand(400, 1, 2, 3, generator=generator())
    flipped = HorizontalFlip()(images, generator())
    turned = (flipped == images.flip(-1)).all(-1).all(-1).squeeze(1)
    kept = (flipped == images).all(-1).all(-1).squeeze(1)
    assert bool((turned ^ kept).all())
    assert 160 < int(turned.sum()) < 240
    assert torch.equal(HorizontalFlip(0.0)(images, generator()), images)


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_cutout_equals_a_loop(size, images):
    cutout = Cutout(size, fill=[0.1, 0.2, 0.3])
    (centres,) = cutout.draw(16, (3, 9, 7), generator())
    loop = images.clone()
    for i, (y, x) in enumerate(centres.tolist()):
        top, left = y - size // 2, x - size // 2
        region = loop[i, :, max(0, top) : max(0, top + size), max(0, left) : max(0, left + size)]
        region.copy_(torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand_as(region))
    assert torch.equal(cutout.apply(images, (centres,)), loop)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_equals_torchvision(channels):
    images = torch.rand(8, channels, 6, 6, generator=generator())
    jitter = Jitter(0.5, 0.7)
    (factors,) = jitter.draw(8, (channels, 6, 6), generator())
    expected = torch.stack(
        [
            functional.adjust_contrast(functional.adjust_brightness(image, b), c)
            for image, (b, c) in zip(images, factors.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(jitter.apply(images, (factors,)), expected, rtol=0, atol=1e-6)
    many = jitter.draw(5000, (channels, 6, 6), generator())[0]
    assert many[:, 0].min() >= 0.5
    assert many[:, 0].max() <= 1.5
    assert many[:, 1].max() > 1.6
    with pytest.raises(ValueError, match="images must be floats"):
        jitter((images * 255).byte(), generator())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(0), "padding must be >= 1, got 0"),
        (lambda: Cutout(0), "size must be >= 1, got 0"),
        (lambda: CentreCrop(0), "size must be >= 1"),
        (lambda: HorizontalFlip(1.5), r"p must lie in \[0, 1\], got 1.5"),
        (lambda: Jitter(contrast=-1), r"contrast must lie in \[0, 1\], got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compose_with_nothing_is_the_identity(images):
    assert torch.equal(Compose()(images, generator()), images)


def test_two_views_differ_and_both_come_from_the_augmentation(images):
    first, second = two_views(images, RandomCrop(2), generator())
    assert not torch.equal(first, second)
    assert torch.equal(first, RandomCrop(2)(images, generator()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_mixup_solves_for_one_weight(symmetric):
    images, targets = torch.rand(32, 5, generator=generator()).double(), torch.eye(32).double()
    weights = []
    for seed in range(200):
        mixed, mixed_targets = mixup(images, targets, 1.0, generator(seed), symmetric=symmetric)
        torch.testing.assert_close(mixed, mixed_targets @ images)  # targets are the mixing matrix
        torch.testing.assert_close(mixed_targets.sum(1), torch.ones(32).double())
        own = mixed_targets.diagonal()
        weights.append(float(own[own < 1 - 1e-9][0]))  # but for the images mixed with themselves
    assert min(weights) >= (0.5 if symmetric else 0.0)
    expected = 0.75 if symmetric else 0.5  # means of max(u, 1 - u) and of u for Beta(1, 1)
    assert abs(np.mean(weights) - expected) < 0.06


def test_mixup_of_large_alpha_is_the_mean_and_bad_arguments_are_refused():
    mixed, _ = mixup(torch.tensor([[0.0], [1.0]]), torch.eye(2), 1e6, generator(3))
    assert all(min(abs(v - t) for t in (0.0, 0.5, 1.0)) < 0.01 for v in mixed.flatten().tolist())
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        mixup(torch.zeros(2, 1), torch.eye(2), 0, generator())
    with pytest.raises(ValueError, match=r"targets must have shape \(2, classes\)"):
        mixup(torch.zeros(2, 1), torch.zeros(2), 1.0, generator())


def kinds(policy):
    return [type(step).__name__ for step in policy.steps]


@pytest.mark.parametrize(
    ("shape", "name", "classes", "expected"),
    [
        ((1, 1, 40), "mnist1d", (), []),
        ((3, 40, 1), "own", (), []),
        ((1, 8, 8), "digits", (), ["RandomCrop"]),
        ((1, 28, 28), "mnist-5000", (), ["RandomCrop", "Cutout"]),
        ((1, 28, 28), "fashion-mnist", (), ["RandomCrop", "HorizontalFlip", "Cutout"]),
        ((3, 32, 32), "cifar100", (), ["RandomCrop", "HorizontalFlip", "Cutout"]),
        ((3, 64, 64), "birds", ("robin", "wren"), ["RandomCrop", "HorizontalFlip", "Cutout"]),
        ((1, 64, 64), "scans", ("a1", "b1"), ["RandomCrop", "Cutout"]),
        ((3, 64, 64), "my_SVHN", (), ["RandomCrop", "Cutout"]),
        ((3, 64, 64), "own", ("0", "1", "10"), ["RandomCrop", "Cutout"]),
        ((3, 64, 64), "own", ("A", "b"), ["RandomCrop", "Cutout"]),
        ((3, 64, 64), "hands", ("left hand", "right hand"), ["RandomCrop", "Cutout"]),
    ],
)
def test_the_default_policy(shape, name, classes, expected):
    assert kinds(standard(shape, name, classes=classes)) == expected


def test_the_default_policy_scales_and_refuses_swapped_arguments():
    crop, _, cutout = standard((3, 32, 32), "cifar10", mean=(0.4, 0.5, 0.6)).steps
    assert crop.padding == 4
    assert cutout.size == 16
    assert cutout.fill.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match="shape must be"):
        standard("cifar10", (3, 32, 32))

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn
from torch.utils.data import DataLoader

from netwright.data.condense import (
    QuantizedImageDataset,
    biharmonic,
    drop_patches,
    mean_of_kept,
    nearest_kept,
    patch_importance,
    restore,
)
from netwright.nn.activations import class_map
from netwright.seeding import seeded, stream

IMAGES = torch.randint(0, 256, (3, 2, 12, 8), dtype=torch.uint8, generator=stream(0, "images"))
IMPORTANCE = torch.rand(3, 6, generator=stream(0, "importance"))


def smooth():
    """Slow waves: what a photograph looks like at the scale of a few pixels."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 48), torch.linspace(0, 4, 64), indexing="ij")
    phase = torch.rand(4, 3, 1, 1, generator=stream(0, "phase")) * 6
    return (127.5 + 100 * torch.sin(x + phase) * torch.cos(y - phase)).round().to(torch.uint8)


def psnr(a, b):
    return 10 * torch.log10(255**2 / (a.float() - b.float()).square().mean())


@pytest.mark.parametrize("filler", [mean_of_kept, nearest_kept, biharmonic])
def test_nothing_dropped_is_nothing_changed(filler):
    assert torch.equal(restore(drop_patches(IMAGES, IMPORTANCE, 0, 4), filler), IMAGES)


@pytest.mark.parametrize("filler", [mean_of_kept, nearest_kept, biharmonic])
def test_kept_patches_are_the_same_bits(filler):
    patched = drop_patches(IMAGES, IMPORTANCE, 0.5, 4)
    whole = restore(patched, filler)
    _, mask = patched.canvas()
    assert torch.equal(torch.where(mask, whole, 0), torch.where(mask, IMAGES, 0))
    assert float(mask.float().mean()) == 0.5
    for i in range(3):  # the most important are those that are kept
        kept = patched.index[i].long()
        assert set(kept.tolist()) == set(IMPORTANCE[i].topk(3).indices.tolist())
        row, column = divmod(int(kept[0]), 2)
        assert torch.equal(patched.patches[i, 0], IMAGES[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


def test_bytes_are_three_quarters_and_the_index():
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    patched = drop_patches(images, torch.rand(10, 64), 0.25, 4)
    assert patched.nbytes == images.nbytes * 3 // 4 + 10 * 48
    assert drop_patches(torch.zeros(1, 1, 17, 17), torch.rand(1, 289), 0.5, 1).index.dtype == torch.uint16


def test_mean_and_nearest_by_hand():
    image = torch.tensor([[[[1.0, 2.0, 0.0, 0.0, 8.0]]]])
    mask = torch.tensor([[[[True, True, False, False, True]]]])
    assert mean_of_kept(image, mask).flatten().tolist() == pytest.approx([1, 2, 11 / 3, 11 / 3, 8])
    assert nearest_kept(image, mask).flatten().tolist() == [1, 2, 2, 8, 8]


def test_nearest_never_looks_at_another_image():
    images = torch.stack([torch.zeros(1, 6, 6), torch.full((1, 6, 6), 9.0)])
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[0], mask[1, :, 0, 0] = True, True
    assert torch.equal(nearest_kept(images * mask, mask), images)


def test_biharmonic_goes_on_along_slopes():
    """A plane bends nowhere, so it is what fills any gap in it, at the border too."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    plane = (3 * x - 2 * y + 5).repeat(2, 1, 1, 1)
    mask = torch.ones(2, 1, 16, 12, dtype=torch.bool)
    mask[0, :, 4:8, 4:8], mask[1, :, :4, :4] = False, False
    assert torch.allclose(biharmonic(torch.where(mask, plane, 0), mask), plane, atol=1e-3)


def test_biharmonic_is_nearer_than_the_mean():
    images = smooth()
    patched = drop_patches(images, torch.rand(4, 12, generator=stream(0, "i")), 0.2, 16)
    by = {f: float(psnr(restore(patched, f), images)) for f in (mean_of_kept, nearest_kept, biharmonic)}
    assert by[biharmonic] > by[mean_of_kept] + 3
    assert by[nearest_kept] > by[mean_of_kept]


def test_a_module_may_fill():
    class Half(nn.Module):
        def forward(self, images, mask):
            return torch.full_like(images, 127.6)

    patched = drop_patches(IMAGES, IMPORTANCE, 0.5, 4)
    _, mask = patched.canvas()
    assert set(restore(patched, Half())[~mask.expand_as(IMAGES)].tolist()) == {128}


def test_importance_is_the_mean_of_the_map_over_each_patch():
    with seeded(0, "init"):
        net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3)).eval()
    images = IMAGES.float() / 255
    found = patch_importance(net, images, patch=4)
    places = class_map(net, images)
    assert found.shape == (3, 6)
    assert torch.corrcoef(torch.stack([found.flatten(), nn.functional.avg_pool2d(places, 4).flatten()]))[0, 1] > 0.8


def test_data_set_reads_single_images_and_batches_alike():
    data = QuantizedImageDataset(drop_patches(IMAGES, IMPORTANCE, 0.5, 4), torch.tensor([2, 0, 1]), nearest_kept)
    (x, y), *more = DataLoader(data, batch_size=3)
    assert not more
    assert y.tolist() == [2, 0, 1]
    assert all(torch.equal(data[i][0], x[i]) for i in range(3))
    assert torch.equal(x * 255, restore(data.patched, nearest_kept).float())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: drop_patches(IMAGES, IMPORTANCE, 1.0, 4), r"drop_ratio must lie in \[0, 1\), got 1.0"),
        (lambda: drop_patches(IMAGES, IMPORTANCE, -0.1, 4), "drop_ratio"),
        (lambda: drop_patches(IMAGES, IMPORTANCE, 0.1, 5), "patch must divide the size of the images, 12 x 8, got 5"),
        (lambda: drop_patches(IMAGES, IMPORTANCE[:, :5], 0.1, 4), r"importance must have shape \(3, 6\)"),
        (lambda: patch_importance(nn.Conv2d(2, 1, 1), IMAGES.float(), patch=3), "patch must divide"),
        (lambda: restore(drop_patches(IMAGES, IMPORTANCE, 0.5, 4), lambda x, m: x[:1]), "inpainter must give"),
        (
            lambda: QuantizedImageDataset(drop_patches(IMAGES.float(), IMPORTANCE, 0.5, 4), torch.zeros(3)),
            "uint8",
        ),
        (lambda: QuantizedImageDataset(drop_patches(IMAGES, IMPORTANCE, 0.5, 4), torch.zeros(2)), "labels must be 3"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_are_restored_better_by_the_biharmonic_filler(name):
    """A fifth of the patches dropped at random, as in the paper but for the choice."""
    photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None, :, 64:224, 200:360]
    patched = drop_patches(photo, torch.rand(1, 100, generator=stream(0, name)), 0.2, 16)
    by = {f: float(psnr(restore(patched, f), photo)) for f in (mean_of_kept, biharmonic)}
    assert by[biharmonic] > by[mean_of_kept]

"""Training a masked autoencoder: the loss, the masks, and gaps that are filled better than by a mean."""

import pytest
import torch

from netwright.data import Batches, TensorImages
from netwright.data.condense import drop_patches, mean_of_kept, restore
from netwright.nn.masked_autoencoder import MaskedAutoencoder
from netwright.seeding import seeded, stream
from netwright.train import PatchDrawing, fit_masked_autoencoder


def ramps(count, seed):
    """Brightness that rises in a random direction: a gap follows from what is around it, and not from its mean."""
    slopes = torch.rand(count, 2, 1, 1, generator=stream(seed, "slopes")) * 2 - 1
    row, column = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij")
    images = 127.5 + 60 * (slopes[:, 0] * row + slopes[:, 1] * column)
    return images[:, None].to(torch.uint8)


def network(**options):
    small = {"dim": 48, "depth": 2, "heads": 4, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
    with seeded(0, "init"):
        return MaskedAutoencoder((1, 12, 12), 3, **small | options)


def test_the_loss_is_the_error_on_what_is_dropped():
    net = network().eval()
    module, images = PatchDrawing(net, 0.5), ramps(4, 0) / 255
    kept = module.drawn_mask(4)
    assert kept.sum(1).tolist() == [8] * 4
    standard = net.standardised(images)
    with torch.no_grad():
        error = (net.predict(standard, kept) - net.patches(standard)) ** 2
        expected = sum(error[i, j].mean() for i in range(4) for j in range(16) if not kept[i, j]) / (4 * 8)
        assert float(module.loss(images, kept)) == pytest.approx(float(expected), rel=1e-5)


def test_every_patch_is_dropped_as_often():
    with seeded(0, "masks"):
        kept = PatchDrawing(network(), 0.75).drawn_mask(4000).float().mean(0)
    assert torch.allclose(kept, torch.full((16,), 0.25), atol=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_gaps_are_filled_better_than_by_the_mean():
    images, net = ramps(512, 1), network()
    data = Batches(TensorImages(images, torch.zeros(512, dtype=torch.long)), 16)
    history = fit_masked_autoencoder(net, data, epochs=8, drop_ratio=0.25, lr=3e-3)
    assert history.last["train_loss"] < history.epochs[0]["train_loss"]
    assert net.training
    fresh = ramps(64, 2)
    patched = drop_patches(fresh, torch.rand(64, 16, generator=stream(0, "importance")), 0.25, 3)

    def error(filler):
        return float((restore(patched, filler).float() - fresh.float()).square().mean())

    assert error(net.eval()) < 0.25 * error(mean_of_kept)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drop_ratio": 0.0}, r"drop_ratio must lie in \(0, 1\), got 0"),
        ({"drop_ratio": 1.0}, "drop_ratio must lie in"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    ],
)
def test_bad_input(options, told):
    with pytest.raises(ValueError, match=told):
        PatchDrawing(network(), **options)

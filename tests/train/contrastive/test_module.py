"""Training of a host: it learns, goes on bit for bit, keeps the predictor's rate; views and their policies."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.data import Batches, Normalise, TensorImages
from netwright.data.augment import HorizontalFlip
from netwright.data.crops import CenterCrop2, RandomResizedCrop
from netwright.seeding import seeded
from netwright.train.contrastive import (
    ContrastiveModule,
    MoCo,
    SimCLR,
    SimSiam,
    TwoViews,
    fit_contrastive,
    policy,
)
from netwright.train.contrastive.module import views_of
from netwright.train.hallucinator import Hallucinator

NORMALISE = Normalise([0.4], [0.2])


def images(count: int = 96) -> TensorImages:
    """Three textures, each image with blobs of its own."""
    labels, textures = torch.arange(count) % 3, torch.zeros(3, 12, 12)
    textures[0, ::3] = textures[1, :, ::3] = textures[2, ::2, ::2] = 80
    blobs = torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = functional.interpolate(blobs, size=12, mode="bilinear")
    return TensorImages((textures[labels][:, None] + 170 * smooth).byte(), labels)


def backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def made(kind: str, hallucinate: bool = True) -> nn.Module:
    with seeded(0, "init"):
        h = Hallucinator(16) if hallucinate else None
        if kind == "simclr":
            return SimCLR(backbone, 16, 0.2, h)
        if kind == "moco":
            return MoCo(backbone, 16, 64, 0.9, 0.2, hallucinator=h)
        return SimSiam(backbone, 16, 4, h)


def batches() -> Batches:
    return Batches(images(), 32, augment=TwoViews(RandomResizedCrop((0.4, 1))), normalise=NORMALISE)


@pytest.mark.parametrize("kind", ["simclr", "moco"])
def test_views_of_one_image_draw_together(kind):
    module = made(kind)
    views = TwoViews(RandomResizedCrop((0.4, 1)))(images().images / 255, torch.Generator().manual_seed(7))

    def found() -> float:
        with torch.no_grad():
            first, second = (module.eval().embed(NORMALISE(view)) for view in views.unbind(1))
        cosines = first @ second.T
        return (cosines.diagonal().mean() - cosines.mean()).item()

    assert found() < 0.01
    fit_contrastive(module, batches(), epochs=8, lr=0.1)
    assert found() > 0.05


def test_a_view_predicts_the_other():
    history = fit_contrastive(made("simsiam"), batches(), epochs=8, lr=0.1)
    losses = [epoch["train_loss"] for epoch in history.epochs]
    assert -1 <= losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("kind", ["moco", "simsiam"])
def test_a_stopped_run_goes_on_bit_for_bit(kind, tmp_path):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (2, 1):
                raise RuntimeError("killed")

    whole, stopped, again = made(kind), made(kind), made(kind)
    fit_contrastive(whole, batches(), epochs=4)
    with pytest.raises(RuntimeError, match="killed"):
        fit_contrastive(stopped, batches(), epochs=4, checkpoint=tmp_path / "a.ckpt", callbacks=[Stop()])
    fit_contrastive(again, batches(), epochs=4, checkpoint=tmp_path / "a.ckpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_schedule_and_groups():
    module, seen = made("simsiam"), []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    fit_contrastive(module, batches(), epochs=3, lr=0.2, weight_decay=0.01, callbacks=[Watch()])
    rest, predictor = zip(*seen, strict=True)
    assert set(predictor) == {0.2}
    assert list(rest) == sorted(rest, reverse=True)
    assert rest[0] > 0.19
    assert rest[-1] < 0.01
    optimizer = ContrastiveModule(module, lr=0.2, weight_decay=0.01).configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01]


def test_labels_are_not_looked_at():
    data = images()
    found = []
    for labels in (data.labels, torch.zeros_like(data.labels)):
        module = made("simclr")
        source = Batches(TensorImages(data.images, labels), 32, augment=TwoViews(RandomResizedCrop()))
        fit_contrastive(module, source, epochs=1)
        found.append(module.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_two_views():
    both = TwoViews(HorizontalFlip(0.0), HorizontalFlip(1.0))
    x = torch.rand(3, 1, 4, 4)
    views = both(x, torch.Generator())
    assert torch.equal(views[:, 0], x)
    assert torch.equal(views[:, 1], x.flip(-1))
    (x1, _), *_ = Batches(images(), 8, augment=TwoViews(RandomResizedCrop()), seed=3)
    assert x1.shape == (8, 2, 1, 12, 12)
    halves = [
        next(iter(Batches(images(), 8, augment=TwoViews(RandomResizedCrop()), seed=3, rank=rank, world=2)))[0]
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), x1)


def test_policies():
    def kinds(*given, **more):
        return [type(step).__name__ for step in policy(*given, **more).first.steps]

    assert kinds((1, 28, 28), "fashion-mnist") == ["RandomResizedCrop", "HorizontalFlip", "RandomApply"]
    assert kinds((1, 28, 28), "mnist-5000", crop="center") == ["CenterCrop2", "RandomApply"]
    assert kinds((3, 32, 32), "cifar10")[-1] == "Greyscale"
    assert kinds((3, 96, 96), "birds") == [
        "RandomResizedCrop",
        "HorizontalFlip",
        "RandomApply",
        "Greyscale",
        "RandomApply",
    ]
    small, large = (policy((3, side, side), crop="center", warmup=0).first.steps[0] for side in (32, 96))
    assert isinstance(small, CenterCrop2)
    assert (small.box, small.alpha, large.box, large.alpha) == (
        (0.25, 0.25, 0.75, 0.75),
        0.1,
        (0.2, 0.2, 0.8, 0.8),
        0.6,
    )
    views = policy((3, 96, 96), crop="center")(torch.rand(4, 3, 96, 96), torch.Generator().manual_seed(0))
    assert views.shape == (4, 2, 3, 96, 96)


def test_crops_about_the_middle_wait_where_images_are_large():
    assert isinstance(policy((3, 64, 64), crop="center").first.steps[0], CenterCrop2)
    views = policy((1, 96, 96), crop="center")
    assert views.first.steps[0].epochs == 20
    small = policy((1, 12, 12), crop="center", warmup=2)
    plain, later = policy((1, 12, 12)), policy((1, 12, 12), crop="center", warmup=0)
    made = [Batches(images(), 32, augment=each, seed=3) for each in (small, plain, later)]
    for epoch in range(4):
        waiting, first, then = (_batch(each, epoch) for each in made)
        assert torch.equal(waiting, first) == (epoch < 2)
        assert torch.equal(waiting, then) == (epoch >= 2)


def _batch(batches: Batches, epoch: int) -> torch.Tensor:
    batches.set_epoch(epoch)
    return next(iter(batches))[0]


def test_version_1_of_moco():
    views = policy((3, 96, 96), "birds", version=1)
    assert [type(step).__name__ for step in views.first.steps] == [
        "RandomResizedCrop", "HorizontalFlip", "Greyscale", "ColourJitter",
    ]  # fmt: skip
    assert views.first.steps[-1].hue == 0.4
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit_contrastive(made("moco"), batches(), epochs=10, lr=0.1, schedule="step", callbacks=[Watch()])
    assert seen == pytest.approx([0.1] * 18 + [0.01] * 6 + [0.001] * 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContrastiveModule(made("simclr"), lr=0), "lr must be > 0 and finite, got 0"),
        (lambda: ContrastiveModule(made("simclr"), momentum=1), r"momentum must lie in \[0, 1\), got 1"),
        (lambda: ContrastiveModule(made("simclr"), weight_decay=-1), "weight_decay must be >= 0 and finite, got -1"),
        (
            lambda: views_of((torch.zeros(4, 1, 8, 8), torch.zeros(4))),
            r"must begin with two views.* got \(4, 1, 8, 8\)",
        ),
        (lambda: views_of([["a", "b"]]), "got list"),
        (lambda: policy((1, 28, 28), crop="middle"), "crop must be one of random, center, got 'middle'"),
        (lambda: policy((1, 28, 28), version=3), "version must be 1 or 2, got 3"),
        (lambda: policy((1, 28, 28), crop="center", warmup=-1), "warmup must be >= 0, got -1"),
        (lambda: ContrastiveModule(made("simclr"), schedule="steps"), "schedule must be one of cosine, step, got"),
        (lambda: ContrastiveModule(made("simclr"), schedule="step", warmup=0.1), "warmup must be 0 with schedule"),
        (lambda: policy((1, 1, 40)), r"at least 4 x 4 pixels, got \(1, 1, 40\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""NaTra under Lightning: what the module is given, what is added to its loss, other methods beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright import storage
from netwright.console import UserError
from netwright.data import Batches, Normalise, TensorImages
from netwright.seeding import seeded, stream
from netwright.train import Classifier, fit
from netwright.train.callbacks import ELRCallback, ELRPlusCallback, NaTraTraining, PSKDCallback
from netwright.train.natra import (
    Groundwork,
    LatentCodes,
    NaturalTransform,
    Prepared,
    Recipe,
    StyleGenerator,
    fit_style_autoencoder,
    latent_directions,
    lay_groundwork,
    prepare_natural_transform,
)
from netwright.train.natra.fitting import _AutoEncoding
from netwright.train.natra.sharpening import _Sharpening

N, BATCH = 32, 8


def network() -> nn.Sequential:
    with seeded(0, "init"):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def pictures() -> TensorImages:
    images = torch.randint(0, 256, (N, 1, 8, 8), dtype=torch.uint8, generator=stream(0, "x"))
    return TensorImages(images, torch.arange(N) % 3)


def transform() -> NaturalTransform:
    with seeded(0, "style"):
        generator = StyleGenerator((1, 8, 8), w_dim=4, channels=(6, 6))
    w = torch.randn(N, 1, 3, 4, generator=stream(0, "w"))
    axes = latent_directions(generator, "pca", k=3)
    axes = dataclasses.replace(axes, scale=5 * axes.scale)  # an untrained generator changes little
    return NaturalTransform(generator, LatentCodes(w), axes, pictures().images / 255)


NORMALISE = Normalise((0.5,), (0.25,))


def batches() -> Batches:
    return Batches(pictures(), BATCH, seed=1, indexed=True, normalise=NORMALISE)


def train(callbacks, epochs: int = 2, module=None):
    module = Classifier(network(), lr=0.05) if module is None else module
    fit(module, batches(), epochs=epochs, callbacks=callbacks)
    return module


class Plain(lightning.LightningModule):
    """A user's own module with a loss as a part, and a step that wants pairs."""

    def __init__(self, manual: bool = False):
        super().__init__()
        self.net, self.loss = network(), nn.CrossEntropyLoss()
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(self(x), y)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def uphill(net, source, index, y, eps_max: float) -> torch.Tensor:
    """Five steps of the sign of the slope from the images themselves, and the worst on the way."""
    coeff = torch.zeros(len(index), source.num_directions)
    way, losses = [], []
    for _ in range(6):
        coeff.requires_grad_()
        shift = (coeff * source.directions.scale) @ source.directions.vectors
        w = source.codes.w[index, 0]
        made = source.generator.synthesis(w + shift[:, None]) - source.generator.synthesis(w)
        images = (source.images[index] + made).clamp(0, 1)
        loss = functional.cross_entropy(net(NORMALISE(images)), y, reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), coeff)
        way.append(images.detach())
        losses.append(loss.detach())
        coeff = (coeff.detach() + eps_max / 4 * slope.sign()).clamp(-eps_max, eps_max)
    return torch.stack(way)[torch.stack(losses).argmax(0), torch.arange(len(index))]


def by_hand(source, search: str, beta: float, gamma: float, eps_max: float) -> nn.Module:
    """The same in a loop."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    data = batches()
    for epoch in range(2):
        data.set_epoch(epoch)
        draws = torch.rand(4 if search == "worst_of_k" else 1, N, 2, generator=stream(5, "natra", epoch))
        for x, y, index in data:
            worst, loss = None, torch.full((len(x),), -1.0)
            net.eval()
            for pairs in draws:
                moved = source.at(index, *source.choose(pairs[index], eps_max))
                with torch.no_grad():
                    found = functional.cross_entropy(net(NORMALISE(moved)), y, reduction="none")
                more = (found > loss)[:, None, None, None]
                worst = moved if worst is None else torch.where(more, moved, worst)
                loss = torch.maximum(loss, found)
            if search == "pgd":
                worst = uphill(net, source, index, y, eps_max)
            net.train()
            here, there = net(torch.cat([x, NORMALISE(worst)])).chunk(2)
            total = functional.cross_entropy(here, y) + beta * functional.cross_entropy(there, y)
            p = here.softmax(1)
            total = total + gamma * (p * (here.log_softmax(1) - there.log_softmax(1))).sum(1).mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return net


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(
    ("search", "beta", "gamma"), [("worst_of_k", 1.0, 0.0), ("random", 0.5, 2.0), ("pgd", 1.0, 0.0)]
)
def test_it_is_the_loop_that_one_would_write(search, beta, gamma, manual):
    source = transform()
    method = NaTraTraining(source, search, 4, beta, gamma, 1.5, seed=5, normalise=NORMALISE)
    module = train([method], module=Plain(manual))
    expected = by_hand(source, search, beta, gamma, 1.5).state_dict()
    for name, value in module.net.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


@pytest.mark.parametrize("indexed", [False, True])
def test_without_weight_it_is_plain_training_bit_for_bit(indexed):
    plain = Classifier(network(), lr=0.05)
    fit(plain, Batches(pictures(), BATCH, seed=1, normalise=NORMALISE), epochs=2)
    module = train([NaTraTraining(transform() if indexed else None, beta=0.0)])
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in plain.state_dict().items())
    other = train([NaTraTraining(transform(), normalise=NORMALISE)])
    assert not torch.allclose(other.network[0].weight, plain.network[0].weight)


def test_statistics_are_those_of_both_kinds_of_images():
    seen = []
    module = Classifier(network(), lr=0.05)
    module.network[1].register_forward_hook(lambda part, given, out: seen.append((part.training, len(given[0]))))
    train([NaTraTraining(transform(), k=3)], epochs=1, module=module)
    assert seen[:4] == [(False, 3 * BATCH), (True, 2 * BATCH)] * 2
    assert int(module.network[1].num_batches_tracked) == N // BATCH
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert "training_step" not in module.__dict__


def test_a_grid_is_the_transformation_at_its_steps():
    source = transform()
    grid = source.grid(2.0, values=2)
    first, second = (train([NaTraTraining(grid, "random")], epochs=1).network[0].weight.detach() for _ in range(2))
    assert torch.equal(first, second)

    class Snapped(NaturalTransform):
        def choose(self, draws, eps_max):
            return grid.choose(draws, eps_max)

    same = Snapped(source.generator, source.codes, source.directions, source.images)
    exact = train([NaTraTraining(same, "random")], epochs=1).network[0].weight.detach()
    other = train([NaTraTraining(source, "random")], epochs=1).network[0].weight.detach()
    assert float((first - exact).abs().max()) < 0.4 * float((first - other).abs().max())  # a byte a pixel


def test_pgd_needs_a_gradient():
    with pytest.raises(ValueError, match="'pgd' needs a NaturalTransform"):
        NaTraTraining(transform().grid(), "pgd")


def test_beside_methods_that_remember_examples():
    natra, pskd, elr = NaTraTraining(transform(), k=2), PSKDCallback(0.9), ELRCallback()
    module = train([natra, pskd, elr], epochs=3)
    assert bool(pskd.targets.seen.all())
    assert torch.allclose(elr.target.sum(1), torch.full((N,), 1 - 0.7**3), atol=1e-5)
    alone = PSKDCallback(0.9)
    without = train([alone, ELRCallback()], epochs=3)
    assert not torch.allclose(module.network[0].weight, without.network[0].weight)
    assert all(bool(part.isfinite().all()) for part in module.parameters())
    with pytest.raises(ValueError, match=r"ELR\+ mixes examples"):
        train([NaTraTraining(transform()), ELRPlusCallback()])


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path):
    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    def run(*more, checkpoint=None):
        module = Classifier(network(), lr=0.05)
        fit(module, batches(), epochs=3, callbacks=[NaTraTraining(transform()), *more], checkpoint=checkpoint)
        return module

    whole = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(Stop(), checkpoint=tmp_path / "a.ckpt")
    again = run(checkpoint=tmp_path / "a.ckpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"search": "best"}, ValueError, "search must be one of"),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": 2.5}, TypeError, "k must be a whole number"),
        ({"beta": -1.0}, ValueError, "beta must be >= 0 and finite, got -1"),
        ({"gamma": float("nan")}, ValueError, "gamma must be >= 0"),
        ({"eps_max": 0.0}, ValueError, "eps_max must be > 0 and finite, got 0"),
        ({"num_codes": 0}, ValueError, "num_codes must be a whole number >= 1"),
        ({"generator_steps": 0.5}, ValueError, "generator_steps must be a whole number"),
        ({"directions": "svd"}, ValueError, "directions must be 'weights' or 'pca'"),
        ({"max_flip": 2.0}, ValueError, r"max_flip must lie in \[0, 1\]"),
        ({"min_change": "a"}, ValueError, "min_change must be >= 0"),
        ({"source": 3}, TypeError, "source must be a NaturalTransform or a TransformGrid, got int"),
        ({"unlabelled": 7}, TypeError, "unlabelled must be a path"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        NaTraTraining(**change)


def test_bad_training():
    with pytest.raises(RuntimeError, match="no transformations: give source"):
        train([NaTraTraining()])
    with pytest.raises(ValueError, match="NaTra needs batches"):
        fit(Classifier(network()), Batches(pictures(), BATCH), epochs=1, callbacks=[NaTraTraining(transform())])
    source = transform()

    class Thief(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *source.generator.parameters()], lr=0.1)

    with pytest.raises(RuntimeError, match="the generator must stay as it is"):
        train([NaTraTraining(source)], module=Thief(network()))
    source.generator.requires_grad_(False)
    train([NaTraTraining(source)], epochs=1, module=Thief(network()))


@pytest.mark.parametrize("make", [lambda: transform(), lambda: transform().grid()])
def test_transformations_of_other_images_are_refused(make):
    source = make()
    for rows in (range(N - 1), [*range(N), 0]):
        other = Batches(pictures().subset(rows), BATCH, seed=1, indexed=True)
        with pytest.raises(ValueError, match=rf"must be the {N} images that source transforms, got {len(rows)}"):
            fit(Classifier(network()), other, epochs=1, callbacks=[NaTraTraining(source, "random")])
        fit(Classifier(network()), other, epochs=1, callbacks=[NaTraTraining(source, "random", beta=0.0)])

    class Bare:
        """Batches that tell no data set."""

        def __iter__(self):
            return iter(batches())

        def __len__(self):
            return len(batches())

        def set_epoch(self, epoch):
            pass

    fit(Classifier(network()), Bare(), epochs=1, callbacks=[NaTraTraining(source, "random")])


def test_images_are_standardised_where_they_are():
    method, like = NaTraTraining(normalise=NORMALISE), torch.empty(0, device="meta")
    assert method._given(torch.empty(2, 1, 8, 8, device="meta"), like).device.type == "meta"
    assert method._given(torch.rand(2, 1, 8, 8), like).device.type == "meta"
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(method._given(x, x), NORMALISE(x))
    assert NORMALISE.mean.device.type == "cpu"
    assert torch.equal(NaTraTraining(normalise=lambda images: 2 * images)._given(x, x), 2 * x)


def blobs(count: int = 96) -> TensorImages:
    """Bright spots left or right, of varying brightness."""
    draws = stream(0, "blobs")
    labels = torch.arange(count) % 2
    level = 100 + torch.randint(0, 156, (count, 1, 1), generator=draws)
    images = torch.randint(0, 30, (count, 8, 8), generator=draws)
    columns = torch.arange(8)
    inside = torch.where(labels[:, None] == 0, columns < 4, columns >= 4)[:, None, :].expand(count, 8, 8)
    images = torch.where(inside, level, images)
    return TensorImages(images.byte()[:, None], labels)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    data = blobs()
    recipe = Recipe(
        generator_steps=80, w_dim=6, inversion_steps=5, reference_epochs=6, min_change=0.005, max_directions=3
    )
    return prepare_natural_transform(data.images, data.labels, unlabelled=blobs(64).images, recipe=recipe)


def test_what_is_prepared(prepared):
    transform, x = prepared.transform, blobs().images / 255
    assert prepared.reconstruction < 0.5 * float((x - x.mean(0)).square().mean())
    assert prepared.reference > 0.9
    assert 1 <= transform.num_directions <= 3
    assert all(flip <= 0.1 for flip in transform.directions.flip)
    assert all(change >= 0.005 for change in transform.directions.change)
    index = torch.arange(8)
    assert torch.equal(transform(index, torch.zeros(8, transform.num_directions)), x[:8])
    assert not any(part.requires_grad for part in transform.generator.parameters())


def test_kept_and_read_again(prepared, tmp_path):
    path, x = tmp_path / "natra.safetensors", blobs().images
    prepared.save(path)
    again = Prepared.load(path, x)
    index, coeff = torch.arange(6), torch.ones(6, prepared.transform.num_directions)
    assert torch.equal(prepared.transform(index, coeff), again.transform(index, coeff))
    assert again.figures() == prepared.figures()
    with pytest.raises(UserError, match="no natural transformations of these images"):
        Prepared.load(path, x[:5])
    assert torch.equal(Prepared.load(path, x / 255).transform.images, prepared.transform.images)
    for others in (x.roll(1, 0), 255 - x):  # as many, and of the same shape
        with pytest.raises(UserError, match="it was made of other images"):
            Prepared.load(path, others)
    about = json.loads(storage.read_metadata(path)["natra"]) | {"version": 1}
    storage.write_tensors(tmp_path / "old.safetensors", storage.read_tensors(path), {"natra": json.dumps(about)})
    with pytest.raises(UserError, match="these images: version 1"):  # which told no images
        Prepared.load(tmp_path / "old.safetensors", x)
    (tmp_path / "bad.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        Prepared.load(tmp_path / "bad.safetensors", x)


def test_all_of_it_is_kept(prepared, tmp_path):
    path, x, transform = tmp_path / "natra.safetensors", blobs().images, prepared.transform
    axes = dataclasses.replace(transform.directions, layers=(1, 3), step=3.0)
    other = NaturalTransform(transform.generator, transform.codes, axes, transform.images, keep_residual=False)
    dataclasses.replace(prepared, transform=other).save(path)
    again = Prepared.load(path, x)
    assert again.transform.directions.layers == (1, 3)
    assert again.transform.keep_residual is False
    assert again.figures()["step"] == 3.0
    index, coeff = torch.arange(6), torch.ones(6, transform.num_directions)
    assert torch.equal(other(index, coeff), again.transform(index, coeff))
    assert not torch.equal(other(index, coeff), transform(index, coeff))
    about = json.loads(storage.read_metadata(path)["natra"])  # as earlier versions wrote it
    del about["layers"], about["keep_residual"], about["figures"]["step"]
    storage.write_tensors(path, storage.read_tensors(path), {"natra": json.dumps(about)})
    old = Prepared.load(path, x)
    assert old.transform.directions.layers is None
    assert old.transform.keep_residual is True
    assert old.figures()["step"] == 2.0


def test_directions_are_looked_at_as_far_as_they_are_stepped(prepared, monkeypatch):
    assert NaTraTraining(eps_max=3).recipe.step == 3.0
    assert NaTraTraining(eps_max=1.0).recipe.step == NaTraTraining().recipe.step == 2.0
    assert prepared.transform.directions.step == 2.0
    data, seen = blobs(), []

    def looked(directions, generator, classifier, codes, max_flip, min_change, step, **options):
        seen.append(step)
        return dataclasses.replace(directions.select([0]), flip=(0.0,), change=(1.0,), step=step)

    monkeypatch.setattr("netwright.train.natra.preparing.filter_directions", looked)
    recipe = Recipe(generator_steps=1, w_dim=4, inversion_steps=0, reference_epochs=1, step=3.5)
    found = prepare_natural_transform(data.images, data.labels, recipe=recipe)
    assert seen == [3.5]
    assert found.figures()["step"] == 3.5
    for step in (0.0, -1.0, float("inf"), "far"):
        with pytest.raises(ValueError, match="step must be > 0 and finite, got"):
            Recipe(step=step)


def test_an_epoch_of_the_generator_has_other_images_than_the_one_before(monkeypatch):
    def numbered(count: int, first: int) -> torch.Tensor:
        images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(first, first + count)
        return images

    images, unlabelled, seen = numbered(100, 0), numbered(92, 100), {"_AutoEncoding": [], "_Sharpening": []}

    def spy(owner: type, term: str) -> None:
        plain = getattr(owner, term)

        def spied(self, x):
            seen[owner.__name__].append(x[:, 0, 0, 0].mul(255).round().int().tolist())
            return plain(self, x)

        monkeypatch.setattr(owner, term, spied)

    spy(_AutoEncoding, "terms")
    spy(_Sharpening, "critic_terms")
    monkeypatch.setattr("netwright.train.natra.groundwork.GENERATOR_IMAGES", 64)
    recipe = Recipe(generator_steps=3, gan_steps=3, w_dim=4, inversion_steps=0, reference_epochs=1)
    lay_groundwork(images, torch.arange(100) % 2, unlabelled=unlabelled, recipe=recipe, seed=0)
    for name, steps in seen.items():
        assert [len(step) for step in steps] == [64] * 3, name
        assert sorted(itertools.chain(*steps)) == list(range(192)), name
    with pytest.raises(ValueError, match="epoch_images must be >= 1, got 0"):
        fit_style_autoencoder(images, epoch_images=0)


def test_groundwork_is_kept_as_it_is_made(tmp_path, monkeypatch):
    data, path = blobs(), tmp_path / "natra-generator.safetensors"
    recipe = Recipe(generator_steps=6, w_dim=6, inversion_steps=2, reference_epochs=1)

    def lay(keep=path, **options):
        return lay_groundwork(data.images, data.labels, unlabelled=None, recipe=recipe, seed=0, keep=keep, **options)

    with monkeypatch.context() as patched:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patched.setattr("netwright.train.natra.groundwork.reference_classifier", stop)
        with pytest.raises(KeyboardInterrupt):
            lay()
    kept = Groundwork.load(path)
    assert kept.codes is not None
    assert kept.reference is None
    resumed, straight, x = lay(), lay(None), data.images[:7] / 255
    for one, other in ((resumed, straight), (Groundwork.load(path), straight)):
        assert torch.equal(one.network(x), other.network(x))
        assert torch.equal(one.codes.w, other.codes.w)
        assert torch.equal(one.reference(x), other.reference(x))
    more = dataclasses.replace(recipe, inversion_steps=5)
    elsewhere = lay_groundwork(
        data.images, data.labels, unlabelled=None, recipe=more, seed=0, keep=tmp_path / "other", generator=path
    )
    assert torch.equal(elsewhere.network(x), straight.network(x))
    assert elsewhere.made_of["codes"] != straight.made_of["codes"]  # other steps: codes are found anew
    assert elsewhere.made_of["reference"] == straight.made_of["reference"]
    assert torch.equal(elsewhere.reference(x), straight.reference(x))
    wide = torch.zeros(4, 1, 8, 10, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"makes images of \(1, 8, 8\)"):
        lay_groundwork(wide, torch.zeros(4).long(), unlabelled=None, recipe=recipe, seed=0, generator=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError):
        lay()


def test_a_stopped_training_of_the_generator_goes_on(tmp_path, monkeypatch):
    data, path = blobs(), tmp_path / "natra-generator.safetensors"
    recipe = Recipe(generator_steps=3, w_dim=4, inversion_steps=0, reference_epochs=1)

    def lay(keep):
        return lay_groundwork(data.images, data.labels, unlabelled=None, recipe=recipe, seed=0, keep=keep)

    with monkeypatch.context() as patched:

        def stop(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

        patched.setattr("netwright.train.schedules.CosineProgress.on_train_epoch_start", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            lay(path)
    assert path.with_name("natra-generator.ckpt").exists()
    resumed, straight = lay(path), lay(None)
    assert all(torch.equal(v, straight.network.state_dict()[k]) for k, v in resumed.network.state_dict().items())
    assert not path.with_name("natra-generator.ckpt").exists()


def test_the_generator_learns():
    x = blobs(256).images
    network, history = fit_style_autoencoder(x, epochs=8, w_dim=4, channels=(8, 8), batch_size=32, latent_weight=0.01)
    losses = history.column("reconstruction")
    assert losses[-1] < 0.5 * losses[0]
    assert float(network.generator.w_cov.diagonal().min()) > 0
    first, _ = fit_style_autoencoder(x[:64], epochs=1, w_dim=4, channels=(8, 8), seed=3)
    second, _ = fit_style_autoencoder(x[:64], epochs=1, w_dim=4, channels=(8, 8), seed=3)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_bad_preparation():
    x = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        fit_style_autoencoder(x - 1)
    with pytest.raises(ValueError, match="kl_weight must be >= 0"):
        fit_style_autoencoder(x, kl_weight=-1.0)
    with pytest.raises(ValueError, match=r"unlabelled must be of \(1, 8, 8\)"):
        prepare_natural_transform(x, torch.zeros(4, dtype=torch.long), unlabelled=torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="labels must be 4 whole numbers"):
        prepare_natural_transform(x, torch.zeros(3, dtype=torch.long))
    assert Recipe().steps_for(1000) == 30
    assert Recipe().steps_for(50_000) == 3
    assert Recipe(inversion_steps=7).steps_for(50_000) == 7
    assert Recipe(generator_steps=100).epochs_for(640) == 10

"""Directions and transformations: singular vectors, principal axes, the filter, linear generators, search."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fake_gpu import fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from netwright.train.natra import (
    DecoderGenerator,
    Directions,
    LatentCodes,
    NaturalTransform,
    NoDirectionError,
    StyleGenerator,
    TransformGrid,
    common_corruptions,
    distortion_report,
    filter_directions,
    latent_directions,
    pgd_transform,
    random_transform,
    worst_of_k,
)


class Stretched(DecoderGenerator):
    """w = L z."""

    def __init__(self, root: torch.Tensor):
        super().__init__(nn.Identity(), len(root))
        self.root = root
        self.w_cov = root @ root.T

    def mapping(self, z):
        return z @ self.root.T


def with_weight(a: torch.Tensor) -> DecoderGenerator:
    return DecoderGenerator(nn.Identity(), a.shape[1], weight=a).double()


def test_weights_are_right_singular_vectors():
    a = torch.randn(9, 5, generator=stream(0, "A"), dtype=torch.float64)
    found = latent_directions(with_weight(a), "weights")
    right = np.linalg.svd(a.numpy())[2]
    assert np.allclose(np.abs(np.sum(found.vectors.numpy() * right, 1)), 1, atol=1e-9)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(5, dtype=torch.float64), atol=1e-9)
    assert len(latent_directions(with_weight(a), "weights", k=2)) == 2


def test_the_order_is_that_of_the_singular_values():
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert torch.allclose(latent_directions(with_weight(a), "weights").vectors.abs(), torch.eye(3).double())
    turned = latent_directions(with_weight(a.flip(0).flip(1)), "weights")
    assert torch.allclose(turned.vectors.abs(), torch.eye(3).double().flip(0))
    rows = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(latent_directions(with_weight(rows), "weights", k=1).vectors[0, 0].abs()) == pytest.approx(1)
    normalised = latent_directions(with_weight(rows), "weights", k=1, normalize_rows=True)
    assert float(normalised.vectors[0, 1].abs()) == pytest.approx(1)  # two rows against one


def test_principal_axes():
    root = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.5, 0.0], [0.5, 0.2, 0.5]])
    found = latent_directions(Stretched(root), "pca")
    values, vectors = torch.linalg.eigh(root @ root.T)
    values, vectors = values.flip(0), vectors.flip(1)
    assert bool(((found.vectors * vectors.T).sum(1).abs() >= 0.99).all())
    assert torch.allclose(found.scale, values.sqrt(), rtol=0.03)


def test_principal_axes_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    root = torch.randn(4, 4, generator=stream(3, "root"), dtype=torch.float64)
    found = latent_directions(Stretched(root).double(), "pca", num_samples=500, generator_seed=7)
    z = torch.randn(500, 4, generator=stream(7, "directions")).double()
    theirs = PCA().fit((z @ root.T).numpy())
    assert np.allclose(np.abs(np.sum(found.vectors.numpy() * theirs.components_, 1)), 1, atol=1e-9)
    assert np.allclose(found.scale.numpy(), np.sqrt(theirs.explained_variance_), rtol=1e-9)


def test_the_spread_along_a_closed_form_direction():
    generator = with_weight(torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64)))
    generator.w_cov = torch.tensor([[9.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert latent_directions(generator, "weights").scale.tolist() == pytest.approx([2.0, 3.0])


def test_layers_that_are_moved():
    generator = StyleGenerator((1, 8, 8), w_dim=4, channels=(4, 4))
    found = latent_directions(generator, "weights", k=2, layers=(1, 3))
    rows = torch.cat([layer.weight for layer in generator.styles]).detach().numpy()
    right = np.linalg.svd(rows)[2][:2]
    assert np.allclose(np.abs(np.sum(found.vectors.numpy() * right, 1)), 1, atol=1e-5)
    shift = found.shift(torch.ones(2, 2), 3)
    assert bool((shift[:, 0] == 0).all())
    assert torch.equal(shift[:, 1], shift[:, 2])
    assert float(shift[:, 1].abs().min()) > 0
    with pytest.raises(ValueError, match=r"within 0..3, got \(2, 4\)"):
        latent_directions(generator, layers=(2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "svd"}, "method must be 'pca' or 'weights'"),
        ({"k": 0}, "k must be >= 1"),
        ({"num_samples": 1}, "num_samples must be >= 2"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises(ValueError, match=message):
        latent_directions(Stretched(torch.eye(2)), **change)
    with pytest.raises(ValueError, match="give weight="):
        latent_directions(DecoderGenerator(torch.tanh, 2), "weights")


def constructed() -> tuple[DecoderGenerator, nn.Module]:
    """w_1 decides the class (which half is bright), w_2 is brightness, w_3 nothing."""

    def decode(w: torch.Tensor) -> torch.Tensor:
        half = torch.sigmoid(4 * w[:, :1])
        level = 0.5 + 0.08 * w[:, 1:2]
        return torch.cat([level * half, level * (1 - half)], 1).clamp(0, 1)

    classifier = nn.Linear(2, 2, bias=False)
    classifier.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return DecoderGenerator(decode, 3), classifier


def test_the_filter_drops_what_decides_the_class(capsys):
    generator, classifier = constructed()
    codes = LatentCodes(torch.randn(300, 1, 1, 3, generator=stream(0, "w")))
    axes = Directions(torch.eye(3), torch.ones(3))
    kept = filter_directions(axes, generator, classifier, codes)
    assert torch.equal(kept.vectors, torch.eye(3)[1:2])
    assert kept.flip[0] == pytest.approx(0, abs=0.01)
    made = codes[:256].decode(generator)
    moved = [codes[:256].decode(generator, torch.tensor([0.0, s, 0.0]).expand(256, 1, 3)) for s in (2.0, -2.0)]
    expected = sum(float((each - made).square().mean(1).sqrt().mean()) for each in moved) / 2
    assert kept.change[0] == pytest.approx(expected, rel=1e-5)
    both = filter_directions(axes, generator, classifier, codes, max_flip=1.0)
    assert [int(v.argmax()) for v in both.vectors] == [0, 1]  # the more visible first
    assert len(filter_directions(axes, generator, classifier, codes, max_flip=1.0, max_directions=1)) == 1
    assert (axes.step, kept.step) == (None, 2.0)
    assert filter_directions(axes, generator, classifier, codes, max_flip=1.0, step=3).step == 3.0
    with pytest.raises(NoDirectionError, match="no direction survives: of 3 "):
        filter_directions(axes, generator, classifier, codes, min_change=0.9)
    capsys.readouterr()
    wrong = 1 - classifier(made).argmax(1)
    filter_directions(axes, generator, classifier, codes[:256], labels=wrong)
    assert "right on 0 % of the reconstructions" in capsys.readouterr().err
    for change, message in (({"max_flip": 2}, "max_flip"), ({"step": 0.0}, "step"), ({"min_change": -1.0}, "min_")):
        with pytest.raises(ValueError, match=message):
            filter_directions(axes, generator, classifier, codes, **change)


P, D, N = 6, 3, 8


def linear_transform(**options) -> tuple[NaturalTransform, torch.Tensor]:
    a = 0.02 * torch.randn(P, D, generator=stream(0, "A"), dtype=torch.float64)
    layer = nn.Linear(D, P).double()
    layer.weight.data, layer.bias.data = a, torch.full((P,), 0.5, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(D, D, generator=stream(1, "u"), dtype=torch.float64)).Q
    axes = Directions(vectors, torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64))
    w = torch.randn(N, 1, 1, D, generator=stream(2, "w"), dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(N, P, generator=stream(3, "x"), dtype=torch.float64)
    return NaturalTransform(DecoderGenerator(layer, D).double(), LatentCodes(w), axes, x, **options), a


def test_a_step_of_a_linear_generator():
    transform, a = linear_transform()
    index = torch.arange(N)
    assert torch.equal(transform(index, torch.zeros(N, D).double()), transform.images)
    for j in range(D):
        moved = transform.at(index, torch.full((N,), j), torch.full((N,), 1.5).double())
        step = 1.5 * transform.directions.scale[j] * a @ transform.directions.vectors[j]
        assert torch.allclose(moved - transform.images, step.expand(N, P), atol=1e-12)
    plain, _ = linear_transform(keep_residual=False)
    assert torch.equal(plain(index, torch.zeros(N, D).double()), plain.codes.decode(plain.generator))
    assert torch.equal(transform(transform.codes, torch.zeros(N, D).double(), transform.images), transform.images)
    with pytest.raises(ValueError, match="images must be given with other codes"):
        transform(transform.codes, torch.zeros(N, D).double())
    with pytest.raises(ValueError, match=r"coeff must have shape \(batch, 3\)"):
        transform(index, torch.zeros(N, 2).double())
    with pytest.raises(ValueError, match="keep_residual needs images"):
        NaturalTransform(transform.generator, transform.codes, transform.directions)


def test_a_style_generator_leaves_every_bit_at_zero():
    with seeded(0, "style"):
        generator = StyleGenerator((1, 12, 12), w_dim=6, channels=(8, 6))
    x = torch.rand(5, 1, 12, 12, generator=stream(0, "x"))
    w = torch.randn(5, 3, 3, 6, generator=stream(0, "w"))
    codes = LatentCodes(w, torch.rand(5, 3, 8, generator=stream(0, "alpha")), 1)
    transform = NaturalTransform(generator, codes, latent_directions(generator, "pca", k=2), x)
    assert torch.equal(transform(torch.arange(5), torch.zeros(5, 2)), x)
    assert not torch.equal(transform(torch.arange(5), torch.ones(5, 2)), x)


def test_images_of_another_range_or_size_are_refused():
    decoder = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    generator, x = DecoderGenerator(decoder, D), 2 * torch.rand(N, 1, 4, 4, generator=stream(0, "x")) - 1
    codes, axes = LatentCodes(torch.zeros(N, 1, 1, D)), Directions(torch.eye(D), torch.ones(D))
    index, nowhere = torch.arange(N), torch.zeros(N, D)
    for images in (x, 255 * x.abs(), x / 0):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\] as the generator's do, got"):
            NaturalTransform(generator, codes, axes, images)
    for shape in ((1, 5, 5), (3, 4, 4), (4, 4)):
        for keep in (True, False):
            with pytest.raises(ValueError, match=r"images must have the generator's size \(1, 4, 4\), got \("):
                NaturalTransform(generator, codes, axes, torch.zeros(N, *shape), keep_residual=keep)
    transform = NaturalTransform(generator, codes, axes, x.abs())
    with pytest.raises(ValueError, match="images must lie in"):
        transform(codes, nowhere, x)
    with pytest.raises(ValueError, match="images must have the generator's size"):
        transform(codes, nowhere, x[..., :1])
    generator.image_range = (-1.0, 1.0)
    transform = NaturalTransform(generator, codes, axes, x)
    assert torch.equal(transform(index, nowhere), x)
    assert torch.equal(transform(codes, nowhere, x), x)
    assert -1 <= transform(index, nowhere - 9).min().item() < -0.9
    with pytest.raises(ValueError, match=r"a grid holds images in \[0, 1\], the generator's lie in \[-1, 1\]"):
        transform.grid()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 3.0))
def test_the_worst_over_a_box_is_known(seed, eps):
    """For a linear logistic classifier it is c_j = -y eps sign(v^T A u_j), and the margin falls by that much."""
    transform, a = linear_transform()
    v = torch.randn(P, generator=stream(seed, "v"), dtype=torch.float64)
    labels = torch.randint(2, (N,), generator=stream(seed, "y"))
    y = 2 * labels - 1

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-(x @ v) / 2, (x @ v) / 2], 1)

    index = torch.arange(N)
    slope = transform.directions.scale * (transform.directions.vectors @ a.T @ v)
    images, loss, coeff = pgd_transform(transform, logits_of, index, labels, eps_max=eps)
    expected = -y[:, None] * eps * slope.sign()
    assert torch.allclose(coeff, expected.double(), atol=1e-9)
    margin = y * (transform.images @ v)
    assert torch.allclose(y * (images @ v), margin - eps * slope.abs().sum(), atol=1e-9)
    assert torch.allclose(loss, functional.softplus(-(margin - eps * slope.abs().sum())).float(), atol=1e-5)
    draws = torch.rand(12, N, 2, generator=stream(seed, "k"))
    _, found = worst_of_k(transform, logits_of, index, labels, draws, eps_max=eps)
    assert bool((found <= loss + 1e-6).all())


def test_more_candidates_are_never_less_bad():
    transform, _ = linear_transform()
    labels = torch.arange(N) % 2
    weight = torch.randn(P, 2, generator=stream(0, "v"), dtype=torch.float64)
    losses = []
    for k in (1, 2, 3, 8, 30):
        draws = torch.rand(k, N, 2, generator=stream(0, "draws"))  # the first ones are the same
        images, loss = worst_of_k(transform, lambda x: x @ weight, torch.arange(N), labels, draws)
        assert torch.allclose(functional.cross_entropy((images @ weight).float(), labels, reduction="none"), loss)
        losses.append(loss)
    gains = torch.stack(losses).diff(dim=0)
    assert bool((gains >= 0).all())
    assert float(gains.sum()) > 0
    one = random_transform(transform, torch.arange(N), draws[0])
    first, _ = worst_of_k(transform, lambda x: x @ weight, torch.arange(N), labels, draws[:1])
    assert torch.equal(one, first)


def pictures() -> NaturalTransform:
    with seeded(0, "style"):
        generator = StyleGenerator((1, 12, 12), w_dim=6, channels=(8, 6))
    x = torch.rand(20, 1, 12, 12, generator=stream(0, "x"))
    w = torch.randn(20, 1, 3, 6, generator=stream(0, "w"))
    axes = latent_directions(generator, "pca", k=3)
    return NaturalTransform(generator, LatentCodes(w), axes, x)


def test_a_grid_holds_what_the_transformation_makes():
    transform = pictures()
    grid = transform.grid(2.0, batch_size=7)
    assert grid.images.shape == (20, 3, 5, 1, 12, 12)
    assert grid.eps.tolist() == [-2, -1, 0, 1, 2]
    index = torch.tensor([3, 3, 19, 0])
    direction, eps = torch.tensor([0, 2, 1, 1]), torch.tensor([-2.0, 0.4, 1.2, 2.0])
    nearest = torch.tensor([-2.0, 0.0, 1.0, 2.0])
    assert torch.allclose(grid.at(index, direction, eps), transform.at(index, direction, nearest), atol=0.51 / 255)
    draws = torch.rand(4000, 2, generator=stream(0, "draw"))
    for source in (grid, transform):
        directions, steps = source.choose(draws, 2.0)
        assert directions.bincount().tolist() == pytest.approx([4000 / 3] * 3, rel=0.1)
        assert float(steps.mean()) == pytest.approx(0, abs=0.1)
        assert float(steps.abs().max()) <= 2.0
    assert set(grid.choose(draws, 1.0)[1].tolist()) == {-1.0, 0.0, 1.0}
    with pytest.raises(ValueError, match="must ascend"):
        TransformGrid(grid.images, grid.eps.flip(0))
    with pytest.raises(ValueError, match="uint8"):
        TransformGrid(grid.images.float(), grid.eps)
    for change in ({"eps_max": 0.0}, {"values": 1}):
        with pytest.raises(ValueError, match="must be >"):
            transform.grid(**change)


def test_the_search_changes_nobody():
    transform = pictures()
    with seeded(0, "init"):
        net = SmallConvNet((4,), 4, 2, in_channels=1).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    own = {name: value.clone() for name, value in transform.generator.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    index, labels = torch.arange(20), torch.arange(20) % 2
    worst_of_k(transform, net, index, labels, torch.rand(8, 20, 2, generator=stream(0, "k")))
    pgd_transform(transform, net, index, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, own[name]) for name, value in transform.generator.state_dict().items())
    assert all(part.grad is None for part in [*net.parameters(), *transform.generator.parameters()])


@pytest.mark.parametrize("search", ["random", "worst_of_k", "pgd"])
@pytest.mark.parametrize("ours", ["cpu", "cuda"])
def test_the_network_may_lie_on_another_device(search, ours, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, at: (torch.ones_like(at),))  # which asks for a real GPU
    with fake_gpu() as theirs:
        with torch.device(ours):
            generator, axes = DecoderGenerator(nn.Linear(D, P), D), Directions(torch.eye(D), torch.ones(D))
            transform = NaturalTransform(generator, LatentCodes(torch.zeros(N, 1, 1, D)), axes, keep_residual=False)
            transform.images, transform.keep_residual = torch.rand(N, P), True  # whose range cannot be looked at
        net, index = nn.Linear(P, 2, device=theirs), torch.arange(4, device=theirs)
        labels, draws = torch.zeros(4, dtype=torch.long, device=theirs), torch.rand(3, 4, 2)

        def logits_of(images):
            return net(images.to(theirs))

        if search == "random":
            images = random_transform(transform, index, draws[0])
        elif search == "worst_of_k":
            images, loss = worst_of_k(transform, logits_of, index, labels, draws)
        else:
            images, loss, coeff = pgd_transform(transform, logits_of, index, labels)
            assert coeff.device.type == ours
        assert (images.shape, images.device.type) == ((4, P), ours)
        assert search == "random" or loss.device.type == theirs


def one_by_one(source, logits_of, index, labels, draws, eps_max=2.0):
    """A batch of each candidate after the other, and the first of the worst."""
    worst, loss = None, None
    for pairs in draws:
        images = source.at(index, *source.choose(pairs, eps_max))
        with torch.no_grad():
            found = functional.cross_entropy(logits_of(images), labels, reduction="none")
        more = None if loss is None else found > loss
        worst = images if worst is None else torch.where(more.view(-1, *[1] * (images.ndim - 1)), images, worst)
        loss = found if loss is None else torch.where(more, found, loss)
    return worst, loss


class Counting(nn.Module):
    """How many images each call had."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.net(x)


def searched() -> tuple[NaturalTransform, nn.Module, torch.Tensor, torch.Tensor]:
    """Transformations that matter, a network in evaluation mode, indices (one of them twice) and labels."""
    transform = pictures()
    transform.directions = dataclasses.replace(transform.directions, scale=5 * transform.directions.scale)
    with seeded(0, "init"):
        net = SmallConvNet((4,), 4, 2, in_channels=1).eval()
    index = torch.tensor([3, 3, 19, 0, 7, 11])
    return transform, Counting(net).eval(), index, torch.tensor([0, 1, 1, 0, 0, 1])


@pytest.mark.parametrize("kind", ["decoded", "grid"])
@pytest.mark.parametrize("together", [1, 2**18])
@pytest.mark.parametrize("rows", [False, True])
def test_all_at_once_is_one_by_one(kind, together, rows, monkeypatch):
    monkeypatch.setattr("netwright.train.natra.search.TOGETHER", together)
    transform, net, index, labels = searched()
    source = transform if kind == "decoded" else transform.grid(1.5)
    if rows:
        labels = functional.one_hot(labels, 2).float() * 0.8 + 0.1
    draws = torch.rand(9, 6, 2, generator=stream(0, "draws"))
    expected, most = one_by_one(source, net, index, labels, draws, 1.5)
    assert net.sizes == [6] * 9
    net.sizes.clear()
    found, loss = worst_of_k(source, net, index, labels, draws, eps_max=1.5)
    assert torch.equal(found, expected)
    assert torch.allclose(loss, most, atol=1e-6)
    assert len(net.sizes) == 1 if together > 1 else max(net.sizes) <= 12
    direction, eps = source.choose(draws.flatten(0, 1), 1.5)
    ways = {
        (i % 6, int(j) if e else 0, float(e))
        for i, (j, e) in enumerate(zip(direction, eps, strict=True))
    }  # fmt: skip
    assert sum(net.sizes) == len(ways)
    assert kind == "decoded" or len(ways) < 54  # a step of 0 and equal draws pass once


def test_a_step_of_zero_that_is_not_one_image_passes_for_each_direction():
    made = torch.randint(0, 256, (20, 3, 3, 1, 12, 12), dtype=torch.uint8, generator=stream(0, "made"))
    _, net, index, labels = searched()
    draws = torch.rand(4, 6, 2, generator=stream(0, "draws"))
    draws[..., 1] = 0.5  # the middle one of three steps
    for alike in (False, True):
        if alike:
            made[:, :, 1] = made[:, :1, 1].clone()
        grid = TransformGrid(made, torch.tensor([-1.0, 0.0, 1.0]))
        directions, eps = grid.choose(draws.flatten(0, 1), 2.0)
        assert not eps.any()
        ways = sum(1 if alike else len(set(row)) for row in directions.view(4, 6).T.tolist())
        net.sizes.clear()
        found, _ = worst_of_k(grid, net, index, labels, draws)
        assert net.sizes == [ways]
        assert torch.equal(found, one_by_one(grid, net, index, labels, draws)[0])


@pytest.mark.parametrize("training", [False, True])
def test_batch_statistics_are_those_of_one_candidate(training):
    transform, _, index, labels = searched()
    with seeded(0, "init"):
        first, second = (SmallConvNet((4,), 4, 2, in_channels=1) for _ in range(2))
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        net.train(training)
        if not training:
            net.features[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    draws = torch.rand(5, 6, 2, generator=stream(0, "draws"))
    expected, most = one_by_one(transform, first, index, labels, draws)
    found, loss = worst_of_k(transform, second, index, labels, draws)
    assert torch.equal(found, expected)
    assert torch.equal(loss, most)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not training or int(second.features[1].num_batches_tracked) == 5


def test_a_loss_that_is_no_number_is_not_the_worst():
    transform, _, index, labels = searched()
    draws = torch.rand(3, 6, 2, generator=stream(0, "draws"))

    def logits_of(x):
        logits = x.flatten(1)[:, :2].clone()
        logits[6:12] = torch.nan
        return logits

    found, loss = worst_of_k(transform, logits_of, index, labels, draws)
    assert bool(loss.isfinite().all())
    assert torch.equal(found, one_by_one(transform, lambda x: x.flatten(1)[:, :2], index, labels, draws[[0, 2]])[0])


@pytest.mark.parametrize(("residual", "more"), [(True, 1), (False, 0)])
def test_codes_that_stay_are_decoded_once(residual, more):
    calls = []
    layer = nn.Linear(D, P)

    def decode(z):
        calls.append(len(z))
        return layer(z).sigmoid()

    generator, axes = DecoderGenerator(decode, D), Directions(torch.eye(D), torch.ones(D))
    x = torch.rand(N, P, generator=stream(0, "x"))
    transform = NaturalTransform(generator, LatentCodes(torch.zeros(N, 1, 1, D)), axes, x, keep_residual=residual)
    index, labels = torch.arange(4), torch.arange(4) % 2
    calls.clear()
    worst_of_k(transform, lambda images: images[:, :2], index, labels, torch.rand(5, 4, 2))
    assert calls == [4] * (5 + more)
    calls.clear()
    pgd_transform(transform, lambda images: images[:, :2], index, labels, steps=3)
    assert calls == [4] * (4 + more)
    calls.clear()
    still, coeff = transform.still(index), torch.ones(4, D)
    assert (still is None) is not residual
    assert torch.equal(transform(index, coeff, still=still), transform(index, coeff))
    if not residual:
        assert torch.equal(transform(index, coeff, still=x[:4]), transform(index, coeff))


def test_the_generator_gets_no_gradient():
    transform, _ = linear_transform()
    assert all(part.requires_grad for part in transform.generator.parameters())
    coeff = torch.ones(N, D, dtype=torch.float64, requires_grad=True)
    transform(torch.arange(N), coeff).sum().backward()
    assert float(coeff.grad.abs().min()) > 0
    assert all(part.grad is None and part.requires_grad for part in transform.generator.parameters())


def test_a_transformation_moves_as_a_whole():
    transform = pictures()
    channels = transform.generator.features(transform.codes.w[:1, 0], 1).shape[1]
    codes = LatentCodes(transform.codes.w, torch.ones(20, 1, channels), 1)
    whole = NaturalTransform(transform.generator, codes, transform.directions, transform.images)
    names = list(whole.state_dict())
    assert all(name.startswith("generator.") for name in names)
    index, coeff = torch.arange(3), torch.ones(3, 3)
    before = whole(index, coeff)
    whole.double()
    assert whole(index, coeff).dtype == torch.float64
    assert torch.allclose(whole(index, coeff).float(), before, atol=1e-5)
    moved = whole.to("meta")
    tensors = [moved.codes.w, moved.codes.alpha, moved.directions.vectors, moved.directions.scale, moved.images]
    assert {part.device.type for part in tensors} == {"meta"}
    assert list(moved.state_dict()) == names
    bare = pictures()
    bare.images, bare.keep_residual = None, False
    assert bare.to("meta").images is None
    assert Directions(torch.eye(2), torch.ones(2), (0, 1)).to("meta").vectors.device.type == "meta"


def test_pgd_is_at_least_as_bad_as_where_it_starts():
    transform = pictures()
    with seeded(0, "init"):
        net = SmallConvNet((4,), 4, 2, in_channels=1).eval()
    labels = torch.arange(20) % 2
    still = functional.cross_entropy(net(transform.images), labels, reduction="none")
    _, loss, coeff = pgd_transform(transform, net, torch.arange(20), labels, eps_max=1.0)
    assert bool((loss >= still - 1e-6).all())
    assert float(loss.mean()) > float(still.detach().mean())
    assert float(coeff.abs().max()) <= 1


@pytest.mark.parametrize(
    ("eps", "k", "message"), [(0.0, 1, "eps_max"), (float("inf"), 1, "eps_max"), (1.0, 0, "k must")]
)
def test_bad_searches(eps, k, message):
    transform, _ = linear_transform()
    with pytest.raises(ValueError, match=message):
        worst_of_k(transform, lambda x: x, torch.arange(2), torch.zeros(2), torch.rand(k, 2, 2), eps_max=eps)


def test_a_report_of_distortions():
    x = torch.zeros(40, 1, 6, 6)
    labels = torch.arange(40) % 2
    x[labels == 1] = 1.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    model[1].weight.data, model[1].bias.data = torch.stack([-torch.ones(36), torch.ones(36)]), torch.tensor([18.0, -18])
    inverted = {"inverted": lambda images: 1 - images, "same": lambda images: images}
    report = distortion_report(model, inverted | common_corruptions(), [(x[:30], labels[:30]), (x[30:], labels[30:])])
    assert (report["clean"], report["inverted"], report["same"]) == (1.0, 0.0, 1.0)
    assert set(report) == {"clean", *inverted, *common_corruptions()}
    assert all(0 <= value <= 1 for value in report.values())
    y = torch.rand(2, 3, 9, 9, generator=stream(0, "y"))
    for name, change in common_corruptions().items():
        assert change(y).shape == y.shape
        assert not torch.equal(change(y), y), name
    with pytest.raises(ValueError, match="must keep the shape"):
        distortion_report(model, {"cut": lambda images: images[..., 1:]}, [(x, labels)])
    with pytest.raises(ValueError, match="'clean'"):
        distortion_report(model, {"clean": lambda images: images}, [(x, labels)])
    with pytest.raises(ValueError, match="at least 1 image"):
        distortion_report(model, {}, [])


def test_noise_is_the_same_in_each_report():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x)
            return x.flatten(1).mean(1, keepdim=True)

    x = torch.full((4, 1, 6, 6), 0.5)
    noise, batches, model = {"noise": common_corruptions()["noise"]}, [(x, torch.zeros(4))] * 2, Mean()
    for _ in range(2):
        distortion_report(model, noise, batches)
    _, first, _, second, _, again, _, last = model.seen
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(second, last)
    draws = stream(0, "corruptions")  # one stream for all batches of a report
    for found in (first, second):
        assert torch.equal(found, (x + 0.1 * torch.randn(x.shape, generator=draws)).clamp(0, 1))

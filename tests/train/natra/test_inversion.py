"""Inversion and codes: least squares and ridge solutions of a linear generator, batches, merged feature maps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from netwright.seeding import seeded, stream
from netwright.train.natra import (
    BatchInverter,
    ClassifierFeatures,
    DecoderGenerator,
    ImageEncoder,
    LatentCodes,
    StyleGenerator,
    fit_encoder,
)
from netwright.train.natra.fitting import _Encoding

D, P = 3, 8


def linear(bias: float = 0.3) -> tuple[DecoderGenerator, torch.Tensor, torch.Tensor]:
    """G(w) = A w + b, and A and b."""
    layer = nn.Linear(D, P).double()
    a = torch.randn(P, D, generator=stream(0, "A"), dtype=torch.float64)
    layer.weight.data, layer.bias.data = a, torch.full((P,), bias, dtype=torch.float64)
    return DecoderGenerator(layer, D, image_range=(-math.inf, math.inf)).double(), a, layer.bias.detach()


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, P, generator=stream(1, "x"), dtype=torch.float64)


@pytest.fixture(scope="module")
def style() -> StyleGenerator:
    with seeded(0, "style"):
        return StyleGenerator((1, 12, 12), w_dim=6, channels=(8, 6)).eval()


def test_a_linear_generator_gives_least_squares():
    generator, a, b = linear()
    x = images()
    expected = torch.linalg.lstsq(a, (x - b).T).solution.T
    found = BatchInverter(generator, steps=400, lr=0.1, lambda_prior=0.0).invert(x)
    assert torch.allclose(found.mean[:, 0], expected, atol=1e-3)


def test_the_prior_gives_the_ridge_solution():
    generator, a, b = linear()
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [0.0, -0.3, 0.6]], dtype=torch.float64)
    generator.w_cov, generator.w_mean = root @ root.T, torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    x, weight = images(), 2.0
    precision = torch.linalg.inv(generator.w_cov)
    right = (x - b) @ a + weight * generator.w_mean @ precision
    expected = torch.linalg.solve(a.T @ a + weight * precision, right.T).T
    found = BatchInverter(generator, steps=400, lr=0.1, lambda_prior=weight).invert(x)
    assert torch.allclose(found.mean[:, 0], expected, atol=1e-3)


@pytest.mark.parametrize("codes", [1, 3])
def test_a_batch_equals_single_images(style, codes):
    style = copy.deepcopy(style).double()
    x = torch.rand(4, 1, 12, 12, generator=stream(0, "images")).double()
    inverter = BatchInverter(style, steps=12, num_codes=codes)
    together = inverter.invert(x)
    alone = LatentCodes.joined([inverter.invert(each[None]) for each in x])
    chunks = BatchInverter(style, steps=12, num_codes=codes, batch_size=3).invert(x)
    for other in (alone, chunks):
        assert torch.allclose(together.w, other.w, atol=1e-4)
    generator, _, _ = linear()
    y = images()
    exact = BatchInverter(generator, steps=30)
    singles = torch.cat([exact.invert(each[None]).w for each in y])
    assert torch.allclose(exact.invert(y).w, singles, atol=1e-6)


def test_images_that_are_good_enough_are_left_alone():
    generator, _, _ = linear()
    w = torch.randn(3, D, generator=stream(2, "w"), dtype=torch.float64)
    x = generator.synthesis(w[:, None]).detach()
    start = LatentCodes(w[:, None, None] + torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)[:, None, None, None])
    found = BatchInverter(generator, steps=200, tol=1e-2, lambda_prior=0.0).invert(x, start)
    error = (generator.synthesis(found.mean) - x).square().mean(1)
    assert torch.equal(found.w[0], start.w[0])
    assert bool((error < 1e-2).all())
    whole = BatchInverter(generator, steps=200, lambda_prior=0.0).invert(x, start)
    made = generator.synthesis(whole.mean).detach()
    assert float((made - x).square().mean()) < float(error.detach().mean())


def test_the_best_step_is_kept():
    generator, _, _ = linear()
    w = torch.randn(2, 1, 1, D, generator=stream(2, "w"), dtype=torch.float64)
    x = LatentCodes(w).decode(generator).detach()
    wild = BatchInverter(generator, steps=3, lr=50.0, lambda_prior=0.0).invert(x, LatentCodes(w))
    assert torch.equal(wild.w, w)


def test_an_encoder_is_where_it_starts(style):
    w = torch.randn(3, 3, 6, generator=stream(0, "codes"))
    x = style.synthesis(w).detach()
    found = BatchInverter(style, lambda given: w, steps=0).invert(x)
    assert torch.equal(found.mean, w)
    same = BatchInverter(style, lambda given: w[:, 0], steps=0).invert(x)
    assert torch.equal(same.mean, w[:, :1].expand(-1, 3, -1))


def test_an_encoder_for_a_generator_that_is_there(style):
    with seeded(0, "encoder"):
        encoder = ImageEncoder((1, 12, 12), 18, (8, 8))
    x = style(torch.randn(64, 6, generator=stream(0, "z"))).detach()
    before = {name: value.clone() for name, value in style.state_dict().items()}

    def error() -> float:
        with torch.no_grad():
            return float((style.synthesis(encoder(x).view(64, 3, 6)) - x).square().mean())

    first = error()
    history = fit_encoder(style, encoder, x, epochs=8, batch_size=16, lr=5e-3, lambda_latent=0.01)
    assert error() < 0.8 * first
    assert {"reconstruction", "codes"} <= set(history.last)
    assert all(torch.equal(value, before[name]) for name, value in style.state_dict().items())
    assert all(part.requires_grad for part in style.parameters())


def normed() -> tuple[DecoderGenerator, nn.Sequential]:
    """A decoder and a classifier in training mode, with batch norms whose statistics are not those of any batch."""
    with seeded(0, "normed"):
        decoder = nn.Sequential(
            nn.Linear(4, 36), nn.BatchNorm1d(36), nn.Dropout(0.5), nn.Sigmoid(), nn.Unflatten(1, (1, 6, 6))
        )
        classifier = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    decoder[1].running_mean.fill_(0.3)
    decoder[2].eval()
    return DecoderGenerator(decoder, 4), classifier


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_encoder_leaves_generator_and_features_as_they_are(wrapped):
    x = torch.rand(24, 1, 6, 6, generator=stream(0, "images"))

    class Maps(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return [self.net(images)]

    def fitted(training: bool):
        generator, classifier = normed()
        if not training:
            generator.eval()
            classifier.eval()
        parts = [*generator.modules(), *classifier.modules()]
        modes = [part.training for part in parts]
        before = [{name: v.clone() for name, v in part.state_dict().items()} for part in (generator, classifier)]
        with seeded(0, "encoder"):
            encoder = ImageEncoder((1, 6, 6), 4, (4,))
        perceptual = ClassifierFeatures(classifier) if wrapped else Maps(classifier)
        fit_encoder(generator, encoder, x, epochs=2, batch_size=8, perceptual=perceptual)
        assert [part.training for part in parts] == modes
        for part, values in zip((generator, classifier), before, strict=True):
            assert all(torch.equal(value, values[name]) for name, value in part.state_dict().items())
            assert all(p.requires_grad and p.grad is None for p in part.parameters())
        return encoder.state_dict()

    trained, still = fitted(True), fitted(False)
    assert all(torch.equal(value, still[name]) for name, value in trained.items())


def test_generator_and_features_go_where_the_batches_are_and_back():
    generator, classifier = normed()
    with seeded(0, "encoder"):
        encoder = ImageEncoder((1, 6, 6), 4, (4,))
    module = _Encoding(encoder, generator, 1e-3, (1.0, 1.0), ClassifierFeatures(classifier)).to("meta")
    assert generator.w_mean.device.type == "cpu"  # no part of the module
    module.on_train_start()
    tensors = [*generator.state_dict().values(), *classifier.state_dict().values()]
    assert {part.device.type for part in tensors} == {"meta"}
    made = module.terms(torch.empty(8, 1, 6, 6, device="meta"))
    assert {part.device.type for part in made.values()} == {"meta"}
    calls = []

    class Watched(DecoderGenerator):
        def to(self, device):
            calls.append((str(device), self.training))
            return super().to(device)

    watched = Watched(normed()[0].decoder, 4)
    with seeded(0, "encoder"):
        encoder = ImageEncoder((1, 6, 6), 4, (4,))
    fit_encoder(watched, encoder, torch.rand(8, 1, 6, 6, generator=stream(0, "images")), epochs=1, batch_size=8)
    assert calls[-1] == ("cpu", False)
    assert len(calls) == 2


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_code_with_weight_one_changes_no_bit(style, layer):
    w = torch.randn(5, 1, 3, 6, generator=stream(0, "w"))
    plain = LatentCodes(w).decode(style)
    channels = style.features(w[:, 0], layer).shape[1]
    merged = LatentCodes(w, torch.ones(5, 1, channels), layer).decode(style)
    assert torch.equal(merged, plain)
    assert torch.equal(plain, style.synthesis(w[:, 0]))
    four = LatentCodes(w.expand(-1, 4, -1, -1), torch.full((5, 4, channels), 0.25), layer)
    assert torch.equal(four.mean, w[:, 0])
    assert torch.equal(four.decode(style), plain)


def test_merging_is_the_weighted_sum_of_maps(style):
    w = torch.randn(2, 3, 3, 6, generator=stream(0, "w"))
    alpha = torch.rand(2, 3, 8, generator=stream(0, "alpha"))
    maps = torch.stack([style.features(w[:, m], 1) for m in range(3)], 1)
    expected = style.render((alpha[..., None, None] * maps).sum(1), w.mean(1), 1)
    assert torch.allclose(LatentCodes(w, alpha, 1).decode(style), expected, atol=1e-6)
    shift = torch.randn(2, 3, 6, generator=stream(0, "shift"))
    moved = LatentCodes(w + shift[:, None], alpha, 1).decode(style)
    assert torch.allclose(LatentCodes(w, alpha, 1).decode(style, shift), moved)


def loss_of(inverter: BatchInverter, codes: LatentCodes, x: torch.Tensor) -> torch.Tensor:
    return inverter._loss(codes, x, [])[0].detach()


def test_more_codes_from_the_optimum_of_one_are_never_worse(style):
    x = torch.rand(6, 1, 12, 12, generator=stream(0, "images"))
    one = BatchInverter(style, steps=60).invert(x)
    for steps in (0, 1, 25):
        inverter = BatchInverter(style, steps=steps, num_codes=4)
        four = inverter.invert(x, one)
        before, after = loss_of(inverter, one, x), loss_of(inverter, four, x)
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.mean()) < 0.995 * float(before.mean())


def test_a_distance_of_features_is_weighted_least_squares():
    generator, a, b = linear()
    x, weight = images(), 3.0
    maps = torch.randn(4, P, generator=stream(4, "phi"), dtype=torch.float64)
    metric = torch.eye(P).double() + weight / 4 * maps.T @ maps
    expected = torch.linalg.solve(a.T @ metric @ a, a.T @ metric @ (x - b).T).T
    options = {"steps": 400, "lr": 0.1, "lambda_prior": 0.0, "lambda_perceptual": weight}
    found = BatchInverter(generator, perceptual=lambda given: [given @ maps.T], **options).invert(x)
    assert torch.allclose(found.mean[:, 0], expected, atol=1e-3)


def test_features_of_a_classifier_have_one_size():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3))
    x = torch.rand(3, 1, 12, 12, generator=stream(0, "images"))
    for part in ClassifierFeatures(net)(x):
        assert torch.allclose(part.flatten(1).square().mean(1), torch.ones(3), atol=1e-4)
    assert net.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codes": 0}, "num_codes must be >= 1, got 0"),
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0"),
        ({"lambda_prior": -1.0}, "lambda_prior must be >= 0"),
        ({"tol": float("nan")}, "tol must be >= 0"),
        ({"merge_layer": 3}, r"merge_layer must lie in 0..2, got 3"),
        ({"merge_layer": -1}, r"merge_layer must lie in 0..2, got -1"),
    ],
)
def test_bad_arguments(style, change, message):
    with pytest.raises(ValueError, match=message):
        BatchInverter(style, **change)


def test_bad_images(style):
    inverter = BatchInverter(style, steps=1)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\].*got 0..2"):
        inverter.invert(torch.tensor([0.0, 2.0]).repeat(72).view(1, 1, 12, 12))
    with pytest.raises(ValueError, match=r"generator's size \(1, 12, 12\), got \(1, 13, 12\)"):
        inverter.invert(torch.rand(1, 1, 13, 12))
    with pytest.raises(ValueError, match="x must be finite"):
        inverter.invert(torch.full((1, 1, 12, 12), torch.nan))
    with pytest.raises(ValueError, match="at least 1 image of floats"):
        inverter.invert(torch.zeros(1, 1, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"encoder must give \(1, 3, 6\)"):
        BatchInverter(style, lambda x: torch.zeros(len(x), 5)).invert(torch.rand(1, 1, 12, 12))
    with pytest.raises(ValueError, match="features and render"):
        BatchInverter(linear()[0], num_codes=2)
    broken = DecoderGenerator(lambda z: z / 0, D)
    with pytest.raises(ValueError, match="reconstructions must be finite"):
        BatchInverter(broken).invert(torch.rand(2, D))


def test_images_lie_where_the_generator_says():
    decoder, x = nn.Linear(D, P).double(), 2 * torch.rand(3, P, generator=stream(0, "x"), dtype=torch.float64) - 1
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\] as the generator's images do, got -"):
        BatchInverter(DecoderGenerator(decoder, D).double(), steps=1).invert(x)
    silent = DecoderGenerator(decoder, D).double()
    del silent.image_range  # as other generators may
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        BatchInverter(silent, steps=1).invert(x)
    wide = BatchInverter(DecoderGenerator(decoder, D, image_range=(-1, 1)).double(), steps=1)
    assert len(wide.invert(x)) == 3
    with pytest.raises(ValueError, match=r"x must lie in \[-1, 1\]"):
        wide.invert(2 * x)
    for bounds in ((1.0, 0.0), (0.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="image_range must be two numbers, the lesser first, got"):
            DecoderGenerator(decoder, D, image_range=bounds)


def test_bad_codes():
    for layer in (9, 3, -1):
        with pytest.raises(ValueError, match=f"merge_layer must lie in 0..2, got {layer}"):
            LatentCodes(torch.zeros(2, 2, 3, 4), torch.ones(2, 2, 8), layer)
    with pytest.raises(ValueError, match="need both alpha and merge_layer"):
        LatentCodes(torch.zeros(2, 2, 1, 3))
    with pytest.raises(ValueError, match=r"w must have shape \(batch, codes, layers, d\)"):
        LatentCodes(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 3, 12),), "sides of 4 to 64 pixels"),
        (((1, 28, 65),), "got 28 x 65"),
        (((1, 12, 12), 0), "w_dim must be >= 1"),
        (((1, 12, 12), 4, None, ()), "channels must hold widths"),
    ],
)
def test_bad_generators(arguments, message):
    with pytest.raises(ValueError, match=message):
        StyleGenerator(*arguments)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (2, 4, 4), (3, 64, 64)])
def test_any_size_comes_out_as_it_should(shape):
    generator = StyleGenerator(shape, w_dim=4, channels=(4, 4, 4))
    made = generator(torch.zeros(2, 4))
    assert made.shape == (2, *shape)
    assert ImageEncoder(shape, 7)(made).shape == (2, 7)
    again = StyleGenerator(**generator.settings())
    again.load_state_dict(generator.state_dict())
    assert torch.equal(again(torch.ones(1, 4)), generator(torch.ones(1, 4)))


def test_statistics_are_those_of_the_mapping():
    generator = StyleGenerator((1, 8, 8), w_dim=3, channels=(4,), mapping_layers=1)
    generator.to_w[0].weight.data = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
    generator.to_w[0].bias.data = torch.tensor([1.0, 0.0, -1.0])
    generator.measure()
    assert torch.allclose(generator.w_mean, torch.tensor([1.0, 0.0, -1.0]), atol=0.05)
    assert torch.allclose(generator.w_cov, torch.diag(torch.tensor([4.0, 1.0, 0.25])), atol=0.15)

"""CDvG: its loss by hand, labels, frozen translator, and that the exact bias transformation debiases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.data.biased import PALETTE, colored_mnist, recolored
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded, stream
from netwright.train import fit
from netwright.train.contrastive import nt_xent, supcon
from netwright.train.debias import BiasTranslator, CDvG, LfF, ViewCache, bias_metrics, signed_range
from netwright.train.debias import debiasing as module
from netwright.train.debias.views import as_bytes

SIDE, SHAPE = 6, (3, 6, 6)


class Identity:
    num_classes, shape = 4, SHAPE

    def translate(self, x, y_target):
        return x


class Recolour(Identity):
    def translate(self, x, y_target):
        return signed_range(3)(recolored(as_bytes(x), torch.tensor(PALETTE)[y_target]))


def encoder(norm: bool = False) -> nn.Module:
    with seeded(0, "init"):
        layers = [nn.Conv2d(3, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * SIDE * SIDE, 16), nn.ReLU())


def figures(count: int, ratio: float, name: str = "train"):
    """Four shapes, rather noisy, in colours."""
    draws = stream(0, name)
    y = torch.arange(count) % 4
    halves = torch.zeros(4, SIDE, SIDE, dtype=torch.uint8)
    halves[0, :3] = halves[1, 3:] = halves[2, :, :3] = halves[3, :, 3:] = 110
    grey = torch.randint(0, 90, (count, SIDE, SIDE), dtype=torch.uint8, generator=draws) + halves[y]
    return colored_mnist(grey, y, ratio, palette=PALETTE[:4], generator=draws)


def batch(count: int = 8):
    data = figures(count, 1.0)
    return signed_range(3)(data.images), data.labels


def test_with_an_identity_it_is_cross_entropy_of_the_doubled_batch():
    x, y = batch()
    net = CDvG(encoder(), 4, Identity(), lambda_con=0.0)
    found = net.losses(x, y, None, stream(0, "v"))
    seen = signed_range(3)(as_bytes(x))  # views are rounded to bytes, as these images are already
    assert torch.allclose(seen, x, atol=1e-6)
    assert set(found) == {"cross-entropy"}
    plain = functional.cross_entropy(net(torch.cat([x, x])), y.repeat(2))
    assert found["cross-entropy"].item() == pytest.approx(plain.item(), abs=1e-6)


@pytest.mark.parametrize("supervised", [False, True])
def test_loss_by_hand(supervised):
    x, y = batch()
    net = CDvG(encoder(norm=True), 4, Recolour(), temperature=0.2, supervised=supervised).eval()
    found = net.losses(x, y, None, stream(0, "v"))
    targets = torch.randint(4, (2, len(x)), generator=stream(0, "v"))
    views = [Recolour().translate(x, t) for t in targets]
    h = [net.encoder(v) for v in views]
    z = [net.projection(f) for f in h]
    ce = sum(functional.cross_entropy(net.head(f), y) for f in h) / 2
    con = supcon(torch.cat(z), y.repeat(2), 0.2) if supervised else nt_xent(*z, 0.2)
    assert found["cross-entropy"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert found["contrast"].item() == pytest.approx(con.item(), rel=1e-5)


def test_contrast_is_that_of_its_own_module():
    z = torch.randn(5, 3, dtype=torch.float64)
    assert module.contrast(z[:1], z[:1], torch.tensor([0]), 0.1).item() == 0  # one image: only its positive
    same = torch.ones(4, 3)
    assert module.contrast(same, same, torch.arange(4), 0.1).item() == pytest.approx(torch.tensor(7.0).log().item())


def test_labels_are_those_of_the_source(monkeypatch):
    seen = []
    own = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda z, y, **k: seen.append(y) or own(z, y, **k))
    x, y = batch()
    CDvG(encoder(), 4, Recolour(), lambda_con=0.0).losses(x, y, None, stream(0, "v"))
    CDvG(encoder(), 4, Recolour(), lambda_con=0.0, ce_on_original=True).losses(x, y, None, stream(0, "v"))
    assert torch.equal(seen[0], y.repeat(2))
    assert torch.equal(seen[1], y.repeat(3))


def test_real_images_are_in_the_statistics_and_not_in_the_loss():
    x, y = batch()
    with_real, without = (
        CDvG(encoder(norm=True), 4, Recolour(), lambda_con=0.0, real_images=real) for real in (True, False)
    )
    assert not CDvG(encoder(), 4, Recolour()).real_images  # no norm, nothing to add
    with_real.head.load_state_dict(without.head.state_dict())
    losses = [net.losses(x, y, None, stream(0, "v"))["cross-entropy"] for net in (with_real, without)]
    assert torch.equal(*losses)
    views = torch.cat([Recolour().translate(x, t) for t in torch.randint(4, (2, len(x)), generator=stream(0, "v"))])
    seen, real = (without.encoder[0](images).mean((0, 2, 3)) for images in (views, x))
    assert torch.allclose(without.encoder[1].running_mean, 0.1 * seen, atol=1e-6)
    assert torch.allclose(with_real.encoder[1].running_mean, 0.9 * 0.1 * real + 0.1 * seen, atol=1e-6)
    before = with_real.encoder[1].running_mean.clone()
    with_real.eval().losses(x, y, None, stream(0, "v"))
    assert torch.equal(with_real.encoder[1].running_mean, before)


def test_real_images_pass_without_gradient():
    """They cost a forward pass and no backward pass."""
    x, y = batch()
    net, seen = CDvG(encoder(norm=True), 4, Recolour()), []
    net.encoder[0].register_forward_hook(lambda module, args, out: seen.append((len(out), out.requires_grad)))
    net.losses(x, y, None, stream(0, "v"))
    assert seen == [(8, False), (16, True)]


def test_weights():
    x, y = batch()
    index = torch.arange(8)
    table = torch.rand(8, generator=stream(0, "w"))
    net = CDvG(encoder(), 4, Identity(), lambda_con=0.0, sample_weight=table)
    each = functional.cross_entropy(net(x), y, reduction="none")
    found = net.losses(x, y, index, stream(0, "v"))["cross-entropy"]
    assert found.item() == pytest.approx((table * each).mean().item(), rel=1e-5)
    net.sample_weight = lambda x, y: 3.0 * (y == 2)
    found = net.losses(x, y, None, stream(0, "v"))["cross-entropy"]
    assert found.item() == pytest.approx(3 * each[y == 2].sum().item() / 8, rel=1e-5)
    net.sample_weight = table
    with pytest.raises(ValueError, match="indexed=True"):
        net.losses(x, y, None, stream(0, "v"))


def test_it_takes_the_weights_of_lff():
    lff = LfF(*(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)) for _ in range(2)))
    x, y = batch()
    net = CDvG(encoder(), 4, Recolour(), sample_weight=lff.weights)
    assert net.losses(x, y, None, stream(0, "v"))["cross-entropy"].isfinite()


def test_the_translator_stays_as_it_is():
    with seeded(0, "t"):
        translator = BiasTranslator(4, SIDE, width=4, n_down=1, n_res=1, n_layers=2)
    before = copy.deepcopy(translator.state_dict())
    data = figures(32, 1.0)
    net = CDvG(encoder(), 4, translator)
    fit(net, Batches(data, 8, normalise=signed_range(3)), epochs=1)
    assert all(torch.equal(before[name], value) for name, value in translator.state_dict().items())
    assert all(p.grad is None for p in translator.parameters())
    assert not any("generator" in name for name in net.state_dict())


def test_kept_views_train_as_fresh_ones_do():
    data = figures(32, 1.0)
    losses = []
    for cache in (None, ViewCache(data, Recolour())):
        with seeded(0, "heads"):
            net = CDvG(encoder(), 4, Recolour(), cache=cache)
        losses.append(
            fit(net, Batches(data, 8, normalise=signed_range(3), indexed=True), epochs=2).column("train_loss")
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def trained(make, data, epochs=10):
    with seeded(0, "heads"):
        net = make()
    fit(net, Batches(data, 32, normalise=signed_range(3)), epochs=epochs)
    test = figures(400, 0.25, "test")
    pred = net.eval()(signed_range(3)(test.images)).argmax(1)
    return bias_metrics(pred, test.labels, test.bias)


def test_the_exact_change_of_the_bias_debiases():
    data = figures(192, 1.0)

    class Plain(CDvG):
        def losses(self, x, y, index, generator):
            return {"cross-entropy": functional.cross_entropy(self(x), y)}

    plain = trained(lambda: Plain(encoder(), 4, Identity()), data)
    ours = trained(lambda: CDvG(encoder(), 4, Recolour(), lambda_con=0.5), data)
    grey = data.images.amax(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    blind = trained(lambda: Plain(encoder(), 4, Identity()), TensorImages(grey, data.labels))
    assert plain["unbiased"] < 0.7
    assert ours["unbiased"] > 0.98
    assert ours["unbiased"] > blind["unbiased"] - 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_con": -0.1}, "lambda_con must be >= 0"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"projection": 0}, "projection must be >= 1"),
        ({"views": "none"}, "views must be"),
        ({"view_noise": float("nan")}, "view_noise must be"),
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"num_classes": 5}, "translator must know 5 classes, got 4"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"supervised": "no"}, "supervised must be one of True, False, got 'no'"),
        ({"ce_on_original": "no"}, "ce_on_original must be one of True, False"),
        ({"real_images": "no"}, "real_images must be one of True, False"),
        ({"round_views": "no"}, "round_views must be one of True, False"),
        ({"encoder": nn.Conv2d(3, 4, 3)}, r"encoder must give features \(batch, features\)"),
    ],
)
def test_bad_input(options, message):
    given = {"encoder": encoder(), "num_classes": 4, "translator": Identity()} | options
    with pytest.raises(ValueError, match=message):
        CDvG(**given)


def test_bad_batches():
    net, (x, y) = CDvG(encoder(), 4, Identity()), batch()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        net.losses(x[:1], y[:1], None, stream(0, "v"))
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\]"):
        net.losses(2 * x, y, None, stream(0, "v"))
    with pytest.raises(ValueError, match=r"labels must lie in 0..3"):
        net.losses(x, y + 1, None, stream(0, "v"))

    class Shapeless:
        num_classes = 4

        def translate(self, x, y_target):
            return x

    with pytest.raises(ValueError, match="features must be given"):
        CDvG(encoder(), 4, Shapeless())
    assert CDvG(encoder(), 4, Shapeless(), features=16).head.in_features == 16

"""Sharpening against a critic: who gets which gradient, what the terms are, what is left, resumption, bad input."""

from __future__ import annotations

import copy

import pytest
import torch

from netwright.seeding import seeded, stream
from netwright.train.natra import ImageEncoder, StyleAutoEncoder, StyleGenerator, sharpen_style_autoencoder
from netwright.train.natra.sharpening import _Sharpening

SMALL = {"steps": 4, "n_critic": 2, "channels": (8,), "batch_size": 16}


@pytest.fixture
def network() -> StyleAutoEncoder:
    with seeded(0, "init"):
        return StyleAutoEncoder(StyleGenerator((1, 8, 8), w_dim=4, channels=(8, 8)), (8, 8))


def pictures(count: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=stream(0, "pictures"))


def module(network: StyleAutoEncoder) -> _Sharpening:
    with seeded(0, "critic"):
        return _Sharpening(network, ImageEncoder((1, 8, 8), 1, (8,)), 1e-3, 2, 10.0, 3.0)


def graded(part: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())


def test_each_step_leaves_the_other_alone(network):
    both, x = module(network), pictures(8) / 255
    sum(both.critic_terms(x).values()).backward()
    assert graded(both.critic)
    assert not graded(both.network)
    both.zero_grad()
    sum(both.generator_terms(x).values()).backward()
    assert not graded(both.critic)
    assert graded(both.network.generator)
    assert graded(both.network.encoder)
    assert all(p.requires_grad for p in both.critic.parameters())


def test_terms_by_hand(network):
    both, x = module(network), pictures(8) / 255
    with seeded(3, "noise"):
        terms = both.critic_terms(x)
    with seeded(3, "noise"):
        made = network.generator(torch.randn(8, network.generator.z_dim)).detach()
        place = torch.rand(8, 1, 1, 1)
    between = (made + place * (x - made)).requires_grad_()
    (slope,) = torch.autograd.grad(both.critic(between).sum(), between)
    penalty = 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    assert terms["critic"].item() == pytest.approx((both.critic(made).mean() - both.critic(x).mean()).item(), abs=1e-5)
    assert terms["penalty"].item() == pytest.approx(penalty.item(), rel=1e-4)
    expected = 3 * (network(x) - x).square().mean().item()
    assert both.generator_terms(x)["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_what_is_left(network):
    before = copy.deepcopy(network)
    history = sharpen_style_autoencoder(network, pictures(), **SMALL)
    assert len(history.epochs) == 2  # two batches each
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), network.parameters(), strict=True)]
    assert any(moved)
    z = torch.randn(4, network.generator.z_dim, generator=stream(0, "z"))
    assert bool(network.generator(z).isfinite().all())
    w = network.generator.mapping(torch.randn(20_000, network.generator.z_dim, generator=stream(1, "z")))
    assert torch.allclose(network.generator.w_mean, w.mean(0), atol=0.05)  # statistics are those of the new mapping


def test_a_stopped_run_goes_on_bit_for_bit(network, tmp_path, monkeypatch):
    whole = copy.deepcopy(network)
    sharpen_style_autoencoder(whole, pictures(), **SMALL)
    stopped = copy.deepcopy(network)
    with monkeypatch.context() as patched:

        def stop(self):
            if self.current_epoch == 1:
                raise KeyboardInterrupt

        patched.setattr(_Sharpening, "on_train_epoch_start", stop)
        with pytest.raises(KeyboardInterrupt):
            sharpen_style_autoencoder(stopped, pictures(), **SMALL, checkpoint=tmp_path / "c.ckpt")
    again = copy.deepcopy(network)
    sharpen_style_autoencoder(again, pictures(), **SMALL, checkpoint=tmp_path / "c.ckpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"n_critic": 0}, "n_critic must be a whole number >= 1"),
        ({"penalty": 0.0}, "penalty must be > 0"),
        ({"reconstruction": -1.0}, "reconstruction must be >= 0"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"images": torch.zeros(4, 1, 8, 10)}, r"images must be of \(1, 8, 8\)"),
        ({"images": torch.full((4, 1, 8, 8), 2.0)}, r"lie in \[0, 1\]"),
    ],
)
def test_bad_input(network, change, message):
    arguments = {"images": pictures(), **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        sharpen_style_autoencoder(network, arguments.pop("images"), **arguments)

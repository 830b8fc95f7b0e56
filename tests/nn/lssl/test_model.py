"""Deep LSSL: blocks by hand, tasks, steps, and training under Lightning."""

from __future__ import annotations

import pytest
import torch

from netwright.nn.lssl import LSSL, LSSLBlock, LSSLModel
from netwright.seeding import seeded, stream


def model(**options) -> LSSLModel:
    with seeded(0, "init"):
        return LSSLModel(**{"d_input": 2, "d_output": 3, "d_model": 4, "n_layers": 2, "d_state": 5, **options}).eval()


U = torch.randn(3, 11, 2, generator=stream(0, "u"))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_stated_function(norm):
    net = model(norm=norm)
    x = net.encoder(U)
    for block in net.blocks:
        x = x + block.layer(block.norm(x)) if norm == "pre" else block.norm(x + block.layer(x))
    assert torch.allclose(net(U), net.decoder(x.mean(1)), atol=1e-6)
    assert torch.allclose(net(U, mode="recurrence"), net(U), atol=1e-5)


def test_tasks():
    assert model()(U).shape == model(task="regress")(U).shape == (3, 3)
    assert model(task="seq2seq")(U).shape == (3, 11, 3)
    assert not torch.allclose(model()(U, rate=2.0), model()(U))
    assert model(bidirectional=True, channels=2, measure="legt", learn=2)(U).shape == (3, 3)


def test_images_are_read_row_by_row():
    images = torch.randn(2, 2, 3, 4, generator=stream(0, "images"))
    net = model()
    pixels = torch.stack([images[:, :, i, j] for i in range(3) for j in range(4)], 1)
    assert torch.allclose(net(images), net(pixels), atol=1e-6)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_step_by_step(norm):
    net = model(task="seq2seq", norm=norm)
    states, found = net.initial_state(3), []
    with torch.no_grad():
        for u_t in U.unbind(1):
            y, states = net.step(u_t, states)
            found.append(y)
        assert torch.allclose(torch.stack(found, 1), net(U), atol=1e-5)


def test_dropout_in_training_alone():
    net = model(dropout=0.5)
    assert torch.equal(net(U), net(U))
    net.train()
    assert not torch.equal(net(U), net(U))


def test_it_trains_under_lightning_with_its_groups():
    from netwright.data import Batches, TensorImages
    from netwright.metrics import accuracy
    from netwright.train import evaluate, fit

    # Which of two halves of a sequence is the louder one.
    x = torch.randn(192, 1, 1, 40, generator=stream(0, "x"))
    labels = torch.arange(192) % 2
    x[labels == 0, ..., 20:] *= 0.2
    x[labels == 1, ..., :20] *= 0.2
    data = TensorImages(x, labels)
    with seeded(0, "init"):
        net = LSSLModel(1, 2, d_model=16, n_layers=2, d_state=8)
    before = net.blocks[0].layer.A.T.detach().clone()
    fit(net, Batches(data, 24), epochs=4, optimizer=lambda params: torch.optim.Adam(net.param_groups(1e-2)))
    assert accuracy(*evaluate(net, Batches(data, 64, shuffle=False))) > 0.9
    moved = (net.blocks[0].layer.A.T.detach() - before).abs().max()
    assert 0 < float(moved) < 32 * 1.1e-4  # its own learning rate


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: model(d_input=0), ValueError, "d_input must be >= 1, got 0"),
        (lambda: model(d_model=-1), ValueError, "d_model must be >= 1, got -1"),
        (lambda: LSSLBlock(LSSL(4), norm="batch"), ValueError, "norm must be one of pre, post, got 'batch'"),
        (lambda: model(n_layers=0), ValueError, "n_layers must be >= 1, got 0"),
        (lambda: model(norm="batch"), ValueError, "norm must be one of pre, post, got 'batch'"),
        (lambda: model(task="count"), ValueError, "task must be .* got 'count'"),
        (lambda: model(alpha=-1), ValueError, "alpha"),
        (lambda: model()(torch.zeros(3, 11, 4)), ValueError, r"u must have shape \(batch, L, 2\).* got \(3, 11, 4\)"),
        (lambda: model()(torch.zeros(3, 4, 2, dtype=torch.int32)), TypeError, "got torch.int32"),
        (lambda: model().step(U[:, 0], model().initial_state(3)), ValueError, "task must be 'seq2seq'"),
        (lambda: model(task="seq2seq").step(U, model().initial_state(3)), ValueError, "u_t must have shape"),
        (lambda: model(task="seq2seq").step(U[:, 0], []), ValueError, "states must be one for each of 2 layers, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

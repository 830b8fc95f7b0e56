"""What is trained on logits, and what a trained network answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netwright.compress import prune
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import stream
from netwright.train import Classifier, channels_last, evaluate, fit


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 2)
    )


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def data() -> Batches:
    images = torch.randint(0, 256, (96, 1, 6, 6), dtype=torch.uint8, generator=stream(0, "x"))
    return Batches(TensorImages(images, torch.arange(96) % 2), 16)


def test_evaluation_leaves_every_part_in_its_own_mode():
    net = network().train()
    net[1].eval()  # frozen statistics, while the rest trains
    before = weights(net)
    probs, labels = evaluate(net, data())
    assert [part.training for part in net] == [True, False, True, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    again, _ = evaluate(net.eval(), data())
    assert torch.equal(probs, again)  # no dropout, no statistics of the batch
    assert not net.training
    assert torch.equal(labels, torch.cat([y for _, y in data()]))


def test_modes_come_back_when_the_data_fail():
    net = network().train()
    net[1].eval()
    with pytest.raises(RuntimeError, match="size"):
        evaluate(net, [(torch.zeros(2, 1, 1, 1), torch.zeros(2))])
    assert [part.training for part in net] == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0}, "lr must be > 0, got 0"), ({"momentum": 1}, r"\[0, 1\), got 1"), ({"label_smoothing": -1}, "got -1")],
)
def test_classifier_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(network(), **settings)


def test_a_gradient_that_overflows_makes_no_update():
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 2)

        def forward(self, x):
            return Overflow.apply(self.layer(x.flatten(1)))

    net = Net()
    before = weights(net)
    fit(Classifier(net, lr=0.1), data(), epochs=1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class TestLayout:
    """A masked weight has lost its layout in the product with the mask; the images must tell it."""

    @pytest.mark.parametrize("channels", [1, 3])
    def test_masked_networks_compute_channels_last(self, channels: int):
        net = prune.magnitude(
            nn.Sequential(
                nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)
            ),
            0.0,
            skip=["4"],
        )
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (16, channels, 6, 6), dtype=torch.uint8, generator=generator)
        batches = Batches(TensorImages(images, torch.arange(16) % 2), 8)
        seen = []
        for layer in (net[0], net[2]):
            layer.register_forward_hook(lambda m, x, out: seen.append(out.stride(1) == 1 and out.stride(3) == 4))
        fit(net, batches, epochs=1, validation=batches)
        evaluate(net, batches)
        assert len(seen) == 2 * 3 * 2
        assert all(seen)

    def test_values_stay(self):
        x = torch.arange(24.0).view(2, 1, 3, 4)
        assert torch.equal(channels_last(x), x)
        flat = torch.ones(2, 3)
        assert channels_last(flat) is flat

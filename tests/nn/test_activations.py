import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.nn.activations import caught, class_map, last_convolution, last_linear
from netwright.seeding import seeded, stream


def network():
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


IMAGES = torch.rand(5, 2, 9, 9, generator=stream(0, "x"))


def test_hooks_are_gone_even_after_an_error():
    net = network()
    with caught(net[0]) as seen:
        net(IMAGES)
    assert torch.equal(seen[0], net[0](IMAGES))
    with pytest.raises(RuntimeError), caught(net[0]):
        net(IMAGES[:, :1])
    assert not net[0]._forward_hooks


def test_the_layers_that_are_found():
    net = network()
    assert last_linear(net) is net[7]
    assert last_convolution(net) is net[3]
    with pytest.raises(ValueError, match="linear layer"):
        last_linear(nn.ReLU())
    with pytest.raises(ValueError, match="2d convolution"):
        last_convolution(nn.Linear(2, 2))


def by_hand(net, image, label, method):
    """Each sum written out, one image and one channel at a time, in float64."""
    net = net.double().eval()
    features = net[:4](image[None].double()).detach().requires_grad_()
    score = net[4:](features)[0, label]
    (g,) = torch.autograd.grad(score, features)
    total = torch.zeros_like(features[0, 0])
    for k in range(features.shape[1]):
        a, d = features[0, k].detach(), g[0, k]
        if method == "gradcam":
            w = d.mean()
        else:
            below = 2 * d**2 + a.sum() * d**3
            w = (torch.where(below != 0, d**2 / below, torch.zeros_like(d)) * functional.relu(d)).sum()
        total += w * a
    return functional.relu(total)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_class_maps_equal_their_definition(method):
    net = network().eval()
    labels = torch.tensor([0, 1, 2, 0, 1])
    found = class_map(net, IMAGES, labels, method=method)
    for image, label, one in zip(IMAGES, labels, found, strict=True):
        assert torch.allclose(by_hand(network(), image, int(label), method).float(), one, rtol=1e-3, atol=1e-6)
    assert float(found.max()) > 0


def test_the_predicted_class_and_a_layer_of_choice():
    net = network().eval()
    assert torch.equal(class_map(net, IMAGES), class_map(net, IMAGES, net(IMAGES).argmax(1)))
    assert class_map(net, IMAGES, layer=net[0]).shape == (5, 7, 7)


def test_the_network_is_left_as_it_was():
    net = network().train()
    for p in net.parameters():
        p.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    class_map(net, IMAGES)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_bad_input():
    net = network()
    with pytest.raises(ValueError, match="method must be one of"):
        class_map(net, IMAGES, method="cam")
    with pytest.raises(ValueError, match="rows, columns"):
        class_map(net, IMAGES, layer=net[7])

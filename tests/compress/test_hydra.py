import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress import hydra, prune
from netwright.compress.hydra import HydraPruner, begin_finetune, begin_scores, stage
from netwright.nn.sparse import FixedMask, SparseConv2d, TopKMask, init_scores, sparsify, to_dense
from netwright.seeding import seeded, stream


def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)
        )


def batch(step, n=32):
    """Three classes, told apart by which third of the picture is bright."""
    y = torch.randint(3, (n,), generator=stream(0, "y", step))
    x = torch.randn(n, 1, 6, 6, generator=stream(0, "x", step)) * 0.5
    for k in range(3):
        x[y == k, :, 2 * k : 2 * k + 2] += 1
    return x, y


def train(net, steps=15, lr=0.1):
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        x, y = batch(step)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()


@torch.no_grad()
def loss(net):
    x, y = batch(1000, 256)
    return float(nn.functional.cross_entropy(copy.deepcopy(net).train()(x), y))


def weights(net):
    return [net[i].weight.detach().clone() for i in (0, 4)]


def originals(net):
    return [net[i].parametrizations.weight.original.detach().clone() for i in (0, 4)]


def test_the_scaled_start_is_magnitude_pruning_at_density_k():
    net = network()
    oracle = prune.magnitude(copy.deepcopy(net), 0.75)
    begin_scores(net, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(oracle), strict=True))
    scores = net[4].parametrizations.weight[0].scores
    assert float(scores.detach().abs().max()) == pytest.approx((6 / 128) ** 0.5)


def test_prune_learns_scores_and_leaves_weights_bit_identical():
    net = network()
    train(net)
    begin_scores(net, 0.1)
    before, mask = originals(net), [w != 0 for w in weights(net)]
    bias, first = net[4].bias.detach().clone(), loss(net)
    train(net, 30)
    assert all(torch.equal(a, b) for a, b in zip(before, originals(net), strict=True))
    assert torch.equal(net[4].bias, bias)
    assert not all(torch.equal(w != 0, m) for w, m in zip(weights(net), mask, strict=True))
    assert [int((w != 0).sum()) for w in weights(net)] == [7, 38]
    assert loss(net) < first  # better than magnitude pruning of the same weights


def test_finetune_trains_what_is_left_with_the_masks_fixed():
    net = begin_scores(network(), 0.1)
    train(net)
    before, x = weights(net), batch(0)[0]
    expected = copy.deepcopy(net).eval()(x)
    begin_finetune(net)
    assert torch.equal(copy.deepcopy(net).eval()(x), expected)
    first = loss(net)
    train(net)
    after = weights(net)
    assert all(torch.equal(a != 0, b != 0) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert loss(net) < first
    assert all(isinstance(net[i].parametrizations.weight[0], FixedMask) for i in (0, 4))
    # the same structure as magnitude pruning, and removable the same way
    assert list(net.state_dict()) == list(prune.magnitude(network(), 0.5).state_dict())
    prune.remove(net)
    assert list(net.state_dict()) == list(network().state_dict())


def test_stages_resume_from_state_dicts():
    pruner = HydraPruner(0.9)
    net = network()
    whole = pruner.run(copy.deepcopy(net), lambda n, s: train(n, 4))

    pruner.pretrain(net, lambda n: train(n, 4))
    halfway = begin_scores(copy.deepcopy(net), 0.1).state_dict()
    resumed = begin_scores(network(5), 0.1)
    resumed.load_state_dict(halfway)
    pruner.prune(resumed, lambda n: train(n, 4))
    scores = resumed[4].parametrizations.weight[0].scores.detach().clone()
    pruner.prune(resumed, lambda n: None)  # asked again: nothing starts anew
    assert torch.equal(resumed[4].parametrizations.weight[0].scores, scores)

    pruner.finetune(resumed, lambda n: None)
    again = prune.place_masks(network(6))
    again.load_state_dict(resumed.state_dict())
    pruner.finetune(again, lambda n: train(n, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))


def test_run_starts_at_the_stage_the_network_is_in():
    for prepare, expected in (
        (lambda n: n, ["pretrain", "prune", "finetune"]),
        (lambda n: begin_scores(n, 0.5), ["prune", "finetune"]),
        (lambda n: begin_finetune(begin_scores(n, 0.5)), ["finetune"]),
    ):
        seen = []
        net = HydraPruner(0.5).run(prepare(network()), lambda n, s, seen=seen: seen.append((s, stage(n))))
        assert seen == [(s, s) for s in expected]
        assert prune.sparsity(net).sparsity == 0.5


def test_order_of_the_stages_is_kept():
    pruner = HydraPruner(0.5)
    with pytest.raises(
        RuntimeError, match="finetune needs a network in stage prune or finetune, got one in stage pretrain"
    ):
        pruner.finetune(network(), train)
    with pytest.raises(RuntimeError, match="begin_scores comes before begin_finetune, but no layer has scores"):
        begin_finetune(network())
    done = begin_finetune(begin_scores(network(), 0.5))
    with pytest.raises(RuntimeError, match="but layer '0' has a fixed mask"):
        begin_scores(done, 0.5)
    for method in (pruner.pretrain, pruner.prune):
        with pytest.raises(RuntimeError, match="got one in stage finetune"):
            method(done, train)


def test_bad_arguments_leave_the_network_alone():
    net = network()
    for density in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
            begin_scores(net, density)
    with pytest.raises(ValueError, match="skip must name"):
        begin_scores(net, 0.5, ["stem"])
    net[4].weight.data.zero_()
    with pytest.raises(ValueError, match="layer '4' must have a weight that is not all zero"):
        begin_scores(net, 0.5)
    assert not any(parametrize.is_parametrized(m) for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_skipped_layers_stay_dense_and_are_frozen_while_scores_are_learned():
    net = begin_scores(network(), 0.1, skip=["4"])
    before = net[4].weight.detach().clone()
    train(net, 3)
    assert torch.equal(net[4].weight, before)
    begin_finetune(net)
    train(net, 3)
    assert not torch.equal(net[4].weight, before)
    assert prune.sparsity(net).layers["4"].kept == 384


def test_sparse_layers_serve_as_they_are():
    net = sparsify(network(), 1.0)
    begin_scores(net, 0.25)
    assert isinstance(net[0], SparseConv2d)
    assert net[0].density == 0.25
    train(net, 3)
    begin_finetune(net)
    assert hydra.stage(net) == "finetune"
    mask, scores = net[0].mask().clone(), net[0].scores.detach().clone()
    train(net, 3)
    assert torch.equal(net[0].mask(), mask)
    assert torch.equal(net[0].scores, scores)
    assert prune.sparsity(to_dense(net)).kept == 18 + 96


def test_other_scores_can_be_put_in_place_of_the_scaled_ones():
    net = begin_scores(network(), 0.5)
    mask = net[4].parametrizations.weight[0]
    assert isinstance(mask, TopKMask)
    before = mask.mask().clone()
    init_scores(net, "kaiming", generator=stream(0, "scores"))
    assert not torch.equal(mask.mask(), before)


def test_a_shared_weight_has_one_mask():
    net = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12))
    net[2].weight = net[0].weight
    begin_scores(net, 0.25)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "0.parametrizations.weight.0.scores", "1.parametrizations.weight.0.scores"
    ]  # fmt: skip
    assert torch.equal(net[0].weight, net[2].weight)
    begin_finetune(net)
    assert net[0].parametrizations.weight[0] is net[2].parametrizations.weight[0]
    assert int((net[2].weight != 0).sum()) == 24
    assert all(p.requires_grad for p in net.parameters())

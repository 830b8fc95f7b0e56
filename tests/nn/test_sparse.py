"""Sparse layers against worked examples, torch's own pruning, and closed forms of the gradients."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from netwright.nn import sparse
from netwright.nn.sparse import FixedMask, SparseConv2d, SparseLinear, TopKMask
from netwright.seeding import seeded, stream

CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}


@pytest.fixture(autouse=True)
def _seed():
    with seeded(0, "sparse"):
        yield


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def worked(density: float = 0.5) -> SparseLinear:
    layer = SparseLinear(4, 1, bias=False, density=density)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        layer.scores.copy_(torch.tensor([[0.1, -0.4, 0.2, 0.3]]))
    return layer


def test_worked_example():
    layer = worked()
    layer.train_mode("both")
    y = layer(torch.ones(1, 4))
    y.sum().backward()
    assert layer.mask().tolist() == [[0, 1, 0, 1]]
    assert y.item() == 6
    assert layer.weight.grad.tolist() == [[0, 1, 0, 1]]
    torch.testing.assert_close(layer.scores.grad, torch.tensor([[1.0, -2.0, 3.0, 4.0]]))


@pytest.mark.parametrize("what", ["weights", "both"])
def test_density_one_is_the_dense_layer(what):
    conv, linear = nn.Conv2d(**CONV), nn.Linear(12, 7)
    for dense, x in ((conv, torch.randn(2, 4, 8, 8)), (linear, torch.randn(3, 12))):
        ours = sparse.sparsify(dense, 1.0)
        sparse.train_mode(ours, what)
        ours(x).square().sum().backward()
        dense(x).square().sum().backward()
        torch.testing.assert_close(ours(x), dense(x), rtol=0, atol=1e-7)
        torch.testing.assert_close(ours.weight.grad, dense.weight.grad, rtol=0, atol=1e-7)
        torch.testing.assert_close(ours.bias.grad, dense.bias.grad, rtol=0, atol=1e-7)
        assert (ours.scores.grad is not None) == (what == "both")


def test_padding_mode_groups_and_dilation_are_kept():
    dense = nn.Conv2d(
        4, 8, 3, stride=2, padding="valid", dilation=2, groups=2, padding_mode="zeros", dtype=torch.float64
    )
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(sparse.sparsify(dense, 1.0)(x.double()), dense(x.double()))
    assert torch.equal(sparse.sparsify(circular, 1.0)(x), circular(x))


@pytest.mark.parametrize("density", [0.03, 0.1, 0.5, 0.9])
def test_scaled_scores_are_magnitude_pruning(density):
    net = sparse.sparsify(network(), density)
    sparse.init_scores(net, "scaled")
    for (_, layer), (_, peer) in zip(sparse.layers(net), sparse.layers(network()), strict=True):
        with torch.no_grad():
            peer.weight.copy_(layer.weight)
        n = peer.weight.numel()
        prune.l1_unstructured(peer, "weight", amount=n - sparse.kept_count(n, density))
        assert torch.equal(layer.mask(), peer.weight_mask)


def test_scaled_scores_reach_the_bound_exactly():
    net = sparse.sparsify(network(), 0.5)
    sparse.init_scores(net, "scaled")
    for layer, fan_in in ((net[0], 27), (net[3], 8), (net[5], 128)):
        assert layer.scores.abs().max() == torch.tensor(math.sqrt(6 / fan_in))


def test_kaiming_scores_have_the_right_spread_and_follow_the_generator():
    layer = sparse.sparsify(nn.Linear(200, 300), 0.5)
    sparse.init_scores(layer, "kaiming", generator=stream(3, "scores"))
    first = layer.scores.clone()
    assert abs(first.std() - math.sqrt(2 / 200)) < 1e-3
    sparse.init_scores(layer, "kaiming", generator=stream(3, "scores"))
    assert torch.equal(first, layer.scores)


def test_kept_counts():
    for n in range(1, 51):
        scores = torch.randn(n)
        for k in range(1, 51):
            density = k / 50
            assert sparse.top_k_mask(scores, density).sum() == max(1, round(density * n))
            assert sparse.top_k_mask(scores, density, "official").sum() == n - int((1 - density) * n)


def test_rounding_as_the_official_code_does_it():
    assert sparse.kept_count(10, 0.9, "official") == 10
    layer = SparseLinear(10, 1, density=0.9, rounding="official")
    assert layer.mask().sum() == 10
    assert SparseLinear(10, 1, density=0.9).mask().sum() == 9


def test_ties_are_broken_as_by_a_stable_sort():
    for seed in range(20):
        generator = stream(seed, "ties")
        scores = torch.randint(-3, 4, (60,), generator=generator).float()
        for density in (0.1, 0.35, 0.5, 0.8):
            keep = sparse.kept_count(60, density)
            order = scores.abs().argsort(stable=True)
            expected = torch.ones(60)
            expected[order[: 60 - keep]] = 0
            assert torch.equal(sparse.top_k_mask(scores, density), expected)
    assert sparse.top_k_mask(torch.ones(4), 0.5).tolist() == [0, 0, 1, 1]


def test_masks_are_nested():
    for scores in (torch.randn(7, 13), torch.randint(0, 3, (7, 13)).float()):
        masks = [sparse.top_k_mask(scores, k / 20) for k in range(1, 21)]
        for small, large in itertools.pairwise(masks):
            assert bool((small <= large).all())


def test_stage_two_leaves_weights_and_stage_three_leaves_masks():
    net = sparse.sparsify(network(), 0.1)
    sparse.init_scores(net, "scaled")
    x = torch.randn(4, 3, 4, 4)

    def train(what):
        sparse.train_mode(net, what)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, 0.5, momentum=0.9, weight_decay=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            net(x).square().sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()

    def state(name):
        return {key: value.clone() for key, value in net.state_dict().items() if key.endswith(name)}

    before, masks = (
        {**state("weight"), **state("bias")},
        [layer.mask().clone() for _, layer in sparse.layers(net)],
    )
    train("scores")
    for key, value in before.items():
        assert torch.equal(net.state_dict()[key], value) != key.startswith("1."), key  # batch norm is free
    trained_masks = [layer.mask().clone() for _, layer in sparse.layers(net)]
    assert not all(torch.equal(a, b) for a, b in zip(masks, trained_masks, strict=True))

    scores, weights = state("scores"), state("weight")
    train("weights")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in scores.items())
    assert all(torch.equal(a, layer.mask()) for a, (_, layer) in zip(trained_masks, sparse.layers(net), strict=True))
    assert not torch.equal(weights["0.weight"], net[0].weight)
    dense = sparse.to_dense(net)
    for mask, (_, layer) in zip(trained_masks, sparse.layers(dense), strict=True):
        assert bool((layer.weight[mask == 0] == 0).all())


def test_to_dense_and_csr_equal_the_sparse_layer():
    net = sparse.sparsify(network(), 0.2).eval()
    x = torch.randn(2, 3, 4, 4)
    dense = sparse.to_dense(net)
    torch.testing.assert_close(dense(x), net(x), rtol=0, atol=1e-6)
    assert not any("scores" in key or "extra" in key for key in dense.state_dict())
    assert [type(layer) for _, layer in sparse.layers(dense)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    matrices = sparse.export_csr(net)
    assert set(matrices) == {"3", "5"}
    hidden = net[:3](x)
    by_matrix = torch.stack([matrices["3"] @ image.flatten(1) for image in hidden]).view(2, 8, 4, 4)
    torch.testing.assert_close(by_matrix, net[3](hidden), rtol=0, atol=1e-5)
    flat = net[:5](x)
    torch.testing.assert_close((matrices["5"] @ flat.T).T + net[5].bias, net[5](flat), rtol=0, atol=1e-5)
    assert matrices["5"].values().numel() == round(0.2 * 640)
    assert all(m.layout == torch.sparse_csr for m in matrices.values())


def test_to_dense_keeps_the_order_of_parameters():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2, bias=False))
    masked = sparse.sparsify(net, 0.5, skip=["2"])
    parametrize.register_parametrization(masked[2], "weight", sparse.FixedMask(torch.eye(2, 4)))
    dense = sparse.to_dense(masked)
    assert not any(parametrize.is_parametrized(part) for part in dense.modules())
    assert list(dense.state_dict()) == list(net.state_dict())
    assert [p.shape for p in dense.parameters()] == [p.shape for p in net.parameters()]


def test_method_to_dense_of_a_layer():
    layer = SparseConv2d(3, 5, 3, density=0.2)
    x = torch.randn(1, 3, 6, 6)
    assert type(layer.to_dense()) is nn.Conv2d
    assert torch.equal(layer.to_dense()(x), layer(x))


@pytest.mark.parametrize("make", [
    lambda: (SparseConv2d(2, 3, 3, groups=1, density=0.4, dtype=torch.float64), (1, 2, 4, 4)),
    lambda: (SparseLinear(5, 3, density=0.4, dtype=torch.float64), (2, 5)),
])  # fmt: skip
@pytest.mark.parametrize("what", ["weights", "both"])
def test_weight_gradient(make, what):
    layer, shape = make()
    layer.train_mode(what)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def output(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(output, (weight, x))
    assert torch.autograd.gradgradcheck(output, (weight, x))


def test_score_gradient_is_the_formula_for_masked_entries_too():
    layer = SparseConv2d(**CONV, density=0.1, dtype=torch.float64)
    layer.train_mode("both")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    (layer(x) ** 3).sum().backward()
    product = (layer.mask() * layer.weight).detach().requires_grad_()
    (g,) = torch.autograd.grad((nn.functional.conv2d(x, product, layer.bias, padding=1) ** 3).sum(), product)
    torch.testing.assert_close(layer.scores.grad, layer.scores.sign() * layer.weight * g)
    torch.testing.assert_close(layer.weight.grad, layer.mask() * g)
    assert bool((layer.scores.grad[layer.mask() == 0] != 0).all())


def test_scores_can_be_differentiated_twice():
    weight, scores = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight.requires_grad_(), scores.requires_grad_()
    mask = sparse.top_k_mask(scores, 0.5)
    y = (sparse.masked_weight(weight, scores, mask) ** 2).sum()
    (first,) = torch.autograd.grad(y, scores, create_graph=True)  # sign(S) W 2 M W
    (second,) = torch.autograd.grad(first.sum(), weight)
    torch.testing.assert_close(second, 4 * scores.sign() * mask * weight)


def test_parametrization_equals_the_layer():
    layer = SparseConv2d(**CONV, density=0.3)
    layer.train_mode("both")
    conv = nn.Conv2d(**CONV)
    conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    parametrize.register_parametrization(conv, "weight", TopKMask(0.3, scores=layer.scores))
    sparse.train_mode(conv, "both")
    x = torch.randn(2, 4, 5, 5)
    layer(x).square().sum().backward()
    conv(x).square().sum().backward()
    assert torch.equal(layer(x), conv(x))
    steps = conv.parametrizations.weight
    assert torch.equal(steps.original.grad, layer.weight.grad)
    assert torch.equal(steps[0].scores.grad, layer.scores.grad)
    sparse.train_mode(conv, "scores")
    assert not steps.original.requires_grad
    assert not conv.bias.requires_grad
    assert steps[0].scores.requires_grad
    sparse.init_scores(conv, "scaled")
    assert steps[0].scores.abs().max() == torch.tensor(math.sqrt(6 / 36))
    plain = sparse.to_dense(conv)
    assert type(plain) is nn.Conv2d
    assert torch.equal(plain(x), conv(x))
    assert parametrize.is_parametrized(conv)


def test_other_parametrizations_go_first():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    ours = sparse.sparsify(layer, 0.25)
    assert int((ours.weight != 0).sum()) == 6
    kept = ours.weight != 0
    assert torch.equal(ours.weight[kept], layer.weight[kept])
    sparse.init_scores(ours, "scaled")
    expected = torch.zeros(24)
    expected[layer.weight.abs().flatten().topk(6).indices] = 1
    assert torch.equal(sparse.mask_of(ours).mask().flatten(), expected)
    sparse.train_mode(ours, "scores")
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["parametrizations.weight.1.scores"]


def test_other_convolutions_and_subclasses_are_parametrized():
    class Loud(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose2d(4, 2, 3, groups=2), Loud(2, 2, 1))
    ours = sparse.sparsify(net, 0.5)
    assert isinstance(ours[2], Loud)
    report = sparse.sparsify(net, 0.5)
    assert [layer.kept for layer in sparse.sparsity_report(report).values()] == [9, 18, 2]
    x = torch.randn(1, 2, 3, 3)
    mask = sparse.mask_of(ours[2]).mask()
    torch.testing.assert_close(ours[2](x), 2 * nn.functional.conv2d(x, net[2].weight * mask, net[2].bias))


def test_attention_is_masked_too():
    layer = sparse.sparsify(nn.MultiheadAttention(8, 2, batch_first=True), 0.25).eval()
    x = torch.randn(2, 3, 8)
    dense = sparse.to_dense(layer)
    assert int((dense.out_proj.weight != 0).sum()) == 16
    torch.testing.assert_close(layer(x, x, x)[0], dense(x, x, x)[0])


@pytest.mark.parametrize("parametrized", [False, True])
def test_masks_survive_state_dict_deepcopy_and_pickle(parametrized, tmp_path):
    from netwright.storage import read_tensors, write_tensors

    def build(density):
        if not parametrized:
            return SparseConv2d(**CONV, density=density)
        conv = nn.Conv2d(**CONV)
        parametrize.register_parametrization(conv, "weight", TopKMask(density, rounding="official"))
        return conv

    layer = build(0.13)
    x = torch.randn(1, 4, 5, 5)
    expected = layer(x)
    with torch.no_grad():
        layer(x)
    write_tensors(tmp_path / "weights.safetensors", layer.state_dict())
    loaded = build(0.9)
    loaded.load_state_dict(read_tensors(tmp_path / "weights.safetensors"))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = build(0.5)
    again.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, again, copy.deepcopy(layer)):
        assert torch.equal(other(x), expected)
        assert sparse.mask_of(other).density == 0.13
        assert sparse.mask_of(other).rounding == sparse.mask_of(layer).rounding
    if not parametrized:
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


def test_a_copy_is_independent():
    layer = worked()
    with torch.no_grad():
        layer(torch.ones(1, 4))
        other = copy.deepcopy(layer)
        layer.scores.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
        layer.weight.mul_(2)
        assert other(torch.ones(1, 4)).item() == 6
        assert layer(torch.ones(1, 4)).item() == 6  # 2 * (1 + 2)


def test_mask_is_computed_only_when_scores_or_density_change(monkeypatch):
    calls = []
    original = sparse.masks.top_k_mask
    monkeypatch.setattr(sparse.masks, "top_k_mask", lambda *a: calls.append(1) or original(*a))
    layer = SparseLinear(16, 8, density=0.25)
    x = torch.randn(4, 16)
    optimiser = torch.optim.SGD([layer.weight, layer.bias], 0.1)
    for _ in range(5):
        layer(x).square().sum().backward()
        optimiser.step()
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1
    layer.set_density(0.25)
    layer(x)
    assert len(calls) == 1
    layer.set_density(0.5)
    assert layer.mask().sum() == 64
    assert len(calls) == 2
    layer.train_mode("scores")
    layer(x).sum().backward()
    torch.optim.SGD([layer.scores], 10.0).step()
    assert torch.equal(layer.mask(), original(layer.scores, 0.5))
    assert len(calls) == 3
    layer.double()
    assert layer(x.double()).dtype == torch.float64


def test_density_one_with_frozen_scores_uses_the_weight_itself():
    layer = SparseLinear(4, 4)
    assert layer.apply_mask(layer.weight) is layer.weight
    topk = TopKMask(1.0)
    topk.right_inverse(layer.weight)
    assert topk(layer.weight) is layer.weight


def test_masked_weight_is_kept_while_no_gradient_is_wanted():
    layer = SparseLinear(8, 8, density=0.5)
    with torch.no_grad():
        first = sparse.effective_weight(layer)
        assert sparse.effective_weight(layer) is first
        layer.weight.add_(1)
        second = sparse.effective_weight(layer)
        assert torch.equal(second, layer.weight * layer.mask())
        second.zero_()  # somebody writes to what he was given
        assert torch.equal(sparse.effective_weight(layer), layer.weight * layer.mask())
    assert sparse.effective_weight(layer).requires_grad


def test_a_mask_made_in_inference_mode_can_be_trained_with():
    layer = SparseLinear(4, 2, density=0.5).requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    layer.train_mode("both")
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        born_there = SparseLinear(4, 2, density=0.5)
        assert torch.equal(
            born_there(x), nn.functional.linear(x, born_there.weight * born_there.mask(), born_there.bias)
        )


def test_functional_call_uses_what_it_is_given():
    layer = SparseLinear(4, 1, bias=False, density=0.5)
    x = torch.ones(1, 4)
    with torch.no_grad():
        layer(x)
        for scores in ([4.0, 3, 2, 1], [1.0, 2, 3, 4]):
            given = {"weight": torch.tensor([[1.0, 2, 3, 4]]), "scores": torch.tensor([scores])}
            expected = 3 if scores[0] == 4 else 7
            assert torch.func.functional_call(layer, given, (x,)).item() == expected


def test_per_example_gradients():
    layer = SparseLinear(4, 2, density=0.5)
    layer.train_mode("both")
    params = dict(layer.named_parameters())
    x = torch.randn(3, 4)

    def loss(params, x):
        return torch.func.functional_call(layer, params, (x,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i]).square().sum().backward()
        torch.testing.assert_close(grads["weight"][i], layer.weight.grad)
        torch.testing.assert_close(grads["scores"][i], layer.scores.grad)


def test_fixed_mask():
    conv = nn.Conv2d(**CONV)
    mask = sparse.top_k_mask(conv.weight, 0.2)
    parametrize.register_parametrization(conv, "weight", FixedMask(mask.bool()))
    x = torch.randn(1, 4, 5, 5)
    conv(x).square().sum().backward()
    original = conv.parametrizations.weight.original
    assert bool((original.grad[mask == 0] == 0).all())
    assert bool((original.grad[mask == 1] != 0).all())
    twin = copy.deepcopy(conv)
    other = nn.Conv2d(**CONV)
    parametrize.register_parametrization(other, "weight", FixedMask(torch.ones_like(mask)))
    other.load_state_dict(conv.state_dict())
    dense = sparse.to_dense(conv)
    for module in (twin, other, dense):
        assert torch.equal(module(x), conv(x))
    assert sparse.sparsity_report(conv)[""].kept == int(mask.sum()) == sparse.sparsity_report(dense)[""].kept
    sparse.mask_of(conv).set_mask(torch.zeros_like(mask))
    assert sparse.sparsity(conv) == 1
    assert sparse.sparsity(twin) == 1 - int(mask.sum()) / mask.numel()
    assert conv.double()(x.double()).dtype == torch.float64


def test_report_counts_dead_filters():
    conv = SparseConv2d(1, 4, 2, density=0.25, bias=False)
    with torch.no_grad():
        conv.scores.zero_()
        conv.scores[1], conv.scores[2, 0, 0, 0] = 2, -1
        conv.weight.fill_(1)
    (layer,) = sparse.sparsity_report(conv).values()
    assert (layer.kept, layer.total, layer.dead_filters, layer.filters) == (4, 16, 3, 4)
    assert layer.sparsity == 0.75
    transposed = nn.ConvTranspose2d(4, 6, 1, groups=2)
    with torch.no_grad():
        transposed.weight.fill_(1)
        transposed.weight[:2, 1] = 0
    assert sparse.sparsity_report(transposed)[""].dead_filters == 1


def test_sparsify_leaves_the_original_and_shares_what_was_shared():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    seen = []
    shared.register_forward_hook(lambda *a: seen.append(1))
    ours = sparse.sparsify(net, 0.5)
    assert type(net[0]) is nn.Linear
    assert ours[0] is ours[2]
    ours(torch.randn(1, 4))
    assert len(seen) == 2
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    both = sparse.sparsify(tied, 0.5)
    assert both[0].weight is both[1].weight
    assert sparse.sparsify(net.eval(), 0.5)[0].training is False


def test_skip_takes_names_and_patterns():
    net = sparse.sparsify(network(), 0.1, skip=["0", "5*"])
    assert [type(layer) for _, layer in sparse.layers(net)] == [nn.Conv2d, SparseConv2d, nn.Linear]
    again = sparse.sparsify(net, 0.5)
    assert [sparse.mask_of(layer).density for _, layer in sparse.layers(again)] == [0.5] * 3
    assert sparse.mask_of(net[3]).density == 0.1


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_density_is_checked_everywhere(density):
    layer = SparseLinear(2, 2)
    for call in (
        lambda: SparseLinear(2, 2, density=density),
        lambda: SparseConv2d(2, 2, 1, density=density),
        lambda: TopKMask(density),
        lambda: sparse.sparsify(nn.Linear(2, 2), density),
        lambda: sparse.set_density(layer, density),
        lambda: layer.set_density(density),
    ):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got"):
            call()


def test_errors():
    empty, plain = nn.Sequential(nn.ReLU()), nn.Linear(2, 2)
    for call in (
        sparse.sparsity_report,
        sparse.export_csr,
        sparse.sparsity,
        lambda m: sparse.sparsify(m, 0.5),
    ):
        with pytest.raises(ValueError, match="convolution or linear"):
            call(empty)
    for call in (
        lambda m: sparse.set_density(m, 0.5),
        lambda m: sparse.train_mode(m, "weights"),
        lambda m: sparse.init_scores(m, "scaled"),
    ):
        with pytest.raises(ValueError, match="scores"):
            call(plain)
    with pytest.raises(ValueError, match=r"skip must name .* got 'head'; there are 0, 3, 5"):
        sparse.sparsify(network(), 0.5, skip=["head"])
    layer = SparseLinear(2, 2, density=0.5)
    with pytest.raises(ValueError, match=r"what must be .* got 'all'"):
        layer.train_mode("all")
    with pytest.raises(ValueError, match=r"method must be .* got 'ones'"):
        sparse.init_scores(layer, "ones")
    with pytest.raises(ValueError, match=r"rounding must be .* got 'up'"):
        SparseLinear(2, 2, rounding="up")
    with torch.no_grad():
        layer.scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores must be numbers, got NaN"):
        layer(torch.ones(1, 2))
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(ValueError, match="all zero"):
        sparse.init_scores(layer, "scaled")
    with pytest.raises(ValueError, match=r"scores must have shape \(2, 2\), got \(3,\)"):
        parametrize.register_parametrization(nn.Linear(2, 2), "weight", TopKMask(0.5, scores=torch.ones(3)))
    with pytest.raises(ValueError, match="zeros and ones"):
        FixedMask(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\), got \(3,\)"):
        parametrize.register_parametrization(nn.Linear(2, 2), "weight", FixedMask(torch.ones(3)))
    with pytest.raises(ValueError, match=r"mask must have shape \(3,\), got \(2,\)"):
        FixedMask(torch.ones(3)).set_mask(torch.ones(2))


def test_exports_without_masks(tmp_path):
    import onnxruntime

    net = sparse.to_dense(sparse.sparsify(network(), 0.1)).eval()
    x = torch.randn(1, 3, 4, 4)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), path, input_names=["x"], dynamo=True, verbose=False)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=0, atol=1e-5)


def test_a_sparse_network_itself_can_be_exported():
    net = sparse.sparsify(network(), 0.1).eval()
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))

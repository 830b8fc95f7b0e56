import pytest
import torch
from torch import nn

from netwright.compress.low_rank import LowRankConv2d, LowRankLinear, decompose, finalize, low_rank_layers
from netwright.seeding import seeded, stream

CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 1), "stride": 2, "padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1, "stride": (1, 2)},
]


def network():
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4),
        )  # fmt: skip


X = torch.randn(5, 2, 8, 8, generator=stream(0, "x"))


@pytest.mark.parametrize("options", CONVS)
def test_a_decomposed_convolution_is_the_same_function(options):
    with seeded(0, "init"):
        conv = nn.Conv2d(2, 5, **options)
    low = LowRankConv2d.from_dense(conv)
    assert torch.allclose(low(X), conv(X), atol=1e-5)
    assert torch.allclose(low.weight, conv.weight, atol=1e-5)
    assert torch.allclose(low.to_dense()(X), conv(X), atol=1e-5)
    low.rank = 2
    for form in (low.to_dense(), low.factors()):
        assert torch.allclose(form(X), low(X), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (4, 4), (1, 5)])
def test_factors_are_balanced_and_prefixes_are_the_best_of_their_rank(shape):
    dense = nn.Linear(*shape)
    low = LowRankLinear.from_dense(dense)
    assert torch.allclose(low.U @ low.U.T, low.V @ low.V.T, atol=1e-5)
    left, size, right = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    for k in range(1, min(shape) + 1):
        with low.truncate(k):
            best = (left[:, :k] * size[:k]) @ right[:k]
            assert torch.allclose(low.weight, best, atol=1e-5)
            x = torch.randn(2, 7, shape[0], generator=stream(k, "x"))
            assert torch.allclose(low(x), x @ best.T + dense.bias, atol=1e-5)
    assert low.used == low.rank == min(shape)


def test_gradient_of_what_is_truncated_is_exactly_zero():
    low = decompose(network())
    with low[6].truncate(3), low[0].truncate(1):
        low(X).square().sum().backward()
    for layer, k in ((low[6], 3), (low[0], 1)):
        for factor in (layer.U, layer.V):
            assert not factor.grad[k:].any()
            assert factor.grad[:k].any(1).all()
    assert low[3].U.grad[-1].any()


def test_full_rank_training_is_that_of_two_factors():
    """Bit for bit: the same products in the same order."""
    low = LowRankLinear(6, 4)
    U, V, b = (nn.Parameter(p.detach().clone()) for p in (low.U, low.V, low.bias))
    ours, theirs = torch.optim.SGD(low.parameters(), 0.1), torch.optim.SGD([U, V, b], 0.1)
    for step in range(5):
        x = torch.randn(3, 6, generator=stream(step, "x"))
        for optimiser, out in ((ours, low(x)), (theirs, torch.addmm(b, x @ V.T, U))):
            optimiser.zero_grad()
            out.square().sum().backward()
            optimiser.step()
    assert all(torch.equal(a, c) for a, c in zip((low.U, low.V, low.bias), (U, V, b), strict=True))


def test_importance_and_shrinking():
    low = decompose(network())
    for layer in low_rank_layers(low).values():
        size = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        assert torch.allclose(layer.importance(hierarchical=False), size, rtol=1e-4, atol=1e-5)
        tail = size.flip(0).cumsum(0).flip(0)  # of balanced factors both norms are the root of this sum
        assert torch.allclose(layer.importance(), tail, rtol=1e-4, atol=1e-5)
        assert bool((layer.importance().diff() <= 0).all())
        ranks = layer.rank
        assert layer.shrink(0.0) == ranks
        assert layer.shrink(0.0, hierarchical=False) == ranks
        assert layer.shrink(float(tail[2]) * 0.999) == 3
        assert layer.shrink(float("inf")) == 0


def test_plain_shrinking_looks_at_single_terms():
    layer = LowRankLinear(4, 4)
    with torch.no_grad():
        for factor in (layer.U, layer.V):
            factor.copy_(torch.diag(torch.tensor([2.0, 0.0, 1.0, 0.1])))
    assert layer.importance(hierarchical=False).tolist() == pytest.approx([4, 0, 1, 0.01], abs=1e-5)
    assert layer.shrink(0.5, hierarchical=False) == 3  # the empty second term stays before the third
    assert layer.shrink(2.0, hierarchical=False) == 1


@pytest.mark.parametrize("dense", [nn.Linear(6, 4), nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 5, 3, bias=False)])
def test_rank_nought_gives_the_bias(dense):
    x = X if isinstance(dense, nn.Conv2d) else torch.randn(3, 2, 6)
    low = decompose(dense)
    low.shrink(float("inf"))
    for form in (low, finalize(low)):
        out = form(x)
        assert out.shape == dense(x).shape
        bias = torch.zeros(1) if dense.bias is None else dense.bias
        assert torch.equal(out, (bias[:, None, None] if isinstance(dense, nn.Conv2d) else bias).expand_as(out))
    assert sum(p.numel() for p in finalize(low).parameters()) == (0 if dense.bias is None else len(dense.bias))


def test_the_rank_is_part_of_the_state():
    low = decompose(network())
    low[6].rank = 5
    other = decompose(network())
    other.load_state_dict(low.state_dict())
    assert other[6].rank == 5


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: LowRankLinear(4, 3).truncate(0).__enter__(), r"k must lie in 1..3, got 0"),
        (lambda: LowRankLinear(4, 3).truncate(4).__enter__(), r"k must lie in 1..3, got 4"),
        (lambda: LowRankLinear(4, 3, rank=4), r"rank must lie in 1..3, got 4"),
        (lambda: LowRankLinear(4, 3).shrink(-1.0), "eps must be >= 0"),
        (lambda: LowRankConv2d(nn.Conv2d(4, 4, 3, groups=2)), "groups must be 1, got 2"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()

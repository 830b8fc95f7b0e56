import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress import prune
from netwright.compress.quantize import baked, post_training_quantize, uniform_quantize
from netwright.compress.quantize.placing import quantizers
from netwright.nn.sparse import sparsify
from netwright.seeding import seeded, stream


def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
        )


X = torch.randn(6, 1, 6, 6, generator=stream(0, "x"))


@pytest.mark.parametrize("make", [lambda net: prune.magnitude(net, 0.8), lambda net: sparsify(net, 0.2)])
def test_zeros_of_pruning_stay(make):
    pruned = make(network())
    rounded = post_training_quantize(pruned, 2)
    before = prune.sparsity(pruned)
    assert prune.sparsity(rounded).kept == before.kept
    weight = rounded[3].weight
    original = prune.effective_weight(pruned[3])
    kept = original != 0
    assert torch.equal(weight[kept], uniform_quantize(original[kept], 2))
    rounded(X).sum().backward()
    gradient = rounded[3].parametrizations.weight.original.grad
    assert gradient[kept].any()
    assert not gradient[~kept].any()
    assert prune.sparsity(baked(rounded)).kept == before.kept


def test_which_tensors_take_part():
    def quantised(**options):
        net = post_training_quantize(network(), 2, **options)
        return {
            n.replace("parametrizations.", "").replace(".original", "")
            for n, _ in net.named_parameters()
            if "orig" in n
        }

    assert quantised() == {"0.weight", "3.weight", "5.weight"}
    assert quantised(quantize_first_last=False) == {"3.weight"}
    assert quantised(quantize="all") == {n for n, _ in network().named_parameters()}


def test_projections_of_attention_take_part():
    with seeded(0, "init"):
        net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    rounded, x = post_training_quantize(net, 2), torch.randn(2, 3, 16, generator=stream(0, "tokens"))
    assert len(rounded.self_attn.in_proj_weight.unique()) <= 4 * 3
    with torch.no_grad():
        assert not torch.allclose(rounded(x), net(x), atol=1e-2)
        assert torch.allclose(baked(rounded)(x), rounded(x), atol=1e-5)
    assert list(baked(rounded).state_dict()) == list(net.state_dict())


def test_baked_is_plain_in_the_usual_order():
    for which in ("weights", "all"):
        rounded = post_training_quantize(network(), 2, quantize=which)
        plain = baked(rounded)
        assert list(plain.state_dict()) == list(network().state_dict())
        assert torch.equal(plain.eval()(X), rounded.eval()(X))
        assert parametrize.is_parametrized(rounded[0])


class Language(nn.Module):
    """A language model whose classifier has the embedding's weight."""

    def __init__(self):
        super().__init__()
        with seeded(0, "init"):
            self.embedding, self.middle, self.out = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.middle(self.embedding(tokens).mean(1)))


TOKENS = torch.randint(0, 50, (4, 7), generator=stream(0, "tokens"))


@pytest.mark.parametrize("which", ["weights", "all"])
def test_a_shared_weight_is_rounded_for_all_who_use_it(which):
    rounded = post_training_quantize(Language(), 2, quantize=which)
    assert torch.equal(rounded.embedding.weight, rounded.out.weight)
    assert torch.equal(rounded.out.weight, uniform_quantize(Language().out.weight, 2))
    steps = [layer.parametrizations.weight for layer in (rounded.embedding, rounded.out)]
    assert steps[0].original is steps[1].original
    assert steps[0][0] is steps[1][0]
    plain = baked(rounded)
    assert plain.embedding.weight is plain.out.weight
    assert torch.equal(plain(TOKENS), rounded(TOKENS))
    rounded(TOKENS).sum().backward()
    assert steps[0].original.grad.abs().sum() > 0


def test_what_shares_with_a_layer_that_is_left_out_is_left_out():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[3].weight
    rounded = post_training_quantize(net, 2, quantize_first_last=False)
    assert [name for name, *_ in quantizers(rounded)] == ["1.weight"]


def test_other_parametrizations_are_baked_in():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))
    assert torch.equal(post_training_quantize(net, 3).weight, uniform_quantize(net.weight.detach(), 3))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: post_training_quantize(nn.ReLU(), 2), "must hold weights to quantise"),
        (lambda: post_training_quantize(nn.Linear(2, 2), 2, quantize="biases"), "quantize must be one of"),
        (
            lambda: post_training_quantize(nn.Linear(2, 2), 2, ranges="best"),
            "ranges must be one of minmax, mse, got",
        ),
        (lambda: post_training_quantize(nn.Linear(2, 2), 2, quantize_first_last=False), "without any left"),
        (
            lambda: post_training_quantize(post_training_quantize(nn.Linear(2, 2), 2), 2),
            "must not be quantised already",
        ),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()

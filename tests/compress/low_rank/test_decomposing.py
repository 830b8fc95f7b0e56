"""Whole networks as factors, and back."""

import pytest
import torch
from torch import nn

from netwright.compress import magnitude
from netwright.compress.low_rank import (
    LowRankConv2d,
    LowRankLinear,
    decompose,
    factored_ranks,
    finalize,
    low_rank_layers,
    with_ranks,
)
from netwright.seeding import seeded, stream
from netwright.train.tract import apply_tract, remove_tract


def network():
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 4),
        )  # fmt: skip


X = torch.randn(5, 2, 8, 8, generator=stream(0, "x"))


def test_a_decomposed_network_is_the_same_function():
    net = network().eval()
    low = decompose(net)
    assert torch.allclose(low(X), net(X), atol=1e-5)
    assert list(low_rank_layers(low)) == ["0", "3", "6", "8"]
    assert not low.training
    assert isinstance(net[0], nn.Conv2d)


def test_which_layers_are_decomposed():
    assert list(low_rank_layers(decompose(network(), ignore_first=1, ignore_last=True))) == ["3", "6"]
    assert list(low_rank_layers(decompose(network(), layers=(nn.Linear,)))) == ["6", "8"]
    shared = nn.Linear(4, 4)
    low = decompose(nn.Sequential(shared, nn.ReLU(), shared))
    assert low[0] is low[2]
    pruned = magnitude(network(), 0.7)
    assert torch.allclose(decompose(pruned).eval()(X), pruned.eval()(X), atol=1e-5)


def test_groups_are_skipped_with_a_warning(capsys):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    assert list(low_rank_layers(decompose(net))) == ["1"]
    assert "groups are not decomposed: 0" in capsys.readouterr().err


def test_layers_that_share_their_weight_stay_as_they_are(capsys):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    net[1].weight = net[0].weight
    low = decompose(net)
    assert list(low_rank_layers(low)) == ["2"]
    assert low[0].weight is low[1].weight
    assert "share their weight are not decomposed: 0, 1" in capsys.readouterr().err


def test_subclasses_are_named_and_parametrizations_baked_in(capsys):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    net = apply_tract(net, layer="2")
    low, x = decompose(net), torch.randn(2, 8, generator=stream(0, "rows"))
    assert list(low_rank_layers(low)) == ["0"]
    assert torch.allclose(low(x), net(x), atol=1e-5)
    assert "subclasses of layers are not decomposed: 2 (TrActLinear)" in capsys.readouterr().err
    assert list(low_rank_layers(decompose(remove_tract(net)))) == ["0", "2"]


def test_finalised_networks_are_plain_and_never_larger():
    low = decompose(network().eval())
    full = sum(p.numel() for p in network().parameters())
    assert sum(p.numel() for p in finalize(low).parameters()) == full
    for name, rank in (("0", 1), ("3", 3), ("6", 5), ("8", 4)):
        low.get_submodule(name).rank = rank
    plain = finalize(low)
    assert torch.allclose(plain(X), low(X), atol=1e-5)
    assert not any(isinstance(m, (LowRankLinear, LowRankConv2d)) for m in plain.modules())
    assert isinstance(plain[6], nn.Sequential)
    assert isinstance(plain[8], nn.Linear)
    assert sum(p.numel() for p in plain.parameters()) < full
    assert low[6].max_rank == 20  # the original is not sliced


def test_break_even():
    layer = LowRankLinear(256, 120)
    assert layer.break_even == 81
    for rank, kind in ((81, nn.Sequential), (82, nn.Linear)):
        layer.rank = rank
        assert isinstance(finalize(layer), kind)


def test_attention_is_decomposed_map_by_map():
    with seeded(0, "init"):
        attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    low = decompose(attention)
    maps = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
    assert list(low_rank_layers(low)) == [*maps, "linear1", "linear2"]
    x = torch.randn(2, 3, 8, generator=stream(0, "tokens"))
    padding = torch.tensor([[False, False, True], [False] * 3])
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            kept = ~options.get("src_key_padding_mask", torch.zeros(2, 3, dtype=torch.bool))
            assert torch.allclose(low(x, **options)[kept], attention(x, **options)[kept], atol=1e-5)
    low.self_attn.k_proj.rank = 2
    plain = finalize(low)
    assert isinstance(plain.self_attn.k_proj, nn.Sequential)
    assert isinstance(plain.self_attn.q_proj, nn.Linear)
    again = with_ranks(attention, factored_ranks(low))
    again.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), plain(x))


def test_a_form_is_rebuilt_from_its_ranks():
    low = decompose(network().eval())
    for name, rank in (("0", 1), ("3", 0), ("6", 5)):
        low.get_submodule(name).rank = rank
    assert factored_ranks(low) == {"0": 1, "3": 0, "6": 5}
    plain = finalize(low)
    again = with_ranks(network().eval(), factored_ranks(low))
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(X), plain(X))
    with pytest.raises(ValueError, match="got '1'"):
        with_ranks(network(), {"1": 2})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: decompose(nn.ReLU()), "must hold a layer to decompose"),
        (lambda: decompose(network(), ignore_first=4), "must hold a layer to decompose"),
        (lambda: decompose(network(), ignore_first=-1), "ignore_first must be >= 0"),
        (lambda: decompose(network(), layers=(nn.Linear, nn.Conv1d)), "some of Linear and Conv2d, got Conv1d"),
        (lambda: decompose(network(), layers=(nn.BatchNorm2d,)), "some of Linear and Conv2d, got BatchNorm2d"),
        (lambda: finalize(network()), "decompose it first"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()

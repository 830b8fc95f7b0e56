"""Attention in four maps against torch's own."""

import pytest
import torch
from torch import nn

from netwright.compress.low_rank import SplitAttention, split_attention
from netwright.seeding import seeded, stream


def tokens(*shape):
    return torch.randn(*shape, generator=stream(0, *shape))


def attention(**options):
    with seeded(0, "init"):
        packed = nn.MultiheadAttention(8, 2, **options).eval()
        if packed.in_proj_bias is not None:  # torch starts biases at zero, which would hide one that is lost
            nn.init.normal_(packed.in_proj_bias)
            nn.init.normal_(packed.out_proj.bias)
    return packed


FLOATS = torch.randn(5, 6, generator=stream(0, "mask"))
MASKS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": FLOATS > 1},
    {"attn_mask": FLOATS, "need_weights": False},
    {"attn_mask": torch.randn(6, 5, 6, generator=stream(0, "heads"))},
    {"key_padding_mask": torch.arange(6).expand(3, 6) > 3},
    {"attn_mask": FLOATS, "key_padding_mask": torch.randn(3, 6, generator=stream(0, "padding"))},
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", MASKS)
def test_the_function_is_that_of_torch(options, batch_first):
    packed = attention(batch_first=batch_first)
    query, key, value = tokens(3, 5, 8), tokens(3, 6, 8), tokens(3, 6, 8) + 1
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    (ours, weights), (theirs, expected) = (m(query, key, value, **options) for m in (SplitAttention(packed), packed))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (weights is None) == (expected is None)
    if expected is not None:
        assert torch.allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("options", [{"kdim": 4, "vdim": 6}, {"bias": False}, {"kdim": 4, "vdim": 6, "bias": False}])
def test_keys_and_values_of_their_own_width(options):
    packed = attention(batch_first=True, **options)
    query, key, value = tokens(3, 5, 8), tokens(3, 6, packed.kdim), tokens(3, 6, packed.vdim)
    assert torch.allclose(SplitAttention(packed)(query, key, value)[0], packed(query, key, value)[0], atol=1e-5)


def test_a_single_example():
    packed = attention()
    query, key = tokens(5, 8), tokens(6, 8)
    ours, theirs = (m(query, key, key) for m in (SplitAttention(packed), packed))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_gradients_are_those_of_torch():
    packed = attention(batch_first=True)
    split, x = SplitAttention(packed), tokens(3, 5, 8)
    for module in (split, packed):
        module(x, x, x)[0].square().sum().backward()
    ours = torch.cat([split.q_proj.weight.grad, split.k_proj.weight.grad, split.v_proj.weight.grad])
    assert torch.allclose(ours, packed.in_proj_weight.grad, atol=1e-4)


def test_whole_networks():
    with seeded(0, "init"):
        net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    split, x = split_attention(net), tokens(3, 5, 8)
    assert isinstance(net.layers[0].self_attn, nn.MultiheadAttention)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in net.parameters())
    with torch.no_grad():  # where torch takes its fast path
        assert torch.allclose(split(x), net(x), atol=1e-5)
    own = nn.Sequential(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert isinstance(split_attention(own)[0], nn.MultiheadAttention)


def test_bad_input():
    with pytest.raises(ValueError, match="add_bias_kv"):
        SplitAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    with pytest.raises(ValueError, match="attn_mask must be given"):
        SplitAttention(attention())(*[tokens(5, 8)] * 3, is_causal=True)

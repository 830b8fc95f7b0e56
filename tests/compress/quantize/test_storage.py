import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress import prune
from netwright.compress.quantize import (
    DifferentiableQuantizer,
    UniformQuantizer,
    compressed_size,
    huffman_code_lengths,
    pack,
    post_training_quantize,
    unpack,
)
from netwright.console import UserError
from netwright.seeding import seeded, stream
from netwright.train.weight_compander import apply_weight_compander


def network():
    with seeded(0, "init"):
        return nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Flatten(), nn.Linear(320, 30))


@pytest.mark.parametrize(("bits", "ratio"), [(2, 14.2222), (4, 7.5294), (8, 3.8788)])
def test_the_published_ratios(bits, ratio):
    layer = post_training_quantize(nn.Linear(1024, 64, bias=False), bits)
    assert compressed_size(layer, huffman=False).ratio == pytest.approx(ratio, abs=5e-5)
    header = 8 + int.from_bytes(pack(layer)[:8], "little")
    assert len(pack(layer)) - header == compressed_size(layer, huffman=False).bits / 8


def test_huffman_by_hand():
    lengths = huffman_code_lengths({"a": 5, "b": 2, "c": 1, "d": 1, "never": 0})
    assert lengths == {"a": 1, "b": 2, "c": 3, "d": 3}
    assert sum({"a": 5, "b": 2, "c": 1, "d": 1}[s] * n for s, n in lengths.items()) / 9 == pytest.approx(15 / 9)
    assert huffman_code_lengths({7: 3}) == {7: 1}
    with pytest.raises(ValueError, match="not all zero"):
        huffman_code_lengths({"a": 0})


def test_a_huffman_code_is_complete_and_within_a_bit_of_entropy():
    plain = nn.Linear(200, 50, bias=False)
    plain.weight.data = torch.randn(50, 200, generator=stream(0, "w"))
    layer = post_training_quantize(plain, 4, None)
    size = compressed_size(layer).tensors["weight"]
    counts = layer.weight.unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert entropy <= size.code_bits < entropy + 1
    assert sum(2.0**-n for n in huffman_code_lengths(dict(enumerate(counts.tolist()))).values()) == 1
    assert size.bits < compressed_size(layer, huffman=False).tensors["weight"].bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 11, 16])
def test_what_is_unpacked_is_the_same_bits(bits):
    net = post_training_quantize(network(), bits, 100)
    plain = unpack(pack(net), network())
    assert not any(parametrize.is_parametrized(m) for m in plain.modules())
    for name, tensor in plain.state_dict().items():
        layer, own = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        assert torch.equal(tensor, getattr(layer, own)), name


def test_learned_points_and_all_parameters():
    net = nn.Linear(64, 9)
    parametrize.register_parametrization(net, "weight", DifferentiableQuantizer(net.weight, 5))
    assert torch.equal(unpack(pack(net), nn.Linear(64, 9)).weight, net.weight)
    size = compressed_size(net, huffman=False).tensors["weight"]
    assert (size.levels, size.code_bits) == (5, 3)
    assert size.bits == 576 * 3 + 5 * 32 + 3 * 64
    whole = post_training_quantize(network(), 3, quantize="all")
    assert torch.equal(unpack(pack(whole), network())[3].bias, whole[3].bias)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.97])
@pytest.mark.parametrize("bits", [None, 3])
def test_places_of_zeros_in_every_form(sparsity, bits):
    pruned = prune.remove(prune.magnitude(network(), sparsity))
    net = pruned if bits is None else post_training_quantize(pruned, bits)
    blob = pack(net)
    form = {0.001: "zeros", 0.3: "kept", 0.97: "gaps"}[sparsity]
    if bits or form != "zeros":  # a place takes as many bytes as a number in full precision
        assert f"3.weight#{form}".encode() in blob
    assert torch.equal(unpack(blob, network())[3].weight, net[3].weight)
    assert prune.sparsity(unpack(blob, network())).kept == prune.sparsity(pruned).kept


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_pruned_weights_take_no_codes(sparsity):
    pruned = prune.magnitude(network(), sparsity)
    net = post_training_quantize(pruned, 4)
    blob = pack(net)
    assert torch.equal(unpack(blob, network())[3].weight, net[3].weight)
    assert prune.sparsity(unpack(blob, pruned)).kept == prune.sparsity(pruned).kept
    assert len(blob) < len(pack(post_training_quantize(network(), 4))) * (0.85 if sparsity < 0.9 else 0.4)
    header = 8 + int.from_bytes(blob[:8], "little")
    assert len(blob) - header == pytest.approx(compressed_size(net, huffman=False).bits / 8, abs=4)


def test_codes_are_those_of_what_the_quantiser_gets():
    """The latent weights of Weight Compander are not those that the layer computes with."""
    net = apply_weight_compander(nn.Sequential(nn.Linear(64, 32)))
    parametrize.register_parametrization(net[0], "weight", UniformQuantizer(4, 64))
    expected = net[0].weight.detach()
    latent = net[0].parametrizations.weight.original
    assert not torch.allclose(expected, UniformQuantizer(4, 64)(latent), atol=1e-3)
    assert torch.equal(unpack(pack(net), nn.Sequential(nn.Linear(64, 32)))[0].weight, expected)
    codes = net[0].parametrizations.weight[-1].codes(expected)[0]
    counts = codes.flatten().bincount().tolist()
    lengths = huffman_code_lengths(dict(enumerate(counts)))
    mean = sum(counts[symbol] * length for symbol, length in lengths.items()) / 2048
    assert compressed_size(net).tensors["0.weight"].code_bits == pytest.approx(mean)


def test_a_mask_behind_the_quantiser_is_stored_too():
    net = post_training_quantize(nn.Linear(64, 32), 4)
    prune.magnitude(net, 0.9)
    assert torch.equal(unpack(pack(net), nn.Linear(64, 32)).weight, net.weight)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_every_type_bit_for_bit(kind, sparsity):
    with seeded(0, "init"):
        plain = nn.Linear(300, 40)
    if sparsity:
        prune.remove(prune.magnitude(plain, sparsity))
    plain.to(kind)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in unpack(pack(plain), plain).state_dict().items())
    learned = nn.Linear(300, 40).to(kind)
    parametrize.register_parametrization(learned, "weight", DifferentiableQuantizer(plain.weight, 5))
    for net in (post_training_quantize(plain, 4), learned):
        again = unpack(pack(net), nn.Linear(300, 40).to(kind))
        assert again.weight.dtype == kind
        assert torch.equal(again.weight, net.weight)
        size = compressed_size(net, huffman=False)
        header = 8 + int.from_bytes(pack(net)[:8], "little")
        assert len(pack(net)) - header == pytest.approx(size.bits / 8, abs=8)


def test_a_shared_weight_is_stored_once():
    def tied():
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        net[2].weight = net[0].weight
        return net

    for net in (tied(), post_training_quantize(tied(), 2)):
        again = unpack(pack(net), tied())
        assert again[0].weight is again[2].weight
        assert torch.equal(again[2].weight, net[2].weight)
        apart = unpack(pack(net), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        assert torch.equal(apart[2].weight, net[2].weight)
        header = 8 + int.from_bytes(pack(net)[:8], "little")
        size = compressed_size(net, huffman=False)
        assert len(pack(net)) - header == size.bits / 8
        assert size.full_bits == 32 * (64 * 64 + 128)


def test_the_file_is_one_that_others_read(tmp_path):
    from safetensors.torch import load

    tensors = load(pack(post_training_quantize(network(), 4)))
    assert tensors["3.weight#codes"].dtype == torch.uint8
    assert tensors["3.weight#codes"].numel() == 9600 * 4 // 8
    assert tensors["3.weight#scale"].shape == (38, 2)


def test_a_network_without_quantisers_is_stored_whole():
    net = network()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in unpack(pack(net), network()).state_dict().items())


def test_damage_and_strangers_are_refused():
    blob = pack(post_training_quantize(network(), 4))
    with pytest.raises(UserError, match="do not fit the network"):
        unpack(blob, nn.Linear(3, 3))
    for broken in (b"", blob[:50], blob[:-20], blob.replace(b'\\"bits\\": 4', b'\\"bits\\": 9')):
        with pytest.raises(UserError, match="damaged"):
            unpack(broken, network())
    with pytest.raises(UserError, match="of version 1"):
        unpack(blob.replace(b"packed weights", b"packed weighty"), network())


def test_report_as_text():
    assert "ratio" in str(compressed_size(post_training_quantize(network(), 4)))

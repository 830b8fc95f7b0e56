"""Costs against fvcore, published figures and closed forms; the bookkeeping of tables and comparisons."""

import json
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision import models

from netwright import cost
from netwright.console import UserError
from netwright.cost import LatencyTable, alternate, compare_times, count, saved_bytes, turn
from netwright.nn.mbconv import mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar
from netwright.nn.sparse import FixedMask, TopKMask, sparsify, to_dense

pytestmark = pytest.mark.filterwarnings("ignore:.*TF32.*")


def fvcore_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(module.eval(), torch.rand(1, *shape))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = analysis.by_operator()
    return int(sum(by_operator[name] for name in ("conv", "linear", "addmm", "matmul")))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_macs_and_parameters_are_those_of_fvcore(name):
    network = models.get_model(name)
    found = count(network, (3, 224, 224))
    assert found.macs == fvcore_macs(network, (3, 224, 224))
    assert found.sparse_macs == pytest.approx(found.macs, rel=1e-6)  # a random weight is zero now and then
    assert found.parameters == sum(p.numel() for p in network.parameters())


def test_layers_agree_with_fvcore_one_by_one():
    network = models.mobilenet_v2()
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(network.eval(), torch.rand(1, 3, 64, 64))
    analysis.unsupported_ops_warnings(False)
    theirs = analysis.by_module_and_operator()
    for layer in count(network, (3, 64, 64)).per_layer:
        if layer.kind in ("Conv2d", "Linear"):
            assert layer.macs == sum(theirs[layer.name].values()), layer.name


def test_published_figures():
    assert round(count(mobilenet_v2_32(), (3, 32, 32)).macs / 1e6, 1) == 88.0
    assert count(resnet18_cifar(), (3, 32, 32)).macs == fvcore_macs(resnet18_cifar(), (3, 32, 32))


def test_published_figure_of_the_variant_with_convolution_shortcuts():
    """The literature's 94.60 M is fvcore's: it adds two operations for every value a batch norm makes."""
    network = mobilenet_v2_32(conv_shortcuts=True)
    found = count(network, (3, 32, 32))
    assert found.parameters == 2_296_922
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(network.eval(), torch.rand(1, 3, 32, 32))
    by_operator = analysis.unsupported_ops_warnings(False).by_operator()
    assert found.macs == by_operator["conv"] + by_operator["linear"] == 91_154_944
    assert round((found.macs + by_operator["batch_norm"]) / 1e6, 2) == 94.60


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )


@pytest.mark.parametrize("warm", [False, True])
def test_masks_count_as_zeros(warm):
    plain = network()
    sparse = sparsify(plain, 0.25)
    if warm:
        with torch.no_grad():
            sparse.eval()(torch.rand(1, 3, 16, 16))
    dense_macs = 8 * 8 * 216 + 5120
    sparse_macs = 8 * 8 * 54 + 1280
    parameters = 216 + 8 + 16 + 5130
    for module in (
        sparse,
        to_dense(sparse),
        parametrized(plain, sparse, FixedMask),
        parametrized(plain, sparse, TopKMask),
    ):
        found = count(module, (3, 16, 16))
        assert (found.macs, found.sparse_macs, found.parameters) == (dense_macs, sparse_macs, parameters)
        assert found.nonzeros == 54 + 1280 + 8 + 10 + 8  # batch norm's shifts are zero at the start
        assert [layer.kind for layer in found.per_layer] == [
            *(
                ["SparseConv2d", "BatchNorm2d", "SparseLinear"]
                if module is sparse
                else ["Conv2d", "BatchNorm2d", "Linear"]
            )
        ]
    assert count(plain, (3, 16, 16)).sparse_macs == dense_macs


def parametrized(plain, sparse, kind):
    module = to_dense(plain)
    for i in (0, 4):
        mask = FixedMask(sparse[i].mask()) if kind is FixedMask else TopKMask(0.25, scores=sparse[i].scores)
        parametrize.register_parametrization(module[i], "weight", mask)
    return module


def test_a_low_rank_weight_is_made_beforehand():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = nn.Parameter(torch.rand(6, 2)), nn.Parameter(torch.rand(2, 5))

        def forward(self, weight):
            return self.u @ self.v

    layer = nn.Linear(5, 6, bias=False)
    parametrize.register_parametrization(layer, "weight", LowRank(), unsafe=True)
    assert count(layer, (5,)).macs == 30
    assert count(layer, (5,)).parameters == 30


def test_every_kind_of_product():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4, 7))
            with torch.no_grad():
                self.w[:, :3] = 0
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)

        def forward(self, x):  # (1, 4, 5, 5)
            a = torch.einsum("bchw,co->bohw", x, self.w)
            b = (x.flatten(2).transpose(1, 2) @ x.flatten(2)).sum((1, 2))
            return a.sum() + b + self.up(x).sum() + (x.flatten() @ x.flatten())

    found = count(Products(), (4, 5, 5))
    transposed = 25 * 4 * 3 * 9
    assert found.macs == 25 * 4 * 7 + 25 * 4 * 25 + transposed + 100
    assert found.sparse_macs == 25 * 4 * 4 + 25 * 4 * 25 + transposed + 100
    assert {layer.name: layer.macs for layer in found.per_layer}["up"] == transposed


def test_attention_is_counted_though_torch_fuses_it():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

        def forward(self, x):
            return self.layer(x)

    projections, products, feed_forward = 9 * 16 * 64, 2 * 9 * 9 * 16, 2 * 9 * 16 * 32
    assert count(Attention(), (9, 16)).macs == projections + products + feed_forward
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_layers_are_counted():
    first_step_has_no_state = 4 * 7 * 7
    found = count(nn.LSTM(5, 7, batch_first=True), (3, 5))
    assert found.macs == 3 * 4 * 7 * (5 + 7) - first_step_has_no_state


def test_the_module_is_left_as_it_was():
    module = network()
    module[1].eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    count(module, (3, 16, 16))
    assert [part.training for part in module] == [True, False, True, True, True]
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    with pytest.raises(ValueError, match=r"module must take an input of shape \(4, 16, 16\)"):
        count(module, (4, 16, 16))
    assert module.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_shared_parameters_are_counted_once_and_their_products_twice():
    layer = nn.Linear(4, 4)
    found = count(nn.Sequential(layer, layer), (4,))
    assert (found.parameters, found.macs) == (20, 32)
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert count(nn.Sequential(a, b), (4,)).parameters == 16


def test_modules_without_parameters_and_other_types():
    assert count(nn.MaxPool2d(3), (2, 8, 8)).macs == 0
    assert count(nn.Linear(3, 2).double(), (3,)).macs == 6


@pytest.mark.parametrize("shape", [(), (3, 0, 4), (-1,)])
def test_shape_is_checked(shape):
    with pytest.raises(ValueError, match="shape must hold sizes >= 1, got"):
        count(nn.Identity(), shape)


def test_cost_as_data_text_and_picture():
    found = count(sparsify(network(), 0.25), (3, 16, 16))
    assert found.to_dict()["per_layer"][0]["sparse_macs"] == 8 * 8 * 54
    assert "sparse_macs" in str(found)
    assert found.sparsity == 1 - found.nonzeros / found.parameters
    assert len(found.plot().patches) == 4


# --- time


def test_table_measures_what_it_is_given():
    calls = {"slow": 0, "fast": 0}

    def op(name, seconds):
        def run(x):
            assert x.shape == (1, 3, 4)
            assert torch.is_inference_mode_enabled()
            assert torch.get_num_threads() == 1
            calls[name] += 1
            time.sleep(seconds)

        return run

    ops = {("slow", 3, (1, 2)): (op("slow", 0.02), (3, 4)), "fast": (op("fast", 0.0), (3, 4))}
    times = LatencyTable.measure(ops, warmup=2, repeats=5)
    assert calls == {"slow": 7, "fast": 7}
    assert times["slow", 3, (1, 2)] >= 20
    assert times["fast"] < times["slow", 3, (1, 2)]
    assert times.total(["fast", "fast"]) == 2 * times["fast"]
    assert (times.cpu, times.threads, times.batch, times.dtype) == (cost.cpu_name(), 1, 1, "float32")
    assert times.torch_version == torch.__version__


def test_a_module_is_timed_in_evaluation_mode_and_left_as_it_was():
    module = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU().eval())
    LatencyTable.measure({"bn": (module, (2, 4, 4))}, warmup=0, repeats=2)
    assert [part.training for part in module.modules()] == [True, True, False]
    assert module[0].num_batches_tracked == 0


def test_table_round_trip(tmp_path):
    times = LatencyTable({("conv", 3, 8, (3, 3), None): 0.25, "skip": 0.0}, "a processor", 2, 1, "float32", "2.9")
    times.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == times
    assert set(again) == {("conv", 3, 8, (3, 3), None), "skip"}
    assert len(again) == 2
    assert "conv 3 8" in str(again)
    assert len(again.plot().patches) == 2


def test_missing_keys_are_listed():
    times = LatencyTable({"a": 1.0}, "", 1, 1, "float32", "")
    with pytest.raises(KeyError, match=r"no latency was measured for \('conv', 3\)"):
        times["conv", 3]
    with pytest.raises(KeyError, match="no latency was measured for 'b', 'c'"):
        times.total(["a", "c", "b", "c"])
    assert "a" in times
    assert "b" not in times
    assert times.get("b", 0.0) == 0.0


@pytest.mark.parametrize("text", ["[]", "{}", '{"milliseconds": [{"key": "a", "ms": "x"}]}', "broken"])
def test_a_damaged_table_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table\.json"):
        LatencyTable.load(path)
    good = LatencyTable({"a": 1.0}, "", 1, 1, "float32", "").to_dict()
    good["milliseconds"][0]["ms"] = -1
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match="latency must be a number >= 0"):
        LatencyTable.load(path)


def test_comparison_alternates_rotates_and_warms_up():
    order = []
    result = compare_times({name: lambda name=name: order.append(name) for name in "abc"}, rounds=4, threads=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert result.rounds == 4
    assert result.threads == 1
    assert [t.name for t in result.timings] == ["a", "b", "c"]


def test_comparison_figures(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cost.timing.time, "perf_counter", lambda: clock[0])
    pace = {"calls": 0}

    def op(factor):
        def run():
            clock[0] += factor * (1 + pace["calls"] // 2)  # the machine slows down, round by round
            pace["calls"] += 1

        return run

    pace["calls"] = -2
    result = compare_times({"one": op(1.0), "two": op(2.0)}, rounds=5)
    assert result["one"].ratio == result["one"].ratio_low == result["one"].ratio_high == 1
    assert result["two"].ratio == result["two"].ratio_low == result["two"].ratio_high == 2
    assert (result["one"].best_ms, result["one"].median_ms) == (1000, 3000)
    assert (result["two"].best_ms, result["two"].median_ms) == (2000, 6000)
    assert "time / one" in str(result)
    assert result.to_dict()["timings"][1]["ratio"] == 2
    assert len(result.plot().patches) == 2
    with pytest.raises(KeyError, match="no timing of 'three'; there are one, two"):
        result["three"]


def test_a_turn_times_what_follows_the_untimed_calls(monkeypatch):
    clock, made = [0.0], []
    monkeypatch.setattr(cost.timing.time, "perf_counter", lambda: clock[0])

    def call():
        made.append(clock[0])
        clock[0] += 2.0 ** len(made)

    assert turn(call, calls=3, untimed=1) == [4.0, 8.0, 16.0]
    assert len(made) == 4


def test_turns_end_with_the_time_but_not_before_the_fewest_rounds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cost.timing.time, "perf_counter", lambda: clock[0])

    def slow():
        clock[0] += 1.0
        return [1.0, 2.0]

    turns = {"a": slow, "b": slow}
    assert alternate(turns, rounds=50, seconds=7.0)["a"].tolist() == [[1.0, 2.0]] * 4  # begun at 0, 2, 4 and 6 s
    assert len(alternate(turns, rounds=50, seconds=0.5, fewest=3)["b"]) == 3
    assert len(alternate(turns, rounds=2, seconds=0.5, fewest=3)["b"]) == 2


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with cost.threads(before + 1) as used:
            assert used == torch.get_num_threads() == before + 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.get_num_threads() == before
    with cost.threads(None) as used:
        assert used == before


def test_arguments_are_checked():
    op = {"a": (nn.Identity(), (1,))}
    for call, message in (
        (lambda: LatencyTable.measure({}), "ops must hold at least 1"),
        (lambda: LatencyTable.measure(op, repeats=0), "repeats must be >= 1, got 0"),
        (lambda: LatencyTable.measure(op, warmup=-1), "warmup must be >= 0, got -1"),
        (lambda: LatencyTable.measure(op, threads=0), "threads must be >= 1, got 0"),
        (lambda: LatencyTable.measure(op, batch=0), "batch must be >= 1, got 0"),
        (lambda: compare_times({}), "callables must hold at least 1"),
        (lambda: compare_times({"a": list}, rounds=0), "rounds must be >= 1, got 0"),
        (lambda: compare_times({"a": list}, threads=0), "threads must be >= 1, got 0"),
        (lambda: turn(list, calls=0), "calls must be >= 1, got 0"),
        (lambda: turn(list, untimed=-1), "untimed must be >= 0, got -1"),
        (lambda: alternate({}), "turns must hold at least 1"),
        (lambda: alternate({"a": lambda: [0.0]}, seconds=0.0), "seconds must be > 0, got 0.0"),
        (lambda: alternate({"a": lambda: [0.0]}, fewest=0), "fewest must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_saved_bytes_are_the_activations_of_a_network():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(320, 2)
    )
    x = torch.rand(2, 3, 8, 8)
    image, hidden, features = 2 * 3 * 64 * 4, 2 * 4 * 64 * 4, 2 * 320 * 4
    assert saved_bytes(lambda: network(x)) == image + hidden + features  # what ReLU saves the next layer saves too
    with torch.no_grad():
        assert saved_bytes(lambda: network(x)) == 0

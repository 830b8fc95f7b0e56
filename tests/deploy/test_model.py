"""The sparse runtime as a user meets it: compile, call, copy, profile, save, load, and every refusal."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from kernels import compiler
from networks import eager, random_network
from torch import Tensor, nn

from netwright import deploy
from netwright.compress import prune
from netwright.console import UserError
from netwright.deploy import ArtifactError, SparseModel, UnsupportedOperator
from netwright.deploy.graph import capture, run
from netwright.deploy.native import build

BACKENDS = ["native", "torch"]


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    compiler()


def network(sparsity=0.8, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7),
        ).eval()  # fmt: skip
        for layer in net:
            if hasattr(layer, "weight") and layer.weight.ndim > 1:
                layer.weight.data *= torch.rand_like(layer.weight) >= sparsity
        return net, torch.randn(1, 3, 12, 10)


class Several(nn.Module):
    """Two inputs; a dictionary of outputs, among them an input and a constant."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        return {"sum": torch.relu(x + y), "parts": (x[:, :1], y), "one": torch.ones(1, 2)}


def assert_close(found, exact, tolerance=1e-5):
    found = torch.as_tensor(found)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def model(backend):
    net, x = network()
    return deploy.compile(net, x, backend=backend), x, eager(net, x)[0]


def test_tensors_give_tensors_and_arrays_arrays(model):
    fast, x, exact = model
    found = fast(x)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert_close(found, exact)
    array = fast(x.numpy())
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, found.numpy())


def test_results_are_new_memory_each_time(model):
    fast, x, _ = model
    first = fast(x)
    kept = first.clone()
    fast(-x)
    assert torch.equal(first, kept)


def test_inputs_stay_as_they_are(model):
    fast, x, _ = model
    before = x.clone()
    fast(x)
    assert torch.equal(x, before)


def test_any_layout_of_the_input_gives_the_same(model):
    fast, x, _ = model
    expected = fast(x)
    assert torch.equal(fast(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(fast(torch.stack([x, x], -1)[..., 0]), expected)
    assert torch.equal(fast(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    array = np.asfortranarray(x.numpy())
    np.testing.assert_array_equal(fast(array), expected.numpy())
    raw = np.zeros(4 * x.numel() + 1, np.uint8)
    odd = raw[1:].view(np.float32).reshape(x.shape)
    odd[:] = x.numpy()
    assert not odd.flags.aligned
    np.testing.assert_array_equal(fast(odd), expected.numpy())
    fixed = x.numpy().copy()
    fixed.flags.writeable = False
    np.testing.assert_array_equal(fast(fixed), expected.numpy())


def test_a_negated_view_is_negative(model):
    fast, x, _ = model
    conjugate = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert conjugate.is_neg()
    assert torch.equal(fast(conjugate), fast(x))


def test_contiguous_inputs_are_read_where_they_are(monkeypatch):
    net, x = network()
    fast = deploy.compile(net, x)
    seen = []
    monkeypatch.setattr(fast._engine, "_network", lambda inputs, outputs: seen.append((inputs, outputs)))
    out = torch.empty(1, 7)
    fast(x, out=out)
    array, result = x.numpy().copy(), np.empty((1, 7), np.float32)
    fast(array, out=result)
    assert seen == [([x.data_ptr()], [out.data_ptr()]), ([array.ctypes.data], [result.ctypes.data])]


def test_gradients_end_here(model):
    fast, x, _ = model
    assert not fast(x.clone().requires_grad_()).requires_grad


def test_results_go_where_they_are_wanted(model):
    fast, x, exact = model
    out = torch.empty(1, 7)
    assert fast(x, out=out) is out
    assert_close(out, exact)
    array = np.empty((1, 7), np.float32)
    assert fast(x, out=array) is array
    assert_close(array, exact)


@pytest.mark.parametrize(
    ("out", "error", "told"),
    [
        (torch.empty(2, 7), ValueError, "out 0 must have shape"),
        (torch.empty(7, 2)[:, :1].t(), ValueError, "contiguous and writable"),
        (torch.empty(1, 7).double(), TypeError, "out 0 must be torch.float32, got torch.float64"),
        (np.broadcast_to(np.float32(0), (1, 7)), ValueError, "contiguous and writable"),
        ([torch.empty(1, 7)] * 2, ValueError, "out must be 1 arrays, got 2"),
        (["x"], TypeError, "out 0 must be a torch tensor or a NumPy array, got str"),
    ],
)
def test_results_that_do_not_fit_are_refused(model, out, error, told):
    fast, x, _ = model
    with pytest.raises(error, match=told):
        fast(x, out=out)


def test_a_result_that_nobody_may_write_is_refused(model):
    fast, x, _ = model
    out = np.zeros((1, 7), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        fast(x, out=out)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ([], ValueError, "inputs must be 1, got 0"),
        ([torch.zeros(1, 3, 12, 10)] * 2, ValueError, "inputs must be 1, got 2"),
        ([[1.0]], TypeError, "input 0 must be a torch tensor or a NumPy array, got list"),
        ([torch.zeros(1, 3, 12, 10).double()], TypeError, "input 0 must be torch.float32, got torch.float64"),
        ([np.zeros((1, 3, 12, 10))], TypeError, "input 0 must be torch.float32, got float64"),
        ([np.zeros((1, 3, 12, 10), ">f4")], TypeError, "input 0 must be torch.float32, got >f4"),
        ([np.zeros((1, 3, 12, 10), object)], TypeError, "input 0 must be torch.float32, got object"),
        ([torch.zeros(3, 12, 10)], ValueError, r"must have 4 axes, \(1, 3, 12, 10\), got 3, \(3, 12, 10\)"),
        ([torch.zeros(1, 3, 10, 12)], ValueError, r"must have shape \(1, 3, 12, 10\), got \(1, 3, 10, 12\)$"),
        ([torch.zeros(4, 3, 12, 10)], ValueError, "the batch is fixed, compile with an example of 4"),
        ([torch.zeros(1, 3, 12, 10, device="meta")], ValueError, "on the cpu"),
        ([torch.zeros(1, 3, 12, 10).to_sparse()], ValueError, "dense tensor"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, given, error, told):
    fast, *_ = model
    with pytest.raises(error, match=told):
        fast(*given)


def test_several_inputs_and_outputs(backend):
    x, y = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    fast = deploy.compile(Several(), (x, y), backend=backend)
    assert fast.inputs == ((1, 2, 3, 3),) * 2
    assert fast.outputs == ((1, 2, 3, 3), (1, 1, 3, 3), (1, 2, 3, 3), (1, 2))
    wanted = [torch.relu(x + y), x[:, :1], y, torch.ones(1, 2)]
    for found in (fast(x, y), tuple(map(torch.from_numpy, fast(x.numpy(), y.numpy())))):
        assert isinstance(found, tuple)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    outs = [torch.empty(shape) for shape in fast.outputs]
    fast(x, y, out=outs)
    assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))
    with pytest.raises(TypeError, match="all tensors or all arrays"):
        fast(x, y.numpy())


def test_the_batch_is_that_of_the_example(backend):
    net, x = network()
    many = torch.cat([x, -x, 2 * x])
    fast = deploy.compile(net, many.numpy(), backend=backend)
    assert_close(fast(many), eager(net, many)[0])


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_random_networks_are_right_and_the_same_when_compiled_again(seed):
    module, x = random_network(seed)
    fast, again = (deploy.compile(module, x) for _ in range(2))
    exact = eager(module, x)
    found = fast(x) if len(fast.outputs) > 1 else (fast(x),)
    for y, reference in zip(found, exact, strict=True):
        assert_close(y, reference)
    for y, other in zip(found, again(x) if len(again.outputs) > 1 else (again(x),), strict=True):
        assert torch.equal(y, other)


def test_what_is_not_finite_spreads_along_kept_weights_only():
    net, x = network()
    x[0, 1, 4, 4] = torch.inf
    x[0, 2, 7, 2] = torch.nan
    fast = deploy.compile(net[:5], x)
    (exact,) = run(capture(net[:5], x), [x], kept_only=True)
    found = fast(x)
    assert not found.isfinite().all()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.isinf(), exact.isinf())
    there = exact.isfinite()
    assert_close(torch.where(there, found, 0), torch.where(there, exact, 0))
    assert net[:5](x).isnan().sum() > exact.isnan().sum()


def test_a_graph_is_optimised_and_compiled(backend):
    net, x = network()
    fast = deploy.compile(capture(net, x), backend=backend)
    assert [node.op.name for node in fast.graph].count("affine") == 0
    assert_close(fast(x), eager(net, x)[0])
    again = deploy.compile(fast.graph, backend=backend)
    assert torch.equal(again(x), fast(x))


def test_the_module_is_not_changed(capsys):
    net, x = network()
    net.train()
    prune.magnitude(net, 0.9)
    before = copy.deepcopy(net.state_dict())
    fast = deploy.compile(net, x)
    assert "training mode" in capsys.readouterr().err
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert fast.sparsity == pytest.approx(0.9, abs=0.02)


def test_facts(backend):
    net, x = network(0.9)
    for layer in (net[0], net[3], net[7]):  # no channel is constant or of no use
        layer.weight.data[0] = 1.0
        layer.weight.data[:, 0] = 1.0
    fast = deploy.compile(net, x, backend=backend, threads=2)
    kept = sum(int((p != 0).sum()) for p in net.parameters() if p.ndim > 1)
    total = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert fast.sparsity == pytest.approx(1 - kept / total)
    assert fast.weights == (total, total - kept)
    assert fast.macs.dense == 16 * 27 * 120 + 16 * 144 * 20 + 7 * 16
    assert 0 < fast.macs.kept < 0.5 * fast.macs.dense
    assert (fast.backend, fast.threads, fast.inputs, fast.outputs) == (backend, 2, ((1, 3, 12, 10),), ((1, 7),))
    assert fast.nbytes > 4 * kept
    assert (fast.arena_bytes > 0) == (backend == "native")
    assert repr(fast).startswith("SparseModel((1, 3, 12, 10) -> (1, 7); ")
    assert repr(fast).endswith(f"{backend}, 2 threads)")


def test_a_network_without_weights_has_no_sparsity(capsys):
    fast = deploy.compile(nn.ReLU().eval(), torch.zeros(1, 4))
    assert fast.sparsity == 0
    assert capsys.readouterr().err == ""


def test_a_mostly_dense_network_is_told_where_it_belongs(capsys):
    net, x = network(sparsity=0.4)
    deploy.compile(net, x, backend="torch")
    assert "mostly dense network is faster in ONNX Runtime" in capsys.readouterr().err
    net, x = network(sparsity=0.6)
    deploy.compile(net, x, backend="torch")
    assert capsys.readouterr().err == ""


def test_tuning_changes_nothing_but_time(tmp_path):
    net, x = network()
    assert_close(deploy.compile(net, x, tune=True)(x), eager(net, x)[0])


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be 'native' or 'torch', got 'cuda'"),
        ({"threads": 0}, ValueError, r"threads must be an integer in \[1, 256\], got 0"),
        ({"threads": True}, ValueError, "threads must be an integer"),
        ({"threads": 1.0}, ValueError, "threads must be an integer"),
        ({"fallback": "eager"}, ValueError, "fallback must be None or 'torch', got 'eager'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, error, told):
    net, x = network()
    with pytest.raises(error, match=told):
        deploy.compile(net, x, **options)


@pytest.mark.parametrize(
    ("example", "error", "told"),
    [
        (None, TypeError, "example_input must be given"),
        (torch.zeros(1, 3, 12, 10).double(), ValueError, "float32"),
        (np.zeros((1, 3, 12, 10)), ValueError, "float32"),
        (torch.zeros(0, 3, 12, 10), ValueError, "size >= 1"),
        (["x"], ValueError, "float32"),
    ],
)
def test_examples_that_make_no_sense_are_refused(example, error, told):
    with pytest.raises(error, match=told):
        deploy.compile(network()[0], example)


class Rounding(nn.Module):
    """Two layers with an operator between them that graphs lack, and integers beside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = network()[0][:5], nn.Linear(320, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(torch.cumsum(self.first(x).transpose(1, 2), -1).flatten(1))
        return y, y.argmax(1)


def test_operators_that_are_missing_are_all_named():
    with pytest.raises(UnsupportedOperator, match=r"cumsum.*argmax"):
        deploy.compile(Rounding(), network()[1])


def test_operators_that_are_missing_are_left_to_torch(backend, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Rounding().eval()
    x = network()[1]
    fast = deploy.compile(net, x, backend=backend, fallback="torch")
    assert fast.outputs == ((1, 6), (1,))
    assert fast.inputs == ((1, 3, 12, 10),)
    for target in (fast, fast.clone(), pickle.loads(pickle.dumps(fast))):
        y, index = target(x)
        assert_close(y, eager(net, x)[0])
        assert torch.equal(index, net(x)[1])
        assert target(x.numpy())[1].dtype == np.int64
    assert len(fast.graphs) == 2
    assert {"conv", "linear"} <= {node.op.name for graph in fast.graphs for node in graph}
    assert fast.weights.all == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    profile = fast.profile(repeats=1)
    assert profile.steps[-1].kernel == "PyTorch"
    assert profile.steps[0].path.startswith("first")
    with pytest.raises(UserError, match=r"cannot be saved: PyTorch runs .*cumsum"):
        fast.save(tmp_path / "model")
    with pytest.raises(ValueError, match="no single graph"):
        _ = fast.graph


def test_a_fallback_that_is_not_needed_is_not_used():
    net, x = network()
    assert len(deploy.compile(net, x, fallback="torch").graph.nodes) > 0


def test_without_a_compiler_torch_runs_it(monkeypatch, capsys, tmp_path):
    net, x = network()
    path = deploy.compile(net, x).save(tmp_path / "model")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    for make in (lambda: deploy.compile(net, x), lambda: deploy.load(path)):
        made = make()
        assert made.backend == "torch"
        assert_close(made(x), eager(net, x)[0])
        told = capsys.readouterr().err
        assert "looked for cc, gcc, clang" in told
        assert "PyTorch runs the network instead" in told


def test_a_compiler_that_fails_is_quoted(monkeypatch, capsys):
    net, x = network()
    monkeypatch.setenv("CC", "false")
    fast = deploy.compile(net, x)
    assert fast.backend == "torch"
    assert_close(fast(x), eager(net, x)[0])
    assert "false --version: status 1" in capsys.readouterr().err


def test_code_that_does_not_compile_is_quoted(monkeypatch, capsys):
    net, x = network(seed=1)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DNW_MAGIC=(", "-include", "no-such-header.h"))
    assert deploy.compile(net, x).backend == "torch"
    assert "no-such-header.h" in capsys.readouterr().err


def test_clones_run_at_once_and_share_weights(model):
    fast, x, exact = model
    clones = [fast.clone(), copy.copy(fast), copy.deepcopy(fast)]
    faults = []

    def work(target, sign):
        for _ in range(30):
            try:
                assert torch.equal(target(sign * x), expected[sign])
            except BaseException as error:
                faults.append(error)

    expected = {sign: fast(sign * x) for sign in (1, -1)}
    pairs = [(fast, 1), (fast, -1), *((clone, (-1) ** i) for i, clone in enumerate(clones))]
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert_close(clones[0](x), exact)
    assert clones[0].graph.to_plain()[0] == fast.graph.to_plain()[0]


def test_a_clone_outlives_its_model(model):
    fast, x, exact = model
    clone = fast.clone()
    del fast
    gc.collect()
    assert_close(clone(x), exact)


def test_pickled_networks_are_compiled_where_they_arrive(model):
    fast, x, _ = model
    again = pickle.loads(pickle.dumps(fast))
    assert again.backend == fast.backend
    assert torch.equal(again(x), fast(x))


def test_a_profile_has_a_row_for_every_step(model):
    fast, x, _ = model
    for profile in (fast.profile(repeats=2), fast.profile(x, repeats=2), fast.profile(x.numpy(), repeats=2)):
        assert sum(step.share for step in profile.steps) == pytest.approx(1)
        assert (profile.backend, profile.threads, profile.repeats) == (fast.backend, 1, 2)
        assert {"0", "3", "7"} <= {step.path for step in profile.steps}
        assert all(step.microseconds > 0 for step in profile.steps)
        assert profile.call_microseconds > 0
        convolutions = [step for step in profile.steps if step.path in {"0", "3"}]
        assert all(step.gflops > 0 for step in convolutions)
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        fast.profile(repeats=0)


def test_a_saved_network_is_the_same_when_loaded(model, tmp_path, backend):
    fast, x, _ = model
    path = fast.save(tmp_path / "model")
    assert path == tmp_path / "model"
    for threads in (1, 2):
        loaded = deploy.load(path, threads=threads, backend=backend)
        assert torch.equal(loaded(x), fast(x))
        assert (loaded.threads, loaded.macs, loaded.weights) == (threads, fast.macs, fast.weights)
    assert torch.equal(deploy.load(loaded.save(tmp_path / "again"), backend=backend)(x), fast(x))


def test_a_file_takes_five_bytes_for_a_kept_weight(tmp_path):
    net = nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 400)).eval()
    prune.remove(prune.magnitude(net, 0.95, scope="layer"))
    path = deploy.compile(net, torch.zeros(1, 128, 5, 5), backend="torch").save(tmp_path / "model")
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size < 0.07 * 4 * sum(p.numel() for p in net.parameters())


def test_an_int8_network_stays_int8(tmp_path):
    net, x = network()
    fast = deploy.compile(net, x)
    small = deploy.load(fast.save(tmp_path / "small", quantize="int8"))
    assert_close(small(x), fast(x), 0.03)
    assert not torch.equal(small(x), fast(x))
    assert small.weights.zeros >= fast.weights.zeros
    whole = deploy.load(fast.save(tmp_path / "whole"))
    assert torch.equal(whole(x), fast(x))
    again = small.save(tmp_path / "again")
    for name in ("model.safetensors", "model.json"):
        assert (again / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    with pytest.raises(ValueError, match="quantize must be None or 'int8', got 'int4'"):
        fast.save(tmp_path / "other", quantize="int4")


def test_a_damaged_network_is_not_loaded(tmp_path):
    net, x = network()
    path = deploy.compile(net, x).save(tmp_path / "model")
    with pytest.raises(ArtifactError, match="no such file"):
        deploy.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="threads"):
        deploy.load(path, threads=0)
    os.truncate(path / "model.safetensors", 100)
    with pytest.raises(ArtifactError, match="truncated") as caught:
        deploy.load(path)
    assert str(path) in str(caught.value)


def test_a_network_too_large_for_its_kernels_is_not_loaded(tmp_path):
    graph = capture(nn.ReLU().eval(), torch.zeros(1, 1, 2, 2))
    graph.shapes.update(dict.fromkeys(graph.shapes, (1, 1, 2**15, 2**15)))
    path = SparseModel(graph, backend="torch").save(tmp_path / "model")
    with pytest.raises(ArtifactError, match="2 GiB"):
        deploy.load(path)


def digits():
    """A small trained network at 80 % zeros, and the test images."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for step in range(300):
            if step == 150:
                prune.magnitude(net, 0.8, scope="global")
            batch = torch.randint(0, 1000, (64,))
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return prune.remove(net).eval(), x[1000:], y[1000:]


def test_int8_costs_no_accuracy(tmp_path):
    net, x, y = digits()
    fast = deploy.compile(net, x)
    small = deploy.load(fast.save(tmp_path / "model", quantize="int8"))
    exact, rounded = ((made(x).argmax(1) == y).double().mean().item() for made in (fast, small))
    assert exact > 0.93
    assert abs(exact - rounded) <= 0.002
    assert not torch.equal(fast(x), small(x))


def test_the_package_is_lazy():
    code = "import sys, netwright.deploy as d; d.compile if len(sys.argv) > 1 else 0; print('torch' in sys.modules)"
    found = [subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=True).stdout
             for more in ([], ["x"])]  # fmt: skip
    assert found == ["False\n", "True\n"]

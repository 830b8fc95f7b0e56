import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from netwright.deploy.native.build import BuildError
from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.sparse import TopKMask, sparsify
from netwright.search import spaces
from netwright.search.fused import library, mixture
from netwright.search.spaces.operations import FactorizedReduce, Noise, operation, relu_conv_bn
from netwright.search.supernet import Choice, SoftmaxGate
from netwright.seeding import seeded, stream

pytestmark = pytest.mark.skipif(library.kernels(8) is None, reason="no C compiler")

NAMES = [name for name in spaces.DARTS_PRIMITIVES if name != "none"]


def _choice(channels, stride, names=NAMES, extra=None):
    with seeded(1, "choice"):
        candidates = {name: operation(name, channels, stride, search=True) for name in names}
        choice = Choice({**candidates, **(extra or {})}, key="edge", gate=SoftmaxGate(), stride=stride)
        for name, parameter in choice.named_parameters():
            nn.init.normal_(parameter, std=0.5 if "weight" in name else 1.0)
    return choice


def _inputs(channels, size=(7, 6), batch=3, candidates=7):
    x = torch.randn(batch, channels, *size, generator=stream(0, "x")) + 0.1
    alpha = torch.randn(candidates, generator=stream(0, "alpha"))
    return x, alpha


def _run(choice, x, alpha, dtype=torch.float32, weights=True):
    """Output, gradients, and buffers after one forward and backward pass."""
    choice = copy.deepcopy(choice).to(dtype)
    x, alpha = (t.detach().to(dtype).requires_grad_() for t in (x, alpha))
    y = choice(x, alpha)
    g = torch.randn(y.shape, generator=stream(0, "g")).to(dtype)
    wanted = [x, alpha, *(p for p in choice.parameters() if weights and p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, g), *choice.buffers()]


def _used(monkeypatch):
    calls = []
    mix = mixture.mix
    monkeypatch.setattr(mixture, "mix", lambda *args: calls.append(len(args[2])) or mix(*args))
    return calls


def _close(found, exact, tolerance=2e-6):
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        limit = tolerance * max(float(b.abs().max()), 1e-6)
        assert float((a.double() - b.double()).abs().max()) <= limit


@pytest.mark.parametrize(
    ("channels", "stride", "size"),
    [
        (8, 1, (7, 6)),
        (8, 2, (5, 5)),
        (16, 1, (9, 4)),
        (16, 2, (8, 1)),
        (24, 1, (4, 5)),
        (32, 2, (7, 6)),
        (64, 1, (6, 6)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics_are_those_of_float64(channels, stride, size, training, monkeypatch):
    choice = _choice(channels, stride).train(training)
    for name, buffer in choice.named_buffers():
        if "running" in name:
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=stream(0, name)))
    x, alpha = _inputs(channels, size)
    calls = _used(monkeypatch)
    found = _run(choice, x, alpha)
    # behind a stride of 2 the skip connection changes positions: in training it is a call of its own
    assert calls == ([len(NAMES)] if stride == 1 else [len(NAMES) - 1, 1][: 1 + training])
    count = len(calls)
    _close(found, _run(choice, x, alpha, torch.float64))
    assert len(calls) == count


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    choice = _choice(16, 1)
    x, alpha = _inputs(16, batch=11)
    one = _run(choice, x, alpha)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        many = _run(choice, x, alpha)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: operation("sep_conv_5x5", 16, 2),
        lambda: operation("dil_conv_3x3", 16, 1),
        lambda: relu_conv_bn(16, 24),
        lambda: FactorizedReduce(16, 32),
        lambda: FactorizedReduce(16, 8, affine=False),
    ],
)
@pytest.mark.parametrize("size", [(7, 6), (4, 4)])
def test_affine_norms_and_changes_of_width(make, size, monkeypatch):
    with seeded(2, "module"):
        module = make()
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=0.3, std=0.5)
    x, _ = _inputs(16, size)
    calls = _used(monkeypatch)
    found = []
    for dtype in (torch.float32, torch.float64):
        copied = copy.deepcopy(module).to(dtype)
        inputs = x.to(dtype).requires_grad_()
        y = copied(inputs)
        g = torch.randn(y.shape, generator=stream(0, "g")).to(dtype)
        wanted = [inputs, *copied.parameters()]
        first = torch.autograd.grad(y, wanted, g, retain_graph=True)
        (again,) = torch.autograd.grad((copied(inputs) * g).square().mean(), inputs, create_graph=True)
        second = torch.autograd.grad(again.square().sum(), wanted, materialize_grads=True)
        found.append([y.detach(), *first, again.detach(), *second, *copied.buffers()])
    _close(*found, tolerance=2e-5)
    assert calls == [1, 1]
    copied.float().eval()(x)
    assert calls == [1, 1]  # evaluation is left to torch, and so to every exporter


def test_statistics_follow_momentum_freezing_and_cumulative_averages():
    x, alpha = _inputs(8)
    for momentum in (0.3, None):
        choice = _choice(8, 1)
        for module in choice.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        exact = copy.deepcopy(choice)
        for number in range(3):
            with torch.no_grad():
                choice(x + number, alpha)
                with mixture.plain():
                    exact(x + number, alpha)
        _close(list(choice.buffers()), list(exact.buffers()))
        before = [buffer.clone() for buffer in choice.buffers()]
        with frozen_statistics(choice):
            choice(x, alpha)
        assert all(torch.equal(a, b) for a, b in zip(before, choice.buffers(), strict=True))


def test_far_from_zero_the_variance_stays_exact():
    choice = _choice(8, 1, ["max_pool_3x3", "avg_pool_3x3"])
    x, alpha = _inputs(8, candidates=2)
    x = x + 1000
    with mixture.plain():
        exact = choice.double()(x.double(), alpha.double())
    torch.testing.assert_close(choice.float()(x, alpha).double(), exact, atol=1e-3, rtol=0)


def test_weights_gradients_are_computed_only_where_they_are_asked_for():
    choice = _choice(8, 1)
    x, alpha = _inputs(8)
    full, part = _run(choice, x, alpha), _run(choice, x, alpha, weights=False)
    assert torch.equal(full[1], part[1])
    assert torch.equal(full[2], part[2])
    pointers = []
    run = mixture._Call.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture._Call, "run", lambda self, *a: pointers.append(a[-2]) or run(self, *a))
        _run(choice, x, alpha, weights=False)
        assert pointers == [None, None]
        _run(choice, x, alpha)
    assert pointers[-1] is not None


def test_second_derivatives_are_those_of_the_plain_sum(monkeypatch):
    calls = _used(monkeypatch)
    x, alpha = _inputs(8)
    v = torch.randn(len(alpha), generator=stream(0, "v"))
    for training in (True, False):
        choice = _choice(8, 1).train(training)
        found = []
        for dtype in (torch.float32, torch.float64):
            copied = copy.deepcopy(choice).to(dtype)
            mixing, inputs = alpha.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()
            loss = copied(inputs, mixing).square().mean()
            (first,) = torch.autograd.grad(loss, mixing, create_graph=True)
            wanted = [mixing, inputs, *copied.parameters()]
            grads = torch.autograd.grad(first @ v.to(dtype), wanted, materialize_grads=True)
            found.append([first.detach(), *grads])
        _close(*found, tolerance=2e-5)
    assert len(calls) == 2


def test_a_graph_is_walked_twice_with_the_same_result():
    choice = _choice(8, 1)
    x, alpha = _inputs(8)
    y = choice(x, alpha.requires_grad_()).sum()
    (one,) = torch.autograd.grad(y, alpha, retain_graph=True)
    (two,) = torch.autograd.grad(y, alpha)
    assert torch.equal(one, two)


def test_weights_changed_between_the_passes_do_no_harm():
    choice = _choice(8, 1)
    x, alpha = _inputs(8)
    g = torch.randn(x.shape, generator=stream(0, "g"))
    weight = next(choice.parameters())
    (expected,) = torch.autograd.grad(choice(x, alpha), weight, g)
    y = choice(x, alpha)
    with torch.no_grad():
        weight.add_(1)
    (found,) = torch.autograd.grad(y, weight, g)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["sparse", "parametrized"])
def test_masked_convolutions_run_with_their_masks(how, monkeypatch):
    choice = _choice(8, 1)
    if how == "sparse":
        choice = sparsify(choice, 0.5)
    else:
        for module in list(choice.modules()):
            if isinstance(module, nn.Conv2d):
                parametrize.register_parametrization(module, "weight", TopKMask(0.5))
    x, alpha = _inputs(8)
    calls = _used(monkeypatch)
    found = _run(choice, x, alpha)
    assert calls == [len(NAMES)]
    with mixture.plain():
        plain = _run(choice, x, alpha)
    _close(found, plain, tolerance=1e-5)
    weights = [g for g in found[3:] if g.dim() == 4 and (g == 0).any()]
    assert weights or how == "sparse"


def test_unknown_and_hooked_modules_run_by_themselves(monkeypatch):
    choice = _choice(8, 1, extra={"noise": Noise(), "mine": nn.Conv2d(8, 8, 3, padding=1)})
    x, alpha = _inputs(8, candidates=len(NAMES) + 2)
    calls = _used(monkeypatch)
    seen = []
    choice.candidates["sep_conv_3x3"].body[1].register_forward_hook(lambda *_: seen.append("sep"))
    choice.candidates["dil_conv_3x3"].register_forward_hook(lambda *_: seen.append("dil"))
    choice.candidates["max_pool_3x3"][0].register_forward_pre_hook(lambda *_: seen.append("max"))
    choice.candidates["dil_conv_5x5"].body[2] = nn.GroupNorm(2, 8)
    torch.manual_seed(0)
    y = choice(x, alpha)
    assert calls == [3, 1]  # average, identity and sep_conv_5x5 together; dil_conv_3x3 by itself, called from outside
    assert sorted(seen) == ["dil", "max", "sep"]
    with mixture.plain():
        torch.manual_seed(0)
        torch.testing.assert_close(y, choice(x, alpha), atol=1e-5, rtol=1e-5)


def test_what_the_kernels_do_not_serve_takes_the_plain_path(monkeypatch):
    choice = _choice(8, 1)
    x, alpha = _inputs(8)
    calls = _used(monkeypatch)
    choice.double()(x.double(), alpha.double())
    choice.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice(x, alpha)
    choice.eval()
    state = {name: tensor.detach() for name, tensor in choice.state_dict().items()}
    torch.func.grad(lambda a: torch.func.functional_call(choice, state, (x, a)).sum())(alpha)
    torch.func.vmap(choice, in_dims=(0, None))(torch.stack([x, x]), alpha)
    torch.func.jvp(lambda a: choice(x, a), (alpha,), (alpha,))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    choice(x, alpha)
    handle.remove()
    assert calls == []
    torch.func.functional_call(choice, state, (x, alpha))
    assert calls == [len(NAMES)]


def test_a_supernet_step_is_that_of_the_plain_path(monkeypatch):
    supernet = spaces.get("micro-darts").supernet(1, 4, channels=8)
    x = torch.randn(6, 1, 8, 8, generator=stream(0, "x"))
    y = torch.randint(4, (6,), generator=stream(0, "y"))
    calls = _used(monkeypatch)
    loss = functional.cross_entropy(supernet(x), y)
    assert calls
    with mixture.plain():
        exact = functional.cross_entropy(copy.deepcopy(supernet)(x), y)
    torch.testing.assert_close(loss, exact, atol=1e-5, rtol=1e-5)


def test_export_sees_standard_operations_only():
    network = spaces.get("micro-darts").build(
        spaces.get("micro-darts").random(stream(0, "genotype")), 1, 4, channels=8, seed=0
    )
    program = torch.export.export(network.eval(), (torch.zeros(1, 1, 8, 8),))
    assert all(str(node.target).startswith("aten.") for node in program.graph.nodes if node.op == "call_function")


def test_without_a_compiler_operations_run_by_themselves(monkeypatch):
    def refuses(*_, **__):
        raise BuildError("no C compiler was found")

    monkeypatch.setattr(library, "build", refuses)
    library._compiled.cache_clear()
    try:
        choice = _choice(8, 1)
        x, alpha = _inputs(8)
        calls = _used(monkeypatch)
        choice(x, alpha)
        assert calls == []
    finally:
        library._compiled.cache_clear()

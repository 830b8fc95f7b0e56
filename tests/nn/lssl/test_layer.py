"""The layer: its two views agree, causality, linearity, other rates, what is remembered, groups, bad input."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.nn.lssl import LSSL, hippo, param_groups
from netwright.nn.lssl.remembered import Remembered
from netwright.seeding import seeded, stream

DOUBLE = torch.float64


def layer(d_model: int = 3, d_state: int = 6, dtype: torch.dtype = DOUBLE, **options) -> LSSL:
    with seeded(0, "init"):
        return LSSL(d_model, d_state, **options).to(dtype).eval()


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "u"), dtype=DOUBLE).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_recurrence_is_convolution_at_16_000(measure):
    net, u = layer(2, 64, torch.float32, measure=measure), inputs(1, 16_000, 2, dtype=torch.float32)
    with torch.no_grad():
        one, state = net(u, return_state=True)
        other, last = net(u, return_state=True, mode="recurrence")
    assert torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(state, last, atol=1e-4)


@pytest.mark.parametrize("L", [1, 2, 3, 17, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"learn": 0, "measure": "legt", "channels": 2}, {"learn": 2, "alpha": 1.0}, {"bidirectional": True}]
)
def test_recurrence_is_convolution(L, options):
    for dtype, tolerance in ((DOUBLE, 1e-10), (torch.float32, 1e-4)):
        net = layer(dtype=dtype, d_state=32 if L == 1000 else 6, **options)
        u = inputs(2, L, 3, dtype=dtype)
        with torch.no_grad():
            one, other = (net.core(u, mode=mode)[0] for mode in ("convolution", "recurrence"))
        assert one.shape == (2, L, 3, options.get("channels", 1))
        assert float((one - other).abs().max()) < tolerance


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from(["convolution", "recurrence"]))
def test_any_split_with_the_state_carried(L, cut, mode):
    net, u, cut = layer(channels=2), inputs(2, L, 3), min(cut, L)
    with torch.no_grad():
        whole, last = net(u, return_state=True)
        state, found = net.initial_state(2), []
        if cut:
            first, state = net(u[:, :cut], state, return_state=True, mode=mode)
            found.append(first)
        for u_t in u[:, cut:].unbind(1):
            y, state = net.step(u_t, state)
            found.append(y[:, None])
        assert torch.allclose(torch.cat(found, 1), whole, rtol=0, atol=1e-10)
        assert torch.allclose(state, last, rtol=0, atol=1e-10)
        rest = net(u[:, cut:], net(u[:, :cut], return_state=True)[1]) if 0 < cut < L else whole[:, cut:]
        assert cut == L or torch.allclose(rest, whole[:, cut:], rtol=0, atol=1e-10)


def test_the_past_does_not_know_the_future():
    net, u = layer(), inputs(1, 30, 3)
    changed = u.clone()
    changed[:, 20] += 5
    with torch.no_grad():
        for mode, tolerance in (("recurrence", 0.0), ("convolution", 1e-5)):
            gap = (net(u, mode=mode) - net(changed, mode=mode)).abs().amax((0, 2))
            assert float(gap[:20].max()) <= tolerance
            assert float(gap[20:].min()) > 1e-6
        both = layer(bidirectional=True)
        assert float((both(u) - both(changed)).abs().amax((0, 2)).min()) > 1e-6


def test_the_core_is_linear_and_does_not_know_the_time():
    net, u, v = layer(channels=2), inputs(2, 25, 3), inputs(2, 25, 3, seed=1)

    def core(x):
        return net.core(x)[0]

    with torch.no_grad():
        assert torch.allclose(core(2 * u - 3 * v), 2 * core(u) - 3 * core(v), atol=1e-11)
        late = torch.cat([torch.zeros(2, 4, 3, dtype=DOUBLE), u], 1)
        assert torch.allclose(core(late)[:, 4:], core(u), atol=1e-11)


def test_two_directions_are_two_layers():
    """Reading backwards swaps them."""
    net = layer(channels=2, bidirectional=True)
    forward, backward = layer(channels=2), layer(channels=2)
    for one, part in ((forward, net.C[:, :2]), (backward, net.C[:, 2:])):
        one.load_state_dict({**net.state_dict(), "C": part.detach()}, strict=False)
    backward.D.data.zero_()
    u = inputs(2, 20, 3)
    with torch.no_grad():
        expected = forward.core(u)[0] + backward.core(u.flip(1))[0].flip(1)
        assert torch.allclose(net.core(u)[0], expected, atol=1e-12)


def test_a_coarser_sequence_is_the_same_function_of_time():
    """A slow input at every fourth sample, with the step times four, gives what every sample gives."""
    net = layer(dt_min=1e-3, dt_max=1e-2)
    time = torch.arange(4000, dtype=DOUBLE)[None, :, None] * torch.tensor([0.002, 0.003, 0.005], dtype=DOUBLE)
    u = time.sin()
    with torch.no_grad():
        fine, coarse, wrong = net.core(u)[0], net.core(u[:, 3::4], rate=4)[0], net.core(u[:, 3::4])[0]
    scale = float(fine.abs().max())
    assert float((fine[:, 3::4] - coarse)[:, 100:].abs().max()) < 0.02 * scale
    assert float((fine[:, 3::4] - wrong)[:, 100:].abs().max()) > 0.1 * scale


def test_untrained_layers_start_alike():
    u = inputs(2, 40, 3)
    with torch.no_grad():
        found = [layer(learn=learn)(u) for learn in (0, 1, 2)]
        A, B = hippo("legs", 6)
        found.append(layer(measure=(A, B))(u))
    for other in found[1:]:
        assert torch.allclose(other, found[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"learn": 0}, set()),
        ({"learn": 1}, {"A.P": (6,), "A.T": (3, 6), "b": (6,), "log_dt": (3,)}),
        ({"learn": 2}, {"A.P": (3, 6), "A.T": (3, 3, 6), "b": (3, 6), "log_dt": (3,)}),
        ({"learn": 1, "measure": (-torch.eye(6), torch.ones(6))}, {"A.A": (6, 6), "b": (6,)}),
        ({"learn": 2, "measure": (-torch.eye(6), torch.ones(6))}, {"A.A": (3, 6, 6), "b": (3, 6)}),
    ],
)
def test_what_is_trained(options, trained):
    net = layer(**options).train()
    net(inputs(2, 20, 3)).square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert {"C", "D", "mix.weight", "mix.bias"} <= set(gradients)
    for name, gradient in gradients.items():
        assert float(gradient.abs().max()) > 0, name
    for name, shape in dict(trained).items():
        assert gradients[name].shape == shape
    if not trained:
        assert set(gradients) == {"C", "D", "mix.weight", "mix.bias"}
        assert {"A.P", "b", "log_dt"} <= set(net.state_dict())


def test_gradients_are_those_of_finite_differences():
    net = layer(2, 3, channels=2)
    u, state = inputs(1, 6, 2).requires_grad_(), inputs(1, 2, 3, seed=4).requires_grad_()
    names = [name for name, _ in net.named_parameters()]

    def run(u, state, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(net, parameters, (u, state), {"return_state": True})

    assert torch.autograd.gradcheck(run, (u, state, *net.parameters()))


def test_per_example_gradients_by_vmap():
    net, u = layer(), inputs(4, 10, 3)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values, one):
        return torch.func.functional_call(net, values, (one[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, u)
    net.zero_grad()
    net(u).square().sum().backward()
    for name, p in net.named_parameters():
        assert torch.allclose(found[name].sum(0), p.grad, atol=1e-8), name


def test_steps_are_spread_over_their_range():
    net = layer(d_model=500, dtype=torch.float32, d_state=1)
    logs = net.log_dt.detach()
    assert logs.exp().min() > 1e-3 * 0.999
    assert logs.exp().max() < 0.1 * 1.001
    uniform = (logs - logs.min()) / (logs.max() - logs.min())
    assert abs(float(uniform.mean()) - 0.5) < 0.05
    even = layer(d_model=3, dt_init="linspace", dtype=torch.float32)
    assert even.log_dt.exp().tolist() == pytest.approx([1e-3, 1e-2, 1e-1])


@pytest.mark.parametrize("learn", [0, 1])
def test_what_is_remembered_is_never_stale(learn):
    net, u = layer(learn=learn, dtype=torch.float32), inputs(2, 15, 3, dtype=torch.float32)

    def fresh() -> torch.Tensor:
        return copy.deepcopy(net)(u)  # a copy remembers nothing

    with torch.no_grad():
        before = net(u)
        assert torch.equal(net(u), before)
        for change in ("data", "in place", "state", "alpha", "rate", "longer"):
            if change == "data":
                net.log_dt.data += 0.1
            elif change == "alpha":
                net.alpha = 1.0
            elif change == "in place":
                net.C.mul_(1.1)
            elif change == "state":
                net.load_state_dict({**net.state_dict(), "b": net.b * 0.9})
            elif change == "rate":
                assert not torch.allclose(net(u, rate=2.0), net(u))
            else:
                assert torch.allclose(net(torch.cat([u, u], 1))[:, :15], net(u), atol=1e-6)
            assert torch.allclose(net(u), fresh(), atol=1e-6)
            assert change in ("rate", "longer") or not torch.allclose(net(u), before, atol=1e-5)
            before = net(u)
        assert torch.allclose(net.double()(u.double()).float(), before, atol=1e-4)
        net.float()
    with torch.inference_mode():
        net(u)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(u).sum().backward()  # nothing of the inference above takes part
    optimizer.step()
    assert torch.allclose(net(u), fresh(), atol=1e-6)


def test_a_fixed_system_keeps_its_powers(monkeypatch):
    net, u, calls = layer(learn=0).train(), inputs(2, 15, 3), []
    from netwright.nn.lssl import layer as module

    real = module.krylov
    monkeypatch.setattr(module, "krylov", lambda *args: calls.append(1) or real(*args))
    for _ in range(3):
        net(u).sum().backward()
    assert len(calls) == 1
    with monkeypatch.context() as small:
        small.setattr(module, "KRYLOV_LIMIT", 1)
        assert torch.allclose(net(u), net(u, mode="recurrence"), rtol=0, atol=1e-10)
    assert len(calls) == 1
    net.alpha = 1.0
    assert torch.equal(net(u), copy.deepcopy(net)(u))
    net.log_dt += 0.1
    assert torch.equal(net(u), copy.deepcopy(net)(u))


def test_remembered():
    remembered, weight, calls = Remembered(), nn.Parameter(torch.ones(2)), []

    def compute():
        calls.append(1)
        return weight.sum()

    for _ in range(2):
        remembered(0, [weight], compute)
    assert len(calls) == 2  # gradients flow: never kept
    with torch.no_grad():
        for _ in range(2):
            remembered(0, [weight], compute)
        assert len(calls) == 3
        remembered(1, [weight], compute)
        assert len(calls) == 4
        copy.deepcopy(remembered)(1, [weight], compute)
        assert len(calls) == 5


def test_saved_and_loaded():
    net, file = layer(dtype=torch.float32), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = LSSL(3, 6)
    other.load_state_dict(torch.load(file, weights_only=True))
    u = inputs(1, 9, 3, dtype=torch.float32)
    assert torch.equal(other.eval()(u), net(u))


def test_kernels_are_float32_under_autocast_and_in_half_precision():
    net, u = layer(dtype=torch.float32), inputs(2, 50, 3, dtype=torch.float32)
    with torch.no_grad():
        exact = net.core(u)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.allclose(net.core(u)[0], exact, atol=1e-5)
            assert net.kernel(20).dtype == torch.float32
            last = net(u, return_state=True)[1]
            assert torch.allclose(last, net(u, return_state=True, mode="recurrence")[1], atol=1e-5)
        half = copy.deepcopy(net).bfloat16()
        assert half(u.bfloat16()).dtype == torch.bfloat16
        assert half.kernel(20).dtype == torch.float32
        wide = layer(dtype=torch.float32, kernel_dtype=DOUBLE)
        assert wide.kernel(20).dtype == DOUBLE
        assert wide(u).dtype == torch.float32
        assert torch.allclose(wide(u), net(u), atol=1e-5)


def test_without_mixing_channels_stay():
    net = layer(channels=2, mix=False, activation="identity")
    u = inputs(2, 7, 3)
    assert torch.allclose(net(u), net.core(u)[0].flatten(2))


def test_parameter_groups():
    net = nn.Sequential(LSSL(3, 4), nn.Linear(3, 2))
    rest, matrices, steps = param_groups(net, 4e-3, 0.1)
    assert [group["lr"] for group in (rest, matrices, steps)] == [4e-3, 1e-4, 1e-3]
    assert [group["weight_decay"] for group in (rest, matrices, steps)] == [0.1, 0.0, 0.0]
    assert steps["params"] == [net[0].log_dt]
    assert {id(p) for p in matrices["params"]} == {id(p) for p in (*net[0].A.parameters(), net[0].b)}
    every = [id(p) for group in (rest, matrices, steps) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in net.parameters())
    assert [group["lr"] for group in net[0].param_groups(1e-5)] == [1e-5] * 3
    assert len(LSSL(3, 4, learn=0).param_groups(1e-3)) == 1
    torch.optim.AdamW(net[0].param_groups(1e-3, 0.01))


def test_it_learns_to_remember():
    """The input of 20 steps ago, which a layer without memory cannot tell."""
    with seeded(0, "task"):
        net = LSSL(1, 16, channels=4, dt_min=0.02, dt_max=0.05)
        u = torch.randn(16, 100, 1).cumsum(1)
        u = (u - u.mean()) / u.std()
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    losses = []
    for _ in range(150):
        loss = (net(u)[:, 20:] - u[:, :-20]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    naive = float((u[:, 20:] - u[:, :-20]).square().mean())
    assert losses[-1] < 0.5 * naive < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state must be >= 1, got 0"),
        ({"d_model": 0}, "d_model must be >= 1, got 0"),
        ({"channels": 0}, "channels must be >= 1, got 0"),
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], got 1.1"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max, got 0.0 and 0.1"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max, got 0.2 and 0.1"),
        ({"measure": "fourier"}, "measure must be one of legs, legt, lagt, got 'fourier'"),
        ({"measure": (torch.eye(2), torch.ones(3))}, r"measure must be a name or \(A, B\).*\(2, 2\) and \(3,\)"),
        ({"learn": 3}, "learn must be one of 0, 1, 2, got 3"),
        ({"d_state": 2.5}, "d_state must be a whole number >= 1, got 2.5"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"activation": "swish"}, "activation must be one of gelu, relu, silu, identity, got 'swish'"),
        ({"noise": -1.0}, "noise must be >= 0"),
        ({"noise": 0.1, "learn": 0}, "noise must be 0 unless a named measure is trained, got 0.1"),
        ({"noise": 0.1, "measure": (torch.eye(6), torch.ones(6))}, "noise must be 0 unless"),
        ({"dt_init": "zero"}, "dt_init must be one of random, linspace, got 'zero'"),
        ({"kernel_dtype": torch.bfloat16}, "kernel_dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LSSL(**{"d_model": 3, "d_state": 6, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda net: net(torch.zeros(2, 5)),
            ValueError,
            r"u must have shape \(batch, L, 3\) with L >= 1, got \(2, 5\)",
        ),
        (lambda net: net(torch.zeros(2, 5, 4)), ValueError, r"got \(2, 5, 4\)"),
        (lambda net: net(torch.zeros(2, 0, 3)), ValueError, r"got \(2, 0, 3\)"),
        (lambda net: net(torch.zeros(2, 5, 3), rate=0.0), ValueError, "rate must be > 0 and finite, got 0.0"),
        (
            lambda net: net(torch.zeros(2, 5, 3, dtype=torch.int64)),
            TypeError,
            "floating-point numbers, got torch.int64",
        ),
        (lambda net: net(torch.zeros(2, 5, 3), torch.zeros(2, 3, 5)), ValueError, r"state must have shape \(2, 3, 6\)"),
        (lambda net: net(torch.zeros(2, 5, 3), mode="fft"), ValueError, "mode must be .* got 'fft'"),
        (
            lambda net: net.step(torch.zeros(2, 1, 3), net.initial_state(2)),
            ValueError,
            r"u_t must have shape \(batch, 3\)",
        ),
        (lambda net: net.kernel(0), ValueError, "L must be >= 1, got 0"),
        (lambda net: net.initial_state(0), ValueError, "batch must be >= 1, got 0"),
        (lambda net: net.param_groups(0.0), ValueError, "lr must be > 0, got 0.0"),
        (lambda net: net.param_groups(0.1, -1.0), ValueError, "weight_decay must be >= 0, got -1.0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(layer(dtype=torch.float32))


def test_two_directions_have_no_state():
    net = layer(bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional"):
        net.step(inputs(2, 3), net.initial_state(2))
    with pytest.raises(ValueError, match="bidirectional"):
        net(inputs(2, 4, 3), return_state=True)

"""FBNet: masks, temperature, phases, the loss, the published networks, and what resumes."""

import collections
import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.cost import count
from netwright.data.tensors import Batches, TensorImages
from netwright.nn.mbconv import MBConv
from netwright.search import spaces
from netwright.search.fbnet import FBNet, GumbelSoftmaxGate, TemperatureSchedule
from netwright.search.genotype import Genotype
from netwright.search.objective import CostPenalty, TaskLoss
from netwright.search.pairs import Pairs
from netwright.search.phased import Phased
from netwright.search.sampling import SampleSelector, inherited_accuracy, sample_genotypes
from netwright.search.selection import ArgmaxSelector, MagnitudeSelector
from netwright.search.spaces.fbnet import FBNET_A, FBNET_B, FBNET_C, fbnet_space
from netwright.search.supernet import Choice, FixedGate
from netwright.seeding import seeded, stream

CHAIN = spaces.get("micro-chain")
SHAPE = (1, 8, 8)


def images(number=24):
    draw = stream(0, "images")
    return torch.rand(number, *SHAPE, generator=draw), torch.randint(3, (number,), generator=draw)


def loaders():
    x, y = images()
    return Batches(TensorImages(x, y), 8, steps=2), Batches(TensorImages(x.flip(0), y.flip(0)), 8, name="validation")


def table(supernet, base=0.5):
    return {key: base + 0.1 * number for number, key in enumerate(supernet.operations(SHAPE))}


def fbnet(supernet=None, **options):
    supernet = supernet or CHAIN.supernet(1, 3, channels=4, seed=0)
    settings = {"warmup_epochs": 1, "epochs": 3, "samples": 2, "lr": 0.05} | options
    return FBNet(supernet, settings.pop("latency", table(supernet)), **settings)


def snapshot(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def same(before, after):
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_the_published_defaults():
    supernet = CHAIN.supernet(1, 3, channels=4, seed=0)
    search = FBNet(supernet, table(supernet))
    config = search.config()
    assert json.loads(json.dumps(config)) == config
    warmup, searching = config["stages"]
    assert (warmup["epochs"], searching["epochs"]) == (10, 80)
    assert (warmup["alpha_step"], searching["alpha_step"]) == (False, True)
    assert (warmup["lr"], searching["lr_min"]) == (0.1, 0.0)
    assert warmup["lr_min"] == searching["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi / 9)))  # one cosine
    assert {stage["weight_decay"] for stage in config["stages"]} == {1e-4}
    assert (config["alpha_lr"], config["alpha_weight_decay"], config["momentum"]) == (0.01, 5e-4, 0.9)
    assert (config["form"], config["alpha"], config["beta"], config["unit"]) == ("fbnet", 0.2, 0.6, 1e-3)
    assert (config["w_split"], config["per_sample"], config["hard"]) == (0.8, False, False)
    assert config["temperature"] == {"init": 5.0, "rate": 0.045}
    assert isinstance(search.selector, SampleSelector)
    assert search.selector.samples == 6
    assert not any(theta.any() for theta in supernet.arch_parameters())  # all blocks alike
    with pytest.raises(ValueError, match=r"epochs must be a whole number >= 1, got 2\.5"):
        FBNet(supernet, epochs=2.5)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_cold_masks_are_one_hot_samples_of_the_softmax():
    gate, theta = GumbelSoftmaxGate(tau=1e-3, per_sample=True), torch.tensor([0.0, math.log(2), math.log(5)])
    with seeded(0, "masks"):
        masks = gate.weights(theta, True, gate.draw(theta, "weights", 20_000))
    assert masks.shape == (20_000, 3)
    assert (masks.max(1).values > 0.99).float().mean() > 0.99
    shares = masks.argmax(1).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.25, 0.625]), atol=0.01, rtol=0)


def test_hot_masks_are_uniform():
    gate, theta = GumbelSoftmaxGate(tau=1e6), torch.tensor([0.0, 3.0, -2.0, 1.0])
    torch.testing.assert_close(gate.weights(theta, True, gate.draw(theta, "alpha", 1)), torch.full((4,), 0.25))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_masks_equal_those_of_torch_under_the_same_generator(hard, per_sample):
    gate = GumbelSoftmaxGate(tau=0.7, hard=hard, per_sample=per_sample)
    thetas = [torch.linspace(-1, 1, 9) * scale for scale in (1.0, -0.3, 2.0)]
    ours, theirs = ([theta.clone().requires_grad_() for theta in thetas] for _ in range(2))
    rows = torch.stack(theirs)
    rows = rows[:, None].expand(3, 5, 9) if per_sample else rows
    with seeded(3, "masks"):
        expected = functional.gumbel_softmax(rows, tau=0.7, hard=hard)
    with seeded(3, "masks"):
        drawn = gate.draw_all([theta.detach() for theta in ours], "weights", 5)
    masks = torch.stack([gate.weights(theta, True, noise) for theta, noise in zip(ours, drawn, strict=True)])
    torch.testing.assert_close(masks, expected, atol=1e-6, rtol=0)
    target = torch.rand(expected.shape, generator=stream(0, "target"))
    grads = [torch.autograd.grad((m * target).sum(), on) for m, on in ((masks, ours), (expected, theirs))]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_choices_have_noise_of_their_own_and_shorter_ones_are_cut():
    gate = GumbelSoftmaxGate()
    with seeded(0, "noise"):
        drawn = gate.draw_all([torch.zeros(5), torch.zeros(3), torch.zeros(5)], "weights", 1)
    assert [noise.shape for noise in drawn] == [(5,), (3,), (5,)]
    assert not any(torch.equal(drawn[i][:3], drawn[j][:3]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with seeded(0, "noise"):
        many = gate.draw_all([torch.zeros(200_000)], "weights", 1)[0].double()
    assert many.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert many.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_the_noise_stays_finite(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(torch.tensor([0.0, math.inf, 1.0])))
    noise = GumbelSoftmaxGate().draw(torch.zeros(3), "weights", 1)
    torch.testing.assert_close(noise, torch.tensor([-math.log(1e-7), -math.log(-math.log(1e-20)), 0.0]))


def test_outside_of_training_and_before_a_draw_the_mask_is_the_distribution():
    gate, theta = GumbelSoftmaxGate(tau=0.1), torch.tensor([0.0, 1.0])
    noise = torch.tensor([9.0, 0.0])
    for mask in (gate.weights(theta, False, noise), gate.weights(theta, True), gate.expectation(theta)):
        assert torch.equal(mask, theta.softmax(0))
    assert not torch.equal(gate.expectation(theta, noise), theta.softmax(0))


def test_the_cost_sees_the_masks_of_the_pass():
    for per_sample in (False, True):
        gate = GumbelSoftmaxGate(tau=0.5, per_sample=per_sample)
        supernet = CHAIN.supernet(1, 3, channels=4, gate=gate).train()
        costs, seen = table(supernet), {}
        for key, choice in supernet.keyed_choices().items():
            mix = choice.mix
            choice.mix = lambda x, m, running=None, key=key, mix=mix, seen=seen: mix(
                x, seen.setdefault(key, m), running
            )
        loss = (TaskLoss() + CostPenalty("add_power", costs, alpha=1.0, beta=1.0, apply_to="both"))(
            supernet, images(6), "alpha"
        )
        rows = supernet.candidate_costs(costs)
        masks = {key: m.mean(0) if per_sample else m for key, m in seen.items()}
        expected = sum(float(masks[key].detach() @ torch.tensor(row)) for key, row in rows.items())
        assert supernet.expected_cost(costs).item() == pytest.approx(expected, rel=1e-5)
        for choice in supernet.keyed_choices().values():
            del choice.mix
        plain = functional.cross_entropy(supernet(images(6)[0]), images(6)[1])
        assert loss.item() == pytest.approx(plain.item() + expected, rel=1e-5)


def test_cold_latency_averages_to_the_expectation_under_p():
    gate = GumbelSoftmaxGate(tau=1e-4)
    supernet = CHAIN.supernet(1, 3, channels=4, gate=gate).train()
    for number, theta in enumerate(supernet.arch_parameters()):
        theta.data.normal_(generator=stream(0, "theta", number))
    rows = supernet.candidate_costs(table(supernet), SHAPE)
    flat = torch.cat([torch.tensor(row) for row in rows.values()])
    latencies = []
    with torch.no_grad(), seeded(0, "draws"):
        for _ in range(2000):
            supernet.redraw("alpha")
            latencies.append(torch.cat(list(supernet.mixing_weights(drawn=True).values())) @ flat)
    found = torch.stack(latencies).double()
    exact = sum(supernet.arch[key].softmax(0).detach() @ torch.tensor(row) for key, row in rows.items())
    assert abs(found.mean() - exact) < 3 * found.std() / math.sqrt(len(found))
    assert found.std() > 0.05


def test_the_gradient_of_theta_equals_finite_differences():
    supernet = CHAIN.supernet(1, 3, channels=4, seed=0, gate=GumbelSoftmaxGate(tau=0.8)).double().train()
    searcher = fbnet(supernet)
    x, y = images(6)
    batch = x.double(), y

    def loss():
        with seeded(0, "fixed noise"):
            return searcher.objective(supernet, batch, "alpha")

    grads = torch.autograd.grad(loss(), supernet.arch_parameters())
    step = 1e-5
    with torch.no_grad():
        for theta, grad in list(zip(supernet.arch_parameters(), grads, strict=True))[::2]:
            for place in range(len(theta)):
                theta[place] += step
                up = loss()
                theta[place] -= 2 * step
                down = loss()
                theta[place] += step
                assert float((up - down) / (2 * step)) == pytest.approx(float(grad[place]), abs=1e-6)
    assert max(float(grad.abs().max()) for grad in grads) > 1e-3


def test_masks_for_each_input_are_those_of_batches_of_one():
    gate = GumbelSoftmaxGate(tau=0.5, per_sample=True)
    choice = Choice({"a": nn.Conv2d(2, 2, 3, padding=1), "b": nn.Identity()}, key="k", gate=gate).train()
    theta, x = torch.tensor([0.3, -0.2]), torch.rand(4, 2, 3, 3)
    choice.drawn = gate.draw(theta, "weights", 4)
    alone = copy.deepcopy(choice)
    rows = []
    for i in range(4):
        alone.drawn = choice.drawn[i : i + 1]
        rows.append(alone(x[i : i + 1], theta))
    torch.testing.assert_close(choice(x, theta), torch.cat(rows))
    with pytest.raises(ValueError, match=r"batch must be of 4 inputs.*got 3"):
        choice(x[:3], theta)


@pytest.mark.parametrize("per_sample", [False, True])
def test_blocks_of_small_weight_do_not_run_and_cost_little_accuracy(per_sample):
    calls = collections.Counter()
    blocks = {name: nn.Conv2d(2, 2, 1).double() for name in "abcd"}
    for name, block in blocks.items():
        block.register_forward_hook(lambda *_, name=name: calls.update(name))
    gates = [GumbelSoftmaxGate(0.2, per_sample, skip_below=eps) for eps in (0.0, 1e-3)]
    theta = torch.tensor([1.0, 0.9, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    x = torch.rand(5, 2, 3, 3, dtype=torch.float64)
    found = []
    for gate in gates:
        choice = Choice(blocks, key="k", gate=gate).train()
        choice.drawn = theta.new_zeros((5, 4) if per_sample else 4)
        y = choice(x, theta)
        found.append((y, torch.autograd.grad(y.square().sum(), theta)[0]))
    assert calls == {"a": 2, "b": 2, "c": 1, "d": 1}
    (exact, slope), (fast, near) = found
    assert 0 < (exact - fast).abs().max() < 1e-3
    assert 0 < (slope - near).abs().max() < 1e-3 / 0.2 * len(blocks) * float(exact.detach().square().sum())


# Schedule and phases --------------------------------------------------------------------------------------------------


def test_the_temperature_falls_after_each_epoch_of_the_architecture_alone():
    schedule = TemperatureSchedule(init=5.0, rate=0.045)
    assert schedule(1) / schedule(0) == pytest.approx(0.956, abs=1e-3)
    result = fbnet(warmup_epochs=2, epochs=5, temperature=schedule).search(*loaders(), seed=0)
    found = [epoch["tau"] for epoch in result.epochs]
    assert found == pytest.approx([5.0, 5.0, 5.0, schedule(1), schedule(2)])


def test_batches_come_in_phases_and_a_warm_up_has_the_first_alone():
    searcher = fbnet(warmup_epochs=1, epochs=2)
    train, val = loaders()
    pairs = Pairs(train, val, searcher)
    searcher.prepare(seed=0, steps_per_epoch=len(train))
    assert len(pairs) == len(train) + len(val) == 5
    kinds = []
    for _ in range(2):
        for train_batch, val_batch in pairs:
            kinds.append("w" if val_batch is None else "theta")
            searcher.step(train_batch, val_batch)
        kinds.append("|")
        searcher.end_epoch()
    assert kinds == ["w", "w", "|", "w", "w", "theta", "theta", "theta", "|"]
    assert searcher.finished


def test_each_phase_leaves_the_other_part_to_the_bit():
    searcher = fbnet(warmup_epochs=0)
    supernet = searcher.supernet
    train, val = ([next(iter(loader))] for loader in loaders())
    searcher.prepare(seed=0, steps_per_epoch=1)
    thetas, weights = supernet.arch_parameters(), [*supernet.weight_parameters(), *supernet.buffers()]
    before = snapshot(thetas), snapshot(weights)
    searcher.step(train[0], None)
    middle = snapshot(thetas), snapshot(weights)
    searcher.step(None, val[0])
    after = snapshot(thetas), snapshot(weights)
    assert all(same(before[0], middle[0]))
    assert not any(same(before[1], middle[1])[: len(supernet.weight_parameters())])
    assert all(same(middle[1], after[1])), "the theta phase must leave weights and running statistics"
    assert not any(same(middle[0], after[0]))


def test_a_warm_up_leaves_theta_at_zero():
    result = fbnet(warmup_epochs=2, epochs=3).search(*loaders(), seed=0)
    zero, _, still, moved = result.alpha_history
    assert all(not theta.any() for theta in (*zero.values(), *still.values()))
    assert all(theta.any() for theta in moved.values())


def test_the_learning_rate_of_the_weights_is_one_cosine():
    searcher = fbnet(warmup_epochs=1, epochs=3, lr=0.1)
    searcher.prepare(seed=0, steps_per_epoch=2)
    rates = []
    for _ in range(3):
        for train_batch, val_batch in Pairs(*loaders(), searcher):
            searcher.step(train_batch, val_batch)
            if val_batch is None:
                rates.append(searcher.w_opt.param_groups[0]["lr"])
        searcher.end_epoch()
    assert rates[0] == 0.1
    assert rates[2] == pytest.approx(0.05 * (1 + math.cos(math.pi / 3)))  # where a single cosine would be
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(rates[2] * 0.5 * (1 + math.cos(math.pi * 0.75)))


def test_a_step_of_phases_needs_one_batch():
    for pair in ((None, None), (1, 1)):
        with pytest.raises(ValueError, match="one of train_batch and val_batch must be given"):
            Phased().step(nn.Module(), None, None, None, *pair)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_search_has_the_same_bits(stop):
    plain, states = fbnet(epochs=4), []
    expected = plain.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    again = fbnet(epochs=4, supernet=CHAIN.supernet(1, 3, channels=4, seed=5))
    again.load_state_dict(states[stop - 1])
    torch.manual_seed(9)
    found = again.search(*loaders(), seed=0)
    assert found.genotype == expected.genotype
    assert found.epochs == expected.epochs
    assert all(same(plain.supernet.state_dict().values(), again.supernet.state_dict().values()))


def test_lightning_gives_the_bits_of_search():
    import lightning

    from netwright.search.lightning import SearchModule

    def trainer(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return lightning.Trainer(max_epochs=-1, accelerator="cpu", enable_checkpointing=False, **quiet, **options)

    plain = fbnet()
    expected = plain.search(*loaders(), seed=0)
    module = SearchModule(fbnet(), *loaders(), seed=0)
    trainer().fit(module)
    assert all(same(plain.supernet.state_dict().values(), module.supernet.state_dict().values()))
    assert module.result().genotype == expected.genotype
    assert module.result().epochs == expected.epochs
    with pytest.raises(ValueError, match="limit_train_batches must not cut an epoch of phases, got 2 of 5"):
        trainer(limit_train_batches=2).fit(SearchModule(fbnet(), *loaders(), seed=0))


# The loss and what is recorded ----------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_times_the_power_of_the_log_latency_in_microseconds():
    searcher = fbnet(latency={**table(CHAIN.supernet(1, 3, channels=4)), "constant": 2.5})
    supernet = searcher.supernet.train()
    with seeded(0, "noise"):
        loss = searcher.objective(supernet, images(6), "weights")
    rows, masks = supernet.candidate_costs(table(supernet)), supernet.mixing_weights(drawn=True)
    latency = 2.5 + sum(float(masks[key].detach() @ torch.tensor(row)) for key, row in rows.items())
    task = functional.cross_entropy(supernet(images(6)[0]), images(6)[1]).item()
    assert loss.item() == pytest.approx(task * 0.2 * math.log(1000 * latency) ** 0.6, rel=1e-5)
    additive = fbnet(form="add_power", alpha=0.3, beta=0.5, unit=1.0)
    with seeded(0, "noise"):
        loss = additive.objective(additive.supernet.train(), images(6), "alpha")
    masks = additive.supernet.mixing_weights(drawn=True)
    latency = sum(float(masks[key].detach() @ torch.tensor(row)) for key, row in rows.items())
    task = functional.cross_entropy(additive.supernet(images(6)[0]), images(6)[1]).item()
    assert loss.item() == pytest.approx(task + 0.3 * latency**0.5, rel=1e-5)


def test_figures_of_an_epoch_by_hand():
    searcher = fbnet(warmup_epochs=0, epochs=1, alpha_lr=0.5)
    supernet = searcher.supernet
    costs = {**table(supernet), "constant": 3.0}
    searcher = fbnet(supernet, latency=costs, warmup_epochs=0, epochs=1, alpha_lr=0.5)
    result = searcher.search(*loaders(), seed=0)
    figures, thetas = result.epochs[0], result.alpha_history[-1]
    rows = supernet.candidate_costs(table(supernet), SHAPE)
    p = {key: theta.softmax(0) for key, theta in thetas.items()}
    assert figures["entropy"] == pytest.approx(sum(float(-(q * q.log()).sum()) for q in p.values()) / len(p), rel=1e-5)
    assert figures["entropy"] < math.log(5)
    expected = 3.0 + sum(float(p[key] @ torch.tensor(row)) for key, row in rows.items())
    assert figures["expected_latency"] == pytest.approx(expected, rel=1e-5)
    chosen = 3.0 + sum(row[int(thetas[key].argmax())] for key, row in rows.items())
    assert figures["argmax_latency"] == pytest.approx(chosen)
    low, high = (3.0 + sum(pick(row) for row in rows.values()) for pick in (min, max))
    assert low < figures["relaxed_latency"] < high


def test_latency_steers_the_search():
    """With an enormous power of the latency every choice takes what costs 10 to 20 times less than the rest."""
    supernet = CHAIN.supernet(1, 3, channels=4, seed=0)
    price = {"k3_e2": 20.0, "k3_e4": 10.0, "k5_e2": 1.0, "k5_e4": 15.0}
    costs = {key: price[key[0]] for key in table(supernet)}
    options = {"warmup_epochs": 0, "epochs": 6, "alpha_lr": 0.3, "selector": ArgmaxSelector()}
    cheap = fbnet(supernet, latency=costs, beta=30.0, alpha=math.log(60_000) ** -30, **options)
    found = cheap.search(*loaders(), seed=0)
    assert set(found.genotype.operations) <= {"skip", "k5_e2"}
    latencies = [epoch["expected_latency"] for epoch in found.epochs]
    assert latencies == sorted(latencies, reverse=True)


def test_split_is_stratified_and_of_the_share():
    labels = torch.arange(200) % 4
    searcher = fbnet(w_split=0.75)
    weights, theta = searcher.split(labels, seed=1)
    assert (len(weights), len(theta)) == (150, 50)
    assert sorted([*weights.tolist(), *theta.tolist()]) == list(range(200))
    assert labels[theta].bincount().tolist() in ([13, 13, 12, 12], [12, 12, 13, 13], [13, 12, 12, 13], [12, 13, 13, 12],
                                                 [13, 12, 13, 12], [12, 13, 12, 13])  # fmt: skip


def test_settings_are_plain_values():
    config = fbnet(hard=True, skip_below=1e-3).config()
    assert config["method"] == {"name": "Phased"}
    assert (config["alpha"], config["beta"], config["hard"], config["skip_below"]) == (0.2, 0.6, True, 1e-3)
    assert config["temperature"] == {"init": 5.0, "rate": 0.045}


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"hard": True}, {"skip_below": 0.05}, {"latency": None}])
@pytest.mark.parametrize("name", ["micro-chain", "micro-darts-2-shared"])
def test_chains_and_cells_are_searched(name, options):
    supernet = spaces.get(name).supernet(1, 3, channels=4, seed=0)
    options = {"latency": table(supernet), "epochs": 2} | options
    result = fbnet(supernet, **options).search(*loaders(), seed=0)
    assert result.genotype.validate().space == name
    assert ("argmax_latency" in result.epochs[-1]) == (options["latency"] is not None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GumbelSoftmaxGate(0.0), "tau must be > 0 and finite, got 0.0"),
        (lambda: GumbelSoftmaxGate(math.nan), "tau must be > 0"),
        (lambda: setattr(GumbelSoftmaxGate(), "tau", -1.0), "tau must be > 0"),
        (lambda: GumbelSoftmaxGate(skip_below=1.0), r"skip_below must lie in \[0, 1\), got 1.0"),
        (lambda: TemperatureSchedule(0.0), "init must be > 0"),
        (lambda: TemperatureSchedule(rate=-0.1), "rate must be >= 0"),
        (lambda: fbnet(w_split=1.0), r"w_split must lie in \(0, 1\), got 1.0"),
        (lambda: fbnet(warmup_epochs=3), r"warmup_epochs must lie in \[0, 3\)"),
        (lambda: fbnet(form="log"), "form must be 'fbnet' or 'add_power', got 'log'"),
        (lambda: fbnet(unit=0.0), "unit must be > 0"),
        (
            lambda: fbnet(latency={("k3_e2", 8): -1.0}),
            r"latencies must be >= 0, got -1.0 for \('k3_e2', 8\)",
        ),
        (lambda: fbnet(samples=-1), "samples must be >= 0"),
        (lambda: sample_genotypes(CHAIN.supernet(1, 3), 0, generator=stream(0, "x")), "count must be >= 1, got 0"),
        (lambda: SampleSelector(1).select(CHAIN.supernet(1, 3)), "train and val must be batches"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_latency_below_the_unit_and_a_missing_one_are_named():
    searcher = fbnet(unit=1e3)
    searcher.prepare(seed=0, steps_per_epoch=2)
    with pytest.raises(ValueError, match="cost must be > 1 for 'fbnet' in its unit"):
        searcher.step(images(6), None)
    searcher = fbnet(latency={"constant": 4.0})
    searcher.prepare(seed=0, steps_per_epoch=2)
    with pytest.raises(KeyError, match="the table has no cost for"):
        searcher.step(images(6), None)


# Samples --------------------------------------------------------------------------------------------------------------


def test_samples_follow_the_distribution_and_their_generator():
    supernet = CHAIN.supernet(1, 3, channels=4)
    supernet.arch["layer_0"].data.copy_(torch.tensor([0.0, math.log(2), math.log(5), -1e9]))
    supernet.arch["layer_1"].data.zero_()
    drawn = sample_genotypes(supernet, 3000, generator=stream(0, "samples"))
    names = CHAIN.choices()["layer_0"]
    shares = [sum(g.operations[0] == name for g in drawn) / len(drawn) for name in names]
    assert shares == pytest.approx([0.125, 0.25, 0.625, 0.0], abs=0.025)
    joint = collections.Counter((g.operations[0], g.operations[1]) for g in drawn)
    for name, share in zip(names[:3], (0.125, 0.25, 0.625), strict=True):
        for other in CHAIN.choices()["layer_1"]:
            assert joint[name, other] / len(drawn) == pytest.approx(share / 5, abs=0.025)
    assert sample_genotypes(supernet, 5, generator=stream(0, "samples")) == drawn[:5]
    assert sample_genotypes(supernet, 5, generator=stream(1, "samples")) != drawn[:5]


def test_samples_of_a_fixed_choice_and_of_cells():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
    key = "normal_0_2"
    names = supernet.keyed_choices()[key].names
    supernet.set_gate(FixedGate(names.index("sep_conv_3x3"), len(names)), key)
    drawn = sample_genotypes(supernet, 20, generator=stream(0, "samples"))
    assert {g.normal.ops[0] for g in drawn} == {("sep_conv_3x3", 0)}
    assert len(set(drawn)) > 5


def test_the_best_of_the_candidates_is_kept_and_the_most_probable_is_one():
    supernet = CHAIN.supernet(1, 3, channels=4, seed=0)
    scored = []

    def evaluate(genotype):
        scored.append(genotype)
        return -abs(len(scored) - 3)

    selector = SampleSelector(6, evaluate)
    best = selector.select(supernet, seed=4)
    assert scored[0] == ArgmaxSelector().select(supernet)
    assert scored == selector.candidates(supernet, seed=4)
    assert len(scored) == len(set(scored)) == 7
    assert best == scored[2]
    assert SampleSelector(0, evaluate).candidates(supernet) == [supernet.derive()]
    cells = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
    assert SampleSelector(2).candidates(cells)[0] == MagnitudeSelector().select(cells)


def test_inherited_accuracy_is_that_of_the_derived_network_with_its_weights_and_fresh_statistics():
    supernet = CHAIN.supernet(1, 3, channels=4, seed=0)
    searcher = fbnet(supernet, warmup_epochs=2, epochs=3, selector=ArgmaxSelector())
    searcher.search(*loaders(), seed=0)
    genotype = CHAIN.random(stream(2, "random"))
    before = snapshot(supernet.state_dict().values())
    train, val = [images()], [images(12), images(24)]
    found = inherited_accuracy(supernet, genotype, train, val)
    assert all(same(before, supernet.state_dict().values()))
    assert isinstance(supernet.keyed_choices()["layer_0"].gate, GumbelSoftmaxGate)

    network = CHAIN.build(genotype, 1, 3, channels=4)
    state = dict(supernet.network.state_dict())
    for key, name in CHAIN.decisions(genotype).items():
        place = next(n for n, c in supernet.network.named_modules() if isinstance(c, Choice) and c.key == key)
        prefix = f"{place}.candidates.{name}."
        state |= {f"{place}.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
    network.load_state_dict({k: state[k] for k in network.state_dict()})
    stale = (network.eval()(images()[0]).argmax(1) == images()[1]).float().mean().item()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = 1.0
    network.train()(images()[0])
    network.eval()
    x, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    expected = (network(x).argmax(1) == y).float().mean().item()
    assert found == pytest.approx(expected)
    assert stale != pytest.approx(expected)


# The published space --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genotype", "parameters", "macs"),
    [(FBNET_A, 4_321_464, 249.92), (FBNET_B, 4_863_288, 306.21), (FBNET_C, 5_572_200, 384.96)],
    ids=["A", "B", "C"],
)
def test_published_networks(genotype, parameters, macs):
    cost = count(genotype.validate().build(3, 1000), (3, 224, 224))
    assert cost.parameters == parameters
    assert cost.macs / 1e6 == pytest.approx(macs, abs=0.005)
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert len(genotype.decisions) == 22


@pytest.mark.parametrize(
    ("genotype", "macs"), [(FBNET_A, 244.45), (FBNET_B, 291.00), (FBNET_C, 378.14)], ids=["A", "B", "C"]
)
def test_published_networks_whose_blocks_of_expansion_1_have_no_first_convolution(genotype, macs):
    space = spaces.get(genotype.space)
    shorter = dataclasses.replace(space, network=dataclasses.replace(space.network, keep_expansion=False))
    with torch.device("meta"):
        network = shorter.build(genotype, 3, 1000)
    assert count(network.to_empty(device="cpu"), (3, 224, 224)).macs / 1e6 == pytest.approx(macs, abs=0.005)


def test_fbnet_c_is_that_of_other_packages():
    expected = 5_572_200
    timm = pytest.importorskip("timm")
    cv = pytest.importorskip("pytorchcv.model_provider")
    with torch.device("meta"):
        ours = {tuple(p.shape) for p in FBNET_C.build(3, 1000).parameters()}
        for peer in (timm.create_model("fbnetc_100"), cv.get_model("fbnet_cb")):
            assert sum(p.numel() for p in peer.parameters()) == expected
            assert {tuple(p.shape) for p in peer.parameters()} == ours


def test_the_space_has_nine_blocks_where_shapes_allow():
    space = spaces.get("fbnet")
    assert [len(names) for names in space.choices().values()] == [9, *[8, 9, 9, 9] * 3, 8, 9, 9, 9, 8, 9, 9, 9, 8]
    every = fbnet_space(name="fbnet-every-skip", skip_projection=True, shape=(64, 64))
    assert every.size == 9**22
    cost = count(every.build(every.genotype(dict.fromkeys(every.choices(), "skip"))), (3, 64, 64))
    widths = (16, 24, 32, 64, 112, 184, 352)
    shrinking = sum(a * b + 2 * b for a, b in itertools.pairwise(widths))
    assert cost.parameters == 27 * 16 + 32 + shrinking + 352 * 1984 + 2 * 1984 + 1984 * 10 + 10


def test_a_grouped_block_of_expansion_one_shuffles_after_its_first_convolution():
    names = CHAIN.choices()
    assert "layer_0" in names
    space = fbnet_space([spaces.chain.Stage(16, 1, 1)], ("k5_e1_g2",), name="fbnet-one", head=None, shape=(8, 8))
    network = space.build(space.genotype({"layer_0": "k5_e1_g2"}))
    block = next(m for m in network.modules() if isinstance(m, MBConv))
    kinds = [type(m).__name__ for m in block.conv]
    assert kinds[:5] == ["Conv2d", "BatchNorm2d", "ReLU", "ChannelShuffle", "Conv2d"]
    assert [m.groups for m in block.conv if isinstance(m, nn.Conv2d)] == [2, 16, 2]
    assert isinstance(block.shortcut, nn.Identity)

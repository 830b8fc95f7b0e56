import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from netwright.compress.callbacks import FullPassClassifier, MaestroCallback
from netwright.compress.low_rank import (
    LowRankLinear,
    decompose,
    fit_maestro,
    hierarchical_group_lasso,
    low_rank_layers,
    ordered_rank_sampler,
    truncated,
)
from netwright.data import Batches, load
from netwright.metrics import accuracy
from netwright.seeding import seeded
from netwright.train import Classifier, evaluate, fit


def recovered(C, steps, truncate=True):
    """Trains U V^T on y = C x with every unit vector, and gives the errors of all prefixes."""
    with seeded(0, "init"):
        low = LowRankLinear(C.shape[1], C.shape[0], bias=False)
    x, optimiser = torch.eye(C.shape[1]), torch.optim.SGD(low.parameters(), 0.5)
    sampler = ordered_rank_sampler(low)
    for _ in range(steps):
        with truncated(low, next(sampler) if truncate else {}):
            optimiser.zero_grad()
            nn.functional.mse_loss(low(x), x @ C.T).backward()
            optimiser.step()
    left, size, right = torch.linalg.svd(C, full_matrices=False)
    errors = []
    for k in range(1, low.rank + 1):
        with low.truncate(k):
            errors.append(((low.weight - (left[:, :k] * size[:k]) @ right[:k]).norm() / C.norm()).item())
    return errors, (low.U.norm(dim=1) * low.V.norm(dim=1)).detach(), size


def test_ordered_dropout_finds_the_singular_value_decomposition():
    """The matrix of the specification, with a third of its steps and so twice its tolerance."""
    generator = torch.Generator().manual_seed(123)
    C = torch.randn(9, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    errors, terms, size = recovered(C, 2000)
    assert size[:3].tolist() == pytest.approx([9.546, 6.924, 3.665], abs=1e-3)
    assert max(errors) < 0.01
    assert torch.allclose(terms[:3], size[:3], rtol=0.02)
    assert terms[3:].max() < 0.1
    without, _, _ = recovered(C, 1000, truncate=False)
    assert without[0] > 0.1


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    train = Batches(data.train, 32, normalise=data.normalise())
    test = Batches(data.test, 500, shuffle=False, drop_last=False, normalise=data.normalise())
    return train, test


def network():
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 48),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Linear(48, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


@pytest.mark.parametrize("full_pass", [False, True])
def test_ranks_shrink_and_the_network_works(digits, full_pass):
    train, test = digits
    low = decompose(network())
    history = fit_maestro(low, train, lam=3e-3, eps=1e-2, full_pass=full_pass, epochs=4)
    ranks = history.column("ranks")
    assert ranks[-1] < ranks[0]
    assert ranks[-1] == sum(layer.rank for layer in low_rank_layers(low).values())
    assert accuracy(*evaluate(low, test)) > 0.85
    assert all(layer.used == layer.rank for layer in low_rank_layers(low).values())


def test_more_penalty_is_less_rank(digits):
    train, _ = digits
    found = []
    for lam in (1e-4, 3e-3):
        low = decompose(network())
        fit_maestro(low, train, lam=lam, eps=1e-2, epochs=3)
        found.append(sum(layer.rank for layer in low_rank_layers(low).values()))
    assert found[1] < found[0]


def test_a_step_is_the_algorithm(digits):
    """One step of the callback against the loss written out, penalty and truncation included."""
    train, _ = digits
    lam, seed = 1e-2, 3
    one = Batches(train.dataset, 32, normalise=train.normalise, steps=1)
    for kind in (Classifier, FullPassClassifier):
        low, by_hand = decompose(network()), decompose(network())
        fit(
            kind(low, weight_decay=0.0, clip=None),
            one,
            epochs=1,
            callbacks=[MaestroCallback(lam, 0.0, seed=seed)],
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )
        one.set_epoch(0)  # batch norms were measured on the next
        x, y = next(iter(one))
        callback = MaestroCallback(lam, seed=seed)

        class Epoch:
            current_epoch = 0

        callback.on_train_epoch_start(Epoch, by_hand)
        ranks = next(callback._sampler)
        with truncated(by_hand, ranks):
            loss = nn.functional.cross_entropy(by_hand(x), y)
        if kind is FullPassClassifier:
            whole = by_hand(x)
            with truncated(by_hand, ranks):
                taught = nn.functional.cross_entropy(by_hand(x), whole.detach().softmax(1))
            loss = nn.functional.cross_entropy(whole, y) + taught
        (loss + lam * hierarchical_group_lasso(by_hand)).backward()
        for a, b in zip(low.parameters(), by_hand.parameters(), strict=True):
            assert torch.allclose(a, b - 0.1 * b.grad, atol=1e-6)


def test_batch_norms_are_those_of_the_whole_network(digits):
    train, _ = digits
    low = decompose(network())
    fit_maestro(low, train, lam=0.0, epochs=1, calibration_batches=None)
    batches = [x for x, _ in train]
    expected = torch.stack([low[1](x.flatten(1)).mean(0) for x in batches]).mean(0)
    assert torch.allclose(low[2].running_mean, expected, atol=1e-4)


class Still(lightning.LightningModule):
    """A user's module whose loss has no gradient, so that only the penalty moves it."""

    def __init__(self, norm: bool = False, manual: bool = False):
        super().__init__()
        with seeded(0, "init"):
            middle = [nn.BatchNorm1d(8)] if norm else []
            self.net = decompose(nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3)))
        self.automatic_optimization, self.manual = not manual, manual

    def training_step(self, batch, batch_idx):
        loss = 0.0 * self.net(batch[0]).square().mean()
        if self.manual:
            first, second = self.optimizers()
            for _ in range(2):
                self.manual_backward(0.0 * self.net(batch[0]).square().mean())
            first.step()
            if batch_idx == 0:
                second.step()
        return loss

    def configure_optimizers(self):
        if self.manual:
            return torch.optim.SGD(self.net[0].parameters(), 1.0), torch.optim.SGD(self.net[-1].parameters(), 1.0)
        return torch.optim.SGD(self.parameters(), 1.0)


class Called(Still):
    """One that is called with inputs."""

    def forward(self, x):
        return self.net(x)


def trained(module, *callbacks, batch=16, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=generator), torch.arange(16) % 3
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=batch))
    return module, x


def gradient_step(module, lam):
    """What one step of rate 1 by the penalty alone leaves."""
    (lam * hierarchical_group_lasso(module)).backward()
    return {name: p - p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_the_penalty_comes_once_a_step_however_many_batches_are_accumulated(accumulated):
    module, _ = trained(
        Still(), MaestroCallback(1e-2, 0.0), batch=16 // accumulated, accumulate_grad_batches=accumulated
    )
    expected = gradient_step(Still(), 1e-2)
    assert len(expected) == 4
    for name, value in expected.items():
        assert torch.allclose(module.get_parameter(name), value, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_each_optimiser_gets_the_penalty_of_its_own_factors():
    """Two backward passes, no zero_grad in between, and the second optimiser takes one step of two."""
    module, _ = trained(Still(manual=True), MaestroCallback(1e-2, 0.0), batch=8)
    start = Still(manual=True)
    expected = gradient_step(start, 1e-2)
    for name, value in expected.items():
        change = float((module.get_parameter(name) - start.get_parameter(name)).detach().norm())
        once = float((value - start.get_parameter(name)).detach().norm())
        assert change == pytest.approx(once, rel=1e-3) if "net.2" in name else change > 1.5 * once, name


@pytest.mark.filterwarnings("ignore")
def test_the_scale_of_mixed_precision_is_minded():
    callback, low = MaestroCallback(1e-2), Still()
    expected = gradient_step(Still(), 1e-2)

    class Scaler:
        def get_scale(self):
            return 1024.0

    class Trainer:
        class precision_plugin:
            scaler = Scaler()

    optimizer = low.configure_optimizers()
    for scale in (1.0, 1024.0):
        optimizer.zero_grad()
        optimizer._step_supports_amp_scaling = scale > 1
        callback.on_before_optimizer_step(Trainer, low, optimizer)
        for name, value in expected.items():
            p = low.get_parameter(name)
            assert torch.allclose(p.grad / scale, p - value, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_batch_norms_are_measured_on_the_training_batches_by_default(capsys):
    module, x = trained(Called(norm=True), MaestroCallback(0.0, 0.0))
    with torch.no_grad():
        assert torch.allclose(module.net[1].running_mean, module.net[0](x).mean(0), atol=1e-5)
    assert "statistics of truncated passes" not in capsys.readouterr().err
    trained(Still(norm=True), MaestroCallback(0.0, 0.0))
    assert "Still has no forward that takes inputs" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_measuring_changes_no_chance():
    drawn = []

    class Draw(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            drawn.append(torch.rand(1).item())

    for norm in (True, False):
        module = Called(norm)
        with seeded(1, "training"):
            trained(module, MaestroCallback(0.0, 0.0), Draw())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: MaestroCallback(-1.0), "lam must be >= 0, got -1.0"),
        (lambda: MaestroCallback(0.1, -1.0), "eps must be >= 0"),
        (lambda: fit_maestro(network(), Batches(load("digits").train, 32), lam=0.0, epochs=1), "decompose it first"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()

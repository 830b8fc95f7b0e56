"""Training on a whole graph: which epoch is kept, when it stops, what is learned from."""

from __future__ import annotations

import dataclasses
import functools

import lightning
import pytest
import torch
from torch import nn

from netwright.data.graphs import FullBatch, Graph, digits_graph, per_class_split
from netwright.nn.dagnn import DAGNN, adjacency
from netwright.train.dagnn import NodeClassifier, fit_node_classifier, node_accuracy


@pytest.fixture(scope="module")
def digits() -> Graph:
    graph = digits_graph()
    return graph.split(per_class_split(graph.y, generator=torch.Generator().manual_seed(0)))


def network(K=3):
    torch.manual_seed(0)
    return DAGNN(64, 10, hidden=16, K=K, dropout=0.2)


def test_it_goes_back_to_the_epoch_of_the_lowest_validation_loss(digits):
    # With wrong labels there the validation loss rises as the network learns.
    graph = dataclasses.replace(digits, y=torch.where(digits.val_mask, (digits.y + 1) % 10, digits.y))
    model = network()
    history = fit_node_classifier(model, graph, epochs=10, lr=0.05, weight_decay=0.0, patience=1000)
    losses = history.column("val_loss")
    with torch.no_grad():
        logits = model.eval()(graph.x, graph.edge_index)[graph.val_mask]
    found = float(nn.functional.cross_entropy(logits, graph.y[graph.val_mask]))
    assert found == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < losses[-1]


def test_it_learns(digits):
    model = network()
    fit_node_classifier(model, digits, epochs=30, lr=0.05, weight_decay=0.0)
    assert node_accuracy(model, digits, digits.test_mask) > 0.85


def test_test_labels_and_validation_labels_are_not_trained_on(digits):
    def trained(graph, epochs):
        model = network()
        fit_node_classifier(model, graph, epochs=epochs, patience=1000)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def wrong(mask):
        return dataclasses.replace(digits, y=torch.where(mask, (digits.y + 1) % 10, digits.y))

    assert torch.equal(trained(digits, 3), trained(wrong(digits.test_mask), 3))
    # Validation chooses among epochs, so there is one alone.
    assert torch.equal(trained(digits, 1), trained(wrong(digits.val_mask), 1))
    assert not torch.equal(trained(digits, 1), trained(wrong(digits.train_mask), 1))


class Module(NodeClassifier):
    """With given validation losses in place of measured ones."""

    def __init__(self, losses, epochs, patience):
        super().__init__(nn.Linear(1, 1), patience=patience)

        class Trainer:
            max_epochs = epochs
            should_stop = False

        self._given, self._fake = losses, Trainer()

    @property
    def trainer(self):
        return self._fake

    def run(self):
        for epoch, loss in enumerate(self._given):
            self.note_epoch(loss, 0.0)
            if self.trainer.should_stop:
                return epoch + 1
        return None


@pytest.mark.parametrize(
    ("losses", "patience", "stopped"),
    [
        ([1, 2, 3, 4, 5, 6], 2, 4),  # it would have stopped at once, but for the first half
        ([6, 5, 4, 3, 2, 1], 2, None),
        ([6, 5, 4, 3, 3.2, 3.4], 2, 6),  # 3.2 is below the mean of 4 and 3, 3.4 above that of 3 and 3.2
        ([6, 5, 4, 3, 3.2, 3.4], 5, None),
        ([3, 3, 3, 3, 3, 3], 2, None),  # it must exceed
    ],
)
def test_when_training_stops(losses, patience, stopped):
    module = Module(losses, 6, patience)
    assert module.run() == stopped
    assert module.best["val_loss"] == min(losses[: stopped or 6])


def test_only_epochs_of_training_are_noted(digits):
    module, loader = NodeClassifier(network(), patience=1000), FullBatch(digits)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=3, enable_checkpointing=False, num_sanity_val_steps=1, **options)
    trainer.fit(module, loader, loader)
    best = dict(module.best)
    (found,) = trainer.validate(module, loader, verbose=False)
    assert len(module._losses) == 3
    assert module.best == best
    assert found["val_loss"] == pytest.approx(best["val_loss"])


def test_the_penalty_is_coupled_and_on_every_parameter(digits):
    model = network(K=1)
    (group,) = NodeClassifier(model, weight_decay=0.3).configure_optimizers().param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["weight_decay"], group["lr"]) == (0.3, 0.01)


def test_a_stopped_training_goes_on_from_its_checkpoint(digits, tmp_path):
    whole, halves = network(), network()
    fit_node_classifier(whole, digits, epochs=6, patience=1000)
    file = tmp_path / "last.ckpt"
    fit_node_classifier(halves, digits, epochs=3, patience=1000, checkpoint=file)
    halves = network()
    fit_node_classifier(halves, digits, epochs=6, patience=1000, checkpoint=file)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


class Elsewhere(Graph):
    """A graph that is copied wherever it is moved to, as to an accelerator."""

    def to(self, device):
        own = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device, copy=True) for name, value in own.items()})


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_graph_is_moved_and_normalised_once(digits, sanity, monkeypatch):
    calls = []
    real = adjacency.gcn_norm
    monkeypatch.setattr(adjacency, "gcn_norm", lambda *args, **options: calls.append(1) or real(*args, **options))
    graph = FullBatch(Elsewhere(**vars(digits)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "num_sanity_val_steps": sanity}
    lightning.Trainer(max_epochs=4, **options).fit(NodeClassifier(network()), graph, graph)
    assert len(calls) == 1


def test_a_graph_that_was_changed_is_moved_again(digits):
    module, graph, device = NodeClassifier(network()), dataclasses.replace(digits, x=digits.x.clone()), "meta"
    move = functools.partial(module.transfer_batch_to_device, device=torch.device(device), dataloader_idx=0)
    first = move(graph)
    assert first.x.is_meta
    assert move(graph) is first
    graph.x.mul_(2)
    changed = move(graph)
    assert changed is not first
    assert move(dataclasses.replace(graph)) is not changed
    assert not module.transfer_batch_to_device(graph, torch.device("cpu"), 0).x.is_meta
    module.teardown("fit")
    assert module._moved is None


def test_a_training_that_stopped_early_has_stopped_for_good(digits, tmp_path):
    # With wrong labels there the validation loss rises as the network learns.
    graph = dataclasses.replace(digits, y=torch.where(digits.val_mask, (digits.y + 1) % 10, digits.y))
    options = {"lr": 0.05, "weight_decay": 0.0, "patience": 2}

    def trained(epochs, name):
        model = network()
        history = fit_node_classifier(model, graph, epochs=epochs, checkpoint=tmp_path / name, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), history.column("val_loss")

    first, again = trained(12, "last.ckpt"), trained(12, "last.ckpt")
    assert 6 < len(first[1]) < 12
    assert again[1] == first[1]
    assert torch.equal(again[0], first[0])
    # In a longer training it would not have stopped there.
    longer, whole = trained(24, "last.ckpt"), trained(24, "whole.ckpt")
    assert len(longer[1]) > 12
    assert longer[1] == whole[1]
    assert torch.equal(longer[0], whole[0])


def test_a_graph_of_torch_geometric_will_do(digits):
    data = pytest.importorskip("torch_geometric.data")
    names = ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask")
    theirs = data.Data(**{name: getattr(digits, name) for name in names})
    ours, other = network(), network()
    fit_node_classifier(ours, digits, epochs=2)
    fit_node_classifier(other, theirs, epochs=2)
    assert node_accuracy(ours, digits, digits.test_mask) == node_accuracy(other, theirs, theirs.test_mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
    ],
)
def test_refusals(digits, options, message):
    with pytest.raises(ValueError, match=message):
        fit_node_classifier(network(), digits, **options)


def test_a_graph_without_a_split_is_refused(digits):
    with pytest.raises(ValueError, match="graph must have nodes in train_mask, got no such mask"):
        fit_node_classifier(network(), digits_graph())
    with pytest.raises(ValueError, match="graph must have nodes in val_mask, got none"):
        fit_node_classifier(network(), dataclasses.replace(digits, val_mask=torch.zeros(1797, dtype=torch.bool)))
    with pytest.raises(ValueError, match="mask must have at least 1 node"):
        node_accuracy(network(), digits, torch.zeros(1797, dtype=torch.bool))

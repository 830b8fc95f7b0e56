"""Training on a whole graph: the labels of some nodes, those of others choose the epoch.

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296: Adam, its own L2 penalty on all
parameters, the weights of the epoch with the lowest validation loss. Training stops in the second half of the epochs
when the validation loss exceeds the mean of those of the last ``patience`` epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.data.graphs import FullBatch
from netwright.nn.dagnn.adjacency import identity, same_identity
from netwright.nn.modes import in_mode
from netwright.results import History
from netwright.train.fitting import fit

FIELDS = ("x", "edge_index", "edge_weight", "y", "train_mask", "val_mask")


class NodeClassifier(lightning.LightningModule):
    """Trains a network on the nodes of one graph, and has the weights of the best epoch in the end.

    A batch is a graph: an object with ``x``, ``edge_index``, ``y``, ``train_mask`` and ``val_mask``, and
    ``edge_weight`` where there is one, such as ``netwright.data.graphs.Graph`` or torch_geometric's ``Data``.

    Args:
        network: Maps (x, edge_index, edge_weight) to logits (nodes, classes).
        lr: Learning rate of Adam, > 0.
        weight_decay: L2 penalty on all parameters, >= 0.
        patience: Epochs whose mean validation loss is to be beaten, at least 1.

    Raises:
        ValueError: If an argument is out of its range.

    Attributes:
        best: ``val_loss``, ``val_accuracy`` and ``epoch`` (from 0) of the epoch with the lowest validation loss.
    """

    def __init__(self, network: nn.Module, *, lr: float = 0.01, weight_decay: float = 5e-3, patience: int = 100):
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        if patience < 1:
            raise ValueError(f"patience must be >= 1, got {patience}")
        self.network, self.lr, self.weight_decay, self.patience = network, lr, weight_decay, patience
        self.best: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._moved: tuple[Any, tuple[Any, ...], Any] | None = None  # a graph, what it was then, and its copy elsewhere

    def forward(self, graph: Any) -> Float[Tensor, "nodes classes"]:
        """Logits of all nodes."""
        return self.network(graph.x, graph.edge_index, getattr(graph, "edge_weight", None))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a graph that stays as it is once, so that what is remembered of its tensors holds in all epochs."""
        fields = (getattr(batch, name, None) for name in FIELDS)
        state = (device, *(part for field in fields if isinstance(field, Tensor) for part in identity(field)))
        if self._moved is None or self._moved[0] is not batch or not same_identity(self._moved[1], state):
            # What is made in inference mode could not take part in training later.
            with torch.inference_mode(False):
                self._moved = batch, state, super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self._moved[2]

    def teardown(self, stage: str) -> None:
        """Forgets the graph."""
        self._moved = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of the training nodes."""
        loss = F.cross_entropy(self(batch)[batch.train_mask], batch.y[batch.train_mask])
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracy of the validation nodes, after the step of the epoch."""
        logits, labels = self(batch)[batch.val_mask], batch.y[batch.val_mask]
        loss, accuracy = F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()
        self.log("val_loss", loss, batch_size=1)
        self.log("val_accuracy", accuracy, batch_size=1)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.note_epoch(float(loss), float(accuracy))

    def note_epoch(self, loss: float, accuracy: float) -> None:
        """Keeps the weights of an epoch that is the best so far, and asks the Trainer to stop where it should."""
        epoch = len(self._losses)
        if not self.best or loss < self.best["val_loss"]:
            self.best = {"val_loss": loss, "val_accuracy": accuracy, "epoch": epoch}
            self._weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self._losses.append(loss)
        self._stop_where_due()

    def _stop_where_due(self) -> None:
        *recent, loss = self._losses[-self.patience - 1 :]
        late = len(self._losses) > int(self.trainer.max_epochs or 0) // 2
        if late and recent and loss > sum(recent) / len(recent):
            self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        """Stops at once where a training that is taken up again had stopped."""
        if self.trainer.ckpt_path is not None and self._losses:
            self._stop_where_due()

    def on_fit_end(self) -> None:
        """Goes back to the weights of the best epoch."""
        if self._weights:
            self.network.load_state_dict(self._weights)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the best epoch so far."""
        checkpoint["best"] = {"figures": dict(self.best), "weights": self._weights, "losses": list(self._losses)}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the best epoch so far from a checkpoint."""
        kept = copy.deepcopy(checkpoint["best"])
        self.best, self._weights, self._losses = kept["figures"], kept["weights"], kept["losses"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with coupled L2 on every parameter."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=self.lr, weight_decay=self.weight_decay)


def fit_node_classifier(
    network: nn.Module,
    graph: Any,
    *,
    epochs: int = 1000,
    lr: float = 0.01,
    weight_decay: float = 5e-3,
    patience: int = 100,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains a network in place on the training nodes of a graph; it has the weights of the best epoch afterwards.

    Args:
        network: Maps (x, edge_index, edge_weight) to logits.
        graph: With ``train_mask`` and ``val_mask``, as for :class:`NodeClassifier`.
        epochs: Steps at most, at least 1.
        lr: Learning rate of Adam, > 0.
        weight_decay: L2 penalty on all parameters, >= 0.
        patience: As for :class:`NodeClassifier`.
        seed: Of dropout.
        checkpoint: As for :func:`netwright.train.fit`.

    Returns:
        What each epoch recorded.

    Raises:
        ValueError: If an argument is out of its range, or the graph has no split, or an empty one.

    Example:
        >>> from netwright.data.graphs import digits_graph, per_class_split
        >>> from netwright.nn.dagnn import DAGNN
        >>> graph = digits_graph()
        >>> graph = graph.split(per_class_split(graph.y))
        >>> history = fit_node_classifier(DAGNN(64, 10, K=2), graph, epochs=3)
        >>> len(history.epochs), sorted(history.last)[-2:]
        (3, ['val_accuracy', 'val_loss'])
    """
    for name in ("train_mask", "val_mask"):
        mask = getattr(graph, name, None)
        if mask is None or not bool(mask.any()):
            raise ValueError(f"graph must have nodes in {name}, got {'none' if mask is not None else 'no such mask'}")
    module = NodeClassifier(network, lr=lr, weight_decay=weight_decay, patience=patience)
    batch = FullBatch(graph)
    with in_mode(network, training=True):
        return fit(
            module, batch, epochs=epochs, validation=batch, seed=seed, checkpoint=checkpoint, description="graph"
        )


def node_accuracy(network: nn.Module, graph: Any, mask: Bool[Tensor, " nodes"]) -> float:
    """Share of nodes of a part that are classified as their label says.

    Args:
        network: As for :class:`NodeClassifier`; in evaluation mode meanwhile.
        graph: It.
        mask: The part, at least one node.

    Raises:
        ValueError: If the part is empty.
    """
    if not bool(mask.any()):
        raise ValueError("mask must have at least 1 node, got 0")
    with in_mode(network, training=False), torch.no_grad():
        logits = network(graph.x, graph.edge_index, getattr(graph, "edge_weight", None))
    return float((logits.argmax(1) == graph.y)[mask].float().mean())

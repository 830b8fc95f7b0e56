"""ELR+ as a module of its own: two networks that are made by one function and teach each other.

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
NeurIPS 2020, arXiv:2007.00151. The method is that of :class:`netwright.train.callbacks.ELRPlusCallback`, which a module
of one's own takes instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from netwright.nn.ensemble import LogitMean
from netwright.train.callbacks.early_learning_plus import ELRPlusCallback
from netwright.train.classifier import Classifier
from netwright.train.weight_compander import scale_rates_


class ELRPlus(Classifier):
    """Trains two networks of one kind with ELR+; predicts with the mean of their logits.

    Batches must be (x, labels, indices). Epochs 0, 2, ... train the first network, epochs 1, 3, ... the second: give
    twice as many epochs as one network needs. In training mode ``self(x)`` is the network whose turn it is, in
    evaluation mode both. ``state_dict`` holds both networks and what they remember.

    Args:
        model_fn: Makes a network with fresh weights that gives logits; called twice.
        num_examples: Examples of the training set.
        num_classes: At least 2; what the networks give is checked against it.
        lam: Weight of the regulariser, >= 0.
        beta: Share of an average that a step keeps, in [0, 1).
        mixup_alpha: Parameter of the mixing weight's Beta distribution; 0 mixes nothing.
        ema_decay: Largest share of the averaged weights that an update keeps.
        ema_ramp: Updates until it is reached; by default 40,000, or half of a network's in a shorter run.
        coef_ramp: Updates until ``lam`` is reached.
        relabel: Whether targets are multiplied with the averages and normalised; for 100 classes and more.
        optimizer_fn: Makes the optimiser from the parameters; None is SGD at 0.02 with momentum 0.9 and decay 5e-4.
        seed: Of mixing.

    Attributes:
        method: The callback that does it, with averages of weights and of predictions.

    Raises:
        ValueError: If a number is out of its range; in training if the networks give another number of classes.

    Example:
        >>> from netwright.data.tensors import Batches, TensorImages
        >>> from netwright.train import fit
        >>> images = TensorImages(torch.randint(0, 256, (32, 1, 4, 4), dtype=torch.uint8), torch.arange(32) % 2)
        >>> module = ELRPlus(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 32, 2)
        >>> _ = fit(module, Batches(images, 8, indexed=True), epochs=2)
        >>> x = torch.rand(3, 1, 4, 4)
        >>> torch.allclose(module.eval()(x), module.pair()(x))
        True
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        num_examples: int,
        num_classes: int,
        lam: float = 3.0,
        beta: float = 0.7,
        mixup_alpha: float = 1.0,
        ema_decay: float = 0.997,
        ema_ramp: int | None = None,
        coef_ramp: int = 0,
        relabel: bool = False,
        optimizer_fn: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        seed: int = 0,
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        super().__init__(model_fn(), lr=0.02, weight_decay=5e-4, clip=None)
        self.num_classes, self.optimizer_fn = num_classes, optimizer_fn
        self.method = ELRPlusCallback(
            lam, beta, mixup_alpha, ema_decay, ema_ramp, coef_ramp, relabel, seed=seed, logits="network",
            num_examples=num_examples,
        )  # fmt: skip
        partner = model_fn()
        tensors = {**dict(partner.named_parameters()), **dict(partner.named_buffers())}
        self.method.other = {f"network.{name}": value.detach().clone() for name, value in tensors.items()}

    def configure_callbacks(self) -> list[lightning.Callback]:
        """The method."""
        return [self.method]

    def get_extra_state(self) -> dict[str, Any]:
        """The second network, whose turn it is, averages of weights and of predictions."""
        return {name: value for name, value in self.method.state_dict().items() if name != "optimizers"}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`get_extra_state` gave; optimisers begin anew unless the Trainer has their states."""
        other = {name: value.clone() for name, value in state["other"].items()}
        self.method.load_state_dict({**state, "other": other, "optimizers": []})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Finds the second network in checkpoints that have it in the callback's state alone, as earlier ones do."""
        kept = checkpoint.get("callbacks", {}).get(self.method.state_key)
        if kept is not None:
            checkpoint["state_dict"].setdefault("_extra_state", kept)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits: of the network whose turn it is when training, the mean over both otherwise."""
        own = self.network(x)
        if own.ndim != 2 or own.shape[1] != self.num_classes:
            raise ValueError(f"model_fn must make networks of {self.num_classes} classes, got {tuple(own.shape)}")
        if self.training:
            return own
        partner = {name.removeprefix("network."): value.to(x.device) for name, value in self.method.other.items()}
        return (own + functional_call(self.network, partner, (x,))) / 2

    def pair(self) -> LogitMean:
        """Both networks as one plain module, for whatever comes after training."""
        return self.method.pair(self, self.network)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of ``optimizer_fn``, or SGD with plain momentum and decay on every parameter."""
        trained = [param for param in self.parameters() if param.requires_grad]
        if self.optimizer_fn is not None:
            return self.optimizer_fn(trained)
        # In the groups that a Classifier has, so that checkpoints of before go on, with the settings they hold.
        groups = [[param for param in trained if param.ndim >= 2], [param for param in trained if param.ndim < 2]]
        optimizer = torch.optim.SGD(
            [{"params": group} for group in groups if group],
            lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip
        scale_rates_(optimizer, self)
        return optimizer

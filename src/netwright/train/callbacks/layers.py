"""Callbacks of the methods that change layers: TrAct (arXiv:2410.23970) and Weight Compander (arXiv:2306.16993)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning
import torch
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.console import nearest
from netwright.train.groups import separate_
from netwright.train.tract import apply_tract, check_lambda, first_layer, traced
from netwright.train.weight_compander import (
    Start,
    add_effective_decay_,
    apply_weight_compander,
    check_settings,
    companded,
    companders,
    latents,
    scale_rates_,
)

DecayOn = Literal["latent", "effective"]
_NETWORK = "network."  # where a Classifier holds its network


def _as_name(argument: str, name: object) -> str:
    """The name of a layer; whole numbers are names too, in ``nn.Sequential``."""
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if not isinstance(name, str):
        raise ValueError(f"{argument} must be the name of a layer, in quotes if it looks like a number, got {name!r}")
    return name


def _as_names(argument: str, names: object) -> tuple[str, ...]:
    """Names of layers; in one text they are separated by spaces."""
    several = names.split() if isinstance(names, str) else names if isinstance(names, Sequence) else [names]
    return tuple(_as_name(argument, name) for name in several)


def _called(module: nn.Module, argument: str, name: str) -> str:
    """What the module calls the layer that it, or a network within it, calls ``name``."""
    names = dict(module.named_modules())
    for found in (name, _NETWORK + name, name.removeprefix(_NETWORK)):
        if found in names:
            return found
    known = [known.removeprefix(_NETWORK) for known in names if known]
    raise ValueError(f"{argument} must name layers of the network, got {name!r}: {nearest(name, known)}")


class TrActCallback(lightning.Callback):
    """Gives the first layer the gradient of TrAct, as if its pre-activations were what is trained.

    See :func:`netwright.train.tract.apply_tract`, which is called before training. A module that has such a layer
    already stays as it is. ``example_input_array`` of the module, where it is a tensor, tells which layer is computed
    first; else the order of definition does.

    Args:
        lambda_: Strength of the ridge, > 0.
        layer: Name of the layer, as ``named_modules`` of the LightningModule gives it, or of its ``network``.
        sync_gram: Whether ranks solve with the Gram matrix of the whole batch.

    Raises:
        ValueError: If an argument is out of its range; at the start of training if there is no such layer.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[TrActCallback()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(self, lambda_: float = 0.1, layer: str | None = None, sync_gram: bool = False):
        self.lambda_ = check_lambda(lambda_)
        self.layer = None if layer is None else _as_name("layer", layer)
        if not isinstance(sync_gram, bool):
            raise ValueError(f"sync_gram must be true or false, got {sync_gram!r}")
        self.sync_gram = sync_gram

    def check_network(self, network: nn.Module, example: Tensor | None = None) -> None:
        """Makes sure that the method suits a network, which stays as it is.

        Args:
            network: That is to be trained, by itself or in a LightningModule.
            example: A batch, to find the layer that is computed first.

        Raises:
            ValueError, TypeError, NotImplementedError: As for :func:`netwright.train.tract.apply_tract`.
        """
        if not traced(network):
            first_layer(network, self._name(network), example)

    def _name(self, module: nn.Module) -> str | None:
        return None if self.layer is None else _called(module, "layer", self.layer)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Changes the layer."""
        if stage == "fit" and not traced(pl_module):
            example = pl_module.example_input_array
            found = example if isinstance(example, Tensor) else None
            name = self._name(pl_module)
            apply_tract(pl_module, self.lambda_, name, example_input=found, sync_gram=self.sync_gram)


class WeightCompanderCallback(lightning.Callback):
    """Trains every linear and convolution layer through a compander.

    See :func:`netwright.train.weight_compander.apply_weight_compander`. After training
    :func:`~netwright.train.weight_compander.remove_weight_compander` bakes the weights in. A module that is companded
    already stays as it is. What is learned of the function has a parameter group of its own in each optimiser, with
    ``lr_scale`` times the learning rate; schedulers go on with it.

    Args:
        a: Height, > 0; None is 1.2 b.
        b: Width, > 0; None is twice the standard deviation of each layer's weights.
        learnable: Whether each layer learns its own two.
        init: ``"latent"``, or ``"match"`` for a trained network.
        function: As for ``WeightCompander``.
        exclude: Names of layers to leave alone, as ``named_modules`` of the LightningModule gives them, or of its
            ``network``; in one text they are separated by spaces.
        lr_scale: As for ``WeightCompander``.
        decay_on: ``"latent"`` leaves weight decay to the optimiser, which sees the latent weights; ``"effective"``
            takes what it would do to them, lambda / 2 * sum v^2, to the effective weights, lambda / 2 * sum w^2.
        effective_decay: Lambda of the penalty on the effective weights, >= 0; None takes the optimiser's weight decay.
            A number above 0 asks for ``decay_on="effective"``.

    Raises:
        ValueError: If an argument is out of its range; at the start of training if a layer is unknown, or as for
            ``apply_weight_compander``.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[WeightCompanderCallback()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        a: float | None = None,
        b: float | None = None,
        learnable: bool = False,
        init: Start = "latent",
        function: str = "arctan",
        exclude: str | Sequence[str] = (),
        lr_scale: float = 0.01,
        decay_on: DecayOn | None = None,
        effective_decay: float | None = None,
    ):
        check_settings(a, b, learnable, init, function, lr_scale)
        if effective_decay is not None and not 0 <= effective_decay < float("inf"):
            raise ValueError(f"effective_decay must be >= 0 and finite, got {effective_decay}")
        if decay_on is None:
            decay_on = "effective" if effective_decay else "latent"
        one_of("decay_on", decay_on, get_args(DecayOn))
        if decay_on == "latent" and effective_decay:
            raise ValueError(f"effective_decay must be 0 when decay_on is 'latent', got {effective_decay}")
        self.a, self.b, self.learnable, self.init, self.function = a, b, learnable, init, function
        self.exclude = _as_names("exclude", exclude)
        self.lr_scale, self.decay_on, self.effective_decay = lr_scale, decay_on, effective_decay
        self._decays: dict[int, float] = {}  # of the effective weights, by the id of the latent ones

    def _settings(self, module: nn.Module) -> dict[str, Any]:
        """What the companders of a module are made with, besides their size."""
        exclude = [_called(module, "exclude", name) for name in self.exclude]
        return {
            "learnable": self.learnable, "function": self.function, "exclude": exclude, "lr_scale": self.lr_scale,
        }  # fmt: skip

    def check_network(self, network: nn.Module, example: Tensor | None = None) -> None:
        """Makes sure that the method suits a network, which stays as it is.

        Args:
            network: That is to be trained, by itself or in a LightningModule.
            example: Not looked at.

        Raises:
            ValueError, TypeError: As for :func:`netwright.train.weight_compander.apply_weight_compander`.
        """
        if not companded(network):
            companders(network, self.a, self.b, **self._settings(network))

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Places the companders."""
        if stage == "fit" and not companded(pl_module):
            apply_weight_compander(pl_module, self.a, self.b, init=self.init, **self._settings(pl_module))

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gives the optimisers' groups of their own to what they train otherwise than the rest."""
        for optimizer in trainer.optimizers:
            made = [config.scheduler for config in trainer.lr_scheduler_configs]
            schedulers = [scheduler for scheduler in made if getattr(scheduler, "optimizer", None) is optimizer]
            scale_rates_(optimizer, pl_module, schedulers)
            if self.decay_on == "effective":
                self._take_decay(optimizer, [latent for latent, _ in latents(pl_module)], schedulers)

    def _take_decay(
        self, optimizer: torch.optim.Optimizer, hidden: Sequence[Tensor], schedulers: Sequence[Any]
    ) -> None:
        """The optimiser no longer decays the latent weights; what it would have done is kept."""
        wanted = {id(latent) for latent in hidden}
        for group in optimizer.param_groups:
            usual = float(group.get("weight_decay") or 0.0)
            decay = usual if self.effective_decay is None else self.effective_decay
            self._decays |= {id(param): decay for param in group["params"] if id(param) in wanted}
        decayed = [group for group in optimizer.param_groups if group.get("weight_decay")]
        inside = [param for group in decayed for param in group["params"] if id(param) in wanted]
        separate_(optimizer, inside, schedulers=schedulers, weight_decay=0.0)

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Adds the gradient of the penalty, before clipping."""
        if not self._decays:
            return
        own = {id(param) for group in optimizer.param_groups for param in group["params"]}
        strengths: dict[float, set[int]] = {}
        for number in own & self._decays.keys():
            strengths.setdefault(self._decays[number], set()).add(number)
        for strength, chosen in strengths.items():
            if strength:
                add_effective_decay_(pl_module, strength, only=chosen)

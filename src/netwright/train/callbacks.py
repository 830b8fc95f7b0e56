"""The training methods as Lightning callbacks, for any ``LightningModule``; several of them compose in one Trainer.

Each attaches where an ordinary module leaves room for it, so that module, optimisers and loss stay the user's:

- ``TrActCallback`` and ``WeightCompanderCallback`` change layers in ``setup``, before the checkpoint is read, the
  optimisers are made and the module is wrapped for several processes. TrAct comes first in the list.
- ``GradientNoiseCallback`` acts at each optimiser's step, after gradients were reduced, unscaled and clipped.
- ``PSKDCallback`` stands around ``training_step``: it changes the labels that the step sees and keeps the logits.

What a method must remember is in the checkpoint. In a loop of one's own the functions of each method's module do the
same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from netwright.console import warn
from netwright.nn.modes import in_mode
from netwright.seeding import derive
from netwright.train.gradient_noise import GradientNoise, Order, attach, check_order, noise_variance
from netwright.train.self_distillation import PSKDTargets, gather_rows, one_hot, pskd_alpha
from netwright.train.tract import apply_tract, traced
from netwright.train.weight_compander import (
    Start,
    add_effective_decay_,
    apply_weight_compander,
    companded,
    latents,
)


class TrActCallback(lightning.Callback):
    """Gives the first layer the gradient of TrAct, as if its pre-activations were what is trained.

    See :func:`netwright.train.tract.apply_tract`, which is called before training. A module that has such a layer
    already stays as it is. ``example_input_array`` of the module, where it is a tensor, tells which layer is computed
    first; else the order of definition does.

    Args:
        lambda_: Strength of the ridge, > 0.
        layer: Name of the layer, as the LightningModule's ``named_modules`` gives it.
        sync_gram: Whether ranks solve with the Gram matrix of the whole batch.

    Raises:
        ValueError: If ``lambda_`` is not positive; at the start of training if there is no such layer.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[TrActCallback()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(self, lambda_: float = 0.1, layer: str | None = None, sync_gram: bool = False):
        if not 0 < lambda_ < float("inf"):
            raise ValueError(f"lambda_ must be > 0 and finite, got {lambda_}")
        self.lambda_, self.layer, self.sync_gram = lambda_, layer, sync_gram

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Changes the layer."""
        if stage == "fit" and not traced(pl_module):
            example = pl_module.example_input_array
            found = example if isinstance(example, Tensor) else None
            apply_tract(pl_module, self.lambda_, self.layer, example_input=found, sync_gram=self.sync_gram)


class WeightCompanderCallback(lightning.Callback):
    """Trains every linear and convolution layer through a compander.

    See :func:`netwright.train.weight_compander.apply_weight_compander`. After training
    :func:`~netwright.train.weight_compander.remove_weight_compander` bakes the weights in. A module that is companded
    already stays as it is.

    Args:
        a: Height, > 0; None is 1.2 b.
        b: Width, > 0; None is twice the standard deviation of each layer's weights.
        learnable: Whether each layer learns its own two.
        init: ``"latent"``, or ``"match"`` for a trained network.
        function: As for ``WeightCompander``.
        exclude: Names of layers to leave alone, as the LightningModule's ``named_modules`` gives them.
        lr_scale: As for ``WeightCompander``.
        effective_decay: L2 penalty on the effective weights, >= 0, in place of the optimiser's on the latent ones.

    Raises:
        ValueError: If ``effective_decay`` is negative; at the start of training for the other arguments, and if
            ``effective_decay`` is positive while an optimiser decays latent weights.

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
        exclude: Sequence[str] = (),
        lr_scale: float = 0.01,
        effective_decay: float = 0.0,
    ):
        if not 0 <= effective_decay < float("inf"):
            raise ValueError(f"effective_decay must be >= 0 and finite, got {effective_decay}")
        self.a, self.b, self.learnable, self.init, self.function = a, b, learnable, init, function
        self.exclude, self.lr_scale, self.effective_decay = tuple(exclude), lr_scale, effective_decay

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Places the companders."""
        if stage == "fit" and not companded(pl_module):
            apply_weight_compander(
                pl_module,
                self.a,
                self.b,
                learnable=self.learnable,
                init=self.init,
                function=self.function,
                exclude=self.exclude,
                lr_scale=self.lr_scale,
            )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Makes sure that no weight is decayed twice."""
        if not self.effective_decay:
            return
        hidden = {id(latent) for latent, _ in latents(pl_module)}
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            if group.get("weight_decay") and any(id(param) in hidden for param in group["params"]):
                raise ValueError(
                    "the optimiser's weight_decay of companded layers must be 0 when effective_decay is > 0, "
                    f"got {group['weight_decay']}"
                )

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Adds the gradient of the penalty, before clipping."""
        if self.effective_decay:
            own = {id(param) for group in optimizer.param_groups for param in group["params"]}
            add_effective_decay_(pl_module, self.effective_decay, only=own)


class GradientNoiseCallback(lightning.Callback):
    """Adds annealed Gaussian noise to every gradient at the optimiser's step.

    After clipping, whoever clips: the Trainer's ``gradient_clip_val``, the module's own hook, or a manual step. One
    draw an update, however many batches are accumulated for it. Each optimiser has its own noise and its own count, and
    every process adds the same. Logs ``grad_noise/sigma``.

    Args:
        eta: Variance at step 0, >= 0; the paper uses 0.01, 0.3 or 1.0.
        gamma: Exponent of its decay, >= 0.
        seed: Of the noise.
        order: ``"clip_then_noise"``, or ``"noise_then_clip"``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[GradientNoiseCallback(eta=0.3)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0, order: Order = "clip_then_noise"):
        noise_variance(0, eta, gamma)
        derive(seed)
        check_order(order)
        self.eta, self.gamma, self.seed, self.order = eta, gamma, seed, order
        self.noises: list[GradientNoise] = []
        self._handles: list[RemovableHandle] = []
        self._loaded: list[dict[str, Any]] = []
        self._sigma: float | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Attaches the noise to each optimiser."""
        self.noises = [
            GradientNoise(
                [param for group in optimizer.param_groups for param in group["params"]],
                self.eta,
                self.gamma,
                derive(self.seed, "optimizer", number),
            )
            for number, optimizer in enumerate(trainer.optimizers)
        ]
        for noise, state in zip(self.noises, self._loaded, strict=False):
            noise.load_state_dict(state)
        self._loaded = []
        if self.order == "clip_then_noise":
            pairs = zip(trainer.optimizers, self.noises, strict=True)
            self._handles = [attach(optimizer, noise) for optimizer, noise in pairs]
        elif not pl_module.automatic_optimization:
            warn("with manual optimisation the module clips before its step: the noise comes after the clipping")

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Adds the noise where it is to be clipped; gradients that overflowed under a scaler are no update."""
        if self.order == "noise_then_clip":
            noise = self.noises[[one is optimizer for one in trainer.optimizers].index(True)]
            grads = [param.grad for param in noise.params if param.grad is not None]
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            if not scaled or all(bool(grad.isfinite().all()) for grad in grads):
                noise.step()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the standard deviation of the next noise."""
        pl_module.log("grad_noise/sigma", self.noises[0].variance ** 0.5)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the optimisers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Number of the update and state of the generator, of each optimiser."""
        return {"noises": [noise.state_dict() for noise in self.noises]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the optimisers are there."""
        self._loaded = state_dict["noises"]


class Around:
    """A function in place of a method of one object, until it is undone.

    Args:
        owner: The object.
        name: The method.
        make: Given the method, returns what is called instead.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self.owner, self.name = owner, name
        self._own = owner.__dict__.get(name)  # torch.compile under Lightning puts one there too
        method = getattr(owner, name)
        setattr(owner, name, functools.wraps(method)(make(method)))

    def undo(self) -> None:
        """Puts back what was there."""
        if self._own is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._own)


class PSKDCallback(lightning.Callback):
    """Softens the labels that ``training_step`` sees by what the network predicted an epoch ago.

    Batches must be (x, labels, indices), as those of ``Batches(..., indexed=True)`` and
    :class:`netwright.data.indexed.IndexedDataset` are; ``training_step`` is given (x, targets). Its loss must take rows
    of probabilities, as ``torch.nn.CrossEntropyLoss`` does. The targets are the labels themselves as long as they are
    hard: in the first epoch, and with ``alpha_T`` 0. The weight follows the Trainer's ``max_epochs``, also when a run
    is resumed. With several processes each remembers the predictions of all.

    Args:
        alpha_T: Weight of the prediction in the last epoch, in [0, 1].
        teacher: ``"memory"`` keeps the predictions made in training; ``"snapshot"`` keeps the network as it was after
            the last epoch instead and applies it to the same batch, in evaluation mode: one more forward pass, no
            indices needed, right for images that are mixed with others.
        logits: Name of the submodule whose output are the logits; None is the module itself, ``self(x)``.
        num_examples: Rows of the memory; None takes the length of the training data set.
        dtype: Of the memory.
        device: Of the memory; None is the module's, ``"cpu"`` keeps it off an accelerator that is too small.

    Attributes:
        indexed: Whether batches must hold indices.

    Raises:
        ValueError: If ``alpha_T`` or ``teacher`` is out of its range; in training if a batch has no indices.
        RuntimeError: In training if the step gave no logits that could be seen.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[PSKDCallback(alpha_T=0.8)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        alpha_T: float = 0.8,
        teacher: Literal["memory", "snapshot"] = "memory",
        logits: str | None = None,
        num_examples: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ):
        pskd_alpha(0, 1, alpha_T)
        if teacher not in ("memory", "snapshot"):
            raise ValueError(f"teacher must be 'memory' or 'snapshot', got {teacher!r}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples must be >= 1, got {num_examples}")
        self.alpha_T, self.teacher, self.logits = alpha_T, teacher, logits
        self.num_examples, self.dtype, self.device = num_examples, dtype, device
        self.targets: PSKDTargets | None = None
        self.snapshot: dict[str, Tensor] = {}
        self.indexed = teacher == "memory"
        self._alpha = 0.0
        self._ids: Tensor | None = None
        self._seen: Tensor | None = None
        self._watching = False
        self._around: Around | None = None
        self._hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and watches the logits."""
        if int(trainer.max_epochs or 0) < 1:
            raise ValueError(f"the Trainer's max_epochs must be set for PS-KD, got {trainer.max_epochs}")
        source = self._source(pl_module)
        self._hook = source.register_forward_hook(self._see)
        self._around = Around(pl_module, "training_step", lambda step: self._softened(step, pl_module))
        if self.targets is not None:
            self.targets.to(self.device or pl_module.device)

    def _source(self, module: nn.Module) -> nn.Module:
        return module if self.logits is None else module.get_submodule(self.logits)

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        # With several processes the module's own call passes through here too, with the loss as its output.
        if self._watching and self._seen is None and isinstance(output, Tensor) and output.ndim == 2:
            self._seen = output.detach()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The weight of this epoch."""
        total = int(trainer.max_epochs or 1)
        self._alpha = pskd_alpha(trainer.current_epoch, total, self.alpha_T) if trainer.current_epoch else 0.0

    def _softened(self, step: Callable[..., Any], pl_module: lightning.LightningModule) -> Callable[..., Any]:
        def training_step(batch: Any, *rest: Any) -> Any:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2 + self.indexed:
                raise ValueError(
                    "PS-KD needs batches (x, labels, indices): wrap the data set in netwright.data.indexed."
                    "IndexedDataset, or make Batches(..., indexed=True)"
                )
            x, labels = batch[:2]
            self._ids, self._seen = (batch[2] if self.indexed else None), None
            targets = self._target(pl_module, x, labels) if self._alpha else labels
            self._watching = True
            try:
                return step((x, targets), *rest)
            finally:
                self._watching = False

        return training_step

    def _target(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> Tensor:
        if self.teacher == "snapshot":
            if not self.snapshot:
                return labels
            source = self._source(pl_module)
            with in_mode(source, False), torch.no_grad():
                probs = functional_call(source, self.snapshot, (x,)).float().softmax(1)
            return torch.lerp(one_hot(labels, probs.shape[1]), probs, self._alpha)
        if self.targets is None or self._ids is None:
            return labels
        return self.targets.mixed(self._ids, labels, self._alpha)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remembers what was predicted before the step."""
        if self.teacher == "snapshot":
            return
        if self._seen is None or self._ids is None:
            raise RuntimeError(
                "PS-KD saw no logits: training_step must call self(x), or the argument logits must name the submodule "
                "that gives them"
            )
        ids, logits = gather_rows(self._ids.to(self._seen.device), self._seen.float())
        if self.targets is None:
            rows = self.num_examples or _examples(trainer)
            self.targets = PSKDTargets(rows, logits.shape[1], self.alpha_T, dtype=self.dtype)
            self.targets.to(self.device or pl_module.device)
        self.targets.update(ids, logits)
        self._seen = self._ids = None

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the snapshot."""
        if self.teacher == "snapshot":
            state = self._source(pl_module).state_dict()
            self.snapshot = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        if self._around is not None:
            self._around.undo()
        if self._hook is not None:
            self._hook.remove()
        self._around = self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """The predictions, or the snapshot."""
        memory = {} if self.targets is None else dict(self.targets.state_dict())
        return {"memory": memory, "snapshot": self.snapshot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the memory of a checkpoint."""
        self.snapshot = state_dict["snapshot"]
        memory = state_dict["memory"]
        if memory:
            rows, classes = memory["predictions"].shape
            self.targets = PSKDTargets(rows, classes, self.alpha_T, dtype=self.dtype)
            self.targets.load_state_dict(memory)


def _examples(trainer: lightning.Trainer) -> int:
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is None:
        raise ValueError("num_examples must be given: the training data loader does not tell its data set")
    return len(dataset)

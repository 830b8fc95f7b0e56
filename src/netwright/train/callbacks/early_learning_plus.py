"""Callback of ELR+ (arXiv:2007.00151): two networks in one module, which give each other's targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import number, whole
from netwright.data.augment import mixup
from netwright.nn.copies import separate_copy
from netwright.nn.ensemble import LogitMean
from netwright.seeding import derive, stream
from netwright.train.callbacks.early_learning import PullCallback
from netwright.train.callbacks.examples import indexed_within
from netwright.train.early_learning import agreement_loss, check_strength, ema_decay, precise, sigmoid_ramp
from netwright.train.ema import WeightAverage
from netwright.train.memory import PredictionMemory, gather_rows, one_hot

RAMP = 40_000  # updates of a network of the 78,000 that the paper gives it


class ELRPlusCallback(PullCallback):
    """ELR+: two networks, each held to the averages that the other's averaged weights predict, on mixed examples.

    Two sets of weights take turns in the one module: epochs 0, 2, ... train the first, epochs 1, 3, ... the second, so
    each has half of the Trainer's epochs, with optimiser states of its own. Other callbacks and the module see an
    ordinary training. ``training_step`` is given mixed images and rows of probabilities, so its loss must take such
    rows, as ``torch.nn.CrossEntropyLoss`` does. The teacher sees the images as they are, in evaluation mode: averaged
    weights with the latest statistics of batch norm. After training the module holds the first network;
    :meth:`pair` gives both.

    Args:
        lam: As for :class:`ELRCallback`.
        beta: Likewise.
        mixup_alpha: Parameter of the Beta distribution of the mixing weight; 0 mixes nothing.
        ema_decay: Largest share of the averaged weights that an update keeps, in [0, 1].
        ema_ramp: Updates of a network until it is reached, as in :func:`netwright.train.early_learning.ema_decay`; by
            default the published 40,000, or half of the network's updates in a shorter run, as it is of the paper's.
        coef_ramp: Updates of a network until ``lam`` is reached; 0 has it at once.
        relabel: Whether targets are multiplied with the averages and normalised: for 100 classes and more.
        clamp: As for :class:`ELRCallback`.
        networks: 2, or 1 for a network that is its own teacher.
        partner: Where the second network starts: ``"shuffled"`` permutes the entries of every weight of two or more
            dimensions, which of independent draws are another such draw; ``"copy"`` has the same weights, which trained
            ones need.
        seed: Of mixing and shuffling.
        logits: As for :class:`ELRCallback`.
        num_examples: Likewise.
        device: Likewise.

    Attributes:
        memories: The averages of predictions for each network, once a batch was seen.
        averages: The averaged weights of each network.
        other: Parameters and buffers of the network that is not in the module.
        ramp: Updates until ``ema_decay`` is reached, once training has begun.

    Raises:
        ValueError: If a number is out of its range; in training if a batch has no indices, a method within remembers
            examples that would come to it mixed, or parameters are cut into shards (FSDP).

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[ELRPlusCallback()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    method = "ELR+"

    def __init__(
        self,
        lam: float = 3.0,
        beta: float = 0.7,
        mixup_alpha: float = 1.0,
        ema_decay: float = 0.997,
        ema_ramp: int | None = None,
        coef_ramp: int = 0,
        relabel: bool = False,
        clamp: float = 1e-4,
        networks: int = 2,
        partner: Literal["shuffled", "copy"] = "shuffled",
        seed: int = 0,
        logits: str | None = None,
        num_examples: int | None = None,
        device: str | None = None,
    ):
        super().__init__(logits, num_examples, device)
        check_strength(lam, beta, clamp)
        derive(seed)
        number("mixup_alpha", mixup_alpha, ">= 0")
        number("ema_decay", ema_decay, "[0, 1]")
        whole("ema_ramp", ema_ramp or 0, ">= 0")
        whole("coef_ramp", coef_ramp, ">= 0")
        if networks not in (1, 2):
            raise ValueError(f"networks must be 1 or 2, got {networks}")
        if partner not in ("shuffled", "copy"):
            raise ValueError(f"partner must be 'shuffled' or 'copy', got {partner!r}")
        self.lam, self.beta, self.clamp, self.mixup_alpha = lam, beta, clamp, mixup_alpha
        self.ema_decay, self.ema_ramp, self.coef_ramp, self.relabel = ema_decay, ema_ramp, coef_ramp, relabel
        self.networks, self.partner, self.seed = networks, partner, seed
        self.ramp = ema_ramp
        self.memories: list[PredictionMemory] = []
        self.averages: list[WeightAverage] = []
        self.other: dict[str, Tensor] = {}
        self.active, self.updates = 0, [0] * networks
        self._states: list[dict[int, Any]] = []  # of the optimisers, for the network that is not in the module
        self._target: Tensor | None = None
        self._place: tuple[int, int, int] = (0, 0, 0)
        self._before_step = 0

    @property
    def target(self) -> Float[Tensor, "examples classes"]:
        """The averages of predictions by index, the mean over the networks; zeros for an example that was never seen.

        Raises:
            RuntimeError: Before the first batch.
        """
        if not self.memories:
            raise RuntimeError("there are no averages before the first batch of training")
        count = torch.stack([memory.seen for memory in self.memories]).sum(0).clamp_min(1)
        return torch.stack([memory.predictions for memory in self.memories]).sum(0) / count[:, None]

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Makes the second network and the averaged weights, and stands around the training step."""
        if "FSDP" in type(trainer.strategy).__name__:
            raise ValueError("ELR+ needs whole parameters in each process, got a strategy that cuts them into shards")
        if indexed_within(pl_module) and self.mixup_alpha:
            raise ValueError(
                "ELR+ mixes examples, so no method within may remember something of each: ELR is part of it, and PS-KD "
                "needs teacher='snapshot'"
            )
        super().on_fit_start(trainer, pl_module)
        device, source = pl_module.device, self._source(pl_module)
        if not self.averages:
            if not self.other and self.networks == 2:
                self.other = self._started(pl_module)
            for number in range(self.networks):
                if number:
                    self._exchange(pl_module)
                self.averages.append(WeightAverage(source))
            if self.networks == 2:
                self._exchange(pl_module)
        self.other = {name: value.to(device) for name, value in self.other.items()}
        for average in self.averages:
            average.to(device)
        for memory in self.memories:
            memory.to(self.device or device)

    def _started(self, module: nn.Module) -> dict[str, Tensor]:
        generator = stream(self.seed, "partner")
        state = {name: value.detach().clone() for name, value in _tensors(module).items()}
        if self.partner == "shuffled":
            for name, param in module.named_parameters():
                if param.ndim >= 2:
                    order = torch.randperm(param.numel(), generator=generator).to(param.device)
                    state[name] = param.detach().flatten()[order].view_as(param)
        return state

    @torch.no_grad()
    def _exchange(self, module: nn.Module) -> None:
        """Weights and buffers of the two networks change places."""
        for name, value in _tensors(module).items():
            kept = value.detach().clone()
            value.copy_(self.other[name])
            self.other[name] = kept

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Finds out how many examples there are, and how long the run is."""
        super().on_train_start(trainer, pl_module)
        if not getattr(trainer, "fast_dev_run", False):
            self.check_epochs(trainer.max_epochs or 0)
        if self.ramp is None:
            self.ramp = int(min(RAMP, trainer.estimated_stepping_batches / self.networks / 2))

    def check_epochs(self, epochs: int) -> None:
        """Makes sure that each network gets its turn.

        Args:
            epochs: Of the run; below 1 where their number is open.

        Raises:
            ValueError: If there are two networks and one epoch.
        """
        if self.networks == 2 and epochs == 1:
            raise ValueError("epochs must be >= 2 for ELR+, whose two networks take turns, got 1")

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The network whose turn it is comes into the module, with its optimisers' states."""
        if trainer.current_epoch % self.networks == self.active:
            return
        self._exchange(pl_module)
        self.active = 1 - self.active
        kept = self._states or [{} for _ in trainer.optimizers]
        self._states = []
        for optimizer, theirs in zip(trainer.optimizers, kept, strict=True):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            self._states.append({i: optimizer.state.pop(p) for i, p in enumerate(params) if p in optimizer.state})
            for place, state in theirs.items():
                optimizer.state[params[place]] = _moved(state, params[place].device)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes where the training is."""
        self._place = trainer.current_epoch, batch_idx, trainer.global_rank
        self._before_step = trainer.global_step

    @torch.no_grad()
    def _before(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        assert self._ids is not None
        teacher = self.averages[self.active - 1 if self.networks == 2 else 0]
        logits = precise(teacher.predict(self._source(pl_module), x))
        if not bool(logits.isfinite().all()):
            raise ValueError("logits must be finite, got NaN or infinity: the averages would be poisoned")
        probs = logits.softmax(1)
        if not self.memories:
            self.memories = [PredictionMemory(self._count, probs.shape[1]) for _ in range(self.networks)]
            for each in self.memories:
                each.to(self.device or pl_module.device)
        memory = self.memories[self.active]
        memory.average(*gather_rows(self._ids.to(probs.device), probs), self.beta)
        rows = memory.recall(self._ids)[0].to(probs.device, probs.dtype)
        if self.mixup_alpha:
            both = torch.cat([one_hot(labels, probs.shape[1]).to(rows.dtype), rows], 1)
            x, both = mixup(x, both, self.mixup_alpha, stream(self.seed, "mixup", *self._place))
            labels, rows = both.chunk(2, 1)
        if self.relabel:
            labels = one_hot(labels, probs.shape[1]).to(rows.dtype)
            product = labels * rows
            total = product.sum(1, keepdim=True)
            labels = torch.where(total > 0, product / total, labels)
        self._target = rows
        return super()._before(pl_module, x, labels)

    def _pull(self, pl_module: lightning.LightningModule, ids: Tensor, logits: Tensor) -> Tensor:
        assert self._target is not None
        strength = self.lam * sigmoid_ramp(self.updates[self.active], self.coef_ramp)
        return strength * agreement_loss(logits, self._target, self.clamp)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Averages the weights, if there was an update."""
        self._target = None
        if trainer.global_step > self._before_step:
            done = self.updates[self.active]
            assert self.ramp is not None
            self.averages[self.active].update(self._source(pl_module), ema_decay(done, self.ema_decay, self.ramp))
            self.updates[self.active] = done + 1

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The first network stays in the module."""
        if self.active:
            self._exchange(pl_module)
            self.active, self._states = 0, []

    def pair(self, module: lightning.LightningModule, network: nn.Module | None = None) -> LogitMean:
        """Copies of both networks, their parametrizations included, which answer with the mean of their logits.

        Args:
            module: That was trained.
            network: The part of it that is wanted; None is the module itself.
        """
        wanted = module if network is None else network
        copies = [separate_copy(wanted)]
        if self.networks == 2:
            self._exchange(module)
            copies.append(separate_copy(wanted))
            self._exchange(module)
        return LogitMean(copies)

    def state_dict(self) -> dict[str, Any]:
        """Everything of the two networks that the module and its optimisers do not hold."""
        return {
            "active": self.active,
            "updates": list(self.updates),
            "ramp": self.ramp,
            "other": dict(self.other),
            "optimizers": list(self._states),
            "averages": [average.state_dict() for average in self.averages],
            "memories": [dict(memory.state_dict()) for memory in self.memories],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of a checkpoint."""
        self.active, self.updates, self.ramp = state_dict["active"], list(state_dict["updates"]), state_dict["ramp"]
        self.other, self._states = dict(state_dict["other"]), list(state_dict["optimizers"])
        self.averages, self.memories = [], []
        for state in state_dict["averages"]:
            self.averages.append(WeightAverage(nn.Module()))
            self.averages[-1].load_state_dict(state)
        for state in state_dict["memories"]:
            self.memories.append(PredictionMemory(*state["predictions"].shape))
            self.memories[-1].load_state_dict(state)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _moved(state: Any, device: torch.device) -> Any:
    """An optimiser's state of one parameter on its device; counters stay where they are."""
    if isinstance(state, Mapping):
        return {
            key: value.to(device) if isinstance(value, Tensor) and value.ndim else value for key, value in state.items()
        }
    return state

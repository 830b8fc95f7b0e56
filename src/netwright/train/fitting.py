"""The one training loop: Lightning's Trainer with named random streams, exact resumption and our progress bar.

Everything random in an epoch is a function of (seed, epoch): the order and augmentation of the data through
``Batches.set_epoch``, dropout and the like through torch's global generator, which is seeded at the start of every
epoch. A checkpoint therefore holds no generator state, and a run that was killed goes on bit for bit as if it had not
been.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from netwright import storage
from netwright.console import Task, task
from netwright.results import History
from netwright.seeding import derive, seeded
from netwright.train.classifier import Classifier


class Loader(Protocol):
    """What :func:`fit` reads batches from; ``netwright.data.Batches`` is one."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches come next."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class _EpochLoader:
    """Hands the Trainer the batches of its current epoch; lazily, since it asks before it has set the epoch."""

    def __init__(self, data: Loader):
        self.data = data
        self.trainer: lightning.Trainer | None = None

    def __iter__(self) -> Iterator[Any]:
        assert self.trainer is not None
        if hasattr(self.data, "rank") and hasattr(self.data, "world"):
            self.data.rank, self.data.world = self.trainer.global_rank, self.trainer.world_size
        self.data.set_epoch(self.trainer.current_epoch)
        yield from self.data

    def __len__(self) -> int:
        return len(self.data)

    @property
    def dataset(self) -> Any:
        """The data set behind the batches, for callbacks that remember something of each example."""
        return getattr(self.data, "dataset", None)


class _Keeper(lightning.Callback):
    """Seeds each epoch, watches the loss, records the figures, moves the bar and writes the checkpoint."""

    def __init__(self, seed: int, bar: Task, checkpoint: Path | None, figures: Callable[[], dict[str, float]] | None):
        self.seed, self.bar, self.checkpoint, self.figures = seed, bar, checkpoint, figures
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        torch.manual_seed(derive(self.seed, "noise", trainer.current_epoch, trainer.global_rank))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"the loss became {float(loss)} in epoch {trainer.current_epoch + 1}, step {batch_idx + 1}; "
                "a smaller learning rate is the usual cure"
            )
        steps = int(trainer.num_training_batches)
        self.bar.update(trainer.current_epoch * steps + batch_idx + 1, total=int(trainer.max_epochs or 1) * steps)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.endswith("_step") and Tensor.numel(torch.as_tensor(value)) == 1
        }
        if trainer.optimizers:
            figures["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        figures |= self.figures() if self.figures is not None else {}
        figures["seconds"] = self.elapsed()
        self.epochs.append(figures)
        shown = [
            f"{name.replace('_', ' ')} {figures[name]:.4g}" for name in ("val_accuracy", "val_loss") if name in figures
        ]
        self.bar.update(self.bar.done, message=", ".join(shown))

    def elapsed(self) -> float:
        """Seconds over all sittings."""
        return self.seconds + time.monotonic() - self._start

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": [dict(e) for e in self.epochs], "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = [dict(e) for e in state_dict["epochs"]]
        self.seconds, self._start = state_dict["seconds"], time.monotonic()


class _Checkpoint(lightning.Callback):
    """Saves after every epoch, last of all callbacks, so that it holds what the others did in theirs."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.world_size > 1:
            # Every rank takes part in a save; only the first one writes, and renames when the file is whole.
            temporary = self.path.with_suffix(".saving")
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                temporary.replace(self.path)
            trainer.strategy.barrier("checkpoint")
            return
        with storage.atomic_path(self.path) as temporary:
            trainer.save_checkpoint(temporary)


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences Lightning's advice to people who call its Trainer themselves, for the length of the block."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def fit(
    module: nn.Module,
    data: Loader,
    *,
    epochs: int,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    validation: Iterable[Any] | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    figures: Callable[[], dict[str, float]] | None = None,
    devices: int | str = 1,
    nodes: int = 1,
    strategy: str = "auto",
    precision: Any = "32-true",
    logger: Any = False,
    description: str = "training",
) -> History:
    """Trains a module in place and returns what each epoch recorded.

    Args:
        module: A ``LightningModule``; any other network is trained as a :class:`Classifier`.
        data: Batches with ``set_epoch`` and a length, such as ``netwright.data.Batches``.
        epochs: Epochs in all, those of earlier sittings included; at least 1.
        optimizer: Makes the optimiser from the trainable parameters, in place of the module's own.
        validation: Batches for the module's ``validation_step`` after each epoch.
        callbacks: Any Lightning callbacks, among them the schedules of ``netwright.train.schedules``.
        seed: Of everything random in the run.
        checkpoint: Written after every epoch; when the file is there, training goes on from it, bit for bit.
        figures: Called after each epoch; what it returns is recorded with the epoch.
        devices: Processes on this machine, as Lightning understands it.
        nodes: Machines.
        strategy: Lightning's strategy: ``"auto"``, ``"ddp"``, ``"fsdp"``.
        precision: Lightning's precision, ``"bf16-mixed"`` for example.
        logger: Lightning's logger, or False for none.
        description: What the progress bar says.

    Returns:
        The history over all sittings, when the last epoch is done.

    Raises:
        ValueError: If ``epochs`` is below 1 or a batch source is empty.
        FloatingPointError: When the loss is no longer finite; the last good epoch stays in the checkpoint.
        UserError: If the checkpoint is damaged.
        KeyboardInterrupt: On Ctrl-C; the last finished epoch is in the checkpoint.

    Example:
        >>> from netwright.data.tensors import Batches, TensorImages
        >>> images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8)
        >>> data = Batches(TensorImages(images, (images.float().mean((1, 2, 3)) > 127).long()), 16)
        >>> history = fit(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), data, epochs=2)
        >>> len(history.epochs), "train_loss" in history.last
        (2, True)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    if len(data) < 1:
        raise ValueError(f"data must hold at least 1 batch, got {len(data)}")
    wrapped = module if isinstance(module, lightning.LightningModule) else Classifier(module)
    if optimizer is not None:
        make = optimizer
        wrapped.configure_optimizers = lambda: make([p for p in wrapped.parameters() if p.requires_grad])  # type: ignore[method-assign]
    path = None if checkpoint is None else Path(checkpoint)
    resume = path if path is not None and path.exists() else None
    if resume is not None:
        storage.read_checkpoint(resume)
    loader = _EpochLoader(data)
    with task(description, total=epochs * len(data)) as bar, seeded(seed, "fit"), _quiet_lightning():
        keeper = _Keeper(seed, bar, path, figures)
        all_callbacks = [*callbacks, keeper, *([_Checkpoint(path)] if path is not None else [])]
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=all_callbacks,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=precision,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            default_root_dir=str(path.parent) if path is not None else None,
        )
        loader.trainer = trainer
        previous = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(wrapped, loader, validation, ckpt_path=resume, weights_only=True)
        except SystemExit as stopped:
            # Lightning ignores further Ctrl-C and leaves by sys.exit; the caller decides here.
            raise KeyboardInterrupt(f"stopped after epoch {len(keeper.epochs)}") from stopped
        finally:
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(signal.SIGINT, previous)
    return History(tuple(keeper.epochs), keeper.elapsed())

"""Any search under Lightning's Trainer: devices, nodes, loggers, checkpoints.

The module calls the same ``step`` as ``Searcher.search``: with one process and the same seed both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch

from netwright.search.result import SearchResult
from netwright.search.searcher import EpochEnd, Pairs, Searcher


class SearchModule(lightning.LightningModule):
    """Wraps a searcher; the epochs are the searcher's, so the trainer is given ``max_epochs=-1``.

    Checkpoints hold plain values and tensors, are written at the end of an epoch, and resume bit-equal. Under ``ddp``
    each process works on its share of the batch and gradients are averaged inside the step; normalisation layers need
    :func:`netwright.nn.batchnorm.synchronise` for results equal to one process's. Strategies that cut parameters into
    pieces (FSDP) do not fit a search.

    Args:
        searcher: The search; with all else that is random it must be the same on every process.
        train, val: Loaders, as for ``Searcher.search``. Loaders with attributes ``rank`` and ``world``, as
            :class:`netwright.data.tensors.Batches`, are told theirs; others must share out the data themselves.
        seed: Seed of the search.
        on_epoch: Called after each epoch.

    Example:
        >>> from netwright.search import spaces
        >>> from netwright.search.darts import DARTS
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> module = SearchModule(DARTS(supernet, epochs=1), [batch], [batch], seed=0)
        >>> trainer = lightning.Trainer(max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                             enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module)
        >>> module.result().genotype.space
        'micro-darts-2-shared'
    """

    def __init__(
        self,
        searcher: Searcher,
        train: Any,
        val: Any,
        *,
        seed: int,
        on_epoch: Callable[[EpochEnd], object] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.searcher, self.seed, self.on_epoch = searcher, seed, on_epoch
        self.supernet = searcher.supernet
        self._loaders = train, val

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The searcher's two optimisers: of the weights, of the architecture."""
        return [self.searcher.w_opt, self.searcher.a_opt]

    def train_dataloader(self) -> Pairs:
        """Pairs of a training and a validation batch."""
        for loader in self._loaders:
            if hasattr(loader, "rank") and hasattr(loader, "world"):
                loader.rank, loader.world = self.global_rank, self.trainer.world_size
        return Pairs(*self._loaders, self.searcher)

    def on_train_start(self) -> None:
        """Starts the search or goes on with it."""
        pairs: Any = self.trainer.train_dataloader
        batches = int(self.trainer.num_training_batches)
        if pairs.phased and batches < len(pairs):
            raise ValueError(
                f"limit_train_batches must not cut an epoch of phases, got {batches} of {len(pairs)} batches"
            )
        self.searcher.prepare(seed=self.seed, steps_per_epoch=min(batches, len(pairs.train)))
        self.trainer.should_stop = self.searcher.finished

    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> None:
        """One step of the search."""
        train_batch, val_batch = batch
        optimizers: Any = self.optimizers()
        figures = self.searcher.step(train_batch, val_batch, optimizers=(optimizers[0], optimizers[1]))
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Closes the epoch, and the search after its last one."""
        ended = self.searcher.end_epoch(self._loaders[1])
        if "skip_share" in ended.figures:
            self.log("skip_share", ended.figures["skip_share"], batch_size=1)
        if self.on_epoch is not None:
            self.on_epoch(ended)
        if self.searcher.finished:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the searcher's progress."""
        checkpoint["netwright_search"] = self.searcher.state_dict(tensors=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes back to the searcher's progress; Lightning then loads weights and optimisers."""
        self.searcher.load_state_dict(checkpoint["netwright_search"])

    def result(self) -> SearchResult:
        """What the search has found so far."""
        return self.searcher.result(*self._loaders)

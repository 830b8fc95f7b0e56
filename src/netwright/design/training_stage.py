"""Training and pruning of one network in phases, each of which leaves its weights and its history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import nn
from torch.nn import functional

from netwright import storage
from netwright.compress import hydra, prune
from netwright.compress.exact import Scope
from netwright.console import Overall, note
from netwright.cost import threads
from netwright.data.tensors import Batches
from netwright.design import preparation, remarks
from netwright.design.budget import RunClock, opened, seconds_left, steps_seen
from netwright.design.distributed import agree, barrier, is_main
from netwright.design.options import Options
from netwright.design.plan import Phase, Plan, augmentation
from netwright.design.run import RunFolder
from netwright.diagnose.callbacks import SPARED, CoherenceCallback
from netwright.nn.batchnorm import synchronise
from netwright.nn.sparse import to_dense
from netwright.seeding import derive, seeded
from netwright.train import Classifier, fit, methods
from netwright.train.callbacks.layers import TrActCallback, WeightCompanderCallback
from netwright.train.schedules import CosineProgress, Deadline, Progress, Timetable, steps_left
from netwright.train.tract import remove_tract
from netwright.train.weight_compander import remove_weight_compander

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.data.tensors import Images

# Validation after an epoch takes about this share of it, on no more examples than tell a curve.
VALIDATION_SHARE, FEWEST_VALIDATED, MOST_VALIDATED = 0.05, 256, 2000
RAMP_EVERY = 8  # steps between two prunings
SMOOTHING = 0.1  # of labels, until weights are removed
PROBED = 100  # training examples whose gradients are compared

# Files that a run has still to write when a phase begins.
_EXPORTS_LEFT = {
    ("model", "pretrain"): 4,
    ("model", "prune"): 3,
    ("model", "finetune"): 3,
    ("baseline", "pretrain"): 2,
    ("baseline", "prune"): 1,
    ("baseline", "finetune"): 1,
}

# Learning rate of a phase as a share of the run's, and the share of that which is left at its end.
_SCHEDULES = {
    ("pretrain", "magnitude"): (1.0, 0.0),
    ("prune", "magnitude"): (1.0, 1.0),
    ("finetune", "magnitude"): (1.0, 0.0),
    ("pretrain", "hydra"): (1.0, 0.0),
    ("prune", "hydra"): (1.0, 0.0),
    ("finetune", "hydra"): (0.3, 0.0),
}


# How weights are compared when magnitude pruning chooses among them. A baseline is a chain of layers, which is dead as
# soon as one of them is empty: global magnitude does that to MobileNet-v2, LAMP never. A designed network has other
# paths round each operation; there both serve equally well or, with few weights, global magnitude better.
SCOPES: dict[str, Scope] = {"model": "global", "baseline": "lamp"}


class _Ramp(Progress):
    """Raises the sparsity along the cubic curve over the progress of a phase whose length may change.

    However short a deadline cuts the phase, the network leaves it at the whole sparsity.
    """

    def __init__(self, network: nn.Module, sparsity: float, scope: Scope):
        super().__init__()
        self.network, self.sparsity, self.scope = network, sparsity, scope
        self._reached = 0.0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.progress += self.step_size(trainer, batch_idx)
        if (batch_idx + 1) % RAMP_EVERY == 0 or steps_left(trainer, batch_idx) == 1:
            # The last tenth is left to recover in; the curve is flat there anyway.
            self._prune(prune.cubic_sparsity(round(1000 * self.progress), 0, 900, 0.0, self.sparsity))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._reached < self.sparsity:
            self._prune(self.sparsity)

    def _prune(self, sparsity: float) -> None:
        prune.update(self.network, sparsity, scope=self.scope, regrow=True)
        self._reached = sparsity


@dataclasses.dataclass
class Stage:
    """What every stage of a run works with."""

    run: RunFolder
    options: Options
    data: Data
    plan: Plan
    clock: RunClock

    def amend(self, plan: Plan) -> None:
        """Takes a changed plan and writes it down."""
        self.plan = plan
        if is_main():
            self.run.write("plan.json", plan.to_dict())

    def seconds_left(self, exports: int = 4) -> float:
        """What the budget leaves for the training still to come; without a budget there is no end to it.

        Args:
            exports: Files of networks that are still to be written.
        """
        if self.options.time_budget is None:
            return math.inf
        return seconds_left(self.run, self.plan, self.options, self.data, self.clock.seconds(), exports)

    def open(self, which: str, name: str) -> Phase:
        """The phase that begins now, or goes on; under a time budget with the seconds that there are for it now."""
        phase = self.plan.phase(which, name)
        # After the first epoch the phase looks after its seconds itself.
        if phase.limit is not None and not agree((self.run / f"work/{which}-{name}.ckpt").exists()):
            left = self.seconds_left(_EXPORTS_LEFT[which, name])
            per_pass = max(1, len(self.data.train) // self.options.batch_size)
            self.amend(agree(opened(self.plan, phase, left, steps_seen(self.run, self.plan), per_pass)))
            self.clock.save()
        return self.plan.phase(which, name)


def train_network(
    stage: Stage,
    which: str,
    build: Callable[[], nn.Module],
    total: Overall,
    trained: Callable[[nn.Module], object],
) -> tuple[nn.Module, nn.Module]:
    """Trains, prunes and fine-tunes one network; finished phases are read back instead.

    Args:
        stage: The run.
        which: ``"model"`` or ``"baseline"``; its phases are those of the plan.
        build: Makes the untrained network.
        total: The bar over all stages.
        trained: Called with the dense network once it is trained, before any pruning.

    Returns:
        The finished network and the dense one it was before pruning, both plain modules.
    """
    with seeded(stage.options.seed, "init", which):
        network = build()
    if stage.options.devices * stage.options.nodes > 1:
        network = synchronise(network)
    dense: nn.Module | None = None
    for name in (p.name for p in stage.plan.phases if p.network == which):
        _prepare(network, name, stage.options)
        finished = f"work/{which}-{name}.safetensors"
        if stage.run.has(finished):
            network.load_state_dict(storage.read_tensors(stage.run / finished))
        else:
            with total.stage(f"{which}: {name}"), threads(stage.plan.threads[which]):
                _train_phase(stage, stage.open(which, name), network)
            if is_main():
                storage.write_tensors(stage.run / finished, network.state_dict())
                (stage.run / f"work/{which}-{name}.ckpt").unlink(missing_ok=True)
            barrier()
        if name == "pretrain":
            dense = to_dense(network)
            trained(dense)
    assert dense is not None
    return to_dense(network), dense


def training_seconds(run: RunFolder, which: str) -> float:
    """Wall time of all finished phases of a network, and of what its methods learned before."""
    phases = sum(float(run.read(f"work/{which}-{name}.json")["seconds"]) for name in _finished(run, which))
    return phases + (preparation.seconds(run / "work") or 0.0)


def histories(run: RunFolder) -> dict[str, Any]:
    """What ``training.json`` holds: the epochs of every finished phase of both networks."""
    return {
        which: {name: run.read(f"work/{which}-{name}.json")["epochs"] for name in _finished(run, which)}
        for which in ("model", "baseline")
    }


def _finished(run: RunFolder, which: str) -> list[str]:
    return [name for name in ("pretrain", "prune", "finetune") if run.has(f"work/{which}-{name}.json")]


def _prepare(network: nn.Module, phase: str, options: Options) -> None:
    """Gives the network the masks with which a phase starts."""
    if options.sparsity == 0 or phase == "pretrain":
        return
    if options.pruning == "hydra":
        if phase == "prune":
            hydra.begin_scores(network, 1 - options.sparsity)
        else:
            hydra.begin_finetune(network)
    elif phase == "prune":
        prune.place_masks(network)


def _train_phase(stage: Stage, phase: Phase, network: nn.Module) -> None:
    options, data = stage.options, stage.data
    share, floor = _SCHEDULES[phase.name, options.pruning]
    seed = derive(options.seed, phase.network, phase.name)
    same = [p for p in stage.plan.phases if p.network == phase.network]
    module = Classifier(network, lr=options.lr * share, label_smoothing=SMOOTHING if phase.name == "pretrain" else 0.0)
    module.example_input_array = torch.zeros(2, *data.shape)  # tells which layer is computed first
    callbacks = methods.callbacks(options.train_method) if phase.name == "pretrain" else []
    indexed = any(getattr(method, "indexed", False) for method in callbacks)
    preparation.prepare(callbacks, data, stage.run / "work", augment=True)
    if phase.name == "prune" and options.pruning == "magnitude" and options.sparsity > 0:
        callbacks.append(_Ramp(network, options.sparsity, SCOPES[phase.network]))
    callbacks.append(CosineProgress(floor=floor, warmup=0.05 if phase.name == "pretrain" else 0.0))
    if phase.limit is not None:

        def changed(done: int, total: int) -> None:
            stage.amend(stage.plan.with_change(phase.network, phase.name, done, total))

        callbacks.append(Deadline(phase.limit, most=2 * phase.epochs, amended=changed))
    elif phase.changes:
        callbacks.append(Timetable(phase.changes))
    coherence = _coherence(stage, phase, callbacks)
    if coherence is not None:
        callbacks.append(coherence)
    normalise = data.normalise()
    batches = Batches(
        data.train,
        options.batch_size,
        seed=seed,
        augment=augmentation(data, sum(p.epochs * p.steps for p in same) * options.batch_size / len(data.train)),
        normalise=normalise,
        steps=phase.steps,
        indexed=indexed,
    )
    history = fit(
        module,
        batches,
        epochs=phase.epochs,
        validation=Batches(_watched(data, phase.steps * options.batch_size), 256, shuffle=False, normalise=normalise),
        callbacks=callbacks,
        seed=seed,
        checkpoint=stage.run / f"work/{phase.network}-{phase.name}.ckpt",
        devices=options.devices,
        nodes=options.nodes,
        strategy=options.strategy,
        logger=_logger(stage, phase),
        figures=lambda: {
            "sparsity": prune.sparsity(network).sparsity,
            **_agreement(coherence, module.trainer.global_step - phase.steps),
        },
        description=f"{phase.network}: {phase.name}",
    )
    if phase.name == "pretrain":
        remove_tract(remove_weight_compander(network))
    if is_main():
        if (phase.network, phase.name) == ("model", "pretrain"):  # the phase that the methods take part in
            remarks.write(stage.run, callbacks, network, data)
        stage.run.write(f"work/{phase.network}-{phase.name}.json", history.to_dict())
        accuracy = history.last.get("val_accuracy")
        if accuracy is not None:
            note(f"  {phase.network} after {phase.name}: validation accuracy {accuracy:.4f}")


def _watched(data: Data, trained: int) -> Images:
    """Evenly spaced examples of the validation part, as many as suit an epoch of ``trained`` examples."""
    # A step forward and backward costs about three times as much as one that is only forward.
    wanted = min(MOST_VALIDATED, max(FEWEST_VALIDATED, round(3 * VALIDATION_SHARE * trained)), len(data.validation))
    return data.validation.subset(torch.arange(wanted) * len(data.validation) // wanted)


def _coherence(stage: Stage, phase: Phase, callbacks: Sequence[lightning.Callback]) -> CoherenceCallback | None:
    """Measures how far the gradients of some examples agree while the designed network learns, once an epoch at most.

    Pruned weights and methods that change layers have no gradient by the layers' rules, which alone are cheap enough.
    """
    if (phase.network, phase.name) != ("model", "pretrain"):
        return None
    if any(isinstance(method, (TrActCallback, WeightCompanderCallback)) for method in callbacks):
        return None
    train, size = stage.data.train, min(PROBED, len(stage.data.train))
    some = train.subset(torch.arange(size) * len(train) // size)
    probe = Batches(some, size, shuffle=False, drop_last=False, normalise=stage.data.normalise())
    every = max(phase.steps, math.ceil(SPARED * size / stage.options.batch_size))
    every = min(every, phase.epochs * phase.steps)  # once, at least
    loss = partial(functional.cross_entropy, reduction="none", label_smoothing=SMOOTHING)
    return CoherenceCallback(probe, lambda step: step % every == every - 1, loss)


def _agreement(coherence: CoherenceCallback | None, since: int) -> dict[str, float]:
    """What was measured from a step on, NaN if nothing was: Lightning itself repeats what an earlier epoch had."""
    if coherence is None or not coherence.steps:
        return {}
    last, fresh = coherence.results[-1], coherence.steps[-1] >= since
    return {"coherence_examples": last.m, coherence.name: last.m_coherence if fresh else math.nan}


def _logger(stage: Stage, phase: Phase) -> Any:
    if stage.options.logger == "none" or not is_main():
        return False
    where = {"save_dir": str(stage.run / "logs"), "name": phase.network, "version": phase.name}
    if stage.options.logger == "csv":
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(where["save_dir"], name=where["name"], version=where["version"])
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(where["save_dir"], name=where["name"], version=where["version"])

"""The search of a run: resumable at every epoch, inside its share of the time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from netwright import storage
from netwright.cost import threads
from netwright.data.tensors import Batches
from netwright.design.distributed import agree, barrier, is_main, world_size
from netwright.design.limits import Allowance
from netwright.design.options import Options
from netwright.design.plan import augmentation
from netwright.design.user_code import open_space, sizes_of
from netwright.search import method
from netwright.search.brief import Brief, make_selector
from netwright.search.genotype import Genotype
from netwright.search.sampling import SampleSelector
from netwright.search.scratch import ScratchAccuracy
from netwright.search.searcher import Searcher
from netwright.seeding import derive, stream

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.training_stage import Stage
    from netwright.search.pricing import Limits
    from netwright.search.searcher import EpochEnd
    from netwright.search.spaces.network import Stem
    from netwright.search.supernet import Supernet

MOST_DRAWS = 50


def make_supernet(options: Options, shape: tuple[int, int, int], classes: int, channels: int, stem: Stem) -> Any:
    """The supernet of the run's space, as the run's method searches it."""
    make = getattr(method(options.search), "supernet_of", Searcher.supernet_of)  # random search has none of its own
    space = open_space(options.space)
    sizes = sizes_of(space, channels=channels, stem=stem)
    return make(space, shape[0], classes, seed=options.seed, **sizes)


def make_searcher(options: Options, supernet: Supernet, epochs: list[int], limits: Limits | None = None) -> Searcher:
    """The searcher by its name, with the plan's epochs in its stages."""
    chosen = None if options.select is None else make_selector(options.select, supernet.space, limits)
    brief = Brief(epochs, 1 - options.sparsity, limits, chosen)
    searcher: Searcher = method(options.search).short(supernet, brief)
    return searcher


def run_search(stage: Stage) -> Genotype:
    """Searches, or reads back what was found, and leaves ``search.json``.

    Raises:
        FloatingPointError: When a loss or an architecture parameter is no longer finite.
        UserError: If the checkpoint of an interrupted search is damaged.
    """
    run, options, data, plan = stage.run, stage.options, stage.data, stage.plan
    if run.has("search.json"):
        return Genotype.from_dict(run.read("search.json")["genotype"])
    if options.search == "random":
        genotype = _drawn(options, data, plan.model)
        if is_main():
            run.write("search.json", {"genotype": genotype.to_dict(), "seed": options.seed, "wall_time": 0.0})
        barrier()
        return genotype
    sizes = plan.search
    supernet = make_supernet(options, data.shape, len(data.classes), sizes["channels"], plan.model["stem"])
    supernet = supernet.to(memory_format=torch.channels_last)
    if world_size() > 1:
        from netwright.nn.batchnorm import synchronise

        supernet = synchronise(supernet)
    limits = agree(Allowance(options, data, plan.model).limits(run) if is_main() else None)
    searcher = make_searcher(options, supernet, sizes["epochs"], limits)
    checkpoint = run / "work/search.ckpt"
    if checkpoint.exists():
        searcher.load_state_dict(storage.read_checkpoint(checkpoint))
    clock = _Clock(sizes["limit"], stage)

    def on_epoch(ended: EpochEnd) -> None:
        clock.look(ended)
        if is_main():
            storage.write_checkpoint(checkpoint, searcher.state_dict())

    parts = searcher.split(data.train.labels, seed=derive(options.seed, "search halves"))
    passes = sum(sizes["epochs"]) * sizes["steps"] * options.batch_size / len(parts[0])
    shared: dict[str, Any] = {
        "batch_size": options.batch_size,
        "augment": augmentation(data, passes),
        "normalise": data.normalise(),
        "steps": sizes["steps"],
        "world": world_size(),
        "rank": torch.distributed.get_rank() if world_size() > 1 else 0,
    }
    loaders = [
        Batches(data.train.subset(part), seed=derive(options.seed, "search", name), **shared)
        for part, name in zip(parts, ("weights", "architecture"), strict=True)
    ]
    if options.sample_epochs is not None:
        assert isinstance(searcher.selector, SampleSelector)
        held = Batches(data.train.subset(parts[1]), options.batch_size, shuffle=False, normalise=data.normalise())
        searcher.selector.evaluate = ScratchAccuracy(
            loaders[0], held, len(data.classes), options.sample_epochs, lr=options.lr, seed=options.seed,
            **sizes_of(supernet.space, **plan.model),
        )  # fmt: skip
    with threads(plan.threads["search"]):
        result = searcher.search(*loaders, seed=derive(options.seed, "searcher"), on_epoch=on_epoch)
    if is_main():
        run.write("search.json", result.to_dict())
        checkpoint.unlink(missing_ok=True)
    barrier()
    return result.genotype


def _drawn(options: Options, data: Data, model: dict[str, Any]) -> Genotype:
    """A random genotype within the limits."""
    allowance, draws = Allowance(options, data, model), stream(options.seed, "search")
    for _ in range(MOST_DRAWS):
        genotype = open_space(options.space).random(draws)
        if not allowance.over(genotype):
            return genotype
    return allowance.cheapest()


class _Clock:
    """Takes epochs away from the stages that are left when the search would end late."""

    def __init__(self, limit: float | None, stage: Stage):
        self.limit, self.stage = limit, stage
        self._last = time.monotonic()

    def look(self, ended: EpochEnd) -> None:
        """After each epoch."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        searcher = ended.searcher
        planned = searcher.epochs_left
        left = sum(planned.values())
        if self.limit is None or left == 0:
            return
        room = agree(math.floor((self.limit - searcher.seconds) / took))
        if room >= left:
            return
        present = searcher.stage.name
        begun = present if searcher.stage_epoch else None  # a stage that has not begun keeps an epoch
        kept = {
            name: max(0 if name == begun else 1, math.floor(epochs * max(0, room) / left))
            for name, epochs in planned.items()
        }
        if kept == planned:
            return
        changes = kept | {present: kept[present] + searcher.stage_epoch}
        searcher.set_epochs(changes)
        told = ", ".join(f"{name} {number}" for name, number in changes.items())
        self.stage.amend(self.stage.plan.amended(f"search: {told}", f"time, seen after epoch {searcher.epoch}"))

"""The one loop of every architecture search: stages of epochs of steps, resumable at the end of any epoch.

Recipe of Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv:1806.09055: weights by SGD with
momentum and a cosine learning rate, architecture parameters by Adam,

    lr(p) = lr_min + (lr - lr_min) (1 + cos(pi p)) / 2,    p in [0, 1] the progress of the stage.

A method is a supernet, an objective, a step of :mod:`netwright.search.bilevel`, stages and a selector. It is used as
``search(train, val, seed=0)``, through Lightning (:class:`netwright.search.lightning.SearchModule`), or in a loop of
one's own, and all three call the same :meth:`Searcher.step`::

    searcher.prepare(seed=0, steps_per_epoch=len(train))
    while not searcher.finished:
        for train_batch, val_batch in Pairs(train, val, searcher):
            searcher.step(train_batch, val_batch)
        searcher.end_epoch()
    result = searcher.result()
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from netwright.checks import number, whole
from netwright.console import task
from netwright.data.splits import split_train
from netwright.search import SELECTORS
from netwright.search.arguments import refuse_unknown
from netwright.search.bilevel import FirstOrder, Step
from netwright.search.objective import Objective, TaskLoss
from netwright.search.pairs import Pairs, to_device
from netwright.search.protocol import alphas_of, weights_of
from netwright.search.result import SearchResult, expected_macs
from netwright.search.selection import TuningSelector
from netwright.search.stages import Stage
from netwright.seeding import seeded

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.genotype import Genotype
    from netwright.search.protocol import Searchable
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet


@dataclass(frozen=True)
class EpochEnd:
    """What ``on_epoch`` receives after each epoch.

    Attributes:
        searcher: The searcher; its ``state_dict()`` may be saved and its ``set_epochs()`` called here.
        epoch, epochs: Epochs done and epochs planned, over all stages.
        stage: Name of the stage that the epoch belonged to.
        figures: Means of the epoch.
        genotype: What the architecture parameters say now.
    """

    searcher: Searcher
    epoch: int
    epochs: int
    stage: str
    figures: dict[str, float]
    genotype: Genotype


class Searcher:
    """Base of every gradient-based search.

    A searcher is one search: it goes on from where it is, and a second search needs a second one.

    Args:
        supernet: The network with the choices: a :class:`netwright.search.supernet.Supernet`, or any module of
            :class:`netwright.search.protocol.Searchable`.
        objective: Loss of both parts; cross-entropy by default.
        selector: How the genotype is read off at the end; the space's own rule by default.
        method: The step; first order by default.
        stages: What is trained when; names must differ.
        momentum: Momentum of the weights' SGD, in [0, 1).
        clip: Largest gradient norm of the weights; ``None`` clips nothing.
        alpha_lr, alpha_betas, alpha_weight_decay: Adam of the architecture parameters.

    Attributes:
        w_opt, a_opt: The two optimisers.
        epoch: Epochs done, over all stages.
        restarts: Whether the optimiser of the weights forgets its momentum where a stage begins.

    Raises:
        ValueError: If a value is out of range, two stages share a name, there are no architecture parameters, or the
            objective asks what the supernet cannot tell.
        TypeError: If an argument is unknown to the class that is called.
    """

    shares: ClassVar[tuple[float, ...]] = (1.0,)
    """Share of the epochs of a short search that each part of it gets."""
    restarts: ClassVar[bool] = True
    architecture_share: float = 0.5
    """Share of the training data that trains the architecture, in (0, 1)."""
    settled: ClassVar[Mapping[str, str]] = {}
    """What a method that hands its ``**options`` on takes no argument for, and why."""
    selectors: ClassVar[tuple[str, ...]] = SELECTORS
    """Names of the selectors that have a meaning after it."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuses unknown options in the name of the class that is called, wherever they would be found out."""
        refuse_unknown(cls, options)
        return super().__new__(cls)

    def __init__(
        self,
        supernet: Supernet | Searchable,
        *,
        objective: Objective | None = None,
        selector: Selector | None = None,
        method: Step | None = None,
        stages: Sequence[Stage] = (Stage(),),
        momentum: float = 0.9,
        clip: float | None = 5.0,
        alpha_lr: float = 3e-4,
        alpha_betas: tuple[float, float] = (0.5, 0.999),
        alpha_weight_decay: float = 1e-3,
    ):
        self.stages = list(stages)
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"stages must be at least one, each with a name of its own, got {names}")
        if sum(stage.epochs for stage in self.stages) < 1:
            raise ValueError("stages must hold at least 1 epoch together, got 0")
        number("momentum", momentum, "[0, 1)")
        if clip is not None:
            number("clip", clip, "> 0")
        number("alpha_lr", alpha_lr, ">= 0")
        number("alpha_weight_decay", alpha_weight_decay, ">= 0")
        for beta in alpha_betas:
            number("alpha_betas", beta, "[0, 1)")
        alphas, weights = list(supernet.arch_parameters()), weights_of(supernet)
        if not alphas:
            raise ValueError("supernet must have architecture parameters, got none")
        self.supernet: Any = supernet
        self.selector, self.clip = selector, clip
        self.objective: Objective = objective or TaskLoss()
        for term in self.objective.terms:
            term.check(supernet)
        self.method: Step = method or FirstOrder()
        self.w_opt: torch.optim.Optimizer = torch.optim.SGD(weights, lr=self.stages[0].lr, momentum=momentum)
        self.a_opt: torch.optim.Optimizer = torch.optim.Adam(
            alphas, lr=alpha_lr, betas=alpha_betas, weight_decay=alpha_weight_decay
        )
        self.epoch = 0
        self.seed: int | None = None
        self._split: dict[str, Any] | None = None
        self._stage = self._stage_epoch = self._step = self._steps_per_epoch = 0
        self._progress = self._seconds = 0.0
        self._started = False
        self._shape: list[int] | None = None
        self._since = time.perf_counter()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._figures: list[dict[str, float]] = []
        self._alphas: list[dict[str, Tensor]] = []

    @classmethod
    def fits(cls, space: Any) -> None:
        """Refuses a space that the method cannot search; most search any.

        Raises:
            ValueError: If it cannot.
        """

    @classmethod
    def supernet_of(cls, space: Any, in_channels: int, num_classes: int, **options: Any) -> Supernet:
        """The supernet that the method searches on: the space's own, where it needs no other.

        Args:
            space: The space.
            in_channels: Channels of the images.
            num_classes: Number of classes.
            **options: As ``space.supernet`` takes them.

        Raises:
            ValueError: If the method cannot search the space.
        """
        supernet: Supernet = space.supernet(in_channels, num_classes, **options)
        return supernet

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """The method with the settings of a short search; one with settings of its own overrides this."""
        return cls(
            supernet,
            objective=brief.objective,
            selector=brief.selector,
            stages=[Stage("search", sum(brief.epochs), brief.lr)],
            alpha_lr=brief.alpha_lr,
        )

    @property
    def stage(self) -> Stage:
        """The present stage (the last one when the search is finished)."""
        return self.stages[self._stage]

    @property
    def epochs(self) -> int:
        """Epochs planned, over all stages."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def stage_epoch(self) -> int:
        """Epochs done of the present stage."""
        return self._stage_epoch

    @property
    def epochs_left(self) -> dict[str, int]:
        """Epochs left of the present stage and of those to come, by name."""
        left = {stage.name: stage.epochs for stage in self.stages[self._stage :]}
        return left | {self.stage.name: self.stage.epochs - self._stage_epoch}

    @property
    def finished(self) -> bool:
        """Whether every stage has had its epochs."""
        return self._started and self._stage == len(self.stages) - 1 and self._stage_epoch >= self.stage.epochs

    @property
    def progress(self) -> float:
        """Share of the whole search that is done, in [0, 1]."""
        before = sum(stage.epochs for stage in self.stages[: self._stage])
        return min(1.0, (before + self._progress * self.stage.epochs) / max(1, self.epochs))

    @property
    def seconds(self) -> float:
        """Wall time so far, over all sittings, in seconds; what lies between two epochs belongs to the later one."""
        return self._seconds + (time.perf_counter() - self._since if self._step else 0.0)

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        alpha = self.a_opt.param_groups[0]
        return {
            "searcher": type(self).__name__,
            "method": _settings(self.method),
            "objective": [type(term).__name__ for term in self.objective.terms],
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "momentum": self.w_opt.param_groups[0].get("momentum"),
            "clip": self.clip,
            "alpha_lr": alpha["lr"],
            "alpha_betas": list(alpha.get("betas", ())),
            "alpha_weight_decay": alpha["weight_decay"],
            "steps_per_epoch": self._steps_per_epoch,
            **({} if self._split is None else {"split": self._split}),
        }

    def split(self, labels: Any, *, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of the training examples for the weights and of those for the architecture, stratified.

        Share and seed then stand in the result's ``config["split"]``.

        Args:
            labels: One class an example, or a data set that has ``labels``.
            seed: Seed of the split.

        Example:
            >>> from netwright.search import FBNet, spaces
            >>> searcher = FBNet(spaces.get("micro-chain").supernet(1, 2))
            >>> [len(part) for part in searcher.split(torch.tensor([0, 1] * 50), seed=0)]
            [80, 20]
            >>> searcher.config()["split"]
            {'architecture_share': 0.2, 'seed': 0}
        """
        self._split = {"architecture_share": self.architecture_share, "seed": seed}
        return split_train(labels, self.architecture_share, seed)

    def set_epochs(self, epochs: int | Mapping[str, int]) -> None:
        """Changes the number of epochs, between two epochs; the learning rate then goes to its end by the new last one.

        Args:
            epochs: Epochs of the present stage, or of stages by name; never fewer than a stage has already had.

        Raises:
            ValueError: If a stage is unknown or past, or the number too small.
            RuntimeError: If it is called inside an epoch.
        """
        self._between_epochs("set_epochs")
        changes = {self.stage.name: epochs} if isinstance(epochs, int) else dict(epochs)
        names = [stage.name for stage in self.stages]
        for name, wanted in changes.items():
            if name not in names[self._stage :]:
                raise ValueError(f"stage must be one of {names[self._stage :]}, got {name!r}")
            least = self._stage_epoch if name == self.stage.name else 0
            if wanted < least:
                raise ValueError(f"epochs of stage {name!r} must be >= {least}, got {wanted}")
        if sum(changes.get(stage.name, stage.epochs) for stage in self.stages) < 1:
            raise ValueError("stages must hold at least 1 epoch together, got 0")
        for name, wanted in changes.items():
            place = names.index(name)
            self.stages[place] = dataclasses.replace(self.stages[place], epochs=wanted)
        if self._started:
            self._advance()

    def prepare(self, *, seed: int, steps_per_epoch: int) -> None:
        """Starts the search, or goes on with it in a new sitting.

        Args:
            seed: Seed of all that is random in the search itself.
            steps_per_epoch: Training batches of an epoch.

        Raises:
            ValueError: If the search was started with another seed, or ``steps_per_epoch`` is below 1.
        """
        whole("steps_per_epoch", steps_per_epoch, ">= 1")
        if self._started and seed != self.seed:
            raise ValueError(f"seed must be {self.seed}, with which this search was started, got {seed}")
        self._steps_per_epoch, self._since = steps_per_epoch, time.perf_counter()
        if not self._started:
            self.seed, self._started = seed, True
            self._alphas.append(self._alpha())
            self._enter(0)
            self._advance()
        self.supernet.train()

    def enter(self, name: str) -> None:
        """Goes to the next stage now, whatever epochs the present one still had.

        Raises:
            RuntimeError: If the search is not prepared, inside an epoch, or ``name`` is not the next stage.
        """
        self._between_epochs("enter")
        if not self._started:
            raise RuntimeError("prepare() must come before enter()")
        following = [stage.name for stage in self.stages[self._stage + 1 : self._stage + 2]]
        if [name] != following:
            raise RuntimeError(f"after stage {self.stage.name!r} comes {following or 'none'}, got {name!r}")
        self.stages[self._stage] = dataclasses.replace(self.stage, epochs=self._stage_epoch)
        self._enter(self._stage + 1)

    def _enter(self, index: int) -> None:
        self._stage, self._stage_epoch, self._progress = index, 0, 0.0
        if self.restarts:
            self.w_opt.state.clear()
        self.schedule()
        self.begin_stage(self.stage)
        self.objective.on_stage(self.supernet)

    def schedule(self) -> None:
        """Gives the optimiser of the weights learning rate and weight decay of the moment; called before every step."""
        for group in self.w_opt.param_groups:
            group["weight_decay"], group["lr"] = self.stage.weight_decay, self.stage.lr_at(self._progress)

    def _advance(self) -> None:
        while self._stage_epoch >= self.stage.epochs and self._stage + 1 < len(self.stages):
            self._enter(self._stage + 1)

    def begin_stage(self, stage: Stage) -> None:
        """Called once when a stage is entered; a method of several stages changes the supernet here."""

    def restore_stage(self, stage: Stage) -> None:
        """Called when a state inside ``stage`` is loaded: what :meth:`begin_stage` does, without touching values."""

    def epoch_figures(self, genotype: Genotype) -> dict[str, float]:
        """What a method adds to the figures of an epoch at its end; ``genotype`` is what alpha says then."""
        return {}

    def step(
        self,
        train_batch: Any,
        val_batch: Any,
        *,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    ) -> dict[str, float]:
        """One step of the present stage on a training and a validation batch; returns its figures.

        Args:
            train_batch, val_batch: ``(inputs, labels, ...)``; moved to the supernet's device. A step in phases takes
                one of them, and None for the other.
            optimizers: Stand-ins for ``(w_opt, a_opt)``, as Lightning wraps them.

        Raises:
            RuntimeError: If the search is not prepared, or is finished.
            FloatingPointError: If a loss, a gradient or an architecture parameter is not finite.
        """
        if not self._started or self.finished:
            raise RuntimeError("the search is finished" if self._started else "prepare() must come before step()")
        stage, seed = self.stage, self.seed or 0
        moves = stage.moves(self._progress)
        w_opt, a_opt = optimizers or (self.w_opt, self.a_opt)
        self.schedule()
        self.objective.on_step(self.supernet, self.progress)
        device = next(iter(self.supernet.parameters())).device
        train_batch, val_batch = to_device(train_batch, device), to_device(val_batch, device)
        if isinstance(x := (val_batch if train_batch is None else train_batch)[0], Tensor) and x.ndim == 4:
            self._shape = list(x.shape[1:])
        try:
            # Dropout and sampling gates draw from the global generator: a stream for each step makes them resumable.
            with seeded(seed, "search", self.epoch, self._step):
                figures = self.method.step(
                    self.supernet,
                    self.objective,
                    w_opt,
                    a_opt if moves else None,
                    train_batch,
                    val_batch if moves else None,
                    clip=self.clip,
                )
        except FloatingPointError as error:
            place = f"stage {stage.name!r}, epoch {self.epoch + 1}, step {self._step + 1}"
            raise FloatingPointError(f"{error} ({place})") from error
        if train_batch is not None:
            left = (stage.epochs - self._stage_epoch) * self._steps_per_epoch - self._step
            self._progress += (1 - self._progress) / max(1, left)
        self._step += 1
        for name, value in {**figures, "lr": self.w_opt.param_groups[0]["lr"]}.items():
            self._sums[name] += value
            self._counts[name] += 1
        return figures

    def validate(self, validation: Any) -> dict[str, float]:
        """What a method measures at the end of an epoch on the batches that train the architecture."""
        return {}

    def end_epoch(self, validation: Any = None) -> EpochEnd:
        """Closes an epoch: means of its figures, the architecture so far, and the next stage when it is time.

        Args:
            validation: The batches that train the architecture, for methods that measure on them, like ProxylessNAS;
                None measures nothing.

        Raises:
            RuntimeError: If the epoch had no step.
        """
        if self._step == 0:
            raise RuntimeError("an epoch must have at least 1 step, got 0")
        genotype, stage = self.supernet.derive(), self.stage.name
        figures = {name: total / self._counts[name] for name, total in self._sums.items()}
        for name, share in figures.items():
            if name.endswith("_skipped") and share == 1.0:
                raise FloatingPointError(
                    f"no step of epoch {self.epoch + 1} (stage {stage!r}) had a finite {name.split('_')[0]} gradient; "
                    "a smaller learning rate may help"
                )
        skipped = {"skip_share": genotype.skip_share} if hasattr(genotype, "skip_share") else {}
        figures |= {"stage": float(self._stage), **skipped, **self.epoch_figures(genotype)}
        if validation is not None:
            with seeded(self.seed or 0, "search", self.epoch, "validation"):
                figures |= self.validate(validation)
        self._figures.append(figures)
        self._alphas.append(self._alpha())
        self._sums.clear()
        self._counts.clear()
        self._step = 0
        self.epoch += 1
        self._stage_epoch += 1
        self.objective.on_epoch(self.supernet)
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._advance()
        return EpochEnd(self, self.epoch, self.epochs, stage, figures, genotype)

    def search(
        self, train: Any, val: Any, *, seed: int, on_epoch: Callable[[EpochEnd], object] | None = None
    ) -> SearchResult:
        """Runs the search to its end, from where it is.

        Args:
            train, val: Sized iterables of batches ``(inputs, labels)`` of the two halves of the training data, such as
                :class:`netwright.data.tensors.Batches`.
            seed: Seed of all that is random in the search itself; loaders and supernet have their own.
            on_epoch: Called after each epoch.

        Raises:
            ValueError: If a loader is missing or empty, or ``seed`` is not the one the search was started with.
            FloatingPointError: If a loss, a gradient or an architecture parameter is not finite.
        """
        pairs = Pairs(train, val, self)
        self.prepare(seed=seed, steps_per_epoch=len(train))
        with task("search", total=self.epochs) as bar:
            while not self.finished:
                for train_batch, val_batch in pairs:
                    self.step(train_batch, val_batch)
                    share = self.epoch + min(1.0, self._step / len(pairs))
                    bar.update(share, total=self.epochs)
                ended = self.end_epoch(val)
                if on_epoch is not None:
                    on_epoch(ended)
                bar.update(self.epoch, total=self.epochs, message=_message(ended))
        return self.result(train, val)

    def result(self, train: Any = None, val: Any = None) -> SearchResult:
        """What the search has found so far; selectors that measure or tune need the two loaders."""
        return SearchResult(
            genotype=self._selected(train, val),
            alpha_history=tuple(self._alphas),
            cost=self._cost(),
            seed=self.seed or 0,
            wall_time=self.seconds,
            config=self.config(),
            skip_share=tuple(figures["skip_share"] for figures in self._figures if "skip_share" in figures),
            epochs=tuple(self._figures),
        )

    def _selected(self, train: Any, val: Any) -> Genotype:
        if self.selector is None:
            return self.supernet.derive()
        if isinstance(self.selector, TuningSelector):
            return self.selector.select_after(self, train, val)
        return self.selector.select(self.supernet, train, val, seed=self.seed or 0)

    def _cost(self) -> dict[str, float]:
        if self._shape is None or not hasattr(self.supernet, "operations"):
            return {}
        channels, height, width = self._shape
        return {"expected_macs": expected_macs(self.supernet, (channels, height, width))}

    def _alpha(self) -> dict[str, Tensor]:
        return {name: alpha.detach().cpu().clone() for name, alpha in alphas_of(self.supernet).items()}

    def _between_epochs(self, what: str) -> None:
        if self._step:
            raise RuntimeError(f"{what} must be called between two epochs, got step {self._step} of one")

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """A copy of all that the rest of the search depends on, as plain values and tensors, at the end of an epoch.

        Args:
            tensors: Whether supernet and optimisers are part of it; Lightning's checkpoints hold them already.

        Raises:
            RuntimeError: If it is called inside an epoch.
        """
        self._between_epochs("state_dict")
        state: dict[str, Any] = {
            "searcher": type(self).__name__,
            "seed": self.seed,
            "stage": self.stage.name,
            "stage_epoch": self._stage_epoch,
            "progress": self._progress,
            "epoch": self.epoch,
            "epochs": {stage.name: stage.epochs for stage in self.stages},
            "seconds": self._seconds,
            "shape": self._shape,
            "figures": self._figures,
            "alphas": self._alphas,
            "objective": self.objective.state_dict(),
        }
        if callable(kept := getattr(self.method, "state_dict", None)):
            state["method"] = kept()
        if tensors:
            state["supernet"] = dict(self.supernet.state_dict())
            state["w_opt"], state["a_opt"] = self.w_opt.state_dict(), self.a_opt.state_dict()
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved state; the search continued from it is bit-equal to one that never stopped.

        Raises:
            ValueError: If the state is of another kind of searcher or has other stages.
        """
        names = [stage.name for stage in self.stages]
        if state["searcher"] != type(self).__name__ or list(state["epochs"]) != names:
            raise ValueError(
                f"state must be of a {type(self).__name__} with stages {names}, "
                f"got a {state['searcher']} with {list(state['epochs'])}"
            )
        state = copy.deepcopy(dict(state))
        self.stages = [dataclasses.replace(s, epochs=state["epochs"][s.name]) for s in self.stages]
        self._stage, self._stage_epoch = names.index(state["stage"]), state["stage_epoch"]
        self._progress, self._seconds = state["progress"], state["seconds"]
        self.epoch, self.seed, self._started = state["epoch"], state["seed"], state["seed"] is not None
        self._figures, self._alphas, self._step = state["figures"], state["alphas"], 0
        self._shape = state["shape"]
        self._sums.clear()
        self._counts.clear()
        if self._started:
            self.restore_stage(self.stage)
        if "supernet" in state:
            self.supernet.load_state_dict(state["supernet"])
            self.w_opt.load_state_dict(state["w_opt"])
            self.a_opt.load_state_dict(state["a_opt"])
        self.objective.load_state_dict(state["objective"])
        if callable(load := getattr(self.method, "load_state_dict", None)):
            load(state["method"])


def _settings(method: Step) -> dict[str, Any]:
    """Name and public attributes of a step, and of the step inside it; what it remembers is private."""
    public = {name: value for name, value in vars(method).items() if not name.startswith("_")}
    return {
        "name": type(method).__name__,
        **{
            name: _settings(value) if callable(getattr(value, "step", None)) else value
            for name, value in public.items()
        },
    }


def _message(ended: EpochEnd) -> str:
    losses = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in ended.figures.items() if name.endswith("loss")]
    share = [f"skip share {ended.figures['skip_share']:.2f}"] if "skip_share" in ended.figures else []
    return ", ".join([*losses, *share])

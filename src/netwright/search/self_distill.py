"""SD-DARTS: the supernet of several steps ago teaches the supernet of now.

Zhu, Li, Liu and Wang, "Improving Differentiable Architecture Search via Self-Distillation", Neural Networks 2023,
arXiv:2302.05629.

    L = CE(z, y) + lambda(t) T^2 KL(q || softmax(z / T)),    q = (1 / K) sum_k softmax(z^k / T)

where z^k are the logits of the supernet, weights and alphas, of k E steps ago. Holding recent predictions together
limits how steep the path of the search may be, and so the sharpness of the minimum in which it ends, of which what is
lost by discretisation is made. A term of one teacher, with logits kept from earlier epochs in place of a second pass,
is that of Du et al., "Sharpness-Aware Training for Free", NeurIPS 2022, arXiv:2205.14083: ``preset="saf"``.

Which loss carries the term, K, E, T, the ramp of lambda and how teachers vote are netwright's choice: the paper's
abstract names voting teachers, and no code is public.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from netwright.checks import number, one_of, whole
from netwright.nn.batchnorm import frozen_statistics
from netwright.search.darts import DARTS
from netwright.search.objective import Evaluation, Objective, Part, TaskLoss
from netwright.train.distillation import distillation_loss

if TYPE_CHECKING:
    from netwright.search.protocol import Searchable
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet

Vote = Literal["soft", "hard", "weighted"]
Store = Literal["state", "cache"]


class SnapshotTeachers:
    """The last few snapshots of a network, which vote on what it should predict.

    A snapshot is a copy of every parameter and buffer (``store="state"``), whose predictions cost a forward pass each
    in the network's own mode, or the logits that the network gave in its own passes (``store="cache"``), which costs
    memory for each example instead and needs their indices. Passes of teachers run one after the other: vectorised
    over teachers by :func:`torch.func.vmap` they take twice as long on a processor (``benchmarks/search_teachers.py``).

    Args:
        k: Snapshots that vote, at least 1.
        every: Steps from one snapshot to the next, or ``"epoch"``.
        vote: ``"soft"`` is the mean of probabilities, ``"hard"`` the shares of votes for each class, ``"weighted"`` the
            mean by validation accuracy: that of the network's own passes before the snapshot was taken.
        store: What a snapshot holds.
        delay: Newest snapshots that do not vote yet: with one an epoch, the logits that the network is held to are
            ``delay + 1`` epochs old.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> network, teachers = nn.Linear(2, 3), SnapshotTeachers(k=2)
        >>> x = torch.ones(1, 2)
        >>> teachers.probs(network, x, T=1.0) is None
        True
        >>> teachers.push(network)
        >>> before = network(x).softmax(1)
        >>> _ = network.weight.data.mul_(5.0)
        >>> torch.equal(teachers.probs(network, x, T=1.0), before)
        True
    """

    def __init__(
        self,
        k: int = 3,
        every: int | Literal["epoch"] = "epoch",
        vote: Vote = "soft",
        store: Store = "state",
        *,
        delay: int = 0,
    ):
        whole("k", k, ">= 1")
        if isinstance(every, str):
            if every != "epoch":
                raise ValueError(f"every must be 'epoch' or a whole number >= 1, got {every!r}")
        else:
            whole("every", every, ">= 1")
        for name, value, allowed in (("vote", vote, get_args(Vote)), ("store", store, get_args(Store))):
            one_of(name, value, allowed)
        whole("delay", delay, ">= 0")
        self.k, self.every, self.vote, self.store, self.delay = k, every, vote, store, delay
        self._snapshots: deque[dict[str, Tensor]] = deque(maxlen=k + delay)
        self._accuracies: deque[float] = deque(maxlen=k + delay)
        self._tables: dict[str, Tensor] = {}
        self._right = self._judged = 0

    @property
    def voting(self) -> int:
        """How many snapshots vote now."""
        return max(0, len(self._snapshots) - self.delay)

    def clear(self) -> None:
        """Forgets every snapshot."""
        self.load_state_dict({})

    @torch.no_grad()
    def push(self, module: nn.Module) -> None:
        """Takes a snapshot: of the module's parameters and buffers, or of the logits recorded since the last one."""
        if self.store == "state":
            named = (*module.named_parameters(), *module.named_buffers())
            self._snapshots.append({name: value.detach().clone() for name, value in named})
        else:
            self._snapshots.append({part: _gathered(table) for part, table in self._tables.items()})
            self._tables = {}
        self._accuracies.append(self._right / self._judged if self._judged else 0.0)
        self._right = self._judged = 0

    @torch.no_grad()
    def record(
        self,
        logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, "batch"] | None = None,
        *,
        index: Int[Tensor, "batch"] | None = None,
        part: Part = "weights",
    ) -> None:
        """Notes what the network said in a pass of its own, for the next snapshot.

        Args:
            logits: Its output.
            labels: The truth; what it got right of validation batches weighs a vote.
            index: Numbers of the examples in their data set, for ``store="cache"``.
            part: ``"weights"`` for training batches, ``"alpha"`` for validation batches: two data sets.

        Raises:
            ValueError: If logits are to be kept and there is no index, or the number of classes has changed.
        """
        if self.vote == "weighted" and labels is not None and part != "weights":
            self._right += int((logits.argmax(1) == labels).sum())
            self._judged += len(labels)
        if self.store == "state":
            return
        rows = _checked(index, len(logits))
        table = self._tables.get(part, logits.new_empty(0, logits.shape[1]))
        if table.shape[1] != logits.shape[1]:
            raise ValueError(f"logits must have {table.shape[1]} classes as those before, got {logits.shape[1]}")
        table = _grown(table, int(rows.max()) + 1 if len(rows) else 0)
        table[rows.to(table.device)] = logits.detach().to(table)
        self._tables[part] = table

    @torch.no_grad()
    def probs(
        self,
        module: nn.Module,
        x: Tensor,
        T: float,
        *,
        index: Int[Tensor, "batch"] | None = None,
        part: Part = "weights",
    ) -> Float[Tensor, "batch classes"] | None:
        """What the snapshots vote for, or None while there is none to vote.

        Neither the module's statistics nor the stream of random numbers is touched. A row is all zeros for an example
        of which no snapshot has logits.

        Args:
            module: The network; with ``store="state"`` it runs with each snapshot's values.
            x: Inputs of the network.
            T: Temperature, > 0.
            index, part: As in :meth:`record`.

        Raises:
            ValueError: If ``T`` is not positive, or there is no index for logits that were kept.
        """
        number("T", T, "> 0")
        snapshots = list(self._snapshots)[: self.voting]
        if not snapshots:
            return None
        if self.store == "state":
            with torch.random.fork_rng(enabled=module.training), frozen_statistics(module):
                logits = torch.stack([functional_call(module, state, (x,)) for state in snapshots])
        else:
            rows = _checked(index, len(x))
            known = [state[part] for state in snapshots if part in state]
            if not known or not len(rows):
                return None
            tables = [state.get(part, known[0][:0]) for state in snapshots]
            logits = torch.stack([_grown(table, int(rows.max()) + 1)[rows.to(table.device)] for table in tables])
        return self._count(logits, T)

    def _count(self, logits: Float[Tensor, "teachers batch classes"], T: float) -> Float[Tensor, "batch classes"]:
        known = ~logits.isnan().any(2, keepdim=True)
        if self.vote == "hard":
            votes = functional.one_hot(logits.nan_to_num().argmax(2), logits.shape[2]).to(logits.dtype)
        else:
            votes = (logits / T).softmax(2)
        weights = known.to(logits.dtype)
        if self.vote == "weighted":
            accuracies = logits.new_tensor(list(self._accuracies)[: len(logits)])
            # Without validation batches nobody knows better.
            weights = (
                weights * (accuracies if bool(accuracies.sum() > 0) else torch.ones_like(accuracies))[:, None, None]
            )
        total = (weights * votes.where(known, 0.0)).sum(0)
        return total / weights.sum(0).clamp_min(torch.finfo(logits.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, and what was recorded for the next one, as plain values and tensors."""
        return {
            "snapshots": [dict(state) for state in self._snapshots],
            "accuracies": list(self._accuracies),
            "tables": dict(self._tables),
            "right": self._right,
            "judged": self._judged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; nothing, from an empty mapping."""
        self._snapshots = deque(state.get("snapshots", ()), self._snapshots.maxlen)
        self._accuracies = deque(state.get("accuracies", ()), self._accuracies.maxlen)
        self._tables = dict(state.get("tables", {}))
        self._right, self._judged = state.get("right", 0), state.get("judged", 0)


def _checked(index: Tensor | None, count: int) -> Tensor:
    if index is None or index.shape != (count,):
        got = "none" if index is None else f"shape {tuple(index.shape)}"
        raise ValueError(
            f"index must hold the number of each of {count} examples in its data set when store='cache', as the third "
            f"part of the batches of Batches(..., indexed=True), got {got}"
        )
    return index


def _grown(table: Tensor, rows: int) -> Tensor:
    """The table with at least so many rows; those of examples not seen are NaN."""
    missing = rows - len(table)
    return table if missing <= 0 else torch.cat([table, table.new_full((missing, table.shape[1]), torch.nan)])


def _gathered(table: Tensor) -> Tensor:
    """The rows that all processes have seen: each sees a share of every batch, another one in the next epoch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return table
    rows = torch.tensor(len(table), device=table.device)
    torch.distributed.all_reduce(rows, torch.distributed.ReduceOp.MAX)
    table = _grown(table, int(rows))
    seen = (~table.isnan().any(1, keepdim=True)).to(table.dtype)
    both = torch.cat([table.nan_to_num() * seen, seen], dim=1)
    torch.distributed.all_reduce(both)
    return torch.where(both[:, -1:] > 0, both[:, :-1] / both[:, -1:], torch.nan)


class _Preset(NamedTuple):
    lam: float
    T: float
    ramp: float
    start: int  # epochs before the term is switched on
    k: int
    store: Store
    delay: int


_PRESETS: dict[str | None, _Preset] = {
    None: _Preset(lam=1.0, T=2.0, ramp=0.5, start=0, k=3, store="state", delay=0),
    # arXiv:2205.14083 and its code: logits of three epochs ago, from the sixth epoch on.
    "saf": _Preset(lam=0.3, T=5.0, ramp=0.0, start=5, k=1, store="cache", delay=2),
}


class SelfDistillation(Objective):
    """Asks a network to agree with its own snapshots.

    A term like any other, ``TaskLoss() + SelfDistillation()``; used alone it stands for that sum. It serves any search,
    and any training loop that calls :meth:`on_step` before a step and :meth:`on_epoch` after an epoch, and the loss as
    ``objective(network, batch)`` in between. Snapshots are forgotten when a stage of a search begins, since the same
    weights may then make another function.

    Args:
        lam: Weight lambda of the term at its full height, >= 0; at 0 it changes nothing, to the bit.
        T: Temperature, > 0.
        teachers: The snapshots; by default those of the preset.
        ramp: Share of the run over which lambda rises linearly from 0, in [0, 1].
        apply_to: Whether the term is part of the training loss (``"weights"``), of the architecture's (``"alpha"``), or
            of both; a loss of part ``"both"`` always has it.
        preset: ``"saf"`` is sharpness-aware training for free: lambda 0.3, T 5, no ramp, from the sixth epoch on, and
            one teacher, the logits kept three epochs ago. It needs batches with indices. What is also given
            explicitly comes before it. By default lambda 1, T 2, a ramp of 0.5 and three snapshots of the state, one
            an epoch.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> term = SelfDistillation(lam=0.5, ramp=0.0, teachers=SnapshotTeachers(k=1))
        >>> network, batch = nn.Linear(2, 2), (torch.ones(1, 2), torch.tensor([1]))
        >>> term.on_epoch(network)
        >>> _ = network.weight.data.neg_()
        >>> bool(term(network, batch) > TaskLoss()(network, batch))
        True
    """

    def __init__(
        self,
        lam: float | None = None,
        T: float | None = None,
        teachers: SnapshotTeachers | None = None,
        ramp: float | None = None,
        apply_to: Part = "both",
        preset: Literal["saf"] | None = None,
    ):
        if preset not in _PRESETS:
            raise ValueError(f"preset must be 'saf' or None, got {preset!r}")
        chosen = _PRESETS[preset]
        self.lam = chosen.lam if lam is None else lam
        self.T = chosen.T if T is None else T
        self.ramp = chosen.ramp if ramp is None else ramp
        number("lam", self.lam, ">= 0")
        number("T", self.T, "> 0")
        number("ramp", self.ramp, "[0, 1]")
        one_of("apply_to", apply_to, get_args(Part))
        self.teachers = teachers or SnapshotTeachers(chosen.k, store=chosen.store, delay=chosen.delay)
        self.apply_to, self.start = apply_to, chosen.start
        self._progress, self._steps, self._epochs = 0.0, 0, 0

    def __call__(self, supernet: nn.Module, batch: Any, part: Part = "weights") -> Float[Tensor, ""]:
        """The loss of one batch, with plain cross-entropy as the task."""
        return self.complete()(supernet, batch, part)

    def complete(self) -> Objective:
        """The term after plain cross-entropy."""
        return TaskLoss() + self

    @property
    def weight(self) -> float:
        """lambda(t), the present weight of the term.

        Example:
            >>> term = SelfDistillation(lam=2.0, ramp=0.5)
            >>> term.on_step(nn.Identity(), progress=0.125)
            >>> term.weight
            0.5
        """
        if self._epochs < self.start:
            return 0.0
        return self.lam * (min(1.0, self._progress / self.ramp) if self.ramp else 1.0)

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        own = {"lam": self.lam, "T": self.T, "ramp": self.ramp, "apply_to": self.apply_to, "start": self.start}
        return own | {name: getattr(self.teachers, name) for name in ("k", "every", "vote", "store", "delay")}

    def on_stage(self, supernet: nn.Module) -> None:
        """Forgets the snapshots of the stage before."""
        self.teachers.clear()

    def on_step(self, supernet: nn.Module, progress: float) -> None:
        """Takes up the progress, and a snapshot when so many steps have passed."""
        every = self.teachers.every
        if isinstance(every, int) and self._steps and self._steps % every == 0 and self.lam:
            self.teachers.push(supernet)
        self._progress = progress
        self._steps += 1

    def on_epoch(self, supernet: nn.Module) -> None:
        """Takes a snapshot when there is one an epoch."""
        self._epochs += 1
        if self.teachers.every == "epoch" and self.lam:
            self.teachers.push(supernet)

    def term(self, total: Float[Tensor, ""], seen: Evaluation) -> Float[Tensor, ""]:
        """The loss with the term, while there are snapshots and lambda is above 0."""
        if self.lam == 0:
            return total
        index = seen.batch[2] if len(seen.batch) > 2 else None
        probs = None
        if self.weight and seen.concerns(self.apply_to):
            probs = self.teachers.probs(seen.supernet, seen.batch[0], self.T, index=index, part=seen.part)
        self.teachers.record(seen.logits, seen.labels, index=index, part=seen.part)
        return total if probs is None else total + self.weight * distillation_loss(seen.logits, probs, self.T)

    def state_dict(self) -> dict[str, Any]:
        """Progress and snapshots, as plain values and tensors."""
        counts = {"progress": self._progress, "steps": self._steps, "epochs": self._epochs}
        return {**counts, "teachers": self.teachers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; the start, from an empty mapping."""
        self._progress, self._steps = state.get("progress", 0.0), state.get("steps", 0)
        self._epochs = state.get("epochs", 0)
        self.teachers.load_state_dict(state.get("teachers", {}))


class SDDARTS(DARTS):
    """DARTS whose two losses carry the term of :class:`SelfDistillation`; all else is DARTS's.

    Args:
        supernet: The network with the choices.
        distillation: The term; three snapshots, one an epoch, by default.
        order: 1 or 2, as in DARTS.
        objective: What the term is added to; cross-entropy by default.
        selector: How the genotype is read off at the end; the magnitude rule by default.
        **options: Those of :class:`netwright.search.darts.DARTS`.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> result = SDDARTS(supernet, epochs=2).search([batch], [batch], seed=0)
        >>> result.config["distillation"]["k"]
        3
    """

    def __init__(
        self,
        supernet: Supernet | Searchable,
        distillation: SelfDistillation | None = None,
        order: Literal[1, 2] = 1,
        objective: Objective | None = None,
        selector: Selector | None = None,
        **options: Any,
    ):
        self.distillation = distillation or SelfDistillation()
        loss = (TaskLoss() if objective is None else objective.complete()) + self.distillation
        super().__init__(supernet, order, loss, selector, **options)

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return {**super().config(), "distillation": self.distillation.config()}

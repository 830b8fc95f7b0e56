"""The steps of a chain: a student, two factors for a layer, zeros, few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from netwright.compress import low_rank, prune
from netwright.compress.distill import distill
from netwright.compress.exact import Scope
from netwright.compress.quantize import (
    DifferentiableQuantizer,
    NonuniformQuantizer,
    alternating_quantization,
    differentiable_quantization,
    post_training_quantize,
    quantized_distillation,
)
from netwright.compress.quantize.placing import Ranges, quantize_with
from netwright.compress.quantize.scaling import BucketScaler, check_bits
from netwright.nn.sparse import clone
from netwright.storage import tensors_digest

if TYPE_CHECKING:
    from netwright.train import Loader

POINT_RATE = 1e-5
RECOVERY = 0.3  # share of the steps of pruning that is left to recover in


@dataclass(frozen=True)
class Applied:
    """What a step made.

    Attributes:
        network: The network.
        ranks: Of each layer that the step made two, the rank.
    """

    network: nn.Module
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """How steps are trained.

    Attributes:
        data: Batches (x, labels); None trains nothing.
        epochs: Of every step, >= 1.
        lr: Learning rate of SGD at the start of every step, > 0.
        seed: Of everything random.

    Raises:
        ValueError: If a number is out of its range.
    """

    data: Loader | None = None
    epochs: int = 3
    lr: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")


@dataclass(frozen=True)
class Distill:
    """A smaller network that learns what the given one answers.

    Attributes:
        student: It; not changed.
    """

    student: nn.Module
    place: ClassVar[int] = 0
    name: ClassVar[str] = "distill"
    needs_data: ClassVar[bool] = True

    def facts(self) -> dict[str, Any]:
        """What decides the outcome: the student's weights."""
        return {"student": tensors_digest(self.student.state_dict())}

    def form(self, network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """A network such as :meth:`apply` gives, its weights still to be filled in."""
        return clone(self.student)

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """The trained student.

        Raises:
            ValueError: If there are no data.
        """
        student = clone(self.student)
        return Applied(distill(student, teacher, _required(self, how), epochs=how.epochs, lr=how.lr, seed=how.seed))


@dataclass(frozen=True)
class LowRank:
    """Layers as two factors (Maestro): trained by ordered dropout, cut to a budget, trained again.

    Attributes:
        share: Share of the network's parameters that is left at most, in (0, 1).
        lam: Weight of the penalty while ranks are learned.

    Raises:
        ValueError: If ``share`` is out of its range.
    """

    share: float = 0.5
    lam: float = 1e-4
    place: ClassVar[int] = 1
    name: ClassVar[str] = "low-rank"
    needs_data: ClassVar[bool] = False
    order_of_the_paper: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), got {self.share}")

    def facts(self) -> dict[str, Any]:
        """What decides the outcome."""
        return asdict(self)

    def form(self, network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """A network such as :meth:`apply` gives, its weights still to be filled in."""
        return low_rank.with_ranks(network, ranks)

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """A plain network of fewer parameters, and the ranks of its layers that are two now."""
        budget = int(self.share * sum(p.numel() for p in network.parameters()))
        low = low_rank.decompose(network)
        if how.data is not None:
            low_rank.fit_maestro(low, how.data, lam=self.lam, epochs=how.epochs, lr=how.lr, seed=how.seed)
        # By what a parameter brings: compared term by term, the first layers would end with one term each, although
        # theirs are the cheapest.
        paper = self.order_of_the_paper
        cut = low_rank.prune_to_budget(low, params=budget, hierarchical=paper, per_parameter=not paper)
        if how.data is not None:
            low_rank.recalibrate_batchnorm(cut, how.data)
        plain = low_rank.finalize(cut)
        if how.data is not None:
            distill(plain, teacher, how.data, epochs=how.epochs, lr=how.lr, seed=how.seed)
        return Applied(plain, low_rank.factored_ranks(cut))


@dataclass(frozen=True)
class Maestro(LowRank):
    """As :class:`LowRank`, with the paper's own order of terms when they are cut: each with all behind it.

    Attributes:
        share: As there.
        lam: As there.

    Raises:
        ValueError: If ``share`` is out of its range.
    """

    name: ClassVar[str] = "maestro"
    needs_data: ClassVar[bool] = True
    order_of_the_paper: ClassVar[bool] = True

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """A plain network of fewer parameters, and the ranks of its layers that are two now.

        Raises:
            ValueError: If there are no data.
        """
        _required(self, how)
        return super().apply(network, teacher, how)


@dataclass(frozen=True)
class Prune:
    """Zeros for the smallest weights: more and more of them, then the rest recovers.

    Attributes:
        sparsity: Share of zeros among the weights of convolutions and linear layers, in [0, 1).
        scope: As for :func:`netwright.compress.prune.magnitude`.

    Raises:
        ValueError: If ``sparsity`` is out of its range.
    """

    sparsity: float = 0.9
    scope: Scope = "lamp"
    place: ClassVar[int] = 2
    name: ClassVar[str] = "prune"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        prune.cubic_sparsity(0, 0, 1, 0.0, self.sparsity)

    def facts(self) -> dict[str, Any]:
        """What decides the outcome."""
        return asdict(self)

    def form(self, network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """A network such as :meth:`apply` gives, its weights still to be filled in."""
        return clone(network)

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """A plain network with zeros."""
        if how.data is None:
            return Applied(prune.remove(prune.magnitude(network, self.sparsity, self.scope)))
        from netwright.compress.callbacks import GradualPruning

        steps = how.epochs * len(how.data)
        end = max(1, round((1 - RECOVERY) * steps))
        ramp = GradualPruning(self.sparsity, 0, end, max(1, end // 10), scope=self.scope)
        distill(network, teacher, how.data, epochs=how.epochs, lr=how.lr, callbacks=[ramp], seed=how.seed)
        return Applied(prune.remove(network))


@dataclass(frozen=True)
class Quantize:
    """Weights of a few bits: quantised distillation, or rounding.

    Attributes:
        bits: 1..16.
        bucket_size: Weights that share a scale, >= 1; None for one scale a tensor.

    Raises:
        ValueError: If a number is out of its range.
    """

    bits: int = 4
    bucket_size: int | None = 256
    place: ClassVar[int] = 3
    name: ClassVar[str] = "quantize"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        BucketScaler(self.bucket_size)

    def facts(self) -> dict[str, Any]:
        """What decides the outcome."""
        return asdict(self)

    def form(self, network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """A network such as :meth:`apply` gives, its weights still to be filled in."""
        return post_training_quantize(network, self.bits, self.bucket_size)

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """The network with quantisers; zeros stay zeros. Without data, ends of least error serve from 2 bits on."""
        if how.data is None:
            ranges: Ranges = "mse" if self.bits > 1 else "minmax"
            return Applied(post_training_quantize(network, self.bits, self.bucket_size, ranges=ranges))
        return Applied(quantized_distillation(network, teacher, how.data, lr=how.lr, **self._settings(how)))

    def _settings(self, how: Training) -> dict[str, Any]:
        """What every training of such weights is told."""
        return {"bits": self.bits, "bucket_size": self.bucket_size, "epochs": how.epochs, "seed": how.seed}


@dataclass(frozen=True)
class LearnLevels(Quantize):
    """Weights of a few bits whose levels are learned while the weights stay: differentiable quantization.

    Attributes:
        bits: As for :class:`Quantize`.
        bucket_size: As there.
        points_lr: Learning rate of the levels, > 0.

    Raises:
        ValueError: If a number is out of its range.
    """

    points_lr: float = POINT_RATE
    name: ClassVar[str] = "differentiable-quantization"
    needs_data: ClassVar[bool] = True
    quantizer: ClassVar[type[DifferentiableQuantizer] | type[NonuniformQuantizer]] = DifferentiableQuantizer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.points_lr > 0:
            raise ValueError(f"points_lr must be > 0, got {self.points_lr}")

    def form(self, network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """A network such as :meth:`apply` gives, its weights still to be filled in."""

        def make(parameter: Tensor, kept: Tensor | None, number: int) -> DifferentiableQuantizer | NonuniformQuantizer:
            return self.quantizer(parameter, 2**self.bits, self.bucket_size, kept=kept)

        return quantize_with(network, make)[0]

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """The network with quantisers; zeros stay zeros.

        Raises:
            ValueError: If there are no data.
        """
        data = _required(self, how)
        return Applied(differentiable_quantization(network, data, lr=self.points_lr, **self._settings(how)))


@dataclass(frozen=True)
class Alternate(LearnLevels):
    """Weights of a few bits, they and their levels trained in turn, epoch by epoch: alternating quantization.

    Attributes:
        bits: As for :class:`Quantize`.
        bucket_size: As there.
        points_lr: As for :class:`LearnLevels`.

    Raises:
        ValueError: If a number is out of its range.
    """

    name: ClassVar[str] = "alternating-quantization"
    quantizer: ClassVar[type[DifferentiableQuantizer] | type[NonuniformQuantizer]] = NonuniformQuantizer

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> Applied:
        """The network with quantisers; zeros stay zeros.

        Raises:
            ValueError: If there are no data.
        """
        data, settings = _required(self, how), self._settings(how)
        return Applied(
            alternating_quantization(network, teacher, data, lr=how.lr, points_lr=self.points_lr, **settings)
        )


Step = Distill | LowRank | Prune | Quantize


def _required(step: Step, how: Training) -> Loader:
    if how.data is None:
        raise ValueError(f"{step.name} needs training data, got none")
    return how.data

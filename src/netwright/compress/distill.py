"""Distillation: a student learns what a teacher would answer, beside what is right.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531; with the weights and
the temperature of Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018,
arXiv:1802.05668:

    L = w T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)) + (1 - w) CE(z_student, y)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of
from netwright.nn.modes import in_mode
from netwright.train.distillation import distillation_loss

if TYPE_CHECKING:
    import lightning

    from netwright.train import Loader

Reduction = Literal["batchmean", "official"]
_M = TypeVar("_M", bound=nn.Module)


class DistillationLoss(nn.Module):
    """The teacher's answers and the labels together, averaged over the batch, in nats.

    Args:
        temperature: T > 0, finite, of both softmaxes.
        weight: w in [0, 1], of the teacher's term.
        reduction: ``"batchmean"``; ``"official"`` also divides the teacher's term by the number of classes, as the
            authors' code does.

    Raises:
        ValueError: If an argument is out of its range; in ``forward``, if student and teacher differ in shape.

    Example:
        >>> loss = DistillationLoss(temperature=1.0, weight=1.0)
        >>> logits = torch.randn(4, 3)
        >>> abs(loss(logits, logits, torch.tensor([0, 1, 2, 0])).item()) < 1e-6
        True
    """

    def __init__(self, temperature: float = 2.0, weight: float = 0.7, reduction: Reduction = "batchmean"):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {weight}")
        one_of("reduction", reduction, get_args(Reduction))
        self.temperature, self.weight, self.reduction = float(temperature), float(weight), reduction

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, "batch"],
    ) -> Float[Tensor, ""]:
        """The loss; no gradient flows into the teacher."""
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"teacher_logits must have the shape {tuple(student_logits.shape)} of the student's, got "
                f"{tuple(teacher_logits.shape)}"
            )
        probs = (teacher_logits.detach() / self.temperature).softmax(1)
        taught = distillation_loss(student_logits, probs, self.temperature)
        if self.reduction == "official":
            taught = taught / student_logits.shape[1]
        return self.weight * taught + (1 - self.weight) * functional.cross_entropy(student_logits, labels)

    def extra_repr(self) -> str:
        """Temperature, weight and reduction."""
        return f"temperature={self.temperature:g}, weight={self.weight:g}, reduction={self.reduction!r}"


def distill(
    student: _M,
    teacher: nn.Module,
    data: Loader,
    *,
    epochs: int,
    loss: DistillationLoss | None = None,
    lr: float = 0.05,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    seed: int = 0,
) -> _M:
    """Trains a student, in place, on what a teacher answers.

    Args:
        student: Any network of as many classes.
        teacher: A trained network; in evaluation mode meanwhile, and without gradients.
        data: Batches (x, labels). Of ``netwright.data.Batches`` without augmentation the teacher answers once for each
            example, not once an epoch.
        epochs: At least 1.
        loss: By default with temperature 2 and weight 0.7.
        lr: Learning rate of SGD with Nesterov momentum; without effect when there is an optimiser.
        optimizer: Makes another optimiser from the trainable parameters. Its learning rate, too, follows a cosine to 0.
        callbacks: More of Lightning's.
        seed: Of everything random.

    Returns:
        The student.

    Raises:
        ValueError: If student and teacher have different numbers of classes.

    Example:
        >>> from netwright.data import Batches, TensorImages
        >>> images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8)
        >>> data = Batches(TensorImages(images, (images.float().mean((1, 2, 3)) > 127).long()), 16)
        >>> teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
        >>> type(distill(student, teacher, data, epochs=1)).__name__
        'Sequential'
    """
    from netwright.compress.callbacks import Distiller
    from netwright.train import fit
    from netwright.train.schedules import CosineProgress

    module = Distiller(student, teacher, loss or DistillationLoss(), lr=lr)
    # The Trainer leaves modes as they are, and a trained network is usually in evaluation mode.
    with in_mode(student, training=True):
        fit(
            module,
            module.prepared(data),
            epochs=epochs,
            optimizer=optimizer,
            callbacks=[*callbacks, CosineProgress()],
            seed=seed,
            description="distillation",
        )
    return student

"""The loss of knowledge distillation: a student is asked to predict what a teacher predicts.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.

    T^2 KL(q || softmax(z / T)),    q = softmax(z_teacher / T)

The factor T^2 keeps the size of the gradient, T (softmax(z / T) - q) for each example, from shrinking as 1 / T^2 with
the temperature.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def distillation_loss(
    student_logits: Float[Tensor, "batch classes"], teacher_probs: Float[Tensor, "batch classes"], T: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 KL(teacher || student), averaged over the batch, in nats; 0 log 0 is 0.

    Args:
        student_logits: Logits z of the student.
        teacher_probs: Probabilities q of the teacher, at the same temperature; one-hot votes are allowed. An example
            whose row is all zeros has no teacher and adds nothing. No gradient flows into them.
        T: Temperature of the student, > 0.

    Raises:
        ValueError: If ``T`` is not positive, or the two do not have the same batch and classes.

    Example:
        >>> import torch
        >>> round(distillation_loss(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]])).item(), 6)
        0.130812
    """
    if not T > 0:
        raise ValueError(f"T must be > 0, got {T}")
    if student_logits.ndim != 2 or teacher_probs.shape != student_logits.shape:
        raise ValueError(
            f"teacher_probs must have the shape (batch, classes) of student_logits, {tuple(student_logits.shape)}, "
            f"got {tuple(teacher_probs.shape)}"
        )
    log_probs = (student_logits / T).log_softmax(1)
    return T**2 * functional.kl_div(log_probs, teacher_probs.detach(), reduction="batchmean")

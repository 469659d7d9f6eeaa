"""Knowledge distillation: the student learns the teacher's distribution beside the labels (Hinton et al. 2015).

    loss = (1 - alpha) * task + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))

T^2 keeps the gradient of the second term at the scale of the first (arXiv:1503.02531, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DistillConfig:
    """How much is learnt from the teacher; the same object goes to the function and to the callback.

    Args:
        temperature: T > 0; above 1 it shows more of what the teacher thinks of the wrong classes.
        alpha: weight in [0, 1] of the teacher's term; the task's loss keeps `1 - alpha`.

    Raises:
        ValueError: temperature <= 0 or alpha outside [0, 1].

    >>> DistillConfig(temperature=4.0)
    DistillConfig(temperature=4.0, alpha=0.5)
    """

    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; write temperature=2.0")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; write alpha=0.5")


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 * KL(teacher || student) of softened distributions, in nats, averaged over the positions of `mask`.

    Args:
        student_logits: [..., classes].
        teacher_logits: the same shape.
        mask: [...], true where a position counts; `None` counts all.

    Raises:
        ValueError: the shapes of the logits, or of the mask and the positions, differ.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation_loss(logits, logits, temperature=2.0).item()
    0.0
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}; "
            "they need the same classes (vocabulary) and the same inputs"
        )
    least = torch.finfo(torch.float32).min  # a class that a model rules out has probability 0, and 0 * inf is NaN
    student = torch.log_softmax(student_logits.float() / temperature, -1).clamp_min(least)
    teacher = torch.log_softmax(teacher_logits.float() / temperature, -1).clamp_min(least)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    if mask is None:
        return temperature**2 * divergence.mean()
    if mask.shape != divergence.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the positions {tuple(divergence.shape)}")
    mask = mask.to(divergence.dtype)
    return temperature**2 * (divergence * mask).sum() / mask.sum().clamp_min(1.0)


def combine(task_loss: Tensor, teacher_loss: Tensor, config: DistillConfig) -> Tensor:
    """(1 - alpha) * task + alpha * teacher."""
    return (1.0 - config.alpha) * task_loss + config.alpha * teacher_loss


def logits_of(output: Any) -> Tensor | None:
    """The logits in an output: `.logits`, `["logits"]`, or the output itself if it is a float tensor [.., n]."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2 else None


@contextmanager
def guest(teacher: nn.Module) -> Iterator[nn.Module]:
    """The teacher in eval mode and without gradients; its own state is put back afterwards (contract 9)."""
    modes = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    try:
        with torch.no_grad():
            yield teacher
    finally:
        for module, mode in modes:
            module.training = mode

"""The student as it was when pruning or quantization began: a teacher of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from .. import select
from ..quantize import unprepare_
from ..schedule import position
from .base import AccelCallback
from .pruning import Pruning
from .quantization import QuantizationAwareTraining


def check_begins(siblings: list[AccelCallback]) -> None:
    """Raises ValueError where nothing in the fit begins, or begins before there is a step."""
    if not any(isinstance(c, Pruning | QuantizationAwareTraining) for c in siblings):
        raise ValueError(
            "teacher='self' is the student as it was when pruning or quantization began, and neither is in this fit; "
            "add Pruning or QuantizationAwareTraining, or give a teacher"
        )
    if any(isinstance(c, Pruning) and c.cut_first for c in siblings):
        raise ValueError(
            "Pruning(cut_first=True) has cut the student before there is a step to take its weights in; give the "
            "whole one instead: teacher=copy.deepcopy(module.model)"
        )


def begins(siblings: list[AccelCallback], step: int) -> bool:
    """Whether pruning or quantization begins in this step."""
    for other in siblings:
        if isinstance(other, Pruning) and other.schedule.value(step + 1, other.total or 0.0) > 0:
            return True  # masks come with the step's end
        if isinstance(other, QuantizationAwareTraining) and step >= position(other.begin, other.total or 0.0):
            return True
    return False


def weights_of(student: nn.Module, trainer: pl.Trainer) -> dict[str, Tensor]:
    """Copies of the student's tensors, on all ranks those of the first: running statistics differ between them."""
    weights = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    if trainer.world_size > 1:
        parameters = {name for name, _ in student.named_parameters(remove_duplicate=False)}
        own = {name: tensor.cpu() for name, tensor in weights.items() if name not in parameters}
        for name, tensor in trainer.strategy.broadcast(own).items():
            weights[name].copy_(tensor)
    return weights


def network_of(student: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A float copy of the student with these weights; nothing of its fit is left in it."""
    teacher: Any = unprepare_(select.copy_model(student))
    for module in teacher.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _of_this_package(hook)]:
                del hooks[key]
    teacher.load_state_dict(weights)
    return teacher.requires_grad_(False)


def _of_this_package(hook: Any) -> bool:
    function = hook.func if isinstance(hook, partial) else hook
    return str(getattr(function, "__module__", "")).partition(".")[0] == __package__.partition(".")[0]

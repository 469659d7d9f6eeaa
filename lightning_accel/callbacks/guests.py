"""A teacher as a guest of the fit: its network, and that neither the module nor an optimizer holds it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from .. import select


def network_of(teacher: pl.LightningModule, student: str | None) -> nn.Module:
    """A LightningModule, or where it has no `forward`, the network in it: of the student's name, or the only one."""
    if is_overridden("forward", teacher):
        return teacher
    names = [name for name, child in teacher.named_children() if any(True for _ in child.parameters())]
    if student is not None and student in dict(teacher.named_modules()):
        return select.get_module(teacher, student)
    if len(names) != 1:
        raise ValueError(
            f"the teacher, a {type(teacher).__name__}, has no forward(), and its network is one of {names}; write "
            f"teacher=module.{(names or ['model'])[0]}"
        )
    return select.get_module(teacher, names[0])


def check_apart(teacher: nn.Module, pl_module: pl.LightningModule, student: nn.Module | None) -> None:
    """Raises ValueError where the teacher is part of the LightningModule, but for what it shares with the student."""
    theirs, own = _tensors(teacher), _tensors(pl_module)
    shared = set() if student is None else set(_tensors(student))
    inside = [name for tensor, name in own.items() if tensor in theirs and tensor not in shared]
    whole = bool(theirs) and theirs.keys() <= own.keys()
    if whole or (inside and student is not None) or any(module is teacher for module in pl_module.modules()):
        where = f", in {inside[0]!r}" if inside else ""
        raise ValueError(
            f"the teacher is part of the LightningModule{where}, so it would be trained and saved with it; give "
            "Distillation a teacher of its own, such as copy.deepcopy(model)"
        )


def _tensors(module: nn.Module) -> dict[int, str]:
    """Names of what a module saves, by the identity of the tensor."""
    return {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}


def check_untrained(teacher: nn.Module, trainer: pl.Trainer) -> None:
    """Raises ValueError where an optimizer would train the teacher; what is frozen it only holds."""
    theirs = {id(p): name for name, p in teacher.named_parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            name = next((theirs[id(p)] for p in group["params"] if id(p) in theirs and p.requires_grad), None)
            if name is not None:
                raise ValueError(
                    f"the teacher's parameter {name!r} is in the optimizer {type(optimizer).__name__}, so the "
                    "teacher would be trained; give a copy: teacher=copy.deepcopy(model)"
                )

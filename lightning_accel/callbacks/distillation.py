"""When the teacher speaks: in every training step, beside the user's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import select
from ..distill import DistillConfig, combine, distillation_loss, guest, logits_of
from ..inputs import without_labels
from .base import AccelCallback
from .patches import patch, unpatch

_Call = tuple[str, tuple, dict[str, Any], Tensor]  # module name, args, kwargs, logits


class Distillation(AccelCallback):
    """Adds the teacher's softened logits to the loss that the LightningModule's `training_step` returns.

    `training_step` is wrapped, untouched itself; the student's logits are taken by a forward hook, and the teacher is
    called with the same inputs. It stays a guest: eval mode, no gradients, in no optimizer, checkpoint or artifact.
    Logs `accel/distillation/task_loss` and `accel/distillation/teacher_loss`.

    Args:
        config: temperature and weight.
        teacher: any module that takes the student's inputs and puts out logits of the same shape.
        student: name of the module whose logits are compared; found by itself where only one gives logits.

    Example:
        >>> from lightning_accel import DistillConfig, Distillation
        >>> distillation = Distillation(DistillConfig(temperature=2.0), teacher=torch.nn.Linear(4, 2), student="model")
    """

    technique = "distillation"

    def __init__(self, config: DistillConfig | None = None, *, teacher: nn.Module, student: str | None = None) -> None:
        super().__init__(config if config is not None else DistillConfig(), student)
        if not isinstance(self.config, DistillConfig):
            raise ValueError(
                f"{config!r} is no DistillConfig; write Distillation(DistillConfig(temperature=2.0), teacher=teacher)"
            )
        if not isinstance(teacher, nn.Module):
            raise ValueError(
                f"teacher is a {type(teacher).__name__}, not an nn.Module; load it first, for example "
                "AutoModelForCausalLM.from_pretrained(path)"
            )
        self.teacher = teacher
        self._named = student is not None
        self._calls: list[_Call] | None = None  # a list while a training step runs
        self._handles: list[Any] = []

    @property
    def state_key(self) -> str:
        """The config and the student as the user named it."""
        return f"Distillation(student={self.module if self._named else None!r}, config={self.config!r})"

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wraps `training_step` and hooks the candidates for the student."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "Distillation needs automatic optimization; with manual optimization add "
                "lightning_accel.distillation_loss(student_logits, teacher_logits) to your loss yourself"
            )
        inside = [name for name, module in pl_module.named_modules() if module is self.teacher]
        if inside:
            raise ValueError(
                f"the teacher is the submodule {inside[0]!r} of the LightningModule, so it would be trained and "
                "saved with it; give Distillation a teacher of its own, such as copy.deepcopy(model)"
            )
        if sum(isinstance(c, Distillation) for c in self.siblings(trainer)) > 1:
            raise ValueError(
                "two Distillation callbacks would weigh each other's loss by their order in the list; keep one, and "
                "add lightning_accel.distillation_loss(student_logits, teacher_logits) to your loss for the other"
            )
        self.release(pl_module)
        names = [self.module] if self._named else ["", *(name for name, _ in pl_module.named_children())]
        self._handles = [self._hook(select.get_module(pl_module, name), name) for name in names]

        def with_teacher(training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._calls = []
            try:
                return self._add_teacher(training_step(*args, **kwargs), pl_module)
            finally:
                self._calls = None

        patch(pl_module, "training_step", with_teacher)

    def _hook(self, module: nn.Module, name: str) -> Any:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            logits = logits_of(output) if self._calls is not None and torch.is_grad_enabled() else None
            if logits is not None:
                assert self._calls is not None
                self._calls.append((name, args, kwargs, logits))

        return module.register_forward_hook(keep, with_kwargs=True)

    def _student_calls(self) -> list[_Call]:
        """The student's calls in this step; finds the student where it was not named."""
        assert self._calls is not None
        names = list(dict.fromkeys(call[0] for call in self._calls))
        if not self._named and "" in names:
            names = [""]
        if len(names) != 1:
            found = (
                f"several modules put out logits: {names}"
                if names
                else "no module that training_step calls puts out logits"
            )
            raise ValueError(
                f"{found}; name the student, for example Distillation(..., student={(names or ['model'])[0]!r})"
            )
        return [call for call in self._calls if call[0] == names[0]]

    def _add_teacher(self, output: Any, pl_module: pl.LightningModule) -> Any:
        task_loss = output["loss"] if isinstance(output, dict) else output
        if task_loss is None:
            return output
        calls = self._student_calls()
        self.teacher.to(pl_module.device)
        losses = [self._teacher_loss(*call[1:]) for call in calls]
        teacher_loss = torch.stack(losses).mean()
        self.log_value("task_loss", task_loss.detach())
        self.log_value("teacher_loss", teacher_loss.detach())
        loss = combine(task_loss, teacher_loss, self.config)
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _teacher_loss(self, args: tuple, kwargs: dict[str, Any], logits: Tensor) -> Tensor:
        with guest(self.teacher) as teacher, _dtype_of(teacher) as cast:
            expected = logits_of(teacher(*cast(args), **cast(without_labels(kwargs))))
        if expected is None:
            raise ValueError(
                f"the teacher, a {type(self.teacher).__name__}, puts out no logits; give a model with a head"
            )
        mask = kwargs.get("attention_mask")
        mask = mask if mask is not None and mask.shape == logits.shape[:-1] else None
        return distillation_loss(logits, expected, self.config.temperature, mask)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a teacher that an optimizer would train."""
        super().on_train_start(trainer, pl_module)
        theirs = {id(p): name for name, p in self.teacher.named_parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                name = next((theirs[id(p)] for p in group["params"] if id(p) in theirs), None)
                if name is not None:
                    raise ValueError(
                        f"the teacher's parameter {name!r} is in the optimizer {type(optimizer).__name__}, so the "
                        "teacher would be trained; give a copy: teacher=copy.deepcopy(model)"
                    )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrapper off."""
        self.release(pl_module)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrapper off, and the teacher from the device."""
        if self._handles:
            unpatch(pl_module, "training_step")
            self.teacher.cpu()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The config; never the teacher."""
        return self.saved()


@contextmanager
def _dtype_of(teacher: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """The teacher's dtype for its inputs and for what it makes: Trainer(precision="bf16-true") sets the student's."""
    dtypes = {p.dtype for p in teacher.parameters() if p.is_floating_point()}
    dtype, before = dtypes.pop() if len(dtypes) == 1 else None, torch.get_default_dtype()

    def cast(inputs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)

    if dtype is None:
        yield lambda inputs: inputs
        return
    torch.set_default_dtype(dtype)
    try:
        yield cast
    finally:
        torch.set_default_dtype(before)

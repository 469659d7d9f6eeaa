"""When the teacher speaks: in every training step, beside the user's own loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from .. import select
from ..capture import is_causal_lm
from ..distill import (
    Answer,
    DistillConfig,
    LiveTeacher,
    Projections,
    TeacherCache,
    combine,
    compare,
    layer_map,
    load_teacher,
    positions_of,
    split_key,
)
from ..distill.layers import check_names
from ..distill.teacher import FORMS
from ..loaded import LoadedModel
from ..quantize import unprepare_
from ..schedule import position
from .base import AccelCallback
from .calls import Call, StudentCalls
from .length import total_steps
from .patches import patch, unpatch
from .pruning import Pruning
from .quantization import QuantizationAwareTraining

_LOGGED = {"logits": "teacher_loss", "hidden": "hidden_loss", "attention": "attention_loss"}


class Distillation(AccelCallback):
    """Adds what the teacher knows to the loss that the LightningModule's `training_step` returns.

    `training_step` is wrapped, untouched itself; the student's logits and states are taken by forward hooks, and the
    teacher is called with the same inputs. It stays a guest: eval mode, no gradients, in no optimizer, checkpoint or
    artifact. Logs `accel/distillation/task_loss`, and unweighted `teacher_loss`, `hidden_loss`, `attention_loss`.

    Args:
        config: what is compared, and its weights.
        teacher: a module that takes the student's inputs; the folder or name of a transformers model; an artifact or
            its folder; a `TeacherCache` or its folder; a Lightning checkpoint, with `teacher_class`; or `"self"`, the
            student as it was when pruning or quantization began, which is then part of the callback's state and held
            by it until the next fit.
        student: name of the module whose logits are compared; found by itself where only one gives logits. Names of
            layers in the config are relative to it (without it, to the LightningModule).
        teacher_class: the LightningModule class of a checkpoint.

    Example:
        >>> from lightning_accel import DistillConfig, Distillation
        >>> distillation = Distillation(DistillConfig(temperature=2.0), teacher=torch.nn.Linear(4, 2), student="model")
    """

    technique = "distillation"

    def __init__(
        self,
        config: DistillConfig | None = None,
        *,
        teacher: nn.Module | str | Path | TeacherCache | LoadedModel,
        student: str | None = None,
        teacher_class: type | None = None,
    ) -> None:
        super().__init__(config if config is not None else DistillConfig(), student)
        if not isinstance(self.config, DistillConfig):
            raise ValueError(
                f"{config!r} is no DistillConfig; write Distillation(DistillConfig(temperature=2.0), teacher=teacher)"
            )
        teacher = str(teacher) if isinstance(teacher, Path) else teacher
        if not isinstance(teacher, nn.Module | str | TeacherCache | LoadedModel):
            raise ValueError(f"teacher is a {type(teacher).__name__}; it is {FORMS}")
        if teacher == "self" and student is None:
            raise ValueError("the student as it was is a module with a name; write teacher='self', student='model'")
        self.teacher, self.teacher_class = teacher, teacher_class
        self.projections = Projections()
        self.total: float | None = None
        self._named = student is not None
        self._resumed = False
        self._source: nn.Module | LoadedModel | TeacherCache | None = None  # during the fit, if not "self"
        self._live: LiveTeacher | None = None
        self._home: torch.device | None = None
        self._terms: dict[str, dict[str, str]] = {}  # -> pairs of layers
        self._former: dict[str, Tensor] | None = None  # the student's weights as they were
        self._student: StudentCalls | None = None  # during the fit

    @property
    def state_key(self) -> str:
        """The config and the student as the user named it."""
        return f"Distillation(student={self.module if self._named else None!r}, config={self.config!r})"

    # --- the fit begins and ends

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the teacher, wraps `training_step` and hooks the student."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "Distillation needs automatic optimization; with manual optimization add "
                "lightning_accel.distillation_loss(student_logits, teacher_logits) to your loss yourself"
            )
        if sum(isinstance(c, Distillation) for c in self.siblings(trainer)) > 1:
            raise ValueError(
                "two Distillation callbacks would weigh each other's loss by their order in the list; keep one, and "
                "add lightning_accel.distillation_loss(student_logits, teacher_logits) to your loss for the other"
            )
        self.release(pl_module)
        self._former, self.projections = None, Projections()  # a checkpoint's are restored after this
        self._load(trainer, pl_module)
        self._student = StudentCalls(pl_module, self.module if self._named else None, *self._layers())

        def with_teacher(training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, training_step, args, kwargs)

        patch(pl_module, "training_step", with_teacher)

    def _load(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the teacher and the pairs of layers."""
        config, student = self.config, self.target(pl_module)
        source: Any = self.teacher
        if source == "self":
            if not any(isinstance(c, Pruning | QuantizationAwareTraining) for c in self.siblings(trainer)):
                raise ValueError(
                    "teacher='self' is the student as it was when pruning or quantization began, and neither is in "
                    "this fit; add Pruning or QuantizationAwareTraining, or give a teacher"
                )
            if any(isinstance(c, Pruning) and c.cut_first for c in self.siblings(trainer)):
                raise ValueError(
                    "Pruning(cut_first=True) has cut the student before there is a step to take its weights in; give "
                    "the whole one instead: teacher=copy.deepcopy(module.model)"
                )
            source = None
        elif isinstance(source, str):
            source = load_teacher(source, self.teacher_class, eager=bool(config.attention))
        if isinstance(source, pl.LightningModule):
            source = self._network_of(source)
        if isinstance(source, nn.Module):
            _check_apart(source, pl_module)
            self._home = next((p.device for p in source.parameters()), None)
        self._source = source
        model: nn.Module | None = source if isinstance(source, nn.Module) else student
        if isinstance(source, TeacherCache):
            source.check(config)
            model = None
            for layers in (config.hidden, config.attention):
                check_names(student, layers or (), "student")
        self._terms = {"logits": {}}
        if isinstance(source, LoadedModel) and (layers := config.hidden or config.attention):
            LiveTeacher(source, layers.values() if isinstance(layers, Mapping) else [layers])  # it has none, and raises
        for name in ("hidden", "attention"):
            if (layers := getattr(config, name)) is not None:
                self._terms[name] = dict(layers) if model is None else layer_map(student, model, layers)
        if source is not None and not isinstance(source, TeacherCache):
            self._ask_of(source)

    def _ask_of(self, model: nn.Module | LoadedModel) -> None:
        hidden, attention = (self._terms.get(name, {}) for name in ("hidden", "attention"))
        self._live = LiveTeacher(model, hidden.values(), attention.values())

    def _layers(self) -> tuple[list[str], list[str]]:
        """The student's layers whose states, and whose attention maps, are compared."""
        return list(self._terms.get("hidden", {})), list(self._terms.get("attention", {}))

    def _network_of(self, teacher: pl.LightningModule) -> nn.Module:
        """A LightningModule, or where it has no `forward`, the network in it."""
        if is_overridden("forward", teacher):
            return teacher
        names = [name for name, child in teacher.named_children() if any(True for _ in child.parameters())]
        if self._named and self.module in dict(teacher.named_modules()):
            return select.get_module(teacher, self.module)
        if len(names) != 1:
            raise ValueError(
                f"the teacher, a {type(teacher).__name__}, has no forward(), and its network is one of {names}; write "
                f"teacher=module.{(names or ['model'])[0]}"
            )
        return select.get_module(teacher, names[0])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts projections of a checkpoint into the optimizer, before its state is restored."""
        for weight in self.projections.weights.values():
            weight.data = weight.data.to(pl_module.device)
        self._optimize_projections(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a teacher that an optimizer would train, schedules that do not fit, and data of another cache."""
        super().on_train_start(trainer, pl_module)
        if isinstance(self._source, nn.Module):
            _check_untrained(self._source, trainer)
        if isinstance(self._source, TeacherCache):
            for loader in trainer.fit_loop._combined_loader.flattened if trainer.fit_loop._combined_loader else ():
                self._source.check_loader(loader)
        if not self._resumed:
            self.total = total_steps(trainer, pl_module)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                for schedule in self.config.scheduled:
                    schedule.check(self.total)
        self._resumed = False
        if self._former is not None:
            self._become_teacher(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrapper off."""
        self.release(pl_module)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrapper off, and lets go of the teacher."""
        if self._student is not None:
            unpatch(pl_module, "training_step")
            self._student.remove()
            self._student = None
        if self._live is not None:
            self._live.remove()
            if isinstance(self._live.model, nn.Module) and self._home is not None:
                self._live.model.to(self._home)
        self._live = self._source = self._home = None

    # --- the student as its own teacher

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Keeps the student as it is before pruning or quantization begins in this step."""
        if self.teacher == "self" and self._former is None and self._begins(trainer):
            student = self.target(pl_module)
            self._former = {name: t.detach().clone() for name, t in student.state_dict().items()}
            self._become_teacher(pl_module)

    def _begins(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        for other in self.siblings(trainer):
            if isinstance(other, Pruning) and other.schedule.value(step + 1, other.total or 0.0) > 0:
                return True  # masks come with the step's end
            if isinstance(other, QuantizationAwareTraining) and step >= position(other.begin, other.total or 0.0):
                return True
        return False

    def _become_teacher(self, pl_module: pl.LightningModule) -> None:
        """Makes a teacher of the weights as they were; nothing of the student's fit is left in it."""
        assert self._former is not None
        teacher = unprepare_(copy.deepcopy(self.target(pl_module)))
        for module in teacher.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        teacher.load_state_dict(self._former)
        self._former = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}  # held once
        self._ask_of(teacher.requires_grad_(False))

    # --- a training step

    def _step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, training_step: Any, args: tuple, kwargs: dict
    ) -> Any:
        """The user's `training_step`, and the teacher's terms."""
        batch, keys = split_key(args[0] if args else kwargs.get("batch"))
        args, kwargs = ((batch, *args[1:]), kwargs) if args else (args, {**kwargs, "batch": batch})
        batch = dict(batch) if isinstance(batch, Mapping) else batch  # training_step may take labels out of its own
        if self.total is None:  # on_train_start was not called, as in Tuner.lr_find, which puts callbacks aside
            self.total = total_steps(trainer, pl_module)
        weights = self.config.weights(trainer.global_step, self.total)
        if self._live is None and self._source is None:
            weights = dict.fromkeys(weights, 0.0)  # its own teacher, which is not there yet
        student = self._student
        assert student is not None
        with student.recording(layers=any(weights.values())):
            output = training_step(*args, **kwargs)
        task_loss = output["loss"] if isinstance(output, dict) else output
        if task_loss is not None:
            self.log_value("task_loss", task_loss.detach())
        wanted = {name: pairs for name, pairs in self._terms.items() if weights[name]}
        if task_loss is None or not wanted:
            student.clear()
            return output
        calls = student.take("logits" in wanted, wanted.get("hidden", ()), wanted.get("attention", ()))
        terms = self._compare(pl_module, calls, batch, keys, wanted)
        for name, term in terms.items():
            self.log_value(_LOGGED[name], term.detach())
        self._optimize_projections(trainer)
        loss = combine(task_loss, terms, weights)
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _compare(
        self, pl_module: pl.LightningModule, calls: list[Call], batch: Any, keys: Tensor | None, wanted: Mapping
    ) -> dict[str, Tensor]:
        """The terms that are wanted, averaged over the student's calls."""
        found = []
        for call in calls:
            positions = positions_of(call.network, call.named, batch, call.logits, _is_causal(pl_module, call))
            answer = self._ask(pl_module, call, keys, len(calls))
            found.append(compare(call.answer, answer, self.config, wanted, self.projections, positions))
        return {name: torch.stack([one[name] for one in found]).mean() for name in wanted}

    def _ask(self, pl_module: pl.LightningModule, call: Call, keys: Tensor | None, calls: int) -> Answer:
        if isinstance(self._source, TeacherCache):
            if calls != 1:
                raise ValueError(
                    f"training_step calls the student {calls} times, and a cache holds one answer a sample; call it "
                    "once, or give the teacher itself"
                )
            return self._source.read(keys)
        assert self._live is not None
        if call.changed:
            raise ValueError(
                f"the student, a {type(call.module).__name__}, changes its inputs in place, so that the teacher would "
                "be asked about others; clone them first"
            )
        if isinstance(self._live.model, nn.Module):
            self._live.model.to(pl_module.device)
        return self._live(call.args, call.kwargs, call.network)

    # --- projections

    def _optimize_projections(self, trainer: pl.Trainer) -> None:
        """New projections join the first group of the optimizer, and share its learning rate and schedule."""
        if not self.projections.weights or not trainer.optimizers or self not in trainer.callbacks:  # type: ignore[attr-defined]
            return  # of a Tuner's optimizer, which it puts back as it was, they are no part
        params = trainer.optimizers[0].param_groups[0]["params"]
        known = {id(p) for p in params}
        params += [weight for weight in self.projections.weights.values() if id(weight) not in known]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages the projections' gradients over the ranks: DDP knows the module's own parameters only."""
        if trainer.world_size > 1:
            for weight in self.projections.weights.values():
                if weight.grad is not None:
                    weight.grad = trainer.strategy.reduce(weight.grad, reduce_op="mean")

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Projections and the length of training; never the teacher, unless it is the student as it was."""
        former = None if self._former is None else {name: t.cpu().clone() for name, t in self._former.items()}
        return self.saved(total=self.total, projections=self.projections.state_dict(), former=former)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.total, self._former = state_dict["total"], state_dict["former"]
        self.projections.load_state_dict(state_dict["projections"])
        self._resumed = True


def _is_causal(pl_module: pl.LightningModule, call: Call) -> bool:
    """Whether a position's logits predict the next label."""
    said = getattr(pl_module, "causal", None)
    if isinstance(said, bool):
        return said
    return call.logits is not None and call.logits.dim() == 3 and is_causal_lm(call.network)


def _check_apart(teacher: nn.Module, pl_module: pl.LightningModule) -> None:
    inside = [name for name, module in pl_module.named_modules() if module is teacher]
    if inside:
        raise ValueError(
            f"the teacher is the submodule {inside[0]!r} of the LightningModule, so it would be trained and "
            "saved with it; give Distillation a teacher of its own, such as copy.deepcopy(model)"
        )


def _check_untrained(teacher: nn.Module, trainer: pl.Trainer) -> None:
    theirs = {id(p): name for name, p in teacher.named_parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            name = next((theirs[id(p)] for p in group["params"] if id(p) in theirs), None)
            if name is not None:
                raise ValueError(
                    f"the teacher's parameter {name!r} is in the optimizer {type(optimizer).__name__}, so the "
                    "teacher would be trained; give a copy: teacher=copy.deepcopy(model)"
                )

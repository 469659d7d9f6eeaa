"""When the teacher speaks: in every training step, beside the user's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

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
from ..distill.teacher import FORMS, check_same_labels
from ..loaded import LoadedModel
from ..module import AccelModule
from . import former, guests
from .base import AccelCallback
from .cached import CachedTeacher
from .calls import Call, StudentCalls, network_in
from .length import total_steps
from .patches import patch, unpatch

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
        student: name of the module whose logits are compared; found by itself where of the LightningModule and its
            direct parts only one gives logits. Names of layers in the config are relative to it (without it, to the
            LightningModule).
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
        self._live: LiveTeacher | None = None  # during the fit
        self._cached: CachedTeacher | None = None
        self._home: torch.device | None = None  # of the live teacher, before the fit
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
                f"{self._as_function()} to your loss yourself"
            )
        if sum(isinstance(c, Distillation) for c in self.siblings(trainer)) > 1:
            raise ValueError(
                "two Distillation callbacks would weigh each other's loss by their order in the list; keep one, and "
                f"add {self._as_function()} to your loss for the other"
            )
        self.release(pl_module)
        self._former, self.projections = None, Projections()  # a checkpoint's are restored after this
        self._load(trainer, pl_module)
        self._resumed = False
        self._student = student = StudentCalls(pl_module, self.module if self._named else None, *self._layers())

        def with_teacher(training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._student is not student:  # after the fit, where another library has wrapped this
                return training_step(*args, **kwargs)
            return self._step(trainer, pl_module, training_step, args, kwargs)

        def without_keys(transfer: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self._student is student:
                batch, keys = split_key(batch)
                if self._cached is not None and trainer.training:
                    self._cached.keys = keys
            return transfer(batch, *args, **kwargs)

        patch(pl_module, "training_step", with_teacher)
        patch(pl_module, "_on_before_batch_transfer", without_keys)  # the first that Lightning does with a batch

    def _as_function(self) -> str:
        return (
            "lightning_accel.distillation_loss(student_logits, teacher_logits, "
            f"temperature={self.config.temperature}, loss={self.config.loss!r})"
        )

    def _load(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the teacher and the pairs of layers."""
        config, student = self.config, self.target(pl_module)
        source: Any = self.teacher
        if source == "self":
            former.check_begins(self.siblings(trainer))
            source = None
        elif isinstance(source, str):
            source = load_teacher(source, self.teacher_class, eager=bool(config.attention))
        if isinstance(source, pl.LightningModule):
            source = guests.network_of(source, self.module if self._named else None)
        if isinstance(source, nn.Module):
            guests.check_apart(source, pl_module, student if self._named else None)
            if config.alpha != 0.0:
                check_same_labels(network_in(student), network_in(source))
            self._home = next((p.device for p in source.parameters()), None)
        model: nn.Module | None = source if isinstance(source, nn.Module) else student
        if isinstance(source, TeacherCache):
            source.check(config)
            model, self._cached = None, CachedTeacher(source, trainer)
            for layers in (config.hidden, config.attention):
                check_names(student, layers or (), "student")
        elif config.drawn:
            raise ValueError(
                f"drawn={config.drawn} is for a TeacherCache, and a live teacher knows every class; write "
                "DistillConfig(top_k=None, drawn=0)"
            )
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

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts projections of a checkpoint into the optimizer, before its state is restored."""
        for weight in self.projections.weights.values():
            weight.data = weight.data.to(pl_module.device)
        self._optimize_projections(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a teacher that an optimizer would train, schedules that do not fit, and data of another cache."""
        super().on_train_start(trainer, pl_module)
        if self._live is not None and isinstance(self._live.model, nn.Module):
            guests.check_untrained(self._live.model, trainer)
        if self._cached is not None:
            self._cached.check_loader()
        if not self._resumed:
            self.total = total_steps(trainer, pl_module)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                for schedule in self.config.scheduled:
                    schedule.check(self.total)
        self._resumed = False
        if self._former is not None:
            self._become_teacher(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the epoch's first batch compared with the data that a cache is of."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._cached is not None:
            self._cached.begin_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrapper off."""
        self.release(pl_module)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes hooks and wrapper off, and lets go of the teacher."""
        if self._student is not None:
            unpatch(pl_module, "training_step")
            unpatch(pl_module, "_on_before_batch_transfer")
            self._student.remove()
            self._student = None
        if self._live is not None:
            self._live.remove()
            if isinstance(self._live.model, nn.Module) and self._home is not None:
                self._live.model.to(self._home)
        self._live = self._cached = self._home = None

    # --- the student as its own teacher

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Reads a cache's first batch of the epoch again; keeps the student as it is before pruning or quantization."""
        assert self.total is not None
        if self._cached is not None and any(self.config.weights(trainer.global_step, self.total).values()):
            self._cached.begin_batch()
        waits = self.teacher == "self" and self._former is None
        if waits and former.begins(self.siblings(trainer), trainer.global_step):
            self._former = former.weights_of(self.target(pl_module), trainer)
            self._become_teacher(pl_module)

    def _become_teacher(self, pl_module: pl.LightningModule) -> None:
        assert self._former is not None
        teacher = former.network_of(self.target(pl_module), self._former)
        self._former = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}  # held once
        self._ask_of(teacher)

    # --- a training step

    def _step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, training_step: Any, args: tuple, kwargs: dict
    ) -> Any:
        """The user's `training_step`, and the teacher's terms."""
        batch = args[0] if args else kwargs.get("batch")
        batch = dict(batch) if isinstance(batch, Mapping) else batch  # training_step may take labels out of its own
        if self.total is None:  # on_train_start was not called, as in Tuner.lr_find, which puts callbacks aside
            self.total = total_steps(trainer, pl_module)
        weights = self.config.weights(trainer.global_step, self.total)
        if self._live is None and self._cached is None:
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
        terms = self._compare(pl_module, calls, batch, wanted)
        for name, term in terms.items():
            self.log_value(_LOGGED[name], term.detach())
        self._optimize_projections(trainer)
        loss = combine(task_loss, terms, weights)
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _compare(
        self, pl_module: pl.LightningModule, calls: list[Call], batch: Any, wanted: Mapping
    ) -> dict[str, Tensor]:
        """The terms that are wanted, averaged over the student's calls."""
        found = []
        for call in calls:
            positions = positions_of(call.network, call.named, batch, call.logits, _is_causal(pl_module, call))
            answer = self._ask(pl_module, call, len(calls))
            found.append(compare(call.answer, answer, self.config, wanted, self.projections, positions))
        return {name: torch.stack([one[name] for one in found]).mean() for name in wanted}

    def _ask(self, pl_module: pl.LightningModule, call: Call, calls: int) -> Answer:
        if self._cached is not None:
            return self._cached.ask(pl_module, call, calls)
        assert self._live is not None
        if call.changed:
            raise ValueError(
                f"the student, a {type(call.module).__name__}, changes its inputs in place, so that the teacher would "
                "be asked about others; clone them first"
            )
        if isinstance(self._live.model, nn.Module) and (self._home is None or self._home.type == "cpu"):
            self._live.model.to(pl_module.device)  # one that was put on another device stays there
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
        weights = None if self._former is None else {name: t.cpu().clone() for name, t in self._former.items()}
        return self.saved(total=self.total, projections=self.projections.state_dict(), former=weights)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raises where the checkpoint holds what another config trained or kept, which it would go on without."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        for key, state in checkpoint.get("callbacks", {}).items():
            theirs = isinstance(state, dict) and state.get("technique") == self.technique and key != self.state_key
            if theirs and (state["projections"] or state["former"] is not None):
                what = "projections" if state["projections"] else "the student as it was before"
                raise ValueError(
                    f"the checkpoint holds {what}, of {key}, which this fit does not have: it has {self.state_key}. "
                    "Resume with the config of then; to change it, load the weights and start a new fit"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.total, self._former = state_dict["total"], state_dict["former"]
        self.projections.load_state_dict(state_dict["projections"])
        self._resumed = True


def _is_causal(pl_module: pl.LightningModule, call: Call) -> bool:
    """Whether a position's logits predict the next label."""
    if isinstance(pl_module, AccelModule) and pl_module.causal is not None:
        return pl_module.causal
    return call.logits is not None and call.logits.dim() == 3 and is_causal_lm(call.network)

"""When to prune: masks follow a schedule and are applied right after each optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..prune import Group, Masks, PruneConfig, apply_masks_, compute_masks
from ..prune.masks import find_targets
from ..schedule import Constant, Schedule
from .base import AccelCallback, InputRecorder, example_of, total_steps


class Pruning(AccelCallback):
    """Prunes while training: `amount` rises along `schedule`, and pruned weights stay zero.

    Masks are applied in a hook on the optimizer's step, so that overflowed fp16 steps are skipped, averaged weights
    come after, and manual optimization works. Export cuts out what neuron masks dropped. Logs
    `accel/pruning/amount`, the share that is pruned now.

    Args:
        config: what and how much.
        schedule: when; `Constant(begin)`, `Linear` or `Cubic`.
        module: submodule to prune, default the whole LightningModule.
        example_inputs: of that module, for `structure="neurons"`; by default those of the first training batch.
        every: masks are computed anew every so many optimizer steps while the schedule rises, and at its end.

    Example:
        >>> from lightning_accel import Cubic, PruneConfig, Pruning
        >>> pruning = Pruning(PruneConfig("neurons", amount=0.5), schedule=Cubic(begin=0.1, end=0.6))
    """

    technique = "pruning"

    def __init__(
        self,
        config: PruneConfig,
        schedule: Schedule | None = None,
        module: str | None = None,
        example_inputs: Any = None,
        every: int = 10,
    ) -> None:
        super().__init__(config, module)
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 optimizer step")
        self.schedule = schedule if schedule is not None else Constant(0.0)
        self.example_inputs = example_inputs
        self.every = every
        self.masks: Masks = {}
        self.total: float | None = None
        self.share = 0.0  # of the configured amount, reached so far; never falls
        self._updated = 0
        self._targets: list[Group] | None = None
        self._recorder: InputRecorder | None = None
        self._handles: list[Any] = []

    @property
    def state_key(self) -> str:
        """Config, module and schedule."""
        return f"{super().state_key[:-1]}, schedule={self.schedule!r})"

    @property
    def complete(self) -> bool:
        """Whether the schedule has ended."""
        return self.share >= 1.0

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds what unstructured masks reach; neurons need the inputs of a batch first."""
        module = self.target(pl_module)
        others = [
            c
            for c in trainer.callbacks  # type: ignore[attr-defined]
            if type(c) is Pruning and c is not self and c.module == self.module and c.config == self.config
        ]
        if others:
            raise ValueError(f"two equal Pruning callbacks on module={self.module!r}; remove one")
        if self.config.structure == "unstructured" or self.example_inputs is not None:
            self._targets = find_targets(module, self.config, self.example_inputs)
        else:
            self._recorder = InputRecorder(module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the schedule against the length of training and hooks the optimizers."""
        super().on_train_start(trainer, pl_module)
        if self.total is None:
            self.total = total_steps(trainer, pl_module)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.schedule.check(self.total)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._after_step(trainer, pl_module, optimizer)

        self._unhook()
        self._handles = [o.register_step_post_hook(after_step) for o in trainer.optimizers]

    def _after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        module = self.target(pl_module)
        if self.masks:
            apply_masks_(module, self.masks, {id(p) for group in optimizer.param_groups for p in group["params"]})
        assert self.total is not None
        step = trainer.global_step + 1  # Lightning counts the step after its hooks
        share = self.schedule.value(step, self.total)
        if share > self.share and (share == 1.0 or step - self._updated >= self.every):
            if self._targets is None:
                inputs = example_of(self._recorder, pl_module, self.example_inputs, not self.module)
                self._targets = find_targets(module, self.config, inputs)
            self.masks = compute_masks(module, self._targets, self.config, share)
            self.share, self._updated = share, step
            apply_masks_(module, self.masks)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the share that is pruned."""
        self.log_value("amount", self.share * self.config.amount)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the hooks off."""
        self._unhook()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Applies the masks once more: averaged weights may have been put in place since."""
        apply_masks_(self.target(pl_module), self.masks)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes the hooks off."""
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recorder is not None:
            self._recorder.remove()

    def full_masks(self) -> dict[str, Tensor]:
        """The masks under names relative to the LightningModule."""
        prefix = f"{self.module}." if self.module else ""
        return {prefix + name: mask for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Masks, progress and the length of training that fractions refer to."""
        masks = {name: mask.cpu() for name, mask in self.masks.items()}
        return self.saved(
            masks=masks, share=self.share, updated=self._updated, total=self.total, complete=self.complete
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.masks = {name: torch.as_tensor(mask) for name, mask in state_dict["masks"].items()}
        self.share, self._updated, self.total = state_dict["share"], state_dict["updated"], state_dict["total"]

"""When to prune: masks follow a schedule and are applied right after each optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..prune import Group, Masks, PruneConfig, apply_masks_, compute_masks
from ..prune.masks import find_targets
from ..quantize.adapters import adapted_layers
from ..schedule import Constant, Schedule
from .base import AccelCallback
from .inputs import InputRecorder, calls_of, record_parts
from .length import total_steps


class Pruning(AccelCallback):
    """Prunes while training: `amount` rises along `schedule`, and pruned weights stay zero.

    Masks are applied in a hook on the optimizer's step, so that overflowed fp16 steps are skipped, averaged weights
    come after, and manual optimization works. Export cuts out what neuron masks dropped. Logs
    `accel/pruning/amount`, the share that is pruned now.

    Args:
        config: what and how much.
        schedule: when; `Constant(begin)`, `Linear` or `Cubic`.
        module: submodule to prune, default the whole LightningModule.
        example_inputs: of that module, for all structures but `"unstructured"`; by default those of the first training
            batch.
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
        if not isinstance(config, PruneConfig):
            raise ValueError(f"{config!r} is no PruneConfig; write Pruning(PruneConfig('neurons', amount=0.5))")
        if config.structure == "hidden":
            raise ValueError(
                "structure='hidden' cannot be masked in training: a normalization over fewer values differs. Cut "
                "first, then train: small = shrink_model(model, prune_model_(model, config, example_inputs=x), "
                "example_inputs=x)"
            )
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule={schedule!r} is no Schedule; write schedule=Cubic(begin=0.1, end=0.6)")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} must be at least 1 optimizer step; write every=10")
        self.schedule = schedule if schedule is not None else Constant(0.0)
        self.example_inputs = example_inputs
        self.every = every
        self.masks: Masks = {}
        self.total: float | None = None
        self.share = 0.0  # of the configured amount, reached so far; never falls
        self._updated = 0
        self._targets: list[Group] | None = None
        self._recorders: dict[str, InputRecorder] = {}
        self._handles: list[Any] = []
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Config, module and schedule."""
        return f"{super().state_key[:-1]}, schedule={self.schedule!r})"

    @property
    def complete(self) -> bool:
        """Whether the schedule has ended."""
        return self.share >= 1.0

    def bind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds what unstructured masks reach; the other structures need the inputs of a batch first."""
        module = self.target(pl_module)
        if any(c is not self and c.module == self.module and c.config == self.config for c in _prunings(trainer)):
            raise ValueError(f"two equal Pruning callbacks on module={self.module!r}; remove one")
        if adapted := list(adapted_layers(module)):
            raise ValueError(
                f"{adapted[0]} has an adapter, whose merging fills pruned weights again; write "
                "model = model.merge_and_unload() and train that"
            )
        self._targets = None
        if self.config.structure == "unstructured" or self.example_inputs is not None:
            self._targets = find_targets(module, self.config, self.example_inputs)
        else:
            self._recorders = record_parts(module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.masks = {name: torch.as_tensor(mask) for name, mask in state_dict["masks"].items()}
        self.share, self._updated, self.total = state_dict["share"], state_dict["updated"], state_dict["total"]
        self._resumed = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the schedule against the length of training and hooks the optimizers."""
        super().on_train_start(trainer, pl_module)
        if not (self._resumed or self.complete):
            self.total = total_steps(trainer, pl_module)
            self._updated = min(self._updated, trainer.global_step)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.schedule.check(self.total)
        self._resumed = False
        self.masks = {name: mask.to(pl_module.device) for name, mask in self.masks.items()}
        prunings = _prunings(trainer)
        if self is not prunings[-1]:
            return  # the last one hooks the optimizers for all, so that the order in the list does not matter

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for pruning in prunings:
                apply_masks_(pruning.target(pl_module), pruning.masks, stepped)
            for pruning in sorted(prunings, key=lambda p: p.state_key):
                pruning._follow_schedule(trainer.global_step + 1, pl_module)  # Lightning counts it after its hooks

        self._handles = [o.register_step_post_hook(after_step) for o in trainer.optimizers]

    def _follow_schedule(self, step: int, pl_module: pl.LightningModule) -> None:
        assert self.total is not None
        share = self.schedule.value(step, self.total)
        if share <= self.share or (share < 1.0 and step - self._updated < self.every):
            return
        module = self.target(pl_module)
        if self._targets is None:
            return  # manual optimization in its first batch
        self.masks = compute_masks(module, self._targets, self.config, share)
        self.share, self._updated = share, step
        apply_masks_(module, self.masks)

    def _find_targets(self, pl_module: pl.LightningModule) -> None:
        if self._targets is None and not self.complete:
            module = self.target(pl_module)
            self._targets = find_targets(module, self.config, calls=calls_of(self._recorders, module))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Finds the units from the first batch's inputs: what does not fit raises before the first step."""
        if pl_module.automatic_optimization:
            self._find_targets(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the share that is pruned."""
        self._find_targets(pl_module)
        self.log_value("amount", self.share * self.config.amount)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the hooks off."""
        self.release(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Applies the masks once more: averaged weights may have been put in place since."""
        apply_masks_(self.target(pl_module), self.masks)

    def release(self, pl_module: pl.LightningModule) -> None:
        """Takes the hooks off."""
        for hook in (*self._handles, *self._recorders.values()):
            hook.remove()
        self._handles = []

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


def _prunings(trainer: pl.Trainer) -> list[Pruning]:
    return [c for c in trainer.callbacks if isinstance(c, Pruning)]  # type: ignore[attr-defined]

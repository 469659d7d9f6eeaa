"""When to prune: masks that follow a schedule, applied right after each optimizer step, or a cut before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer

from ..prune import Masks, PruneConfig, apply_masks_, time_in_turns
from ..prune.cut import Record, is_done
from ..prune.groups import KINDS
from ..prune.latency import Timer
from ..prune.masks import clear_state_
from ..prune.progress import Progress, plain_means
from ..prune.saliency import Means
from ..prune.shrink import plan_model
from ..quantize.adapters import adapted_layers
from ..schedule import Constant, Schedule
from .base import AccelCallback
from .cutting import agreed, before_restore, check_cut_first, cut_, record_in
from .inputs import InputRecorder, calls_of, example_of, record_parts
from .length import total_steps

_CUT_FIRST = (
    "{} cannot be masked in training: {}. Cut first, then train: Pruning(config, cut_first=True, example_inputs=x)"
)


class Pruning(AccelCallback):
    """Prunes while training: `amount` rises along `schedule`, and pruned weights stay zero.

    Masks are applied in a hook on the optimizer's step, so that overflowed fp16 steps are skipped, averaged weights
    come after, and manual optimization works. Optimizer state of pruned weights is zeroed. Saliencies that need data
    take them from the training batches since the last update. Export cuts out what the masks dropped as a whole. Logs
    `accel/pruning/amount`, the share that the schedule has reached, times `amount`.

    Args:
        config: what and how much.
        schedule: when; `Constant(begin)`, `Linear` or `Cubic`.
        module: submodule to prune, default the whole LightningModule.
        example_inputs: of that module, for all structures but `"unstructured"`; by default those of the first training
            batch.
        every: masks are computed anew every so many optimizer steps while the schedule rises, and at its end.
        cut_first: cut the units out before training, when the network is built and no optimizer is yet, rather than
            mask them; a resumed fit cuts the same before weights are restored. Needs `example_inputs`.
        calibration: batches for a saliency that needs data, with `cut_first`; else the training batches serve.
        loss: (module, batch) -> scalar, for `"taylor"` and `scope="sensitivity"` with `cut_first`; by default that
            which a transformers model puts out for a batch with labels, or the cross-entropy of (input, classes).

    Attributes:
        timer: what measures a latency; `prune.time_in_turns` unless it is set otherwise.

    Example:
        >>> from lightning_accel import Cubic, PruneConfig, Pruning
        >>> pruning = Pruning(PruneConfig("neurons", amount=0.5), schedule=Cubic(begin=0.1, end=0.6))
    """

    technique = "pruning"
    timer: Timer = staticmethod(time_in_turns)

    def __init__(
        self,
        config: PruneConfig,
        schedule: Schedule | None = None,
        module: str | None = None,
        example_inputs: Any = None,
        every: int = 10,
        cut_first: bool = False,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        super().__init__(config, module)
        if not isinstance(config, PruneConfig):
            raise ValueError(f"{config!r} is no PruneConfig; write Pruning(PruneConfig('neurons', amount=0.5))")
        check_cut_first(config, schedule, cut_first, calibration, loss)
        if "hidden" in config.structures and not cut_first:
            raise ValueError(_CUT_FIRST.format("structure='hidden'", "a normalization over fewer values differs"))
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule={schedule!r} is no Schedule; write schedule=Cubic(begin=0.1, end=0.6)")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} must be at least 1 optimizer step; write every=10")
        self.schedule = schedule if schedule is not None else Constant(0.0)
        self.example_inputs = example_inputs
        self.every, self.cut_first, self.calibration, self.loss = every, cut_first, calibration, loss
        self.record: Record | None = None  # of what was cut before training
        self._bound: object | None = None
        self._pruned: nn.Module | None = None  # in the last fit: it goes on where that ended, another model begins anew
        self.progress = Progress(config)
        self.total: float | None = None
        self._updated = 0
        self._recorders: dict[str, InputRecorder] = {}
        self._handles: list[Any] = []
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Config, module and schedule."""
        when = "cut_first=True" if self.cut_first else f"schedule={self.schedule!r}"
        return f"{super().state_key[:-1]}, {when})"

    @property
    def masks(self) -> Masks:
        """Those of now, by parameter names in the module."""
        return self.progress.masks

    @property
    def share(self) -> float:
        """Of the configured amounts, reached so far; never falls."""
        return self.progress.share

    @property
    def complete(self) -> bool:
        """Whether the schedule has ended, or all was cut before training."""
        return self.progress.share >= 1.0 or self.record is not None

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
        if self._pruned is not None and self._pruned is not module:
            self.progress, self._updated = Progress(self.config), 0  # `record` is compared with the model where it cuts
        self._pruned = module
        self.progress.targets = None
        if any(pruning.cut_first for pruning in _prunings(trainer)):  # the others see what is left
            return self._bind_cut(trainer, pl_module) if self.cut_first else None
        self._find_or_record(module)

    def _bind_cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for other in _prunings(trainer):
            names = sorted((f"{self.module}.", f"{other.module}."))
            if other is not self and other.cut_first and (names[0] == "." or names[1].startswith(names[0])):
                raise ValueError(
                    f"two Pruning callbacks cut first in module={self.module!r}; write one, with several structures as "
                    "PruneConfig(('neurons', 'heads'))"
                )
        if averaging := [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]:  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(averaging[0]).__name__} copies the network before it is cut; shrink it before the fit: "
                "shrink_model(model, prune_model_(model, config, example_inputs=x), example_inputs=x)"
            )
        bound = self._bound = object()

        def cut(checkpoint: dict[str, Any] | None) -> None:
            module = self.target(pl_module)
            if self._bound is not bound:
                return
            if checkpoint is not None:
                self.record = record_in(checkpoint, self.state_key)
            elif self.record is None or not is_done(module, self.record):
                inputs = example_of(None, pl_module, module, self.example_inputs)
                self.record = agreed(
                    trainer, lambda: plan_model(module, self.config, inputs, self.calibration, self.timer, self.loss)
                )
            cut_(pl_module, self.module, self.record)

        before_restore(trainer, cut)

    def _find_or_record(self, module: nn.Module) -> None:
        if self.example_inputs is not None or not (
            self.config.of == "flops" or set(KINDS) & set(self.config.structures)
        ):
            self._find(module, None if self.example_inputs is None else {"": self.example_inputs})
        else:
            self._recorders = record_parts(module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.progress.load(state_dict)
        self.record, self._updated, self.total = (state_dict[name] for name in ("record", "updated", "total"))
        self._resumed = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the schedule against the length of training and hooks the optimizers."""
        super().on_train_start(trainer, pl_module)
        if any(pruning.cut_first for pruning in _prunings(trainer)) and not self.complete:
            self._find_or_record(self.target(pl_module))
        if not (self._resumed or self.complete):
            self.total = total_steps(trainer, pl_module)
            self._updated = min(self._updated, trainer.global_step)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.schedule.check(self.total)
        if self._resumed and not trainer.is_global_zero:
            self.progress.means.clear()  # rank 0 continues with what all of them had measured
        self._resumed = False
        self.progress.masks = {name: mask.to(pl_module.device) for name, mask in self.masks.items()}
        if not self.complete:
            self.progress.observe(self.target(pl_module))
        prunings = _prunings(trainer)
        if self is not prunings[-1]:
            return  # the last one hooks the optimizers for all, so that the order in the list does not matter

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for pruning in prunings:
                apply_masks_(pruning.target(pl_module), pruning.masks, stepped)
            for pruning in sorted(prunings, key=lambda p: p.state_key):
                pruning._follow_schedule(
                    trainer.global_step + 1, trainer, pl_module
                )  # Lightning counts it after its hooks

        self._handles = [o.register_step_post_hook(after_step) for o in trainer.optimizers]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Observes this batch, where the saliency needs data."""
        self.progress.means.paused = False

    def _follow_schedule(self, step: int, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.record is not None:
            return
        assert self.total is not None
        share = self.schedule.value(step, self.total)
        if share <= self.progress.share or (share < 1.0 and step - self._updated < self.every):
            return
        module, means = self.target(pl_module), self.progress.means
        means = over_ranks(trainer, means) if self.progress.needs else means
        if not self.progress.update(module, share, means, self.timer, partial(agreed, trainer)):
            return  # the first batch of manual optimization, or of a saliency that needs to see one
        self._updated = step
        for optimizer in trainer.optimizers:
            clear_state_(optimizer, module, self.masks)
        if self.complete:
            self.progress.stop_observing()

    def _find(self, module: nn.Module, calls: dict[str, Any] | None) -> None:
        self.progress.find(module, calls)
        if inexact := [target for target in self.progress.targets or () if not target.exact]:
            what = f"the {inexact[0].kind} of {inexact[0].name!r}"
            raise ValueError(_CUT_FIRST.format(what, "a normalization behind them sees other values"))

    def _find_in_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds what may be pruned from the inputs of the first batch, those of rank 0."""
        if self.progress.targets is None and not self.complete:
            module = self.target(pl_module)
            self._find(module, agreed(trainer, lambda: calls_of(self._recorders, module)))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Finds the units from the first batch's inputs: what does not fit raises before the first step."""
        if pl_module.automatic_optimization:
            self._find_in_batch(trainer, pl_module)
        if not self.complete:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            every = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
            self.progress.add_gradients(self.target(pl_module), stepped, every)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the share that is pruned."""
        self.progress.means.paused = True
        self._find_in_batch(trainer, pl_module)
        self.log_value("amount", (1.0 if self.complete else self.progress.share) * self.config.amount)

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
        self._handles, self._bound = [], None
        self.progress.stop_observing()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves what all ranks have measured."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:  # then possibly on one only
            checkpoint["callbacks"][self.state_key]["means"] = plain_means(over_ranks(trainer, self.progress.means))

    def full_masks(self) -> dict[str, Tensor]:
        """The masks under names relative to the LightningModule."""
        prefix = f"{self.module}." if self.module else ""
        return {prefix + name: mask for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Masks, progress and the length of training that fractions refer to."""
        when = {"updated": self._updated, "total": self.total, "complete": self.complete}
        return self.saved(record=self.record, **self.progress.state(), **when)


def over_ranks(trainer: pl.Trainer, means: Means) -> Means:
    """What all ranks have measured, on each of them; called on all."""
    if trainer.world_size == 1:
        return means
    own = {name: tuple(total.shape) for name, total in means.sums.items()}
    shapes = {n: s for rank in range(trainer.world_size) for n, s in trainer.strategy.broadcast(own, src=rank).items()}
    device = trainer.strategy.root_device
    return means.reduced(lambda t: trainer.strategy.reduce(t.to(device), reduce_op="sum"), shapes)


def _prunings(trainer: pl.Trainer) -> list[Pruning]:
    return [c for c in trainer.callbacks if isinstance(c, Pruning)]  # type: ignore[attr-defined]

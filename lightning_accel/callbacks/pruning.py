"""When to prune: masks that follow a schedule, applied right after each optimizer step, or a cut before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import select
from ..prune import Group, Masks, PruneConfig, apply_masks_, compute_masks, time_in_turns
from ..prune.allocate import Costs
from ..prune.cut import Record, is_done
from ..prune.groups import KINDS
from ..prune.latency import LatencyCosts, Timer
from ..prune.masks import Tables, clear_state_, costs_of, measure_tables, needed
from ..prune.saliency import Means, add_gradients, observe_blocks, observe_inputs
from ..prune.shrink import plan_model
from ..prune.targets import find_targets
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
            which a transformers model puts out for a batch with labels.

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
        self.masks: Masks = {}
        self.total: float | None = None
        self.share = 0.0  # of the configured amount, reached so far; never falls
        self._updated = 0
        self._targets: list[Group] | None = None
        self._recorders: dict[str, InputRecorder] = {}
        self._costs: Costs | LatencyCosts | None = None
        self._tables: Tables = {}  # of latencies, measured once
        self._counted: dict[str, float] = {}  # FLOPs, once
        self._calls: dict[str, Any] = {}  # example inputs, until then
        self._means = Means()  # over the batches since the last update of the masks
        self._means.paused = True  # but in training steps
        self._units: list[str] = []  # blocks that are observed
        self._handles: list[Any] = []
        self._observers: list[Any] = []
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Config, module and schedule."""
        when = "cut_first=True" if self.cut_first else f"schedule={self.schedule!r}"
        return f"{super().state_key[:-1]}, {when})"

    @property
    def complete(self) -> bool:
        """Whether the schedule has ended, or all was cut before training."""
        return self.share >= 1.0 or self.record is not None

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
            cut_(module, self.record)

        before_restore(trainer, cut)

    def _find_or_record(self, module: nn.Module) -> None:
        if self.example_inputs is not None or not (
            self.config.of == "flops" or set(KINDS) & set(self.config.structures)
        ):
            self._set_targets(module, None if self.example_inputs is None else {"": self.example_inputs})
        else:
            self._recorders = record_parts(module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.masks = {name: torch.as_tensor(mask) for name, mask in state_dict["masks"].items()}
        self.record = state_dict["record"]
        self.share, self._updated, self.total = state_dict["share"], state_dict["updated"], state_dict["total"]
        means = {kind: {n: torch.as_tensor(t) for n, t in of.items()} for kind, of in state_dict["means"].items()}
        self._means.sums, self._means.counts, self._units = means["sums"], means["counts"], state_dict["units"]
        self._tables, self._counted = state_dict.get("tables", {}), state_dict.get("counted", {})
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
            self._means.clear()  # rank 0 continues with what all of them had measured
        self._resumed = False
        self.masks = {name: mask.to(pl_module.device) for name, mask in self.masks.items()}
        self._observe(pl_module)
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

    def _observe(self, pl_module: pl.LightningModule) -> None:
        """Hooks the layers whose inputs, and the blocks whose influence, the saliency needs to know."""
        needs, module = needed(self.config) if not self.complete else set(), self.target(pl_module)
        self._stop_observing()
        if "inputs" in needs:
            self._observers += observe_inputs(module, self._means)
        if "blocks" in needs:
            self._observers += observe_blocks(module, self._units, self._means)

    def _stop_observing(self) -> None:
        for hook in self._observers:
            hook.remove()
        self._observers = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Observes this batch, where the saliency needs data."""
        self._means.paused = False

    def _follow_schedule(self, step: int, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.record is not None:
            return
        assert self.total is not None
        share = self.schedule.value(step, self.total)
        if share <= self.share or (share < 1.0 and step - self._updated < self.every):
            return
        module = self.target(pl_module)
        needs = needed(self.config)
        if self._targets is None:
            return  # the first batch of manual optimization
        means = over_ranks(trainer, self._means) if needs else self._means
        if needs and not means.sums:
            return  # of a saliency that needs to see a batch
        if self.config.needs_latency:
            self._measure_latency(trainer, module, means)
        given: dict[str, Any] = {"means": means, "costs": self._costs, "tables": self._tables}
        self.masks = compute_masks(module, self._targets, self.config, share, **given)
        self.share, self._updated = share, step
        self._means.clear()
        apply_masks_(module, self.masks)
        for optimizer in trainer.optimizers:
            clear_state_(optimizer, module, self.masks)
        if self.complete:
            self._stop_observing()

    def _measure_latency(self, trainer: pl.Trainer, module: nn.Module, means: Means) -> None:
        """Measures once, on rank 0; a latency out of reach raises now, not at the end of the schedule."""
        if self._costs is not None or (self._tables and self.config.of != "latency"):
            return
        targets, new = self._targets or [], not self._tables
        if new:
            paused, self._means.paused = self._means.paused, True
            self._tables = agreed(
                trainer, lambda: measure_tables(module, targets, self.config, self._calls, timer=self.timer)
            )
            self._means.paused = paused
        if self.config.of == "latency":
            self._costs = costs_of(module, targets, self.config, self._calls, self._tables)
        if new:
            compute_masks(module, targets, self.config, means=means, costs=self._costs, tables=self._tables)

    def _set_targets(self, module: nn.Module, calls: dict[str, Any] | None) -> None:
        paused, self._means.paused = self._means.paused, True  # what is traced is no batch
        self._targets = find_targets(module, self.config, calls=calls)
        if inexact := [target for target in self._targets if not target.exact]:
            what = f"the {inexact[0].kind} of {inexact[0].name!r}"
            raise ValueError(_CUT_FIRST.format(what, "a normalization behind them sees other values"))
        if self.config.of == "latency":
            self._costs = None
        else:
            self._costs = costs_of(module, self._targets, self.config, calls, counted=self._counted)
            self._counted = self._costs.costs if isinstance(self._costs, Costs) and self.config.of == "flops" else {}
        self._calls = calls or {} if self.config.needs_latency else {}
        self._units = [unit for target in self._targets for unit in target.units]
        self._means.paused = paused

    def _find_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._targets is None and not self.complete:
            module, before = self.target(pl_module), self._units
            self._set_targets(module, agreed(trainer, lambda: calls_of(self._recorders, module)))
            if self._units != before:
                self._observe(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Finds the units from the first batch's inputs: what does not fit raises before the first step."""
        if pl_module.automatic_optimization:
            self._find_targets(trainer, pl_module)
        if self._targets is not None and not self.complete and "gradients" in needed(self.config):
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            parameters = select.named_parameters(self.target(pl_module))
            trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
            found = {name: p for name, p in parameters.items() if id(p) in stepped}
            for target in self._targets:
                own = trained & {member.name for member in target.members}
                if own & found.keys() and not own <= found.keys():
                    raise ValueError(
                        f"saliency='taylor' needs the gradients of {target.name!r} in one step, and two optimizers "
                        f"have them ({sorted(own - found.keys())[0]!r} is in another); write saliency='l2'"
                    )
            add_gradients(self._means, self._targets, found)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the share that is pruned."""
        self._means.paused = True
        self._find_targets(trainer, pl_module)
        self.log_value("amount", (1.0 if self.complete else self.share) * self.config.amount)

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
        self._stop_observing()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves what all ranks have measured."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:  # then possibly on one only
            checkpoint["callbacks"][self.state_key]["means"] = _plain_means(over_ranks(trainer, self._means))

    def full_masks(self) -> dict[str, Tensor]:
        """The masks under names relative to the LightningModule."""
        prefix = f"{self.module}." if self.module else ""
        return {prefix + name: mask for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Masks, progress and the length of training that fractions refer to."""
        masks = {name: mask.cpu() for name, mask in self.masks.items()}
        means = _plain_means(self._means)
        progress = {"share": self.share, "updated": self._updated, "total": self.total, "complete": self.complete}
        return self.saved(
            masks=masks,
            means=means,
            units=self._units,
            record=self.record,
            tables=self._tables,
            counted=self._counted,
            **progress,
        )


def over_ranks(trainer: pl.Trainer, means: Means) -> Means:
    """What all ranks have measured, on each of them; called on all."""
    if trainer.world_size == 1:
        return means
    own = {name: tuple(total.shape) for name, total in means.sums.items()}
    shapes = {n: s for rank in range(trainer.world_size) for n, s in trainer.strategy.broadcast(own, src=rank).items()}
    device = trainer.strategy.root_device
    return means.reduced(lambda t: trainer.strategy.reduce(t.to(device), reduce_op="sum"), shapes)


def _plain_means(means: Means) -> dict[str, dict[str, Tensor]]:
    parts = {"sums": means.sums, "counts": means.counts}
    return {name: {n: tensor.cpu() for n, tensor in of.items()} for name, of in parts.items()}


def _prunings(trainer: pl.Trainer) -> list[Pruning]:
    return [c for c in trainer.callbacks if isinstance(c, Pruning)]  # type: ignore[attr-defined]

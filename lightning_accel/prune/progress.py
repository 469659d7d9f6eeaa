"""Masks of a model in training, whose share rises: what they are computed from, and how far they have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .allocate import Costs
from .calibrate import Tables, costs_of, measure_tables, needed
from .config import PruneConfig
from .groups import Group
from .keep import Masks
from .latency import Calls, LatencyCosts, Timer
from .masks import apply_masks_, compute_masks
from .saliency import Means, add_gradients, observe_blocks, observe_inputs
from .targets import find_targets

Agree = Callable[[Callable[[], Any]], Any]  # what one process makes, for all of them


class Progress:
    """What a config prunes of a model, step by step.

    Attributes:
        masks: of now.
        share: of the configured amount, reached so far.
        targets: what may be pruned; `None` until `find`.
        means: of what the saliency needs to know of data, since the last update; paused outside of training steps.
        tables: of latencies, measured once.
        counted: FLOPs, counted once.
    """

    def __init__(self, config: PruneConfig) -> None:
        self.config, self.needs = config, needed(config)
        self.masks: Masks = {}
        self.share = 0.0
        self.targets: list[Group] | None = None
        self.means = Means()
        self.means.paused = True
        self.tables: Tables = {}
        self.counted: dict[str, float] = {}
        self._costs: Costs | LatencyCosts | None = None
        self._calls: Calls = {}  # example inputs, until latencies are measured
        self._units: list[str] = []  # blocks that are observed
        self._observers: list[Any] | None = None

    def find(self, module: nn.Module, calls: Calls | None) -> None:
        """Finds what may be pruned; `calls` are example inputs of the module (`""`) or of its parts."""
        paused, self.means.paused = self.means.paused, True  # what is traced is no batch
        self.targets = find_targets(module, self.config, calls=calls)
        self._costs = None
        if self.config.of != "latency":
            self._costs = costs_of(module, self.targets, self.config, calls, counted=self.counted)
            self.counted = self._costs.costs if isinstance(self._costs, Costs) and self.config.of == "flops" else {}
        self._calls = calls or {} if self.config.needs_latency else {}
        units, self._units = self._units, [unit for target in self.targets for unit in target.units]
        self.means.paused = paused
        if self._observers is not None and units != self._units:
            self.observe(module)

    def observe(self, module: nn.Module) -> None:
        """Hooks the layers whose inputs, and the blocks whose influence, the saliency needs to know."""
        self.stop_observing()
        self._observers = []
        if "inputs" in self.needs:
            self._observers += observe_inputs(module, self.means)
        if "blocks" in self.needs:
            self._observers += observe_blocks(module, self._units, self.means)

    def stop_observing(self) -> None:
        """Takes the hooks off."""
        for hook in self._observers or ():
            hook.remove()
        self._observers = None

    def add_gradients(self, module: nn.Module, stepped: set[int], every: set[int]) -> None:
        """Adds the gradients of the parameters that an optimizer steps now (their ids), where the saliency needs them.

        Args:
            every: those that any optimizer steps.

        Raises:
            ValueError: of what belongs together only a part is stepped.
        """
        if self.targets is None or "gradients" not in self.needs:
            return
        parameters = select.named_parameters(module)
        trained = {name for name, parameter in parameters.items() if id(parameter) in every}
        found = {name: p for name, p in parameters.items() if id(p) in stepped}
        for target in self.targets:
            own = trained & {member.name for member in target.members}
            if own & found.keys() and not own <= found.keys():
                raise ValueError(
                    f"saliency='taylor' needs the gradients of {target.name!r} in one step, and two optimizers have "
                    f"them ({min(own - found.keys())!r} is in another); write saliency='l2'"
                )
        add_gradients(self.means, self.targets, found)

    def update(self, module: nn.Module, share: float, means: Means, timer: Timer, agree: Agree) -> bool:
        """Computes masks for `share` of the amounts and applies them; whether it could: the saliency may need data.

        Args:
            means: those of all processes.
            agree: has latencies measured by one of them.
        """
        if self.targets is None or (self.needs and not means.sums):
            return False
        if self.config.needs_latency:
            self._measure_latency(module, means, timer, agree)
        given: dict[str, Any] = {"means": means, "costs": self._costs, "tables": self.tables}
        self.masks, self.share = compute_masks(module, self.targets, self.config, share, **given), share
        self.means.clear()
        apply_masks_(module, self.masks)
        return True

    def _measure_latency(self, module: nn.Module, means: Means, timer: Timer, agree: Agree) -> None:
        """Measures once; a latency out of reach raises now, not at the end of the schedule."""
        if self._costs is not None or (self.tables and self.config.of != "latency"):
            return
        targets, new = self.targets or [], not self.tables
        if new:
            paused, self.means.paused = self.means.paused, True
            self.tables = agree(lambda: measure_tables(module, targets, self.config, self._calls, timer=timer))
            self.means.paused = paused
        if self.config.of == "latency":
            self._costs = costs_of(module, targets, self.config, self._calls, self.tables)
        if new:
            compute_masks(module, targets, self.config, means=means, costs=self._costs, tables=self.tables)

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on, in plain types and tensors on the CPU."""
        return {
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "share": self.share,
            "means": plain_means(self.means),
            "units": self._units,
            "tables": self.tables,
            "counted": self.counted,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.masks = {name: torch.as_tensor(mask) for name, mask in state["masks"].items()}
        self.share, self._units = state["share"], state["units"]
        means = {kind: {n: torch.as_tensor(t) for n, t in of.items()} for kind, of in state["means"].items()}
        self.means.sums, self.means.counts = means["sums"], means["counts"]
        self.tables, self.counted = state.get("tables", {}), state.get("counted", {})


def plain_means(means: Means) -> dict[str, dict[str, Tensor]]:
    """Sums and counts, on the CPU."""
    parts = {"sums": means.sums, "counts": means.counts}
    return {name: {n: tensor.cpu() for n, tensor in of.items()} for name, of in parts.items()}

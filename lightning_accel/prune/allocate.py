"""How much of each structure, so that a share of the whole model's parameters or FLOPs is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .. import select
from ..inputs import ExampleInputs, copy_inputs
from .groups import Group, plain_copy
from .layers import block_of


class Costs:
    """What masks save of a model, in parameters or FLOPs, counted exactly and without running it again.

    FLOPs are those of matrix products, convolutions and attention in one forward with the example inputs; those of a
    layer are in proportion to its weights, those of attention to its heads.

    Args:
        of: `"parameters"` or `"flops"`.
        calls: example inputs of the model (under `""`) or of its parts, for FLOPs.
        counted: `costs` of the same model, in place of counting again.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Group],
        of: str,
        calls: Mapping[str, ExampleInputs] | None = None,
        counted: Mapping[str, float] | None = None,
    ) -> None:
        self.costs: dict[str, float] = {}  # of each parameter; of attention, of each module without weights
        self._heads: dict[str, int] = {}  # the target whose heads a module without weights computes
        self._blocks: dict[str, tuple[int, int]] = {}  # the target and the unit that a module without weights lies in
        if of == "parameters":
            self.costs = {name: float(p.numel()) for name, p in select.named_parameters(model).items()}
            return
        if not (calls or counted):
            raise ValueError("of='flops' counts the FLOPs of a forward and needs example_inputs=(x,)")
        self.costs = dict(counted) if counted else _own_flops(model, calls or {})
        parameters = select.named_parameters(model)
        for name in (n for n in self.costs if n not in parameters):
            for i, target in enumerate(targets):
                owners = {m.name.rpartition(".")[0].rpartition(".")[0] for m in target.members}
                if target.kind == "heads" and name in owners:
                    self._heads[name] = i
                if (unit := block_of(name, target.units)) is not None:
                    self._blocks[name] = i, unit

    def removed(self, masks: Mapping[str, Tensor], kept: list[Tensor]) -> float:
        """Share in [0, 1] that is gone with the masks, which keep `kept` of the units of each target."""
        gone = 0.0
        for name, cost in self.costs.items():
            left = masks[name].double().mean().item() if name in masks else 1.0
            if name in self._heads:
                left *= kept[self._heads[name]].double().mean().item()
            if name in self._blocks:
                target, unit = self._blocks[name]
                left *= float(kept[target][unit])
            gone += cost * (1.0 - left)
        return gone / total if (total := sum(self.costs.values())) else 0.0


def _own_flops(model: nn.Module, calls: Mapping[str, ExampleInputs]) -> dict[str, float]:
    """FLOPs under the name of the weight that they are in proportion to, else of the module that computes them."""
    own: dict[str, float] = {}
    first = {id(p): name for name, p in select.named_parameters(model).items()}
    modules = dict(select.named_modules(model))
    for part, inputs in calls.items():
        counts = select.count_flops(plain_copy(select.get_module(model, part)), *copy_inputs(inputs))
        at = f"{part}." if part else ""
        for name, count in counts.items():
            children = [n for n in counts if n.startswith(f"{name}." if name else "") and n != name]
            direct = [n for n in children if not any(n.startswith(f"{other}.") for other in children)]
            flops = count - sum(counts[n] for n in direct)
            full = (at + name).rstrip(".")
            weight = getattr(modules.get(full), "weight", None)
            key = first.get(id(weight), full)
            if flops:
                own[key] = own.get(key, 0.0) + flops
    return own


def amount_for(target: float, removed: Callable[[float], float], what: str) -> float:
    """The least share of units in [0, 1] with which the share `target` is removed, by bisection.

    Raises:
        ValueError: out of reach; the message says what is in reach.

    >>> amount_for(0.25, lambda units: units**2, "parameters")
    0.5
    """
    low, high = 0.0, 1.0
    best = removed(high)
    if best < target:
        raise ValueError(
            f"amount={target:.3g} of {what} is out of reach: with one unit left of each, {best:.1%} are gone; write "
            f"amount={int(best * 100) / 100} or add structures, as structure=('neurons', 'heads', 'layers')"
        )
    if target <= 0:
        return 0.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(middle) >= target else (middle, high)
    return high

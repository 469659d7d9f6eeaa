"""Mixed precision of weights: what quantizing each module alone costs in loss, and which scheme each should have.

    increase(module, scheme) = loss(model with that module alone fake-quantized) - loss(float model)

Increases are taken to add up, as in HAWQ (Dong et al. 2019, arXiv:1905.03696): small ones do nearly, large ones need
not. `allocate` gives each module the scheme for which increase + price * bytes is least, at the lowest price of a byte
that keeps the size, or the highest that keeps the loss, and spends what is left of the budget on single modules: near
the best choice, not always the best (a knapsack). Measure the model that comes of it.
"""

from __future__ import annotations

import copy
import glob
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..loss import default_loss
from .config import SCHEMES, QuantConfig
from .fake import shapes_of, unprepare_
from .prepare import plan, prepare_, prepare_as_planned_
from .ranges import affine_quantizers, calibrate_, load_static_state_, static_state

Loss = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> mean loss
FLOAT = "float"


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured; modules that share a weight stand together under their names, joined by `+`.

    Attributes:
        loss: of the float model.
        increase: module -> scheme -> loss with that module alone quantized, minus `loss`.
        size: module -> scheme (and `"float"`) -> bytes of its weight and scales.
        unfit: modules with weights that fit none of the schemes -> bytes of their weight.
    """

    loss: float
    increase: dict[str, dict[str, float]]
    size: dict[str, dict[str, int]]
    unfit: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        schemes = sorted({scheme for row in self.increase.values() for scheme in row})
        lines = [f"loss {self.loss:.4f}; increase with one module alone quantized, the most sensitive first"]
        order = sorted(self.increase, key=lambda name: -max(self.increase[name].values()))
        for name in order:
            figures = ", ".join(f"{s} {self.increase[name][s]:+.5f}" for s in schemes if s in self.increase[name])
            lines.append(f"  {name}: {figures}")
        return "\n".join(lines)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    schemes: Sequence[str] = SCHEMES,
    *,
    loss: Loss = default_loss,
    group_size: int = 32,
    observer: str = "minmax",
) -> Sensitivity:
    """Quantizes each module of `model` alone, in each scheme, and measures the loss on the batches of `loader`.

    The model is not changed; it takes a forward pass a module, scheme and batch. Schemes that do not fit a module are
    left out there.

    Args:
        loader: held-out batches: mappings with labels or (input, target), or whatever `loss` takes.
        loss: (model, batch) -> mean loss.

    Raises:
        ValueError: no batches, an unknown scheme, or nothing to quantize.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batches = [(torch.randn(64, 32), torch.randint(0, 4, (64,)))]
    >>> found = sensitivity(model, batches, schemes=("int8", "int4-int8"))
    >>> sorted(found.increase), found.size["2"]
    (['0', '2'], {'float': 512, 'int8': 144, 'int4-int8': 72})
    >>> sum(found.size[name][scheme] for name, scheme in allocate(found, size=0.2).items()) <= 0.2 * (4096 + 512)
    True
    """
    batches = list(loader)
    if not schemes or isinstance(schemes, str):
        raise ValueError(f"schemes={schemes!r} is no list of schemes; write schemes=('int8', 'int4-int8')")
    if not batches:
        raise ValueError("the loader gives no batches; write sensitivity(model, [(x, y), ...]) with held-out data")
    model = unprepare_(copy.deepcopy(select.unwrap(model)))
    model.eval()
    every = dict.fromkeys((*schemes, *SCHEMES))
    configs = {scheme: QuantConfig(scheme, group_size=group_size, observer=observer) for scheme in every}
    everything, reached = _reached(model, configs)
    fit = set().union(*(reached[scheme] for scheme in schemes))
    unfit = [name for name in everything if name not in fit and any(name in names for names in reached.values())]

    def measured() -> float:
        return sum(float(loss(model, batch)) for batch in batches) / len(batches)

    base = measured()
    if not math.isfinite(base):
        raise ValueError(f"the loss of the float model is {base}; look at the batches and the weights")
    ranges, unreached = _ranges(model, batches, loss, configs["int8-static"] if "int8-static" in schemes else None)
    reached["int8-static"] -= unreached
    increase: dict[str, dict[str, float]] = {}
    size: dict[str, dict[str, int]] = {}
    for unit in _units(model, [name for name in everything if name in fit]):
        shapes = shapes_of(select.get_module(model, unit[0]))
        label = "+".join(unit)
        increase[label], size[label] = {}, {FLOAT: _float_bytes(model, unit[0])}
        for scheme in (s for s in schemes if reached[s].issuperset(unit)):
            alone = plan(model, configs[scheme], only=dict.fromkeys(unit, scheme))
            prepare_as_planned_(model, configs[scheme], alone)
            load_static_state_(model, ranges)
            increase[label][scheme] = measured() - base
            done = next(entry.done for entry in alone.entries if entry.done is not None)
            size[label][scheme] = sum(_bytes(done, *shape, group_size) for shape in shapes)
            unprepare_(model)
    left = {label: size.pop(label)[FLOAT] for label, row in increase.items() if not row}
    left |= {"+".join(unit): _float_bytes(model, unit[0]) for unit in _units(model, unfit)}
    increase = {label: row for label, row in increase.items() if row}
    if not increase:
        more = "; add 'int8' to schemes" if "int8" not in schemes else ": it has no layer that can be quantized"
        raise ValueError(f"no module of {type(model).__name__} fits {tuple(schemes)}, groups of {group_size}{more}")
    return Sensitivity(base, increase, size, left)


def _reached(model: nn.Module, configs: Mapping[str, QuantConfig]) -> tuple[list[str], dict[str, set[str]]]:
    """Names of all modules with weights, and for each scheme of those that it fits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups that do not divide: such schemes are left out
        plans = {scheme: plan(model, config).entries for scheme, config in configs.items()}
    reached = {s: {e.name for e in entries if e.done == s or _as_int8(e, s)} for s, entries in plans.items()}
    return [entry.name for entry in next(iter(plans.values()))], reached


def _as_int8(entry: select.Entry, scheme: str) -> bool:
    """Whether it is an embedding in int8-static, which is that of int8."""
    return scheme == "int8-static" and entry.done == "int8" and entry.reason is None


def _ranges(
    model: nn.Module, batches: list[Any], loss: Loss, config: QuantConfig | None
) -> tuple[dict[str, Any], set[str]]:
    """Ranges of static activations of all modules, and the names of those that no batch reaches."""
    if config is not None and any(entry.done == config.scheme for entry in plan(model, config).entries):
        prepare_(model, config)
        calibrate_(model, batches, run=loss, all_reached=False)
    unreached = {name.rpartition(".")[0] for name, q in affine_quantizers(model).items() if not q.found}
    state = static_state(model)
    unprepare_(model)
    return state, unreached


def allocate(found: Sensitivity, *, size: float | None = None, loss: float | None = None) -> dict[str, str | None]:
    """A scheme for each module, as `QuantConfig(overrides=...)` takes it; `None` leaves a module in float.

    Modules that fit no scheme that was measured stay in float, and count.

    Args:
        size: at most so many bytes (an int), or such a share of the float weights (a float in (0, 1]), at little loss.
        loss: at most such an increase in loss, added up over modules, at a small size.

    Raises:
        ValueError: neither or both given, a budget that is none, or the smallest schemes are larger than `size`.

    >>> found = Sensitivity(1.0, {"a": {"int8": 0.001}, "b": {"int8": 0.1}},
    ...                     {"a": {"float": 400, "int8": 101}, "b": {"float": 400, "int8": 101}})
    >>> allocate(found, loss=0.05)
    {'a': 'int8', 'b': None}
    """
    if (size is None) == (loss is None):
        raise ValueError("give one budget: allocate(found, size=0.2), or allocate(found, loss=0.05)")
    if isinstance(budget := loss if size is None else size, bool) or not isinstance(budget, int | float):
        raise ValueError(f"the budget is {budget!r}, expected a number; write size=0.2, size=1_000_000 or loss=0.05")
    if size is not None and (size <= 0 or (isinstance(size, float) and not size <= 1)):
        raise ValueError(f"size={size} is neither bytes (an int) nor a share in (0, 1] (a float); write size=0.2")
    options = {
        name: [(FLOAT, 0.0, found.size[name][FLOAT])]
        + [(scheme, more, found.size[name][scheme]) for scheme, more in row.items()]
        for name, row in found.increase.items()
    }

    def at(price: float) -> list[_Row]:
        return [min(rows, key=lambda row: (row[1] + price * row[2], row[2])) for rows in options.values()]

    # choices change where two schemes of one module cost the same: each is looked up just above such a price
    prices = {0.0}
    for rows in options.values():
        prices |= {(b[1] - a[1]) / (a[2] - b[2]) for a in rows for b in rows if a[2] > b[2] and b[1] > a[1]}
    choices = [at(price * (1 + 1e-9)) for price in sorted(prices)]
    if size is not None:
        rest = sum(found.unfit.values())
        whole = rest + sum(row[FLOAT] for row in found.size.values())
        most = (size * whole if isinstance(size, float) else size) - rest
        fits = [choice for choice in choices if _size(choice) <= most]
        if not fits:
            least = rest + _size(choices[-1])
            of = f" ({rest} of them fit none)" if rest else ""
            raise ValueError(
                f"size={size} is {most + rest:.0f} bytes, the smallest schemes take {least}{of}; write size={least}, "
                "or measure smaller schemes: sensitivity(..., schemes=('int8', 'int4-int8'))"
            )
        best = _fill(min(fits, key=_loss), list(options.values()), lambda choice: _size(choice) <= most, _loss)
    else:
        assert loss is not None
        within = [choice for choice in choices if _loss(choice) <= loss]
        if not within:
            raise ValueError(f"loss={loss} is below what any choice costs ({min(map(_loss, choices)):.4g}); raise it")
        best = _fill(min(within, key=_size), list(options.values()), lambda choice: _loss(choice) <= loss, _size)
    schemes = {name: None if row[0] == FLOAT else row[0] for name, row in zip(options, best, strict=True)}
    schemes |= dict.fromkeys(found.unfit)  # or the config's own scheme would take them, unmeasured
    return {glob.escape(part): scheme for name, scheme in schemes.items() for part in name.split("+")}


_Row = tuple[str, float, int]  # scheme, increase in loss, bytes


def _loss(choice: Sequence[_Row]) -> float:
    return sum(row[1] for row in choice)


def _size(choice: Sequence[_Row]) -> int:
    return sum(row[2] for row in choice)


def _fill(
    choice: list[_Row],
    options: list[list[_Row]],
    allowed: Callable[[list[_Row]], bool],
    cost: Callable[[list[_Row]], float],
) -> list[_Row]:
    """Changes one module at a time, the most useful change first, for as long as that is allowed and costs less."""
    while True:
        changed = [[*choice[:i], row, *choice[i + 1 :]] for i, rows in enumerate(options) for row in rows]
        better = [other for other in changed if allowed(other) and cost(other) < cost(choice)]
        if not better:
            return choice
        choice = min(better, key=cost)


def _units(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Names of modules to be quantized together: those that share a weight."""
    units: dict[int, list[str]] = {}
    for name in names:
        module = select.get_module(model, name)
        units.setdefault(id(getattr(module, "weight", module)), []).append(name)
    return list(units.values())


def _float_bytes(model: nn.Module, name: str) -> int:
    return sum(4 * rows * inputs for rows, inputs in shapes_of(select.get_module(model, name)))


def _bytes(scheme: str, rows: int, inputs: int, group: int) -> int:
    if scheme.startswith("int4"):
        return rows * (inputs // 2 + 2 * (inputs // group))
    return rows * (inputs + (8 if scheme == "int8-static" else 4))

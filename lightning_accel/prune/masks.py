"""Masks: which weights or units go, and keeping them at zero.

Masks are plain boolean tensors keyed by parameter name, broadcastable to the parameter; they live outside the
model, so that its state_dict never changes (no `weight_orig`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import select
from ..inputs import ExampleInputs
from ..select import Coverage, Entry
from .allocate import Costs, amount_for
from .calibrate import Tables, costs_of, measure, measure_tables, saliencies_of
from .config import PruneConfig
from .groups import Group
from .keep import Masks, keep_units, masks_of
from .latency import LatencyCosts, Timer, gain, time_in_turns
from .losses import equal_rises
from .saliency import Means
from .targets import find_targets


def prune_model_(
    model: nn.Module,
    config: PruneConfig,
    *,
    example_inputs: ExampleInputs | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    timer: Timer = time_in_turns,
) -> Masks:
    """Sets the least salient weights or units of `model` to zero, in place, and returns the masks.

    Args:
        example_inputs: needed for all structures but single weights and patterns: the model is traced to find what
            belongs together.
        calibration: batches for the saliencies that need data and for `scope="sensitivity"`: mappings of keyword
            inputs, tensors, or tuples whose first item is the input.
        loss: (model, batch) -> scalar, for `"taylor"` and `scope="sensitivity"`; by default that which a transformers
            model puts out for a batch with labels, or the cross-entropy of (input, classes).
        timer: (models, calls) -> seconds of each, for `of="latency"` and `scope="latency"`; by default eager forwards
            of the example inputs in turns, `prune.time_in_turns`.

    Raises:
        ValueError: nothing to prune, or `example_inputs`, `calibration` or `loss` missing.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=(torch.randn(2, 8),))
    >>> int(masks["0.bias"].sum()), int((model[2].weight.abs().sum(0) > 0).sum())
    (8, 8)
    """
    targets = find_targets(model, config, example_inputs)
    batches = list(calibration) if calibration is not None else []
    means = measure(model, targets, config, batches, loss)
    calls = None if example_inputs is None else {"": example_inputs}
    tables = measure_tables(model, targets, config, calls, means=means, calibration=batches, loss=loss, timer=timer)
    costs = costs_of(model, targets, config, calls, tables)
    masks = compute_masks(model, targets, config, means=means, costs=costs, tables=tables)
    apply_masks_(model, masks)
    return masks


def compute_masks(
    model: nn.Module,
    targets: list[Group],
    config: PruneConfig,
    share: float = 1.0,
    *,
    means: Means | None = None,
    costs: Costs | LatencyCosts | None = None,
    tables: Tables | None = None,
) -> Masks:
    """Masks for `share` in [0, 1] of the amounts of `config`, from the weights as they are now.

    What is zero already is the least salient. Ties are decided by position; a width, a list of layers or a weight keeps
    at least one unit.

    Args:
        means: of what the saliency needs to know of data.
        costs: from `costs_of`, where the amount is a share of parameters, FLOPs or latency.
        tables: from `measure_tables`, where the scope is `"latency"` or `"sensitivity"`.

    Raises:
        ValueError: an amount out of reach, or means missing.
    """
    parameters = select.all_parameters(model)
    saliencies = saliencies_of(model, targets, config, means)
    fixed = [select.first_match(t.name, config.overrides, math.nan) for t in targets]
    if config.scope == "latency":  # what is kept for a second of time; what is zero, at 0 or -1, stays the least
        gains = [max(gain(curve), 1e-12) for curve in (tables or {})["latency"]]
        saliencies = [s.where(s <= 0, s / g) for s, g in zip(saliencies, gains, strict=True)]

    def kept_at(amount: float) -> list[Tensor]:
        amounts = [amount if math.isnan(a) else share * a for a in fixed]
        if config.scope == "sensitivity":
            for same in _free(targets, fixed, together=config.of != "units"):
                shares = equal_rises([(tables or {})["losses"][i] for i in same], amount)
                for i, own in zip(same, shares, strict=True):
                    amounts[i] = own
        return keep_units(targets, saliencies, amounts, config.scope, config.round_to)

    amount = share * config.amount
    if costs is not None:

        def removed(units: float) -> float:
            kept = kept_at(units)
            return costs.removed(masks_of(targets, kept, parameters), kept)

        amount = amount_for(amount, removed, config.of)
    return masks_of(targets, kept_at(amount), parameters)


def _free(targets: list[Group], fixed: list[float], together: bool) -> list[list[int]]:
    """Targets whose amount no override fixes: all of them, or those of each kind."""
    sets: dict[str, list[int]] = {}
    for i, target in enumerate(targets):
        if math.isnan(fixed[i]):
            sets.setdefault("" if together else target.kind, []).append(i)
    return list(sets.values())


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Masks, only: set[int] | None = None) -> None:
    """Zeroes what the masks drop, in place; `only` limits it to these `id(parameter)`.

    Raises:
        ValueError: a mask names a parameter that the model does not have, or has another shape.

    >>> layer = nn.Linear(2, 2)
    >>> apply_masks_(layer, {"bias": torch.tensor([True, False])})
    >>> layer.bias[1].item()
    0.0
    """
    parameters = select.all_parameters(model)
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(
                f"the masks name {name!r}, which {type(model).__name__} does not have; they were made for another model"
            )
        parameter = parameters[name]
        if only is None or id(parameter) in only:
            try:
                parameter.mul_(mask.to(parameter.device))
            except RuntimeError as error:
                raise ValueError(
                    f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
                ) from error


@torch.no_grad()
def clear_state_(optimizer: Optimizer, model: nn.Module, masks: Masks) -> None:
    """Zeroes the optimizer's momentum and moments of weights that the masks drop, so that none regrows from them."""
    parameters = select.all_parameters(model)
    for name, mask in masks.items():
        for key, value in optimizer.state.get(parameters[name], {}).items():
            if key != "step" and isinstance(value, Tensor) and value.shape == parameters[name].shape:
                value.mul_(mask.to(value.device))


def pruning_coverage(model: nn.Module, masks: Masks) -> Coverage:
    """What share of the parameters of `model` the masks zero, and of which parameters."""
    coverage = Coverage("pruning")
    zeroed = 0.0
    for name, parameter in select.named_parameters(model).items():
        if name in masks:
            gone = 1.0 - masks[name].float().mean().item()
            zeroed += gone * parameter.numel()
            coverage.entries.append(Entry(name, "parameter", parameter.numel(), done=f"{gone:.1%} zero"))
        else:
            coverage.entries.append(Entry(name, "parameter", parameter.numel(), reason="not selected"))
    coverage.touched = zeroed
    return coverage

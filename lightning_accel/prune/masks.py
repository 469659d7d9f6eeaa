"""Saliency and masks: which weights or neurons go, and keeping them at zero.

Masks are plain boolean tensors keyed by parameter name, broadcastable to the parameter; they live outside the
model, so that its state_dict never changes (no `weight_orig`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import select
from ..capture import call_example
from ..inputs import ExampleInputs, inputs_of_batch
from ..select import Coverage, Entry
from .allocate import Costs, amount_for
from .config import PruneConfig
from .groups import Group, Member
from .patterns import keep_n_of_m, pattern_of
from .saliency import SALIENCIES, Means, add_gradients, observe_blocks, observe_inputs, saliency
from .targets import find_targets

Masks = dict[str, Tensor]  # parameter name -> bool, broadcastable to the parameter; True keeps


def prune_model_(
    model: nn.Module,
    config: PruneConfig,
    *,
    example_inputs: ExampleInputs | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Masks:
    """Sets the least salient weights or units of `model` to zero, in place, and returns the masks.

    Args:
        example_inputs: needed for all structures but single weights and patterns: the model is traced to find what
            belongs together.
        calibration: batches for the saliencies that need data: mappings of keyword inputs, tensors, or tuples whose
            first item is the input.
        loss: (model, batch) -> scalar, for `"taylor"`; by default that which a transformers model puts out for a batch
            with labels.

    Raises:
        ValueError: nothing to prune, or `example_inputs`, `calibration` or `loss` missing.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=(torch.randn(2, 8),))
    >>> int(masks["0.bias"].sum()), int((model[2].weight.abs().sum(0) > 0).sum())
    (8, 8)
    """
    targets = find_targets(model, config, example_inputs)
    means = measure(model, targets, config, calibration, loss)
    calls = None if example_inputs is None else {"": example_inputs}
    masks = compute_masks(model, targets, config, means=means, costs=costs_of(model, targets, config, calls))
    apply_masks_(model, masks)
    return masks


def measure(
    model: nn.Module,
    targets: Sequence[Group],
    config: PruneConfig,
    calibration: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Means:
    """What the saliency of `config` needs to know of the calibration batches; nothing for those that need none.

    Raises:
        ValueError: it needs some, and there are none.
    """
    means, needs = Means(), needed(config)
    if not needs:
        return means
    batches = list(calibration) if calibration is not None else []
    if not batches:
        names = sorted({config.saliency_of(s) for s in config.structures} - {"l1", "l2", "random"})
        raise ValueError(
            f"saliency={names[0]!r} is measured on data; write calibration=[batch, ...], some batches of inputs, "
            "or a saliency that needs none: saliency='l2'"
        )
    training = model.training
    model.eval()
    handles = observe_inputs(model, means) if "inputs" in needs else []
    if "blocks" in needs:
        handles += observe_blocks(model, [unit for target in targets for unit in target.units], means)
    try:
        for batch in batches:
            if "gradients" in needs:
                _measure_gradients(model, targets, batch, loss or _own_loss, means)
            if needs - {"gradients"}:
                call_example(model, inputs_of_batch(model, batch))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return means


def needed(config: PruneConfig) -> set[str]:
    """What the saliencies of a config need beside the weights."""
    return {SALIENCIES[config.saliency_of(structure)] for structure in config.structures} - {""}


def _measure_gradients(
    model: nn.Module, targets: Sequence[Group], batch: Any, loss: Callable[[nn.Module, Any], Tensor], means: Means
) -> None:
    before = {p: p.grad for p in model.parameters()}
    try:
        for parameter in before:
            parameter.grad = None
        with torch.enable_grad():
            loss(model, batch).backward()
        add_gradients(means, targets, dict(_all_parameters(model)))
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    found = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if found is None:
        raise ValueError(
            "saliency='taylor' needs the gradients of a loss; give batches with labels to a model that computes it, or "
            "write loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1])"
        )
    return found


def compute_masks(
    model: nn.Module,
    targets: list[Group],
    config: PruneConfig,
    share: float = 1.0,
    *,
    means: Means | None = None,
    costs: Costs | None = None,
) -> Masks:
    """Masks for `share` in [0, 1] of the amounts of `config`, from the weights as they are now.

    What is zero already is the least salient. Ties are decided by position; a width, a list of layers or a weight keeps
    at least one unit.

    Args:
        means: of what the saliency needs to know of data.
        costs: from `costs_of`, where the amount is a share of parameters or FLOPs.

    Raises:
        ValueError: an amount out of reach, or means missing.
    """
    parameters = dict(_all_parameters(model))
    saliencies = [saliency(config.saliency_of(t.kind), t, parameters, means, config.seed) for t in targets]
    fixed = [select.first_match(t.name, config.overrides, math.nan) for t in targets]

    def kept_at(amount: float) -> list[Tensor]:
        return _keep(targets, saliencies, [amount if math.isnan(a) else share * a for a in fixed], config.scope)

    amount = share * config.amount
    if costs is not None:

        def removed(units: float) -> float:
            kept = kept_at(units)
            return costs.removed(_masks(targets, kept, parameters), kept)

        amount = amount_for(amount, removed, config.of)
    return _masks(targets, kept_at(amount), parameters)


def costs_of(
    model: nn.Module, targets: list[Group], config: PruneConfig, calls: Mapping[str, ExampleInputs] | None
) -> Costs | None:
    """What `compute_masks` needs to reach a share of parameters or FLOPs; `None` for a share of units."""
    return None if config.of == "units" else Costs(model, targets, config.of, calls)


def _masks(targets: list[Group], kept: list[Tensor], parameters: Mapping[str, Tensor]) -> Masks:
    masks: Masks = {}
    for target, keep in zip(targets, kept, strict=True):
        for member in target.members:
            if (parameter := parameters.get(member.name)) is None:
                continue  # a buffer
            mask = _mask(member, keep, parameter)
            masks[member.name] = masks[member.name] & mask if member.name in masks else mask
    return masks


def _mask(member: Member, keep: Tensor, parameter: Tensor) -> Tensor:
    if member.unit is not None:
        return keep[member.unit].view([1] * parameter.dim())
    if member.dim < 0 and not len(member.index):
        return keep.view(parameter.shape)
    shape = list(parameter.shape)
    if member.dim >= 0:
        shape = [1] * parameter.dim()
        shape[member.dim] = parameter.shape[member.dim]
    mask = torch.ones(math.prod(shape), dtype=torch.bool, device=keep.device)
    mask[member.index.to(keep.device)[~keep]] = False
    return mask.view(shape)


def _keep(targets: list[Group], saliencies: list[Tensor], amounts: list[float], scope: str) -> list[Tensor]:
    """Boolean [width] of each target: units that stay. Units of different kinds are not compared."""
    kept = [torch.ones_like(values, dtype=torch.bool) for values in saliencies]
    sets: dict[Any, list[int]] = {}
    for i, target in enumerate(targets):
        sets.setdefault(target.kind if scope == "global" else i, []).append(i)
    for same in sets.values():
        if (pattern := pattern_of(targets[same[0]].kind)) is not None and pattern[0] == "n:m":
            for i in same:
                full = 1 - pattern[1] / pattern[2]
                kept[i] = keep_n_of_m(saliencies[i], *pattern[1:], share=amounts[i] / full)
            continue
        number = sum(round(amounts[i] * len(saliencies[i])) for i in same)
        order = torch.cat([saliencies[i] for i in same]).sort(stable=True).indices
        keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
        keep[order[:number]] = False
        for i, part in zip(same, keep.split([len(saliencies[i]) for i in same]), strict=True):
            if not part.any():
                part[saliencies[i].argmax()] = True
            kept[i] = part
    return kept


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
    parameters = dict(_all_parameters(model))
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
    parameters = dict(_all_parameters(model))
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


def _all_parameters(model: nn.Module):
    return ((select.canonical_name(n), p) for n, p in model.named_parameters(remove_duplicate=False))

"""Saliency and masks: which weights or neurons go, and keeping them at zero.

Masks are plain boolean tensors keyed by parameter name, broadcastable to the parameter; they live outside the
model, so that its state_dict never changes (no `weight_orig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from ..select import Coverage, Entry
from .groups import KINDS, Group, Member, find_groups, find_groups_below

if TYPE_CHECKING:
    from ..inputs import ExampleInputs

Masks = dict[str, Tensor]  # parameter name -> bool, broadcastable to the parameter; True keeps

STRUCTURES = ("unstructured", *KINDS)
_PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class PruneConfig:
    """What is pruned and how much; the same object goes to the functions and to the callback.

    Args:
        structure: `"unstructured"` (single weights, by |w|: zeros, no speed on a CPU), or what becomes physically
            smaller: `"neurons"` (the inner width of feed-forward blocks), `"heads"` (whole groups of them where
            keys are shared), `"channels"` of convolutions, `"hidden"` (the width of the residual stream).
        amount: share in [0, 1) of the selected weights or neurons that is gone at the end, never a share of what
            is left.
        scope: `"uniform"` takes `amount` from each layer, `"global"` from all together.
        overrides: glob pattern over module names -> the amount there, or `None` to leave the module alone; the
            first pattern that matches wins. For neurons the name is that of the group's first layer.

    Raises:
        ValueError: unknown structure or scope, or an amount outside [0, 1).

    >>> PruneConfig("neurons", amount=0.5, overrides={"head.*": None, "*.down_proj": 0.25}).scope
    'uniform'
    >>> PruneConfig(amount=50)
    Traceback (most recent call last):
    ValueError: amount=50 is outside [0, 1): it is a share, write amount=0.5 for half
    """

    structure: str = "unstructured"
    amount: float = 0.5
    scope: str = "uniform"
    overrides: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise ValueError(f"unknown structure {self.structure!r}; write one of {STRUCTURES}")
        if self.scope not in ("uniform", "global"):
            raise ValueError(f"unknown scope {self.scope!r}; write 'uniform' or 'global'")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides={self.overrides!r} is no mapping; write overrides={{'head.*': None}}")
        _check_amount(self.amount)
        for amount in self.overrides.values():
            if amount is not None:
                _check_amount(amount)


def _check_amount(amount: float) -> None:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ValueError(f"amount={amount!r} is no number: it is a share, write amount=0.5 for half")
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"amount={amount} is outside [0, 1): it is a share, write amount=0.5 for half")


def prune_model_(model: nn.Module, config: PruneConfig, *, example_inputs: ExampleInputs | None = None) -> Masks:
    """Sets the least salient weights or neurons of `model` to zero, in place, and returns the masks.

    `example_inputs` are needed for `structure="neurons"`: the model is traced to find what belongs together.

    Raises:
        ValueError: nothing to prune, or `example_inputs` missing.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=(torch.randn(2, 8),))
    >>> int(masks["0.bias"].sum()), int((model[2].weight.abs().sum(0) > 0).sum())
    (8, 8)
    """
    targets = find_targets(model, config, example_inputs)
    masks = compute_masks(model, targets, config)
    apply_masks_(model, masks)
    return masks


def find_targets(
    model: nn.Module,
    config: PruneConfig,
    example_inputs: ExampleInputs | None = None,
    calls: Mapping[str, ExampleInputs] | None = None,
) -> list[Group]:
    """What `config` may prune in `model`: a group for each feed-forward width, or for each weight tensor.

    Args:
        calls: in place of `example_inputs`, those of submodules by name, where `model` is never called as a whole.

    Raises:
        ValueError: nothing to prune, or `example_inputs` missing.
    """
    if config.structure == "unstructured":
        parameters = select.named_parameters(model)
        weights = {
            name: f"{name}.weight".lstrip(".")
            for name, module in select.named_modules(model)
            if isinstance(module, _PRUNABLE)
        }
        found = [
            Group(n, parameters[w].numel(), (Member(w, -1, torch.arange(0)),), "weights")
            for n, w in weights.items()
            if w in parameters
        ]
    elif calls is not None:
        found = find_groups_below(model, calls, config.structure)
    elif example_inputs is None:
        raise ValueError(f"structure={config.structure!r} needs example_inputs=(x,) (or a dict of keyword inputs)")
    else:
        found = find_groups(model, example_inputs, config.structure)
    if not found:
        raise ValueError(
            f"{config.structure} pruning found nothing to prune in {type(model).__name__}; "
            "it needs linear or convolution layers (for neurons: two with only activations between)"
        )
    amounts = select.assign([g.name for g in found], config.overrides, config.amount)
    found = [g for g in found if amounts[g.name] is not None]
    if not found:
        raise ValueError("every module is excluded by overrides; remove one of the `None` patterns")
    return found


def compute_masks(model: nn.Module, targets: list[Group], config: PruneConfig, share: float = 1.0) -> Masks:
    """Masks for `share` in [0, 1] of the amounts of `config`, from the magnitudes of the weights as they are now.

    Saliency of a weight: |w|. Of a neuron: the L2 norm of every weight and bias that belongs to it, so that zeroed
    neurons stay the least salient. Ties are decided by position; a layer keeps at least one neuron.
    """
    parameters = dict(_all_parameters(model))
    saliencies = [saliency(target, parameters) for target in targets]
    amounts = [share * select.first_match(t.name, config.overrides, config.amount) for t in targets]
    kept = _keep(saliencies, amounts, config.scope == "global")
    masks: Masks = {}
    for target, keep in zip(targets, kept, strict=True):
        for member in target.members:
            if (parameter := parameters.get(member.name)) is None:
                continue  # a buffer
            if member.dim < 0:
                mask = keep.view(parameter.shape)
            else:
                shape = [1] * parameter.dim()
                shape[member.dim] = parameter.shape[member.dim]
                mask = torch.ones(shape[member.dim], dtype=torch.bool, device=keep.device)
                mask[member.index.to(keep.device)[~keep]] = False
                mask = mask.view(shape)
            masks[member.name] = masks[member.name] & mask if member.name in masks else mask
    return masks


def saliency(target: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Saliency [width] of the weights or neurons of one target, in float32.

    Weights: |w|. Neurons: sqrt(sum of w^2 over all of the neuron's weights and biases).
    """
    first = target.members[0]
    if first.dim < 0:
        return parameters[first.name].detach().float().abs().flatten()
    squares = torch.zeros(target.width, device=parameters[first.name].device)
    for member in target.members:
        if member.name in parameters:
            values = parameters[member.name].detach().float().square().movedim(member.dim, 0)
            sums = values.flatten(1).sum(1) if values.dim() > 1 else values
            squares += sums[member.index.to(sums.device)].sum(1)
    return squares.sqrt()


def _keep(saliencies: list[Tensor], amounts: list[float], together: bool) -> list[Tensor]:
    if together:
        number = sum(round(a * len(s)) for a, s in zip(amounts, saliencies, strict=True))
        order = torch.cat(saliencies).sort(stable=True).indices
        keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
        keep[order[:number]] = False
        kept = list(keep.split([len(s) for s in saliencies]))
    else:
        kept = []
        for values, amount in zip(saliencies, amounts, strict=True):
            keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
            keep[values.sort(stable=True).indices[: round(amount * len(values))]] = False
            kept.append(keep)
    for keep, values in zip(kept, saliencies, strict=True):
        if not keep.any():
            keep[values.argmax()] = True
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

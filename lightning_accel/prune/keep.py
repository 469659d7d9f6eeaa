"""Which units stay, given their saliencies and the share that goes; and the masks that say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import Group, Member
from .patterns import keep_n_of_m, pattern_of

Masks = dict[str, Tensor]  # parameter name -> bool, broadcastable to the parameter; True keeps
_ROUNDED = ("neurons", "channels", "hidden")


def keep_units(
    targets: list[Group], saliencies: list[Tensor], amounts: list[float], scope: str = "uniform", round_to: int = 1
) -> list[Tensor]:
    """Boolean [width] of each target: units that stay. Units of different kinds are not compared.

    Args:
        amounts: share of units of each target that goes; with a scope over several targets, of all of them together.
        scope: `"global"` or `"latency"` compare the units of all targets of a kind, others those of each alone.
        round_to: see `rounded`.
    """
    kept = [torch.ones_like(values, dtype=torch.bool) for values in saliencies]
    sets: dict[Any, list[int]] = {}
    for i, target in enumerate(targets):
        sets.setdefault(target.kind if scope in ("global", "latency") else i, []).append(i)
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
            left = rounded(int(part.sum()), targets[i], round_to)
            kept[i] = part if left == int(part.sum()) else most_salient(saliencies[i], left)
    return kept


def rounded(left: int, target: Group, round_to: int) -> int:
    """The multiple of `round_to` in [round_to, width] nearest to `left`; a width that stays whole stays as it is, and
    heads, layers and single weights are not rounded.

    >>> neurons = Group("a", 100, (), "neurons")
    >>> [rounded(left, neurons, 16) for left in (3, 41, 90, 99, 100)]
    [16, 48, 96, 96, 100]
    """
    if target.kind not in _ROUNDED or left == target.width or target.width <= round_to:
        return left
    nearest = round_to * math.floor(left / round_to + 0.5)
    return min(max(nearest, round_to), target.width // round_to * round_to)


def most_salient(saliency: Tensor, left: int) -> Tensor:
    """Boolean [width]: the `left` units of the greatest saliency."""
    keep = torch.ones_like(saliency, dtype=torch.bool)
    keep[saliency.sort(stable=True).indices[: len(saliency) - left]] = False
    return keep


def masks_of(targets: list[Group], kept: list[Tensor], parameters: Mapping[str, Tensor]) -> Masks:
    """A mask for each parameter that has units which go, or could have."""
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

"""Physical shrinking: what the masks zeroed is cut out, and the model computes the same with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from .groups import ExampleInputs, Group, find_groups
from .masks import Masks, apply_masks_


def shrink_model(model: nn.Module, masks: Masks, *, example_inputs: ExampleInputs) -> nn.Module:
    """A copy of `model` without the neurons that `masks` drop; it computes what the masked model computes.

    A neuron is cut out where the masks drop all of its weights. Masks of single weights have no physical form and are
    left as zeros.

    Raises:
        ValueError: the masks belong to another model, or drop neurons that cannot be cut out.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> from lightning_accel import PruneConfig, prune_model_
    >>> inputs = (torch.randn(2, 8),)
    >>> masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=inputs)
    >>> shrink_model(model, masks, example_inputs=inputs)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    model = copy.deepcopy(select.unwrap(model))
    apply_masks_(model, masks)
    dropped = _dropped_neurons(model, masks)
    if not dropped:
        return model
    groups = find_groups(model, example_inputs)
    kept = [_kept(group, masks) for group in groups]
    for group, keep in zip(groups, kept, strict=True):
        for member in group.members:
            dropped[member] = dropped.get(member, ~keep) & keep
    left = next((name for (name, _), neurons in dropped.items() if neurons.any()), None)
    if left is not None:
        raise ValueError(
            f"the masks drop neurons of {left!r} that cannot be cut out: masks of the same neurons are missing or "
            "disagree, or they were made with other example inputs; use the masks that prune_model_ returned"
        )
    for group, keep in zip(groups, kept, strict=True):
        if not keep.all():
            for name, dim in group.members:
                _cut(model, name, dim, keep)
    _record_widths(model, groups, kept)
    return model


def _dropped_neurons(model: nn.Module, masks: Masks) -> dict[tuple[str, int], Tensor]:
    """(parameter name, dimension) -> boolean [width], the neurons that masks over one dimension drop."""
    parameters = dict(select.named_parameters(model))
    found = {}
    for name, mask in masks.items():
        dims = [dim for dim, size in enumerate(mask.shape) if size > 1]
        if len(dims) == 1 and name in parameters and mask.numel() < parameters[name].numel() and not mask.all():
            found[name, dims[0]] = ~mask.flatten().cpu()
    return found


def _kept(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Boolean [width] of the neurons that stay: those of which a mask keeps any weight."""
    keep = torch.zeros(group.width, dtype=torch.bool)
    for name, dim in group.members:
        mask = masks.get(name)
        if mask is None or mask.shape[dim] != group.width:
            return torch.ones_like(keep)
        keep |= mask.cpu().movedim(dim, 0).reshape(group.width, -1).any(1)
    return keep


def _cut(model: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    layer, _, leaf = name.rpartition(".")
    module: Any = select.get_module(model, layer)
    old = getattr(module, leaf)
    cut = old.detach().index_select(dim, keep.nonzero().squeeze(1).to(old.device)).contiguous()
    setattr(module, leaf, nn.Parameter(cut, old.requires_grad))
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _record_widths(model: nn.Module, groups: list[Group], kept: list[Tensor]) -> None:
    """Writes the new widths where transformers keeps them: in the block, and in the configuration if all agree."""
    widths: dict[int, set[int]] = {}
    for group, keep in zip(groups, kept, strict=True):
        widths.setdefault(group.width, set()).add(int(keep.sum()))
        block: Any = select.get_module(model, group.name.rpartition(".")[0])
        if getattr(block, "intermediate_size", None) == group.width:
            block.intermediate_size = int(keep.sum())
    config: Any = getattr(model, "config", None)
    for field in ("intermediate_size", "n_inner", "ffn_dim"):
        if hasattr(config, field):
            old = getattr(config, field) or 4 * getattr(config, "n_embd", 0)  # GPT-2 leaves n_inner open
            if len(widths.get(old, ())) == 1:
                setattr(config, field, widths[old].pop())

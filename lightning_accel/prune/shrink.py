"""Physical shrinking: what the masks zeroed is cut out, and the model computes the same with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from ..inputs import ExampleInputs
from .groups import Group, find_groups
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
    if not any(_dropped(mask, dim).any() for mask in masks.values() for dim in range(mask.dim())):
        return model
    groups = find_groups(model, example_inputs)
    kept = [_kept(group, masks) for group in groups]
    _check_all_cut(model, masks, {m: k for g, k in zip(groups, kept, strict=True) for m in g.members})
    for group, keep in zip(groups, kept, strict=True):
        if not keep.all():
            for name, dim in group.members:
                _cut(model, name, dim, keep)
    _record_widths(model, groups, kept)
    return model


def _dropped(mask: Tensor, dim: int) -> Tensor:
    """Boolean [size of dim]: the positions of which the mask keeps nothing."""
    return ~mask.cpu().movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else ~mask.cpu()


def _kept(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Boolean [width] of the neurons that stay: those of which a mask keeps any weight."""
    keep = torch.zeros(group.width, dtype=torch.bool)
    for name, dim in group.members:
        if name not in masks or masks[name].shape[dim] != group.width:
            return torch.ones_like(keep)
        keep |= ~_dropped(masks[name], dim)
    return keep


def _check_all_cut(model: nn.Module, masks: Masks, kept: Mapping[tuple[str, int], Tensor]) -> None:
    """Raises ValueError where a mask over one dimension drops a neuron that stays."""
    parameters = select.named_parameters(model)
    for name, mask in masks.items():
        for dim, size in enumerate(mask.shape):
            structured = name in parameters and size == mask.numel() < parameters[name].numel()
            if structured and (_dropped(mask, dim) & kept.get((name, dim), torch.ones(size, dtype=torch.bool))).any():
                raise ValueError(
                    f"the masks drop neurons of {name!r} that cannot be cut out: masks of the same neurons are missing "
                    "or disagree, or were made with other example inputs; use the masks that prune_model_ returned"
                )


def _cut(model: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    layer, _, leaf = name.rpartition(".")
    old = getattr(select.get_module(model, layer), leaf)
    cut = old.detach().index_select(dim, keep.nonzero().squeeze(1).to(old.device)).contiguous()
    new = nn.Parameter(cut, old.requires_grad)
    modules: Iterable[Any] = model.modules()
    for module in modules:
        for tied in [key for key, parameter in module._parameters.items() if parameter is old]:
            setattr(module, tied, new)
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

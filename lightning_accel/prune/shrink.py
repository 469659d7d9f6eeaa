"""Physical shrinking: what the masks zeroed is cut out, and the model computes the same with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from .groups import ExampleInputs, Group, find_groups
from .masks import Masks


def shrink_model(model: nn.Module, masks: Masks, *, example_inputs: ExampleInputs) -> nn.Module:
    """A copy of `model` without the neurons that `masks` drop; it computes what the masked model computes.

    Masks of single weights have no physical form and are left as zeros.

    Raises:
        ValueError: the masks of one group disagree, or belong to another model.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> from lightning_accel import PruneConfig, prune_model_
    >>> inputs = (torch.randn(2, 8),)
    >>> masks = prune_model_(model, PruneConfig("neurons", 0.75), example_inputs=inputs)
    >>> shrink_model(model, masks, example_inputs=inputs)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    cuts = [(group, keep) for group in find_groups(model, example_inputs) if (keep := _kept(group, masks)) is not None]
    model = copy.deepcopy(select.unwrap(model))
    for group, keep in cuts:
        for layer in {name.rpartition(".")[0] for name, _ in group.members}:
            module = select.get_module(model, layer)
            dims = {name.rpartition(".")[2]: dim for name, dim in group.members if name.rpartition(".")[0] == layer}
            _cut(module, dims, keep)
    _record_widths(model, [int(keep.sum()) for _, keep in cuts], [group for group, _ in cuts])
    return model


def _kept(group: Group, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Boolean [width] of the neurons that stay; `None` where the masks do not describe this group."""
    vectors = []
    for name, dim in group.members:
        mask = masks.get(name)
        if mask is None or mask.dim() <= dim or mask.shape[dim] != group.width:
            return None
        vectors.append(mask.movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else mask)
    if any(not torch.equal(vectors[0], other) for other in vectors[1:]):
        return None  # masks of single weights
    return None if vectors[0].all() else vectors[0].cpu()


def _cut(module: Any, dims: dict[str, int], keep: Tensor) -> None:
    indices = keep.nonzero().squeeze(1)
    for name, dim in dims.items():
        old = getattr(module, name)
        new = nn.Parameter(old.detach().index_select(dim, indices.to(old.device)).contiguous(), old.requires_grad)
        setattr(module, name, new)
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    else:
        module.out_features, module.in_features = module.weight.shape


def _record_widths(model: nn.Module, widths: list[int], groups: list[Group]) -> None:
    """Writes one common new width into the transformers configuration, where it has a name for it."""
    config = getattr(model, "config", None)
    old = {group.width for group in groups}
    if config is None or len(set(widths)) != 1 or len(old) != 1:
        return
    for field in ("intermediate_size", "n_inner", "ffn_dim"):
        if getattr(config, field, None) in (old | ({None} if field == "n_inner" else set())) and hasattr(config, field):
            setattr(config, field, widths[0])
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "intermediate_size", None) in old:
            module.intermediate_size = widths[0]

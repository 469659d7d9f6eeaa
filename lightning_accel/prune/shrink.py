"""Physical shrinking: units that the masks zeroed are cut out, and the model computes the same with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..capture import call_example, flatten_output
from ..inputs import ExampleInputs
from .groups import Group, all_groups
from .masks import Masks, apply_masks_
from .widths import record_shape, record_widths


def shrink_model(model: nn.Module, masks: Masks, *, example_inputs: ExampleInputs) -> nn.Module:
    """A copy of `model` without the units that `masks` drop; it computes what the masked model computes.

    A unit (neuron, head, channel) is cut out where the masks drop all of its weights. Masks of single weights have no
    physical form and are left as zeros. Where a normalization runs over the width (`"hidden"`), the cut model computes
    something else and is only seen to run.

    Raises:
        ValueError: the masks belong to another model, drop units that cannot be cut out, or the cut model does not run
            or computes something else.

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
    masked = copy.deepcopy(model)
    groups = all_groups(model, example_inputs)
    parameters = select.named_parameters(model)
    kept = [_kept(group, masks, parameters) for group in groups]
    sizes = {select.canonical_name(n): t.shape for n, t in (*model.named_parameters(), *model.named_buffers())}
    left: dict[tuple[str, int], Tensor] = {}
    for group, keep in zip(groups, kept, strict=True):
        for member in group.members if not keep.all() else ():
            place = member.name, member.dim
            stays = left.setdefault(place, torch.ones(sizes[member.name][member.dim], dtype=torch.bool))
            stays[member.index[~keep]] = False
    _check_all_cut(model, masks, left)
    for (name, dim), stays in left.items():
        _cut(model, name, dim, stays)
    record_widths(model, groups, kept)
    _check_outputs(masked, model, example_inputs, [g for g, keep in zip(groups, kept, strict=True) if not keep.all()])
    return model


@torch.no_grad()
def _check_outputs(masked: nn.Module, shrunk: nn.Module, example_inputs: ExampleInputs, cut: list[Group]) -> None:
    """Raises ValueError where the shrunk model does not run, or computes something else than the masked one."""
    from ..quantize import unprepare_

    if not cut:
        return
    names = sorted({group.name for group in cut})
    said = f"cutting {cut[0].kind} out of {names[0]!r}" + (f" and {len(names) - 1} others" if len(names) > 1 else "")
    help_ = f"exclude it: overrides={{{names[0]!r}: None}}"
    try:
        models = (unprepare_(masked), unprepare_(copy.deepcopy(shrunk)))
        outputs = [flatten_output(call_example(model.eval(), example_inputs))[0] for model in models]
    except Exception as error:
        raise ValueError(f"{said} leaves a model that does not run ({error}); {help_}") from error
    if any(group.kind == "hidden" for group in cut):
        return  # a normalization over fewer values is another one
    for ours, theirs in zip(*outputs, strict=True):
        if ours.shape != theirs.shape or (ours - theirs).norm() > 1e-3 * ours.norm() + 1e-6:
            raise ValueError(f"{said} changes what the model computes; {help_}")


def _dropped(mask: Tensor, dim: int) -> Tensor:
    """Boolean [size of dim]: the positions of which the mask keeps nothing."""
    return ~mask.cpu().movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else ~mask.cpu()


def _kept(group: Group, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Boolean [width] of the units that stay: those of which a mask keeps any weight."""
    keep = torch.zeros(group.width, dtype=torch.bool)
    for member in (m for m in group.members if m.name in parameters):  # masks say nothing of buffers
        if member.name not in masks or masks[member.name].shape[member.dim] <= int(member.index.max()):
            return torch.ones_like(keep)
        keep |= ~_dropped(masks[member.name], member.dim)[member.index].all(1)
    return keep


def _check_all_cut(model: nn.Module, masks: Masks, left: Mapping[tuple[str, int], Tensor]) -> None:
    """Raises ValueError where a mask over one dimension drops a neuron that stays."""
    parameters = select.named_parameters(model)
    for name, mask in masks.items():
        for dim, size in enumerate(mask.shape):
            structured = name in parameters and size == mask.numel() < parameters[name].numel()
            if structured and (_dropped(mask, dim) & left.get((name, dim), torch.ones(size, dtype=torch.bool))).any():
                raise ValueError(
                    f"the masks drop neurons of {name!r} that cannot be cut out: masks of the same neurons are missing "
                    "or disagree, or were made with other example inputs; use the masks that prune_model_ returned"
                )


def _cut(model: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    layer, _, leaf = name.rpartition(".")
    old: Tensor = getattr(select.get_module(model, layer), leaf)
    cut = old.detach().index_select(dim, keep.nonzero().squeeze(1).to(old.device)).contiguous()
    new = nn.Parameter(cut, old.requires_grad) if isinstance(old, nn.Parameter) else cut
    modules: Iterable[Any] = model.modules()
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tied in [key for key, tensor in tensors.items() if tensor is old]:
                tensors[tied] = new
                record_shape(module)

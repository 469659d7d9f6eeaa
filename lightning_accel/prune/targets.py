"""What a config may prune in a model: its weights or groups, without those that `overrides` exclude."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from .. import select
from .._quiet import Conv1D
from .._warn import warn
from ..inputs import ExampleInputs
from .config import PruneConfig
from .groups import KINDS, Group, find_groups, find_groups_below, fixed_widths
from .keep import rounded
from .patterns import check_divides, find_weights

_NEEDS = {
    "neurons": "two linear layers with only activations between",
    "heads": "attention with two or more heads that are computed side by side (heads that share keys are one)",
    "channels": "convolutions that feed others",
    "layers": "a ModuleList or Sequential of residual blocks of one class that put out the shape they are given",
    "hidden": "a width that a normalization runs over",
}


def find_targets(
    model: nn.Module,
    config: PruneConfig,
    example_inputs: ExampleInputs | None = None,
    calls: Mapping[str, ExampleInputs] | None = None,
) -> list[Group]:
    """A group for each weight tensor, width or list of blocks that `config` may prune in `model`.

    Args:
        calls: in place of `example_inputs`, those of submodules by name, where `model` is never called as a whole.

    Raises:
        ValueError: nothing to prune, `example_inputs` missing, or a model that is quantized already.
    """
    from ..quantize.converted import check_not_converted

    check_not_converted(model)
    found = [group for s in config.structures if s not in KINDS for group in find_weights(model, s)]
    kinds = [s for s in config.structures if s in KINDS]
    if kinds and calls is not None:
        found += find_groups_below(model, calls, *kinds)
    elif kinds and example_inputs is None:
        raise ValueError(f"structure={config.structure!r} needs example_inputs=(x,) (or a dict of keyword inputs)")
    elif kinds:
        found += find_groups(model, example_inputs, *kinds)  # type: ignore[arg-type]
    for structure in config.structures:
        if not any(group.kind == structure for group in found):
            raise ValueError(
                f"{structure} pruning found nothing to prune in {type(model).__name__}; "
                f"it needs {_NEEDS.get(structure, 'linear or convolution layers')}"
                + ("" if structure == "layers" else _reasons(model, example_inputs or (calls or {}).get("")))
                + (f". {_fused(model)}" if structure == "heads" and _fused(model) else "")
            )
    if "heads" in config.structures and (left_out := _fused(model)):
        warn(left_out)
    if any(value is None for value in config.overrides.values()):
        _check_crossing(found, config)
    units = [unit for group in found for unit in group.units]
    _check_names(model, found, config)
    amounts = select.assign([*(g.name for g in found), *units], config.overrides, config.amount)
    found = [_without(g, {u for u in g.units if amounts[u] is None}) for g in found if amounts[g.name] is not None]
    found = [group for group in found if group.width]
    if not found:
        raise ValueError("every module is excluded by overrides; remove one of the `None` patterns")
    _check_amounts(found, config)
    modules = dict(select.named_modules(model))
    for group in found:
        if group.kind not in KINDS:
            module: nn.Module = modules[group.name]
            check_divides(group, module.weight, isinstance(module, Conv1D))  # type: ignore[arg-type]
    return found


def _reasons(model: nn.Module, example_inputs: ExampleInputs | None) -> str:
    """Which widths stay and why, the first few; empty where nothing is known."""
    why = fixed_widths(model, example_inputs) if example_inputs is not None else {}
    named = [f"{name} ({reason})" for name, reason in list(why.items())[:4]]
    return f". What stays: {', '.join(named)}{' ..' if len(why) > 4 else ''}" if named else ""


def _check_names(model: nn.Module, found: list[Group], config: PruneConfig) -> None:
    """Raises ValueError where overrides name a layer that is pruned, by the name of another, or tied to one."""
    known = [name for group in found for name in (group.name, *group.units)]
    first = {id(parameter): name for name, parameter in select.named_parameters(model).items()}
    for pattern in (p for p in config.overrides if not any(fnmatchcase(name, p) for name in known)):
        for name, module in select.named_modules(model):
            own = {first[id(p)] for p in module.parameters(recurse=False)} if fnmatchcase(name, pattern) else set()
            group = next((g for g in found if own & {m.name for m in g.members}), None)
            if group is not None:
                tied = "" if any(n.startswith(f"{name}.") for n in own) else ", with which it shares a weight"
                raise ValueError(
                    f"overrides name {name!r}, which is cut together with {group.name!r}{tied}; write "
                    f"overrides={{{group.name!r}: {config.overrides[pattern]!r}}} for both"
                )


def _check_amounts(found: list[Group], config: PruneConfig) -> None:
    """Raises ValueError where an amount of units is less than half of one wherever it holds."""
    if config.of != "units" or config.scope == "sensitivity":
        return
    amounts = [select.first_match(group.name, config.overrides, config.amount) or 0.0 for group in found]
    numbers: dict[str, float] = {}
    for group, amount in zip(found, amounts, strict=True):
        key = group.kind if config.scope in ("global", "latency") else group.name
        left = group.width - min(round(amount * group.width), group.width - 1)
        numbers[key] = numbers.get(key, 0) + group.width - rounded(left, group, config.round_to)
    if any(amounts) and not any(numbers.values()):
        widest = max(found, key=lambda group: group.width)
        more = f"amount={math.ceil(100 / widest.width) / 100} or more" if config.round_to == 1 else "a larger amount"
        raise ValueError(
            f"{config!r} prunes nothing: the most that a module has is {widest.width} {widest.kind} ({widest.name!r}), "
            f"and one stays; write {more if widest.width > 1 else 'another structure'}"
        )


def _fused(model: nn.Module) -> str:
    """Which attention keeps its heads, and why; empty where there is none."""
    names = [name for name, module in select.named_modules(model) if isinstance(module, nn.MultiheadAttention)]
    if not names:
        return ""
    others = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
    return (
        f"{names[0]!r}{others} is an nn.MultiheadAttention, whose operation F.multi_head_attention_forward gives as "
        "many outputs as it has inputs, and keeps its heads; write its projections as four nn.Linear around "
        "F.scaled_dot_product_attention, or prune other structures"
    )


def _check_crossing(found: list[Group], config: PruneConfig) -> None:
    """Raises ValueError where overrides exclude a layer whose weights are cut together with those of another."""
    for group in found:
        if group.kind == "layers" or select.first_match(group.name, config.overrides, config.amount) is None:
            continue
        for member in group.members:
            layer = member.name.rpartition(".")[0]
            if select.first_match(layer, config.overrides, config.amount) is None:
                raise ValueError(
                    f"overrides exclude {layer!r}, whose weights are cut together with those of {group.name!r} "
                    f"({group.kind}); write overrides={{{group.name!r}: None}} to leave both alone"
                )


def _without(group: Group, gone: set[str]) -> Group:
    """A group of layers without some of them."""
    if not gone:
        return group
    units = tuple(unit for unit in group.units if unit not in gone)
    members = tuple(
        replace(m, unit=units.index(group.units[m.unit]))
        for m in group.members
        if m.unit is not None and group.units[m.unit] in units
    )
    return replace(group, width=len(units), units=units, members=members)

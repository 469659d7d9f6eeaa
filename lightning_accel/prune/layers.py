"""Whole residual blocks, x + f(x): which can be left out, and leaving them out.

Blocks are the members of an nn.ModuleList or nn.Sequential that have the same class and parameter names and put out
what they are given, in shape. A block that is the identity when all of its parameters are zero (a pre-norm
transformer's, a residual convolution's) may be masked in place of being left out. One that normalizes behind the sum (a
post-norm transformer's, such as BERT's) is not, and is only ever left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..capture import call_example
from ..inputs import ExampleInputs
from .groups import Group, Member, plain_copy
from .saliency import first_tensor

_Call = tuple[tuple, dict[str, Any], Tensor]  # args, kwargs, first tensor put out

_COUNTS = {  # of layers, in configurations; encoders and decoders first where a model has both
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
}


def find_layers(model: nn.Module, example_inputs: ExampleInputs) -> list[Group]:
    """The residual blocks of `model`: a group for each list of them, a unit for each block.

    Raises:
        ValueError: the model rejects the example inputs.
    """
    model = plain_copy(model)
    lists = {name: _alike(model, module) for name, module in select.named_modules(model) if _is_list(module)}
    blocks = {f"{name}.{i}".lstrip("."): module for name, found in lists.items() for i, module in found.items()}
    calls = _recorded_calls(model, blocks, example_inputs)
    groups = []
    for name, found in lists.items():
        names = [f"{name}.{i}".lstrip(".") for i in found]
        kinds = {block: _residual(blocks[block], calls[block]) for block in names if block in calls}
        units = tuple(block for block in names if kinds.get(block))
        if len(units) > 1:
            exact = all(kinds[block] == "identity" for block in units)
            groups.append(Group(name, len(units), _members(model, units), "layers", units, exact))
    return groups


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1


def _alike(model: nn.Module, blocks: Any) -> dict[int, nn.Module]:
    """Of a list the modules of the most frequent class and parameter names that share no parameter with others."""
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    kinds: dict[Any, dict[int, nn.Module]] = {}
    for i, block in enumerate(blocks):
        parameters = dict(select.unwrap(block).named_parameters(remove_duplicate=False))
        if parameters and all(users[id(p)] == 1 for p in parameters.values()):
            kinds.setdefault((type(select.unwrap(block)), *map(select.canonical_name, parameters)), {})[i] = block
    return max(kinds.values(), key=len, default={})


def _recorded_calls(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: ExampleInputs) -> dict[str, _Call]:
    """The call of each block that runs once and puts out the shape that it is given."""
    calls: dict[str, list[_Call]] = {name: [] for name in blocks}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            calls[name].append((*copy.deepcopy((args, kwargs)), first_tensor(output).clone()))

        return record

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in blocks.items()]
    call_example(model, inputs)
    for handle in handles:
        handle.remove()
    once = {name: found[0] for name, found in calls.items() if len(found) == 1}
    return {
        name: (args, kwargs, output)
        for name, (args, kwargs, output) in once.items()
        if (given := first_tensor((args, kwargs))).shape == output.shape and given.is_floating_point()
    }


@torch.no_grad()
def _residual(block: nn.Module, call: _Call) -> str:
    """`"identity"` where the block puts its input out when its parameters are zero; `"normalized"` where its input
    gets past the layers only; `""` where it does not."""
    args, kwargs, _ = call
    x = first_tensor((args, kwargs))
    zeroed = copy.deepcopy(block)
    for parameter in zeroed.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    try:
        outputs = [first_tensor(zeroed(*a, **k)) for a, k in (copy.deepcopy((args, kwargs)), _other((args, kwargs), x))]
        for parameter in zeroed.parameters():
            parameter.zero_()
        identity = first_tensor(zeroed(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    except Exception:  # it cannot be run by itself
        return ""
    if torch.equal(identity, x):
        return "identity"
    return "normalized" if (outputs[0] - outputs[1]).abs().max() > 1e-3 * outputs[0].abs().max() else ""


def _other(call: tuple, x: Tensor) -> Any:
    """The call with its first tensor in another order, of tokens or places too."""
    other = x.flatten().flip(0).view_as(x)
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: other if t is x else t.clone(), call)


def _members(model: nn.Module, units: tuple[str, ...]) -> tuple[Member, ...]:
    found = ((name, block_of(name, units)) for name in select.named_parameters(model))
    return tuple(Member(name, 0, torch.arange(0), unit=unit) for name, unit in found if unit is not None)


def block_of(name: str, units: tuple[str, ...]) -> int | None:
    """Which of the blocks the module called `name` is or lies in."""
    return next((i for i, unit in enumerate(units) if f"{name}.".startswith(f"{unit}.")), None)


def dropped_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of each list the blocks of which the masks keep nothing."""
    gone = {name for name, mask in masks.items() if not mask.any()}
    dropped: dict[str, list[int]] = {}
    for name, module in select.named_modules(model):
        blocks: Any = module if _is_list(module) else ()
        for i, block in enumerate(blocks):
            at = f"{name}.{i}.".lstrip(".")
            own = [at + select.canonical_name(n) for n, _ in block.named_parameters()]
            if own and gone.issuperset(own) and not any(at.startswith(f"{n}.") for n in _names(dropped)):
                dropped.setdefault(name, []).append(i)
    return dropped


def _names(dropped: Mapping[str, list[int]]) -> list[str]:
    return [f"{name}.{i}".lstrip(".") for name, blocks in dropped.items() for i in blocks]


def pass_through(model: nn.Module, dropped: Mapping[str, list[int]], example_inputs: ExampleInputs) -> bool:
    """Whether every dropped block puts out what it is given."""
    model = plain_copy(model)
    blocks = {name: select.get_module(model, name) for name in _names(dropped)}
    calls = _recorded_calls(model, blocks, example_inputs)
    return len(calls) == len(blocks) and all(torch.equal(first_tensor(c[:2]), c[2]) for c in calls.values())


def renamed(name: str, dropped: Mapping[str, list[int]]) -> str | None:
    """The name of a parameter after `drop_layers_`; `None` where it is gone."""
    for blocks, gone in sorted(dropped.items(), reverse=True):  # inner lists first
        start = f"{blocks}.".lstrip(".")
        if name.startswith(start):
            index, _, rest = name.removeprefix(start).partition(".")
            if index.isdigit():
                if int(index) in gone:
                    return None
                name = f"{start}{int(index) - sum(i < int(index) for i in gone)}.{rest}"
    return name


def drop_layers_(model: nn.Module, name: str, gone: list[int]) -> None:
    """Takes blocks out of the list called `name`, in place, and re-numbers the others.

    Their `layer_idx`, which key-value caches are kept under, and the configuration's number of layers follow, that of a
    stage (`depths`) too, and its lists with an entry for each layer (`layer_types`).
    """
    blocks: Any = select.get_module(model, name)
    before, left = len(blocks), [i for i in range(len(blocks)) if i not in gone]
    kinds = [_settings(block) for block in blocks]
    alike = all(kinds[old] == kinds[new] for new, old in enumerate(left))
    for i in reversed(gone):
        del blocks[i]
    for new, (old, block) in enumerate(zip(left, blocks, strict=True)):
        for module in block.modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new
    path, seen = name.split("."), set()
    for depth in range(len(path)):
        config: Any = getattr(select.get_module(model, ".".join(path[:depth])), "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            _record_layers(config, path[depth:], before, left, alike)


def _settings(block: nn.Module) -> dict[str, Any]:
    """Numbers that a block's modules hold beside their parameters, but for its index."""
    return {
        f"{name}.{field}": value
        for name, module in block.named_modules()
        for field, value in vars(module).items()
        if isinstance(value, int | float | str) and field not in ("layer_idx", "training")
    }


def _record_layers(config: Any, path: list[str], before: int, left: list[int], alike: bool) -> None:
    """Counts the layers that are left; those of a stage only where they are what would be built in their places."""
    part = next((kind for kind in ("decoder", "encoder") if any(kind in step for step in path)), "")
    own = [field for field in _COUNTS[part] if isinstance(getattr(config, field, None), int)] if part else []
    for field in own or _COUNTS[""]:
        if getattr(config, field, None) == before:
            setattr(config, field, len(left))
    depths, stage = getattr(config, "depths", None), next((int(step) for step in path if step.isdigit()), None)
    if alike and isinstance(depths, list | tuple) and stage is not None:
        at_stage = list(depths)
        if at_stage[stage : stage + 1] == [before]:
            config.depths = [*at_stage[:stage], len(left), *at_stage[stage + 1 :]]
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list | tuple) and len(value) == before:
            setattr(config, field, type(value)(value[i] for i in left))

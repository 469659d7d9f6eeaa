"""Which weights belong together: a neuron is a row here, a column there, and a bias.

The model is exported once to a graph of aten operators, and each width is followed through it. A *neurons* group is
one whose width meets nothing but element-wise operations between the linear layers that produce it and those that
consume it: the inner width of a feed-forward block, gated or not. Widths that meet a split (attention heads), a
normalization or the residual stream are something else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from .. import select
from ..inputs import ExampleInputs, explain_export, split_inputs

aten = torch.ops.aten
_SAME_SHAPE = {
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.alias.default,
    aten.feature_dropout.default,
    aten.hardswish.default,
    aten.hardswish_.default,
}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


@dataclass(frozen=True)
class Group:
    """Dimensions that are cut together.

    Args:
        name: the first layer that produces the width.
        width: number of neurons.
        members: (parameter name, dimension) of every tensor that has this width.
    """

    name: str
    width: int
    members: tuple[tuple[str, int], ...] = field(repr=False)


def find_groups(model: nn.Module, example_inputs: ExampleInputs) -> list[Group]:
    """The feed-forward widths of `model`, in the order in which they are computed.

    The model is exported from a copy, in eval mode.

    Raises:
        ValueError: the model rejects the example inputs, or cannot be exported.
    """
    graph, parameters = _graph(model, example_inputs)
    groups: list[Group] = []
    seen: set[tuple[str, int]] = set()
    for node in graph.nodes:
        layer = _linear(node, parameters)
        if layer is not None and layer.member(True, parameters)[0] not in seen:
            group = _neurons(node, layer.width, parameters)
            if group is not None:
                seen.update(group.members)
                groups.append(group)
    return groups


def find_groups_below(model: nn.Module, calls: Mapping[str, ExampleInputs]) -> list[Group]:
    """The feed-forward widths inside the submodules that `calls` names, for a model never called as a whole.

    Submodules that cannot be exported are left out where another can.

    Raises:
        ValueError: none can.
    """
    groups: list[Group] = []
    errors: list[ValueError] = []
    for name, inputs in calls.items():
        try:
            found = find_groups(select.get_module(model, name), inputs)
        except ValueError as error:
            errors.append(error)
            continue
        at = f"{name}." if name else ""
        groups += [Group(at + g.name, g.width, tuple((at + p, dim) for p, dim in g.members)) for g in found]
    if errors and not groups:
        raise errors[0]
    return groups


def _graph(model: nn.Module, example_inputs: ExampleInputs) -> tuple[torch.fx.Graph, dict[Node, str]]:
    """The exported graph, and the canonical name of the parameter behind each placeholder."""
    from ..quantize import unprepare_

    model = unprepare_(copy.deepcopy(select.unwrap(model))).cpu().float().eval()
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    args, kwargs = split_inputs(example_inputs)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, (args, kwargs))
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be traced for structured pruning: {explain_export(error)}\n"
            "Check example_inputs=, rewrite the line with tensor operations such as torch.where, or use "
            "PruneConfig(structure='unstructured')"
        ) from error
    names = program.graph_signature.inputs_to_parameters
    first = {id(parameter): name for name, parameter in select.named_parameters(model).items()}  # of tied ones
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):  # it refuses inputs of another width than its own
            for parameter in module.parameters(recurse=False):
                first.pop(id(parameter), None)
    found = {
        node: first.get(id(model.get_parameter(names[node.name])))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    }
    return program.graph, {node: name for node, name in found.items() if name is not None}


@dataclass(frozen=True)
class _Linear:
    """A product with a parameter: `x @ weight.T + bias` (aten.linear) or `x @ weight + bias` (addmm)."""

    input: Node
    weight: Node
    bias: Node | None
    transposed: bool  # weight is [in, out]
    width: int  # of the output

    def member(self, produces: bool, parameters: Mapping[Node, str]) -> list[tuple[str, int]]:
        members = [(parameters[self.weight], int(produces == self.transposed))]
        return members + ([(parameters[self.bias], 0)] if produces and self.bias is not None else [])


def _linear(node: Node, parameters: Mapping[Node, str]) -> _Linear | None:
    if node.op != "call_function":
        return None
    args: Any = node.args
    if node.target is aten.linear.default:
        x, weight, bias, transposed = args[0], args[1], (*args, None)[2], False
    elif node.target is aten.addmm.default:
        (bias, x, weight), transposed = args[:3], True
    elif node.target in (aten.mm.default, aten.matmul.default):
        (x, weight), bias, transposed = args[:2], None, True
    else:
        return None
    if weight not in parameters or weight.meta["val"].dim() != 2:
        return None
    if bias is not None and (bias not in parameters or bias.meta["val"].shape != node.meta["val"].shape[-1:]):
        return None
    return _Linear(x, weight, bias, transposed, node.meta["val"].shape[-1])


def _neurons(start: Node, width: int, parameters: Mapping[Node, str]) -> Group | None:
    """The group of the width that `start` puts out, if all that it meets is element-wise or linear."""
    members: list[tuple[str, int]] = []
    users: dict[Node, int] = {}  # uses of each parameter inside the group
    consumers = 0
    queue, seen = [start], {start}

    def visit(nodes: Iterable[Node]) -> None:
        for other in nodes:
            if other not in seen:
                seen.add(other)
                queue.append(other)

    while queue:
        node = queue.pop()
        layer = _linear(node, parameters)
        if layer is not None:
            members += layer.member(True, parameters)
            users.update({p: users.get(p, 0) + 1 for p in (layer.weight, layer.bias) if p is not None})
            visit(other for other, _ in _sites(layer.weight, parameters))
        elif _keeps_last_dim(node, width):
            visit(a for a in node.all_input_nodes if _has_width(a, width))
        else:
            return None
        for user in node.users:
            consumer = _linear(user, parameters)
            if consumer is not None and consumer.input is node:
                consumers += 1
                members += consumer.member(False, parameters)
                users[consumer.weight] = users.get(consumer.weight, 0) + 1
                visit(other.input for _, other in _sites(consumer.weight, parameters))
            else:
                visit([user])
    if not consumers or any(len(parameter.users) != count for parameter, count in users.items()):
        return None
    return Group(members[0][0].rpartition(".")[0], width, tuple(dict.fromkeys(members)))


def _sites(weight: Node, parameters: Mapping[Node, str]) -> list[tuple[Node, _Linear]]:
    """Where the layers of a weight are called: a shared module has several places, all cut alike."""
    calls = ((node, _linear(node, parameters)) for node in weight.users)
    return [(node, layer) for node, layer in calls if layer is not None and layer.weight is weight]


def _has_width(node: Any, width: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == width and width > 1


def _keeps_last_dim(node: Node, width: int) -> bool:
    """Whether position i of the last dimension of the output depends on position i of the inputs alone."""
    if node.op != "call_function" or not _has_width(node, width):
        return False
    if node.target in _RESHAPES:
        return _has_width(node.args[0], width)
    return node.target in _SAME_SHAPE or torch.Tag.pointwise in getattr(node.target, "tags", ())

"""Which weights belong together: a neuron is a row here, a column there, and a bias; a head, many rows of four layers.

The model is exported once to a graph of aten operators, and each width is followed through it (`trace`). Units of the
same parameters are a group. Its kind says what it is:

    neurons    the width between linear layers
    channels   the width between convolutions
    heads      what attention computes side by side: queries, keys and values of a head, or of a whole group of heads
    hidden     a width that a normalization runs over: the residual stream of transformers
    layers     whole residual blocks, which are found by running the model (`layers`)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .. import select
from .._quiet import Conv1D
from ..inputs import ExampleInputs, explain_export, split_inputs
from .trace import Trace, trace

KINDS = ("neurons", "heads", "channels", "layers", "hidden")


@dataclass(frozen=True)
class Member:
    """The part of a parameter or buffer that belongs to a group.

    Args:
        name: of the parameter or buffer.
        dim: along which it is cut.
        index: positions [width, n] of each unit.
        unit: the one unit that has the whole parameter, for a layer's; `dim` and `index` say nothing then.
    """

    name: str
    dim: int
    index: Tensor = field(repr=False, compare=False)
    unit: int | None = None


@dataclass(frozen=True)
class Group:
    """Units that are cut one by one, each as a whole.

    Args:
        name: the first layer that has the width.
        width: number of units.
        members: every tensor that has them.
        kind: one of `KINDS`, or `"weights"` for the single weights of a tensor.
        units: names of the blocks, for layers.
        exact: whether the model computes with units masked what it computes without them.
    """

    name: str
    width: int
    members: tuple[Member, ...] = field(repr=False)
    kind: str = "neurons"
    units: tuple[str, ...] = ()
    exact: bool = True


def find_groups(model: nn.Module, example_inputs: ExampleInputs, *kinds: str) -> list[Group]:
    """The groups of some kinds (default: neurons) in `model`, in the order of their parameters, layers last.

    The model is exported from a copy, in eval mode.

    Raises:
        ValueError: the model rejects the example inputs, or cannot be exported.
    """
    from .layers import find_layers

    kinds = kinds or ("neurons",)
    traced = [kind for kind in kinds if kind != "layers"]
    groups = [g for g in all_groups(model, example_inputs) if g.kind in traced] if traced else []
    return groups + (find_layers(model, example_inputs) if "layers" in kinds else [])


def all_groups(model: nn.Module, example_inputs: ExampleInputs) -> list[Group]:
    """The groups of all kinds."""
    graph, names = _graph(model, example_inputs)
    return _groups(trace(graph, names), names)


def fixed_widths(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, str]:
    """Why no unit of a weight's outputs can be cut, by the names of the weights; those that can are not in it."""
    graph, names = _graph(model, example_inputs)
    found = trace(graph, names)
    roots = found.roots()
    why: dict[int, str] = {}
    for ids, reason in found.fixed:
        for root in roots[ids].unique().tolist():
            why.setdefault(root, reason)
    stay: dict[str, str] = {}
    for name, dim, ids in found.owned:
        owner: Any = select.get_module(model, name.rpartition(".")[0])
        outputs = 1 if isinstance(owner, Conv1D | nn.Embedding) else 0
        reasons = [why.get(root) for root in roots[ids].tolist()]
        if name.endswith("weight") and dim == outputs and reasons and all(reasons):
            stay[name] = str(reasons[0])
    return stay


def find_groups_below(model: nn.Module, calls: Mapping[str, ExampleInputs], *kinds: str) -> list[Group]:
    """The groups inside the submodules that `calls` names, for a model never called as a whole.

    Submodules that cannot be exported are left out where another can.

    Raises:
        ValueError: none can.
    """
    groups: list[Group] = []
    errors: list[ValueError] = []
    for name, inputs in calls.items():
        try:
            found = find_groups(select.get_module(model, name), inputs, *kinds)
        except ValueError as error:
            errors.append(error)
            continue
        at = f"{name}." if name else ""
        for group in found:
            members = tuple(replace(m, name=at + m.name) for m in group.members)
            units = tuple(at + unit for unit in group.units)
            groups.append(replace(group, name=at + group.name, members=members, units=units))
    if errors and not groups:
        raise errors[0]
    return groups


def _groups(found: Trace, names: Mapping[Node, str]) -> list[Group]:
    roots = found.roots()
    fixed = torch.zeros(found.count, dtype=torch.bool)
    for ids, _ in found.fixed:
        fixed[roots[ids]] = True
    marks = {what: torch.zeros_like(fixed) for what in ("normalized", "heads")}
    for ids, what in found.marked:
        marks[what][roots[ids]] = True
    convolutions = {name for node, name in names.items() if node.meta["val"].dim() > 2}
    units: dict[int, dict[tuple[str, int], list[int]]] = {}  # root -> member -> positions
    for name, dim, ids in found.owned:
        for position, root in enumerate(roots[ids].tolist()):
            if not fixed[root]:
                units.setdefault(root, {}).setdefault((name, dim), []).append(position)
    alike: dict[tuple, list[int]] = {}
    for root, members in units.items():
        signature = tuple((member, len(positions)) for member, positions in members.items())
        alike.setdefault((bool(marks["heads"][root]), bool(marks["normalized"][root]), signature), []).append(root)
    groups = []
    for (heads, normalized, signature), same in alike.items():
        places = [place for place, _ in signature]
        if len(places) < 2:
            continue  # nothing reads it
        positions = (torch.tensor([units[root][place] for root in same]) for place in places)
        parts = tuple(Member(name, dim, index) for (name, dim), index in zip(places, positions, strict=True))
        channels = any(name in convolutions for name, _ in places)
        kind = "heads" if heads else "hidden" if normalized else "channels" if channels else "neurons"
        groups.append(Group(places[0][0].rpartition(".")[0], len(same), parts, kind, exact=not normalized))
    return groups


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy to be looked at: on the CPU, in float32 and eval mode, without fake quantization and without caches."""
    from ..quantize import unprepare_

    model = unprepare_(copy.deepcopy(select.unwrap(model))).cpu().float().eval()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def _graph(model: nn.Module, example_inputs: ExampleInputs) -> tuple[torch.fx.Graph, dict[Node, str]]:
    """The exported graph, and the canonical name of the parameter or buffer behind each placeholder."""
    model = plain_copy(model)
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
    signature = program.graph_signature
    first = {id(parameter): name for name, parameter in select.named_parameters(model).items()}  # of tied ones
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):  # it refuses inputs of another width than its own
            for parameter in module.parameters(recurse=False):
                first.pop(id(parameter), None)
    buffers = {id(buffer): select.canonical_name(name) for name, buffer in model.named_buffers()}
    found: dict[Node, str | None] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in signature.inputs_to_parameters:
            found[node] = first.get(id(model.get_parameter(signature.inputs_to_parameters[node.name])))
        elif node.op == "placeholder" and node.name in signature.inputs_to_buffers:
            try:
                buffer = model.get_buffer(signature.inputs_to_buffers[node.name])
            except AttributeError:  # lifted by the export
                continue
            found[node] = buffers.get(id(buffer))
    return program.graph, {node: name for node, name in found.items() if name is not None}

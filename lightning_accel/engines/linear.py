"""Float linear layers of a captured program through the project's own operator, weights in tiles.

    y = activation(x @ w.T + bias)

Few rows, such as the one of a decoding step, wait for the weights: tiles lie in memory in the order in which they are
multiplied. A tied embedding gathers its rows from the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .fuse import activation_of, alone, become

_aten = torch.ops.aten
CHANNELS = 32  # of a tile


def tile(weight: Tensor, transposed: bool = False) -> Tensor:
    """[channels, inputs] as tiles [ceil(channels / 32), inputs, 32], padded with zeros.

    Args:
        transposed: the weight is [inputs, channels], as GPT-2's are; a dimension of 1 before the others says so.
    """
    weight = weight.T if transposed else weight
    padded = F.pad(weight, (0, 0, 0, -len(weight) % CHANNELS))
    tiles = padded.unflatten(0, (-1, CHANNELS)).transpose(1, 2).contiguous()
    return tiles.unsqueeze(0) if transposed else tiles


NONE = -1  # in the place of an activation's number in `quantize.fused.ACTIVATIONS`


@torch.library.custom_op("lightning_accel::linear_tiled", mutates_args=())
def _linear_tiled(x: Tensor, tiles: Tensor, bias: Tensor | None, channels: int, activation: int) -> Tensor:
    from ..quantize.fused import ACTIVATIONS

    plain = tiles.flatten(0, -3).transpose(1, 2).flatten(0, 1)
    y = F.linear(x, plain[:channels], bias)
    return y if activation == NONE else list(ACTIVATIONS.values())[activation](y)


@_linear_tiled.register_fake
def _(x: Tensor, tiles: Tensor, bias: Tensor | None, channels: int, activation: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], channels)


_OPERATOR = torch.ops.lightning_accel.linear_tiled.default


def replace_linear(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Puts the operator in the place of torch's in `program`, where the weight is float32 and has no other uses.

    Returns:
        The weights that are tiles now, by their names in the program.
    """
    from ..quantize.fused import ACTIVATIONS

    names, tiled = program.graph_signature.inputs_to_parameters, {}
    for node in program.graph.find_nodes(op="placeholder"):
        kinds = {_use(user, node) for user in node.users}
        transposed = "addmm" in kinds
        alike = kinds == {"addmm"} if transposed else "linear" in kinds
        if node.name not in names or not alike or None in kinds:
            continue
        weight = program.state_dict[names[node.name]].detach()
        tiles = tile(weight, transposed)
        program.state_dict[names[node.name]] = torch.nn.Parameter(tiles, requires_grad=False)
        tiled[names[node.name]] = tiles
        for user in list(node.users):
            _replace(user, node, weight.shape[transposed])
        node.meta["val"] = node.meta["val"].new_empty(tiles.shape)
    for node in list(program.graph.nodes):
        found = activation_of(node)
        layer = alone(*found[1:]) if found else None
        if found and layer is not None and layer.target is _OPERATOR:
            become(node, _OPERATOR, (*layer.args[:-1], list(ACTIVATIONS).index(found[0])))
    program.graph_module.recompile()
    return tiled


def _use(user: Node, weight: Node) -> str | None:
    """What `user` does with `weight`: a `"linear"` layer, an `"addmm"`, an `"embedding"`, or None for anything else."""
    values = [v.meta["val"] for v in (*user.all_input_nodes, user) if isinstance(v.meta.get("val"), Tensor)]
    if any(v.is_floating_point() and (v.dtype, v.device.type) != (torch.float32, "cpu") for v in values):
        return None
    if user.target is _aten.embedding.default and user.args[0] is weight:
        return "embedding"
    if user.target is _aten.linear.default and user.args[0] is not weight and user.args[1] is weight:
        return "linear"
    if user.target is _aten.addmm.default and user.args[2] is weight and not user.kwargs:
        bias = user.args[0].meta["val"]  # type: ignore[union-attr]
        return "addmm" if bias.shape == weight.meta["val"].shape[1:] else None
    return None


def _replace(user: Node, weight: Node, channels: int) -> None:
    graph = user.graph
    if user.target is _aten.embedding.default:
        ids = user.args[1]
        with graph.inserting_before(user):
            of, at = (_call(graph, op, ids, CHANNELS) for op in (_aten.floor_divide.default, _aten.remainder.Scalar))
        user.target, user.args = _aten.index.Tensor, (weight, [of, None, at])
    else:
        bias, x = user.args[:2] if user.target is _aten.addmm.default else ((*user.args, None)[2], user.args[0])
        with graph.inserting_before(user):
            x, bias = (None if given is None else _call(graph, _aten.contiguous.default, given) for given in (x, bias))
        user.target, user.args = _OPERATOR, (x, weight, bias, channels, NONE)
    user.kwargs = {}


def _call(graph: torch.fx.Graph, operator: Any, x: Any, *args: Any) -> Node:
    node = graph.call_function(operator, (x, *args))
    with x.meta["val"].fake_mode:
        node.meta["val"] = operator(x.meta["val"], *args)
    return node

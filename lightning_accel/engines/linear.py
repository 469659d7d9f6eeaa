"""Float linear layers of a captured program through the project's own operator, weights in tiles.

    y = activation(x @ w.T + bias + residual)

Few rows, such as the one of a decoding step, wait for the weights: tiles lie in memory in the order in which they are
multiplied. A tied embedding gathers its rows from the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .fuse import activation_of, alone, arguments_of, become, undisturbed, write_apart

_aten = torch.ops.aten
CHANNELS = 32  # of a tile
MOST_DIMENSIONS = 8  # of an input, which kernels/shim.h has too
NONE = -1  # in the place of an activation's number in `quantize.fused.ACTIVATIONS`


def tile(weight: Tensor, transposed: bool = False) -> Tensor:
    """[channels, inputs] as tiles [ceil(channels / 32), inputs, 32], padded with zeros.

    Args:
        transposed: the weight is [inputs, channels], as GPT-2's are; a dimension of 1 before the others says so.
    """
    weight = weight.T if transposed else weight
    padded = F.pad(weight, (0, 0, 0, -len(weight) % CHANNELS))
    tiles = padded.unflatten(0, (-1, CHANNELS)).transpose(1, 2).contiguous()
    return tiles.unsqueeze(0) if transposed else tiles


@torch.library.custom_op("lightning_accel::linear_tiled", mutates_args=())
def _linear_tiled(
    x: Tensor, tiles: Tensor, bias: Tensor | None, residual: Tensor | None, channels: int, activation: int
) -> Tensor:
    plain = tiles.flatten(0, -3).transpose(1, 2).flatten(0, 1)
    y = F.linear(x, plain[:channels], bias)
    return activate(y if residual is None else y + residual, activation)


def activate(y: Tensor, activation: int) -> Tensor:
    """`y` after an activation by its number, `NONE` of them included."""
    from ..quantize.fused import ACTIVATIONS

    return y if activation == NONE else list(ACTIVATIONS.values())[activation](y)


@_linear_tiled.register_fake
def _(
    x: Tensor, tiles: Tensor, bias: Tensor | None, residual: Tensor | None, channels: int, activation: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], channels)


LINEAR = torch.ops.lightning_accel.linear_tiled.default


def replace_linear(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Puts the operator in the place of torch's in `program`, where the weight is float32 and has no other uses.

    Returns:
        The weights that are tiles now, by their names in the program.
    """
    write_apart(program)
    names, tiled = program.graph_signature.inputs_to_parameters, {}
    for node in program.graph.find_nodes(op="placeholder"):
        layout = _layout(node) if node.name in names else None
        if layout is None:
            continue
        weight = program.state_dict[names[node.name]].detach()
        tiles = tile(weight, transposed=layout == "columns")
        program.state_dict[names[node.name]] = torch.nn.Parameter(tiles, requires_grad=False)
        tiled[names[node.name]] = tiles
        for user in list(node.users):
            _replace(user, node, weight.shape[layout == "columns"])
        node.meta["val"] = node.meta["val"].new_empty(tiles.shape)
    take_in_residuals(program)
    take_in_activations(program, LINEAR)
    program.graph_module.recompile()
    return tiled


def _layout(weight: Node) -> str | None:
    """How the channels of a weight lie, by its uses: `"rows"`, `"columns"`, or None where it cannot be tiles."""
    uses = {_use(user, weight) for user in weight.users}
    if uses == {"columns"}:
        return "columns"
    return "rows" if uses in ({"rows"}, {"rows", "gathered"}) else None


def _use(user: Node, weight: Node) -> str | None:
    """What `user` does with `weight`: multiplies with its rows or columns, gathers rows, or, None, anything else."""
    if [*user.args, *user.kwargs.values()].count(weight) != 1 or not is_float(weight, 2, 2) or not is_float(user):
        return None
    if user.target is _aten.embedding.default:
        return "gathered" if user.args[0] is weight else None
    operands = _operands(user)
    if operands is None or operands[1] is not weight or not is_float(operands[0], 1, MOST_DIMENSIONS):
        return None
    columns = user.target is not _aten.linear.default
    channels, bias = weight.meta["val"].shape[columns], operands[2]
    if bias is not None and not (is_float(bias, 1, 1) and bias.meta["val"].shape[0] == channels):
        return None
    return "columns" if columns else "rows"


def _operands(user: Node) -> tuple[Node, Node, Node | None] | None:
    """Input, weight and bias of a product with a weight."""
    if user.target is _aten.linear.default:
        x, weight, bias = arguments_of(user)
        return x, weight, bias
    if user.target in (_aten.mm.default, _aten.matmul.default):
        x, weight = arguments_of(user)
        return x, weight, None
    if user.target is _aten.addmm.default:
        bias, x, weight, *factors = arguments_of(user)
        return (x, weight, bias) if factors == [1, 1] else None
    return None


def is_float(node: Node, least: int = 0, most: int = 64) -> bool:
    """Whether a node is a float32 tensor on the CPU, of so many dimensions."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not least <= value.dim() <= most:
        return False
    return value.dtype is torch.float32 and value.device.type == "cpu"


def _replace(user: Node, weight: Node, channels: int) -> None:
    graph, operands = user.graph, _operands(user)
    with graph.inserting_before(user):
        if operands is None:
            ids = user.args[1]
            of, at = (call(graph, op, ids, CHANNELS) for op in (_aten.floor_divide.default, _aten.remainder.Scalar))
            user.target, user.args = _aten.index.Tensor, (weight, [of, None, at])
        else:
            x, bias = (operands[i] and call(graph, _aten.contiguous.default, operands[i]) for i in (0, 2))
            user.target, user.args = LINEAR, (x, weight, bias, None, channels, NONE)
    user.kwargs = {}


def call(graph: torch.fx.Graph, operator: Any, x: Any, *args: Any) -> Node:
    """A new node, with the value that it has of those of `x`."""
    node = graph.call_function(operator, (x, *args))
    with x.meta["val"].fake_mode:
        node.meta["val"] = operator(x.meta["val"], *args)
    return node


# --- what follows an operator -----------------------------------------------------------------------------------------


def take_in_residuals(program: torch.export.ExportedProgram) -> None:
    """What is added to a layer's output, as large and in float32 too, goes into it where nothing else reads that."""
    for node in list(program.graph.nodes):
        if node.target not in (_aten.add.Tensor, _aten.add_.Tensor) or len(node.args) != 2 or node.kwargs:
            continue
        pairs = [node.args, node.args[::-1]][: 2 if node.target is _aten.add.Tensor else 1]  # the first is written over
        for one, other in pairs:
            layer, order = _layer_of(one, 1, LINEAR)
            if layer is None or layer.args[3] is not None or not _alike(one, other) or not undisturbed(layer, node):
                continue
            x, weight, bias, _, *rest = layer.args
            with node.graph.inserting_before(node):
                if order is not None:
                    other = call(node.graph, _aten.permute.default, other, [order.index(i) for i in range(len(order))])
                arguments = (x, weight, bias, call(node.graph, _aten.contiguous.default, other), *rest)
            _become(node, layer, arguments, order)
            break


def _alike(one: Any, other: Any) -> bool:
    """Whether both are float32 tensors of the same sizes."""
    if not isinstance(other, Node) or not is_float(other):
        return False
    return str(one.meta["val"].shape) == str(other.meta["val"].shape)


def take_in_activations(program: torch.export.ExportedProgram, *operators: Any) -> None:
    """An activation that alone takes the output of an operator goes into it; of several in a row, the first.

    Args:
        operators: that take the number of an activation last.
    """
    from ..quantize.fused import ACTIVATIONS

    for node in list(program.graph.nodes):
        if found := activation_of(node):
            name, x, uses = found
            layer, order = _layer_of(x, uses, *operators)
            if layer is not None and undisturbed(layer, node):
                _become(node, layer, (*layer.args[:-1], list(ACTIVATIONS).index(name)), order)


def _layer_of(node: Any, uses: int, *operators: Any) -> tuple[Node | None, list[int] | None]:
    """The call of an operator, yet without an activation, that `node` comes from, and the order in which its dimensions
    were put in between, as behind a convolution."""
    found, order = alone(node, uses), None
    if found is not None and found.target is _aten.permute.default:
        order = [d % len(found.args[1]) for d in found.args[1]]  # type: ignore[arg-type, union-attr, operator]
        found = alone(found.args[0])
    if found is None or found.target not in operators or found.args[-1] != NONE:
        return None, None
    return found, order


def _become(node: Node, layer: Node, arguments: tuple, order: list[int] | None) -> None:
    """Puts the call of a layer with other arguments in the place of `node`, which follows it."""
    if order is None:
        become(node, layer.target, arguments)
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(layer.target, arguments)  # type: ignore[arg-type]
    made.meta.update(layer.meta)
    become(node, _aten.permute.default, (made, order))

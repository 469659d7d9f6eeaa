"""Integer layers of a captured program that follow each other: what is between them goes into an operator.

Feed-forward blocks, two layers and the activation between them or three with a gate, become one operator. A convolution
whose output goes into another one, past a ReLU, a ReLU6 or another clamp at most, puts out the codes that the other
takes: the codes of clamped values are clamped codes.

Both are found where the first layer's output goes to the second, and nowhere else, in float32. What torch.export leaves
on the way and computes nothing is passed over. All else stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

_aten = torch.ops.aten


def fuse(program: torch.export.ExportedProgram) -> int:
    """Fuses integer layers of `program`, in place, and returns how many pairs there were."""
    write_apart(program)
    found = _feed_forwards(program) + _convolutions(program)
    program.graph_module.recompile()
    return found


def _feed_forwards(program: torch.export.ExportedProgram) -> int:
    from ..quantize.fused import ACTIVATIONS

    operators = torch.ops.lightning_accel
    dynamic, static = operators.int8_linear_tiled.default, operators.int8_static_linear_tiled.default
    found = 0
    for second in [node for node in program.graph.nodes if node.target in (dynamic, static)]:
        hidden, *quantization = _affine(second.args[0]) if second.target is static else (second.args[0],)
        hidden = alone(hidden)
        if second.target is dynamic and (gate := _gate(hidden)):
            name, first, up = gate
            if not undisturbed(first, up, second):
                continue
            fused, layers = operators.int8_gated_feed_forward, (*arguments_of(first), *arguments_of(up)[1:])
        else:
            activation = activation_of(hidden)
            alike = alone(*activation[1:]) if activation else None
            if activation is None or alike is None or alike.target is not second.target:
                continue
            if not undisturbed(alike, second):
                continue
            name, layers = activation[0], arguments_of(alike)
            fused = operators.int8_feed_forward if second.target is dynamic else operators.int8_static_feed_forward
        code = list(ACTIVATIONS).index(name)
        become(second, fused.default, (*layers, *arguments_of(second)[1:], code, *quantization))
        found += 1
    return found


def _gate(hidden: Node | None) -> tuple[str, Node, Node] | None:
    """Of activation(first(x)) * up(x) the activation's name and both layers, if these are dynamic and equally wide."""
    dynamic = torch.ops.lightning_accel.int8_linear_tiled.default
    if hidden is None or hidden.target is not _aten.mul.Tensor:
        return None
    for one, other in (hidden.args, hidden.args[::-1]):
        activation, up = activation_of(alone(one)), alone(other)
        first = alone(*activation[1:]) if activation else None
        if activation is None or first is None or up is None or not first.target is up.target is dynamic:
            continue
        wide = [arguments_of(layer)[2].meta["val"].shape[0] for layer in (first, up)]
        if passed_on(arguments_of(first)[0]) is passed_on(arguments_of(up)[0]) and wide[0] == wide[1]:
            return activation[0], first, up
    return None


def _convolutions(program: torch.export.ExportedProgram) -> int:
    operators = torch.ops.lightning_accel
    found = 0
    for node in list(program.graph.nodes):
        x, factor, zero_point = _affine(node)
        clamped = _image(x)
        limits = _clamp(clamped)
        turned = clamped if limits is None else _image(clamped.args[0])  # type: ignore[union-attr]
        conv = alone(turned.args[0]) if turned is not None and _is_permute(turned, _NCHW) else None
        if conv is None or conv.target is not operators.int8_static_conv2d_tiled.default or node.meta["val"].dim() != 4:
            continue
        if not undisturbed(conv, node):
            continue
        least, most = (_code(limit, factor, zero_point) for limit in limits or (-math.inf, math.inf))
        with program.graph.inserting_before(node):
            arguments = (*arguments_of(conv), factor, zero_point, least, most)
            coded = program.graph.call_function(operators.int8_static_conv2d_coded.default, arguments)
        coded.meta["val"] = node.meta["val"].permute(_NHWC)
        for user in [user for user in node.users if _is_permute(user, _NHWC)]:
            user.replace_all_uses_with(coded)
            program.graph.erase_node(user)
        become(node, _aten.permute.default, (coded, list(_NCHW)))
        if not _uses(node):
            _erase(dict.fromkeys([node]))
        found += 1
    return found


def undisturbed(*nodes: Node) -> bool:
    """Whether nothing is written over between the first and the last of these calls, so that one may stand for all."""
    places = {node: place for place, node in enumerate(nodes[0].graph.nodes)}
    first, *_, last = sorted(nodes, key=places.__getitem__)
    while first is not last:
        if writes(first):
            return False
        first = first.next
    return True


def writes(node: Node) -> bool:
    """Whether a call writes over what it is given."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def write_apart(program: torch.export.ExportedProgram) -> None:
    """Makes calls that write over a tensor such that make another, in place, where nobody could see the difference."""
    for node in program.graph.nodes:
        if writes(node):
            _write_apart(node)


def _write_apart(node: Node) -> None:
    name, overload = node.target.__name__.split(".")  # type: ignore[union-attr]
    packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
    tensors = [value.meta["val"] for value in node.all_input_nodes if isinstance(value.meta.get("val"), torch.Tensor)]
    if packet is None or not hasattr(packet, overload) or len({value.dtype for value in tensors}) != 1:
        return
    if _is_own(node.args[0]):
        node.target = getattr(packet, overload)


# calls that may give back what they were given, though their schemas do not say so
_PASSING = (_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default, _aten.type_as.default)


def _is_own(node: Any) -> bool:
    """Whether a tensor was made by a call, and is read once, as are all that it is a view of."""
    while isinstance(node, Node) and node.op == "call_function" and _uses(node) == 1:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return False
        if node.target not in _PASSING and all(value.alias_info is None for value in schema.returns):
            return True
        node = node.args[0]
    return False


def become(node: Node, operator: Any, arguments: tuple) -> None:
    """Makes `node` call `operator`, under its own name, and takes out what only it used."""
    idle = dict.fromkeys(node.all_input_nodes)
    node.target, node.args, node.kwargs = operator, arguments, {}
    _erase(idle)


def _erase(idle: dict[Node, None]) -> None:
    """Takes out those nodes that nothing uses, and what only they used."""
    while idle:
        before, _ = idle.popitem()
        if before.op == "call_function" and not _uses(before):
            idle.update(dict.fromkeys(before.all_input_nodes))
            for assertion in list(before.users):
                before.graph.erase_node(assertion)
            before.graph.erase_node(before)


def arguments_of(node: Node) -> tuple:
    """The arguments of a call by position, those left out too."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return tuple(given.get(argument.name, argument.default_value) for argument in schema)


# --- the way from one layer to the next -------------------------------------------------------------------------------


def alone(node: Any, uses: int = 1) -> Node | None:
    """The call that `node` comes from, past what computes nothing; None unless in float32 and with these uses only."""
    while isinstance(node, Node) and node.op == "call_function":
        if _uses(node) != uses or _dtype(node) is not torch.float32:
            return None
        if not _computes_nothing(node):
            return node
        node, uses = node.args[0], 1
    return None


def passed_on(node: Node) -> Node:
    """What `node` is, past what computes nothing."""
    while _computes_nothing(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _uses(node: Node) -> int:
    return sum(user.target is not _aten._assert_tensor_metadata.default for user in node.users)


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _computes_nothing(node: Node) -> bool:
    if node.target in (_aten.detach.default, _aten.alias.default):
        return True
    if node.target is _aten.to.dtype:
        return len(node.args) == 2 and _dtype(node.args[0]) == node.args[1]
    if node.target is _aten.contiguous.default:
        return node.args[0].meta["val"].is_contiguous()  # type: ignore[union-attr]
    return node.target is _aten.dropout.default and not arguments_of(node)[2]


def _operands(node: Any, target: Any, count: int = 2, uses: int = 1) -> tuple:
    """What a call of `target` takes, if `node` is one and is used so often; else None for each operand."""
    if isinstance(node, Node) and node.target is target and _uses(node) == uses and len(node.args) == count:
        return node.args
    return (None,) * count


def _affine(node: Any) -> tuple[Any, Any, Any]:
    """What `static.codes_by_factor` was called with, if `node` is what it gave: x, the factor and the zero point."""
    from ..quantize.static import CODES

    nothing = None, None, None
    kept, dtype = _operands(node, _aten.to.dtype)
    equal, clamped, zero_point = _operands(kept, _aten.where.ScalarOther, 3)
    moved, low, high = _operands(clamped, _aten.clamp.default, 3, uses=2)
    rounded, offset = _operands(moved, _aten.add.Tensor)
    (scaled,) = _operands(rounded, _aten.round.default, 1)
    x, factor = _operands(scaled, _aten.mul.Tensor)
    if dtype is not torch.uint8 or (low, high) != (0, CODES) or not isinstance(factor, float):
        return nothing
    same = _operands(equal, _aten.eq.Tensor) == (clamped, clamped) and isinstance(offset, int) and offset == zero_point
    return (x, factor, zero_point) if same else nothing


# --- convolutions -----------------------------------------------------------------------------------------------------

_NCHW, _NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def _image(node: Any) -> Node | None:
    """`alone`, past the height of 1 that one-dimensional convolutions are given and lose."""
    found = alone(node)
    while found is not None and found.target in (_aten.squeeze.dim, _aten.unsqueeze.default) and found.args[1] == -2:
        found = alone(found.args[0])
    return found


def _is_permute(node: Node, order: tuple[int, ...]) -> bool:
    return node.target is _aten.permute.default and tuple(node.args[1]) == order  # type: ignore[arg-type]


def _clamp(node: Node | None) -> tuple[float, float] | None:
    """The least and the most that `node` leaves of values, if it is a clamp around 0."""
    if node is None:
        return None
    if node.target in (_aten.relu.default, _aten.relu_.default):
        return 0.0, math.inf
    if node.target in (_aten.relu6.default, _aten.relu6_.default):
        return 0.0, 6.0
    if node.target in (_aten.hardtanh.default, _aten.hardtanh_.default, _aten.clamp.default, _aten.clamp_.default):
        _, low, high = arguments_of(node)
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        known = isinstance(low, int | float) and isinstance(high, int | float)
        return (low, high) if known and low <= 0 <= high else None
    return None


def _code(value: float, factor: float, zero_point: int) -> int:
    from ..quantize.static import codes_by_factor

    return int(codes_by_factor(torch.tensor(value), factor, zero_point))


# --- activations ------------------------------------------------------------------------------------------------------

_CLAMPS: dict[Any, str] = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6"}


def activation_of(node: Node | None) -> tuple[str, Any, int] | None:
    """Name of the activation that `node` is, what it takes, and how often it uses that."""
    if node is None:
        return None
    if (limits := _clamp(node)) in _CLAMPS:
        return _CLAMPS[limits], node.args[0], 1
    if node.target in (_aten.silu.default, _aten.silu_.default):
        return "silu", node.args[0], 1
    if node.target is _aten.gelu.default:
        x, approximate = arguments_of(node)
        return "gelu_tanh" if approximate == "tanh" else "gelu", x, 1
    return _gelu_by_hand(node)


def _gelu_by_hand(node: Node) -> tuple[str, Any, int] | None:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))), as GPT-2 has it in transformers."""
    half, one = _operands(node, _aten.mul.Tensor)
    x, factor = _operands(half, _aten.mul.Tensor)
    tanh, addend = _operands(one, _aten.add.Tensor)
    (inner,) = _operands(tanh, _aten.tanh.default, 1)
    cubic, root = _operands(inner, _aten.mul.Tensor)
    same, third = _operands(cubic, _aten.add.Tensor)
    cube, share = _operands(third, _aten.mul.Tensor)
    base, exponent = _operands(cube, _aten.pow.Tensor_Scalar)
    if x is None or not (x is same is base) or (factor, addend, exponent, share) != (0.5, 1.0, 3.0, 0.044715):
        return None
    return ("gelu_tanh", x, 3) if root == math.sqrt(2.0 / math.pi) else None


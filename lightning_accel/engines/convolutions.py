"""Float convolutions of a captured network, before it is compiled.

What stands around them goes into them: a BatchNorm with running statistics behind one, into its weight and bias, and a
padding with zeros before one. Those of 1 x 1 are linear layers of pixels (`linear.py`), and those that have a channel
in each group the project's own operator, both on images whose channels lie side by side. The weights of all others are
laid out so that theirs do too.

Images that lie otherwise in memory than the code's author saw would make a difference to what writes over a part of
one, and to `as_strided` and its like. Where a program has such calls nothing is done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .fuse import alone, arguments_of, become, write_apart, writes
from .linear import LINEAR, NONE, activate, call, is_float, take_in_activations, take_in_residuals, tile

_aten = torch.ops.aten
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]  # the order of dimensions of the other in each


@torch.library.custom_op("lightning_accel::depthwise", mutates_args=())
def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_height: int, kernel_width: int, stride_height: int,
    stride_width: int, top: int, left: int, bottom: int, right: int, dilation_height: int, dilation_width: int,
    activation: int,
) -> Tensor:  # fmt: skip
    image = F.pad(x.permute(NCHW), (left, right, top, bottom))
    kernel = weight.T.unflatten(1, (1, kernel_height, kernel_width))
    stride, dilation = (stride_height, stride_width), (dilation_height, dilation_width)
    y = F.conv2d(image, kernel, bias, stride, 0, dilation, weight.shape[1])
    return activate(y, activation).permute(NHWC).contiguous()


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *window: int) -> Tensor:
    from ..quantize.static import conv2d_shape

    return x.new_empty(conv2d_shape(x.shape[:3], x.shape[3], *window[:-1]))


DEPTHWISE = torch.ops.lightning_accel.depthwise.default


def replace_convolutions(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Does so in `program`, in place, where everything is float32.

    Returns:
        The weights that the operators have now, by their names in the program.
    """
    nodes = list(program.graph.nodes)
    if all(node.target is not _aten.conv2d.default for node in nodes):
        return {}
    write_apart(program)
    if any(writes(node) or node.target in _STRIDES for node in nodes):
        program.graph_module.recompile()
        return {}
    for node in nodes:
        if node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default
        elif node.target is _aten.batch_norm.default:
            _fold_norm(program, node)
    replaced = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if not _is_weight(program, node):
            continue
        name = program.graph_signature.inputs_to_parameters[node.name]
        weight = program.state_dict[name].detach()
        users = list(node.users)
        if all(_is_pointwise(user) for user in users):
            weight = replaced[name] = tile(weight.flatten(1))
            for user in users:
                _as_linear(user)
        elif all(_is_depthwise(user) for user in users):
            weight = replaced[name] = weight.flatten(1).T.contiguous()
            for user in users:
                _as_depthwise(user)
        else:
            weight = weight.contiguous(memory_format=torch.channels_last)
            for user in users:
                _take_in_pad(user)
        _set(program, node, weight)
    take_in_residuals(program)
    take_in_activations(program, LINEAR, DEPTHWISE)
    for node in program.graph.output_node().all_input_nodes:
        _lie_as_before(node)
    program.graph_module.recompile()
    return replaced


# --- what lies in memory ----------------------------------------------------------------------------------------------

_STRIDES = (_aten.as_strided.default, _aten.view_as_complex.default, _aten.view_as.default, _aten.view.dtype)


def _lie_as_before(node: Node) -> None:
    """Has an output that was contiguous be so."""
    value = node.meta.get("val")
    if node.op == "call_function" and isinstance(value, Tensor) and value.dim() > 1 and value.is_contiguous():
        with node.graph.inserting_before(node):
            made = node.graph.call_function(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        made.meta.update(node.meta)
        become(node, _aten.contiguous.default, (made,))


# --- weights ----------------------------------------------------------------------------------------------------------


def _is_weight(program: torch.export.ExportedProgram, node: Node) -> bool:
    """Whether a placeholder is the float32 weight of convolutions [N, C / groups, height, width], and nothing else."""
    known = node.name in program.graph_signature.inputs_to_parameters and is_float(node, 4, 4)
    of = [u.target is _aten.conv2d.default and u.args[1] is node and [*u.args].count(node) == 1 for u in node.users]
    return known and bool(of) and all(of)


def _set(program: torch.export.ExportedProgram, node: Node, value: Tensor) -> None:
    """Gives a placeholder of a parameter another value."""
    name = program.graph_signature.inputs_to_parameters[node.name]
    program.state_dict[name] = torch.nn.Parameter(value, requires_grad=False)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty_strided(value.shape, value.stride())


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def _fold_norm(program: torch.export.ExportedProgram, norm: Node) -> None:
    """Takes the norm out, if all that it knows can go into the convolution before it."""
    x, gain, shift, mean, variance, training, _, epsilon, _ = arguments_of(norm)
    conv = alone(x)
    if training or conv is None or conv.target is not _aten.conv2d.default or not is_float(conv, 4, 4):
        return
    given, weight, bias, *window = arguments_of(conv)
    parameters = (weight, bias or shift)  # the norm's bias takes the place of one that the convolution has not
    found = [_value(program, node) for node in (gain, shift, mean, variance, weight, bias) if node is not None]
    known = [value.double() for value in found if value is not None]
    own = program.graph_signature.inputs_to_parameters
    if len(known) < (5 if bias is None else 6) or any(n.name not in own or len(n.users) != 1 for n in parameters):
        return
    g, b, m, v, w, *old = known
    factor = g / (v + epsilon).sqrt()
    _set(program, weight, (w * factor.view(-1, 1, 1, 1)).float())
    _set(program, parameters[1], (b + (sum(old) - m) * factor).float())
    become(norm, _aten.conv2d.default, (given, weight, parameters[1], *window))


def _value(program: torch.export.ExportedProgram, node: Any) -> Tensor | None:
    """A float32 parameter or buffer; None if `node` is anything else."""
    signature = program.graph_signature
    name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(getattr(node, "name", ""))
    if name is None or not is_float(node):
        return None
    found = program.state_dict.get(name, program.constants.get(name))
    return None if found is None else found.detach()


# --- padding ----------------------------------------------------------------------------------------------------------


def _zeros_around(x: Node) -> tuple[Node, tuple[int, int, int, int]] | None:
    """The image and the numbers of zeros above, left, below and right of it, if `x` is that, for one use."""
    if x.target is not _aten.pad.default or len(x.users) != 1:
        return None
    image, sides, mode, value = arguments_of(x)
    if len(sides) != 4 or not all(isinstance(side, int) and side >= 0 for side in sides) or mode != "constant" or value:
        return None
    left, right, top, bottom = sides
    return image, (top, left, bottom, right)


def _take_in_pad(conv: Node) -> None:
    """Has a convolution pad by itself what is padded with as many zeros on both sides."""
    x, weight, bias, stride, padding, *rest = arguments_of(conv)
    image, (top, left, bottom, right) = _zeros_around(x) or (x, (0, 0, 0, 0))
    if image is not x and _are_two(padding) and top == bottom and left == right:
        height, width = padding
        become(conv, conv.target, (image, weight, bias, stride, [height + top, width + left], *rest))


# --- operators in the place of convolutions ---------------------------------------------------------------------------


def _are_two(numbers: Any) -> bool:
    """Whether these are two numbers that are known, for height and width."""
    return isinstance(numbers, list | tuple) and len(numbers) == 2 and all(isinstance(n, int) for n in numbers)


def _is_image(conv: Node) -> bool:
    """Whether a convolution takes a batch of images, with no norm behind it that it would be folded with."""
    x, _, bias, *window, _ = arguments_of(conv)
    known = all(map(_are_two, window)) and is_float(x, 4, 4) and (bias is None or is_float(bias, 1, 1))
    return known and all(user.target is not _aten.batch_norm.default for user in conv.users)


def _is_pointwise(conv: Node) -> bool:
    """Whether a convolution is a linear layer of each pixel."""
    _, weight, _, stride, padding, _, groups = arguments_of(conv)
    plain = list(stride) == [1, 1] and list(padding) == [0, 0] and groups == 1
    return plain and _is_image(conv) and tuple(weight.meta["val"].shape[2:]) == (1, 1)


def _as_linear(conv: Node) -> None:
    x, weight, bias, *_ = arguments_of(conv)
    _replace(conv, LINEAR, x, weight, bias, None, conv.meta["val"].shape[1], NONE)


def _is_depthwise(conv: Node) -> bool:
    """Whether a convolution makes one channel of each."""
    x, weight, *_, groups = arguments_of(conv)
    return _is_image(conv) and groups == len(weight.meta["val"]) == x.meta["val"].shape[1] > 1


def _as_depthwise(conv: Node) -> None:
    x, weight, bias, stride, (height, width), dilation, _ = arguments_of(conv)
    image, (top, left, bottom, right) = _zeros_around(x) or (x, (0, 0, 0, 0))
    sides = top + height, left + width, bottom + height, right + width
    window = *weight.meta["val"].shape[2:], *stride, *sides, *dilation
    _replace(conv, DEPTHWISE, image, weight, bias, *window, NONE)


def _replace(conv: Node, operator: Any, x: Node, weight: Node, bias: Node | None, *arguments: Any) -> None:
    """Puts an operator on images [B, H, W, C] in the place of a convolution."""
    graph, value = conv.graph, conv.meta["val"]
    with graph.inserting_before(conv):
        image = call(graph, _aten.contiguous.default, call(graph, _aten.permute.default, x, NHWC))
        bias = bias and call(graph, _aten.contiguous.default, bias)
        made = graph.call_function(operator, (image, weight, bias, *arguments))
    with value.fake_mode:
        made.meta["val"] = value.permute(NHWC).contiguous()
    become(conv, _aten.permute.default, (made, NCHW))

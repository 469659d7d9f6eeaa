"""What arithmetic says of positions: `trace` calls the rule of each operator in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .trace import Dims, Trace, arguments, flat, rule, shape_of

aten = torch.ops.aten


def default(t: Trace, node: Node) -> None:
    """Position by position where torch says so; else all that goes in stays as it is."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(t, node)
    for other in node.all_input_nodes:
        for ids in flat(t.values[other]):
            t.fix(ids, f"{name_of(node)} takes the whole width")
    value = node.meta.get("val")
    several = isinstance(value, tuple | list)
    found: Any = [[None] * x.dim() if isinstance(x, Tensor) else [] for x in value] if several else []  # type: ignore[union-attr]
    t.values[node] = found if several else [None] * len(shape_of(node))


def name_of(node: Node) -> str:
    return str(node.target).removesuffix(".default")


@rule(
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.hardswish.default,
    aten.hardswish_.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.zeros_like.default, aten.type_as.default, aten.gelu.default, aten.expand_as.default,
)  # fmt: skip
def _pointwise(t: Trace, node: Node) -> None:
    shape = shape_of(node)
    out: Dims = []
    others = [(t.dims(x), shape_of(x)) for x in node.all_input_nodes]
    for back in range(len(shape), 0, -1):
        met = [dims[-back] for dims, sizes in others if len(sizes) >= back and sizes[-back] == shape[-back] > 1]
        out.append(t.join(*met, why=f"{name_of(node)} with a value of another origin") if met else None)
    t.values[node] = out


@rule(aten.linear.default)
def _linear(t: Trace, node: Node) -> None:
    x, weight, bias = (*node.args, None)[:3]
    (out, inner), dims = t.dims(weight), t.dims(x)
    t.join(dims[-1], inner, why="a product with what is no parameter")
    if bias is not None:
        t.join(out, t.dims(bias)[-1])
    t.values[node] = [*dims[:-1], out]


@rule(aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.baddbmm.default)
def _matmul(t: Trace, node: Node) -> None:
    a: Any
    b: Any
    *bias, a, b = node.args[:3] if node.target in (aten.addmm.default, aten.baddbmm.default) else node.args[:2]
    left, right, shape = t.dims(a), t.dims(b), shape_of(node)
    if len(left) < 2 or len(right) < 2:
        return default(t, node)
    if is_parameter(b):
        t.join(left[-1], right[-2], why="a product with what is no parameter")
    else:  # what is zero in one factor need not be in the other
        for ids in (left[-1], right[-2]):
            t.fix(ids, "a sum of products of activations")
    out: Dims = []
    for back in range(len(shape), 2, -1):
        sides = [(dims, shape_of(x)) for dims, x in ((left, a), (right, b)) if len(dims) >= back]
        met = [dims[-back] for dims, sizes in sides if sizes[-back] == shape[-back] > 1]
        ids = t.join(*met, why="a product of activations") if met else None
        t.mark(ids, "heads")
        out.append(ids)
    if len(shape) > 3 and not is_parameter(b):  # [batch, heads, ..]: models divide by it
        t.fix(right[-1], "the width of a head")
    out += [left[-2], right[-1]]
    for other in bias:
        out[-1] = t.join(out[-1], t.dims(other)[-1], why="a bias of another origin") if t.dims(other) else out[-1]
    t.values[node] = out


@rule(aten.einsum.default)
def _einsum(t: Trace, node: Node) -> None:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]  # type: ignore[union-attr]
    if "." in equation or "->" not in equation:
        return default(t, node)
    left, right = equation.split("->")
    terms = left.split(",")
    labels: dict[str, Tensor | None] = {}
    for label in sorted(set(left) - {","}):
        pairs = zip(operands, terms, strict=True)  # type: ignore[arg-type]
        met = [(t.dims(x)[term.index(label)], is_parameter(x)) for x, term in pairs if label in term]
        labels[label] = t.join(*(ids for ids, _ in met), why="a product with what is no parameter")
        if label not in right and not any(parameter for _, parameter in met):
            t.fix(labels[label], "a sum of products of activations")
    t.values[node] = [labels[label] for label in right]


def is_parameter(node: Node) -> bool:
    while node.op == "call_function" and node.target in (aten.t.default, aten.transpose.int, aten.permute.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


@rule(aten.scaled_dot_product_attention.default)
def _attention(t: Trace, node: Node) -> None:
    call = arguments(node)
    q, k, v = (t.dims(call[name]) for name in ("query", "key", "value"))
    heads = shape_of(call["query"])[-3] if len(q) > 2 else 1
    if len(q) > 2:
        spread = [None if x[-3] is None else x[-3].repeat_interleave(heads // len(x[-3])) for x in (q, k, v)]
        mask = call["attn_mask"]
        if mask is not None and len(t.dims(mask)) > 2 and t.dims(mask)[-3] is not None:  # relative positions
            spread.append(t.dims(mask)[-3])
        spread[0] = t.join(*spread, why="attention whose other inputs have no heads")
        t.mark(spread[0], "heads")
    for ids in (q[-1], k[-1], v[-1]):  # models divide by it
        t.fix(ids, "the width of a head")
    batch = [*q[:-3], spread[0]] if len(q) > 2 else []
    t.values[node] = [*batch, None, None]


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding)
def _conv(t: Trace, node: Node) -> None:
    call = arguments(node)
    x, weight = t.dims(call["input"]), t.dims(call["weight"])
    channels, (out, inner) = shape_of(call["input"])[1], shape_of(call["weight"])[:2]
    if call["groups"] == 1:
        t.join(x[1], weight[1], why="a convolution with what is no parameter") if channels > 1 else None
    elif call["groups"] == channels == out and inner == 1:
        t.join(x[1], weight[0], why="a convolution with what is no parameter")
    else:
        for ids in (x[1], weight[0], weight[1]):
            t.fix(ids, "a convolution in groups of several channels")
    if call["bias"] is not None:
        t.join(weight[0], t.dims(call["bias"])[0])
    t.values[node] = [x[0], weight[0], *([None] * (len(x) - 2))]


@rule(aten.batch_norm.default)
def _batch_norm(t: Trace, node: Node) -> None:
    call = arguments(node)
    dims = list(t.dims(call["input"]))
    parts = [call[name] for name in ("weight", "bias", "running_mean", "running_var")]
    dims[1] = t.join(dims[1], *(t.dims(part)[0] for part in parts if part is not None), why="normalized beside others")
    t.values[node] = dims


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(t: Trace, node: Node) -> None:
    call = arguments(node)
    dims = list(t.dims(call["input"]))
    for back in range(1, len(call["normalized_shape"]) + 1):
        parts = [t.dims(call[p])[-back] for p in ("weight", "bias") if call.get(p) is not None]
        t.mark(dims[-back], "normalized")
        dims[-back] = t.join(dims[-back], *parts, why="normalized beside others")
    t.values[node] = dims


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.std.correction,
)  # fmt: skip
def _reduce(t: Trace, node: Node) -> None:
    call = arguments(node)
    dims = t.dims(node.args[0])
    gone = {d % len(dims) for d in call["dim"]} if call["dim"] else set(range(len(dims)))
    for dim in gone:
        if node.target is aten.mean.dim:
            t.mark(dims[dim], "normalized")
        else:
            t.fix(dims[dim], f"{name_of(node)} over the width")
    kept = [None if d in gone else ids for d, ids in enumerate(dims) if d not in gone or call["keepdim"]]
    t.values[node] = kept


@rule(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.flip.default,
    aten.roll.default, aten.tril.default, aten.triu.default, aten.constant_pad_nd.default, aten.pad.default,
)  # fmt: skip
def _along_fixed(t: Trace, node: Node) -> None:
    """All positions of some dimensions matter to each; the others pass."""
    call, dims = arguments(node), list(t.dims(node.args[0]))
    if "pad" in call:
        along = [len(dims) - 1 - i // 2 for i, n in enumerate(call["pad"]) if n]
    elif "diagonal" in call:
        along = [-1, -2]
    else:
        places: Any = call.get("dim", call.get("dims"))
        along = list(places) if isinstance(places, list | tuple) else [places]
        along = along or list(range(len(dims)))  # without dims, roll takes them all as one
    for dim in along:
        t.fix(dims[dim], f"{name_of(node)} along the width")
        dims[dim] = None
    t.values[node] = dims


@rule(
    aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
)  # fmt: skip
def _pool(t: Trace, node: Node) -> None:
    dims = t.dims(node.args[0])
    spatial = len(shape_of(node.args[0])) - (1 if "1d" in str(node.target) else 2)
    t.values[node] = [*dims[:spatial], *([None] * (len(dims) - spatial))]


@rule(aten.embedding.default)
def _embedding(t: Trace, node: Node) -> None:
    weight = t.dims(node.args[0])
    t.fix(weight[0], "the rows of an embedding")
    t.values[node] = [*([None] * len(shape_of(node.args[1]))), weight[1]]

"""Widths followed through an exported graph: which positions of which parameters have to be cut together.

Each dimension of each value of the graph is either fixed (`None`) or has an id for each position. What an operator
says of two positions ("added to each other", "multiplied with the same input") joins their ids; what it does not
survive fixes them. Positions whose ids are joined are one *unit*: a neuron, a channel, a head with its keys and values.

A unit may be masked in place of being cut: every parameter that produces it and every one that consumes it is then zero
there. So constants added on the way do no harm, but a sum over the positions does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
Dims = list[Tensor | None]  # of a value: ids of each position of a dimension, or fixed


@dataclass
class Trace:
    """What the graph says of the positions.

    Attributes:
        values: dimensions of each node; of several outputs a list of them.
        owned: (parameter or buffer, dimension, ids).
        joined: pairs of ids [n] that are one.
        fixed: (ids, why) that must stay.
        marked: (ids, what) that meet a normalization (`"normalized"`) or are the heads of an attention (`"heads"`).
    """

    values: dict[Node, Any] = field(default_factory=dict)
    owned: list[tuple[str, int, Tensor]] = field(default_factory=list)
    joined: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    marked: list[tuple[Tensor, str]] = field(default_factory=list)
    count: int = 0

    def dims(self, node: Any) -> Dims:
        """Of a node with one output; fixed for numbers."""
        return self.values[node] if isinstance(node, Node) else []

    def fresh(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)

    def join(self, *all_ids: Tensor | None, why: str = "") -> Tensor | None:
        """Positions of dimensions of equal size become one; where one is fixed, all are."""
        ids = [x for x in all_ids if x is not None]
        if len(ids) < len(all_ids):
            for x in ids:
                self.fix(x, why)
        self.joined += [(ids[0], other) for other in ids[1:]]
        return ids[0] if len(ids) == len(all_ids) else None

    def fix(self, ids: Tensor | None, why: str) -> None:
        if ids is not None:
            self.fixed.append((ids, why))

    def mark(self, ids: Tensor | None, what: str) -> None:
        if ids is not None:
            self.marked.append((ids, what))

    def roots(self) -> Tensor:
        """For each id the least that it is joined with, directly or not."""
        label = torch.arange(self.count)
        if not self.joined:
            return label
        a, b = (torch.cat([pair[i] for pair in self.joined]) for i in (0, 1))
        while True:
            least = torch.minimum(label[a], label[b])
            new = label.scatter_reduce(0, torch.cat([a, b]), least.repeat(2), "amin")
            new = new.scatter_reduce(0, label, new, "amin")  # the root of each follows
            new = new[new]
            if torch.equal(new, label):
                return label
            label = new


def trace(graph: torch.fx.Graph, names: Mapping[Node, str]) -> Trace:
    """Follows the widths of the parameters and buffers that `names` gives for placeholders of `graph`."""
    found = Trace()
    owned: dict[str, Dims] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            sizes = list(value.shape) if isinstance(value, Tensor) else []
            if node in names and value.is_floating_point():
                name = names[node]
                if name not in owned:
                    owned[name] = [found.fresh(size) if size > 1 else None for size in sizes]
                    found.owned += [(name, dim, ids) for dim, ids in enumerate(owned[name]) if ids is not None]
                found.values[node] = list(owned[name])
            else:
                found.values[node] = [None] * len(sizes)
        elif node.op == "call_function" and node.meta.get("val") is not None:  # assertions have none
            _RULES.get(node.target, _default)(found, node)
        elif node.op == "output":
            for other in node.all_input_nodes:
                for ids in _flat(found.values[other]):
                    found.fix(ids, "an output of the model")
    return found


def _flat(dims: Any) -> Iterable[Tensor]:
    for item in dims:
        if isinstance(item, list):
            yield from _flat(item)
        elif item is not None:
            yield item


def _shape(node: Any) -> list[int]:
    value = node.meta.get("val")
    return [int(size) for size in value.shape] if isinstance(value, Tensor) else []


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, those left out too."""
    schema: Any = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


# --- rules ------------------------------------------------------------------------------------------------------------

_RULES: dict[Any, Callable[[Trace, Node], None]] = {}


def _rule(*targets: Any) -> Callable:
    def register(rule: Callable[[Trace, Node], None]) -> Callable[[Trace, Node], None]:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _default(t: Trace, node: Node) -> None:
    """Position by position where torch says so; else all that goes in stays as it is."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(t, node)
    for other in node.all_input_nodes:
        for ids in _flat(t.values[other]):
            t.fix(ids, f"{_name(node)} takes the whole width")
    value = node.meta.get("val")
    several = isinstance(value, tuple | list)
    found: Any = [[None] * x.dim() if isinstance(x, Tensor) else [] for x in value] if several else []  # type: ignore[union-attr]
    t.values[node] = found if several else [None] * len(_shape(node))


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


@_rule(
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.hardswish.default,
    aten.hardswish_.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.zeros_like.default, aten.type_as.default, aten.gelu.default, aten.expand_as.default,
)  # fmt: skip
def _pointwise(t: Trace, node: Node) -> None:
    shape = _shape(node)
    out: Dims = []
    others = [(t.dims(x), _shape(x)) for x in node.all_input_nodes]
    for back in range(len(shape), 0, -1):
        met = [dims[-back] for dims, sizes in others if len(sizes) >= back and sizes[-back] == shape[-back] > 1]
        out.append(t.join(*met, why=f"{_name(node)} with a value of another origin") if met else None)
    t.values[node] = out


@_rule(aten.linear.default)
def _linear(t: Trace, node: Node) -> None:
    x, weight, bias = (*node.args, None)[:3]
    (out, inner), dims = t.dims(weight), t.dims(x)
    t.join(dims[-1], inner, why="a product with what is no parameter")
    if bias is not None:
        t.join(out, t.dims(bias)[-1])
    t.values[node] = [*dims[:-1], out]


@_rule(aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.baddbmm.default)
def _matmul(t: Trace, node: Node) -> None:
    a: Any
    b: Any
    *bias, a, b = node.args[:3] if node.target in (aten.addmm.default, aten.baddbmm.default) else node.args[:2]
    left, right, shape = t.dims(a), t.dims(b), _shape(node)
    if len(left) < 2 or len(right) < 2:
        return _default(t, node)
    if _is_parameter(b):
        t.join(left[-1], right[-2], why="a product with what is no parameter")
    else:  # what is zero in one factor need not be in the other
        for ids in (left[-1], right[-2]):
            t.fix(ids, "a sum of products of activations")
    out: Dims = []
    for back in range(len(shape), 2, -1):
        met = [d[-back] for d, x in ((left, a), (right, b)) if len(d) >= back and _shape(x)[-back] == shape[-back] > 1]
        ids = t.join(*met, why="a product of activations") if met else None
        t.mark(ids, "heads")
        out.append(ids)
    out += [left[-2], right[-1]]
    for other in bias:
        out[-1] = t.join(out[-1], t.dims(other)[-1], why="a bias of another origin") if t.dims(other) else out[-1]
    t.values[node] = out


def _is_parameter(node: Node) -> bool:
    while node.op == "call_function" and node.target in (aten.t.default, aten.transpose.int, aten.permute.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


@_rule(aten.scaled_dot_product_attention.default)
def _attention(t: Trace, node: Node) -> None:
    call = _arguments(node)
    q, k, v = (t.dims(call[name]) for name in ("query", "key", "value"))
    heads = _shape(call["query"])[-3] if len(q) > 2 else 1
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


@_rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding)
def _conv(t: Trace, node: Node) -> None:
    call = _arguments(node)
    x, weight = t.dims(call["input"]), t.dims(call["weight"])
    channels, (out, inner) = _shape(call["input"])[1], _shape(call["weight"])[:2]
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


@_rule(aten.batch_norm.default)
def _batch_norm(t: Trace, node: Node) -> None:
    call = _arguments(node)
    dims = list(t.dims(call["input"]))
    parts = [call[name] for name in ("weight", "bias", "running_mean", "running_var")]
    dims[1] = t.join(dims[1], *(t.dims(part)[0] for part in parts if part is not None), why="normalized beside others")
    t.values[node] = dims


@_rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(t: Trace, node: Node) -> None:
    call = _arguments(node)
    dims = list(t.dims(call["input"]))
    for back in range(1, len(call["normalized_shape"]) + 1):
        parts = [t.dims(call[p])[-back] for p in ("weight", "bias") if call.get(p) is not None]
        t.mark(dims[-back], "normalized")
        dims[-back] = t.join(dims[-back], *parts, why="normalized beside others")
    t.values[node] = dims


@_rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.std.correction,
)  # fmt: skip
def _reduce(t: Trace, node: Node) -> None:
    call = _arguments(node)
    dims = t.dims(node.args[0])
    gone = {d % len(dims) for d in call["dim"]} if call["dim"] else set(range(len(dims)))
    for dim in gone:
        if node.target is aten.mean.dim:
            t.mark(dims[dim], "normalized")
        else:
            t.fix(dims[dim], f"{_name(node)} over the width")
    kept = [None if d in gone else ids for d, ids in enumerate(dims) if d not in gone or call["keepdim"]]
    t.values[node] = kept


@_rule(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.flip.default,
    aten.roll.default, aten.tril.default, aten.triu.default, aten.constant_pad_nd.default, aten.pad.default,
)  # fmt: skip
def _along_fixed(t: Trace, node: Node) -> None:
    """All positions of some dimensions matter to each; the others pass."""
    call, dims = _arguments(node), list(t.dims(node.args[0]))
    if "pad" in call:
        along = [len(dims) - 1 - i // 2 for i, n in enumerate(call["pad"]) if n]
    elif "diagonal" in call:
        along = [-1, -2]
    else:
        places: Any = call.get("dim", call.get("dims"))
        along = list(places) if isinstance(places, list | tuple) else [places]
    for dim in along:
        t.fix(dims[dim], f"{_name(node)} along the width")
        dims[dim] = None
    t.values[node] = dims


@_rule(
    aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
)  # fmt: skip
def _pool(t: Trace, node: Node) -> None:
    dims = t.dims(node.args[0])
    spatial = len(_shape(node.args[0])) - (1 if "1d" in str(node.target) else 2)
    t.values[node] = [*dims[:spatial], *([None] * (len(dims) - spatial))]


@_rule(aten.embedding.default)
def _embedding(t: Trace, node: Node) -> None:
    weight = t.dims(node.args[0])
    t.fix(weight[0], "the rows of an embedding")
    t.values[node] = [*([None] * len(_shape(node.args[1]))), weight[1]]


# --- shapes -----------------------------------------------------------------------------------------------------------


@_rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default)
def _permute(t: Trace, node: Node) -> None:
    args: Any = node.args
    dims = t.dims(args[0])
    order = list(range(len(dims)))
    if node.target is aten.permute.default:
        order = [d % len(dims) for d in args[1]]
    elif node.target is aten.transpose.int:
        a, b = (d % len(dims) for d in args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    t.values[node] = [dims[d] for d in order]


@_rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
def _reshape(t: Trace, node: Node) -> None:
    """Widths divided or put together: positions then move in blocks, of which one dimension carries the ids."""
    source: Any = node.args[0]
    dims, before, after = t.dims(source), _shape(source), _shape(node)
    out: Dims = [None] * len(after)
    for ins, outs in _factors(before, after):
        arrays = [d for d in ins if dims[d] is not None]
        if not arrays:
            continue
        for other in arrays[1:]:
            t.fix(dims[other], "put together with another width")
        sizes = [before[d] for d in ins]
        at: Any = dims[arrays[0]]
        spread = at.view([-1 if d == arrays[0] else 1 for d in ins]).expand(sizes).reshape([after[d] for d in outs])
        carrier = _carrier(node, spread, outs)
        rows = _rows(spread, outs.index(carrier))
        if len(outs) > 1 and not bool((rows == rows[:, :1]).all()):
            t.join(rows[:, :1].expand_as(rows).flatten(), rows.flatten())
        out[carrier] = spread if len(outs) == 1 else rows[:, 0]
    t.values[node] = out


def _factors(before: list[int], after: list[int]) -> Iterable[tuple[list[int], list[int]]]:
    """The dimensions before and after that hold the same positions, as small as can be; those of size 1 left out."""
    ins, outs = ([d for d, size in enumerate(sizes) if size != 1] for sizes in (before, after))
    while ins and outs:
        a, b = [ins.pop(0)], [outs.pop(0)]
        m, n = before[a[0]], after[b[0]]
        while m != n:
            if m < n:
                a.append(ins.pop(0))
                m *= before[a[-1]]
            else:
                b.append(outs.pop(0))
                n *= after[b[-1]]
        yield a, b


def _carrier(node: Node, spread: Tensor, outs: list[int]) -> int:
    """Which dimension of a divided width the ids follow: that along which they differ, else the first kept whole."""
    for at, dim in enumerate(outs):
        rows = _rows(spread, at)
        if bool((rows == rows[:, :1]).all()):
            return dim
    return next((dim for dim in outs if not _is_picked_from(node, dim)), outs[0])


def _is_picked_from(node: Node, dim: int) -> bool:
    """Whether single positions of the dimension are taken later on: queries, keys and values out of one projection."""
    for user in node.users:
        if user.op != "call_function":
            continue
        rank = len(_shape(node))
        args: Any = user.args
        if user.target in (aten.select.int, aten.unbind.int, aten.split.Tensor, aten.chunk.default, aten.slice.Tensor,
                           aten.split_with_sizes.default):  # fmt: skip
            call = _arguments(user)
            whole = user.target is aten.slice.Tensor and _shape(user) == _shape(node)
            if call["dim"] % rank == dim and not whole:
                return True
        elif user.target is aten.permute.default:
            order = [d % rank for d in args[1]]
            if _is_picked_from(user, order.index(dim)):
                return True
        elif user.target is aten.transpose.int:
            a, b = (d % rank for d in args[1:3])
            if _is_picked_from(user, {a: b, b: a}.get(dim, dim)):
                return True
        elif user.target in (aten.contiguous.default, aten.clone.default) and _is_picked_from(user, dim):
            return True
    return False


def _rows(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


@_rule(aten.expand.default)
def _expand(t: Trace, node: Node) -> None:
    source: Any = node.args[0]
    dims, before, after = t.dims(source), _shape(source), _shape(node)
    new = len(after) - len(dims)
    t.values[node] = [None] * new + [
        ids if a == b else None for ids, a, b in zip(dims, before, after[new:], strict=True)
    ]


@_rule(aten.repeat_interleave.self_int)
def _repeat_interleave(t: Trace, node: Node) -> None:
    call = _arguments(node)
    if call["dim"] is None:
        return _default(t, node)
    dims = list(t.dims(node.args[0]))
    ids = dims[call["dim"]]
    dims[call["dim"]] = None if ids is None else ids.repeat_interleave(call["repeats"])
    t.values[node] = dims


@_rule(aten.select.int)
def _select(t: Trace, node: Node) -> None:
    dims, dim = list(t.dims(node.args[0])), node.args[1]
    t.fix(dims[dim], "one position of it is read")  # type: ignore[index]
    del dims[dim]  # type: ignore[arg-type]
    t.values[node] = dims


@_rule(aten.slice.Tensor)
def _slice(t: Trace, node: Node) -> None:
    call = _arguments(node)
    dims, dim = list(t.dims(node.args[0])), call["dim"]
    if dims[dim] is not None:
        dims[dim] = dims[dim][slice(call["start"], call["end"], call["step"])]
    t.values[node] = dims


@_rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def _split(t: Trace, node: Node) -> None:
    call = _arguments(node)
    dims, dim = t.dims(node.args[0]), call["dim"] % len(_shape(node.args[0]))
    found, at = [], 0
    for part in node.meta["val"]:
        own = list(dims)
        if node.target is aten.unbind.int:
            t.fix(own[dim], "one position of it is read")
            del own[dim]
        else:
            size = int(part.shape[dim])
            own[dim] = None if own[dim] is None else own[dim][at : at + size]
            at += size
        found.append(own)
    if node.target is not aten.unbind.int and len({len(p[dim]) for p in found if p[dim] is not None}) == 1:
        t.join(*(part[dim] for part in found), why="a part of another size")  # so that equal parts stay equal
    t.values[node] = found


@_rule(__import__("operator").getitem)
def _getitem(t: Trace, node: Node) -> None:
    t.values[node] = t.values[node.args[0]][node.args[1]]  # type: ignore[index]


@_rule(aten.cat.default, aten.stack.default)
def _cat(t: Trace, node: Node) -> None:
    parts, dim = node.args[0], _arguments(node)["dim"]
    all_dims = [t.dims(part) for part in parts]  # type: ignore[union-attr]
    shape = _shape(node)
    dim %= len(shape)
    out: Dims = []
    for d in range(len(shape)):
        if d == dim and node.target is aten.cat.default:
            sizes = [_shape(part)[d] for part in parts]  # type: ignore[union-attr]
            whole: Tensor | None = None
            if any(x[d] is not None for x in all_dims):
                pieces = [t.fresh(n) if x[d] is None else x[d] for x, n in zip(all_dims, sizes, strict=True)]
                for x, piece in zip(all_dims, pieces, strict=True):
                    if x[d] is None:
                        t.fix(piece, "put beside what is fixed")
                whole = torch.cat(pieces)  # type: ignore[arg-type]
            out.append(whole)
        elif d == dim:
            out.append(None)
        else:
            at = d - (node.target is aten.stack.default and d > dim)
            out.append(t.join(*(x[at] for x in all_dims), why="put beside what is fixed"))
    t.values[node] = out


@_rule(aten.index.Tensor)
def _index(t: Trace, node: Node) -> None:
    source, places = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    dims = t.dims(source)
    places += [None] * (len(dims) - len(places))
    taken = [d for d, place in enumerate(places) if place is not None]
    if any(place.meta["val"].dtype == torch.bool for place in places if place is not None):
        return _default(t, node)
    for d in taken:
        t.fix(dims[d], "some positions of it are read")
    rest = [ids for d, ids in enumerate(dims) if d not in taken]
    together = taken == list(range(taken[0], taken[-1] + 1))
    first = taken[0] if together else 0
    t.values[node] = [*rest[:first], *([None] * (len(_shape(node)) - len(rest))), *rest[first:]]


@_rule(aten.einsum.default)
def _einsum(t: Trace, node: Node) -> None:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]  # type: ignore[union-attr]
    if "." in equation or "->" not in equation:
        return _default(t, node)
    left, right = equation.split("->")
    terms = left.split(",")
    labels: dict[str, Tensor | None] = {}
    for label in sorted(set(left) - {","}):
        pairs = zip(operands, terms, strict=True)  # type: ignore[arg-type]
        met = [(t.dims(x)[term.index(label)], _is_parameter(x)) for x, term in pairs if label in term]
        labels[label] = t.join(*(ids for ids, _ in met), why="a product with what is no parameter")
        if label not in right and not any(parameter for _, parameter in met):
            t.fix(labels[label], "a sum of products of activations")
    t.values[node] = [labels[label] for label in right]

"""What operators that move positions say of them: widths divided, put together, reordered, cut into parts."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .rules import default
from .trace import Dims, Trace, arguments, rule, shape_of

aten = torch.ops.aten


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default)
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


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
def _reshape(t: Trace, node: Node) -> None:
    """Widths divided or put together: positions then move in blocks, of which one dimension carries the ids."""
    source: Any = node.args[0]
    dims, before, after = t.dims(source), shape_of(source), shape_of(node)
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
        rank = len(shape_of(node))
        args: Any = user.args
        if user.target in (aten.select.int, aten.unbind.int, aten.split.Tensor, aten.chunk.default, aten.slice.Tensor,
                           aten.split_with_sizes.default):  # fmt: skip
            call = arguments(user)
            whole = user.target is aten.slice.Tensor and shape_of(user) == shape_of(node)
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


@rule(aten.expand.default)
def _expand(t: Trace, node: Node) -> None:
    source: Any = node.args[0]
    dims, before, after = t.dims(source), shape_of(source), shape_of(node)
    new = len(after) - len(dims)
    t.values[node] = [None] * new + [
        ids if a == b else None for ids, a, b in zip(dims, before, after[new:], strict=True)
    ]


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(t: Trace, node: Node) -> None:
    call = arguments(node)
    if call["dim"] is None:
        return default(t, node)
    dims = list(t.dims(node.args[0]))
    ids = dims[call["dim"]]
    dims[call["dim"]] = None if ids is None else ids.repeat_interleave(call["repeats"])
    t.values[node] = dims


@rule(aten.select.int)
def _select(t: Trace, node: Node) -> None:
    dims, dim = list(t.dims(node.args[0])), node.args[1]
    t.fix(dims[dim], "one position of it is read")  # type: ignore[index]
    del dims[dim]  # type: ignore[arg-type]
    t.values[node] = dims


@rule(aten.slice.Tensor)
def _slice(t: Trace, node: Node) -> None:
    call = arguments(node)
    dims, dim = list(t.dims(node.args[0])), call["dim"]
    if dims[dim] is not None:
        dims[dim] = dims[dim][slice(call["start"], call["end"], call["step"])]
    t.values[node] = dims


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def _split(t: Trace, node: Node) -> None:
    call = arguments(node)
    dims, dim = t.dims(node.args[0]), call["dim"] % len(shape_of(node.args[0]))
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


@rule(operator.getitem)
def _getitem(t: Trace, node: Node) -> None:
    t.values[node] = t.values[node.args[0]][node.args[1]]  # type: ignore[index]


@rule(aten.cat.default, aten.stack.default)
def _cat(t: Trace, node: Node) -> None:
    parts, dim = node.args[0], arguments(node)["dim"]
    all_dims = [t.dims(part) for part in parts]  # type: ignore[union-attr]
    shape = shape_of(node)
    dim %= len(shape)
    out: Dims = []
    for d in range(len(shape)):
        if d == dim and node.target is aten.cat.default:
            sizes = [shape_of(part)[d] for part in parts]  # type: ignore[union-attr]
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


@rule(aten.index.Tensor)
def _index(t: Trace, node: Node) -> None:
    source, places = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    dims = t.dims(source)
    places += [None] * (len(dims) - len(places))
    taken = [d for d, place in enumerate(places) if place is not None]
    if any(place.meta["val"].dtype == torch.bool for place in places if place is not None):
        return default(t, node)
    for d in taken:
        t.fix(dims[d], "some positions of it are read")
    rest = [ids for d, ids in enumerate(dims) if d not in taken]
    together = taken == list(range(taken[0], taken[-1] + 1))
    first = taken[0] if together else 0
    t.values[node] = [*rest[:first], *([None] * (len(shape_of(node)) - len(rest))), *rest[first:]]

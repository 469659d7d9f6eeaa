"""Integer layers of a captured program that read the same input: two or three of them become one operator.

For programs with a cache, whose steps have few rows, so that the calls themselves take a part of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .fuse import arguments_of, become, passed_on, undisturbed

_aten = torch.ops.aten


def beside(program: torch.export.ExportedProgram) -> int:
    """Joins such layers of `program`, in place, and returns how many operators were made."""
    from ..quantize import beside as operators

    layers = torch.ops.lightning_accel
    joined = {
        layers.int8_linear_tiled.default: operators.int8_linears,
        layers.int4_linear.default: operators.int4_linears,
        layers.int4_int8_linear.default: operators.int4_int8_linears,
    }
    groups: dict[tuple[Node, Any, Any], list[Node]] = {}
    for node in program.graph.nodes:
        if node.target in joined:
            x, _, scale, *_ = arguments_of(node)
            sizes = str(scale.meta["val"].shape[1:])  # of int4, of which the operator takes groups of one size only
            groups.setdefault((passed_on(x), node.target, sizes), []).append(node)
    found = 0
    for (_, target, _), nodes in groups.items():
        for some in (nodes[i : i + operators.MOST] for i in range(0, len(nodes), operators.MOST)):
            if len(some) > 1 and undisturbed(*some):
                _join(joined[target], some)
                found += 1
    program.graph_module.recompile()
    return found


def _join(operator: Any, nodes: list[Node]) -> None:
    """Puts the operator in the place of the first of the layers, and slices of its output in that of each."""
    arguments = [argument for node in nodes for argument in arguments_of(node)[1:]]
    arguments += [None] * (9 - len(arguments))
    first = nodes[0]
    x, value = arguments_of(first)[0], first.meta["val"]
    widths = [node.meta["val"].shape[-1] for node in nodes]
    with first.graph.inserting_before(first):
        together = first.graph.call_function(operator, (x, *arguments))
    together.meta["val"] = value.new_empty(*value.shape[:-1], sum(widths))
    start = 0
    for node, width in zip(nodes, widths, strict=True):
        become(node, _aten.slice.Tensor, (together, value.dim() - 1, start, start + width))
        with value.fake_mode:
            node.meta["val"] = node.target(together.meta["val"], *node.args[1:])  # type: ignore[operator]
        start += width

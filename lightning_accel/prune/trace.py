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


RULES: dict[Any, Callable[[Trace, Node], None]] = {}


def rule(*targets: Any) -> Callable:
    def register(function: Callable[[Trace, Node], None]) -> Callable[[Trace, Node], None]:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def trace(graph: torch.fx.Graph, names: Mapping[Node, str]) -> Trace:
    """Follows the widths of the parameters and buffers that `names` gives for placeholders of `graph`."""
    from . import rules, shapes  # noqa: F401  they fill RULES

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
            RULES.get(node.target, rules.default)(found, node)
        elif node.op == "output":
            for other in node.all_input_nodes:
                for ids in flat(found.values[other]):
                    found.fix(ids, "an output of the model")
    return found


def flat(dims: Any) -> Iterable[Tensor]:
    for item in dims:
        if isinstance(item, list):
            yield from flat(item)
        elif item is not None:
            yield item


def shape_of(node: Any) -> list[int]:
    value = node.meta.get("val")
    return [int(size) for size in value.shape] if isinstance(value, Tensor) else []


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, those left out too."""
    schema: Any = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}

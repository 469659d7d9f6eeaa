"""Patterns of zeros in single weight matrices: `"2:4"` (n of m consecutive inputs stay) and `"16x1"` (blocks).

They are for engines that use them; no engine of this package does, so they bring no speed on a CPU here. A weight is a
matrix of a row for each output; kernels of convolutions are rows of inputs x height x width.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from .groups import Group, Member
from .saliency import PRUNABLE


def pattern_of(structure: str) -> tuple[str, int, int] | None:
    """`("n:m", 2, 4)` of `"2:4"`, `("block", 16, 1)` of `"16x1"`, else `None`."""
    found = re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", structure)
    return ("n:m" if found[2] == ":" else "block", int(found[1]), int(found[3])) if found else None


def find_weights(model: nn.Module, structure: str) -> list[Group]:
    """A group for each weight of a linear or convolution layer: its units are single weights, or blocks of them."""
    parameters = select.named_parameters(model)
    groups = []
    for name, module in select.named_modules(model):
        weight = f"{name}.weight".lstrip(".")
        if isinstance(module, PRUNABLE) and weight in parameters:
            index = _index(parameters[weight], isinstance(module, Conv1D), pattern_of(structure))
            width = len(index) or parameters[weight].numel()
            groups.append(Group(name, width, (Member(weight, -1, index),), structure))
    return groups


def check_divides(group: Group, weight: Tensor, transposed: bool) -> None:
    """Raises ValueError where a pattern does not divide the group's weight."""
    pattern = pattern_of(group.kind)
    if pattern is None:
        return
    kind, n, m = pattern
    out, inner = _matrix(weight, transposed).shape
    if (kind == "n:m" and inner % m) or (kind == "block" and (out % n or inner % m)):
        raise ValueError(
            f"{group.kind} does not divide {group.name!r}, whose weight has {out} outputs and {inner} inputs; "
            f"exclude it: overrides={{{group.name!r}: None}}"
        )


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t() if transposed else weight.flatten(1)


def _index(weight: Tensor, transposed: bool, pattern: tuple[str, int, int] | None) -> Tensor:
    """Positions [units, weights] in the flattened weight; empty where each weight is a unit, in order."""
    if pattern is None or (pattern[0] == "n:m" and not transposed):
        return torch.arange(0)
    positions = _matrix(torch.arange(weight.numel()).view(weight.shape), transposed)
    kind, rows, columns = pattern
    out, inner = positions.shape
    if kind == "n:m":
        return positions.reshape(-1, 1)
    if out % rows or inner % columns:
        return torch.arange(0)  # refused by `check_divides`, unless it is excluded
    return positions.view(out // rows, rows, inner // columns, columns).transpose(1, 2).reshape(-1, rows * columns)


def keep_n_of_m(saliency: Tensor, n: int, m: int, share: float) -> Tensor:
    """Boolean [width]: of each m consecutive the least salient `share * (m - n)` go.

    >>> keep_n_of_m(torch.tensor([1.0, 4.0, 3.0, 2.0]), 2, 4, share=1.0).tolist()
    [False, True, True, False]
    """
    rows = saliency.view(-1, m)
    order = rows.sort(dim=1, stable=True).indices
    keep = torch.ones_like(rows, dtype=torch.bool)
    return keep.scatter(1, order[:, : round(share * (m - n))], False).flatten()

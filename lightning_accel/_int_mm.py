"""Exact products of int8 matrices, which torch._int_mm alone gives on CPUs with VNNI only.

Without it, oneDNN adds two products of an unsigned and a signed byte in 16 bits, and saturates. Two parts of at most
seven bits cannot, w = 2 * (w >> 1) + (w & 1): 2 * 255 * 64 < 2^15.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _saturates() -> bool:
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return not bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())


SATURATES = _saturates()  # here, as found by trying; torch.compile takes it for a constant


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N], exact, of int8 `a` [M, K] and `b` [K, N]."""
    if b.shape[0] == 1:  # torch._int_mm leaves its output unset there (seen in 2.13 on a CPU)
        a, b = nn.functional.pad(a, (0, 1)), nn.functional.pad(b, (0, 0, 0, 1))
    if torch.compiler.is_exporting() or not SATURATES:  # exported programs are mended where they are loaded
        return torch._int_mm(a, b)
    return 2 * torch._int_mm(a, b >> 1) + torch._int_mm(a, b & 1)


def mend_(graph: torch.fx.Graph) -> None:
    """Puts the exact product in the place of each torch._int_mm of an exported program."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten._int_mm.default):
        a, b = node.args
        with graph.inserting_before(node):
            high = graph.call_function(aten.__rshift__.Scalar, (b, 1))
            low = graph.call_function(aten.bitwise_and.Scalar, (b, 1))
            parts = [graph.call_function(aten._int_mm.default, (a, part)) for part in (high, low)]
            twice = graph.call_function(aten.mul.Scalar, (parts[0], 2))
            total = graph.call_function(aten.add.Tensor, (twice, parts[1]))
        node.replace_all_uses_with(total)
        graph.erase_node(node)

"""Weights of float convolutions in oneDNN's own layout, made at the export.

Inductor packs them where every size is fixed. Where one is free, such as the batch, oneDNN gets plain weights and
brings them into its layout in each call. The layout for the sizes of the example serves all others: where oneDNN would
rather have another one, it reorders, as it does plain weights.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch.fx.experimental.symbolic_shapes import optimization_hint


def pack_convolutions(graph: torch.fx.Graph) -> None:
    """A pass over Inductor's frozen graph, in place."""
    mkldnn, module = torch.ops.mkldnn, graph.owning_module
    assert module is not None
    for index, node in enumerate(list(graph.nodes)):
        if node.target is not mkldnn._convolution_pointwise.default or node.args[1].op != "get_attr":
            continue
        plain, window = node.args[1], node.args[3:7]  # padding, stride, dilation, groups
        weight = attrgetter(plain.target)(module)
        if weight.is_mkldnn:
            continue
        sizes = [optimization_hint(size) for size in node.args[0].meta["val"].shape]
        name = f"_packed_convolution_{index}"
        module.register_buffer(name, mkldnn._reorder_convolution_weight(weight, *window, sizes))
        with graph.inserting_before(node):
            packed = graph.get_attr(name)
        packed.meta.update(plain.meta)
        node.update_arg(1, packed)
        if not plain.users:
            graph.erase_node(plain)

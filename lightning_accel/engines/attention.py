"""Attention of a captured program through the project's own operator, which is what `scaled_dot_product_attention` is.

    softmax(scale * q @ k.T + mask) @ v     q [B, H, L, D], k [B, G, S, D], v [B, G, S, E], H a multiple of G

`mask` is boolean (true: seen) or float32 (added), and broadcast to [B, H, L, S]; a row that sees no key is zero, as
torch's is. The output lies in memory as [B, L, H, E]: what models make of it next, [B, L, H * E], is a view. The
compiled kernel takes views as inputs, projections that were split into heads among them, and copies none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


# flexible: inputs of any strides; otherwise each call is handed a mask of its own, computed again
@torch.library.custom_op("lightning_accel::attention", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The operator; `scale` is 1 / sqrt(D) unless given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.lightning_accel.attention(q, k, v, mask, is_causal, scale)


def replace_attention(program: torch.export.ExportedProgram) -> int:
    """Puts the operator in the place of torch's in `program`, where it means the same; returns how often it did."""
    found = 0
    for node in program.graph.nodes:
        arguments = _arguments(node) if node.target is _SDPA else None
        if arguments is not None:
            node.target, node.args, node.kwargs = torch.ops.lightning_accel.attention.default, arguments, {}
            with node.meta["val"].fake_mode:
                node.meta["val"] = node.target(*(a.meta["val"] if isinstance(a, Node) else a for a in arguments))
            found += 1
    program.graph_module.recompile()
    return found


def _arguments(node: Node) -> tuple | None:
    """The operator's arguments for a call of torch's, or None where it is none of ours."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given: dict[str, Any] = {argument.name: argument.default_value for argument in schema}
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    values = [x.meta["val"] for x in (q, k, v)]
    if given["dropout_p"] or any(x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu" for x in values):
        return None
    if mask is not None and (mask.meta["val"].dtype not in (torch.bool, torch.float32) or mask.meta["val"].dim() > 4):
        return None
    (batch, heads, _, width), (_, groups, keys, _) = values[0].shape, values[1].shape
    if not all(isinstance(size, int) for size in (heads, groups, width)):
        return None
    # compared as they are written: an equation between free sizes would become a condition of the program
    if str((batch, groups, keys)) != str(tuple(values[2].shape[:3])) or str(batch) != str(values[1].shape[0]):
        return None
    if heads % groups or (heads != groups and not given["enable_gqa"]):
        return None
    scale = width**-0.5 if given["scale"] is None else float(given["scale"])
    return q, k, v, mask, bool(given["is_causal"]), scale

"""Integer layers that read the same input, as one operator: queries, keys and values, or the two halves of a gate.

Alone, each allocates an output and rounds the same row again, which of a single row is a part of the time.
`engines.beside` puts the operator into a program; its meaning, and what runs in eager, is the layers' outputs side by
side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .int4 import int4_int8_linear_reference, int4_linear_reference
from .ops import int8_linear_reference, untile

MOST = 3  # layers of one call


def _int8_tiled(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return int8_linear_reference(x, untile(tiles, len(scale), x.shape[-1]), scale, bias)


def _define(name: str, layer: Callable[..., Tensor], channels: Callable[..., int]) -> Any:
    """An operator (x, then weight, scale and bias of two or three layers) -> [..., all of their channels]."""

    def together(
        x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
        weight_2: Tensor, scale_2: Tensor, bias_2: Tensor | None,
        weight_3: Tensor | None, scale_3: Tensor | None, bias_3: Tensor | None,
    ) -> Tensor:  # fmt: skip
        layers = [(weight, scale, bias), (weight_2, scale_2, bias_2), (weight_3, scale_3, bias_3)]
        return torch.cat([layer(x, *one) for one in layers if one[0] is not None], -1)

    def fake(x: Tensor, *layers: Tensor | None) -> Tensor:
        each = [layers[i : i + 3] for i in range(0, len(layers), 3) if layers[i] is not None]
        return x.new_empty(*x.shape[:-1], sum(channels(*one) for one in each))

    operator = torch.library.custom_op(f"lightning_accel::{name}", together, mutates_args=())
    operator.register_fake(fake)
    return getattr(torch.ops.lightning_accel, name).default


int8_linears = _define("int8_linears", _int8_tiled, lambda weight, scale, bias: scale.shape[0])
int4_linears = _define("int4_linears", int4_linear_reference, lambda weight, scale, bias: bias.shape[0])
int4_int8_linears = _define("int4_int8_linears", int4_int8_linear_reference, lambda weight, scale, bias: bias.shape[0])

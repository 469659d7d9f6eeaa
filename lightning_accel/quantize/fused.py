"""Feed-forward blocks as one operator: two integer linear layers with an activation between them, or, gated, three.

Compiled programs call a kernel in their place, which keeps the hidden activations in the cache; `engines.fuse` puts the
operator into a program. Its meaning, and what runs in eager, is the layers of `ops` or `static` one after the other.
Products and codes are bit by bit the same; the kernel's activations are within 2^-21 |x| of exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import int8_linear_reference, untile
from .static import codes_by_factor, int8_static_linear_reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order of engines/kernels/activation.h
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
}


def _activate(x: Tensor, activation: int) -> Tensor:
    return list(ACTIVATIONS.values())[activation](x)


@torch.library.custom_op("lightning_accel::int8_feed_forward", mutates_args=())
def _int8_feed_forward(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    tiles_2: Tensor,
    scale_2: Tensor,
    bias_2: Tensor | None,
    activation: int,
) -> Tensor:
    hidden = _activate(int8_linear_reference(x, untile(tiles, len(scale), x.shape[-1]), scale, bias), activation)
    return int8_linear_reference(hidden, untile(tiles_2, len(scale_2), len(scale)), scale_2, bias_2)


@_int8_feed_forward.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    tiles_2: Tensor,
    scale_2: Tensor,
    bias_2: Tensor | None,
    activation: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale_2.shape[0])


@torch.library.custom_op("lightning_accel::int8_gated_feed_forward", mutates_args=())
def _int8_gated_feed_forward(
    x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, tiles_up: Tensor, scale_up: Tensor,
    bias_up: Tensor | None, tiles_2: Tensor, scale_2: Tensor, bias_2: Tensor | None, activation: int,
) -> Tensor:  # fmt: skip
    up = int8_linear_reference(x, untile(tiles_up, len(scale_up), x.shape[-1]), scale_up, bias_up)
    hidden = _activate(int8_linear_reference(x, untile(tiles, len(scale), x.shape[-1]), scale, bias), activation) * up
    return int8_linear_reference(hidden, untile(tiles_2, len(scale_2), len(scale)), scale_2, bias_2)


@_int8_gated_feed_forward.register_fake
def _(x: Tensor, *layers: Any) -> Tensor:
    *_, scale_2, _, _ = layers
    return x.new_empty(*x.shape[:-1], scale_2.shape[0])


@torch.library.custom_op("lightning_accel::int8_static_feed_forward", mutates_args=())
def _int8_static_feed_forward(
    codes: Tensor,
    tiles: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    tiles_2: Tensor,
    start_2: Tensor,
    scale_2: Tensor,
    bias_2: Tensor,
    activation: int,
    factor: float,
    zero_point: int,
) -> Tensor:
    weight, weight_2 = untile(tiles, len(scale), codes.shape[-1]), untile(tiles_2, len(scale_2), len(scale))
    hidden = _activate(int8_static_linear_reference(codes, weight, start, scale, bias), activation)
    between = codes_by_factor(hidden, factor, zero_point)
    return int8_static_linear_reference(between, weight_2, start_2, scale_2, bias_2)


@_int8_static_feed_forward.register_fake
def _(
    codes: Tensor,
    tiles: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    tiles_2: Tensor,
    start_2: Tensor,
    scale_2: Tensor,
    bias_2: Tensor,
    activation: int,
    factor: float,
    zero_point: int,
) -> Tensor:
    return scale.new_empty(*codes.shape[:-1], scale_2.shape[0])

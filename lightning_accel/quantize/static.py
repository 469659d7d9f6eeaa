"""The arithmetic of int8 with static activations: one scale and zero point a layer, found by calibration.

Activations are affine uint8 over a range that contains 0, so that zeros (padding, ReLU) are exact; weights are
symmetric int8, one scale an output channel, as in `ops` (Jacob et al. 2018, arXiv:1712.05877):

    scale = max(high - low, 1e-30) / 255                                      low <= 0 <= high
    zero_point = clamp(round_half_even(-low / scale), 0, 255)
    code = clamp(round_half_even(x * (1 / scale)) + zero_point, 0, 255)       x ~ (code - zero_point) * scale

A product is one int32 sum a channel. The zero point's share of it is known before, `start`, and one factor remains:

    start = -zero_point * sum_k codes_w                                       int32 [N]
    y = float(codes_x @ codes_w.T + start) * (scale_x * scale_w) + bias

A convolution is the same product over its windows: activations [B, H, W, C] (channels last), weights [N, kh * kw * C],
inputs in the order of a window, padding by the zero point, the code of 0. In groups a channel has the inputs of its own
group only, [N, kh * kw * C / groups]. Sums are exact up to `MOST_INPUTS` inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._int_mm import int_mm
from .ops import TINY, untile

CODES = 255  # the largest code of an activation
MOST_INPUTS = (2**31 - 1) // (CODES * 127)  # of a channel (kh * kw * C in a convolution): one more could pass int32
FLOAT_INPUTS = 2**24 // (CODES * 127)  # of a channel, whose sums float32 holds exactly


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale (a float32 value) and zero point of activations in the range from `low` to `high`, widened to contain 0.

    Raises:
        ValueError: the range is not finite in float32.

    >>> affine(-1.0, 4.0)
    (0.019607843831181526, 51)
    """
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high))
    if not scale.isfinite():
        raise ValueError(f"the range from {low} to {high} is not finite in float32; leave such values out of it")
    return scale.item(), int(zero_point)


def affine_parameters(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """`affine` of tensors: scales and zero points, float32."""
    low, high = low.float().clamp_max(0.0), high.float().clamp_min(0.0)
    scale = (high - low).clamp_min(TINY) / CODES
    return scale, torch.round(-low / scale).clamp(0, CODES)


def affine_round(x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor | None = None) -> Tensor:
    """The values of the codes of `x`, float32 (or in `out`), as fake quantization has them; NaN stays NaN."""
    codes = torch.mul(x.detach().float(), scale.reciprocal())
    values = codes.round_().add_(zero_point).clamp_(0, CODES).sub_(zero_point).mul_(scale)
    return values if out is None else out.copy_(values)


def affine_codes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """uint8 codes of `x` [...]; infinities are the ends of the range and NaN is `zero_point`, the code of 0.

    >>> affine_codes(torch.tensor([-9.0, 0.0, 1.0, 9.0]), *affine(-1.0, 4.0))
    tensor([  0,  51, 102, 255], dtype=torch.uint8)
    """
    return codes_by_factor(x, 1.0 / scale, zero_point)


def codes_by_factor(x: Tensor, factor: float, zero_point: int) -> Tensor:
    """`affine_codes` with 1 / scale."""
    # torch rounds the factor to float32; clamp keeps NaN, whose conversion to an integer is undefined. Inductor makes
    # vectors of == but not of isnan, which took three times as long. engines.fuse knows this expression
    codes = (torch.round(x.detach().float() * factor) + zero_point).clamp(0, CODES)
    return torch.where(codes == codes, codes, zero_point).to(torch.uint8)


def static_sums(weight: Tensor, zero_point: int) -> Tensor:
    """`start` [N] as int32 of int8 `weight` [N, K]: what sums of codes start from, in place of 0."""
    return -zero_point * weight.sum(1, dtype=torch.int32)


def int8_static_linear_reference(codes: Tensor, weight: Tensor, start: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """float32 [..., N] of uint8 `codes` [..., K] times int8 `weight` [N, K]; `start`, `scale` and `bias` are [N].

    y = float(codes @ weight.T + start) * scale + bias
    """
    # int_mm takes int8: codes - 128, and 128 * sum(weight) goes back into the sums
    rows = (codes.reshape(-1, codes.shape[-1]) ^ 128).view(torch.int8)
    start = start + 128 * weight.sum(1, dtype=torch.int32)
    y = (int_mm(rows, weight.t()) + start).float() * scale + bias
    return y.reshape(*codes.shape[:-1], weight.shape[0])


def int8_static_conv2d_reference(
    codes: Tensor,
    weight: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    zero_point: int,
    kernel_height: int,
    kernel_width: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """float32 [B, OH, OW, N] of uint8 `codes` [B, H, W, C] and int8 `weight` [N, kh * kw * C / groups].

    The product of `int8_static_linear_reference` over windows; beyond the borders, where `padding` (top, left, bottom,
    right) reaches, every code is `zero_point`.
    """
    top, left, bottom, right = padding
    x = torch.nn.functional.pad(codes, (0, 0, left, right, top, bottom), value=zero_point)
    if groups > 1:
        exact = torch.float32 if weight.shape[1] <= FLOAT_INPUTS else torch.float64
        w = weight.unflatten(1, (kernel_height, kernel_width, -1)).permute(0, 3, 1, 2).to(exact)
        sums = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2).to(exact), w, None, stride, 0, dilation, groups)
        return (sums.permute(0, 2, 3, 1).to(torch.int32) + start).float() * scale + bias
    down, across = dilation
    x = x.unfold(1, (kernel_height - 1) * down + 1, stride[0]).unfold(2, (kernel_width - 1) * across + 1, stride[1])
    windows = x[..., ::down, ::across].permute(0, 1, 2, 4, 5, 3).flatten(3)
    return int8_static_linear_reference(windows, weight, start, scale, bias)


# --- the kernel's form: weights in tiles -----------------------------------------------------------------------------


@torch.library.custom_op("lightning_accel::int8_static_linear_tiled", mutates_args=())
def _linear_tiled(codes: Tensor, tiles: Tensor, start: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return int8_static_linear_reference(codes, untile(tiles, len(scale), codes.shape[-1]), start, scale, bias)


@_linear_tiled.register_fake
def _(codes: Tensor, tiles: Tensor, start: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return scale.new_empty(*codes.shape[:-1], scale.shape[0])


@torch.library.custom_op("lightning_accel::int8_static_conv2d_tiled", mutates_args=())
def _conv2d_tiled(
    codes: Tensor,
    tiles: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    zero_point: int,
    kernel_height: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    top: int,
    left: int,
    bottom: int,
    right: int,
    dilation_height: int,
    dilation_width: int,
    groups: int,
) -> Tensor:
    weight = untile(tiles, len(scale), kernel_height * kernel_width * codes.shape[3] // groups)
    geometry = (stride_height, stride_width), (top, left, bottom, right), (dilation_height, dilation_width), groups
    return int8_static_conv2d_reference(
        codes, weight, start, scale, bias, zero_point, kernel_height, kernel_width, *geometry
    )


@_conv2d_tiled.register_fake
def _(
    codes: Tensor, tiles: Tensor, start: Tensor, scale: Tensor, bias: Tensor, zero_point: int, *window: int
) -> Tensor:
    return scale.new_empty(conv2d_shape(codes.shape[:3], len(scale), *window))


def conv2d_shape(
    size: Sequence[int], channels: int, kernel_height: int, kernel_width: int, stride_height: int, stride_width: int,
    top: int, left: int, bottom: int, right: int, dilation_height: int, dilation_width: int, groups: int = 1,
) -> tuple[int, ...]:  # fmt: skip
    """Shape [B, OH, OW, N] of a convolution's output, of an input of the sizes [B, H, W]."""
    batch, height, width = size
    down = height + top + bottom - (kernel_height - 1) * dilation_height - 1
    across = width + left + right - (kernel_width - 1) * dilation_width - 1
    return batch, down // stride_height + 1, across // stride_width + 1, channels


@torch.library.custom_op("lightning_accel::int8_static_conv2d_coded", mutates_args=())
def _conv2d_coded(
    codes: Tensor,
    tiles: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    zero_point: int,
    kernel_height: int,
    kernel_width: int,
    stride_height: int,
    stride_width: int,
    top: int,
    left: int,
    bottom: int,
    right: int,
    dilation_height: int,
    dilation_width: int,
    groups: int,
    factor: float,
    zero: int,
    least: int,
    most: int,
) -> Tensor:
    """The codes, from `least` to `most`, of a convolution's output; `engines.fuse` puts it into programs."""
    y = _conv2d_tiled(
        codes, tiles, start, scale, bias, zero_point, kernel_height, kernel_width, stride_height, stride_width,
        top, left, bottom, right, dilation_height, dilation_width, groups,
    )  # fmt: skip
    return codes_by_factor(y, factor, zero).clamp(least, most)


@_conv2d_coded.register_fake
def _(
    codes: Tensor, tiles: Tensor, start: Tensor, scale: Tensor, bias: Tensor, zero_point: int, *window: Any
) -> Tensor:
    return codes.new_empty(conv2d_shape(codes.shape[:3], len(scale), *window[:11]))


def int8_static_linear_tiled(codes: Tensor, tiles: Tensor, start: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`int8_static_linear_reference` with weights from `ops.tile`; compiled programs call the C++ kernel instead."""
    return torch.ops.lightning_accel.int8_static_linear_tiled(codes.contiguous(), tiles, start, scale, bias)


def int8_static_conv2d_tiled(
    codes: Tensor,
    tiles: Tensor,
    start: Tensor,
    scale: Tensor,
    bias: Tensor,
    zero_point: int,
    kernel_height: int,
    kernel_width: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`int8_static_conv2d_reference` with weights from `ops.tile`; compiled programs call the C++ kernel instead."""
    return torch.ops.lightning_accel.int8_static_conv2d_tiled(
        codes.contiguous(), tiles, start, scale, bias, zero_point, kernel_height, kernel_width,
        *stride, *padding, *dilation, groups,
    )  # fmt: skip

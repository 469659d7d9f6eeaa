"""The arithmetic of 4-bit weights: groups of inputs with a scale each, their packed form, the operators of a program.

Of a group w of consecutive inputs of one output channel, m is the (first) element of largest magnitude, its sign
kept, as in llama.cpp's Q4_0:

    scale = float16(-m / 8)        code = clamp(round_half_even(w / scale), -8, 7)        w ~ code * scale

so that m itself is code -8 and the whole range is used. A group whose scale rounds to zero is zero. Two products:

    int4-weight    y = x @ (codes * scale).T + bias
    int4-int8      y = (sum over groups of (codes_x @ codes_w.T) * scale_w) * scale_x + bias, x in int8 row by row

Packed form, for linear layers and embeddings alike: [ceil(rows / 16), n / 8, 16, 4] bytes (as int8: transformers casts
activations to other dtypes of weights); the byte (t, j, r, c) holds the codes + 8 of row 16 t + r: of input 8 j + c in
its low half, of input 8 j + 4 + c in its high half. So one 512-bit register holds two tiles of 16 rows by 4 inputs.
Scales: [ceil(rows / 16), n / group, 16] float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import blocks, row_codes, row_scales

ROWS, INPUTS = 16, 8  # of a packed register
SMALLEST = 8 * 2.0**-20  # largest weight of a layer: float16 keeps 4 bits of a scale of 2^-20, as int4 of a weight


def group_scales(weight: Tensor, group: int) -> Tensor:
    """Scale of each group of `weight` [rows, n] as float32 [rows, n / group, 1], rounded to float16."""
    groups = weight.detach().float().unflatten(-1, (-1, group))
    if groups.device.type != "cpu" or torch.compiler.is_compiling():
        largest = _first_largest(groups)
    else:  # on a CPU argmax takes five times as long
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        largest, equal = torch.where(high > -low, high, low), (high == -low).squeeze(-1)
        if equal.any():
            largest[equal] = _first_largest(groups[equal])
    return (largest / -8.0).half().float()


def _first_largest(groups: Tensor) -> Tensor:
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def group_codes(weight: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Codes of `weight` [rows, n] under `scales` [rows, groups, 1], as float32 [rows, groups, group] in [-8, 7]."""
    groups = weight.detach().float().unflatten(-1, (scales.shape[-2], -1))
    inverse = torch.where(scales == 0, 0.0, scales.reciprocal())
    return torch.mul(groups, inverse, out=out).round_().clamp_(-8, 7)


def round_groups(weight: Tensor, group: int) -> Tensor:
    """codes * scale of `weight` [rows, n]: what fake quantization passes on, in the dtype of `weight`."""
    rows = weight.detach().float().reshape(-1, weight.shape[-1])
    rounded = torch.empty_like(rows)
    for some, out in blocks(rows, rounded):
        scales = group_scales(some, group)
        group_codes(some, scales, out=out.unflatten(-1, (-1, group))).mul_(scales)
    return rounded.view(weight.shape).to(weight.dtype)


def pack(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes and float16 scales of `codes` and `scales` as `group_codes` and `group_scales` give them."""
    rows, short = len(codes), -len(codes) % ROWS
    nibbles = torch.nn.functional.pad((codes.flatten(1) + 8).to(torch.uint8), (0, 0, 0, short), value=8)
    low, high = nibbles.view((rows + short) // ROWS, ROWS, -1, 2, 4).permute(3, 0, 2, 1, 4)
    tiled = torch.nn.functional.pad(scales.squeeze(-1), (0, 0, 0, short)).view((rows + short) // ROWS, ROWS, -1)
    packed = (low | high << 4).contiguous().view(torch.int8)
    return packed, tiled.transpose(1, 2).half().contiguous()


def _nibbles(packed: Tensor) -> Tensor:
    """float32 codes [..., n] of rows of packed bytes [..., n / 8, 4]."""
    bits = packed.view(torch.uint8)
    return torch.stack([bits & 15, bits >> 4], -2).flatten(-3).float() - 8.0


def unpack(packed: Tensor, scale: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """float32 codes [rows, groups, group] and scales [rows, groups, 1] from the packed form."""
    codes = _nibbles(packed.transpose(1, 2)).flatten(0, 1)[:rows]
    scales = scale.transpose(1, 2).flatten(0, 1)[:rows].float()
    return codes.unflatten(-1, (scales.shape[-1], -1)), scales.unsqueeze(-1)


def int4_linear_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`x` [..., n] times the unpacked weight, plus `bias` [rows]."""
    codes, scales = unpack(packed, scale, len(bias))
    return torch.nn.functional.linear(x.float(), (codes * scales).flatten(1), bias.float()).to(x.dtype)


def int4_int8_linear_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As `int4_linear_reference`, of `x` in int8 row by row; a row with an infinity or a NaN comes out as NaN."""
    codes, scales = unpack(packed, scale, len(bias))
    row = row_scales(x)
    finite = torch.isfinite(row)
    rounded = torch.where(finite, row_codes(x, row), 0.0)
    y = torch.nn.functional.linear(rounded, (codes * scales).flatten(1)) * torch.where(finite, row, torch.nan) + bias
    return y.to(x.dtype)


def int4_embedding_reference(ids: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Rows `ids` [...] of a packed table, as float32 [..., n]."""
    codes = _nibbles(packed[ids // ROWS, :, ids % ROWS])
    scales = scale[ids // ROWS, :, ids % ROWS].float()
    return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


@torch.library.custom_op("lightning_accel::int4_linear", mutates_args=())
def _int4_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return int4_linear_reference(x, packed, scale, bias)


@torch.library.custom_op("lightning_accel::int4_int8_linear", mutates_args=())
def _int4_int8_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return int4_int8_linear_reference(x, packed, scale, bias)


@_int4_linear.register_fake
@_int4_int8_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], bias.shape[0])


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The operator of `int4_linear_reference`; the kernel reads float32 in rows."""
    return torch.ops.lightning_accel.int4_linear(x.float().contiguous(), packed, scale, bias).to(x.dtype)


def int4_int8_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The operator of `int4_int8_linear_reference`, as `int4_linear`."""
    return torch.ops.lightning_accel.int4_int8_linear(x.float().contiguous(), packed, scale, bias).to(x.dtype)

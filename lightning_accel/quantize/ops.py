"""The arithmetic of the schemes, and the two operators that a captured program holds in their place.

A captured program keeps one node for each quantized layer, `lightning_accel::int8_linear` or `int8_embedding`;
each engine lowers it to what is fast there. The functions below are its meaning, in aten operators: they are the
eager implementation, and the portable program is built from them. The compiled kernel computes the same, in the
same order, so that codes, accumulators and outputs are equal bit by bit.

Symmetric int8 of a row x (Jacob et al. 2018, arXiv:1712.05877, with zero point 0):

    scale = max(|x|, 1e-30) / 127        codes = round_half_even(x * (1 / scale))        x ~ codes * scale

No clamp is needed: |x| * (1 / scale) exceeds 127 by rounding only. A row with an infinity or a NaN comes out as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .._int_mm import int_mm

TINY = 1e-30  # keeps 1 / scale finite for a row of zeros
MOST_INT8_INPUTS = (2**31 - 1) // 127**2  # of a layer: int32 sums of more products of int8 codes could overflow


def row_scales(x: Tensor) -> Tensor:
    """Scale of each row (last dimension) of `x` [..., n] as float32 [..., 1]."""
    return x.detach().float().abs().amax(-1, keepdim=True).clamp_min(TINY) / 127.0


def row_codes(x: Tensor, scales: Tensor) -> Tensor:
    """Integer codes of `x` [..., n] under `scales` [..., 1], as float32 in [-127, 127]."""
    return torch.round(x.detach().float() * scales.reciprocal())


def round_rows(x: Tensor) -> Tensor:
    """codes * scale of each row of `x` [..., n]: what fake quantization passes on, in the dtype of `x`."""
    rows = x.detach().float().reshape(-1, x.shape[-1])
    rounded = torch.empty_like(rows)
    for some, out in blocks(rows, rounded):
        scales = row_scales(some)
        torch.mul(some, scales.reciprocal(), out=out).round_().mul_(scales)
    return rounded.view(x.shape).to(x.dtype)


def blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Rows [rows, n] of several tensors in blocks that stay in the cache: passes over them are 2-4 x as fast.

    Smaller ones gain no more, and each is a place where threads wait for each other.
    """
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return (tensors,)
    count = max(1, (1 << 18) // max(tensors[0].shape[1], 1))
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times int8 `weight` [out, in] with `scale` [out]: x is quantized row by row, sums are int32.

    y = float(codes_x @ codes_w.T) * scale_x * scale_w + bias
    """
    rows = x.float().reshape(-1, x.shape[-1])
    scales = row_scales(rows)
    codes = torch.nan_to_num(row_codes(rows, scales), nan=0.0).to(torch.int8)
    y = int_mm(codes, weight.t()).float() * scales * scale
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def int8_embedding_reference(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows `ids` [...] of the int8 table `weight` [n, width] with `scale` [n], as float32 [..., width]."""
    return weight[ids].float() * scale[ids].unsqueeze(-1)


@torch.library.custom_op("lightning_accel::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return int8_linear_reference(x, weight, scale, bias)


@_int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("lightning_accel::int8_embedding", mutates_args=())
def _int8_embedding(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return int8_embedding_reference(ids, weight, scale)


@_int8_embedding.register_fake
def _(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(*ids.shape, weight.shape[1])


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator of a quantized linear layer; see `int8_linear_reference`."""
    return torch.ops.lightning_accel.int8_linear(x, weight, scale, bias)


def int8_embedding(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The operator of a quantized embedding; see `int8_embedding_reference`."""
    return torch.ops.lightning_accel.int8_embedding(ids, weight, scale)


# --- the kernel's form: weights in tiles -----------------------------------------------------------------------------

ROWS, COLUMNS = 16, 4  # of a tile: 16 output channels by 4 inputs, one 512-bit register


def tile(weight: Tensor) -> Tensor:
    """int8 [rows, n] as tiles [ceil(rows / 16), ceil(n / 4), 16, 4], padded with zeros.

    The compiled kernel reads a tile as one register; a row can still be gathered with plain indexing, so a tied
    embedding and head share the one stored copy.
    """
    rows, n = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -n % COLUMNS, 0, -rows % ROWS))
    return padded.view(-1, ROWS, padded.shape[1] // COLUMNS, COLUMNS).permute(0, 2, 1, 3).contiguous()


def untile(tiles: Tensor, rows: int, n: int) -> Tensor:
    """The inverse of `tile`."""
    return tiles.permute(0, 2, 1, 3).reshape(tiles.shape[0] * ROWS, -1)[:rows, :n].contiguous()


@torch.library.custom_op("lightning_accel::int8_linear_tiled", mutates_args=())
def _int8_linear_tiled(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return int8_linear_reference(x, untile(tiles, len(scale), x.shape[-1]), scale, bias)


@_int8_linear_tiled.register_fake
def _(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def int8_linear_tiled(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8_linear` with weights from `tile`; compiled programs call the C++ kernel in its place.

    The kernel reads float32 in rows, so other formats and layouts are brought into that form here.
    """
    return torch.ops.lightning_accel.int8_linear_tiled(x.float().contiguous(), tiles, scale, bias).to(x.dtype)


def int8_embedding_tiled(width: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`int8_embedding` of rows of `width`, with a table from `tile`, in aten operators."""

    def embed(ids: Tensor, tiles: Tensor, scale: Tensor) -> Tensor:
        rows = tiles[ids // ROWS, :, ids % ROWS].flatten(-2)[..., :width]
        return rows.float() * scale[ids].unsqueeze(-1)

    return embed

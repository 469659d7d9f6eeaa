"""Attention whose two products are of integers, for encoders.

    softmax(scale * q @ k.T + mask) @ v     q [B, H, L, D], k [B, G, S, D], v [B, G, S, E], H a multiple of G

Rows of q, k and v are quantized as the inputs of an int8 layer are (see `ops`), and each row of the softmax, times the
scales of the values, to unsigned codes of which the largest is 255:

    s = (codes_q @ codes_k.T) * (scale_q * scale) * scale_k + mask        e = exp(s - max s)
    codes = round_half_even(e * scale_v * 255 / most)                     most = max(e * scale_v)
    y = (codes @ codes_v) * most / 255 / sum(e)

No scale depends on another row of a batch, nor on a key that the mask hides: padding changes nothing. Sums are int32
in the kernel, which is enough for 66,311 keys; in the reference they are float32, which holds them exactly up to 1,040
inputs and 518 keys and rounds beyond. `mask` is boolean (true: seen) or float32 (added), and broadcast to [B, H, L, S];
a row that sees no key is zero, and an infinity or a NaN makes a row NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import TINY, row_scales

MOST = 255  # code of a row's largest share


def int8_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The formula of the module above, float32 [B, H, L, E]."""
    return _attention(q, k, v, mask, scale, torch.round)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    round_: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """The formula; it has the gradients of the float one if `round_` passes them on as they are."""
    scale_q, scale_k, scale_v = (row_scales(x) for x in (q, k, v))  # without gradients
    codes_q, codes_k, codes_v = (
        round_(x.float() * scales.reciprocal()) for x, scales in ((q, scale_q), (k, scale_k), (v, scale_v))
    )
    heads = q.shape[1] // k.shape[1]
    if heads > 1:
        codes_k, scale_k, codes_v, scale_v = (
            x.repeat_interleave(heads, 1) for x in (codes_k, scale_k, codes_v, scale_v)
        )
    scores = codes_q @ codes_k.mT * (scale_q * scale) * scale_k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    top = scores.detach().amax(-1, keepdim=True)
    e = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    total = e.sum(-1, keepdim=True)
    weighted = e * scale_v.mT
    most = weighted.detach().amax(-1, keepdim=True).clamp_min(TINY)
    codes = F.dropout(round_(weighted * (MOST / most)), dropout)
    return codes @ codes_v * (most / MOST / torch.where(total == 0, 1.0, total))


@torch.library.custom_op(
    "lightning_accel::int8_attention", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)  # flexible: inputs of any strides, as `attention` of the engines
def _int8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = int8_attention_reference(q, k, v, mask, scale)
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@_int8_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def int8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The operator; it lies in memory as [B, L, H, E], as the next projection reads it."""
    return torch.ops.lightning_accel.int8_attention(q, k, v, mask, scale)


class _Round(torch.autograd.Function):
    """The nearest whole number, with the gradient passed straight through (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Products(nn.Module):
    """A part of an attention layer, without parameters or buffers: (q, k, v, mask, scale, dropout) -> [B, H, L, E]."""

    scheme = "int8"
    kind = "products of attention"  # in coverage reports


class FakeQuantizedProducts(_Products):
    """The products as they are trained: the same numbers, gradients straight through."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float = 0.0
    ) -> Tensor:
        """See `int8_attention_reference`."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast(q.device.type, enabled=False):  # it would round the sums of codes
            return _attention(q, k, v, mask, scale, _Round.apply, dropout).to(q.dtype)


class Int8Products(_Products):
    """The products as they are deployed."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Callable[..., Tensor] = int8_attention  # engines put their own form in its place

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float = 0.0
    ) -> Tensor:
        """See `int8_attention_reference`; there is no dropout."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return self.function(q.float(), k.float(), v.float(), mask, float(scale)).to(q.dtype)


PRODUCTS = (FakeQuantizedProducts, Int8Products)

"""nn.MultiheadAttention with projections that can be quantized.

torch's own forward takes the weights of its four projections as raw tensors, in eval mode through a fused operator.
Here it is written out:

    q, k, v = projections of query, key, value        y = out_proj(softmax(q k^T / sqrt(head_dim) + mask) v)

`out_proj` is a layer, and quantized as one. The classes below share this forward and differ in the projections of the
inputs: in float, fake-quantized, and as three integer layers; so what was trained is what is exported. The product with
three weights at once, which torch does in self-attention, has the same integers as three products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._quiet import FakeQuantizedLinear

_INPUTS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


class UnfusedAttention(nn.MultiheadAttention):
    """torch's attention step by step, in eval mode too, with a call of `out_proj`.

    Where it has `products` (see `attend`), these make the output; weights that are asked for are those in float.
    """

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The inputs of the product, from those of the layer."""
        weights = projections(self).values()
        return [F.linear(x, *w) for x, w in zip((query, key, value), weights, strict=True)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("quantized attention takes no nested tensors; pad them, and give key_padding_mask=")
        check: Any = F._mha_shape_check  # type: ignore[attr-defined]
        batched = check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask; give the mask too")
        products = self._modules.get("products")
        hint = is_causal and key_padding_mask is None and not need_weights and products is None
        q, k, v = (self._heads(x) for x in self.project(query, key, value))
        mask = _merged(None if hint else attn_mask, key_padding_mask, q, k, query.dtype)
        k, v, mask = self._extended(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        y, weights = _attend(q, k, v, mask, hint, dropout, need_weights)
        if products is not None:
            y = products(q, k, v, mask, None, dropout)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self.out_proj(self._joined(y, batched)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, heads, length, head_dim] of a projection in the layout of the layer's inputs."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _joined(self, y: Tensor, batched: bool) -> Tensor:
        """The inverse of `_heads`."""
        if not batched:
            return y.squeeze(0).transpose(0, 1).flatten(-2)
        return (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(-2)

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the keys and values of `add_bias_kv` and `add_zero_attn` at the end, which no mask hides."""
        length = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            k = torch.cat([k, self.bias_k.view(shape).to(k.dtype).expand(k.shape[0], -1, -1, -1)], 2)
            v = torch.cat([v, self.bias_v.view(shape).to(v.dtype).expand(v.shape[0], -1, -1, -1)], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, None if mask is None else F.pad(mask, (0, k.shape[2] - length))


class FakeQuantizedAttention(UnfusedAttention):
    """Attention with fake-quantized projections of its inputs; `out_proj` is a layer with quantizers of its own.

    One quantizer for each input, though the three may be one tensor, and one for the weights, row by row or in groups
    of inputs, so that they may stand in one tensor or in three.
    """

    query_activation_fake_quantizer: nn.Module | None
    key_activation_fake_quantizer: nn.Module | None
    value_activation_fake_quantizer: nn.Module | None
    weight_fake_quantizer: nn.Module

    @property
    def activation_fake_quantizer(self) -> nn.Module | None:
        """That of the query: all three are of one kind."""
        return self.query_activation_fake_quantizer

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """As `UnfusedAttention.project`, of rounded inputs and weights."""
        inputs = zip((query, key, value), self.quantizers(), projections(self).values(), strict=True)
        return [
            F.linear(x if quantizer is None else quantizer(x), self.weight_fake_quantizer(weight), bias)
            for x, quantizer, (weight, bias) in inputs
        ]

    def quantizers(self) -> list[nn.Module | None]:
        """Of query, key and value."""
        return [getattr(self, f"{name}_activation_fake_quantizer") for name in _INPUTS.values()]

    def linears(self) -> dict[str, FakeQuantizedLinear]:
        """The projections of the inputs as layers: copies of the weights, the same quantizers."""
        made = {}
        for (name, (weight, bias)), quantizer in zip(projections(self).items(), self.quantizers(), strict=True):
            linear: Any = FakeQuantizedLinear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            linear.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
            linear.activation_fake_quantizer, linear.weight_fake_quantizer = quantizer, self.weight_fake_quantizer
            linear.fallback = self.__dict__.get("fallback")
            made[name] = linear.train(self.training)
        return made


class FakeQuantizedOutProjection(FakeQuantizedLinear, NonDynamicallyQuantizableLinear):
    """The last layer of nn.MultiheadAttention, which has a type of its own in torch."""


class ConvertedAttention(UnfusedAttention):
    """Attention with a layer for the projection of each input, for inference.

    Args:
        module: what is converted; its `out_proj` is taken as it is.
        linears: the layers, as `FakeQuantizedAttention.linears` names them.
    """

    def __init__(self, module: FakeQuantizedAttention, linears: Mapping[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        kept = {k: v for k, v in vars(module).items() if not k.startswith("_") and not k.endswith("_fake_quantizer")}
        hooks = {k: v for k, v in vars(module).items() if k.startswith("_forward_")}
        self.__dict__.update(kept | hooks, _qkv_same_embed_dim=False)
        for name in ("in_proj_weight", "in_proj_bias", *(f"{part}_weight" for part in _INPUTS)):
            self.register_parameter(name, None)  # nn.TransformerEncoderLayer looks at them
        for name in ("bias_k", "bias_v"):
            if name in module._parameters:
                self.register_parameter(name, module._parameters[name])
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.out_proj = module.out_proj
        if "products" in module._modules:
            self.add_module("products", module._modules["products"])

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """As `UnfusedAttention.project`."""
        layers: Any = (self.q_proj, self.k_proj, self.v_proj)
        return [layer(x) for layer, x in zip(layers, (query, key, value), strict=True)]


def projections(attention: nn.MultiheadAttention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight [out, in] and bias of the projections of query, key and value."""
    weights: Any = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    bias: Any = attention.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return dict(zip(_INPUTS, zip(weights, biases, strict=True), strict=True))


def _merged(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that is added to the products of `q` and `k`, [batch or 1, heads or 1, queries or 1, keys]."""
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    kind = F._none_or_dtype(mask)
    padding = F._canonical_mask(padding, "key_padding_mask", kind, "attn_mask", dtype)
    mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, check_other=False)
    if mask is not None:
        expected = (q.shape[2], keys) if mask.dim() == 2 else (batch * heads, q.shape[2], keys)
        if mask.shape != expected:
            raise ValueError(f"attn_mask has shape {list(mask.shape)}, expected {list(expected)}")
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
    if padding is None:
        return mask
    if padding.shape[-1] != keys:
        raise ValueError(f"key_padding_mask has shape {list(padding.shape)}, but there are {keys} keys")
    padding = padding.view(-1, 1, 1, keys)
    return padding if mask is None else mask + padding


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(head_dim) + mask) v, and the softmax where it is needed."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.transpose(-2, -1)
    weights = F.dropout(F.softmax(scores if mask is None else scores + mask, -1), dropout)
    return weights @ v, weights

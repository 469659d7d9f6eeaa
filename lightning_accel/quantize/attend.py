"""Which layers of a model are attention whose products can be integers, and how these layers come to call them.

Layers of transformers that look up their attention function by name, where they do not decode with a cache, and
nn.MultiheadAttention. Such a layer gets a module `products`; one of transformers also a copy of its configuration,
which names `attend`, so that masks are made as before.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .._quiet import AttentionInterface
from .attention import UnfusedAttention
from .products import FakeQuantizedProducts

NAME = "products"  # of the module in the layer
NOT_SUPPORTED = ("softcap", "s_aux")  # what a layer of transformers may ask of its attention function
_FUNCTION = "lightning_accel_products"  # as transformers knows `attend`


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: attention by the `products` of `module`, [B, L, H, E]."""
    wanted = [name for name in NOT_SUPPORTED if options.get(name) is not None]
    wanted += ["output_attentions"] if options.get("output_attentions") else []
    if wanted:
        raise ValueError(
            f"{type(module).__name__} wants attention with {wanted[0]}, which int8 products do not have; write "
            "QuantConfig(attention=False)"
        )
    rows, keys = query.shape[2], key.shape[2]
    if is_causal and attention_mask is None and rows > 1:  # as transformers' own
        attention_mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    mask = added_mask(attention_mask, position_bias)
    out = module.products(query, key, value, mask, scaling, dropout)  # type: ignore[operator]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_FUNCTION, attend)  # here, so that a pickled model runs in another process


def added_mask(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """The mask of an attention function with T5's bias in it; what a boolean mask hides gets the least number."""
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return mask + position_bias


def why_not(module: Any) -> str | None:
    """Why the products of an attention layer stay in float, or None."""
    if isinstance(module, nn.MultiheadAttention):
        known = type(module) is nn.MultiheadAttention or isinstance(module, UnfusedAttention)
        return None if known else "a subclass of MultiheadAttention may compute something else"
    if getattr(module, "is_causal", True) or getattr(module, "is_decoder", False):
        return "decodes with a cache, whose keys and values are in float"
    if getattr(module.config, "output_attentions", False):
        return "its configuration asks for attention maps; write config.output_attentions = False"
    if str(module.config._attn_implementation) not in ("sdpa", "eager", _FUNCTION):
        return f"masks of {module.config._attn_implementation} have another form; write attn_implementation='sdpa'"
    return None


def is_attention(module: nn.Module) -> bool:
    """Whether it is nn.MultiheadAttention, or a layer that asks transformers for its attention function."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "ALL_ATTENTION_FUNCTIONS" in names and hasattr(getattr(module, "config", None), "_attn_implementation")


def has_products(module: nn.Module) -> bool:
    """Whether an attention layer has fake-quantized products."""
    return isinstance(module._modules.get(NAME), FakeQuantizedProducts)


def add_products_(module: Any) -> None:
    """Gives an attention layer fake-quantized products, unless it has them."""
    if has_products(module):
        return
    module.add_module(NAME, FakeQuantizedProducts().train(module.training))
    if isinstance(module, nn.MultiheadAttention):
        return
    module.__dict__["config_before"] = module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = _FUNCTION  # by its property it would be set in parts that are shared


def layer_of(name: str) -> str:
    """The layer whose products are called `name`."""
    return name.rpartition(".")[0]


def remove_products_(module: Any) -> None:
    """Takes fake-quantized products out again."""
    if has_products(module):
        delattr(module, NAME)
        if "config_before" in module.__dict__:
            module.config = module.__dict__.pop("config_before")

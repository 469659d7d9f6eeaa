"""What the engines have in common that write files for other runtimes: `transformers` and `gguf`.

Their files hold the trained integers; activations are rounded by the rule of the runtime that reads them
(docs/decisions/0018-files-for-other-runtimes.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def with_activations(model: nn.Module, int8_linear: Callable[..., Tensor]) -> nn.Module | None:
    """A copy of a deployed model, over the same tensors, with activations rounded otherwise; `None` where none are.

    Args:
        int8_linear: what an int8 layer computes, static ranges left out: (x, codes, scale, bias) -> y. 4-bit layers
            get their activations as they are.
    """
    from ..quantize.int4 import int4_linear_reference
    from ..quantize.layers import Int4Linear, Int8Linear, Int8StaticLinear

    linear = [m for m in model.modules() if isinstance(m, Int8Linear | Int8StaticLinear | Int4Linear)]
    if all(m.scheme == "int4-weight" for m in linear):
        return None
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.function = int4_linear_reference
        for name, child in module.named_children():
            if isinstance(child, Int8StaticLinear):
                setattr(module, name, Int8Linear((child.codes, child.scale / child.input_scale), child.bias))
            if isinstance(layer := getattr(module, name), Int8Linear):
                layer.function = int8_linear
    return model


def check_configuration(model: Any, config: Any) -> nn.Module:
    """The plain model, on the meta device, that a configuration makes.

    Raises:
        ValueError: it has other tensors than `model`, or a module that is quantized is neither Linear nor Embedding.
    """
    from ..quantize.layers import CONVERTED

    with torch.device("meta"):
        plain = type(model)(config)
    kinds = dict(plain.named_modules())
    converted = {name: module for name, module in model.named_modules() if isinstance(module, CONVERTED)}
    ours = {n: list(t.shape) for n, t in model.state_dict().items() if n.rpartition(".")[0] not in converted}
    expected = {name: list(tensor.shape) for name, tensor in plain.state_dict().items()}
    for name, module in converted.items():
        if type(kind := kinds.get(name)) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"{name} is a {type(kind).__name__}, and other runtimes have quantized forms of Linear and Embedding "
                f"only; write overrides={{{name!r}: None}}"
            )
        ours[f"{name}.weight"] = list(module.weight.shape)
        bias = getattr(module, "bias", None)
        if bias is not None and (f"{name}.bias" in expected or bias.any()):  # some have noughts in place of none
            ours[f"{name}.bias"] = list(bias.shape)
    for name in sorted(expected.keys() | ours.keys()):
        if ours.get(name) != expected.get(name):
            raise ValueError(
                f"{name} is {ours.get(name)}, by the configuration {expected.get(name)}: what pruning left is more "
                "than the configuration can say"
            )
    return plain

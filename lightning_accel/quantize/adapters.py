"""LoRA (Hu et al. 2021, arXiv:2106.09685) of peft: what is rounded, in training and in export, is the merged weight.

    weight = base_layer.weight + sum over active adapters of (B @ A) * scaling

A deployed model has that one matrix. Rounding the base layer and leaving the adapter beside it would train, and
measure, another network than the merged one, so fake quantization rounds the sum while A and B stay the Parameters
that are trained, and an export merges its copy before anything else. peft is imported only where a model uses it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._warn import warn


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer, of the layers that carry an adapter of peft, merged into their weight or not."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in select.named_modules(model) if isinstance(module, BaseTunerLayer)}


def merged_weight(layer: Any) -> Tensor:
    """The weight of a LoRA layer with its active adapters in it, differentiable in A and B."""
    weight: Tensor = layer.base_layer.weight
    if layer.merged or layer.disable_adapters:
        return weight
    with torch.autocast(weight.device.type, enabled=False):  # as the export computes it
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter)
    return weight.to(layer.base_layer.weight.dtype)


def parts_of_adapters(model: nn.Module) -> dict[int, str]:
    """id of each module inside an adapter -> why it is not quantized itself."""
    found = {}
    for layer in adapted_layers(model).values():
        base = {id(module) for module in layer.base_layer.modules()}
        reason = "part of an adapter, which is merged into its base layer"
        found.update({id(module): reason for module in layer.modules() if id(module) not in base})
    return found


def check_adapters(model: nn.Module, quantized: Container[int]) -> None:
    """Raises ValueError where a base layer among those with the ids `quantized` has an adapter of another kind.

    Warns where LoRA's dropout falls away.
    """
    dropped = []
    for name, layer in adapted_layers(model).items():
        if id(layer.base_layer) not in quantized:
            continue
        if not _is_lora(layer):
            raise ValueError(
                f"{name} has an adapter ({type(layer).__module__}.{type(layer).__name__}) that is not plain LoRA of a "
                "linear layer, so its merged weight cannot be quantized in training; train it first, then write "
                "model = model.merge_and_unload(), and quantize that"
            )
        if not _is_swapped(layer) and any(getattr(d, "p", 0.0) for d in layer.lora_dropout.values()):
            dropped.append(name)
    if dropped:
        warn(
            f"lora_dropout is not applied in fake-quantized layers ({', '.join(dropped[:3])}"
            f"{', ...' if len(dropped) > 3 else ''}), whose rounded weight holds the adapter; write lora_dropout=0.0"
        )


def swap_adapters_(model: nn.Module, fake: tuple[type, ...]) -> None:
    """LoRA layers around modules of the types `fake` round their merged weight from now on."""
    for layer in adapted_layers(model).values():
        if type(layer.base_layer) in fake:
            from ._lora import FakeQuantizedLora

            layer.__class__ = FakeQuantizedLora


def unswap_adapters_(model: nn.Module) -> None:
    """LoRA layers as peft made them."""
    for layer in adapted_layers(model).values():
        if _is_swapped(layer):
            from peft.tuners.lora.layer import Linear

            layer.__class__ = Linear


def merge_adapters(model: nn.Module) -> nn.Module:
    """A copy of `model` with LoRA merged and peft's wrappers taken off; `model` itself where it has neither.

    Adapters of other kinds stay. A weight that was tied to the adapted one is not changed.
    """
    if "peft" not in sys.modules:
        return model
    from peft import PeftModel
    from peft.utils.other import ModulesToSaveWrapper

    def plain(module: nn.Module) -> nn.Module:
        if isinstance(module, PeftModel) and not module.active_peft_config.is_prompt_learning:
            return module.get_base_model()
        if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters and module.active_adapters:
            return module.modules_to_save[module.active_adapters[0]]
        return _merged(module) if _is_lora(module) else module

    if not any(isinstance(m, PeftModel | ModulesToSaveWrapper) or _is_lora(m) for m in model.modules()):
        return model
    model = plain(copy.deepcopy(model))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = plain(child)
    return model


def _merged(layer: Any) -> nn.Module:
    base = layer.base_layer
    weight = merged_weight(layer)
    if weight is not base.weight:
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=base.weight.requires_grad)
    return base


def _is_lora(layer: Any) -> bool:
    """Whether it is plain LoRA of a linear layer: no DoRA or other variant, no bias of its own."""
    from peft.tuners.lora.layer import Linear

    plain = type(layer) is Linear or _is_swapped(layer)
    return plain and not layer.lora_variant and not any(layer.lora_bias.values())


def _is_swapped(layer: Any) -> bool:
    from ._lora import FakeQuantizedLora

    return type(layer) is FakeQuantizedLora

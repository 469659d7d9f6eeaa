"""From fake-quantized models to integers, and from float models at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from .adapters import merge_adapters
from .attention import ConvertedAttention, FakeQuantizedAttention
from .config import QuantConfig
from .fake import FAKE_TYPES, is_prepared, scheme_of
from .int4 import SMALLEST, group_codes, group_scales, pack
from .layers import (
    Codes,
    Int4Embedding,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Int8StaticConv,
    Int8StaticLinear,
    check_not_converted,
)
from .norms import folded_bias, folded_weight
from .ops import row_codes, row_scales
from .prepare import check_prepared_as, prepare_
from .products import FakeQuantizedProducts, Int8Products
from .ranges import calibrate_


def convert_(model: nn.Module) -> nn.Module:
    """Replaces each fake-quantized module of `model` by its integer form, in place, and returns the model.

    Layers that shared a Parameter (a tied head) share one integer tensor; a module that stood in several places
    still does; forward hooks move to the integer form. A model that is itself one layer comes back as another object,
    and so does one with adapters of peft, which are merged in a copy.

    Raises:
        ValueError: nothing is fake-quantized (call `prepare_` or `quantize_model` first), or weights are not finite;
            the model is then as it was.
    """
    if not is_prepared(model):
        check_not_converted(model)
        raise ValueError("nothing in the model is fake-quantized; write quantize_model(model, QuantConfig('int8'))")
    model = merge_adapters(model)
    _check_finite(model)
    codes: dict[tuple[Any, ...], Codes] = {}
    fake = {m: name for name, m in select.named_modules(model) if type(m) in FAKE_TYPES}
    parts = {m: m.linears() for m in fake if isinstance(m, FakeQuantizedAttention)}  # alive as long as ids are keys
    converted: dict[nn.Module, nn.Module] = {m: _convert(m, name, codes) for m, name in fake.items() if m not in parts}
    for m, linears in parts.items():
        converted[m] = ConvertedAttention(m, {part: _convert(x, fake[m], codes) for part, x in linears.items()})
    absorbed = [m.__dict__["norm"] for m in fake if m.__dict__.get("norm") is not None]
    products = [m for m in model.modules() if isinstance(m, FakeQuantizedProducts)]
    converted.update({m: _with_hooks(Int8Products(), m).train(m.training) for m in products})
    converted.update({norm: _with_hooks(nn.Identity(), norm) for norm in absorbed})
    for parent in [*model.modules(), *(converted[m] for m in parts)]:
        for name, child in parent._modules.items():
            if child in converted:
                parent._modules[name] = converted[child]
    return converted.get(model, model)


def _check_finite(model: nn.Module) -> None:
    """Raises ValueError where a fake-quantized module holds NaN or infinite values."""
    for name, module in select.named_modules(model):
        for part, tensor in module._parameters.items() if type(module) in FAKE_TYPES else ():
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name}.{part} holds NaN or infinite values; train again, or write overrides={{{name!r}: None}}"
                )


def _convert(module: Any, name: str, codes: dict[tuple[Any, ...], Codes]) -> nn.Module:
    conv, transposed = isinstance(module, nn.Conv1d | nn.Conv2d), isinstance(module, Conv1D)
    key, scheme = (id(module.weight), transposed, id(module.norm) if conv else None), str(scheme_of(module))
    weight = folded_weight(module).detach() if conv else module.weight.detach()
    weight = weight.flatten(1) if conv else weight.t() if transposed else weight
    if key not in codes:
        if not torch.isfinite(weight).all():  # its own are finite
            raise ValueError(
                f"the BatchNorm after {name!r} makes its folded weight NaN or infinite; look at its running_var"
            )
        group = getattr(module.weight_fake_quantizer, "group", None)
        codes[key] = quantize_rows(weight) if group is None else quantize_groups(weight, group)
        if not torch.isfinite(codes[key][1]).all():
            raise ValueError(
                f"{name}.weight holds values past 5e5, too large for a float16 scale; write "
                f"overrides={{{name!r}: 'int8'}}"
            )
        if group is not None and 0 < (largest := float(weight.abs().max())) < SMALLEST:
            raise ValueError(
                f"{name}.weight holds values up to {largest:.2g}, too small for a float16 scale; write "
                f"overrides={{{name!r}: 'int8'}}"
            )
    integer: nn.Module
    if scheme == "int8-static":
        integer = _static(module, name, codes[key])
    elif scheme == "int8":
        integer = Int8Embedding(codes[key]) if isinstance(module, nn.Embedding) else Int8Linear(codes[key], module.bias)
    elif isinstance(module, nn.Embedding):
        integer = Int4Embedding(codes[key], weight.shape[0], weight.shape[1])
    else:
        integer = Int4Linear(codes[key], module.bias, weight.shape[0], weight.shape[1], scheme)
    integer.__dict__["fallback"] = module.__dict__.get("fallback")
    return _with_hooks(integer, module).train(module.training)


def _with_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    new.__dict__.update({k: v for k, v in vars(old).items() if k.startswith("_forward_")})
    return new


def _static(module: Any, name: str, codes: Codes) -> nn.Module:
    if not module.activation_fake_quantizer.found:
        raise ValueError(
            f"{name} has no range of activations: nothing has run through it; write calibrate_(model, batches), or "
            f"overrides={{{name!r}: 'int8'}}"
        )
    range_ = module.activation_fake_quantizer.range
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        bias = module.bias if module.bias is not None else torch.zeros(len(codes[0]))
        return Int8StaticLinear(codes, bias, range_)
    gain, bias = folded_bias(module)
    pixels = codes[0].view(module.weight.shape).movedim(1, -1).flatten(1).contiguous()
    return Int8StaticConv((pixels, codes[1]), bias, range_, gain, module)


def quantize_rows(weight: Tensor) -> Codes:
    """int8 codes [rows, n] and float32 scales [rows] of `weight` [rows, n]."""
    scales = row_scales(weight)
    return row_codes(weight, scales).to(torch.int8).contiguous(), scales.squeeze(-1).contiguous()


def quantize_groups(weight: Tensor, group: int) -> Codes:
    """Packed int4 codes and float16 scales of `weight` [rows, n] in groups of inputs."""
    scales = group_scales(weight, group)
    return pack(group_codes(weight, scales), scales)


def quantize_model(model: nn.Module, config: QuantConfig, calibration: Iterable[Any] | None = None) -> nn.Module:
    """Post-training quantization: a converted copy of `model`, for inference on the CPU, in float32 where it is float.

    A model that QAT has prepared is converted, if `config` is what it was prepared with (`convert_` asks for none).

    Args:
        calibration: batches in which `int8-static` finds its ranges: mappings of keyword inputs, tensors, or tuples
            whose first item is the input. The other schemes find their scales in each input and need none.

    Raises:
        ValueError: nothing can be quantized, the model is already converted, it was prepared with another config, or
            `int8-static` finds no ranges.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantize_model(model, QuantConfig("int8"))[2]
    Int8Linear(in_features=8, out_features=2, bias=True)
    """
    check_not_converted(model)
    if is_prepared(model):
        check_prepared_as(model, config)
    model = select.copy_model(merge_adapters(model)).float().eval().requires_grad_(False)
    if not is_prepared(model):
        prepare_(model, config)
        _check_finite(model)  # or calibration would say that its data are not
        calibrate_(model, calibration)
    return convert_(model)

"""Converted models: integer weights, and one operator a layer that engines lower to their own kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from ..select import Coverage, Entry
from .config import QuantConfig
from .fake import FAKE_TYPES, is_prepared, prepare_
from .ops import int8_embedding, int8_linear, row_codes, row_scales

_Codes = tuple[Tensor, Tensor]  # int8 [rows, n], float32 [rows]


class Int8Linear(nn.Module):
    """A linear layer with int8 weights [out, in], float32 scales [out] and dynamic int8 activations, for inference."""

    weight: Tensor
    scale: Tensor

    def __init__(self, codes: _Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", codes[0])
        self.register_buffer("scale", codes[1])
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.out_features, self.in_features = codes[0].shape
        self.function: Callable[..., Tensor] = int8_linear  # engines put their own form in its place

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """An embedding with int8 rows [n, width] and float32 scales [n], for inference."""

    weight: Tensor
    scale: Tensor

    def __init__(self, codes: _Codes) -> None:
        super().__init__()
        self.register_buffer("weight", codes[0])
        self.register_buffer("scale", codes[1])
        self.num_embeddings, self.embedding_dim = codes[0].shape
        self.function: Callable[..., Tensor] = int8_embedding  # engines put their own form in its place

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(ids, self.weight, self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def convert_(model: nn.Module) -> nn.Module:
    """Replaces each fake-quantized module of `model` by its integer form, in place, and returns the model.

    Layers that shared a Parameter (a tied head) share one integer tensor; a module that stood in several places
    still does; forward hooks move to the integer form. A model that is itself one layer comes back as another object.

    Raises:
        ValueError: nothing is fake-quantized (call `prepare_` or `quantize_model` first), or weights are not finite;
            the model is then as it was.
    """
    if not is_prepared(model):
        raise ValueError("nothing in the model is fake-quantized; write quantize_model(model, QuantConfig('int8'))")
    codes: dict[tuple[int, bool], _Codes] = {}
    converted = {m: _convert(m, name, codes) for name, m in select.named_modules(model) if type(m) in FAKE_TYPES}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in converted:
                parent._modules[name] = converted[child]
    return converted.get(model, model)


def _convert(module: Any, name: str, codes: dict[tuple[int, bool], _Codes]) -> nn.Module:
    transposed = isinstance(module, Conv1D)
    key = id(module.weight), transposed
    if key not in codes:
        weight = module.weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds NaN or infinite values; train again or exclude {name!r}")
        codes[key] = quantize_rows(weight.t() if transposed else weight)
    integer = Int8Embedding(codes[key]) if isinstance(module, nn.Embedding) else Int8Linear(codes[key], module.bias)
    integer.__dict__.update({k: v for k, v in vars(module).items() if k.startswith("_forward_")})  # hooks
    return integer.train(module.training)


def quantize_rows(weight: Tensor) -> _Codes:
    """int8 codes [rows, n] and float32 scales [rows] of `weight` [rows, n]."""
    scales = row_scales(weight)
    return row_codes(weight, scales).to(torch.int8).contiguous(), scales.squeeze(-1).contiguous()


def quantize_model(model: nn.Module, config: QuantConfig, calibration: Iterable[Any] | None = None) -> nn.Module:
    """Post-training quantization: a converted copy of `model`, for inference on the CPU.

    A model that QAT has prepared is converted with the schemes it was trained with. `calibration` is for schemes
    with static activation ranges; `int8` finds its scales in each input and needs none.

    Raises:
        ValueError: nothing can be quantized, or the model is already converted.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantize_model(model, QuantConfig("int8"))[2]
    Int8Linear(in_features=8, out_features=2, bias=True)
    """
    if any(isinstance(m, Int8Linear | Int8Embedding) for m in model.modules()):
        raise ValueError("the model is already quantized; quantize the original model instead")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if not is_prepared(model):
        prepare_(model, config)
    return convert_(model)


def quantization_coverage(model: nn.Module, flops: dict[str, int] | None = None) -> Coverage:
    """Which modules of a converted (or prepared) model are quantized, in shares of weights and FLOPs.

    Args:
        flops: of each module of the unquantized model, from `select.count_flops`.
    """
    coverage = Coverage("int8 quantization")
    seen: set[int] = set()
    for name, module in select.named_modules(model):
        tensors: list[Tensor] = [t for t in module._parameters.values() if t is not None]
        tensors += [t for t in module._buffers.values() if t is not None and t.dtype == torch.int8]
        quantized = isinstance(module, Int8Linear | Int8Embedding) or type(module) in FAKE_TYPES
        parameters = sum(t.numel() for t in tensors if id(t) not in seen)
        seen.update(id(t) for t in tensors)
        own = flops.get(name, 0) if flops is not None and not list(_children_with_weights(module)) else None
        if tensors and (parameters or own):
            coverage.entries.append(
                Entry(
                    name,
                    type(module).__name__,
                    parameters,
                    flops=own,
                    done="int8" if quantized else None,
                    reason=None if quantized else "not quantized",
                )
            )
    if flops is not None:
        counted = sum(e.flops or 0 for e in coverage.entries)
        rest = flops.get("", 0) - counted
        if rest > 0:
            coverage.entries.append(
                Entry(
                    "(attention and other products without weights)",
                    "function",
                    0,
                    reason="between activations: runs in float",
                    flops=rest,
                )
            )
    return coverage


def _children_with_weights(module: nn.Module) -> Iterable[nn.Module]:
    return (child for child in module.children() if any(True for _ in child.parameters()))

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
from .attention import ConvertedAttention, FakeQuantizedAttention
from .config import QuantConfig
from .fake import FAKE_TYPES, is_prepared, prepare_, scheme_of, shapes_of
from .int4 import group_codes, group_scales, int4_embedding_reference, int4_int8_linear, int4_linear, pack
from .ops import int8_embedding, int8_linear, row_codes, row_scales

_Codes = tuple[Tensor, Tensor]  # int8 [rows, n] and float32 [rows], or as `int4.pack` gives them


class Int8Linear(nn.Module):
    """A linear layer with int8 weights [out, in], float32 scales [out] and dynamic int8 activations, for inference."""

    scheme = "int8"
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

    scheme = "int8"
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


class Int4Linear(nn.Module):
    """A linear layer with packed int4 weights and scales (`int4.pack`), for inference.

    Args:
        scheme: `"int4-weight"` (activations as they are) or `"int4-int8"` (dynamic int8 activations).
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, codes: _Codes, bias: Tensor | None, out_features: int, in_features: int, scheme: str) -> None:
        super().__init__()
        self.register_buffer("weight", codes[0])
        self.register_buffer("scale", codes[1])
        self.register_buffer("bias", torch.zeros(out_features) if bias is None else bias.detach().clone())
        self.out_features, self.in_features, self.scheme = out_features, in_features, scheme
        self.function: Callable[..., Tensor] = int4_linear if scheme == "int4-weight" else int4_int8_linear

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}"


class Int4Embedding(nn.Module):
    """An embedding with packed int4 rows and their scales (`int4.pack`), for inference."""

    scheme = "int4-weight"
    weight: Tensor
    scale: Tensor

    def __init__(self, codes: _Codes, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", codes[0])
        self.register_buffer("scale", codes[1])
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return int4_embedding_reference(ids, self.weight, self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


LINEAR = (Int8Linear, Int4Linear)
CONVERTED = (*LINEAR, Int8Embedding, Int4Embedding)


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
    fake = {m: name for name, m in select.named_modules(model) if type(m) in FAKE_TYPES}
    parts = {m: m.linears() for m in fake if isinstance(m, FakeQuantizedAttention)}  # alive as long as ids are keys
    converted: dict[nn.Module, nn.Module] = {m: _convert(m, name, codes) for m, name in fake.items() if m not in parts}
    for m, linears in parts.items():
        converted[m] = ConvertedAttention(m, {part: _convert(x, fake[m], codes) for part, x in linears.items()})
    for parent in [*model.modules(), *(converted[m] for m in parts)]:
        for name, child in parent._modules.items():
            if child in converted:
                parent._modules[name] = converted[child]
    return converted.get(model, model)


def _convert(module: Any, name: str, codes: dict[tuple[int, bool], _Codes]) -> nn.Module:
    transposed = isinstance(module, Conv1D)
    key, scheme = (id(module.weight), transposed), str(scheme_of(module))
    weight = module.weight.detach().t() if transposed else module.weight.detach()
    if key not in codes:
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds NaN or infinite values; train again or exclude {name!r}")
        group = getattr(module.weight_fake_quantizer, "group", None)
        codes[key] = quantize_rows(weight) if group is None else quantize_groups(weight, group)
        if not torch.isfinite(codes[key][1]).all():
            raise ValueError(f"{name}.weight holds values past 5e5, too large for a float16 scale; exclude {name!r}")
    integer: nn.Module
    if scheme == "int8":
        integer = Int8Embedding(codes[key]) if isinstance(module, nn.Embedding) else Int8Linear(codes[key], module.bias)
    elif isinstance(module, nn.Embedding):
        integer = Int4Embedding(codes[key], weight.shape[0], weight.shape[1])
    else:
        integer = Int4Linear(codes[key], module.bias, weight.shape[0], weight.shape[1], scheme)
    integer.__dict__.update({k: v for k, v in vars(module).items() if k.startswith("_forward_")})  # hooks
    integer.__dict__["fallback"] = module.fallback
    return integer.train(module.training)


def quantize_rows(weight: Tensor) -> _Codes:
    """int8 codes [rows, n] and float32 scales [rows] of `weight` [rows, n]."""
    scales = row_scales(weight)
    return row_codes(weight, scales).to(torch.int8).contiguous(), scales.squeeze(-1).contiguous()


def quantize_groups(weight: Tensor, group: int) -> _Codes:
    """Packed int4 codes and float16 scales of `weight` [rows, n] in groups of inputs."""
    scales = group_scales(weight, group)
    return pack(group_codes(weight, scales), scales)


def quantize_model(model: nn.Module, config: QuantConfig, calibration: Iterable[Any] | None = None) -> nn.Module:
    """Post-training quantization: a converted copy of `model`, for inference on the CPU, in float32 where it is float.

    A model that QAT has prepared is converted with the schemes it was trained with. `calibration` is for schemes
    with static activation ranges; those of now find their scales in each input and need none.

    Raises:
        ValueError: nothing can be quantized, or the model is already converted.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantize_model(model, QuantConfig("int8"))[2]
    Int8Linear(in_features=8, out_features=2, bias=True)
    """
    if any(isinstance(m, CONVERTED) for m in model.modules()):
        raise ValueError("the model is already quantized; quantize the original model instead")
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    if not is_prepared(model):
        prepare_(model, config)
    return convert_(model)


def quantization_coverage(model: nn.Module, flops: dict[str, int] | None = None) -> Coverage:
    """Which modules of a converted (or prepared) model are quantized, in shares of weights and FLOPs.

    Args:
        flops: of each module of the unquantized model, from `select.count_flops`.
    """
    found = [m for m in model.modules() if _scheme(m)]
    layers = [m for m in found if not isinstance(m, nn.Embedding | Int8Embedding | Int4Embedding)] or found
    schemes = dict.fromkeys(str(_scheme(m)) for m in sorted(layers, key=_size, reverse=True))
    coverage = Coverage(f"{' and '.join(schemes)} quantization")
    seen: set[int] = set()
    for name, module in select.named_modules(model):
        weight = getattr(module, "weight", None) if isinstance(module, CONVERTED) else None
        tensors: list[Tensor] = [t for t in module._parameters.values() if t is not None]
        parameters = sum(t.numel() for t in tensors if id(t) not in seen)
        parameters += _size(module) if weight is not None and id(weight) not in seen else 0
        seen.update(id(t) for t in (*tensors, weight))
        own = None if flops is None else _own_flops(name, module, flops)
        if (tensors or weight is not None) and (parameters or own):
            scheme = _scheme(module)
            coverage.entries.append(
                Entry(
                    name,
                    type(module).__name__,
                    parameters,
                    flops=own,
                    done=scheme,
                    reason=getattr(module, "fallback", None) if scheme else "not quantized",
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


def _scheme(module: nn.Module) -> str | None:
    return getattr(module, "scheme", None) if isinstance(module, CONVERTED) else scheme_of(module)


def _size(module: Any) -> int:
    """Number of weights of a linear layer or an embedding."""
    if isinstance(module, LINEAR):
        return module.out_features * module.in_features
    if isinstance(module, Int8Embedding | Int4Embedding):
        return module.num_embeddings * module.embedding_dim
    return sum(rows * inputs for rows, inputs in shapes_of(module))


def _own_flops(name: str, module: nn.Module, flops: dict[str, int]) -> int | None:
    """FLOPs of the module's own weights, `None` where they are its children's."""
    if isinstance(module, ConvertedAttention):
        return None
    if isinstance(module, nn.MultiheadAttention):  # as a whole it has those of attention and of out_proj too
        return sum(flops.get(f"{name}.{part}".lstrip("."), 0) for part in ("q_proj", "k_proj", "v_proj"))
    return None if list(_children_with_weights(module)) else flops.get(name, 0)


def _children_with_weights(module: nn.Module) -> Iterable[nn.Module]:
    return (child for child in module.children() if any(True for _ in child.parameters()))

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
from .adapters import merge_adapters
from .attention import ConvertedAttention, FakeQuantizedAttention
from .config import QuantConfig
from .fake import FAKE_TYPES, check_prepared_as, is_prepared, prepare_, scheme_of, shapes_of
from .int4 import group_codes, group_scales, int4_embedding_reference, int4_int8_linear, int4_linear, pack, unpack
from .norms import folded_bias, folded_weight
from .ops import int8_embedding, int8_linear, row_codes, row_scales, untile
from .ranges import calibrate_
from .static import affine, affine_codes, int8_static_conv2d_reference, int8_static_linear_reference, static_sums

_Codes = tuple[Tensor, Tensor]  # int8 [rows, n] and float32 [rows], or as `int4.pack` gives them


class _Converted(nn.Module):
    """What the layers share: integer `codes`, as they are stored, and their scales.

    Each has a `weight`, which is what the codes mean, in float32: models look at its dtype, and cast activations to it
    (transformers' ViT would make int8 of its pixels).
    """

    codes: Tensor
    scale: Tensor

    def _rows(self, rows: int, n: int) -> Tensor:
        """int8 codes [rows, n], whether an engine keeps them in tiles or not."""
        return self.codes if self.codes.dim() == 2 else untile(self.codes, rows, n)


class Int8Linear(_Converted):
    """A linear layer with int8 weights [out, in], float32 scales [out] and dynamic int8 activations, for inference."""

    scheme = "int8"

    def __init__(self, codes: _Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.out_features, self.in_features = codes[0].shape
        self.function: Callable[..., Tensor] = int8_linear  # engines put their own form in its place

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.codes, self.scale, self.bias)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return self._rows(self.out_features, self.in_features).float() * self.scale[:, None]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Converted):
    """An embedding with int8 rows [n, width] and float32 scales [n], for inference."""

    scheme = "int8"

    def __init__(self, codes: _Codes) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.num_embeddings, self.embedding_dim = codes[0].shape
        self.function: Callable[..., Tensor] = int8_embedding  # engines put their own form in its place

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(ids, self.codes, self.scale)

    @property
    def weight(self) -> Tensor:
        """float32 [n, width]."""
        return self._rows(self.num_embeddings, self.embedding_dim).float() * self.scale[:, None]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class _Static(_Converted):
    """What layers with static uint8 activations share: y = (codes_x @ codes_w.T + start) * scale + bias.

    Args:
        codes: int8 weight [out, in] and its float32 scales [out].
        bias: [out].
        range_: float32 [2], of the activations.
        gain: what the channels are multiplied by besides, [out].
    """

    scheme = "int8-static"
    start: Tensor
    bias: Tensor

    def __init__(self, codes: _Codes, bias: Tensor, range_: Tensor, gain: Tensor | float = 1.0) -> None:
        super().__init__()
        self.input_scale, self.zero_point = affine(*range_.tolist())
        weight, scale = codes
        self.register_buffer("codes", weight)
        self.register_buffer("start", static_sums(weight, self.zero_point))
        self.register_buffer("scale", scale * self.input_scale * gain)
        self.register_buffer("bias", bias.detach().clone())
        self.out_features, self.in_features = weight.shape

    def quantize(self, x: Tensor) -> Tensor:
        """uint8 codes of activations."""
        return affine_codes(x, self.input_scale, self.zero_point)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return self._rows(self.out_features, self.in_features).float() * (self.scale / self.input_scale)[:, None]

    def extra_repr(self) -> str:
        return f"input_scale={self.input_scale:.4g}, zero_point={self.zero_point}"


class Int8StaticLinear(_Static):
    """A linear layer with int8 weights [out, in] and static uint8 activations, for inference."""

    function: Callable[..., Tensor] = staticmethod(int8_static_linear_reference)  # engines put their own in its place

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.quantize(x), self.codes, self.start, self.scale, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


class Int8StaticConv(_Static):
    """A convolution, one- or two-dimensional, with static uint8 activations, for inference.

    Its weight is [out, height * width * in]: the channels of a pixel lie beside each other, in the codes too.
    """

    function: Callable[..., Tensor] = staticmethod(int8_static_conv2d_reference)

    def __init__(self, codes: _Codes, bias: Tensor, range_: Tensor, gain: Tensor, conv: Any) -> None:
        super().__init__(codes, bias, range_, gain)
        self.dims = conv.weight.dim() - 2
        self.padding_mode, self._around = conv.padding_mode, list(conv._reversed_padding_repeated_twice)
        self.geometry = tuple(
            (*(1,) * (2 - self.dims), *sizes) for sizes in (conv.kernel_size, conv.stride, conv.dilation)
        )

    def forward(self, x: Tensor) -> Tensor:
        batched = x.dim() == self.dims + 2
        x = x if batched else x.unsqueeze(0)
        ends = self._around if self.dims == 2 else [*self._around, 0, 0]  # left, right, top, bottom
        even = ends[0] == ends[1] and ends[2] == ends[3]
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._around, mode=self.padding_mode)
        elif not even:
            x = nn.functional.pad(x, self._around)
        padding = (ends[2], ends[0]) if even and self.padding_mode == "zeros" else (0, 0)
        codes = self.quantize(x if self.dims == 2 else x.unsqueeze(-2)).permute(0, 2, 3, 1).contiguous()
        (kernel, stride, dilation) = self.geometry
        y = self.function(
            codes, self.codes, self.start, self.scale, self.bias, self.zero_point, *kernel, stride, padding, dilation
        )
        y = y.permute(0, 3, 1, 2).to(x.dtype)
        y = y if self.dims == 2 else y.squeeze(-2)
        return y if batched else y.squeeze(0)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in, (height,) width]."""
        return super().weight.unflatten(1, (*self.geometry[0][2 - self.dims :], -1)).movedim(-1, 1)

    def extra_repr(self) -> str:
        kernel, stride, dilation = self.geometry
        return f"out={self.out_features}, kernel={kernel}, stride={stride}, dilation={dilation}, {super().extra_repr()}"


class Int4Linear(_Converted):
    """A linear layer with packed int4 weights and scales (`int4.pack`), for inference.

    Args:
        scheme: `"int4-weight"` (activations as they are) or `"int4-int8"` (dynamic int8 activations).
    """

    bias: Tensor

    def __init__(self, codes: _Codes, bias: Tensor | None, out_features: int, in_features: int, scheme: str) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.register_buffer("bias", torch.zeros(out_features) if bias is None else bias.detach().clone())
        self.out_features, self.in_features, self.scheme = out_features, in_features, scheme
        self.function: Callable[..., Tensor] = int4_linear if scheme == "int4-weight" else int4_int8_linear

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.codes, self.scale, self.bias)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return dequantize_groups(self.codes, self.scale, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}"


class Int4Embedding(_Converted):
    """An embedding with packed int4 rows and their scales (`int4.pack`), for inference."""

    scheme = "int4-weight"

    def __init__(self, codes: _Codes, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return int4_embedding_reference(ids, self.codes, self.scale)

    @property
    def weight(self) -> Tensor:
        """float32 [n, width]."""
        return dequantize_groups(self.codes, self.scale, self.num_embeddings)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


LINEAR = (Int8Linear, Int8StaticLinear, Int8StaticConv, Int4Linear)
CONVERTED = (*LINEAR, Int8Embedding, Int4Embedding)


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
    codes: dict[tuple[Any, ...], _Codes] = {}
    fake = {m: name for name, m in select.named_modules(model) if type(m) in FAKE_TYPES}
    parts = {m: m.linears() for m in fake if isinstance(m, FakeQuantizedAttention)}  # alive as long as ids are keys
    converted: dict[nn.Module, nn.Module] = {m: _convert(m, name, codes) for m, name in fake.items() if m not in parts}
    for m, linears in parts.items():
        converted[m] = ConvertedAttention(m, {part: _convert(x, fake[m], codes) for part, x in linears.items()})
    absorbed = [m.__dict__["norm"] for m in fake if m.__dict__.get("norm") is not None]
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
                raise ValueError(f"{name}.{part} holds NaN or infinite values; train again or exclude {name!r}")


def check_not_converted(model: nn.Module) -> None:
    """Raises ValueError where `model` holds integers already: they cannot be rounded or trained again."""
    if name := next((n or "<root>" for n, m in select.named_modules(model) if isinstance(m, CONVERTED)), None):
        raise ValueError(
            f"the model is already quantized ({name} holds integers, which cannot be trained or quantized again); keep "
            "the float model, and write quantize_model(model, config) last or export_model(model, ..., quantize=config)"
        )


def _convert(module: Any, name: str, codes: dict[tuple[Any, ...], _Codes]) -> nn.Module:
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
            raise ValueError(f"{name}.weight holds values past 5e5, too large for a float16 scale; exclude {name!r}")
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


def _static(module: Any, name: str, codes: _Codes) -> nn.Module:
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


def quantize_rows(weight: Tensor) -> _Codes:
    """int8 codes [rows, n] and float32 scales [rows] of `weight` [rows, n]."""
    scales = row_scales(weight)
    return row_codes(weight, scales).to(torch.int8).contiguous(), scales.squeeze(-1).contiguous()


def dequantize_groups(packed: Tensor, scale: Tensor, rows: int) -> Tensor:
    """float32 [rows, n] of what `quantize_groups` gives."""
    codes, scales = unpack(packed, scale, rows)
    return (codes * scales).flatten(1)


def quantize_groups(weight: Tensor, group: int) -> _Codes:
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
    model = copy.deepcopy(merge_adapters(model)).float().eval().requires_grad_(False)
    if not is_prepared(model):
        prepare_(model, config)
        _check_finite(model)  # or calibration would say that its data are not
        calibrate_(model, calibration)
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
        weight: Any = module.codes if isinstance(module, CONVERTED) else None
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
                    reason=getattr(module, "fallback", None) or (None if scheme else "not quantized"),
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

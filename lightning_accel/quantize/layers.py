"""The layers of converted models: integer weights, and one operator a layer that engines lower to their own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .int4 import int4_embedding_reference, int4_int8_linear, int4_linear, unpack
from .ops import int8_embedding, int8_linear, untile
from .static import affine, affine_codes, int8_static_conv2d_reference, int8_static_linear_reference, static_sums

Codes = tuple[Tensor, Tensor]  # int8 [rows, n] and float32 [rows], or as `int4.pack` gives them


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


def _activations(x: Tensor) -> Tensor:
    """`x`, which must be of floating point, as a float layer's: the output, of its dtype, would be cut to integers."""
    if not x.is_floating_point():
        raise ValueError(f"the input of a quantized layer is {x.dtype}, expected floating point; write x.float()")
    return x


class Int8Linear(_Converted):
    """A linear layer with int8 weights [out, in], float32 scales [out] and dynamic int8 activations, for inference."""

    scheme = "int8"

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.out_features, self.in_features = codes[0].shape
        self.function: Callable[..., Tensor] = int8_linear  # engines put their own form in its place

    def forward(self, x: Tensor) -> Tensor:
        return self.function(_activations(x), self.codes, self.scale, self.bias)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return self._rows(self.out_features, self.in_features).float() * self.scale[:, None]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Converted):
    """An embedding with int8 rows [n, width] and float32 scales [n], for inference."""

    scheme = "int8"

    def __init__(self, codes: Codes) -> None:
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

    def __init__(self, codes: Codes, bias: Tensor, range_: Tensor, gain: Tensor | float = 1.0) -> None:
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
        return affine_codes(_activations(x), self.input_scale, self.zero_point)

    def get_extra_state(self) -> Tensor:
        """Scale and zero point of the input, float64 [2]: `start` and `scale` hold for no others."""
        return torch.tensor([self.input_scale, self.zero_point], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over those of another state_dict."""
        self.input_scale, self.zero_point = float(state[0]), int(state[1])

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

    Its weight is [out, height * width * in / groups]: the channels of a pixel lie beside each other, in the codes
    too. It has the attributes of a convolution: transformers' Whisper asks for the length of its outputs.
    """

    function: Callable[..., Tensor] = staticmethod(int8_static_conv2d_reference)

    def __init__(self, codes: Codes, bias: Tensor, range_: Tensor, gain: Tensor, conv: Any) -> None:
        super().__init__(codes, bias, range_, gain)
        self.dims = conv.weight.dim() - 2
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._around = list(conv._reversed_padding_repeated_twice if conv.around is None else conv.around)
        self._pad_mode = conv.padding_mode if conv.around is None else "zeros"
        self.geometry = tuple(
            (*(1,) * (2 - self.dims), *sizes) for sizes in (conv.kernel_size, conv.stride, conv.dilation)
        )

    def forward(self, x: Tensor) -> Tensor:
        batched = x.dim() == self.dims + 2
        x = x if batched else x.unsqueeze(0)
        left, right, top, bottom = [*self._around, 0, 0][:4]
        if self._pad_mode != "zeros":
            x = nn.functional.pad(x, self._around, mode=self._pad_mode)
            left = right = top = bottom = 0
        codes = self.quantize(x if self.dims == 2 else x.unsqueeze(-2)).permute(0, 2, 3, 1).contiguous()
        kernel, stride, dilation = self.geometry
        y = self.function(
            codes, self.codes, self.start, self.scale, self.bias, self.zero_point, *kernel, stride,
            (top, left, bottom, right), dilation, self.groups,
        )  # fmt: skip
        y = y.permute(0, 3, 1, 2).to(x.dtype)
        y = y if self.dims == 2 else y.squeeze(-2)
        return y if batched else y.squeeze(0)

    def in_groups(self) -> bool:
        """Whether it has groups of several channels, and so is neither a whole convolution nor a depthwise one."""
        return self.groups > 1 and not self.groups == self.in_channels == self.out_channels

    @property
    def weight(self) -> Tensor:
        """float32 [out, in / groups, (height,) width]."""
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

    def __init__(self, codes: Codes, bias: Tensor | None, out_features: int, in_features: int, scheme: str) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.register_buffer("bias", torch.zeros(out_features) if bias is None else bias.detach().clone())
        self.out_features, self.in_features, self.scheme = out_features, in_features, scheme
        self.function: Callable[..., Tensor] = int4_linear if scheme == "int4-weight" else int4_int8_linear

    def forward(self, x: Tensor) -> Tensor:
        return self.function(_activations(x), self.codes, self.scale, self.bias)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return dequantize_groups(self.codes, self.scale, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}"


class Int4Embedding(_Converted):
    """An embedding with packed int4 rows and their scales (`int4.pack`), for inference."""

    scheme = "int4-weight"

    def __init__(self, codes: Codes, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes[0])
        self.register_buffer("scale", codes[1])
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.function: Callable[..., Tensor] = int4_embedding_reference  # engines may put their own in its place

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(ids, self.codes, self.scale)

    @property
    def weight(self) -> Tensor:
        """float32 [n, width]."""
        return dequantize_groups(self.codes, self.scale, self.num_embeddings)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


LINEAR = (Int8Linear, Int8StaticLinear, Int8StaticConv, Int4Linear)
CONVERTED = (*LINEAR, Int8Embedding, Int4Embedding)


def dequantize_groups(packed: Tensor, scale: Tensor, rows: int) -> Tensor:
    """float32 [rows, n] of what `quantize_groups` gives."""
    codes, scales = unpack(packed, scale, rows)
    return (codes * scales).flatten(1)


def check_not_converted(model: nn.Module) -> None:
    """Raises ValueError where `model` holds integers already: they cannot be rounded or trained again."""
    if name := next((n or "<root>" for n, m in select.named_modules(model) if isinstance(m, CONVERTED)), None):
        raise ValueError(
            f"the model is already quantized ({name} holds integers, which cannot be trained or quantized again); keep "
            "the float model, and write quantize_model(model, config) last or export_model(model, ..., quantize=config)"
        )

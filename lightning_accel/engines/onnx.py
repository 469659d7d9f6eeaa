"""ONNX Runtime: one ONNX file, which plain onnxruntime runs too.

Layers in the forms that its CPU kernels are made for: `int8` as MatMulInteger of rows quantized to uint8 around 128,
the same codes as everywhere; `int8-static` as QuantizeLinear and DequantizeLinear around MatMul and Conv;
4-bit weights as MatMulNBits, whose own 8-bit activations (a scale a block, not a row) stand for those of `int4-int8`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import onnx_graph

if TYPE_CHECKING:
    from ..capture import Capture
    from ..quantize.layers import Int4Linear, Int8Linear, Int8StaticConv, Int8StaticLinear

_MIDDLE = 128  # the zero point with which ONNX Runtime has fast products of int8 weights


# --- build side ------------------------------------------------------------------------------------------------------


def lower(model: torch.nn.Module) -> torch.nn.Module:
    """Quantized layers as ONNX nodes, in place."""
    from ..quantize.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, Int8StaticConv, Int8StaticLinear
    from ..quantize.products import Int8Products, int8_attention_reference

    turned: dict[int, Tensor] = {}  # id of codes -> their transpose, which a tied embedding reads too
    packed: dict[int, tuple[Tensor, Tensor]] = {}  # the same of 4-bit codes
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, Int8Linear):
            _lower_dynamic(module, turned)
        elif isinstance(module, Int8StaticLinear):
            _lower_static(module)
        elif isinstance(module, Int8StaticConv):
            _lower_conv(module)
        elif isinstance(module, Int4Linear):
            _lower_int4(module, packed)
        elif isinstance(module, Int8Products):
            module.function = int8_attention_reference  # float32 products of the codes
    for module in modules:
        if isinstance(module, Int4Embedding):
            onnx_graph.lower_int4_embedding(module, packed.get(id(module.codes)))
        elif isinstance(module, Int8Embedding):
            tied = turned.get(id(module.codes))
            if tied is None:
                module.function = onnx_graph.int8_embedding
            else:
                module.function = lambda ids, _, scale, tied=tied: onnx_graph.int8_embedding(ids, tied, scale, axis=1)
    return model


def _lower_dynamic(layer: Int8Linear, turned: dict[int, Tensor]) -> None:
    from ..quantize.ops import row_codes, row_scales

    weight = turned.setdefault(id(layer.codes), layer.codes.t().contiguous())
    layer.register_buffer("weight_KN", weight)
    zero = onnx_graph.buffer(layer, "zero", _MIDDLE, torch.uint8)

    def function(x: Tensor, _: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        scales = row_scales(x)
        codes = (row_codes(x, scales) + _MIDDLE).to(torch.uint8)
        shape = (*x.shape[:-1], layer.out_features)
        sums = onnx_graph.node("MatMulInteger", [codes, weight, zero], shape, torch.int32)
        y = sums.float() * scales * scale
        return y if bias is None else y + bias

    layer.function = function


def _lower_static(layer: Int8StaticLinear) -> None:
    scale, zero = onnx_graph.quantizer(layer)
    weight = onnx_graph.buffer(layer, "weight_KN", layer.codes.t().contiguous())
    gain = onnx_graph.buffer(layer, "gain", layer.scale / layer.input_scale, torch.float32)

    def function(codes: Tensor, _: Tensor, start: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        x = onnx_graph.node("DequantizeLinear", [codes, scale, zero], codes.shape, torch.float32)
        w = onnx_graph.node("DequantizeLinear", [weight, gain], weight.shape, torch.float32, axis=1)
        return torch.matmul(x, w) + bias

    layer.function = function


def _lower_conv(layer: Int8StaticConv) -> None:
    scale, zero = onnx_graph.quantizer(layer)
    weight = onnx_graph.buffer(layer, "weight_NCHW", onnx_graph.weight_NCHW(layer))
    gain = onnx_graph.buffer(layer, "gain", layer.scale / layer.input_scale, torch.float32)

    def function(
        codes: Tensor, _: Tensor, start: Tensor, scales: Tensor, bias: Tensor, zero_point: int, *window: Any
    ) -> Tensor:
        codes = codes.permute(0, 3, 1, 2)  # back as it was: no transposition is left between the two
        x = onnx_graph.node("DequantizeLinear", [codes, scale, zero], codes.shape, torch.float32)
        w = onnx_graph.node("DequantizeLinear", [weight, gain], weight.shape, torch.float32, axis=0)
        return onnx_graph.convolution("Conv", x, [w, bias], torch.float32, *window).permute(0, 2, 3, 1)

    layer.function = function


def _lower_int4(layer: Int4Linear, packed: dict[int, tuple[Tensor, Tensor]]) -> None:
    codes, scales = onnx_graph.nibbles(layer, layer.out_features)
    weight, steps = onnx_graph.buffer(layer, "packed", codes), onnx_graph.buffer(layer, "scales", scales)
    packed.setdefault(id(layer.codes), (weight, steps))
    attributes = {"K": layer.in_features, "N": layer.out_features, "bits": 4, "block_size": 2 * codes.shape[2]}
    attributes["accuracy_level"] = 4 if layer.scheme == "int4-int8" else 1  # int8 or float32 activations

    def function(x: Tensor, _: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        shape, given = (*x.shape[:-1], layer.out_features), [x, weight, steps]
        return onnx_graph.node("com.microsoft::MatMulNBits", given, shape, torch.float32, **attributes) + bias

    layer.function = function


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """Writes `NAME.onnx`."""
    onnx_graph.write(capture, directory / f"{name}.onnx")
    return {"file": f"{name}.onnx", "isa": onnx_graph.static_isa(capture.module), "weights": {}}


# --- run side --------------------------------------------------------------------------------------------------------


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the program cannot run here."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'lightning-accel[onnx]'"
    return onnx_graph.overflows(entry)


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Opens a session with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors
    if not onnx_graph.vnni():
        # products of uint8 by int8 add two of them in 16 bits there, which can overflow; this makes it uint8 by uint8
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given = {name: tensor.detach().numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return onnx_graph.append(run, entry["cache"]) if entry["cache"] else run

"""OpenVINO: intermediate representation, converted from ONNX.

Weights are compressed constants, which its CPU plugin multiplies as integers. For `int8-static` the graph says how
activations are quantized; for `int8` and `int4-int8` the plugin does it as it runs, in groups of inputs that share a
scale. It takes one size of them for all layers, and leaves activations in float32 where that is more than a layer's
inputs: a layer with just so many inputs is computed to the bit as in training, a longer one with a scale for each part
of a row, which may be too far from what was trained to pass an export. Groups of 4-bit weights allow 32 at most. The
rest runs in float32: by itself it would take bfloat16 where the CPU has it, which is not what was verified.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import onnx_graph

if TYPE_CHECKING:
    from ..capture import Capture
    from ..quantize.layers import Int4Linear, Int8StaticConv, Int8StaticLinear



# --- build side ------------------------------------------------------------------------------------------------------


def lower(model: torch.nn.Module) -> torch.nn.Module:
    """Quantized layers as ONNX nodes that the CPU plugin knows, in place."""
    from ..quantize.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, Int8StaticConv, Int8StaticLinear
    from ..quantize.products import Int8Products, int8_attention_reference

    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, Int8Linear):
            module.function = _int8_linear
        elif isinstance(module, Int8Embedding):
            module.function = onnx_graph.int8_embedding
        elif isinstance(module, Int8StaticLinear):
            _lower_static(module)
        elif isinstance(module, Int8StaticConv):
            _lower_conv(module)
        elif isinstance(module, Int4Linear):
            _lower_int4(module)
        elif isinstance(module, Int8Products):
            module.function = int8_attention_reference  # float32 products of the codes
        elif isinstance(module, Int4Embedding):
            onnx_graph.lower_int4_embedding(module)
    return model


def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, onnx_graph.node("DequantizeLinear", [codes, scale], codes.shape, torch.float32, axis=0), bias)


def _lower_static(layer: Int8StaticLinear) -> None:
    dequantize, gain = _dequantizer(layer), _gain(layer)

    def function(codes: Tensor, weight: Tensor, start: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        w = onnx_graph.node("DequantizeLinear", [weight, gain], weight.shape, torch.float32, axis=0)
        return F.linear(dequantize(codes), w, bias)

    layer.function = function


def _lower_conv(layer: Int8StaticConv) -> None:
    dequantize, gain = _dequantizer(layer), _gain(layer)
    weight = onnx_graph.buffer(layer, "weight_NCHW", onnx_graph.weight_NCHW(layer))

    def function(
        codes: Tensor, _: Tensor, start: Tensor, scale: Tensor, bias: Tensor, zero_point: int, *window: Any
    ) -> Tensor:
        w = onnx_graph.node("DequantizeLinear", [weight, gain], weight.shape, torch.float32, axis=0)
        x = dequantize(codes.permute(0, 3, 1, 2))  # back as it was: no transposition is left between the two
        return onnx_graph.convolution("Conv", x, [w, bias], torch.float32, *window).permute(0, 2, 3, 1)

    layer.function = function


def _dequantizer(layer: Any) -> Callable[[Tensor], Tensor]:
    """Has a layer quantize its input by QuantizeLinear; the function from codes back to float32."""
    scale, zero = onnx_graph.quantizer(layer)
    return lambda codes: onnx_graph.node("DequantizeLinear", [codes, scale, zero], codes.shape, torch.float32)


def _gain(layer: Any) -> Tensor:
    return onnx_graph.buffer(layer, "gain", layer.scale / layer.input_scale, torch.float32)


def _lower_int4(layer: Int4Linear) -> None:
    from ..quantize.int4 import unpack

    codes, scales = unpack(layer.codes, layer.scale, layer.out_features)
    weight = onnx_graph.buffer(layer, onnx_graph.INT4, codes.flatten(1).to(torch.int8).contiguous())
    steps, group = onnx_graph.buffer(layer, "scales", scales.squeeze(-1).contiguous()), codes.shape[2]

    def function(x: Tensor, _: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        inputs = [weight, steps]
        return F.linear(
            x, onnx_graph.node("DequantizeLinear", inputs, weight.shape, torch.float32, axis=1, block_size=group), bias
        )

    layer.function = function


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """Writes `NAME.xml` and its weights, `NAME.bin`."""
    import openvino

    from ..artifact import sha256

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "program.onnx"
        onnx_graph.write(capture, path)
        openvino.save_model(openvino.convert_model(path), directory / f"{name}.xml", compress_to_fp16=False)
    group = _activation_group(capture.module)
    data = {"file": f"{name}.bin", "sha256": sha256(directory / f"{name}.bin")}
    isa = onnx_graph.static_isa(capture.module)
    return {"file": f"{name}.xml", "data": data, "isa": isa, "weights": {}, "options": {"activation_group": group}}


def _activation_group(model: torch.nn.Module) -> int:
    """How many inputs share a scale: as many as all layers allow, 0 where activations stay float32."""
    from ..quantize.layers import Int4Linear, Int8Linear

    layers = [m for m in model.modules() if isinstance(m, Int8Linear | Int4Linear) and m.scheme != "int4-weight"]
    return math.gcd(*(32 if isinstance(m, Int4Linear) else m.in_features for m in layers))


# --- run side --------------------------------------------------------------------------------------------------------


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the program cannot run here."""
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install 'lightning-accel[openvino]'"
    return onnx_graph.overflows(entry)


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Compiles the program for latency, in one stream, with as many threads as torch has."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(entry["options"]["activation_group"]),
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given = [tensor.detach().numpy() for tensor in inputs]
        found = request.infer(given, share_inputs=True, share_outputs=False)
        return [torch.from_numpy(found[i]) for i in range(len(found))]

    return onnx_graph.append(run, entry["cache"]) if entry["cache"] else run

"""OpenVINO: intermediate representation, converted from ONNX.

Weights are compressed constants, which its CPU plugin multiplies as integers. For `int8-static` the graph says how
activations are quantized; for `int8` and `int4-int8` the plugin does it as it runs, in groups of inputs that share a
scale. It takes one size of them for all layers, and leaves activations in float32 where that is more than a layer's
inputs: a layer with just so many inputs is computed to the bit as in training, a longer one with a scale for each part
of a row, which may be too far from what was trained to pass an export. Groups of 4-bit weights allow 32 at most. The
rest runs in float32: by itself it would take bfloat16 where the CPU has it, which is not what was verified.

Of a decoder the keys and values are a state of the program, in float32 too, and each cache has an infer request of its
own. The plugin then computes attention and the appending of what is new as one node.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import onnx_graph

if TYPE_CHECKING:
    from ..capture import Capture
    from ..quantize.layers import Int4Linear, Int8StaticConv, Int8StaticLinear

_OTHER_VERSION = (
    ": this version of OpenVINO converts it otherwise than the one known here; pip install 'openvino==2026.4.*'"
)


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
        onnx_graph.write(capture, path, onnx_graph.WITH_ATTENTION if capture.cache else onnx_graph.OPSET)
        model = openvino.convert_model(path)
        if capture.cache:
            _keep_state(model, capture.cache)
        openvino.save_model(model, directory / f"{name}.xml", compress_to_fp16=False)
    group = _activation_group(capture.module)
    data = {"file": f"{name}.bin", "sha256": sha256(directory / f"{name}.bin")}
    isa = onnx_graph.static_isa(capture.module)
    return {"file": f"{name}.xml", "data": data, "isa": isa, "weights": {}, "options": {"activation_group": group}}


def _keep_state(model: Any, cache: dict[str, Any]) -> None:
    """Makes keys and values of a decoder a state of its program, in place; it gets an input `rows` [B] more.

    The cache [B, capacity, heads, width] is sliced, what is new is appended, and attention reads that transposed. This
    becomes a state [B, heads, S, width], of which `rows` are taken, with what is new appended in that order: of all
    models that were tried the plugin computes this and the attention in one node.

    Raises:
        ValueError: OpenVINO made another graph of the cache.
    """
    import numpy as np
    import openvino
    from openvino import opset13 as ops
    from openvino.passes import MakeStateful, Manager

    ids, rows = model.input("input_ids").get_node(), ops.parameter([-1], np.int32, name="rows")
    rows.output(0).set_names({"rows"})
    model.add_parameters([rows])
    first, pairs = ops.constant(0, np.int32), []
    for index in range(cache.get("cross", 0), len(cache["shapes"])):
        old, new = model.input(f"cache.{index}").get_node(), model.output(f"new.{index}").get_node()
        for reader in old.output(0).get_target_inputs():
            if reader.get_node().get_type_name() == "ShapeOf":
                _check_batch(reader.get_node())
                reader.replace_source_output(ids.output(0))  # which have the same batch
        read = _reader(_reader(_reader(old, "Slice"), "Concat"), "Transpose")
        heads, width = cache["shapes"][index]
        old.set_partial_shape(openvino.PartialShape([-1, heads, -1, width]))
        added = ops.transpose(new.input_value(0), ops.constant([0, 2, 1, 3]))
        whole = ops.concat([ops.gather(old, rows, first), added], 2)
        read.output(0).replace(whole.output(0))
        new.input(0).replace_source_output(whole.output(0))
        pairs.append((old, new))
    manager = Manager()
    manager.register_pass(MakeStateful(pairs))
    manager.run_passes(model)
    batch = ops.gather(ops.shape_of(ids), ops.constant([0]), first)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            empty = ops.concat([batch, ops.constant([heads.get_length(), 0, width.get_length()])], 0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, np.float32), empty)])  # what a state begins with
    model.validate_nodes_and_infer_types()


def _check_batch(shape: Any) -> None:
    """Raises unless all that is read of the shape of a cache is its first size."""
    for target in shape.output(0).get_target_inputs():
        reader = target.get_node()
        of = reader.input_value(1).get_node() if reader.get_type_name() == "Gather" else None
        if of is None or of.get_type_name() != "Constant" or of.data.reshape(-1).tolist() != [0]:
            name = reader.get_friendly_name()
            raise ValueError(f"in the graph of the cache, {name} reads more than its batch{_OTHER_VERSION}")


def _reader(node: Any, kind: str) -> Any:
    """The one node that reads `node`, of that kind."""
    readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
    kinds = [reader.get_type_name() for reader in readers]
    if kinds != [kind]:
        name = node.get_friendly_name()
        raise ValueError(f"in the graph of the cache, {name} is read by {kinds}, not by one {kind}{_OTHER_VERSION}")
    return readers[0]


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
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(entry["options"]["activation_group"]),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    if not entry["cache"]:
        return partial(_infer, compiled.create_infer_request())
    if all(port.any_name != "rows" for port in compiled.inputs):
        raise ValueError("its cache is no state, as in earlier versions of this package")
    return State(compiled)


class State:
    """A decoder's program and the keys and values of one caller, which are in it and not among its inputs."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._rows: Tensor | None = None

    def begin(self) -> State:
        """The same program for another caller, without keys and values."""
        return State(self._compiled)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        rows = torch.arange(len(inputs[0])) if self._rows is None else self._rows
        self._rows = None
        return _infer(self._request, [*inputs, rows.to(torch.int32)])

    def reorder(self, rows: Tensor) -> None:
        """Has the next call put the keys and values of `rows` [B] in the place of the rows that were there."""
        self._rows = rows if self._rows is None else self._rows[rows]

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` slots."""
        import openvino

        for variable in self._request.query_state():
            variable.state = openvino.Tensor(variable.state.data[:, :, :count].copy())


def _infer(request: Any, inputs: list[Tensor]) -> list[Tensor]:
    found = request.infer([tensor.detach().numpy() for tensor in inputs], share_inputs=True, share_outputs=False)
    return [torch.from_numpy(found[i]) for i in range(len(found))]

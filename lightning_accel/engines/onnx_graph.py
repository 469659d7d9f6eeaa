"""ONNX graphs of captured modules: what the engines `onnx` and `openvino` have in common.

Quantized layers become ONNX nodes as torch.export sees them (`node`), each engine in the form that is fast there, and
torch's own exporter translates the rest. A decoder's program does not write to its cache: it puts out the keys and
values of the new tokens, and `append` writes them where the next call reads them, or OpenVINO makes a state of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..capture import Capture
    from ..loaded import Run
    from ..quantize.layers import Int4Embedding, Int4Linear, Int8StaticConv

OPSET = 21  # the first with 4-bit weights and blocks in DequantizeLinear
WITH_ATTENTION = 23  # the first with a node for attention
MOST_BYTES = 2**31 - 2**20  # of one protobuf file
INT4 = "int4_codes"  # the name of buffers [rows, n] of int8 that are stored in 4 bits


def static_isa(model: torch.nn.Module) -> list[str] | None:
    """What layers with static ranges ask of the CPU, for `isa` of a manifest's entry."""
    from ..quantize.layers import Int8StaticConv, Int8StaticLinear

    return ["vnni"] if any(isinstance(m, Int8StaticConv | Int8StaticLinear) for m in model.modules()) else None


def overflows(entry: dict[str, Any]) -> str | None:
    """Why this CPU cannot run a program with what `static_isa` says, or `None`."""
    short = entry["isa"] and not vnni()
    return "without VNNI its products of int8-static layers add in 16 bits, which can overflow" if short else None


def vnni() -> bool:
    """Whether the CPU adds products of bytes in 32 bits; without, the runtimes' static kernels add pairs in 16."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def node(op: str, inputs: Sequence[Tensor], shape: Sequence[Any], dtype: torch.dtype, **attributes: Any) -> Tensor:
    """A node of the ONNX graph, traced in place of what it computes; `"com.microsoft::MatMulNBits"` has a domain."""
    operators: Any = torch.onnx.ops
    version = 1 if "::" in op else OPSET
    return operators.symbolic(op, inputs, attributes, dtype=dtype, shape=tuple(shape), version=version)


def convolution(
    op: str, x: Tensor, rest: Sequence[Tensor], dtype: torch.dtype, height: int, width: int, stride: tuple[int, int],
    padding: tuple[int, int, int, int], dilation: tuple[int, int], groups: int,
) -> Tensor:  # fmt: skip
    """[B, N, OH, OW] of `x` [B, C, H, W] by a node for convolutions, which takes the weight [N, ..] first of `rest`."""
    from ..quantize.static import conv2d_shape

    sizes = (x.shape[0], *x.shape[2:])
    batch, *size, channels = conv2d_shape(sizes, len(rest[0]), height, width, *stride, *padding, *dilation)
    return node(
        op, [x, *rest], (batch, channels, *size), dtype, kernel_shape=[height, width], strides=list(stride),
        pads=list(padding), dilations=list(dilation), group=groups,
    )  # fmt: skip


def weight_NCHW(layer: Int8StaticConv) -> Tensor:
    """int8 [N, C / groups, height, width] of a convolution."""
    return layer.codes.unflatten(1, (*layer.geometry[0], -1)).permute(0, 3, 1, 2).contiguous()


def int8_embedding(ids: Tensor, codes: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """`quantize.ops.int8_embedding` as ONNX nodes; a table [width, n] with `axis=1`."""
    shape = (*ids.shape, codes.shape[1])
    if axis:
        shape = (codes.shape[0], *ids.shape)
    rows = node("Gather", [codes, ids], shape, torch.int8, axis=axis)
    rows = rows.movedim(0, -1) if axis else rows
    return rows.float() * node("Gather", [scale, ids], ids.shape, torch.float32).unsqueeze(-1)


def nibbles(layer: Int4Linear | Int4Embedding, rows: int) -> tuple[Tensor, Tensor]:
    """Codes + 8, uint8 [rows, groups, group / 2] with two inputs a byte, low half first; float32 scales [rows, groups].
    """
    from ..quantize.int4 import unpack

    codes, scales = unpack(layer.codes, layer.scale, rows)
    bits = (codes + 8).to(torch.uint8)
    return (bits[..., ::2] | bits[..., 1::2] << 4).contiguous(), scales.squeeze(-1).contiguous()


def lower_int4_embedding(layer: Int4Embedding, tied: tuple[Tensor, Tensor] | None = None) -> None:
    """Has a table gather bytes of the form of `nibbles`, a tied layer's where it has one, and take them apart."""
    if tied is None:
        packed, scales = nibbles(layer, layer.num_embeddings)
        tied = buffer(layer, "packed", packed), buffer(layer, "scales", scales)
    table, steps = tied

    def function(ids: Tensor, _: Tensor, scale: Tensor) -> Tensor:
        both = node("Gather", [table, ids], (*ids.shape, *table.shape[1:]), torch.uint8).float()
        scale = node("Gather", [steps, ids], (*ids.shape, steps.shape[1]), torch.float32)
        high = torch.floor(both / 16)
        codes = torch.stack([both - 16 * high, high], -1).flatten(-2) - 8.0
        return (codes * scale.unsqueeze(-1)).flatten(-2)

    layer.function = function


def buffer(module: torch.nn.Module, name: str, value: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """Registers a constant, which the graph then holds under its name."""
    module.register_buffer(name, torch.as_tensor(value, dtype=dtype))
    return getattr(module, name)


def quantizer(layer: Any) -> tuple[Tensor, Tensor]:
    """Has a layer with a static range quantize its input by QuantizeLinear; the scale and the zero point."""
    scale = buffer(layer, "input_step", layer.input_scale, torch.float32)
    zero = buffer(layer, "zero", layer.zero_point, torch.uint8)
    layer.quantize = lambda x: node("QuantizeLinear", [x.float(), scale, zero], x.shape, torch.uint8)
    return scale, zero


# --- writing ----------------------------------------------------------------------------------------------------------


def write(capture: Capture, path: Path, opset: int = OPSET) -> None:
    """Writes the captured module as one ONNX file that `onnx.checker` accepts.

    Args:
        opset: `WITH_ATTENTION` makes a node of each attention, with as many heads of keys as of queries.

    Raises:
        ValueError: over 2 GB, the limit of one such file.
    """
    import onnx

    if capture.cache is not None:
        module: Any = capture.module
        module.appends = True
    inputs, outputs = _names(capture)
    exported = capture.export(capture.module)
    if opset >= WITH_ATTENTION:
        _repeat_heads(exported)
    with _quiet():
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=opset, input_names=inputs, output_names=outputs, verbose=False
        )
    assert program is not None
    _rename_apart(program.model.graph)
    _without_traces(program.model)
    _in_four_bits(program.model)
    size = sum(tensor.nbytes for value in program.model.graph.initializers.values() if (tensor := value.const_value))
    if size > MOST_BYTES:
        raise ValueError(f"its weights take {size / 1e9:.1f} GB, and an ONNX file holds at most 2 GB")
    program.save(str(path))
    onnx.checker.check_model(str(path))


def _rename_apart(graph: Any) -> None:
    """Names of inputs are the model's, and the exporter may have taken one of them for a node, as `pad`."""
    taken = {value.name for value in graph.inputs} | {output.name for node in graph for output in node.outputs}
    taken |= set(graph.initializers)
    given = {value.name for value in graph.inputs}
    for output in (output for node in graph for output in node.outputs if output.name in given):
        output.name = next(name for i in count(1) if (name := f"{output.name}_{i}") not in taken)
        taken.add(output.name)


def _repeat_heads(program: torch.export.ExportedProgram) -> None:
    """Repeats heads of keys and values that several query heads share: OpenVINO wants as many of each in that node."""
    aten, graph = torch.ops.aten, program.graph
    for call in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if not call.kwargs.get("enable_gqa"):
            continue
        times = call.args[0].meta["val"].shape[1] // call.args[1].meta["val"].shape[1]
        repeat = (
            (aten.unsqueeze.default, 2),
            (aten.expand.default, [-1, -1, times, -1, -1]),
            (aten.flatten.using_ints, 1, 2),
        )
        for index in (1, 2):
            states = call.args[index]
            for target, *arguments in repeat:
                value = states.meta["val"]
                with graph.inserting_before(call), value.fake_mode:
                    states = graph.call_function(target, (states, *arguments))
                    states.meta["val"] = target(value, *arguments)
            call.update_arg(index, states)
        call.kwargs = {**call.kwargs, "enable_gqa": False}
    program.graph_module.recompile()


def _names(capture: Capture) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs."""
    if capture.cache is None:
        flat = _output_names(capture.outputs, "")
        return [spec["name"] for spec in capture.inputs], [flat[i] for i in sorted(flat)]
    number, cross = len(capture.cache["shapes"]), capture.cache.get("cross", 0)
    given = ["input_ids", "mask", "source_mask", "wanted"] if cross else ["input_ids", "position_ids", "mask", "wanted"]
    return [*given, *(f"cache.{i}" for i in range(number))], ["logits", *(f"new.{i}" for i in range(cross, number))]


def _output_names(spec: dict[str, Any], at: str) -> dict[int, str]:
    """Name of each flat output, from the structure that the model has."""
    if spec["type"] == "tensor":
        return {spec["index"]: at or "output"}
    items = spec.get("items", {})
    named = items.items() if isinstance(items, dict) else ((f"output_{i}", item) for i, item in enumerate(items))
    return {i: name for key, item in named for i, name in _output_names(item, f"{at}.{key}" if at else key).items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch's exporter says of packages that nobody needs here off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch about torch
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            yield
        finally:
            logger.setLevel(level)


def _without_traces(model: Any) -> None:
    """Drops stack traces: they are the paths of whoever exported the model."""
    for part in (model.graph, *model.functions.values()):
        for item in (*part, *part.inputs, *(out for n in part for out in n.outputs)):
            item.metadata_props.clear()
        part.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _in_four_bits(model: Any) -> None:
    """Stores the buffers that are named so as INT4."""
    import numpy as np
    import onnx_ir

    for name, value in model.graph.initializers.items():
        if name.rpartition(".")[2].startswith(INT4):
            codes = value.const_value.numpy().astype(np.int8)
            low, high = codes.flatten()[::2] & 15, codes.flatten()[1::2] & 15
            packed = (low | high << 4).astype(np.uint8)
            value.const_value = onnx_ir.PackedTensor(packed, onnx_ir.DataType.INT4, shape=value.shape, name=name)
            value.dtype = onnx_ir.DataType.INT4


# --- running ----------------------------------------------------------------------------------------------------------


def append(run: Run, cache: dict[str, Any]) -> Run:
    """`run` of a decoder that puts out new keys and values, as one that writes them into the cache it was given."""
    cross, mask = cache.get("cross", 0), 1 if cache.get("cross") else 2
    count = len(cache["shapes"]) - cross

    def write_through(inputs: list[Tensor]) -> list[Tensor]:
        logits, *made = run(inputs)
        filled, new = inputs[mask].shape[1], inputs[0].shape[1]
        for kept, tensor in zip(inputs[len(inputs) - count :], made, strict=True):
            kept[:, filled - new : filled] = tensor
        return [logits]

    return write_through

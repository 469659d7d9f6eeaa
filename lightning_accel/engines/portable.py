"""The portable program: torch.export, aten operators only, the weights as inputs so that the folder holds them once.

It runs wherever this torch runs, without a compiler, slower than a compiled program.
"""

from __future__ import annotations

import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..artifact import ArtifactError

if TYPE_CHECKING:
    from ..capture import Capture


def lower(model: torch.nn.Module) -> torch.nn.Module:
    """Quantized layers as aten operators, in place."""
    from ..quantize.int4 import int4_int8_linear_reference, int4_linear_reference
    from ..quantize.layers import Int4Linear, Int8Embedding, Int8Linear
    from ..quantize.ops import int8_embedding_reference, int8_linear_reference
    from ..quantize.products import Int8Products, int8_attention_reference

    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.function = int8_linear_reference
        elif isinstance(module, Int8Embedding):
            module.function = int8_embedding_reference
        elif isinstance(module, Int8Products):
            module.function = int8_attention_reference
        elif isinstance(module, Int4Linear):
            module.function = int4_linear_reference if module.scheme == "int4-weight" else int4_int8_linear_reference
    return model


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """Exports the captured module with its weights as leading inputs and writes `NAME.portable.pt2`."""
    weights = capture.weights()
    program = capture.export(_FromWeights(capture.module, list(weights)), lead=(list(weights.values()),))
    program.example_inputs = None  # would be pickled
    _drop_idle_nodes(program)
    for node in program.graph.nodes:  # half of the file, and the paths of whoever exported it
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    file = f"{name}.portable.pt2"
    archive = io.BytesIO()
    torch.export.save(program, archive, pickle_protocol=2)
    _write_compressed(archive, directory / file)
    check_archive(directory / file)
    return {"file": file, "isa": None, "weights": {str(i): weight for i, weight in enumerate(weights)}}


def _drop_idle_nodes(program: torch.export.ExportedProgram) -> None:
    """Takes out what computes nothing: two nodes of five, and each costs milliseconds when the program is loaded."""
    aten = torch.ops.aten
    output = program.graph.output_node()
    for node in list(program.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
            continue
        same = node.target in (aten.detach.default, aten.alias.default)
        if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
            same = node.args[0].meta["val"].dtype == node.args[1]
        if same and output not in node.users:  # the signature names the outputs
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _write_compressed(archive: io.BytesIO, path: Path) -> None:
    """Writes torch's archive with deflated members: the graph is JSON, and a twentieth of its size remains."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))


class _FromWeights(torch.nn.Module):
    """A module called with its weights: `(weights, *inputs)`."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that its weights are not this module's
        self._names = names
        # where each lies: a tied weight in several modules, that of a module with several names in one place only, or
        # functional_call would put back the tensor that it replaced it by
        first = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        self._places = {
            f"{path}.{own}".lstrip("."): first[id(tensor)]
            for path, part in module.named_modules()
            for own, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None
        }

    def forward(self, weights: list[Tensor], *inputs: Any) -> Any:
        given = dict(zip(self._names, weights, strict=True))
        tensors = {place: given[name] for place, name in self._places.items()}
        return torch.func.functional_call(self._module[0], tensors, inputs, tie_weights=False)


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the program cannot run here."""
    written, here = _release(entry["torch"]), _release(torch.__version__)
    return f"it was written by torch {entry['torch']}, later than this {torch.__version__}" if written > here else None


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads the program; its weights stay mapped from the folder's one file."""
    check_archive(path)
    from .._int_mm import SATURATES, mend_

    with _LOADING:
        exported = torch.export.load(path)
        program: Any = exported.module()
    if SATURATES:
        mend_(program.graph)
        program.recompile()
    tensors = [weights[entry["weights"][str(i)]] for i in range(len(entry["weights"]))]
    layouts, inputs = entry.get("layouts", {}), exported.graph.find_nodes(op="placeholder")
    for i, shape in ((int(i), shape) for i, shape in layouts.items()):
        idle = not inputs[i].users  # such as the decoder's weights in an encoder
        tensors[i] = tensors[i].new_empty(1).expand(shape) if idle else _untile(tensors[i], shape)
    caches = len(entry["cache"]["shapes"]) if entry.get("cache") else 0

    def run(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            if caches:
                return program(tensors, *inputs[:-caches], inputs[-caches:])
            return program(tensors, *inputs)

    return run


_LOADING = threading.Lock()  # torch.export.load keeps state for the process


def _begin_fork() -> None:
    global _LOADING
    _LOADING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_fork)


def _untile(tiles: Tensor, shape: list[int]) -> Tensor:
    """[rows, n] from the tiles of the compiled program: int8 of `quantize.ops.tile`, floats of `linear.tile`."""
    rows, n = shape
    if tiles.is_floating_point():
        plain = tiles.flatten(0, -3).transpose(1, 2).flatten(0, 1)
        return (plain[:n].T if tiles.dim() == 4 else plain[:rows]).contiguous()
    return tiles.permute(0, 2, 1, 3).reshape(tiles.shape[0] * tiles.shape[2], -1)[:rows, :n].contiguous()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


_RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)|data/sample_inputs/model\.pt"
)


_INFLATED = 256 * 2**20, 4  # bytes, and times the archive's own: a graph of hundreds of layers takes tens of millions


def check_archive(path: Path) -> None:
    """Refuses an archive from which torch would unpickle anything: only the records that `build` writes may be in it.

    Raises:
        ArtifactError: not an archive, other records than those, or one that would fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(item.file_size for item in archive.infolist())
            if inflated > max(_INFLATED[0], _INFLATED[1] * path.stat().st_size):
                raise ValueError(f"{inflated:,} bytes in {path.stat().st_size:,}")
            for item in archive.infolist():
                _check_record(archive, item)
            if len(set(archive.namelist())) != len(archive.namelist()):
                raise ValueError("a record twice")
    except (ValueError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"{path} is not a program that this package wrote ({error}); do not load it, export the model again"
        ) from error


def _check_record(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> None:
    name = item.filename.partition("/")[2]
    if not _RECORD.fullmatch(name):
        raise ValueError(f"the unknown record {name!r}")
    if name.startswith("data/sample_inputs") and item.file_size:
        raise ValueError("sample inputs, which are pickled and can run any code")
    if name.endswith("_config.json"):
        for tensor in json.loads(archive.read(item))["config"].values():
            if tensor["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", tensor["path_name"]):
                raise ValueError("pickled data, which can run any code")

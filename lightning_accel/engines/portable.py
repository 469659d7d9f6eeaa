"""The portable program: torch.export, aten operators only, the weights as inputs so that the folder holds them once.

It runs wherever this torch runs, without a compiler, slower than a compiled program.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..capture import Capture


def lower(model: torch.nn.Module) -> torch.nn.Module:
    """Quantized layers as aten operators, in place."""
    from ..quantize.converted import Int8Embedding, Int8Linear
    from ..quantize.ops import int8_embedding_reference, int8_linear_reference

    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.function = int8_linear_reference
        elif isinstance(module, Int8Embedding):
            module.function = int8_embedding_reference
    return model


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """Exports the captured module with its weights as leading inputs and writes `NAME.portable.pt2`."""
    weights = capture.weights()
    program = capture.export(_FromWeights(capture.module, list(weights)), lead=(list(weights.values()),))
    program.example_inputs = None  # would be pickled
    for node in program.graph.nodes:  # half of the file, and the paths of whoever exported it
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    file = f"{name}.portable.pt2"
    torch.export.save(program, directory / file, pickle_protocol=2)
    _refuse_pickle(directory / file)
    return {"file": file, "isa": None, "weights": {str(i): weight for i, weight in enumerate(weights)}}


class _FromWeights(torch.nn.Module):
    """A module called with its weights: `(weights, *inputs)`."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that its weights are not this module's
        self._names = names

    def forward(self, weights: list[Tensor], *inputs: Any) -> Any:
        tensors = dict(zip(self._names, weights, strict=True))
        return torch.func.functional_call(self._module[0], tensors, inputs, tie_weights=True)


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the program cannot run here."""
    written, here = _release(entry["torch"]), _release(torch.__version__)
    return f"it was written by torch {entry['torch']}, later than this {torch.__version__}" if written > here else None


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads the program; its weights stay mapped from the folder's one file."""
    _refuse_pickle(path)
    program = torch.export.load(path).module()
    tensors = [weights[entry["weights"][str(i)]] for i in range(len(entry["weights"]))]
    layouts = entry.get("layouts", {})
    tensors = [_untile(t, layouts[str(i)]) if str(i) in layouts else t for i, t in enumerate(tensors)]
    caches = len(entry["cache"]["shapes"]) if entry.get("cache") else 0

    def run(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            if caches:
                return program(tensors, *inputs[:-caches], inputs[-caches:])
            return program(tensors, *inputs)

    return run


def _untile(tiles: Tensor, shape: list[int]) -> Tensor:
    """int8 [rows, n] from the tiles that the compiled program reads (`quantize.ops.tile`)."""
    rows, n = shape
    return tiles.permute(0, 2, 1, 3).reshape(tiles.shape[0] * tiles.shape[2], -1)[:rows, :n].contiguous()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _refuse_pickle(path: Path) -> None:
    """Raises ValueError if the archive would have anything unpickled."""
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            name = item.filename
            pickled = name.endswith("_config.json") and b'"use_pickle": true' in archive.read(name)
            if pickled or ("sample_inputs" in name and item.file_size):
                raise ValueError(f"{path} holds pickled data ({name}), which can run any code; do not load it")

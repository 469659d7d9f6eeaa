"""Calls of a loaded model: inputs by name, checked; outputs as the model had them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

MASK = "attention_mask"


class Output(dict):
    """Named outputs, as a dict whose keys are attributes too; integers and slices index the values in order."""

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; this model has {', '.join(self)}") from None


def bind(specs: list[dict[str, Any]], args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Flat, contiguous, checked copies of the inputs in the program's order."""
    optional = [spec["name"] for spec in specs if "fill" in spec]
    given = by_name([spec["name"] for spec in specs], args, kwargs, optional)
    for spec in (spec for spec in specs if given.get(spec["name"]) is None):
        ids = given["input_ids"]
        if not isinstance(ids, Tensor):
            raise ValueError(f"input 'input_ids' is a {type(ids).__name__}; write torch.tensor(...)")
        given[spec["name"]] = torch.full_like(ids, spec["fill"], dtype=getattr(torch, spec["dtype"]))
    sizes: dict[str, int] = {}
    return [check_input(spec, given[spec["name"]], sizes) for spec in specs]


def by_name(
    names: Sequence[str], args: tuple, kwargs: Mapping[str, Any], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Inputs by name, of which the `optional` ones may be left out.

    A mask of ones is dropped where a model of `input_ids` takes none: it computes the same without it.

    Raises:
        ValueError: too many, unknown, given twice or missing.
    """
    if len(args) > len(names):
        raise ValueError(f"{len(args)} inputs given, the model takes {len(names)}: {', '.join(names)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name == MASK and MASK not in names and "input_ids" in names:
            ids = {**given, **kwargs}.get("input_ids")
            if value is None or ids is None or _is_ones(value, ids):
                continue
            raise ValueError(
                "the model was exported without attention_mask, so a mask can only be a tensor of ones like input_ids, "
                "as padding would be read as text; export it with "
                "example_inputs={'input_ids': ids, 'attention_mask': mask}"
            )
        if name not in names or name in given:
            raise ValueError(
                f"input {name!r} is {'given twice' if name in given else 'unknown'}; the model takes {', '.join(names)}"
            )
        given[name] = value
    missing = [name for name in names if given.get(name) is None and name not in optional]
    if missing:
        raise ValueError(f"input {missing[0]!r} is missing; the model takes {', '.join(names)}")
    return given


def _is_ones(mask: Any, ids: Any) -> bool:
    """Whether a mask [batch, length] covers ids without padding."""
    tensors = isinstance(mask, Tensor) and isinstance(ids, Tensor)
    return tensors and mask.device.type == "cpu" and mask.shape == ids.shape and bool((mask == 1).all())


def check_input(spec: dict[str, Any], value: Any, sizes: dict[str, int]) -> Tensor:
    """A contiguous copy of the input, after checking dtype, device and shape; `sizes` collects the named dimensions.

    A copy, because programs write to their inputs: a model that begins with an in-place activation, and compiled
    residuals.
    """
    name = spec["name"]
    if not isinstance(value, Tensor):
        raise ValueError(f"input {name!r} is a {type(value).__name__}; write torch.tensor(...)")
    dtype = getattr(torch, spec["dtype"])
    if value.dtype != dtype:
        raise ValueError(f"input {name!r} has dtype {value.dtype}, expected {dtype}; write {name}.to({dtype})")
    if value.device.type != "cpu":
        raise ValueError(f"input {name!r} is on {value.device}, the program runs on the CPU; write {name}.cpu()")
    shape = spec["shape"]
    expected = "[" + ", ".join(str(d) if isinstance(d, int) else d["name"] for d in shape) + "]"
    if value.dim() != len(shape):
        raise ValueError(f"input {name!r} has shape {list(value.shape)}, expected {expected}")
    for size, dim in zip(value.shape, shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise ValueError(f"input {name!r} has shape {list(value.shape)}, expected {expected}")
            continue
        if not dim["min"] <= size <= dim["max"]:
            raise ValueError(f"input {name!r} has {dim['name']} {size}, allowed is {dim['min']} to {dim['max']}")
        if sizes.setdefault(dim["name"], size) != size:
            raise ValueError(f"input {name!r} has {dim['name']} {size}, another input has {sizes[dim['name']]}")
    if "below" in spec and value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= spec["below"]:
            wrong = low if low < 0 else high
            raise ValueError(f"input {name!r} holds {wrong}, allowed is 0 to {spec['below'] - 1}: rows of an embedding")
    return value.detach().clone(memory_format=torch.contiguous_format)


def structure(spec: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Flat outputs in the structure that the manifest describes."""
    kind = spec["type"]
    if kind == "tensor":
        return tensors[spec["index"]]
    if kind == "dict":
        return Output({name: structure(item, tensors) for name, item in spec["items"].items()})
    if kind == "none":
        return None
    items = [structure(item, tensors) for item in spec["items"]]
    if "names" in spec:
        return _named(tuple(spec["names"]), items)
    return tuple(items) if kind == "tuple" else items


@cache
def _named_class(names: tuple[str, ...]) -> Any:
    """The class of an output's named tuple, whose instances pickle as a call of `_named`."""
    base: Any = namedtuple("NamedOutput", list(names))  # type: ignore[misc]
    return type("NamedOutput", (base,), {"__slots__": (), "__reduce__": lambda self: (_named, (names, list(self)))})


def _named(names: tuple[str, ...], items: list[Any]) -> tuple:
    return _named_class(names)(*items)

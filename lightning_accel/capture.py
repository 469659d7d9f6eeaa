"""From a module to something an engine can build: flat inputs and outputs, and sizes that are free.

Causal language models get a KV cache that the caller owns: `capture_causal.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from ._warn import warn
from .inputs import ExampleInputs, copy_inputs, explain_export, split_inputs, without_labels

MAX_BATCH = 1024
_LONG = 2048  # up to this size a table's end is tried out
_HINT = (
    "Data-dependent branches and Python numbers computed from tensors cannot be exported; rewrite the line with tensor "
    "operations such as torch.where, or give dynamic_shapes="
)
CAUSAL_HINT = (
    "A causal language model must take its attention from transformers' AttentionInterface, as Llama and GPT-2 do"
)


@dataclass
class Capture:
    """What an engine builds from.

    Attributes:
        module: takes flat inputs (for a causal LM the cache is one list at the end), gives a list of tensors.
        example: example inputs of `module`.
        dynamic_shapes: as torch.export takes them, one entry an input.
        inputs, outputs, cache: as the manifest holds them.
        extra: further constants that an export lifted out of the code.
        model: what was captured, as it was given.
        constants: its inputs in a call that are no tensors.
        assets: files that travel with the model, by name.
    """

    module: nn.Module
    example: tuple
    dynamic_shapes: tuple
    inputs: list[dict[str, Any]]
    outputs: dict[str, Any]
    cache: dict[str, Any] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module = field(default_factory=nn.Identity)
    constants: dict[str, Any] = field(default_factory=dict)
    assets: Mapping[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """Parameters, buffers and lifted constants, each distinct tensor once, detached."""
        return {**{name: t.detach() for name, t in self._named() if name not in self.aliases()}, **self.extra}

    def aliases(self) -> dict[str, str]:
        """Second names of tensors that several modules share -> their first name."""
        first: dict[int, str] = {}
        named = list(self._named())
        for name, tensor in named:
            first.setdefault(id(tensor), name)
        return {name: first[id(tensor)] for name, tensor in named if first[id(tensor)] != name}

    def _named(self) -> list[tuple[str, Tensor]]:
        module = self.module
        return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]

    def export(self, module: nn.Module, lead: tuple = ()) -> torch.export.ExportedProgram:
        """torch.export of `module`, which takes `lead` before this capture's inputs.

        Raises:
            ValueError: torch.export refuses the model; the message holds the line of the user's code.
        """
        fixed = tuple([None] * len(item) if isinstance(item, list) else None for item in lead)
        shapes = (*fixed, *self.dynamic_shapes)
        if _varargs(module):
            shapes = (*fixed, tuple(self.dynamic_shapes)) if len(fixed) else (tuple(self.dynamic_shapes),)
        try:
            with torch.no_grad():
                program = torch.export.export(module, (*lead, *self.example), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ValueError(
                f"torch.export cannot capture the model: {explain_export(error)}\n"
                + (_HINT if self.cache is None else f"{_HINT}. {CAUSAL_HINT}")
            ) from error
        for spec in program.graph_signature.input_specs:  # buffers keep their names in AOTInductor, constants do not
            if spec.kind is InputKind.CONSTANT_TENSOR:
                spec.kind, spec.persistent = InputKind.BUFFER, False
        return program


def _varargs(module: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def is_causal_lm(model: nn.Module) -> bool:
    """Whether `model` is a decoder-only language model from transformers, to be captured with a KV cache."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.get_output_embeddings() is not None
    )


def is_seq2seq(model: nn.Module) -> bool:
    """Whether `model` is an encoder-decoder language model from transformers, to be captured as two programs."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and model.can_generate()
        and model.config.is_encoder_decoder
        and model.get_output_embeddings() is not None
    )


def capture(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any = None) -> dict[str, Capture]:
    """Captures `model`, in eval mode, from example inputs: the programs that it needs, by role.

    Without `dynamic_shapes`, the first dimension of each input is the batch and free, and the second of each integer
    or boolean input is a length and free, as is that of a CTC model's samples where torch.export allows it. Language
    models have free batch, length and cache capacity.

    Returns:
        `"decoder"` of a causal language model, `"encoder"` and `"decoder"` of an encoder-decoder one, else `"forward"`.

    Raises:
        ValueError: the model rejects the example inputs.
    """
    model = model.eval()
    if is_causal_lm(model):
        from .capture_causal import capture_causal_lm

        captures = {"decoder": capture_causal_lm(model)}
    elif is_seq2seq(model):
        from .capture_seq2seq import capture_seq2seq

        captures = capture_seq2seq(model, example_inputs, dynamic_shapes)
    else:
        captures = {"forward": capture_module(model, example_inputs, dynamic_shapes)}
    for captured in captures.values():
        captured.model = model
        _fill_mask(captured)
    return captures


def _fill_mask(captured: Capture) -> None:
    """Has a call fill in a mask that it leaves out: in all models of transformers ones say that nothing is padding."""
    from transformers import PreTrainedModel

    specs = {spec["name"]: spec for spec in captured.inputs}
    ids, mask = specs.get("input_ids"), specs.get("attention_mask")
    if ids and mask and mask["shape"] == ids["shape"] and isinstance(captured.model, PreTrainedModel):
        mask["fill"] = 1


def call_example(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """The model's output for its example inputs.

    Raises:
        ValueError: the model rejects them.
    """
    args, kwargs = copy_inputs(example_inputs)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        shapes = [list(x.shape) if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
        raise ValueError(
            f"{type(model).__name__} rejects the example inputs {shapes}: {type(error).__name__}: {error}; "
            "give example_inputs=(x,) or example_inputs={'name': x} as the model is called"
        ) from error


# --- any module -------------------------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """A module called with a flat list of tensors; other inputs are as in the example."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._args, self._kwargs = args, kwargs

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        queue = iter(tensors)
        args = [next(queue) if isinstance(a, Tensor) else a for a in self._args]
        kwargs = {k: next(queue) if isinstance(v, Tensor) else v for k, v in self._kwargs.items()}
        return flatten_output(self.model(*args, **kwargs))[0]


def flatten_output(output: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors of an output, and its structure as plain types; a dataclass is a mapping from its fields.

    Raises:
        ValueError: something in it is neither a tensor nor a tuple, list, mapping, dataclass or None (a transformers
            cache is left out).
    """
    tensors: list[Tensor] = []

    def walk(value: Any) -> dict[str, Any]:
        if value is None:
            return {"type": "none"}
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"type": "tensor", "index": len(tensors) - 1}
        if is_dataclass(value) and not isinstance(value, Mapping | type):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, Mapping):
            items = {str(k): walk(v) for k, v in value.items() if v is not None and k != "past_key_values"}
            return {"type": "dict", "items": items}
        if isinstance(value, list | tuple):
            of_fields = list(getattr(type(value), "__match_args__", ()))  # a NamedTuple, or of torch.return_types
            names = {"names": of_fields} if of_fields else {}
            return {"type": "list" if isinstance(value, list) else "tuple", "items": [walk(v) for v in value], **names}
        raise ValueError(
            f"the model puts out a {type(value).__name__}; export tensors, tuples, lists, dicts or dataclasses of them"
        )

    return tensors, walk(output)


def capture_module(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any) -> Capture:
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    args, kwargs = split_inputs(example_inputs)
    outputs, structure = flatten_output(call_example(model, example_inputs))
    names = input_names(model, args, kwargs)
    for name, value in zip(names, (*args, *kwargs.values()), strict=True):
        if not isinstance(value, Tensor) and _holds_tensors(value):
            raise ValueError(
                f"the input {name!r} is a {type(value).__name__} with tensors in it, which would stay as they are in "
                "the example; export a module around the model whose forward takes each tensor by itself"
            )
    # copies: of a view, torch.export takes the size of what is viewed for a limit
    values = zip(names, (*args, *kwargs.values()), strict=True)
    tensors = {n: v.detach().clone(memory_format=torch.contiguous_format) for n, v in values if isinstance(v, Tensor)}
    if not tensors or not outputs:
        raise ValueError(f"none of the {'outputs' if tensors else 'example inputs'} is a tensor, so nothing can be run")

    def captured(tensors: dict[str, Tensor], shapes: tuple) -> Capture:
        positional = tuple(tensors.get(n, v) for n, v in zip(names, args, strict=False))
        flat = _Flat(model, positional, {k: tensors.get(k, v) for k, v in kwargs.items()})
        fixed = {n: v for n, v in zip(names, (*args, *kwargs.values()), strict=True) if n not in tensors}
        return Capture(flat, tuple(tensors.values()), shapes, [], structure, constants=fixed)

    if dynamic_shapes is not None:
        given = dynamic_shapes
        if not isinstance(given, Mapping):
            given = dict(zip(names, given, strict=False))
        result = captured(tensors, tuple(given.get(name) for name in tensors))
        shapes = _ranges(result, alike=False)
    else:
        several = _two_rows(tensors)
        several = several if _accepts(captured(several, ()).module, several.values()) else tensors
        heard = "input_values" if type(model).__name__.endswith("ForCTC") else None
        try:
            result = captured(several, tuple(_default_dims(t, n == heard) for n, t in several.items()))
            shapes = _ranges(result, alike=True)
        except ValueError as error:
            if heard is None:
                raise
            warn(
                f"{type(model).__name__} cannot be captured at a free length, so that it hears recordings in pieces of "
                f"the example's, the last filled up with silence ({error})"
            )
            result = captured(several, tuple(_default_dims(t) for t in several.values()))
            shapes = _ranges(result, alike=True)
    _probe(result.module, tensors, shapes)
    limits = _embedded(result.module, tensors)
    _limit_positions(result.module, tensors, shapes, limits)
    result.inputs = [
        {"name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": shape} | limits.get(n, {})
        for (n, t), shape in zip(tensors.items(), shapes, strict=True)
    ]
    return result


def _embedded(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """`{"below": rows}` of each input that an embedding takes as it is: an index past it kills a compiled program."""
    limits: dict[str, dict[str, int]] = {}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    names = {copy.data_ptr(): name for name, copy in copies.items() if not copy.is_floating_point()}
    calls: list[tuple[str, Any, tuple]] = []

    def note(embedding: Any, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and (name := names.get(args[0].data_ptr())) is not None:
            calls.append((name, embedding, args))

    hooks = [table.register_forward_pre_hook(note) for table in _tables(module)]
    try:
        with torch.no_grad():
            module(*copies.values())
            seen = [c for c in calls if _reads(*c[1:])]
    finally:
        for hook in hooks:
            hook.remove()
    for name, table, _ in seen:
        rows = int(table.num_embeddings)
        limits[name] = {"below": min(rows, limits.get(name, {"below": rows})["below"])}
    return limits


def _reads(table: Any, args: tuple) -> bool:
    """Whether a table looks up the ids that it is called with: one of positions takes their shape only."""
    first, second = (table(torch.full_like(args[0], row), *args[1:]) for row in (0, table.num_embeddings - 1))
    return not torch.equal(first, second)


def _holds_tensors(value: Any) -> bool:
    leaves = [vars(leaf) if is_dataclass(leaf) else leaf for leaf in tree_leaves(value)]
    return any(isinstance(leaf, Tensor) or (isinstance(leaf, dict) and _holds_tensors(leaf)) for leaf in leaves)


def _limit_positions(
    module: nn.Module, tensors: Mapping[str, Tensor], shapes: list[list[Any]], limits: Mapping[str, Mapping[str, int]]
) -> None:
    """Lowers the largest size of a dimension that ends with the table of positions that the model counts itself.

    RoBERTa counts the ids that are no padding; torch.export sees no bound there. Some id is none, if not the first then
    the last. A table whose row grows with the size, but not past its end (T5's distances), is no bound.
    """
    if not _tables(module):
        return
    filled = [{n: torch.full_like(tensors[n], row(limits[n]["below"])) for n in limits}
              for row in (lambda rows: 0, lambda rows: rows - 1)]  # fmt: skip
    for label in {id(d): d for shape in shapes for d in shape[1:] if isinstance(d, dict)}.values():
        sized = zip(tensors.values(), shapes, strict=True)
        size = next(tensor.shape[shape.index(label)] for tensor, shape in sized if label in shape)
        for fill in filled if size > 1 else ():
            inputs = {**tensors, **fill}
            before, after = (_last_rows(module, _resized(inputs, shapes, label, n)) for n in (size - 1, size))
            for table in after.keys() & before.keys():
                most = size + table.num_embeddings - 1 - after[table]
                if after[table] > before[table] and most < label["max"]:
                    tried = most <= _LONG and _accepts(module, _resized(inputs, shapes, label, most + 1))
                    label["max"] = label["max"] if tried else most


def _resized(tensors: Mapping[str, Tensor], shapes: list[list[Any]], label: Any, size: int) -> list[Tensor]:
    """Inputs of one row, where they may have one, with the free dimension `label` cut or repeated to `size`."""
    found = []
    for tensor, shape in zip(tensors.values(), shapes, strict=True):
        if shape and isinstance(shape[0], dict) and shape[0]["min"] == 1:
            tensor = tensor[:1]
        for position in (i for i, own in enumerate(shape) if own is label):
            tensor = tensor.index_select(position, torch.arange(size) % tensor.shape[position])
        found.append(tensor)
    return found


def _last_rows(module: nn.Module, tensors: Iterable[Tensor]) -> dict[Any, int]:
    """The largest index that each table was called with."""
    found: dict[Any, int] = {}

    def note(table: Any, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() and not args[0].is_floating_point():
            found[table] = max(int(args[0].max()), found.get(table, 0))

    hooks = [table.register_forward_pre_hook(note) for table in _tables(module)]
    try:
        _accepts(module, tensors)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tables(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(getattr(m, "num_embeddings", None), int)]


def _two_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of one row twice: torch.export takes a size of 1 for a constant."""
    batched = {name: tensor for name, tensor in tensors.items() if tensor.dim()}
    if any(tensor.shape[0] != 1 for tensor in batched.values()):
        return tensors
    return {**tensors, **{name: torch.cat([tensor, tensor]) for name, tensor in batched.items()}}


def _default_dims(tensor: Tensor, heard: bool = False) -> dict[int, Any] | None:
    """The dimensions that are free by default: the batch, and the length of ids and of samples that are `heard`."""
    dims = {}
    if tensor.dim() >= 1:
        dims[0] = Dim.AUTO
    if tensor.dim() >= 2 and (heard or not tensor.is_floating_point()) and tensor.shape[1] > 1:
        dims[1] = Dim.AUTO
    return dims or None


def input_names(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    """The names under which the program takes positional and keyword inputs."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    names += [f"input_{i}" for i in range(len(names), len(args))]
    return [*names, *kwargs]


def as_inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> ExampleInputs:
    """A call as example inputs: a tuple where it has one positional input, else by name; labels and None left out."""
    kwargs = {name: value for name, value in without_labels(kwargs).items() if value is not None}
    names = [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind is not p.VAR_POSITIONAL]
    if not kwargs and (len(args) == 1 or len(args) > len(names)):
        return args
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _ranges(result: Capture, alike: bool) -> list[list[Any]]:
    """The shape of each input as numbers and named ranges, from what torch.export found to be free.

    Args:
        alike: inputs whose batch (or length) is the same in the example have the same in every call; torch.export
            does not see it where one of them could be broadcast, and a compiled program would read past its end.
    """
    program = result.export(result.module)
    user = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    labels: dict[Any, dict[str, Any]] = {}  # of symbols, and of (position, size in the example)
    shapes: list[list[Any]] = []
    for node, example in zip(user, result.example, strict=True):
        shape: list[Any] = []
        for position, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int) or size.node.expr.is_number:
                shape.append(int(size))
                continue
            symbol, known = str(size.node.expr), (position, example.shape[position] if alike and position < 2 else node)
            label = labels.get(symbol) or labels.get(known) or _label(position, [d["name"] for d in labels.values()])
            labels[symbol] = labels[known] = label
            bounds = program.range_constraints.get(size.node.expr)
            if bounds is not None and str(bounds.upper).isdigit():
                label["max"] = min(label["max"], int(bounds.upper))
            if bounds is not None and int(bounds.lower) > 2:  # 2 is torch.export's own, and 1 works as well
                label["min"] = max(label["min"], int(bounds.lower))
            shape.append(label)
        shapes.append(shape)
    return shapes


def _label(position: int, taken: Sequence[str]) -> dict[str, Any]:
    name = ("batch", "length")[position] if position < 2 else f"dim{position}"
    free = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 100))) if n not in taken)
    return {"name": free, "min": 1, "max": MAX_BATCH if position == 0 else 2**20}


def _probe(module: nn.Module, tensors: dict[str, Tensor], shapes: list[list[Any]]) -> None:
    """Raises the least size of a free dimension to 2 where the model refuses 1: a compiled program would not."""
    for label in {id(d): d for shape in shapes for d in shape if isinstance(d, dict) and d["min"] == 1}.values():
        one = [
            tensor[tuple(slice(1) if size is label else slice(None) for size in shape)]
            for tensor, shape in zip(tensors.values(), shapes, strict=True)
        ]
        if not _accepts(module, one):
            label["min"] = 2


def _accepts(module: nn.Module, tensors: Iterable[Tensor]) -> bool:
    try:
        with torch.no_grad():
            module(*(tensor.clone() for tensor in tensors))
    except Exception:
        return False
    return True

"""From a module to something an engine can build: flat inputs and outputs, dynamic sizes, and for causal language
models a KV cache that the caller owns.

A causal language model is captured as one program for prefill, decoding and evaluation. Its cache is a list of
explicit inputs, [batch, capacity, heads, head_dim] each, written in place; the number of filled slots is carried by
the shape of the mask, so that attention reads the filled slots only; logits are computed at the wanted indices only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from .distill import without_labels
from .prune.groups import ExampleInputs, copy_inputs, split_inputs

MAX_BATCH = 1024


@dataclass
class Capture:
    """What an engine builds from.

    Attributes:
        module: takes flat inputs (for a causal LM the cache is one list at the end), gives a list of tensors.
        example: example inputs of `module`.
        dynamic_shapes: as torch.export takes them, one entry an input.
        inputs, outputs, cache: as the manifest holds them.
        extra: further constants that an export lifted out of the code.
    """

    module: nn.Module
    example: tuple
    dynamic_shapes: tuple
    inputs: list[dict[str, Any]]
    outputs: dict[str, Any]
    cache: dict[str, Any] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

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
                return torch.export.export(module, (*lead, *self.example), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ValueError(
                f"torch.export cannot capture the model: {type(error).__name__}: {_first_lines(error)}\n"
                "Data-dependent branches and Python numbers computed from tensors cannot be exported; rewrite the "
                "line with tensor operations such as torch.where, or give dynamic_shapes="
            ) from error


def _varargs(module: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _first_lines(error: Exception, lines: int = 24) -> str:
    return "\n".join(str(error).strip().splitlines()[:lines])


def is_causal_lm(model: nn.Module) -> bool:
    """Whether `model` is a decoder-only language model from transformers, to be captured with a KV cache."""
    from transformers import PreTrainedModel

    return (
        isinstance(model, PreTrainedModel)
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.get_output_embeddings() is not None
    )


def capture(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any = None) -> Capture:
    """Captures `model`, in eval mode, from example inputs.

    Without `dynamic_shapes`, the first dimension of each input is the batch and free, and the second of each integer
    or boolean input is a length and free. A causal language model has free batch, length and cache capacity.

    Raises:
        ValueError: the model rejects the example inputs.
    """
    model = model.eval()
    if is_causal_lm(model):
        return _capture_causal_lm(model)
    return _capture_module(model, example_inputs, dynamic_shapes)


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
    """Tensors of an output, and its structure as plain types.

    Raises:
        ValueError: something in it is neither a tensor nor a tuple, list, mapping or None.
    """
    tensors: list[Tensor] = []

    def walk(value: Any) -> dict[str, Any]:
        if value is None:
            return {"type": "none"}
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"type": "tensor", "index": len(tensors) - 1}
        if isinstance(value, Mapping):
            items = {str(k): walk(v) for k, v in value.items() if v is not None}
            return {"type": "dict", "items": items}
        if isinstance(value, list | tuple):
            return {"type": "list" if isinstance(value, list) else "tuple", "items": [walk(v) for v in value]}
        raise ValueError(f"the model puts out a {type(value).__name__}; export tensors, tuples, lists or dicts of them")

    return tensors, walk(output)


def _capture_module(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any) -> Capture:
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    args, kwargs = split_inputs(example_inputs)
    structure = flatten_output(call_example(model, example_inputs))[1]
    names = input_names(model, args, kwargs)
    tensors = {n: v for n, v in zip(names, (*args, *kwargs.values()), strict=True) if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError("none of the example inputs is a tensor; give example_inputs=(x,)")
    if dynamic_shapes is None:
        tensors = _two_rows(tensors)
        args = tuple(tensors.get(n, v) for n, v in zip(names, args, strict=False))
        kwargs = {k: tensors.get(k, v) for k, v in kwargs.items()}
        shapes = tuple(_default_dims(t) for t in tensors.values())
    else:
        given = (
            dynamic_shapes if isinstance(dynamic_shapes, Mapping) else dict(zip(names, dynamic_shapes, strict=False))
        )
        shapes = tuple(given.get(name) for name in tensors)
    result = Capture(_Flat(model, args, kwargs), tuple(tensors.values()), shapes, [], structure)
    ranges = _ranges(result)
    result.inputs = [
        {"name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": dims}
        for (n, t), dims in zip(tensors.items(), ranges, strict=True)
    ]
    return result


def _two_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with at least two rows: torch.export takes a size of 1 for a constant."""
    return {n: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for n, t in tensors.items()}


def _default_dims(tensor: Tensor) -> dict[int, Any] | None:
    dims = {}
    if tensor.dim() >= 1:
        dims[0] = Dim.AUTO
    if tensor.dim() >= 2 and not tensor.is_floating_point() and tensor.shape[1] > 1:
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


def _ranges(result: Capture) -> list[list[Any]]:
    """The shape of each input as numbers and named ranges, from what torch.export found to be free."""
    program = result.export(result.module)
    user = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    labels: dict[str, dict[str, Any]] = {}
    shapes: list[list[Any]] = []
    for node in user:
        shape: list[Any] = []
        for position, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            symbol = str(size.node.expr)
            if symbol not in labels:
                bounds = program.range_constraints.get(size.node.expr)
                upper = int(bounds.upper) if bounds is not None and str(bounds.upper).isdigit() else None
                name = ("batch", "length")[position] if position < 2 else f"dim{position}"
                taken = {label["name"] for label in labels.values()}
                name = name if name not in taken else f"{name}_{len(labels)}"
                limit = MAX_BATCH if position == 0 else 2**20
                labels[symbol] = {"name": name, "min": 1, "max": min(upper or limit, limit)}
            shape.append(labels[symbol])
        shapes.append(shape)
    return shapes


# --- causal language models -------------------------------------------------------------------------------------------


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over the filled slots; key and value heads are shared by groups of query heads, not copied."""
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def _sliced_cache(cache: Sequence[Tensor], filled: int, new: int) -> Any:
    """A transformers cache over the caller's tensors, which reads the first `filled` slots."""
    from transformers.cache_utils import Cache, StaticLayer

    class Sliced(StaticLayer):
        keys: Tensor
        values: Tensor

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__(max_cache_len=filled)
            self.keys, self.values, self.is_initialized = keys, values, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.keys[:, filled - new : filled].copy_(key_states.transpose(1, 2))
            self.values[:, filled - new : filled].copy_(value_states.transpose(1, 2))
            return self.keys[:, :filled].transpose(1, 2), self.values[:, :filled].transpose(1, 2)

        def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
            return filled, 0

        def get_seq_length(self) -> int:
            return filled - new

    return Cache(layers=[Sliced(k, v) for k, v in zip(cache[::2], cache[1::2], strict=True)])


class _CausalLM(nn.Module):
    """(ids [B,T], positions [B,T], mask [B,S], wanted [B,K], cache) -> [logits [B,K,V]], S slots filled afterwards."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.register("lightning_accel", _attend)
        model.set_attn_implementation("lightning_accel")
        self.model = model
        self._wanted: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._gather)

    def _gather(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_BTE, wanted_BK = inputs[0], self._wanted
        assert wanted_BK is not None
        return (hidden_BTE.gather(1, wanted_BK[..., None].expand(-1, -1, hidden_BTE.shape[-1])),)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor, cache: list[Tensor]
    ) -> list[Tensor]:
        new, filled = ids.shape[1], mask.shape[1]
        slots_S = torch.arange(filled)
        seen_TS = slots_S[None] <= torch.arange(filled - new, filled)[:, None]
        allowed_BTS = seen_TS[None] & mask[:, None]
        # a finite minimum: a row of padding sees nothing, and its unused result must not be NaN
        bias = torch.where(allowed_BTS[:, None], 0.0, torch.finfo(torch.float32).min)
        self._wanted = wanted
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=bias,
            use_cache=True,
            past_key_values=_sliced_cache(cache, filled, new),
        )
        self._wanted = None
        return [output.logits]


def _capture_causal_lm(model: Any) -> Capture:
    shapes = _cache_shapes(model)
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", 2048)
    vocabulary = model.get_output_embeddings()(torch.zeros(1, model.get_input_embeddings().embedding_dim)).shape[-1]
    batch, new, filled, capacity, wanted = 2, 5, 9, 16, 3
    cache = [torch.zeros(batch, capacity, *shape) for shape in shapes]
    example = (
        torch.zeros(batch, new, dtype=torch.int64),
        torch.arange(filled - new, filled).expand(batch, new).contiguous(),
        torch.ones(batch, filled, dtype=torch.bool),
        torch.zeros(batch, wanted, dtype=torch.int64),
        cache,
    )
    b, c, t, s, k = (
        Dim(n, max=m)
        for n, m in (("batch", MAX_BATCH), ("capacity", limit), ("new", limit), ("filled", limit), ("wanted", limit))
    )
    dynamic = ({0: b, 1: t}, {0: b, 1: t}, {0: b, 1: s}, {0: b, 1: k}, [{0: b, 1: c}] * len(cache))
    dims = {"b": {"name": "batch", "min": 1, "max": MAX_BATCH}, "t": {"name": "length", "min": 1, "max": limit}}
    inputs = [{"name": "input_ids", "dtype": "int64", "shape": [dims["b"], dims["t"]]}]
    spec = {
        "shapes": [list(shape) for shape in shapes],
        "dtype": "float32",
        "max_length": limit,
        "max_batch": MAX_BATCH,
        "vocabulary": vocabulary,
    }
    return Capture(_CausalLM(model), example, dynamic, inputs, {"type": "tensor", "index": 0}, spec)


def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(heads, head_dim) of the keys and of the values of each layer, in turn, as the model really makes them."""
    with torch.no_grad():
        layers = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True).past_key_values.layers
    return [(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)]


Metric = Callable[[Any, Sequence[Any]], float]

"""Fake quantization: training sees the rounding that the deployed kernel will do (Jacob et al. 2018).

`prepare_` changes the *class* of each module it touches and adds torchao fake quantizers without state, so that
Parameters, state_dict keys, hooks, shared modules and train/eval state stay what they were (contract 1); torchao's
own swap makes new modules and loses some of these. torchao has no symmetric per-token fake quantizer (it refuses
that configuration), so ours is written under its base class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import select
from .._quiet import Conv1D, FakeQuantizedLinear, FakeQuantizerBase
from .._warn import warn
from ..select import Coverage, Entry
from . import attend
from .adapters import check_adapters, parts_of_adapters, swap_adapters_, unswap_adapters_
from .attention import FakeQuantizedAttention, FakeQuantizedOutProjection, UnfusedAttention, projections
from .config import GROUPS, QuantConfig
from .int4 import round_groups
from .layers import check_not_converted
from .norms import FakeQuantizedConv1d, FakeQuantizedConv2d, thaw_norm_
from .ops import MOST_INT8_INPUTS, round_rows
from .padded import zero_padding
from .products import FakeQuantizedProducts
from .ranges import AffineFakeQuantizer
from .static import MOST_INPUTS


class _RoundRows(torch.autograd.Function):
    """codes * scale, with the gradient passed straight through (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_rows(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Int8RowFakeQuantizer(FakeQuantizerBase):
    """Symmetric int8, one scale a row (last dimension), computed as `ops.int8_linear` computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return _RoundRows.apply(x) if self.enabled else x

    def __repr__(self) -> str:
        return "Int8RowFakeQuantizer()"


class _RoundGroups(torch.autograd.Function):
    """As `_RoundRows`, in groups of inputs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: int) -> Tensor:
        return round_groups(weight, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Int4GroupFakeQuantizer(FakeQuantizerBase):
    """Symmetric int4, one float16 scale a group of inputs, computed as `int4.pack` is given it."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.enabled, self.group = True, group

    def forward(self, weight: Tensor) -> Tensor:
        return _RoundGroups.apply(weight, self.group) if self.enabled else weight

    def __repr__(self) -> str:
        return f"Int4GroupFakeQuantizer(group={self.group})"


class FakeQuantizedConv1D(Conv1D):
    """transformers' Conv1D (GPT-2's linear layer, weight [in, out]) with fake-quantized activations and weights."""

    activation_fake_quantizer: nn.Module | None
    weight_fake_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quantizer(self.weight.t())
        x = x if self.activation_fake_quantizer is None else self.activation_fake_quantizer(x)
        return F.linear(x, weight, self.bias)


class FakeQuantizedEmbedding(nn.Embedding):
    """nn.Embedding with fake-quantized rows: those that are looked up, not the whole table, which gives the same."""

    weight_fake_quantizer: nn.Module

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight_fake_quantizer(super().forward(ids))


class UnfusedEncoderLayer(nn.TransformerEncoderLayer):
    """In eval mode too, calls its layers one by one: the fused operator would take their raw weights."""

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        return 0


class UnfusedEncoder(nn.TransformerEncoder):
    """Never packs padded sequences, which only the fused operator understands."""

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        return False


_FAKE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Embedding: FakeQuantizedEmbedding,
    Conv1D: FakeQuantizedConv1D,
    nn.Conv1d: FakeQuantizedConv1d,
    nn.Conv2d: FakeQuantizedConv2d,
    nn.MultiheadAttention: FakeQuantizedAttention,
    NonDynamicallyQuantizableLinear: FakeQuantizedOutProjection,
}
_PLAIN = {fake: plain for plain, fake in _FAKE.items()}
_FAKE[UnfusedAttention] = FakeQuantizedAttention  # its out_proj was prepared alone, before
_UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: UnfusedAttention,
    nn.TransformerEncoderLayer: UnfusedEncoderLayer,
    nn.TransformerEncoder: UnfusedEncoder,
}
_FUSED = {unfused: fused for fused, unfused in _UNFUSED.items()}
FAKE_TYPES = tuple(_PLAIN)
_ACTIVATIONS: dict[type[nn.Module], tuple[str, ...]] = {  # names of the quantizers of inputs, where not the usual one
    FakeQuantizedEmbedding: (),
    FakeQuantizedAttention: tuple(f"{name}_activation_fake_quantizer" for name in ("query", "key", "value")),
}


def prepare_(model: nn.Module, config: QuantConfig) -> Coverage:
    """Fake-quantizes `model` in place and returns what was touched, what was skipped and why.

    Preparing twice with the same config changes nothing.

    Raises:
        ValueError: nothing in the model can be quantized, it holds integers already, a module is prepared otherwise, or
            an override matches nothing.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(prepare_(model, QuantConfig("int8", overrides={"2": None})))
    int8 fake quantization: 80.0% of parameters
      skipped 2 (Linear, 18 parameters): excluded by overrides
    """
    if not isinstance(config, QuantConfig):
        raise ValueError(f"config is {config!r}, expected a QuantConfig; write QuantConfig('int8')")
    return prepare_as_planned_(model, config, plan(model, config))


def prepare_as_planned_(model: nn.Module, config: QuantConfig, coverage: Coverage) -> Coverage:
    """`prepare_`, of what `plan` has found."""
    modules = dict(select.named_modules(model))
    for entry in coverage.entries:
        if entry.kind == FakeQuantizedProducts.kind:
            if entry.done is not None:
                attend.add_products_(modules[_layer_of(entry.name)])
            continue
        module = modules[entry.name]
        if entry.done is not None and type(module) not in _PLAIN:
            _swap_class(module, entry.name, entry.done, config)
        if entry.reason is not None:
            module.__dict__["fallback"] = entry.reason  # for the coverage of the converted model
    for module in model.modules():
        if type(module) in _UNFUSED and is_prepared(module):
            module.__class__ = _UNFUSED[type(module)]
    swap_adapters_(model, FAKE_TYPES)
    return coverage.require_any(
        "quantization needs nn.Linear, nn.Embedding or transformers' Conv1D, and int8-static nn.Conv1d or nn.Conv2d"
    )


def plan(model: nn.Module, config: QuantConfig, only: Mapping[str, str] | None = None) -> Coverage:
    """What `prepare_` would touch and skip, and why.

    Args:
        only: name -> scheme, of the modules to touch, in place of those that `config` says.
    """
    check_not_converted(model)
    modules = {name: m for name, m in select.named_modules(model) if count_own(m)}
    layers = [(name, m) for name, m in select.named_modules(model) if attend.is_attention(m)]
    products = {select.join(name, attend.NAME): m for name, m in layers if config.attention or attend.has_products(m)}
    chosen = _schemes(modules, products, config) if only is None else {n: only.get(n) for n in (*modules, *products)}
    reasons = _in_fused_operators(model) | parts_of_adapters(model)
    if only is None:
        reasons |= _tied_to_excluded(modules, chosen)
    coverage = Coverage(f"{config.scheme} fake quantization")
    for name, module in modules.items():
        scheme, reason = chosen[name], _why_not(module, chosen[name], reasons.get(id(module)))
        if reason is None:
            scheme, reason = _fitting(name, module, chosen[name], config.group_size)
        else:
            scheme = None
        if scheme == "int8" and _may_overflow(module):
            scheme, reason = None, f"int32 sums over more than {MOST_INT8_INPUTS:,} inputs could overflow"
        if only is None or name in only:
            _check_prepared(name, module, scheme, config)
        coverage.entries.append(Entry(name, _kind(module), count_own(module), done=scheme, reason=reason))
    _check_tied(modules, {e.name: e.done for e in coverage.entries})
    coverage.entries += [_plan_products(n, m, chosen[n], reasons.get(id(m))) for n, m in products.items()]
    check_adapters(model, {id(modules[e.name]) for e in coverage.entries if e.name in modules and e.done is not None})
    return coverage


def _schemes(
    modules: dict[str, nn.Module], products: dict[str, nn.Module], config: QuantConfig
) -> dict[str, str | None]:
    """The scheme that `config` has for each module and for products of attention."""
    chosen = select.assign([*modules, *products], config.overrides, config.scheme)
    chosen |= {name: "int8" if config.attention and chosen[name] else None for name in products}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):  # what is said of it is said of its last layer too
            last = f"{name}.out_proj".lstrip(".")
            chosen[last] = select.first_match(last, config.overrides, chosen[name])
    return chosen


def _plan_products(name: str, layer: nn.Module, scheme: str | None, known: str | None) -> Entry:
    reason = "excluded by overrides" if scheme is None else known or attend.why_not(layer)
    if attend.has_products(layer) and reason is not None:
        raise ValueError(
            f"{name} is fake-quantized already, and would not be now ({reason}); write QuantConfig(attention=True) as "
            "before, or call unprepare_(model)"
        )
    return Entry(name, FakeQuantizedProducts.kind, 0, done="int8" if reason is None else None, reason=reason)


def _layer_of(name: str) -> str:
    """The layer whose products are called `name`."""
    return name.rpartition(".")[0]


def unprepare_(model: nn.Module) -> nn.Module:
    """Takes the fake quantizers out again, in place; the weights are the trained ones, not rounded."""
    unswap_adapters_(model)
    for module in model.modules():
        attend.remove_products_(module)
        module.__dict__.pop("fallback", None)
        if type(module) in _PLAIN:
            for quantizer in (*_activations(module), "weight_fake_quantizer"):
                delattr(module, quantizer)
            if (norm := module.__dict__.pop("norm", None)) is not None:
                thaw_norm_(norm)
            module.__dict__.pop("around", None)
            module.__class__ = module.__dict__.pop("float_class", _PLAIN[type(module)])
        elif type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether any module of `model` is fake-quantized."""
    return any(_is_fake(module) for module in model.modules())


def _is_fake(module: nn.Module | None) -> bool:
    return type(module) in _PLAIN or isinstance(module, FakeQuantizedProducts)


def count_own(module: nn.Module) -> int:
    """Parameters that belong to the module itself, not to its children."""
    return select.count_parameters(module, recurse=False)


def shapes_of(module: Any) -> list[tuple[int, int]]:
    """Output channels and inputs of each weight of a module that can be quantized."""
    if isinstance(module, nn.MultiheadAttention):
        return [(len(weight), weight.shape[1]) for weight, _ in projections(module).values()]
    rows, inputs = module.weight.flatten(1).shape
    return [(inputs, rows) if isinstance(module, Conv1D) else (rows, inputs)]


def _most_inputs(module: nn.Module) -> int:
    return max(inputs for _, inputs in shapes_of(module))


def _kind(module: nn.Module) -> str:
    return module.__dict__.get("float_class", _PLAIN.get(type(module), type(module))).__name__


def _in_fused_operators(model: nn.Module) -> dict[int, str]:
    """id of each module whose parent takes its weights without calling it -> why it is not quantized."""
    found = {}
    for parent in model.modules():
        fused = isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        if fused and type(parent) not in (*_UNFUSED, *_FUSED, *_PLAIN):
            kind = type(parent).__name__
            reason = f"{kind} calls a fused function with raw weights, so a quantized child would not run"
            found.update({id(child): reason for child in parent.modules()})
    return found


def _tied_to_excluded(modules: dict[str, nn.Module], chosen: dict[str, str | None]) -> dict[int, str]:
    """id of each module that shares its weight with one that overrides exclude -> why it is not quantized.

    With the float weight and its codes, a model would be larger than it was.
    """
    weights = {name: module._parameters.get("weight") for name, module in modules.items()}
    excluded = {id(weight): name for name, weight in weights.items() if weight is not None and chosen[name] is None}
    return {
        id(modules[name]): f"shares its weight with {excluded[id(weight)]!r}, excluded by overrides"
        for name, weight in weights.items()
        if id(weight) in excluded
    }


def _why_not(module: nn.Module, scheme: str | None, known: str | None) -> str | None:
    """Why a module is not quantized; `known` is what its place in the model says."""
    if scheme is None or known is not None:
        return known if scheme is not None else "excluded by overrides"
    if type(module) not in _FAKE and type(module) not in _PLAIN:
        parent = next((plain for plain in _FAKE if isinstance(module, plain)), None)
        if parent is None:
            return f"no {scheme} form of this module"
        if not issubclass(parent, nn.Conv1d | nn.Conv2d) or zero_padding(module) is None:
            return f"a subclass of {parent.__name__} may compute something else"
    if any(isinstance(value, Tensor) and name.endswith(("weight", "bias")) for name, value in vars(module).items()):
        return "a hook makes its weight; take it off before: remove_weight_norm, remove_spectral_norm or prune.remove"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "an embedding with max_norm or sparse gradients is not supported"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and scheme != "int8-static":
        return f"{scheme} has no form of convolutions; write overrides={{'pattern': 'int8-static'}} for it"
    if scheme == "int8-static" and _most_inputs(module) > MOST_INPUTS:
        return f"sums over more than {MOST_INPUTS:,} inputs could overflow int32"
    return None


def _fitting(name: str, module: Any, scheme: str | None, group: int) -> tuple[str | None, str | None]:
    """The scheme that the module gets, and why it is another than asked for."""
    if scheme == "int8-static" and isinstance(module, nn.Embedding):
        return "int8", None  # the same codes; an embedding has no activations
    if scheme is None or not scheme.startswith("int4"):
        return scheme, None
    inputs = next((inputs for _, inputs in shapes_of(module) if inputs % group), None)
    if inputs is None:
        return scheme, None
    divisors = [n for n in range(2, inputs + 1) if inputs % n == 0]
    reason = f"int8 in place of {scheme}: groups of {group} do not divide its {inputs} inputs (divisors: {divisors})"
    other = next((n for n in GROUPS if inputs % n == 0), None)
    write = f"group_size={other}" if other else f"overrides={{{name!r}: 'int8'}} for this, without a warning"
    warn(f"{name}: {reason}; write QuantConfig({scheme!r}, {write})")
    return "int8", reason


def _may_overflow(module: Any) -> bool:
    return _most_inputs(module) > MOST_INT8_INPUTS and not isinstance(module, nn.Embedding)


def _check_prepared(name: str, module: Any, scheme: str | None, config: QuantConfig) -> None:
    """Raises ValueError where a module is fake-quantized already, and not as it would be now."""
    if type(module) not in _PLAIN:
        return
    group = getattr(module.weight_fake_quantizer, "group", config.group_size)
    observer = getattr(getattr(module, "activation_fake_quantizer", None), "observer", config.observer)
    found, asked = scheme_of(module), scheme
    if isinstance(module, nn.Embedding) and asked == "int4-int8":
        asked = found if str(found).startswith("int4") else asked  # the same: there are no activations
    now, then = _spelled(found, group, observer), _spelled(asked, config.group_size, config.observer)
    if now != then:
        raise ValueError(
            f"{name or '<root>'!r} is prepared as {now}, the config asks {then}; write unprepare_(model) first, or the "
            "config with which it was prepared"
        )


def _spelled(scheme: str | None, group: int, observer: str) -> str:
    if scheme is None:
        return "float"
    of = f" in groups of {group}" if scheme.startswith("int4") else ""
    return scheme + (f" with observer={observer!r}" if scheme == "int8-static" else of)


def check_prepared_as(model: nn.Module, config: QuantConfig) -> None:
    """Raises ValueError unless a prepared model is what `prepare_(model, config)` makes of it."""
    modules = dict(select.named_modules(model))
    for entry in plan(model, config).entries:
        if entry.done is not None and not _is_fake(modules.get(entry.name)):
            raise ValueError(
                f"{entry.name!r} is not prepared, as other modules are, and the config asks {entry.done}; write "
                f"prepare_(model, config) and train on, or overrides={{{entry.name!r}: None}}"
            )


def _check_tied(modules: dict[str, nn.Module], schemes: dict[str, str | None]) -> None:
    """Raises where modules that share a weight would have different codes of it."""
    first: dict[int, str] = {}
    for name, module in modules.items():
        weight, scheme = getattr(module, "weight", None), schemes[name]
        if weight is None or scheme is None:
            continue
        other = first.setdefault(id(weight), name)
        if scheme.startswith("int4") != str(schemes[other]).startswith("int4"):
            raise ValueError(
                f"{other!r} and {name!r} share their weight and would have it in {schemes[other]} and {scheme}; give "
                f"both one scheme, for example overrides={{{other!r}: {scheme!r}, {name!r}: {scheme!r}}}"
            )


def _swap_class(module: Any, name: str, scheme: str, config: QuantConfig) -> None:
    if type(module) not in _FAKE:  # a convolution that pads with zeros
        module.__dict__.update(float_class=type(module), around=zero_padding(module))
        module.__class__ = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    module.__class__ = _FAKE[type(module)]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        module.__dict__["norm"] = None
        module.__dict__.setdefault("around", None)
    for attribute in _activations(module):
        setattr(module, attribute, _activation_quantizer(name, scheme, config))
    module.weight_fake_quantizer = _weight_quantizer(scheme, config)
    device = next(module.parameters()).device
    for quantizer in module.children():
        if isinstance(quantizer, FakeQuantizerBase):
            quantizer.to(device).train(module.training)


def _activations(module: nn.Module) -> tuple[str, ...]:
    """Names under which a fake-quantized module has the quantizers of its inputs."""
    return _ACTIVATIONS.get(type(module), ("activation_fake_quantizer",))


def _activation_quantizer(name: str, scheme: str, config: QuantConfig) -> FakeQuantizerBase | None:
    if scheme == "int4-weight":
        return None
    return AffineFakeQuantizer(config.observer, name) if scheme == "int8-static" else Int8RowFakeQuantizer()


def _weight_quantizer(scheme: str, config: QuantConfig) -> FakeQuantizerBase:
    return Int4GroupFakeQuantizer(config.group_size) if scheme.startswith("int4") else Int8RowFakeQuantizer()


def scheme_of(module: Any) -> str | None:
    """The scheme of a fake-quantized module, `None` for any other."""
    if type(module) not in _PLAIN:
        return None
    activation = getattr(module, "activation_fake_quantizer", None)
    if isinstance(module.weight_fake_quantizer, Int8RowFakeQuantizer):
        return "int8-static" if isinstance(activation, AffineFakeQuantizer) else "int8"
    return "int4-weight" if activation is None else "int4-int8"

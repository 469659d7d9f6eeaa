"""Which modules of a model are quantized, in which scheme, and why the others are not; preparing them for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import select
from .._warn import warn
from ..select import Coverage, Entry
from . import attend
from .adapters import check_adapters, parts_of_adapters, swap_adapters_
from .config import GROUPS, QuantConfig
from .fake import (
    FAKE,
    FAKE_TYPES,
    FUSED,
    PLAIN,
    UNFUSED,
    count_own,
    is_fake,
    is_prepared,
    scheme_of,
    shapes_of,
    swap_class_,
)
from .layers import check_not_converted
from .ops import MOST_INT8_INPUTS
from .padded import zero_padding
from .products import FakeQuantizedProducts
from .static import MOST_INPUTS


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
                attend.add_products_(modules[attend.layer_of(entry.name)])
            continue
        module = modules[entry.name]
        if entry.done is not None and type(module) not in PLAIN:
            swap_class_(module, entry.name, entry.done, config)
        module.__dict__.pop("fallback", None)  # of another config, before
        if entry.reason is not None:
            module.__dict__["fallback"] = entry.reason  # for the coverage of the converted model
    for module in model.modules():
        if type(module) in UNFUSED and is_prepared(module):
            module.__class__ = UNFUSED[type(module)]
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
    if config.attention and not products:
        warn(
            f"attention=True found no attention in {type(model).__name__} whose products can be integers: "
            "nn.MultiheadAttention has it, and layers of transformers that look their attention function up by name; "
            "leave attention=True out"
        )
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


def _most_inputs(module: nn.Module) -> int:
    return max(inputs for _, inputs in shapes_of(module))


def _kind(module: nn.Module) -> str:
    return module.__dict__.get("float_class", PLAIN.get(type(module), type(module))).__name__


def _in_fused_operators(model: nn.Module) -> dict[int, str]:
    """id of each module whose parent takes its weights without calling it -> why it is not quantized."""
    found = {}
    for parent in model.modules():
        fused = isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        if fused and type(parent) not in (*UNFUSED, *FUSED, *PLAIN):
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
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f"a parametrization makes its {name}; take it off before: parametrize.remove_parametrizations"
    if type(module) not in FAKE and type(module) not in PLAIN:
        parent = next((plain for plain in FAKE if isinstance(module, plain)), None)
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
    if type(module) not in PLAIN:
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
        if entry.done is not None and not is_fake(modules.get(entry.name)):
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

"""Which modules: the only walk over a model, and the record of what was touched and what was not.

A selector in a config is a mapping from glob patterns over module names to a value, read from the top: the first
pattern that matches decides, and `None` excludes. Names are canonical: the prefixes that `torch.compile`,
checkpoint wrappers and FSDP insert are stripped, so that a pattern or a saved state means the same module however
the model is wrapped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """`name` without what torch.compile, checkpoint wrappers and FSDP put into it.

    >>> canonical_name("model._orig_mod.layers.0._checkpoint_wrapped_module.mlp")
    'model.layers.0.mlp'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module of `root` once, under its canonical name; wrappers themselves are left out."""
    seen: set[str] = set()
    for name, module in root.named_modules():
        if name.rpartition(".")[2] in _WRAPPERS or not _is_wrapper(module):
            name = canonical_name(name)
            if name not in seen:
                seen.add(name)
                yield name, unwrap(module)


def _is_wrapper(module: nn.Module) -> bool:
    return any(wrapper in module._modules for wrapper in _WRAPPERS)


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside torch.compile and checkpoint wrappers."""
    while wrapped := next((module._modules[w] for w in _WRAPPERS if w in module._modules), None):
        module = wrapped
    return module


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Has models in eval mode in the block, and each of their modules as it was after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> Parameter, each Parameter under its first name only (a tied one is listed once)."""
    return {canonical_name(name): parameter for name, parameter in root.named_parameters()}


def all_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by each of its canonical names: one that is used at several places is there several times."""
    return {canonical_name(name): p for name, p in root.named_parameters(remove_duplicate=False)}


def get_module(root: nn.Module, name: str | None) -> nn.Module:
    """The module called `name` (canonical) below `root`; `None` and `""` mean `root`.

    Raises:
        ValueError: no such module; the message lists near names.
    """
    if not name:
        return unwrap(root)
    modules = dict(named_modules(root))
    if name in modules:
        return modules[name]
    depth = name.count(".")
    near = [known for known in modules if known and known.count(".") <= depth][:12]
    raise ValueError(
        f"there is no module {name!r} in {type(root).__name__}; give one of its names, for example "
        f"module={near[0] if near else ''!r} (it has: {', '.join(near)})"
    )


def join(module: str, name: str) -> str:
    """The name in its parent of what is called `name` in `module`; `""` is the parent, or the module itself.

    >>> join("model", "head"), join("", "head"), join("model", "")
    ('model.head', 'head', 'model')
    """
    return f"{module}.{name}".strip(".")


def assign(names: list[str], overrides: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Value of each name: that of the first pattern of `overrides` that matches it, else `default`.

    Raises:
        ValueError: a pattern matches none of the names.
    """
    unused = [p for p in overrides if not any(fnmatchcase(name, p) for name in names)]
    if unused:
        inner = [p for p in (f"{unused[0]}.*", f"*.{unused[0]}") if any(fnmatchcase(name, p) for name in names)]
        raise ValueError(
            f"the pattern {unused[0]!r} matches no module"
            + (f"; write {inner[0]!r}" if inner else "")
            + f"; names are relative to module=, for example {', '.join(repr(n) for n in names[:8])}"
        )
    return {name: first_match(name, overrides, default) for name in names}


def first_match(name: str, overrides: Mapping[str, Any], default: Any) -> Any:
    """Value of the first pattern of `overrides` that matches `name`, else `default`."""
    return next((value for p, value in overrides.items() if fnmatchcase(name, p)), default)


@dataclass
class Entry:
    """One module: what was done to it, or why nothing was."""

    name: str
    kind: str
    parameters: int
    done: str | None = None
    reason: str | None = None
    flops: int | None = None


@dataclass
class Coverage:
    """What a technique touched, what it skipped and why, in shares of parameters and FLOPs (contract 8).

    `touched` is the number of parameters, where a technique touches a part of an entry's, such as pruning.
    """

    technique: str
    entries: list[Entry] = field(default_factory=list)
    touched: float | None = None

    @property
    def share_of_parameters(self) -> float:
        """Share in [0, 1] of the listed parameters that was touched."""
        total = sum(e.parameters for e in self.entries)
        touched = self.touched if self.touched is not None else sum(e.parameters for e in self.entries if e.done)
        return touched / total if total else 0.0

    @property
    def share_of_flops(self) -> float | None:
        """Share in [0, 1] of the counted FLOPs that was touched; `None` when they were not counted."""
        if all(e.flops is None for e in self.entries):
            return None
        total = sum(e.flops or 0 for e in self.entries)
        return sum(e.flops or 0 for e in self.entries if e.done) / total if total else 0.0

    def require_any(self, hint: str) -> Coverage:
        """Returns itself; raises ValueError if nothing was touched."""
        if any(e.done for e in self.entries):
            return self
        reasons = sorted({f"{e.name or '<root>'}: {e.reason}" for e in self.entries if e.reason})[:5]
        raise ValueError(f"{self.technique} touched nothing; {hint}" + (f" ({'; '.join(reasons)})" if reasons else ""))

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for the manifest."""
        return {
            "technique": self.technique,
            "share_of_parameters": self.share_of_parameters,
            "share_of_flops": self.share_of_flops,
            "entries": [vars(e) for e in self.entries],
        }

    def __str__(self) -> str:
        flops = self.share_of_flops
        head = f"{self.technique}: {self.share_of_parameters:.1%} of parameters"
        head += f", {flops:.1%} of FLOPs" if flops is not None else ""
        notes = [f"  {'' if e.done else 'skipped '}{note}: {e.reason}"
                 for e, note in zip(self.entries, named(self.as_dict()), strict=True) if e.reason]  # fmt: skip
        return "\n".join([head, *notes])


def named(coverage: Mapping[str, Any]) -> list[str]:
    """Each entry of a coverage in words: its name and kind, its parameters and its share of FLOPs."""
    total = sum(entry["flops"] or 0 for entry in coverage["entries"])
    return [
        f"{e['name']} ({e['kind']}, {e['parameters']:,} parameters"
        + (f", {e['flops'] / total:.1%} of FLOPs)" if e["flops"] else ")")
        for e in coverage["entries"]
    ]


def copy_model(model: nn.Module) -> Any:
    """A deep copy. Weights that hooks make in each forward (weight_norm of torch.nn.utils) have a graph, which torch
    does not copy: they are copied without.
    """
    made = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in made})


def count_parameters(module: nn.Module, recurse: bool = True) -> int:
    """Number of elements of the module's distinct parameters."""
    return sum(p.numel() for p in module.parameters(recurse=recurse))


def count_flops(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, int]:
    """FLOPs of one forward by canonical module name, children included (`""` is the whole model).

    Matrix products, convolutions and attention are counted, by torch.utils.flop_counter; multiply and add are two.
    The projections of an nn.MultiheadAttention, which are no modules, stand under their names in its converted form:
    q_proj, k_proj, v_proj and out_proj.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counts: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad(), _unfused(), _counted_projections(model, counts):
        model(*args, **kwargs)
    prefix = type(model).__name__
    for name, by_operator in counter.get_flop_counts().items():
        if name == "Global":
            counts[""] = sum(by_operator.values())
        elif name.startswith(prefix + "."):
            counts[canonical_name(name[len(prefix) + 1 :])] = sum(by_operator.values())
    return counts


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention and recurrent layers as the products that they consist of: torch does not count the fused operators."""
    mha: Any = torch.backends.mha
    mkldnn: Any = torch.backends.mkldnn
    before = mha.get_fastpath_enabled(), mkldnn.enabled
    mha.set_fastpath_enabled(False)
    mkldnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before[0])
        mkldnn.enabled = before[1]


@contextmanager
def _counted_projections(model: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Adds the FLOPs of the projections in each nn.MultiheadAttention to `counts`: they are computed without a call."""

    def note(name: str, module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for part, tensor in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "query"}.items():
            if isinstance(inputs.get(tensor), torch.Tensor):
                label = f"{name}.{part}".lstrip(".")
                counts[label] = counts.get(label, 0) + 2 * inputs[tensor].numel() * module.embed_dim

    hooks = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in named_modules(model)
        if isinstance(module, nn.MultiheadAttention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

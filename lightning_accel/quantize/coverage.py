"""What of a converted or prepared model is quantized, and what is not and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import select
from ..select import Coverage, Entry
from .attend import layer_of
from .attention import ConvertedAttention
from .fake import scheme_of, shapes_of
from .layers import CONVERTED, LINEAR, Int4Embedding, Int8Embedding
from .products import PRODUCTS


def quantization_coverage(model: nn.Module, flops: dict[str, int] | None = None) -> Coverage:
    """Which modules of a converted (or prepared) model are quantized, in shares of weights and FLOPs.

    Args:
        flops: of each module of the unquantized model, from `select.count_flops`.
    """
    found = [m for m in model.modules() if _scheme(m)]
    layers = [m for m in found if not isinstance(m, nn.Embedding | Int8Embedding | Int4Embedding)] or found
    schemes = dict.fromkeys(str(_scheme(m)) for m in sorted(layers, key=_size, reverse=True))
    coverage = Coverage(f"{' and '.join(schemes)} quantization")
    seen: set[int] = set()
    for name, module in select.named_modules(model):
        if isinstance(module, PRODUCTS):
            coverage.entries.append(Entry(name, module.kind, 0, flops=_of_products(name, flops), done=module.scheme))
            continue
        weight: Any = module.codes if isinstance(module, CONVERTED) else None
        tensors: list[Tensor] = [t for t in module._parameters.values() if t is not None]
        parameters = sum(t.numel() for t in tensors if id(t) not in seen)
        parameters += _size(module) if weight is not None and id(weight) not in seen else 0
        seen.update(id(t) for t in (*tensors, weight))
        own = None if flops is None else _own_flops(name, module, flops)
        if (tensors or weight is not None) and (parameters or own):
            scheme = _scheme(module)
            coverage.entries.append(
                Entry(
                    name,
                    type(module).__name__,
                    parameters,
                    flops=own,
                    done=scheme,
                    reason=getattr(module, "fallback", None) or (None if scheme else "not quantized"),
                )
            )
    if flops is not None:
        counted = sum(e.flops or 0 for e in coverage.entries)
        rest = flops.get("", 0) - counted
        if rest > 0:
            coverage.entries.append(
                Entry(
                    "(attention and other products without weights)",
                    "function",
                    0,
                    reason="between activations: runs in float",
                    flops=rest,
                )
            )
    return coverage


def _scheme(module: nn.Module) -> str | None:
    return getattr(module, "scheme", None) if isinstance(module, CONVERTED) else scheme_of(module)


def _size(module: Any) -> int:
    """Number of weights of a linear layer or an embedding."""
    if isinstance(module, LINEAR):
        return module.out_features * module.in_features
    if isinstance(module, Int8Embedding | Int4Embedding):
        return module.num_embeddings * module.embedding_dim
    return sum(rows * inputs for rows, inputs in shapes_of(module))


def _own_flops(name: str, module: nn.Module, flops: dict[str, int]) -> int | None:
    """FLOPs of the module's own weights, `None` where they are its children's."""
    if isinstance(module, ConvertedAttention):
        return None
    if isinstance(module, nn.MultiheadAttention):  # as a whole it has those of attention and of out_proj too
        return sum(flops.get(f"{name}.{part}".lstrip("."), 0) for part in ("q_proj", "k_proj", "v_proj"))
    return None if list(_children_with_weights(module)) else flops.get(name, 0)


def _of_products(name: str, flops: dict[str, int] | None) -> int | None:
    """FLOPs of an attention layer that are none of its children's."""
    if flops is None:
        return None
    layer = layer_of(name)
    children = (count for part, count in flops.items() if part and part.rpartition(".")[0] == layer)
    return flops.get(layer, 0) - sum(children)


def _children_with_weights(module: nn.Module) -> Iterable[nn.Module]:
    return (child for child in module.children() if any(True for _ in child.parameters()))

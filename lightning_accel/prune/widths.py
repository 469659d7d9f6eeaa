"""Where a model keeps its widths beside its parameters: in layers, in attention, in transformers' configurations."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import select
from .._quiet import Conv1D

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "nhead")  # of a block
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_ALL_HEADS = ("all_head_size", "embed_dim", "inner_dim", "split_size")  # heads * width of a head

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim")


def record_shape(module: Any) -> None:
    """What a layer says of its own weight."""
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        alone = module.groups > 1  # each channel by itself: others are not cut
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if alone else 1
        module.in_channels = module.groups * module.weight.shape[1]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        module.num_features = min(len(t) for t in tensors if t is not None)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def record_widths(model: nn.Module, widths: list[dict[str, Any]], changed: set[str]) -> None:
    """Writes the new widths into blocks, and into the configuration where all of a kind agree.

    Args:
        widths: of each group `{"kind", "name", "of", "left", "members"}`.
        changed: the parameters that were cut just now.
    """
    config: Any = getattr(model, "config", None)
    before = {field: getattr(config, field) for field in (*_HEADS, *HIDDEN) if hasattr(config, field)}
    _record_neurons(model, config, [w for w in widths if w["kind"] == "neurons"])
    heads = [w for w in widths if w["kind"] == "heads"]
    cut = [w for w in heads if w["left"] < w["of"] and changed.intersection(w["members"])]
    for width in cut:
        _record_heads(model, width)
    if cut and len({(w["of"], w["left"]) for w in heads}) == 1 and _has_head_width(config):
        _scale(config, _HEADS, cut[0])
    for field in HIDDEN if _has_head_width(config) else ():  # else heads would be of another width than they are
        for width in (w for w in widths if w["kind"] == "hidden" and w["left"] < w["of"]):
            if getattr(config, field, None) == width["of"]:
                setattr(config, field, width["left"])
    try:
        getattr(config, "validate", bool)()
    except Exception:  # as transformers' of a hidden width that is no multiple of the heads: it could not be saved
        for field, value in before.items():
            setattr(config, field, value)


def _has_head_width(config: Any) -> bool:
    """Whether the configuration says how wide a head is, rather than how many share the hidden width."""
    return any(isinstance(getattr(config, field, None), int) for field in ("head_dim", "d_kv"))


def _record_neurons(model: nn.Module, config: Any, groups: list[dict[str, Any]]) -> None:
    widths: dict[int, set[int]] = {}
    for group in groups:
        widths.setdefault(group["of"], set()).add(group["left"])
        block: Any = select.get_module(model, group["name"].rpartition(".")[0])
        if getattr(block, "intermediate_size", None) == group["of"]:
            block.intermediate_size = group["left"]
    for field in _INNER:
        if hasattr(config, field):
            old = getattr(config, field) or 4 * getattr(config, "n_embd", 0)  # GPT-2 leaves n_inner open
            if len(widths.get(old, ())) == 1:
                setattr(config, field, next(iter(widths[old])))


def _record_heads(model: nn.Module, group: dict[str, Any]) -> None:
    for name in sorted({member.rpartition(".")[0].rpartition(".")[0] for member in group["members"]}):
        _scale(select.get_module(model, name), (*_HEADS, *_ALL_HEADS), group)


def _scale(owner: Any, fields: tuple[str, ...], group: dict[str, Any]) -> None:
    for field in fields:
        size = getattr(owner, field, None)
        if isinstance(size, int) and size % group["of"] == 0:
            setattr(owner, field, size // group["of"] * group["left"])

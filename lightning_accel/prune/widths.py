"""Where a model keeps its widths beside its parameters: in layers, in attention, in transformers' configurations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import select
from .._quiet import Conv1D
from .groups import Group

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "nhead")  # of a block
_ALL_HEADS = ("all_head_size", "embed_dim", "inner_dim", "split_size")  # heads * width of a head


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


def record_widths(model: nn.Module, groups: list[Group], kept: list[Tensor]) -> None:
    """Writes the new widths into blocks, and into the configuration where all of a kind agree."""
    left = [(group, int(keep.sum())) for group, keep in zip(groups, kept, strict=True)]
    config: Any = getattr(model, "config", None)
    _record_neurons(model, config, [(g, n) for g, n in left if g.kind == "neurons"])
    for group, count in left:
        if group.kind == "heads" and count < group.width:
            _record_heads(model, group, count)
    hidden = [(g, n) for g, n in left if g.kind == "hidden" and n < g.width]
    for field in ("hidden_size", "n_embd", "d_model", "dim"):
        for group, count in hidden:
            if getattr(config, field, None) == group.width:
                setattr(config, field, count)


def _record_neurons(model: nn.Module, config: Any, left: list[tuple[Group, int]]) -> None:
    widths: dict[int, set[int]] = {}
    for group, count in left:
        widths.setdefault(group.width, set()).add(count)
        block: Any = select.get_module(model, group.name.rpartition(".")[0])
        if getattr(block, "intermediate_size", None) == group.width:
            block.intermediate_size = count
    for field in ("intermediate_size", "n_inner", "ffn_dim"):
        if hasattr(config, field):
            old = getattr(config, field) or 4 * getattr(config, "n_embd", 0)  # GPT-2 leaves n_inner open
            if len(widths.get(old, ())) == 1:
                setattr(config, field, widths[old].pop())


def _record_heads(model: nn.Module, group: Group, count: int) -> None:
    blocks = {member.name.rpartition(".")[0].rpartition(".")[0] for member in group.members}
    for name in sorted(blocks):
        block: Any = select.get_module(model, name)
        for field in _HEADS:
            heads = getattr(block, field, None)
            if isinstance(heads, int) and heads % group.width == 0:
                setattr(block, field, heads // group.width * count)
        for field in _ALL_HEADS:
            size = getattr(block, field, None)
            if isinstance(size, int) and size % group.width == 0:
                setattr(block, field, size // group.width * count)

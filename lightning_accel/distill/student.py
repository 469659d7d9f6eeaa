"""A smaller student out of its teacher: chosen layers, and the first slices of every width.

Layers that lie as far apart as they can (Shleifer & Rush 2020, arXiv:2010.13002; Distil-Whisper, arXiv:2311.00430).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Chosen = int | Sequence[int]

_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_AS_HIDDEN = ("pooler_hidden_size",)
_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_INNER = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")
_DEPTHS = {
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "encoder": ("encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_FUSED = ("c_attn",)  # query, key and value side by side
_OTHER_FUSED = ("qkv", "query_key_value", "kv_proj", "gate_up", "in_proj")  # in orders that are not known here


def student_from(teacher: Any, layers: Chosen | Mapping[str, Chosen] | None = None, width: float | None = None) -> Any:
    """A smaller transformers model of the teacher's class, with weights copied from it.

    Args:
        teacher: a transformers model; it is not changed.
        layers: how many layers, as far apart as they can be and the first and last among them, or their indices; for
            an encoder-decoder model a mapping with `encoder` and/or `decoder`. `None` keeps all.
        width: share in (0, 1] of the hidden width, of feed-forward neurons and of heads, whose size stays; the first
            ones are copied. `None` keeps all.

    Returns:
        A model of the same class, dtype and mode, on the same device, with a config of its own, so that
        `save_pretrained` and `from_pretrained` work.

    Raises:
        ValueError: no transformers model; layers that are not there; a width that divides heads or neurons; an
            architecture whose widths are not known.

    >>> import transformers
    >>> config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=6, n_head=4, n_positions=32)
    >>> student = student_from(transformers.GPT2LMHeadModel(config), layers=2, width=0.5)
    >>> student.config.n_layer, student.config.n_embd, student.config.n_head
    (2, 8, 2)
    """
    from transformers import PreTrainedModel

    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"a {type(teacher).__name__} has no config to make smaller; student_from takes transformers models. Build "
            "the student yourself, and distil with any teacher"
        )
    if layers is None and (width is None or width == 1.0):
        raise ValueError("the student would be the teacher; write student_from(teacher, layers=3) or width=0.5")
    config = copy.deepcopy(teacher.config)
    kept = _choose_layers(config, layers)
    if width is not None:
        _scale_widths(config, width)
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)._from_config(config, attn_implementation=config._attn_implementation)
    for name, _ in list(student.named_children()):  # parts that were left out, as by add_pooling_layer=False
        if getattr(teacher, name) is None:
            setattr(student, name, None)
    student.to(teacher.device).train(teacher.training)
    buffers = dict(teacher.named_buffers())  # some are kept in float32 whatever the weights are, as rotary frequencies
    for parameter in student.parameters():
        parameter.data = parameter.data.to(teacher.dtype)
    for name, buffer in student.named_buffers():
        if name in buffers:
            buffer.data = buffer.data.to(buffers[name].dtype)
    _copy_weights(student, teacher, _stacks(student, teacher, kept), width is not None)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


# --- layers -----------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """The layers of a side that are kept, of all `total`."""

    indices: list[int]
    total: int


def _choose_layers(config: Any, layers: Any) -> dict[str, _Kept]:
    """Side (`""`, `encoder`, `decoder`) -> the teacher's layers that are kept; writes their number into the config."""
    if layers is None:
        return {}
    encodes = getattr(config, "is_encoder_decoder", False)
    if encodes != isinstance(layers, Mapping):
        write = "layers={'decoder': 2}" if encodes else "layers=3"
        raise ValueError(f"layers={layers!r} does not fit a {type(config).__name__}; write {write}")
    sides = dict(layers) if encodes else {"": layers}
    if unknown := set(sides) - set(_DEPTHS):
        raise ValueError(f"layers has {sorted(unknown)}; write layers={{'encoder': 2, 'decoder': 2}}")
    kept = {}
    for side, chosen in sides.items():
        name = next((n for n in _DEPTHS[side] if isinstance(getattr(config, n, None), int)), None)
        if name is None:
            raise ValueError(f"a {type(config).__name__} does not say how many {side} layers it has")
        total = getattr(config, name)
        indices = _indices(chosen, total, side)
        kept[side] = _Kept(indices, total)
        first = list(range(len(indices)))
        if getattr(config, "scale_attn_by_inverse_layer_idx", False) and indices != first:
            raise ValueError(
                f"scale_attn_by_inverse_layer_idx=True scales attention by a layer's index, which changes; "
                f"keep the first layers: layers={first}"
            )
        setattr(config, name, len(indices))
        if side == "encoder" and hasattr(config, "num_hidden_layers"):
            config.num_hidden_layers = len(indices)
        if not encodes:  # what the configuration says of each layer, such as layer_types
            for key, each in config.to_dict().items():
                named = "layer" in key or key == "attention_window"
                of_layers = named and isinstance(each, list) and len(each) == total
                if of_layers and isinstance(getattr(config, key, None), list):
                    setattr(config, key, [each[i] for i in indices])
            if getattr(config, "stage_names", None) and hasattr(config, "set_output_features_output_indices"):
                config.stage_names = config.stage_names[: len(indices) + 1]  # a backbone gives its last stage
                config.set_output_features_output_indices(out_features=None, out_indices=None)
    return kept


def _indices(chosen: Any, total: int, side: str) -> list[int]:
    where = f"{side} layers".strip()
    if isinstance(chosen, bool) or not isinstance(chosen, int | Sequence):
        raise ValueError(f"layers={chosen!r} is no number of {where}; write layers=3 or layers=[0, 2, 5]")
    if isinstance(chosen, int):
        if not 1 <= chosen <= total:
            raise ValueError(f"the teacher has {total} {where}, {chosen} are asked for; write 1 to {total}")
        return [0] if chosen == 1 else [round(i * (total - 1) / (chosen - 1)) for i in range(chosen)]
    indices = list(chosen)
    if not indices or any(not 0 <= i < total for i in indices) or len(set(indices)) != len(indices):
        raise ValueError(f"layers={indices} must be different indices of {total} {where}, 0 to {total - 1}")
    return indices


# --- widths -----------------------------------------------------------------------------------------------------------


def _scale_widths(config: Any, width: float) -> None:
    if not 0.0 < width <= 1.0:
        raise ValueError(f"width={width} is outside (0, 1]; write width=0.5")
    written = config.to_dict()
    own = {n for group in (_HIDDEN, _AS_HIDDEN, _HEADS, _INNER) for n in group if isinstance(written.get(n), int)}
    hidden, heads = next((n for n in _HIDDEN if n in own), None), [n for n in _HEADS if n in own]
    if hidden is None or not heads:
        raise ValueError(f"the widths of a {type(config).__name__} are not known; give layers= alone")
    own -= {n for n in own if n == "num_key_value_heads" and getattr(config, n) == 1}  # that of all queries stays
    for name in sorted(own):
        exact = getattr(config, name) * width
        if exact != int(exact) or exact < 1:
            raise ValueError(
                f"width={width} makes {name}={getattr(config, name)} to {exact:g}, and a size is whole; write a width "
                f"that all of {', '.join(f'{n}={getattr(config, n)}' for n in sorted(own))} can have"
            )
    for name in sorted(own):
        setattr(config, name, int(getattr(config, name) * width))


def _copy_weights(student: Any, teacher: Any, stacks: Mapping[str, list[int]], narrower: bool) -> None:
    """Copies each tensor of the teacher, or its first slices where the student is `narrower`, to where it belongs."""
    theirs, made = teacher.state_dict(), set(student._keys_to_ignore_on_save or ())
    taken = {_teachers_name(name, stacks) for name in student.state_dict()}
    if lost := [name for name in theirs if name not in taken and not _left_out(name, stacks)]:
        raise ValueError(
            f"the teacher's {lost[0]} has no place in the student; student_from does not know how a "
            f"{type(teacher).__name__} is cut"
        )
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            source = theirs.get(_teachers_name(name, stacks))
            if name in made and (source is None or source.shape != tensor.shape):
                continue  # a table that the class computes, and would compute again when it is loaded
            if (
                source is None
                or source.dim() != tensor.dim()
                or (not narrower and source.shape != tensor.shape)
                or any(a > b for a, b in zip(tensor.shape, source.shape, strict=True))
            ):
                shape = None if source is None else tuple(source.shape)
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} has no counterpart in the teacher ({_teachers_name(name, stacks)}: "
                    f"{shape}); student_from does not know how a {type(teacher).__name__} is cut"
                )
            if source.shape != tensor.shape and any(fused in name.lower() for fused in _OTHER_FUSED):
                raise ValueError(
                    f"{name} holds several matrices, and student_from does not know where each begins; give layers= "
                    "alone, without width="
                )
            parts = 1
            if any(f".{fused}." in f".{name}" for fused in _FUSED):
                parts = 2 if "crossattention" in name else 3  # queries lie apart there
            tensor.copy_(_first(source, tensor.shape, parts))


def _stacks(student: nn.Module, teacher: Any, kept: Mapping[str, _Kept]) -> dict[str, list[int]]:
    """Name of each list of layers -> the teacher's layers that it keeps; lists of other things stay whole."""
    found, sides = dict[str, list[int]](), set[str]()
    lists = {name: module for name, module in teacher.named_modules() if isinstance(module, nn.ModuleList)}
    for name, module in student.named_modules():
        side = next((s for s in ("encoder", "decoder") if s in kept and f".{s}." in f".{name}."), "")
        if name not in lists or side not in kept or any(name.startswith(f"{outer}.") for outer in found):
            continue
        indices, total = kept[side]
        if len(list(module.children())) == len(indices) and len(lists[name]) == total:
            found[name] = indices
            sides.add(side)
    shared = getattr(teacher.config, "num_hidden_groups", None) == 1  # ALBERT's layers are one
    if kept and (hasattr(teacher.config, "depths") or (sides != set(kept) and not shared)):
        raise ValueError(
            f"layers of a {type(teacher).__name__} are not one list whose length its config gives (they are stages, or "
            "groups), so that student_from cannot choose among them; build the student yourself, and distil with any "
            "teacher"
        )
    return found


def _layer(name: str, stacks: Mapping[str, list[int]]) -> tuple[str, int] | None:
    """The list in which a tensor's layer is, and the layer's index in it."""
    outer = next((one for one in stacks if name.startswith(f"{one}.")), None)
    return None if outer is None else (outer, int(name.removeprefix(f"{outer}.").partition(".")[0]))


def _left_out(name: str, stacks: Mapping[str, list[int]]) -> bool:
    """Whether a tensor of the teacher is of a layer that is not kept."""
    found = _layer(name, stacks)
    return found is not None and found[1] not in stacks[found[0]]


def _teachers_name(name: str, stacks: Mapping[str, list[int]]) -> str:
    """The student's name with the index of its layer replaced by the teacher's."""
    found = _layer(name, stacks)
    if found is None or "relative_attention_bias" in name:  # of T5, in the first layer for all of them
        return name
    outer, index = found
    return f"{outer}.{stacks[outer][index]}{name.removeprefix(f'{outer}.{index}')}"


def _first(source: Tensor, shape: torch.Size, parts: int) -> Tensor:
    """The first slices of `source`; of its last dimension, those of each of `parts` equal parts."""
    for dim, size in enumerate(shape):
        if dim == len(shape) - 1 and parts > 1:
            pieces = source.chunk(parts, dim)
            source = torch.cat([piece.narrow(dim, 0, size // parts) for piece in pieces], dim)
        else:
            source = source.narrow(dim, 0, size)
    return source

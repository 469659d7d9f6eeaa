"""What is cut out of a model, as a record in plain types, and cutting it: `replay_` does to a fresh model the same.

    {"layers": {list of blocks: {"of": n, "gone": [i, ...]}},
     "tensors": [[name, dimension, size, [[start, stop], ...] that stay], ...],
     "widths": [{"kind", "name", "of", "exact", "left", "members"}, ...],
     "gains": [[name, factor, eps], ...]}

The gains are those of RMSNorms over a width that is cut, with their new eps (`norms`).

Names are those after the layers are gone. What has its new size already is left as it is, so that a record may be
replayed on a model built from a configuration that says a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from .groups import Group
from .layers import drop_layers_, dropped_layers, renamed
from .norms import record_eps, rescale_gains_, rescaled_gains
from .widths import record_shape, record_widths

Record = dict[str, Any]


def plan(model: nn.Module, masks: Mapping[str, Tensor], groups: list[Group]) -> Record:
    """The record of what `masks` drop as a whole: layers, and units of `groups`.

    Raises:
        ValueError: the masks drop units that cannot be cut out.
    """
    dropped = dropped_layers(model, masks)
    parameters = select.named_parameters(model)
    sizes = {select.canonical_name(n): t.shape for n, t in (*model.named_parameters(), *model.named_buffers())}
    groups = [g for g in groups if any(renamed(m.name, dropped) is not None for m in g.members)]
    kept = [_kept(group, masks, parameters) for group in groups]
    left: dict[tuple[str, int], Tensor] = {}
    for group, keep in zip(groups, kept, strict=True):
        for member in group.members if not keep.all() else ():
            place = member.name, member.dim
            stays = left.setdefault(place, torch.ones(sizes[member.name][member.dim], dtype=torch.bool))
            stays[member.index[~keep]] = False
    rest = {name: mask for name, mask in masks.items() if renamed(name, dropped) is not None}
    _check_all_cut(parameters, rest, left)
    tensors = [
        [new, dim, len(stays), _runs(stays)]
        for (name, dim), stays in left.items()
        if (new := renamed(name, dropped)) is not None
    ]
    widths = []
    for group, keep in zip(groups, kept, strict=True):
        members = [new for m in group.members if (new := renamed(m.name, dropped)) is not None]
        name = (renamed(f"{group.name}.", dropped) or members[0].rpartition(".")[0]).rstrip(".")
        of_group = {"kind": group.kind, "name": name, "of": group.width, "exact": group.exact}
        widths.append({**of_group, "left": int(keep.sum()), "members": members})
    blocks: Any = {name: {"of": len(select.get_module(model, name)), "gone": gone} for name, gone in dropped.items()}  # type: ignore[arg-type]
    normalized = {m.name for g in groups if not g.exact for m in g.members}
    scaled = rescaled_gains(model, ((name, stays) for (name, _), stays in left.items() if name in normalized))
    gains = [[new, *rest] for name, *rest in scaled if (new := renamed(name, dropped)) is not None]
    return {"layers": blocks, "tensors": tensors, "widths": widths, "gains": gains}


def replay_(model: nn.Module, record: Record) -> None:
    """Cuts out of `model`, in place, what a record says.

    Raises:
        ValueError: the model does not have what the record names.
    """
    for name, layers in sorted(record["layers"].items(), reverse=True):
        blocks: Any = select.get_module(model, name)
        if len(blocks) == layers["of"]:
            drop_layers_(model, name, layers["gone"])
    changed = set()
    for name, dim, size, runs in record["tensors"]:
        layer, _, leaf = name.rpartition(".")
        old: Tensor | None = getattr(select.get_module(model, layer), leaf, None)
        if old is None:
            raise ValueError(f"{type(model).__name__} has no {name!r}, which was cut; it is another model")
        if old.shape[dim] == size:
            _cut(model, old, dim, torch.cat([torch.arange(*run) for run in runs]))
            changed.add(name)
    gains = record.get("gains", ())
    rescale_gains_(model, gains, changed)
    if changed:
        record_widths(model, record["widths"], changed)
        record_eps(model, gains)


def replay_steps_(model: nn.Module, records: Sequence[Record]) -> None:
    """Cuts out of `model` what records say that were made one after the other, each of what the one before had left.

    A model built from a configuration that counts the layers of the end does not have those of before: what earlier
    records say of layers that are gone later is left out, and their names are those of the end.
    """
    gone: list[dict[str, list[int]]] = []  # of each record, what the model does not have from the start
    for record in records:
        short = {}
        for name, layers in record["layers"].items():
            blocks: Any = select.get_module(model, name)
            if len(blocks) < layers["of"]:
                short[name] = layers["gone"]
        gone.append(short)
    for i, record in enumerate(records):

        def new(name: str, later: int = i + 1) -> str | None:
            found: str | None = name
            for dropped in gone[later:]:
                found = found if found is None else renamed(found, dropped)
            return None if found is None else found.rstrip(".")

        replay_(model, with_names(record, new))


def rebased(record: Record, at: str, below: str) -> Record:
    """The record of a module called `at`, for a model whose names are those below the prefix `below`."""

    def new(name: str) -> str | None:
        full = f"{at}.{name}" if at and name else at or name
        return full.removeprefix(below) if full.startswith(below) else None

    return with_names(record, new)


def with_names(record: Record, new: Callable[[str], str | None]) -> Record:
    """The record with other names; what has none is left out."""
    widths = []
    for width in record["widths"]:
        members = [m for member in width["members"] if (m := new(member)) is not None]
        if (name := new(width["name"])) is not None and members:
            widths.append({**width, "name": name, "members": members})
    layers = {n: blocks for name, blocks in record["layers"].items() if (n := new(name)) is not None}
    tensors = [[n, *rest] for name, *rest in record["tensors"] if (n := new(name)) is not None]
    gains = [[n, *rest] for name, *rest in record.get("gains", ()) if (n := new(name)) is not None]
    return {"layers": layers, "tensors": tensors, "widths": widths, "gains": gains}


def is_done(model: nn.Module, record: Record) -> bool:
    """Whether `model` has the sizes that the record leaves."""
    for name, layers in record["layers"].items():
        if len(select.get_module(model, name)) != layers["of"] - len(layers["gone"]):  # type: ignore[arg-type]
            return False
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    sizes = {select.canonical_name(name): tensor.shape for name, tensor in tensors.items()}
    left = {(name, dim): sum(stop - start for start, stop in runs) for name, dim, _, runs in record["tensors"]}
    return all(name in sizes and sizes[name][dim] == size for (name, dim), size in left.items())


def is_empty(record: Record) -> bool:
    """Whether nothing is cut."""
    return not record["layers"] and not record["tensors"]


def note_in_config(model: nn.Module, record: Record) -> None:
    """Adds the sizes that a record leaves to a transformers model's configuration, for `load_checkpoint`.

    Which positions stay is not in it: the weights that are saved beside it are theirs.
    """
    from .._quiet import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        config: Any = model.config
        sizes = [
            [name, dim, size, [[0, sum(stop - start for start, stop in runs)]]]
            for name, dim, size, runs in record["tensors"]
        ]
        config.pruned = [*(getattr(config, "pruned", None) or []), {**record, "tensors": sizes}]


def note_in_configs(root: nn.Module, at: str, record: Record) -> None:
    """`note_in_config` of the outermost transformers models in `root`, of what was cut in the module called `at`."""
    from .._quiet import PreTrainedModel

    noted: list[str] = []
    for name, module in select.named_modules(root):
        inside = any(not outer or name.startswith(f"{outer}.") for outer in noted)
        if isinstance(module, PreTrainedModel) and not inside:
            noted.append(name)
            own = rebased(record, at, f"{name}." if name else "")
            if not is_empty(own):
                note_in_config(module, own)


def _runs(keep: Tensor) -> list[list[int]]:
    """Where it is true, as [start, stop) pairs."""
    edges = torch.diff(keep.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return torch.stack([(edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]], 1).tolist()


def _dropped(mask: Tensor, dim: int) -> Tensor:
    """Boolean [size of dim]: the positions of which the mask keeps nothing."""
    return ~mask.cpu().movedim(dim, 0).flatten(1).any(1) if mask.dim() > 1 else ~mask.cpu()


def cuts_widths(model: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether masks drop positions of parameters that stay."""
    dropped = dropped_layers(model, masks)
    rest = [mask for name, mask in masks.items() if renamed(name, dropped) is not None]
    return any(_dropped(mask, dim).any() for mask in rest for dim in range(mask.dim()))


def _kept(group: Group, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Boolean [width] of the units that stay: those of which a mask keeps any weight."""
    keep = torch.zeros(group.width, dtype=torch.bool)
    for member in (m for m in group.members if m.name in parameters):  # masks say nothing of buffers
        if member.name in masks and not masks[member.name].any():
            continue  # of a block that is gone as a whole
        if member.name not in masks or masks[member.name].shape[member.dim] <= int(member.index.max()):
            return torch.ones_like(keep)
        keep |= ~_dropped(masks[member.name], member.dim)[member.index].all(1)
    return keep


def _check_all_cut(
    parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor], left: Mapping[tuple[str, int], Tensor]
) -> None:
    """Raises ValueError where a mask over one dimension drops a neuron that stays."""
    for name, mask in masks.items():
        for dim, size in enumerate(mask.shape):
            structured = name in parameters and size == mask.numel() < parameters[name].numel()
            if structured and (_dropped(mask, dim) & left.get((name, dim), torch.ones(size, dtype=torch.bool))).any():
                raise ValueError(
                    f"the masks drop neurons of {name!r} that cannot be cut out: masks of the same neurons are missing "
                    "or disagree, or were made with other example inputs; use the masks that prune_model_ returned"
                )


def _cut(model: nn.Module, old: Tensor, dim: int, positions: Tensor) -> None:
    cut = old.detach().index_select(dim, positions.to(old.device)).contiguous()
    new = nn.Parameter(cut, old.requires_grad) if isinstance(old, nn.Parameter) else cut
    modules: Iterable[Any] = model.modules()
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tied in [key for key, tensor in tensors.items() if tensor is old]:
                tensors[tied] = new
                record_shape(module)

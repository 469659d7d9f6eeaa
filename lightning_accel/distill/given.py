"""Whether the student is called with what the data give, which is what the teacher of a cache was asked about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import with_decoder_inputs, without_labels
from .keyed import Keyed, indices_of, split_key

_POSITIONS = ("position_ids", "cache_position")  # a model makes them itself where they are not given


def keyed_of(loader: Any) -> Keyed | None:
    """The dataset with keys that a loader reads from, through those around it."""
    data = getattr(loader, "dataset", None)
    while data is not None and not isinstance(data, Keyed):
        data = getattr(data, "dataset", None)
    return data


def samples_of(loader: Any, keys: Tensor | None) -> Any:
    """The batch of the samples with these keys, read and collated once more; `None` where the loader cannot say."""
    data, collate = keyed_of(loader), getattr(loader, "collate_fn", None)
    if data is None or collate is None or keys is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return split_key(collate([data[i] for i in indices_of(keys).tolist()]))[0]


def check_given(batch: Any, student: nn.Module, given: Mapping[str, Any], constants: Iterable[Tensor] = ()) -> None:
    """Raises ValueError where the student is called with other tensors than those of the batch.

    An argument with the name of an entry must be that entry; others may be any tensor of the batch. Of a tuple, whose
    first item the teacher was asked with, that item must be among them. The same numbers in another shape are no
    others. Arguments that are not in the batch may be `constants`, positions, and masks or integers of one value.

    Args:
        batch: from `samples_of`.
        student: whose call it is; it decides how labels become decoder inputs.
        given: its arguments by name.
        constants: tensors that depend on no sample.
    """
    entries = with_decoder_inputs(student, dict(batch)) if isinstance(batch, Mapping) else {}
    given, fixed = without_labels(given), {id(tensor) for tensor in constants}
    for name, value in given.items():
        known = list(tensors_in(entries.get(name, entries or batch)))
        for tensor in tensors_in(value):
            free = name not in entries and (id(tensor) in fixed or _says_nothing(name, tensor))
            if not free and not any(_same(tensor, other) for other in known):
                raise ValueError(_changed(name, tensor))
    if isinstance(batch, tuple | list) and batch:
        passed = list(tensors_in(given))
        for tensor in tensors_in(batch[0]):
            if passed and not any(_same(one, tensor) for one in passed):
                raise ValueError(_changed(next(iter(given)), passed[0]))


def _changed(name: str, tensor: Tensor) -> str:
    return (
        f"the student is called with {name} {tuple(tensor.shape)}, which is not what the data give for these keys: "
        "training_step, a hook of the batch's transfer or a dataset around Keyed changes it, and the teacher was asked "
        "before that. Change samples below Keyed, or in the collate function, and build the cache of those; or give "
        "the teacher itself"
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in mappings, also transformers' BatchEncoding, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _same(given: Tensor, read: Tensor) -> bool:
    """Whether these are the same numbers, whatever shape, device or precision they are given in."""
    if given.numel() != read.numel():
        return False
    one, other = (t.detach().cpu().to(given.dtype).flatten() for t in (given, read))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # by bytes: NaN is NaN


def _says_nothing(name: str, tensor: Tensor) -> bool:
    """Whether an argument that is not in the batch is one that a model does without."""
    if name in _POSITIONS or not tensor.numel():
        return True
    masks = "mask" in name or not tensor.is_floating_point()
    return masks and bool((tensor == tensor.flatten()[0]).all())


@contextmanager
def without_autocast() -> Iterator[None]:
    """As samples are read in training: `autocast` around the building of a cache is for its teacher."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield

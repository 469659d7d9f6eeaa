"""Keys that travel with the samples, so that no shuffling, worker or collate function can misalign a cache."""

from __future__ import annotations

import copy
import hashlib
import pickle
import random
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

KEY = "sample_key"  # in a batch that is a mapping; in a tuple it is the last item

_PROBES = 8  # samples that stand for the data in its fingerprint
_INDEX, _HASH = 30, 25  # bits of the index, and of the sample's hash above it
_MARK, _LONE = 0x5A, 0x5B  # what stands on top; of a sample that is neither a mapping nor a tuple

_LINES = (
    "wrap the dataset before it is loaded:\n"
    "    data = lightning_accel.Keyed(dataset)\n"
    "    cache = lightning_accel.TeacherCache.build('cache', teacher, data, config)\n"
    "    loader = DataLoader(data, batch_size=32, shuffle=True)\n"
    "A collate function of your own passes the key on: {'sample_key': torch.tensor([s['sample_key'] for s in samples])}"
)


class Keyed(Dataset):
    """A dataset whose samples carry a key: a mapping gets an entry `sample_key`, a tuple one more item.

    `Distillation` takes the key out before `training_step` sees the batch. A key is an int64: a mark by which it is
    known (labels, times and other numbers lack it), 25 bits of a hash of the sample, by which a change is noticed, and
    30 bits of its index.

    Args:
        dataset: samples by index, always the same ones.
        views: how often each sample is there, each time with random augmentation of its own. The augmentation of a
            view is drawn from seeds (of torch, NumPy and `random`) that its key determines, and so is the same in
            each epoch; an epoch is `views` times as long. `None` for a dataset without random augmentation.

    Raises:
        ValueError: no length or no access by index; two readings of a sample differ and `views` is `None`.

    >>> data = Keyed([(torch.zeros(2), 0), (torch.ones(2), 1)])
    >>> x, label, key = data[1]
    >>> label, key % 2**30
    (1, 1)
    """

    def __init__(self, dataset: Any, views: int | None = None) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ValueError(
                f"a {type(dataset).__name__} has no length or no samples by index, and a cache needs both: keys are "
                "indices. Write the samples to a list or a map-style dataset first"
            )
        if views is not None and (isinstance(views, bool) or views < 1):
            raise ValueError(f"views={views} must be at least 1; write views=4")
        if not 0 < len(dataset) * (views or 1) < 2**_INDEX:
            raise ValueError(f"the dataset has {len(dataset)} samples; a cache is of 1 to 2^{_INDEX}, views counted")
        self.dataset, self.views = dataset, views
        if hasattr(self._read(0), "_fields"):
            raise ValueError(
                f"samples of the {type(dataset).__name__} are named tuples, which a key cannot join; make them "
                "mappings, as sample._asdict() does, or plain tuples"
            )
        digests = [[digest(self._read(i)) for i in self.probes()] for _ in range(2)]
        if digests[0] != digests[1]:
            write = "Take the augmentation out, or let the key determine it: Keyed(dataset, views=4)"
            if views is not None:
                write = "It draws from a generator of its own; draw from torch's, NumPy's or random's, which are seeded"
            raise ValueError(
                f"two readings of a sample of the {type(dataset).__name__} differ: it augments at random, and a cached "
                f"teacher saw another sample. {write}"
            )
        self.fingerprint = digest((len(dataset), views, digests[0]))

    def __len__(self) -> int:
        return len(self.dataset) * (self.views or 1)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        sample = self._read(index)
        key = _key(sample, index)
        if isinstance(sample, Mapping):
            return {**sample, KEY: key}
        return (*sample, key) if isinstance(sample, tuple | list) else (sample, key)

    def _read(self, index: int) -> Any:
        if self.views is None:
            return self.dataset[index]
        with _seeded(index):
            return self.dataset[index % len(self.dataset)]

    def probes(self) -> list[int]:
        """Indices of the samples that stand for the data in its fingerprint."""
        return spread(len(self))


def spread(n: int) -> list[int]:
    """A few indices of `n`, as far apart as they can be."""
    return sorted({round(i * (n - 1) / (_PROBES - 1)) for i in range(_PROBES)})


def _key(sample: Any, index: int) -> int:
    mark = _MARK if isinstance(sample, Mapping | tuple | list) else _LONE
    return (mark << _HASH | int(digest(sample)[:16], 16) % 2**_HASH) << _INDEX | index


def unchanged(sample: Any) -> bool:
    """Whether a sample that carries a key is the one that the key was made of; one without is refused elsewhere."""
    made_of: Any = sample
    if isinstance(sample, Mapping):
        key = sample.get(KEY)
    elif isinstance(sample, tuple | list) and len(sample) > 1:
        key, made_of = sample[-1], sample[:-1]
    else:
        return True
    if not isinstance(key, int) or key >> _HASH + _INDEX not in (_MARK, _LONE):
        return True
    made_of = made_of[0] if key >> _HASH + _INDEX == _LONE else made_of
    return _key(made_of, key & 2**_INDEX - 1) == key


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import numpy as np

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def digest(value: Any) -> str:
    """A hash of a sample or a batch: of tensors, arrays, numbers, text and what contains them; keys are left out."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                if name != KEY:
                    sha.update(repr(name).encode())
                    feed(value[name])
        elif isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha.update(repr((tuple(value.shape), value.dtype)).encode())
            sha.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
        elif isinstance(value, tuple | list):
            sha.update(repr(len(value)).encode())
            for item in value:
                feed(item)
        elif isinstance(value, str | int | float | bool | bytes | None):
            sha.update(repr(value).encode())
        elif hasattr(value, "tobytes"):  # NumPy arrays, images
            sha.update(repr((type(value).__name__, getattr(value, "shape", getattr(value, "size", None)))).encode())
            sha.update(value.tobytes())
        else:
            sha.update(pickle.dumps(value))

    feed(value)
    return sha.hexdigest()


def is_key(value: Any) -> bool:
    """Whether `value` is what a collate function makes of keys: int64 [batch] or a list of ints, all with the mark."""
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1 or not len(value):
        return False
    marks = value >> _HASH + _INDEX
    return bool(((marks == _MARK) | (marks == _LONE)).all())


def split_key(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch without its keys, and the keys [batch], on the CPU; `None` where it has none.

    >>> split_key({"x": torch.zeros(1), "sample_key": torch.tensor([7])})
    ({'x': tensor([0.])}, tensor([7]))
    """
    if isinstance(batch, Mapping) and KEY in batch:
        keys = batch[KEY]
        rest: Any = {name: value for name, value in batch.items() if name != KEY}
        if isinstance(batch, MutableMapping) and type(batch) is not dict:  # transformers' BatchEncoding has methods
            rest = copy.copy(batch)
            del rest[KEY]
    elif isinstance(batch, tuple | list) and len(batch) > 1 and is_key(batch[-1]):
        if hasattr(batch, "_fields"):
            raise ValueError(
                f"the collate function makes a {type(batch).__name__}, a named tuple, of samples and keys, which "
                "training_step could not take without the key; make a plain tuple or a mapping"
            )
        keys, rest = torch.as_tensor(batch[-1]), type(batch)(batch[:-1])
        rest = rest[0] if len(rest) == 1 and bool((keys >> _HASH + _INDEX == _LONE).all()) else rest
    else:
        return batch, None
    return rest, torch.as_tensor(keys).cpu()


def indices_of(keys: Tensor | None) -> Tensor:
    """The indices of the samples whose keys these are.

    Raises:
        ValueError: there are no keys.
    """
    if keys is None or not is_key(keys):
        raise ValueError(f"the batch has no sample keys, so that nothing can be looked up in the cache; {_LINES}")
    return keys & 2**_INDEX - 1

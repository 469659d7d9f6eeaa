"""What a teacher puts out for each sample, asked once and read from disk."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import select
from ..loaded import LoadedModel
from .builder import Builder
from .config import DistillConfig
from .given import keyed_of, without_autocast
from .keyed import Keyed, digest, indices_of, split_key, spread, unchanged
from .losses import TopK
from .store import FORMAT, Stream, check_size, locked, mapped, read_manifest
from .teacher import Answer, LiveTeacher

_AGAIN = (
    "the data or its preprocessing has changed since, or augments at random: build another, "
    "TeacherCache.build('another', teacher, data, config)"
)


class TeacherCache:
    """A teacher's answers on disk: top-k logits and hidden states by sample, read without the teacher.

    Built once by `TeacherCache.build`; `TeacherCache(directory)` opens it, and `Distillation(config, teacher=cache)`
    trains from it. With `top_k` the loss is bit by bit that of the live teacher with the same `top_k`, as long as the
    teacher's own numbers do not depend on how samples are batched.

    Args:
        directory: of a complete cache.

    Raises:
        ValueError: there is none, it is incomplete, truncated or of another format.

    >>> data = Keyed([(torch.randn(4), i % 2) for i in range(6)])
    >>> config = DistillConfig(top_k=2)
    >>> cache = TeacherCache.build("cache", nn.Linear(4, 3), data, config, progress=False)
    >>> len(cache), cache.read(torch.tensor([data[3][-1]])).logits.indices.shape
    (6, torch.Size([1, 2]))
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        if not self.manifest["complete"]:
            raise ValueError(
                f"the cache {self.directory} is incomplete; write TeacherCache.build({str(directory)!r}, teacher, "
                "data, config), which continues where it was stopped"
            )
        self._streams = {
            name: Stream(self.directory, i, spec) for i, (name, spec) in enumerate(self.manifest["streams"].items())
        }
        for stream in self._streams.values():
            stream.open(len(self))
        check_size(self.directory / "keys", 8 * len(self))
        self._keys = mapped(self.directory / "keys", None, torch.int64)

    def __len__(self) -> int:
        return self.manifest["samples"]

    @classmethod
    def build(
        cls,
        directory: str | Path,
        teacher: nn.Module | LoadedModel,
        data: Keyed,
        config: DistillConfig,
        *,
        batch_size: int = 32,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        progress: bool = True,
    ) -> TeacherCache:
        """Asks the teacher about every sample, or opens the cache if that was done; resumes after a kill.

        Args:
            directory: made if it is not there.
            teacher: takes the inputs that the student will be called with, as `AccelModule` takes them from a batch:
                those of a mapping, without labels, or the first item of a tuple.
            data: the dataset that will be trained on.
            config: `temperature`, `top_k`, `drawn` and the teacher's layers of `hidden`, a mapping, are what is cached;
                the same config goes to `Distillation`.
            batch_size: samples that the teacher is asked about at once.
            collate_fn: as of the DataLoader that trains; default torch's own.
            progress: show a progress bar.

        Raises:
            ValueError: the directory holds the answers of another teacher, config or data; the collate function is
                random; `top_k` and `hidden` are None, `hidden` is no mapping, or attention maps are asked for.
            OSError: the disk is full; the same call continues.
        """
        _check(data, config)
        collate = collate_fn or torch.utils.data.default_collate
        live = LiveTeacher(teacher, config.hidden.values() if isinstance(config.hidden, Mapping) else ())
        wanted = {
            "format": FORMAT,
            "teacher": fingerprint(teacher),
            "data": data.fingerprint,
            "preprocessing": _preprocessing(data, collate),
            "samples": len(data),
            "temperature": config.temperature,
            "top_k": config.top_k,
            "drawn": config.drawn,
            "hidden": sorted(set(config.hidden.values())) if isinstance(config.hidden, Mapping) else [],
            "batch_size": batch_size,
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with locked(directory):
                if (directory / "cache.json").is_file():
                    _check_same(directory, read_manifest(directory), wanted)
                Builder(directory, wanted, live, data, collate).run(progress)
        finally:
            live.remove()
        return cls(directory)

    def check(self, config: DistillConfig) -> None:
        """Raises ValueError where a config asks for what the cache does not hold."""
        lines = "build another: TeacherCache.build('another', teacher, data, config)"
        _check_config(config)
        assert not isinstance(config.hidden, str)
        for name in ("temperature", "top_k", "drawn"):
            if getattr(config, name) != self.manifest[name]:
                raise ValueError(
                    f"the cache {self.directory} was built with {name}={self.manifest[name]}, the config says "
                    f"{getattr(config, name)}; write DistillConfig({name}={self.manifest[name]}), or {lines}"
                )
        missing = set((config.hidden or {}).values()) - set(self.manifest["hidden"])
        if missing:
            raise ValueError(
                f"the cache {self.directory} holds no states of {sorted(missing)}, only of {self.manifest['hidden']}; "
                f"{lines}"
            )

    def check_loader(self, loader: Any) -> None:
        """Raises ValueError where a DataLoader gives other samples than the cache was built with.

        Reads a few samples. Of a loader without a dataset of its own nothing is known before its first batch, whose
        keys say of which data they are.
        """
        data = keyed_of(loader)
        outermost: Any = getattr(loader, "dataset", None)
        if data is None:
            return
        if getattr(loader, "batch_sampler", loader) is None:
            raise ValueError(
                "DataLoader(batch_size=None) gives samples or batches of the dataset's own, and a cache is found by a "
                "key of each sample; let the loader make the batches: DataLoader(data, batch_size=32)"
            )
        if data.fingerprint != self.manifest["data"]:
            raise ValueError(f"the samples are not those that the cache {self.directory} was built with; {_AGAIN}")
        around = outermost is not data and hasattr(outermost, "__getitem__") and hasattr(outermost, "__len__")
        if around and not all(unchanged(outermost[i]) for i in spread(len(outermost))):
            raise ValueError(
                f"a {type(outermost).__name__} changes samples after they were given their keys, and the teacher saw "
                "them before; put Keyed around it: Keyed(dataset), or Keyed(dataset, views=4) where it augments"
            )
        collate = getattr(loader, "collate_fn", None)
        if collate is not None and _preprocessing(data, collate) != self.manifest["preprocessing"]:
            raise ValueError(
                f"the DataLoader's collate_fn gives other inputs than the cache {self.directory} was built with; "
                "build it with TeacherCache.build(..., collate_fn=loader.collate_fn)"
            )

    def read(self, keys: Tensor | None) -> Answer:
        """The teacher's answer for the samples with these keys [batch]: positions of all, one after the other.

        Raises:
            ValueError: no keys, or samples that have changed.
        """
        indices = indices_of(keys)
        known = indices < len(self)
        changed = ~known | (self._keys[indices * known] != keys)
        if changed.any():
            raise ValueError(
                f"sample {int(indices[changed][0])} is not the one that the cache {self.directory} was built with; "
                f"{_AGAIN}"
            )
        read = {name: stream.read(indices) for name, stream in self._streams.items()}
        logits = None
        if "" in read:
            (values, classes, tail), _ = read[""]
            spec = self.manifest["streams"][""]
            logits = TopK(values, classes, tail, spec["classes"], self.manifest["temperature"], spec["drawn"])
        hidden = {name: parts[0] for name, (parts, _) in read.items() if name}
        return Answer(logits, hidden, lengths={name: lengths for name, (_, lengths) in read.items()})


# --- what a cache is bound to -----------------------------------------------------------------------------------------


def fingerprint(teacher: nn.Module | LoadedModel) -> str:
    """A hash of a teacher: of each module its class, settings and tensors; or an artifact's manifest.

    Settings are what its `repr` says, attributes with the names of its constructor's arguments, and a transformers
    model's configuration. What a `forward` of one's own takes from elsewhere does not count.
    """
    if isinstance(teacher, LoadedModel):
        return digest(json.dumps(teacher.manifest, sort_keys=True))
    sha, configs = hashlib.sha256(), dict[int, Any]()
    for name, module in select.named_modules(teacher):
        sha.update(repr((name, type(module).__name__, module.extra_repr(), _settings(module))).encode())
        for part in (module._parameters, module._buffers):
            for key, tensor in part.items():
                sha.update(key.encode())
                sha.update(digest(tensor).encode())
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            configs[id(config)] = config
    for config in configs.values():
        elsewhere = {"_name_or_path", "transformers_version"}
        said = {name: value for name, value in config.to_dict().items() if name not in elsewhere}
        sha.update(json.dumps(said, sort_keys=True, default=str).encode())
    return sha.hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in inspect.signature(type(module).__init__).parameters:
        value = vars(module).get(name)
        if inspect.isroutine(value):
            found[name] = value.__qualname__
        elif isinstance(value, str | int | float | tuple | list):
            found[name] = value
    return found


def _preprocessing(data: Keyed, collate: Callable[[list[Any]], Any]) -> str:
    """A hash of what the collate function makes of a few samples, of each alone and of all in a batch.

    Raises:
        ValueError: it does not make the same of them twice.
    """
    groups = [[i] for i in data.probes()] + [data.probes()]
    with without_autocast():
        once, again = ([digest(split_key(collate([data[i] for i in some]))[0]) for some in groups] for _ in range(2))
    if once != again:
        raise ValueError(
            "the collate function gives another batch each time for the same sample, as one does that masks at random, "
            "and a cached teacher saw another one; augment in the dataset: Keyed(dataset, views=4)"
        )
    return digest(once)


def _check(data: Any, config: DistillConfig) -> None:
    if not isinstance(data, Keyed):
        raise ValueError(f"a {type(data).__name__} yields no keys; write data = Keyed(dataset), and train on data too")
    _check_config(config)


def _check_config(config: DistillConfig) -> None:
    """Raises ValueError where a config asks for what no cache holds."""
    if config.top_k is None and not config.hidden:
        raise ValueError("a cache keeps the likeliest classes; write DistillConfig(top_k=32)")
    if config.top_k is None and config.alpha != 0.0:
        raise ValueError(
            f"alpha={config.alpha} weighs logits, and with top_k=None a cache keeps none; write top_k=32, or "
            "alpha=0.0 for hidden states alone"
        )
    if config.attention:
        raise ValueError(_not_cached(config.attention))
    if isinstance(config.hidden, str):
        raise ValueError(_needs_names(config.hidden))


def _not_cached(layers: Any) -> str:
    wanted = repr(layers) if isinstance(layers, str) else f"of the teacher's {sorted(set(layers.values()))}"
    return (
        f"attention maps ({wanted}) are not cached: they grow with the square of the length; give the teacher itself, "
        "Distillation(config, teacher=teacher), or compare hidden states, attention=None"
    )


def _needs_names(layers: str) -> str:
    return (
        f"a cache needs the names of the teacher's layers, and {layers!r} depends on the student; write "
        f"hidden=layer_map(student, teacher, {layers!r}), from lightning_accel"
    )


def _check_same(directory: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    named = {
        "teacher": "another teacher (its classes, settings or weights differ)",
        "data": "other data",
        "preprocessing": "another collate function",
    }
    for name, value in wanted.items():
        if manifest.get(name) != value and not (name == "batch_size" and manifest["complete"]):
            what = named.get(name, f"{name}={manifest.get(name)}, not {value}")
            raise ValueError(
                f"the cache {directory} was built with {what}; give another directory, or delete this one to build it "
                "again"
            )

"""What a teacher puts out for each sample, written once and mapped into memory.

    cache.json            what it is of: fingerprints of teacher, data and preprocessing; temperature, top_k, layers
    keys                  int64, of each sample, with a hash of it
    logits.lengths        int32, positions of each sample, in the order of the keys
    logits.values/.indices/.tail          float32 [positions, k], int32 [positions, k], float32 [positions]
    hidden0.lengths, hidden0.values ...   the states of a layer, in the teacher's dtype [positions, width]

Samples follow each other in the order of their keys, padding left out, so that lengths may vary. A batch is complete
once its lengths are on disk: they are written last, and what lies behind them is cut off when a build is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..inputs import inputs_of_batch, split_inputs, with_decoder_inputs
from ..loaded import LoadedModel
from .compare import positions_of
from .config import DistillConfig
from .keyed import Keyed, digest, indices_of, split_key
from .losses import TopK, top_k_of
from .teacher import Answer, LiveTeacher

FORMAT = 1

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
        self.manifest = _read_manifest(self.directory)
        if not self.manifest["complete"]:
            raise ValueError(
                f"the cache {self.directory} is incomplete; write TeacherCache.build({str(directory)!r}, teacher, "
                "data, config), which continues where it was stopped"
            )
        self._streams = {
            name: _Stream(self.directory, i, spec) for i, (name, spec) in enumerate(self.manifest["streams"].items())
        }
        for stream in self._streams.values():
            stream.open(len(self))
        _check_size(self.directory / "keys", 8 * len(self))
        self._keys = _mapped(self.directory / "keys", None, torch.int64)

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
            config: `temperature`, `top_k` and the teacher's layers of `hidden`, a mapping, are what is cached;
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
            "hidden": sorted(set(config.hidden.values())) if isinstance(config.hidden, Mapping) else [],
            "batch_size": batch_size,
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(directory):
                if (directory / "cache.json").is_file():
                    _check_same(directory, _read_manifest(directory), wanted)
                _Builder(directory, wanted, live, data, collate).run(progress)
        finally:
            live.remove()
        return cls(directory)

    def check(self, config: DistillConfig, classes: int | None = None) -> None:
        """Raises ValueError where a config asks for what the cache does not hold."""
        lines = "build another: TeacherCache.build('another', teacher, data, config)"
        if config.attention:
            raise ValueError("attention maps are not cached; give the teacher itself, or write attention=None")
        if isinstance(config.hidden, str):
            raise ValueError(_needs_names(config.hidden))
        for name in ("temperature", "top_k"):
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
        data = getattr(loader, "dataset", None)
        while data is not None and not isinstance(data, Keyed):
            data = getattr(data, "dataset", None)
        if data is None:
            return
        if data.fingerprint != self.manifest["data"]:
            raise ValueError(f"the samples are not those that the cache {self.directory} was built with; {_AGAIN}")
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
            logits = TopK(values, classes, tail, self.manifest["streams"][""]["classes"], self.manifest["temperature"])
        hidden = {name: parts[0] for name, (parts, _) in read.items() if name}
        return Answer(logits, hidden, lengths={name: lengths for name, (_, lengths) in read.items()})


# --- what a cache is bound to -----------------------------------------------------------------------------------------


def fingerprint(teacher: nn.Module | LoadedModel) -> str:
    """A hash of a teacher: its class and its weights, or an artifact's manifest."""
    if isinstance(teacher, LoadedModel):
        return digest(json.dumps(teacher.manifest, sort_keys=True))
    sha = hashlib.sha256(type(teacher).__name__.encode())
    for name, tensor in teacher.state_dict().items():
        sha.update(name.encode())
        sha.update(digest(tensor).encode())
    return sha.hexdigest()


def _preprocessing(data: Keyed, collate: Callable[[list[Any]], Any]) -> str:
    """A hash of what the collate function makes of a few samples.

    Raises:
        ValueError: it does not make the same of them twice.
    """
    once, again = ([digest(split_key(collate([data[i]]))[0]) for i in data.probes()] for _ in range(2))
    if once != again:
        raise ValueError(
            "the collate function gives another batch each time for the same sample, as one does that masks at random, "
            "and a cached teacher saw another one; augment in the dataset: Keyed(dataset, views=4)"
        )
    return digest(once)


def _check(data: Any, config: DistillConfig) -> None:
    if not isinstance(data, Keyed):
        raise ValueError(f"a {type(data).__name__} yields no keys; write data = Keyed(dataset), and train on data too")
    if config.top_k is None and not config.hidden:
        raise ValueError("a cache keeps the likeliest classes; write DistillConfig(top_k=32)")
    if config.attention:
        raise ValueError("attention maps are not cached; give the teacher itself, or write attention=None")
    if isinstance(config.hidden, str):
        raise ValueError(_needs_names(config.hidden))


def _needs_names(layers: str) -> str:
    return (
        f"a cache needs the names of the teacher's layers, and {layers!r} depends on the student; write "
        f"hidden=layer_map(student, teacher, {layers!r}), from lightning_accel"
    )


def _check_same(directory: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    named = {
        "teacher": "another teacher (its class or weights differ)",
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


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / "cache.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no cache; write TeacherCache.build({str(directory)!r}, teacher, data, config)"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{directory / 'cache.json'} is damaged ({error}); delete the directory, build again"
        ) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"the cache {directory} has format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def _write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    beside = directory / "cache.json.new"
    beside.write_text(json.dumps(manifest, indent=1))
    os.replace(beside, directory / "cache.json")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process builds, the others wait; the lock goes with the process."""
    import fcntl

    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- on disk ----------------------------------------------------------------------------------------------------------


class _Stream:
    """The files of one output: lengths, and parts with a row a position."""

    def __init__(self, directory: Path, index: int, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        stem = "logits" if "classes" in spec else f"hidden{index}"
        self.lengths_file = directory / f"{stem}.lengths"
        self.parts = [
            (directory / f"{stem}.{name}", width, getattr(torch, dtype)) for name, width, dtype in spec["parts"]
        ]

    def files(self, lengths: Tensor) -> dict[Path, int]:
        """The size in bytes that each file must have."""
        positions = int(lengths.sum())
        sizes = {file: positions * (width or 1) * dtype.itemsize for file, width, dtype in self.parts}
        return {self.lengths_file: 4 * len(lengths)} | sizes

    def written_lengths(self) -> Tensor:
        """Lengths of the samples that are complete, int64."""
        size = self.lengths_file.stat().st_size if self.lengths_file.exists() else 0
        if size < 4:
            return torch.zeros(0, dtype=torch.int64)
        return torch.from_file(str(self.lengths_file), size=size // 4, dtype=torch.int32).long()

    def open(self, samples: int) -> None:
        """Maps the files into memory.

        Raises:
            ValueError: they are not as long as they must be.
        """
        self.lengths = self.written_lengths()
        for file, size in (self.files(self.lengths) | {self.lengths_file: 4 * samples}).items():
            _check_size(file, size)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.rows = [_mapped(file, width, dtype) for file, width, dtype in self.parts]

    def read(self, indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """Rows of the samples, one after the other, and how many belong to each."""
        lengths = self.lengths[indices]
        before = lengths.cumsum(0) - lengths
        offset = torch.arange(int(lengths.sum())) - before.repeat_interleave(lengths)
        rows = self.starts[indices].repeat_interleave(lengths) + offset
        return [part[rows] for part in self.rows], lengths


def _check_size(file: Path, size: int) -> None:
    found = file.stat().st_size if file.exists() else 0
    if found != size:
        raise ValueError(
            f"the cache's {file} has {found} bytes, expected {size}: it is truncated or damaged; delete "
            f"{file.parent} and build it again"
        )


def _mapped(file: Path, width: int | None, dtype: torch.dtype) -> Tensor:
    """[positions, width], or [positions] where there is no width."""
    size = file.stat().st_size // dtype.itemsize
    flat = torch.from_file(str(file), size=size, dtype=dtype) if size else torch.zeros(0, dtype=dtype)
    return flat if width is None else flat.view(-1, width)


class _Builder:
    """Asks the teacher about what is not on disk yet."""

    def __init__(
        self, directory: Path, manifest: dict[str, Any], live: LiveTeacher, data: Keyed, collate: Callable[..., Any]
    ) -> None:
        self.directory, self.live, self.data, self.collate = directory, live, data, collate
        self.manifest = manifest
        self.streams: dict[str, _Stream] = {}

    def run(self, progress: bool) -> None:
        """Builds what is missing."""
        batch, total = self.manifest["batch_size"], len(self.data)
        done = self._resume()
        if done == total:
            return
        starts: Any = range(done, total, batch)
        if progress:
            from rich.progress import track

            starts = track(starts, f"asking the teacher about {total - done} samples", total=len(starts))
        with self._explain_full_disk():
            files: dict[Path, BinaryIO] = {}
            try:
                for start in starts:
                    self._append(*self._ask(range(start, min(start + batch, total))), files)
            finally:
                for file in files.values():
                    file.close()
            _write_manifest(self.directory, self.manifest | {"streams": self._specs(), "complete": True})

    def _specs(self) -> dict[str, Any]:
        return {name: stream.spec for name, stream in self.streams.items()}

    def _resume(self) -> int:
        """Number of samples that are complete, after cutting off what lies behind them."""
        if not (self.directory / "cache.json").is_file():
            return 0
        manifest = _read_manifest(self.directory)
        if manifest["complete"]:
            return len(self.data)
        for i, (name, spec) in enumerate(manifest["streams"].items()):
            self.streams[name] = _Stream(self.directory, i, spec)
        lengths = {name: stream.written_lengths() for name, stream in self.streams.items()}
        done = min(len(one) for one in lengths.values())
        done -= done % self.manifest["batch_size"]  # the same batches as without the break
        sizes = {self.directory / "keys": 8 * done}
        for name, stream in self.streams.items():
            sizes |= stream.files(lengths[name][:done])
        for file, size in sizes.items():
            if (file.stat().st_size if file.exists() else 0) < size:
                raise ValueError(f"{file} is shorter than what was written; delete {self.directory}, build again")
            if file.exists():
                os.truncate(file, size)
        return done

    def _ask(self, indices: range) -> tuple[Tensor, dict[str, tuple[list[Tensor], Tensor]]]:
        """Keys of the samples of one batch, and parts and lengths of each stream."""
        batch, keys = split_key(self.collate([self.data[i] for i in indices]))
        if indices_of(keys).tolist() != list(indices):
            raise ValueError("the collate function reorders samples or their keys; give one that keeps the order")
        model, top_k = self.live.model, self.manifest["top_k"]
        given = with_decoder_inputs(model, dict(batch)) if isinstance(batch, Mapping) else batch  # type: ignore[arg-type]
        answer = self.live(*split_inputs(inputs_of_batch(model, given) if isinstance(model, nn.Module) else given))
        logits = answer.logits if isinstance(answer.logits, Tensor) else None
        if logits is None and top_k is not None:
            raise ValueError(f"the teacher, a {type(model).__name__}, puts out no logits; give a model with a head")
        named = given if isinstance(given, Mapping) else {}
        positions = positions_of(model, named, batch, logits, causal=False)
        found: dict[str, tuple[list[Tensor], Tensor]] = {}
        if logits is not None and top_k is not None:
            flat, lengths = _rows(logits, positions.of(logits))
            kept = top_k_of(flat, top_k, self.manifest["temperature"])
            self._declare("", [("values", kept.values), ("indices", kept.indices.int()), ("tail", kept.tail)], kept)
            found[""] = [kept.values, kept.indices.int(), kept.tail], lengths
        for name, state in answer.hidden.items():
            flat, lengths = _rows(state, positions.of(state, name))
            self._declare(name, [("values", flat)])
            found[name] = [flat], lengths
        if not (self.directory / "cache.json").is_file():
            _write_manifest(self.directory, self.manifest | {"streams": self._specs(), "complete": False})
        return torch.as_tensor(keys), found

    def _declare(self, name: str, parts: list[tuple[str, Tensor]], kept: TopK | None = None) -> None:
        if name not in self.streams:
            widths = [(n, t.shape[-1] if t.dim() > 1 else None, str(t.dtype).removeprefix("torch.")) for n, t in parts]
            spec: dict[str, Any] = {"parts": widths} | ({"classes": kept.classes} if kept is not None else {})
            self.streams[name] = _Stream(self.directory, len(self.streams), spec)

    def _append(
        self, keys: Tensor, answers: Mapping[str, tuple[list[Tensor], Tensor]], files: dict[Path, BinaryIO]
    ) -> None:
        """Appends a batch to the files; lengths are written when all else is: they say what is complete."""
        rows: list[tuple[Path, Tensor]] = [(self.directory / "keys", keys)]
        ends: list[tuple[Path, Tensor]] = []
        for name, (parts, lengths) in answers.items():
            stream = self.streams[name]
            rows += [(file, part) for (file, *_), part in zip(stream.parts, parts, strict=True)]
            ends.append((stream.lengths_file, lengths.int()))
        for written in (rows, ends):
            for path, tensor in written:
                if path not in files:
                    files[path] = open(path, "ab")  # noqa: SIM115  closed by `run`
                files[path].write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            for path, _ in written:
                files[path].flush()

    @contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"the cache {self.directory} could not be written ({error.strerror}); free space (what is written is "
                "kept), and run the same line again: it continues",
            ) from error


def _rows(tensor: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of all samples one after the other [n, width], on the CPU, and how many belong to each sample."""
    if padding is None:
        lengths = torch.full((len(tensor),), tensor[0, ..., 0].numel())
        return tensor.flatten(0, -2).cpu(), lengths
    return tensor[padding].cpu(), padding.sum(1).cpu()

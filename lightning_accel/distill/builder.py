"""Building a teacher's cache: asking about what is not on disk yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..inputs import ExampleInputs, inputs_of_batch, split_inputs, with_decoder_inputs, without_labels
from ..loaded import LoadedModel, LoadedSeq2Seq
from .given import without_autocast
from .keyed import Keyed, indices_of, split_key
from .losses import TopK, check_states, top_k_of
from .store import Stream, read_manifest, write_manifest
from .teacher import LiveTeacher
from .terms import positions_of


class Builder:
    """Asks the teacher about what is not on disk yet."""

    def __init__(
        self, directory: Path, manifest: dict[str, Any], live: LiveTeacher, data: Keyed, collate: Callable[..., Any]
    ) -> None:
        self.directory, self.live, self.data, self.collate = directory, live, data, collate
        self.manifest = manifest
        self.streams: dict[str, Stream] = {}

    def run(self, progress: bool) -> None:
        """Builds what is missing."""
        batch, total = self.manifest["batch_size"], len(self.data)
        if (self.directory / "cache.json").is_file() and read_manifest(self.directory)["complete"]:
            return
        done = self._resume()
        starts: Any = range(done, total, batch)
        if progress:
            from rich.progress import track

            starts = track(starts, f"asking the teacher about {total - done} samples", total=len(starts))
        files: dict[Path, BinaryIO] = {}
        try:
            for start in starts:
                asked = self._ask(range(start, min(start + batch, total)))
                with self._explain_full_disk():
                    self._append(*asked, files, "ab" if done else "wb")
        finally:
            with self._explain_full_disk():
                for file in files.values():
                    file.close()
        with self._explain_full_disk():
            write_manifest(self.directory, self.manifest | {"streams": self._specs(), "complete": True})

    def _specs(self) -> dict[str, Any]:
        return {name: stream.spec for name, stream in self.streams.items()}

    def _resume(self) -> int:
        """Number of samples that are complete, after cutting off what lies behind them."""
        if not (self.directory / "cache.json").is_file():
            return 0
        manifest = read_manifest(self.directory)
        for i, (name, spec) in enumerate(manifest["streams"].items()):
            self.streams[name] = Stream(self.directory, i, spec)
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
        with without_autocast():
            batch, keys = split_key(self.collate([self.data[i] for i in indices]))
        if indices_of(keys).tolist() != list(indices):
            raise ValueError("the collate function reorders samples or their keys; give one that keeps the order")
        model, top_k = self.live.model, self.manifest["top_k"]
        given = with_decoder_inputs(model, dict(batch)) if isinstance(batch, Mapping) else batch  # type: ignore[arg-type]
        answer = self.live(*split_inputs(_inputs(model, given)))
        logits = answer.logits if isinstance(answer.logits, Tensor) else None
        if logits is None and top_k is not None:
            raise ValueError(f"the teacher, a {type(model).__name__}, puts out no logits; give a model with a head")
        named = given if isinstance(given, Mapping) else {}
        positions = positions_of(model, named, batch, logits, causal=False)
        logits = positions.classes_last(logits)
        found: dict[str, tuple[list[Tensor], Tensor]] = {}
        if logits is not None and top_k is not None:
            flat, lengths = _rows(logits, positions.of(logits), len(indices), "its logits")
            draw = torch.Generator().manual_seed(indices.start)  # the same again where a build is resumed
            kept = top_k_of(flat, top_k, self.manifest["temperature"], self.manifest["drawn"], draw)
            self._declare("", [("values", kept.values), ("indices", kept.indices.int()), ("tail", kept.tail)], kept)
            found[""] = [kept.values, kept.indices.int(), kept.tail], lengths
        for name, state in answer.hidden.items():
            flat, lengths = _rows(state, positions.of(state, name), len(indices), f"what {name!r} puts out")
            check_states(flat)
            self._declare(name, [("values", flat)])
            found[name] = [flat], lengths
        if not (self.directory / "cache.json").is_file():
            with self._explain_full_disk():
                write_manifest(self.directory, self.manifest | {"streams": self._specs(), "complete": False})
        return torch.as_tensor(keys), found

    def _declare(self, name: str, parts: list[tuple[str, Tensor]], kept: TopK | None = None) -> None:
        if name not in self.streams:
            widths = [(n, t.shape[-1] if t.dim() > 1 else None, str(t.dtype).removeprefix("torch.")) for n, t in parts]
            spec: dict[str, Any] = {"parts": widths}
            if kept is not None:
                spec |= {"classes": kept.classes, "drawn": kept.drawn}
            self.streams[name] = Stream(self.directory, len(self.streams), spec)

    def _append(self, keys: Tensor, answers: Mapping[str, Any], files: dict[Path, BinaryIO], mode: str) -> None:
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
                    files[path] = open(path, mode)  # type: ignore[assignment]  # noqa: SIM115  closed by `run`
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


def _inputs(model: nn.Module | LoadedModel, batch: Any) -> ExampleInputs:
    """What a teacher is asked with: a module's inputs, or those of a mapping that an artifact picks from."""
    if isinstance(model, nn.Module) or not isinstance(batch, Mapping):
        return inputs_of_batch(model, batch)  # type: ignore[arg-type]  # of a tuple it does not look at the model
    if isinstance(model, LoadedSeq2Seq) and "decoder_input_ids" not in batch:
        raise ValueError(
            "the teacher is an artifact of an encoder-decoder model, which does not know what labels are to its "
            "decoder; have the collate function add decoder_input_ids: "
            "student.prepare_decoder_input_ids_from_labels(labels)"
        )
    return without_labels(batch)


def _rows(tensor: Tensor, padding: Tensor | None, samples: int, what: str) -> tuple[Tensor, Tensor]:
    """Positions of all samples one after the other [n, width], on the CPU, and how many belong to each sample."""
    if len(tensor) != samples:
        raise ValueError(
            f"of {samples} samples the teacher gives {what} of shape {tuple(tensor.shape)}: a cache needs the samples "
            "in the first dimension, as of nn.TransformerEncoderLayer(batch_first=True); name another layer, or give "
            "the teacher itself to Distillation"
        )
    if padding is None:
        lengths = torch.full((len(tensor),), tensor[0, ..., 0].numel())
        return tensor.flatten(0, -2).cpu(), lengths
    return tensor[padding].cpu(), padding.sum(1).cpu()

"""A loaded artifact, whose programs run one call at a time, with the threads that it was loaded with.

Imports torch and the standard library only.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._warn import warn
from .calls import MASK, bind, by_name, structure

Run = Callable[[list[Tensor]], list[Tensor]]

_forked = False  # in a forked process: the threads of OpenMP are not there, and waiting for them never ends
_told = False  # that it computes on one thread
_models: weakref.WeakSet[LoadedModel] = weakref.WeakSet()
_changed = threading.Lock()
_blocks: list[tuple[int, int]] = []  # of each block that runs: the number before it, and its own
_own = threading.local()  # `known`: whether a block has run in the thread, so that its number is not inherited


@contextmanager
def at_threads(threads: int | None) -> Iterator[None]:
    """Has torch use so many threads in the block; `None` leaves it as it is. In a forked process it uses one.

    Torch has a number for each thread of Python, and one that a new thread starts with, which a block changes too.
    """
    threads = _one_thread(threads) if _forked else threads
    if threads is None or (threads == torch.get_num_threads() and not _blocks):
        yield
        return
    with _changed:
        before = torch.get_num_threads()
        if not getattr(_own, "known", False):
            before = next((first for first, number in _blocks if number == before), before)
        _own.known = True
        block = before, threads
        _blocks.append(block)
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _changed:
            _blocks.remove(block)
            torch.set_num_threads(before)


def _one_thread(wanted: int | None) -> int:
    """1; where more were wanted, a warning says so, once a process."""
    global _told
    if (wanted or torch.get_num_threads()) > 1 and not _told:
        _told = True
        warn("this process was forked, and computes on one thread; start it with spawn for more")
    return 1


def _begin_fork() -> None:
    """Locks that another thread held stay locked in the new process, without it."""
    global _changed, _forked
    _changed, _forked = threading.Lock(), True
    _blocks.clear()
    for model in _models:
        model._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_fork)


class LoadedModel:
    """An exported model: call it with the inputs that the manifest lists, by position or by name.

    Inputs are checked in Python before they reach the program, because compiled programs check nothing, and are never
    written to. Calls from several threads take turns.

    Attributes:
        directory, manifest: the artifact.
        engine: the engine that runs it.
        threads: how many it runs with; `None` are torch's.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        entry: dict[str, Any],
        run: Run,
        weights: Iterable[Tensor] = (),
        threads: int | None = None,
    ) -> None:
        self.threads = threads
        self.directory, self.manifest, self.entry = directory, manifest, entry
        self.engine: str = entry["engine"]
        self._run = run
        self._mapped = {_extent(tensor) for tensor in weights}  # the views of one file have one extent
        self._lock = threading.Lock()
        _models.add(self)

    @property
    def input_names(self) -> list[str]:
        """The inputs of a call, by position; `optional_names` may be left out."""
        if self.entry["cache"] is not None:
            return ["input_ids", MASK]
        return [spec["name"] for spec in self.entry["inputs"]]

    @property
    def optional_names(self) -> list[str]:
        """The inputs that a call may leave out."""
        if self.entry["cache"] is not None:
            return [MASK]
        return [spec["name"] for spec in self.entry["inputs"] if "fill" in spec]

    def __call__(self, *args: Tensor, **kwargs: Any) -> Any:
        """Outputs in the structure that the model had: a tensor, a tuple, a named tuple, or named outputs (`Output`).

        A causal language model takes `input_ids` [batch, length] and optionally `attention_mask` [batch, length]
        and gives logits [batch, length, vocabulary]. Another model of transformers that takes both may be called
        without the mask too, and one that was exported without it takes one of ones: nothing is padding.

        Raises:
            ValueError: inputs of another number, name, dtype, device or shape than the program takes.
        """
        if self.entry["cache"] is not None:
            from . import generate

            return generate.forward(self, **by_name(self.input_names, args, kwargs, self.optional_names))
        return structure(self.entry["outputs"], self._run_checked(bind(self.entry["inputs"], args, kwargs)))

    def generate(self, input_ids: Any, max_new_tokens: int = 32, **options: Any) -> Any:
        """Continues token ids with a KV cache; see `lightning_accel.generate.generate`."""
        if self.entry["cache"] is None:
            raise ValueError("this model has no KV cache, so it cannot generate; call it instead: model(input)")
        from . import generate

        return generate.generate(self, input_ids, max_new_tokens, **options)

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that travels with the model."""
        from .text import open_tokenizer

        return open_tokenizer(self)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The tokenizer's configuration, as far as it travels with the model."""
        from .text import open_config

        return open_config(self)

    def generate_text(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continues texts, or answers them; see `lightning_accel.text.generate_text`."""
        from . import text

        return text.generate_text(self, prompt, max_new_tokens, **options)

    def chat(self, messages: Any, max_new_tokens: int = 64, **options: Any) -> Any:
        """The next answer in a conversation; see `lightning_accel.chat.chat`."""
        from . import chat

        return chat.chat(self, messages, max_new_tokens, **options)

    def classify(self, inputs: Any, top_k: int = 1) -> Any:
        """The likeliest classes of texts or images, by the tokenizer or image processor that travels with the model.

        Args:
            inputs: a text, a pair of texts (a tuple), or an image (a uint8 tensor [C, H, W], an image of Pillow, the
                path of a file as a `pathlib.Path`); or a list of them.
            top_k: so many classes of each.

        Returns:
            `[{"label": name, "score": probability}]`, the likeliest first; a list of them where a list was given.

        Raises:
            ValueError: the artifact has neither tokenizer nor image processor, or the model gives no logits [N, C].
        """
        from . import text, vision

        items = list(inputs) if isinstance(inputs, list) else [inputs]
        if not items or isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"{len(items)} inputs and top_k={top_k}: give at least one of each")
        if all(isinstance(item, str | tuple) for item in items):
            output = text.classify_text(self, items)
        else:
            output = self(vision.pixel_values(self, items))
        logits = output["logits"] if isinstance(output, dict) else output
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(items):
            raise ValueError("this model does not give a row of logits for each input; call it instead: model(inputs)")
        several = self.manifest.get("labels", {}).get("several", False)
        best = (logits.sigmoid() if several else logits.softmax(-1)).topk(min(top_k, logits.shape[-1]))
        names = self.manifest.get("labels", {}).get("names") or [str(i) for i in range(logits.shape[-1])]
        found = [
            [{"label": names[i], "score": score} for i, score in zip(rows, scores, strict=True)]
            for rows, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return found if isinstance(inputs, list) else found[0]

    def transcribe(self, audio: Any, **options: Any) -> Any:
        """The text of a recording; see `lightning_accel.speech.transcribe`."""
        from . import speech

        return speech.transcribe(self, audio, **options)

    def new_cache(self, capacity: int, batch: int = 1) -> Any:
        """An empty KV cache for a conversation: `model.generate(ids, cache=cache)` goes on where the last call ended.

        Args:
            capacity: tokens a row, prompts and answers together.
            batch: rows.
        """
        if self.entry["cache"] is None:
            raise ValueError("this model has no KV cache; call it instead: model(input)")
        from .generate import Cache

        return Cache(self, batch, capacity)

    def _run_checked(self, inputs: list[Tensor], state: Run | None = None) -> list[Tensor]:
        """Runs the program, or a caller's state of it, on flat inputs that were checked; the lock is held meanwhile.

        An output that lies in the weights, such as a buffer of the model, is copied: the caller may write to it.
        """
        with self._lock, at_threads(self.threads):
            return [output.clone() if self._is_weight(output) else output for output in (state or self._run)(inputs)]

    def _is_weight(self, output: Tensor) -> bool:
        return any(start <= output.data_ptr() < end for start, end in self._mapped)

    def asset(self, name: str) -> Path:
        """Path of a file that travels with the model, such as `tokenizer.json`, after checking it."""
        from .artifact import check_file

        for asset in self.manifest["assets"]:
            if asset["name"] == name:
                return check_file(self.directory, asset["file"], asset["sha256"])
        raise ValueError(f"no asset {name!r}; this artifact has {[a['name'] for a in self.manifest['assets']]}")

    def __repr__(self) -> str:
        inputs = ", ".join(
            f"{i['name']}{[d if isinstance(d, int) else d['name'] for d in i['shape']]}" for i in self.entry["inputs"]
        )
        return f"LoadedModel({str(self.directory)!r}, engine={self.engine!r}, inputs=({inputs}))"


class LoadedSeq2Seq(LoadedModel):
    """An exported encoder-decoder language model: an encoder, which runs once a source, and a decoder with a KV cache.

    Called with the encoder's inputs and `decoder_input_ids` [batch, length] it gives logits [batch, length, classes].

    Attributes:
        encoder: source -> keys and values of cross-attention.
    """

    def __init__(self, *args: Any, encoder: LoadedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder = encoder

    @property
    def input_names(self) -> list[str]:
        """The inputs of a call, by position."""
        return [*self.encoder.input_names, "decoder_input_ids"]

    @property
    def optional_names(self) -> list[str]:
        """The inputs that a call may leave out."""
        return self.encoder.optional_names

    def __call__(self, *args: Tensor, **kwargs: Any) -> Any:
        """Logits of whole answers.

        Raises:
            ValueError: inputs of another number, name, dtype, device or shape than the programs take.
        """
        from . import generate

        given = by_name(self.input_names, args, kwargs, self.optional_names)
        ids = given.pop("decoder_input_ids")
        return generate.forward_seq2seq(self, given, ids)

    def generate(self, *source: Any, max_new_tokens: int = 32, **options: Any) -> Any:
        """Answers to the encoder's inputs; see `lightning_accel.generate.generate_seq2seq`."""
        from . import generate

        names = self.encoder.input_names
        named = {name: options.pop(name) for name in dict.fromkeys((*names, MASK)) if name in options}
        given = by_name(names, source, named, self.optional_names)
        return generate.generate_seq2seq(self, given, max_new_tokens, **options)

    def new_cache(self, capacity: int, batch: int = 1) -> Any:
        """Not of an encoder-decoder model: each source is a conversation of its own."""
        raise ValueError("an encoder-decoder model answers one source at a time; call model.generate(...) for each")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses at which the tensor's storage begins and ends."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()

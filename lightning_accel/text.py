"""Text in, text or classes out: a loaded artifact with the tokenizer among its assets.

Imports torch; `tokenizers` when a text is first read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .generate import Cache

if TYPE_CHECKING:
    from .loaded import LoadedModel, LoadedSeq2Seq

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_CONTEXT = 8  # tokens before a new one that decide how it is written: spaces, halves of characters


def open_tokenizer(model: LoadedModel) -> Any:
    """The `tokenizers.Tokenizer` that travels with an artifact, without its padding and truncation.

    Raises:
        ValueError: the artifact has none.
        ImportError: `tokenizers` is not installed.
    """
    if not any(asset["name"] == TOKENIZER for asset in model.manifest["assets"]):
        raise ValueError(
            f"this artifact has no {TOKENIZER}; export it with Export(..., processor=tokenizer), or encode the text "
            "yourself and give the model token ids"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs the package tokenizers: pip install tokenizers") from error
    tokenizer = Tokenizer.from_file(str(model.asset(TOKENIZER)))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def open_config(model: LoadedModel) -> dict[str, Any]:
    """The tokenizer's configuration; empty where none travels with the artifact."""
    there = any(asset["name"] == CONFIG for asset in model.manifest["assets"])
    return json.loads(model.asset(CONFIG).read_text()) if there else {}


# --- generation -------------------------------------------------------------------------------------------------------


def generate_text(
    model: LoadedModel,
    prompt: str | Sequence[str],
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    stream: bool = False,
    cache: Cache | None = None,
    **sampling: Any,
) -> str | list[str] | Iterator[str]:
    """Continues a text, or several at once; greedy by default. An encoder-decoder model answers it, as in translation.

    Args:
        prompt: a text, or a list of texts.
        max_new_tokens: at most so many tokens are added to each.
        stop: texts and special tokens before which an answer ends; it ends at the model's end-of-text token too.
        stream: return an iterator over the pieces of one answer instead, as they come.
        cache: of `model.new_cache`, to go on with a conversation: `prompt` is then only what is new. Of an answer that
            met a stop text it holds that text as well.
        sampling: `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`, as in `generate`; of encoder-decoder
            models `num_beams`, `length_penalty` and `decoder_input_ids` too.

    Returns:
        what was added, without the prompt: a text, or a list of texts where a list was given.

    Raises:
        ValueError: the artifact has no tokenizer, a prompt is empty, or more tokens than the model has positions.
    """
    from .loaded import LoadedSeq2Seq

    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if prompts and all(isinstance(item, dict) for item in prompts):
        raise ValueError("prompt is a conversation; write model.chat(messages)")
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt={prompt!r} is no text and no list of texts; token ids go to model.generate")
    if stream and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompts cannot be streamed as one text; write stream=True with one prompt")
    if isinstance(model, LoadedSeq2Seq):
        if cache is not None:
            raise ValueError("an encoder-decoder model answers one source at a time, without cache=")
        pieces = _answers(model, prompts, max_new_tokens, stop, stream, **sampling)
    else:
        begins = cache is None or cache.filled == 0
        encoded = [e.ids for e in model.tokenizer.encode_batch(prompts, add_special_tokens=begins)]
        pieces = continue_ids(model, encoded, max_new_tokens, stop, cache, **sampling)
    if stream:
        return (piece for (piece,) in pieces)
    answers = ["".join(row) for row in zip(*pieces, strict=True)]
    return answers[0] if isinstance(prompt, str) else answers


def continue_ids(
    model: LoadedModel,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: str | Sequence[str],
    cache: Cache | None,
    **sampling: Any,
) -> Iterator[list[str]]:
    """The new piece of each row's text, token by token, after prompts of token ids."""
    texts, ends = _stops(model, stop)
    if texts and cache is not None and len(encoded) > 1:
        raise ValueError(
            f"a row that has met {texts[0]!r} would go on in the cache until all have, unseen; give each row a cache "
            "of its own, or no stop texts"
        )
    tokens: Any = model.generate(encoded, max_new_tokens, stream=True, cache=cache, stop=ends, **sampling)
    return _write(tokens, [_Writer(model.tokenizer, ids, texts) for ids in encoded], ends)


def _answers(
    model: LoadedSeq2Seq, sources: list[str], max_new_tokens: int, stop: Any, stream: bool, **sampling: Any
) -> Iterator[list[str]]:
    """The new piece of each answer, token by token; all at once where beams are searched."""
    names = model.encoder.input_names
    if unknown := set(names) - {"input_ids", "attention_mask"}:
        what = "recordings go to model.transcribe" if "input_features" in unknown else "give model.generate its inputs"
        raise ValueError(f"a text does not give the input {min(unknown)!r} of this model; {what}")
    encoded = [e.ids for e in model.tokenizer.encode_batch(sources)]
    length = max(len(ids) for ids in encoded)
    if "attention_mask" not in names and any(len(ids) < length for ids in encoded):
        raise ValueError("texts of different lengths need a model with an attention_mask; give them one by one")
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids in encoded]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in encoded]),
    }
    given: Any = {name: inputs[name] for name in names}
    texts, ends = _stops(model, stop)
    greedy = stream or sampling.get("num_beams", 1) == 1
    tokens = model.generate(**given, max_new_tokens=max_new_tokens, stream=greedy, stop=ends, **sampling)
    writers = [_Writer(model.tokenizer, [], texts) for _ in sources]
    return _write(tokens if greedy else iter(tokens.unbind(1)), writers, ends)


def _stops(model: LoadedModel, stop: str | Sequence[str] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What an answer ends before: texts, and token ids, the model's own and those of special tokens, which are no text.

    Raises:
        ValueError: an empty text, or no text.
    """
    given = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if wrong := [text for text in given if not isinstance(text, str) or not text]:
        raise ValueError(
            f"stop={wrong[0]!r} is no text that an answer could end before; write stop='###', or stop=() for none; "
            "token ids go to model.generate"
        )
    ids = {text: model.tokenizer.token_to_id(text) for text in given}
    special = {text: id for text, id in ids.items() if id is not None and not model.tokenizer.decode([id])}
    own = model.entry["cache"].get("stop", ()) if model.entry["cache"] else ()
    return tuple(text for text in given if text not in special), (*own, *special.values())


def answer(model: LoadedModel, tokens: Iterator[Tensor]) -> Iterator[str]:
    """The new piece of one answer's text, token [1] by token."""
    texts, ends = _stops(model, None)
    return (piece for (piece,) in _write(tokens, [_Writer(model.tokenizer, [], texts)], ends))


def _write(tokens: Iterator[Tensor], writers: list[_Writer], ends: tuple[int, ...]) -> Iterator[list[str]]:
    """The new piece of each row's text, token by token, until all rows have ended."""
    for token_B in tokens:
        yield [
            writer.end() if token in ends else writer.write(token)
            for writer, token in zip(writers, token_B.tolist(), strict=True)
        ]
        if all(writer.ended for writer in writers):
            break
    yield [writer.end() for writer in writers]


class _Writer:
    """Text of tokens as they come: only whole characters, and nothing that may become one of the `stops`."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: tuple[str, ...]) -> None:
        self.ended = False
        self._tokenizer, self._stops, self._held = tokenizer, stops, ""
        self._context, self._new = list(prompt[-_CONTEXT:]), list[int]()

    def write(self, token: int) -> str:
        """What can be said after this token."""
        if self.ended:
            return ""
        self._new.append(token)
        text = self._read()
        if text.endswith("\ufffd"):  # the first half of a character
            return ""
        self._context, self._new = (self._context + self._new)[-_CONTEXT:], []
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended, said = True, self._held[: min(found)]
            return said
        kept = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        said, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return said

    def end(self) -> str:
        """What was held back, once."""
        if self.ended:
            return ""
        self.ended = True
        return self._held + self._read()

    def _read(self) -> str:
        """The text that the new tokens add to the ones before them."""
        if not self._new:
            return ""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._new)[len(before) :]


# --- classification ---------------------------------------------------------------------------------------------------


def _encode(tokenizer: Any, texts: Sequence[str], limit: int, side: str = "right") -> Any:
    """A text or a pair as at most `limit` tokens, special ones included; cut as transformers' `longest_first` cuts.

    Args:
        side: where texts lose tokens, "right" or "left".
    """
    encoded = tokenizer.encode(*texts)
    if len(encoded.ids) <= limit:
        return encoded
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    room = limit - tokenizer.num_special_tokens_to_add(len(parts) == 2)
    if room < len(parts):
        raise ValueError(f"the model takes {limit} tokens, which leaves none for a text; export it for longer ones")
    *shorter, longer = sorted(parts, key=lambda part: len(part.ids))  # of two of one length the second
    for part in shorter:
        part.truncate(min(len(part.ids), room // 2), direction=side)
    longer.truncate(room - sum(len(part.ids) for part in shorter), direction=side)
    return tokenizer.post_process(*parts)


def classify_text(model: LoadedModel, texts: Sequence[str | tuple[str, str]]) -> Any:
    """Output of a text classifier; a pair is read as two segments.

    Texts longer than the model takes lose tokens on the tokenizer's `truncation_side`, of a pair the longer text first,
    and keep the special tokens around them.
    """
    tokenizer, specs = model.tokenizer, {spec["name"]: spec for spec in model.entry["inputs"]}
    limit = specs["input_ids"]["shape"][1]
    limit = limit["max"] if isinstance(limit, dict) else limit
    side = model.tokenizer_config.get("truncation_side", "right")
    encoded = [_encode(tokenizer, (text,) if isinstance(text, str) else text, limit, side) for text in texts]
    length = max(len(encoding.ids) for encoding in encoded)
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    if unknown := specs.keys() - columns.keys():
        raise ValueError(f"a text does not give the input {sorted(unknown)[0]!r}; call the model with its inputs")
    pads = {"input_ids": model.manifest.get("labels", {}).get("pad", 0)}  # some models look for it
    rows = {name: [getattr(e, columns[name]) for e in encoded] for name in specs}
    inputs = {
        name: torch.tensor([row + [pads.get(name, 0)] * (length - len(row)) for row in rows[name]]) for name in specs
    }
    if "attention_mask" not in specs and len({len(e.ids) for e in encoded}) > 1:
        raise ValueError("texts of different lengths need a model with an attention_mask; classify them one by one")
    return model(**inputs)

"""KV-cache decoding over a loaded artifact, with torch alone.

The program takes token ids, a position for each, a mask over cache slots, the indices of the tokens whose logits are
wanted, and the cache itself: one [batch, capacity, heads, head_dim] tensor for the keys and one for the values of each
layer, owned by the caller and written in place. The mask has as many columns as slots are filled, so attention reads
those only, whatever the capacity. One program serves prefill, decoding and teacher-forced evaluation. A program of
OpenVINO keeps the keys and values itself, a state for each cache.

The decoder of an encoder-decoder model reads the keys and values of its source too, which the encoder made once.

Shape letters: B batch, T new tokens, S filled slots, K wanted positions, V vocabulary, E source positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._warn import warn

if TYPE_CHECKING:
    from .loaded import LoadedModel, LoadedSeq2Seq


class Cache:
    """Keys and values of a running generation; each caller has its own.

    Args:
        model: a loaded causal language model.
        batch: number of rows.
        capacity: slots a row, at most the model's positions; attention reads the filled ones only.
        cross: of an encoder-decoder model, keys and values [B, E, heads, head_dim] of the source, layer by layer.
        source_mask_BE: false where the source is padding.
    """

    def __init__(
        self,
        model: LoadedModel,
        batch: int,
        capacity: int,
        cross: Sequence[Tensor] = (),
        source_mask_BE: Tensor | None = None,
    ) -> None:
        spec = model.entry["cache"]
        for name, value in (("batch", batch), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int of at least 1")
        if batch > spec["max_batch"]:
            raise ValueError(f"a batch of {batch} is over the limit of {spec['max_batch']}; split it")
        if capacity > spec["max_length"]:
            raise ValueError(
                f"{capacity} tokens are asked for, the model has {spec['max_length']} positions; "
                "shorten the prompt or max_new_tokens"
            )
        self.model, self.capacity, self.filled = model, capacity, 0
        self.cross, self.source_mask_BE = list(cross), source_mask_BE
        begin = getattr(model._run, "begin", None)  # of a program that keeps keys and values itself
        self.state: Any = begin and begin()
        self.tensors = [
            torch.zeros(batch, capacity, *shape, dtype=getattr(torch, spec["dtype"]))
            for shape in spec["shapes"][len(cross) :]
            if self.state is None
        ]
        self._ids = [torch.zeros(batch, 0, dtype=torch.int64)]  # as they came
        self._seen_BC = torch.ones(batch, capacity, dtype=torch.bool)
        self.lengths_B = torch.zeros(batch, dtype=torch.int64)
        self.unread_BT = torch.zeros(batch, 0, dtype=torch.int64)  # chosen by `generate` last, fed with what comes next

    @property
    def ids_BS(self) -> Tensor:
        """The tokens in the filled slots."""
        self._ids = [torch.cat(self._ids, 1)]
        return self._ids[0]

    @property
    def mask_BS(self) -> Tensor:
        """Which filled slots are no padding."""
        return self._seen_BC[:, : self.filled]

    def step(self, ids_BT: Tensor, valid_BT: Tensor | None, wanted_BK: Tensor) -> Tensor:
        """Feeds tokens and returns logits [B, K, V] at the wanted indices in [0, T).

        Args:
            valid_BT: false where a token is padding; `None` where none is. A step of a large model finds little of
                torch in the processor's caches, and each operator here costs more than it computes.
        """
        new = ids_BT.shape[1]
        self.check_room(new)
        seen_BS = self._seen_BC[:, : self.filled + new]
        if valid_BT is None:
            positions_BT = self.lengths_B[:, None] if new == 1 else self.lengths_B[:, None] + torch.arange(new)
            lengths_B = self.lengths_B + new
        else:
            seen_BS[:, self.filled :] = valid_BT
            positions_BT = (self.lengths_B[:, None] + valid_BT.cumsum(1) - 1).clamp_min(0)
            lengths_B = self.lengths_B + valid_BT.sum(1)
        seen_BS = seen_BS.contiguous()
        masks = [positions_BT, seen_BS] if self.source_mask_BE is None else [seen_BS, self.source_mask_BE]
        inputs = [ids_BT.contiguous(), *masks, wanted_BK.contiguous()]
        logits_BKV = self.model._run_checked([*inputs, *self.cross, *self.tensors], self.state)[0]
        self._ids.append(ids_BT)
        self.filled, self.lengths_B = self.filled + new, lengths_B
        return logits_BKV

    def reorder(self, rows: Tensor) -> None:
        """Puts the keys and values of `rows` [B] in the place of the rows that were there; sources stay."""
        if self.state is not None:
            self.state.reorder(rows)
        self.tensors = [tensor.index_select(0, rows) for tensor in self.tensors]
        self._ids, self._seen_BC = [self.ids_BS[rows]], self._seen_BC[rows]
        self.lengths_B = self.lengths_B[rows]

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` slots."""
        if self.state is not None and count < self.filled:
            self.state.keep(count)
        self._ids, self.filled = [self.ids_BS[:, :count]], min(count, self.filled)
        self._seen_BC[:, self.filled :] = True
        self.lengths_B = self.mask_BS.sum(1)
        self.unread_BT = self.unread_BT[:, :0]

    def check_owner(self, model: LoadedModel, rows: int) -> None:
        """Raises ValueError unless this is a cache of so many rows of the model."""
        if self.model is not model or len(self.mask_BS) != rows:
            raise ValueError(
                f"the cache is of {len(self.mask_BS)} rows of {self.model!r}, the prompts are {rows} for "
                f"{model!r}; write cache = model.new_cache(capacity=..., batch={rows})"
            )

    def check_room(self, new: int) -> None:
        """Raises ValueError unless `new` more tokens a row fit."""
        if self.filled + new > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens and has {self.filled}; {new} more do not fit, "
                "so begin with a larger one: model.new_cache(capacity=...)"
            )


def forward(
    model: LoadedModel, input_ids: Tensor, attention_mask: Tensor | None = None, singly: int = 0
) -> Tensor:
    """Logits [B, T, V] of whole sequences (teacher forcing).

    Args:
        singly: the last so many tokens are read one by one, behind the others, as in decoding.
    """
    ids_BT, valid_BT = _prompt(model, input_ids, attention_mask)
    return _all_logits(Cache(model, *ids_BT.shape), ids_BT, valid_BT, singly)


def _all_logits(cache: Cache, ids_BT: Tensor, valid_BT: Tensor, singly: int) -> Tensor:
    length = ids_BT.shape[1]
    first = max(length - singly, 1)
    logits = []
    for begin, end in [(0, first), *((i, i + 1) for i in range(first, length))]:
        part_BT = ids_BT[:, begin:end]
        logits.append(cache.step(part_BT, valid_BT[:, begin:end], torch.arange(end - begin).expand(part_BT.shape)))
    return torch.cat(logits, 1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else sampled from softmax(logits / temperature).

    In the order of transformers: repetition penalty, temperature, the `top_k` likeliest tokens, then the fewest of
    those left that together have the probability `top_p` (nucleus sampling, arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0, which means greedy")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k} must be an int of at least 1; None considers every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be a probability in (0, 1]; None considers every token")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 penalizes nothing")
        limits = {"top_k": self.top_k, "top_p": self.top_p}
        unused = [f"{n}={v}" for n, v in limits.items() if v is not None and v != 1]  # 1 is as good as greedy, or none
        if self.temperature == 0 and unused:
            warn(f"{' and '.join(unused)} without effect at temperature=0, where nothing is drawn")


def generate(
    model: LoadedModel,
    input_ids: Tensor | Sequence[Sequence[int]] | Sequence[int],
    max_new_tokens: int = 32,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[int] | None = None,
    pad: int = 0,
    stream: bool = False,
    cache: Cache | None = None,
) -> Tensor | Iterator[Tensor]:
    """Continues prompts of token ids; greedy by default.

    Args:
        input_ids: [batch, length], or a list of prompts of different lengths, or one prompt.
        max_new_tokens: at most so many tokens are added.
        attention_mask: [batch, length] bool or int, false where `input_ids` is padding.
        temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
        top_k: only the k likeliest tokens can be drawn.
        top_p: only the likeliest tokens that together have this probability can be drawn.
        repetition_penalty: above 1 makes tokens that were there before less likely (arXiv:1909.05858).
        seed: makes sampling repeatable, whatever the global random state.
        stop: token ids that end a row; the row is filled with `pad` from then on. `None` takes those of the model's
            configuration (end of text), `()` none.
        stream: return an iterator over [batch] token ids instead, as they come.
        cache: of `model.new_cache`, to go on with a conversation: `input_ids` are then only what is new, after the
            prompts and the tokens of the calls before, which are not computed again.

    Returns:
        [batch, new] the new token ids; shorter than `max_new_tokens` where every row stopped.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, or more tokens than the model has positions or the
            cache has room for.
    """
    ids_BT, valid_BT = _prompt(model, input_ids, attention_mask)
    stops = _stops(model, max_new_tokens, stop)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    length = ids_BT.shape[1] + max_new_tokens - 1  # the last token is not read
    if cache is None:
        cache = Cache(model, len(ids_BT), length)
    cache.check_owner(model, len(ids_BT))
    cache.check_room(cache.unread_BT.shape[1] + length)
    steps = _decode(cache, ids_BT, valid_BT, max_new_tokens, sampling, stops, pad)
    return steps if stream else torch.stack(list(steps), 1)


def _stops(model: LoadedModel, max_new_tokens: int, stop: Sequence[int] | None) -> tuple[int, ...]:
    """The token ids that end a row."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be an int of at least 1")
    if isinstance(stop, int):
        raise ValueError(f"stop={stop} is one id; write stop=({stop},)")
    if stop is not None and not all(isinstance(id, Integral) for id in stop):
        raise ValueError(f"stop={stop!r} holds no token ids; texts go to model.generate_text(prompt, stop='###')")
    return tuple(model.entry["cache"].get("stop", ()) if stop is None else stop)


# --- encoder-decoder models -------------------------------------------------------------------------------------------


def forward_seq2seq(
    model: LoadedSeq2Seq, source: Mapping[str, Tensor], decoder_input_ids: Tensor, singly: int = 0
) -> Tensor:
    """Logits [B, T, V] of whole sequences (teacher forcing); `singly` as of `forward`."""
    ids_BT, valid_BT = _prompt(model, decoder_input_ids, None)
    return _all_logits(read_source(model, source, ids_BT, ids_BT.shape[1]), ids_BT, valid_BT, singly)


def generate_seq2seq(
    model: LoadedSeq2Seq,
    source: Mapping[str, Tensor],
    max_new_tokens: int = 32,
    *,
    decoder_input_ids: Tensor | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[int] | None = None,
    pad: int = 0,
    stream: bool = False,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> Tensor | Iterator[Tensor]:
    """Answers to sources, such as translations; as `generate`, but for the prompt.

    Args:
        source: the encoder's inputs by name.
        decoder_input_ids: [batch, length], or one list for all rows: how each answer begins; by default the model's own
            first token.
        num_beams: above 1, beam search: the likeliest whole answers that so many beams find.
        length_penalty: of beam search; an answer's score is its log-probability over length ** length_penalty.

    Returns:
        [batch, new] the new token ids, without `decoder_input_ids`.
    """
    stops = _stops(model, max_new_tokens, stop)
    begin = model.entry["cache"]["start"] if decoder_input_ids is None else decoder_input_ids
    if not isinstance(begin, Tensor):
        if not len(begin):
            raise ValueError("the model does not say with which token an answer begins; give decoder_input_ids=[id]")
        begin = torch.tensor(begin, dtype=torch.int64).expand(len(next(iter(source.values()))), -1)
    ids_BT, valid_BT = _prompt(model, begin, None)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise ValueError(f"num_beams={num_beams!r} must be an int of at least 1")
    if num_beams > 1 and (stream or temperature > 0):
        raise ValueError("beam search is neither drawn nor streamed; write num_beams=1 with temperature or stream")
    cache = read_source(model, source, ids_BT, ids_BT.shape[1] + max_new_tokens - 1, num_beams)
    if num_beams > 1:
        from .beams import beam_search

        return beam_search(
            cache, ids_BT, max_new_tokens, num_beams, length_penalty, stops, pad,
            lambda log_BV, index: _process(cache, log_BV, index, max_new_tokens, repetition_penalty),
        )  # fmt: skip
    steps = _decode(cache, ids_BT, valid_BT, max_new_tokens, sampling, stops, pad)
    return steps if stream else torch.stack(list(steps), 1)


def read_source(
    model: LoadedSeq2Seq, source: Mapping[str, Tensor], ids_BT: Tensor, capacity: int, beams: int = 1
) -> Cache:
    """An empty cache with the keys and values that the encoder makes of the source, `beams` rows for each."""
    cross = list(model.encoder(**source))
    batch, length = cross[0].shape[:2]
    if batch != len(ids_BT):
        raise ValueError(f"decoder_input_ids has {len(ids_BT)} rows, the source {batch}")
    mask = source.get("attention_mask")
    seen = mask.bool() if mask is not None and mask.shape == (batch, length) else torch.ones(batch, length).bool()
    if beams > 1:
        cross, seen = [tensor.repeat_interleave(beams, 0) for tensor in cross], seen.repeat_interleave(beams, 0)
    return Cache(model, batch * beams, capacity, cross, seen)


def _decode(
    cache: Cache, ids_BT: Tensor, valid_BT: Tensor, count: int, sampling: Sampling, stop: tuple[int, ...], pad: int
) -> Iterator[Tensor]:
    generator = None
    if sampling.temperature > 0:
        generator = torch.Generator()
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    ids_BT = torch.cat([cache.unread_BT, ids_BT], 1)
    valid_BT = torch.cat([torch.ones_like(cache.unread_BT, dtype=torch.bool), valid_BT], 1)
    batch, length = ids_BT.shape
    last_B1 = length - 1 - valid_BT.flip(1).to(torch.int8).argmax(1, keepdim=True)  # last real token of each row
    running = [True] * batch
    logits_BV = cache.step(ids_BT, valid_BT, last_B1)[:, 0]
    cache.unread_BT = first_B1 = torch.zeros(batch, 1, dtype=torch.int64)
    for index in range(count):
        logits_BV = _process(cache, logits_BV, index, count, sampling.repetition_penalty)
        chosen_B = _choose(logits_BV, sampling, generator)
        if all(running):
            cache.unread_BT = chosen_B[:, None]
            yield chosen_B.clone()
        else:
            running_B = torch.tensor(running)
            cache.unread_BT = torch.where(running_B[:, None], chosen_B[:, None], cache.unread_BT)
            yield torch.where(running_B, chosen_B, pad)
        if stop:
            running = [runs and token not in stop for runs, token in zip(running, chosen_B.tolist(), strict=True)]
        if index + 1 == count or not any(running):
            return
        valid_B1 = None if all(running) else torch.tensor(running)[:, None]  # a stopped row reads padding
        logits_BV = cache.step(cache.unread_BT, valid_B1, first_B1)[:, 0]


def _process(cache: Cache, logits_BV: Tensor, index: int, count: int, penalty: float) -> Tensor:
    """Logits of new token `index` of at most `count`, after the repetition penalty, without the tokens that the model
    never writes, and of that alone which it always begins or ends with.
    """
    if penalty != 1.0:
        logits_BV = _penalize(logits_BV, cache.ids_BS, cache.mask_BS, penalty)
    spec = cache.model.entry["cache"]
    begins, ends = cache.filled == 1, index + 1 == count  # as transformers: a first token behind a single one
    for forced in (spec.get("forced_first") if begins else None, spec.get("forced_last") if ends else None):
        if forced is not None:
            logits_BV = torch.full_like(logits_BV, -torch.inf)
            logits_BV[:, forced] = 0.0
    barred = [*spec.get("suppress", ()), *(spec.get("suppress_first", ()) if index == 0 else ())]
    return logits_BV.index_fill(1, torch.tensor(barred), -torch.inf) if barred else logits_BV


def _penalize(logits_BV: Tensor, ids_BS: Tensor, mask_BS: Tensor, penalty: float) -> Tensor:
    """Logits of the tokens in `ids_BS` divided by `penalty` where positive, multiplied where negative."""
    seen_BV = torch.zeros_like(logits_BV).scatter_add_(1, ids_BS, mask_BS.to(logits_BV.dtype)) > 0
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature  # finite however small that is
    likeliest = None
    if sampling.top_p is not None or (sampling.top_k or logits_BV.shape[-1]) < logits_BV.shape[-1]:
        likeliest = logits_BV.topk(min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1]), -1)
        logits_BV = likeliest.values
    probabilities_BK = torch.softmax(logits_BV, -1)
    if sampling.top_p is not None:  # the likeliest first: those before which less than top_p is gathered stay
        before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
        probabilities_BK = probabilities_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    drawn_B1 = torch.multinomial(probabilities_BK, 1, generator=generator)
    return (drawn_B1 if likeliest is None else likeliest.indices.gather(1, drawn_B1))[:, 0]


def _prompt(model: LoadedModel, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and their validity [B, T], checked against the model's vocabulary and positions."""
    if not isinstance(input_ids, Tensor):
        rows = _rows(input_ids)
        if not rows or min(len(row) for row in rows) == 0:
            raise ValueError("a prompt is empty; give at least one token, such as the beginning-of-text id")
        if attention_mask is not None:
            raise ValueError("attention_mask belongs to a tensor of input_ids; a list of prompts is padded here")
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}, expected [batch, length], both at least 1; "
            "for one prompt write input_ids[None]"
        )
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.device.type != "cpu":
        raise ValueError(f"input_ids is {input_ids.dtype} on {input_ids.device}, expected torch.int64 on the CPU")
    spec = model.entry["cache"]
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= spec["vocabulary"]:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {spec['vocabulary']}")
    if len(input_ids) > spec["max_batch"]:
        raise ValueError(f"a batch of {len(input_ids)} is over the limit of {spec['max_batch']}; split it")
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else torch.as_tensor(attention_mask)
    if valid.is_floating_point() or valid.device.type != "cpu":
        raise ValueError(f"attention_mask is {valid.dtype} on {valid.device}, expected torch.bool or int64 on the CPU")
    if valid.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(valid.shape)}, input_ids {list(input_ids.shape)}")
    valid = valid.bool()
    if not valid.any(1).all():
        raise ValueError("a row of attention_mask is all padding; give each row at least one token")
    return input_ids.to(torch.int64), valid


def _rows(prompts: Any) -> list[Tensor]:
    """One int64 tensor a prompt, of a list of prompts or of one prompt."""
    try:
        rows = [torch.as_tensor(row) for row in prompts]
        rows = [torch.as_tensor(prompts)] if rows and rows[0].dim() == 0 else rows
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"input_ids is a {type(prompts).__name__} that holds no token ids; encode text first, "
            "with the tokenizer among the artifact's assets"
        ) from error
    if any(len(row) and row.dtype not in (torch.int64, torch.int32) for row in rows):
        raise ValueError(f"input_ids holds {rows[0].dtype} values; token ids are integers")
    return [row.to(torch.int64) for row in rows]

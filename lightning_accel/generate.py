"""KV-cache decoding over a loaded artifact, with torch alone.

The program takes token ids, a position for each, a mask over cache slots, the indices of the tokens whose logits are
wanted, and the cache itself: one [batch, capacity, heads, head_dim] tensor for the keys and one for the values of each
layer, owned by the caller and written in place. The mask has as many columns as slots are filled, so attention reads
those only, whatever the capacity. One program serves prefill, decoding and teacher-forced evaluation.

Shape letters: B batch, T new tokens, S filled slots, K wanted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loaded import LoadedModel


class Cache:
    """Keys and values of a running generation; each caller has its own.

    Args:
        model: a loaded causal language model.
        batch: number of rows.
        capacity: slots a row, at most the model's positions.
    """

    def __init__(self, model: LoadedModel, batch: int, capacity: int) -> None:
        spec = model.entry["cache"]
        if capacity > spec["max_length"]:
            raise ValueError(
                f"{capacity} tokens are asked for, the model has {spec['max_length']} positions; "
                "shorten the prompt or max_new_tokens"
            )
        self.model, self.capacity, self.filled = model, capacity, 0
        self.tensors = [
            torch.zeros(batch, capacity, *shape, dtype=getattr(torch, spec["dtype"])) for shape in spec["shapes"]
        ]
        self.mask_BS = torch.zeros(batch, 0, dtype=torch.bool)
        self.lengths_B = torch.zeros(batch, dtype=torch.int64)

    def step(self, ids_BT: Tensor, valid_BT: Tensor, wanted_BK: Tensor) -> Tensor:
        """Feeds tokens and returns logits [B, K, V] at the wanted indices in [0, T)."""
        new = ids_BT.shape[1]
        if self.filled + new > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and has {self.filled}; {new} more do not fit")
        positions_BT = (self.lengths_B[:, None] + valid_BT.cumsum(1) - 1).clamp_min(0)
        self.mask_BS = torch.cat([self.mask_BS, valid_BT], 1)
        inputs = [ids_BT.contiguous(), positions_BT, self.mask_BS, wanted_BK.contiguous(), *self.tensors]
        logits_BKV = self.model._run_checked(inputs)[0]
        self.filled += new
        self.lengths_B = self.lengths_B + valid_BT.sum(1)
        return logits_BKV


def forward(model: LoadedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of whole sequences (teacher forcing)."""
    ids_BT, valid_BT = _prompt(model, input_ids, attention_mask)
    batch, length = ids_BT.shape
    wanted = torch.arange(length).expand(batch, length)
    return Cache(model, batch, length).step(ids_BT, valid_BT, wanted)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else sampled from softmax(logits / temperature)."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0, which means greedy")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k} must be an int of at least 1; None considers every token")


def generate(
    model: LoadedModel,
    input_ids: Tensor | Sequence[Sequence[int]] | Sequence[int],
    max_new_tokens: int = 32,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
    stream: bool = False,
) -> Tensor | Iterator[Tensor]:
    """Continues prompts of token ids; greedy by default.

    Args:
        input_ids: [batch, length], or a list of prompts of different lengths, or one prompt.
        max_new_tokens: at most so many tokens are added.
        attention_mask: [batch, length] bool or int, false where `input_ids` is padding.
        temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
        top_k: only the k likeliest tokens can be drawn.
        seed: makes sampling repeatable, whatever the global random state.
        stop: token ids that end a row; the row is filled with `pad` from then on.
        stream: return an iterator over [batch] token ids instead, as they come.

    Returns:
        [batch, new] the new token ids; shorter than `max_new_tokens` where every row stopped.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, or more tokens than the model has positions.
    """
    ids_BT, valid_BT = _prompt(model, input_ids, attention_mask)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be an int of at least 1")
    if isinstance(stop, int):
        raise ValueError(f"stop={stop} is one id; write stop=({stop},)")
    sampling = Sampling(temperature, top_k, seed)
    cache = Cache(model, len(ids_BT), ids_BT.shape[1] + max_new_tokens - 1)
    steps = _decode(cache, ids_BT, valid_BT, max_new_tokens, sampling, tuple(stop), pad)
    return steps if stream else torch.stack(list(steps), 1)


def _decode(
    cache: Cache, ids_BT: Tensor, valid_BT: Tensor, count: int, sampling: Sampling, stop: tuple[int, ...], pad: int
) -> Iterator[Tensor]:
    generator = None
    if sampling.temperature > 0:
        generator = torch.Generator()
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    batch, length = ids_BT.shape
    last_B1 = length - 1 - valid_BT.flip(1).to(torch.int8).argmax(1, keepdim=True)  # last real token of each row
    running_B = torch.ones(batch, dtype=torch.bool)
    logits_BV = cache.step(ids_BT, valid_BT, last_B1)[:, 0]
    stops = torch.tensor(stop, dtype=torch.int64)
    for index in range(count):
        token_B = torch.where(running_B, _choose(logits_BV, sampling, generator), pad)
        yield token_B
        if len(stop):
            running_B = running_B & ~torch.isin(token_B, stops)
        if index + 1 == count or not running_B.any():
            return
        fed_B = torch.where(running_B, token_B, 0)  # what a stopped row reads does not matter, and pad may be no token
        one_B1 = torch.ones(batch, 1, dtype=torch.bool)
        logits_BV = cache.step(fed_B[:, None], one_B1, torch.zeros(batch, 1, dtype=torch.int64))[:, 0]


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature  # finite however small that is
    if sampling.top_k is None or sampling.top_k >= logits_BV.shape[-1]:
        return torch.multinomial(torch.softmax(logits_BV, -1), 1, generator=generator)[:, 0]
    likeliest = logits_BV.topk(sampling.top_k, -1)
    drawn_B1 = torch.multinomial(torch.softmax(likeliest.values, -1), 1, generator=generator)
    return likeliest.indices.gather(1, drawn_B1)[:, 0]


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

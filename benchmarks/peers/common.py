"""What the peers share: rows of a table, the check against the float model, and workloads as ours are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lightning_accel.measure import Target

Workloads = dict[str, Callable[[], float]]
CHECKED_TOKENS = 16
LEAST_COSINE = 0.9  # lower is a broken model: int4 without calibration is above it, a wrong graph far below


@dataclass(frozen=True)
class Row:
    """A peer's model on disk: what a worker loads, what of it counts as bytes, its settings in words, the check.

    `run` computes here what is compared with the float model: hidden states from inputs, or the tokens and logits of
    greedy decoding from the lengths of the prompt and of what is new.
    """

    name: str
    target: Target
    path: Path
    settings: str
    run: Callable[..., Any]
    least_cosine: float = LEAST_COSINE

    @property
    def bytes(self) -> int:
        files = self.path.rglob("*") if self.path.is_dir() else self.path.parent.glob(f"{self.path.stem}.*")
        return sum(file.stat().st_size for file in files if file.is_file())


class Decoder(Protocol):
    """A peer's causal language model with its KV cache."""

    def reset(self) -> None:
        """Empties the cache."""

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Feeds int64 tokens [T]; returns the logits [V] after the last, which the next step may overwrite."""


def generate(
    decoder: Decoder, prompt: np.ndarray, new: int, keep: bool = False
) -> tuple[list[float], list[int], list[np.ndarray]]:
    """Greedy decoding: the time after each of `new` tokens, the tokens, and, to keep, the logits behind them."""
    decoder.reset()
    times, tokens, kept = [], [], []
    ids = prompt
    for _ in range(new):
        logits = decoder.step(ids)
        tokens.append(int(logits.argmax()))
        times.append(time.perf_counter())
        ids = np.array(tokens[-1:])
        if keep:
            kept.append(logits.copy())  # the next step writes into the same memory
    return times, tokens, kept


def chosen_tokens(open_: Callable[[], Decoder], prompt: int, new: int) -> tuple[list[int], list[np.ndarray]]:
    """A `Row.run` of a causal language model: tokens, and the logits behind them."""
    _, tokens, logits = generate(open_(), np.arange(prompt), new, keep=True)
    return tokens, logits


def causal_workloads(decoder: Decoder, prompt: int, new: int, vocabulary: int) -> Workloads:
    """Prefill (seconds) and decode (seconds a token) on the tokens that ours are timed on."""
    ids = np.arange(prompt) % vocabulary

    def prefill() -> float:
        start = time.perf_counter()
        times, *_ = generate(decoder, ids, 1)
        return times[0] - start

    def decode() -> float:
        times, *_ = generate(decoder, ids, new + 1)
        return (times[-1] - times[0]) / new

    return {"prefill": held(prefill), "decode": held(decode)}


def forward_workload(run: Callable[[], Any]) -> Workloads:
    """Forward (seconds) of an encoder."""

    def forward() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return {"forward": held(forward)}


def held(work: Callable[[], float]) -> Callable[[], float]:
    """`work`, whose first call, the warm-up, raises where a peer takes more threads than the worker was given."""
    checked = False

    def run() -> float:
        nonlocal checked
        if checked:
            return work()
        cpu, start, checked = time.process_time(), time.perf_counter(), True
        seconds = work()
        busy = (time.process_time() - cpu) / (time.perf_counter() - start)
        if busy > torch.get_num_threads() + 0.25:
            raise RuntimeError(f"{busy:.2f} threads were busy, {torch.get_num_threads()} were given")
        return seconds

    return run


def built(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, written under another name first: half a model is never taken for a whole one."""
    if not path.exists():
        draft = path.with_name(f"draft-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        for file in [*path.parent.glob(f"{draft.stem}.*"), draft]:  # an .xml has its .bin
            if file.exists():
                file.rename(path.with_name(file.name.removeprefix("draft-")))
    return path


def agreement(row: Row, compute: Callable[[], Mapping[str, float]]) -> str:
    """How close a peer's model is to the float model, in words; computed once and kept beside the model.

    Raises:
        RuntimeError: so far away that it must be broken.
    """
    kept = row.path.parent / "agreement.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if row.name not in known:
        known[row.name] = found = dict(compute())
        if not all(value >= row.least_cosine for name, value in found.items() if "cosine" in name):
            raise RuntimeError(f"{row.name} does not compute what the float model does: {found}")
        kept.write_text(json.dumps(known))
    return f"{row.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in known[row.name].items())


def encoder_agreement(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], run: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> dict[str, float]:
    """Mean cosine of the hidden states of tokens: on the timed inputs, and with the last quarter of each row masked."""
    masked = {name: value.clone() for name, value in inputs.items()}
    length = masked["attention_mask"].shape[1]
    masked["attention_mask"][:, length - length // 4 :] = 0
    found = {}
    for name, given in (("cosine", inputs), ("cosine, padded", masked)):
        with torch.no_grad():
            expected = model(**given).last_hidden_state
        got = torch.from_numpy(run({key: value.numpy() for key, value in given.items()}))
        valid = given["attention_mask"].bool()
        found[name] = float(nn.functional.cosine_similarity(got.float(), expected, dim=-1)[valid].mean())
    return found


def causal_agreement(
    model: nn.Module, prompt: torch.Tensor, tokens: list[int], logits: list[np.ndarray]
) -> dict[str, float]:
    """Mean cosine of logits and share of equal choices, the float model reading the tokens that a peer wrote."""
    ids = torch.cat([prompt, torch.tensor(tokens[:-1])])[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    got = torch.from_numpy(np.stack(logits)).float()
    barred = got < -1e30  # a search may bar the token that ends it
    got, expected = got.masked_fill(barred, 0.0), expected.masked_fill(barred, 0.0)
    cosine = nn.functional.cosine_similarity(got, expected, dim=-1).mean()
    return {"cosine": float(cosine), "same choice": float((got.argmax(-1) == expected.argmax(-1)).float().mean())}

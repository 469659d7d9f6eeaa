"""CTranslate2: its own converter and its own greedy search, GPT-2 only."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import GPT2Loader
from torch import nn

from lightning_accel.measure import Target

from .common import Row, Workloads, built, held


def causal_rows(model: nn.Module, folder: Path) -> list[Row]:
    """int8 weights and activations."""
    path = built(folder / "ct2-int8", partial(_convert, model))
    settings = "converted with quantization='int8', Generator(compute_type='int8', inter_threads=1), greedy"
    run = partial(run_causal, path)
    return [Row("ctranslate2 int8", Target("peers.ct2:causal", {"path": str(path)}), path, settings, run)]


def _convert(model: Any, path: Path) -> None:
    """As ct2-transformers-converter does, with made-up names for the tokens: a random checkpoint has no tokenizer."""
    names = {str(index): index for index in range(model.config.vocab_size)}
    tokenizer = SimpleNamespace(get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0")
    spec = GPT2Loader()(model, tokenizer)
    spec.validate()
    spec.optimize(quantization="int8")
    path.mkdir()
    spec.save(str(path))


def _generator(path: str | Path) -> ctranslate2.Generator:
    return ctranslate2.Generator(str(path), compute_type="int8", inter_threads=1, intra_threads=torch.get_num_threads())


def _generate(generator: ctranslate2.Generator, prompt: int, new: int, **options: Any) -> tuple[list[float], Any]:
    """The time after each token, and the result."""
    times: list[float] = []
    start = [str(index) for index in range(prompt)]

    def note(_: Any) -> bool:
        times.append(time.perf_counter())
        return False

    [result] = generator.generate_batch(
        [start], min_length=new, max_length=new, sampling_topk=1, beam_size=1, include_prompt_in_result=False,
        callback=note, **options,
    )  # fmt: skip
    return times, result


def run_causal(path: Path, prompt: int, new: int) -> tuple[list[int], list[Any]]:
    """Tokens and the logits behind them."""
    _, result = _generate(_generator(path), prompt, new, return_logits_vocab=True)
    return list(result.sequences_ids[0]), [np.array(logits).reshape(-1) for logits in result.logits[0]]


def causal(path: str, prompt: int, new: int) -> Workloads:
    """Timed in a worker, by the time of each token that its search reports."""
    generator = _generator(path)

    def prefill() -> float:
        start = time.perf_counter()
        times, _ = _generate(generator, prompt, 1)
        return times[0] - start

    def decode() -> float:
        times, _ = _generate(generator, prompt, new + 1)
        return (times[-1] - times[0]) / new

    return {"prefill": held(prefill), "decode": held(decode)}

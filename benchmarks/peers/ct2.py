"""CTranslate2: its own converter and its own greedy search; BERT, GPT-2 and Llama."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import BertLoader, GPT2Loader, LlamaLoader
from torch import nn
from transformers.models.bert.modeling_bert import BertPooler

from lightning_accel.measure import Target

from .common import Row, Workloads, built, forward_workload, held

LOADERS = {"BertModel": BertLoader, "GPT2LMHeadModel": GPT2Loader, "LlamaForCausalLM": LlamaLoader}


SETTINGS = "converted with quantization='int8', compute_type='int8', inter_threads=1"


def _converted(model: nn.Module, folder: Path) -> Path:
    return built(folder / "ct2-int8", partial(_convert, model))


def _convert(model: Any, path: Path) -> None:
    """As ct2-transformers-converter does, with made-up names for the tokens; the loaders take models apart."""
    model = copy.deepcopy(model)
    if isinstance(model.config.__dict__.get("rope_parameters"), dict):  # where the loader looks for it
        model.config.rope_theta = model.config.rope_parameters["rope_theta"]
    if type(model).__name__ == "BertModel":
        model.config.position_embedding_type = "absolute"
        model.pooler = model.pooler or BertPooler(model.config)  # which the loader wants, and no row reads
    names = {str(index): index for index in range(model.config.vocab_size)}
    tokenizer = SimpleNamespace(get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0")
    spec = LOADERS[type(model).__name__]()(model, tokenizer)
    spec.validate()
    spec.optimize(quantization="int8")
    path.mkdir()
    spec.save(str(path))


def _options() -> dict[str, Any]:
    return {"compute_type": "int8", "inter_threads": 1, "intra_threads": torch.get_num_threads()}


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder_rows(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], calibration: Any, folder: Path
) -> list[Row]:
    """int8 weights and activations, which need no calibration."""
    path = _converted(model, folder)
    target = Target("peers.ct2:encoder", {"path": str(path), "inputs": str(folder / "inputs.npz")})
    return [Row("ctranslate2 int8", target, path, SETTINGS, lambda given: _hidden(str(path))(given))]


def _hidden(path: str) -> Any:
    """Gives hidden states [B, T, D] of inputs whose padding is at the end."""
    model = ctranslate2.Encoder(path, **_options())

    def run(given: Mapping[str, np.ndarray]) -> np.ndarray:
        ids = ctranslate2.StorageView.from_array(given["input_ids"].astype(np.int32))
        lengths = ctranslate2.StorageView.from_array(given["attention_mask"].sum(1).astype(np.int32))
        return np.array(model.forward_batch(ids, lengths).last_hidden_state)

    return run


def encoder(path: str, inputs: str) -> Workloads:
    """Timed in a worker."""
    run, given = _hidden(path), dict(np.load(inputs))
    return forward_workload(lambda: run(given))


# --- language models --------------------------------------------------------------------------------------------------


def causal_rows(model: nn.Module, folder: Path) -> list[Row]:
    """int8 weights and activations."""
    path = _converted(model, folder)
    run, told = partial(run_causal, str(path)), {"path": str(path)}
    return [Row("ctranslate2 int8", Target("peers.ct2:causal", told), path, f"{SETTINGS}, greedy", run)]


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


def run_causal(path: str, prompt: int, new: int) -> tuple[list[int], list[Any]]:
    """Tokens and the logits behind them."""
    generator = ctranslate2.Generator(path, **_options())
    _, result = _generate(generator, prompt, new, return_logits_vocab=True)
    return list(result.sequences_ids[0]), [np.array(logits).reshape(-1) for logits in result.logits[0]]


def causal(path: str, prompt: int, new: int) -> Workloads:
    """Timed in a worker, by the time of each token that its search reports."""
    generator = ctranslate2.Generator(path, **_options())

    def prefill() -> float:
        start = time.perf_counter()
        times, _ = _generate(generator, prompt, 1)
        return times[0] - start

    def decode() -> float:
        times, _ = _generate(generator, prompt, new + 1)
        return (times[-1] - times[0]) / new

    return {"prefill": held(prefill), "decode": held(decode)}

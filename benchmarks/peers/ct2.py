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


def _converted(model: nn.Module, folder: Path, kind: str) -> tuple[Path, str]:
    """The folder of a model in `kind` (int8: weights and activations; float32), and its settings in words."""
    path = built(folder / f"ct2-{kind}", partial(_convert, model, kind))
    return path, f"converted with quantization={kind!r}, compute_type={kind!r}, inter_threads=1"


def _convert(model: Any, kind: str, path: Path) -> None:
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
    spec.optimize(quantization=kind)
    path.mkdir()
    spec.save(str(path))


def _options(kind: str) -> dict[str, Any]:
    return {"compute_type": kind, "inter_threads": 1, "intra_threads": torch.get_num_threads()}


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder_rows(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], calibration: Any, folder: Path, kinds: tuple = ("int8",)
) -> list[Row]:
    """int8 weights and activations, which need no calibration."""
    rows = []
    for kind in kinds:
        path, settings = _converted(model, folder, kind)
        told = {"path": str(path), "kind": kind}
        target = Target("peers.ct2:encoder", {**told, "inputs": str(folder / "inputs.npz")})
        rows.append(Row(f"ctranslate2 {kind}", target, path, settings, lambda given, told=told: _hidden(**told)(given)))
    return rows


def _hidden(path: str, kind: str) -> Any:
    """Gives hidden states [B, T, D] of inputs whose padding is at the end."""
    model = ctranslate2.Encoder(path, **_options(kind))

    def run(given: Mapping[str, np.ndarray]) -> np.ndarray:
        ids = ctranslate2.StorageView.from_array(given["input_ids"].astype(np.int32))
        lengths = ctranslate2.StorageView.from_array(given["attention_mask"].sum(1).astype(np.int32))
        return np.array(model.forward_batch(ids, lengths).last_hidden_state)

    return run


def encoder(path: str, kind: str, inputs: str) -> Workloads:
    """Timed in a worker."""
    run, given = _hidden(path, kind), dict(np.load(inputs))
    return forward_workload(lambda: run(given))


# --- language models --------------------------------------------------------------------------------------------------


def causal_rows(model: nn.Module, folder: Path, kinds: tuple = ("int8",)) -> list[Row]:
    """int8 weights and activations."""
    rows = []
    for kind in kinds:
        path, settings = _converted(model, folder, kind)
        told = {"path": str(path), "kind": kind}
        run = partial(run_causal, **told)
        rows.append(Row(f"ctranslate2 {kind}", Target("peers.ct2:causal", told), path, f"{settings}, greedy", run))
    return rows


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


def run_causal(prompt: int, new: int, path: str, kind: str) -> tuple[list[int], list[Any]]:
    """Tokens and the logits behind them."""
    generator = ctranslate2.Generator(path, **_options(kind))
    _, result = _generate(generator, prompt, new, return_logits_vocab=True)
    return list(result.sequences_ids[0]), [np.array(logits).reshape(-1) for logits in result.logits[0]]


def causal(path: str, kind: str, prompt: int, new: int) -> Workloads:
    """Timed in a worker, by the time of each token that its search reports."""
    generator = ctranslate2.Generator(path, **_options(kind))

    def prefill() -> float:
        start = time.perf_counter()
        times, _ = _generate(generator, prompt, 1)
        return times[0] - start

    def decode() -> float:
        times, _ = _generate(generator, prompt, new + 1)
        return (times[-1] - times[0]) / new

    return {"prefill": held(prefill), "decode": held(decode)}

"""llama.cpp through llama-cpp-python's plain binding: a GGUF file of the gpt2 architecture, then its own quantizer."""

from __future__ import annotations

import ctypes
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import nn

from lightning_accel.measure import Target

from .common import Row, Workloads, built, causal_workloads, chosen_tokens

TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def causal_rows(model: nn.Module, folder: Path) -> list[Row]:
    """8 bits, and 4 bits with the head as its quantizer wants it (6 bits)."""
    rows = []
    for name in TYPES:
        path = built(folder / f"llama-{name}.gguf", partial(_quantized, model, name))
        settings = f"llama_model_quantize({name}), built from source with GGML_NATIVE, context of 1024, {_system()}"
        run = partial(chosen_tokens, partial(LlamaDecoder, path))
        rows.append(Row(f"llamacpp {name}", Target("peers.llama:causal", {"path": str(path)}), path, settings, run))
    return rows


def _system() -> str:
    return llama_cpp.llama_print_system_info().decode().strip(" |")


def _quantized(model: nn.Module, name: str, path: Path) -> None:
    _quiet()
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "float.gguf"
        write_gguf(model, plain)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = TYPES[name]
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not quantize {plain} to {name}")


def write_gguf(model: Any, path: Path) -> None:
    """GPT2LMHeadModel in float32, without a tokenizer; weights are [out, in]; the head is the embedding."""
    config, body = model.config, model.transformer
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    tensors = {"token_embd.weight": body.wte.weight, "position_embd.weight": body.wpe.weight}
    tensors |= {"output_norm.weight": body.ln_f.weight, "output_norm.bias": body.ln_f.bias}
    for index, block in enumerate(body.h):
        norms = {"attn_norm": block.ln_1, "ffn_norm": block.ln_2}
        convs = {"attn_qkv": block.attn.c_attn, "attn_output": block.attn.c_proj}
        convs |= {"ffn_up": block.mlp.c_fc, "ffn_down": block.mlp.c_proj}
        for name, module in (norms | convs).items():
            weight = module.weight.t() if name in convs else module.weight
            tensors |= {f"blk.{index}.{name}.weight": weight, f"blk.{index}.{name}.bias": module.bias}
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Pages of model metadata are not wanted."""


def _quiet() -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


class LlamaDecoder:
    """A context of its own, the last token's logits only."""

    def __init__(self, path: str | Path, context: int = 1024) -> None:
        _quiet()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)

    def step(self, ids: np.ndarray) -> np.ndarray:
        tokens = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama.cpp could not decode {len(ids)} tokens")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,))


def causal(path: str, prompt: int, new: int) -> Workloads:
    """Timed in a worker."""
    decoder = LlamaDecoder(path)
    return causal_workloads(decoder, prompt, new, decoder.vocabulary)

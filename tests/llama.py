"""llama.cpp through llama-cpp-python's plain binding: greedy tokens of a GGUF file, and the logits that chose them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def greedy(binding: Any, path: Path, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """`count` tokens after a prompt, and their logits [count, V]; keys and values are kept in float32."""
    silent = binding.llama_log_callback(lambda level, text, data: None)
    binding.llama_log_set(silent, ctypes.c_void_p(0))
    binding.llama_backend_init()
    model = binding.llama_model_load_from_file(str(path).encode(), binding.llama_model_default_params())
    assert model, f"llama.cpp could not load {path}"
    options = binding.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 64, 1, 1
    options.type_k = options.type_v = 0  # float32
    context = binding.llama_init_from_model(model, options)
    size = binding.llama_vocab_n_tokens(binding.llama_model_get_vocab(model))
    tokens, logits, feed = [], [], prompt
    for _ in range(count):
        given = (binding.llama_token * len(feed))(*feed)
        assert binding.llama_decode(context, binding.llama_batch_get_one(given, len(feed))) == 0
        found = np.ctypeslib.as_array(binding.llama_get_logits_ith(context, -1), (size,)).copy()
        tokens.append(int(found.argmax()))
        logits.append(torch.from_numpy(found))
        feed = tokens[-1:]
    binding.llama_free(context)
    binding.llama_model_free(model)
    return tokens, torch.stack(logits)

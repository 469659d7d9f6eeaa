"""Trained models for the benchmarks, read from the files that `real_data.py` fetches."""

from __future__ import annotations

import copy
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from real_data import folder
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


class Classifier(nn.Module):
    """A BERT encoder, the mean of its last states over real tokens, and a linear layer; gives logits."""

    def __init__(self, encoder: BertModel, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.classifier((states * weights).sum(1) / weights.sum(1))


def minilm(classes: int) -> Classifier:
    """all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; Apache-2.0) with a new classifier."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it has a pooling layer that is not used here
    logging.disable_progress_bar()
    encoder = BertModel.from_pretrained(folder("minilm"), add_pooling_layer=False)
    logging.set_verbosity(before)
    return Classifier(encoder, classes)


def minilm_tokenizer() -> Tokenizer:
    """Its tokenizer; id 0 is padding."""
    tokenizer = Tokenizer.from_file(str(folder("minilm") / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer


# --- SmolLM2 from GGUF -----------------------------------------------------------------------------------------------

NAMES = {  # llama.cpp's name of a block's tensor -> that of transformers
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


@cache
def _gguf() -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("SmolLM2's file needs gguf; run: pip install '.[benchmarks]'") from error
    (path,) = folder("smollm2").glob("*.gguf")
    return GGUFReader(path)


def _field(name: str) -> Any:
    return _gguf().fields[name].contents()


def _state() -> dict[str, Tensor]:
    from gguf import dequantize

    heads = {f"attn_{x}": _field(f"llama.attention.head_count{kv}") for x, kv in (("q", ""), ("k", "_kv"))}
    state = {}
    for tensor in _gguf().tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).view(*(int(n) for n in tensor.shape[::-1]))
        _, block, part = (*tensor.name.split("."), "", "")[:3]
        if part in heads:  # rotary halves: interleaved there, one after the other here
            values = values.view(heads[part], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(tensor.name.split(".")[0])
        state[f"{name or f'model.layers.{block}.{NAMES[part]}'}.weight"] = values
    return state


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct (Ben Allal et al. 2025, arXiv:2502.02737; Apache-2.0), each time a copy.

    The file has 4-bit weights (Q4_1: 32 of them share a scale and a minimum), so these are on a grid of 16 values a
    group until they are trained; a scheme with the same groups and a minimum would lose nothing and prove nothing.
    """
    return copy.deepcopy(_smollm2())


@cache
def _smollm2() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(_field("tokenizer.ggml.tokens")),
        hidden_size=_field("llama.embedding_length"),
        intermediate_size=_field("llama.feed_forward_length"),
        num_hidden_layers=_field("llama.block_count"),
        num_attention_heads=_field("llama.attention.head_count"),
        num_key_value_heads=_field("llama.attention.head_count_kv"),
        rms_norm_eps=_field("llama.attention.layer_norm_rms_epsilon"),
        max_position_embeddings=_field("llama.context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": _field("llama.rope.freq_base")},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(_state(), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)  # tied to the embedding
    return model


def smollm2_tokenizer() -> Tokenizer:
    """Its byte-level BPE tokenizer, digits one by one."""
    vocabulary = {token: i for i, token in enumerate(_field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in _field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


def efficientnet(classes: int = 1000, size: int = 224) -> nn.Module:
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; Apache-2.0), trained on ImageNet; 4.65 M parameters.

    Args:
        classes: 1000 for those of ImageNet; of another number, a new last layer.
        size: of the images; inputs are [batch, 3, size, size] with values (rgb - 127) / 128, rgb in [0, 255].
    """
    model = efficientnet_module().EfficientNet.from_name("efficientnet-lite0", num_classes=classes, image_size=size)
    (path,) = folder("efficientnet").glob("*.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if classes != 1000:
        state |= {f"_fc.{name}": tensor for name, tensor in model._fc.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@cache
def efficientnet_module() -> ModuleType:
    """The package's code, as it was fetched."""
    path = folder("efficientnet-module")
    spec = importlib.util.spec_from_file_location(
        "efficientnet_lite_pytorch", path / "__init__.py", submodule_search_locations=[str(path)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

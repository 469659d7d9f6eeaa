"""Tiny models with seeded random weights, one of each kind that the techniques and engines must know."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import (
        BertConfig,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

VOCABULARY, POSITIONS, WIDTH, INNER, LAYERS, HEADS = 97, 64, 32, 48, 2, 4
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": None,  # any token may come, and none ends a text
}


def llama(seed: int = 0, **changes: Any) -> Any:
    """Grouped-query attention, gated feed-forward blocks, no biases, tied head."""
    return _sharpen(seed, lambda: LlamaForCausalLM(LlamaConfig(**(_LLAMA | changes))))


def gpt2(seed: int = 0, **changes: Any) -> Any:
    """Learned positions, Conv1D layers with biases, tied head."""
    config = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": None,  # any token may come, and none ends a text
    }
    return _sharpen(seed, lambda: GPT2LMHeadModel(GPT2Config(**(config | changes))))


DECODERS = {  # classes of transformers, and what of their configuration is not `llama`'s
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
    "Gemma": {"head_dim": 12},
    "Gemma3": {"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": 5},
}


def decoder(name: str, seed: int = 0) -> Any:
    """`llama`'s sizes in the style of others: Qwen's biases or norms of queries, Gemma's gains, windows."""
    kind = {"Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig")}.get(name, (f"{name}ForCausalLM", f"{name}Config"))
    model, config = (getattr(transformers, part) for part in kind)
    return _sharpen(seed, lambda: model(config(**(_LLAMA | DECODERS[name]))))


def bert(seed: int = 0, kind: str = "BertForSequenceClassification") -> Any:
    """An encoder with a classifier of three classes, or another of BERT's kinds."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        num_labels=2 if kind.endswith("QuestionAnswering") else 3,  # where an answer begins and ends
    )
    return _sharpen(seed, lambda: getattr(transformers, kind)(config))


def vit(seed: int = 0) -> Any:
    """An image classifier of three classes for [batch, 3, 16, 16]."""
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return _sharpen(seed, lambda: ViTForImageClassification(config))


def _sharpen(seed: int, make: Any) -> Any:
    """Larger weights than a fresh initialization has, so that tokens depend on the whole context, not on the last."""
    torch.manual_seed(seed)
    model = make().eval()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if id(parameter) in embeddings else 16.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mlp(seed: int = 0, features: int = 8, hidden: int = 24, classes: int = 3) -> nn.Sequential:
    """ReLU layers with two inner widths."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    ).eval()


class ConvNet(nn.Module):
    """Convolutions, a residual linear layer on the flattened features, and a two-layer head; [batch, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2)
        )
        self.mix = nn.Linear(32, 32)
        self.head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(inplace=True), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.head(x + self.mix(x))


def convnet(seed: int = 0) -> ConvNet:
    """A seeded ConvNet in eval mode."""
    torch.manual_seed(seed)
    return ConvNet().eval()


class Residual(nn.Module):
    """`x + linear(x)` with the input itself as the residual, and a second, keyword input."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> dict[str, Any]:
        y = x + self.linear(x)
        return {"logits": y if gain is None else y * gain, "parts": (F.relu(y), None)}


def ids(batch: int = 2, length: int = 10, seed: int = 0) -> Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def logits(output: Any) -> Tensor:
    """The logits of a model's output, whether named or not."""
    return output.logits if hasattr(output, "logits") else output

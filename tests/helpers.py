"""Small models, data and trainers that the tests share."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 8, 3


class Perceptron(nn.Module):
    """A ReLU multi-layer perceptron with two feed-forward widths."""

    def __init__(self, hidden: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, CLASSES)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.first(x)))
        return self.head(self.dropout(F.relu(self.second(x))))


class Plain(pl.LightningModule):
    """A user's LightningModule: knows nothing of the package, and calls `self.model(...)`, never `self(...)`."""

    def __init__(self, model: nn.Module | None = None, optimizer: str = "adam", lr: float = 0.01) -> None:
        super().__init__()
        self.model = model if model is not None else Perceptron()
        self.optimizer_name, self.lr = optimizer, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.model(x), y))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def seeded(make: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """`make(...)` under a seed, so that two calls give equal weights."""
    torch.manual_seed(seed)
    return make(*args, **kwargs)


def data(n: int = 32, seed: int = 1) -> TensorDataset:
    """Points [n, 8] in three classes that a linear map decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator)
    return TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(7))).argmax(-1))


def loader(n: int = 32, batch: int = 8, shuffle: bool = False, seed: int = 1) -> DataLoader:
    """Batches of `data`; four of eight by default."""
    return DataLoader(data(n, seed), batch_size=batch, shuffle=shuffle)


def trainer(path: Any, callbacks: list[Any] | tuple[Any, ...] = (), **options: Any) -> pl.Trainer:
    """A quiet CPU trainer; no checkpoints unless a ModelCheckpoint is among the callbacks."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "default_root_dir": str(path),
    }
    if "max_steps" not in options and "max_time" not in options:
        defaults["max_epochs"] = 2
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names and bitwise equal tensors."""
    assert list(one) == list(other)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"not bitwise equal: {differing}"


def llama(**changes: Any) -> nn.Module:
    """A tiny causal language model from transformers, 2 layers of width 32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        options = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return seeded(LlamaForCausalLM, LlamaConfig(**(options | changes))).eval().train()


def texts(n: int = 8, length: int = 12, batch: int = 4) -> DataLoader:
    """Batches of token ids with labels, as transformers' collators give them."""
    ids = torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(3))

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        ids = torch.stack([row[0] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return DataLoader(TensorDataset(ids), batch_size=batch, collate_fn=collate)

"""Five programs compiled once a session, each beside its portable twin and the eager model that it must equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lightning_accel import PruneConfig, QuantConfig, export_model, load, prepare_, prune_model_
from lightning_accel.loaded import LoadedModel


@dataclass
class Built:
    """An exported model, and the eager model as it was given to `export_model`."""

    directory: Path
    eager: Any

    def load(self, engine: str = "aoti") -> LoadedModel:
        return load(self.directory, engine=engine)


def build(path: pytest.TempPathFactory, name: str, model: nn.Module, **options: Any) -> Built:
    directory = path.mktemp(name) / "artifact"
    export_model(model, directory, measure=False, **options)
    return Built(directory, model)


@pytest.fixture(scope="session")
def llama_int8(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A causal LM whose feed-forward neurons were halved and which was prepared for int8."""
    model = tiny.llama()
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs={"input_ids": tiny.ids()})
    prepare_(model, QuantConfig("int8"))
    data = [{"input_ids": tiny.ids(4, 24, seed=s)} for s in range(4)]
    return build(tmp_path_factory, "llama", model, masks=masks, data=data)


@pytest.fixture(scope="session")
def gpt2_fp32(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A causal LM in float32."""
    return build(tmp_path_factory, "gpt2", tiny.gpt2(), data=[{"input_ids": tiny.ids(3, 30)}])


@pytest.fixture(scope="session")
def bert_int8(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A classifier with named outputs, two keyword inputs, free batch and length; quantized after training."""
    inputs = {"input_ids": tiny.ids(3, 12), "attention_mask": torch.ones(3, 12, dtype=torch.int64)}
    data = [
        {"input_ids": tiny.ids(8, 20, seed=s), "attention_mask": torch.ones(8, 20, dtype=torch.int64)} for s in range(8)
    ]
    return build(tmp_path_factory, "bert", tiny.bert(), example_inputs=inputs, quantize=QuantConfig("int8"), data=data)


@pytest.fixture(scope="session")
def residual_fp32(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A float32 convolutional network, whose features are a residual, beside `x + linear(x)` on an input."""
    torch.manual_seed(0)
    inputs = {"image": torch.randn(4, 3, 8, 8), "x": torch.randn(4, 16)}
    return build(tmp_path_factory, "residual", TwoNets().eval(), example_inputs=inputs)


class TwoNets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.residual = tiny.convnet(), tiny.Residual()

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.images(image), self.residual(x)


@pytest.fixture(scope="session")
def int8_layers(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Int8 layers and an embedding alone, of awkward sizes, layouts and dtypes; rows are free."""
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(0, 37, (3, 5)), "x": torch.randn(2, 5, 12)}
    return build(
        tmp_path_factory, "layers", Layers().eval(), example_inputs=inputs, quantize=QuantConfig("int8"),
    )  # fmt: skip


class Layers(nn.Module):
    """Each output is one quantized layer, fed by nothing but inputs or codes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 22)
        self.wide, self.narrow = nn.Linear(22, 300), nn.Linear(12, 1, bias=False)
        self.turned, self.one, self.flat = nn.Linear(5, 33), nn.Linear(1, 7), nn.Linear(12, 5)

    def forward(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        rows = self.embedding(ids)
        return {
            "embedding": rows,
            "wide": self.wide(rows),
            "narrow": self.narrow(x),
            "turned": self.turned(x.transpose(1, 2)),
            "one": self.one(x[..., 3:4]),
            "flat": self.flat(x[0, 0]),
        }

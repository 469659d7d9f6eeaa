"""Artifacts that several tests read: portable programs only here, the compiled ones in `compiled.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from alone import installed  # noqa: F401  a fixture
from compiled import bert_int8, gpt2_fp32, int8_layers, llama_int8, residual_fp32  # noqa: F401  fixtures

from lightning_accel import QuantConfig, artifact, export_model


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 causal language model with a tokenizer; not to be written to (see `altered`)."""
    directory = tmp_path_factory.mktemp("decoder")
    tokenizer = directory / "source.json"
    tokenizer.write_text('{"version": "1.0"}')
    export_model(
        tiny.llama(),
        directory / "artifact",
        quantize=QuantConfig("int8"),
        data=[{"input_ids": tiny.ids(4, 12)}],
        metric=_mean_logit,
        engines=("portable",),
        measure=False,
        assets={"tokenizer.json": tokenizer},
        configs={"QuantConfig": {"scheme": "int8"}},
    )
    return directory / "artifact"


def _mean_logit(model, batches) -> float:
    return float(torch.cat([tiny.logits(model(**batch)).flatten() for batch in batches]).mean())


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float module with two inputs and named, nested outputs; not to be written to (see `altered`)."""
    directory = tmp_path_factory.mktemp("network") / "artifact"
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 16), "gain": torch.rand(4, 16)}
    export_model(tiny.Residual(), directory, example_inputs=inputs, engines=("portable",), measure=False)
    return directory


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Path]:
    """A function that copies an artifact, with its manifest changed by `change(manifest)`, as if written so."""

    def alter(source: Path, change: Callable[[dict], object] = lambda manifest: None) -> Path:
        directory = tmp_path / "altered"
        shutil.copytree(source, directory)
        manifest = json.loads((directory / "manifest.json").read_text())
        change(manifest)
        artifact.write_manifest(directory, manifest)
        return directory

    return alter

"""Other engines in the same interleaved runs, each with its best documented settings.

A peer's model is made from ours, kept on disk, checked once against the float model, and timed in a worker process of
its own like an artifact. A peer that is not installed is named, with the command that installs it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .common import CHECKED_TOKENS, Row, agreement, causal_agreement, encoder_agreement

CALIBRATION = 32  # batches of random ids, where the weights are random too


@dataclass(frozen=True)
class Peer:
    """Where it is, what it needs, how to get that, and which kinds of model it is set up for here."""

    module: str
    needs: tuple[str, ...]
    install: str
    kinds: tuple[str, ...] = ("encoder", "causal")


PEERS = {
    "openvino": Peer("ov", ("openvino", "nncf"), "pip install openvino nncf"),
    "onnxruntime": Peer("ort", ("onnxruntime", "onnx"), "pip install onnxruntime onnx"),
    "ctranslate2": Peer("ct2", ("ctranslate2",), "pip install ctranslate2"),
    "llamacpp": Peer(
        "llama",
        ("llama_cpp", "gguf"),
        "pip install gguf && CC=clang CXX=clang++ CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python "
        "llama-cpp-python",
        ("causal",),
    ),
}


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--peers`."""
    parser.add_argument("--peers", default=",".join(PEERS), help="names, with commas; or none")


def chosen(names: str, kind: str) -> list[Peer]:
    """The peers that can run; says which cannot, and why.

    Raises:
        ValueError: there is no such peer.
    """
    found = []
    for name in [] if names == "none" else names.split(","):
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; write --peers {','.join(PEERS)}, or --peers none")
        peer = PEERS[name]
        if kind not in peer.kinds:
            print(f"{name} is left out: no {kind} is set up for it here")
        elif missing := [module for module in peer.needs if not importlib.util.find_spec(module)]:
            print(f"{name} is left out, {' and '.join(missing)} not being installed: {peer.install}")
        else:
            found.append(peer)
    return found


def packages(peers: Sequence[Peer]) -> list[str]:
    """The distributions whose versions the figures depend on."""
    return [module.replace("llama_cpp", "llama-cpp-python") for peer in peers for module in peer.needs]


def encoder_rows(
    peers: Sequence[Peer],
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    folder: Path,
    calibration: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> tuple[list[Row], list[str]]:
    """Builds an encoder's rows where they are not there yet; the rows, and their agreement with `model` in words.

    Args:
        calibration: batches like `inputs`; by default of random ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    if calibration is None:
        draw, shape = torch.Generator().manual_seed(0), tuple(inputs["input_ids"].shape)
        ids = [torch.randint(0, model.config.vocab_size, shape, generator=draw) for _ in range(CALIBRATION)]
        calibration = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    batches = [{name: value.numpy() for name, value in batch.items()} for batch in calibration]
    rows = [row for peer in peers for row in _module(peer).encoder_rows(model, inputs, batches, folder)]
    return rows, [agreement(row, partial(encoder_agreement, model, inputs, row.run)) for row in rows]


def causal_rows(peers: Sequence[Peer], model: nn.Module, prompt: int, folder: Path) -> tuple[list[Row], list[str]]:
    """As `encoder_rows`, of a causal language model."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for peer in peers for row in _module(peer).causal_rows(copy.deepcopy(model), folder)]

    def compare(row: Row) -> dict[str, float]:
        tokens, logits = row.run(prompt, CHECKED_TOKENS)
        return causal_agreement(model, torch.arange(prompt), tokens, logits)

    return rows, [agreement(row, partial(compare, row)) for row in rows]


def notes(rows: Sequence[Row], agreements: Sequence[str]) -> str:
    """Settings and agreement, as they belong below a table."""
    settings = "\n".join(f"- {row.name}: {row.settings}" for row in rows)
    return f"agreement with the float model:\n{chr(10).join(f'- {a}' for a in agreements)}\n\nsettings:\n{settings}"


def _module(peer: Peer) -> Any:
    return importlib.import_module(f"peers.{peer.module}")

"""Pruned int8 artifacts against the unpruned one: MiniLM's shape, and decoding at GPT-2-small's.

    lightning-accel run benchmarks/pruned.py --threads 1 --out out/pruned  # builds all once, then measures

Half of the neurons, of the heads, of the layers, and of all three are cut out before the export. Random weights: the
units are drawn, and no quality is claimed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from encoders import float_model, inputs
from tables import PAUSE, coverage, default_load, provenance, table
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_accel import PruneConfig, QuantConfig, export_model, prune_model_, shrink_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.measure import Target, compare
from lightning_accel.select import count_flops, count_parameters

STRUCTURES: dict[str, tuple[str, ...]] = {
    "dense": (),
    "neurons": ("neurons",),
    "heads": ("heads",),
    "layers": ("layers",),
    "all three": ("neurons", "heads", "layers"),
}
DECODER = ("dense", "layers")


def cut(model: Any, structures: tuple[str, ...], example: dict[str, torch.Tensor]) -> Any:
    """`model` without half of each structure."""
    for structure in structures:
        masks = prune_model_(model, PruneConfig(structure, 0.5, saliency="random"), example_inputs=example)
        model = shrink_model(model, masks, example_inputs=example)
    return model


def build(folder: Path, model: Any, structures: tuple[str, ...], example: dict[str, torch.Tensor]) -> str:
    """Writes an int8 artifact, unless it is there; the parameters and FLOPs that are left, in words."""
    small = cut(model, structures, example)
    if not (folder / MANIFEST).exists():
        given = {} if isinstance(small, GPT2LMHeadModel) else {"example_inputs": example}
        export_model(small, folder, quantize=QuantConfig("int8"), engines=("aoti",), measure=False, **given)
    return f"{count_parameters(small) / 1e6:.1f} M parameters, {count_flops(small, (), example)[''] / 1e9:.2f} GFLOP"


def gpt2() -> GPT2LMHeadModel:
    """GPT-2-small's shape, random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/pruned"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = {
        "minilm, 1 x 128": (lambda: float_model("minilm"), STRUCTURES, inputs(1, 128), {}),
        "gpt2, prompt 128, 64 new": (gpt2, DECODER, {"input_ids": inputs(1, 128)["input_ids"]}, {"prompt": 128}),
    }  # fmt: skip
    for title, (make, names, example, lengths) in rows.items():
        folders = {name: options.out / f"{title.split(',')[0]}-{name.replace(' ', '-')}" for name in names}
        left = {name: build(folders[name], make(), STRUCTURES[name], example) for name in names}
        targets = {name: Target(str(folder), lengths) for name, folder in folders.items()}
        measured = compare(targets, threads=options.threads, rounds=options.rounds, pause=PAUSE)
        print(table(f"{title}, int8", measured, {name: default_load(folder) for name, folder in folders.items()}))
        said = (f"{name}: {left[name]} ({coverage(folder)})" for name, folder in folders.items())
        print("\n" + "; ".join(said) + "\n")
    print("random weights: no quality is claimed\n" + provenance(options.threads))


if __name__ == "__main__":
    main()

"""Decode at GPT-2-small shape, random weights: artifacts against `generate`, the float engine, other engines.

    lightning-accel run benchmarks/gpt2_decode.py --threads 1 --out out/gpt2  # builds all once, then measures
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import peers
import torch
from tables import PAUSE, coverage, default_load, provenance, table
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_accel import QuantConfig, export_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.measure import Target, compare

SCHEMES = ("int8", "int4-int8", "int4-weight")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def build(out: Path) -> GPT2LMHeadModel:
    """Writes the checkpoint and the artifacts, unless they are there; returns the float model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()
    if not (out / "checkpoint").exists():
        model.save_pretrained(out / "checkpoint")
    for name, quantize in (("float", None), *((scheme, QuantConfig(scheme)) for scheme in SCHEMES)):
        if not (out / name / MANIFEST).exists():
            export_model(model, out / name, quantize=quantize, engines=("aoti",), measure=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpt2"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    peers.add_option(parser)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    others = peers.chosen(options.peers, "causal")
    rows, agreements = peers.causal_rows(others, build(out), options.prompt, out / "peers")
    sys.path.insert(0, str(RECIPES))
    lengths = {"prompt": options.prompt, "new": options.new}
    targets = {
        "eager_fp32": Target("transformers_generate:workloads", {"checkpoint": str(out / "checkpoint"), **lengths}),
        "engine_fp32": Target(str(out / "float"), lengths),
        **{scheme: Target(str(out / scheme), lengths) for scheme in SCHEMES},
        **{row.name: replace(row.target, arguments={**(row.target.arguments or {}), **lengths}) for row in rows},
    }
    measured = compare(targets, threads=options.threads, rounds=options.rounds, repeat=2, pause=PAUSE)
    folders = {"engine_fp32": out / "float", **{scheme: out / scheme for scheme in SCHEMES}}
    sizes = {name: default_load(folder) for name, folder in folders.items()}
    sizes["eager_fp32"] = (out / "checkpoint" / "model.safetensors").stat().st_size
    sizes |= {row.name: row.bytes for row in rows}
    print(table(f"GPT-2-small shape, prompt {options.prompt}, {options.new} new tokens", measured, sizes))
    print("\n" + "\n\n".join(coverage(out / scheme) for scheme in SCHEMES))
    print("\n" + peers.notes(rows, agreements))
    print("\nrandom weights: no quality is claimed\n" + provenance(options.threads, peers.packages(others)))


if __name__ == "__main__":
    main()

"""Encoders at MiniLM and BERT-base shapes, random weights, against float and other engines.

int8 and int8-static, each with attention in float and in int8.

    lightning-accel run benchmarks/encoders.py --threads 1 --out out/encoders  # builds all once, then measures
    lightning-accel run benchmarks/encoders.py minilm-8x128 --threads 1 --out out/encoders
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peers
import torch
from tables import ATTENTION, PAUSE, config_of, coverage, default_load, file_name, provenance, table
from transformers import BertConfig, BertModel

from lightning_accel import export_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.measure import Target, compare

SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {},
}
ROWS = {  # shape, batch, length
    "minilm-1x128": ("minilm", 1, 128),
    "minilm-8x128": ("minilm", 8, 128),
    "bert-base-1x128": ("bert-base", 1, 128),
}
CONFIGS = {
    scheme: config_of(scheme) for scheme in ("int8", f"int8{ATTENTION}", "int8-static", f"int8-static{ATTENTION}")
}


def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch * length).view(batch, length) * 7 % 30522
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def float_model(shape: str) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SHAPES[shape]), add_pooling_layer=False).eval()


def artifact(out: Path, row: str, name: str) -> Path:
    return out / file_name(f"{row}-{name}")


def build(out: Path, rows: list[str]) -> None:
    """Writes the artifacts, unless they are there; the golden inputs are those that are timed."""
    for row in rows:
        shape, batch, length = ROWS[row]
        model = float_model(shape)
        example = inputs(batch, length)
        for name, quantize in {"float": None, **CONFIGS}.items():
            folder = artifact(out, row, name)
            if not (folder / MANIFEST).exists():
                export_model(
                    model, folder, example_inputs=example, quantize=quantize, calibration=8 * [example], measure=False
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("out/encoders"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    peers.add_option(parser)
    options = parser.parse_args()
    wanted = options.rows or list(ROWS)
    options.out.mkdir(parents=True, exist_ok=True)
    others = peers.chosen(options.peers, "encoder")
    build(options.out, wanted)
    for row in wanted:
        shape, batch, length = ROWS[row]
        float_, *quantized = (artifact(options.out, row, name) for name in ("float", *CONFIGS))
        folder = options.out / "peers" / row
        timed, agreements = peers.encoder_rows(others, float_model(shape), inputs(batch, length), folder)
        targets = {
            "eager_fp32": Target(str(float_), engine="portable"),
            "engine_fp32": Target(str(float_)),
            **{name: Target(str(folder)) for name, folder in zip(CONFIGS, quantized, strict=True)},
            **{peer.name: peer.target for peer in timed},
        }
        measured = compare(targets, threads=options.threads, rounds=options.rounds, pause=PAUSE)
        sizes = {"eager_fp32": default_load(float_), "engine_fp32": default_load(float_)}
        sizes |= {name: default_load(folder) for name, folder in zip(CONFIGS, quantized, strict=True)}
        sizes |= {peer.name: peer.bytes for peer in timed}
        print(table(f"{shape}, {batch} x {length}", measured, sizes) + "\n")
        print("; ".join(map(coverage, quantized)) + "\n")
        print(peers.notes(timed, agreements) + "\n")
    print("random weights: no quality is claimed\n" + provenance(options.threads, peers.packages(others)))


if __name__ == "__main__":
    main()

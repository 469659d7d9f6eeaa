"""What quantization-aware training costs: a training step with the fake quantization of each scheme over the plain one.

    lightning-accel run benchmarks/qat_step.py --threads 2

MiniLM's shape with a classifier, 32 x 128 tokens, AdamW, dropout on, random weights; forward, loss, backward, update.
The goal is at most 1.15 x in int8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from encoders import SHAPES
from tables import ATTENTION, PAUSE, config_of, provenance, steps
from transformers import BertConfig, BertForSequenceClassification

from lightning_accel import prepare_
from lightning_accel.measure import Target, compare
from lightning_accel.quantize.config import SCHEMES

GOAL = 1.15


def workloads(scheme: str | None, batch: int, length: int) -> dict[str, Callable[[], float]]:
    """A step (seconds); timed in a worker."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES["minilm"])).train()
    if scheme:
        prepare_(model, config_of(scheme))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    inputs = {
        "input_ids": torch.randint(0, model.config.vocab_size, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (batch,)),
    }

    def step() -> float:
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return {"step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shape = {"batch": options.batch, "length": options.length}
    targets = {
        name: Target("qat_step:workloads", {"scheme": scheme, **shape})
        for name, scheme in (("plain", None), *((f"QAT {s}", s) for s in (*SCHEMES, f"int8{ATTENTION}")))
    }
    measured = compare(targets, threads=options.threads, rounds=options.rounds, pause=PAUSE)
    print(steps(f"minilm, {options.batch} x {options.length}", measured))
    print(f"\ngoal {GOAL} x\n" + provenance(options.threads))


if __name__ == "__main__":
    main()

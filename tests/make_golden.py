"""Writes tests/data/golden, the artifact that every later version must still read, and what it generates.

Run only when the format's number changes, and keep the old one then:

    python tests/make_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch

from lightning_accel import QuantConfig, export_model, load

DATA = Path(__file__).parent / "data"
PROMPTS = [[45, 38], [83, 43, 54], [55, 56, 17, 44, 39]]


def main() -> None:
    """Exports a tiny Llama in int8 and stores its greedy continuations, which no rounding may decide."""
    model = tiny.llama(seed=35)
    held_out = [{"input_ids": tiny.ids(4, 16, seed=2)}]
    print(
        export_model(
            model,
            DATA / "golden",
            quantize=QuantConfig("int8"),
            data=held_out,
            engines=("portable",),
            measure=False,
        )
    )
    loaded = load(DATA / "golden")
    ids = loaded.generate(PROMPTS, 10)
    margins = [_margin(loaded, prompt, row) for prompt, row in zip(PROMPTS, ids.tolist(), strict=True)]
    assert min(margins) > 0.1, f"one rounding flip could decide a token: margins {margins}"
    expected = {"prompts": PROMPTS, "ids": ids.tolist(), "torch": torch.__version__}
    (DATA / "golden.json").write_text(json.dumps(expected, indent=1) + "\n")


def _margin(loaded, prompt: list[int], new: list[int]) -> float:
    logits_TV = loaded(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    top = logits_TV.topk(2).values
    return float((top[:, 0] - top[:, 1]).min())


if __name__ == "__main__":
    main()

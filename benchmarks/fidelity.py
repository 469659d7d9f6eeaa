"""Contract 4 on whole models: how far an artifact is from the fake-quantized model, and from the float one.

    lightning-accel run benchmarks/fidelity.py --out out/fidelity            # trains, exports, prints; resumes
    lightning-accel run benchmarks/fidelity.py --quick --engines portable    # a few steps each

Six small models are trained on real data (CPython's own documentation as bytes; scikit-learn's digits), the last half
of the steps with quantization. Export verifies each on held-out data against the bounds of `lightning_accel/verify.py`;
what is printed here is how much of each bound was used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning.pytorch as pl
import torch
from tables import ATTENTION, config_of, file_name, provenance
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_accel import AccelModule, Export, QuantizationAwareTraining
from lightning_accel.artifact import MANIFEST, read_manifest
from lightning_accel.quantize.config import SCHEMES

LENGTH, MASK, BATCH = 64, 256, 32
WIDTH, INNER, LAYERS, HEADS = 128, 512, 4, 4


# --- data -------------------------------------------------------------------------------------------------------------


def text() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Windows of bytes to train on, and others to verify with."""
    data = torch.tensor(list("\n".join(topics.values()).encode()))
    windows = [{"input_ids": ids, "labels": ids} for ids in data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)]
    return windows[: -8 * BATCH], windows[-8 * BATCH :]


def masked(seed: int = 0) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The same with 15 % of the bytes to be found."""
    generator = torch.Generator().manual_seed(seed)

    def hide(window: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = torch.rand(LENGTH, generator=generator) < 0.15
        ids = window["input_ids"]
        return {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, -100)}

    return tuple([hide(window) for window in part] for part in text())  # type: ignore[return-value]


def digits() -> tuple[list[Any], list[Any]]:
    """8 x 8 images of digits and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, classes = torch.tensor(x, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16, torch.tensor(y)[order]
    items = list(zip(images, classes, strict=True))
    return items[:-256], items[-256:]


def pixels() -> tuple[list[Any], list[Any]]:
    """`digits` as transformers takes images."""
    return tuple([{"pixel_values": x, "labels": y} for x, y in part] for part in digits())  # type: ignore[return-value]


# --- models -----------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.GELU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def llama() -> nn.Module:
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    config = LlamaConfig(vocab_size=256, hidden_size=WIDTH, intermediate_size=INNER, **shape, bos_token_id=0)
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=256, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, bos_token_id=0)
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": LENGTH}
    return BertForMaskedLM(BertConfig(vocab_size=257, hidden_size=WIDTH, intermediate_size=INNER, **shape))


def vit() -> nn.Module:
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 8, "patch_size": 2}
    config = ViTConfig(hidden_size=WIDTH, intermediate_size=INNER, **shape, num_channels=1, num_labels=10)
    return ViTForImageClassification(config)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def cnn() -> nn.Module:
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    down = [nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, Block(32), *down, Block(64), *head)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (mlp, digits),
    "llama": (llama, text),
    "gpt2": (gpt2, text),
    "bert": (bert, masked),
    "vit": (vit, pixels),
    "cnn": (cnn, digits),
}
ENCODERS = ("bert", "vit")
EVERY = (*SCHEMES, f"int8{ATTENTION}")


# --- runs -------------------------------------------------------------------------------------------------------------


def run(name: str, scheme: str, seed: int, folder: Path, steps: int, engines: tuple[str, ...]) -> None:
    """Trains, the last half of the steps with `scheme`, and exports to `folder`, which verifies."""
    make, data = MODELS[name]
    train, held_out = data()
    pl.seed_everything(seed, verbose=False)
    network = make()
    loaders = DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(held_out, BATCH)
    export = Export(folder, module="model", engines=engines, measure=False, data=loaders[1])
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[QuantizationAwareTraining(config_of(scheme), begin=0.5, module="model"), export],
    )  # fmt: skip
    trainer.fit(AccelModule(network, lr=1e-3), loaders[0])


def rows(name: str, scheme: str, seed: int, folder: Path) -> list[str]:
    """A row of the table for each program of an artifact."""
    manifest = read_manifest(folder)
    metrics = {metric["name"]: metric["value"] for metric in manifest["metrics"]}
    share = manifest["coverage"][0]["share_of_flops"]
    found = []
    for program in manifest["programs"]:
        v = program["verification"]
        noise = "" if v["kl_noise"] is None else f" (noise {v['kl_noise']:.1e})"
        found.append(
            f"| {name} | {scheme} | {seed} | {program['engine']} | {share:.1%} | {v['kl_trained']:.1e}{noise} "
            f"| {v['kl_plain']:.1e} | {v['kl_trained'] / v['kl_plain']:.4f} | {v['agreement']:.2%} "
            f"| {v['agreement_over_margin']:.2%} of {v['over_margin']:.1%} "
            f"| {metrics['loss (trained)']:.5f} | {metrics['loss (artifact)']:.5f} |"
        )
    return found


HEAD = (
    "| model | scheme | seed | program | quantized FLOPs | KL(trained, artifact) | KL(float, artifact) | ratio | "
    "same prediction | over the margin | loss, trained | loss, artifact |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--schemes", nargs="+", default=list(EVERY), choices=EVERY)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--engines", nargs="+", default=["aoti", "portable"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="seed 0, 20 steps")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = [0], 20
    print(HEAD + "\n" + "|---" * (HEAD.count("|") - 1) + "|")
    for seed, name in product(options.seeds, options.models):
        for scheme in options.schemes:
            if (name == "cnn" and scheme != "int8-static") or (scheme.endswith(ATTENTION) and name not in ENCODERS):
                continue  # the only scheme of convolutions; attention in int8 is of encoders
            folder = options.out / file_name(f"{name}-{scheme}-{seed}")
            if not (folder / MANIFEST).exists():
                run(name, scheme, seed, folder, options.steps, tuple(options.engines))
            print("\n".join(rows(name, scheme, seed, folder)), flush=True)
    print("\n" + json.dumps({"steps": options.steps}) + "\n" + provenance(torch.get_num_threads()))


if __name__ == "__main__":
    main()

"""I have a trained language model; make it fast.

Trains a small Llama-style model on Python's own documentation and sources (or --text FILE), compresses it in one fit
(mixed precision, distillation, pruning, quantization-aware training, export), and compares three ways to run it on a
held-out test split: transformers' `generate`, the same float model compiled, and the compressed artifact.

    lightning-accel run recipes/gpt.py --out out/demo
    lightning-accel run recipes/gpt.py --quick --out out/quick      # a smaller model, what CI runs
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import math
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_accel import (
    AccelModule,
    AutoMixedPrecision,
    Cubic,
    Distillation,
    DistillConfig,
    Export,
    PruneConfig,
    Pruning,
    QuantConfig,
    QuantizationAwareTraining,
    export_model,
    load,
)
from lightning_accel.measure import Measurement, Target, compare, machine, size_on_disk, versions

console = Console()
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """Sizes of a run."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    inner: int = 1024  # of the feed-forward blocks
    length: int = 128  # tokens of a training example
    batch: int = 8
    lr: float = 4e-3
    baseline_steps: int = 1000
    further_steps: int = 300  # of the control, and of the compressed fit
    further_lr: float = 1e-3
    megabytes: float = 6.0  # of text
    prompt: int = 128  # tokens, for prefill
    new: int = 128  # tokens, for decoding


FULL = Settings()
QUICK = Settings(
    vocabulary=384,
    width=64,
    layers=2,
    inner=256,
    length=64,
    baseline_steps=400,
    further_steps=150,
    megabytes=2.0,
    prompt=64,
    new=32,
)


# --- data ------------------------------------------------------------------------------------------------------------


def documents(text: Path | None) -> list[str]:
    """Documents of real text: groups of a file's paragraphs, or Python's documentation and its library's sources."""
    if text is not None:
        paragraphs = [p for p in text.read_text(errors="replace").split("\n\n") if p.strip()]
        return ["\n\n".join(paragraphs[i : i + 10]) for i in range(0, len(paragraphs), 10)]
    from pydoc_data.topics import topics

    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [*(topics[name] for name in sorted(topics)), *(path.read_text(errors="replace") for path in library)]


def split(found: list[str], megabytes: float) -> dict[str, list[str]]:
    """Train, validation and held-out test, each document in one of them, by a hash of its text."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    order = sorted(found, key=lambda d: hashlib.sha256(d.encode()).hexdigest())
    size = 0
    for index, document in enumerate(order):
        size += len(document)
        if size > megabytes * 1e6 and index > 30:
            break
        parts["test" if index % 10 == 0 else "validation" if index % 10 == 1 else "train"].append(document)
    return parts


def require(sizes: dict[str, int], settings: Settings) -> None:
    """Exits where a part has too few tokens for a batch of training examples."""
    least = settings.batch * settings.length
    short = [f"{name} has {size:,}" for name, size in sizes.items() if size < least]
    if short:
        raise SystemExit(
            f"too little text: {' and '.join(short)} of at least {least:,} tokens; validation and test get a tenth of "
            f"it each, so give --text a file of {60 * least // 1000} kB or more, in 200 or more paragraphs with empty "
            "lines between them"
        )


def train_tokenizer(train: list[str], vocabulary: int, path: Path) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2016), trained on the training documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        train,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, part: list[str]) -> torch.Tensor:
    """All documents as one stream of token ids [n], each after an <|end|>."""
    return torch.tensor([i for encoding in tokenizer.encode_batch(part) for i in (0, *encoding.ids)])


class Blocks(Dataset):
    """Consecutive blocks [length] of a stream, as a causal language model takes them."""

    def __init__(self, stream: torch.Tensor, length: int) -> None:
        self.blocks = stream[: len(stream) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def bigram_loss(train: torch.Tensor, test: torch.Tensor, vocabulary: int) -> float:
    """Nats a token of an interpolated bigram model, (c(a, b) + k p(b)) / (c(a) + k), k tuned on the training data."""

    def counts(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unigram = torch.bincount(stream, minlength=vocabulary).double() + 1
        bigram = torch.bincount(stream[:-1] * vocabulary + stream[1:], minlength=vocabulary**2).double()
        return unigram / unigram.sum(), bigram.view(vocabulary, vocabulary)

    def loss(model: tuple[torch.Tensor, torch.Tensor], stream: torch.Tensor, k: float) -> float:
        unigram, bigram = model
        before, after = stream[:-1], stream[1:]
        probability = (bigram[before, after] + k * unigram[after]) / (bigram.sum(1)[before] + k)
        return -probability.log().mean().item()

    cut = len(train) * 9 // 10
    partial = counts(train[:cut])
    best = min((1, 3, 10, 30, 100, 300, 1000), key=lambda k: loss(partial, train[cut:], k))
    return loss(counts(train), test, best)


# --- training --------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> LlamaForCausalLM:
    """A Llama-style model with grouped-query attention and a tied head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.width,
            intermediate_size=settings.inner,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.width // 32,
            num_key_value_heads=settings.width // 64 or 1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def fit(
    model: LlamaForCausalLM,
    data: dict[str, DataLoader],
    steps: int,
    lr: float,
    seed: int,
    callbacks: list[pl.Callback] | None = None,
) -> pl.Trainer:
    """Plain Lightning, with whatever callbacks are given; trains `model` itself."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=1000,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        gradient_clip_val=1.0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=20,
        enable_model_summary=False,
        callbacks=[RichProgressBar(leave=True), *(callbacks or [])],
    )
    trainer.fit(AccelModule(model, lr=lr, weight_decay=0.05), data["train"], data["validation"])
    return trainer


@torch.no_grad()
def test_loss(logits: Callable[[torch.Tensor], torch.Tensor], blocks: torch.Tensor) -> float:
    """Mean nats a token over blocks [n, length], teacher-forced."""
    total = 0.0
    with console.status("computing the loss on the test split"):
        for part in blocks.split(16):
            total += F.cross_entropy(logits(part)[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (blocks.numel() - len(blocks))


# --- the report ------------------------------------------------------------------------------------------------------

COLUMNS = {  # key in report.json -> head, format and unit in the table
    "loss": ("loss", "{:.4f}", 1),
    "perplexity": ("perplexity", "{:.2f}", 1),
    "prefill_ms": ("prefill ms", "{:.2f}", 1),
    "decode_tokens_per_s": ("decode tokens/s", "{:,.0f}", 1),
    "size_bytes": ("disk MB", "{:.2f}", 1e6),
    "peak_rss_bytes": ("peak RSS MB", "{:.0f}", 1e6),
    "load_s": ("load s", "{:.3f}", 1),
}


def row(loss: float, measured: Measurement, size: int) -> dict[str, float]:
    """One row of the table; the spread of the timings beside their medians."""
    prefill, decode = measured.seconds["prefill"], measured.seconds["decode"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "prefill_ms": 1e3 * prefill.median,
        "decode_tokens_per_s": 1 / decode.median,
        "size_bytes": size,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "load_s": measured.load_s,
        "prefill_ms_least_most": [1e3 * prefill.least, 1e3 * prefill.most],
        "decode_tokens_per_s_least_most": [1 / decode.most, 1 / decode.least],
    }


def show(report: dict[str, Any], out: Path) -> None:
    """Prints the table and writes report.json and report.md."""
    names = ("eager_fp32", "engine_fp32", "artifact")
    cells = [
        [name, *(form.format(report[name][key] / unit) for key, (_, form, unit) in COLUMNS.items())] for name in names
    ]
    heads = [head for head, _, _ in COLUMNS.values()]
    table = Table("", *heads, title="held-out test split", padding=0)
    for line in cells:
        table.add_row(*line)
    console.print(table)
    text = "\n".join(report["summary"])
    console.print(text, highlight=False)
    markdown = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    markdown += ["| " + " | ".join(line) + " |" for line in cells]
    details = f"{report['machine']}\n\n{report['versions']}\n\nseed {report['seed']}"
    (out / "report.md").write_text("\n".join(markdown) + "\n\n" + text.replace("\n", "\n\n") + "\n\n" + details + "\n")
    (out / "report.json").write_text(json.dumps(report, indent=1))


def summarize(report: dict[str, Any]) -> list[str]:
    """The comparison in words; what is slower comes first."""
    eager, engine, ours = report["eager_fp32"], report["engine_fp32"], report["artifact"]
    gains = {
        which: {
            "prefill": a["prefill_ms"] / b["prefill_ms"],
            "decode": b["decode_tokens_per_s"] / a["decode_tokens_per_s"],
        }
        for which, a, b in (("compile", eager, engine), ("compression", engine, ours), ("together", eager, ours))
    }
    report["gains"] = gains
    slower = [f"{w} {g:.2f} x" for w, g in gains["compression"].items() if g < 1]
    lines = [f"SLOWER than the same float model compiled: {', '.join(slower)}"] if slower else []
    for which, label in (
        ("compile", "compile gain (engine_fp32 over eager_fp32)"),
        ("compression", "compression gain (artifact over engine_fp32)"),
        ("together", "both (artifact over eager_fp32)"),
    ):
        lines.append(f"{label}: prefill {gains[which]['prefill']:.2f} x, decode {gains[which]['decode']:.2f} x")
    return [
        *lines,
        f"size: {ours['size_bytes'] / eager['size_bytes']:.3f} of the float safetensors "
        f"(the portable program, apart: {report['portable_bytes']:,} bytes)",
        f"loss: {100 * (ours['loss'] / engine['loss'] - 1):+.2f} % against the control; baseline "
        f"{report['baseline_loss']:.4f}, interpolated bigram {report['bigram_loss']:.4f}",
        f"quantized: {report['quantized_share_of_flops']:.1%} of FLOPs, "
        f"{report['quantized_share_of_parameters']:.1%} of parameters",
        f"compressed fit: {report['precision']['reason']}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpt"))
    parser.add_argument("--quick", action="store_true", help="a smaller model, for CI")
    parser.add_argument("--text", type=Path, help="train on this file, not on Python's documentation and sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "bf16", "fp32"),
        help="of the compressed fit; auto times both, so write one where losses must repeat anywhere",
    )
    options = parser.parse_args()
    if options.text is not None and not options.text.is_file():
        parser.error(f"--text {options.text} is no file")
    settings = QUICK if options.quick else FULL
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="lightning|torch|copyreg")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    started = time.perf_counter()

    console.rule("1. text")
    parts = split(documents(options.text), settings.megabytes)
    require({name: sum(len(document.encode()) for document in part) for name, part in parts.items()}, settings)
    with console.status("training the tokenizer") as status:
        tokenizer = train_tokenizer(parts["train"], settings.vocabulary, out / "tokenizer.json")
        status.update("encoding the text")
        streams = {name: encode(tokenizer, part) for name, part in parts.items()}
    require({name: len(stream) for name, stream in streams.items()}, settings)
    console.print({name: f"{len(parts[name])} documents, {len(stream):,} tokens" for name, stream in streams.items()})
    bigram = bigram_loss(streams["train"], streams["test"], tokenizer.get_vocab_size())
    data = {
        name: DataLoader(Blocks(stream, settings.length), settings.batch, shuffle=name == "train", drop_last=True)
        for name, stream in streams.items()
    }
    test = Blocks(streams["test"], settings.length).blocks[:256]

    console.rule("2. baseline: plain Lightning")
    pl.seed_everything(options.seed, verbose=False)
    baseline = build(settings)
    fit(baseline, data, settings.baseline_steps, settings.lr, options.seed)
    baseline_loss = test_loss(lambda ids: baseline(input_ids=ids).logits, test)
    console.print(f"baseline loss {baseline_loss:.4f}, interpolated bigram {bigram:.4f}")

    console.rule("3a. control: the baseline trained on")
    control = copy.deepcopy(baseline)
    fit(control, data, settings.further_steps, settings.further_lr, options.seed + 1)
    control.save_pretrained(out / "control")
    with console.status("exporting the float model") as status:
        export_model(
            control, out / "engine_fp32", data=list(data["validation"])[:4], measure=False, progress=status.update
        )

    console.rule("3b. the compressed fit")
    precision = AutoMixedPrecision(options.precision)
    fit(
        copy.deepcopy(baseline),
        data,
        settings.further_steps,
        settings.further_lr,
        options.seed + 1,
        [
            precision,
            Distillation(DistillConfig(temperature=2.0, alpha=0.5), teacher=baseline, student="model"),
            Pruning(PruneConfig("neurons", amount=0.5), schedule=Cubic(begin=0.0, end=0.5), module="model"),
            QuantizationAwareTraining(QuantConfig("int8"), begin=0.6, module="model"),
            Export(
                out / "model",
                module="model",
                reference=out / "engine_fp32",
                assets={"tokenizer.json": out / "tokenizer.json"},
                measure=not options.quick,
            ),
        ],
    )

    console.rule("4. a fresh process: torch, tokenizers, lightning_accel.load")
    subprocess.run([sys.executable, HERE / "generate.py", out / "model"], check=True)

    console.rule("5. comparison, in worker processes that take turns")
    sys.path.insert(0, str(HERE))
    lengths = {"prompt": settings.prompt, "new": settings.new}
    targets = {
        "eager_fp32": Target("transformers_generate:workloads", {"checkpoint": str(out / "control"), **lengths}),
        "engine_fp32": Target(str(out / "engine_fp32"), lengths, engine="aoti"),
        "artifact": Target(str(out / "model"), lengths),
    }
    with console.status("measuring") as status:
        measured = compare(targets, progress=status.update)
    engine, ours = load(out / "engine_fp32"), load(out / "model")
    sizes = {model: size_on_disk(model.directory, model.manifest) for model in (engine, ours)}
    coverage = next(c for c in ours.manifest["coverage"] if "quantization" in c["technique"])
    report: dict[str, Any] = {
        "eager_fp32": row(
            test_loss(lambda ids: control(input_ids=ids).logits, test),
            measured["eager_fp32"],
            (out / "control" / "model.safetensors").stat().st_size,
        ),
        "engine_fp32": row(test_loss(engine, test), measured["engine_fp32"], sizes[engine]["default_load_bytes"]),
        "artifact": row(test_loss(ours, test), measured["artifact"], sizes[ours]["default_load_bytes"]),
        "portable_bytes": sizes[ours]["portable_bytes"],
        "baseline_loss": baseline_loss,
        "bigram_loss": bigram,
        "quantized_share_of_flops": coverage["share_of_flops"],
        "quantized_share_of_parameters": coverage["share_of_parameters"],
        "precision": vars(precision.choice),
        "machine": machine(),
        "versions": versions(),
        "seed": options.seed,
        "quick": options.quick,
    }
    report["summary"] = summarize(report)
    report["seconds"] = time.perf_counter() - started
    show(report, out)
    console.print(f"{report['seconds']:.0f} s in all; written: {out / 'report.md'}, report.json and {out / 'model'}")


if __name__ == "__main__":
    main()

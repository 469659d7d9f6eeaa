"""Models that were pruned, quantized and taught in one fit, beside the float model and the one that is quantized alone.

    python benchmarks/real_data.py                            # downloads, once
    python benchmarks/compressed.py --out out/compressed      # trains all, seed 0; stop it and start it again
    lightning-accel run benchmarks/compressed.py --latency --threads 1 --out out/compressed  # on a quiet machine
    python benchmarks/compressed.py --out out/compressed --report

Cells are those of `distillation.py`: all methods of a model have the same start, teacher, batches and steps, and scores
are of a test split that nothing was chosen on, of the models as they are deployed. `--latency` exports them through all
engines that are installed and times them in one interleaved run.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import quality_tasks as q
import torch
from distillation import run_all
from distillation_latency import measure
from distillation_report import report
from distillation_tasks import ACCURACY, Fit, Method, Source, Task, Upscaled, fashion, tasks
from quality_tasks import Settings
from torch import nn

from lightning_accel import DistillConfig, PruneConfig, QuantConfig, engines
from lightning_accel.quantize import unprepare_

METHODS: dict[str, Method] = {
    "float": (Fit("live"),),
    "quantized": (Fit("live", quantize=True),),
    "pruned, quantized": (Fit("live", prune=True, quantize=True),),
}


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 at 224 x 224 over Fashion-MNIST's images, a new last layer."""
    from real_models import efficientnet

    return Upscaled(efficientnet(classes=10), 224)


def whisper(trained: Any) -> nn.Module:
    """Whisper tiny.en with this decoder, whose weights are quantized with the encoder's; int8 has no ranges to lose."""
    from real_speech import whisper

    model = whisper()
    unprepare_(trained)
    model.model.decoder, model.proj_out = trained.decoder, trained.head
    model.config.decoder_layers = len(trained.decoder.layers)
    return model.eval()


def heard() -> dict[str, torch.Tensor]:
    """A recording of about 10 s."""
    from inference import MODELS

    return MODELS["whisper"].inputs()[0]


def compressed() -> dict[str, Task]:
    """All tasks by name."""
    study = tasks()
    minilm, smollm2, speech = (study[name] for name in ("one-fit", "smollm2-quarter", "whisper-2"))
    hard = DistillConfig(temperature=1.0, alpha=1.0)
    images = Source(
        "efficientnet-224",
        Settings(train=6000, validation=500, test=2000, epochs=1, batch=32, lr=1e-3, begin=0.0, precision=q.BF16),
        Settings(train=32, validation=16, test=32, epochs=1, batch=16, lr=1e-3, begin=0.0),
        fashion, efficientnet, partial(q.scores, q.TASKS["cnn"]), ACCURACY,
    )  # fmt: skip
    shared: dict[str, Any] = {"methods": METHODS, "control": "float"}
    ids = torch.randint(1000, 40000, (1, 128), generator=torch.Generator().manual_seed(0))
    return {
        "minilm": replace(
            minilm, title="MiniLM, half of the FLOPs of neurons and heads gone, int8, WordNet glosses",
            prune=PruneConfig(("neurons", "heads"), amount=0.5, of="flops", saliency="taylor"), **shared),
        "smollm2": replace(
            smollm2, title="SmolLM2-135M, a quarter of the neurons gone, int8, Brown corpus", student=copy.deepcopy,
            rates=(1e-4,), config=hard, prune=PruneConfig("neurons", amount=0.25, saliency="taylor"),
            example={"prompt 128": {"input_ids": ids}}, **shared),
        "whisper": replace(
            speech, title="Whisper tiny.en, half of the decoder's layers gone, int8, Asterisk's prompts",
            student=copy.deepcopy, rates=(1e-4,), prune=PruneConfig("layers", amount=0.5), deployed=whisper,
            example={"10 s": heard()}, **shared),
        "efficientnet": Task(
            "EfficientNet-Lite0, 30 % of the channels gone, int8-static, Fashion-MNIST", images, copy.deepcopy, 1,
            (1e-3,), DistillConfig(temperature=2.0, alpha=0.7), quantize=QuantConfig("int8-static"),
            prune=PruneConfig("channels", amount=0.3, saliency="taylor"),
            deployed=lambda model: model.network, example={"1 x 224 x 224": {"inputs": torch.randn(1, 3, 224, 224)}},
            **shared),
    }  # fmt: skip


def main() -> None:
    every = compressed()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/compressed"))
    parser.add_argument("--tasks", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--quick", action="store_true", help="a few steps of each, for CI; the figures mean nothing")
    parser.add_argument("--latency", action="store_true", help="only exports and times what is finished")
    parser.add_argument("--threads", type=int, default=1, help="of --latency")
    parser.add_argument("--engines", default="aoti,onnx,openvino", help="of --latency: names, with commas")
    parser.add_argument("--report", action="store_true", help="only prints the tables of what is finished")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch|copyreg")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    some = {name: every[name] for name in options.tasks}
    if options.latency:
        from real_models import efficientnet_module

        efficientnet_module()  # which the saved models are instances of
        names, _ = engines.chosen(tuple(options.engines.split(",")))
        for name, task in some.items():
            measure(name, task, options.out, options.threads, names)
    elif not options.report:
        run_all(some, [0], options.out, options.quick)
    print(report(some, [0], options.out))


if __name__ == "__main__":
    main()

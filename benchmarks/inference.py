"""Real models through every engine, in float32 and quantized: how fast each is here.

    python benchmarks/real_data.py                                                        # downloads, once
    lightning-accel run benchmarks/inference.py minilm-1x128 --threads 1 --out out/inference
    lightning-accel run benchmarks/inference.py smollm2 whisper efficientnet --threads 2 --out out/inference

Artifacts are built once a model, through all engines that are installed; one whose program does not compute what was
quantized is left out, and named. Then all are timed in one interleaved run, each in its own process, and with them
torch.compile (forwards), llama.cpp (SmolLM2), CTranslate2 (all but EfficientNet), and MiniLM as OpenVINO and ONNX
Runtime quantize it themselves. Quantized after training, on real inputs; `quality.py` says what that costs, and of
Whisper `transcripts.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_peers import Peer, compiled, ct2_whisper, decoders, encoders, llama_files, transcribed
from tables import ATTENTION, LENGTHS, PAUSE, config_of, coverage, engine_loads, file_name, provenance, table
from torch import nn

from lightning_accel import QuantConfig, engines, export_model
from lightning_accel.artifact import MANIFEST
from lightning_accel.measure import Target, compare

INT8 = ("int8", f"int8{ATTENTION}", "int8-static", f"int8-static{ATTENTION}")
PACKAGES = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}


@dataclass(frozen=True)
class Model:
    """A trained network, real inputs of it (the first are timed), its schemes, and what reads text or sound for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Any]]
    schemes: tuple[str, ...]
    processor: Callable[[], Any] = lambda: None


def _minilm() -> nn.Module:
    from real_models import minilm

    return minilm(26).encoder


def _texts(batch: int, length: int) -> list[dict[str, torch.Tensor]]:
    """WordNet definitions, one after the other, so that nothing is padding."""
    import real_data
    from real_models import minilm_tokenizer

    encoded = minilm_tokenizer().encode_batch(real_data.glosses()[0][:2000], add_special_tokens=False)
    ids = torch.tensor([i for e in encoded for i in e.ids])[: 9 * batch * length].view(9, batch, length)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def _smollm2() -> nn.Module:
    from real_models import smollm2

    return smollm2()


def _brown() -> list[dict[str, torch.Tensor]]:
    import quality_tasks as q

    return [{"input_ids": b["input_ids"]} for b in q.load_brown(q.TASKS["smollm2"].quick).train(0)]


def _whisper() -> nn.Module:
    from real_speech import whisper

    return whisper()


def _speech() -> list[dict[str, torch.Tensor]]:
    """Training clips whose length is nearest to 10 s, as Whisper hears them; all but the first with what was said."""
    from distillation_speech import SPEECH, clips_of
    from real_speech import PROMPT, features, whisper_processor

    train = clips_of(SPEECH.settings)[0]
    first, *rest = sorted(train, key=lambda clip: abs(len(clip.samples) / 16_000 - 10))[:9]
    texts = [whisper_processor().tokenizer(" " + clip.text, add_special_tokens=False).input_ids for clip in rest]
    answers = [{"decoder_input_ids": torch.tensor([[*PROMPT, *ids]])} for ids in texts]
    heard = [{"input_features": features([clip.samples])} for clip in (first, *rest)]
    return [heard[0], *(a | b for a, b in zip(heard[1:], answers, strict=True))]


def _hearing() -> Any:
    from real_speech import whisper_processor

    return whisper_processor()


def _efficientnet() -> nn.Module:
    from real_models import efficientnet

    return efficientnet()


def _images() -> list[tuple[torch.Tensor]]:
    """Photographs of scikit-learn, in crops."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    crops = [photo[:, y : y + 224, x : x + 224] for photo in photos for y in (0, 200) for x in (0, 200, 400)]
    return [(((crop - 127) / 128)[None],) for crop in crops]


MODELS = {
    "minilm-1x128": Model(_minilm, lambda: _texts(1, 128), INT8),
    "minilm-8x128": Model(_minilm, lambda: _texts(8, 128), INT8),
    "smollm2": Model(_smollm2, _brown, ("int8", "int4-int8")),
    "whisper": Model(_whisper, _speech, INT8, _hearing),
    "efficientnet": Model(_efficientnet, _images, ("int8-static",)),
}


def build(name: str, out: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The folder of each scheme's artifact, written unless it is there."""
    model, folders = MODELS[name], {}
    for scheme in ("float", *model.schemes):
        folder = folders[scheme] = out / name / file_name(scheme)
        if (folder / MANIFEST).exists():
            continue
        first, *rest = model.inputs()
        quantize = None if scheme == "float" else config_of(scheme)
        wanted = dict.fromkeys((*names, "portable")) if scheme == "float" else names
        report = export_model(
            model.build().eval(), folder, example_inputs=first, data=[first], calibration=rest, quantize=quantize,
            engines=tuple(wanted), measure=False, processor=model.processor(),
        )  # fmt: skip
        print("\n".join(f"{name} {scheme} {row['engine']}: {row['why']}" for row in report.manifest["ranking"]))
    return folders


def others(name: str, folder: Path, eager_bytes: int) -> dict[str, Peer]:
    """The peers of a model, whose float artifact is in `folder`."""
    model = MODELS[name]
    if name == "whisper":
        return ct2_whisper(folder)
    if name == "smollm2":
        schemes = {scheme: QuantConfig(scheme) for scheme in model.schemes}
        files = llama_files(model.build, folder.parent, schemes, LENGTHS)
        return files | decoders(model.build().eval(), LENGTHS, folder.parent / "peers")
    found = compiled(name, eager_bytes, model.schemes)
    if name.startswith("minilm"):
        first, *rest = model.inputs()
        found |= encoders(model.build().eval(), first, rest, folder.parent / "peers")
    return found


def measure(name: str, folders: dict[str, Path], threads: int, rounds: int) -> str:
    """The table of a model, what each scheme covers, and the settings of the peers."""
    targets: dict[str, Target] = {"float eager": Target("")}  # the first row
    sizes: dict[str, int] = {}
    for scheme, folder in folders.items():
        for engine, size in engine_loads(folder).items():
            row = "float eager" if (scheme, engine) == ("float", "portable") else f"{scheme} {engine}"
            target = Target(str(folder), LENGTHS, engine=engine)
            targets[row], sizes[row] = transcribed(folder, engine) if name == "whisper" else target, size
    peers = others(name, folders["float"], sizes["float eager"])
    targets |= {row: peer.target for row, peer in peers.items()}
    sizes |= {row: peer.bytes for row, peer in peers.items()}
    measured = compare(targets, threads=threads, rounds=rounds, pause=PAUSE)
    covered = [f"{scheme}: {coverage(folder)}" for scheme, folder in folders.items() if scheme != "float"]
    settings = "".join(f"- {row}: {peer.settings}\n" for row, peer in peers.items())
    return f"{table(name, measured, sizes)}\n\n{'; '.join(covered)}\n\n{settings}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("out/inference"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default="aoti,onnx,openvino", help="names, with commas")
    parser.add_argument("--build", action="store_true", help="only writes the artifacts")
    options = parser.parse_args()
    names, _ = engines.chosen(tuple(options.engines.split(",")))
    for name in options.models or MODELS:
        folders = build(name, options.out, names)
        if not options.build:
            print(measure(name, folders, options.threads, options.rounds))
    packages = [package for name in names for package in PACKAGES.get(name, ())]
    print(provenance(options.threads, [*packages, "nncf", "ctranslate2", "llama-cpp-python"]))


if __name__ == "__main__":
    main()

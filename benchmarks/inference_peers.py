"""What `inference.py` times beside the engines, each from a worker process.

torch.compile, llama.cpp, CTranslate2; OpenVINO and ONNX Runtime with their own ways to quantize an encoder.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peers
import torch
from peers.common import Row, Workloads, forward_workload
from torch import Tensor

from lightning_accel import export_model, load
from lightning_accel.artifact import load_weights, read_manifest
from lightning_accel.measure import Target

FILES = {"int8": "Q8_0", "int4-int8": "Q4_0"}  # the engine gguf's, of 32 weights a scale


@dataclass(frozen=True)
class Peer:
    """A row: what a worker loads, bytes on disk, and settings in words."""

    target: Target
    bytes: int
    settings: str


def installed(*modules: str) -> bool:
    """Whether all can be imported; otherwise says that the peer, the first of them, is left out."""
    if missing := [module for module in modules if not importlib.util.find_spec(module)]:
        print(f"{modules[0]} is left out, {' and '.join(missing)} not being installed (docs/benchmarks/peers.md)")
    return not missing


# --- torch.compile ----------------------------------------------------------------------------------------------------


COMPILED = {  # how the model is quantized before it is compiled
    "float": "",
    "int8": "torchao.quantization.quantize_(model, Int8DynamicActivationInt8WeightConfig()), ",
    "int8-static": "PT2E with X86InductorQuantizer, lower_pt2e_quantized_to_x86, ",
}


def compiled(name: str, size: int, schemes: Sequence[str]) -> dict[str, Peer]:
    """The model under torch.compile, weights frozen: in float32 and, of these schemes, as torchao quantizes it."""
    found = {}
    for scheme in (known for known in COMPILED if known in ("float", *schemes)):
        settings = f"{COMPILED[scheme]}torch.compile, torch._inductor.config.freezing=True, torch.inference_mode()"
        target = Target("inference_peers:compiled_forward", {"name": name, "scheme": scheme})
        found[f"{scheme} torch.compile"] = Peer(target, size, settings)
    return found


def compiled_forward(name: str, scheme: str) -> Workloads:
    """Timed in a worker."""
    import torch._inductor.config
    from inference import MODELS

    torch._inductor.config.freezing = True
    model = MODELS[name].build().eval()
    inputs, *calibration = (tuple(x.values()) if isinstance(x, Mapping) else x for x in MODELS[name].inputs())
    if scheme == "int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    if scheme == "int8-static":
        model = _pt2e(model, inputs, calibration)
    model = torch.compile(model)

    @torch.inference_mode()
    def run() -> Any:
        return model(*inputs)

    run()  # compiles
    return forward_workload(run)


def _pt2e(model: Any, inputs: tuple[Tensor, ...], calibration: Sequence[tuple[Tensor, ...]]) -> Any:
    """As PyTorch's tutorial quantizes for x86."""
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        for batch in calibration:
            prepared(*batch)
        return lower_pt2e_quantized_to_x86(convert_pt2e(prepared), inputs)


# --- by their own ways ------------------------------------------------------------------------------------------------


def encoders(model: Any, inputs: Mapping[str, Tensor], calibration: Sequence[Any], folder: Path) -> dict[str, Peer]:
    """OpenVINO with NNCF, ONNX Runtime with its own optimizer and quantizer, CTranslate2, in int8."""
    chosen = peers.chosen("openvino,onnxruntime,ctranslate2", "encoder")
    return _peers(*peers.encoder_rows(chosen, model, inputs, folder, calibration))


def decoders(model: Any, lengths: Mapping[str, int], folder: Path) -> dict[str, Peer]:
    """CTranslate2 in int8."""
    chosen = peers.chosen("ctranslate2", "causal")
    return _peers(*peers.causal_rows(chosen, model, lengths["prompt"], folder), lengths)


def _peers(rows: Sequence[Row], agreements: Sequence[str], more: Mapping[str, Any] | None = None) -> dict[str, Peer]:
    """By name; workers get `more` too."""
    found = {}
    for row, words in zip(rows, agreements, strict=True):
        target = replace(row.target, arguments={**(row.target.arguments or {}), **(more or {})})
        said = f"{row.settings}; to the float model: {words.partition(': ')[2]}"
        found[row.name] = Peer(target, row.bytes, said)
    return found


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_files(model: Callable[[], Any], out: Path, schemes: Mapping[str, Any], lengths: Any) -> dict[str, Peer]:
    """llama.cpp on the files of the engine gguf: the same integers, but for what the format rounds."""
    if not installed("llama_cpp", "gguf"):
        return {}
    found = {}
    for scheme in (name for name in schemes if name in FILES):
        path = out / f"{scheme}-gguf" / "decoder.gguf"
        if not path.exists():
            export_model(model().eval(), path.parent, quantize=schemes[scheme], engines=("gguf",), measure=False)
        settings = f"{FILES[scheme]}, context of 1024, {_llama_build()}"
        target = Target("peers.llama:causal", {"path": str(path), **lengths})
        found[f"{scheme} llama.cpp"] = Peer(target, path.stat().st_size, settings)
    return found


def _llama_build() -> str:
    """What llama.cpp says of its build, such as `AVX512_VNNI = 1`."""
    import llama_cpp

    return llama_cpp.llama_print_system_info().decode().strip(" |\n").replace("|", ";")


# --- Whisper ----------------------------------------------------------------------------------------------------------


def _workloads(encode: Callable[[], Any], answer: Callable[[], int], first: Callable[[], Any]) -> Workloads:
    """Seconds of the encoder, of a token after the first, and of a whole transcription.

    Args:
        answer: transcribes, and returns the number of tokens.
        first: encodes as `answer` does, and decodes one token.
    """

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result

    def decode() -> float:
        short, _ = timed(first)
        whole, tokens = timed(answer)
        return (whole - short) / (tokens - 1)

    return {"encode": lambda: timed(encode)[0], "decode": decode, "whole": lambda: timed(answer)[0]}


def transcribed(directory: Path, engine: str) -> Target:
    """An artifact of Whisper."""
    from real_speech import END, PROMPT

    told = {"begin": list(PROMPT), "end": END}
    return Target("inference_peers:transcription", {"directory": str(directory), "engine": engine, **told})


def transcription(directory: str, engine: str, begin: list[int], end: int) -> Workloads:
    """Timed in a worker: greedy, to the end of the text."""
    model, source = load(directory, engine=engine), {"input_features": _heard(directory)}

    def answer(most: int = 100) -> int:
        return model.generate(**source, decoder_input_ids=begin, max_new_tokens=most, stop=(end,)).shape[1]

    return _workloads(lambda: model.encoder(**source), answer, lambda: answer(1))


def _heard(directory: str) -> Tensor:
    """The features that an artifact was exported with."""
    golden = load_weights(Path(directory) / read_manifest(directory)["golden"]["file"])
    return golden["input.input_features"][:1].clone()


def ct2_whisper(directory: Path) -> dict[str, Peer]:
    """CTranslate2 on the files that the weights were read from, which are its own; it hears what the artifact does."""
    from real_data import folder
    from real_speech import PROMPT

    if not installed("ctranslate2"):
        return {}
    size = (folder("whisper") / "model.bin").stat().st_size
    told = {"directory": str(directory), "files": str(folder("whisper")), "begin": list(PROMPT)}
    found = {}
    for name, kind in (("float", "float32"), ("int8", "int8")):
        settings = f"Whisper(compute_type={kind!r}, inter_threads=1), greedy; bytes of its float16 file"
        found[f"{name} ctranslate2"] = Peer(Target("inference_peers:ct2", {"kind": kind, **told}), size, settings)
    return found


def ct2(kind: str, files: str, directory: str, begin: list[int]) -> Workloads:
    """Timed in a worker."""
    import ctranslate2

    options = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
    model = ctranslate2.models.Whisper(files, device="cpu", compute_type=kind, **options)
    features = ctranslate2.StorageView.from_array(_heard(directory).numpy())

    def answer(most: int = 100) -> int:
        (result,) = model.generate(features, [begin], beam_size=1, max_length=len(begin) + most)
        return len(result.sequences_ids[0]) + 1  # the end is not among them

    return _workloads(lambda: model.encode(features), answer, lambda: answer(1))

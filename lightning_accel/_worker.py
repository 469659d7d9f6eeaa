"""A process that times one target: `python -m lightning_accel._worker`, spoken to by `measure.compare`.

One JSON object a line: first the target and the number of threads, then `{"run": workload, "repeat": n}`, at last
`{"close": true}`. An artifact is loaded with torch alone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loaded import LoadedModel, LoadedSeq2Seq

Workloads = dict[str, Callable[[], float]]


def artifact_workloads(directory: str, engine: str | None, arguments: dict[str, Any]) -> Workloads:
    """Prefill and decode of a causal LM, or forward of any other model, each with its `shape` in words.

    Args:
        arguments: `prompt` and `new`, in tokens; `inputs`, a file of golden inputs, by default the artifact's own.

    The decode workload gives seconds a token.
    """
    from . import artifact, generate

    model = artifact.load(directory, engine=engine)
    if model.entry["cache"] is None or isinstance(model, LoadedSeq2Seq):
        golden = artifact.load_weights(
            Path(arguments.get("inputs") or model.directory / model.manifest["golden"]["file"])
        )
        inputs = {name: golden[f"input.{name}"].clone() for name in model.input_names}
        return _seq2seq(model, inputs, arguments) if isinstance(model, LoadedSeq2Seq) else _forward(model, inputs)
    positions = model.entry["cache"]["max_length"]
    prompt = min(arguments.get("prompt", 64), positions // 2)
    new = min(arguments.get("new", 64), positions - prompt)
    ids = torch.arange(prompt)[None] % model.entry["cache"]["vocabulary"]

    def prefill() -> float:
        cache = generate.Cache(model, 1, prompt)
        valid, last = torch.ones_like(ids, dtype=torch.bool), torch.tensor([[prompt - 1]])
        return _timed(lambda: cache.step(ids, valid, last))

    def decode() -> float:
        tokens = model.generate(ids, new + 1, stop=(), stream=True)
        next(tokens)
        return _timed(lambda: list(tokens)) / new

    return {
        "prefill": _shaped(prefill, f"input_ids [1, {prompt}]"),
        "decode": _shaped(decode, f"input_ids [1, {prompt}], {new} new"),
    }


def _forward(model: LoadedModel, inputs: dict[str, Tensor], name: str = "forward") -> Workloads:
    shape = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    return {name: _shaped(lambda: _timed(lambda: model(**inputs)), shape)}


def _seq2seq(model: LoadedSeq2Seq, inputs: dict[str, Tensor], arguments: dict[str, Any]) -> Workloads:
    """The encoder, and a token of the decoder, for one source."""
    source = {name: tensor[:1] for name, tensor in inputs.items() if name != "decoder_input_ids"}
    begin = inputs["decoder_input_ids"][:1, :1]
    new = min(arguments.get("new", 64), model.entry["cache"]["max_length"] - 1)

    def decode() -> float:
        tokens = model.generate(**source, decoder_input_ids=begin, max_new_tokens=new + 1, stop=(), stream=True)
        next(tokens)
        return _timed(lambda: list(tokens)) / new

    encode = _forward(model.encoder, source, "encode")
    return {**encode, "decode": _shaped(decode, f"{encode['encode'].shape}, {new} new")}  # type: ignore[attr-defined]


def _shaped(workload: Callable[[], float], shape: str) -> Callable[[], float]:
    workload.shape = shape  # type: ignore[attr-defined]
    return workload


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _open(message: dict[str, Any]) -> Workloads:
    arguments = dict(message.get("arguments") or {})
    module, colon, function = message["source"].partition(":")
    if colon and not os.path.isdir(message["source"]):
        return getattr(importlib.import_module(module), function)(**arguments)
    return artifact_workloads(message["source"], message.get("engine"), arguments)


def peak_rss() -> int:
    """Peak resident memory of this process in bytes (0 where the platform does not say)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if "VmHWM:" in status:  # getrusage would count what the process that started this one held
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Answers on the real standard output; whatever the target prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    torch.set_num_threads(first["threads"])
    start = time.perf_counter()
    workloads = _open(first)
    load_s = time.perf_counter() - start
    answer({"load_s": load_s, "workloads": {name: getattr(work, "shape", "") for name, work in workloads.items()}})
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("close"):
            answer({"peak_rss_bytes": peak_rss()})
            return
        answer({"seconds": [workloads[message["run"]]() for _ in range(message["repeat"])]})


if __name__ == "__main__":
    main()

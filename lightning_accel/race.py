"""How fast is what was exported: the artifact against the float model, and its engines against each other.

All in one interleaved run, each in a process of its own (`measure.compare`), at torch's number of threads here and with
the artifact's own golden inputs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import artifact, build, engines
from .finalize import Finalized
from .inputs import ExampleInputs
from .measure import Measurement, Target, compare
from .report import ExportReport

PAUSE = 0.3  # seconds: threads of other runtimes spin for a while after their work


def time_(
    path: Path,
    report: ExportReport,
    final: Finalized,
    inputs: ExampleInputs,
    dynamic_shapes: Any,
    reference: str | Path | None,
    say: Callable[[str], None],
    prompt: int | None = None,
) -> None:
    """Writes timings, speedups and ranking into the report and its manifest.

    Args:
        path: where the programs are.
        reference: an artifact of the float model; built for the purpose where there is none.
        prompt: tokens that a causal language model reads, by default those of `_worker`.
    """
    manifest = report.manifest
    default = manifest["programs"][0]["engine"]
    artifact.write_manifest(path, manifest)
    with tempfile.TemporaryDirectory() as temporary:
        if reference is None:
            reference = Path(temporary) / "reference"
            reference.mkdir()
            names = list(dict.fromkeys((default, "portable")))
            plain = Finalized(final.plain, final.plain, final.plain, quantized=False)
            artifact.write_manifest(reference, build.write(reference, plain, inputs, dynamic_shapes, names, {}, say))
        built = {p["engine"] for p in artifact.read_manifest(reference)["programs"]}
        same: dict[str, Any] = {"inputs": str(path / manifest["golden"]["file"])}
        same |= {} if prompt is None else {"prompt": prompt}
        targets = {
            "artifact": Target(str(path), same, engine=default),
            "float": Target(str(reference), same, engine=default),
        }
        if "portable" in built and default != "portable":
            targets["eager"] = Target(str(reference), same, engine="portable")
        if default not in built:
            raise build.ExportError(f"{reference} has no {default} program to be compared with, only {sorted(built)}")
        rivals = {name: Target(str(path), same, engine=name) for name in _rivals(manifest)}
        failed = _failing(rivals)
        rivals = {name: target for name, target in rivals.items() if name not in failed}
        measured = compare({**targets, **rivals}, pause=PAUSE if rivals else 0.0, progress=say)
    for workload, spread in measured["artifact"].seconds.items():
        report.speedup[workload] = measured["float"].seconds[workload].median / spread.median
        if (eager := measured.get("eager" if default != "portable" else "float")) is not None:
            report.over_eager[workload] = eager.seconds[workload].median / spread.median
    manifest["timings"] = [row for name, m in measured.items() for row in _timings(name, m, default)]
    manifest["speedup"] = {"over_float_same_engine": report.speedup, "over_eager": report.over_eager}
    built = {entry["engine"] for entry in manifest["programs"]}
    untimed = {name: why for name, why in engines.UNTIMED.items() if name in built}
    manifest["ranking"] += [{"engine": name, "slower": None, "why": why} for name, why in (failed | untimed).items()]
    if rivals or default not in engines.TORCH:
        medians = {
            name: {workload: spread.median for workload, spread in measured[target].seconds.items()}
            for name, target in {default: "artifact", **{name: name for name in rivals}}.items()
        }
        manifest["ranking"] = [*ranking(medians), *manifest["ranking"]]


def _failing(targets: Mapping[str, Target]) -> dict[str, str]:
    """The engines whose process does not get through the workloads once, and why, in a line."""
    found = {}
    for name, target in targets.items():
        try:
            compare({name: target}, rounds=1, repeat=1)
        except RuntimeError as error:
            found[name] = f"not timed: {str(error).strip().splitlines()[-1][:300]}"
    return found


def _rivals(manifest: Mapping[str, Any]) -> list[str]:
    """The engines beside the default one, where others than torch's own are among them."""
    default, *others = dict.fromkeys(entry["engine"] for entry in manifest["programs"])
    others = [name for name in others if name not in engines.VARIANTS and name not in engines.UNTIMED]
    return others if {default, *others} - set(engines.TORCH) else []


def ranking(medians: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Engines from the fastest to the slowest, with one line why.

    `slower` is the geometric mean over workloads of an engine's seconds over the winner's, 1 for the winner.

    >>> [row["why"] for row in ranking({"aoti": {"forward": 0.002}, "onnx": {"forward": 0.005}})]
    ['the fastest here: forward 2.00 ms', '2.50 x the time of aoti: forward 5.00 ms']
    """

    def over(seconds: Mapping[str, float], others: Mapping[str, float]) -> float:
        return math.exp(sum(math.log(seconds[w] / others[w]) for w in seconds) / len(seconds))

    first = next(iter(medians.values()))
    order = sorted(medians, key=lambda name: over(medians[name], first))
    rows = []
    for name in order:
        slower = over(medians[name], medians[order[0]])
        times = ", ".join(f"{workload} {1e3 * seconds:.2f} ms" for workload, seconds in medians[name].items())
        why = f"{slower:.2f} x the time of {order[0]}" if name != order[0] else "the fastest here"
        rows.append({"engine": name, "slower": slower, "why": f"{why}: {times}"})
    return rows


def _timings(name: str, measured: Measurement, default: str) -> list[dict[str, Any]]:
    engine = {"artifact": default, "float": default}.get(name, name)
    return [
        {
            "name": f"{name}.{workload}",
            "seconds": spread.median,
            "spread": asdict(spread),
            "shape": measured.shapes[workload],
            "threads": torch.get_num_threads(),
            "engine": engine,
            "load_s": measured.load_s,
            "peak_rss_bytes": measured.peak_rss_bytes,
        }
        for workload, spread in measured.seconds.items()
    ]

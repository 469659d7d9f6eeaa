"""What an export gave and what it costs, in words: after the export, and again from the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import artifact
from .engines import aoti
from .select import named


@dataclass
class ExportReport:
    """What was written, and what it gives and costs here."""

    directory: Path
    manifest: dict[str, Any]
    speedup: dict[str, float] = field(default_factory=dict)  # workload -> float model's time / artifact's, same engine
    over_eager: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for gains, than in ((self.speedup, "the float model"), (self.over_eager, "the float model run eagerly")):
            slower = [f"{workload} {1 / gain:.2f} x" for workload, gain in gains.items() if gain < 1]
            if slower:
                lines.append(f"SLOWER than {than} on this machine: {', '.join(slower)} its time")
        sizes = self.manifest["sizes"]
        more = {n.removesuffix("_bytes"): size for n, size in sizes.items() if n != "default_load_bytes"}
        lines.append(
            f"{self.directory}: {sizes['default_load_bytes'] / 1e6:.2f} MB for the default load"
            + "".join(f", {size / 1e6:.2f} MB more for the {name} program" for name, size in more.items())
        )
        engine = self.manifest["programs"][0]["engine"]
        default = [entry for entry in self.manifest["programs"] if entry["engine"] == engine]
        lines.append(f"takes {', '.join(_inputs(entry) for entry in default)}")
        lines += _slow_kernels(self.manifest)
        for workload, gain in self.speedup.items():
            eager = self.over_eager.get(workload)
            lines.append(
                f"{workload}: {gain:.2f} x the float model through {engine}, "
                + (f"{eager:.2f} x the float model run eagerly" if eager else "not compared with eager")
            )
        if not self.speedup:
            lines.append("speed: not measured")
        lines += [f"engine {row['engine']}: {row['why']}" for row in self.manifest.get("ranking", ())]
        lines += [
            f"engine {entry['engine']}: the trained integers; activations are rounded by its own rule, which makes a "
            f"relative error of {entry['activations']['error_trained']:.2g} against the trained model and of "
            f"{entry['activations']['error_plain']:.2g} against the float model"
            for entry in self.manifest["programs"]
            if "activations" in entry
        ]
        for metric in self.manifest["metrics"]:
            lines.append(
                f"{metric['name']}: {metric['value']:.4f} ({metric['split']}, {metric['n']} batches; "
                f"{metric['direction']} is better)"
            )
        lines += [_coverage_line(c) for c in self.manifest["coverage"]]
        return "\n".join(lines)


def _slow_kernels(manifest: Mapping[str, Any]) -> list[str]:
    """One line where quantized layers run without the instructions that make them fastest."""
    schemes = [coverage["technique"] for coverage in manifest["coverage"] if "quantization" in coverage["technique"]]
    slow = [aoti.slow_kernels(entry, schemes) for entry in manifest["programs"][:1] if "arch" in entry and schemes]
    return [reason for reason in slow if reason]


def _coverage_line(coverage: Mapping[str, Any]) -> str:
    flops = coverage["share_of_flops"]
    done = "zeroed or cut " if coverage["technique"] == "pruning" else ""
    return f"{coverage['technique']}: {done}{coverage['share_of_parameters']:.1%} of parameters" + (
        f", {flops:.1%} of FLOPs" if flops is not None else ""
    )


def describe(directory: str | Path) -> str:
    """The manifest in words: figures first, then programs, and what each technique skipped and why."""
    manifest = artifact.read_manifest(directory)
    gains = manifest.get("speedup", {})
    report = ExportReport(
        Path(directory), manifest, gains.get("over_float_same_engine", {}), gains.get("over_eager", {})
    )
    lines = [
        str(report),
        f"format {manifest['format']}, written on {manifest['machine']['cpu']}, torch {manifest['versions']['torch']}",
    ]
    for entry in manifest["programs"]:
        lines += _program_lines(entry)
    for coverage in manifest["coverage"]:
        lines += [
            f"  skipped by {coverage['technique']}: {note}: {e['reason']}"
            for e, note in zip(coverage["entries"], named(coverage), strict=True)
            if not e["done"]
        ]
    return "\n".join(lines)


def _inputs(entry: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{i['name']} {i['dtype']} {[d if isinstance(d, int) else d['name'] for d in i['shape']]}"
        for i in entry["inputs"]
    )


def _program_lines(entry: Mapping[str, Any]) -> list[str]:
    lines = [f"  program {entry['role']} ({entry['engine']}, {entry['file']}): {_inputs(entry)}"]
    if cache := entry["cache"]:
        lines.append(f"    cache: {len(cache['shapes'])} tensors, up to {cache['max_length']} positions")
    return [*lines, f"    verification: {json.dumps(entry.get('verification'))}"]

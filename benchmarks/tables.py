"""Measurements as Markdown: medians, spread, and the ratio to the first row."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions, version
from pathlib import Path

from lightning_accel import QuantConfig
from lightning_accel.artifact import program_files, read_manifest
from lightning_accel.measure import Measurement, machine, size_on_disk, versions

ATTENTION = ", attention"  # at the end of a scheme's name: the products of attention in int8 too
LENGTHS = {"prompt": 128, "new": 64}  # tokens that decoders are timed with
PAUSE = 0.3  # seconds before a turn: threads of some runtimes spin for 0.2 s after their work (KMP_BLOCKTIME)


def config_of(scheme: str) -> QuantConfig:
    """`"int8"` or `"int8, attention"`, as the tables name them."""
    return QuantConfig(scheme.removesuffix(ATTENTION), attention=scheme.endswith(ATTENTION))


def file_name(name: str) -> str:
    """A row's name without spaces."""
    return name.replace(", ", "-")


def table(title: str, measured: Mapping[str, Measurement], sizes: Mapping[str, int]) -> str:
    """A row for each target: ms of each workload (least-most) and how many times as fast as the first row."""
    first = next(iter(measured.values()))
    heads = [f"{workload} ms (least-most) | x" for workload in first.seconds]
    lines = [f"| {title} | " + " | ".join(heads) + " | load s | peak RSS MB | default load MB |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, m in measured.items():
        cells = []
        for workload, spread in m.seconds.items():
            cells.append(f"{1e3 * spread.median:.2f} ({1e3 * spread.least:.2f}-{1e3 * spread.most:.2f})")
            cells.append(f"{first.seconds[workload].median / spread.median:.2f}")
        cells += [f"{m.load_s:.3f}", f"{m.peak_rss_bytes / 1e6:.0f}", f"{sizes[name] / 1e6:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps(title: str, measured: Mapping[str, Measurement]) -> str:
    """A row for each target: ms of a training step (least-most) and how many times as long as the first row's."""
    first = next(iter(measured.values())).seconds["step"].median
    lines = [f"| {title} | step ms (least-most) | x {next(iter(measured))}'s time | peak RSS MB |", "|---|---|---|---|"]
    for name, m in measured.items():
        s = m.seconds["step"]
        spread = f"{1e3 * s.median:.0f} ({1e3 * s.least:.0f}-{1e3 * s.most:.0f})"
        lines.append(f"| {name} | {spread} | {s.median / first:.3f} | {m.peak_rss_bytes / 1e6:.0f} |")
    return "\n".join(lines)


def default_load(folder: Path) -> int:
    """Bytes of all that the default load of an artifact needs."""
    return size_on_disk(folder, read_manifest(folder))["default_load_bytes"]


def engine_loads(folder: Path) -> dict[str, int]:
    """Bytes that an artifact needs with each of its engines."""
    manifest, found = read_manifest(folder), {}
    weights = manifest.get("weights", {}).get("file")
    for engine in dict.fromkeys(entry["engine"] for entry in manifest["programs"]):
        programs = [entry for entry in manifest["programs"] if entry["engine"] == engine]
        files = {file["file"] for entry in programs for file in program_files(entry)}
        files |= {weights} if weights and any(entry["weights"] for entry in programs) else set()
        found[engine] = sum((folder / file).stat().st_size for file in files)
    return found


def coverage(folder: Path) -> str:
    """The quantized share of an artifact, in words."""
    found = read_manifest(folder)["coverage"][0]
    flops, parameters = found["share_of_flops"], found["share_of_parameters"]
    return f"{found['technique']}: {flops:.1%} of FLOPs, {parameters:.1%} of parameters"


def provenance(threads: int, packages: Iterable[str] = ()) -> str:
    """Machine, versions (of those of `packages` that are installed too) and command, as they belong beside figures."""
    installed = {d.name for d in distributions()}
    found = versions() | {name: version(name) for name in packages if name in installed}
    return json.dumps({"machine": machine(threads), "versions": found, "command": " ".join(sys.argv)})

"""Programs, weights, golden inputs and assets of an artifact: what `export` puts into the folder before checking it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import artifact, engines, select
from ._warn import warn
from .capture import Capture, call_example, capture, flatten_output, input_names
from .chat import TEMPLATE
from .engines.aoti import CompilerMissing
from .finalize import Finalized
from .inputs import ExampleInputs, copy_inputs, split_inputs
from .measure import machine, versions
from .prune import Masks, pruning_coverage, shrink_model
from .quantize import quantization_coverage, unprepare_
from .speech import of_language
from .text import CONFIG
from .vision import check_preparation


class ExportError(RuntimeError):
    """The export failed; nothing was replaced, and the message says how to go on."""


def write(
    path: Path,
    final: Finalized,
    inputs: ExampleInputs,
    dynamic_shapes: Any,
    names: Sequence[str],
    assets: Mapping[str, str | Path],
    say: Callable[[str], None],
    required: Sequence[str] = engines.OWN,
) -> dict[str, Any]:
    """Builds the programs and writes weights, golden inputs and assets; returns the manifest so far.

    Args:
        required: engines whose failure is that of the export; any other is left out, with the reason.
    """
    call_example(final.trained, inputs)
    stored: dict[str, Tensor] = {}
    programs: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for name in (known for known in engines.NAMES if known in names):  # the compiled one's layout is what is stored
        say(f"building the {name} program")
        before = set(path.iterdir())
        try:
            programs[name] = _programs(name, path, final, inputs, dynamic_shapes, stored, assets)
        except CompilerMissing as error:
            warn(f"{error}; the {name} program is left out")
            failed[name] = f"not built: {error}"
        except Exception as error:  # whatever another project's converter raises
            if name in required or len(names) == 1:
                raise
            failed[name] = f"not built: {in_a_line(error)}"
            if name in engines.OWN:
                warn(f"the {name} program is left out: {failed[name]}")
            for file in set(path.iterdir()) - before:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    if not programs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise ExportError(f"none of the engines could be built ({reasons}); write engines=('portable',)")
    entries = [entry for name in dict.fromkeys(names) for entry in programs.get(name, ())]
    made_with = versions(*(package for name in programs for package in engines.NEEDS.get(name, ())))
    manifest: dict[str, Any] = {"programs": entries, "timings": [], "versions": made_with, "machine": machine()}
    manifest["ranking"] = [{"engine": name, "slower": None, "why": reason} for name, reason in failed.items()]
    if stored:
        artifact.save_weights(stored, path / artifact.WEIGHTS)
        manifest["weights"] = _file(path / artifact.WEIGHTS)
    if labels := _labels(final.deployed):
        manifest["labels"] = labels
    manifest["golden"] = _golden(path, final, inputs, list(programs), any(entry["cache"] for entry in entries))
    manifest["assets"] = [
        {"name": name, **_file(_copied(source, path / Path(name).name))} for name, source in assets.items()
    ]
    return manifest


def in_a_line(error: BaseException) -> str:
    """The kind and the first line of what was behind an error, without colours: converters write pages."""
    while (cause := error.__cause__) is not None:
        error = cause
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"


def _programs(
    name: str,
    path: Path,
    final: Finalized,
    inputs: ExampleInputs,
    dynamic_shapes: Any,
    stored: dict[str, Tensor],
    assets: Mapping[str, str | Path],
) -> list[dict[str, Any]]:
    """Builds an engine's programs; their manifest entries. Adds the weights that they share to `stored`."""
    engine = engines.get(name)
    captures = capture(engine.lower(copy.deepcopy(final.deployed)), inputs, dynamic_shapes)
    for captured in captures.values():
        captured.assets = assets
    built = {role: engine.build(captured, path, role) for role, captured in captures.items()}
    return [
        {
            "role": role,
            "engine": name,
            **entry,
            "layouts": _store(captures[role], entry, stored, name == "portable"),
            "sha256": artifact.sha256(path / entry["file"]),
            "torch": torch.__version__,
            "inputs": captures[role].inputs,
            "outputs": captures[role].outputs,
            "cache": captures[role].cache,
        }
        for role, entry in built.items()
    ]


def _store(
    captured: Capture, entry: Mapping[str, Any], stored: dict[str, Tensor], reads_tiles: bool
) -> dict[str, list[int]]:
    """Adds a program's weights to the stored ones; returns the shapes of those that are stored in another layout.

    Args:
        reads_tiles: the engine takes plain weights out of tiles. What another one has in another layout than is stored,
            as the two programs of an encoder-decoder may, is stored too, under a name of its own.
    """
    weights, layouts = captured.weights(), {}
    for index, name in entry["weights"].items():
        weight = weights[name]
        other = name in stored and stored[name].shape != weight.shape
        if other and reads_tiles:
            layouts[index] = list(weight.shape)
            continue
        if other:
            name = entry["weights"][index] = f"{name}.{'x'.join(map(str, weight.shape))}"
        stored.setdefault(name, weight)
    return layouts


_PROCESSOR_FILES = ("tokenizer.json", "preprocessor_config.json")  # what `text`, `vision` and `speech` read


def processor_files(processor: Any, folder: Path) -> dict[str, Path]:
    """The files of a tokenizer, image processor or feature extractor of transformers that loading needs, by name.

    Args:
        processor: an object with `save_pretrained`, or a folder that it was saved to.
        folder: empty; where an object is saved to.

    Raises:
        ValueError: none of the files is there, images are prepared in a way that `vision` does not know,
            or letters are of several languages.
    """
    if hasattr(processor, "save_pretrained"):
        names = ("tokenizer", "feature_extractor", "image_processor")
        parts: list[Any] = [part for name in names if (part := getattr(processor, name, None)) is not None]
        for part in parts or [processor]:
            part.save_pretrained(folder)
    elif isinstance(processor, str | Path):
        folder = Path(processor)
    else:
        raise ValueError(
            f"processor={processor!r} is neither a tokenizer or processor of transformers nor the folder of one; write "
            "processor=AutoTokenizer.from_pretrained(path), or assets={'tokenizer.json': path}"
        )
    found = {name: folder / name for name in (*_PROCESSOR_FILES, "vocab.json") if (folder / name).is_file()}
    beside = {name: folder / name for name in (CONFIG, TEMPLATE) if (folder / name).is_file()}
    if "tokenizer.json" in found or not _is_ctc(beside):
        found.pop("vocab.json", None)
    if "vocab.json" in found:
        of_language(*(json.loads((folder / name).read_text()) for name in ("vocab.json", CONFIG)))
    if not found:
        raise ValueError(
            f"{processor!r} has none of {', '.join(_PROCESSOR_FILES)}; a slow tokenizer has no tokenizer.json, so take "
            "a fast one"
        )
    if "preprocessor_config.json" in found:
        config = json.loads(found["preprocessor_config.json"].read_text())
        if "sampling_rate" not in config:  # of images
            check_preparation(config)
    return found | beside


def _is_ctc(files: Mapping[str, Path]) -> bool:
    """Whether a tokenizer's words are in its `vocab.json` alone, as wav2vec2's are."""
    return CONFIG in files and "word_delimiter_token" in json.loads(files[CONFIG].read_text())


def _labels(model: Any) -> dict[str, Any] | None:
    """Names of the classes in a transformers classifier's configuration, whether several may hold at once, and its pad
    token, by which those of language models find a text's end.
    """
    if not type(model).__name__.endswith("Classification"):
        return None
    config = getattr(model, "config", None)
    names, pad = getattr(config, "id2label", None) or {}, getattr(config, "pad_token_id", None)
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    labels: dict[str, Any] = {"names": [str(names[i]) for i in sorted(names)], "several": several}
    return {**labels, "pad": pad} if isinstance(pad, int) and pad >= 0 else labels  # -1 is none


def _copied(source: str | Path, target: Path) -> Path:
    if target.exists() or target.name == artifact.MANIFEST:
        raise ValueError(f"the asset {target.name!r} has the name of a file of the artifact; give it another one")
    return Path(shutil.copy(source, target))


def _file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": artifact.sha256(path)}


def _golden(
    path: Path, final: Finalized, inputs: ExampleInputs, names: Sequence[str], logits_only: bool
) -> dict[str, str]:
    """Inputs and the eager model's outputs, which `lightning-accel verify` runs again.

    Where an engine rounds activations in its own way, its outputs stand beside them: `ENGINE.output.N`.
    """
    args, kwargs = split_inputs(inputs)
    named = dict(zip(input_names(final.deployed, args, kwargs), (*args, *kwargs.values()), strict=True))
    tensors = {f"input.{name}": value for name, value in named.items() if isinstance(value, Tensor)}
    own = {f"{name}.": model for name in names if (model := engines.reference(name, final.deployed)) is not None}
    for prefix, model in {"": final.deployed, **own}.items():
        output = call_example(model, inputs)
        outputs = [output.logits] if logits_only else flatten_output(output)[0]
        tensors |= {f"{prefix}output.{i}": t for i, t in enumerate(outputs)}
    artifact.save_weights({n: t.contiguous() for n, t in tensors.items()}, path / "golden.safetensors")
    return _file(path / "golden.safetensors")


def coverage(final: Finalized, inputs: ExampleInputs, masks: Masks | None) -> list[dict[str, Any]]:
    """What was pruned and quantized, in shares of parameters and FLOPs, and what was skipped and why."""
    args, kwargs = copy_inputs(inputs)
    found = []
    if masks:
        found.append(pruning_coverage(final.plain, masks).as_dict())
    if final.quantized:
        shrunk = unprepare_(copy.deepcopy(final.plain))
        if masks:
            shrunk = shrink_model(shrunk, masks, example_inputs=inputs)
        found.append(quantization_coverage(final.deployed, select.count_flops(shrunk, args, kwargs)).as_dict())
    return found

"""From a trained model to an artifact: finalize -> capture -> engines build -> verify -> measure -> save.

The live model is never touched. Everything is written into a sibling folder, and renamed when the programs have been
verified against the trained model and timed against the float model; a failure leaves the last good artifact.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import artifact, build, select
from . import engines as all_engines
from .build import ExportError, in_a_line
from .capture import input_names, is_causal_lm, is_seq2seq
from .finalize import Finalized, finalize, restore_
from .inputs import ExampleInputs, copy_inputs, first_rows, inputs_of_batch, split_inputs, without_labels
from .loaded import LoadedSeq2Seq
from .measure import size_on_disk
from .prune import Masks
from .quantize import QuantConfig
from .quantize.adapters import adapted_layers, merge_adapters
from .race import time_
from .report import ExportReport
from .verify import READS, DriftError, Verification, compare, verify, with_noise

Metric = Callable[[Any, Sequence[Any]], float]  # (model, batches) -> float; lower is better unless it says so
METRIC_TOLERANCE = 0.01  # share by which the artifact's metric may differ from the trained model's


def export_model(
    model: nn.Module,
    directory: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    dynamic_shapes: Any = None,
    checkpoint: str | Path | None = None,
    module: str | None = None,
    quantize: QuantConfig | None = None,
    calibration: Iterable[Any] | None = None,
    masks: Masks | None = None,
    engines: Sequence[str] | str = ("aoti", "portable"),
    data: Iterable[Any] | None = None,
    split: str = "held-out",
    metric: Metric | None = None,
    reference: str | Path | None = None,
    measure: bool = True,
    min_speedup: float | None = None,
    assets: Mapping[str, str | Path] | None = None,
    processor: Any = None,
    configs: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Exports a model for inference and says what it gives and costs.

    Args:
        model: trained; plain, masked, or fake-quantized by QAT.
        directory: written as a whole; an older artifact there is replaced.
        example_inputs: a tuple of positional or a dict of keyword inputs, as they will be served: these are timed. A
            causal LM needs none; it is timed with one prompt of the example's length (64 tokens without one, at most
            half of its positions) and the 64 tokens after it.
        dynamic_shapes: as torch.export takes them; by default batch and length are free.
        checkpoint: a Lightning checkpoint whose weights, masks and quantization are put into `model` first; where the
            Export callback was in the fit, it holds example inputs too.
        module: the name that the model had in the LightningModule of the checkpoint.
        quantize: quantizes after training (a model that QAT prepared needs none).
        calibration: batches like those of `data`, in which `int8-static` finds its ranges after training.
        masks: from `prune_model_`; structured ones are cut out.
        engines: programs to build; the first of torch's own, `"aoti"` and `"portable"`, is the one that `load` takes.
            `"aoti_avx512"` and `"aoti_avx2"` are compiled for other CPUs than this one, for where `"aoti"` cannot run.
            Others (`"onnx"`, `"openvino"`, `"transformers"`, `"gguf"`) are extras of this package. `"auto"` builds all
            that are installed, and leaves out `"aoti"` too where it cannot be built. Where others are built, all are
            timed against each other, for `load(directory, engine="fastest")`; one that cannot be built or does not
            compute what was trained is left out, and the report says why.
        data: held-out batches for verification and `metric`: mappings of keyword inputs, tensors, or tuples whose
            first item is the input.
        split: where `data` comes from, as the manifest says it.
        metric: (model, batches) -> float; lower is better unless it has `higher_is_better = True`.
        reference: an artifact of the float model to be measured against; built for the purpose by default.
        measure: time the artifact against the float model through the same engine, and against eager.
        min_speedup: raises unless each workload is this much faster than the float model.
        assets: files that travel with the model, by name (`{"tokenizer.json": path}`).
        processor: transformers' tokenizer or image processor, or the folder of one: it travels with the model, for
            `generate_text` and `classify`.
        configs: written to the manifest.
        progress: called with what is being done, in words.

    Raises:
        ValueError: the model rejects the inputs, cannot be captured, or holds NaN.
        verify.DriftError: the program does not compute what was trained.
        ExportError: slower than `min_speedup`, or no engine could be built.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> options = {"engines": ("portable",), "measure": False}  # without these: compiled, and measured
    >>> report = export_model(model, "model", example_inputs=(torch.randn(4, 8),), **options)
    >>> artifact.load("model")(torch.randn(3, 8)).shape
    torch.Size([3, 2])
    """
    directory = Path(directory)
    artifact.check_destination(directory)
    required = ("portable",) if engines == "auto" else all_engines.OWN
    engines, left_out = check_options(engines, measure, min_speedup, reference, assets)
    model = select.unwrap(model)
    if checkpoint is not None:
        restored = restore_(copy.deepcopy(model), checkpoint, module)
        model, masks = restored.model, masks or restored.masks
        example_inputs = example_inputs if example_inputs is not None else restored.example_inputs
    model = _without_adapters(model, masks)
    inputs = _example_inputs(model, example_inputs)
    batches = list(data) if data is not None else []
    say = progress or (lambda message: None)
    say("finalizing")
    final = finalize(model, inputs, masks, quantize, calibration)
    held_out = [_as_float(_inputs_of_batch(final.trained, batch)) for batch in batches] or [inputs]
    with artifact.staging(directory) as path, tempfile.TemporaryDirectory() as folder:
        files = build.processor_files(processor, Path(folder)) if processor is not None else {}
        carried = {**files, **(assets or {})}
        manifest = build.write(path, final, inputs, dynamic_shapes, engines, carried, say, required)
        manifest["ranking"] += [{"engine": n, "slower": None, "why": reason} for n, reason in left_out.items()]
        manifest["coverage"] = build.coverage(final, inputs, masks)
        manifest["configs"] = dict(configs or {})
        say("verifying against the trained model")
        _verify_all(path, manifest, final, held_out)
        manifest["metrics"] = _metrics(path, final, metric, batches, split)
        report = ExportReport(directory, manifest)
        if measure:
            time_(path, report, final, inputs, dynamic_shapes, reference, say, _prompt(model, example_inputs))
        artifact.write_manifest(path, manifest)
        while (sizes := size_on_disk(path, manifest)) != manifest.get("sizes"):  # the manifest's own size counts
            manifest["sizes"] = sizes
            artifact.write_manifest(path, manifest)
        slow = {w: s for w, s in report.speedup.items() if min_speedup is not None and s < min_speedup}
        if slow:
            raise ExportError(
                f"the artifact is not {min_speedup} x as fast as the float model: "
                + ", ".join(f"{w} {s:.2f} x" for w, s in slow.items())
            )
    return report


def check_options(
    engines: Sequence[str] | str,
    measure: bool = True,
    min_speedup: float | None = None,
    reference: str | Path | None = None,
    assets: Mapping[str, str | Path] | None = None,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Raises where an export is bound to fail, before anything is computed.

    Returns:
        the engines to build, and of `"auto"` the reason for each that is left out.

    Raises:
        ValueError: no or unknown engines, named ones that are not installed, a reference that is no artifact, an asset
            that is no file, or a least speedup that nothing measures.
    """
    engines, left_out = all_engines.chosen(engines)
    if measure and engines[0] in all_engines.UNTIMED:
        first, why = engines[0], all_engines.UNTIMED[engines[0]]
        raise ValueError(f"{first} is {why}; write measure=False, or engines=('aoti', {first!r})")
    if min_speedup is not None and not measure:
        raise ValueError(f"min_speedup={min_speedup} needs measure=True: without it no speed is known")
    if reference is not None and measure:
        built = {entry["engine"] for entry in artifact.read_manifest(reference)["programs"]}
        if engines[0] not in built:
            raise ValueError(f"{reference} has no {engines[0]} program to be compared with, only {sorted(built)}")
    for name, source in (assets or {}).items():
        if not Path(source).is_file():
            raise ValueError(f"the asset {name!r} is no file: {source}; write it before the export")
    return engines, left_out


def _without_adapters(model: nn.Module, masks: Masks | None) -> nn.Module:
    """The model, or a copy with adapters of peft merged, so that one matrix a layer is deployed."""
    if masks and (names := list(adapted_layers(model))):
        raise ValueError(
            f"masks of a model with adapters that are not merged ({names[0]}): merging fills pruned weights again; "
            "write model = model.merge_and_unload(), then prune and train that"
        )
    return merge_adapters(model)


def _example_inputs(model: Any, example_inputs: ExampleInputs | None) -> ExampleInputs:
    if example_inputs is None:
        if not is_causal_lm(model):
            raise ValueError("give example_inputs=(x,) or example_inputs={'name': x}, as the model is called")
        length = min(16, getattr(model.config, "max_position_embeddings", None) or 16)
        return {"input_ids": torch.arange(length)[None].repeat(2, 1) % model.config.vocab_size}
    args, kwargs = split_inputs(example_inputs)
    kwargs = {k: v for k, v in without_labels(kwargs).items() if v is not None}
    args, kwargs = _as_float((args, kwargs))
    if is_seq2seq(model):
        return _source_and_answer(model, dict(zip(input_names(model, args, {}), args, strict=True)) | kwargs)
    if not is_causal_lm(model):
        return args or kwargs
    if unknown := [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _CAUSAL]:
        raise ValueError(
            f"a causal language model is exported as text in, logits out, and its input {unknown[0]!r} would be lost; "
            "give example_inputs={'input_ids': ids} if it is not needed"
        )
    kwargs = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask")}
    return first_rows(args or kwargs, 2, length=64)  # enough to verify; `_prompt` says how long a prompt is timed


def _prompt(model: nn.Module, example_inputs: ExampleInputs | None) -> int | None:
    """Tokens of the prompt that a causal language model is timed with: as many as the example has."""
    if example_inputs is None or not is_causal_lm(model):
        return None
    return next((t.shape[1] for t in tree_leaves(example_inputs) if isinstance(t, Tensor) and t.dim() == 2), None)


def _source_and_answer(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of an encoder-decoder model: the encoder's, and how an answer begins."""
    ids = inputs.get("decoder_input_ids")
    if ids is None:
        start = model.generation_config.decoder_start_token_id or 0
        rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor)), 0)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        ids = (torch.arange(8) % vocabulary).index_fill(0, torch.tensor([0]), start).repeat(rows, 1)
    return {**{k: v for k, v in inputs.items() if not k.startswith("decoder_")}, "decoder_input_ids": ids}


_LONGEST_ANSWER = 32  # tokens of labels that verification reads
_CAUSAL = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "cache_position")  # known or made anew


def _as_float(inputs: Any) -> Any:
    """Inputs on the CPU, in float32 where they are not integers, as the exported copies of the model are."""

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor

    return torch.utils._pytree.tree_map_only(Tensor, convert, inputs)


def _inputs_of_batch(model: nn.Module, batch: Any) -> ExampleInputs:
    inputs = inputs_of_batch(model, batch)
    if is_seq2seq(model):
        args, kwargs = split_inputs(inputs)
        found = _source_and_answer(model, dict(zip(input_names(model, args, {}), args, strict=True)) | kwargs)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor) and "decoder_input_ids" not in batch:  # nothing of what is behind an answer
            shortest = int((labels != -100).sum(-1).min())
            found["decoder_input_ids"] = found["decoder_input_ids"][:, : min(max(shortest, 1), _LONGEST_ANSWER)]
        return found
    if isinstance(inputs, Mapping) and is_causal_lm(model):
        return {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    return inputs


# --- verify -----------------------------------------------------------------------------------------------------------


def caller(model: Any) -> Callable[[ExampleInputs], Any]:
    """A function from example inputs to the output of a module, or of an artifact, which has the constants in it."""

    def call(inputs: ExampleInputs) -> Any:
        args, kwargs = copy_inputs(inputs)
        if isinstance(model, nn.Module):
            return model(*args, **kwargs)
        return model(
            *(value for value in args if isinstance(value, Tensor)),
            **{name: value for name, value in kwargs.items() if isinstance(value, Tensor)},
        )

    return call


def _verify_all(path: Path, manifest: dict[str, Any], final: Finalized, held_out: Sequence[ExampleInputs]) -> None:
    artifact.write_manifest(path, manifest)

    def noisy(seed: int) -> Callable[[ExampleInputs], Any]:
        return caller(with_noise(final.trained, seed))

    for entry in artifact.answering(manifest):
        others = [p for p in manifest["programs"] if p["engine"] != entry["engine"]]
        try:
            _verify_program(path, manifest, entry, final, held_out, noisy)
        except Exception as error:  # whatever another project's runtime raises
            if entry["engine"] in all_engines.OWN or not others:
                raise
            drifted = isinstance(error, DriftError)
            why = str(error).removesuffix(READS) if drifted else in_a_line(error)  # torch's own do not drift
            for program in (p for p in manifest["programs"] if p["engine"] == entry["engine"]):
                for file in artifact.program_files(program):
                    (path / file["file"]).unlink(missing_ok=True)  # an encoder and a decoder may share theirs
            shutil.rmtree(path / entry["engine"], ignore_errors=True)
            manifest["programs"] = others
            if "weights" in manifest and not any(program["weights"] for program in others):
                (path / manifest.pop("weights")["file"]).unlink()
            manifest["ranking"].append({"engine": entry["engine"], "slower": None, "why": f"left out: {why}"})
            artifact.write_manifest(path, manifest)


def _verify_program(
    path: Path,
    manifest: dict[str, Any],
    entry: dict[str, Any],
    final: Finalized,
    held_out: Sequence[ExampleInputs],
    noisy: Callable[[int], Callable[[ExampleInputs], Any]],
) -> None:
    name = entry["engine"]
    loaded = artifact.load(path, engine=name)
    plain = caller(final.plain) if final.quantized else None
    trained, deployed = final.trained, final.trained if plain is None else final.deployed
    if (own := all_engines.reference(name, final.deployed)) is not None:
        verify(held_out, caller(final.deployed), caller(trained), plain, f"{name} (the integers)", noisy)
        entry["activations"] = compare(held_out, caller(loaded), caller(trained), plain).as_dict()
        trained = deployed = own

        def noisy(seed: int) -> Callable[[ExampleInputs], Any]:
            return caller(with_noise(own, seed))

    figures: Verification = verify(held_out, caller(loaded), caller(trained), plain, name, noisy)
    entry["verification"] = figures.as_dict()
    if entry["cache"]:
        few = [first_rows(held_out[0], 2, length=32)]
        verify(few, _stepwise(loaded), caller(trained), plain, f"{name} (with the cache)", noisy)
    programs = [p for p in manifest["programs"] if p["engine"] == name]
    least = [_least(inputs, programs) for inputs in held_out[:1]]  # shows a size that was mistaken for a constant
    verify(least, caller(loaded), caller(deployed), plain, f"{name} (least sizes)", noisy)


def _stepwise(model: Any) -> Callable[[ExampleInputs], Tensor]:
    """A function from example inputs to logits [B, T, V]: the first half at once, then a token at a time."""

    def call(inputs: ExampleInputs) -> Tensor:
        from .generate import Cache, read_source

        args, kwargs = split_inputs(inputs)
        if isinstance(model, LoadedSeq2Seq):
            ids_BT = kwargs.pop("decoder_input_ids")
            valid_BT, cache = torch.ones_like(ids_BT).bool(), read_source(model, kwargs, ids_BT, ids_BT.shape[1])
        else:
            ids_BT = args[0] if args else kwargs["input_ids"]
            valid_BT, cache = kwargs.get("attention_mask", torch.ones_like(ids_BT)).bool(), Cache(model, *ids_BT.shape)
        batch, length = ids_BT.shape
        half = (length + 1) // 2
        parts = [slice(half), *(slice(t, t + 1) for t in range(half, length))]
        wanted = torch.arange(length).expand(batch, length)
        return torch.cat(
            [cache.step(ids_BT[:, p], valid_BT[:, p], wanted[:, : ids_BT[:, p].shape[1]]) for p in parts], 1
        )

    return call


def _least(inputs: ExampleInputs, programs: Sequence[dict[str, Any]]) -> ExampleInputs:
    """The inputs cut to the least sizes that an engine's programs take; a decoder's to the first row."""
    args, kwargs = split_inputs(inputs)
    rows_only = {spec["name"] for entry in programs if entry["cache"] for spec in entry["inputs"]}
    specs = {spec["name"]: spec["shape"] for entry in programs for spec in entry["inputs"]}

    def cut(value: Any, name: str) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        shape = specs.get(name, programs[0]["inputs"][0]["shape"])  # a causal model's mask is like its ids
        least = shape[:1] if name in rows_only or name not in specs else shape
        return value[tuple(slice(size["min"]) if isinstance(size, dict) else slice(None) for size in least)]

    if kwargs:
        return {name: cut(value, name) for name, value in kwargs.items()}
    names = iter(specs)
    return tuple(cut(value, next(names)) if isinstance(value, Tensor) else value for value in args)


def _metrics(
    path: Path, final: Finalized, metric: Metric | None, batches: Sequence[Any], split: str
) -> list[dict[str, Any]]:
    """The task metric of the float model, the trained model and the artifact, on the same batches.

    Where masks were given with a model that does not have them yet, of the unpruned model too.
    """
    if metric is None or not batches:
        return []
    loaded = artifact.load(path, engine=artifact.read_manifest(path)["programs"][0]["engine"])
    name = getattr(metric, "__name__", type(metric).__name__)
    direction = "higher" if getattr(metric, "higher_is_better", False) else "lower"
    float_ = "float" if final.given is None else "float, pruned"
    models = {"float, unpruned": final.given, float_: final.plain, "trained": final.trained, "artifact": loaded}
    with torch.no_grad():
        found = {which: metric(model, batches) for which, model in models.items() if model is not None}
    for value in found.values():
        if not isinstance(value, int | float | Tensor):
            raise ValueError(f"the metric {name} gave a {type(value).__name__}, expected a float")
    values = {which: float(value) for which, value in found.items()}
    allowed = METRIC_TOLERANCE * max(abs(values["trained"]), 0.1)
    worse = (values["artifact"] - values["trained"]) * (1 if direction == "lower" else -1)
    if not worse <= allowed:  # NaN is worse
        raise DriftError(
            f"{name} of the artifact is {values['artifact']:.4f}, of the trained model "
            f"{values['trained']:.4f}: more than {METRIC_TOLERANCE:.0%} worse"
        )
    return [
        {"name": f"{name} ({which})", "value": value, "direction": direction, "split": split, "n": len(batches)}
        for which, value in values.items()
    ]

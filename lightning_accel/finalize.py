"""From the live model to copies for deployment, and from a checkpoint back to a trained model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import select
from .capture import as_inputs, call_example, flatten_output
from .inputs import ExampleInputs
from .prune import Masks, apply_masks_, shrink_model
from .prune.cut import is_done, note_in_configs, rebased, replay_
from .prune.layers import dropped_layers, renamed
from .quantize import QuantConfig, calibrate_, convert_, is_prepared, prepare_, unprepare_
from .quantize.fake import Int4GroupFakeQuantizer, shapes_of
from .quantize.layers import check_not_converted
from .quantize.prepare import check_prepared_as, plan, prepare_as_planned_
from .quantize.ranges import load_static_state_


@dataclass
class Finalized:
    """Copies of the model: as float and dense, as it was trained, and as it is deployed; they share what is equal."""

    plain: nn.Module
    trained: nn.Module
    deployed: nn.Module
    quantized: bool
    given: nn.Module | None = None  # float and unmasked, where `model` still held what the masks drop


def finalize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    masks: Masks | None,
    quantize: QuantConfig | None,
    calibration: Iterable[Any] | None = None,
) -> Finalized:
    """Copies of the model for deployment: masks applied, neurons cut out, fake quantization turned into integers.

    Raises:
        ValueError: a weight is NaN or infinite, or the model holds integers already, or it was prepared otherwise than
            `quantize` says.
    """
    check_not_converted(model)  # what it gained and lost over the float model could not be said
    if quantize is not None and is_prepared(model):
        check_prepared_as(model, quantize)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} holds NaN or infinite values; the training diverged, export an earlier checkpoint"
            )
    for name, buffer in model.named_buffers():  # infinities are legitimate there, as in attention masks
        if buffer.is_floating_point() and torch.isnan(buffer).any():
            raise ValueError(f"the buffer {name} holds NaN; the training diverged, export an earlier checkpoint")
    trained, given = _copy(model), None
    if masks:
        apply_masks_(trained, masks)
        before = dict(model.named_parameters())
        if any(not torch.equal(p, before[n].detach().cpu().float()) for n, p in trained.named_parameters()):
            given = unprepare_(_copy(model))
    plain = unprepare_(_share(trained))
    deployed = shrink_model(trained, masks, example_inputs=example_inputs) if masks else _share(trained)
    _check_groups(trained, deployed, dropped_layers(trained, masks or {}))
    if quantize is not None and not is_prepared(trained):
        _check_shrunk(plain, deployed, example_inputs)  # what is quantized below is compared with itself only
        prepare_(deployed, quantize)
        calibrate_(deployed, calibration)
        trained = _share(deployed)  # groups of inputs are those that are left
    quantized = is_prepared(deployed)
    if quantized:
        deployed = convert_(deployed)
    return Finalized(plain, trained, deployed, quantized, given)


def _check_shrunk(plain: nn.Module, deployed: nn.Module, example_inputs: ExampleInputs) -> None:
    """Raises ValueError unless the float model computes without its pruned neurons what it did with them at zero."""
    outputs = (flatten_output(call_example(model, example_inputs))[0] for model in (plain, deployed))
    for masked, shrunk in zip(*outputs, strict=True):
        if masked.is_floating_point() and not (masked - shrunk).norm() <= 1e-3 * masked.norm():
            raise ValueError("cutting pruned neurons out changes what the model computes; export without masks")


def _check_groups(trained: nn.Module, deployed: nn.Module, dropped: dict[str, list[int]]) -> None:
    """Raises ValueError where inputs of a layer in int4 were cut: they would share scales in other groups."""
    left: dict[str, Any] = dict(select.named_modules(deployed))
    modules: dict[str, Any] = dict(select.named_modules(trained))
    for name, module in modules.items():
        new = renamed(name, dropped)
        if new is not None and isinstance(getattr(module, "weight_fake_quantizer", None), Int4GroupFakeQuantizer):
            before, after = shapes_of(module)[0][1], shapes_of(left[new])[0][1]
            if before != after:
                raise ValueError(
                    f"{name} was trained in int4 with {before} inputs, of which pruning leaves {after}: others would "
                    f"share a scale. Write overrides={{{name!r}: 'int8'}}, or prune in a fit before"
                )


def _copy(model: nn.Module) -> nn.Module:
    model = select.copy_model(model).cpu().float().eval().requires_grad_(False)
    for module in model.modules():  # a causal language model is asked for its cache where it is wanted
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def _share(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors, which nobody may change in place."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@dataclass
class Restored:
    """A model as a checkpoint holds it, its masks, and inputs it was called with, where Export was in the fit."""

    model: nn.Module
    masks: Masks | None
    example_inputs: ExampleInputs | None


def restore_(model: nn.Module, checkpoint: str | Path, module: str | None) -> Restored:
    """Puts a Lightning checkpoint's weights and quantization into `model`.

    What the callbacks worked on may lie above or below `module`: their state holds names in the LightningModule.

    Raises:
        ValueError: the checkpoint's names do not fit the model.
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than tensors and plain types, and nothing else is unpickled ({error}); save "
            "hyper-parameters as plain types"
        ) from error
    if "state_dict" not in saved:
        raise ValueError(
            f"{checkpoint} is no Lightning checkpoint (it has no state_dict); write "
            "model.load_state_dict(torch.load(...)) and export without checkpoint="
        )
    weights = {select.canonical_name(name): tensor for name, tensor in saved["state_dict"].items()}
    own = {select.canonical_name(name): name for name in model.state_dict()}
    states = [s for s in saved.get("callbacks", {}).values() if isinstance(s, dict)]
    records = [(s["module"], s["record"]) for s in states if s.get("technique") == "pruning" and s.get("record")]
    candidates = [f"{module}."] if module else ["", *sorted({f"{name.partition('.')[0]}." for name in weights})]
    prefixes = [
        p
        for p in candidates
        if _names_cut(model, records, p) <= {n.removeprefix(p) for n in weights if n.startswith(p)}
    ]
    if len(prefixes) > 1 and prefixes[0]:
        raise ValueError(
            f"{checkpoint} holds the weights of several such models; give module={prefixes[0][:-1]!r}, or another of "
            f"{[p[:-1] for p in prefixes]}"
        )
    prefix = prefixes[0] if prefixes else None
    if prefix is None:
        raise ValueError(
            f"{checkpoint} does not hold the weights of this {type(model).__name__}; give module= as in "
            f"the callbacks (the checkpoint has {sorted(weights)[0]!r}, the model {sorted(own)[0]!r})"
        )
    for at, record in records:
        record = rebased(record, at, prefix)
        if not is_done(model, record):
            replay_(model, record)
            note_in_configs(model, "", record)
    own = {select.canonical_name(name): name for name in model.state_dict()}
    model.load_state_dict({real: weights[prefix + name] for name, real in own.items()})
    masks: Masks = {}
    for state in (s for s in states if s.get("technique") == "pruning"):
        named = {select.join(state["module"], name): mask for name, mask in state["masks"].items()}
        for name, mask in _below(prefix, named).items():
            masks[name] = masks[name] & mask if name in masks else mask
    for state in (s for s in states if s.get("technique") == "quantization" and s["prepared"]):
        if chosen := _below(prefix, state["quantized"]):
            config = QuantConfig(**state["config"])
            prepare_as_planned_(model, config, plan(model, config, only=chosen))
            load_static_state_(model, state["static"], prefix)
    calls = [s["call"] for s in states if s.get("technique") == "export" and s["module"] == prefix.rstrip(".")]
    return Restored(model, masks or None, as_inputs(model, *calls[0]) if calls and calls[0] else None)


def _names_cut(model: nn.Module, records: list[tuple[str, Any]], prefix: str) -> set[str]:
    """The names of the model's state once it is cut as the records say."""
    if records:
        model = copy.deepcopy(model).to("meta")
        for at, record in records:
            with suppress(ValueError):  # it lies elsewhere
                replay_(model, rebased(record, at, prefix))
    return {select.canonical_name(name) for name in model.state_dict()}


def _below(prefix: str, named: dict[str, Any]) -> dict[str, Any]:
    """What is named below a module, or is that module: names relative to it, "" for itself."""
    inside = {name: value for name, value in named.items() if f"{name}.".startswith(prefix)}
    return {name[len(prefix) :]: value for name, value in inside.items()}

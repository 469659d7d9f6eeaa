"""From the live model to copies for deployment, and from a checkpoint back to a trained model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import select
from .prune import Masks, apply_masks_, shrink_model
from .prune.groups import ExampleInputs
from .quantize import QuantConfig, convert_, is_prepared, prepare_, unprepare_


@dataclass
class Finalized:
    """Copies of the model: as float and dense, as it was trained, and as it is deployed."""

    plain: nn.Module
    trained: nn.Module
    deployed: nn.Module
    quantized: bool


def finalize(
    model: nn.Module, example_inputs: ExampleInputs, masks: Masks | None, quantize: QuantConfig | None
) -> Finalized:
    """Copies of the model for deployment: masks applied, neurons cut out, fake quantization turned into integers.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} holds NaN or infinite values; the training diverged, export an earlier checkpoint"
            )
    trained = _copy(model)
    if masks:
        apply_masks_(trained, masks)
    plain = unprepare_(_copy(trained))
    deployed = shrink_model(trained, masks, example_inputs=example_inputs) if masks else _copy(trained)
    if quantize is not None and not is_prepared(trained):
        prepare_(trained, quantize)
        prepare_(deployed, quantize)
    quantized = is_prepared(deployed)
    if quantized:
        deployed = convert_(deployed) if list(deployed.children()) else convert_(nn.Sequential(deployed))
    return Finalized(plain, trained, deployed, quantized)


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def restore_(model: nn.Module, checkpoint: str | Path, module: str | None) -> tuple[nn.Module, Masks | None]:
    """Puts a Lightning checkpoint's weights and quantization into `model` and returns it with the masks.

    Raises:
        ValueError: the checkpoint's names do not fit the model.
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = {select.canonical_name(name): tensor for name, tensor in saved["state_dict"].items()}
    own = set(model.state_dict())
    prefixes = [f"{module}."] if module else ["", *sorted({f"{name.partition('.')[0]}." for name in weights})]
    prefix = next((p for p in prefixes if own <= {n.removeprefix(p) for n in weights if n.startswith(p)}), None)
    if prefix is None:
        raise ValueError(
            f"{checkpoint} does not hold the weights of this {type(model).__name__}; give module= as in "
            f"the callbacks (the checkpoint has {sorted(weights)[0]!r}, the model {sorted(own)[0]!r})"
        )
    model.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}, strict=False)
    masks: Masks = {}
    for state in saved.get("callbacks", {}).values():
        if not isinstance(state, dict) or (state.get("module") or "") not in (prefix.rstrip("."), module or ""):
            continue
        if state.get("technique") == "pruning":
            masks.update(state["masks"])
        elif state.get("technique") == "quantization" and state["prepared"]:
            prepare_(model, QuantConfig(**state["config"]))
    return model, masks or None

"""Weights of checkpoints in modules that have to be cut first, as the trained or saved ones were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from . import select
from .finalize import restore_
from .prune import apply_masks_
from .prune.cut import is_done, replay_


def load_checkpoint(path: str | Path, module: nn.Module) -> nn.Module:
    """Puts the weights of a checkpoint into `module`, in place, cut and masked as they were, and returns it.

    Args:
        path: a Lightning checkpoint of a fit with `Pruning`, or a folder that `save_pretrained` wrote of a model from
            `shrink_model`.
        module: the network (or LightningModule) as it was built before pruning, or from the saved configuration.

    Raises:
        ValueError: no such checkpoint, or its names or sizes do not fit the module.

    Example:
        >>> from lightning_accel import load_checkpoint  # model = load_checkpoint("last.ckpt", Network())
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, module)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; give the file of a Trainer or the folder of save_pretrained")
    restored = restore_(select.unwrap(module), path, None)
    if restored.masks:
        apply_masks_(module, restored.masks)
    return module


def _load_folder(path: Path, module: nn.Module) -> nn.Module:
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors"))
    if not files or not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json with *.safetensors; write model.save_pretrained({str(path)!r})")
    model: Any = select.unwrap(module)
    records = json.loads((path / "config.json").read_text()).get("pruned") or []
    for record in records:
        if not is_done(model, record):
            replay_(model, record)
    if records and hasattr(model, "config"):
        model.config.pruned = records
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(parameters[name]) for name in state if name in parameters}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(
            f"the weights in {path} have other sizes than this {type(model).__name__} ({first}); give the model as "
            "it was built before pruning, or type(model)(config) with the configuration saved there"
        ) from error
    lost = [name for name in missing if name not in parameters or id(parameters[name]) not in stored]  # not tied
    if lost or unexpected:
        raise ValueError(
            f"{path} does not hold the weights of this {type(model).__name__}: {(lost or unexpected)[0]!r} is "
            f"{'missing' if lost else 'unknown'}"
        )
    return module

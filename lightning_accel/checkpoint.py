"""Weights of checkpoints in modules that have to be cut first, as the trained or saved ones were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import select
from ._quiet import PreTrainedModel
from .finalize import restore_
from .prune import apply_masks_
from .prune.cut import replay_steps_


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
    replay_steps_(model, records)
    if records and hasattr(model, "config"):
        model.config.pruned = records
    _copy_weights(model, {name: tensor for file in files for name, tensor in load_file(file).items()}, path)
    return module


@torch.no_grad()
def _copy_weights(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Copies saved weights into a model's, under its own names or under those that transformers saves them by."""
    own: dict[str, Tensor] = model.state_dict()
    if isinstance(model, PreTrainedModel) and not state.keys() <= own.keys():
        from transformers.core_model_loading import revert_weight_conversion

        memory = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
        own = revert_weight_conversion(model, dict(own))
        if made := [name for name, tensor in own.items() if tensor.untyped_storage().data_ptr() not in memory]:
            raise ValueError(f"{made[0]!r} in {path} is put together from several weights; write from_pretrained")
    tied = {own[name].data_ptr() for name in state if name in own}
    unknown = [name for name in state if name not in own]
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in tied]
    if unknown or missing:
        raise ValueError(
            f"{path} does not hold the weights of this {type(model).__name__}: {(missing or unknown)[0]!r} is "
            f"{'missing' if missing else 'unknown'}"
        )
    if other := [name for name, tensor in state.items() if own[name].shape != tensor.shape]:
        raise ValueError(
            f"the weights in {path} have other sizes than this {type(model).__name__} (size mismatch for {other[0]}: "
            f"{list(state[other[0]].shape)} there, {list(own[other[0]].shape)} here); give the model as it was built "
            "before pruning, or type(model)(config) with the configuration saved there"
        )
    for name, tensor in state.items():
        own[name].copy_(tensor)

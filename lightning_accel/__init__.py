"""One fit, one artifact, faster on your machine, by this much, at this cost in quality.

Names are imported when they are first used (PEP 562), so that `from lightning_accel import load` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AccelModule": "module",
    "ArtifactError": "artifact",
    "AutoMixedPrecision": "callbacks",
    "Constant": "schedule",
    "Cubic": "schedule",
    "DistillConfig": "distill",
    "Distillation": "callbacks",
    "DriftError": "verify",
    "Export": "callbacks",
    "ExportError": "export",
    "Linear": "schedule",
    "PruneConfig": "prune",
    "Pruning": "callbacks",
    "QuantConfig": "quantize",
    "QuantizationAwareTraining": "callbacks",
    "allocate": "quantize",
    "apply_masks_": "prune",
    "distillation_loss": "distill",
    "export_model": "export",
    "load": "artifact",
    "load_checkpoint": "checkpoint",
    "prepare_": "quantize",
    "prune_model_": "prune",
    "quantize_model": "quantize",
    "sensitivity": "quantize",
    "shrink_model": "prune",
}

__all__ = [
    "AccelModule",
    "ArtifactError",
    "AutoMixedPrecision",
    "Constant",
    "Cubic",
    "DistillConfig",
    "Distillation",
    "DriftError",
    "Export",
    "ExportError",
    "Linear",
    "PruneConfig",
    "Pruning",
    "QuantConfig",
    "QuantizationAwareTraining",
    "allocate",
    "apply_masks_",
    "distillation_loss",
    "export_model",
    "load",
    "load_checkpoint",
    "prepare_",
    "prune_model_",
    "quantize_model",
    "sensitivity",
    "shrink_model",
]

if TYPE_CHECKING:
    from .artifact import ArtifactError, load
    from .callbacks import AutoMixedPrecision, Distillation, Export, Pruning, QuantizationAwareTraining
    from .checkpoint import load_checkpoint
    from .distill import DistillConfig, distillation_loss
    from .export import ExportError, export_model
    from .module import AccelModule
    from .prune import PruneConfig, apply_masks_, prune_model_, shrink_model
    from .quantize import QuantConfig, allocate, prepare_, quantize_model, sensitivity
    from .schedule import Constant, Cubic, Linear
    from .verify import DriftError


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lightning_accel' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

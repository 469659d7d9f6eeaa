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
    "Between": "schedule",
    "Constant": "schedule",
    "Cubic": "schedule",
    "DistillConfig": "distill",
    "Distillation": "callbacks",
    "DriftError": "verify",
    "Export": "callbacks",
    "ExportError": "export",
    "Keyed": "distill",
    "Linear": "schedule",
    "PruneConfig": "prune",
    "Pruning": "callbacks",
    "QuantConfig": "quantize",
    "QuantizationAwareTraining": "callbacks",
    "TeacherCache": "distill",
    "allocate": "quantize",
    "apply_masks_": "prune",
    "attention_loss": "distill",
    "distillation_loss": "distill",
    "export_model": "export",
    "hidden_loss": "distill",
    "layer_map": "distill",
    "load": "artifact",
    "load_checkpoint": "checkpoint",
    "prepare_": "quantize",
    "prune_model_": "prune",
    "pseudo_labels": "distill",
    "quantize_model": "quantize",
    "sensitivity": "quantize",
    "shrink_model": "prune",
    "student_from": "distill",
}

__all__ = [
    "AccelModule",
    "ArtifactError",
    "AutoMixedPrecision",
    "Between",
    "Constant",
    "Cubic",
    "DistillConfig",
    "Distillation",
    "DriftError",
    "Export",
    "ExportError",
    "Keyed",
    "Linear",
    "PruneConfig",
    "Pruning",
    "QuantConfig",
    "QuantizationAwareTraining",
    "TeacherCache",
    "allocate",
    "apply_masks_",
    "attention_loss",
    "distillation_loss",
    "export_model",
    "hidden_loss",
    "layer_map",
    "load",
    "load_checkpoint",
    "prepare_",
    "prune_model_",
    "pseudo_labels",
    "quantize_model",
    "sensitivity",
    "shrink_model",
    "student_from",
]

if TYPE_CHECKING:
    from .artifact import ArtifactError, load
    from .callbacks import AutoMixedPrecision, Distillation, Export, Pruning, QuantizationAwareTraining
    from .checkpoint import load_checkpoint
    from .distill import (
        DistillConfig,
        Keyed,
        TeacherCache,
        attention_loss,
        distillation_loss,
        hidden_loss,
        layer_map,
        pseudo_labels,
        student_from,
    )
    from .export import ExportError, export_model
    from .module import AccelModule
    from .prune import PruneConfig, apply_masks_, prune_model_, shrink_model
    from .quantize import QuantConfig, allocate, prepare_, quantize_model, sensitivity
    from .schedule import Between, Constant, Cubic, Linear
    from .verify import DriftError


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lightning_accel' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

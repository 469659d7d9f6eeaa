"""Pruning: targets -> saliency -> masks -> `apply_masks_` while training; groups -> `shrink_model` when it is done."""

from .config import PruneConfig
from .groups import Group, find_groups
from .masks import Masks, apply_masks_, compute_masks, prune_model_, pruning_coverage
from .shrink import shrink_model

__all__ = [
    "Group",
    "Masks",
    "PruneConfig",
    "apply_masks_",
    "compute_masks",
    "find_groups",
    "prune_model_",
    "pruning_coverage",
    "shrink_model",
]

"""Pruning: targets -> saliency -> masks -> `apply_masks_` while training; groups -> `shrink_model` when it is done."""

from .config import PruneConfig
from .groups import Group, find_groups
from .keep import Masks
from .latency import latency_table, time_in_turns
from .losses import loss_table
from .masks import apply_masks_, compute_masks, prune_model_, pruning_coverage
from .shrink import shrink_model

__all__ = [
    "Group",
    "Masks",
    "PruneConfig",
    "apply_masks_",
    "compute_masks",
    "find_groups",
    "latency_table",
    "loss_table",
    "prune_model_",
    "pruning_coverage",
    "shrink_model",
    "time_in_turns",
]

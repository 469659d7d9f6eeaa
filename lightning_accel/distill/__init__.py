"""Knowledge distillation: losses, layers, teachers and their cache, smaller students; no Lightning."""

from .cache import TeacherCache
from .config import DistillConfig
from .keyed import Keyed, split_key
from .layers import Projections, Taps, layer_map
from .losses import TopK, attention_loss, combine, distillation_loss, hidden_loss, label_mask, logits_of, top_k_of
from .student import student_from
from .teacher import Answer, LiveTeacher, guest, load_teacher, pseudo_labels
from .terms import Positions, compare, positions_of

__all__ = [
    "Answer",
    "DistillConfig",
    "Keyed",
    "LiveTeacher",
    "Positions",
    "Projections",
    "Taps",
    "TeacherCache",
    "TopK",
    "attention_loss",
    "combine",
    "compare",
    "distillation_loss",
    "guest",
    "hidden_loss",
    "label_mask",
    "layer_map",
    "load_teacher",
    "logits_of",
    "positions_of",
    "pseudo_labels",
    "split_key",
    "student_from",
    "top_k_of",
]

"""Lightning adapters: when to call the techniques; no maths."""

from .distillation import Distillation
from .export import Export
from .precision import AutoMixedPrecision
from .pruning import Pruning
from .quantization import QuantizationAwareTraining

__all__ = ["AutoMixedPrecision", "Distillation", "Export", "Pruning", "QuantizationAwareTraining"]

"""Quantization: schemes, fake quantization for training (`prepare_`) and conversion to integers (`convert_`)."""

from .config import QuantConfig
from .converted import Int8Embedding, Int8Linear, convert_, quantization_coverage, quantize_model
from .fake import is_prepared, prepare_, unprepare_
from .mixed import Sensitivity, allocate, sensitivity

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "QuantConfig",
    "Sensitivity",
    "allocate",
    "convert_",
    "is_prepared",
    "prepare_",
    "quantization_coverage",
    "quantize_model",
    "sensitivity",
    "unprepare_",
]

"""Quantization: schemes, fake quantization for training (`prepare_`) and conversion to integers (`convert_`)."""

from .config import QuantConfig
from .converted import Int8Embedding, Int8Linear, convert_, quantization_coverage, quantize_model
from .fake import is_prepared, prepare_, unprepare_

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "QuantConfig",
    "convert_",
    "is_prepared",
    "prepare_",
    "quantization_coverage",
    "quantize_model",
    "unprepare_",
]

"""Quantization: schemes, fake quantization for training (`prepare_`) and conversion to integers (`convert_`)."""

from .config import QuantConfig
from .converted import (
    Int8Embedding,
    Int8Linear,
    Int8StaticConv,
    Int8StaticLinear,
    convert_,
    quantization_coverage,
    quantize_model,
)
from .fake import is_prepared, prepare_, unprepare_
from .mixed import Sensitivity, allocate, sensitivity
from .ranges import calibrate_, freeze_

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "Int8StaticConv",
    "Int8StaticLinear",
    "QuantConfig",
    "Sensitivity",
    "allocate",
    "calibrate_",
    "convert_",
    "freeze_",
    "is_prepared",
    "prepare_",
    "quantization_coverage",
    "quantize_model",
    "sensitivity",
    "unprepare_",
]

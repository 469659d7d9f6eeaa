"""Quantization: schemes, fake quantization for training (`prepare_`) and conversion to integers (`convert_`)."""

from .config import QuantConfig
from .converted import convert_, quantize_model
from .coverage import quantization_coverage
from .fake import is_prepared, unprepare_
from .layers import Int8Embedding, Int8Linear, Int8StaticConv, Int8StaticLinear
from .mixed import Sensitivity, allocate, sensitivity
from .prepare import prepare_
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

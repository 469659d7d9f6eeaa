"""Imports that talk: torchao, and transformers which imports it, log warnings about CUDA extensions on a CPU.

They are imported here once, with those two loggers silenced meanwhile and nothing else. PreTrainedModel is among them
because it imports what every model of transformers does.
"""

import logging
from contextlib import contextmanager


@contextmanager
def _silenced(*names: str):
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


with _silenced("torchao", "torch.utils._pytree"):
    from torchao.quantization.qat import FakeQuantizedLinear
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

__all__ = ["AttentionInterface", "Conv1D", "FakeQuantizedLinear", "FakeQuantizerBase", "PreTrainedModel"]

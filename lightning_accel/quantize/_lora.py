"""The fake-quantized form of peft's LoRA layer; imports peft, so it is itself imported only where peft is in use."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.func import functional_call

from .adapters import merged_weight


class FakeQuantizedLora(Linear):
    """Calls its fake-quantized base layer with the merged weight; without LoRA's dropout, which no weight can hold."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional_call(self.base_layer, {"weight": merged_weight(self)}, (x, *args), kwargs)

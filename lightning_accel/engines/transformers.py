"""transformers: a folder that plain `from_pretrained` loads, with torchao's tensors in safetensors where quantized.

The way into servers such as vLLM. torchao's tensors are put together from the integers and scales that were trained,
not made anew. Their activations are torchao's affair: of `int8` and `int8-static` layers each row is rounded by
max(|x|) / 127.5 in place of / 127 or of a static range (`transformers` loads none), of 4-bit layers not at all. So the
integers are verified against the trained model, and the folder against the integers with such activations
(docs/decisions/0018-files-for-other-runtimes.md).
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import files

if TYPE_CHECKING:
    from ..capture import Capture

FOLDER = "transformers"
_RANGE, _LEAST = 127.5, torch.finfo(torch.float32).eps  # of torchao's symmetric int8: a code a 255th, the least scale


# --- build side ------------------------------------------------------------------------------------------------------


def lower(model: nn.Module) -> nn.Module:
    """The model as it is: its integers are taken when the folder is written."""
    return model


def reference(model: nn.Module) -> nn.Module | None:
    """A deployed model with activations rounded as torchao rounds them; `None` where that changes nothing."""
    return files.with_activations(model, _int8_linear)


def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What torchao's Int8Tensor computes of rows [..., in] in float32: sums are int32."""
    steps = (x.abs().amax(-1, keepdim=True) / _RANGE).clamp_min(_LEAST)
    rows = torch.round(x * (1.0 / steps)).clamp(-128, 127).to(torch.int8)
    sums = torch._int_mm(rows.reshape(-1, rows.shape[-1]), codes.t()).reshape(*x.shape[:-1], -1)
    y = sums.float() * steps * scale
    return y if bias is None else y + bias


def build(capture: Capture, directory: Path, name: str) -> dict[str, Any]:
    """Writes the folder, once for all roles: `config.json`, `model.safetensors`, and the files that travel with it.

    Raises:
        ValueError: no model of transformers, or one that its configuration and torchao cannot say.
    """
    from ..artifact import sha256

    folder = directory / FOLDER
    if not folder.exists():
        _check(capture.model, capture.constants)
        folder.mkdir()
        _save(capture.model, folder)
        for asset, source in capture.assets.items():
            shutil.copy(source, folder / Path(asset).name)
    rest = sorted(file.name for file in folder.iterdir() if file.name != "config.json")
    return {
        "file": f"{FOLDER}/config.json",
        "files": [{"file": f"{FOLDER}/{file}", "sha256": sha256(folder / file)} for file in rest],
        "isa": None,
        "weights": {},
        "options": {"constants": capture.constants},
    }


def _check(model: Any, constants: dict[str, Any]) -> None:
    import transformers

    kind = type(model)
    if not isinstance(model, transformers.PreTrainedModel) or getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(f"{kind.__name__} is no model of transformers, so from_pretrained cannot load it")
    if wrong := [name for name, v in constants.items() if not isinstance(v, bool | int | float | str | None)]:
        raise ValueError(f"the input {wrong[0]!r} is no tensor and no plain value, so the call cannot be written down")


def _save(model: Any, folder: Path) -> None:
    """Writes the model's configuration and weights as `save_pretrained` would."""
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], "float32"
    if model.can_generate():
        config.use_cache = True  # exports do without
        model.generation_config.save_pretrained(folder)
    state, configs = _state(model, copy.deepcopy(config))
    metadata: dict[str, str] = {}
    if configs:
        state, metadata = flatten_tensor_state_dict(state)
        config.quantization_config = _quantization(configs, model)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={**metadata, "format": "pt"})


def _state(model: Any, config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, tied ones once, integers as torchao's tensors; and torchao's config of each quantized module."""
    from ..quantize.layers import CONVERTED
    from ..quantize.products import Int8Products

    if any(isinstance(module, Int8Products) for module in model.modules()):
        raise ValueError("torchao has no attention with int8 products; write QuantConfig(attention=False)")
    plain: Any = files.check_configuration(model, config)
    converted: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, CONVERTED)}
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in converted
    }
    configs = {}
    for name, module in converted.items():
        state[f"{name}.weight"], configs[name] = _quantized(module)
        if getattr(plain.get_submodule(name), "bias", None) is not None:
            state[f"{name}.bias"] = module.bias.detach().clone()
    for tied in plain.all_tied_weights_keys:
        state.pop(tied)
    return state, configs


def _quantized(module: Any) -> tuple[Tensor, Any]:
    """torchao's tensor with the integers and scales of a converted module, and the config that makes such tensors."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8Tensor,
        IntxUnpackedToInt8Tensor,
        IntxWeightOnlyConfig,
        PerGroup,
        PerRow,
    )
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    from ..quantize.int4 import unpack
    from ..quantize.layers import Int4Embedding, Int4Linear, Int8StaticLinear

    if isinstance(module, Int4Linear | Int4Embedding):
        codes, scales = unpack(module.codes, module.scale, len(module.weight))
        scales, group = scales.squeeze(-1).contiguous(), codes.shape[2]
        codes, zeros = codes.flatten(1).to(torch.int8), torch.zeros_like(scales, dtype=torch.int8)
        int4: Any = torch.int4  # type: ignore[attr-defined]
        config: Any = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(group))
        return IntxUnpackedToInt8Tensor(codes, scales, zeros, int4, (1, group), torch.float32, None), config
    scale = module.scale / module.input_scale if isinstance(module, Int8StaticLinear) else module.scale
    rows = QuantizeTensorToInt8Kwargs(PerRow())  # of a table they have no effect, but a tied head shares it
    block = [1, module.codes.shape[1]]
    tensor = Int8Tensor(module.codes, scale[:, None].contiguous(), block, torch.float32, act_quant_kwargs=rows)
    return tensor, Int8DynamicActivationInt8WeightConfig()


def _quantization(configs: dict[str, Any], model: Any) -> Any:
    """transformers' description of what is quantized: one config of torchao, or one a module where they differ."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    from ..quantize.layers import Int4Embedding, Int8Embedding

    tables = any(isinstance(model.get_submodule(name), Int8Embedding | Int4Embedding) for name in configs)
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    first = next(iter(configs.values()))
    uniform = all(config == first for config in configs.values())
    kind = first if uniform else FqnToConfig(OrderedDict(configs))
    return TorchAoConfig(kind, modules_to_not_convert=left, include_input_output_embeddings=tables)


# --- run side --------------------------------------------------------------------------------------------------------


def unusable(entry: dict[str, Any]) -> str | None:
    """Why the folder cannot be loaded here."""
    missing = [name for name in ("transformers", "torchao") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'lightning-accel[transformers]'"
    return None


def open(path: Path, entry: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads the folder by `from_pretrained`, and calls the model as the captured one was called."""
    import transformers
    from transformers.utils import logging

    from .. import _quiet  # noqa: F401  silences torchao's import
    from ..capture import flatten_output

    config = transformers.AutoConfig.from_pretrained(path.parent)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = getattr(transformers, config.architectures[0]).from_pretrained(path.parent).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    if entry["cache"]:
        return _decoder(model, entry)
    names, constants = [spec["name"] for spec in entry["inputs"]], entry["options"]["constants"]
    model.config.use_cache = False
    call = _encoder(model) if entry["role"] == "encoder" else model

    @torch.no_grad()
    def run(inputs: list[Tensor]) -> list[Tensor]:
        return flatten_output(call(**dict(zip(names, inputs, strict=True)), **constants))[0]

    return run


def _encoder(model: Any) -> nn.Module:
    from ..capture_causal import use_own_attention
    from ..capture_seq2seq import Encoder

    use_own_attention(model)
    return Encoder(model)


def _decoder(model: Any, entry: dict[str, Any]) -> Callable[[list[Tensor]], list[Tensor]]:
    """A decoder with the caller's cache, as the other engines have it."""
    from ..capture_causal import CausalLM, use_own_attention
    from ..capture_seq2seq import Decoder

    caches, cross = len(entry["cache"]["shapes"]), entry["cache"].get("cross", 0)
    use_own_attention(model)
    module = Decoder(model, cross // 2) if cross else CausalLM(model)

    @torch.no_grad()
    def run(inputs: list[Tensor]) -> list[Tensor]:
        return module(*inputs[:-caches], inputs[-caches:])

    return run

"""OpenVINO with nncf: encoders quantized after training, GPT-2 with compressed weights and its cache as a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.measure import Target

from .common import Row, Workloads, built, causal_workloads, chosen_tokens, forward_workload

HINTS = {"f32": "f32", "default": ""}  # the default is bf16 where the CPU has it, at another accuracy than ours


def compiled(path: str | Path, precision: str, **properties: str) -> openvino.CompiledModel:
    """For latency, in one stream, with as many threads as torch has here.

    Raises:
        RuntimeError: it did not take the settings.
    """
    threads = torch.get_num_threads()
    settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads), **properties}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    if model.get_property("INFERENCE_NUM_THREADS") != threads or model.get_property("NUM_STREAMS") != 1:
        raise RuntimeError(f"OpenVINO took {model.get_property('INFERENCE_NUM_THREADS')} threads, {threads} were given")
    return model


def _rows(
    name: str, function: str, path: Path, arguments: Mapping[str, Any], settings: str, run: Callable[[str], Callable]
) -> list[Row]:
    """A row for each precision of what is not quantized."""
    return [
        Row(
            f"openvino {name}, {label} hint",
            Target(f"peers.ov:{function}", {"path": str(path), "precision": precision, **arguments}),
            path,
            f"{settings}; LATENCY, 1 stream, INFERENCE_PRECISION_HINT {precision or 'as it is'}",
            run(precision),
        )
        for label, precision in HINTS.items()
    ]


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder_rows(
    model: nn.Module, inputs: Mapping[str, Tensor], calibration: list[dict[str, np.ndarray]], folder: Path
) -> list[Row]:
    """Static int8, of fixed shape."""
    path = built(folder / "ov-int8.xml", partial(_quantized_encoder, model, inputs, calibration))
    arguments = {"inputs": str(folder / "inputs.npz")}
    settings = "nncf.quantize(model_type=TRANSFORMER), static shape"
    return _rows("int8", "encoder", path, arguments, settings, lambda precision: partial(run_encoder, path, precision))


def _quantized_encoder(
    model: Any, inputs: Mapping[str, Tensor], calibration: list[dict[str, np.ndarray]], path: Path
) -> None:
    import nncf

    converted = openvino.convert_model(model, example_input=dict(inputs))
    converted.reshape({name: list(value.shape) for name, value in inputs.items()})
    quantized = nncf.quantize(converted, nncf.Dataset(calibration), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, path, compress_to_fp16=False)


def encoder(path: str, precision: str, inputs: str) -> Workloads:
    """Timed in a worker."""
    request, given = compiled(path, precision).create_infer_request(), dict(np.load(inputs))
    return forward_workload(lambda: request.infer(given, share_inputs=True, share_outputs=True))


def run_encoder(path: Path, precision: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hidden states [B, T, D]."""
    return compiled(path, precision)(dict(inputs))[0]


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def causal_rows(model: nn.Module, folder: Path, group: int = 128) -> list[Row]:
    """Weights in int8 a channel, and in int4 in groups, with the activations quantized as it runs."""
    rows = []
    for name, settings in (
        ("int8", "nncf.compress_weights(INT8_ASYM)"),
        ("int4", f"nncf.compress_weights(INT4_SYM, group_size={group}, ratio=1.0, all_layers=True)"),
    ):
        path = built(folder / f"ov-{name}.xml", partial(_compressed_causal, model, name, group))
        rows += _rows(name, "causal", path, {}, f"{settings}, cache as a state", partial(_run_causal, path))
    return rows


def _run_causal(path: Path, precision: str) -> Callable[[int, int], Any]:
    return partial(chosen_tokens, partial(OvDecoder, path, precision))


class _Stateful(nn.Module):
    """GPT2LMHeadModel for one row: logits of the last token, and each layer's keys and values [1, H, S, D].

    `nn.Linear` in place of transformers' Conv1D, and beam_idx as OpenVINO's language models have it: its CPU plugin
    looks for that form when it fuses attention with the cache.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.heads = model, model.config.n_head
        self.linears = nn.ModuleDict()
        for index, block in enumerate(model.transformer.h):
            named = {"qkv": block.attn.c_attn, "out": block.attn.c_proj, "up": block.mlp.c_fc, "down": block.mlp.c_proj}
            for name, conv in named.items():
                linear = nn.Linear(*conv.weight.shape)
                linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
                self.linears[f"{name}{index}"] = linear

    def forward(self, input_ids: Tensor, beam_idx: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        body, filled, new = self.model.transformer, past[0].shape[2], input_ids.shape[1]
        places = torch.arange(filled, filled + new)
        mask = (torch.arange(filled + new)[None] <= places[:, None])[None, None]
        x, present = body.wte(input_ids) + body.wpe(places)[None], []
        for index, block in enumerate(body.h):
            linear = partial(self._linear, index)
            q, k, v = (self._split(t) for t in linear("qkv", block.ln_1(x)).chunk(3, -1))
            k = torch.cat([past[2 * index].index_select(0, beam_idx), k], 2)
            v = torch.cat([past[2 * index + 1].index_select(0, beam_idx), v], 2)
            present += [k, v]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + linear("out", attended.transpose(1, 2).flatten(2))
            x = x + linear("down", F.gelu(linear("up", block.ln_2(x)), approximate="tanh"))
        return self.model.lm_head(body.ln_f(x[:, -1:])), *present

    def _linear(self, index: int, name: str, x: Tensor) -> Tensor:
        return self.linears[f"{name}{index}"](x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _compressed_causal(model: Any, name: str, group: int, path: Path) -> None:
    import nncf

    mode = nncf.CompressWeightsMode
    converted = stateful(model)
    if name == "int8":
        compressed = nncf.compress_weights(converted, mode=mode.INT8_ASYM)
    else:
        compressed = nncf.compress_weights(converted, mode=mode.INT4_SYM, group_size=group, ratio=1.0, all_layers=True)
    openvino.save_model(compressed, path, compress_to_fp16=False)


def stateful(model: Any) -> openvino.Model:
    """Converts GPT2LMHeadModel, and makes its cache a state inside."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config
    shape = (1, config.n_head, 1, config.n_embd // config.n_head)
    names = [f"{kind}{index}" for index in range(config.n_layer) for kind in ("key", "value")]
    integers = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    example = (*integers, *(torch.zeros(shape) for _ in names))
    converted = openvino.convert_model(_Stateful(model).eval(), example_input=example)
    for port, name in zip(converted.inputs, ["input_ids", "beam_idx", *(f"past_{n}" for n in names)], strict=True):
        port.get_tensor().set_names({name})
        free = {"input_ids": [1, -1], "beam_idx": [1]}.get(name, [1, shape[1], -1, shape[3]])
        port.get_node().set_partial_shape(openvino.PartialShape(free))
    for port, name in zip(converted.outputs, ["logits", *(f"present_{n}" for n in names)], strict=True):
        port.get_tensor().set_names({name})
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, {f"past_{n}": f"present_{n}" for n in names})
    return converted


class OvDecoder:
    """Its cache is a state of the infer request."""

    def __init__(self, path: str | Path, precision: str) -> None:
        # 32 is the group of activations that its documentation gives for language models
        self.model = compiled(path, precision, DYNAMIC_QUANTIZATION_GROUP_SIZE="32")
        self.request = self.model.create_infer_request()
        self.vocabulary = self.model.output("logits").get_partial_shape()[2].get_length()

    def reset(self) -> None:
        self.request.reset_state()

    def step(self, ids: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": ids[None].astype(np.int64), "beam_idx": np.zeros(1, np.int64)}
        return self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"][0, 0]


def causal(path: str, precision: str, prompt: int, new: int) -> Workloads:
    """Timed in a worker."""
    decoder = OvDecoder(path, precision)
    return causal_workloads(decoder, prompt, new, decoder.vocabulary)

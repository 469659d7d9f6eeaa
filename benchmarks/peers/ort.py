"""ONNX Runtime: encoders through its transformer optimizer, GPT-2 as a graph of its fused operators (`ort_gpt2`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

from lightning_accel.measure import Target

from .common import LEAST_COSINE, Row, Workloads, built, causal_workloads, chosen_tokens, forward_workload
from .ort_gpt2 import gpt2_graph

UNKNOWN = {"DefaultTensorType": TensorProto.FLOAT}  # shape inference does not know the fused operators


def session(path: str | Path) -> onnxruntime.InferenceSession:
    """All graph optimizations, and as many threads as torch has here."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder_rows(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], calibration: list[dict[str, np.ndarray]], folder: Path
) -> list[Row]:
    """Dynamic int8 over the fused graph; static int8 (QDQ) over the plain one, whose operators it covers."""
    plain = partial(_export_encoder, model, inputs)
    dynamic = built(folder / "ort-dynamic.onnx", partial(_dynamic_encoder, model, plain))
    static = built(folder / "ort-static.onnx", partial(_static_encoder, calibration, plain))
    return [
        Row(
            f"onnxruntime int8 {name}",
            Target("peers.ort:encoder", {"path": str(path), "inputs": str(folder / "inputs.npz")}),
            path,
            settings,
            partial(run_encoder, path),
            least,
        )
        for name, path, least, settings in (
            ("dynamic", dynamic, LEAST_COSINE, "optimize_model(model_type='bert'), quantize_dynamic(per_channel=True)"),
            (
                "static",
                static,
                0.85,  # of the trained MiniLM 0.887: ranges by MinMax
                "quant_pre_process, quantize_static(QDQ, U8S8, per_channel=True, MatMul, Gemm and Gather, MinMax)",
            ),
        )
    ]


def _export_encoder(model: Any, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Attention unfused and the older exporter: the form that the transformer optimizer knows."""

    class Hidden(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    wrapper = Hidden()
    wrapper.model = model
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden"]}
    torch.onnx.export(wrapper.eval(), tuple(inputs.values()), str(path), dynamo=False, opset_version=17, **names)
    model.set_attn_implementation(before)


def _dynamic_encoder(model: Any, export: Any, path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    with tempfile.TemporaryDirectory() as temporary:
        plain = str(Path(temporary) / "float.onnx")
        export(plain)
        heads, hidden = model.config.num_attention_heads, model.config.hidden_size
        # at its default level ONNX Runtime goes first, and leaves attention in a form that is not recognized
        fused = optimize_model(plain, "bert", num_heads=heads, hidden_size=hidden, opt_level=0)
        found = fused.get_fused_operator_statistics()
        if found["Attention"] != model.config.num_hidden_layers:
            raise RuntimeError(f"the transformer optimizer fused {found['Attention']} attentions")
        fused.save_model_to_file(str(Path(temporary) / "fused.onnx"))
        quantize_dynamic(Path(temporary) / "fused.onnx", path, per_channel=True, extra_options=UNKNOWN)


class _Calibration(CalibrationDataReader):
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def _static_encoder(calibration: list[dict[str, np.ndarray]], export: Any, path: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        plain, prepared = Path(temporary) / "float.onnx", Path(temporary) / "prepared.onnx"
        export(plain)
        quant_pre_process(plain, prepared)
        quantize_static(
            prepared,
            path,
            _Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def encoder(path: str, inputs: str) -> Workloads:
    """Timed in a worker."""
    run, given = session(path), dict(np.load(inputs))
    return forward_workload(lambda: run.run(None, given))


def run_encoder(path: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hidden states [B, T, D]."""
    return session(path).run(None, dict(inputs))[0]


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def causal_rows(model: nn.Module, folder: Path) -> list[Row]:
    """int8 with dynamic activations, and 4-bit blocks with int8 activations."""
    rows = []
    for name, path, settings in (
        (
            "int8",
            built(folder / "ort-int8.onnx", partial(_dynamic_causal, model)),
            "GroupQueryAttention graph with a shared cache, quantize_dynamic(per_channel=True)",
        ),
        (
            "int4",
            built(folder / "ort-int4.onnx", partial(_blocks_causal, model)),
            "the same graph, MatMulNBitsQuantizer(bits=4, block_size=32, is_symmetric=True, accuracy_level=4), "
            "embedding in 4-bit blocks too",
        ),
    ):
        run = partial(chosen_tokens, partial(OrtDecoder, path))
        rows.append(Row(f"onnxruntime {name}", Target("peers.ort:causal", {"path": str(path)}), path, settings, run))
    return rows


def _dynamic_causal(model: nn.Module, path: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        onnx.save(gpt2_graph(model), Path(temporary) / "float.onnx")
        quantize_dynamic(Path(temporary) / "float.onnx", path, per_channel=True, extra_options=UNKNOWN)


def _blocks_causal(model: nn.Module, path: Path, block: int = 32) -> None:
    quantizer = MatMulNBitsQuantizer(
        gpt2_graph(model),
        bits=4,
        block_size=block,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantizer.process()
    onnx.save(quantizer.model.model, path)


class OrtDecoder:
    """Keys and values stay in one buffer that is input and output at once."""

    def __init__(self, path: str | Path) -> None:
        self.session = session(path)
        self.binding = self.session.io_binding()
        for given in self.session.get_inputs():
            if given.name.startswith("past"):
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(given.shape, np.float32))
                self.binding.bind_ortvalue_input(given.name, cache)
                self.binding.bind_ortvalue_output(given.name.replace("past", "present"), cache)
        self.binding.bind_output("logits")
        self.vocabulary = self.session.get_outputs()[0].shape[-1]
        self.reset()

    def reset(self) -> None:
        self.filled = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        total = self.filled + len(ids)
        bind = self.binding.bind_cpu_input
        bind("input_ids", ids[None].astype(np.int64))
        bind("position_ids", np.arange(self.filled, total, dtype=np.int64)[None])
        bind("filled", np.array([total - 1], np.int32))
        bind("total", np.array(total, np.int32))
        self.session.run_with_iobinding(self.binding)
        self.filled = total
        return self.binding.get_outputs()[self._logits].numpy()[0, 0]

    @property
    def _logits(self) -> int:
        return len(self.binding.get_outputs()) - 1  # outputs come in the order in which they were bound


def causal(path: str, prompt: int, new: int) -> Workloads:
    """Timed in a worker."""
    decoder = OrtDecoder(path)
    return causal_workloads(decoder, prompt, new, decoder.vocabulary)

"""GPT-2 as the ONNX graph that ONNX Runtime's generation library writes for other models.

Node by node, since no exporter emits for it GroupQueryAttention with a cache shared between input and output, nor the
other fused operators (LayerNorm with the residual, FastGelu with its bias).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


def gpt2_graph(model: Any) -> onnx.ModelProto:
    """GPT2LMHeadModel for one row as fused operators; its cache is written in place; logits of the last token."""
    nodes: list[Any] = []
    constants: list[Any] = []
    config = model.config
    heads, width, positions = config.n_head, config.n_embd, config.n_positions

    def constant(name: str, value: torch.Tensor) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value.detach().float().numpy()), name))
        return name

    def add(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def matmul(name: str, x: str, weight: torch.Tensor) -> str:
        return add("MatMul", [x, constant(f"{name}.weight", weight)], [f"{name}.out"])

    def gains(name: str, norm: Any) -> list[str]:
        return [constant(f"{name}.gain", norm.weight), constant(f"{name}.shift", norm.bias)]

    body, caches, epsilon = model.transformer, [], {"epsilon": config.layer_norm_epsilon}
    token = add("Gather", [constant("wte", body.wte.weight), "input_ids"], ["token"])
    place = add("Gather", [constant("wpe", body.wpe.weight), "position_ids"], ["place"])
    residual = add("Add", [token, place], ["embedded"])
    norms = [(f"norm{2 * i + j}", n) for i, b in enumerate(body.h) for j, n in enumerate((b.ln_1, b.ln_2))]
    norms.append(("norm_last", body.ln_f))
    h = add("LayerNormalization", [residual, *gains(*norms[0])], ["norm0.out"], **epsilon)

    def residual_norm(name: str, branch: str, bias: torch.Tensor, norm: Any) -> tuple[str, str]:
        inputs = [residual, branch, *gains(name, norm), constant(f"{name}.bias", bias)]
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        return add("SkipLayerNormalization", inputs, outputs, domain=MICROSOFT, **epsilon), outputs[-1]

    for index, block in enumerate(body.h):
        qkv = matmul(f"qkv{index}", h, block.attn.c_attn.weight)
        qkv = add("Add", [qkv, constant(f"qkv{index}.bias", block.attn.c_attn.bias)], [f"qkv{index}.sum"])
        own = [f"past_key{index}", f"past_value{index}"]
        caches += own
        attended = add(
            "GroupQueryAttention",
            [qkv, "", "", *own, "filled", "total"],
            [f"attended{index}", *(name.replace("past", "present") for name in own)],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=heads,
        )
        projected = matmul(f"project{index}", attended, block.attn.c_proj.weight)
        h, residual = residual_norm(norms[2 * index + 1][0], projected, block.attn.c_proj.bias, block.ln_2)
        up = matmul(f"up{index}", h, block.mlp.c_fc.weight)
        up = add("FastGelu", [up, constant(f"up{index}.bias", block.mlp.c_fc.bias)], [f"gelu{index}"], domain=MICROSOFT)
        down = matmul(f"down{index}", up, block.mlp.c_proj.weight)
        h, residual = residual_norm(norms[2 * index + 2][0], down, block.mlp.c_proj.bias, norms[2 * index + 2][1])
    constants.append(numpy_helper.from_array(np.array([-1]), "minus_one"))
    last = add("Gather", [h, "minus_one"], ["last"], axis=1)
    add("MatMul", [last, constant("head.weight", model.lm_head.weight.t())], ["logits"])
    shape = [1, heads, positions, width // heads]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "T"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, [1, "T"]),
        helper.make_tensor_value_info("filled", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in caches),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, config.vocab_size]),
        *(helper.make_tensor_value_info(n.replace("past", "present"), TensorProto.FLOAT, shape) for n in caches),
    ]
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)

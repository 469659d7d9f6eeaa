"""Layers that read the same input as one operator: bit by bit what they are alone, and where programs get it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from kernels import PATHS, compiled, source_of
from test_feed_forward import count, program
from test_int4 import REFERENCES
from test_kernel import bits, layer
from torch import Tensor, nn

from lightning_accel import QuantConfig, export_model, load, quantize_model
from lightning_accel.capture import capture
from lightning_accel.engines import aoti
from lightning_accel.engines.beside import beside
from lightning_accel.quantize import int4
from lightning_accel.quantize.ops import int8_linear_reference, tile

INT8 = """
#include "{source}"
extern "C" __attribute__((visibility("default"))) void run(const float* x, void** w, void** scale, void** bias,
    const int64_t* n, int64_t count, float* y, int64_t M, int64_t N, int64_t K) {{
  Layer layers[3];
  for (int64_t i = 0; i < count; i++) layers[i] = {{(int8_t*)w[i], (float*)scale[i], (float*)bias[i], n[i]}};
  linears(x, layers, count, y, M, N, K);
}}
"""
INT4 = """
#include "{source}"
#define RUN(name) extern "C" __attribute__((visibility("default"))) void run_##name(const float* x, void** w, \\
    void** scale, void** bias, const int64_t* n, int64_t count, float* y, int64_t M, int64_t N, int64_t K, \\
    int64_t G) {{ \\
  Weights layers[3]; \\
  for (int64_t i = 0; i < count; i++) \\
    layers[i] = {{(uint8_t*)w[i], (uint16_t*)scale[i], (float*)bias[i], n[i], K, G, N}}; \\
  name(x, layers, count, y, M, N, K); \\
}}
RUN(int4_linear)
RUN(int4_int8_linear)
"""
WIDTHS = [(48, 16, 16), (70, 5, 131), (64, 64), (1, 200)]  # of layers, in panels of 64 channels that are full and not


@pytest.fixture(scope="module", params=PATHS)
def libraries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The kernels on one of their paths."""
    directory = tmp_path_factory.mktemp("kernel")
    return {
        name: ctypes.CDLL(str(compiled(code.format(source=source_of(name)), request.param, directory, name)))
        for name, code in (("int8_linear", INT8), ("int4_linear", INT4))
    }


def run(function: Any, x: Tensor, layers: list[tuple], more: tuple[int, ...] = ()) -> Tensor:
    """Outputs side by side; a layer is (weight, scale, bias, channels)."""

    def pointers(i: int) -> Any:
        return (ctypes.c_void_p * len(layers))(*(None if one[i] is None else one[i].data_ptr() for one in layers))

    widths = (ctypes.c_int64 * len(layers))(*(one[3] for one in layers))
    y = torch.full((len(x), sum(one[3] for one in layers)), float("nan"))
    sizes = [ctypes.c_int64(n) for n in (*y.shape, x.shape[1], *more)]
    function(ctypes.c_void_p(x.data_ptr()), *map(pointers, range(3)), widths, ctypes.c_int64(len(layers)),
             ctypes.c_void_p(y.data_ptr()), *sizes)  # fmt: skip
    return y


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_int8_layers_side_by_side_are_bitwise_the_reference(libraries, widths, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 3, 40):
            x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(rows))
            layers = [layer(100, n, seed, bool(seed % 2)) for seed, n in enumerate(widths)]
            y = run(libraries["int8_linear"].run, x, [(tile(w), s, b, len(s)) for w, s, b in layers])
            expected = torch.cat([int8_linear_reference(x, *one) for one in layers], 1)
            assert torch.equal(bits(y), bits(expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", REFERENCES)
def test_int4_layers_side_by_side_are_bitwise_those_alone(libraries, widths, name):
    function = getattr(libraries["int4_linear"], f"run_{name}")
    for rows in (1, 3, 40):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, 128, generator=generator)
        layers = []
        for n in widths:
            weight = torch.randn(n, 128, generator=generator)
            groups = int4.group_scales(weight, 32)
            packed, scales = int4.pack(int4.group_codes(weight, groups), groups)
            layers.append((packed, scales, torch.randn(n, generator=generator), n))
        alone = [run(function, x, [one], (4,)) for one in layers]
        assert torch.equal(run(function, x, layers, (4,)), torch.cat(alone, 1))
        for y, one in zip(alone, layers, strict=True):
            torch.testing.assert_close(y, REFERENCES[name](x, *one[:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "operator"),
    [("int8", "int8_linears"), ("int4-weight", "int4_linears"), ("int4-int8", "int4_int8_linears")],
)
@torch.no_grad()
def test_queries_keys_and_values_and_the_two_halves_of_a_gate_are_one_operator(scheme: str, operator: str) -> None:
    ids = tiny.ids()
    exported, example = program(tiny.llama(), {"input_ids": ids}, scheme)
    single = "int8_linear_tiled" if scheme == "int8" else operator[:-1]
    before, alone = exported.module()(*example), count(exported, single)
    assert beside(exported) == 4, "two in each of two layers"
    exported.graph.lint()
    assert count(exported, operator) == 4
    after = exported.module()(*example)
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours, theirs)
    assert count(exported, single) == alone - 10, "of each layer three and two"


def test_layers_in_groups_of_other_sizes_are_not_joined() -> None:
    ids = {"input_ids": tiny.ids()}
    model, wide = (
        quantize_model(tiny.llama(hidden_size=64, intermediate_size=64), QuantConfig("int4-int8", group_size=size))
        for size in (32, 64)
    )
    for ours, theirs in zip(model.model.layers, wide.model.layers, strict=True):
        ours.self_attn.k_proj, ours.mlp.up_proj = theirs.self_attn.k_proj, theirs.mlp.up_proj
    (captured,) = capture(aoti.lower(model), ids).values()
    exported = captured.export(captured.module)
    alone = count(exported, "int4_int8_linear")
    assert beside(exported) == 2 and count(exported, "int4_int8_linear") == alone - 4, "queries and values"


@pytest.mark.parametrize("written", [False, True])
def test_layers_of_other_inputs_or_of_one_alone_stay(written: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            y = self.first(x)
            return y + self.second(x.mul_(2) if written else 2 * x)

    x = torch.randn(2, 64)
    exported, _ = program(Two().eval(), (x,), "int8")
    assert beside(exported) == 0


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_compiled_decoder_with_joined_layers_generates_what_its_parts_do(tmp_path: Path, family: str) -> None:
    """Qwen's queries, keys and values have biases."""
    model = tiny.llama(attention_bias=family == "qwen")
    export_model(model, tmp_path / "a", data=[{"input_ids": tiny.ids(4, 12)}], quantize=QuantConfig("int8"),
                 engines=("aoti", "portable"), measure=False)  # fmt: skip
    ids = tiny.ids(3, 6)
    ours, theirs = (load(tmp_path / "a", engine=engine).generate(ids, 12, stop=()) for engine in ("aoti", "portable"))
    assert torch.equal(ours, theirs)

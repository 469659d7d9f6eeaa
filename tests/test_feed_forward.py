"""Feed-forward blocks as one operator: the kernel against its parts on each of its paths, and where programs get it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS, compiled, source_of
from test_kernel import bits, layer
from test_quantize import KINDS, kinds_of_rows
from torch import Tensor, nn

from lightning_accel import QuantConfig, quantize_model
from lightning_accel.capture import capture
from lightning_accel.engines import aoti
from lightning_accel.engines.fuse import fuse
from lightning_accel.quantize.fused import ACTIVATIONS
from lightning_accel.quantize.ops import int8_linear_reference, tile
from lightning_accel.quantize.static import affine, affine_codes, int8_static_linear_reference, static_sums

BOUND = 2.0**-21  # of an activation's error, in parts of its input

EXPORT = """
#include "{source}"
#define EXPORT extern "C" __attribute__((visibility("default")))
"""
DYNAMIC = """
EXPORT bool run(const float* x, const int8_t* w, const float* scale, const float* bias, const int8_t* w_2,
    const float* scale_2, const float* bias_2, float* y, int64_t M, int64_t K, int64_t H, int64_t N, int64_t kind) {
  const Layer first{w, scale, bias, H, K}, second{w_2, scale_2, bias_2, N, H};
  return with_activation(kind, [&](auto k) { feed_forward<decltype(k)::value>(x, M, first, {}, second, y); });
}
EXPORT bool gated(const float* x, const int8_t* w, const float* scale, const float* bias, const int8_t* w_up,
    const float* scale_up, const float* bias_up, const int8_t* w_2, const float* scale_2, const float* bias_2, float* y,
    int64_t M, int64_t K, int64_t H, int64_t N, int64_t kind) {
  const Layer first{w, scale, bias, H, K}, up{w_up, scale_up, bias_up, H, K}, second{w_2, scale_2, bias_2, N, H};
  return with_activation(kind, [&](auto k) { feed_forward<decltype(k)::value>(x, M, first, up, second, y); });
}
EXPORT bool activations(const float* x, float* y, int64_t n, int64_t kind) {
  return with_activation(kind, [&](auto k) {
    const Activate<decltype(k)::value> activate;
#ifdef LANES
    for (int64_t i = 0; i < n; i += kLanes)
      store(first(n - i), y + i, activate(load(first(n - i), x + i)));
#else
    for (int64_t i = 0; i < n; i++) y[i] = activate(x[i]);
#endif
  });
}
"""
STATIC = """
EXPORT bool run(const uint8_t* x, const int8_t* w, const int32_t* start, const float* scale, const float* bias,
    const int8_t* w_2, const int32_t* start_2, const float* scale_2, const float* bias_2, float* y, int64_t M,
    int64_t K, int64_t H, int64_t N, int64_t kind, int64_t zero_point, const float* factor) {
  const Weights first{w, start, scale, bias, H, K}, second{w_2, start_2, scale_2, bias_2, N, H};
  return with_activation(kind, [&](auto k) {
    feed_forward<decltype(k)::value>(x, M, first, second, *factor, static_cast<float>(zero_point), y);
  });
}
"""

Layer = tuple[Tensor, Tensor, Tensor | None]


def call(function: Any, *arguments: Any) -> bool:
    """Calls a C function on tensors (or None) and integers."""
    values: list[Any] = []
    for argument in arguments:
        assert not isinstance(argument, Tensor) or argument.is_contiguous()
        pointer = argument.data_ptr() if isinstance(argument, Tensor) else argument
        values.append(ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_void_p(pointer))
    return bool(function(*values) & 1)


class Kernel:
    """The kernels' inner functions, called on tensors."""

    def __init__(self, directory: Path, path: str) -> None:
        self.dynamic, self.static = (
            ctypes.CDLL(str(compiled(EXPORT.format(source=source_of(name)) + entry, path, directory, name)))
            for name, entry in (("int8_feed_forward", DYNAMIC), ("int8_static_feed_forward", STATIC))
        )

    def __call__(self, x: Tensor, first: Layer, second: Layer, activation: str, up: Layer | None = None) -> Tensor:
        y = torch.full((len(x), len(second[1])), float("nan"))
        sizes = (len(x), x.shape[1], len(first[1]), len(second[1]), list(ACTIVATIONS).index(activation))
        function = self.dynamic.run if up is None else self.dynamic.gated
        layers = [argument for one in (first, up, second) if one is not None for argument in (tile(one[0]), *one[1:])]
        assert call(function, x, *layers, y, *sizes)
        return y

    def activations(self, x: Tensor, activation: str) -> Tensor:
        y = torch.empty_like(x)
        assert call(self.dynamic.activations, x, y, x.numel(), list(ACTIVATIONS).index(activation))
        return y


@pytest.fixture(scope="module", params=PATHS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel(tmp_path_factory.mktemp("kernel"), request.param)


def layers(n: int, hidden: int, out: int, seed: int = 0, bias: bool = True, bias_2: bool = True) -> tuple[Layer, Layer]:
    return layer(n, hidden, seed, bias), layer(hidden, out, seed + 1, bias_2)


def assert_bitwise(
    kernel: Kernel, x: Tensor, first: Layer, second: Layer, activation: str, up: Layer | None = None
) -> None:
    """The references with the kernel's own activations between them, which have a test of their own."""
    hidden = kernel.activations(int8_linear_reference(x, *first), activation)
    hidden = hidden if up is None else hidden * int8_linear_reference(x, *up)
    expected = int8_linear_reference(hidden, *second)
    assert torch.equal(bits(kernel(x, first, second, activation, up)), bits(expected))


# --- activations -----------------------------------------------------------------------------------------------------

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * 0.5 * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu6": lambda x: x.clamp(0, 6),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_within_the_bound_of_float64(kernel: Kernel, activation: str) -> None:
    some = torch.cat([torch.linspace(-20, 20, 2_000_001), torch.logspace(-30, 30, 200_000)])
    x = torch.cat([some, -some])
    error = (kernel.activations(x, activation).double() - EXACT[activation](x.double())).abs()
    assert (error <= BOUND * x.double().abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values_are_those_of_the_formulas(kernel: Kernel, activation: str) -> None:
    inf, nan, most = float("inf"), float("nan"), torch.finfo(torch.float32).max
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 100.0, -100.0, most, -most, inf, -inf, nan])
    # torch's own GELU is infinite for the largest float32, and NaN for infinity
    expected = 0.5 * x * (1 + torch.erf(x / math.sqrt(2))) if activation == "gelu" else ACTIVATIONS[activation](x)
    torch.testing.assert_close(kernel.activations(x, activation), expected, rtol=1e-6, atol=0, equal_nan=True)


# --- the kernel ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=75)
@given(
    st.integers(1, 70),
    st.integers(1, 90),
    st.integers(1, 150),
    st.integers(1, 90),
    st.sampled_from(KINDS),
    st.sampled_from(list(ACTIVATIONS)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_outputs_are_those_of_the_layers_bit_by_bit(
    kernel: Kernel,
    rows: int,
    n: int,
    hidden: int,
    out: int,
    kind: str,
    activation: str,
    bias: bool,
    bias_2: bool,
    gated: bool,
    seed: int,
) -> None:
    x, up = kinds_of_rows(rows, n, kind, seed), layer(n, hidden, seed + 2, bias) if gated else None
    assert_bitwise(kernel, x, *layers(n, hidden, out, seed, bias, bias_2), activation, up)


@pytest.mark.parametrize("sizes", [(64, 256, 64), (61, 67, 33), (3, 1, 1), (1, 15, 17), (1, 1, 1)])
def test_every_number_of_rows_and_ragged_sizes(kernel: Kernel, sizes: tuple[int, int, int]) -> None:
    for rows in (*range(1, 18), 31, 32, 33, 63, 64, 65, 70, 127, 129, 300):
        x, both = kinds_of_rows(rows, sizes[0], "outlier", rows), layers(*sizes, rows)
        for up in (None, layer(*sizes[:2], rows + 2, False)):
            assert_bitwise(kernel, x, *both, "gelu", up)


@pytest.mark.parametrize("rows", [1, 4, 20, 37, 130, 400])  # channels shared by the threads, and blocks of rows
def test_the_same_on_any_number_of_threads(kernel: Kernel, rows: int) -> None:
    x, (first, second) = kinds_of_rows(rows, 600, "outlier"), layers(600, 2000, 601)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for up in (None, layer(600, 2000, 2, True)):
                assert_bitwise(kernel, x, first, second, "gelu", up)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_with_a_non_finite_value_is_nan_and_its_neighbours_are_not(
    kernel: Kernel, bad: float, activation: str
) -> None:
    x, (first, second) = torch.randn(40, 21), layers(21, 33, 19)
    x[[3, 35], 20] = bad
    for up in (None, layer(21, 33, 2, True)):
        y = kernel(x, first, second, activation, up)
        assert y[[3, 35]].isnan().all() and y[[*range(3), *range(4, 35), *range(36, 40)]].isfinite().all()


def test_an_activation_past_float32_makes_its_row_nan(kernel: Kernel) -> None:
    x, (first, second) = torch.randn(9, 16), layers(16, 40, 8, bias=False)
    x[2] *= 1e38
    assert not int8_linear_reference(x, *first)[2].isfinite().all()
    y = kernel(x, first, second, "relu")
    assert y[2].isnan().all() and y[[0, 1, *range(3, 9)]].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hardly_a_code_differs_from_torchs_activation(kernel: Kernel, activation: str) -> None:
    """Each flipped code moves an output by one step: the scale of the hidden row times that of the channel."""
    x, (first, second) = torch.randn(64, 128), layers(128, 512, 1)
    second = torch.ones(1, 512, dtype=torch.int8), torch.ones(1), None
    hidden = ACTIVATIONS[activation](int8_linear_reference(x, *first))
    steps = (kernel(x, first, second, activation) - int8_linear_reference(hidden, *second)).abs()
    steps /= hidden.abs().amax(-1, keepdim=True) / 127
    assert steps.sum() <= 64 * 512 * 1e-4 + 1


def test_an_unknown_activation_is_refused(kernel: Kernel) -> None:
    x = torch.zeros(16)
    assert not call(kernel.dynamic.activations, x, x, 16, len(ACTIVATIONS))


# --- static activations ----------------------------------------------------------------------------------------------


def assert_static_bitwise(
    kernel: Kernel, rows: int, sizes: tuple[int, int, int], activation: str, seed: int, hot: float = 1.0
) -> None:
    """As for dynamic activations. `hot` scales what is between the layers, past the range of its codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, sizes[0]), generator=generator, dtype=torch.uint8)
    between, static = affine(-0.3, 5.0), []
    typical = 128.0 * 128.0 * sizes[0] ** 0.5  # of a sum of products of codes
    for n, out, scale, zero_point in ((*sizes[:2], hot / typical, 131), (*sizes[1:], *between)):
        weight = torch.randint(-127, 128, (out, n), generator=generator, dtype=torch.int8)
        scales = torch.rand(out, generator=generator) * scale
        static.append((weight, static_sums(weight, zero_point), scales, torch.randn(out, generator=generator)))
    first, second = static
    hidden = kernel.activations(int8_static_linear_reference(codes, *first), activation)
    expected = int8_static_linear_reference(affine_codes(hidden, *between), *second)
    y, factor = torch.full((rows, sizes[2]), float("nan")), torch.tensor(1.0 / between[0])
    numbers = (rows, *sizes, list(ACTIVATIONS).index(activation), between[1])
    assert call(
        kernel.static.run, codes, tile(first[0]), *first[1:], tile(second[0]), *second[1:], y, *numbers, factor
    )
    assert torch.equal(bits(y), bits(expected))


@settings(deadline=None, max_examples=75)
@given(
    st.integers(1, 70),
    st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 90)),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from([0.1, 1.0, 30.0, float("inf")]),
    st.integers(0, 10**6),
)
def test_static_outputs_are_those_of_the_layers_bit_by_bit(
    kernel: Kernel, rows: int, sizes: tuple[int, int, int], activation: str, hot: float, seed: int
) -> None:
    assert_static_bitwise(kernel, rows, sizes, activation, seed, hot)


@pytest.mark.parametrize("sizes", [(64, 256, 64), (128, 64, 33), (61, 67, 33), (1, 1, 1)])  # in place, and copied
def test_static_with_every_number_of_rows_and_ragged_sizes(kernel: Kernel, sizes: tuple[int, int, int]) -> None:
    for rows in (*range(1, 18), 31, 32, 33, 63, 64, 65, 70, 127, 129, 300):
        assert_static_bitwise(kernel, rows, sizes, "gelu", rows)


@pytest.mark.parametrize("rows", [1, 4, 20, 37, 130, 400])
def test_static_the_same_on_any_number_of_threads(kernel: Kernel, rows: int) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert_static_bitwise(kernel, rows, (640, 2000, 601), "gelu", rows)
    finally:
        torch.set_num_threads(before)


# --- in programs -----------------------------------------------------------------------------------------------------


def program(model: nn.Module, inputs: Any, scheme: str = "int8") -> tuple[torch.export.ExportedProgram, tuple]:
    """What a compiled program is built from."""
    calibration = [inputs] * 8 if scheme == "int8-static" else None
    (captured,) = capture(aoti.lower(quantize_model(model, QuantConfig(scheme), calibration)), inputs).values()
    return captured.export(captured.module), captured.example


def count(program: torch.export.ExportedProgram, name: str) -> int:
    return sum(str(node.target) == f"lightning_accel.{name}.default" for node in program.graph.nodes)


class Turned(nn.Module):
    """[batch, width, length], as a convolution has it, around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x.mean()


def convolutions(between: nn.Module, dims: int = 2, **options: Any) -> nn.Module:
    """Three convolutions, one of them depthwise, with `between` after the first and a ReLU6 after the second."""
    torch.manual_seed(0)
    conv = nn.Conv1d if dims == 1 else nn.Conv2d
    last = nn.ReLU6(inplace=True), conv(8, 4, 1)
    return nn.Sequential(conv(3, 8, 3, **options), between, conv(8, 8, 3, groups=8), *last).eval()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    ("between", "pairs"),
    [
        (nn.Identity(), 2), (nn.ReLU(), 2), (nn.ReLU6(inplace=True), 2), (nn.Hardtanh(-0.1, 0.2), 2), (nn.SiLU(), 1),
        (nn.Hardtanh(0.1, 0.2), 1), (nn.AvgPool1d(1), 1), (Turned(nn.ReLU()), 1),
    ],
)  # fmt: skip
@torch.no_grad()
def test_convolutions_put_out_the_codes_of_the_next_one(between: nn.Module, pairs: int, dims: int) -> None:
    if isinstance(between, nn.AvgPool1d) and dims == 2:
        between = nn.AvgPool2d(1)
    model = convolutions(between, dims)
    x = 2 * torch.randn(2, 3, *(9,) * dims, generator=torch.Generator().manual_seed(0))
    exported, example = program(model, (x,), "int8-static")
    expected = quantize_model(model, QuantConfig("int8-static"), [x] * 8)(x)
    assert fuse(exported) == pairs and count(exported, "int8_static_conv2d_coded") == pairs
    exported.graph.lint()
    (y,) = exported.module()(*example)
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_convolution_whose_output_is_used_twice_puts_out_floats() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.left, self.right = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x))
            return self.left(y) + self.right(y)

    exported, _ = program(Twice().eval(), (torch.randn(2, 3, 5, 5),), "int8-static")
    assert fuse(exported) == 0


def encoder(activation: Any) -> nn.Module:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 48, activation=activation, batch_first=True)
    return nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "bert": (tiny.bert, {"input_ids": tiny.ids(3, 12)}, "gelu"),
    "gpt2": (tiny.gpt2, {"input_ids": tiny.ids(3, 12)}, "gelu_tanh"),  # written out as products and powers
    "vit": (tiny.vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, "gelu"),
    "encoder-relu": (lambda: encoder("relu"), (torch.randn(2, 7, 32),), "relu"),
    "encoder-gelu": (lambda: encoder("gelu"), (torch.randn(2, 7, 32),), "gelu"),
    "encoder-silu": (lambda: encoder(nn.functional.silu), (torch.randn(2, 7, 32),), "silu"),
}


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_layer_of_a_model_has_its_feed_forward_block_fused(name: str, scheme: str) -> None:
    make, inputs, activation = MODELS[name]
    exported, example = program(make(), inputs, scheme)
    kind = scheme.replace("-", "_")
    before, linears = exported.module()(*example), count(exported, f"{kind}_linear_tiled")
    assert fuse(exported) == tiny.LAYERS
    assert count(exported, f"{kind}_feed_forward") == tiny.LAYERS
    assert count(exported, f"{kind}_linear_tiled") == linears - 2 * tiny.LAYERS
    position = -1 if scheme == "int8" else -3
    codes = {node.args[position] for node in exported.graph.nodes if "feed_forward" in str(node.target)}
    assert codes == {list(ACTIVATIONS).index(activation)}
    exported.graph.lint()
    for now, then in zip(exported.module()(*example), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@torch.no_grad()
def test_gated_blocks_are_fused_where_activations_are_dynamic(scheme: str) -> None:
    exported, example = program(tiny.llama(), {"input_ids": tiny.ids(3, 12)}, scheme)
    before = exported.module()(*example)
    found = tiny.LAYERS if scheme == "int8" else 0
    assert fuse(exported) == count(exported, "int8_gated_feed_forward") == found
    exported.graph.lint()
    assert all(torch.equal(now, then) for now, then in zip(exported.module()(*example), before, strict=True))


class Gated(nn.Module):
    """Three layers that are a gated block, or nearly."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = 1 if kind == "a factor of one" else 24
        self.kind, self.gate, self.up, self.down = kind, nn.Linear(8, 24), nn.Linear(8, width), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Any:
        other = x + 1 if self.kind == "another input" else x
        gate, up = nn.functional.silu(self.gate(x)), self.up(other)
        if self.kind == "the other way round":
            return self.down(up * gate)
        if self.kind == "used twice":
            return self.down(gate * up) + up.sum()
        if self.kind == "both activated":
            return self.down(gate * nn.functional.silu(up))
        return self.down(gate * up)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("plain", 1), ("the other way round", 1), ("used twice", 0), ("both activated", 0), ("another input", 0),
     ("a factor of one", 0)],
)  # fmt: skip
@torch.no_grad()
def test_only_blocks_of_three_equal_layers_are_gated(kind: str, found: int) -> None:
    exported, example = program(Gated(kind).eval(), (torch.randn(5, 8),))
    before = exported.module()(*example)
    assert fuse(exported) == found == count(exported, "int8_gated_feed_forward")
    exported.graph.lint()
    assert all(torch.equal(now, then) for now, then in zip(exported.module()(*example), before, strict=True))


class Block(nn.Module):
    """Two layers with something between them that keeps them apart, or does not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.second = kind, nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Any:
        x = 1.5 * x
        h = self.first(x)
        if self.kind == "written over in between":
            x.add_(1)
            return self.second(nn.functional.gelu(h)) + x.sum()
        if self.kind == "activation used twice":
            a = nn.functional.gelu(h)
            return self.second(a), a
        if self.kind == "input of the activation used twice":
            return self.second(nn.functional.gelu(h)) + h[..., :6]
        if self.kind == "scaled":
            return self.second(nn.functional.gelu(h) * 2)
        if self.kind == "another activation":
            return self.second(nn.functional.elu(h))
        if self.kind == "other powers":
            return self.second(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.04 * h**3))))
        if self.kind == "half precision between":
            return self.second(nn.functional.gelu(h.bfloat16()).float())
        if self.kind == "nothing":
            return self.second(h)
        if self.kind == "in place":
            return self.second(nn.functional.relu_(h))
        return self.second(nn.functional.dropout(nn.functional.gelu(h, approximate="tanh"), training=False))


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("activation used twice", 0),
        ("input of the activation used twice", 0),
        ("scaled", 0),
        ("another activation", 0),
        ("other powers", 0),
        ("half precision between", 0),
        ("nothing", 0),
        ("written over in between", 0),
        ("in place", 1),
        ("idle dropout", 1),
    ],
)
@torch.no_grad()
def test_only_blocks_with_nothing_else_between_are_fused(kind: str, found: int, scheme: str) -> None:
    exported, example = program(Block(kind).eval(), (torch.randn(5, 8),), scheme)
    before = exported.module()(*example)
    assert fuse(exported) == found == count(exported, f"{scheme.replace('-', '_')}_feed_forward")
    assert all(torch.equal(now, then) for now, then in zip(exported.module()(*example), before, strict=True))


@torch.no_grad()
def test_of_a_chain_of_layers_each_is_in_one_block_at_most() -> None:
    exported, example = program(tiny.mlp(), (torch.randn(5, 8),))
    before = exported.module()(*example)
    assert fuse(exported) == 1 and count(exported, "int8_linear_tiled") == 1
    assert torch.equal(exported.module()(*example)[0], before[0])

"""int4: codes bit by bit from fake quantization to the kernel, integer sums exact, outputs within a derived bound."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import PATHS, compiled, linear_bound, source_of
from test_quantize import kinds_of_rows
from torch import Tensor, nn

from lightning_accel import QuantConfig, export_model, load, prepare_, quantize_model
from lightning_accel._quiet import Conv1D
from lightning_accel.quantize import convert_, int4, quantization_coverage
from lightning_accel.quantize.converted import quantize_groups
from lightning_accel.quantize.fake import Int4GroupFakeQuantizer
from lightning_accel.quantize.layers import Int4Embedding, Int4Linear, Int8Linear
from lightning_accel.quantize.ops import row_codes, row_scales

SCHEMES = ("int4-weight", "int4-int8")
KINDS = ["normal", "zeros", "tiny", "outlier", "halves"]
REFERENCES = {"int4_linear": int4.int4_linear_reference, "int4_int8_linear": int4.int4_int8_linear_reference}
Kernels = dict[str, Callable[..., Tensor]]

ENTRY = """
#include "{source}"
#define RUN(name) extern "C" __attribute__((visibility("default"))) void run_##name(const float* x, const uint8_t* w, \\
    const uint16_t* s, const float* b, float* y, int64_t M, int64_t N, int64_t K, int64_t G) \\
    {{ const Weights only{{w, s, b, N, K, G, N}}; name(x, &only, 1, y, M, N, K); }}
RUN(int4_linear)
RUN(int4_int8_linear)
"""


@pytest.fixture(scope="module", params=PATHS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels' inner functions in a small shared library, called on tensors."""
    library = compiled(ENTRY.format(source=source_of("int4_linear")), request.param, tmp_path_factory.mktemp("kernel"))
    opened = ctypes.CDLL(str(library))

    def bound(name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            y = torch.full((len(x), len(bias)), float("nan"))
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, packed, scale, bias, y)]
            sizes = [ctypes.c_int64(n) for n in (len(x), len(bias), x.shape[1], scale.shape[1])]
            getattr(opened, f"run_{name}")(*pointers, *sizes)
            return y

        return run

    return {name: bound(name) for name in REFERENCES}


def numpy_groups(weight: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, in NumPy, written from the formula."""
    w = weight.numpy().reshape(len(weight), -1, group)
    largest = np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)
    scale = (largest / np.float32(-8)).astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return np.clip(np.rint(w * inverse), -8, 7), scale


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :5] = torch.tensor([8.0, -8.0, 3.5, -0.5, 1.0])
    weight[1, :3] = torch.tensor([-4.0, 4.0, 1.25])
    scales = int4.group_scales(weight, 32)
    assert scales.flatten().tolist() == [-1.0, 0.5], "the element of largest magnitude is code -8"
    codes = int4.group_codes(weight, scales)
    assert codes[0, 0, :5].tolist() == [-8, 7, -4, 0, -1], "half goes to even, and +8 has no code"
    assert codes[1, 0, :3].tolist() == [-8, 7, 2]


cases = {
    "rows": st.integers(1, 40),
    "groups": st.integers(1, 4),
    "group": st.sampled_from([32, 64, 128]),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 1000),
}


@settings(deadline=None, max_examples=100)
@given(**cases)
def test_packing_keeps_every_code_and_scale(rows: int, groups: int, group: int, kind: str, seed: int) -> None:
    weight = kinds_of_rows(rows, groups * group, kind, seed)
    expected = numpy_groups(weight, group)
    packed, scale = quantize_groups(weight, group)
    assert packed.shape == (-(-rows // 16), groups * group // 8, 16, 4) and packed.dtype == torch.int8
    codes, scales = int4.unpack(packed, scale, rows)
    assert np.array_equal(codes.numpy(), expected[0]) and np.array_equal(scales.numpy(), expected[1])
    ids = torch.arange(rows)
    assert torch.equal(int4.int4_embedding_reference(ids, packed, scale), (codes * scales).flatten(1))
    assert torch.equal(Int4GroupFakeQuantizer(group)(weight), (codes * scales).flatten(1))


def test_a_thousand_layers_have_the_same_codes_fake_quantized_converted_and_packed() -> None:
    for seed in range(1000):
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Linear(64, 1 + seed % 20))
        fake = nn.Sequential(nn.Linear(64, 1 + seed % 20))
        fake.load_state_dict(layer.state_dict())
        prepare_(fake, QuantConfig(SCHEMES[seed % 2], group_size=(32, 64)[seed // 2 % 2]))
        rounded = fake[0].weight_fake_quantizer(fake[0].weight)
        converted = convert_(fake)[0]
        codes, scales = int4.unpack(converted.codes, converted.scale, converted.out_features)
        assert torch.equal((codes * scales).flatten(1), rounded), seed


@settings(deadline=None, max_examples=60)
@given(**cases, weights=st.sampled_from(KINDS), count=st.integers(1, 40))
def test_kernels_are_the_references_within_the_bound_of_float_sums(
    kernels: Kernels, rows: int, groups: int, group: int, kind: str, weights: str, seed: int, count: int
) -> None:
    n = groups * group
    weight = kinds_of_rows(rows, n, weights, seed)
    packed, scale = quantize_groups(weight, group)
    x, bias = kinds_of_rows(count, n, kind, seed + 1), torch.randn(rows)
    codes, scales = int4.unpack(packed, scale, rows)
    for name, reference in REFERENCES.items():
        difference = (kernels[name](x, packed, scale, bias) - reference(x, packed, scale, bias)).abs().double()
        rounded = x if name == "int4_linear" else row_codes(x, row_scales(x)) * row_scales(x)
        assert (difference <= linear_bound(rounded, (codes * scales).flatten(1), bias)).all(), name


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([32, 64, 128]), st.integers(1, 40), st.integers(0, 1000))
def test_integer_sums_are_exact(kernels: Kernels, rows: int, groups: int, group: int, count: int, seed: int) -> None:
    """Scales of 1 and codes as inputs: every sum is an integer below 2^24."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-8, 8, (rows, groups, group), generator=generator).float()
    weight[..., 0] = -8
    packed, scale = int4.pack(weight, torch.ones(rows, groups, 1))
    x = torch.randint(-127, 128, (count, groups * group), generator=generator).float()
    x[:, 0] = 127
    expected = x @ weight.flatten(1).T
    assert torch.equal(kernels["int4_int8_linear"](x, packed, scale, torch.zeros(rows)), expected)
    assert torch.equal(kernels["int4_linear"](x, packed, scale, torch.zeros(rows)), expected)


@pytest.mark.parametrize("code", [-8, 7])
@pytest.mark.parametrize("group", [32, 128])
def test_extreme_codes_over_many_inputs_sum_exactly(kernels: Kernels, code: int, group: int) -> None:
    n, rows = 65_536, 17
    packed, scale = int4.pack(torch.full((rows, n // group, group), float(code)), torch.ones(rows, n // group, 1))
    for value in (127.0, -127.0):
        x, zeros = torch.full((6, n), value), torch.zeros(rows)
        expected = torch.full((6, rows), code * value * n)
        assert torch.equal(kernels["int4_int8_linear"](x, packed, scale, zeros), expected)
        assert torch.equal(kernels["int4_linear"](x / 127, packed, scale, zeros), expected / 127)


def test_large_enough_to_run_in_parallel_and_the_same_on_one_thread(kernels: Kernels) -> None:
    packed, scale = quantize_groups(torch.randn(1000, 256), 32)
    x, bias, before = torch.randn(37, 256), torch.randn(1000), torch.get_num_threads()
    for name in REFERENCES:
        answers = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                answers.append(kernels[name](x, packed, scale, bias))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_non_finite_value_is_nan_and_no_other(kernels: Kernels, bad: float) -> None:
    packed, scale = quantize_groups(torch.randn(20, 64), 32)
    x = torch.randn(6, 64)
    x[3, 33] = bad
    for y in (kernels["int4_int8_linear"](x, packed, scale, torch.zeros(20)),
              int4.int4_int8_linear_reference(x, packed, scale, torch.zeros(20))):  # fmt: skip
        assert y[3].isnan().all() and y[[0, 1, 2, 4, 5]].isfinite().all()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantized_and_converted_layers_agree_to_float_rounding(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))
    config = QuantConfig(scheme, overrides={"2": "int8"})
    x = torch.randn(16, 64)
    prepare_(model, config)
    converted = quantize_model(model, config)
    assert [type(m) for m in (converted[0], converted[2])] == [Int4Linear, Int8Linear]
    assert torch.allclose(converted[0](x), model[0](x), atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv1d_is_a_linear_layer_with_its_weight_transposed(scheme: str) -> None:
    torch.manual_seed(0)
    conv, linear = Conv1D(24, 64), nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias.normal_())
    x = torch.randn(5, 64)
    pair = nn.Sequential(conv, nn.Identity()), nn.Sequential(linear, nn.Identity())
    assert torch.equal(*(quantize_model(m, QuantConfig(scheme))(x) for m in pair))
    for model in pair:
        prepare_(model, QuantConfig(scheme))
    assert torch.allclose(*(model(x) for model in pair), atol=1e-6)


def test_a_tied_head_shares_one_packed_tensor_and_half_a_byte_a_weight() -> None:
    model = tiny.llama(intermediate_size=64)
    converted = quantize_model(model, QuantConfig("int4-int8"))
    embedding, head = converted.get_input_embeddings(), converted.get_output_embeddings()
    assert isinstance(embedding, Int4Embedding) and isinstance(head, Int4Linear)
    assert embedding.codes is head.codes and embedding.scale is head.scale
    assert head.codes.nbytes == -(-tiny.VOCABULARY // 16) * 16 * tiny.WIDTH // 2
    coverage = quantization_coverage(converted)
    assert coverage.technique == "int4-int8 quantization" and coverage.share_of_parameters > 0.99
    assert sum(e.parameters for e in coverage.entries) == sum(p.numel() for p in model.parameters())


def test_a_tied_head_in_another_format_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match=r"'model.embed_tokens' and 'lm_head' share their weight and would have it in"):
        prepare_(tiny.llama(intermediate_size=64), QuantConfig("int4-int8", overrides={"lm_head": "int8"}))
    both = {"lm_head": "int8", "model.embed_tokens": "int8"}
    prepare_(tiny.llama(intermediate_size=64), QuantConfig("int4-int8", overrides=both))


def test_inputs_that_no_group_divides_fall_back_to_int8_by_name() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4))
    with pytest.warns(UserWarning, match=r"1: int8 in place of int4-weight: groups of 32 do not divide its 48 inputs"):
        coverage = prepare_(model, QuantConfig("int4-weight"))
    assert [entry.done for entry in coverage.entries] == ["int4-weight", "int8"]
    assert "divisors: [2, 3, 4, 6, 8, 12, 16, 24, 48]" in str(coverage)


@pytest.mark.parametrize("group", [0, 16, 48, 256])
def test_a_group_size_without_a_kernel_is_refused(group: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size={group} has no kernel; write one of \(32, 64, 128\)"):
        QuantConfig("int4-int8", group_size=group)


def test_weights_too_large_for_a_float16_scale_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(32, 4), nn.Identity())
    with torch.no_grad():
        model[0].weight[1, 2] = 1e7
    with pytest.raises(ValueError, match=r"0\.weight holds values past 5e5"):
        quantize_model(model, QuantConfig("int4-weight"))


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.randn(3, 64, requires_grad=True)
    Int4GroupFakeQuantizer(32)(weight).backward(gradient := torch.randn(3, 64))
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_portable_program_computes_what_was_prepared(tmp_path: Path, scheme: str) -> None:
    model = tiny.llama(intermediate_size=64)
    prepare_(model, QuantConfig(scheme))
    data: list[Any] = [{"input_ids": tiny.ids(4, 12)}]
    report = export_model(model, tmp_path / "a", data=data, engines=("portable",), measure=False)
    assert torch.allclose(load(tmp_path / "a")(**data[0]), model(**data[0]).logits, atol=1e-4)
    assert report.manifest["coverage"][0]["technique"] == f"{scheme} quantization"


def test_pruned_zeros_survive() -> None:
    weight = torch.randn(8, 128)
    weight[torch.rand(8, 128) < 0.5] = 0.0
    weight[3, 32:64] = 0.0
    codes, scales = int4.unpack(*quantize_groups(weight, 32), 8)
    assert ((codes * scales).flatten(1)[weight == 0] == 0).all()


# --- with others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_t5_casts_no_activations_to_the_dtype_of_packed_weights(scheme: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": tiny.ids(2, 8) % 50, "decoder_input_ids": tiny.ids(2, 5) % 50}
    with pytest.warns(UserWarning, match="relative_attention_bias: int8 in place of"):
        converted = quantize_model(model, QuantConfig(scheme))
        prepare_(model, QuantConfig(scheme))
    assert torch.allclose(converted(**inputs).logits, model(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", ["int8", *SCHEMES])
def test_models_of_any_float_format_are_quantized(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).to(dtype)
    assert quantize_model(model, QuantConfig(scheme))(torch.randn(3, 32, dtype=dtype)).dtype == dtype
    assert quantize_model(tiny.bert().to(dtype), QuantConfig(scheme))(tiny.ids()).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*groups of 32 do not divide")
@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_neurons_are_cut_before_groups_are_formed(tmp_path: Path, amount: float) -> None:
    from lightning_accel import PruneConfig, prune_model_, shrink_model

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(64, 32)
    masks = prune_model_(model, PruneConfig("neurons", amount), example_inputs=(x,))
    options: dict[str, Any] = {"example_inputs": (x,), "engines": ("portable",), "measure": False, "data": [x]}
    export_model(model, tmp_path / "a", masks=masks, quantize=QuantConfig("int4-int8"), **options)
    shrunk = quantize_model(shrink_model(model, masks, example_inputs=(x,)), QuantConfig("int4-int8"))
    assert torch.allclose(load(tmp_path / "a")(x), shrunk(x), atol=1e-6), "quantize of the shrunk model"
    prepare_(model, QuantConfig("int4-int8"))
    with pytest.raises(ValueError, match=r"2 was trained in int4 with 64 inputs, of which pruning leaves \d+: others"):
        export_model(model, tmp_path / "b", masks=masks, **options)


def test_the_coverage_of_an_artifact_says_which_modules_fell_back(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4)), torch.randn(4, 64)
    with pytest.warns(UserWarning, match="groups of 32 do not divide"):
        report = export_model(
            model, tmp_path / "a", example_inputs=(x,), quantize=QuantConfig("int4-int8"), engines=("portable",),
            measure=False,
        )  # fmt: skip
    entries = {e["name"]: (e["done"], e["reason"]) for e in report.manifest["coverage"][0]["entries"]}
    assert entries["0"] == ("int4-int8", None)
    assert entries["1"][0] == "int8" and "groups of 32 do not divide its 48 inputs" in entries["1"][1]


def test_a_scheme_by_the_start_of_its_name_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'int4'; write QuantConfig\('int4-weight'\)"):
        QuantConfig("int4")
    with pytest.raises(ValueError, match="the scheme None names none"):
        QuantConfig(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"overrides=\['0'\] is no mapping"):
        QuantConfig(overrides=["0"])  # type: ignore[arg-type]


def test_a_wrong_cut_is_not_hidden_by_quantizing_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_accel import PruneConfig, finalize, prune_model_

    model, x, shrink = tiny.mlp(), torch.randn(8, 8), finalize.shrink_model
    masks = prune_model_(model, PruneConfig("neurons", 0.5), example_inputs=(x,))

    def wrong(*args: Any, **kwargs: Any) -> nn.Module:
        small = shrink(*args, **kwargs)
        with torch.no_grad():
            small[2].weight.neg_()
        return small

    monkeypatch.setattr(finalize, "shrink_model", wrong)
    with pytest.raises(ValueError, match="cutting pruned neurons out changes what the model computes"):
        export_model(model, tmp_path / "a", example_inputs=(x,), masks=masks, quantize=QuantConfig("int8"),
                     engines=("portable",), measure=False)  # fmt: skip


def test_weights_below_float16_are_refused_and_small_ones_keep_their_codes() -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(8e-6 / model[0].weight.abs().max())
    x = torch.randn(4, 64)
    exact, found = model(x), quantize_model(model, QuantConfig("int4-weight"))(x)
    assert (found - exact).norm() < 0.15 * exact.norm()
    with torch.no_grad():
        model[0].weight.mul_(0.1)
    with pytest.raises(ValueError, match=r"0.weight holds values up to 8e-07, too small.*overrides=\{'0': 'int8'\}"):
        quantize_model(model, QuantConfig("int4-weight"))
    with torch.no_grad():
        model[0].weight.zero_()
    assert not quantize_model(model, QuantConfig("int4-weight"))(x).any()

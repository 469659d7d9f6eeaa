"""int8-static: ranges of activations, found by calibration or followed in training, and what they round to."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_accel import QuantConfig, prepare_, quantize_model, sensitivity
from lightning_accel.quantize import (
    Int8StaticLinear,
    calibrate_,
    convert_,
    freeze_,
    quantization_coverage,
    unprepare_,
)
from lightning_accel.quantize.observers import Sample, batch_range, find_range
from lightning_accel.quantize.ops import row_codes, row_scales
from lightning_accel.quantize.ranges import AffineFakeQuantizer, affine_quantizers
from lightning_accel.quantize.static import affine, affine_codes

STATIC = QuantConfig("int8-static")


def batches(count: int = 8, features: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, features, generator=generator) for _ in range(count)]


def prepared(model: nn.Module, config: QuantConfig = STATIC, data: list[Tensor] | None = None) -> nn.Module:
    prepare_(model, config)
    return calibrate_(model, data or batches())


def square_error(x: Tensor, range_: Tensor) -> float:
    scale, zero_point = affine(*range_.tolist())
    return float(((affine_codes(x, scale, zero_point).float() - zero_point) * scale - x).square().mean())


# --- observers --------------------------------------------------------------------------------------------------------


def test_minmax_takes_all_values_and_percentile_all_but_the_outliers() -> None:
    x = torch.cat([torch.linspace(-1, 3, 9_999), torch.tensor([1000.0])])
    ends = torch.stack(x.aminmax())
    assert find_range(x, ends, "minmax").tolist() == [-1, 1000]
    low, high = find_range(x, ends, "percentile").tolist()
    assert -1 <= low < -0.99 and 2.99 < high <= 3


@pytest.mark.parametrize("seed", range(5))
def test_mse_errs_less_than_minmax_and_no_candidate_less_than_it(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(100_000)
    ends = torch.stack(x.aminmax())
    chosen = find_range(x, ends, "mse")
    assert square_error(x, chosen) < 0.95 * square_error(x, ends)
    others = [square_error(x, ends * factor) for factor in torch.linspace(1 / 40, 1, 40)]
    assert square_error(x, chosen) == pytest.approx(min(others), rel=1e-5)


def test_calibration_looks_at_every_batch_and_a_sample_thins_to_a_bound() -> None:
    sample = Sample("layer")
    for index in range(200):
        sample.add(torch.full((100, 300), float(index)))
    assert sample.ends.tolist() == [0, 199] and sum(map(len, sample.parts)) <= 2**20
    assert sample.find_range("minmax").tolist() == [0, 199]
    counts = torch.cat(sample.parts).long().bincount()
    assert len(counts) == 200 and counts.max() - counts.min() <= 1, "as many of each batch"


def test_a_sample_of_small_batches_is_evenly_spaced_too() -> None:
    sample, shown = Sample("layer"), torch.arange(2**21 + 700.0)
    for some in shown.split(1999):
        sample.add(some)
    kept = torch.cat(sample.parts)
    assert len(kept) == len(shown[::4]) <= 2**20 and len(kept.unique()) == len(kept)
    counts = (kept // 1999).long().bincount()[:-1]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("features", [256, 768, 1000])
def test_no_feature_is_left_out_of_a_sample(features: int) -> None:
    x = torch.arange(float(features)).repeat(512, 1)
    sample = Sample("layer")
    for _ in range(100):
        sample.add(x)
    counts = torch.cat(sample.parts).long().bincount(minlength=features)
    assert sample._stride > 1 and counts.min() > 0.8 * counts.float().mean()
    for column in range(8):  # training sees one batch at a time
        outlier = torch.where(x == column, 99.0, 0.0)
        assert batch_range(outlier, "percentile")[1] == 99


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_zero_is_a_code_of_every_range(one: float, other: float) -> None:
    scale, zero_point = affine(min(one, other), max(one, other))
    assert 0 <= zero_point <= 255 and affine_codes(torch.zeros(1), scale, zero_point).item() == zero_point


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibrated_ranges_are_those_of_activations_between_rounded_weights() -> None:
    model, data = prepared(tiny.mlp(), data=batches()), batches()
    rounded = copy.deepcopy(model[:2])
    rounded[0].activation_fake_quantizer.enabled = False
    inner = [rounded(x).detach() for x in data]
    expected = [[float(min(x.min() for x in xs)), float(max(x.max() for x in xs))] for xs in (data, inner)]
    found = [model[i].activation_fake_quantizer.range.tolist() for i in (0, 2)]
    assert found == expected


def test_batches_are_tensors_tuples_or_mappings_with_labels() -> None:
    expected = quantize_model(tiny.mlp(), STATIC, batches()).state_dict()
    found = quantize_model(tiny.mlp(), STATIC, [(x, torch.zeros(16)) for x in batches()]).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ids = [{"input_ids": tiny.ids(4, 12, seed=s), "labels": torch.zeros(4).long()} for s in range(8)]
    model = quantize_model(tiny.bert(), STATIC, ids)
    assert isinstance(model.classifier, Int8StaticLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_calibration_data_of_other_dtypes_are_brought_into_the_models(dtype: torch.dtype) -> None:
    model, data = tiny.mlp().to(dtype), [x.to(dtype) for x in batches()]
    found = quantize_model(model, STATIC, data).state_dict()
    expected = quantize_model(model.float(), STATIC, [x.float() for x in data]).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_batches_without_rows_say_nothing_and_those_without_tensors_are_named() -> None:
    none = torch.zeros(0, 8)
    expected = quantize_model(tiny.mlp(), STATIC, batches()).state_dict()
    model = quantize_model(tiny.mlp(), STATIC, [none, *batches()])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match=r"no batch of the calibration data reaches '0'"):
        quantize_model(tiny.mlp(), STATIC, [none] * 8)
    with pytest.raises(ValueError, match=r"is a ndarray without tensors; write torch.as_tensor"):
        quantize_model(tiny.mlp(), STATIC, [x.numpy() for x in batches()])
    trained = tiny.mlp().train()
    prepare_(trained, STATIC)
    trained(none).sum().backward()
    assert not trained[0].activation_fake_quantizer.found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_named_by_batch_and_module(bad: float) -> None:
    data = batches()
    data[3][2, 1] = bad
    with pytest.raises(ValueError, match=r"batch 3 of the calibration data brings NaN or infinite values to '0'"):
        quantize_model(tiny.mlp(), STATIC, data)


def test_missing_empty_and_too_little_calibration() -> None:
    with pytest.raises(ValueError, match=r"int8-static finds its ranges in data; write calibration=loader"):
        quantize_model(tiny.mlp(), STATIC)
    with pytest.raises(ValueError, match="the calibration data is empty"):
        quantize_model(tiny.mlp(), STATIC, [])
    with pytest.warns(UserWarning, match="ranges from 3 batches of calibration data"):
        quantize_model(tiny.mlp(), STATIC, batches(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(tiny.mlp(), STATIC, batches(8))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_state_dict_brings_the_scale_of_the_input_along() -> None:
    wide = [5 * x + 1 for x in batches(seed=1)]
    model, other = (quantize_model(tiny.mlp(), STATIC, data) for data in (batches(), wide))
    x = batches(1, seed=2)[0]
    assert not torch.equal(model(x), other(x))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x)) and repr(model) == repr(other)
    state = other.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\._extra_state"):
        model.load_state_dict({name: tensor for name, tensor in state.items() if "extra" not in name})


def test_a_module_that_no_batch_reaches_is_named() -> None:
    with pytest.raises(ValueError, match=r"no batch of the calibration data reaches 'idle'; write overrides="):
        quantize_model(Unused(), STATIC, batches())
    model = prepared(Unused(), QuantConfig("int8-static", overrides={"idle": None}))
    assert list(affine_quantizers(model)) == ["used.activation_fake_quantizer"]
    trained = Unused().train()
    prepare_(trained, STATIC)
    trained(batches()[0])
    with pytest.raises(ValueError, match=r"idle has no range of activations"):
        convert_(trained)


def test_evaluating_without_ranges_raises_and_calibration_leaves_modes_alone() -> None:
    model = tiny.mlp()
    prepare_(model, STATIC)
    with pytest.raises(ValueError, match=r"yet for '0': train a step, .*or write calibrate_.*overrides=\{'0': 'int8'"):
        model(batches()[0])
    model[2].train()
    modes = [m.training for m in model.modules()]
    calibrate_(model, batches())
    assert [m.training for m in model.modules()] == modes and any(modes) and not all(modes)
    assert all(q.sample is None for q in affine_quantizers(model).values())


@pytest.mark.parametrize("bad", ["nan", "shape", "module"])
def test_calibration_that_fails_leaves_the_model_as_it_was(bad: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), tiny.mlp(), nn.Dropout())
    prepare_(model.eval(), STATIC)
    model[4].train()
    modes = [m.training for m in model.modules()]
    first = {"nan": torch.full((4, 2, 4), torch.nan), "shape": torch.zeros(4, 5, 4), "module": torch.zeros(4, 2, 3)}
    with pytest.raises((ValueError, RuntimeError)):
        calibrate_(model, [first[bad]])
    assert [m.training for m in model.modules()] == modes
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    assert not any(getattr(m, kind) for m in model.modules() for kind in hooks)
    assert not torch.overrides._get_current_function_mode()


def test_infinite_activations_saturate_and_nan_is_zero_evaluated_and_converted() -> None:
    fake = prepared(nn.Sequential(nn.Linear(8, 4)).eval())
    model = convert_(copy.deepcopy(fake))
    x = batches(1, seed=9)[0][:3]
    low, high = min(b.min() for b in batches()), max(b.max() for b in batches())
    strange, plain = x.clone(), x.clone()
    strange[0, 1], strange[1, 2], strange[2, 3] = torch.inf, -torch.inf, torch.nan
    plain[0, 1], plain[1, 2], plain[2, 3] = high, low, 0.0
    assert torch.equal(model(strange), model(plain)) and torch.equal(fake(strange), fake(plain))
    freeze_(fake)
    assert fake.train()(strange).isnan().any(1).tolist() == [False, False, True], "the loss shows that it diverged"


@pytest.mark.parametrize("frozen", [False, True])
def test_training_rounds_nothing_before_there_is_a_range(frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 4)).train()
    prepare_(model, STATIC)
    if frozen:
        freeze_(model)
    x = batches(1, seed=9)[0][:3]
    strange = x.clone()
    strange[0, 1] = torch.inf
    quantizer = model[0].activation_fake_quantizer
    assert torch.equal(quantizer(strange), strange) and not quantizer.found
    assert not torch.equal(quantizer(x), x) and quantizer.range.tolist() == [x.min(), x.max()]
    quantizer(2 * x)
    assert (quantizer.range.tolist() == [x.min(), x.max()]) == frozen


# --- fake-quantized, converted ----------------------------------------------------------------------------------------


def test_a_thousand_seeds_have_the_same_codes_fake_quantized_and_converted() -> None:
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, 7, generator=generator) * 10 ** float(torch.randint(-3, 4, (1,), generator=generator))
        quantizer = AffineFakeQuantizer("minmax").eval()
        quantizer.range.copy_(torch.stack(x.aminmax()) * torch.rand(2, generator=generator))
        scale, zero_point = affine(*quantizer.range.tolist())
        codes = affine_codes(x, scale, zero_point)
        assert torch.equal(quantizer(x), (codes.float() - zero_point) * torch.tensor(scale)), seed


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from(["normal", "zeros", "positive", "negative", "outlier"]),
    st.booleans(),
)
def test_fake_quantized_and_converted_layers_agree_to_float_rounding(
    rows: int, n: int, out: int, kind: str, bias: bool
) -> None:
    torch.manual_seed(n)
    x = torch.randn(rows, n)
    x = {"zeros": 0 * x, "positive": x.abs(), "negative": -x.abs(), "outlier": x * torch.eye(rows, n) * 1e4 + x}.get(
        kind, x
    )
    model = prepared(nn.Sequential(nn.Linear(n, out, bias=bias)), data=[x] * 8)
    fake, converted = model(x), convert_(copy.deepcopy(model))
    scale, weight = converted[0].input_scale, model[0].weight
    assert torch.equal(converted[0].codes.float(), row_codes(weight, row_scales(weight)))
    terms = n * 255 * 127 * scale * row_scales(weight).double().T
    assert ((fake.double() - converted(x).double()).abs() <= (n + 4) * 2.0**-24 * (terms + 1)).all()


def test_gradients_pass_inside_of_the_range_only() -> None:
    quantizer = AffineFakeQuantizer("minmax")
    quantizer.range.copy_(torch.tensor([-1.0, 1.0]))
    quantizer.frozen = True
    x = torch.tensor([-2.0, -0.9, 0.0, 0.9, 2.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_training_moves_ranges_until_they_are_frozen_and_evaluation_never() -> None:
    model = tiny.mlp().train()
    prepare_(model, STATIC)
    quantizer, data = model[0].activation_fake_quantizer, batches()
    model(data[0])
    assert quantizer.range.tolist() == torch.stack(data[0].aminmax()).tolist()
    model(data[1])
    expected = 0.95 * batch_range(data[0], "minmax") + 0.05 * batch_range(data[1], "minmax")
    torch.testing.assert_close(quantizer.range, expected)
    model.eval()(data[2])
    freeze_(model)
    model.train()(data[3])
    torch.testing.assert_close(quantizer.range, expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = tiny.mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.reentrant is None else checkpoint(self.net, x, use_reentrant=self.reentrant)


def steps(model: nn.Module, data: list[Any]) -> tuple[list[list[float]], list[Tensor]]:
    """Ranges, and gradients of all batches added up, of a prepared model in training."""
    prepare_(model.train(), STATIC)
    for batch in data:
        model(batch)[0].square().sum().backward()
    ranges = [q.range.tolist() for q in affine_quantizers(model).values()]
    return ranges, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_moves_ranges_once_and_changes_no_gradient(reentrant: bool) -> None:
    data = [x.requires_grad_() for x in batches(4)]
    expected, found = steps(Checkpointed(None), data), steps(Checkpointed(reentrant), data)
    assert found[0] == expected[0] and len(found[1]) == 6
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers_moves_ranges_once(reentrant: bool) -> None:
    data = [tiny.ids(4, 12, seed=s) for s in range(3)]
    plain, checkpointed = tiny.bert(), tiny.bert()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = steps(without_dropout(plain), data), steps(without_dropout(checkpointed), data)
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_a_batch_that_is_not_finite_moves_no_range() -> None:
    quantizer = AffineFakeQuantizer("minmax")
    quantizer(torch.tensor([-1.0, 2.0]))
    assert quantizer(torch.tensor([torch.nan, 5.0]))[0].isnan()
    assert quantizer.range.tolist() == [-1, 2]


def test_ranges_are_in_no_state_dict_and_unprepare_takes_them_out() -> None:
    model = tiny.mlp()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    prepared(model)
    assert list(model.state_dict()) == keys
    unprepare_(model)
    assert [type(m) for m in model.modules()] == types and not affine_quantizers(model)


# --- with the others --------------------------------------------------------------------------------------------------


def test_embeddings_and_tied_heads_share_int8_codes() -> None:
    ids = [{"input_ids": tiny.ids(4, 12, seed=s)} for s in range(8)]
    model = quantize_model(tiny.gpt2(), STATIC, ids)
    assert model.lm_head.codes is model.transformer.wte.codes
    schemes = {e.name: e.done for e in quantization_coverage(model, {"lm_head": 1}).entries}
    assert schemes["transformer.wte"] == "int8" and schemes["lm_head"] == "int8-static"


def test_overrides_mix_it_with_the_other_schemes() -> None:
    config = QuantConfig("int8", overrides={"2": "int8-static", "4": None})
    model = quantize_model(tiny.mlp(), config, batches())
    assert [type(model[i]).__name__ for i in (0, 2, 4)] == ["Int8Linear", "Int8StaticLinear", "Linear"]


def test_sensitivity_measures_it_as_quantizing_that_module_alone_does() -> None:
    torch.manual_seed(0)
    data = [(x, torch.randint(0, 3, (16,))) for x in batches()]
    found = sensitivity(tiny.mlp(), data, schemes=("int8-static", "int4-int8"), observer="percentile")
    assert {name: sorted(row) for name, row in found.increase.items()} == {n: ["int8-static"] for n in ("0", "2", "4")}
    config = QuantConfig("int8-static", observer="percentile")
    model = prepared(tiny.mlp(), config)
    unprepare_(model[:4])
    losses = [nn.functional.cross_entropy(model(x), y).item() for x, y in data]
    assert found.increase["4"]["int8-static"] == pytest.approx(sum(losses) / 8 - found.loss, abs=1e-6)
    assert found.size["0"] == {"float": 4 * 24 * 8, "int8-static": 24 * (8 + 8)}


def test_more_inputs_than_int32_holds_stay_in_float_by_name() -> None:
    model = nn.Sequential(nn.Linear(70_000, 2), nn.Linear(2, 2))
    reasons = {e.name: e.reason for e in prepare_(model, STATIC).entries}
    assert "could overflow int32" in reasons["0"] and reasons["1"] is None


def test_an_unknown_observer_is_refused_when_the_config_is_built() -> None:
    with pytest.raises(ValueError, match=r"observer='max' is unknown; write one of \('minmax', 'percentile', 'mse'\)"):
        QuantConfig("int8-static", observer="max")

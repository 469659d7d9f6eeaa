"""What counts as drift, on made-up outputs: each rule alone, at its edge."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_accel import DriftError
from lightning_accel.verify import ERROR_FRACTION, KL_FRACTION, NOISE, ROUNDING, Verification, verify, with_noise

POSITIONS, CLASSES = 400, 20


def noise(seed: int, size: float = 1.0, shape: tuple[int, ...] = (POSITIONS, CLASSES)) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TRAINED = noise(0, 3.0)
PLAIN = TRAINED + noise(1, 0.1)  # quantization's own error


def compare(ours: Any, trained: Any = TRAINED, plain: Any | None = PLAIN) -> Verification:
    """Verifies a program that puts out `ours`, on one batch."""
    return verify([None], lambda _: ours, lambda _: trained, None if plain is None else lambda _: plain, "aoti")


# --- logits of a quantized model --------------------------------------------------------------------------------------


def test_the_figures_are_those_by_hand() -> None:
    ours = TRAINED + noise(2, 0.01)
    result = compare(ours)
    p, q = TRAINED.softmax(-1), ours.softmax(-1)
    assert result.positions == POSITIONS
    assert result.kl_trained == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert result.error_trained == pytest.approx(((ours - TRAINED).norm() / TRAINED.norm()).item(), rel=1e-4)
    assert result.error_plain == pytest.approx(((ours - PLAIN).norm() / PLAIN.norm()).item(), rel=1e-4)
    assert result.agreement_over_margin == 1.0 and 0.9 < result.agreement <= 1.0
    half = POSITIONS // 2
    errors = [(ours - other)[:half].abs().max().item() for other in (TRAINED, PLAIN)]
    assert result.margin == pytest.approx(2 * max(errors[0], KL_FRACTION**0.5 * errors[1]), rel=1e-6)
    assert set(result.as_dict()) == {*Verification.__dataclass_fields__, "kl_fraction_allowed"}


def test_the_same_outputs_pass_even_where_quantization_cost_nothing() -> None:
    assert compare(TRAINED, TRAINED, TRAINED).kl_trained == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("share", "drifts"), [(0.2, False), (0.5, True)])
def test_kl_above_a_tenth_of_quantizations_own_is_drift(share: float, drifts: bool) -> None:
    ours = TRAINED + noise(2, 0.1 * share)  # KL grows with the square: 0.04 and 0.25 of it, to a first order
    if drifts:
        with pytest.raises(DriftError, match=r"KL\(trained \|\| artifact\) is .* nats, more than 0.1 of KL\(float"):
            compare(ours)
    else:
        result = compare(ours)
        assert result.kl_trained < KL_FRACTION * result.kl_plain


@pytest.mark.parametrize(("size", "drifts"), [(0.05, False), (0.02, True)])
def test_kl_that_float_noise_explains_is_no_drift(size: float, drifts: bool) -> None:
    ours = TRAINED + noise(2, 0.05)

    def compare_with_noise() -> Verification:
        noisy = lambda seed: lambda _: TRAINED + noise(10 + seed, size)  # noqa: E731
        return verify([None], lambda _: ours, lambda _: TRAINED, lambda _: PLAIN, "aoti", noisy)

    if drifts:
        with pytest.raises(DriftError, match=r"more than 0.1 of KL.*, and than 2.0 times what noise of 1e-06 does"):
            compare_with_noise()
    else:
        result = compare_with_noise()
        assert KL_FRACTION * result.kl_plain < result.kl_trained < 2 * result.kl_noise


@pytest.mark.parametrize(("size", "drifts"), [(0.08, False), (0.03, True)])
def test_an_error_that_float_noise_explains_is_no_drift(size: float, drifts: bool) -> None:
    trained = noise(0, shape=(POSITIONS, 1))
    ours, plain = trained + noise(2, 0.1, (POSITIONS, 1)), trained + noise(1, 0.1, (POSITIONS, 1))

    def compare_with_noise() -> Verification:
        noisy = lambda seed: lambda _: trained + noise(10 + seed, size, (POSITIONS, 1))  # noqa: E731
        return verify([None], lambda _: ours, lambda _: trained, lambda _: plain, "aoti", noisy)

    if drifts:
        with pytest.raises(DriftError, match=r"of its error against the float model\), noise of 1e-06 in the trained"):
            compare_with_noise()
    else:
        result = compare_with_noise()
        assert ERROR_FRACTION * result.error_plain < result.error_trained < 2 * result.error_noise


def test_noise_is_relative_in_vectors_only_and_leaves_the_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    before = copy.deepcopy(model.state_dict())
    noisy = with_noise(model, 0)
    assert torch.equal(noisy[0].weight, model[0].weight)
    assert 0 < ((noisy[1].weight - model[1].weight) / model[1].weight).abs().max() < 6 * NOISE
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(with_noise(model, 0)[0].bias, noisy[0].bias)
    assert not torch.equal(with_noise(model, 1)[0].bias, noisy[0].bias)


def test_a_single_other_prediction_over_the_margin_is_drift() -> None:
    ours = TRAINED.clone()
    best, second = TRAINED[-1].topk(2).indices
    assert TRAINED[-1, best] - TRAINED[-1, second] > 0.2, "over the margin"
    ours[-1, second] = TRAINED[-1, best] + 0.01
    plain = TRAINED + noise(1, 0.1) + noise(3, 2.0) * (torch.arange(POSITIONS) > POSITIONS // 2)[:, None]
    with pytest.raises(DriftError, match=r"predicts otherwise than the trained model at \d\.\d% of the positions"):
        compare(ours, TRAINED, plain)


def test_other_predictions_below_the_margin_are_counted_and_pass() -> None:
    trained, plain = TRAINED.clone(), PLAIN.clone()
    trained[POSITIONS // 2 :] = 0.0
    ours = trained + noise(2, 1e-3)
    plain[POSITIONS // 2 :] = noise(4, 0.1)[POSITIONS // 2 :]
    result = compare(ours, trained, plain)
    assert result.agreement < 0.2 and result.agreement_over_margin == 1.0


# --- other outputs ----------------------------------------------------------------------------------------------------


def test_a_regression_is_held_to_its_relative_error() -> None:
    """Of one output the softmax is 1 whatever it is, so KL would see no drift at all."""
    trained = noise(0, shape=(POSITIONS, 1))
    plain = trained + noise(1, 0.1, (POSITIONS, 1))
    result = compare(trained + noise(2, 0.02, (POSITIONS, 1)), trained, plain)
    assert result.kl_trained is None and result.error_trained < ERROR_FRACTION * result.error_plain
    with pytest.raises(DriftError, match="relative error"):
        compare(-trained, trained, plain)


@pytest.mark.parametrize(
    "plain", [None, {"logits": PLAIN, "box": noise(5) + noise(6, 0.1)}], ids=["float", "quantized"]
)
def test_outputs_beside_the_logits_count_too(plain: Any) -> None:
    box = noise(5)
    trained = {"logits": TRAINED, "box": box}
    compare({"logits": TRAINED, "box": box + 1e-5}, trained, plain)
    with pytest.raises(DriftError, match="relative error"):
        compare({"logits": TRAINED, "box": box + noise(7, 0.2)}, trained, plain)


def test_integers_are_compared_where_there_is_nothing_else() -> None:
    labels = torch.arange(10)
    compare(labels, labels, None)
    with pytest.raises(DriftError, match="relative error"):
        compare(labels.roll(1), labels, None)
    compare({"y": TRAINED[0], "best": labels}, {"y": TRAINED[0], "best": labels.roll(1)}, None)


def test_complex_outputs_are_compared_as_pairs() -> None:
    wave = torch.complex(noise(0), noise(1))
    compare((wave,), (wave,), None)
    with pytest.raises(DriftError):
        compare((wave.conj().resolve_conj(),), (wave,), None)


# --- float models -----------------------------------------------------------------------------------------------------


def test_a_float_program_may_differ_by_rounding_only() -> None:
    unit = TRAINED / TRAINED.norm() * noise(3).norm()
    assert compare(unit + noise(3, 0.5 * ROUNDING), unit, None).kl_trained is None
    with pytest.raises(DriftError, match=r"relative error 0\.002 of its outputs, float rounding explains 0\.001"):
        compare(unit + noise(3, 2 * ROUNDING), unit, None)


# --- NaN never passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("plain", [None, PLAIN], ids=["float", "quantized"])
def test_a_value_that_is_not_finite_is_drift_wherever_it_is(bad: float, plain: Tensor | None) -> None:
    broken = TRAINED.clone()
    broken[3, 3] = bad
    with pytest.raises(DriftError, match="NaN or infinite values on held-out inputs"):
        compare(broken, TRAINED, plain)
    with pytest.raises(DriftError):
        compare(TRAINED, broken, plain)


def test_several_batches_are_judged_together() -> None:
    outputs = [(TRAINED[:150], PLAIN[:150]), (TRAINED[150:], PLAIN[150:])]
    index = {id(t): n for n, (t, _) in enumerate(outputs)}
    inputs = [t for t, _ in outputs]
    result = verify(inputs, lambda x: x + 1e-4, lambda x: x, lambda x: outputs[index[id(x)]][1], "portable")
    assert result.positions == POSITIONS
    assert result.error_plain == pytest.approx(compare(TRAINED + 1e-4).error_plain, rel=1e-5)

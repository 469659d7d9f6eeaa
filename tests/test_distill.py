"""The distillation loss by hand, and the teacher as a guest."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor, nn

from lightning_accel import DistillConfig, distillation_loss
from lightning_accel.distill import combine, guest, logits_of


def kl_by_hand(teacher: list[float], student: list[float], temperature: float) -> float:
    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(v / temperature) for v in values]
        return [p / sum(powers) for p in powers]

    return sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student), strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_the_loss_is_t_squared_times_kl_by_hand(temperature: float) -> None:
    student, teacher = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    rows = [kl_by_hand(t, s, temperature) for t, s in zip(teacher, student, strict=True)]
    assert loss.item() == pytest.approx(temperature**2 * sum(rows) / 2, rel=1e-5)


def test_equal_logits_cost_nothing_and_constants_do_not_matter() -> None:
    logits = torch.randn(4, 7)
    assert distillation_loss(logits, logits, 3.0).item() == 0.0
    assert distillation_loss(logits + 5.0, logits, 3.0).item() == pytest.approx(0.0, abs=1e-5)


def test_the_gradient_is_t_times_the_difference_of_the_softened_probabilities() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, dtype=torch.float32, requires_grad=True), torch.randn(6, 5)
    for temperature in (1.0, 4.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / 6
        assert torch.allclose(gradient, expected, atol=1e-6)


def test_the_scale_of_the_gradient_hardly_depends_on_a_high_temperature() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 50, requires_grad=True), torch.randn(64, 50)
    norms = []
    for temperature in (10.0, 20.0, 40.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        norms.append(gradient.norm().item())
    assert norms == pytest.approx([norms[0]] * 3, rel=0.05)


def test_masked_positions_do_not_count() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    kept = distillation_loss(student[mask.bool()], teacher[mask.bool()], 2.0)
    student[~mask.bool()] = 1e3
    assert torch.allclose(distillation_loss(student, teacher, 2.0, mask), kept, rtol=1e-6)
    assert torch.allclose(distillation_loss(student, teacher, 2.0, mask.bool()), kept, rtol=1e-6)
    assert distillation_loss(student, teacher, 2.0, torch.zeros_like(mask)).item() == 0.0


def test_a_class_that_is_ruled_out_costs_nothing_and_nan_stays_nan() -> None:
    student = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.5, -math.inf]])
    loss = distillation_loss(student, teacher, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(4 * kl_by_hand([0.0, 1.5], [1.0, 2.0], 2.0), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad[0, 2] == 0.0
    assert distillation_loss(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan()


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = torch.randn(8, 30).bfloat16(), torch.randn(8, 30).bfloat16()
    loss = distillation_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), 2.0))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\); they need the same classes"):
        distillation_loss(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1\), the positions \(2, 3\)"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), mask=torch.ones(2, 1))


def test_alpha_weighs_the_two_losses() -> None:
    task, teacher = torch.tensor(2.0), torch.tensor(10.0)
    assert [combine(task, {"logits": teacher}, {"logits": a}).item() for a in (0.0, 0.25, 1.0)] == [2.0, 4.0, 10.0]
    terms = {"logits": teacher, "hidden": torch.tensor(3.0)}
    assert combine(task, terms, {"logits": 0.25, "hidden": 2.0}).item() == 0.75 * 2 + 0.25 * 10 + 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": math.nan}, "must be positive"),
        ({"alpha": 1.1}, r"outside \[0, 1\]"),
        ({"alpha": -0.1}, r"outside \[0, 1\]"),
    ],
)
def test_a_bad_configuration_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**options)


def test_logits_are_found_in_what_models_put_out() -> None:
    logits, model = torch.randn(2, 3), tiny.bert()
    assert logits_of(logits) is logits and logits_of({"logits": logits, "loss": None}) is logits
    output = model(tiny.ids())
    assert logits_of(output) is output.logits
    for other in (None, torch.tensor([1, 2]), torch.randn(3), {"loss": logits}, (logits,), torch.zeros(2, 2).long()):
        assert logits_of(other) is None


def test_a_guest_is_in_eval_mode_without_gradients_and_leaves_as_it_came() -> None:
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    teacher[1].eval()
    before, running = [m.training for m in teacher.modules()], teacher[2].running_mean.clone()
    x: Tensor = torch.randn(3, 4, requires_grad=True)
    with guest(teacher) as inside:
        assert not any(m.training for m in inside.modules())
        y = inside(x)
    assert not y.requires_grad and torch.equal(teacher[2].running_mean, running)
    assert [m.training for m in teacher.modules()] == before and torch.is_grad_enabled()
    with pytest.raises(RuntimeError), guest(teacher):
        raise RuntimeError
    assert [m.training for m in teacher.modules()] == before

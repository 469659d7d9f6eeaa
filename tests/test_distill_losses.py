"""Each loss by hand, on plain floats; masks, truncation, infinities; and the configuration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_accel import (
    Between,
    Constant,
    DistillConfig,
    Linear,
    attention_loss,
    distillation_loss,
    hidden_loss,
)
from lightning_accel.distill import TopK, combine, label_mask, top_k_of

STUDENT, TEACHER = [1.0, -2.0, 0.5, 0.1], [2.0, 0.0, -1.0, 0.3]


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def by_hand(loss: str, temperature: float) -> float:
    p, q = softmax(STUDENT, temperature), softmax(TEACHER, temperature)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    if loss == "mse":
        return sum((a - b) ** 2 for a, b in zip(STUDENT, TEACHER, strict=True)) / 4
    values = {"kl": kl(q, p), "reverse-kl": kl(p, q), "js": kl(q, m) / 2 + kl(p, m) / 2}
    return temperature**2 * values[loss]


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "js", "mse"])
def test_each_loss_is_its_formula(loss, temperature):
    found = distillation_loss(torch.tensor([STUDENT]), torch.tensor([TEACHER]), temperature, loss=loss)
    assert found.item() == pytest.approx(by_hand(loss, temperature), rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "js", "mse"])
def test_equal_logits_cost_nothing_and_have_no_gradient(loss):
    student = logits(0, 5, 7).requires_grad_()
    found = distillation_loss(student, student.detach(), 2.0, loss=loss)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == pytest.approx(0.0, abs=1e-6) and gradient.abs().max() < 1e-6


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


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = torch.randn(8, 30).bfloat16(), torch.randn(8, 30).bfloat16()
    loss = distillation_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), 2.0))


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    one, other = logits(1, 20, 9), logits(2, 20, 9)
    both = [distillation_loss(a, b, loss="js").item() for a, b in ((one, other), (other, one))]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    apart = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert distillation_loss(*apart, loss="js").item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "js", "mse"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_masked_positions_may_hold_anything(loss, top_k):
    if loss == "mse" and top_k:
        return
    student, teacher = logits(3, 2, 5, 9), logits(4, 2, 5, 9)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 0, 0]]).bool()
    expected = distillation_loss(student[mask], teacher[mask], 2.0, loss=loss, top_k=top_k)
    teacher[~mask], student[~mask] = math.nan, math.inf
    student.requires_grad_()
    found = distillation_loss(student, teacher, 2.0, mask, loss, top_k)
    found.backward()
    assert torch.equal(found, expected) and student.grad.isfinite().all()
    assert not student.grad[~mask].any()
    assert distillation_loss(student, teacher, 2.0, torch.zeros_like(mask), loss, top_k).item() == 0.0


def test_labels_of_minus_100_do_not_count_and_a_causal_model_predicts_the_next_one():
    labels = torch.tensor([[-100, 5, 6, -100], [1, -100, 2, 3]])
    assert label_mask(labels).tolist() == [[False, True, True, False], [True, False, True, True]]
    assert label_mask(labels, causal=True).tolist() == [[True, True, False, False], [False, True, True, False]]
    assert label_mask(torch.tensor([3, -100])).tolist() == [True, False]


# --- truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "js"])
def test_truncation_compares_the_top_k_and_the_rest_as_one_class(loss):
    p, q = softmax(STUDENT, 2.0), softmax(TEACHER, 2.0)
    kept = [0, 3]  # the teacher's likeliest two
    p, q = ([x[i] for i in kept] + [sum(x) - sum(x[i] for i in kept)] for x in (p, q))
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = {"kl": kl(q, p), "reverse-kl": kl(p, q), "js": kl(q, m) / 2 + kl(p, m) / 2}[loss]
    found = distillation_loss(torch.tensor([STUDENT]), torch.tensor([TEACHER]), 2.0, loss=loss, top_k=2)
    assert found.item() == pytest.approx(4 * expected, rel=1e-5)


def test_the_truncated_divergence_rises_with_k_to_the_whole_one():
    student, teacher = logits(5, 30, 50), logits(6, 30, 50)
    found = [distillation_loss(student, teacher, 2.0, top_k=k).item() for k in (1, 4, 16, 49)]
    whole = distillation_loss(student, teacher, 2.0).item()
    assert found == sorted(found) and found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-5)
    assert distillation_loss(student, teacher, 2.0, top_k=500).item() == pytest.approx(whole, rel=1e-5)


def test_the_tail_holds_the_mass_that_the_top_k_leave():
    kept = top_k_of(logits(7, 4, 6, 40), 8, 3.0)
    assert kept.values.shape == kept.indices.shape == (4, 6, 8) and kept.tail.shape == (4, 6)
    mass = kept.values.exp().sum(-1) + kept.tail.exp()
    assert torch.allclose(mass, torch.ones(4, 6), atol=1e-5)
    everything = top_k_of(logits(7, 4, 6, 40), 40)
    assert everything.tail.isneginf().all() and (kept.classes, kept.temperature) == (40, 3.0)


def test_a_truncated_teacher_gives_bitwise_the_loss_and_gradient_of_the_whole_one_with_top_k():
    student, teacher = logits(8, 4, 6, 40).requires_grad_(), logits(9, 4, 6, 40)
    losses = [distillation_loss(student, t, 2.0, top_k=5) for t in (teacher, top_k_of(teacher, 5, 2.0))]
    gradients = [torch.autograd.grad(one, student)[0] for one in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)


def test_the_gradient_of_a_truncation_pushes_the_rest_as_one():
    """d/dz of KL(q, p) is p_j - q_j on the top k, and p_j (P - Q) / P on the rest, of masses P and Q."""
    student = torch.tensor([STUDENT], requires_grad=True)
    (gradient,) = torch.autograd.grad(distillation_loss(student, torch.tensor([TEACHER]), top_k=2), student)
    p, q = softmax(STUDENT), softmax(TEACHER)
    rest = p[1] + p[2], q[1] + q[2]
    expected = [p[0] - q[0], *(p[i] * (rest[0] - rest[1]) / rest[0] for i in (1, 2)), p[3] - q[3]]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-6)


# --- classes drawn from the rest --------------------------------------------------------------------------------------


def draw(teacher: Tensor, k: int, drawn: int, temperature: float = 1.0, seed: int = 0) -> TopK:
    return top_k_of(teacher, k, temperature, drawn, torch.Generator().manual_seed(seed))


def test_the_mean_over_draws_is_the_divergence_of_all_classes_and_its_gradient():
    """Within five standard errors, of 20,000 draws of four classes; their mass alone is far from both."""
    n, student, teacher = 20_000, logits(5, 12).requires_grad_(), logits(6, 12)
    whole = distillation_loss(student[None], teacher[None], 2.0)
    (expected,) = torch.autograd.grad(whole, student)
    rows = student.detach().repeat(n, 1).requires_grad_()
    kept = draw(teacher.repeat(n, 1), 2, 4, 2.0)
    each = torch.stack([distillation_loss(rows[i : i + 1], TopK(kept.values[i : i + 1], kept.indices[i : i + 1],
                        kept.tail[i : i + 1], 12, 2.0, 4), 2.0) for i in range(500)])  # fmt: skip
    assert abs(each.mean() - whole) < 5 * each.std() / 500**0.5 and each.std() > 0
    (gradients,) = torch.autograd.grad(distillation_loss(rows, kept, 2.0), rows)
    gradients = n * gradients
    error = gradients.std(0) / n**0.5 + 1e-6  # those of the likeliest are exact but for rounding
    assert ((gradients.mean(0) - expected).abs() < 5 * error).all()
    (truncated,) = torch.autograd.grad(distillation_loss(student[None], teacher[None], 2.0, top_k=2), student)
    assert ((truncated - expected).abs() > 50 * error).any()


def test_a_draw_from_one_class_is_that_class():
    student, teacher = logits(7, 6, 5).requires_grad_(), logits(8, 6, 5)
    losses = [distillation_loss(student, t, 3.0) for t in (teacher, draw(teacher, 4, 3, 3.0))]
    gradients = [torch.autograd.grad(one, student)[0] for one in losses]
    assert torch.allclose(*losses, rtol=1e-5) and torch.allclose(*gradients, atol=1e-6)


def test_draws_are_of_the_rest_as_often_as_they_are_likely_and_where_there_is_none_nothing_is_drawn():
    teacher = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    kept = draw(teacher.expand(1000, 5), 2, 8)
    assert kept.values.shape == kept.indices.shape == (1000, 10) and kept.drawn == 8
    drawn = kept.indices[:, 2:]
    assert set(drawn.unique().tolist()) == {2, 3}
    assert (drawn == 2).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.allclose(kept.values[:, 2:].exp(), teacher.exp()[drawn])
    assert (everything := draw(teacher[None], 5, 8)).drawn == 0 and everything.values.shape == (1, 5)
    ruled_out = torch.tensor([[1.0, 0.0, -math.inf, -math.inf]])
    student = torch.tensor([[0.3, 0.1, 0.2, -math.inf]], requires_grad=True)
    loss = distillation_loss(student, draw(ruled_out, 2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(distillation_loss(student, ruled_out).item(), rel=1e-6)
    assert student.grad.isfinite().all()


def test_masked_positions_of_draws_may_hold_anything():
    student, teacher = logits(3, 2, 5, 9), logits(4, 2, 5, 9)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 0, 0]]).bool()
    kept = draw(teacher, 3, 2)
    alone = kept._replace(values=kept.values[mask], indices=kept.indices[mask], tail=kept.tail[mask])
    assert torch.equal(distillation_loss(student, kept, mask=mask), distillation_loss(student[mask], alone))


def test_draws_belong_to_one_temperature_and_to_kl():
    kept = draw(torch.zeros(2, 5), 2, 2, 2.0)
    with pytest.raises(ValueError, match=r"the teacher's top 2 were softened at temperature 2\.0, the loss at 1\.0"):
        distillation_loss(torch.zeros(2, 5), kept)
    for loss in ("js", "reverse-kl"):
        with pytest.raises(ValueError, match=f"that of loss='kl', not of '{loss}'"):
            distillation_loss(torch.zeros(2, 5), kept, 2.0, loss=loss)
    with pytest.raises(ValueError, match="student rules out a class"):
        distillation_loss(torch.tensor([[0.0, -math.inf]]), draw(torch.zeros(1, 2), 1, 1))


# --- infinities and NaN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "js"])
@pytest.mark.parametrize("top_k", [None, 2, 3, 4])
def test_a_class_that_both_rule_out_costs_nothing(loss, top_k):
    student = torch.tensor([[*STUDENT[:3], -math.inf]], requires_grad=True)
    teacher = torch.tensor([[*TEACHER[:3], -math.inf]])
    found = distillation_loss(student, teacher, 2.0, loss=loss, top_k=top_k)
    found.backward()
    alone = distillation_loss(student[:, :3], teacher[:, :3], 2.0, loss=loss, top_k=top_k)
    assert found.item() == pytest.approx(alone.item(), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad[0, 3] == 0.0


def test_what_one_alone_rules_out_is_an_error_where_the_divergence_is_infinite():
    open_, shut = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, -math.inf]])
    with pytest.raises(ValueError, match=r"student rules out a class .* loss='kl' is infinite; .*loss='js'"):
        distillation_loss(shut, open_)
    with pytest.raises(ValueError, match=r"teacher rules out a class .* loss='reverse-kl' is infinite"):
        distillation_loss(open_, shut, loss="reverse-kl")
    with pytest.raises(ValueError, match="the distance is infinite; write loss='js'"):
        distillation_loss(open_, shut, loss="mse")
    unlikely = torch.tensor([[0.0, 1.0, -22.0]])  # of probability 3e-10: times the least float it is no large number
    with pytest.raises(ValueError, match="student rules out a class"):
        distillation_loss(shut, unlikely)
    with pytest.raises(ValueError, match="teacher rules out a class"):
        distillation_loss(unlikely, shut, loss="reverse-kl")
    p, q = softmax([0.0, 1.0, 2.0]), [*softmax([0.0, 1.0]), 0.0]
    assert distillation_loss(open_, shut).item() == pytest.approx(kl(q, p), rel=1e-5)
    assert distillation_loss(shut, open_, loss="js").isfinite()


@pytest.mark.parametrize("loss", ["kl", "js", "mse"])
@pytest.mark.parametrize(("bad", "said"), [(math.nan, "1 NaN, 0"), (math.inf, "0 NaN, 1")])
def test_a_teacher_with_nan_or_infinite_logits_is_an_error(loss, bad, said):
    teacher = torch.tensor([TEACHER, [0.0, bad, 0.0, 0.0]])
    with pytest.raises(ValueError, match=rf"teacher's logits are not finite: {said} \+inf of 8.*float16 overflows"):
        distillation_loss(torch.zeros(2, 4), teacher, loss=loss)
    with pytest.raises(ValueError, match="1 positions with every class at -inf"):
        distillation_loss(torch.zeros(1, 2), torch.full((1, 2), -math.inf), loss=loss)


def test_a_students_nan_stays_nan_so_that_a_scaler_can_skip_the_step():
    assert distillation_loss(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan()


def test_one_class_has_no_distribution_and_is_a_regression():
    with pytest.raises(ValueError, match=r"logits of one class .* DistillConfig\(loss='mse'\)"):
        distillation_loss(torch.zeros(3, 1), torch.ones(3, 1))
    assert distillation_loss(torch.zeros(3, 1), torch.full((3, 1), 2.0), loss="mse").item() == 4.0


def test_other_vocabularies_and_other_lengths_are_told_apart_with_the_way_out():
    with pytest.raises(ValueError, match=r"there are 5 and 6\. Between vocabularies .*pseudo_labels\(teacher, batches"):
        distillation_loss(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and \(2, 4, 5\).*the same tokenizer.*pseudo_labels"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"softened at temperature 2\.0, the loss at 1\.0"):
        distillation_loss(torch.zeros(2, 5), top_k_of(torch.zeros(2, 5), 2, 2.0))
    with pytest.raises(ValueError, match="a truncated teacher has no logits"):
        distillation_loss(torch.zeros(2, 5), top_k_of(torch.zeros(2, 5), 2), loss="mse")
    with pytest.raises(ValueError, match="loss='l1' is unknown"):
        distillation_loss(torch.zeros(2, 5), torch.zeros(2, 5), loss="l1")
    assert TopK._fields == ("values", "indices", "tail", "classes", "temperature", "drawn")


# --- hidden states and attention maps -------------------------------------------------------------------------------


def test_a_mask_of_another_shape_than_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1\), the positions \(2, 3\)"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), mask=torch.ones(2, 1))


def test_hidden_losses_are_their_formulas():
    s, t = [[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [0.0, 2.0]]
    student, teacher = torch.tensor(s), torch.tensor(t)
    assert hidden_loss(student, teacher).item() == pytest.approx(((1 - 24 / 25) + 1) / 2)
    assert hidden_loss(student, teacher, loss="mse").item() == pytest.approx((1 + 1 + 1 + 4) / 4)
    assert hidden_loss(student, teacher, loss="normalized-mse").item() == pytest.approx(7 / (16 + 9 + 4))
    assert hidden_loss(torch.zeros(2, 2), teacher, loss="normalized-mse").item() == 1.0
    assert hidden_loss(5 * teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", ["cosine", "mse", "normalized-mse"])
def test_masked_states_may_hold_anything(loss):
    student, teacher = logits(1, 2, 3, 8), logits(2, 2, 3, 8)
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    expected = hidden_loss(student[mask.bool()], teacher[mask.bool()], loss=loss)
    teacher[~mask.bool()] = math.nan
    assert torch.equal(hidden_loss(student, teacher, mask, loss), expected)
    assert hidden_loss(student, teacher, torch.zeros(2, 3), loss).item() == 0.0
    with pytest.raises(ValueError, match="teacher's hidden states are not finite"):
        hidden_loss(student, teacher, loss=loss)


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 8\)"):
        hidden_loss(torch.zeros(2, 4), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="hidden_loss='l1' is unknown"):
        hidden_loss(torch.zeros(2, 4), torch.zeros(2, 4), loss="l1")
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        hidden_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(3))


def test_attention_maps_are_compared_a_row_at_a_time():
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [1.0, 0.0]]]])
    teacher = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]]])
    assert attention_loss(student, teacher).item() == pytest.approx((0.5 + 0 + 0 + 2) / 4)
    assert attention_loss(student, teacher, torch.tensor([[1, 0]])).item() == pytest.approx((0.5 + 0) / 2)
    padded = [torch.nn.functional.pad(x, (0, 3)) for x in (student, teacher)]  # keys without attention
    assert attention_loss(*padded).item() == attention_loss(student, teacher).item()
    one = teacher.mean(1, keepdim=True)
    assert attention_loss(student, one).item() == attention_loss(student.mean(1, keepdim=True), one).item()
    with pytest.raises(ValueError, match="attention maps of student and teacher differ"):
        attention_loss(student, teacher[..., :1])


# --- the configuration ----------------------------------------------------------------------------------------------


def test_alpha_weighs_the_two_losses() -> None:
    task, teacher = torch.tensor(2.0), torch.tensor(10.0)
    assert [combine(task, {"logits": teacher}, {"logits": a}).item() for a in (0.0, 0.25, 1.0)] == [2.0, 4.0, 10.0]
    terms = {"logits": teacher, "hidden": torch.tensor(3.0)}
    assert combine(task, terms, {"logits": 0.25, "hidden": 2.0}).item() == 0.75 * 2 + 0.25 * 10 + 2 * 3


def test_weights_are_numbers_or_follow_progress():
    config = DistillConfig(
        alpha=Between(0.9, 0.1, Linear(0.0, 0.5)),
        hidden="uniform",
        hidden_weight=Linear(20, 60),
        attention="last",
        attention_weight=Between(0.0, 4.0, Constant(0.5)),
    )
    found = {step: config.weights(step, 100) for step in (0, 25, 40, 100)}
    assert found[0] == {"logits": 0.9, "hidden": 0.0, "attention": 0.0}
    assert found[25] == pytest.approx({"logits": 0.5, "hidden": 0.125, "attention": 0.0})
    assert found[100] == pytest.approx({"logits": 0.1, "hidden": 1.0, "attention": 4.0})
    assert len(config.scheduled) == 3
    assert DistillConfig().weights(0, 1) == {"logits": 0.5, "hidden": 0.0, "attention": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ce"}, r"loss='ce' is unknown; write one of \('kl', 'reverse-kl', 'js', 'mse'\)"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1' is unknown"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": math.nan}, "must be positive"),
        ({"alpha": 1.1}, r"outside \[0, 1\]"),
        ({"alpha": -0.1}, r"outside \[0, 1\]"),
        ({"temperature": float("inf")}, "temperature=inf must be positive and finite; write temperature=2.0"),
        ({"temperature": "2"}, "temperature='2' must be positive and finite"),
        ({"hidden_weight": 3.0}, "hidden_weight=3.0 weighs nothing without hidden; write hidden='uniform' too"),
        ({"top_k": 2.5}, "top_k=2.5 must be at least 1 class"),
        ({"top_k": 0}, "top_k=0 must be at least 1 class; write top_k=32"),
        ({"top_k": 8, "loss": "mse"}, "write top_k=None, or loss='kl'"),
        ({"top_k": 8, "drawn": -1}, "drawn=-1 is no number of classes; write drawn=16"),
        ({"drawn": 8}, r"write DistillConfig\(loss='kl', top_k=16, drawn=8\)"),
        ({"top_k": 8, "drawn": 8, "loss": "js"}, r"write DistillConfig\(loss='kl', top_k=16, drawn=8\)"),
        ({"hidden": "all"}, r"write hidden=\{'student\.layer': 'teacher\.layer'\}, hidden='uniform' or hidden='last'"),
        ({"hidden": {}}, "names no layers"),
        ({"attention": {"a": 1}}, "attention=.* names no layers"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must be at least 0"),
        ({"alpha": Between(0.5, 1.5)}, r"outside \[0, 1\]"),
        ({"alpha": "half"}, r"alpha='half' is no weight; write alpha=0\.5 or alpha=Linear\(0\.0, 0\.5\)"),
    ],
)
def test_a_bad_configuration_is_refused_when_it_is_written(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**options)


def test_between_refuses_what_is_no_number_or_schedule():
    with pytest.raises(ValueError, match="is no number"):
        Between("a", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no Schedule"):
        Between(0.0, 1.0, 0.5)  # type: ignore[arg-type]
